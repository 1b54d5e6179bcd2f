"""Checkpoints: contents, safety, and errors for invalid files."""
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import learn_tokenizer

from model import ModelArgs, Transformer
from tinyllm import checkpoint
from tinyllm.cli import UserError


@pytest.fixture
def state():
    model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=300))
    vocabulary = learn_tokenizer(["a few words"], 300)
    return {**checkpoint.model_state(model), "iter_num": 3, "config": {"seed": 1}, "tokenizer": vocabulary.model,
            "tokenizer_sha256": vocabulary.sha256}


def test_save_and_load(state):
    checkpoint.save_checkpoint("a.pt", state)
    found = checkpoint.load_checkpoint("a.pt")
    assert found.keys() == state.keys() and found["iter_num"] == 3
    model = checkpoint.build_model(found)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state["model"].values(), strict=True))
    assert model.output.weight is model.tok_embeddings.weight
    assert checkpoint.build_tokenizer(found).sha256 == state["tokenizer_sha256"]


def test_same_state_gives_same_bytes(state):
    checkpoint.save_checkpoint("a.pt", state)
    checkpoint.save_checkpoint("b.pt", state)
    assert open("a.pt", "rb").read() == open("b.pt", "rb").read()


def test_a_failed_save_keeps_the_old_file(state, monkeypatch):
    checkpoint.save_checkpoint("a.pt", state)
    before = open("a.pt", "rb").read()

    def full(content, file):
        file.write(b"the first half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        checkpoint.save_checkpoint("a.pt", state)
    assert open("a.pt", "rb").read() == before and os.listdir() == ["a.pt"]


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("it_ran",))


def test_missing_checkpoint_lists_existing_ones(tmp_path):
    with pytest.raises(UserError, match="python train.py creates one"):
        checkpoint.load_checkpoint("output/ckpt.pt")
    with pytest.raises(UserError, match="python train.py --out_dir .*output.mine creates one"):
        checkpoint.load_checkpoint(Path("output/mine/ckpt.pt"))
    for name in ("output/last.pt", "output/mine/ckpt.pt", "output/Story-Q8.gguf", "output/notes.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    for name, first in [("output/ckpt.pt", "mine.ckpt.pt"), ("outptu/last.pt", "last.pt"),
                        ("output/Story-Q4.gguf", "Story-Q8.gguf")]:
        with pytest.raises(UserError, match=f"no checkpoint at .*\n *choose from output.{first}, ") as error:
            checkpoint.load_checkpoint(name)
        assert "notes.txt" not in str(error.value)


def test_code_in_a_checkpoint_does_not_run(state):
    torch.save({**state, "config": Payload()}, "evil.pt")
    with open("evil.pickle", "wb") as file:
        pickle.dump(Payload(), file)
    for name in ("evil.pt", "evil.pickle"):
        with pytest.raises(UserError, match=name):
            checkpoint.load_checkpoint(name)
    assert not os.path.exists("it_ran")


def test_cut_and_foreign_files_are_refused(state):
    checkpoint.save_checkpoint("a.pt", state)
    whole = open("a.pt", "rb").read()
    for content in [b"", b"PK", b"hello" * 100, *(whole[:n] for n in (1, 100, len(whole) // 2, len(whole) - 1))]:
        with open("bad.pt", "wb") as file:
            file.write(content)
        with pytest.raises(UserError, match="bad.pt"):
            checkpoint.load_checkpoint("bad.pt")
    with pytest.raises(UserError, match="choose from a.pt, bad.pt"):
        checkpoint.load_checkpoint("missing.pt")
    with zipfile.ZipFile("zip.pt", "w") as file:
        file.writestr("hello.txt", "x")
    with pytest.raises(UserError, match="zip.pt"):
        checkpoint.load_checkpoint("zip.pt")


@pytest.mark.parametrize("content", [{}, [], torch.zeros(3), {"model": {}, "config": {}}])
def test_wrong_contents_are_refused(content):
    torch.save(content, "other.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load_checkpoint("other.pt")


@pytest.mark.parametrize("change", [{"dim": 32}, {"n_layers": 2}, {"vocab_size": 301}, {"dim": 15}, {"colour": 1}])
def test_weights_of_another_shape_are_refused(state, change):
    state["model_args"].update(change)
    with pytest.raises(UserError, match="model_args"):
        checkpoint.build_model(state)


def test_missing_and_surplus_weights_are_refused(state):
    short, long = dict(state["model"]), dict(state["model"], extra=torch.zeros(1))
    del short["norm.weight"]
    for weights in (short, long):
        with pytest.raises(UserError, match="norm.weight|extra"):
            checkpoint.build_model({**state, "model": weights})


def test_checkpoint_without_tokenizer_names_the_flag(state):
    del state["tokenizer"]
    with pytest.raises(UserError, match="--tokenizer"):
        checkpoint.build_tokenizer(state)
