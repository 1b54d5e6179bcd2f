"""Several processes as one, as torchrun starts them. Without torchrun there is one, and nothing here does anything.

    torchrun --nproc_per_node=2 train.py            # two processes of this machine, a GPU for each if there are GPUs

All have the same weights and take the same steps: each computes the gradients of its share of a step, PyTorch's DDP
takes their mean. What hangs on a clock, a signal or a file must be the same in all too, so the first one tells it.
"""
import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tinyllm.cli import UserError, end_children
from tinyllm.device import count

PATIENCE = timedelta(minutes=10)        # for a process that is busy; one that is dead is noticed at once
GONE = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "Timed out")   # of gloo's words

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Which of how many processes this is: of all, and of those of this machine."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """The sums of what the processes have, in float64 and on the CPU. No process goes on before all have come."""
        return self._over_all(values, dist.ReduceOp.SUM, group)

    def max(self, *values: float) -> list[float]:
        """The largest of what the processes have."""
        return self._over_all(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.MAX).tolist()

    def first_says(self, value: float) -> float:
        """The value that the first process has, in all processes."""
        return self.sum(torch.tensor(value if self.first else 0.0, dtype=torch.float64)).item()

    def _over_all(self, values: Tensor, how: dist.ReduceOp, group: dist.ProcessGroup | None = None) -> Tensor:
        values = values.cpu().to(torch.float64, copy=True)      # Apple's GPU knows no float64
        if self.size > 1:
            dist.all_reduce(values, how, group)
        return values

    def attempt(self, action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """Do something in all processes. Where it fails, all of them end, and one says why.

        group: of another patience than PATIENCE.
        Raises:
            UserError or OSError: what the first of those that failed raised; in the others SystemExit.
        """
        if self.size == 1:
            return action()
        result, problem = None, None
        try:
            result = action()
        except (UserError, OSError) as error:
            problem = error
        failed = self.sum(torch.eye(self.size)[self.rank] * bool(problem), group).tolist()
        if problem and failed.index(1) == self.rank:
            raise problem
        if any(failed):
            sys.exit(1)
        return result

    def first_does(self, action: Callable[[], Any]) -> None:
        """Do something in the first process, for all; where it fails, all end, as with `attempt`."""
        self.attempt(lambda: action() if self.first else None)

    @property
    def begun_again(self) -> bool:
        """Whether torchrun has started the processes again, after one had died."""
        return bool(self.max(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))[0])

    @property
    def command(self) -> str:
        """What starts a script as this one was started."""
        here = os.environ.get("LOCAL_WORLD_SIZE", self.size)
        return "python" if self.size == 1 else f"torchrun --nproc_per_node={here}"

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is trained: with several processes, the backward pass takes the mean of their gradients."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def keeping(self, wrapped: nn.Module, more: bool) -> AbstractContextManager:
        """While `more` micro-batches follow, a process keeps its gradients to itself: one exchange for each step.

        Not where the model is divided (extras/fsdp.py), for whole gradients would not fit.
        """
        return wrapped.no_sync() if more and isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def seed(self, seed: int, step: int) -> None:
        """Give each process and step random numbers of its own, so that a run which goes on has the same."""
        if self.size > 1:
            numbers = np.random.SeedSequence((seed, step, self.rank))
            torch.manual_seed(int(numbers.generate_state(1, np.uint64)[0]))

    def device(self, name: str) -> str:
        """The device for this process when the settings say `name`: of several GPUs its own.

        Raises:
            UserError: when there are fewer GPUs than processes.
        """
        if self.size == 1 or name == "cpu":
            return name
        gpus = count("cuda")
        if name == "auto" and not gpus:
            return "cpu" if count("mps") else "auto"        # an Apple GPU cannot be shared
        if name not in ("auto", "cuda") or self.local_rank >= gpus:
            here = os.environ.get("LOCAL_WORLD_SIZE", self.size)
            raise UserError(f"--device {name} is not enough for {here} processes, this machine has {gpus} GPUs\n"
                            f"       use --device auto and torchrun --nproc_per_node={max(gpus, 1)}, or --device cpu")
        return f"cuda:{self.local_rank}"


ALONE = World()


def find_world() -> World:
    """What torchrun says in the environment."""
    return World(*(int(os.environ.get(name, default)) for name, default in
                   (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))


def join(world: World) -> None:
    """Find the other processes: messages between CPUs go through gloo, between GPUs through NCCL."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, *_ = next(dist.rendezvous("env://", timeout=PATIENCE))
    if keeps_store():
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=world.rank, world_size=world.size)


def keeps_store() -> bool:
    """Whether torchrun still has the addresses of the dead when it starts the processes again, as in PyTorch 2.13.

    On one machine the number of the start tells them apart; several machines do not count alike.
    """
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def check_restarts(world: World) -> None:
    """Raise UserError, in the first process, when torchrun was told to restart what could not meet again."""
    restarts, machines = (int(os.environ.get(name, 0)) for name in ("TORCHELASTIC_MAX_RESTARTS", "GROUP_WORLD_SIZE"))
    if restarts and machines > 1 and keeps_store():
        if not world.first:
            raise SystemExit(1)             # one message is enough
        raise UserError("--max_restarts on several machines needs this in front of torchrun, on each of them:\n"
                        "       TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun ...")


@contextmanager
def joined() -> Iterator[World]:
    """Be one of the processes, until the end of the block. Only the first one prints.

    The group is left as it is: taking leave of a process that is dead could last.

    Raises:
        UserError: when another process has ended, or torchrun's own settings do not fit together.
    """
    world = find_world()
    if world.size == 1:
        yield world
        return
    check_restarts(world)
    try:
        join(world)
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            with redirect_stdout(sys.stdout if world.first else nowhere):
                yield world
        atexit.register(leave, 0)
    except (SystemExit, UserError, OSError) as end:
        # a reader of the output who has seen enough is no failure
        atexit.register(leave, 0 if isinstance(end, BrokenPipeError) else getattr(end, "code", 1) or 0)
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in GONE):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)       # torchrun is about to send it, but why comes first
        atexit.register(leave, 1)
        raise UserError(f"process {world.rank} of {world.size} ends, because another one has ended or hangs; what was "
                        "saved stays, and the same command goes on with it") from error


def leave(status: int) -> None:
    """End the process when all is done. Tearing gloo's threads down ended in an abort twice, in hundreds of exits."""
    sys.stdout.flush()
    sys.stderr.flush()
    end_children()
    os._exit(status)
