"""Files that are whole or not there: written under a temporary name, flushed, then renamed; locks on
folders and files."""
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from tinyllm.cli import UserError

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None
    import msvcrt

LINE_ENDS = re.compile("[\x85\u2028\u2029]")    # that JSON leaves as they are, and some readers take for a new line
LOCK_OFFSET = 1 << 30                                   # there, a byte is locked, beyond what anybody reads or writes
LOCK = ".lock"                                  # on Windows, which cannot open a folder, a file in it is locked
LOCK_HELD_ERRORS = (BlockingIOError, PermissionError)       # what a lock raises that another process holds


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
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
        atomic_replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and not error.filename:
            error.filename = str(path)
        temporary.unlink(missing_ok=True)
        raise


def atomic_replace(source: Path, target: Path) -> None:
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
def folder_lock(folder: str | Path) -> Iterator[None]:
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
def file_lock(path: Path) -> Iterator[None]:
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
            os.lseek(handle, LOCK_OFFSET, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except LOCK_HELD_ERRORS as error:
        os.close(handle)
        raise UserError(f"another process is writing to {path.resolve()}\n       wait for its end, or name "
                        "another") from error
    except OSError:                             # a file system without locks
        pass
    return handle


def save_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a JSON object, and with it a checksum."""
    with atomic_write(path) as file:
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
