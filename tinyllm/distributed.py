"""Several processes that work as one, started by torchrun. In a single process, nothing here has an effect.

    torchrun --nproc_per_node=2 train.py --gradient_accumulation_steps 2    # two processes, each with a GPU if any

All ranks have the same weights and take the same steps. Each computes the gradients of its micro-batches; PyTorch's DDP
averages them. Rank 0 makes all decisions that depend on a clock, a signal or a file, and broadcasts them.
"""
import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor

from tinyllm import compat
from tinyllm.cli import UserError, kill_child_processes
from tinyllm.device import device_count

TIMEOUT = timedelta(minutes=10)         # for a busy rank; the others notice a dead rank at once
# parts of gloo's error messages
PEER_LOST_MESSAGES = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "Timed out")


@dataclass(frozen=True)
class DistributedContext:
    """This process's rank, the number of ranks, and this process's rank on its machine."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True in the process that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor, group: torch_dist.ProcessGroup | None = None) -> Tensor:
        """Return the sums over all ranks, in float64 on the CPU. Every rank must call it and waits for the others."""
        return self._all_reduce(values, torch_dist.ReduceOp.SUM, group)

    def max(self, *values: float) -> list[float]:
        """Return the largest of each value over all ranks."""
        return self._all_reduce(torch.tensor(values, dtype=torch.float64), torch_dist.ReduceOp.MAX).tolist()

    def broadcast_from_main(self, value: float) -> float:
        """Return the main process's value on all ranks."""
        return self.sum(torch.tensor(value if self.is_main else 0.0, dtype=torch.float64)).item()

    def _all_reduce(self, values: Tensor, operation: Any, group: torch_dist.ProcessGroup | None = None) -> Tensor:
        values = values.cpu().to(torch.float64, copy=True)      # Apple's GPU has no float64
        if self.world_size > 1:
            torch_dist.all_reduce(values, operation, group)
        return values

    @contextmanager
    def fail_together(self, group: torch_dist.ProcessGroup | None = None) -> Iterator[None]:
        """Run a block on all ranks. If it fails on some ranks, the lowest of them raises its error and the others exit.

        Collectives inside the block must come before anything that can fail on one rank alone.
        """
        if self.world_size == 1:
            yield
            return
        error = None
        try:
            yield
        except (UserError, OSError) as raised:
            error = raised
        has_failed = torch.zeros(self.world_size)
        has_failed[self.rank] = error is not None
        failed_ranks = self.sum(has_failed, group).nonzero()
        if len(failed_ranks) and failed_ranks[0] == self.rank:
            raise error
        if len(failed_ranks):
            sys.exit(1)

    @property
    def was_restarted(self) -> bool:
        """True if torchrun has restarted the processes after one of them died."""
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0

    @property
    def launch_command(self) -> str:
        """Command that started this script: `python`, or `torchrun` with the number of processes."""
        n_local = os.environ.get("LOCAL_WORLD_SIZE", self.world_size)
        return "python" if self.world_size == 1 else f"torchrun --nproc_per_node={n_local}"

    def seed(self, seed: int, step: int) -> None:
        """Seed each rank and step differently, so that a resumed run draws the same random numbers."""
        if self.world_size > 1:
            sequence = np.random.SeedSequence((seed, step, self.rank))
            torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def device(self, name: str) -> str:
        """Return this rank's device for the setting `device`. Raises UserError for fewer GPUs than processes."""
        if self.world_size == 1 or name == "cpu":
            return name
        n_gpus = device_count("cuda")
        if name == "auto" and not n_gpus:
            return "cpu" if device_count("mps") else "auto"     # an Apple GPU cannot be shared
        if name not in ("auto", "cuda") or self.local_rank >= n_gpus:
            raise UserError(f"--device {name}: {n_gpus} GPUs are not enough for the processes on this machine\n"
                            f"       use --device auto and torchrun --nproc_per_node={max(n_gpus, 1)}, or --device cpu")
        return f"cuda:{self.local_rank}"


SINGLE_PROCESS = DistributedContext()


def from_env() -> DistributedContext:
    """Return the ranks that torchrun sets in the environment."""
    return DistributedContext(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)),
                              int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def distributed_context() -> Iterator[DistributedContext]:
    """Join the other processes for the block. Only the main process prints.

    Raises UserError if another process has ended. Does not destroy the process group, because that could wait for it.
    """
    ranks = from_env()
    if ranks.world_size == 1:
        yield ranks
        return
    try:
        init_process_group(ranks)
        with open(os.devnull, "w", encoding="utf-8") as devnull:
            with redirect_stdout(sys.stdout if ranks.is_main else devnull):
                yield ranks
        atexit.register(hard_exit, 0)
    except (SystemExit, UserError, OSError) as end:
        atexit.register(hard_exit, getattr(end, "code", 1) or 0)
        raise
    except RuntimeError as error:
        if not isinstance(error, torch_dist.DistError) and not any(text in str(error) for text in PEER_LOST_MESSAGES):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)       # torchrun will send it; print the message first
        atexit.register(hard_exit, 1)
        raise UserError(f"process {ranks.rank} of {ranks.world_size} exits: another one has ended or hangs\n"
                        "       the last checkpoint is intact; the same command resumes from it") from error


def init_process_group(ranks: DistributedContext) -> None:
    """Connect to the other ranks: CPU tensors go through gloo, GPU tensors through NCCL."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, *_ = next(torch_dist.rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store outlives a restart and keeps the addresses of dead processes: each start uses its own keys
        store = torch_dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    with compat.gloo_prints_to_stderr():
        torch_dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=ranks.rank,
                                      world_size=ranks.world_size)


def hard_exit(status: int) -> None:
    """End the process without shutting down gloo's threads, which aborted it in 2 of several hundred exits."""
    sys.stdout.flush()
    sys.stderr.flush()
    kill_child_processes()
    os._exit(status)
