"""Sampling: prompts in, and one new token for each of them at a time.

    engine = Engine(model)                              # or Engine(model, quantize="int8")
    for step in engine.generate([[1, 403, 407], [1, 291]], max_new_tokens=100, ends=[2]):
        print(step.tokens)                              # e.g. [378, 17], then [261, None] once the second has ended

The weights are those of model.py, arranged for few and large operations, because a token costs as much time for
starting them as for their arithmetic: matrices with the same input are one (wq, wk, wv; w1, w3), and the gains of
the norms and the scale of attention are multiplied into them.

Shapes as in model.py: B batch, T tokens, H heads, K key-value heads, D dim of a head.
"""
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.compiled import CompiledAttention, CompiledLayers, CudaGraphStep
from model import Transformer
from tinyllm import optional
from tinyllm.kernels import causal_attention
from tinyllm.sampling import SamplingParams, exponential_noise, sample_token, seen_token_mask
from tinyllm.weights import (
    LinearFn,
    folded_norm_weight,
    fuse_layer_weights,
    linear,
    linear_fp16,
    linear_int8,
    to_float32_on,
)

# PyTorch asks every argument of a call whether it overrides the call. For the packed weights of `half`, the answer
# comes as a C++ exception, which takes longer than the product; so the engine asks nobody.
_NO_TORCH_FUNCTION = torch._C.DisableTorchFunctionSubclass

AttentionFn = Callable[[int, Tensor], Tensor]            # layer, (B * T, H + 2 K, D) -> (B * T, dim)


class Step(NamedTuple):
    """A token for each sequence, None where one has ended; and the logits (B, vocab_size) that they were drawn from."""
    tokens: list[int | None]
    logits: Tensor


