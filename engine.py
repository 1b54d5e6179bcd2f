"""Sampling: ids in, ids out, one token for every sequence of a batch at a time.

    for step in generate(model, [[1, 403, 407], [1, 291]], max_new_tokens=100, eos_id=2):
        print(step)             # e.g. [378, 17], then [261, None] once the second has ended
"""
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from model import KVCache, Transformer


@torch.inference_mode()
def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, eos_id: int = -1, seed: int = 0) -> Iterator[list[int | None]]:
    """Continue prompts that may differ in length; yield the next token of each, None where one has ended.

    A sequence ends at eos, which is not yielded. What it gets depends on its prompt, the seed and its
    place in the batch, not on its neighbours. When a sequence fills the model's window, it goes on
    with its first token (bos) and the newer half of the window.

    Args:
        prompts: ids, at least one each.
        temperature: 0 always takes the likeliest token.
        top_k: draw from the k likeliest only; 0 for all.
        top_p: draw from the likeliest that together reach this probability (arXiv 1904.09751).
        eos_id: the token that ends a sequence; -1 for none.
    """
    device, window = model.rope.device, model.args.max_seq_len
    generators = [_generator(seed, row) for row in range(len(prompts))]
    contexts = [list(prompt) for prompt in prompts]         # what each sequence has in view
    ended = [False] * len(prompts)
    cache = None
    for _ in range(max_new_tokens):
        if cache is None or max(map(len, contexts)) > window:
            contexts = [_shorten(context, window) for context in contexts]
            cache = KVCache(model.args, len(prompts), device, model.output.weight.dtype)
            fresh = contexts
        logits = _forward(model, fresh, cache, contexts)                    # (B, vocab_size)
        tokens = choose(logits, temperature, top_k, top_p, generators)
        ended = [end or token == eos_id for end, token in zip(ended, tokens)]
        if all(ended):
            return
        for context, token, end in zip(contexts, tokens, ended):
            if not end:
                context.append(token)
        fresh = [context[-1:] for context in contexts]      # of an ended one it is the old one, to no effect
        yield [None if end else token for end, token in zip(ended, tokens)]


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float,
           generators: list[torch.Generator]) -> list[int]:
    """Draw one token for each row of logits (B, vocab_size), each with its own random numbers.

    The largest of p / e with e exponentially distributed is a draw from p (Gumbel-max trick, arXiv
    1611.01144); with p and e sorted alike it takes exactly k numbers, also where logits are equal.
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    best, ids = logits.float().topk(min(top_k or logits.shape[-1], logits.shape[-1]))       # (B, k), sorted
    p = ((best - best[:, :1]) / temperature).softmax(-1).cpu()
    if top_p < 1:
        p[p.cumsum(-1) - p >= top_p] = 0                    # what comes before already reaches top_p
    noise = torch.stack([torch.empty(p.shape[-1]).exponential_(generator=generator) for generator in generators])
    return ids.cpu().gather(1, (p / noise).argmax(-1, keepdim=True)).flatten().tolist()


def _forward(model: Transformer, fresh: list[list[int]], cache: KVCache, contexts: list[list[int]]) -> Tensor:
    """Run the new tokens of each sequence, padded on the right; return the logits after its last one."""
    width = max(map(len, fresh))
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in fresh], device=cache.lengths.device)
    last = torch.tensor([len(ids) - 1 for ids in fresh], device=tokens.device)
    seen = [len(context) - len(ids) for context, ids in zip(contexts, fresh)]
    cache.lengths, cache.end = torch.tensor(seen, device=tokens.device), max(seen)
    logits = model(tokens, cache=cache, last=last)
    return logits[:, 0]


def _shorten(context: list[int], window: int) -> list[int]:
    return context if len(context) <= window else context[:1] + context[-(window // 2):]


def _generator(seed: int, row: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
