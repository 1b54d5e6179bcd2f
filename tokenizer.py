"""Text to token ids and back.

    tokenizer = Tokenizer("data/tok4096.model")         # SentencePiece: what step 1 makes, and Llama 2
    tokenizer = load("tokenizer.json")                  # of any kind: also Llama 3's, and those of Hugging Face
    ids = tokenizer.encode("Once upon a time", bos=True, eos=False)
    assert tokenizer.decode(ids) == "Once upon a time"

A vocabulary trained by `train` is byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) with
Llama 2's layout: 0 unknown, 1 bos, 2 eos, 3 to 258 the single bytes, then the learned pieces. It
loses nothing: every string comes back exactly. Models trained elsewhere keep their own behaviour.
Whole collections of texts are encoded word by word where that gives the same ids (tinyllm/words.py).
"""
import base64
import binascii
import hashlib
import importlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from tinyllm.cli import UserError
from tinyllm.words import BYTE, CONTROL, NORMAL, SPACE, SPACE_MARK, UNKNOWN, UNUSED, WordEncoder, why_not_wordwise

WORD_END = "\x1f"           # ends a word while training, and is dropped from the text
N_RESERVED_IDS = 3 + 256      # unknown, bos, eos, and a piece for each byte


class BaseTokenizer:
    """What all kinds of tokenizer have in common.

    Attributes:
        n_words: size of the vocabulary; ids run from 0 to n_words - 1.
        bos_id, eos_id, pad_id: special ids, -1 where there are none.
        add_bos: whether the model expects bos before a text.
        exact: whether it was trained by `train`, so that no text is lost.
        undivided: why texts cannot be encoded word by word; empty when they can be.
        model: the bytes of the model file; sha256: their digest in hex.
    """
    n_words: int
    bos_id = eos_id = pad_id = -1
    add_bos = True
    is_lossless = False
    why_not_wordwise = "it is not of SentencePiece"

    def __init__(self, model: bytes):
        self.model, self.sha256 = model, hashlib.sha256(model).hexdigest()

    def encode(self, s: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a string, between bos and eos if asked for."""
        return self.encode_batch([s], bos, eos)[0]

    def encode_batch(self, texts: list[str], bos: bool = False, eos: bool = False) -> list[list[int]]:
        """Ids of each string; faster than one call each."""
        head, tail = [self.bos_id] * bos, [self.eos_id] * eos
        try:
            return [head + ids + tail for ids in self._encode(texts)]
        except (TypeError, UnicodeEncodeError) as error:
            broken = next((text for text in texts if re.search("[\ud800-\udfff]", text)), None)
            if broken is None:
                raise
            raise UserError(f"this is not text, some of its bytes are not UTF-8: {ascii(broken[:60])}") from error

    def encode_documents(self, texts: list[bytes]) -> np.ndarray:
        """Ids of texts, given in UTF-8: bos ... eos of each, one after another, int32."""
        batch = self.encode_batch([text.decode() for text in texts], bos=True, eos=True)
        return np.fromiter(chain.from_iterable(batch), np.int32)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of the beginning of a text, as the model knows beginnings: after bos, if it was trained with it.

        Raises UserError where that is no id at all, and there is nothing to go on from.
        """
        ids = self.encode(text)
        if self.bos_id < 0 and not ids:
            raise UserError("this vocabulary has no bos, with which a text would begin; give it a beginning")
        return [self.bos_id] + ids if self.bos_id >= 0 and (self.add_bos or not ids) else ids

    def special_token_id(self, special: str) -> int:
        """The id of a special token. Raises UserError when there is none of that name."""
        raise UserError(f"this vocabulary has no special token {special}")

    def _encode(self, texts: list[str]) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """The text of the ids; special ids are left out, unfinished characters become U+FFFD."""
        raise NotImplementedError

    def id_to_piece(self, token: int) -> str:
        """The text of one entry of the vocabulary, a space shown as U+2581."""
        raise NotImplementedError


class Tokenizer(BaseTokenizer):
    """A SentencePiece model."""

    def __init__(self, model: str | Path | bytes):
        """Load a `.model` file, or its bytes. Raises UserError when it is not one."""
        super().__init__(model if isinstance(model, bytes) else _read(Path(model)))
        name = "the tokenizer" if isinstance(model, bytes) else str(model)
        try:
            self._sp = SentencePieceProcessor(model_proto=self.model)
            self.n_words = self._sp.vocab_size()
            self.pieces()               # all of them are text
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{name} is not a SentencePiece model ({len(self.model)} bytes)") from error
        if not self.n_words:
            raise UserError(f"{name} is an empty SentencePiece model")
        self.bos_id, self.eos_id, self.pad_id = self._sp.bos_id(), self._sp.eos_id(), self._sp.pad_id()

    @cached_property
    def is_lossless(self) -> bool:
        return self._sp.encode("\n", out_type=str) == [SPACE, "\n"] and not self.why_not_wordwise

    @cached_property
    def why_not_wordwise(self) -> str:
        try:
            return why_not_wordwise(self.model)
        except (LookupError, TypeError):
            return "its file is of an unknown form"

    @cached_property
    def _by_words(self) -> WordEncoder:
        front = self._sp.encode("\n")          # of a space and the newline, which nothing else merges with

        def encode(words: list[bytes]) -> Iterator[list[int]]:
            return (self._sp.encode("\n" + word.decode())[len(front):] for word in words)  # a list would start threads
        return WordEncoder(encode, [self.eos_id, self.bos_id])

    def encode_documents(self, texts: list[bytes]) -> np.ndarray:
        if self.why_not_wordwise or not all(texts) or any(SPACE_MARK in text for text in texts):
            return super().encode_documents(texts)
        return self._by_words.encode(texts)[1:-1]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        batch = self._sp.encode(texts)
        for i, text in enumerate(texts):
            if SPACE in text and self.is_lossless:
                batch[i] = self._encode_with_space_mark(text)
        return batch

    def _encode_with_space_mark(self, text: str) -> list[int]:
        """Encode a text that holds the very character that stands for a space: spell it in bytes.

        What follows it must not get the space that SentencePiece puts before a text. A newline is
        always a piece of its own, so "\\n" + rest encodes to [space, newline, *ids of the bare rest].
        """
        first, *rest = text.split(SPACE)
        ids = self._sp.encode(first) or self._sp.encode("\n")[:1]
        for part in rest:
            ids += [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
            ids += self._sp.encode("\n" + part)[2:]
        return ids

    def decode(self, ids: list[int]) -> str:
        try:
            return self._sp.decode(ids)
        except IndexError:                  # a model may have more embeddings than there are entries
            return self._sp.decode([i for i in ids if 0 <= i < self.n_words])

    def id_to_piece(self, token: int) -> str:
        return self._sp.id_to_piece(token) if token < self.n_words else ""

    def special_token_id(self, special: str) -> int:
        found = self._sp.piece_to_id(special)
        return found if self._sp.id_to_piece(found) == special else super().special_token_id(special)

    def pieces(self) -> list[tuple[str, float, int]]:
        """Text, score and kind of each entry; the kinds are those of SentencePiece's file."""
        sp = self._sp
        kinds = ((sp.is_unknown, UNKNOWN), (sp.is_control, CONTROL), (sp.is_byte, BYTE), (sp.is_unused, UNUSED))
        return [(sp.id_to_piece(i), sp.get_score(i), next((kind for has, kind in kinds if has(i)), NORMAL))
                for i in range(self.n_words)]


class JsonTokenizer(BaseTokenizer):
    """A `tokenizer.json` of Hugging Face (package tokenizers).

    What such a file leaves to others, it has under the key OWN: the special tokens bos and eos, and add_bos.
    """
    OWN = "tiny-llm"

    def __init__(self, model: bytes):
        """Raises UserError when the package is missing, or the bytes are no such file."""
        super().__init__(model)
        tokenizers = require_package("tokenizers", "this vocabulary, a tokenizer.json,")
        try:
            content = json.loads(model)
            own = content.pop(self.OWN, {})
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:          # the package raises nothing more special
            raise UserError(f"the vocabulary is no tokenizer.json that tokenizers can read: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True        # what looks like a special token in a text is text
        self.n_words = self._tokenizer.get_vocab_size()
        self.bos_id, self.eos_id = (self.special_token_id(own[name]) if own.get(name) else -1 for name in ("bos", "eos"))
        self.add_bos = self.bos_id >= 0 and own.get("add_bos", True)
        self._spells_bytes = b'"ByteLevel"' in model

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def id_to_piece(self, token: int) -> str:
        text = self.decode([token]).replace(" ", SPACE) if self._spells_bytes else ""
        return text or self._tokenizer.id_to_token(token) or ""

    def special_token_id(self, special: str) -> int:
        found = self._tokenizer.token_to_id(special)
        return super().special_token_id(special) if found is None else found


class TiktokenTokenizer(BaseTokenizer):
    """Llama 3's vocabulary: lines of a token in base64 and its rank, and 256 special tokens after them.

    Pattern, names and numbers are those of meta-llama/llama3 (package tiktoken).
    """
    PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4)),
               "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
               *(f"<|reserved_special_token_{i}|>" for i in range(5, 251))]
    # time and stack of the pattern grow by the square of a run of one kind, so that long texts and runs are cut
    MAX_CHUNK_CHARS, LONG_RUN = 400_000, re.compile(r"\s{25000}(?=\s)|\S{25000}(?=\S)")

    def __init__(self, model: bytes):
        """Raises UserError when the package is missing, or the bytes are no such file."""
        super().__init__(model)
        tiktoken = require_package("tiktoken", "Llama 3's vocabulary")
        self.ranks = _ranks(model)
        self.special = {name: len(self.ranks) + i for i, name in enumerate(self.SPECIAL)}
        self._encoding = tiktoken.Encoding("llama3", pat_str=self.PATTERN, mergeable_ranks=self.ranks,
                                           special_tokens=self.special)
        self.n_words = self._encoding.n_vocab
        self.bos_id, self.eos_id = self.special_token_id("<|begin_of_text|>"), self.special_token_id("<|end_of_text|>")

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [[i for part in self._parts(text) for i in self._encoding.encode_ordinary(part)] for text in texts]

    def _parts(self, s: str) -> Iterator[str]:
        for begin in range(0, len(s), self.MAX_CHUNK_CHARS):
            text, place = s[begin:begin + self.MAX_CHUNK_CHARS], 0
            for cut in [*(run.end() for run in self.LONG_RUN.finditer(text)), len(text)]:
                yield text[place:cut]
                place = cut

    def decode(self, ids: list[int], special: bool = False) -> str:
        """The text of the ids, with special tokens by name if asked for."""
        kept = ids if special else [i for i in ids if i < len(self.ranks)]
        return self._encoding.decode_bytes(kept).decode("utf-8", errors="replace")

    def id_to_piece(self, token: int) -> str:
        return self.decode([token], special=True).replace(" ", SPACE)

    def special_token_id(self, special: str) -> int:
        return self.special[special] if special in self.special else super().special_token_id(special)


