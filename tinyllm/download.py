"""The TinyStories download: mirrors in turn, what has arrived is kept, and nothing unpacks to where it should not.

    folder = tinystories("data")
"""
import errno
import gzip
import re
import shutil
import tarfile
import time
import zlib
from pathlib import Path

import requests
from tqdm import tqdm

from tinyllm.cli import UserError
from tinyllm.corpus import TINYSTORIES_DIR, find_files
from tinyllm.files import atomic_replace, sha256

ARCHIVE = f"{TINYSTORIES_DIR}.tar.gz"
MIRRORS = {
    "huggingface": f"https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/{ARCHIVE}",
    "hf-mirror": f"https://hf-mirror.com/datasets/roneneldan/TinyStories/resolve/main/{ARCHIVE}",
    "modelscope": f"https://www.modelscope.cn/datasets/AI-ModelScope/TinyStories/resolve/master/{ARCHIVE}",
}
RETRY_DELAYS = (1, 4, 15)             # seconds before each further try of a mirror
MAX_TAR_HEADER_BYTES = 1 << 20              # bytes that an archive may have between two files

_CHUNK = 1 << 16                # bytes written at a time, and at most lost when a connection breaks


def download_tinystories(data_dir: str | Path, mirror: str = "") -> Path:
    """Fetch and unpack TinyStories (Eldan and Li 2023, arXiv 2305.07759) unless it is there.

    Args:
        mirror: names of MIRRORS or addresses, separated by commas, tried in that order; all when empty.
    Returns:
        the folder with the stories.
    Raises:
        UserError: when no mirror delivers, the archive is damaged, or the disk is full.
    """
    folder, archive = Path(data_dir) / TINYSTORIES_DIR, Path(data_dir) / ARCHIVE
    if not folder.is_dir():
        archive.parent.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            download_file(_mirrors(mirror), archive, begins=b"\x1f\x8b")
        _unpack(archive, folder)
    return folder


def _mirrors(names: str) -> dict[str, str]:
    chosen = [name.strip() for name in names.split(",") if name.strip()] or list(MIRRORS)
    unknown = [name for name in chosen if name not in MIRRORS and not name.startswith(("http://", "https://"))]
    if unknown:
        raise UserError(f"unknown mirror {unknown[0]!r}; known are {', '.join(MIRRORS)}, and any http(s) address")
    return {name: MIRRORS.get(name, name) for name in chosen}


class _Damaged(Exception):
    """What arrived is not the file."""


def download_file(mirrors: dict[str, str], target: Path, begins: bytes = b"") -> None:
    """Download a file; what an earlier try has brought is in `<name>.part`, and is not asked for again.

    Each mirror is tried until it brought nothing new len(PAUSES) + 1 times in a row.

    Args:
        mirrors: addresses of the file by name.
        begins: its first bytes, where they are known.
    Raises:
        UserError: when no mirror delivers, or the disk is full.
    """
    part = target.with_name(target.name + ".part")
    failures = []
    for name, url in mirrors.items():
        pauses, most = list(RETRY_DELAYS), _size(part)
        while True:
            try:
                _check(part, begins, _receive(url, part))
                return atomic_replace(part, target)
            except (requests.RequestException, _Damaged) as error:
                failure = f"       {name}: {error}"
                if isinstance(error, _Damaged):
                    part.unlink(missing_ok=True)
            if _size(part) > most:
                pauses, most = list(RETRY_DELAYS), _size(part)
            if not pauses:
                break
            time.sleep(pauses.pop(0))
        failures.append(failure)
    raise UserError("\n".join([f"{target.name} could not be downloaded", *failures,
                               f"       get it in another way, for example from {next(iter(mirrors.values()))},",
                               f"       put it at {target.resolve()} and run this again;",
                               "       or begin with what comes along: python train_vocab.py"]))


def _receive(url: str, part: Path) -> str:
    """Append to `part` what is missing; return the SHA-256 that the server announces, or ''."""
    have = _size(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as response:
        hops = [*response.history, response]
        if url.startswith("https:") and not all(hop.url.startswith("https:") for hop in hops):
            raise _Damaged("redirects to an address that is not https")
        marks = [hop.headers.get("X-Linked-Etag", "").strip('"') for hop in hops]
        if response.status_code != 416:          # 416: there is nothing after what we have
            response.raise_for_status()
            if "html" in response.headers.get("Content-Type", ""):
                raise _Damaged("sent a web page instead of the file")
            _append(response, part, have)
        elif response.headers.get("Content-Range", "").rpartition("/")[2] != str(have):
            raise _Damaged(f"has a shorter file than the {have:,} bytes that are here")
    return next((mark for mark in marks if re.fullmatch("[0-9a-f]{64}", mark)), "")


def _append(response: requests.Response, part: Path, have: int) -> None:
    """Write the body of a response to `part`, after what is there if the server continued it."""
    resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    start = have if resumed else 0
    length = response.headers.get("Content-Length")
    total = start + int(length) if length else None
    if length and int(length) > shutil.disk_usage(part.parent).free:
        raise UserError(f"no room: {int(length):,} bytes are to come, {shutil.disk_usage(part.parent).free:,} are free "
                        f"on the disk of {part.parent.resolve()}")
    with (open(part, "ab" if resumed else "wb") as file,
          tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar):
        for piece in response.iter_content(_CHUNK):
            file.write(piece)
            bar.update(len(piece))
    if total is not None and _size(part) != total:
        raise requests.ConnectionError(f"the connection ended at {_size(part):,} of {total:,} bytes")


def _check(part: Path, begins: bytes, announced: str) -> None:
    with open(part, "rb") as file:
        head = file.read(16)
    if not head.startswith(begins):
        raise _Damaged(f"sent another kind of file (it begins with {head!r})")
    if announced and sha256(part) != announced:
        raise _Damaged("sent a file whose SHA-256 is not the announced one")


class _LimitedReader:
    """The unpacked archive, of which no more than `left` bytes can be read: a heading may claim to be of any size."""

    def __init__(self, plain: gzip.GzipFile):
        self.plain, self.left = plain, MAX_TAR_HEADER_BYTES

    def read(self, size: int) -> bytes:
        content = self.plain.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise tarfile.ReadError("its headings are larger than those of any archive")
        return content


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack the .json files of the archive; `folder` appears when all of them are there and sound."""
    if not hasattr(tarfile, "data_filter"):
        raise UserError("this Python cannot unpack archives safely; use 3.10.12, 3.11.4, 3.12 or newer")
    fresh = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)        # what a kill has left
    fresh.mkdir()
    try:
        with gzip.open(archive) as plain, tarfile.open(fileobj=(metered := _LimitedReader(plain)), mode="r|") as tar:
            for member in tqdm(tar, unit=" files", desc=f"unpacking {archive.name}", disable=None):
                metered.left = member.size + MAX_TAR_HEADER_BYTES
                if member.size > shutil.disk_usage(fresh).free:
                    raise OSError(errno.ENOSPC, "the disk is too small for what the archive holds", str(fresh))
                if member.isfile() and member.name.endswith(".json"):
                    tar.extract(member, fresh, filter="data")    # refuses every path that leads elsewhere
            while plain.read(_CHUNK):                             # gzip compares its checksum at the very end
                pass
        find_files(fresh)
        atomic_replace(fresh, folder)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, UserError) as error:
        bad = archive.with_name(archive.name + ".bad")
        atomic_replace(archive, bad)
        raise UserError(f"{archive} is damaged ({error})\n       it is now {bad.name}; run this again to fetch "
                        "another, or put a sound one in its place") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
