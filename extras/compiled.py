"""A layer's work on one token as one C++ function, and attention of several texts: `python sample.py --compile`.

    layers = CompiledLayers(args, rope)
    for layer in model.layers:
        layers.add(matrices of the layer)
    x = layers(x, length, cache)                # what engine.py does with some 30 operations a layer

A small model's token costs engine.py more time for starting operations than for their arithmetic. PyTorch's compiler
makes one function of them all, as long as none is a call into a library: so the products are spelled out, multiply
and sum. With a single token nothing is lost by that, since each weight is read once and reading is what takes the time.
Products of several texts at once are better left to the library; for them, attention alone is compiled.

A function takes the weights as arguments. One is enough for all layers and for every checkpoint of that shape, and is
kept in a file: compiling takes about 15 seconds for each of the two, loading a few milliseconds.
"""
import hashlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ModelArgs
from tinyllm import device
from tinyllm.cli import UserError
from tinyllm.files import atomic_replace, sha256
from tinyllm.weights import quantize_int8

FOLDER = Path(os.path.expanduser("~/.cache/tiny-llm"))
DYNAMIC = torch.export.Dim.DYNAMIC
COMPILER = {        # of PyTorch's compiler; each is worth a tenth of the time, or more
    "cpp.enable_floating_point_contract_flag": "fast",      # multiply and add are one instruction
    "aot_inductor.allow_stack_allocation": True,            # no allocation for small tensors on the way
}


class CompiledLayers:
    """The layers of a model for one token of one text, on a CPU."""

    def __init__(self, args: ModelArgs, rope: Tensor, dtype: torch.dtype = torch.float32, quantize: str = ""):
        """Weights are kept in `dtype`, or with quantize "int8" in 8 bits. rope: (2, max_seq_len, D / 2)."""
        self.args, self.quantize, self.dtype = args, quantize, torch.float32 if quantize else dtype
        self.rope = rope.movedim(1, 0).contiguous()                        # (max_seq_len, 2, D / 2)
        self.weights: list[list[Tensor]] = []
        self.run: Callable[[list[Tensor]], list[Tensor]] | None = None

    def add(self, matrices: list[Tensor]) -> None:
        """Add a layer, as engine.py arranges its matrices."""
        parts = []
        for matrix in matrices:
            packs = self.quantize and matrix.shape[1] % 16 == 0
            parts += _pack(matrix) if packs else (matrix.to(self.dtype).contiguous(), torch.ones(1))
        self.weights.append(parts)

    def load(self) -> None:
        """Get ready. Raises UserError when compiling cannot be done here."""
        if self.run is None:
            x, past = torch.zeros(1, self.args.dim), torch.zeros(1, 2 * self.args.n_kv_heads, 16, self.args.head_dim)
            self.run = _load(DecodeLayer(self.args), (x, self.rope[0], torch.tensor([1]), past, *self.weights[0]),
                             (None, None, None, {2: DYNAMIC}, (None,) * 8))

    def __call__(self, x: Tensor, length: int, cache: Tensor) -> Tensor:
        """Run a token after `length` others.

        Args:
            x: (1, dim + 1); what is beyond dim stays.
            cache: (n_layers, 1, 2 K, room, D), keys and then values; those of the token are added.
        Returns:
            x, before the last norm.
        """
        turns, at, stream = self.rope[length], torch.tensor([length]), x[:, :-1]
        for weights, past, place in zip(self.weights, cache.unbind(), cache[:, :, :, length].unbind()):
            stream, fresh = self.run([stream, turns, at, past, *weights])
            place.copy_(fresh)
        return torch.cat((stream, x[:, -1:]), 1)


class CompiledAttention:
    """Attention of one more token of each of several texts, on a CPU."""

    def __init__(self, args: ModelArgs):
        self.args = args
        self.run: Callable[[list[Tensor]], list[Tensor]] | None = None

    def load(self) -> None:
        """Get ready. Raises UserError when compiling cannot be done here."""
        if self.run is None:
            both, size = 2 * self.args.n_kv_heads, self.args.head_dim
            heads, past = torch.zeros(2, self.args.n_heads + both, size), torch.zeros(2, both, 16, size)
            self.run = _load(DecodeAttention(self.args), (heads, torch.tensor([1, 2]), past),
                             ({0: DYNAMIC}, {0: DYNAMIC}, {0: DYNAMIC, 2: DYNAMIC}))

    def __call__(self, heads: Tensor, lengths: Tensor, past: Tensor) -> Tensor:
        """heads: (B, H + 2 K, D), turned; lengths: (B,), 1 or more; past: (B, 2 K, room, D). Returns (B, dim)."""
        return self.run([heads, lengths, past])[0]


