"""Files of llama2.c (github.com/karpathy/llama2.c): a header, then all weights in a fixed order.

Version 0, for its run.c, has no magic number and contains the rotary tables; version 1 was to follow it; version 2, for
its runq.c, stores matrices as int8 in groups that share a float32 scale. The tokenizer is another file: `story.bin`
goes with `story.tokenizer.bin`, or with a `tokenizer.bin` of the right size.
"""
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from extras.formats.common import make_checkpoint, sentencepiece_model
from model import ModelArgs
from tinyllm.checkpoint import Checkpoint, build_model, build_tokenizer
from tinyllm.cli import UserError
from tinyllm.files import atomic_write
from tokenizer import BYTE, CONTROL, NORMAL, SPACE_MARK, UNKNOWN, BaseTokenizer, Tokenizer

MAGIC = b"24ka"                         # 0x616b3432
HEADER_BYTES = 256                      # of versions 1 and 2
LEGACY_HEADER_BYTES = 28                # of version 0
HEADER_FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
GROUP_SIZE = 64                         # weights that share a scale; halved until it divides all rows
LLAMA2_TOKEN_TYPES = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]        # run.c relies on them
PROBE_SENTENCE = "Once upon a time, there was a girl."
OTHER_TARGETS = "write a .gguf or a folder instead"

Shape = tuple[int, ...]


class Header(NamedTuple):
    version: int
    args: ModelArgs
    group_size: int                     # 0: nothing is quantized
    size: int                           # bytes


# ---- in -----------------------------------------------------------------------------------------

def is_legacy(path: Path) -> bool:
    """True for a file of version 0: it has the size that its first seven numbers imply."""
    try:
        return read_header(path).version == 0
    except UserError:
        return False


def read(path: Path) -> Checkpoint:
    """Read a file of any version, and the tokenizer beside it. Raises UserError if it is damaged.

    The checkpoint has no digest of that tokenizer, because --tokenizer may name another form of it.
    """
    header = read_header(path)
    data = np.memmap(path, mode="c")
    offset = header.size
    model = {}
    for name, shape in tensor_shapes(header.args, header.version):
        n_bytes = tensor_bytes(shape, header.group_size)
        model[name] = decode(data[offset:offset + n_bytes], shape, header.group_size)
        offset += n_bytes
    model.pop("rope", None)
    return {**make_checkpoint(model, asdict(header.args)), "tokenizer": find_tokenizer(path, header.args.vocab_size)}


