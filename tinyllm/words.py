"""Texts as words, so that each distinct word is worked on once: counted by step 1, encoded by step 2.

    counts = WordCounts()
    counts.add([b"a cat saw a dog"])
    counts.flush()                                 # counts.counts is {b" a": 2, b" cat": 1, ...}

A word begins where a space follows something else, and holds all spaces up to its letters; a newline is a word by
itself. Every text gets a space in front, as SentencePiece puts one there. No piece of a vocabulary of step 1 crosses
the border of a word, so that byte-pair encoding of a text is that of its words, one after another.

Text repeats itself: 3.4 million words of TinyStories are 36,000 distinct ones. What is left to do per word is done by
numpy for 128 kB of text at a time.
"""
import io
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np

from tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, BaseTokenizer, Tokenizer

SPACE_MARK = SPACE.encode()             # SentencePiece writes a space as this character
MAX_WORDS = 1 << 17                    # numbers that are given before all is forgotten,
MAX_WORD_BYTES = 1 << 23                    # and the length of the words that had them, so that long ones take no more
MAX_COUNT_BYTES = 100 << 20                 # bytes that the counted words may take, about

_SLOTS = 2 * MAX_WORDS
_PROBES = 3                             # places where a word may be kept
_LONGEST = 15                           # bytes of a word that is kept; its length takes the 16th
_LOW_BYTES = np.array([(1 << 8 * min(n, 8)) - 1 for n in range(_LONGEST + 1)], np.uint64)
_HIGH_BYTES = np.array([(1 << 8 * max(n - 8, 0)) - 1 for n in range(_LONGEST + 1)], np.uint64)
_ODD = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93], np.uint64)       # any two will do that are odd and mixed


def split_words(texts: list[bytes]) -> tuple[bytes, np.ndarray, np.ndarray]:
    """The texts in one buffer with a space in front of each, and where its words and its texts begin.

    Returns:
        buffer; places where words begin, and that of the end (words + 1,); for each text its first word (texts,).
    """
    buffer = b" ".join([b"", *texts, bytes(_LONGEST)])          # zeros at the end, to read whole numbers there
    end = len(buffer) - 1 - _LONGEST
    data = np.frombuffer(buffer, np.uint8, end)
    sizes = np.fromiter(map(len, texts), np.int64, len(texts)) + 1
    spaces, newlines = data == ord(" "), data == ord("\n")
    begins = newlines.copy()
    begins[1:] |= (spaces[1:] > spaces[:-1]) | newlines[:-1]
    firsts = np.cumsum(sizes) - sizes
    begins[firsts] = True
    places = np.append(np.flatnonzero(begins), end)
    return buffer, places, np.searchsorted(places, firsts)