class CudaGraphStep:
    """A step of a batch on an NVIDIA GPU, as a CUDA graph: all its kernels are started at once, as one thing.

    Recording fixes the addresses, so the tokens and their places are copied to where they were the first time, and
    attention goes over all the room of the cache.
    """

    def __init__(self, extend: Callable[[Tensor, Tensor, Tensor], Tensor], cache: Tensor):
        """extend(cache, tokens (B,), places (B, 1)) gives logits (B, vocab_size) without synchronising with the CPU."""
        self.extend, self.cache = extend, cache
        self.graph = None

    def __call__(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        places = torch.tensor(lengths)[:, None]
        if self.graph is None:
            self.tokens, self.places = tokens.clone(), places.to(tokens.device)
            self._record()
        self.tokens.copy_(tokens)
        self.places.copy_(places)
        self.graph.replay()
        return self.logits.clone()

    def _record(self) -> None:
        with torch.cuda.device(self.tokens.device):
            aside = torch.cuda.Stream()                 # libraries set themselves up in a first run, outside the graph
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self.extend(self.cache, self.tokens, self.places)
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=aside):    # what cuBLAS keeps for the stream goes with it
                self.logits = self.extend(self.cache, self.tokens, self.places)


class DecodeLayer(nn.Module):
    """The arithmetic of a layer, in words that the compiler can join: no library calls, no views of complex numbers."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args

    def forward(self, x: Tensor, turns: Tensor, length: Tensor, past: Tensor,
                *weights: Tensor) -> tuple[Tensor, Tensor]:
        """x: (1, dim); turns: (2, D / 2); length: (1,); past: (1, 2 K, room, D); weights and scales of four matrices.

        Returns x after the layer, and the token's keys and values (1, 2 K, D).
        """
        n_heads, n_kv, size = self.args.n_heads, self.args.n_kv_heads, self.args.head_dim
        qkv, out, up, down = zip(weights[::2], weights[1::2])
        heads = (_product(x, *qkv) * self._norm(x)).view(1, -1, size)                       # (1, H + 2 K, D)
        even, odd = heads[:, :n_heads + n_kv].unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = turns
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
        k, v = turned[:, n_heads:], heads[:, n_heads + n_kv:]                               # (1, K, D)
        x = x + _product(_attention(turned[:, :n_heads], k, v, length, past), *out)
        gate, value = (_product(x, *up) * self._norm(x)).chunk(2, -1)
        return x + _product(F.silu(gate) * value, *down), torch.cat((k, v), 1)

    def _norm(self, x: Tensor) -> Tensor:
        """What a product of x is multiplied with, so that it is one of the normed x."""
        return torch.rsqrt((x * x).sum(-1, keepdim=True) + self.args.dim * self.args.norm_eps)


class DecodeAttention(nn.Module):
    """The arithmetic of CompiledAttention."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args

    def forward(self, heads: Tensor, lengths: Tensor, past: Tensor) -> tuple[Tensor]:
        q, k, v = heads.split((self.args.n_heads, self.args.n_kv_heads, self.args.n_kv_heads), 1)
        return _attention(q, k, v, lengths, past),


def _attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, past: Tensor) -> Tensor:
    """Attention of a token to `lengths` others, and to its own k and v, which are not in the cache yet.

    q: (B, H, D); k and v: (B, K, D); lengths: (B,); past: (B, 2 K, room, D). Returns (B, H * D).
    """
    known = lengths.amax().item()
    torch._check(1 <= known)
    torch._check(known <= past.shape[2])
    keys, values = past.narrow(2, 0, known).chunk(2, 1)                                     # (B, K, known, D)
    q = q.unflatten(1, (k.shape[1], -1))                                                    # (B, K, H / K, D)
    scores = (q[:, :, :, None] * keys[:, :, None]).sum(-1)                                  # (B, K, H / K, known)
    seen = torch.arange(known) < lengths[:, None]                                           # (B, known)
    scores = torch.where(seen[:, None, None], scores, -torch.inf)
    own = (q * k[:, :, None]).sum(-1, keepdim=True)                                         # (B, K, H / K, 1)
    top = torch.maximum(scores.amax(-1, keepdim=True), own)
    scores, own = (scores - top).exp(), (own - top).exp()
    mixed = (scores[..., None] * values[:, :, None]).sum(-2) + own * v[:, :, None]          # (B, K, H / K, D)
    return (mixed / (scores.sum(-1, keepdim=True) + own)).flatten(1)


