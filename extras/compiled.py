"""Compiled decoding on a CPU, CUDA graphs on an NVIDIA GPU: `python sample.py --compile`.

For one token of a small model, engine.py spends more time launching operations, about 30 per layer, than computing.
PyTorch's compiler fuses them into one C++ function if none of them calls a library. So matrix products are written as
elementwise multiply and sum, which is as fast for a single token, because reading the weights dominates. For several
sequences the library is faster, so only their attention is compiled.

The weights are arguments, so one function serves all layers and all checkpoints of a shape. Each of the two functions
compiles for about 15 seconds, once, and is then loaded from a file.
"""
import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ModelArgs, Transformer
from tinyllm import compat, device
from tinyllm.cli import UserError
from tinyllm.device_errors import compiler_problem
from tinyllm.engine import DecodeStep, Engine, KVCache, LinearFn
from tinyllm.files import atomic_replace, sha256

FOLDER = Path(os.path.expanduser("~/.cache/tiny-llm"))
DYNAMIC = torch.export.Dim.DYNAMIC
COMPILER_OPTIONS = {        # each saves at least 10% of the time
    "cpp.enable_floating_point_contract_flag": "fast",      # fused multiply-add
    "aot_inductor.allow_stack_allocation": True,            # small intermediate tensors are not allocated
}

CompiledFn = Callable[[list[Tensor]], list[Tensor]]


def compiled_engine_class(engine_class: type[Engine], quantize: str, device: torch.device) -> type[Engine]:
    """Return a subclass of engine_class that decodes with compiled code. Raises UserError if this is not supported."""
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--compile supports CPUs and NVIDIA GPUs, not {device}")
    if device.type == "cuda":
        return type("CudaGraphEngine", (CudaGraphDecode, engine_class), {})
    if engine_class is not Engine:
        raise UserError("--compile supports only Llama models on a CPU, not GPT-2")
    if quantize:
        raise UserError(f"--compile does not work with --quantize {quantize}")
    return CompiledEngine


class CompiledEngine(Engine):
    """A CPU engine that decodes with compiled code."""

    def __init__(self, model: Transformer, dtype: torch.dtype = torch.float32, quantize: str = "",
                 device: torch.device | None = None):
        self.weight_dtype = dtype
        self.layer_weights: list[list[Tensor]] = []
        self.run_layer: CompiledFn | None = None
        self.run_attention: CompiledFn | None = None
        super().__init__(model, dtype, quantize, device)
        self.cos_sin = model.rope.to(self.device).movedim(1, 0).contiguous()            # (max_seq_len, 2, D / 2)

    def _add_layer(self, matrices: tuple[Tensor, ...], make_linear: Callable[[Tensor], LinearFn]) -> None:
        super()._add_layer(matrices, make_linear)
        self.layer_weights.append([matrix.to(self.weight_dtype).contiguous() for matrix in matrices])

    def generate(self, prompts: list[list[int]], *args, **options) -> Iterator[DecodeStep]:
        """Load compiled code, then call Engine.generate. Raises UserError if compiling does not work here."""
        if len(prompts) == 1:
            self.load_layer()
        else:
            self.load_attention()
        return super().generate(prompts, *args, **options)

    def load_layer(self) -> None:
        kv = torch.zeros(1, 2 * self.n_kv_heads, 16, self.args.head_dim)
        example = (torch.zeros(1, self.args.dim), self.cos_sin[0], torch.tensor([1]), kv, *self.layer_weights[0])
        dynamic_dims = (None, None, None, {2: DYNAMIC}, None, None, None, None)
        self.run_layer = self.run_layer or load_function(DecodeLayer(self.args), example, dynamic_dims)

    def load_attention(self) -> None:
        qkv = torch.zeros(2, self.n_heads + 2 * self.n_kv_heads, self.args.head_dim)
        example = (qkv, torch.tensor([1, 2]), torch.zeros(2, 2 * self.n_kv_heads, 16, self.args.head_dim))
        dynamic_dims = ({0: DYNAMIC}, {0: DYNAMIC}, {0: DYNAMIC, 2: DYNAMIC})
        self.run_attention = self.run_attention or load_function(DecodeAttention(self.args), example, dynamic_dims)

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        cache.advance()
        return self._decode_single(tokens, cache) if len(tokens) == 1 else self._decode_batch(tokens, cache)

    def _decode_single(self, tokens: Tensor, cache: KVCache) -> Tensor:
        x = F.embedding(tokens, self.embeddings)                                    # (1, dim + 1)
        residual = x[:, :-1]
        cos_sin = self.cos_sin[cache.position]                                      # (2, D / 2)
        length = torch.tensor([cache.position])
        for layer, (weights, kv) in enumerate(zip(self.layer_weights, cache.kv.unbind())):
            residual, new_kv = self.run_layer([residual, cos_sin, length, kv, *weights])
            cache.write(layer, new_kv)
        return self._logits(torch.cat((residual, x[:, -1:]), 1))

    def _decode_batch(self, tokens: Tensor, cache: KVCache) -> Tensor:
        position = cache.position
        lengths = torch.full((len(tokens),), position) if isinstance(position, int) else position.flatten()     # (B,)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            cache.write(layer, qkv[:, self.n_heads:])
            return self.run_attention([qkv, lengths, cache.kv[layer]])[0]

        return self._logits(self._run_layers(tokens[:, None], self._rope_factors(cache.position), attend))


