"""Split texts into words, so that steps 1 and 2 process each distinct word once.

    counts = WordCounts()
    counts.add([b"a cat saw a dog"])
    counts.flush()                                 # counts.counts is {b" a": 2, b" cat": 1, ...}

A word begins with the spaces in front of it; a newline is a word by itself. Every text gets a space in front, as in
SentencePiece. No piece of step 1's tokenizers crosses the border of a word, so the byte-pair encoding of a text is the
encoding of its words, one after another. Text repeats itself: 3.4 million words of TinyStories are 36,000 distinct
ones. numpy looks them up, 128 kB of text at a time.
"""
import re
from array import array
from collections.abc import Iterable
from itertools import chain
from zlib import crc32

import numpy as np

from tokenizer import HARD_TEXT, NORMAL, SPACE_MARK, UNUSED, BaseTokenizer, Tokenizer

SPACE_MARK_BYTES = SPACE_MARK.encode()
CROSSES_WORDS = re.compile(f"[^{SPACE_MARK} ][{SPACE_MARK} ]|\n.|.\n", re.DOTALL)
MAX_WORDS = 1 << 17                     # words per table; a new table replaces a full one
MAX_WORD_BYTES = 1 << 23                # bytes of all words of a table, which limits the memory of long words
MAX_COUNT_BYTES = 100 << 20             # approximate memory of the counted words

_N_SLOTS = 2 * MAX_WORDS
_SLOTS_PER_WORD = 3                     # possible slots of a word
_MAX_KEY_BYTES = 15                     # longest word in a table; the 16th byte of its key is its length
_LOW_MASK = np.array([(1 << 8 * min(n, 8)) - 1 for n in range(_MAX_KEY_BYTES + 1)], np.uint64)
_HIGH_MASK = np.array([(1 << 8 * max(n - 8, 0)) - 1 for n in range(_MAX_KEY_BYTES + 1)], np.uint64)
_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93], np.uint64)        # any two odd, random numbers


