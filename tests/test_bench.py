"""tools/bench.py: contenders train the same model and take turns; errors."""
import importlib
import json
import sys
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_user_error, run_captured

from model import ModelArgs
from tinyllm import cli, demo_stories, shards
from tinyllm import device as devices
from tinyllm.cli import UserError
from tools import bench

ARGS = ModelArgs(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=64, max_seq_len=16)


@pytest.fixture
def batch():
    tokens = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.fixture
def backend():
    return devices.choose_backend("cpu", "float32")


def test_each_contender_trains_its_model(batch, backend):
    pytest.importorskip("transformers")
    train_cfg, _ = cli.parse_settings(vars(importlib.import_module("train")), ["--warmup_iters", "0"])
    run = bench.build_run(train_cfg, backend, ARGS, compiled=False)
    losses = [bench.train.train_step(run, repeat(batch))[1].item() for _ in range(20)]
    assert losses[-1] < losses[0] - 0.1
    Path("peer").mkdir()
    Path("peer/model.py").write_text("from model import *\nclass Transformer(Transformer):\n"
                                     "    def forward(self, x, y):\n        y.view(-1)\n"
                                     "        return super().forward(x, y)\n", encoding="utf-8")
    for make in (bench.transformers_step, lambda *args: bench.peer_step(Path("peer"), *args)):
        step = make(backend, ARGS, batch)
        model = next(cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, torch.nn.Module))
        before = [weight.clone() for weight in model.parameters()]
        step()
        assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert sum(weight.numel() for weight in before) == sum(map(torch.numel, block_model().parameters()))


def block_model():
    from model import Transformer
    return Transformer(ARGS)


def test_contenders_take_turns_after_warm_up(monkeypatch, backend):
    calls, now = [], [0.0]

    def step(name, seconds):
        calls.append(name)
        now[0] += seconds if len(calls) > 4 else 100.0
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    found = bench.time_interleaved({"a": lambda: step("a", 1.0), "b": lambda: step("b", 3.0)}, backend, 3)
    assert calls == ["a", "b"] * 5 and found == {"a": 1.0, "b": 3.0}


@pytest.mark.parametrize("argv, message", [([], "tools.bench train | quality"), (["quality"], "--data PATH"),
                                           (["quality", "--data", "x"], "no file or folder"),
                                           (["quality", "--data", ".", "--minutes", "1"], "--minutes 3"),
                                           (["train", "--rounds", "0"], "rounds must be"),
                                           (["train", "--peer", "nowhere"], "no model.py in"),
                                           (["train", "--preset", "cpu_3min", "--peer", "nowhere"], "no model.py in"),
                                           (["train", "--preset", "cpu_4"], "unknown preset 'cpu_4'")])
def test_errors(monkeypatch, argv, message):
    monkeypatch.setattr(sys, "argv", ["bench.py", *argv])
    monkeypatch.setattr(bench, "build_run", lambda *args, **changes: None)
    with pytest.raises(UserError) as found:
        bench.main()
    assert message in str(found.value)


def test_training_is_measured_where_compiling_is_impossible(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "train", "--preset", "cpu_3min", "--device", "cpu"])
    monkeypatch.setattr(bench, "why_not_compilable", lambda device: "no C++ compiler was found")
    monkeypatch.setattr(bench, "transformers_step", lambda *args: None)
    monkeypatch.setattr(bench, "matrix_seconds", lambda *args: 1.0)
    monkeypatch.setattr(bench, "time_interleaved", lambda steps, *args: dict.fromkeys(steps, 1.0))
    bench.main()
    output = capsys.readouterr()
    assert "no C++ compiler" in output.err
    assert "memory, eager: about" in output.out and "compiled" not in output.out


def test_out_of_memory_is_a_user_error(monkeypatch):
    def full(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(sys, "argv", ["bench.py", "sample"])
    monkeypatch.setattr(bench, "bench_sample", full)
    with pytest.raises(UserError, match="not enough memory\n.*smaller model"):
        bench.main()


def test_text_against_plain_implementation(run_in_process, capsys, monkeypatch):
    """Both implementations finish on the same text with the same number of tokens."""
    monkeypatch.setattr(bench, "PROCESSES", 1)
    stories = [{"story": story} for story in demo_stories.generate_stories(50)]
    Path("mine.json").write_text(json.dumps(stories), encoding="utf-8")
    tokens = []
    time_script = bench.time_script

    def look(script, *args):
        found = time_script(script, *args)
        if "shards" in args:
            tokens.append(sum(path.stat().st_size for path in Path(args[-2]).iterdir()) / 2)
        elif script == "preprocess.py":
            manifest = shards.read_manifest(Path(args[1], "tok4096"))
            tokens.append(manifest.total("train", "tokens") + manifest.total("val", "tokens"))
        return found
    monkeypatch.setattr(bench, "time_script", look)
    run_in_process("bench", "text", "--data", "mine.json", "--text_mb", 0.3, "--rounds", 1)
    assert tokens[0] == tokens[1] > 50_000
    assert capsys.readouterr().out.count("x the speed") == 2


def test_a_failed_contender_is_reported():
    with pytest.raises(UserError, match="no text in|no file or folder"):
        bench.time_script("train_vocab.py", "--data", "nowhere")


def test_scaling_needs_several_processes():
    assert_user_error(run_captured("bench_scale"), "torchrun --nproc_per_node=2 -m tools.bench_scale")