class CudaGraphDecode:
    """Mixin for an engine that decodes with CUDA graphs; list it before the engine class."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.steps: WeakKeyDictionary[KVCache, CudaGraphStep] = WeakKeyDictionary()

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        if cache not in self.steps:
            self.steps[cache] = CudaGraphStep(self._decode_at_position)
        return self.steps[cache](tokens, cache)


class CudaGraphStep:
    """A decode step recorded as a CUDA graph, which launches all its kernels at once.

    The graph reads fixed addresses, so tokens and positions are copied there, and attention reads the complete cache.
    decode(tokens (B,), cache) must return logits (B, vocab_size) without synchronizing with the CPU.
    """

    def __init__(self, decode: Callable[[Tensor, KVCache], Tensor]):
        self.decode = decode
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        positions = device.to_device(torch.tensor(cache.advance_lengths())[:, None], tokens.device)     # (B, 1)
        if self.graph is None:
            self.tokens = tokens.clone()
            self.positions = positions.clone()
            self.record(cache)
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.logits.clone()

    def run(self, cache: KVCache) -> Tensor:
        cache.move_to(self.positions, cache.cache_len)
        return self.decode(self.tokens, cache)

    def record(self, cache: KVCache) -> None:
        with torch.cuda.device(self.tokens.device):
            side_stream = torch.cuda.Stream()           # libraries initialize in a first run, outside the graph
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):
                self.run(cache)
            torch.cuda.current_stream().wait_stream(side_stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=side_stream):      # reuses this stream's cuBLAS workspace
                self.logits = self.run(cache)


# ---- modules to compile -------------------------------------------------------------------------

class DecodeLayer(nn.Module):
    """A layer for one token, without library calls and complex numbers, so that the compiler can fuse it."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args

    def forward(self, x: Tensor, cos_sin: Tensor, length: Tensor, kv_cache: Tensor, wqkv: Tensor, wo: Tensor,
                w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        """Run a token that follows `length` cached tokens.

        x: (1, dim); cos_sin: (2, D / 2); length: (1,); kv_cache: (1, 2 K, cache_len, D); four matrices (out, in).
        Returns x after the layer, and the token's keys and values (1, 2 K, D).
        """
        n_heads, n_kv_heads = self.args.n_heads, self.args.n_kv_heads
        qkv = (_linear(x, wqkv) * self._inverse_norm(x)).view(1, -1, self.args.head_dim)        # (1, H + 2 K, D)
        even, odd = qkv[:, :n_heads + n_kv_heads].unflatten(-1, (-1, 2)).unbind(-1)             # (1, H + K, D / 2)
        cos, sin = cos_sin
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
        q, k = rotated[:, :n_heads], rotated[:, n_heads:]                                       # (1, H, D), (1, K, D)
        v = qkv[:, n_heads + n_kv_heads:]                                                       # (1, K, D)
        x = x + _linear(_attention(q, k, v, length, kv_cache), wo)
        gate, up = (_linear(x, w13) * self._inverse_norm(x)).chunk(2, -1)
        return x + _linear(F.silu(gate) * up, w2), torch.cat((k, v), 1)

    def _inverse_norm(self, x: Tensor) -> Tensor:
        """Return the factor that turns a product with x into a product with RMSNorm(x)."""
        return torch.rsqrt((x * x).sum(-1, keepdim=True) + self.args.dim * self.args.norm_eps)


class DecodeAttention(nn.Module):
    """Attention for one new token per sequence."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args

    def forward(self, qkv: Tensor, lengths: Tensor, kv_cache: Tensor) -> tuple[Tensor]:
        """Return (B, H * D). qkv: (B, H + 2 K, D), rotated; lengths: (B,), >= 1; kv_cache: (B, 2 K, cache_len, D)."""
        q, k, v = qkv.split((self.args.n_heads, self.args.n_kv_heads, self.args.n_kv_heads), 1)
        return _attention(q, k, v, lengths, kv_cache),


def _attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, kv_cache: Tensor) -> Tensor:
    """Return a token's attention to `lengths` cached tokens and to its own k and v, which the cache may lack.

    q: (B, H, D); k and v: (B, K, D); lengths: (B,); kv_cache: (B, 2 K, cache_len, D). Returns (B, H * D).
    """
    longest = lengths.amax().item()
    torch._check(1 <= longest)
    torch._check(longest <= kv_cache.shape[2])
    keys, values = kv_cache.narrow(2, 0, longest).chunk(2, 1)                               # (B, K, longest, D)
    q = q.unflatten(1, (k.shape[1], -1))                                                    # (B, K, H / K, D)
    scores = (q[:, :, :, None] * keys[:, :, None]).sum(-1)                                  # (B, K, H / K, longest)
    is_cached = torch.arange(longest) < lengths[:, None]                                    # (B, longest)
    scores = torch.where(is_cached[:, None, None], scores, -torch.inf)
    self_score = (q * k[:, :, None]).sum(-1, keepdim=True)                                  # (B, K, H / K, 1)
    max_score = torch.maximum(scores.amax(-1, keepdim=True), self_score)
    exp_scores = (scores - max_score).exp()
    exp_self = (self_score - max_score).exp()
    out = (exp_scores[..., None] * values[:, :, None]).sum(-2) + exp_self * v[:, :, None]   # (B, K, H / K, D)
    return (out / (exp_scores.sum(-1, keepdim=True) + exp_self)).flatten(1)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T for a single row x."""
    x = x.as_strided(x.shape, x.stride())       # stores x; else it is recomputed for each row of weight
    return (x[:, None] * weight.float()).sum(-1)


# ---- compiling ----------------------------------------------------------------------------------

def load_function(module: DecodeLayer | DecodeAttention, example: tuple[Tensor, ...], dynamic_dims: tuple
                  ) -> CompiledFn:
    """Return a module's compiled forward, from its file or after compiling.

    dynamic_dims: the dimensions of each tensor that may differ from the example's.
    """
    path = compiled_path(module, example)
    if not is_intact(path):
        compile_to_file(module, example, dynamic_dims, path)
    try:
        # torch._inductor.aoti_load_package wraps this class, but importing it takes 2 seconds
        return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).run
    except RuntimeError as error:
        raise does_not_work(error) from error


