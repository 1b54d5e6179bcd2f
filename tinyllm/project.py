"""Find and load the tokenizer of a data folder."""
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyllm import optional
from tinyllm.cli import UserError, format_command, suggest_path
from tinyllm.files import sha256
from tokenizer import BaseTokenizer, Tokenizer

MANIFEST = "manifest.json"                      # written when all shards of a folder are complete
DATA = Path("data")                             # default data folder of the scripts


@contextmanager
def tokenizer_errors(source: str | Path = "") -> Iterator[None]:
    """Turn the ValueError of a tokenizer into a UserError. source: the file that the message names."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{source}: {error}" if source else str(error)) from error


def load_tokenizer(source: str | Path | bytes) -> BaseTokenizer:
    """Load a tokenizer from its file or bytes, and detect its kind from the content.

    Raises UserError if it is missing or damaged, or its package is missing.
    """
    if isinstance(source, bytes):
        with tokenizer_errors():
            return _tokenizer_class(source)(source)
    path = Path(source)
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}{suggest_path(path)}")
    model = path.read_bytes()
    with tokenizer_errors(path):
        return _tokenizer_class(model)(model)


def _tokenizer_class(model: bytes) -> type[BaseTokenizer]:
    if model.lstrip()[:1] == b"{":
        return optional.load("tokenizers").JsonTokenizer
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", model):
        return optional.load("tokenizers").TiktokenTokenizer
    return Tokenizer


def find_tokenizer(data_dir: str | Path, vocab_size: int = 0, digest: str = "") -> Path:
    """Return the path of a tokenizer in a data folder: by size, by SHA-256, or the only one.

    Raises UserError if none or several match.
    """
    folder = Path(data_dir)
    if folder.is_file():
        raise UserError(f"{folder} is a file; --data_dir names a folder\n       name a text with train_vocab.py --data")
    paths = tokenizer_files(folder)
    matches = [path for path in paths if not vocab_size or path.stem == f"tok{vocab_size}"]
    if len(matches) > 1 and digest:
        matches = [path for path in matches if sha256(path) == digest] or matches
    if not matches:
        raise UserError(_no_tokenizer_message(folder, paths, vocab_size))
    if len(matches) > 1:
        raise UserError(f"{folder} has several vocabularies ({_join_names(paths)})\n"
                        "       choose one with --vocab_size, or delete the others")
    return matches[0]


def _no_tokenizer_message(folder: Path, paths: list[Path], vocab_size: int) -> str:
    of_size = f" of size {vocab_size}" if vocab_size > 0 else ""
    existing = f", only {_join_names(paths)}" if paths else ""
    hint = "" if folder.exists() else suggest_path(folder)
    command = format_command("train_vocab", data_dir="" if folder == DATA else folder, vocab_size=vocab_size or "")
    return (f"no vocabulary{of_size} in {folder.resolve()}{existing}{hint}\n"
            f"       make one: {command}, with --data PATH for your own text")


def _join_names(paths: list[Path]) -> str:
    return ", ".join(vocab_size_in_name(path) or path.name for path in paths)


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the tokenizer files of a data folder, sorted by size; files with shards come first."""
    def key(path: Path) -> tuple[bool, int, Path]:
        has_shards = (path.with_suffix("") / MANIFEST).is_file()
        return not has_shards, int(vocab_size_in_name(path) or 0), path
    return sorted(folder.glob("tok*.model"), key=key)


def vocab_size_in_name(tokenizer_path: Path) -> str:
    """Return the value of --vocab_size that selects a tokenizer, or "" if its name has no size."""
    size = tokenizer_path.stem.removeprefix("tok")
    return size if size.isdecimal() else ""


def path_flags(tokenizer_path: Path) -> dict[str, str | Path]:
    """Return the settings that select a tokenizer: its folder, and its size if the folder has several."""
    folder = tokenizer_path.parent
    has_several = len(tokenizer_files(folder)) > 1
    return {"data_dir": "" if folder == DATA else folder,
            "vocab_size": vocab_size_in_name(tokenizer_path) if has_several else ""}


def shorten_list(items: list[Any], limit: int = 5) -> str:
    """Return e.g. 'a, b, c, d, e and 4 more'."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more
