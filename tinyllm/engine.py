"""Inference engine: prompts in, one new token per sequence and step out.

    engine = build_engine(model)                        # or build_engine(model, quantize="int8")
    for step in engine.generate([[1, 403, 407], [1, 291]], max_new_tokens=100, stop_ids=[2]):
        print(step.tokens)                              # e.g. [378, 17], then [261, None] once the second has ended

The engine fuses model.py's weights into fewer, larger matrices: at batch size 1, launching an operation costs as much
as computing it. wq, wk and wv become one matrix, and so do w1 and w3. Norm weights and the attention scale are
multiplied into them. Shapes as in model.py: B batch, T tokens, H heads, K key-value heads, D dim of a head.
"""
import copy
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import RMSNorm, Transformer, TransformerBlock
from tinyllm import optional
from tinyllm.cli import UserError
from tinyllm.device import HostCopy, has_async_copies, to_device
from tinyllm.kernels import causal_attention, model_is_original
from tinyllm.sampling import SamplingParams, exponential_noise, occurrence_mask, sample_token

# For packed float16 weights, __torch_function__ dispatch throws a C++ exception that costs more than the product.
_NO_TORCH_FUNCTION = torch._C.DisableTorchFunctionSubclass

MASK_ALIGNMENT = 8              # elements; rows of a mask in 16 bits start at multiples of 16 bytes

LinearFn = Callable[[Tensor], Tensor]                   # (rows, in) -> (rows, out)
AttentionFn = Callable[[int, Tensor], Tensor]           # layer, qkv (B * T, H + 2 K, D) -> (B * T, dim)


class DecodeStep(NamedTuple):
    """One token per sequence (None if it has ended), and the logits (B, vocab_size) that it was sampled from.

    logprobs: log-probability of each sampled token in nats, before temperature and filters; None if not requested.
    """
    tokens: list[int | None]
    logits: Tensor
    logprobs: list[float] | None


class SampledTokens:
    """One token per sequence, on its way from the device to the CPU."""

    def __init__(self, tokens: Tensor, logits: Tensor, with_logprobs: bool):
        """Start one copy of the tokens (B,) and, with_logprobs, of their log-probabilities. logits: (B, vocab_size)."""
        self.logits = logits
        self.with_logprobs = with_logprobs
        packed = tokens                                                                 # (B,) or (2, B)
        if with_logprobs:
            logprobs = logits.log_softmax(-1).gather(1, tokens[:, None]).flatten()      # (B,)
            packed = torch.stack((tokens.int(), logprobs.view(torch.int32)))            # the bits of the floats
        self._copy = HostCopy(packed)

    def ids(self) -> list[int]:
        """Return the token ids; wait for the device if it still computes them."""
        copy = self._copy.read()
        return (copy[0] if self.with_logprobs else copy).tolist()

    def logprobs(self) -> list[float] | None:
        """Return the log-probabilities in nats, or None if they were not requested."""
        return self._copy.read()[1].view(torch.float32).tolist() if self.with_logprobs else None


