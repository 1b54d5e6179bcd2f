"""Write files completely or not at all, and lock folders and files."""
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

LINE_ENDS = re.compile("[\x85\u2028\u2029]")    # line ends for some readers, which json.dumps does not escape
LOCK_FILE = ".lock"                             # locked in place of its folder, which Windows cannot open
LOCK_OFFSET = 1 << 30                           # the byte that Windows locks, past the end of any content
LOCK_HELD_ERRORS = (BlockingIOError, PermissionError)       # raised when another process holds the lock
FSYNC_UNSUPPORTED_ERRNOS = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)      # fsync of a folder on some network drives
READ_SIZE = 1 << 20


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file for writing, which replaces `path` only if the block succeeds.

    A process that dies in the block leaves the old file and at most one `<name>.tmp`, which the next run overwrites.
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
    """Rename a file or folder over `target`, and make the rename survive a power cut."""
    os.replace(source, target)
    if os.name != "posix":      # Windows cannot open a folder, and does not need to flush it
        return
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in FSYNC_UNSUPPORTED_ERRNOS:
            raise
    finally:
        os.close(handle)


def unused_path(folder: Path, pattern: str) -> Path:
    """Return the first unused path of a pattern such as old-{}."""
    return next(path for i in range(1, 10_000) if not (path := folder / pattern.format(i)).exists())


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Lock a folder against other processes of this project, and create it if it does not exist.

    The operating system releases the lock when the process ends. File systems without locks, such as some network
    drives, are not protected. Raises UserError if another process holds the lock.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file; --data_dir and --out_dir name folders")
    was_missing = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = _lock(folder)
    try:
        yield
    finally:
        os.close(handle)
        if not fcntl:
            with suppress(OSError):             # another process may have locked the file by now
                os.unlink(folder / LOCK_FILE)
        if was_missing and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Lock a file against other processes of this project, and create it if it does not exist.

    Raises UserError if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    handle = _lock(path)
    try:
        yield
    finally:
        os.close(handle)


def _lock(path: Path) -> int:
    """Lock a folder or a file. Returns a handle; os.close() unlocks it."""
    if fcntl:
        handle = os.open(path, os.O_RDONLY)
    else:
        handle = os.open(path / LOCK_FILE if path.is_dir() else path, os.O_RDWR | os.O_CREAT)
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(handle, LOCK_OFFSET, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except LOCK_HELD_ERRORS as error:
        os.close(handle)
        raise UserError(f"another process is writing to {path.resolve()}\n"
                        "       wait until it ends, or use another folder or file") from error
    except OSError:                             # a file system without locks
        pass
    return handle


def save_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a JSON object with its checksum."""
    with atomic_write(path) as file:
        file.write(json.dumps({**content, "checksum": json_checksum(content)}, indent=1).encode())


def load_json(path: str | Path) -> dict[str, Any]:
    """Load a file of save_json. Raises ValueError if the content does not match its checksum."""
    try:
        content = json.loads(Path(path).read_bytes())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict) or content.pop("checksum", "") != json_checksum(content):
        raise ValueError("its checksum is missing or does not match")
    return content


def json_checksum(content: dict[str, Any]) -> str:
    """Return the SHA-256 of a JSON object."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def json_line(entry: dict[str, Any]) -> str:
    """Return a line of a .jsonl file. Letters stay readable; characters that would end the line early are escaped."""
    text = json.dumps(entry, ensure_ascii=False)
    return LINE_ENDS.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(READ_SIZE):
            digest.update(chunk)
    return digest.hexdigest()
