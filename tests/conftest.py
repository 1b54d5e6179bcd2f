"""Shared by the tests: the scripts as functions and as processes, and a small project to train on."""
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"         # models are tiny here, and forks of several threads may hang
os.environ["CUDA_VISIBLE_DEVICES"] = ""             # tests are of the CPU, whose results are the same everywhere

import torch  # noqa: E402

import tokenizer  # noqa: E402
from extras import plots  # noqa: E402
from model import ModelArgs, Transformer  # noqa: E402
from tinyllm import (  # noqa: E402
    checkpoint,
    cli,
    demo_stories,
    words,
)
from tinyllm.files import atomic_write  # noqa: E402

torch.backends.mps.is_available = cache(lambda: False)      # nor Apple's; PyTorch's own is a cache too

TINY = ["--dim", "32", "--n_layers", "2", "--n_heads", "4", "--n_kv_heads", "2", "--max_seq_len", "32",
        "--batch_size", "4", "--gradient_accumulation_steps", "2", "--warmup_iters", "2", "--sample_tokens", "8",
        "--device", "cpu", "--log_interval", "1", "--compile", "False"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)


SAVE_PICTURE = plots.save


@pytest.fixture(autouse=True)
def pictures_without_ink(monkeypatch):
    """Drawing would take a third of the time of all tests; those of pictures put SAVE_PICTURE back."""
    def save(figure, path):
        with atomic_write(path):
            pass
    monkeypatch.setattr(plots, "save", save)


def module_name(name: str) -> str:
    """The module of a script, or of a tool."""
    return f"tools.{name}" if (ROOT / "tools" / f"{name}.py").exists() else name


@pytest.fixture
def call(monkeypatch):
    """Run a script's main() in this process: call("train", "--max_iters", 10)."""
    def run(name: str, *args) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        importlib.import_module(module_name(name)).main()
    return run


def count_words(texts) -> dict[bytes, int]:
    """The words of texts, with the space in front of them, and how often each comes."""
    found = words.WordCounts()
    for batch in words.text_batches(texts):
        found.add(batch)
    found.flush()
    return found.counts


def learn(texts, vocab_size: int) -> tokenizer.Tokenizer:
    """A vocabulary of texts, as step 1 makes it."""
    return tokenizer.train_tokenizer(count_words(texts), vocab_size)


def script(name: str, *args, **options) -> subprocess.CompletedProcess:
    """Run a script as a user does, in a process of its own."""
    return subprocess.run([sys.executable, str(ROOT / f"{name}.py"), *map(str, args)], capture_output=True,
                          encoding="utf-8", timeout=120, **options)


def quickly(name: str, *args) -> subprocess.CompletedProcess:
    """The same as `script`, in this process: it saves the seconds that the imports take."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n") for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        for kind, stream in zip(("stdout", "stderr"), streams):
            patch.setattr(sys, kind, stream)
        try:
            cli.run_script(importlib.import_module(module_name(name)).main)
            code = 0
        except SystemExit as end:
            code = 1
            print(end.code, file=sys.stderr)
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)        # run ends with a deaf process
    for stream in streams:
        stream.flush()
    return subprocess.CompletedProcess(args, code, *(stream.buffer.getvalue().decode() for stream in streams))


def assert_user_error(result: subprocess.CompletedProcess, *parts: str) -> None:
    """Status 1, a message that holds all parts, and no traceback."""
    assert result.returncode == 1, (result.returncode, result.stderr)
    assert "Traceback" not in result.stderr, result.stderr
    assert "\nerror: " in "\n" + result.stderr, result.stderr
    for part in parts:
        assert part in result.stderr, (part, result.stderr)


def assert_same(one, two, where="state") -> None:
    """Equal to the last bit, tensors and all."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            if key not in ("seconds", "setup"):     # the wall clock is the one thing that may differ
                assert_same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == two, where


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    """A data folder as steps 1 and 2 leave it: 300 stories, a vocabulary of 512, shards."""
    folder = tmp_path_factory.mktemp("project")
    with open(folder / "stories.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"story": story}) + "\n" for story in demo_stories.generate_stories(300))
    with pytest.MonkeyPatch.context() as patch:
        for name, args in [("train_vocab", ["--data", folder / "stories.jsonl", "--vocab_size", 512]),
                           ("preprocess", [])]:
            patch.setattr(sys, "argv", [f"{name}.py", "--data_dir", str(folder), *map(str, args)])
            importlib.import_module(name).main()
    return folder


@pytest.fixture(scope="session")
def bytewise(tmp_path_factory) -> Path:
    """A checkpoint whose vocabulary knows no Chinese, so that it must spell it in bytes."""
    torch.manual_seed(0)
    vocabulary = learn(["abc"], 300)
    model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=vocabulary.n_words))
    path = tmp_path_factory.mktemp("bytes") / "ckpt.pt"
    checkpoint.save_checkpoint(path, {**checkpoint.model_state(model), "iter_num": 0, "config": {}, "tokenizer": vocabulary.model,
                           "tokenizer_sha256": vocabulary.sha256})
    return path


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    """A folder with a small sound file of each kind: texts, vocabulary, shards, checkpoints, models in other forms."""
    from faults import fuzz
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("sound"))
        fuzz.make_files()
    return folder


def random_model(**shape) -> Transformer:
    """A model of two layers and a window of 24, whose random weights are large enough for its tokens to differ."""
    torch.manual_seed(1)
    model = Transformer(ModelArgs(**{"dim": 64, "n_layers": 2, "max_seq_len": 24, **shape})).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2) if weight.dim() > 1 else torch.nn.init.uniform_(weight, 0.5, 2)
    return model
