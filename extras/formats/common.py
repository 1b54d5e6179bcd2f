"""What the readers and writers share: the state that they make, and vocabularies in the forms that they need."""
import json
import struct
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from extras.tokenizers import JsonTokenizer, TiktokenTokenizer
from tinyllm.cli import UserError
from tinyllm.project import shorten_list
from tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, BaseTokenizer, Tokenizer

LLAMA3 = TiktokenTokenizer.PATTERN
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def make_state(model: dict[str, Tensor], model_args: dict[str, Any], vocabulary: BaseTokenizer | None = None,
               chat: str = "", architecture: str = "llama") -> dict[str, Any]:
    """A state as checkpoint.py has it, of a model that has not been trained here. Without an output, it is tied."""
    model.setdefault("output.weight", model["tok_embeddings.weight"])
    state = {"model": model, "model_args": model_args, "iter_num": 0, "config": {}, "chat": chat,
             "architecture": architecture}
    if vocabulary:
        state |= {"tokenizer": vocabulary.model, "tokenizer_sha256": vocabulary.sha256}
    return state


def layer_names(n_layers: int, of_layer: dict[str, str], of_model: dict[str, str]) -> dict[str, str]:
    """All tensor names of a model, ours to theirs; a layer's names have {} for its number."""
    if not 0 < n_layers < 10_000:
        raise ValueError(f"{n_layers} layers")
    return of_model | {ours.format(i): theirs.format(i) for i in range(n_layers) for ours, theirs in of_layer.items()}


def check_names(found: Iterable[str], expected: Iterable[str], source: Path) -> None:
    """Raise UserError with all names that are missing or too many."""
    found, expected = set(found), set(expected)
    for names, problem in ((expected - found, "lacks"), (found - expected, "has, and nothing here knows,")):
        if names:
            raise UserError(f"{source} {problem} {len(names)} tensors: {shorten_list(sorted(names), 8)}")


def check_supported(values: dict[str, Any], known: dict[str, Collection[Any]], source: Path, model: str) -> None:
    """Raise UserError with all values that a model cannot represent; those that are left out are as it has them."""
    problems = [f"{name} {values[name]!r}" for name, possible in known.items()
                if name in values and values[name] not in possible]
    if problems:
        raise UserError(f"{source} is a model that {model} cannot represent: {', '.join(problems)}")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError when it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def chat_of_template(template: Any) -> str:
    """The chat format that a Hugging Face template writes, by its marks; "" for one that is not known here."""
    text = json.dumps(template)
    marks = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3"}
    return next((name for mark, name in marks.items() if mark in text), "")


# ---- SentencePiece ------------------------------------------------------------------------------

def sentencepiece_model(pieces: list[tuple[str, float, int]], bos_id: int = 1, eos_id: int = 2) -> bytes:
    """The file of a byte-pair vocabulary from text, score and kind of each piece.

    Written by hand as protocol buffers: fields and numbers are those of sentencepiece_model.proto.
    """
    unk_id = next((i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), 0)
    entries = (_field(1, text.encode()) + _key(2, 5) + struct.pack("<f", score) + _number(3, kind)
               for text, score, kind in pieces)
    bpe, yes = 2, 1
    trainer = (_number(3, bpe) + _number(4, len(pieces)) + _number(35, yes) + _number(40, unk_id)
               + _number(41, bos_id) + _number(42, eos_id) + _number(43, -1))
    normalizer = _field(1, b"identity") + _number(3, yes) + _number(4, 0) + _number(5, yes)
    return b"".join(_field(1, entry) for entry in entries) + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, content: bytes) -> bytes:
    return _key(number, 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _key(number, 0) + _varint(value % (1 << 64))


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


# ---- tokenizer.json -----------------------------------------------------------------------------

def tokenizer_json(vocabulary: BaseTokenizer) -> dict[str, Any]:
    """The vocabulary as the content of a tokenizer.json."""
    if isinstance(vocabulary, JsonTokenizer):
        return {key: value for key, value in json.loads(vocabulary.model).items() if key != JsonTokenizer.OWN}
    if isinstance(vocabulary, TiktokenTokenizer):
        return llama3_json(vocabulary)
    return sentencepiece_json(vocabulary)


def sentencepiece_json(vocabulary: Tokenizer) -> dict[str, Any]:
    """A byte-pair SentencePiece model in other words."""
    pieces = vocabulary.pieces()
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    learned = sorted((i for i, (_, _, kind) in enumerate(pieces) if kind == NORMAL), key=lambda i: -pieces[i][1])
    merges = merges_of((pieces[i][0] for i in learned), ids)
    special = {text: i for text, i in ids.items() if pieces[i][2] in (UNKNOWN, CONTROL)}
    unknown = next(text for text, _, kind in pieces if kind == UNKNOWN)
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(special),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]},
        "pre_tokenizer": None,
        "post_processor": _with_bos(pieces[vocabulary.bos_id][0], vocabulary.bos_id),
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": _bpe(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=any(k == BYTE for *_, k in pieces)),
    }


