"""Windows: each once an epoch, in an order that can be resumed, shared and repeated."""
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import IGNORE, PretokDataset, Task
from settings import UserError
from shards import Shard, ShardSet

LENGTHS = {"train": [103, 9, 2, 58], "val": [23, 11, 1]}     # tokens; none, one, and several windows of 10
T = 10


@pytest.fixture
def numbers(tmp_path) -> ShardSet:
    """Shards whose ids count up, so that each token tells where it comes from."""
    found, at = ShardSet(tmp_path, "", 1000, 0, []), 0
    for split, lengths in LENGTHS.items():
        for i, length in enumerate(lengths):
            np.arange(at, at + length, dtype="<u2").tofile(tmp_path / f"{split}_{i:04d}.bin")
            found.shards.append(Shard(f"{split}_{i:04d}.bin", split, [], 1, length, length))
            at += length
    return found


def rows(dataset, batches: int) -> torch.Tensor:
    return torch.cat(list(islice(dataset, batches)))


def test_every_window_once_an_epoch(numbers):
    dataset = PretokDataset(numbers, "train", 3, T, seed=1)
    assert dataset.n_windows == 10 + 0 + 0 + 5
    epochs = rows(dataset, 10).reshape(2, 15, T + 1)
    starts = sorted([*range(0, 100, T), *range(114, 164, T)])
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == starts
        assert (epoch == epoch[:, :1] + torch.arange(T + 1)).all()
    assert not (epochs[0] == epochs[1]).all() and epochs[0][:, 0].tolist() != starts


def test_order_depends_on_seed_and_epoch_alone(numbers):
    first = rows(PretokDataset(numbers, "train", 4, T, seed=1), 30)
    assert torch.equal(rows(PretokDataset(numbers, "train", 1, T, seed=1), 120), first)
    assert not torch.equal(rows(PretokDataset(numbers, "train", 4, T, seed=2), 30), first)
    torch.manual_seed(0)
    torch.rand(5)
    np.random.rand(5)
    assert torch.equal(rows(PretokDataset(numbers, "train", 4, T, seed=1), 30), first)


@pytest.mark.parametrize("position", [0, 4, 12, 13, 15, 31, 400])
def test_a_position_is_all_that_is_needed_to_go_on(numbers, position):
    whole = rows(PretokDataset(numbers, "train", 1, T, seed=3), position + 20)
    assert torch.equal(rows(PretokDataset(numbers, "train", 4, T, seed=3, position=position), 5), whole[position:])


def test_ranks_share_the_batches(numbers):
    alone = list(islice(PretokDataset(numbers, "train", 2, T, seed=5, position=6), 12))
    shares = [list(islice(PretokDataset(numbers, "train", 2, T, seed=5, position=6, rank=rank, world_size=3), 4))
              for rank in range(3)]
    assert all(torch.equal(alone[i], shares[i % 3][i // 3]) for i in range(12))


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_workers_yield_the_same_batches(numbers, workers):
    def batches(count):
        found = Task.iter_batches(numbers, "train", 2, T, seed=5, position=2, num_workers=count)
        return [x for x, _ in islice(found, 9)]
    assert all(torch.equal(a, b) for a, b in zip(batches(0), batches(workers), strict=True))


def test_targets_are_the_next_tokens(numbers):
    x, y = next(Task.iter_batches(numbers, "train", 2, T))
    assert x.shape == y.shape == (2, T) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x + 1, y)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_a_split_is_scored_whole_and_once(numbers, batch_size):
    scored = []
    for x, y in Task.iter_once(numbers, "val", batch_size, T):
        assert x.shape == y.shape and x.shape[1] == T and x.min() >= 0
        assert torch.equal((x + 1)[y != IGNORE], y[y != IGNORE])
        scored += y[y != IGNORE].tolist()
    assert scored == [*range(172 + 1, 172 + 23), *range(195 + 1, 195 + 11)]


def test_too_little_text_is_said(numbers):
    with pytest.raises(UserError, match="172 tokens, too few .* 500"):
        PretokDataset(numbers, "train", 2, 500)


def test_ids_above_16_bits(tmp_path):
    ids = np.array([70_000, 1, 99_999, 65_536], "<u4")
    ids.tofile(tmp_path / "train_0000.bin")
    found = ShardSet(Path(tmp_path), "", 100_000, 0, [Shard("train_0000.bin", "train", [], 1, 4, 4)])
    assert next(iter(PretokDataset(found, "train", 1, 3))).tolist() == [ids.tolist()]