def split_words(texts: list[bytes]) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Join the texts, with a space in front of each, and find their words.

    Returns the buffer; the starts of the words, and their end (words + 1,); the index of each text's first word
    (texts,).
    """
    buffer = b" ".join([b"", *texts, bytes(_MAX_KEY_BYTES)])        # zeros, to read whole integers at the end
    end = len(buffer) - 1 - _MAX_KEY_BYTES
    data = np.frombuffer(buffer, np.uint8, end)
    sizes = np.fromiter(map(len, texts), np.int64, len(texts)) + 1
    text_starts = np.cumsum(sizes) - sizes
    is_space = data == ord(" ")
    is_newline = data == ord("\n")
    is_start = is_newline.copy()
    is_start[1:] |= (is_space[1:] > is_space[:-1]) | is_newline[:-1]
    is_start[text_starts] = True
    word_starts = np.append(np.flatnonzero(is_start), end)
    return buffer, word_starts, np.searchsorted(word_starts, text_starts)


class WordTable:
    """A hash table in numpy. It numbers distinct words 1, 2, 3, ... in order of appearance, a batch at a time.

    A key holds the bytes and the length of a word in two 64-bit integers, `low` and `high`, so equal keys are equal
    words. A slot is free if its `high` is 0. The hash of a key selects _SLOTS_PER_WORD slots, and the word takes the
    first free one. A word that is too long for a key, or finds no free slot, gets a new id in each batch. Where spaces
    are rare, as in Chinese, most words are too long and the table is soon full; this costs little more than no table.
    """

    def __init__(self):
        self.low = np.zeros(_N_SLOTS, np.uint64)
        self.high = np.zeros(_N_SLOTS, np.uint64)
        self.ids = np.zeros(_N_SLOTS, np.int32)
        self.n_words = 0
        self.n_bytes = 0

    def is_full(self) -> bool:
        return self.n_words >= MAX_WORDS or self.n_bytes >= MAX_WORD_BYTES

    def assign_ids(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
        """Assign ids to the words of texts.

        Returns the id of each word (words,), int32; the index of each text's first word (texts,); the new words in the
        order of their ids.
        """
        buffer, word_starts, first_words = split_words(texts)
        keys = _make_keys(buffer, word_starts[:-1], np.diff(word_starts))
        ids = self._lookup(*keys)
        unknown = np.flatnonzero(ids == 0)
        starts = word_starts[unknown].tolist()
        ends = word_starts[unknown + 1].tolist()
        new_ids: dict[bytes, int] = {}
        to_insert = []
        for index, start, end in zip(unknown.tolist(), starts, ends):
            word = buffer[start:end]
            if word not in new_ids:
                new_ids[word] = self.n_words + 1 + len(new_ids)
                if end - start <= _MAX_KEY_BYTES:
                    to_insert.append(index)
            ids[index] = new_ids[word]
        self.n_words += len(new_ids)
        self.n_bytes += sum(map(len, new_ids))
        self._insert(*(key[to_insert] for key in keys), ids[to_insert])
        return ids, first_words, list(new_ids)

    def _lookup(self, low: np.ndarray, high: np.ndarray, hashes: np.ndarray, attempt: int = 0) -> np.ndarray:
        """Return the ids of words, 0 for words that are not in the table."""
        slots = _choose_slots(hashes, attempt)
        is_equal = (self.low.take(slots) == low) & (self.high.take(slots) == high)      # take is twice as fast as []
        ids = self.ids.take(slots) * is_equal
        rest = np.flatnonzero(~is_equal)
        if attempt + 1 < _SLOTS_PER_WORD and len(rest):
            ids[rest] = self._lookup(low[rest], high[rest], hashes[rest], attempt + 1)
        return ids

    def _insert(self, low: np.ndarray, high: np.ndarray, hashes: np.ndarray, ids: np.ndarray, attempt: int = 0) -> None:
        """Put words into free slots. If several words want one slot, the last one gets it and the others try again."""
        slots = _choose_slots(hashes, attempt)
        is_free = self.high[slots] == 0
        self.ids[slots[is_free]] = ids[is_free]
        is_placed = is_free & (self.ids[slots] == ids)
        self.low[slots[is_placed]] = low[is_placed]
        self.high[slots[is_placed]] = high[is_placed]
        rest = ~is_placed
        if attempt + 1 < _SLOTS_PER_WORD and rest.any():
            self._insert(low[rest], high[rest], hashes[rest], ids[rest], attempt + 1)


def _make_keys(buffer: bytes, starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the key of each word, `low` and `high`, and the key's hash.

    The key of a word longer than _MAX_KEY_BYTES contains a length that no key in a table has.
    """
    integers = np.ndarray((len(buffer) - 7,), "<u8", buffer, strides=(1,))      # the 8 bytes at each position
    key_sizes = np.minimum(sizes, _MAX_KEY_BYTES)
    low = integers.take(starts) & _LOW_MASK.take(key_sizes)
    high = integers.take(starts + 8) & _HIGH_MASK.take(key_sizes)
    high |= np.minimum(sizes, _MAX_KEY_BYTES + 1).astype(np.uint64) << np.uint64(56)
    return low, high, (low ^ high * _MULTIPLIERS[0]) * _MULTIPLIERS[1]


def _choose_slots(hashes: np.ndarray, attempt: int) -> np.ndarray:
    return (hashes >> np.uint64(46 - 18 * attempt) & np.uint64(_N_SLOTS - 1)).astype(np.int64)


class DocumentEncoder:
    """A fast encoder of documents. It encodes word by word, several times faster, if that gives the same ids.

        encoder = DocumentEncoder(tokenizer)
        ids = encoder.encode([b"a cat", b"a dog"])      # bos ... eos bos ... eos, int32
    """

    def __init__(self, tokenizer: BaseTokenizer):
        self.tokenizer = tokenizer
        self.is_wordwise = is_wordwise(tokenizer)
        self._start_table()

    def _start_table(self) -> None:
        """Start an empty table. Word 0 stands for eos and bos between two texts."""
        self.table = WordTable()
        self.tokens = array("i", [self.tokenizer.eos_id, self.tokenizer.bos_id])    # ids of all words, concatenated
        self.starts = array("i", [0])                                               # position of each word in `tokens`
        self.sizes = array("i", [2])

    def encode(self, texts: list[bytes]) -> np.ndarray:
        """Return the ids of texts in UTF-8, int32: bos ... eos of each, concatenated."""
        if self.is_wordwise and all(texts) and not any(SPACE_MARK_BYTES in text for text in texts):
            return self._encode_words(texts)
        batch = self.tokenizer.encode_batch([text.decode() for text in texts], bos=True, eos=True)
        return np.fromiter(chain.from_iterable(batch), np.int32)

    def _encode_words(self, texts: list[bytes]) -> np.ndarray:
        if self.table.is_full():
            self._start_table()
        words, first_words, new_words = self.table.assign_ids(texts)
        for word in new_words:
            tokens = self.tokenizer.encode_continuation(word.decode())
            self.starts.append(len(self.tokens))
            self.sizes.append(len(tokens))
            self.tokens.extend(tokens)
        words = np.append(np.insert(words, first_words, 0), 0)
        sizes = np.frombuffer(self.sizes, np.int32).take(words)
        ends = np.cumsum(sizes, dtype=np.int32)                 # end of each word in the result
        # token j of the result, in word i, is tokens[starts[i] + j - (start of i in the result)]
        shifts = np.frombuffer(self.starts, np.int32).take(words) - (ends - sizes)
        positions = np.repeat(shifts, sizes) + np.arange(ends[-1], dtype=np.int32)
        return np.frombuffer(self.tokens, np.int32).take(positions)[1:-1]


