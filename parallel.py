"""Several processes as one, as torchrun starts them. Without torchrun there is one, and nothing here is used.

    torchrun --nproc_per_node=2 train.py            # two processes of this machine, a GPU for each if there are GPUs
"""
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from settings import UserError

PATIENCE = timedelta(minutes=10)        # for a process that is busy; one that is dead is noticed at once


@dataclass(frozen=True)
class World:
    """Which of how many processes this is: of all, and of those of this machine."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def first_says(self, values: list[float]) -> list[float]:
        """The values that the first process has, in all processes. What hangs on the clock must be the same in all."""
        if self.size == 1:
            return values
        told = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(told, 0)
        return told.tolist()

    def sum(self, values: list[float]) -> list[float]:
        """The sums of what the processes have."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()


def find_world() -> World:
    """What torchrun says in the environment."""
    return World(*(int(os.environ.get(name, default)) for name, default in
                   (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Be one of the processes, until the end of the block. Only the first one prints.

    Raises:
        UserError: when another process has ended.
    """
    world = find_world()
    if world.size == 1:
        yield world
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    shown = sys.stdout
    try:
        if world.rank:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
        yield world
    except RuntimeError as error:
        if "Connection closed" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise UserError(f"process {world.rank} of {world.size} stops, because another one has ended") from error
    finally:
        sys.stdout = shown
        dist.destroy_process_group()
