"""Download TinyStories from the first mirror that works. Broken downloads resume; complete ones are checked.

    folder = download_tinystories("data")
"""
import gzip
import re
import shutil
import tarfile
import zlib
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3 import Retry

from tinyllm.cli import UserError
from tinyllm.corpus import TINYSTORIES_DIR, find_files
from tinyllm.files import atomic_replace, sha256

ARCHIVE = f"{TINYSTORIES_DIR}.tar.gz"
MIRRORS = {
    "huggingface": f"https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/{ARCHIVE}",
    "hf-mirror": f"https://hf-mirror.com/datasets/roneneldan/TinyStories/resolve/main/{ARCHIVE}",
    "modelscope": f"https://www.modelscope.cn/datasets/AI-ModelScope/TinyStories/resolve/master/{ARCHIVE}",
}
RETRIES = Retry(3, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False,
                respect_retry_after_header=False)       # a server may ask to wait for a day
MAX_TRIES = 3                   # attempts per mirror that bring no new bytes

_CHUNK_BYTES = 1 << 16          # bytes per write, the most that a broken connection loses


def download_tinystories(data_dir: str | Path, mirror: str = "") -> Path:
    """Download and unpack TinyStories (Eldan and Li 2023, arXiv 2305.07759) unless it exists. Returns its folder.

    mirror: names of MIRRORS or URLs, separated by commas, tried in that order; empty: all. Raises UserError if no
    mirror works, or the archive is damaged.
    """
    folder = Path(data_dir) / TINYSTORIES_DIR
    archive = Path(data_dir) / ARCHIVE
    if folder.is_dir():
        return folder
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        download_file(choose_mirrors(mirror), archive)
    _unpack(archive, folder)
    return folder


def choose_mirrors(names: str) -> dict[str, str]:
    """Return the URLs of mirrors by name. Raises UserError for an unknown name."""
    urls = {}
    for name in map(str.strip, names.split(",") if names else MIRRORS):
        if name not in MIRRORS and not name.startswith(("http://", "https://")):
            raise UserError(f"unknown mirror {name!r}; expected {', '.join(MIRRORS)} or an http(s) URL")
        urls[name] = MIRRORS.get(name, name)
    return urls


class _Damaged(Exception):
    """The mirror sent something other than the file."""


def download_file(mirrors: dict[str, str], target: Path) -> None:
    """Download a file from the first mirror that works. mirrors: URLs by name.

    Resumes from the bytes in `<name>.part`. Raises UserError if no mirror works.
    """
    part = target.with_name(target.name + ".part")
    failures = []
    for name, url in mirrors.items():
        try:
            _download_from(url, part)
            return atomic_replace(part, target)
        except (requests.RequestException, _Damaged) as error:
            failures.append(f"       {name}: {error}")
    raise UserError("\n".join([f"{target.name} could not be downloaded", *failures,
                               f"       download it by other means, for example from {next(iter(mirrors.values()))},",
                               f"       save it as {target.resolve()} and run the same command again;",
                               "       or start with the built-in stories: python train_vocab.py"]))


def _download_from(url: str, part: Path) -> None:
    """Download from one mirror, resuming after errors. Gives up after MAX_TRIES attempts without new bytes."""
    n_failures = 0
    while True:
        size = _size(part)
        try:
            return _receive(url, part)
        except (requests.RequestException, _Damaged) as error:
            if isinstance(error, _Damaged):
                part.unlink(missing_ok=True)
            if _size(part) <= size:
                n_failures += 1
            if n_failures == MAX_TRIES:
                raise


def _receive(url: str, part: Path) -> None:
    """Append the missing bytes to `part`, and check its SHA-256 if the server announces one."""
    offset = _size(part)
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={offset}-" if offset else None}
    with requests.Session() as session:
        session.mount("http://", HTTPAdapter(max_retries=RETRIES))
        session.mount("https://", HTTPAdapter(max_retries=RETRIES))
        response = session.get(url, headers=headers, stream=True, timeout=(10, 60))
        if response.status_code != 416:         # 416: the server has no bytes after `offset`
            response.raise_for_status()
            _write_body(response, part, offset)
        elif response.headers.get("Content-Range", "").rpartition("/")[2] != str(offset):
            raise _Damaged(f"the file is shorter than the {offset:,} bytes downloaded so far")
    etags = [hop.headers.get("X-Linked-Etag", "").strip('"') for hop in (*response.history, response)]
    digests = [etag for etag in etags if re.fullmatch("[0-9a-f]{64}", etag)]
    if digests and digests[0] != sha256(part):
        raise _Damaged("the SHA-256 of the file is not the announced one")


def _write_body(response: requests.Response, part: Path, offset: int) -> None:
    """Write the body of a response to `part`: from `offset` if the server resumes there, else from the start."""
    if "html" in response.headers.get("Content-Type", ""):
        raise _Damaged("found a web page; expected the file")
    if not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
        offset = 0
    length = int(response.headers.get("Content-Length", 0))
    bar = tqdm(total=offset + length or None, initial=offset, unit="B", unit_scale=True, desc=part.stem, disable=None)
    with open(part, "ab" if offset else "wb") as file, bar:
        for chunk in response.iter_content(_CHUNK_BYTES):
            file.write(chunk)
            bar.update(len(chunk))
    if length and _size(part) != offset + length:
        raise requests.ConnectionError(f"the connection ended at {_size(part):,} of {offset + length:,} bytes")


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack the .json files of the archive. `folder` appears when all of them are complete and intact."""
    if not hasattr(tarfile, "data_filter"):
        raise UserError("this Python cannot unpack archives safely; expected 3.10.12, 3.11.4, 3.12 or newer")
    tmp_dir = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp_dir, ignore_errors=True)          # left by a killed run
    tmp_dir.mkdir()
    try:
        _extract(archive, tmp_dir)
        find_files(tmp_dir)
        atomic_replace(tmp_dir, folder)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, UserError) as error:
        bad = archive.with_name(archive.name + ".bad")
        atomic_replace(archive, bad)
        raise UserError(f"{archive} is damaged ({error}); it is now named {bad.name}\n       run the same command "
                        "to download it again, or put an intact archive in its place") from error
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)


def _extract(archive: Path, folder: Path) -> None:
    with gzip.open(archive) as file, tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tqdm(tar, unit=" files", desc=f"unpacking {archive.name}", disable=None):
            if member.isfile() and member.name.endswith(".json"):
                tar.extract(member, folder, filter="data")      # refuses paths outside the folder
        while file.read(_CHUNK_BYTES):                          # gzip checks its checksum at the end
            pass


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