def load_tokenizer(source: str | Path | bytes) -> BaseTokenizer:
    """A vocabulary of any kind, from its file or bytes. Which kind it is, the content says.

    Raises:
        UserError: when there is none, or it is damaged, or its package is missing.
    """
    model = source if isinstance(source, bytes) else _read(Path(source))
    is_json, is_tiktoken = model.lstrip()[:1] == b"{", re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", model)
    if not is_json and not is_tiktoken:
        return Tokenizer(model if isinstance(source, bytes) else source)
    try:
        return JsonTokenizer(model) if is_json else TiktokenTokenizer(model)
    except UserError as error:
        raise error if isinstance(source, bytes) else UserError(f"{source}: {error}") from error


def require_package(package: str, what: str) -> Any:
    """Import a package that only some things need. Raises UserError, with what to type, when it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{what} needs the package {package}\n       pip install {package}") from error


def _ranks(model: bytes) -> dict[bytes, int]:
    try:
        pairs = [line.split() for line in model.splitlines() if line]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise UserError(f"the vocabulary is no tiktoken file: {error}") from error


def train_tokenizer(counts: dict[bytes, int], vocab_size: int) -> Tokenizer:
    """Train byte-pair encoding on the words of a text.

    A space begins a word, a newline and a digit stand alone, a tab is always spelled as its byte, and
    no text is normalised. Where the text has more distinct characters than fit, the commonest get
    half of the room and the others are spelled in bytes. The pieces are those that SentencePiece
    learns from the text itself; only that it leaves out each line with U+2585, here a word, which it
    keeps for itself.

    Args:
        counts: how often each word comes, as in `words.WordCounts`.
        vocab_size: entries at most; a small text may not have as many.
    Raises:
        UserError: when there is no text, or vocab_size has no room for characters.
    """
    check_vocab_size(vocab_size)
    walls = {ord("\t"): WORD_END}           # a tab ends a line's word below
    try:
        return _train(counts, walls, vocab_size)
    except RuntimeError as error:
        if "sentences_.empty()" in str(error):
            raise UserError("there is no text to train a vocabulary on") from error
        if "smaller than required_chars" not in str(error):
            raise
    characters = Counter()
    for word, count in counts.items():
        for character in word.decode():
            characters[character] += count
    half = (vocab_size - N_RESERVED_IDS) // 2
    rare = [character for character, _ in characters.most_common()[half:] if character != " "]
    return _train(counts, walls | dict.fromkeys(map(ord, rare), WORD_END), vocab_size)


def check_vocab_size(vocab_size: int) -> None:
    """Raise UserError when a vocabulary of that size has no room for characters."""
    if vocab_size < N_RESERVED_IDS + 4:
        raise UserError(f"--vocab_size {vocab_size} is too small: {N_RESERVED_IDS} entries are taken by the bytes and "
                        "special ids; try 512 or more")


def _train(counts: dict[bytes, int], walls: dict[int, str], vocab_size: int) -> Tokenizer:
    model, failures = io.BytesIO(), []

    def lines() -> Iterator[str]:
        try:
            for word, count in counts.items():
                if shown := word.decode().translate(walls).strip(WORD_END):
                    yield f"{shown}\t{count}"
        except (Exception, KeyboardInterrupt) as error:     # SentencePiece would turn it into one of its own
            failures.append(error)
            raise

    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines(), input_format="tsv", model_writer=model, add_dummy_prefix=False,
            model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=1.0,
            byte_fallback=True, split_digits=True, required_chars="\n", pretokenization_delimiter=WORD_END,
            normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, max_sentence_length=1 << 30, minloglevel=2)
    except RuntimeError:
        if failures:
            raise failures[0] from None
        raise
    # the words came with their spaces; the texts to encode come without the first one, so that it is put there. A
    # field that comes twice in a protocol buffer has its last value: normalizer_spec (3) { add_dummy_prefix (3): true }
    with_prefix = SentencePieceProcessor(model_proto=model.getvalue() + bytes([3 << 3 | 2, 2, 3 << 3, 1]))
    return Tokenizer(with_prefix.serialized_model_proto())


def _read(path: Path) -> bytes:
    if not path.is_file():
        others = ", ".join(map(str, sorted(path.parent.glob("*.model"))[:5]))
        raise UserError(f"no tokenizer at {path}" + (f"\n       there is {others}" if others else ""))
    return path.read_bytes()
