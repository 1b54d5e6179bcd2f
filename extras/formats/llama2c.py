"""Files of llama2.c (github.com/karpathy/llama2.c): a header, and all weights one after the other.

Version 0, for its run.c, has no mark, and holds the rotary tables too; version 1 was to follow it; version 2, for its
runq.c, keeps matrices as int8, in groups that share a float32 scale. The vocabulary is another file: `story.bin` goes
with `story.tokenizer.bin`, or with a `tokenizer.bin` of the right size.
"""
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extras.formats.common import make_state, sentencepiece_model
from model import ModelArgs
from tinyllm.checkpoint import build_model, build_tokenizer
from tinyllm.cli import UserError
from tinyllm.files import atomic_write
from tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, BaseTokenizer, Tokenizer

MAGIC = b"24ka"                         # 0x616b3432
HEADER, LEGACY_HEADER = 256, 28         # bytes, of versions 1 and 2, and of version 0
NUMBERS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")      # in a header
GROUP = 64                              # weights that share a scale; halved until it divides all rows
LLAMA2_TOKEN_TYPES = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]    # of a vocabulary; run.c takes them for granted
PROBE_SENTENCE = "Once upon a time, there was a girl."


# ---- in -----------------------------------------------------------------------------------------

def is_legacy(path: Path) -> bool:
    """Whether a file is of version 0: it has the size that its first seven numbers imply."""
    try:
        return read_header(path)[0] == 0
    except UserError:
        return False


def read(path: Path) -> dict[str, Any]:
    """Read a file of any version, with the vocabulary that lies beside it. Raises UserError when it is damaged.

    That vocabulary has no digest in the state: it may be given in another form, by --tokenizer.
    """
    version, args, group = read_header(path)
    data, model, place = np.memmap(path, mode="c"), {}, HEADER if version else LEGACY_HEADER
    for name, shape in tensors(args, version):
        size = size_of(shape, group)
        model[name], place = decode(data[place:place + size], shape, group), place + size
    model.pop("rope", None)
    return {**make_state(model, asdict(args)), "tokenizer": find_vocabulary(path, args.vocab_size)}


def read_header(path: Path) -> tuple[int, ModelArgs, int]:
    """Version, shape and group size, which is 0 where nothing is in groups.

    Raises UserError where they do not fit together, or to the size of the file.
    """
    with open(path, "rb") as file:
        version, numbers, tied, group = parse_header(file.read(HEADER).ljust(HEADER, b"\0"))
    try:
        args = ModelArgs(**dict(zip(NUMBERS, numbers)), tie_embeddings=tied)
        if version not in (0, 1, 2) or args.hidden_dim < 1 or version == 2 and (group < 1 or args.dim % group):
            raise ValueError(f"version {version}, dim {args.dim}, hidden_dim {args.hidden_dim}, groups of {group}")
    except ValueError as error:
        raise UserError(f"{path} is damaged, or no file of llama2.c: {error}") from error
    expected, found = HEADER if version else LEGACY_HEADER, path.stat().st_size
    expected += sum(size_of(shape, group) * count for _, shape, count in layout(args, version))
    if found != expected:
        raise UserError(f"{path} has {found:,} bytes; by its header it should have {expected:,}")
    return version, args, group


def parse_header(begin: bytes) -> tuple[int, list[int], bool, int]:
    """Version, the NUMBERS, whether the embedding is the output too, and group size."""
    if not begin.startswith(MAGIC):
        *numbers, vocab_size, max_seq_len = struct.unpack_from("<7i", begin)
        return 0, [*numbers, abs(vocab_size), max_seq_len], vocab_size > 0, 0
    version, *numbers, tied, group = struct.unpack_from("<8iBi", begin, len(MAGIC))
    return version, numbers, bool(tied), group if version == 2 else 0


