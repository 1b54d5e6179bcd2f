"""Read and write llama2.c files (github.com/karpathy/llama2.c): a header, then all weights in a fixed order.

Version 0, for run.c, has no magic number and includes the rotary tables. Version 1 has a magic number and no tables.
Version 2, for runq.c, stores matrices as int8, in groups that share a float32 scale. The tokenizer is a separate file:
`story.tokenizer.bin` beside `story.bin`, or a `tokenizer.bin` of the right size.
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
HEADER_BYTES = 256                      # versions 1 and 2
LEGACY_HEADER_BYTES = 28                # version 0
HEADER_FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
GROUP_SIZE = 64                         # weights per scale; smaller if 64 does not divide every row
LLAMA2_TOKEN_TYPES = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]        # run.c assumes these
PROBE_SENTENCE = "Once upon a time, there was a girl."
OTHER_TARGETS = "choose a .gguf file or a folder as the target"

Shape = tuple[int, ...]


class Header(NamedTuple):
    version: int
    args: ModelArgs
    group_size: int                     # 0 if no tensor is quantized
    size: int                           # bytes


# ---- read ---------------------------------------------------------------------------------------

def is_legacy(path: Path) -> bool:
    """True if the file has the size that the 7 numbers of a version-0 header imply."""
    try:
        return read_header(path).version == 0
    except UserError:
        return False


def read(path: Path) -> Checkpoint:
    """Read a file of any version, and the tokenizer beside it. Raises UserError if it is damaged.

    The checkpoint has no tokenizer digest, so that --tokenizer accepts the same tokenizer in another format.
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
    """Read the header. Raises UserError if its numbers contradict each other or the file size."""
    with open(path, "rb") as file:
        version, numbers, is_tied, group_size = parse_header(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"))
    try:
        args = ModelArgs(**dict(zip(HEADER_FIELDS, numbers)), tie_embeddings=is_tied)
        bad_groups = version == 2 and (group_size < 1 or args.dim % group_size)
        if version not in (0, 1, 2) or args.hidden_dim < 1 or bad_groups:
            raise ValueError(f"version {version}, dim {args.dim}, hidden_dim {args.hidden_dim}, groups of {group_size}")
    except ValueError as error:
        raise UserError(f"{path} is damaged or not a llama2.c file: {error}") from error
    header = Header(version, args, group_size, HEADER_BYTES if version else LEGACY_HEADER_BYTES)
    expected = header.size
    for _, shape, count in layout(args, version):
        expected += tensor_bytes(shape, group_size) * count
    actual = path.stat().st_size
    if actual != expected:
        raise UserError(f"{path} has {actual:,} bytes; expected {expected:,} from its header")
    return header


def parse_header(data: bytes) -> tuple[int, list[int], bool, int]:
    """Return the version, the values of HEADER_FIELDS, True if the output layer is tied, and the group size."""
    if not data.startswith(MAGIC):
        *numbers, vocab_size, max_seq_len = struct.unpack_from("<7i", data)
        return 0, [*numbers, abs(vocab_size), max_seq_len], vocab_size > 0, 0
    version, *numbers, is_tied, group_size = struct.unpack_from("<8iBi", data, len(MAGIC))
    return version, numbers, bool(is_tied), group_size if version == 2 else 0


def decode(data: np.ndarray, shape: Shape, group_size: int) -> Tensor:
    """Return a float32 tensor from its bytes: memory-mapped, or computed from levels and scales."""
    if not is_quantized(shape, group_size):
        return torch.from_numpy(data.view("<f4").reshape(shape))
    count = math.prod(shape)
    levels = data[:count].view(np.int8).reshape(-1, group_size)         # (groups, group_size)
    scales = data[count:].view("<f4")[:, None]                          # (groups, 1)
    return torch.from_numpy((levels * scales).reshape(shape))


def find_tokenizer(path: Path, vocab_size: int) -> bytes | None:
    """Return the tokenizer with vocab_size entries beside a model; None if there is none."""
    for candidate in (tokenizer_path(path), path.with_name("tokenizer.bin")):
        pieces = read_pieces(candidate)
        if len(pieces) == vocab_size:
            return sentencepiece_model(pieces)
    return None


def read_tokenizer(path: Path) -> bytes | None:
    """Convert a tokenizer.bin to a SentencePiece model; None for any other file."""
    pieces = read_pieces(path)
    return sentencepiece_model(pieces) if pieces else None


def read_pieces(path: Path) -> list[tuple[str, float, int]]:
    """Return text, score and kind of each entry of a tokenizer.bin; [] for any other file."""
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


# ---- write --------------------------------------------------------------------------------------

def write(ckpt: Checkpoint, path: Path, version: int) -> None:
    """Write the weights, and the tokenizer beside them. Raises UserError if llama2.c does not support them."""
    tokenizer = build_tokenizer(ckpt)
    vocab_size = ckpt["model_args"]["vocab_size"]
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f"llama2.c needs one tokenizer entry for each embedding; expected {vocab_size}, found "
                        f"{tokenizer.vocab_size}\n       {OTHER_TARGETS}")
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
    """Raise UserError, with the reasons, if run.c would compute the model incorrectly."""
    reasons = []
    for name, expected in (("rope_theta", 10000.0), ("norm_eps", 1e-5)):
        value = getattr(args, name)
        if not math.isclose(value, expected, rel_tol=1e-6):
            reasons.append(f"{name} {value:g} (expected {expected:g})")
    if args.rope_scaling:
        reasons.append("rope_scaling")
    if reasons:
        raise UserError(f"llama2.c cannot run a model with {', '.join(reasons)}\n       {OTHER_TARGETS}")


def encode(weight: Tensor, group_size: int) -> list[bytes]:
    """Return a float32 tensor as bytes. Quantized: int8 levels from -127 to 127, then one scale per group."""
    if not is_quantized(weight.shape, group_size):
        return [weight.numpy().tobytes()]
    groups = weight.reshape(-1, group_size)
    scales = groups.abs().amax(1, keepdim=True) / 127                   # (groups, 1)
    levels = (groups / scales.clamp(min=torch.finfo().tiny)).round().to(torch.int8)
    return [levels.numpy().tobytes(), scales.numpy().tobytes()]


def write_tokenizer(tokenizer: BaseTokenizer, path: Path) -> None:
    """Write a tokenizer.bin. Raises UserError if the tokenizer is not like Llama 2's."""
    if not is_llama2_tokenizer(tokenizer):
        raise UserError("llama2.c needs a tokenizer like Llama 2's: SentencePiece BPE that starts with unk, bos, eos "
                        f"and the 256 bytes\n       {OTHER_TARGETS}")
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


# ---- shared -------------------------------------------------------------------------------------

def tokenizer_path(path: Path) -> Path:
    return path.with_suffix(".tokenizer.bin")


def tensor_shapes(args: ModelArgs, version: int) -> Iterator[tuple[str, Shape]]:
    """Yield name and shape of each tensor in file order."""
    for name, shape, count in layout(args, version):
        for i in range(count):
            yield name.format(i), shape


def layout(args: ModelArgs, version: int) -> list[tuple[str, Shape, int]]:
    """Return names (with {} for the layer number), shapes and counts of all tensors in file order."""
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
    """True for matrices of version 2; norms stay float32."""
    return group_size > 0 and len(shape) > 1


def tensor_bytes(shape: Shape, group_size: int) -> int:
    count = math.prod(shape)
    return count + count // group_size * 4 if is_quantized(shape, group_size) else count * 4