def read_header(path: Path) -> Header:
    """Read the header. Raises UserError if its numbers do not fit together, or to the size of the file."""
    with open(path, "rb") as file:
        version, numbers, is_tied, group_size = parse_header(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"))
    try:
        args = ModelArgs(**dict(zip(HEADER_FIELDS, numbers)), tie_embeddings=is_tied)
        bad_groups = version == 2 and (group_size < 1 or args.dim % group_size)
        if version not in (0, 1, 2) or args.hidden_dim < 1 or bad_groups:
            raise ValueError(f"version {version}, dim {args.dim}, hidden_dim {args.hidden_dim}, groups of {group_size}")
    except ValueError as error:
        raise UserError(f"{path} is damaged, or no file of llama2.c: {error}") from error
    header = Header(version, args, group_size, HEADER_BYTES if version else LEGACY_HEADER_BYTES)
    expected = header.size
    for _, shape, count in layout(args, version):
        expected += tensor_bytes(shape, group_size) * count
    actual = path.stat().st_size
    if actual != expected:
        raise UserError(f"{path} has {actual:,} bytes; by its header it should have {expected:,}")
    return header


def parse_header(data: bytes) -> tuple[int, list[int], bool, int]:
    """Return version, HEADER_FIELDS, True if the embedding is the output layer too, and group size."""
    if not data.startswith(MAGIC):
        *numbers, vocab_size, max_seq_len = struct.unpack_from("<7i", data)
        return 0, [*numbers, abs(vocab_size), max_seq_len], vocab_size > 0, 0
    version, *numbers, is_tied, group_size = struct.unpack_from("<8iBi", data, len(MAGIC))
    return version, numbers, bool(is_tied), group_size if version == 2 else 0


def decode(data: np.ndarray, shape: Shape, group_size: int) -> Tensor:
    """Return a float32 tensor from its bytes: mapped, or computed from levels and scales."""
    if not is_quantized(shape, group_size):
        return torch.from_numpy(data.view("<f4").reshape(shape))
    count = math.prod(shape)
    levels = data[:count].view(np.int8).reshape(-1, group_size)         # (groups, group_size)
    scales = data[count:].view("<f4")[:, None]                          # (groups, 1)
    return torch.from_numpy((levels * scales).reshape(shape))


def find_tokenizer(path: Path, vocab_size: int) -> bytes | None:
    """Return the tokenizer of that size beside a model."""
    for candidate in (tokenizer_path(path), path.with_name("tokenizer.bin")):
        pieces = read_pieces(candidate)
        if len(pieces) == vocab_size:
            return sentencepiece_model(pieces)
    return None


def read_tokenizer(path: Path) -> bytes | None:
    """Return the SentencePiece model of a tokenizer.bin; None for another file."""
    pieces = read_pieces(path)
    return sentencepiece_model(pieces) if pieces else None


def read_pieces(path: Path) -> list[tuple[str, float, int]]:
    """Return text, score and kind of each entry of a tokenizer.bin; nothing for another file."""
    content = path.read_bytes() if path.is_file() else b""
    longest = int.from_bytes(content[:4], "little")
    offset = 4
    pieces = []
    while offset + 8 <= len(content):
        score, length = struct.unpack_from("<fI", content, offset)
        text = content[offset + 8:offset + 8 + length]
        offset += 8 + length
        if length > longest or offset > len(content):
            return []
        pieces.append(as_piece(len(pieces), text.decode(errors="replace"), score))
    return pieces if offset == len(content) else []


def as_piece(token: int, text: str, score: float) -> tuple[str, float, int]:
    if token < 3:
        return text.strip("\n"), score, LLAMA2_TOKEN_TYPES[token]
    return text.replace(" ", SPACE_MARK), score, BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else NORMAL


# ---- out ----------------------------------------------------------------------------------------

def write(ckpt: Checkpoint, path: Path, version: int) -> None:
    """Write the weights, and the tokenizer beside them. Raises UserError for what llama2.c cannot represent."""
    tokenizer = build_tokenizer(ckpt)
    vocab_size = ckpt["model_args"]["vocab_size"]
    if tokenizer.n_words != vocab_size:
        raise UserError(f"llama2c needs a tokenizer entry for each of {vocab_size} embeddings, and there are "
                        f"{tokenizer.n_words}\n       {OTHER_TARGETS}")
    write_tokenizer(tokenizer, tokenizer_path(path))
    write_weights(ckpt, path, version)


def write_weights(ckpt: Checkpoint, path: Path, version: int) -> None:
    model = build_model(ckpt, copy_weights=False)
    args = replace(model.args, hidden_dim=model.args.ffn_dim)
    check_runnable(args)
    weights = {**model.state_dict(), "rope": model.rope}
    group_size = math.gcd(GROUP_SIZE, args.dim, args.hidden_dim) if version == 2 else 0
    with atomic_write(path) as file:
        file.write(make_header(args, version, group_size))
        for name, _ in tensor_shapes(args, version):
            file.writelines(encode(weights[name].cpu().float(), group_size))


def make_header(args: ModelArgs, version: int, group_size: int) -> bytes:
    numbers = [getattr(args, name) for name in HEADER_FIELDS]
    if version > 0:
        fields = struct.pack("<8iBi", version, *numbers, args.tie_embeddings, group_size)
        return (MAGIC + fields).ljust(HEADER_BYTES, b"\0")
    if not args.tie_embeddings:
        numbers[5] = -numbers[5]        # vocab_size
    return struct.pack("<7i", *numbers)


def check_runnable(args: ModelArgs) -> None:
    """Raise UserError, with the reasons, for a model that run.c would compute wrongly."""
    reasons = []
    for name, expected in (("rope_theta", 10000.0), ("norm_eps", 1e-5)):
        value = getattr(args, name)
        if not math.isclose(value, expected, rel_tol=1e-6):
            reasons.append(f"{name} {value:g} (it computes with {expected:g})")
    if args.rope_scaling:
        reasons.append("a rope_scaling")
    if reasons:
        raise UserError(f"llama2.c cannot run a model with {', '.join(reasons)}\n       {OTHER_TARGETS}")


def encode(weight: Tensor, group_size: int) -> list[bytes]:
    """Return the bytes of a float32 tensor; if quantized, levels from -127 to 127, then the scale of each group."""
    if not is_quantized(weight.shape, group_size):
        return [weight.numpy().tobytes()]
    groups = weight.reshape(-1, group_size)
    scales = groups.abs().amax(1, keepdim=True) / 127                   # (groups, 1)
    levels = (groups / scales.clamp(min=torch.finfo().tiny)).round().to(torch.int8)
    return [levels.numpy().tobytes(), scales.numpy().tobytes()]


def write_tokenizer(tokenizer: BaseTokenizer, path: Path) -> None:
    """Write a tokenizer.bin. Raises UserError for a tokenizer that is not like Llama 2's."""
    if not is_llama2_tokenizer(tokenizer):
        raise UserError("llama2c needs a tokenizer like Llama 2's: byte pairs of SentencePiece, and first unknown, "
                        f"bos, eos and the 256 bytes\n       {OTHER_TARGETS}")
    pieces = tokenizer.pieces()
    texts = [text.replace(SPACE_MARK, " ").encode() for text, _, _ in pieces]
    texts[1] = b"\n" + texts[1] + b"\n"
    texts[2] = b"\n" + texts[2] + b"\n"
    with atomic_write(path) as file:
        file.write(struct.pack("<i", max(map(len, texts))))
        for text, (_, score, _) in zip(texts, pieces):
            file.write(struct.pack("<fi", score, len(text)) + text)


def is_llama2_tokenizer(tokenizer: BaseTokenizer) -> bool:
    if not isinstance(tokenizer, Tokenizer) or (tokenizer.bos_id, tokenizer.eos_id) != (1, 2):
        return False
    pieces = tokenizer.pieces()
    if [kind for _, _, kind in pieces[:len(LLAMA2_TOKEN_TYPES)]] != LLAMA2_TOKEN_TYPES:
        return False
    return Tokenizer(sentencepiece_model(pieces)).encode(PROBE_SENTENCE) == tokenizer.encode(PROBE_SENTENCE)


# ---- both ---------------------------------------------------------------------------------------

def tokenizer_path(path: Path) -> Path:
    return path.with_suffix(".tokenizer.bin")


def tensor_shapes(args: ModelArgs, version: int) -> Iterator[tuple[str, Shape]]:
    """Yield name and shape of each tensor in the order of the file."""
    for name, shape, count in layout(args, version):
        for i in range(count):
            yield name.format(i), shape


def layout(args: ModelArgs, version: int) -> list[tuple[str, Shape, int]]:
    """Return the order of the file: names, with {} for the number of a layer, shapes and counts."""
    dim, hidden_dim = args.dim, args.hidden_dim
    kv_dim = args.n_kv_heads * args.head_dim
    parts = {
        "attention_norm": (dim,), "ffn_norm": (dim,), "attention.wq": (dim, dim), "attention.wk": (kv_dim, dim),
        "attention.wv": (kv_dim, dim), "attention.wo": (dim, dim), "feed_forward.w1": (hidden_dim, dim),
        "feed_forward.w2": (dim, hidden_dim), "feed_forward.w3": (hidden_dim, dim)}
    layers = [(f"layers.{{}}.{name}.weight", shape, args.n_layers) for name, shape in parts.items()]
    attention_norm, ffn_norm, *matrices = layers
    embeddings = ("tok_embeddings.weight", (args.vocab_size, dim), 1)
    norm = ("norm.weight", (dim,), 1)
    output = [] if args.tie_embeddings else [("output.weight", (args.vocab_size, dim), 1)]
    if version == 0:
        rope = ("rope", (2, args.max_seq_len, args.head_dim // 2), 1)
        return [embeddings, attention_norm, *matrices[:4], ffn_norm, *matrices[4:], norm, rope, *output]
    return [attention_norm, ffn_norm, norm, embeddings, *matrices, *output]


def is_quantized(shape: Shape, group_size: int) -> bool:
    """True for matrices of version 2; norms stay in float32."""
    return group_size > 0 and len(shape) > 1


def tensor_bytes(shape: Shape, group_size: int) -> int:
    count = math.prod(shape)
    return count + count // group_size * 4 if is_quantized(shape, group_size) else count * 4
