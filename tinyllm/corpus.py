"""Where text comes from: your own files, the downloaded TinyStories, or the built-in stories.

    for text in documents(Path("stories.jsonl.gz")): ...     # one document at a time, in little memory

Every step sees the same documents in the same order, and the same ones are kept for validation.
"""
import codecs
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from tinyllm import demo_stories
from tinyllm.cli import UserError, shell_quote, suggest_path
from tinyllm.files import atomic_replace
from tinyllm.project import separate_data_dir, shorten_list
from tinyllm.words import chunks

SUFFIXES = (".txt", ".json", ".jsonl", ".txt.gz", ".json.gz", ".jsonl.gz")
SEPARATOR = "<|endoftext|>"     # between the documents of a .txt file
TEXT_KEYS = ("story", "text")        # where a JSON object keeps its text; the first one found counts
MAX_DOCUMENT_CHARS = 1 << 16               # characters; a longer document is cut at a blank line, line or space
VAL_FRACTION = 0.02             # of the documents are for validation, but at least one
VAL_BYTES = 2_000_000           # and no more than about so much text: each evaluation reads it all
GROUP_BYTES = 4 << 20           # small files share a part of the work, and a shard, until they are so large together
NON_UTF8_MARKERS = {"utf-16": "\0", "utf-32": "\0", "iso2022": "\x1b", "hz": "~{", "utf-7": "+"}    # of what may pass for UTF-8
DEMO = Path("data/demo")
DEMO_FILES = 10
MAX_KEYS_SHOWN = 5                       # keys of a JSON object without a text that a message names
ENCODING_HINT = ("\n       say what such files are: --encoding gb18030 (Chinese Windows), cp1252 (western), utf-16, ...; "
               "or save them as UTF-8")
TINYSTORIES_DIR = "TinyStories_all_data"                 # in the data folder, where the real stories are unpacked

_READ = 1 << 18                 # characters read at a time
_RECORD = 1 << 24               # characters that one JSON record may have
_GAP = re.compile(r"[\s,]*")


class NotUTF8(UserError):
    """A file is not the text that it should be."""


