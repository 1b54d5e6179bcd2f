"""Fixtures and helpers: scripts as functions and as processes, small data, trained models."""
import atexit
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"         # models are tiny here, and forks of several threads may hang
os.environ["AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL"] = "O0"         # a third of the time to compile a layer
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"        # saves compiling a program for each kind of vector instruction
WANTS_GPU = "--gpu" in [*sys.argv, *os.environ.get("PYTEST_ADDOPTS", "").split()] or "GPU_TESTS" in os.environ
if WANTS_GPU:
    os.environ["GPU_TESTS"] = "1"                   # for pytest-xdist's workers, which have other arguments
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""         # tests are of the CPU, whose results are the same everywhere

import torch  # noqa: E402

import tokenizer  # noqa: E402
import train  # noqa: E402
from extras import plots  # noqa: E402
from extras.formats import common  # noqa: E402
from extras.tokenizers import JsonTokenizer  # noqa: E402
from model import ModelArgs, Transformer  # noqa: E402
from tinyllm import (  # noqa: E402
    checkpoint,
    cli,
    demo_stories,
    device,
    documents,
    resume,
    words,
)
from tinyllm.files import atomic_write  # noqa: E402
from tinyllm.run import TrainRun  # noqa: E402

if not WANTS_GPU:
    torch.backends.mps.is_available = cache(lambda: False)      # nor Apple's; PyTorch's own is a cache too

WORDS = "the and ing test sentence is a This user system assistant \n\n 123 é 中".split(" ")
TINY = ["--dim", "32", "--n_layers", "2", "--n_heads", "4", "--n_kv_heads", "2", "--max_seq_len", "32",
        "--batch_size", "4", "--gradient_accumulation_steps", "2", "--warmup_iters", "2", "--sample_tokens", "8",
        "--device", "cpu", "--log_interval", "1", "--compile", "False"]


SAVE_PICTURE = plots.save


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run only the tests that need a GPU")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU, so it runs only with --gpu")
    if WANTS_GPU and not find_gpu():
        raise pytest.UsageError(f"--gpu: PyTorch {torch.__version__} finds no GPU; expected CUDA or Apple's MPS")


def pytest_collection_modifyitems(config, items):
    """Run the tests with the marker gpu, or all others."""
    is_chosen = {item: bool(item.get_closest_marker("gpu")) == WANTS_GPU for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not is_chosen[item]])
    items[:] = [item for item in items if is_chosen[item]]


def find_gpu() -> str:
    """Return the kind of GPU that PyTorch can use, or ""."""
    return next((kind for kind in ("cuda", "mps") if device.device_count(kind)), "")


def save_empty_picture(figure, path):
    with atomic_write(path):
        pass


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Run each test in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    """Skip drawing, a third of the time of all tests; tests of pictures put SAVE_PICTURE back."""
    monkeypatch.setattr(plots, "save", save_empty_picture)


def module_name(name: str) -> str:
    """Return the module of a script or of a tool."""
    return f"tools.{name}" if (ROOT / "tools" / f"{name}.py").exists() else name


def run_main(name: str, *args) -> None:
    """Run a script's main() in this process: run_main("train", "--max_iters", 10)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        importlib.import_module(module_name(name)).main()


@pytest.fixture
def run_in_process():
    """Run a script's main() in this process, with the working directory of the test."""
    return run_main


def count_words(texts) -> dict[bytes, int]:
    """Count the words of texts, each with its leading space."""
    found = words.WordCounts()
    encoded = [text.encode() for text in texts]
    for batch in documents.group_by_size(encoded, len, documents.BATCH_BYTES):
        found.add(batch)
    found.flush()
    return found.counts


def learn_tokenizer(texts, vocab_size: int) -> tokenizer.Tokenizer:
    """Train a tokenizer on texts, as step 1 does."""
    return tokenizer.train_tokenizer(count_words(texts), vocab_size)


def run_subprocess(name: str, *args, **options) -> subprocess.CompletedProcess:
    """Run a script as a user does, in a process of its own."""
    return subprocess.run([sys.executable, str(ROOT / f"{name}.py"), *map(str, args)], capture_output=True,
                          encoding="utf-8", timeout=120, **options)


def start_script(name: str, *args, **options) -> subprocess.Popen:
    """Start a script in a process of its own: on Linux a fork of this one, which saves the seconds of the imports."""
    import torch._dynamo  # noqa: F401    the optimizers do; once here is faster than in each fork
    command = [sys.executable, str(ROOT / f"{name}.py"), *map(str, args)]
    fork = partial(run_in_fork, name, args) if sys.platform == "linux" else None
    return subprocess.Popen(command, preexec_fn=fork, encoding="utf-8", **options)


def run_in_fork(name: str, args: tuple) -> None:
    """Run a script in the new process, where Popen would execute a program."""
    os.closerange(3, 1024)              # Popen waits until its error pipe is closed
    sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")
    sys.stderr = open(2, "w", encoding="utf-8")
    sys.argv = [f"{name}.py", *map(str, args)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)           # as in each new Python
    atexit._clear()
    status = 1
    try:
        cli.run_script(importlib.import_module(module_name(name)).main)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if status != end.code:
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    with suppress(OSError):
        sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(status)