class WordTable:
    """Gives the distinct words of texts numbers: 1, 2, 3 and so on, as they come.

    A hash table with open addressing, worked on by numpy for all words of a batch at once. A word is its own key, as
    two numbers of 64 bits, so that equal keys are equal words. One that is too long for that, or finds its places
    taken, gets another number in each batch; where spaces are rare, as in Chinese, nearly all do, and the table is soon
    full. That costs little more than not to have it.
    """

    def __init__(self):
        self.low, self.high = np.zeros(_SLOTS, np.uint64), np.zeros(_SLOTS, np.uint64)
        self.numbers, self.known, self.size = np.zeros(_SLOTS, np.int32), 0, 0

    @property
    def full(self) -> bool:
        """Whether it is time to begin anew with another one."""
        return self.known >= MAX_WORDS or self.size >= MAX_WORD_BYTES

    def assign_ids(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
        """Number the words of texts.

        Returns:
            the number of each word (words,), int32; for each text its first word (texts,); the words that had none
            before, in the order of their numbers.
        """
        buffer, places, firsts = split_words(texts)
        sizes = np.diff(places)
        keys = _keys(buffer, places[:-1], sizes)
        numbers = self._lookup(*keys)
        unknown = np.flatnonzero(numbers == 0)
        new: dict[bytes, int] = {}
        to_keep = []
        for at, begin, end in zip(unknown.tolist(), places[unknown].tolist(), places[unknown + 1].tolist()):
            word = buffer[begin:end]
            if word not in new:
                new[word] = self.known + 1 + len(new)
                if end - begin <= _LONGEST:
                    to_keep.append(at)
            numbers[at] = new[word]
        self.known += len(new)
        self.size += sum(map(len, new))
        self._insert(*(key[to_keep] for key in keys), numbers[to_keep])
        return numbers, firsts, list(new)

    def _lookup(self, low: np.ndarray, high: np.ndarray, mixed: np.ndarray, probe: int = 0) -> np.ndarray:
        """The numbers of words; 0 for those that are not kept."""
        slots = _slots(mixed, probe)
        same = (self.low.take(slots) == low) & (self.high.take(slots) == high)      # take is twice as fast as [slots]
        numbers = self.numbers.take(slots) * same
        rest = np.flatnonzero(~same)
        if probe + 1 < _PROBES and len(rest):
            numbers[rest] = self._lookup(low[rest], high[rest], mixed[rest], probe + 1)
        return numbers

    def _insert(self, low: np.ndarray, high: np.ndarray, mixed: np.ndarray, numbers: np.ndarray, probe: int = 0) -> None:
        """Put words where there is room; where several want one slot, one of them gets it."""
        slots = _slots(mixed, probe)
        free = self.high[slots] == 0
        self.numbers[slots[free]] = numbers[free]
        won = free & (self.numbers[slots] == numbers)
        self.low[slots[won]], self.high[slots[won]] = low[won], high[won]
        if probe + 1 < _PROBES and not won.all():
            self._insert(low[~won], high[~won], mixed[~won], numbers[~won], probe + 1)


def _keys(buffer: bytes, places: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bytes of each word as two numbers, its length in the last byte; and both mixed. Of a long word, too few."""
    eights = np.ndarray((len(buffer) - 7,), "<u8", buffer, strides=(1,))        # the 8 bytes from each place on
    short = np.minimum(sizes, _LONGEST)
    low = eights.take(places) & _LOW_BYTES.take(short)
    high = eights.take(places + 8) & _HIGH_BYTES.take(short)
    high |= np.minimum(sizes, _LONGEST + 1).astype(np.uint64) << np.uint64(56)
    return low, high, (low ^ high * _ODD[0]) * _ODD[1]


def _slots(mixed: np.ndarray, probe: int) -> np.ndarray:
    return (mixed >> np.uint64(46 - 18 * probe) & np.uint64(_SLOTS - 1)).astype(np.int64)


class WordEncoder:
    """Encodes texts by the ids of their words, each of which is encoded once."""

    def __init__(self, encode: Callable[[list[bytes]], Iterable[list[int]]], between: list[int]):
        """encode: gives the ids of words. between: the ids that stand between texts."""
        self.encode_words, self.separator_ids = encode, between
        self._forget()

    def _forget(self) -> None:
        """Number 0 is what stands between texts; then come the words."""
        self.words = WordTable()
        self.ids, self.begins, self.sizes = array("i", self.separator_ids), array("i", [0]), array("i", [len(self.separator_ids)])

    def encode(self, texts: list[bytes]) -> np.ndarray:
        """The ids of the texts one after another, int32, with `between` in front of each and at the end."""
        if self.words.full:
            self._forget()
        numbers, firsts, new = self.words.assign_ids(texts)
        for ids in self.encode_words(new):
            self.begins.append(len(self.ids))
            self.sizes.append(len(ids))
            self.ids.extend(ids)
        numbers = np.append(np.insert(numbers, firsts, 0), 0)
        sizes = np.frombuffer(self.sizes, np.int32).take(numbers)
        ends = np.cumsum(sizes, dtype=np.int32)
        # id j of the result, in word i, is ids[begins[i] + j - (where i begins in the result)]
        shifts = np.frombuffer(self.begins, np.int32).take(numbers) - (ends - sizes)
        return np.frombuffer(self.ids, np.int32).take(np.repeat(shifts, sizes) + np.arange(ends[-1], dtype=np.int32))


class DocumentEncoder:
    """Encodes many documents: word by word if that gives the same ids as whole texts, which is several times faster.

        encoder = DocumentEncoder(tokenizer)
        ids = encoder.encode([b"a cat", b"a dog"])      # bos ... eos bos ... eos, int32

    Attributes:
        why_not_wordwise: why whole texts are encoded; empty if words are.
    """

    def __init__(self, tokenizer: BaseTokenizer):
        self.tokenizer = tokenizer
        self.why_not_wordwise = why_not_wordwise(tokenizer)
        self._word_encoder = WordEncoder(self._encode_words, [tokenizer.eos_id, tokenizer.bos_id])

    def encode(self, texts: list[bytes]) -> np.ndarray:
        """Return the ids of texts in UTF-8: bos ... eos of each, one after another, int32."""
        needs_whole_texts = self.why_not_wordwise or not all(texts) or any(SPACE_MARK in text for text in texts)
        return self.encode_whole(texts) if needs_whole_texts else self._word_encoder.encode(texts)[1:-1]

    def encode_whole(self, texts: list[bytes]) -> np.ndarray:
        """The plain way, for every tokenizer."""
        batch = self.tokenizer.encode_batch([text.decode() for text in texts], bos=True, eos=True)
        return np.fromiter(chain.from_iterable(batch), np.int32)

    def _encode_words(self, words: list[bytes]) -> Iterator[list[int]]:
        return (self.tokenizer.encode_continuation(word.decode()) for word in words)


class WordCounts:
    """How often each word comes. When they take more than MOST_MEMORY, those that came least are left out."""

    def __init__(self):
        self.counts: dict[bytes, int] = {}
        self.n_pruned = self._size = 0
        self._numbered: tuple[WordTable, list[bytes], np.ndarray] | None = None

    def add(self, texts: list[bytes]) -> None:
        """Count the words of texts. A character that SentencePiece takes for a space is one."""
        words, names, seen = self._numbered or (WordTable(), [b""], np.zeros(0, np.int64))
        numbers, _, new = words.assign_ids([text.replace(SPACE_MARK, b" ") for text in texts])
        names += new
        now = np.bincount(numbers, minlength=len(seen))
        now[:len(seen)] += seen
        self._numbered = words, names, now
        if words.full:
            self.flush()

    def flush(self) -> None:
        """Bring what was counted by number into `counts`."""
        if self._numbered:
            _, names, seen = self._numbered
            self._numbered = None
            self._add_counts(zip(names[1:], seen[1:].tolist()))

    def merge(self, other: "WordCounts") -> None:
        """Take in what another one has settled."""
        self.n_pruned += other.n_pruned
        self._add_counts(other.counts.items())

    def _add_counts(self, counts: Iterable[tuple[bytes, int]]) -> None:
        for word, count in counts:
            if word not in self.counts:
                self._size += _entry_bytes(word)
            self.counts[word] = self.counts.get(word, 0) + count
        if self._size > MAX_COUNT_BYTES:
            self._prune()

    def _prune(self) -> None:
        """Keep the commonest, in half of the memory. Among equally common ones chance decides, the same each time."""
        every = sorted(self.counts.items(), key=lambda item: (-item[1], crc32(item[0])))
        self.counts, self._size = {}, 0
        for word, count in every:
            if self._size + _entry_bytes(word) > MAX_COUNT_BYTES // 2:
                break
            self.counts[word] = count
            self._size += _entry_bytes(word)
        self.n_pruned += len(every) - len(self.counts)


def _entry_bytes(word: bytes) -> int:
    """Bytes that a word and its count take, about; long ones count more, for what training makes of each character."""
    return max(150, 16 * len(word) * word.isascii()) + 8 * len(word)


def why_not_wordwise(tokenizer: BaseTokenizer) -> str:
    """Return why the words of a text cannot be encoded one by one; empty if they can.

    They can if nothing but byte-pair encoding is done, and no piece crosses the border of a word. Fields and numbers
    are from sentencepiece_model.proto.
    """
    if not isinstance(tokenizer, Tokenizer):
        return "it is not of SentencePiece"
    try:
        fields = list(_fields(tokenizer.model))
        return _wrong_algorithm(fields) or _wrong_pieces(fields)
    except (LookupError, TypeError):
        return "its file is of an unknown form"


def _wrong_algorithm(fields: list[tuple[int, Any]]) -> str:
    trainer = _merged_message(fields, 2)
    normalizer = _merged_message(fields, 3)
    if trainer.get(3, 1) != 2 or not trainer.get(35) or trainer.get(24):
        return "it is no byte-pair encoding with bytes for unknown characters and spaces in front of words"
    if normalizer.get(2) or not normalizer.get(3, 1) or normalizer.get(4, 1) or not normalizer.get(5, 1):
        return "it changes the text before it encodes it, or puts no space in front"
    return ""


def _wrong_pieces(fields: list[tuple[int, Any]]) -> str:
    pieces = [dict(_fields(part)) for field, part in fields if field == 1]
    for piece in pieces:
        if piece.get(3, NORMAL) not in (NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE):
            return "it has symbols that are found before all others"
    for text in [piece[1].decode() for piece in pieces if piece.get(3, NORMAL) in (NORMAL, UNUSED)]:
        if re.search(f"[^{SPACE}]{SPACE}|\n.|.\n", text, re.DOTALL):
            return f"its entry {text!r} crosses the border of a word"
    return ""


def _merged_message(fields: list[tuple[int, Any]], number: int) -> dict[int, Any]:
    """Return the message of that number; of a field that occurs twice, the last value."""
    return dict(pair for field, part in fields if field == number for pair in _fields(part))


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The number and the value, an int or bytes, of each field of a protocol buffer."""
    file = io.BytesIO(message)
    while file.tell() < len(message):
        number, kind = divmod(_varint(file), 8)
        if kind == 0:
            yield number, _varint(file)
        else:
            yield number, file.read(_varint(file) if kind == 2 else {1: 8, 5: 4}[kind])


def _varint(file: BinaryIO) -> int:
    value = shift = 0
    while True:
        byte = file.read(1)[0]
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value