def decode(data: np.ndarray, shape: tuple[int, ...], group: int) -> Tensor:
    """A tensor of float32 from its bytes: mapped as they are, or computed from levels and scales."""
    if not is_quantized(shape, group):
        return torch.from_numpy(data.view("<f4").reshape(shape))
    count = math.prod(shape)
    levels, scales = data[:count].view(np.int8), data[count:].view("<f4")
    return torch.from_numpy((levels.reshape(-1, group) * scales[:, None]).reshape(shape))


def find_vocabulary(path: Path, vocab_size: int) -> bytes | None:
    """The vocabulary of that size beside a model."""
    for place in (vocabulary_path(path), path.with_name("tokenizer.bin")):
        pieces = read_pieces(place)
        if len(pieces) == vocab_size:
            return sentencepiece_model(pieces)
    return None


def read_vocabulary(path: Path) -> bytes | None:
    """A SentencePiece model made of a tokenizer.bin; None when the file is none."""
    pieces = read_pieces(path)
    return sentencepiece_model(pieces) if pieces else None


def read_pieces(path: Path) -> list[tuple[str, float, int]]:
    """Text, score and kind of each entry of a tokenizer.bin; none when the file is none."""
    content = path.read_bytes() if path.is_file() else b""
    longest, place, pieces = int.from_bytes(content[:4], "little"), 4, []
    while place + 8 <= len(content):
        score, length = struct.unpack_from("<fI", content, place)
        text, place = content[place + 8:place + 8 + length], place + 8 + length
        if length > longest or place > len(content):
            return []
        pieces.append((text.decode(errors="replace"), score))
    return [] if place != len(content) else [as_piece(i, *piece) for i, piece in enumerate(pieces)]


def as_piece(i: int, text: str, score: float) -> tuple[str, float, int]:
    if i < 3:
        return text.strip("\n"), score, LLAMA2_TOKEN_TYPES[i]
    return text.replace(" ", SPACE), score, BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else NORMAL


# ---- out ----------------------------------------------------------------------------------------

def write(state: dict[str, Any], path: Path, version: int) -> None:
    """Write the weights, and the vocabulary beside them. Raises UserError for what llama2.c cannot represent."""
    vocabulary = build_tokenizer(state)
    if vocabulary.n_words != state["model_args"]["vocab_size"]:
        raise UserError(f"llama2c needs an entry of the vocabulary for each of {state['model_args']['vocab_size']} "
                        f"embeddings, and there are {vocabulary.n_words}\n       write a .gguf or a folder instead")
    write_vocabulary(vocabulary, vocabulary_path(path))
    write_weights(state, path, version)


def write_weights(state: dict[str, Any], path: Path, version: int) -> None:
    model = build_model(state, copy_weights=False)
    args, weights = replace(model.args, hidden_dim=model.args.ffn_dim), {**model.state_dict(), "rope": model.rope}
    check(args)
    group = math.gcd(GROUP, args.dim, args.hidden_dim) if version == 2 else 0
    with atomic_write(path) as file:
        file.write(make_header(args, version, group))
        for name, _ in tensors(args, version):
            file.writelines(encode(weights[name].cpu().float(), group))


def make_header(args: ModelArgs, version: int, group: int) -> bytes:
    numbers = [getattr(args, name) for name in NUMBERS]
    if version == 0:
        numbers[5] *= 1 if args.tie_embeddings else -1
        return struct.pack("<7i", *numbers)
    return (MAGIC + struct.pack("<8iBi", version, *numbers, args.tie_embeddings, group)).ljust(HEADER, b"\0")


def check(args: ModelArgs) -> None:
    """Raise UserError, with the reasons, for a model that run.c would compute wrongly."""
    reasons = [f"{name} {getattr(args, name):g} (there it is {value:g})"
               for name, value in (("rope_theta", 10000.0), ("norm_eps", 1e-5))
               if not math.isclose(getattr(args, name), value, rel_tol=1e-6)]
    reasons += ["a rope_scaling"] if args.rope_scaling else []
    if reasons:
        raise UserError(f"llama2.c cannot run a model with {', '.join(reasons)}\n"
                        "       write a .gguf or a folder instead")


