"""Windows: each once per epoch, in an order that is resumable, shared and repeatable."""
import os
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tinyllm.dataset import IGNORE_INDEX, PretokDataset, Task
from tinyllm.shards import Shard, ShardSet

DOCUMENTS = {"train": [[23, 5, 75], [9], [2], [11, 12, 35]], "val": [[23, 2], [11], []]}    # tokens, by shard
T = 10
BOS = 0


@pytest.mark.skipif(os.name == "nt", reason="Windows lets nobody replace a file that is mapped")
def test_open_shards_survive_replacement(numbers):
    before = [y for _, y in Task.iter_split(numbers, "val", 2, T)]
    for shard in numbers.shards:
        np.zeros(3, "<u2").tofile(fresh := numbers.folder / "new")
        os.replace(fresh, numbers.folder / shard.file)
    after = [y for _, y in Task.iter_split(numbers, "val", 2, T)]
    assert len(before) == len(after) and all(map(torch.equal, before, after))
    assert len(pickle.loads(pickle.dumps(numbers)).memmap(numbers.shards[0])) == 3


@pytest.fixture
def numbers(tmp_path) -> ShardSet:
    """Shards whose ids count up, except for the BOS of each document, so that ids show their position."""
    found, at = ShardSet(tmp_path, "", 1000, 0, []), 1
    for split, of_shards in DOCUMENTS.items():
        for i, lengths in enumerate(of_shards):
            ids = []
            for length in lengths:
                ids += [BOS, *range(at + 1, at + length)]
                at += length
            np.array(ids, "<u2").tofile(tmp_path / f"{split}_{i:04d}.bin")
            found.shards.append(Shard(f"{split}_{i:04d}.bin", "", split, [], len(lengths), len(ids), len(ids)))
    return found


def rows(dataset, batches: int) -> torch.Tensor:
    return torch.cat(list(islice(dataset, batches)))


def test_each_window_once_per_epoch(numbers):
    dataset = PretokDataset(numbers, "train", 3, T, seed=1)
    assert dataset.n_windows == (3 + 1 + 8) + 1 + 1 + (1 + 2 + 4)
    epochs = rows(dataset, 14).reshape(2, 21, T + 1)
    wanted = []
    for shard in numbers.shards_of("train"):
        ids = [*numbers.memmap(shard).tolist(), *[IGNORE_INDEX] * T]
        begins = [at for at, id in enumerate(ids) if id == BOS]
        for begin, end in zip(begins, [*begins[1:], shard.tokens]):
            wanted += [ids[at:at + T + 1] for at in range(begin, end - 1, T)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(wanted) and epoch.tolist() != wanted
    assert not (epochs[0] == epochs[1]).all()


def test_order_depends_on_seed_and_epoch_alone(numbers):
    first = rows(PretokDataset(numbers, "train", 4, T, seed=1), 30)
    assert torch.equal(rows(PretokDataset(numbers, "train", 1, T, seed=1), 120), first)
    assert not torch.equal(rows(PretokDataset(numbers, "train", 4, T, seed=2), 30), first)
    torch.manual_seed(0)
    torch.rand(5)
    np.random.rand(5)
    assert torch.equal(rows(PretokDataset(numbers, "train", 4, T, seed=1), 30), first)


@pytest.mark.parametrize("position", [0, 4, 12, 13, 15, 31, 400])
def test_resume_from_a_position(numbers, position):
    whole = rows(PretokDataset(numbers, "train", 1, T, seed=3), position + 20)
    assert torch.equal(rows(PretokDataset(numbers, "train", 4, T, seed=3, position=position), 5), whole[position:])


def test_ranks_share_the_batches(numbers):
    alone = list(islice(PretokDataset(numbers, "train", 2, T, seed=5, position=6), 12))
    shares = [list(islice(PretokDataset(numbers, "train", 2, T, seed=5, position=6, rank=rank, world_size=3), 4))
              for rank in range(3)]
    assert all(torch.equal(alone[i], shares[i % 3][i // 3]) for i in range(12))


def test_loader_workers_yield_the_same_batches(numbers):
    def batches(count):
        found = Task.iter_batches(numbers, "train", 2, T, seed=5, position=2, num_workers=count)
        return [x for x, _ in islice(found, 9)]
    assert all(torch.equal(a, b) for a, b in zip(batches(0), batches(2), strict=True))


def test_targets_are_the_next_tokens(numbers):
    x, y = next(Task.iter_batches(numbers, "train", 2, T))
    assert x.shape == y.shape == (2, T) and x.dtype == y.dtype == torch.int64 and x.min() >= 0
    assert torch.equal(x[:, 1:], y[:, :-1].clamp(min=0)) and len(y.unique()) > T


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_split_is_scored_completely_and_once(numbers, batch_size):
    scored = []
    for x, y in Task.iter_split(numbers, "val", batch_size, T):
        assert x.shape == y.shape and x.shape[1] == T and x.min() >= 0
        for window, targets in zip(x, y):
            count = (targets != IGNORE_INDEX).sum()
            assert torch.equal(window[1:count], targets[:count - 1]) and (targets[count:] == IGNORE_INDEX).all()
            scored += targets[:count].tolist()
    at = 1 + sum(map(sum, DOCUMENTS["train"]))
    assert scored == [*range(at + 1, at + 23), at + 24, *range(at + 26, at + 36)]


def test_a_window_may_be_longer_than_the_text(numbers):
    x, y = next(Task.iter_batches(numbers, "train", 2, 500))
    assert x.shape == (2, 500) and (y != IGNORE_INDEX).any(1).all() and (y[:, -1] == IGNORE_INDEX).all()


def test_ids_above_16_bits(tmp_path):
    ids = np.array([70_000, 1, 99_999, 65_536], "<u4")
    ids.tofile(tmp_path / "train_0000.bin")
    found = ShardSet(Path(tmp_path), "", 100_000, 0, [Shard("train_0000.bin", "", "train", [], 1, 4, 4)])
    assert next(iter(PretokDataset(found, "train", 1, 3))).tolist() == [ids.tolist()]
