"""Read the documents of text files; the memory does not grow with the size of a file.

    for text in read_documents(Path("stories.jsonl.gz")): ...

A `.txt` file is split at `<|endoftext|>`. A `.json` file is a list of records, and a `.jsonl` file has one record per
line. A record is a string, or an object with the key `story` or `text`. `.gz` files are unpacked on the fly.
"""
import codecs
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
TEXT_KEYS = ("story", "text")           # keys for the text of a JSON object, in order of preference
MAX_DOCUMENT_CHARS = 1 << 16            # longer documents are cut at a blank line, a newline or a space
BATCH_BYTES = 1 << 17                   # text per batch: all arrays made from it stay in the CPU cache
# Smaller .json files are decoded at once: up to 1.6x as fast as in pieces, for 13-20 MiB of memory.
MAX_WHOLE_JSON_CHARS = 1 << 22
MAX_RECORD_CHARS = 1 << 24              # limit of one JSON record

_CHUNK_CHARS = 1 << 18                  # characters read at a time
_DECODER = json.JSONDecoder()
# the gap before a JSON value, and the end of the file if no value follows
_BEFORE_LIST = re.compile(r"\s*\[\s*"), re.compile(r"\s*\[\s*\]\s*")
_BETWEEN_ITEMS = re.compile(r"\s*,\s*"), re.compile(r"\s*\]\s*")
_BETWEEN_VALUES = re.compile(r"\s*"), re.compile(r"\s*")


def read_documents(path: Path, progress: Callable[[int], None] = lambda count: None, encoding: str = ""
                   ) -> Iterator[str]:
    """Yield the documents of a file, without surrounding white space. Skips blank documents.

    progress: called with the number of bytes read since its last call. Raises UserError with the file and the number
    of the record that cannot be read.
    """
    number = position = 0
    try:
        with open(path, "rb") as raw:
            file = gzip.open(raw) if path.suffix.lower() == ".gz" else raw
            stream = io.TextIOWrapper(file, encoding=codec_name(encoding))
            for number, record in enumerate(_read_records(path, stream), 1):
                yield from filter(None, map(str.strip, _split_long_document(record)))
                if raw.tell() != position:
                    progress(raw.tell() - position)
                    position = raw.tell()
    except UnicodeError as error:
        place = f" after record {number}" if number else ""
        reason = getattr(error, "reason", error)
        raise UserError(f"{path}: this is not {encoding or 'UTF-8'} text{place} ({reason})\n       save all "
                        "files as UTF-8, or name their encoding: --encoding gb18030 (Chinese Windows), cp1252 "
                        "(Western), utf-16, ...") from error
    except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: record {number + 1}: {error}") from error


def codec_name(encoding: str) -> str:
    """Return Python's name of an encoding; for UTF-8, the one that skips a byte order mark.

    Raises UserError for an unknown encoding.
    """
    try:
        "".encode(encoding or "utf-8")
        name = codecs.lookup(encoding or "utf-8").name
    except (LookupError, ValueError) as error:
        raise UserError(f"unknown encoding {encoding!r}; expected gb18030, big5, cp1252, utf-16 or another name that "
                        "Python knows") from error
    return "utf-8-sig" if name == "utf-8" else name


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
        if len(rest) > 2 * MAX_DOCUMENT_CHARS:          # yield the start of a very long document early
            tail = rest[-len(SEPARATOR):]               # the tail may hold half a separator
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
            raise ValueError(f"found the keys {shorten_list(list(value))}; expected {' or '.join(TEXT_KEYS)}")
        value = value[key]
    if not isinstance(value, str):
        raise ValueError(f"found {type(value).__name__}; expected a text")
    try:
        value.encode()
    except UnicodeEncodeError:          # a lone surrogate, half a character, becomes U+FFFD
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _decode_json(read: Callable[[int], str], stream: TextIO) -> Iterator[object]:
    """Yield the JSON values of a file. Lines and small files are decoded at once, longer or damaged text in pieces.

    If a list starts the file, it must be the only value, and its items are yielded instead.
    """
    is_first = True
    while text := read(MAX_WHOLE_JSON_CHARS):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            yield from _decode_pieces(text, stream, is_first)
            return
        is_list = is_first and isinstance(value, list)
        yield from value if is_list else [value]
        if is_list and stream.read().strip():
            raise ValueError("found text after the end of the list")
        is_first = False


def _decode_pieces(text: str, stream: TextIO, is_first: bool) -> Iterator[object]:
    """Yield the items of a list, or consecutive values, from a text and the rest of its stream."""
    is_list = is_first and text.lstrip().startswith("[")
    gap, end = _BEFORE_LIST if is_list else _BETWEEN_VALUES
    start = 0
    while True:
        match = gap.match(text, start)
        problem = f"expected {'a comma' if is_list else 'a value'}"
        if match:
            try:
                value, start = _DECODER.raw_decode(text, match.end())
            except ValueError as error:             # damaged, or not yet read to its end
                problem = getattr(error, "msg", str(error))
            else:
                yield value
                gap, end = _BETWEEN_ITEMS if is_list else _BETWEEN_VALUES
                continue
        more = stream.read(max(_CHUNK_CHARS, len(text) - start))        # doubling avoids repeated decoding
        if not more and end.fullmatch(text, start):
            return
        text = text[start:] + more
        start = 0
        if not more or len(text) > MAX_RECORD_CHARS:
            place = f"longer than {MAX_RECORD_CHARS:,} characters" if more else "cut off"
            raise ValueError(f"{place}, or not JSON ({problem})")


def read_batches(paths: Iterable[Path], progress: Callable[[int], None], encoding: str) -> Iterator[list[bytes]]:
    """Yield the documents of several files in UTF-8, in batches of about BATCH_BYTES."""
    texts = (text.encode() for path in paths for text in read_documents(path, progress, encoding))
    return group_by_size(texts, len, BATCH_BYTES)


def group_by_size(items: Iterable[Any], size_of: Callable[[Any], int], min_size: int) -> Iterator[list[Any]]:
    """Yield the items in lists. A list ends when its size reaches min_size; the last one may be smaller."""
    group, size = [], 0
    for item in items:
        group.append(item)
        size += size_of(item)
        if size >= min_size:
            yield group
            group, size = [], 0
    if group:
        yield group