def _product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x @ weight.T of a single row; weight as plain numbers, or from `_pack`."""
    x = x.as_strided(x.shape, x.stride())       # has x computed and stored, instead of anew for each row of weight
    if len(scale) == 1:
        return (x[:, None] * weight.float()).sum(-1)
    four, size = weight.view(torch.int32), weight.shape[1]
    begins = [min(i * size, x.shape[1] - size) for i in range(4)]       # of each quarter
    # a byte is a number where it is highest in its word: 2 ** 24 times as large, which is in the scale
    first, *others = (x[:, None, begin:begin + size] * (four << 24 - 8 * i & -1 << 24)
                      for i, begin in enumerate(begins))
    return sum(others, first).sum(-1) * scale


def _pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (rows, width) of 8 bits, four to a word, and the scale of each row.

    Byte i of a row's words holds its i-th quarter, so that a shift of several words gives neighbours. A quarter has a
    whole number of 16 columns, because a processor takes so many at once and loses time with fewer; where the last
    ones would reach beyond the row they begin earlier, and hold zeros where another has been. The words go by as
    float32, a type that the compiler's C++ loads without detours; nothing computes with them as such.
    """
    levels, scale = quantize_int8(weight)
    size = -(-weight.shape[1] // 64) * 16
    words = torch.zeros(len(weight), size, 4, dtype=torch.int8)
    for i in range(4):
        fresh = levels[:, i * size:(i + 1) * size]
        words[:, size - fresh.shape[1]:, i] = fresh
    return words.view(torch.float32).squeeze(-1), scale.float() / 2 ** 24


def _load(work: DecodeLayer | DecodeAttention, example: tuple[Tensor, ...], sizes: tuple
          ) -> Callable[[list[Tensor]], list[Tensor]]:
    """The compiled function, from its file if there is one.

    It checks nothing that it is given, so all that it was made for is in the file's name.

    Args:
        sizes: which dimensions of the tensors may differ from those of the example.
    """
    shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in example]
    args = work.args
    key = repr([type(work), args.n_heads, args.norm_eps, shapes, torch.__version__, torch.get_num_threads(),
                sorted(torch.cpu.get_capabilities().items()), Path(__file__).read_bytes()])
    if not FOLDER.is_absolute():
        raise UserError("--compile keeps its code in your home directory, and there is none; leave it out")
    path = FOLDER / f"{type(work).__name__}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt2"
    if not _is_intact(path):
        _compile(work, example, sizes, path)
    try:
        # the class that torch._inductor.aoti_load_package wraps, without the two seconds of that import
        return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).run
    except RuntimeError as error:
        raise UserError(f"--compile does not work here; leave it out: {str(error).splitlines()[0]}") from error


def _is_intact(path: Path) -> bool:
    """Whether a file is there, and as it was written: damaged machine code may end the process."""
    digest = path.with_suffix(".sha256")
    return path.is_file() and digest.is_file() and digest.read_bytes() == sha256(path).encode()


def _compile(work: nn.Module, example: tuple[Tensor, ...], sizes: tuple, path: Path) -> None:
    if why := device.why_no_compiler():
        raise UserError(f"--compile cannot be had here: {why}; leave it out, or mend that")
    temporary = path.with_suffix(f".{os.getpid()}.pt2")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise UserError(f"--compile keeps its code in {path.parent}, and cannot write there; leave it out") from error
    texts = "single texts" if isinstance(work, DecodeLayer) else "several texts at a time"
    print(f"compiling for {texts}, once for models of this shape: about 15 seconds", file=sys.stderr, flush=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(work, example, dynamic_shapes=sizes)
            torch._inductor.aoti_compile_and_package(program, package_path=str(temporary), inductor_configs=COMPILER)
        atomic_replace(temporary, path)
        path.with_suffix(".sha256").write_text(sha256(path), encoding="utf-8")
    except UnicodeError as error:           # Windows in Chinese, Japanese, Korean: another encoding than UTF-8
        raise UserError(f"--compile does not work here; leave it out: {device.NOT_UTF8}") from error
    except (torch._inductor.exc.InductorError, torch._inductor.exc.CppCompileError) as error:
        raise UserError(f"--compile does not work here; leave it out: {str(error).splitlines()[0]}") from error
    finally:
        temporary.unlink(missing_ok=True)