def compiled_path(module: DecodeLayer | DecodeAttention, example: tuple[Tensor, ...]) -> Path:
    """Return a path that depends on shapes, machine and this file, because compiled code checks no arguments."""
    shapes = [(tensor.shape, tensor.dtype) for tensor in example]
    machine = [torch.__version__, torch.get_num_threads(), sorted(compat.cpu_features().items())]
    source = Path(__file__).read_bytes()
    key = repr([type(module), module.args.n_heads, module.args.norm_eps, shapes, machine, source])
    return FOLDER / f"{type(module).__name__}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt2"


def is_intact(path: Path) -> bool:
    """True if the file matches its checksum. Damaged machine code could crash the process."""
    digest = path.with_suffix(".sha256")
    return path.is_file() and digest.is_file() and digest.read_bytes() == sha256(path).encode()


def compile_to_file(module: nn.Module, example: tuple[Tensor, ...], dynamic_dims: tuple, path: Path) -> None:
    if reason := device.why_no_compiler():
        raise UserError(f"--compile does not work here: {reason}")
    compat.require_pytorch(compat.OLDEST_FOR_EXPORT, "--compile")
    from torch._inductor.exc import CppCompileError, InductorError      # takes a second
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.pt2")
    purpose = "single texts" if isinstance(module, DecodeLayer) else "several texts at a time"
    print(f"compiling for {purpose}, once per model shape: about 15 seconds", file=sys.stderr, flush=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, example, dynamic_shapes=dynamic_dims)
            torch._inductor.aoti_compile_and_package(program, package_path=str(temporary),
                                                     inductor_configs=COMPILER_OPTIONS)
        atomic_replace(temporary, path)
        path.with_suffix(".sha256").write_text(sha256(path), encoding="utf-8")
    except (UnicodeError, InductorError, CppCompileError) as error:
        # UnicodeError: on Windows with a Chinese, Japanese or Korean encoding instead of UTF-8
        raise does_not_work(error) from error
    finally:
        temporary.unlink(missing_ok=True)


def does_not_work(error: Exception) -> UserError:
    return UserError(f"--compile does not work here: {compiler_problem(error)}")
