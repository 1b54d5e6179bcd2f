"""Sample the next token from logits: temperature, top-k, top-p, min-p and repetition penalty.

    tokens = sample_token(logits, SamplingParams(temperature=0.8, top_k=300), next(noise))

All functions work on a batch; each sequence has its own random numbers.
"""
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from tinyllm.cli import UserError
from tinyllm.device import to_device

NOISE_CHUNK = 16        # tokens whose random numbers are drawn at once


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings."""
    temperature: float = 1.0            # 0: take the most probable token
    top_k: int = 0                      # sample from the k most probable tokens; 0: from all
    top_p: float = 1.0                  # sample from the top tokens that add up to top_p (arXiv 1904.09751)
    min_p: float = 0.0                  # drop tokens below min_p times the top probability (arXiv 2407.01082)
    repetition_penalty: float = 1.0     # above 1: make tokens that occurred less probable (arXiv 1909.05858)
    seed: int = 0


def validate_sampling(max_new_tokens: int, params: SamplingParams) -> None:
    """Raise UserError that lists all settings out of range."""
    errors = []
    if max_new_tokens < 0:
        errors.append(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    if not 0 <= params.temperature < math.inf:
        errors.append(f"temperature must be 0 or more, not {params.temperature}")
    if params.top_k < 0:
        errors.append(f"top_k must be 0 (all) or more, not {params.top_k}")
    if not 0 < params.top_p <= 1:
        errors.append(f"top_p must be above 0 and at most 1, not {params.top_p}")
    if not 0 <= params.min_p <= 1:
        errors.append(f"min_p must be from 0 to 1, not {params.min_p}")
    if not 0 < params.repetition_penalty < math.inf:
        errors.append(f"repetition_penalty must be above 0, not {params.repetition_penalty}")
    if errors:
        raise UserError("; ".join(errors))


def sample_token(logits: Tensor, params: SamplingParams, noise: Tensor, occurred: Tensor | None = None) -> Tensor:
    """Sample one token per sequence. Returns ids (B,).

    With exponentially distributed e, argmax(p / e) is a sample from p (Gumbel-max trick, arXiv 1611.01144). The noise
    applies to sorted probabilities, so top-k keeps exactly k tokens even if logits are equal.

    logits: (B, vocab_size). noise: (B, k), from `exponential_noise`. occurred: (B, vocab_size), the tokens to penalize.
    """
    if occurred is not None:
        penalty = params.repetition_penalty
        penalized = torch.where(logits > 0, logits / penalty, logits * penalty)     # (B, vocab_size)
        logits = torch.where(occurred, penalized, logits)
    if params.temperature == 0:
        return logits.argmax(-1)
    top_logits, ids = logits.topk(noise.shape[-1])                                  # (B, k), sorted
    p = ((top_logits - top_logits[:, :1]) / params.temperature).softmax(-1)
    if params.top_p < 1:
        p_before = p.cumsum(-1) - p
        p = p.masked_fill(p_before >= params.top_p, 0)
    if params.min_p > 0:
        p = p.masked_fill(p < params.min_p * p[:, :1], 0)
    return ids.gather(1, (p / noise).argmax(-1, keepdim=True)).flatten()


def exponential_noise(params: SamplingParams, sample_ids: Iterable[int], vocab_size: int, device: torch.device
                      ) -> Iterator[Tensor]:
    """Yield exponentially distributed noise (B, k) for each token. Each sample id has its own generator.

    It is drawn on the device. A seed gives other numbers on a GPU than on a CPU, and may on another model of GPU.
    """
    k = min(params.top_k or vocab_size, vocab_size)
    if params.temperature == 0:
        yield from repeat(torch.empty(0, k, device=device))
    generators = []
    for sample_id in sample_ids:
        digest = hashlib.sha256(f"{params.seed} {sample_id}".encode()).digest()
        generators.append(torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1))
    while True:
        noise = torch.empty(len(generators), NOISE_CHUNK, k, device=device)         # (B, NOISE_CHUNK, k)
        for row, generator in zip(noise, generators):
            row.uniform_(generator=generator)
        yield from noise.log_().neg_().unbind(1)


def occurrence_mask(prompts: list[list[int]], vocab_size: int, device: torch.device) -> Tensor:
    """Return a mask (B, vocab_size) of the ids that occur in each prompt."""
    occurred = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, ids in zip(occurred, prompts):
        row[ids] = True
    return to_device(occurred, device)