def find_files(path: str | Path) -> list[Path]:
    """The text files of a folder and its subfolders in order of name, or the one file given.

    Raises:
        UserError: when nothing is there, or nothing of a kind that can be read.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no file or folder at {path.resolve()}{suggest_path(path)}")
    files = [path] if path.is_file() else list_files(path)
    files = [file for file in files if file.name.lower().endswith(SUFFIXES)]
    if not files:
        raise UserError(f"no text in {path.resolve()}\n       files must end in {', '.join(SUFFIXES)}")
    return files


def check_not_nested(source: str | Path, data_dir: str | Path) -> None:
    """Raise UserError where what the steps write would be in the text, and be read as text the next time."""
    source, folder = Path(source).resolve(), Path(data_dir).resolve()
    if source in (folder, *folder.parents):
        raise UserError(f"--data_dir {data_dir} is in the text, and what is written there would be read too\n"
                        f"       name another, such as --data_dir {shell_quote(str(separate_data_dir(source)))}")


def list_files(folder: Path) -> list[Path]:
    """The files of a folder and its subfolders in order of name, but for hidden ones.

    Raises OSError for a subfolder that may not be read. Links to folders are not followed.
    """
    def stop(error: OSError) -> None:
        if folder.is_dir():
            raise error
    found = {}
    for root, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(root, name) for name in names if not name.startswith(".")):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path
    return [found[name] for name in sorted(found)]


def summarize_skipped(path: str | Path) -> str:
    """How many files of a folder are of which kind that cannot be read, in words; empty when there are none."""
    kinds = Counter(other.suffix or "without a kind" for other in list_files(Path(path))
                    if not other.name.lower().endswith(SUFFIXES))
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def group_small_files(files: list[Path]) -> Iterator[list[Path]]:
    """Arrange files into groups for one process to work on; small ones share a group."""
    return chunks(files, lambda path: path.stat().st_size, GROUP_BYTES)


def read_documents(path: Path, progress: Callable[[int], None] = lambda count: None, encoding: str = "") -> Iterator[str]:
    """Yield the documents of a file, without blank ones and without white space around them.

    `.txt` is split at `<|endoftext|>`, or is one document; `.json` is a list, `.jsonl` a line per
    record, each record a string or an object with the key `story` or `text`; `.gz` is unpacked on
    the way. Memory does not grow with the file.

    Args:
        progress: called with the number of bytes of the file read since its last call.
        encoding: of a file that is not UTF-8.
    Raises:
        UserError: names the file, and the record, that cannot be read.
    """
    number = 0
    try:
        with open(path, "rb") as raw:
            stream = _open_text(path, raw, "" if not encoding or _is_utf8(path, encoding) else encoding)
            read = _txt_records if path.name.lower().removesuffix(".gz").endswith(".txt") else _json_records
            at = 0
            for number, record in enumerate(read(stream), 1):
                yield from (piece for piece in map(str.strip, _split_long_document(record)) if piece)
                if raw.tell() != at:
                    progress(raw.tell() - at)
                    at = raw.tell()
    except UnicodeError as error:
        place = f" after record {number}" if number else ""
        reason = getattr(error, "reason", error)
        raise NotUTF8(f"{path}: this is not {encoding or 'UTF-8'} text{place} ({reason}){ENCODING_HINT}") from error
    except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: record {number + 1}: {error}") from error


@contextmanager
def report_all_bad_encodings(files: list[Path], encoding: str) -> Iterator[None]:
    """Where a file turns out not to be UTF-8, and no other encoding is given, name all that are not."""
    try:
        yield
    except NotUTF8 as error:
        wrong = [path for path in files if not encoding and not _is_utf8(path)]
        if len(wrong) < 2:
            raise
        raise UserError(f"{len(wrong)} of {len(files)} files are not UTF-8 text: {shorten_list(wrong)}{ENCODING_HINT}") from error


def _is_utf8(path: Path, encoding: str = "") -> bool:
    """Whether a file is UTF-8; of an encoding whose bytes pass for that, only where none of its signs is there."""
    known = codecs.lookup(encoding).name if encoding else ""
    sign = next((sign for kind, sign in NON_UTF8_MARKERS.items() if known.startswith(kind)), None)
    try:
        with open(path, "rb") as raw, _open_text(path, raw) as stream:
            while text := stream.read(_READ):
                if sign and sign in text:
                    return False
    except UnicodeError:
        return False
    except (OSError, EOFError, zlib.error):     # wrong in another way
        pass
    return True


def _open_text(path: Path, raw: BinaryIO, encoding: str = "") -> TextIO:
    return io.TextIOWrapper(gzip.open(raw) if path.suffix.lower() == ".gz" else raw, encoding=encoding or "utf-8-sig")


def check_encoding(name: str) -> None:
    """Raise UserError for what is no encoding of text."""
    try:
        "".encode(name or "utf-8")
    except (LookupError, ValueError) as error:
        raise UserError(f"--encoding {name} is not known; gb18030, big5, cp1252, utf-16 and others are") from error


def _split_long_document(text: str) -> Iterator[str]:
    """Cut a long text into pieces of at most LONGEST characters."""
    while len(text) > MAX_DOCUMENT_CHARS:
        cut = next((at for mark in ("\n\n", "\n", " ") if (at := text.rfind(mark, MAX_DOCUMENT_CHARS // 2, MAX_DOCUMENT_CHARS)) > 0), MAX_DOCUMENT_CHARS)
        yield text[:cut]
        text = text[cut:]
    yield text


def _txt_records(stream: TextIO) -> Iterator[str]:
    rest = ""
    while piece := stream.read(_READ):
        *whole, rest = (rest + piece).split(SEPARATOR)
        yield from whole
        if len(rest) > 2 * MAX_DOCUMENT_CHARS:         # hand out the beginning of a very long document early
            *whole, left = _split_long_document(rest[:-len(SEPARATOR)])
            yield from whole
            rest = left + rest[-len(SEPARATOR):]        # a separator may have come half
    yield rest


def _json_records(stream: TextIO) -> Iterator[str]:
    for value in _json_values(stream):
        if isinstance(value, dict):
            key = next((key for key in TEXT_KEYS if key in value), None)
            if key is None:
                found = ", ".join(list(value)[:MAX_KEYS_SHOWN]) or "(none)"
                raise ValueError(f"has the keys {found}; expected {' or '.join(TEXT_KEYS)}")
            value = value[key]
        if not isinstance(value, str):
            raise ValueError(f"expected a text, found {type(value).__name__}")
        yield _whole_characters(value)


def _whole_characters(text: str) -> str:
    """JSON can spell half of a character (a lone surrogate), which is no text; it becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _json_values(stream: TextIO) -> Iterator[object]:
    """Decode the values of a list, or values that stand one after another, as they come in."""
    decode = json.JSONDecoder().raw_decode
    text = stream.read(_READ)
    at = _GAP.match(text).end()
    in_list = text.startswith("[", at)
    at += in_list
    commas, due = 0, 0                          # in a list: those since the last value, and how many there must be
    while True:
        gap = _GAP.match(text, at)
        commas, at = commas + gap[0].count(","), gap.end()
        if in_list and text.startswith("]", at) and not commas:
            if text[at + 1:].strip() or any(more.strip() for more in iter(lambda: stream.read(_READ), "")):
                raise ValueError("text after the end of the list")
            return
        try:
            value, at = decode(text, at)
        except ValueError as error:             # wrong, or not all of it is here yet
            more = stream.read(max(_READ, len(text) - at))      # twice as much, so that no part is tried often
            text, at = text[at:] + more, 0
            if not text and not in_list:
                return
            if not more or len(text) > _RECORD:
                wrong = f"over {_RECORD:,} characters long" if more else "cut here"
                raise ValueError(f"it is {wrong}, or not JSON ({getattr(error, 'msg', error)})") from error
        else:
            if in_list and commas != due:
                raise ValueError(f"there are {commas} commas before it instead of {due}")
            commas, due = 0, 1
            yield value


