"""Files that are whole or not there: written under a temporary name, flushed, then renamed; locks on folders; and in
which folders things are."""
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from settings import UserError, command

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None
    import msvcrt

LINE_ENDS = re.compile("[\x85\u2028\u2029]")    # that JSON leaves as they are, and some readers take for a new line
MANIFEST = "manifest.json"                      # in a folder of shards, once they are complete
DATA = Path("data")                             # where the scripts look unless told otherwise
FAR = 1 << 30                                   # there, a byte is locked, beyond what anybody reads or writes
LOCK = ".lock"                                  # on Windows, which cannot open a folder, a file in it is locked
BUSY = (BlockingIOError, PermissionError)       # what a lock raises that another process holds


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file for writing that takes the name `path` only if the block succeeds.

    A process that dies in between leaves the old file as it was, and beside it at most one
    `<name>.tmp`, which the next try overwrites.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and not error.filename:
            error.filename = str(path)
        temporary.unlink(missing_ok=True)
        raise


def replace(source: Path, target: Path) -> None:
    """Rename a file or folder over `target`, and make the rename itself survive a power cut."""
    os.replace(source, target)
    if os.name == "posix":  # Windows cannot open a folder, and needs no flush of it
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):      # some network drives cannot do it
                raise
        finally:
            os.close(folder)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep other processes of this project from writing to a folder, which is made if it is not there.

    The lock is one of the operating system's: it ends with the process, however that ends. A file system that knows
    no locks, as over some networks, has none.

    Raises:
        UserError: when another process holds it.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file; --data_dir and --out_dir name folders")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = _lock(folder)
    try:
        yield
    finally:
        os.close(handle)
        if not fcntl:
            with suppress(OSError):             # as long as another process has it open, which may hold the lock by now
                os.unlink(folder / LOCK)
        if made and not any(folder.iterdir()):      # nothing came of it
            folder.rmdir()


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """The same for a file, beside which other processes may write others; it is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    handle = _lock(path)
    try:
        yield
    finally:
        os.close(handle)


def _lock(path: Path) -> int:
    """Lock a folder or a file; returns what os.close() unlocks it with. Raises UserError when another process has."""
    inside = path / LOCK if path.is_dir() else path
    handle = os.open(path, os.O_RDONLY) if fcntl else os.open(inside, os.O_RDWR | os.O_CREAT)
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(handle, FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except BUSY as error:
        os.close(handle)
        raise UserError(f"another process is writing to {path.resolve()}\n       wait for its end, or name "
                        "another") from error
    except OSError:                             # a file system without locks
        pass
    return handle


def save_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a JSON object, and with it a checksum."""
    with whole_file(path) as file:
        file.write(json.dumps({**content, "checksum": _checksum(content)}, indent=1).encode())


def json_line(entry: dict[str, Any]) -> str:
    """An entry of a file of JSON lines, for people too, and one line for every reader."""
    return LINE_ENDS.sub(lambda end: f"\\u{ord(end[0]):04x}", json.dumps(entry, ensure_ascii=False)) + "\n"


def load_json(path: str | Path) -> dict[str, Any]:
    """Read what save_json wrote. Raises ValueError when it is not that any more, or never was."""
    try:
        content = json.loads(Path(path).read_bytes())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict) or content.pop("checksum", "") != _checksum(content):
        raise ValueError("its checksum is missing or of other content")
    return content


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# ---- what is where ------------------------------------------------------------------------------

def near(folder: str | Path, name: str) -> list[Path]:
    """Folders beside a folder, and within it, that have a file of that name; the newest first, old runs left out."""
    folder = Path(folder)
    roots = [folder] if folder.parent == Path() else [folder, folder.parent]
    found = {path.parent for root in roots for path in (*root.glob(name), *root.glob(f"*/{name}"))} - {folder}
    return sorted((path for path in found if not path.name.startswith("old-")), key=lambda path: -path.stat().st_mtime)


def find(data_dir: str | Path, vocab_size: int = 0, digest: str = "") -> Path:
    """The vocabulary of a data folder: the one of that size, or the only one, or of several that with the SHA-256.

    Raises:
        UserError: when there is none, or several and nothing tells which.
    """
    folder = Path(data_dir)
    if folder.is_file():
        raise UserError(f"{folder} is a file; --data_dir names a folder of steps 1 and 2, and --data of step 1 a text")
    every = vocabularies(folder)
    found = [path for path in every if not vocab_size or path.stem == f"tok{vocab_size}"]
    if len(found) > 1 and digest:
        found = [path for path in found if sha256(path) == digest] or found
    if not found:
        raise UserError(_none_is_there(folder, every, vocab_size))
    if len(found) > 1:
        size = next(filter(None, map(size_of, found)), "")
        which = f"say which: --vocab_size {size}, or " if size else ""
        raise UserError(f"{folder} holds several vocabularies ({_names(every)})\n       "
                        f"{which}delete those that you do not need")
    return found[0]


def _none_is_there(folder: Path, every: list[Path], vocab_size: int) -> str:
    """The message that there is no vocabulary, or none of that size, and where one may come from."""
    of_size = f" of size {vocab_size}" if vocab_size > 0 else ""
    instead = f", where there is {_names(every)}" if every else ""
    others = near(folder, f"tok{vocab_size or '*'}.model")
    elsewhere = f"is it in another --data_dir: {some(others)}? else " if others else ""
    if not (folder / "last.pt").exists() and any(path.suffix in (".txt", ".jsonl") for path in folder.glob("*")):
        make = command("train_vocab", data=folder, data_dir=apart(folder))
    else:
        make = command("train_vocab", data_dir="" if folder == DATA else folder, vocab_size=vocab_size or "")
        make += ", with --data PATH for text of your own"
    return f"no vocabulary{of_size} in {folder.resolve()}{instead}\n       {elsewhere}make one: {make}"


def _names(vocabularies: list[Path]) -> str:
    return ", ".join(size_of(path) or path.name for path in vocabularies)


def apart(text: Path) -> Path:
    """A data folder that is not in the text: data/mine, or one beside a text that holds that."""
    text, usual = text.resolve(), DATA / "mine"
    inside = text in (usual.resolve(), *usual.resolve().parents)
    return text.parent / f"{text.name}-data" if inside else usual


def vocabularies(folder: Path) -> list[Path]:
    """Those of a data folder by size, and first of all those whose text is tokenised."""
    return sorted(folder.glob("tok*.model"),
                  key=lambda path: (not (path.with_suffix("") / MANIFEST).is_file(), int(size_of(path) or 0), path))


def size_of(vocabulary: Path) -> str:
    """What --vocab_size calls a vocabulary; empty for one whose name tells no size."""
    size = vocabulary.stem.removeprefix("tok")
    return size if size.isdecimal() else ""


def settings_for(vocabulary: Path) -> dict[str, str | Path]:
    """The settings by which the steps find a vocabulary: its folder, and its size if that has several."""
    several = len(vocabularies(vocabulary.parent)) > 1
    return {"data_dir": "" if vocabulary.parent == DATA else vocabulary.parent,
            "vocab_size": size_of(vocabulary) if several else ""}


def some(things: list[Any], most: int = 5) -> str:
    """The first of them, and how many more there are, in words."""
    return ", ".join(map(str, things[:most])) + (f" and {len(things) - most} more" if len(things) > most else "")
