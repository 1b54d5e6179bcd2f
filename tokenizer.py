"""Text to token ids and back, with SentencePiece.

    tokenizer = Tokenizer("data/tok4096.model")
    ids = tokenizer.encode("Once upon a time", bos=True)
    assert tokenizer.decode(ids) == "Once upon a time"

`train_tokenizer` learns byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) with Llama 2's layout: 0 unknown,
1 bos, 2 eos, 3 to 258 the single bytes, then the learned pieces. It is lossless: decode(encode(text)) == text for
every text. This file depends only on sentencepiece, so it can be copied into other projects.
"""
import hashlib
import io
import re
from collections import Counter
from functools import cached_property
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

SPACE_MARK = "\u2581"                # how SentencePiece writes a space
NORMAL = 1                      # kinds of pieces in a .model file
UNKNOWN = 2
CONTROL = 3
UNUSED = 5
BYTE = 6
N_RESERVED_IDS = 3 + 256        # unknown, bos, eos, and a piece for each byte
WORD_END = "\x1f"               # separates words during training; no piece contains it
HARD_TEXT = "  ﬁ½\u3000e\u0301 \n\n \t\x00"     # characters that normalizers change
SURROGATE = re.compile("[\ud800-\udfff]")     # how Python represents invalid UTF-8 in arguments


