"""Code that readers and writers share: checkpoints, tensor names, tokenizer conversion."""
import json
import struct
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from extras.tokenizers import JsonTokenizer, TiktokenTokenizer
from tinyllm.checkpoint import Checkpoint
from tinyllm.cli import UserError
from tinyllm.project import shorten_list
from tokenizer import BYTE, CONTROL, NORMAL, SPACE_MARK, UNKNOWN, BaseTokenizer, Tokenizer

BPE = 2                         # SentencePiece's model_type for byte-pair encoding
# regular expressions that split text before the merges
LLAMA3 = TiktokenTokenizer.PATTERN
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def make_checkpoint(model: dict[str, Tensor], model_args: dict[str, Any], tokenizer: BaseTokenizer | None = None,
                    chat: str = "", architecture: str = "llama") -> Checkpoint:
    """Return a checkpoint. Without output.weight, the output layer is tied to the embedding."""
    model.setdefault("output.weight", model["tok_embeddings.weight"])
    ckpt = {"model": model, "model_args": model_args, "iter_num": 0, "config": {}, "chat": chat,
            "architecture": architecture}
    if tokenizer:
        ckpt |= {"tokenizer": tokenizer.model, "tokenizer_sha256": tokenizer.sha256}
    return ckpt


def tensor_names(n_layers: int, model: dict[str, str], layer: dict[str, str], prefix: str,
                 kinds: tuple[str, ...] = ("weight",), is_tied: bool = False) -> dict[str, str]:
    """Map model.py's tensor names to another format's.

    layer: names inside a layer; prefix: the format's name for "layers"; is_tied: omit the output layer.
    """
    if not 0 < n_layers < 10_000:
        raise ValueError(f"{n_layers} layers")
    names = dict(model)
    if is_tied:
        del names["output.weight"]
    for i in range(n_layers):
        for ours, theirs in layer.items():
            for kind in kinds:
                names[f"layers.{i}.{ours}.{kind}"] = f"{prefix}.{i}.{theirs}.{kind}"
    return names


def check_names(names: Iterable[str], expected: Iterable[str], source: Path) -> None:
    """Raise UserError, listing the tensors, if some are missing or unknown."""
    missing = set(expected) - set(names)
    unknown = set(names) - set(expected)
    if missing:
        raise UserError(f"{source} lacks {len(missing)} tensors: {shorten_list(sorted(missing), 8)}")
    if unknown:
        raise UserError(f"{source} has {len(unknown)} unknown tensors: {shorten_list(sorted(unknown), 8)}")


def check_supported(values: dict[str, Any], supported: dict[str, Collection[Any]], source: Path, model: str) -> None:
    """Raise UserError, listing the values, if some are not supported. A missing value counts as supported."""
    wrong = [name for name, possible in supported.items() if name in values and values[name] not in possible]
    if wrong:
        problems = ", ".join(f"{name} {values[name]!r}" for name in wrong)
        raise UserError(f"{source} has settings that {model} does not support: {problems}")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def chat_of_template(template: Any) -> str:
    """Return our name for a Hugging Face chat template; "" if it is unknown."""
    text = json.dumps(template)
    if "<|im_start|>" in text:
        return "chatml"
    return "llama3" if "<|start_header_id|>" in text else ""


# ---- SentencePiece ------------------------------------------------------------------------------

