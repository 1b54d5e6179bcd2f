"""Where the vocabulary, the shards and the checkpoints of a project are."""
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyllm import optional
from tinyllm.cli import UserError, format_command
from tinyllm.files import sha256
from tokenizer import BaseTokenizer, Tokenizer

MANIFEST = "manifest.json"                      # in a folder of shards, once they are complete
DATA = Path("data")                             # where the scripts look unless told otherwise


@contextmanager
def tokenizer_errors(source: str | Path = "") -> Iterator[None]:
    """Turn the ValueError of a tokenizer into a UserError. source: the file to name in front."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{source}: {error}" if source else str(error)) from error


def load_tokenizer(source: str | Path | bytes) -> BaseTokenizer:
    """Load a tokenizer of any kind from its file or bytes; its content tells the kind.

    Raises UserError if it is missing or damaged, or its package is missing.
    """
    if isinstance(source, bytes):
        with tokenizer_errors():
            return _tokenizer_class(source)(source)
    path = Path(source)
    if not path.is_file():
        others = ", ".join(map(str, sorted(path.parent.glob("*.model"))[:5]))
        raise UserError(f"no tokenizer at {path}" + (f"\n       there is {others}" if others else ""))
    model = path.read_bytes()
    with tokenizer_errors(path):
        return _tokenizer_class(model)(model)


def _tokenizer_class(model: bytes) -> type[BaseTokenizer]:
    if model.lstrip()[:1] == b"{":
        return optional.load("tokenizers").JsonTokenizer
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", model):
        return optional.load("tokenizers").TiktokenTokenizer
    return Tokenizer


def folders_with(folder: str | Path, name: str) -> list[Path]:
    """Folders beside a folder, and within it, that have a file of that name; the newest first, old runs left out."""
    folder = Path(folder)
    roots = [folder] if folder.parent == Path() else [folder, folder.parent]
    found = {path.parent for root in roots for path in (*root.glob(name), *root.glob(f"*/{name}"))} - {folder}
    return sorted((path for path in found if not path.name.startswith("old-")), key=lambda path: -path.stat().st_mtime)


def find_tokenizer(data_dir: str | Path, vocab_size: int = 0, digest: str = "") -> Path:
    """The vocabulary of a data folder: the one of that size, or the only one, or of several that with the SHA-256.

    Raises:
        UserError: when there is none, or several and nothing tells which.
    """
    folder = Path(data_dir)
    if folder.is_file():
        raise UserError(f"{folder} is a file; --data_dir names a folder of steps 1 and 2, and --data of step 1 a text")
    every = tokenizer_files(folder)
    found = [path for path in every if not vocab_size or path.stem == f"tok{vocab_size}"]
    if len(found) > 1 and digest:
        found = [path for path in found if sha256(path) == digest] or found
    if not found:
        raise UserError(_no_tokenizer_message(folder, every, vocab_size))
    if len(found) > 1:
        size = next(filter(None, map(vocab_size_in_name, found)), "")
        which = f"say which: --vocab_size {size}, or " if size else ""
        raise UserError(f"{folder} holds several vocabularies ({_names(every)})\n       "
                        f"{which}delete those that you do not need")
    return found[0]


def _no_tokenizer_message(folder: Path, every: list[Path], vocab_size: int) -> str:
    """The message that there is no vocabulary, or none of that size, and where one may come from."""
    of_size = f" of size {vocab_size}" if vocab_size > 0 else ""
    instead = f", where there is {_names(every)}" if every else ""
    others = folders_with(folder, f"tok{vocab_size or '*'}.model")
    elsewhere = f"is it in another --data_dir: {shorten_list(others)}? else " if others else ""
    if not (folder / "last.pt").exists() and any(path.suffix in (".txt", ".jsonl") for path in folder.glob("*")):
        make = format_command("train_vocab", data=folder, data_dir=separate_data_dir(folder))
    else:
        make = format_command("train_vocab", data_dir="" if folder == DATA else folder, vocab_size=vocab_size or "")
        make += ", with --data PATH for text of your own"
    return f"no vocabulary{of_size} in {folder.resolve()}{instead}\n       {elsewhere}make one: {make}"


def _names(vocabularies: list[Path]) -> str:
    return ", ".join(vocab_size_in_name(path) or path.name for path in vocabularies)


def separate_data_dir(text: Path) -> Path:
    """A data folder that is not in the text: data/mine, or one beside a text that holds that."""
    text, usual = text.resolve(), DATA / "mine"
    inside = text in (usual.resolve(), *usual.resolve().parents)
    return text.parent / f"{text.name}-data" if inside else usual


def tokenizer_files(folder: Path) -> list[Path]:
    """Those of a data folder by size, and first of all those whose text is tokenised."""
    return sorted(folder.glob("tok*.model"),
                  key=lambda path: (not (path.with_suffix("") / MANIFEST).is_file(), int(vocab_size_in_name(path) or 0), path))


def vocab_size_in_name(vocabulary: Path) -> str:
    """What --vocab_size calls a vocabulary; empty for one whose name tells no size."""
    size = vocabulary.stem.removeprefix("tok")
    return size if size.isdecimal() else ""


def path_flags(vocabulary: Path) -> dict[str, str | Path]:
    """The settings by which the steps find a vocabulary: its folder, and its size if that has several."""
    several = len(tokenizer_files(vocabulary.parent)) > 1
    return {"data_dir": "" if vocabulary.parent == DATA else vocabulary.parent,
            "vocab_size": vocab_size_in_name(vocabulary) if several else ""}


def shorten_list(things: list[Any], most: int = 5) -> str:
    """The first of them, and how many more there are, in words."""
    return ", ".join(map(str, things[:most])) + (f" and {len(things) - most} more" if len(things) > most else "")
