"""A server with an archive like that of TinyStories, slow enough to be broken off."""
import hashlib
import io
import random
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PIECE, PAUSE = 1 << 14, 0.005       # bytes sent at a time, and seconds between: 2 MB take 0.7 seconds
NOISE = 2_000_000                   # bytes that do not pack, of a file that is not unpacked


def archive(stories: Path) -> bytes:
    """A .tar.gz of the small files of a folder, and of noise that makes it large."""
    packed = io.BytesIO()
    contents = {path.name: path.read_bytes().rstrip() for path in sorted(stories.iterdir())}
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in {**contents, "noise": random.Random(0).randbytes(NOISE)}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def serve(content: bytes) -> str:
    """Serve it, from any byte on, until this process ends; returns the address."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            self.send_response(416 if start >= len(content) else 206 if start else 200)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                             if start < len(content) else f"bytes */{len(content)}")
            self.send_header("Content-Length", str(max(len(content) - start, 0)))
            self.send_header("X-Linked-Etag", hashlib.sha256(content).hexdigest())
            self.end_headers()
            try:
                for at in range(start, len(content), PIECE):
                    self.wfile.write(content[at:at + PIECE])
                    time.sleep(PAUSE)
            except OSError:         # the client is dead, as planned
                pass

        def log_message(self, *args):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"
