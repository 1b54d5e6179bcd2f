"""The download, against a local server that misbehaves."""
import errno
import gzip
import hashlib
import io
import json
import random
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import assert_user_error, run_subprocess

from tinyllm import corpus, download
from tinyllm.cli import UserError
from tinyllm.corpus import TINYSTORIES_DIR
from tinyllm.documents import read_documents
from tinyllm.download import ARCHIVE, download_tinystories

NOISE = random.Random(0)        # so that the archive stays large
STORIES = [[{"story": f"story {i} of {j}: {NOISE.randbytes(300).hex()}"} for i in range(300)] for j in range(3)]
CUT = 150_000                   # bytes after which a connection breaks


def archive(members=None) -> bytes:
    """Return a .tar.gz like the real one, or with the given members (TarInfo or name, content)."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members or [(f"data{j:02d}.json", json.dumps(s).encode()) for j, s in enumerate(STORIES)]:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


class Server:
    """A server of `content` that first misbehaves as listed in `plan`, once per request."""

    def __init__(self):
        self.content, self.plan, self.ranges, self.headers = archive(), [], [], {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.ranges.append(self.headers.get("Range"))
                outer.answer(self, outer.plan.pop(0) if outer.plan else "well")

            def log_message(self, *args):
                pass
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=[0.01], daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/{ARCHIVE}"

    def answer(self, request, how):
        body, start = self.content, 0
        asked = request.headers.get("Range")
        if how == "redirect":
            request.send_response(302)
            request.send_header("Location", self.url)
            request.send_header("X-Linked-Etag", f'"{hashlib.sha256(self.content).hexdigest()}"')
            request.send_header("Content-Length", "0")
            return request.end_headers()
        if isinstance(how, int):
            request.send_response(how)
            request.send_header("Content-Length", "0")
            return request.end_headers()
        if how == "page":
            body = b"<!DOCTYPE html><html>Please log in</html>"
        if asked and how not in ("no ranges", "page"):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(body)}")
                request.send_header("Content-Length", "0")
                return request.end_headers()
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            request.send_response(200)
        request.send_header("Content-Type", "text/html" if how == "page" else "application/gzip")
        request.send_header("Content-Length", str(len(body) - start))
        for name, value in self.headers.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body[start:start + CUT] if how in ("cut", "no ranges") else body[start:])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "RETRIES", download.RETRIES.new(total=2, backoff_factor=0))
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def stories(folder: Path) -> list[str]:
    return [text for file in corpus.find_files(folder) for text in read_documents(file)]


ALL = [entry["story"] for part in STORIES for entry in part]


def nothing_is_taken_for_good(data: Path = Path("data")) -> bool:
    return not (data / ARCHIVE).exists() and not (data / TINYSTORIES_DIR).exists()


@pytest.mark.parametrize("plan", [[], ["redirect"], ["cut"], ["cut"] * 5, [503], [503, 503], ["page"],
                                  ["no ranges", "no ranges"], ["cut", 500, "redirect", "cut"]])
def test_download_completes(server, plan):
    server.plan = list(plan)
    assert stories(download_tinystories("data", server.url)) == ALL
    assert sorted(path.name for path in Path("data").iterdir()) == [TINYSTORIES_DIR, ARCHIVE]


def test_resume_after_a_broken_connection(server):
    server.plan = ["cut", "cut"]
    download_tinystories("data", server.url)
    starts = [int((asked or "bytes=0-")[6:-1]) for asked in server.ranges]
    assert len(starts) == 3 and starts[0] == 0 and starts[1] > CUT - 2**16 and starts[2] > 2 * (CUT - 2**16)


def test_second_run_resumes(server):
    server.plan = ["cut", 404, 404, 404]
    with pytest.raises(UserError):
        download_tinystories("data", server.url)
    part = Path("data") / f"{ARCHIVE}.part"
    size = part.stat().st_size
    assert size > CUT - 2**16 and nothing_is_taken_for_good()
    assert stories(download_tinystories("data", server.url)) == ALL and server.ranges[-1] == f"bytes={size}-"


def test_complete_part_is_accepted(server):
    Path("data").mkdir()
    (Path("data") / f"{ARCHIVE}.part").write_bytes(server.content)
    assert stories(download_tinystories("data", server.url)) == ALL


@pytest.mark.parametrize("part", [b"\x1f\x8b of another file", b"x" * 10_000_000])
def test_part_of_another_file_is_discarded(server, part):
    server.headers["X-Linked-Etag"] = f'"{hashlib.sha256(server.content).hexdigest()}"'
    Path("data").mkdir()
    (Path("data") / f"{ARCHIVE}.part").write_bytes(part)
    assert stories(download_tinystories("data", server.url)) == ALL


def test_a_wrong_checksum_is_refused(server):
    server.headers["X-Linked-Etag"] = f'"{"0" * 64}"'
    with pytest.raises(UserError, match="SHA-256") as error:
        download_tinystories("data", server.url)
    assert nothing_is_taken_for_good() and str((Path("data") / ARCHIVE).resolve()) in str(error.value)


@pytest.mark.parametrize("plan", [["page"] * 3, [404] * 3, [500] * 9])
def test_server_that_always_fails(server, plan):
    server.plan = list(plan)
    with pytest.raises(UserError, match="could not be downloaded"):
        download_tinystories("data", server.url)
    assert nothing_is_taken_for_good() and not list(Path("data").glob("*.part"))


def test_the_next_mirror_takes_over(server):
    other = Server()
    server.plan = [404] * 3
    assert stories(download_tinystories("data", f"{server.url},{other.url}")) == ALL
    assert len(server.ranges) == 3 and len(other.ranges) == 1
    other.http.shutdown()


def test_mirrors_are_tried_in_order():
    assert list(download.choose_mirrors("")) == ["huggingface", "hf-mirror", "modelscope"]
    assert list(download.choose_mirrors("modelscope, hf-mirror")) == ["modelscope", "hf-mirror"]
    with pytest.raises(UserError, match="modelscop"):
        download.choose_mirrors("modelscop")


def test_file_placed_by_hand_is_used(server):
    Path("data").mkdir()
    (Path("data") / ARCHIVE).write_bytes(server.content)
    assert stories(download_tinystories("data", server.url)) == ALL and server.ranges == []


def test_unpacked_stories_are_not_downloaded_again(server):
    download_tinystories("data", server.url)
    (Path("data") / ARCHIVE).unlink()
    download_tinystories("data", server.url)
    assert len(server.ranges) == 1


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


POISON = {
    "parent": archive([("../outside.json", b"[]")]),
    "absolute": archive([("/tmp/tiny_llm_outside.json", b"[]")]),
    "link": archive([(link("away.json", "/etc"), b""), ("away.json/passwd.json", b"[]")]),
    "empty": archive([("readme.md", b"no stories")]),
    "cut": archive()[:-30],
    "no tar": gzip.compress(b"words " * 1000),
    "checksum": archive()[:-8] + b"\x00" * 8,
}


@pytest.mark.parametrize("kind", POISON)
def test_a_bad_archive_leaves_nothing(server, kind, tmp_path):
    server.content = POISON[kind]
    if kind in ("absolute", "link"):    # lands inside, without the slash or the link, which is harmless
        folder = download_tinystories("data", server.url)
        assert not [path for path in folder.rglob("*") if path.is_symlink()]
    else:
        with pytest.raises(UserError, match="damaged"):
            download_tinystories("data", server.url)
        assert nothing_is_taken_for_good() and (Path("data") / f"{ARCHIVE}.bad").exists()
    assert not Path("/tmp/tiny_llm_outside.json").exists() and not list(tmp_path.glob("*.json"))
    assert not list(Path("data").glob("*.tmp"))


def test_full_disk_keeps_existing_files(server, monkeypatch):
    class FullDisk(io.FileIO):
        def write(self, piece):
            if self.tell() + len(piece) > CUT:
                raise OSError(errno.ENOSPC, "No space left on device", str(self.name))
            return super().write(piece)

    with monkeypatch.context() as patch:
        patch.setattr(download, "open", lambda path, mode: FullDisk(path, mode), raising=False)
        with pytest.raises(OSError, match="No space left"):
            download_tinystories("data", server.url)
    size = (Path("data") / f"{ARCHIVE}.part").stat().st_size
    assert size > CUT - 2**16 and nothing_is_taken_for_good()
    assert stories(download_tinystories("data", server.url)) == ALL and server.ranges[-1] == f"bytes={size}-"


def test_from_the_command_line(server):
    result = run_subprocess("train_vocab", "--download", "True", "--mirror", server.url, "--vocab_size", "300")
    assert result.returncode == 0, result.stderr
    assert Path("data/tok300.model").exists() and (Path("data") / TINYSTORIES_DIR / "data00.json").exists()
    result = run_subprocess("train_vocab", "--download", "--data_dir", "other", "--mirror", "nowhere")
    assert_user_error(result, "unknown mirror 'nowhere'")
    folder = Path("data") / TINYSTORIES_DIR
    result = run_subprocess("train_vocab", "--download", "False", "--data", folder, "--vocab_size", "300")
    assert result.returncode == 0 and len(server.ranges) == 1
