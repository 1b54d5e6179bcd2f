"""Every invalid input file gives one error that names it, and changes nothing on disk."""
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SAVE_PICTURE, assert_user_error, learn_tokenizer, run_captured
from faults import fuzz

import preprocess
from extras import plots
from tinyllm import checkpoint, corpus, documents, project, shards
from tinyllm.cli import UserError
from tinyllm.files import load_json, save_json

MODEL, NOTES, MANIFEST = "data/tok300.model", "data/tok300.json", "data/tok300/manifest.json"
SHARD = "data/tok300/val_0000.bin"
CKPT, LAST = str(Path("output/ckpt.pt")), str(Path("output/last.pt"))     # as messages spell them
PREPROCESS, TRAIN, RESUME = ["preprocess"], ["train", "--max_iters", 2], ["train", "--init_from", "resume"]
SAMPLE = ["sample", "--max_new_tokens", 2]
VOCAB = ["train_vocab", "--vocab_size", 300, "--data"]
ORDERS = [(MODEL, PREPROCESS), (MODEL, TRAIN), (NOTES, PREPROCESS), (MANIFEST, TRAIN), (SHARD, TRAIN), (LAST, RESUME),
          (CKPT, SAMPLE), (CKPT, ["train", "--eval_only"]), ("texts/a.json", [*VOCAB, "texts/a.json"]),
          ("texts/b.jsonl", [*VOCAB, "texts/b.jsonl"]), ("texts/d.jsonl.gz", [*VOCAB, "texts/d.jsonl.gz"]),
          ("texts/c.txt", [*VOCAB, "texts/c.txt"]), ("prompt.txt", [*SAMPLE, "--prompt", "FILE:prompt.txt"]),
          ("prompt.txt", [*SAMPLE, "--input_file", "prompt.txt", "--output_file", "new.jsonl"]),
          ("prompt.txt", [*SAMPLE, "--score", "prompt.txt"])]
WRONG = {"empty": b"", "noise": random.Random(1).randbytes(3000), "zeros": bytes(3000),
         "not UTF-8": b"Once upon \xff\xfe a time", "UTF-16": "Once upon a time\nthere was".encode("utf-16"),
         "deep": b"[" * 200_000, "deep object": b'{"a":' * 200_000, "html": b"<html><body>404</body></html>"}
TEXT = {"empty", "zeros", "deep", "deep object", "html"}        # valid content of a .txt
REFUSE_EMPTY = ("--score", "--data", "--output_file")
VALUES = [None, True, -1, 0.5, float("nan"), float("inf"), 10**30, "", "1", "\ud800", "\0", [], [1], {}, {"a": 1}]


@pytest.fixture
def files(valid_files) -> None:
    """A valid file of each kind in the current folder."""
    shutil.copytree(valid_files, ".", dirs_exist_ok=True)
    Path("prompt.txt").write_text("Once upon a time\n", encoding="utf-8")


