"""Sampling: prompts in, and one new token for each of them at a time.

    engine = Engine(model)                              # or Engine(model, quantize="int8")
    for step in engine.generate([[1, 403, 407], [1, 291]], max_new_tokens=100, eos_id=2):
        print(step.tokens)                              # e.g. [378, 17], then [261, None] once the second has ended

The weights are those of model.py, arranged for few and large operations, because a token costs as much time for
starting them as for their arithmetic: matrices with the same input are one (wq, wk, wv; w1, w3), and the gains of
the norms and the scale of attention are multiplied into them.

Shapes as in model.py: B batch, T tokens, H heads, K key-value heads, D dim of a head.
"""
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import RMSNorm, Transformer, TransformerBlock

DRAWS_AT_A_TIME = 16        # tokens for which the random numbers are drawn together

Product = Callable[[Tensor], Tensor]                # (rows, in) -> (rows, out)
Attend = Callable[[int, Tensor, Tensor], Tensor]    # layer, queries, keys and values


@dataclass(frozen=True)
class Sampling:
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


class Step(NamedTuple):
    """A token for each sequence, None where one has ended; and the logits (B, vocab_size) that they were drawn from."""
    tokens: list[int | None]
    logits: Tensor


class Engine:
    """A model arranged for writing. Some weights are copies: when the model learns on, make another engine."""

    def __init__(self, model: Transformer, dtype: torch.dtype = torch.float32, quantize: str = ""):
        """Arrange the weights: in `dtype`, or with quantize "int8" as 8-bit integers with a scale for each row."""
        self.args, self.device = model.args, model.rope.device
        on_cpu = self.device.type == "cpu"
        self.numbers = torch.float32 if on_cpu else dtype                   # the format of the cache
        self.floor = torch.tensor((self.args.dim * self.args.norm_eps) ** 0.5, device=self.device)
        pack = _int8 if quantize == "int8" else _half if on_cpu and dtype == torch.float16 else _plain
        with torch.no_grad():
            self.embeddings = model.tok_embeddings.weight.detach().to(self.numbers)
            self.layers = [[pack(weight.float(), dtype) for weight in _arrange(layer)] for layer in model.layers]
            self.output = pack(model.output.weight.float() * _gain(model.norm), dtype)
            # rotary embedding is a product with complex numbers; values go along, and are not turned
            turns = torch.view_as_complex(model.rope.movedim(0, -1).contiguous())[:, None]  # (max_seq_len, 1, D / 2)
            still = torch.ones_like(turns).expand(-1, self.args.n_kv_heads, -1)
            self.turns = torch.cat((turns.expand(-1, self.args.n_heads + self.args.n_kv_heads, -1), still), 1)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling = Sampling(),
                 eos_id: int = -1, rows: list[int] | None = None) -> Iterator[Step]:
        """Continue prompts that may differ in length.

        A sequence ends at eos, which is not yielded. What it gets depends on its prompt, the seed and its row number,
        not on its neighbours. When it fills the model's window, it goes on with its first token (bos) and the newer
        half.

        Args:
            prompts: ids, at least one each.
            eos_id: the token that ends a sequence; -1 for none.
            rows: the number of each sequence, which chooses its random numbers; 0, 1, ... when left out.
        """
        window, everyone = self.args.max_seq_len, range(len(prompts))
        texts = [list(prompt) for prompt in prompts]
        noise = _noise(sampling, rows or everyone, self.args.vocab_size, self.device)
        seen = _seen(prompts, self.args.vocab_size, self.device) if sampling.repetition_penalty != 1 else None
        room = min(window, max(map(len, prompts)) + max_new_tokens)
        cache = torch.zeros(self.args.n_layers, len(prompts), 2 * self.args.n_kv_heads, room, self.args.head_dim,
                            device=self.device, dtype=self.numbers)         # keys, and then values
        lengths, ended = [window] * len(prompts), [False] * len(prompts)    # of what the cache holds of each; none yet
        for _ in range(max_new_tokens):
            # 1. logits: of one more token where the cache has room for it, else of the text so far
            full = [row for row in everyone if lengths[row] == window]
            if len(full) < len(prompts):
                logits = self._step(tokens, cache, [min(length, window - 1) for length in lengths])
                lengths = [length + 1 for length in lengths]
            if full:
                contexts = [_shorten(texts[row], window) for row in full]
                fresh = self._prefill(contexts, full, cache)
                logits = fresh if len(full) == len(prompts) else logits.index_copy(
                    0, torch.tensor(full, device=self.device), fresh)
                for row, context in zip(full, contexts):
                    lengths[row] = len(context)
            # 2. tokens
            tokens = choose(logits, sampling, next(noise), seen)            # (B,)
            found = tokens.tolist()
            ended = [end or token == eos_id for end, token in zip(ended, found)]
            if all(ended):
                return
            yield Step([None if end else token for end, token in zip(ended, found)], logits)
            for text, token in zip(texts, found):
                text.append(token)
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)

    @torch.inference_mode()
    def read(self, ids: list[int]) -> Iterator[Tensor]:
        """Yield the log-probabilities (n, vocab_size) of what comes after each id but the last, a window at a time."""
        for begin in range(0, len(ids) - 1, self.args.max_seq_len):
            tokens = torch.tensor([ids[:-1][begin:begin + self.args.max_seq_len]], device=self.device)
            x = self._layers(tokens, self.turns[:tokens.shape[1]], lambda _, *qkv: self._causal(*qkv))
            yield self.output(_norm(x, self.floor)).float().log_softmax(-1)

    def _prefill(self, contexts: list[list[int]], rows: list[int], cache: Tensor) -> Tensor:
        """Run contexts from their beginning; return the logits (rows, vocab_size) after each."""
        width = max(map(len, contexts))
        places = slice(None) if len(rows) == cache.shape[1] else torch.tensor(rows, device=self.device)

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            cache[layer, places, :, :width] = kv
            return self._causal(q, kv)

        tokens = torch.tensor([ids + ids[:1] * (width - len(ids)) for ids in contexts], device=self.device)
        x = self._layers(tokens, self.turns[:width], attend)
        last = torch.tensor([row * width + len(ids) - 1 for row, ids in enumerate(contexts)], device=self.device)
        return self.output(_norm(x[last], self.floor)).float()

    def _step(self, tokens: Tensor, cache: Tensor, lengths: list[int]) -> Tensor:
        """Run one more token (B,) of each sequence; return the logits (B, vocab_size) after it."""
        end, shape = max(lengths) + 1, (len(tokens), self.args.n_kv_heads, -1, self.args.head_dim)
        keys_and_values = cache[:, :, :, :end].unbind()                         # of each layer, (B, 2 K, end, D)
        if same := min(lengths) == end - 1:
            turns, mask, fresh = self.turns[end - 1:end], None, cache[:, :, :, end - 1:end].unbind()
        else:
            at = torch.tensor(lengths, device=self.device)[:, None]                         # (B, 1)
            turns, mask = self.turns[at], (torch.arange(end, device=self.device) <= at)[:, None, None]
            places = at[:, None, :, None].expand(-1, cache.shape[2], -1, cache.shape[4])    # (B, 2 K, 1, D)

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            if same:
                fresh[layer].copy_(kv)
            else:
                keys_and_values[layer].scatter_(2, places, kv)
            k, v = keys_and_values[layer].chunk(2, 1)
            # heads that share keys are taken as queries of one head
            return F.scaled_dot_product_attention(q.view(shape), k, v, mask, scale=1.0).reshape(q.shape)

        return self.output(_norm(self._layers(tokens[:, None], turns, attend), self.floor)).float()

    def _causal(self, q: Tensor, kv: Tensor) -> Tensor:
        """Attention of whole sequences: (B, H, T, D) queries, (B, 2 K, T, D) keys and values."""
        k, v = kv.chunk(2, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=q.shape[1] > k.shape[1])

    def _layers(self, tokens: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        """What the layers make of tokens (B, T): (B * T, dim), before the last norm."""
        args, shape = self.args, (*tokens.shape, -1, self.args.head_dim // 2, 2)
        x = F.embedding(tokens.flatten(), self.embeddings).float()                          # (B * T, dim)
        for number, (qkv, out, up, down) in enumerate(self.layers):
            pairs = torch.view_as_complex(qkv(_norm(x, self.floor)).float().view(shape))     # (B, T, H + 2 K, D / 2)
            heads = torch.view_as_real(pairs * turns).flatten(-2).transpose(1, 2).to(self.numbers)
            q, kv = heads.split_with_sizes((args.n_heads, 2 * args.n_kv_heads), 1)
            x = x + out(attend(number, q, kv).transpose(1, 2).reshape(x.shape[0], -1))
            gate, value = up(_norm(x, self.floor)).chunk(2, -1)
            x = x + down(F.silu(gate) * value)
        return x


def choose(logits: Tensor, how: Sampling, noise: Tensor, seen: Tensor | None = None) -> Tensor:
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


def _noise(how: Sampling, rows: Iterable[int], vocab_size: int, device: torch.device) -> Iterator[Tensor]:
    """Exponentially distributed numbers (B, k) for each token; each row has a generator of its own."""
    k = min(how.top_k or vocab_size, vocab_size)
    if how.temperature == 0:
        yield from repeat(torch.empty(0, k))
    seeds = [hashlib.sha256(f"{how.seed} {row}".encode()).digest()[:8] for row in rows]
    generators = [torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1) for seed in seeds]
    while True:
        yield from torch.stack([torch.empty(DRAWS_AT_A_TIME, k).exponential_(generator=generator)
                                for generator in generators], 1).to(device)


def _arrange(layer: TransformerBlock) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four matrices of a layer: to queries, keys and values; from attention; to both of w1 and w3; w2."""
    attention, feed_forward = layer.attention, layer.feed_forward
    wq = attention.wq.weight * attention.args.head_dim ** -0.5
    qkv = torch.cat((wq, attention.wk.weight, attention.wv.weight)) * _gain(layer.attention_norm)
    up = torch.cat((feed_forward.w1.weight, feed_forward.w3.weight)) * _gain(layer.ffn_norm)
    return qkv, attention.wo.weight, up, feed_forward.w2.weight


def _gain(norm: RMSNorm) -> Tensor:
    """What is left of a norm after `_norm`: its gain, and the factor that makes a sum of squares a mean."""
    return norm.weight * norm.weight.numel() ** 0.5


def _plain(weight: Tensor, dtype: torch.dtype) -> Product:
    weight = weight.to(dtype)
    return lambda x: F.linear(x.to(dtype), weight)


def _half(weight: Tensor, dtype: torch.dtype) -> Product:
    """Weights in float16, everything else in float32, on a CPU (FBGEMM, arXiv 2101.05615)."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), None)
    return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)


def _int8(weight: Tensor, dtype: torch.dtype) -> Product:
    """Weights as 8-bit integers with a scale for each row, inputs and results in bfloat16."""
    if weight.shape[1] % 16:                # PyTorch's kernel reads beyond the end of such rows
        return _plain(weight, torch.float32)
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
    packed = (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), packed, scale)


def _norm(x: Tensor, floor: Tensor) -> Tensor:
    """x / sqrt(sum of x^2 + floor^2): RMSNorm but for a factor that is inside the matrices, in three operations."""
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)


def _seen(prompts: list[list[int]], vocab_size: int, device: torch.device) -> Tensor:
    """Which ids each prompt has, (B, vocab_size)."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, ids in zip(seen, prompts):
        row[ids] = True
    return seen.to(device)


def _shorten(context: list[int], window: int) -> list[int]:
    return context if len(context) <= window else context[:1] + context[len(context) - window // 2:]
