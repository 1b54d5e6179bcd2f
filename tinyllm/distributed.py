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
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tinyllm.cli import UserError, kill_child_processes
from tinyllm.device import device_count

TIMEOUT = timedelta(minutes=10)        # for a process that is busy; one that is dead is noticed at once
PEER_LOST_MESSAGES = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "Timed out")   # of gloo's words

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """Which of how many processes this is: of all, and of those of this machine."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor, group: torch_dist.ProcessGroup | None = None) -> Tensor:
        """The sums of what the processes have, in float64 and on the CPU. No process goes on before all have come."""
        return self._all_reduce(values, torch_dist.ReduceOp.SUM, group)

    def max(self, *values: float) -> list[float]:
        """The largest of what the processes have."""
        return self._all_reduce(torch.tensor(values, dtype=torch.float64), torch_dist.ReduceOp.MAX).tolist()

    def broadcast_from_main(self, value: float) -> float:
        """The value that the first process has, in all processes."""
        return self.sum(torch.tensor(value if self.is_main else 0.0, dtype=torch.float64)).item()

    def _all_reduce(self, values: Tensor, how: torch_dist.ReduceOp, group: torch_dist.ProcessGroup | None = None) -> Tensor:
        values = values.cpu().to(torch.float64, copy=True)      # Apple's GPU knows no float64
        if self.size > 1:
            torch_dist.all_reduce(values, how, group)
        return values

    def all_or_none(self, action: Callable[[], T], group: torch_dist.ProcessGroup | None = None) -> T:
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

    def on_main(self, action: Callable[[], Any]) -> None:
        """Do something in the first process, for all; where it fails, all end, as with `attempt`."""
        self.all_or_none(lambda: action() if self.is_main else None)

    @property
    def was_restarted(self) -> bool:
        """Whether torchrun has started the processes again, after one had died."""
        return bool(self.max(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))[0])

    @property
    def launch_command(self) -> str:
        """What starts a script as this one was started."""
        here = os.environ.get("LOCAL_WORLD_SIZE", self.size)
        return "python" if self.size == 1 else f"torchrun --nproc_per_node={here}"

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is trained: with several processes, the backward pass takes the mean of their gradients."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def no_sync(self, wrapped: nn.Module, more: bool) -> AbstractContextManager:
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
        gpus = device_count("cuda")
        if name == "auto" and not gpus:
            return "cpu" if device_count("mps") else "auto"        # an Apple GPU cannot be shared
        if name not in ("auto", "cuda") or self.local_rank >= gpus:
            here = os.environ.get("LOCAL_WORLD_SIZE", self.size)
            raise UserError(f"--device {name} is not enough for {here} processes, this machine has {gpus} GPUs\n"
                            f"       use --device auto and torchrun --nproc_per_node={max(gpus, 1)}, or --device cpu")
        return f"cuda:{self.local_rank}"


SINGLE_PROCESS = DistributedContext()


def from_env() -> DistributedContext:
    """What torchrun says in the environment."""
    return DistributedContext(*(int(os.environ.get(name, default)) for name, default in
                   (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))


def init_process_group(dist: DistributedContext) -> None:
    """Find the other processes: messages between CPUs go through gloo, between GPUs through NCCL."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, *_ = next(torch_dist.rendezvous("env://", timeout=TIMEOUT))
    if agent_store_survives_restart():
        store = torch_dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    torch_dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=dist.rank, world_size=dist.size)


def agent_store_survives_restart() -> bool:
    """Whether torchrun still has the addresses of the dead when it starts the processes again, as in PyTorch 2.13.

    On one machine the number of the start tells them apart; several machines do not count alike.
    """
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def check_restarts(dist: DistributedContext) -> None:
    """Raise UserError, in the first process, when torchrun was told to restart what could not meet again."""
    restarts, machines = (int(os.environ.get(name, 0)) for name in ("TORCHELASTIC_MAX_RESTARTS", "GROUP_WORLD_SIZE"))
    if restarts and machines > 1 and agent_store_survives_restart():
        if not dist.is_main:
            raise SystemExit(1)             # one message is enough
        raise UserError("--max_restarts on several machines needs this in front of torchrun, on each of them:\n"
                        "       TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun ...")


@contextmanager
def distributed_context() -> Iterator[DistributedContext]:
    """Be one of the processes, until the end of the block. Only the first one prints.

    The group is left as it is: taking leave of a process that is dead could last.

    Raises:
        UserError: when another process has ended, or torchrun's own settings do not fit together.
    """
    dist = from_env()
    if dist.size == 1:
        yield dist
        return
    check_restarts(dist)
    try:
        init_process_group(dist)
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            with redirect_stdout(sys.stdout if dist.is_main else nowhere):
                yield dist
        atexit.register(hard_exit, 0)
    except (SystemExit, UserError, OSError) as end:
        # a reader of the output who has seen enough is no failure
        atexit.register(hard_exit, 0 if isinstance(end, BrokenPipeError) else getattr(end, "code", 1) or 0)
        raise
    except RuntimeError as error:
        if not isinstance(error, torch_dist.DistError) and not any(sign in str(error) for sign in PEER_LOST_MESSAGES):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)       # torchrun is about to send it, but why comes first
        atexit.register(hard_exit, 1)
        raise UserError(f"process {dist.rank} of {dist.size} ends, because another one has ended or hangs; what was "
                        "saved stays, and the same command goes on with it") from error


def hard_exit(status: int) -> None:
    """End the process when all is done. Tearing gloo's threads down ended in an abort twice, in hundreds of exits."""
    sys.stdout.flush()
    sys.stderr.flush()
    kill_child_processes()
    os._exit(status)