class BaseTokenizer:
    """The interface of all tokenizers.

    Attributes:
        n_words: size of the vocabulary, also as `vocab_size`; ids run from 0 to n_words - 1.
        bos_id, eos_id, pad_id: special ids; -1 if missing.
        add_bos: True if the model expects bos before a text.
        is_lossless: True if decode(encode(text)) == text for every text.
        model, sha256: the bytes of the model file, and their digest in hex.
    """
    n_words: int
    bos_id = eos_id = pad_id = -1
    add_bos = True
    is_lossless = False

    def __init__(self, model: bytes):
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()

    @property
    def vocab_size(self) -> int:
        return self.n_words

    def encode(self, s: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of a string, optionally with bos in front and eos at the end."""
        return self.encode_batch([s], bos, eos)[0]

    def encode_batch(self, texts: list[str], bos: bool = False, eos: bool = False) -> list[list[int]]:
        """Return the ids of each string; faster than separate calls. Raises ValueError for lone surrogates."""
        head = [self.bos_id] if bos else []
        tail = [self.eos_id] if eos else []
        try:
            return [head + ids + tail for ids in self._encode(texts)]
        except (TypeError, UnicodeEncodeError) as error:
            broken = [text for text in texts if isinstance(text, str) and SURROGATE.search(text)]
            if not broken:
                raise
            raise ValueError(f"the text is not UTF-8: {ascii(broken[0][:60])}") from error

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt, with bos if the model expects it. Raises ValueError if there are no ids."""
        ids = self.encode(text)
        if self.bos_id >= 0 and (self.add_bos or not ids):
            return [self.bos_id] + ids
        if not ids:
            raise ValueError("this tokenizer has no bos token; expected a prompt that is not empty")
        return ids

    def special_token_id(self, special: str) -> int:
        """Return the id of a special token. Raises ValueError for an unknown one."""
        raise ValueError(f"this tokenizer has no special token {special}")

    def _encode(self, texts: list[str]) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without special ids; incomplete characters become U+FFFD."""
        raise NotImplementedError

    def id_to_piece(self, token: int) -> str:
        """Return the text of a vocabulary entry, with U+2581 for spaces."""
        raise NotImplementedError


class Tokenizer(BaseTokenizer):
    """A SentencePiece model."""

    def __init__(self, model: str | Path | bytes):
        """Load a `.model` file, or its bytes. Raises FileNotFoundError or ValueError."""
        super().__init__(model if isinstance(model, bytes) else Path(model).read_bytes())
        name = "this" if isinstance(model, bytes) else model
        try:
            self._sp = SentencePieceProcessor(model_proto=self.model)
            self.n_words = self._sp.vocab_size()
            if not self.pieces():       # raises UnicodeDecodeError for a piece that is not UTF-8
                raise RuntimeError("no pieces")
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} is not a SentencePiece model ({len(self.model)} bytes)") from error
        self.bos_id = self._sp.bos_id()
        self.eos_id = self._sp.eos_id()
        self.pad_id = self._sp.pad_id()
        self._newline_length = len(self._sp.encode("\n"))

    @cached_property
    def is_lossless(self) -> bool:
        texts = [text for text, _, kind in self.pieces() if kind == NORMAL]
        n_bytes = sum(kind == BYTE for _, _, kind in self.pieces())
        newline_stands_alone = all("\n" not in text or text == "\n" for text in texts)
        return (n_bytes == 256 and newline_stands_alone and self._sp.encode("\n", out_type=str) == [SPACE_MARK, "\n"]
                and self._sp.decode(self._sp.encode(HARD_TEXT)) == HARD_TEXT)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        batch = self._sp.encode(texts)
        for i, text in enumerate(texts):
            if SPACE_MARK in text and self.is_lossless:
                batch[i] = self._encode_with_space_mark(text)
        return batch

    def _encode_with_space_mark(self, text: str) -> list[int]:
        """Encode U+2581 as its bytes, because SentencePiece would read it as a space."""
        first, *rest = text.split(SPACE_MARK)
        ids = self._sp.encode(first) or self._sp.encode("\n")[:1]
        space_mark_ids = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        for part in rest:
            ids += space_mark_ids + self.encode_continuation(part)
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Return the ids of a text without the space that SentencePiece puts in front.

        This encodes "\\n" + text: the newline takes that space and merges with nothing, so its ids can be cut off.
        """
        return self._sp.encode("\n" + text)[self._newline_length:]

    def decode(self, ids: list[int]) -> str:
        try:
            return self._sp.decode(ids)
        except IndexError:                  # a model may have more embeddings than vocabulary entries
            return self._sp.decode([i for i in ids if 0 <= i < self.n_words])

    def id_to_piece(self, token: int) -> str:
        return self._sp.id_to_piece(token) if token < self.n_words else ""

    def special_token_id(self, special: str) -> int:
        token = self._sp.piece_to_id(special)       # the unknown id if the piece does not exist
        return token if self._sp.id_to_piece(token) == special else super().special_token_id(special)

    def pieces(self) -> list[tuple[str, float, int]]:
        """Return the text, score and kind of each vocabulary entry."""
        return [(self._sp.id_to_piece(i), self._sp.get_score(i), self._kind(i)) for i in range(self.n_words)]

    def _kind(self, token: int) -> int:
        if self._sp.is_unknown(token):
            return UNKNOWN
        if self._sp.is_control(token):
            return CONTROL
        if self._sp.is_byte(token):
            return BYTE
        return UNUSED if self._sp.is_unused(token) else NORMAL


# ---- training -----------------------------------------------------------------------------------

def train_tokenizer(word_counts: dict[bytes, int], vocab_size: int) -> Tokenizer:
    """Train byte-pair encoding on the words of a text.

    Spaces begin words. Newlines and digits are pieces by themselves, and tabs are encoded as bytes. Text is not
    normalized. If the characters of the text do not fit, the most common ones fill half of the free entries, and the
    others are encoded as bytes. A small text may yield fewer than vocab_size entries.

    Args:
        word_counts: the count of each word; words are in UTF-8, with the space in front of them.
    Raises:
        ValueError: if the text is empty, or vocab_size leaves no room for characters.
    """
    check_vocab_size(vocab_size)
    word_ends = {ord("\t"): WORD_END}           # a tab separates words
    try:
        return _train(word_counts, word_ends, vocab_size)
    except RuntimeError as error:
        if "sentences_.empty()" in str(error):
            raise ValueError("no text to train a tokenizer on") from error
        if "smaller than required_chars" not in str(error):
            raise
    rare = _rare_characters(word_counts, (vocab_size - N_RESERVED_IDS) // 2)
    return _train(word_counts, word_ends | dict.fromkeys(map(ord, rare), WORD_END), vocab_size)


def check_vocab_size(vocab_size: int) -> None:
    """Raise ValueError if vocab_size leaves no room for characters."""
    if vocab_size < N_RESERVED_IDS + 4:
        raise ValueError(f"vocab_size {vocab_size} is too small, because bytes and special ids take {N_RESERVED_IDS} "
                         "entries; expected 512 or more")


def _rare_characters(word_counts: dict[bytes, int], n_common: int) -> list[str]:
    counts = Counter()
    for word, count in word_counts.items():
        for character in word.decode():
            counts[character] += count
    return [character for character, _ in counts.most_common()[n_common:] if character != " "]


def _train(word_counts: dict[bytes, int], word_ends: dict[int, str], vocab_size: int) -> Tokenizer:
    lines = []
    for word, count in word_counts.items():
        text = word.decode().translate(word_ends).strip(WORD_END)
        if text:
            lines.append(f"{text}\t{count}")
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), input_format="tsv", model_writer=model, add_dummy_prefix=False,
        model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=1.0,
        byte_fallback=True, split_digits=True, required_chars="\n", pretokenization_delimiter=WORD_END,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, max_sentence_length=1 << 30, minloglevel=2)
    return Tokenizer(_with_space_in_front(model.getvalue()))


def _with_space_in_front(model: bytes) -> bytes:
    """Return a model that puts a space before each text, as each word had in training."""
    # the last value of a protobuf field counts; append normalizer_spec (3) { add_dummy_prefix (3): true }
    processor = SentencePieceProcessor(model_proto=model + bytes([3 << 3 | 2, 2, 3 << 3, 1]))
    return processor.serialized_model_proto()