def run_captured(name: str, *args) -> subprocess.CompletedProcess:
    """Run a script in this process, which saves the seconds of the imports."""
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
            signal.signal(signal.SIGINT, signal.default_int_handler)        # run_script ignores SIGINT at its end
    for stream in streams:
        stream.flush()
    return subprocess.CompletedProcess(args, code, *(stream.buffer.getvalue().decode() for stream in streams))


def assert_user_error(result: subprocess.CompletedProcess, *parts: str) -> None:
    """Check for status 1, a message that holds all parts, and no traceback."""
    assert result.returncode == 1, (result.returncode, result.stderr)
    assert "Traceback" not in result.stderr, result.stderr
    assert "\nerror: " in "\n" + result.stderr, result.stderr
    for part in parts:
        assert part in result.stderr, (part, result.stderr)


def assert_same(one, two, where="state") -> None:
    """Check that two values are equal to the bit, tensors included."""
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
    run_main("train_vocab", "--data", folder / "stories.jsonl", "--vocab_size", 512, "--data_dir", folder)
    run_main("preprocess", "--data_dir", folder)
    return folder


@pytest.fixture(scope="session")
def ckpt(project, tmp_path_factory) -> Path:
    """A checkpoint after 30 steps, with its log beside it."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", save_empty_picture)
        run_main("train", "--data_dir", project, "--out_dir", out, *TINY, "--max_iters", 30, "--learning_rate", 0.02)
    return out / "ckpt.pt"


@pytest.fixture
def train_small(run_in_process, project):
    """Train on the small project: train_small("out", "--max_iters", 10)."""
    def run(out: str, *args) -> None:
        run_in_process("train", "--data_dir", project, "--out_dir", out, *TINY, *args)
    return run


@pytest.fixture
def planned_run(project, monkeypatch):
    """Build a TrainRun from command line settings, as main() does."""
    def build(*args) -> TrainRun:
        cfg, given = cli.parse_settings(vars(train), ["--data_dir", str(project), *TINY, *map(str, args)])
        return TrainRun(resume.plan_run(cfg, given))
    return build


def load_state(out: str, name: str = "last.pt") -> dict:
    return checkpoint.load_checkpoint(Path(out) / name)


def read_log(out: str) -> list[dict]:
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_same_run(one: str, two: str) -> None:
    assert_same(load_state(one), load_state(two))
    assert Path(one, "log.jsonl").read_bytes() == Path(two, "log.jsonl").read_bytes()
    assert Path(one, "samples.txt").read_bytes() == Path(two, "samples.txt").read_bytes()


@pytest.fixture(scope="session")
def byte_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint whose vocabulary knows no Chinese, so that it must spell it in bytes."""
    torch.manual_seed(0)
    vocabulary = learn_tokenizer(["abc"], 300)
    model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=vocabulary.n_words))
    path = tmp_path_factory.mktemp("bytes") / "ckpt.pt"
    checkpoint.save_checkpoint(path, {**checkpoint.model_state(model), "iter_num": 0, "config": {},
                                      "tokenizer": vocabulary.model, "tokenizer_sha256": vocabulary.sha256})
    return path


@pytest.fixture(scope="session")
def byte_level() -> JsonTokenizer:
    """A byte-level tokenizer.json with the special tokens of ChatML."""
    letters = common.byte_letters()
    words = ["".join(letters[byte] for byte in f"{gap}{word}".encode()[:n])
             for word in WORDS for gap in ("", " ") for n in range(1, 12)]
    entries = list(dict.fromkeys([*letters, *sorted(words, key=len), "<|im_start|>", "<|im_end|>"]))
    ids = {text: i for i, text in enumerate(entries)}
    special = {name: ids[name] for name in ("<|im_start|>", "<|im_end|>")}
    merges = common.merges_of(entries[256:-2], ids)
    content = common.byte_level_json(ids, merges, special, common.GPT2, single_digits=True)
    return JsonTokenizer(common.tokenizer_json_with_meta(content, "<|im_start|>", "<|im_end|>", add_bos=False))


@pytest.fixture(scope="session")
def valid_files(tmp_path_factory) -> Path:
    """A folder with a small valid file of each kind: texts, tokenizer, shards, checkpoints, models in other formats."""
    from faults import fuzz
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("valid"))
        fuzz.make_files()
    return folder


def random_model(**shape) -> Transformer:
    """A model of two layers and a window of 24, whose random weights are large enough for its tokens to differ."""
    torch.manual_seed(1)
    model = Transformer(ModelArgs(**{"dim": 64, "n_layers": 2, "max_seq_len": 24, **shape})).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2) if weight.dim() > 1 else torch.nn.init.uniform_(weight, 0.5, 2)
    return model
