"""Malicious files, servers and texts end in a one-line error. See also test_download.py."""
import gzip
import http.server
import io
import os
import pickle
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_user_error, learn_tokenizer, run_captured

from model import ModelArgs, Transformer
from tinyllm import checkpoint, cli, documents, download, shards
from tinyllm.cli import UserError
from tinyllm.files import load_json, save_json

EVIL = "\x1b]0;owned\x07\x1b[2Jred\x9b31m\u202egnp"


# ---- code ---------------------------------------------------------------------------------------

class Payload:
    def __reduce__(self):
        return (os.mkdir, ("it_ran",))


@pytest.mark.parametrize("args", [
    ["sample", "--checkpoint", "evil.pt"], ["train", "--init_from", "evil.pt", "--out_dir", "out"],
    ["train", "--out_dir", "run"], ["train", "--eval_only", "--init_from", "evil.pt"],
    ["convert", "evil.pt", "out.gguf"], ["preprocess", "--tokenizer", "evil.pt", "--data_dir", "own"],
    ["sample", "--checkpoint", "meta"]])
def test_code_in_a_file_does_not_run(project, args):
    for path in ("evil.pt", "run/last.pt", "meta/consolidated.00.pth"):
        Path(path).parent.mkdir(exist_ok=True)
        torch.save({"model": {}, "model_args": {}, "iter_num": 0, "config": Payload()}, path)
    Path("meta/params.json").write_text('{"dim": 8}', encoding="utf-8")
    Path("evil.pickle").write_bytes(pickle.dumps(Payload()))
    data = [] if args[0] in ("sample", "convert", "preprocess") else ["--data_dir", project, *TINY]
    assert_user_error(run_captured(*args, *data))
    assert not Path("it_ran").exists()


# ---- archives and servers -----------------------------------------------------------------------

def unpack(content: bytes) -> Path:
    Path("a.tar.gz").write_bytes(content)
    download._unpack(Path("a.tar.gz"), Path("stories"))
    return Path("stories")


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE,
                                  tarfile.DIRTYPE])
def test_only_files_are_unpacked(kind):
    folder = unpack(tar((member("a.json", kind, "/etc/passwd"), b""), (member("b.json"), b'["a story"]')))
    assert [path.name for path in folder.iterdir()] == ["b.json"]


def test_redirects_to_files_are_refused(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"\x1f\x8b")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", {"/file": secret.as_uri(), "/ftp": "ftp://127.0.0.1/x"}[self.path])
            self.end_headers()

        def log_message(self, *args):
            pass
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        for place in ("file", "ftp"):
            with pytest.raises(UserError, match="could not be downloaded"):
                download.download_file({"mirror": f"http://127.0.0.1:{server.server_port}/{place}"}, Path("target"))
        server.shutdown()
    assert not Path("target").exists() and not Path("target.part").exists()


# ---- too much -----------------------------------------------------------------------------------

@pytest.mark.parametrize("content", [b"[" * 2_000_000, b'{"a":' * 1_000_000, b'["' + b"a" * 9_000_000,
                                     b"1" * 9_000_000])
def test_json_bombs_end_in_an_error(content, monkeypatch):
    monkeypatch.setattr(documents, "MAX_RECORD_CHARS", 1 << 22)
    Path("bomb.json.gz").write_bytes(gzip.compress(content, 1))
    with pytest.raises(UserError, match="bomb.json.gz: record 1"):
        list(documents.read_documents(Path("bomb.json.gz")))


