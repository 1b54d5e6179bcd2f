"""Sampling: the distribution of tokens, and exact filters."""
import math

import pytest
import torch

from tinyllm.sampling import SamplingParams, exponential_noise, sample_token


def draw(logits, count, occurred=(), **options):
    """Draw `count` tokens."""
    noise = torch.empty(count, options.get("top_k") or len(logits)).exponential_(
        generator=torch.Generator().manual_seed(5))[:, :len(logits)]
    mask = torch.tensor([token in occurred for token in range(len(logits))]).expand(count, -1)
    rows = torch.tensor(logits).expand(count, -1)
    return sample_token(rows, SamplingParams(**options), noise, mask if occurred else None).tolist()


def test_draws_follow_the_distribution():
    """Chi-square over 100,000 draws; the 99.99 % point for 9 degrees of freedom is 33.7."""
    logits = [0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -2.0, 0.1, 0.2, 2.5]
    temperature, count = 1.3, 100_000
    counts = torch.bincount(torch.tensor(draw(logits, count, temperature=temperature)), minlength=10)
    expected = (torch.tensor(logits) / temperature).softmax(0) * count
    assert ((counts - expected) ** 2 / expected).sum() < 33.7


def test_top_k_is_exact_under_ties():
    drawn = set(draw([1.0, 3.0, 3.0, 3.0, 3.0, 0.0], 500, top_k=2))
    assert len(drawn) == 2 and drawn < {1, 2, 3, 4}
    assert set(draw([1.0, 3.0, 2.0], 200, top_k=1)) == {1} and set(draw([1.0, 1.0, 1.0], 200, top_k=99)) == {0, 1, 2}


def test_top_p_keeps_the_smallest_set():
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert set(draw(logits, 500, top_p=0.45)) == {0} and set(draw(logits, 500, top_p=0.55)) == {0, 1}
    assert set(draw(logits, 500, top_p=0.81)) == {0, 1, 2} and set(draw(logits, 2000, top_p=1.0)) == {0, 1, 2, 3}
    assert set(draw(logits, 200, top_p=1e-9)) == {0}
    two = torch.tensor(draw(logits, 5000, top_p=0.55))
    assert (two == 0).float().mean().item() == pytest.approx(0.5 / 0.8, abs=0.03)


def test_temperature():
    logits = [1.0, 1.1, 0.9]
    assert draw(logits, 3, temperature=0) == [1, 1, 1] and set(draw(logits, 100, temperature=1e-30)) == {1}
    assert set(draw(logits, 300, temperature=1e6)) == {0, 1, 2}


def test_min_p_is_relative_to_the_top_token():
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert set(draw(logits, 2000, min_p=0.05)) == {0, 1, 2, 3} and set(draw(logits, 1000, min_p=0.2)) == {0, 1, 2}
    assert set(draw(logits, 500, min_p=0.59)) == {0, 1} and set(draw(logits, 200, min_p=1.0)) == {0}


def test_repetition_penalty():
    assert draw([1.0, 0.9, -1.0], 1, temperature=0, occurred=[0], repetition_penalty=1.2) == [1]
    assert draw([1.0, 0.9, -1.0], 1, temperature=0, occurred=[0], repetition_penalty=1.1) == [0]
    assert draw([-1.0, -1.1], 1, temperature=0, occurred=[0, 0], repetition_penalty=1.2) == [1]    # once, however often
    assert draw([1.0, 0.9, -1.0], 1, temperature=0, occurred=[], repetition_penalty=9.0) == [0]


def test_filters_apply_per_row():
    logits = torch.tensor([[5.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]).repeat(500, 1)
    noise = torch.empty(1000, 4).exponential_(generator=torch.Generator().manual_seed(5))
    found = sample_token(logits, SamplingParams(top_p=0.9), noise)
    assert set(found[::2].tolist()) == {0} and set(found[1::2].tolist()) == {0, 1, 2, 3}


def test_noise_is_exponentially_distributed():
    """Kolmogorov-Smirnov over 16,000 numbers; the 99.99 % point is 2.23 / sqrt(n)."""
    numbers = exponential_noise(SamplingParams(), [0], 100, torch.device("cpu"))
    noise = torch.stack([next(numbers) for _ in range(160)])
    found = noise.flatten().sort().values
    assert (found > 0).all()
    steps = torch.arange(1, len(found) + 1) / len(found)
    assert (1 - (-found).exp() - steps).abs().max() < 2.23 / len(found) ** 0.5
