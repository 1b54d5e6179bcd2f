"""Load windows of token ids from the shards of step 2 to the device.

    batches = Task.iter_batches(load_shards(folder, sha256), "train", batch_size=8, max_seq_len=256)
    x, y = next(batches)                        # each (8, 256); y is x shifted by one token

The training order depends on (seed, epoch, position) alone: a run that resumes at a position sees the same
batches as an uninterrupted one, with any number of processes or loader workers.
"""
import os
import signal
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from itertools import count, islice

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tinyllm.device import to_device
from tinyllm.shards import ShardSet, document_starts

IGNORE_INDEX = -1               # marks targets that are not scored


@dataclass(eq=False, repr=False)
class PretokDataset(IterableDataset):
    """An endless stream of training batches, each of shape (batch_size, max_seq_len + 1), int64.

    Each document starts a new window, so the model sees documents from their first token, as it will generate them.
    A long document continues in further windows; a short document is followed by the next ones in the same window.
    IGNORE_INDEX fills windows at the end of a shard. Each epoch visits every window once, in a new random order.
    `position` is the number of windows to skip. Rank r of `world_size` takes every world_size-th batch, and its loader
    workers take turns.
    """
    shard_set: ShardSet
    split: str
    batch_size: int
    max_seq_len: int
    _: KW_ONLY
    seed: int = 0
    position: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        self.shards = self.shard_set.shards_of(self.split)
        self.window_starts = [find_windows(ids, self.max_seq_len)[0] for ids in self._shard_ids()]
        self.window_offsets = np.cumsum([0, *map(len, self.window_starts)])     # windows before each shard, and total
        self.n_windows = int(self.window_offsets[-1])                           # windows per epoch

    def _shard_ids(self) -> list[np.ndarray]:
        return [self.shard_set.memmap(shard) for shard in self.shards]

    def __iter__(self) -> Iterator[torch.Tensor]:
        shard_ids = self._shard_ids()
        for indices in self.batch_indices():
            windows = [self._window(shard_ids, index) for index in indices]
            yield torch.from_numpy(np.stack(windows))                           # (batch_size, max_seq_len + 1)

    def batch_indices(self) -> Iterator[list[int]]:
        """Yield the window indices of each batch, without end."""
        worker = get_worker_info()
        worker_id = worker.id if worker else 0
        num_workers = worker.num_workers if worker else 1
        first_batch = self.rank + worker_id * self.world_size
        permutation = lru_cache(1)(self._permutation)
        for batch in count(first_batch, num_workers * self.world_size):
            start = self.position + batch * self.batch_size
            positions = range(start, start + self.batch_size)
            yield [permutation(i // self.n_windows)[i % self.n_windows] for i in positions]

    def _permutation(self, epoch: int) -> np.ndarray:
        # numpy promises that the stream of RandomState will never change
        return np.random.RandomState([self.seed, epoch]).permutation(self.n_windows)

    def _window(self, shard_ids: list[np.ndarray], index: int) -> np.ndarray:
        shard = int(np.searchsorted(self.window_offsets, index, side="right")) - 1
        start = self.window_starts[shard][index - self.window_offsets[shard]]
        return _pad(shard_ids[shard][start:start + self.max_seq_len + 1], self.max_seq_len)


class Task:
    """Batches for training and evaluation. The names Task and iter_batches are from llama2.c."""

    @staticmethod
    def iter_batches(shard_set: ShardSet, split: str, batch_size: int, max_seq_len: int, *,
                     device: str | torch.device = "cpu", num_workers: int = 0,
                     **options) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield training batches (x, y) without end, each (batch_size, max_seq_len), int64, on the device.

        Args:
            num_workers: processes that prepare batches; 0: this process.
            options: seed, position, rank, world_size of `PretokDataset`.
        """
        dataset = PretokDataset(shard_set, split, batch_size, max_seq_len, **options)
        batches = DataLoader(dataset, batch_size=None, num_workers=num_workers, worker_init_fn=_start_worker,
                             multiprocessing_context="spawn" if num_workers else None,
                             generator=torch.Generator())       # otherwise it draws global random numbers
        for windows in batches:                                 # (batch_size, max_seq_len + 1)
            yield _inputs_and_targets(windows, torch.device(device))

    @staticmethod
    def iter_split(shard_set: ShardSet, split: str, batch_size: int, max_seq_len: int, *,
                  device: str | torch.device = "cpu", rank: int = 0, world_size: int = 1
                  ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield a split in order: every token of every document is a target once, with its window as context.

        A window holds one document; the targets after its end are IGNORE_INDEX. Rank r of `world_size` takes every
        world_size-th batch. All ranks yield the same number of batches: the last one may be a window without targets.
        """
        windows = _split_windows(shard_set, split, max_seq_len)
        while global_batch := list(islice(windows, world_size * batch_size)):
            batch = global_batch[rank * batch_size:(rank + 1) * batch_size]
            batch = batch or [np.full(max_seq_len + 1, IGNORE_INDEX)]
            yield _inputs_and_targets(torch.from_numpy(np.stack(batch)), torch.device(device))


def _inputs_and_targets(windows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    windows = to_device(windows, device)                       # (B, max_seq_len + 1)
    return windows[:, :-1].clamp(min=0), windows[:, 1:]         # 2 x (B, max_seq_len)


def _start_worker(worker_id: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # the main process handles Ctrl-C and ends the workers
    if hasattr(os, "setpgrp"):
        os.setpgrp()                                    # torchrun sends signals to the whole process group


def _split_windows(shard_set: ShardSet, split: str, max_seq_len: int) -> Iterator[np.ndarray]:
    for shard in shard_set.shards_of(split):
        ids = shard_set.memmap(shard)
        for start, stop in zip(*find_windows(ids, max_seq_len)):
            yield _pad(ids[start:min(stop, start + max_seq_len + 1)], max_seq_len)


def find_windows(ids: np.ndarray, max_seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the start of each window of a shard, and the end of its document (windows,)."""
    starts = document_starts(ids)                                                       # (documents,)
    stops = np.append(starts[1:], len(ids))[:len(starts)]                               # (documents,)
    counts = np.maximum(-(-(stops - starts - 1) // max_seq_len), 1)                     # windows of each document
    indices = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)     # 0, 1, ... in each document
    return np.repeat(starts, counts) + indices * max_seq_len, np.repeat(stops, counts)


def _pad(window: np.ndarray, max_seq_len: int) -> np.ndarray:
    window = window.astype(np.int64)
    return np.pad(window, (0, max_seq_len + 1 - len(window)), constant_values=IGNORE_INDEX)
