"""Read the documents of a text file, in memory that does not grow with the file.

    for text in read_documents(Path("stories.jsonl.gz")): ...

`.txt` is split at `<|endoftext|>`, or is one document; `.json` is a list, `.jsonl` has a record per line; each record
is a string, or an object with the key `story` or `text`. `.gz` is unpacked on the way.
"""
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from tinyllm.cli import UserError
from tinyllm.project import shorten_list

SEPARATOR = "<|endoftext|>"             # between the documents of a .txt file
TEXT_KEYS = ("story", "text")           # keys of a JSON object that may hold its text; the first one found counts
MAX_DOCUMENT_CHARS = 1 << 16            # a longer document is cut at a blank line, a line or a space
BATCH_BYTES = 1 << 17                   # text per batch: all arrays made from it stay in the CPU cache
# A smaller .json file is decoded at once: up to 1.6 times as fast as in pieces, for 13 to 20 MiB of memory.
MAX_WHOLE_JSON_CHARS = 1 << 22
MAX_RECORD_CHARS = 1 << 24              # limit of one JSON record

_CHUNK_CHARS = 1 << 18                  # characters read at a time
_DECODER = json.JSONDecoder()
_GAP = re.compile(r"[\s,\[\]]*")         # between JSON records


def read_documents(path: Path, progress: Callable[[int], None] = lambda count: None, encoding: str = ""
                   ) -> Iterator[str]:
    """Yield the documents of a file, without blank ones and without white space around them.

    progress: called with the number of bytes of the file read since its last call. Raises UserError, which names the
    file and the record that cannot be read.
    """
    number = position = 0
    try:
        with open(path, "rb") as raw:
            file = gzip.open(raw) if path.suffix.lower() == ".gz" else raw
            stream = io.TextIOWrapper(file, encoding=encoding or "utf-8-sig")
            for number, record in enumerate(_read_records(path, stream), 1):
                yield from filter(None, map(str.strip, _split_long_document(record)))
                if raw.tell() != position:
                    progress(raw.tell() - position)
                    position = raw.tell()
    except (UnicodeError, LookupError) as error:        # LookupError: an unknown encoding
        place = f" after record {number}" if number else ""
        reason = getattr(error, "reason", error)
        raise UserError(f"{path}: this is not {encoding or 'UTF-8'} text{place} ({reason})\n       name the encoding "
                        "of all files: --encoding gb18030 (Chinese Windows), cp1252 (western), utf-16, ...; or save "
                        "them as UTF-8") from error
    except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: record {number + 1}: {error}") from error


def _read_records(path: Path, stream: TextIO) -> Iterator[str]:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".txt"):
        return _split_txt(stream)
    read = stream.readline if name.endswith(".jsonl") else stream.read
    return map(_text_of_record, _decode_json(read, stream))


def _split_txt(stream: TextIO) -> Iterator[str]:
    rest = ""
    while chunk := stream.read(_CHUNK_CHARS):
        *complete, rest = (rest + chunk).split(SEPARATOR)
        yield from complete
        if len(rest) > 2 * MAX_DOCUMENT_CHARS:          # yield the beginning of a very long document early
            tail = rest[-len(SEPARATOR):]               # half a separator may be in it
            *complete, rest = _split_long_document(rest[:-len(SEPARATOR)])
            yield from complete
            rest += tail
    yield rest


def _split_long_document(text: str) -> Iterator[str]:
    while len(text) > MAX_DOCUMENT_CHARS:
        cuts = (text.rfind(mark, MAX_DOCUMENT_CHARS // 2, MAX_DOCUMENT_CHARS) for mark in ("\n\n", "\n", " "))
        cut = next((cut for cut in cuts if cut > 0), MAX_DOCUMENT_CHARS)
        yield text[:cut]
        text = text[cut:]
    yield text


def _text_of_record(value: object) -> str:
    if isinstance(value, dict):
        key = next((key for key in TEXT_KEYS if key in value), None)
        if key is None:
            raise ValueError(f"has the keys {shorten_list(list(value))}; expected {' or '.join(TEXT_KEYS)}")
        value = value[key]
    if not isinstance(value, str):
        raise ValueError(f"expected a text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:          # JSON can spell half a character (a lone surrogate); it becomes U+FFFD
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _decode_json(read: Callable[[int], str], stream: TextIO) -> Iterator[object]:
    """Decode the values that a method of the stream reads: of a line, or a small file; anything else in pieces."""
    while text := read(MAX_WHOLE_JSON_CHARS):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            yield from _decode_pieces(text, stream)
            return
        yield from value if isinstance(value, list) else [value]


def _decode_pieces(text: str, stream: TextIO) -> Iterator[object]:
    """Decode the items of lists, or values one after another, from a text and the rest of its stream."""
    start = depth = 0
    while True:
        gap = _GAP.match(text, start)
        depth += gap[0].count("[") - gap[0].count("]")
        start = gap.end()
        try:
            value, start = _DECODER.raw_decode(text, start)
        except ValueError as error:             # damaged, or its end is not read yet
            more = stream.read(max(_CHUNK_CHARS, len(text) - start))        # doubles: no part is decoded often
            text = text[start:] + more
            start = 0
            if not text and not depth:
                return
            if not more or len(text) > MAX_RECORD_CHARS:
                problem = f"over {MAX_RECORD_CHARS:,} characters long" if more else "cut here"
                raise ValueError(f"it is {problem}, or not JSON ({getattr(error, 'msg', error)})") from error
        else:
            yield value


def read_batches(paths: Iterable[Path], progress: Callable[[int], None], encoding: str) -> Iterator[list[bytes]]:
    """Yield the documents of several files in UTF-8, about BATCH_BYTES at a time."""
    texts = (text.encode() for path in paths for text in read_documents(path, progress, encoding))
    return group_by_size(texts, len, BATCH_BYTES)


def group_by_size(items: Iterable[Any], size_of: Callable[[Any], int], min_size: int) -> Iterator[list[Any]]:
    """Yield the items in lists, each ended by the item that brings it to min_size; the last one holds the rest."""
    group, size = [], 0
    for item in items:
        group.append(item)
        size += size_of(item)
        if size >= min_size:
            yield group
            group, size = [], 0
    if group:
        yield group