def encode(weight: Tensor, group: int) -> list[bytes]:
    """The bytes of a float32 tensor; a matrix in groups as levels from -127 to 127, then the scale of each group."""
    if not is_quantized(weight.shape, group):
        return [weight.numpy().tobytes()]
    rows = weight.reshape(-1, group)
    scales = rows.abs().amax(1, keepdim=True) / 127
    levels = (rows / scales.clamp(min=torch.finfo().tiny)).round().to(torch.int8)
    return [levels.numpy().tobytes(), scales.numpy().tobytes()]


def write_vocabulary(vocabulary: BaseTokenizer, path: Path) -> None:
    """Write a tokenizer.bin. Raises UserError for a vocabulary that is not like Llama 2's."""
    pieces = vocabulary.pieces() if isinstance(vocabulary, Tokenizer) else []
    usual = [kind for *_, kind in pieces[:len(LLAMA2_TOKEN_TYPES)]] == LLAMA2_TOKEN_TYPES
    usual = usual and (vocabulary.bos_id, vocabulary.eos_id) == (1, 2)
    if not usual or Tokenizer(sentencepiece_model(pieces)).encode(PROBE_SENTENCE) != vocabulary.encode(PROBE_SENTENCE):
        raise UserError("llama2.c needs a vocabulary like Llama 2's: byte pairs of SentencePiece, and first unknown, "
                        "bos, eos and the 256 bytes\n       write a .gguf or a folder instead")
    texts = [text.replace(SPACE, " ").encode() for text, *_ in pieces]
    texts[1:3] = [b"\n" + text + b"\n" for text in texts[1:3]]
    with atomic_write(path) as file:
        file.write(struct.pack("<i", max(map(len, texts))))
        file.writelines(struct.pack("<fi", score, len(text)) + text for text, (_, score, _) in zip(texts, pieces))


# ---- both ---------------------------------------------------------------------------------------

def vocabulary_path(path: Path) -> Path:
    return path.with_suffix(".tokenizer.bin")


def tensors(args: ModelArgs, version: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor in the order of the file."""
    for name, shape, count in layout(args, version):
        yield from ((name.format(i), shape) for i in range(count))


def layout(args: ModelArgs, version: int) -> list[tuple[str, tuple[int, ...], int]]:
    """Name, with {} for a layer's number, shape and count of what follows each other in the file."""
    dim, hidden, kv, count = args.dim, args.hidden_dim, args.n_kv_heads * args.head_dim, args.n_layers
    attention_norm, ffn_norm = ((f"layers.{{}}.{name}_norm.weight", (dim,), count) for name in ("attention", "ffn"))
    attention = [(f"layers.{{}}.attention.{name}.weight", shape, count) for name, shape in
                 (("wq", (dim, dim)), ("wk", (kv, dim)), ("wv", (kv, dim)), ("wo", (dim, dim)))]
    feed_forward = [(f"layers.{{}}.feed_forward.{name}.weight", shape, count) for name, shape in
                    (("w1", (hidden, dim)), ("w2", (dim, hidden)), ("w3", (hidden, dim)))]
    embeddings, norm = ("tok_embeddings.weight", (args.vocab_size, dim), 1), ("norm.weight", (dim,), 1)
    output = [] if args.tie_embeddings else [("output.weight", (args.vocab_size, dim), 1)]
    if version == 0:
        rope = ("rope", (2, args.max_seq_len, args.head_dim // 2), 1)
        return [embeddings, attention_norm, *attention, ffn_norm, *feed_forward, norm, rope, *output]
    return [attention_norm, ffn_norm, norm, embeddings, *attention, *feed_forward, *output]


def is_quantized(shape: tuple[int, ...], group: int) -> bool:
    """Whether a tensor is in groups: the norms are not."""
    return group > 0 and len(shape) > 1


def size_of(shape: tuple[int, ...], group: int) -> int:
    """Bytes of a tensor."""
    count = math.prod(shape)
    return count + count // group * 4 if is_quantized(shape, group) else count * 4