def tree() -> dict[str, bytes | None]:
    """Return all files of the current folder with their contents."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def refuses(order: list, *parts: str) -> None:
    """Check that a script prints an error with all parts and changes no file."""
    before = tree()
    assert_user_error(run_captured(*order), *parts)
    assert tree() == before


def load_shards() -> shards.ShardSet:
    return shards.load_shards(Path("data/tok300"), project.load_tokenizer(MODEL).sha256)


def load_notes() -> corpus.TextSource:
    cfg = SimpleNamespace(data="", data_dir="data", tokenizer="", encoding="")
    return preprocess.find_source(cfg, Path(MODEL), project.load_tokenizer(MODEL).sha256)


def ids_of(order: tuple) -> str:
    return f"{order[1][0]} {Path(order[0]).name} {order[1][-1]}"


# ---- any file -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, order", ORDERS, ids=map(ids_of, ORDERS))
def test_a_missing_file(files, name, order):
    Path(name).unlink()
    refuses(order, "no vocabulary" if name == MODEL else Path(name).stem)


@pytest.mark.parametrize("name, order", ORDERS, ids=map(ids_of, ORDERS))
def test_folder_instead_of_a_file(files, name, order):
    Path(name).unlink()
    Path(name).mkdir()
    refuses(order, Path(name).stem)


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name, order", ORDERS, ids=map(ids_of, ORDERS))
def test_other_content(files, name, order, kind):
    Path(name).write_bytes(WRONG[kind])
    if kind not in TEXT or not name.endswith(".txt") or kind == "empty" and order[-2] in REFUSE_EMPTY:
        refuses(order, Path(name).name)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name, order", ORDERS, ids=map(ids_of, ORDERS))
def test_unreadable_file(files, name, order):
    Path(name).chmod(0)
    assert_user_error(run_captured(*order), Path(name).name)


@pytest.mark.parametrize("name, load", [(MANIFEST, load_shards), (NOTES, load_notes), (SHARD, load_shards),
                                        (MODEL, load_notes), (CKPT, lambda: checkpoint.load_checkpoint(CKPT))])
def test_truncated_file(files, name, load):
    """Truncate small files at every length; large files at every length near the start, and at some others."""
    whole = Path(name).read_bytes()
    lengths = {*range(min(len(whole), 1024)), *random.Random(1).sample(range(len(whole)), min(len(whole), 200))}
    for length in sorted(lengths):
        Path(name).write_bytes(whole[:length])
        with pytest.raises(UserError, match=Path(name).stem):
            load()


@pytest.mark.parametrize("name, order", ORDERS[:9], ids=map(ids_of, ORDERS[:9]))
def test_truncated_file_through_the_scripts(files, name, order):
    whole = Path(name).read_bytes()
    for length in random.Random(1).sample(range(1, len(whole)), 3):
        Path(name).write_bytes(whole[:length])
        refuses(order, Path(name).name)


@pytest.mark.parametrize("target", ["manifest", "shard", "checkpoint", "last"])
def test_a_flipped_bit_is_refused_or_changes_nothing(files, target):
    name, load = fuzz.TARGETS[target].files[-1], fuzz.TARGETS[target].read
    whole, content = Path(name).read_bytes(), load()
    for place in random.Random(1).sample(range(8 * len(whole)), 50):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        Path(name).write_bytes(damaged)
        try:
            assert load() == content, f"bit {place}"
        except UserError as error:
            assert Path(name).name in str(error)


# ---- vocabulary and its notes -------------------------------------------------------------------

def test_other_vocabulary_of_equal_size(files):
    Path(MODEL).write_bytes(learn_tokenizer(["other words, and other pieces of them"] * 9, 300).model)
    refuses(PREPROCESS, "tok300.json")
    refuses(TRAIN, "another vocabulary")
    refuses([*SAMPLE, "--tokenizer", MODEL], "tok300.model is not the tokenizer")


@pytest.mark.parametrize("key", ["sha256", "source", "val_threshold"])
def test_wrong_values_in_the_sidecar(files, key):
    facts = json.loads(Path(NOTES).read_text(encoding="utf-8"))
    for value in VALUES:
        if not isinstance(value, str) or key == "sha256":
            Path(NOTES).write_text(json.dumps({**facts, key: value}), encoding="utf-8")
            with pytest.raises(UserError, match="tok300.json"):
                load_notes()


@pytest.mark.parametrize("value", VALUES)
def test_sidecar_that_is_no_object(files, value):
    Path(NOTES).write_text(json.dumps(value), encoding="utf-8")
    refuses(PREPROCESS, "tok300.json")


# ---- manifest and shards ------------------------------------------------------------------------

def manifest() -> dict[str, Any]:
    return load_json(MANIFEST)


def save_manifest(content: dict[str, Any]) -> None:
    save_json(MANIFEST, content)


@pytest.mark.parametrize("key", ["format", "tokenizer_sha256", "vocab_size", "val_threshold", "shards"])
def test_a_manifest_without_a_key(files, key):
    save_manifest({k: v for k, v in manifest().items() if k != key})
    refuses(TRAIN, "manifest.json", "python preprocess.py")


@pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", "a\\b", "..", ".", "", "C:\\x.bin", "a/b", "\0",
                                  "x" * 5000])
def test_a_shard_outside_the_folder(files, file):
    content = manifest()
    content["shards"][0]["file"] = file
    save_manifest(content)
    refuses(TRAIN, "manifest.json", "python preprocess.py")


@pytest.mark.parametrize("format", [0, 1, 99])
def test_a_manifest_of_another_format(files, format):
    if format != shards.FORMAT:
        save_manifest({**manifest(), "format": format})
        refuses(TRAIN, "manifest.json", "python preprocess.py")


@pytest.mark.parametrize("change", [lambda ids: ids[:-1], lambda ids: np.append(ids, 2), lambda ids: ids[:0],
                                    lambda ids: ids.astype("<u4"), lambda ids: ids[::-1]])
def test_a_shard_of_other_content(files, change):
    change(np.fromfile(SHARD, "<u2")).tofile(SHARD)
    refuses(TRAIN, "val_0000.bin", "python preprocess.py")


# ---- checkpoints --------------------------------------------------------------------------------

def save(change: Callable[[dict], Any], name: str = CKPT) -> None:
    state = checkpoint.load_checkpoint(name)
    Path(name).unlink()
    torch.save(change(state) or state, name)


WEIGHTS = {
    "NaN": lambda w: w * float("nan"), "inf": lambda w: w / 0, "another shape": lambda w: w[:-1],
    "turned": lambda w: w.T, "one more dimension": lambda w: w[None], "empty": lambda w: w[:0],
    "complex": lambda w: torch.complex(w, w), "sparse": lambda w: w.to_sparse(), "integers": lambda w: w.long(),
    "meta": lambda w: w.to("meta"), "quantised": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    "a list": lambda w: w.tolist(), "a thousand million in 4 bytes": lambda w: torch.zeros(1).expand(10**9),
    "nothing": lambda w: None}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name, order", [(CKPT, SAMPLE), (LAST, RESUME)], ids=["sample", "resume"])
def test_wrong_weights(files, name, order, kind):
    save(lambda state: state["model"].update({"tok_embeddings.weight": WEIGHTS[kind](
        state["model"]["tok_embeddings.weight"])}), name)
    refuses(order)


@pytest.mark.parametrize("args", [{"dim": 10**9}, {"n_layers": 10**9}, {"vocab_size": 10**9}, {"hidden_dim": 10**9},
                                  {"max_seq_len": 10**9}, {"multiple_of": 10**30}, {"n_heads": 10**9}, {"dim": "16"},
                                  {"n_layers": True}, {"dim": 16.0}, {"n_heads": None}, {"norm_eps": "1"}, {"x": 1},
                                  {"rope_scaling": True}, {"rope_scaling": {"factors": [1.0] * 9}}, {"dropout": -1},
                                  {"rope_scaling": {"factor": 0}}, {"norm_eps": float("nan")}, {1: 2},
                                  {"rope_scaling": [1]}, {"rope_theta": 10**400}], ids=repr)
@pytest.mark.parametrize("name, order", [(CKPT, SAMPLE), (LAST, RESUME)], ids=["sample", "resume"])
def test_a_wrong_shape(files, name, order, args):
    """The error comes before any memory is allocated for the model."""
    save(lambda state: state["model_args"].update(args), name)
    refuses(order)


def test_a_shape_nested_without_end():
    """Its repr alone raises RecursionError."""
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UserError, match="model_args"):
        checkpoint.load_model_args({"model": {}, "model_args": {"dim": deep}})


@pytest.mark.parametrize("name, order", [(CKPT, SAMPLE), (LAST, RESUME)], ids=["sample", "resume"])
@pytest.mark.parametrize("change", [
    lambda state: state["model_args"].update(n_heads=3), lambda state: state.update(architecture="unheard of"),
    lambda state: state["model"]["norm.weight"].fill_(float("nan")), lambda state: state["model"].pop("norm.weight")],
    ids=["shape", "architecture", "NaN", "missing weight"])
def test_errors_inside_a_checkpoint_name_the_file(files, name, order, change):
    save(lambda state: (change(state), state)[1], name)
    refuses(order, name)


@pytest.mark.parametrize("key", checkpoint.REQUIRED_TO_RESUME)
def test_wrong_values_in_a_checkpoint(files, key):
    """For each key that resuming needs; values of the right type are accepted."""
    state = checkpoint.load_checkpoint(LAST)
    good = Path(LAST).read_bytes()
    for value in [*VALUES[:1], 10**30, "1", [1], {"a": 1}, torch.zeros(3)]:
        if type(value) is not type(state[key]) or value == {"a": 1} and key not in ("config", "scaler"):
            Path(LAST).write_bytes(good)
            save(lambda state: {**state, key: value}, LAST)
            refuses(RESUME)


@pytest.mark.parametrize("key", checkpoint.REQUIRED)
def test_a_checkpoint_without_a_key(files, key):
    save(lambda state: {k: v for k, v in state.items() if k != key})
    refuses(SAMPLE, CKPT, key)


def test_objects_that_are_no_checkpoint(files):
    for content in (None, 1, "a", [], [1], torch.zeros(3), {}, {1: 2}, {"model": {}}, ({},)):
        torch.save(content, CKPT)
        refuses(SAMPLE, CKPT)


@pytest.mark.parametrize("content", [b"", b"no model", bytes(100), None, 1, "text", b"{", b"{}"])
def test_a_wrong_vocabulary_in_a_checkpoint(files, content):
    save(lambda state: {**state, "tokenizer": content})
    refuses(SAMPLE)


def test_a_checkpoint_with_a_chat_that_is_no_text(files):
    good = Path(CKPT).read_bytes()
    for chat in ([], {}, 1, "unheard of"):
        Path(CKPT).write_bytes(good)
        save(lambda state: {**state, "chat": chat})
        assert "Traceback" not in run_captured(*SAMPLE).stderr


# ---- text ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("record", ["1", "null", "true", "[1]", '{"story": 1}', '{"story": null}', '{"other": "a"}',
                                    "{}", '{"text": ["a"]}', "NaN", "[" * 100_000])
@pytest.mark.parametrize("name", ["texts/a.json", "texts/b.jsonl"])
def test_records_that_are_no_text(files, name, record):
    before = Path(name).read_text(encoding="utf-8")
    Path(name).write_text(before.replace("[", f"[{record},", 1) if name.endswith("json") else f"{before}\n{record}",
                          encoding="utf-8")
    refuses([*VOCAB, name], Path(name).name, "record")


def test_half_a_character_in_json_becomes_a_mark(files):
    Path("texts/a.json").write_text(json.dumps(["a \ud800 b", "c"]), encoding="utf-8")
    assert list(documents.read_documents(Path("texts/a.json"))) == ["a \ufffd b", "c"]


# ---- the log ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["log.jsonl", "clock.jsonl"])
@pytest.mark.parametrize("content", [*WRONG.values(), *(json.dumps(value).encode() + b"\n" for value in VALUES[::3]),
                                     b'{}\n{}\n{}\n', b'{"iter": "1"}\n' * 4, b'{"iter": 1, "val_loss": 1}\n' * 4])
def test_damaged_log_is_repaired_or_reported(files, name, content, monkeypatch):
    if b"iter" in content:
        monkeypatch.setattr(plots, "save", SAVE_PICTURE)        # draw the damaged log
    Path("output", name).write_bytes(content)
    result = run_captured("train", "--init_from", "resume", "--max_iters", 3)
    assert "Traceback" not in result.stderr
    if result.returncode:
        assert_user_error(result, name)