def test_a_text_bomb_is_read_in_little_memory():
    with gzip.open("bomb.txt.gz", "wb", 1) as file:
        for _ in range(100):
            file.write(b"a" * 1_000_000)
    tracemalloc.start()
    assert max(map(len, documents.read_documents(Path("bomb.txt.gz")))) <= documents.MAX_DOCUMENT_CHARS
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_a_packed_checkpoint_is_not_unpacked():
    state = {"model": {"w": torch.zeros(1_000_000)}, "model_args": {}, "iter_num": 0, "config": {}}
    checkpoint.save_checkpoint("a.pt", state)
    with zipfile.ZipFile("a.pt") as plain, zipfile.ZipFile("b.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert Path("b.pt").stat().st_size < 100_000
    with pytest.raises(UserError, match="b.pt .* is damaged"):
        checkpoint.load_checkpoint("b.pt")


@pytest.mark.parametrize("change", [
    {"dim": 10**6, "n_heads": 1, "n_kv_heads": 1}, {"n_layers": 10**8}, {"vocab_size": 10**9}, {"hidden_dim": 10**9},
    {"max_seq_len": 10**9}, {"max_seq_len": 1 << 27}, {"dim": 10**30}, {"rope_scaling": {"factors": "x"}}])
def test_a_shape_takes_no_memory_before_it_is_known_to_fit(change):
    model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=300))
    state = {**checkpoint.model_state(model), "iter_num": 0, "config": {}}
    state["model_args"].update(change)
    with pytest.raises(UserError, match="model_args"):
        checkpoint.build_model(state)


def test_expanded_tensor_is_refused():
    state = {"model": {"tok_embeddings.weight": torch.zeros(1).expand(10**9, 10**3)}, "model_args": {}, "iter_num": 0,
             "config": {}, "architecture": "llama"}
    checkpoint.save_checkpoint("a.pt", state)
    with pytest.raises(UserError, match="tok_embeddings.weight is not a dense"):
        checkpoint.load_checkpoint("a.pt")


# ---- names --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", ".", "", "train_0000.bin/../x", "a\\b",
                                  "train_0000.bin\0", "train_\u0660.bin"])
def test_a_manifest_cannot_name_other_files(project, name):
    folder = Path("tok512")
    folder.mkdir()
    content = load_json(project / "tok512" / "manifest.json")
    content["shards"][0]["file"] = name
    save_json(folder / "manifest.json", content)
    with pytest.raises(UserError, match="manifest.json is damaged.*\n.*preprocess.py"):
        shards.read_manifest(folder)


# ---- the terminal -------------------------------------------------------------------------------

def test_control_characters_are_escaped():
    assert cli.escape_control_chars(EVIL) == "\\x1b]0;owned\\x07\\x1b[2Jred\\x9b31m\\u202egnp"
    harmless = "tab\tline\nKätzchen \u732b \U0001f600"
    assert cli.escape_control_chars(harmless) == harmless


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals in Python")
@pytest.mark.parametrize("mode", [["--prompt", EVIL], ["--prompt", EVIL, "--show_probs"], ["--interactive"],
                                  ["--input_file", "prompts.txt"]])
def test_terminal_output_is_escaped_and_pipes_are_raw(mode, run_in_process, monkeypatch, capsys):
    model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=300, max_seq_len=64))
    state = {**checkpoint.model_state(model), "iter_num": 0, "config": {},
             "tokenizer": learn_tokenizer(["a few words"], 300).model}
    with torch.no_grad():
        model.output.weight[3 + 0x1b] += model.norm.weight * 0 + 9      # it likes to write escapes
    checkpoint.save_checkpoint("ckpt.pt", state)
    Path("prompts.txt").write_text(EVIL, encoding="utf-8")
    command = ["sample", "--checkpoint", "ckpt.pt", "--max_new_tokens", "8", "--device", "cpu", *mode]
    ours, theirs = os.openpty()
    seen = b""
    with open(theirs, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(f"{EVIL}\n"))
        patch.setattr(sys, "stdout", terminal)
        run_in_process(*command)
        print("the end", file=terminal, flush=True)
        while b"the end" not in seen:               # it may come in pieces
            seen += os.read(ours, 1 << 16)
    seen = seen.decode()
    painted = "\x1b[38;5;" if "--show_probs" in mode else "\0"
    assert "\\x1b" in seen and "\x1b" not in seen.replace(painted, "").replace("\x1b[0m", "") and "\x9b" not in seen
    if mode == ["--prompt", EVIL]:
        run_in_process(*command)
        assert "\x1b" in capsys.readouterr().out


def test_an_error_message_is_escaped():
    Path("a.json").write_text('[{"\\u001b[2Jkey": 1}]', encoding="utf-8")
    result = run_captured("train_vocab", "--data", "a.json")
    assert_user_error(result, "\\x1b[2Jkey")
    assert "\x1b" not in result.stderr
