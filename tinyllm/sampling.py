"""How a token is chosen from the logits: temperature, filters, and a draw.

    tokens = choose(logits, Sampling(temperature=0.8, top_k=300), next(noise))

All of it works on the rows of a batch, each with random numbers of its own.
"""
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

NOISE_CHUNK = 16        # tokens for which the random numbers are drawn together


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen.

    Attributes:
        temperature: 0 always takes the likeliest token.
        top_k: draw from the k likeliest only; 0 for all.
        top_p: draw from the likeliest that together reach this probability (arXiv 1904.09751).
        min_p: draw from those that have this share of the likeliest one's probability (arXiv 2407.01082).
        repetition_penalty: above 1, tokens that were there before become less likely (arXiv 1909.05858).
        seed: of the random numbers.
    """
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


def sample_token(logits: Tensor, how: SamplingParams, noise: Tensor, seen: Tensor | None = None) -> Tensor:
    """Choose a token for each row: (B,) of logits (B, vocab_size), noise (B, k), and seen (B, vocab_size), boolean.

    The largest of p / e with e exponentially distributed is a draw from p (Gumbel-max trick, arXiv 1611.01144);
    with p and e sorted alike it takes exactly k numbers, also where logits are equal.
    """
    if seen is not None:
        penalty = how.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if how.temperature == 0:
        return logits.argmax(-1)
    best, ids = logits.topk(noise.shape[-1])                                # (B, k), sorted
    p = ((best - best[:, :1]) / how.temperature).softmax(-1)
    if how.top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= how.top_p, 0)                 # what comes before already reaches top_p
    if how.min_p > 0:
        p = p.masked_fill(p < how.min_p * p[:, :1], 0)
    return ids.gather(1, (p / noise).argmax(-1, keepdim=True)).flatten()


def exponential_noise(how: SamplingParams, rows: Iterable[int], vocab_size: int, device: torch.device) -> Iterator[Tensor]:
    """Exponentially distributed numbers (B, k) for each token; each row has a generator of its own."""
    k = min(how.top_k or vocab_size, vocab_size)
    if how.temperature == 0:
        yield from repeat(torch.empty(0, k))
    seeds = [hashlib.sha256(f"{how.seed} {row}".encode()).digest()[:8] for row in rows]
    generators = [torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1) for seed in seeds]
    while True:
        drawn = [torch.rand(NOISE_CHUNK, k, generator=generator) for generator in generators]
        yield from torch.stack(drawn, 1).log_().neg_().to(device)


def seen_token_mask(prompts: list[list[int]], vocab_size: int, device: torch.device) -> Tensor:
    """Which ids each prompt has, (B, vocab_size)."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, ids in zip(seen, prompts):
        row[ids] = True
    return seen.to(device)