class KVCache:
    """Keys and values of all layers; row i holds lengths[i] tokens of sequence i."""

    def __init__(self, kv: Tensor):
        """Wrap `kv`, (n_layers, B, 2 K, cache_len, D): keys and then values."""
        self.kv = kv
        self.cache_len = kv.shape[3]
        self.lengths = [0] * kv.shape[1]

    def rows_to_prefill(self) -> list[int]:
        """Return the rows that are empty or full."""
        return [row for row, length in enumerate(self.lengths) if length in (0, self.cache_len)]

    def write_prompt(self, layer: int, rows: Tensor, kv: Tensor) -> None:
        """Write the first T tokens of rows. kv: (rows, T, 2 K, D)."""
        self.kv[layer, rows, :, :kv.shape[1]] = kv.transpose(1, 2)

    def advance_lengths(self) -> list[int]:
        """Increment each length and return the new tokens' positions. Full rows are prefilled again afterwards."""
        positions = [min(length, self.cache_len - 1) for length in self.lengths]
        self.lengths = [length + 1 for length in self.lengths]
        return positions

    def advance(self) -> None:
        """Move to the position after the last token of each row."""
        positions = self.advance_lengths()
        end = max(positions) + 1
        if min(positions) == end - 1:
            self.move_to(end - 1, end)
        else:
            self.move_to(to_device(torch.tensor(positions)[:, None], self.kv.device), end)

    def move_to(self, position: int | Tensor, end: int) -> None:
        """Set the position of `write`, an int for all rows or a (B, 1) tensor, and the end of `read`."""
        self.position = position
        keys, values = self.kv[:, :, :, :end].chunk(2, 2)       # (n_layers, B, K, end, D); views of all layers at once
        self._keys = keys.unbind()
        self._values = values.unbind()
        if isinstance(position, int):
            self.mask = None
            self._slots = self.kv[:, :, :, position].unbind()                           # (B, 2 K, D) per layer
        else:
            self.mask = self._attention_mask(position, end)
            self._index = position[:, None, :, None].expand(-1, self.kv.shape[2], -1, self.kv.shape[4])

    def _attention_mask(self, position: Tensor, end: int) -> Tensor:
        """Return the mask (B, 1, 1, end) to add to attention scores: 0 up to each row's position, -inf after it.

        Attention would convert a boolean mask in each layer, and on a GPU copy one whose rows are not aligned.
        """
        width = math.ceil(end / MASK_ALIGNMENT) * MASK_ALIGNMENT
        is_hidden = torch.arange(width, device=self.kv.device) > position               # (B, width)
        mask = torch.zeros(is_hidden.shape, dtype=self.kv.dtype, device=self.kv.device)
        return mask.masked_fill_(is_hidden, -math.inf)[:, None, None, :end]

    def write(self, layer: int, kv: Tensor) -> None:
        """Write one token of each row. kv: (B, 2 K, D)."""
        if isinstance(self.position, int):
            self._slots[layer].copy_(kv)
        else:
            self.kv[layer].scatter_(2, self._index, kv[:, :, None])

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values, each (B, K, end, D)."""
        return self._keys[layer], self._values[layer]


class Engine:
    """A model prepared for generation. Some weights are copies: after more training, build a new engine."""

    def __init__(self, model: Transformer, dtype: torch.dtype = torch.float32, quantize: str = "",
                 device: torch.device | None = None):
        """Fuse the weights and convert them to `dtype`, or with quantize "int8" to 8-bit integers.

        device: None means the model's device.
        """
        self.args = model.args
        self.device = device or model.tok_embeddings.weight.device
        self.n_heads = self.args.n_heads
        self.n_kv_heads = self.args.n_kv_heads
        self.read_ahead = 1 if has_async_copies(self.device) else 0     # steps started before a token is read
        self.cache_dtype = torch.float32 if self.device.type == "cpu" else dtype
        self.layers: list[list[LinearFn]] = []
        with torch.no_grad():
            self._fuse_weights(model, choose_linear(dtype, quantize, self.device))

    def _fuse_weights(self, model: Transformer, make_linear: Callable[[Tensor], LinearFn]) -> None:
        """Set the embeddings, the layers, the output layer, and the table of `_rope_factors`."""
        # With a last column of sqrt(dim * norm_eps), a row's vector norm is sqrt(dim) times RMSNorm's denominator.
        eps_column = torch.full((self.args.vocab_size, 1), (self.args.dim * self.args.norm_eps) ** 0.5,
                                device=self.device)
        self.embeddings = torch.cat((model.tok_embeddings.weight.to(self.device), eps_column), 1)
        for layer in model.layers:
            self._add_layer(fuse_layer_weights(layer, self.device), make_linear)
        output = model.output.weight.to(self.device, torch.float32) * folded_norm_weight(model.norm, self.device)
        self.output = make_linear(output)
        # rotary embedding as complex factors, (max_seq_len, 1, D / 2)
        self.rope = torch.view_as_complex(model.rope.to(self.device).movedim(0, -1).contiguous())[:, None]

    def _add_layer(self, matrices: tuple[Tensor, ...], make_linear: Callable[[Tensor], LinearFn]) -> None:
        self.layers.append([make_linear(matrix) for matrix in matrices])

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, params: SamplingParams = SamplingParams(),
                 stop_ids: Collection[int] = (), sample_ids: list[int] | None = None, with_logprobs: bool = False
                 ) -> Iterator[DecodeStep]:
        """Continue prompts of any lengths, with at least one id each. Yields one step per new token.

        A sequence ends before one of stop_ids. Its tokens depend only on its prompt, the seed and its sample id, not on
        the rest of the batch (except for rounding in int8 and bfloat16). A sequence longer than max_seq_len continues
        from its first token (BOS) and the newer half of the context.

        sample_ids: one per sequence; the seed and this id determine its random numbers. None means 0, 1, ...
        """
        steps = self._sample_steps(prompts, max_new_tokens, params, sample_ids or range(len(prompts)), with_logprobs)
        ended = [False] * len(prompts)
        for step in steps:
            new_ids = step.ids()
            ended = [end or token in stop_ids for end, token in zip(ended, new_ids)]
            if all(ended):
                return
            tokens = [None if end else token for end, token in zip(ended, new_ids)]
            yield DecodeStep(tokens, step.logits, step.logprobs())

    def _sample_steps(self, prompts: list[list[int]], max_new_tokens: int, params: SamplingParams,
                      sample_ids: Collection[int], with_logprobs: bool) -> Iterator[SampledTokens]:
        """Yield the tokens of each step, `read_ahead` steps after they were started. Does not stop at any id."""
        vocab_size, max_seq_len = self.args.vocab_size, self.args.max_seq_len
        sequences = [crop_to_context(prompt, max_seq_len) for prompt in prompts]        # without the tokens of `unread`
        unread: deque[SampledTokens] = deque()
        cache = self.new_cache(len(prompts), min(max_seq_len, max(map(len, prompts)) + max_new_tokens))
        noise = exponential_noise(params, sample_ids, vocab_size, self.device)
        occurred = None                     # or (B, vocab_size)
        if params.repetition_penalty != 1:
            occurred = occurrence_mask(prompts, vocab_size, self.device)
        tokens = torch.empty(0)             # the first step has only the prompts
        for _ in range(max_new_tokens):
            if unread and cache.rows_to_prefill():
                yield from read_steps(unread, sequences, max_seq_len)
            with _NO_TORCH_FUNCTION():
                logits = self._next_logits(sequences, tokens, cache)                    # (B, vocab_size)
            tokens = sample_token(logits, params, next(noise), occurred)                # (B,)
            if occurred is not None:
                occurred.scatter_(1, tokens[:, None], True)
            unread.append(SampledTokens(tokens, logits, with_logprobs))
            yield from read_steps(unread, sequences, max_seq_len, self.read_ahead)
        yield from read_steps(unread, sequences, max_seq_len)

    def _next_logits(self, sequences: list[list[int]], tokens: Tensor, cache: KVCache) -> Tensor:
        """Return the logits (B, vocab_size) after sequences of at most max_seq_len. tokens: (B,), their last ids."""
        rows = cache.rows_to_prefill()
        if len(rows) == len(sequences):
            return self.prefill(sequences, cache, rows)
        logits = self.decode(tokens, cache)
        if rows:
            new_logits = self.prefill([sequences[row] for row in rows], cache, rows)
            logits = logits.index_copy(0, self._int_tensor(rows), new_logits)
        return logits

    def _int_tensor(self, numbers: list) -> Tensor:
        """Return nested lists of integers as a tensor on the device."""
        return to_device(torch.tensor(numbers), self.device)

    def new_cache(self, batch: int, cache_len: int) -> KVCache:
        return KVCache(torch.zeros(self.args.n_layers, batch, 2 * self.n_kv_heads, cache_len, self.args.head_dim,
                                   device=self.device, dtype=self.cache_dtype))

    def prefill(self, prompts: list[list[int]], cache: KVCache, rows: list[int]) -> Tensor:
        """Run prompts and fill these rows of the cache. Returns the logits (rows, vocab_size) after each prompt."""
        width = max(map(len, prompts))
        padded = [ids + ids[:1] * (width - len(ids)) for ids in prompts]
        x = self._run_sequences(padded, cache, rows)                                # (rows * width, dim + 1)
        for row, ids in zip(rows, prompts):
            cache.lengths[row] = len(ids)
        last = [i * width + len(ids) - 1 for i, ids in enumerate(prompts)]
        return self._logits(x[self._int_tensor(last)])

    def _run_sequences(self, sequences: list[list[int]], cache: KVCache | None = None, rows: list[int] | None = None
                       ) -> Tensor:
        """Run sequences of equal length T and write keys and values to rows of a cache. Returns (B * T, dim + 1)."""
        tokens = self._int_tensor(sequences)                                         # (B, T)
        if cache is not None:
            cache_rows = self._int_tensor(rows)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            qkv = qkv.unflatten(0, tokens.shape)                                    # (B, T, H + 2 K, D)
            if cache is not None:
                cache.write_prompt(layer, cache_rows, qkv[:, :, self.n_heads:])
            q, k, v = qkv.transpose(1, 2).split((self.n_heads, self.n_kv_heads, self.n_kv_heads), 1)
            return causal_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2).flatten(0, 1)

        return self._run_layers(tokens, self._rope_factors(slice(tokens.shape[1])), attend)

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Run one new token per sequence, (B,). Returns the logits (B, vocab_size) after it."""
        cache.advance()
        return self._decode_at_position(tokens, cache)

    def _decode_at_position(self, tokens: Tensor, cache: KVCache) -> Tensor:
        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, kv = qkv.split_with_sizes((self.n_heads, 2 * self.n_kv_heads), 1)
            cache.write(layer, kv)
            keys, values = cache.read(layer)                                        # (B, K, end, D)
            q = q.unflatten(1, (self.n_kv_heads, -1))       # (B, K, H / K, D): H / K queries per key-value head
            out = F.scaled_dot_product_attention(q, keys, values, cache.mask, scale=1.0)
            return out.reshape(len(tokens), -1)

        return self._logits(self._run_layers(tokens[:, None], self._rope_factors(cache.position), attend))

    @torch.inference_mode()
    def logprobs(self, ids: list[int]) -> Iterator[Tensor]:
        """Yield the log-probabilities (T, vocab_size) after each id except the last, one window at a time.

        Each window has max_seq_len ids, the last one possibly fewer, and does not see earlier windows.
        """
        for begin in range(0, len(ids) - 1, self.args.max_seq_len):
            window = ids[:-1][begin:begin + self.args.max_seq_len]
            with _NO_TORCH_FUNCTION():
                logprobs = self._logits_of_window(window).log_softmax(-1)
            yield logprobs

    def _logits_of_window(self, ids: list[int]) -> Tensor:
        return self._logits(self._run_sequences([ids]))

    def _rope_factors(self, positions: int | slice | Tensor) -> Tensor:
        """Return the complex factors of q, k and v at these positions, (..., H + 2 K, D / 2). For v they are 1."""
        rope = self.rope[positions]                                                 # (..., 1, D / 2)
        rotations = rope.expand(*rope.shape[:-2], self.n_heads + self.n_kv_heads, -1)
        ones = torch.ones_like(rope).expand(*rope.shape[:-2], self.n_kv_heads, -1)
        return torch.cat((rotations, ones), -2)

    def _run_layers(self, tokens: Tensor, rope: Tensor, attend: AttentionFn) -> Tensor:
        """Run all layers on tokens (B, T). Returns (B * T, dim + 1), before the final norm."""
        pairs_shape = (*tokens.shape, -1, self.args.head_dim // 2, 2)
        x = F.embedding(tokens.flatten(), self.embeddings)                          # (B * T, dim + 1)
        residual = x[:, :-1]                # a view: adding to it in place updates x
        for layer, (wqkv, wo, w13, w2) in enumerate(self.layers):
            pairs = wqkv(_rms_norm(residual, x)).float().view(pairs_shape)
            rotated = torch.view_as_complex(pairs) * rope                           # (B, T, H + 2 K, D / 2)
            qkv = torch.view_as_real(rotated).view(len(x), -1, self.args.head_dim)          # (B * T, H + 2 K, D)
            residual += wo(attend(layer, qkv.to(self.cache_dtype)))
            gate, up = w13(_rms_norm(residual, x)).chunk(2, -1)
            residual += w2(F.silu(gate).mul_(up))
        return x

    def _logits(self, x: Tensor) -> Tensor:
        """Return the float32 logits of rows from `_run_layers`."""
        return self.output(_rms_norm(x[:, :-1], x)).float()


def _rms_norm(residual: Tensor, x: Tensor) -> Tensor:
    """Return RMSNorm(residual), (rows, dim), without the factors of `folded_norm_weight`.

    x: (rows, dim + 1), the residual stream with a last column that adds norm_eps.
    """
    return residual / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


class PlainEngine(Engine):
    """An engine that runs the model's own forward on all tokens for each new one: slow, but correct after any edit."""

    def __init__(self, model: Transformer, device: torch.device | None = None):
        self.args = model.args
        self.device = device or next(model.parameters()).device
        self.read_ahead = 0
        self.model = copy.deepcopy(model).to(self.device, torch.float32).eval()

    def new_cache(self, batch: int, cache_len: int) -> None:
        return None

    def _next_logits(self, sequences: list[list[int]], tokens: Tensor, cache: None) -> Tensor:
        return torch.cat([self._logits_of_window(ids)[-1:] for ids in sequences])

    def _logits_of_window(self, ids: list[int]) -> Tensor:
        return self.model(self._int_tensor([ids]))[0].float()


def build_engine(model: nn.Module, dtype: torch.dtype = torch.float32, quantize: str = "", compiled: bool = False,
                 device: torch.device | None = None) -> Engine:
    """Build a model's engine. compiled: decode with extras/compiled.py. For the other arguments, see Engine."""
    engine_class = Engine if isinstance(model, Transformer) else optional.load("gpt2").GPT2Engine
    if engine_class is Engine and not model_is_original():
        if quantize or compiled:
            raise UserError("model.py was edited, so --quantize and --compile do not work")
        return PlainEngine(model, device)
    if compiled:
        device = device or next(model.parameters()).device
        engine_class = optional.load("compiled").compiled_engine_class(engine_class, quantize, device)
    return engine_class(model, dtype, quantize, device)


def read_steps(unread: deque[SampledTokens], sequences: list[list[int]], max_seq_len: int, keep: int = 0
               ) -> Iterator[SampledTokens]:
    """Yield all unread steps but the newest `keep`, and append their tokens to the sequences."""
    while len(unread) > keep:
        step = unread.popleft()
        for row, token in enumerate(step.ids()):
            sequences[row] = crop_to_context([*sequences[row], token], max_seq_len)
        yield step


def crop_to_context(ids: list[int], max_seq_len: int) -> list[int]:
    """Return ids, or if they exceed max_seq_len, the first id and the last max_seq_len // 2."""
    return ids if len(ids) <= max_seq_len else ids[:1] + ids[len(ids) - max_seq_len // 2:]


# ---- fused weights ------------------------------------------------------------------------------

def fuse_layer_weights(layer: TransformerBlock, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a layer's four matrices in float32: wq, wk and wv fused; wo; w1 and w3 fused; w2."""
    attention, ffn = layer.attention, layer.feed_forward
    linears = (attention.wq, attention.wk, attention.wv, attention.wo, ffn.w1, ffn.w2, ffn.w3)
    wq, wk, wv, wo, w1, w2, w3 = [linear.weight.to(device, torch.float32) for linear in linears]
    wq = wq * attention.args.head_dim ** -0.5
    wqkv = torch.cat((wq, wk, wv)) * folded_norm_weight(layer.attention_norm, device)
    w13 = torch.cat((w1, w3)) * folded_norm_weight(layer.ffn_norm, device)
    return wqkv, wo, w13, w2


def folded_norm_weight(norm: RMSNorm, device: torch.device) -> Tensor:
    """Return the factors that `_rms_norm` omits: the norm's weight, and sqrt(dim) to turn the sum into a mean."""
    return norm.weight.to(device, torch.float32) * norm.weight.numel() ** 0.5


def choose_linear(dtype: torch.dtype, quantize: str, device: torch.device) -> Callable[[Tensor], LinearFn]:
    """Return a function from a weight (out, in) to a linear layer. Raises UserError if `quantize` is not supported."""
    if quantize and (quantize != "int8" or device.type != "cpu"):
        raise UserError(f"--quantize supports int8 on a CPU, not {quantize} on {device}")
    if quantize:
        return linear_int8
    if device.type == "cpu" and dtype == torch.float16:
        return linear_fp16
    return partial(linear, dtype=dtype)


def linear(weight: Tensor, dtype: torch.dtype) -> LinearFn:
    """Return a linear layer with weights, inputs and results in `dtype`."""
    weight = weight.to(dtype)
    return lambda x: F.linear(x.to(dtype), weight)


def linear_fp16(weight: Tensor) -> LinearFn:
    """Return a CPU linear layer with float16 weights, float32 inputs and results (FBGEMM, arXiv 2101.05615)."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), None)
    product = torch.ops.quantized.linear_dynamic_fp16.default._op       # skips PyTorch's checks in Python
    return lambda x: product(x, packed)


def linear_int8(weight: Tensor) -> LinearFn:
    """Return a linear layer with int8 weights and a scale per row, and bfloat16 inputs and results."""
    if weight.shape[1] % 16:                # PyTorch's kernel reads beyond the end of such rows
        return linear(weight, torch.float32)
    levels, scale = quantize_int8(weight)
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), levels, scale)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to 255 levels. Returns the levels (int8) and the scale of each row (bfloat16)."""
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
    return (weight / scale[:, None]).round().to(torch.int8), scale