def byte_level_json(ids: dict[str, int], merges: list[tuple[str, str]], special: dict[str, int], pattern: str,
                    single_digits: bool = False, bos: str = "", whole_words: bool = False) -> dict[str, Any]:
    """A vocabulary like GPT-2's: text is cut by a pattern, and its bytes are merged.

    Args:
        ids: of each entry, bytes written as in `byte_letters`.
        single_digits: cut every digit off before the pattern comes.
        bos: the special token that is put before a text.
        whole_words: a word that is an entry is taken whole, whatever the merges say (Llama 3).
    """
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    digits = [{"type": "Digits", "individual_digits": True}] if single_digits else []
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(special), "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*digits, split, byte_level]},
        "post_processor": _with_bos(bos, special[bos]) if bos else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(ids, merges, ignore_merges=whole_words),
    }


def tokenizer_json_with_meta(content: dict[str, Any], bos: str, eos: str, add_bos: bool) -> bytes:
    """A tokenizer.json with what JsonTokenizer wants to know beside it."""
    own = {"bos": bos, "eos": eos, "add_bos": add_bos}
    return json.dumps({**content, JsonTokenizer.OWN: own}, ensure_ascii=False).encode()


def llama3_json(vocabulary: TiktokenTokenizer) -> dict[str, Any]:
    letters = byte_letters()
    ids = {"".join(letters[byte] for byte in token): rank for token, rank in vocabulary.ranks.items()}
    return byte_level_json(ids, merges_of(ids, ids), vocabulary.special, LLAMA3, bos=vocabulary.SPECIAL[0],
                           whole_words=True)


def merges_of(entries: Iterable[str], known: Collection[str]) -> list[tuple[str, str]]:
    """All ways to make the entries, best first, of two that are known."""
    halves = ((entry[:cut], entry[cut:]) for entry in entries for cut in range(1, len(entry)))
    return [(left, right) for left, right in halves if left in known and right in known]


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others for letters from U+0100 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def _bpe(ids: dict[str, int], merges: list[tuple[str, str]], **more: Any) -> dict[str, Any]:
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **more,
            "vocab": ids, "merges": [list(pair) for pair in merges]}


def _added(special: dict[str, int]) -> list[dict[str, Any]]:
    return [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True} for text, i in sorted(special.items(), key=lambda item: item[1])]


def _with_bos(token: str, token_id: int) -> dict[str, Any]:
    """Put bos before a text; who calls the file from elsewhere expects that."""
    def sequence(name: str, kind: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": token, "type_id": kind}}, {"Sequence": {"id": name, "type_id": kind}}]
    return {"type": "TemplateProcessing", "single": sequence("A", 0), "pair": sequence("A", 0) + sequence("B", 1),
            "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}}}