class Engine:
    """A model arranged for writing. Some weights are copies: when the model learns on, make another engine."""

    def __init__(self, model: Transformer, dtype: torch.dtype = torch.float32, quantize: str = "",
                 compiled: bool = False, device: torch.device | None = None):
        """Arrange the weights: in `dtype`, or with quantize "int8" as 8-bit integers with a scale for each row.

        compiled: write with extras/compiled.py.
        device: where to write; that of the model when None.
        """
        self.args, self.device = model.args, device or model.tok_embeddings.weight.device
        self.n_heads, self.n_kv_heads = self.args.n_heads, self.args.n_kv_heads
        on_cpu = self.device.type == "cpu"
        self.uses_cuda_graph = compiled and not on_cpu
        self.cache_dtype = torch.float32 if on_cpu else dtype
        pack = linear_int8 if quantize == "int8" else linear_fp16 if on_cpu and dtype == torch.float16 else linear
        self.layers: list[list[LinearFn]] = []
        self.compiled_layers = CompiledLayers(self.args, model.rope, dtype, quantize) if compiled and on_cpu else None
        self.compiled_attention = CompiledAttention(self.args) if compiled and on_cpu else None
        self._pack_weights(model, partial(pack, dtype=dtype))

    def _pack_weights(self, model: Transformer, pack: Callable[[Tensor], LinearFn]) -> None:
        """Set embeddings, layers, output, and what `_rope_factors` needs."""
        with torch.no_grad():
            # one number more than dim, which makes the norm of such a row that of RMSNorm, with its eps
            floor = torch.full((self.args.vocab_size, 1), (self.args.dim * self.args.norm_eps) ** 0.5,
                               device=self.device)
            self.embeddings = torch.cat((model.tok_embeddings.weight.to(self.device), floor), 1)
            for layer in model.layers:
                matrices = fuse_layer_weights(layer, self.device)
                self.layers.append([pack(weight) for weight in matrices])
                if self.compiled_layers:
                    self.compiled_layers.add(matrices)
            self.output = pack(to_float32_on(self.device, model.output) * folded_norm_weight(model.norm, self.device))
            # rotary embedding is a product with complex numbers, (max_seq_len, 1, D / 2)
            self.rope = torch.view_as_complex(model.rope.to(self.device).movedim(0, -1).contiguous())[:, None]

    _choose = staticmethod(sample_token)          # extras/tensor_parallel.py has its own

    def generate(self, prompts: list[list[int]], max_new_tokens: int, sampling: SamplingParams = SamplingParams(),
                 ends: Collection[int] = (), rows: list[int] | None = None) -> Iterator[Step]:
        """Continue prompts that may differ in length.

        A sequence ends at one of the ids `ends`, which is not yielded. What it gets depends on its prompt, the seed
        and its row number, and not on its neighbours (but for roundings of int8 and bfloat16). When it fills the
        model's window, it goes on with its first token (bos) and the newer half.

        Args:
            prompts: ids, at least one each.
            rows: the number of each sequence, which chooses its random numbers; 0, 1, ... when left out.
        Raises:
            ValueError: when a prompt has no ids, or some that the vocabulary has not.
            UserError: when it cannot be compiled.
        """
        _check(prompts, self.args.vocab_size)
        if self.compiled_layers:
            (self.compiled_layers if len(prompts) == 1 else self.compiled_attention).load()
        return self._generate(prompts, max_new_tokens, sampling, ends, rows or range(len(prompts)))

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], max_new_tokens: int, sampling: SamplingParams, ends: Collection[int],
               rows: Sequence[int]) -> Iterator[Step]:
        texts = [list(prompt) for prompt in prompts]
        noise = exponential_noise(sampling, rows, self.args.vocab_size, self.device)
        seen = seen_token_mask(prompts, self.args.vocab_size, self.device) if sampling.repetition_penalty != 1 else None
        room = min(self.args.max_seq_len, max(map(len, prompts)) + max_new_tokens)
        cache = torch.zeros(self.args.n_layers, len(prompts), 2 * self.n_kv_heads, room, self.args.head_dim,
                            device=self.device, dtype=self.cache_dtype)     # keys, and then values
        step = CudaGraphStep(self._extend, cache) if self.uses_cuda_graph else partial(self._step, cache)
        # how many tokens of each text the cache holds. A full cache is filled anew from the text, and so is one
        # that holds nothing yet, which therefore begins as full
        lengths = [self.args.max_seq_len] * len(prompts)
        tokens, ended = torch.empty(0), [False] * len(prompts)
        for _ in range(max_new_tokens):
            with _NO_TORCH_FUNCTION():
                logits = self._next_logits(texts, tokens, lengths, cache, step)
            tokens = self._choose(logits, sampling, next(noise), seen)      # (B,)
            found = tokens.tolist()
            ended = [end or token in ends for end, token in zip(ended, found)]
            if all(ended):
                return
            yield Step([None if end else token for end, token in zip(ended, found)], logits)
            for text, token in zip(texts, found):
                text.append(token)
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)

    def _next_logits(self, texts: list[list[int]], tokens: Tensor, lengths: list[int], cache: Tensor,
                     step: Callable[[Tensor, list[int]], Tensor]) -> Tensor:
        """The logits (B, vocab_size) after texts: by one more token where the cache has room, else from the beginning.

        tokens: (B,), the newest of each. lengths: how many tokens of each the cache holds; brought up to date.
        """
        window = self.args.max_seq_len
        full = [row for row, length in enumerate(lengths) if length == window]
        if len(full) < len(texts):
            logits = step(tokens, [min(length, window - 1) for length in lengths])
            lengths[:] = [length + 1 for length in lengths]
        if full:
            contexts = [_crop_to_window(texts[row], window) for row in full]
            fresh = self._prefill(contexts, full, cache)
            logits = fresh if len(full) == len(texts) else logits.index_copy(
                0, torch.tensor(full, device=self.device), fresh)
            for row, context in zip(full, contexts):
                lengths[row] = len(context)
        return logits

    @torch.inference_mode()
    def read(self, ids: list[int]) -> Iterator[Tensor]:
        """Yield the log-probabilities (n, vocab_size) of what comes after each id but the last, a window at a time."""
        before = ids[:-1]
        for begin in range(0, len(before), self.args.max_seq_len):
            tokens = torch.tensor([before[begin:begin + self.args.max_seq_len]], device=self.device)
            with _NO_TORCH_FUNCTION():
                turns = self._rope_factors(slice(tokens.shape[1]))
                x = self._layers(tokens, turns, lambda _, heads: self._causal(heads[None]))
                logprobs = self._logits(x).log_softmax(-1)
            yield logprobs

    def _prefill(self, contexts: list[list[int]], rows: list[int], cache: Tensor) -> Tensor:
        """Run contexts from their beginning; return the logits (rows, vocab_size) after each."""
        width = max(map(len, contexts))
        places = slice(None) if len(rows) == cache.shape[1] else torch.tensor(rows, device=self.device)

        def attend(layer: int, heads: Tensor) -> Tensor:
            heads = heads.unflatten(0, (-1, width))
            cache[layer, places, :, :width] = heads[:, :, self.n_heads:].transpose(1, 2)
            return self._causal(heads)

        tokens = torch.tensor([ids + ids[:1] * (width - len(ids)) for ids in contexts], device=self.device)
        x = self._layers(tokens, self._rope_factors(slice(width)), attend)
        last = torch.tensor([row * width + len(ids) - 1 for row, ids in enumerate(contexts)], device=self.device)
        return self._logits(x[last])

    def _step(self, cache: Tensor, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Run one more token (B,) of each sequence; return the logits (B, vocab_size) after it."""
        if self.compiled_layers and len(tokens) == 1:
            return self._logits(self.compiled_layers(F.embedding(tokens, self.embeddings), lengths[0], cache))
        end = max(lengths) + 1
        known = cache if self.compiled_attention else cache[:, :, :, :end]
        at = end - 1 if min(lengths) == end - 1 else torch.tensor(lengths, device=self.device)[:, None]
        return self._extend(known, tokens, at)

    def _extend(self, cache: Tensor, tokens: Tensor, at: int | Tensor) -> Tensor:
        """Run tokens that come at a place of the cache: the last one for all, or one for each (B, 1)."""
        batch, groups = len(tokens), self.n_heads // self.n_kv_heads
        keys, values = (part.unbind() for part in cache.chunk(2, 2))            # of each layer, (B, K, end, D)
        if isinstance(at, int):
            turns, mask, fresh = self._rope_factors(slice(at, at + 1)), None, cache[:, :, :, at].unbind()
        else:
            turns, mask = self._rope_factors(at), (torch.arange(cache.shape[3], device=self.device) <= at)[:, None, None]
            places = at[:, None, :, None].expand(-1, cache.shape[2], -1, cache.shape[4])    # (B, 2 K, 1, D)
        if self.compiled_attention:
            lengths = torch.full((batch,), at) if mask is None else at.flatten()

        def attend(layer: int, heads: Tensor) -> Tensor:
            q, kv = heads.split_with_sizes((self.n_heads, cache.shape[2]), 1)
            if mask is None:
                fresh[layer].copy_(kv)
            else:
                cache[layer].scatter_(2, places, kv[:, :, None])
            if self.compiled_attention:
                return self.compiled_attention(heads, lengths, cache[layer])
            # heads that share keys are taken as queries of one head
            q = q.unflatten(1, (-1, groups))                                                # (B, K, H / K, D)
            return F.scaled_dot_product_attention(q, keys[layer], values[layer], mask, scale=1.0).reshape(batch, -1)

        return self._logits(self._layers(tokens[:, None], turns, attend))

    def _causal(self, heads: Tensor) -> Tensor:
        """Attention of whole sequences: (B, T, H + 2 K, D) -> (B * T, dim)."""
        q, k, v = heads.transpose(1, 2).split((self.n_heads, self.n_kv_heads, self.n_kv_heads), 1)
        return causal_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2).flatten(0, 1)

    def _rope_factors(self, at: slice | Tensor) -> Tensor:
        """What heads at some places are multiplied with: (..., H + 2 K, D / 2). Values are not turned."""
        turns = self.rope[at]                                                               # (..., 1, D / 2)
        both = [turns.expand(*turns.shape[:-2], self.n_heads + self.n_kv_heads, -1),
                torch.ones_like(turns).expand(*turns.shape[:-2], self.n_kv_heads, -1)]
        return torch.cat(both, -2)

    def _layers(self, tokens: Tensor, turns: Tensor, attend: AttentionFn) -> Tensor:
        """What the layers make of tokens (B, T): (B * T, dim + 1), before the last norm."""
        pairs_of = (*tokens.shape, -1, self.args.head_dim // 2, 2)
        x = F.embedding(tokens.flatten(), self.embeddings)                                  # (B * T, dim + 1)
        stream = x[:, :-1]
        for number, (qkv, out, up, down) in enumerate(self.layers):
            pairs = torch.view_as_complex(qkv(_norm(stream, x)).float().view(pairs_of))     # (B, T, H + 2 K, D / 2)
            heads = torch.view_as_real(pairs * turns).view(len(x), -1, self.args.head_dim).to(self.cache_dtype)
            stream += out(attend(number, heads))
            gate, value = up(_norm(stream, x)).chunk(2, -1)
            stream += down(F.silu(gate).mul_(value))
        return x

    def _logits(self, x: Tensor) -> Tensor:
        """x: (rows, dim + 1), from `_layers`."""
        return self.output(_norm(x[:, :-1], x)).float()


def _norm(stream: Tensor, x: Tensor) -> Tensor:
    """RMSNorm of (rows, dim) but for gain and factor, which are inside the matrices (`gain`).

    x: (rows, dim + 1), the stream with a last column that adds norm_eps to the sum of squares.
    """
    return stream / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def build_engine(model: nn.Module, *options, **more) -> Engine:
    """Make the engine of a model. Takes the further arguments of Engine."""
    engine = Engine if isinstance(model, Transformer) else optional.load("gpt2").GPT2Engine
    return engine(model, *options, **more)


def _check(prompts: list[list[int]], vocab_size: int) -> None:
    for prompt in prompts:
        if not prompt or not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(f"a prompt needs ids from 0 to {vocab_size - 1}, not {prompt[:20]}")


def _crop_to_window(context: list[int], window: int) -> list[int]:
    return context if len(context) <= window else context[:1] + context[len(context) - window // 2:]