class WordCounts:
    """The count of each word. If the words take more than MAX_COUNT_BYTES, the rarest are dropped."""

    def __init__(self):
        self.counts: dict[bytes, int] = {}
        self.n_pruned = 0
        self._n_bytes = 0
        self._drop_table()

    def _drop_table(self) -> None:
        self._table: WordTable | None = None            # None after flush(), which makes pickles small
        self._words = [b""]                             # by id
        self._table_counts = np.zeros(1, np.int64)      # by id

    def add(self, texts: list[bytes]) -> None:
        """Count the words of texts. U+2581 counts as a space, as in SentencePiece."""
        self._table = self._table or WordTable()
        ids, _, new_words = self._table.assign_ids([text.replace(SPACE_MARK_BYTES, b" ") for text in texts])
        self._words += new_words
        counts = np.bincount(ids, minlength=len(self._words))
        counts[:len(self._table_counts)] += self._table_counts
        self._table_counts = counts
        if self._table.is_full():
            self.flush()

    def flush(self) -> None:
        """Move the counts of the table into `counts`."""
        counts = zip(self._words[1:], self._table_counts[1:].tolist())
        self._drop_table()
        self._add_counts(counts)

    def merge(self, other: "WordCounts") -> None:
        """Add the counts of another, flushed object."""
        self.n_pruned += other.n_pruned
        self._add_counts(other.counts.items())

    def _add_counts(self, counts: Iterable[tuple[bytes, int]]) -> None:
        for word, count in counts:
            if word not in self.counts:
                self._n_bytes += _entry_bytes(word)
            self.counts[word] = self.counts.get(word, 0) + count
        if self._n_bytes > MAX_COUNT_BYTES:
            self._prune()

    def _prune(self) -> None:
        """Keep the most common words, in half of the memory. A CRC breaks ties."""
        entries = sorted(self.counts.items(), key=lambda entry: (-entry[1], crc32(entry[0])))
        self.counts = {}
        self._n_bytes = 0
        for word, count in entries:
            if self._n_bytes + _entry_bytes(word) > MAX_COUNT_BYTES // 2:
                break
            self.counts[word] = count
            self._n_bytes += _entry_bytes(word)
        self.n_pruned += len(entries) - len(self.counts)


def _entry_bytes(word: bytes) -> int:
    """Estimate the memory of a word and its count. ASCII words take 16 bytes per character in training."""
    training_bytes = 16 * len(word) if word.isascii() else 0
    return max(150, training_bytes) + 8 * len(word)


def is_wordwise(tokenizer: BaseTokenizer) -> bool:
    """True if the words of a text have the same ids as the text: BPE, no normalization, and pieces within words."""
    if not isinstance(tokenizer, Tokenizer):
        return False
    pieces = tokenizer.pieces()
    is_bpe = all(score.is_integer() for _, score, _ in pieces)      # BPE scores are merge ranks
    texts = [text for text, _, kind in pieces if kind in (NORMAL, UNUSED)]
    has_space_in_front = tokenizer.id_to_piece(tokenizer.encode("a")[0]).startswith(SPACE_MARK)
    keeps_text = tokenizer.decode(tokenizer.encode(HARD_TEXT)) == HARD_TEXT
    return is_bpe and has_space_in_front and keeps_text and not any(map(CROSSES_WORDS.search, texts))