def document_hash(text: bytes) -> int:
    """64 bits of a document, in UTF-8, that decide its split: the same text never lands in both."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def val_hash_threshold(files: list[Path], encoding: str = "") -> int:
    """The rule of the split: documents whose fingerprint is at most this are for validation.

    Because it looks at each text by itself, the rule needs no second pass, holds in any order and
    for any number of processes, and stays when files are added. Small collections are read to the
    end, so that both splits get at least one document.

    Raises:
        UserError: when there are not two different documents.
    """
    size = sum(file.stat().st_size for file in files)
    limit = int(min(VAL_FRACTION, VAL_BYTES / max(size, 1)) * 2**64)
    lowest, highest = 2**64, -1
    for file in files:
        for text in read_documents(file, encoding=encoding):
            mark = document_hash(text.encode())
            lowest, highest = min(lowest, mark), max(highest, mark)
            if lowest <= limit < highest:
                return limit
    if lowest >= highest:
        found = "only one document" if lowest == highest else "no text"
        raise UserError(f"{found} in {', '.join(map(str, files[:3]))}; training needs two or more, one of them for "
                        f"validation\n       in a .txt, put {SEPARATOR} between them")
    return lowest


def default_source(data_dir: str | Path) -> Path:
    """The downloaded stories where there are some, else the built-in ones, written at first use."""
    real = Path(data_dir) / TINYSTORIES_DIR
    return real if real.is_dir() else _write_demo()


def _write_demo() -> Path:
    if not DEMO.is_dir():
        print(f"writing synthetic stories to {DEMO} (made by a grammar, and good for trying)")
        fresh = DEMO.with_name(DEMO.name + ".tmp")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        stories = [{"story": story} for story in demo_stories.generate_stories()]
        for i in range(DEMO_FILES):
            text = json.dumps(stories[i::DEMO_FILES], indent=0)
            (fresh / f"stories{i:02d}.json").write_text(text, encoding="utf-8")
        (fresh / "README.md").write_text("Synthetic stories, by demo_stories.py.\n", encoding="utf-8")
        atomic_replace(fresh, DEMO)
    return DEMO
