"""Windows of token ids, from the shards of step 2 to the device.

    batches = Task.iter_batches(shards.load(folder, sha256), "train", batch_size=8, max_seq_len=256)
    x, y = next(batches)                        # each (8, 256); y is x one token later

Training order is a function of (seed, epoch, position) and of nothing else: a run that goes on at a
position sees what it would have seen, whatever the number of processes or loader workers.
"""
import os
import signal
from collections.abc import Iterator
from functools import lru_cache
from itertools import count, islice

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tinyllm.shards import ShardSet, document_starts

IGNORE_INDEX = -1     # a target that is not scored


class PretokDataset(IterableDataset):
    """An endless stream of training batches, each of shape (batch_size, max_seq_len + 1), int64.

    A window begins at each document, so that the model sees it as it will write it, from its first
    word; a longer document goes on in further windows, a shorter one is followed by its neighbours.
    Every epoch takes each window once, in a new order. Batches are numbered from `position` (counted
    in windows) on; rank r of `world_size` takes every world_size-th, and loader workers share a
    rank's batches in turn, so that together they yield the same batches in the same order as one
    process would. Where a shard ends in a window, IGNORE fills it.
    """

    def __init__(self, shard_set: ShardSet, split: str, batch_size: int, max_seq_len: int, *, seed: int = 0,
                 position: int = 0, rank: int = 0, world_size: int = 1):
        super().__init__()
        self.shard_set, self.shards = shard_set, shard_set.shards_of(split)
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        self.seed, self.position, self.rank, self.world_size = seed, position, rank, world_size
        self.window_starts = [_windows(shard_set.memmap(shard), max_seq_len)[0] for shard in self.shards]
        self.first_window = np.cumsum([0, *map(len, self.window_starts)])      # of each shard; the last entry is the sum
        self.n_windows = int(self.first_window[-1])                     # in an epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        ids = [self.shard_set.memmap(shard) for shard in self.shards]
        for numbers in self.batch_indices():
            yield torch.from_numpy(np.stack([self._window(ids, number) for number in numbers]))

    def batch_indices(self) -> Iterator[list[int]]:
        """Yield the numbers of the windows of each batch, without end."""
        worker = get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker else (0, 1)
        # RandomState, because numpy promises that its stream will never change
        order = lru_cache(1)(lambda epoch: np.random.RandomState([self.seed, epoch]).permutation(self.n_windows))
        for batch in count(self.rank + turn * self.world_size, turns * self.world_size):
            first = self.position + batch * self.batch_size
            yield [order(place // self.n_windows)[place % self.n_windows]
                   for place in range(first, first + self.batch_size)]

    def on_device(self, device: torch.device) -> Iterator[torch.Tensor]:
        """The same batches, cut on the device out of ids that all lie there: a step waits for no copy."""
        parts = [self.shard_set.memmap(shard) for shard in self.shards]
        offsets = np.cumsum([0, *map(len, parts)])
        signed = np.dtype(f"i{parts[0].itemsize}")              # indexing knows no unsigned integers
        ids = torch.empty(offsets[-1], dtype=getattr(torch, signed.name), device=device)
        for part, begin in zip(parts, offsets):
            ids[begin:begin + len(part)] = torch.from_numpy(np.array(part).view(signed))
        starts = np.concatenate([start + offset for start, offset in zip(self.window_starts, offsets)])
        stops = np.repeat(offsets[1:], [len(start) for start in self.window_starts])      # where the shard of each ends
        starts, stops = torch.from_numpy(starts).to(device), torch.from_numpy(stops).to(device)
        span = torch.arange(self.max_seq_len + 1, device=device)
        for numbers in self.batch_indices():
            numbers = _to_device(torch.tensor(numbers), device)
            places = starts[numbers, None] + span                                   # (batch_size, max_seq_len + 1)
            windows = ids[places.clamp(max=len(ids) - 1)].long() & (256 ** parts[0].itemsize - 1)
            yield windows.where(places < stops[numbers, None], IGNORE_INDEX)

    def _window(self, ids: list[np.ndarray], index: int) -> np.ndarray:
        shard = int(np.searchsorted(self.first_window, index, side="right")) - 1
        start = self.window_starts[shard][index - self.first_window[shard]]
        return _padded(ids[shard][start:start + self.max_seq_len + 1], self.max_seq_len)


class Task:
    """How training and evaluation get their batches on the device."""

    @staticmethod
    def iter_batches(shard_set: ShardSet, split: str, batch_size: int, max_seq_len: int, *,
                     device: str | torch.device = "cpu", num_workers: int = 0,
                     **options) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield training batches (x, y) without end, each (batch_size, max_seq_len), int64, on the device.

        Args:
            num_workers: processes that prepare batches; 0 prepares them here.
            options: seed, position, rank, world_size of `PretokDataset`.
        """
        dataset = PretokDataset(shard_set, split, batch_size, max_seq_len, **options)
        device = torch.device(device)
        if num_workers == 0 and fits_on_gpu(shard_set, split, device):
            batches = dataset.on_device(device)
        else:
            batches = DataLoader(dataset, batch_size=None, num_workers=num_workers,
                                 multiprocessing_context="spawn" if num_workers else None,
                                 worker_init_fn=_start_worker,
                                 generator=torch.Generator())   # else it would use up global random numbers
        for windows in batches:                                 # (batch_size, max_seq_len + 1)
            windows = _to_device(windows, device)
            yield windows[:, :-1].clamp(min=0), windows[:, 1:]

    @staticmethod
    def iter_split(shard_set: ShardSet, split: str, batch_size: int, max_seq_len: int, *,
                  device: str | torch.device = "cpu", rank: int = 0, world_size: int = 1
                  ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield a whole split in order: every token of every document once, after what its window has of it.

        No window holds two documents; the targets after the end of one are IGNORE. Rank r of `world_size` has every
        world_size-th batch; all have equally many, the last of some is a window of which nothing is scored.
        """
        rows = _rows(shard_set, split, max_seq_len)
        batches = iter(lambda: list(islice(rows, batch_size)), [])
        while turn := list(islice(batches, world_size)):
            batch = turn[rank] if rank < len(turn) else [np.full(max_seq_len + 1, IGNORE_INDEX)]
            windows = _to_device(torch.from_numpy(np.stack(batch)), torch.device(device))
            yield windows[:, :-1].clamp(min=0), windows[:, 1:]


def fits_on_gpu(shard_set: ShardSet, split: str, device: torch.device) -> bool:
    """Whether the ids of a split take less than a quarter of a GPU's free memory."""
    if device.type != "cuda":
        return False
    size = sum(shard_set.memmap(shard).nbytes for shard in shard_set.shards_of(split))
    return size < torch.cuda.mem_get_info(device)[0] / 4


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor to the device; to a GPU from pinned memory, so that nobody waits for the copy."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _start_worker(number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the main process, which ends the workers
    if hasattr(os, "setpgrp"):
        os.setpgrp()                                    # and so are torchrun's signals, to a whole group


def _rows(shard_set: ShardSet, split: str, max_seq_len: int) -> Iterator[np.ndarray]:
    for shard in shard_set.shards_of(split):
        ids = shard_set.memmap(shard)
        for start, stop in zip(*_windows(ids, max_seq_len)):
            yield _padded(ids[start:min(stop, start + max_seq_len + 1)], max_seq_len)


def _windows(ids: np.ndarray, max_seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the windows of a shard begin, and where the document of each ends."""
    begins = document_starts(ids)
    ends = np.append(begins[1:], len(ids))[:len(begins)]
    counts = np.maximum(-(-(ends - begins - 1) // max_seq_len), 1)                      # windows of each document
    number = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)      # 0, 1, ... in each
    return np.repeat(begins, counts) + number * max_seq_len, np.repeat(ends, counts)


def _padded(window: np.ndarray, max_seq_len: int) -> np.ndarray:
    window = window.astype(np.int64)
    return np.pad(window, (0, max_seq_len + 1 - len(window)), constant_values=IGNORE_INDEX)