def sentencepiece_model(pieces: list[tuple[str, float, int]], bos_id: int = 1, eos_id: int = 2) -> bytes:
    """Return a SentencePiece BPE model as bytes. pieces: text, score and kind of each.

    The format is the protocol buffer of sentencepiece_model.proto.
    """
    unk_id = next((i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), 0)
    trainer = (_field(3, BPE) + _field(4, len(pieces)) + _field(35, True) + _field(40, unk_id)
               + _field(41, bos_id) + _field(42, eos_id) + _field(43, -1))
    normalizer = _field(1, b"identity") + _field(3, True) + _field(4, False) + _field(5, True)
    model = bytearray()
    for text, score, kind in pieces:
        model += _field(1, _field(1, text.encode()) + _field(2, float(score)) + _field(3, kind))
    return bytes(model) + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | float | bytes) -> bytes:
    """Encode a field of a protocol buffer: number and wire type, then the value."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value % (1 << 64))


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


# ---- tokenizer.json -----------------------------------------------------------------------------

def tokenizer_json(tokenizer: BaseTokenizer) -> dict[str, Any]:
    """Convert a tokenizer to the content of a tokenizer.json."""
    if isinstance(tokenizer, JsonTokenizer):
        content = json.loads(tokenizer.model)
        content.pop(JsonTokenizer.OWN, None)
        return content
    if isinstance(tokenizer, TiktokenTokenizer):
        return llama3_json(tokenizer)
    return sentencepiece_json(tokenizer)


def tokenizer_json_with_meta(content: dict[str, Any], bos: str, eos: str, add_bos: bool) -> bytes:
    """Return a tokenizer.json as bytes, with the extra values that JsonTokenizer needs."""
    meta = {"bos": bos, "eos": eos, "add_bos": add_bos}
    return json.dumps({**content, JsonTokenizer.OWN: meta}, ensure_ascii=False).encode()


def sentencepiece_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Convert a SentencePiece model to the content of a tokenizer.json."""
    pieces = tokenizer.pieces()
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    kinds = [kind for _, _, kind in pieces]
    unknown = pieces[kinds.index(UNKNOWN)][0]
    special = {text: i for text, i in ids.items() if kinds[i] in (UNKNOWN, CONTROL)}
    learned = [(text, score) for text, score, kind in pieces if kind == NORMAL]
    learned.sort(key=lambda piece: -piece[1])           # by score, best first
    merges = merges_of((text for text, _ in learned), ids)
    normalizers = [{"type": "Prepend", "prepend": SPACE_MARK},
                   {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}]
    decoders = [{"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": _added_tokens(special),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": _put_bos_in_front(pieces[tokenizer.bos_id][0], tokenizer.bos_id),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in kinds),
    }


def byte_level_json(ids: dict[str, int], merges: list[tuple[str, str]], special: dict[str, int], pattern: str,
                    single_digits: bool = False, bos: str = "", whole_words: bool = False) -> dict[str, Any]:
    """Return the content of a tokenizer.json for byte-level BPE: `pattern` splits text before the merges.

    Args:
        ids: token ids by text, with bytes written as in `byte_letters`.
        single_digits: split off every digit before `pattern` applies.
        bos: special token that starts every text.
        whole_words: encode a word that is in `ids` as one token, without merges (Llama 3).
    """
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = [split, byte_level]
    if single_digits:
        steps.insert(0, {"type": "Digits", "individual_digits": True})
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": _added_tokens(special),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": _put_bos_in_front(bos, special[bos]) if bos else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(ids, merges, ignore_merges=whole_words),
    }


def llama3_json(tokenizer: TiktokenTokenizer) -> dict[str, Any]:
    letters = byte_letters()
    ids = {"".join(letters[byte] for byte in token): rank for token, rank in tokenizer.ranks.items()}
    merges = merges_of(ids, ids)
    return byte_level_json(ids, merges, tokenizer.special, LLAMA3, bos=tokenizer.SPECIAL[0], whole_words=True)


def merges_of(entries: Iterable[str], known: Collection[str]) -> list[tuple[str, str]]:
    """Return all pairs of known strings that form an entry, in the order of the entries."""
    merges = []
    for entry in entries:
        for cut in range(1, len(entry)):
            if entry[:cut] in known and entry[cut:] in known:
                merges.append((entry[:cut], entry[cut:]))
    return merges


def byte_letters() -> list[str]:
    """Return GPT-2's character for each byte: itself if printable, otherwise one from U+0100 up."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _bpe(ids: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> dict[str, Any]:
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **options,
            "vocab": ids, "merges": [list(pair) for pair in merges]}


def _added_tokens(special: dict[str, int]) -> list[dict[str, Any]]:
    in_order = sorted(special.items(), key=lambda item: item[1])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": text, **flags} for text, i in in_order]


def _put_bos_in_front(token: str, token_id: int) -> dict[str, Any]:
    """Return the post-processor that prepends bos to every text, as other programs expect."""
    def sequence(name: str, type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": token, "type_id": type_id}}, {"Sequence": {"id": name, "type_id": type_id}}]

    return {"type": "TemplateProcessing", "single": sequence("A", 0), "pair": sequence("A", 0) + sequence("B", 1),
            "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}}}
