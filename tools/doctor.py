"""Check the machine and the files of the four steps, and print the next command. Writes nothing.

    python -m tools.doctor
    python -m tools.doctor --data_dir data/tuned --out_dir output/tuned
"""
import math
import platform
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))         # for python tools/doctor.py
from tinyllm import checkpoint, cli
from tinyllm.cli import UserError, escape_control_chars, format_command
from tinyllm.device import choose_backend, why_no_compiler, why_no_headers
from tinyllm.files import sha256
from tinyllm.machine import available_cores, free_memory
from tinyllm.project import find_tokenizer, load_tokenizer, path_flags, tokenizer_files
from tinyllm.shards import load_shards

# ---- settings -----------------------------------------------------------------------------------
data_dir = "data"                   # output folder of steps 1 and 2
out_dir = "output"                  # output folder of step 3
vocab_size = 0                      # vocabulary size to check; 0: the run's, otherwise the first with shards
device = "auto"                     # auto, cpu, cuda, cuda:1, mps
# ---- end of settings ----------------------------------------------------------------------------

PACKAGES = ("numpy", "sentencepiece", "requests", "tqdm", "matplotlib", "safetensors", "tokenizers", "tiktoken", "gguf")


def main() -> None:
    cfg, overrides = cli.parse_settings(globals())
    print(f"python          {platform.python_version()} on {platform.platform()}, {platform.machine()}")
    print(f"packages        torch {torch.__version__}, {', '.join(map(describe_package, PACKAGES))}")
    report("device", describe_device, cfg)
    memory = free_memory()
    free = "unknown" if memory is None else f"{memory / 1e9:.1f} GB"
    print(f"free            memory: {free}, disk: {shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB")
    steps = {"train_vocab": describe_tokenizer, "preprocess": describe_shards, "train": describe_run,
             "sample": describe_best}
    failed = [step for step, describe in steps.items() if not report(f"{step}.py", describe, cfg)]
    print(f"next: {next_command(failed[0] if failed else '', cfg, overrides)}")


def report(name: str, describe: Callable[[SimpleNamespace], str], cfg: SimpleNamespace) -> bool:
    """Print a description or the problem. Return True if there is no problem."""
    try:
        print(escape_control_chars(f"{name:15} {describe(cfg)}"))
        return True
    except Exception as error:              # any error: the other checks still run
        print(escape_control_chars(f"{name:15} problem: {error}".splitlines()[0]))
        return False


def next_command(failed_step: str, cfg: SimpleNamespace, overrides: dict[str, Any]) -> str:
    """Return the command of the first step whose files are missing, damaged or unfinished."""
    out_dir = overrides.get("out_dir")
    if not failed_step:
        return format_command("sample", checkpoint=Path(cfg.out_dir) / "ckpt.pt")
    if failed_step == "train_vocab":
        return format_command("train_vocab", data_dir=overrides.get("data_dir"), vocab_size=overrides.get("vocab_size"))
    flags = path_flags(choose_tokenizer(cfg))
    if failed_step == "preprocess":
        return format_command("preprocess", **flags)
    if (Path(cfg.out_dir) / "last.pt").exists():
        return format_command("train", init_from="resume", out_dir=out_dir)
    is_cpu = choose_backend(cfg.device).device.type == "cpu"
    return format_command("train", **flags, out_dir=out_dir, preset="cpu_3min" if is_cpu else "")


# ---- the machine and the files ------------------------------------------------------------------

def describe_package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def describe_device(cfg: SimpleNamespace) -> str:
    return (f"{choose_backend(cfg.device)}; {available_cores()} cores; "
            f"C++ compiler: {why_no_compiler() or why_no_headers() or 'found'}")


def choose_tokenizer(cfg: SimpleNamespace) -> Path:
    """Return the tokenizer of vocab_size; for 0, the run's, otherwise the first with shards."""
    paths = tokenizer_files(Path(cfg.data_dir))
    if cfg.vocab_size or not paths:
        return find_tokenizer(cfg.data_dir, cfg.vocab_size)
    digest = ""
    with suppress(UserError):
        digest = checkpoint.load_checkpoint(Path(cfg.out_dir) / "last.pt", mmap=True).get("tokenizer_sha256", "")
    return next((path for path in paths if sha256(path) == digest), paths[0])


def describe_tokenizer(cfg: SimpleNamespace) -> str:
    path = choose_tokenizer(cfg)
    return f"{path}: {load_tokenizer(path).vocab_size:,} tokens"


def describe_shards(cfg: SimpleNamespace) -> str:
    path = choose_tokenizer(cfg)
    data = load_shards(path.with_suffix(""), sha256(path))
    return f"{data.folder}: {data.total('train', 'tokens'):,} + {data.total('val', 'tokens'):,} tokens of train and val"


def describe_run(cfg: SimpleNamespace) -> str:
    """Describe the latest checkpoint. Raises UserError if the run has not finished."""
    path = Path(cfg.out_dir) / "last.pt"
    ckpt = checkpoint.load_checkpoint(path, checkpoint.REQUIRED_TO_RESUME, mmap=True)
    config = ckpt["config"]
    length = f"max_iters {config['max_iters']}, max_minutes {config['max_minutes']}"
    is_finished = ckpt["iter_num"] >= config["max_iters"] or 0 < 60 * config["max_minutes"] <= ckpt["state"]["seconds"]
    if not is_finished:
        raise UserError(f"{path}: step {ckpt['iter_num']:,}, not finished ({length})")
    return f"{path}: step {ckpt['iter_num']:,}, finished ({length})"


def describe_best(cfg: SimpleNamespace) -> str:
    path = Path(cfg.out_dir) / "ckpt.pt"
    ckpt = checkpoint.load_checkpoint(path, mmap=True)
    n_params = checkpoint.build_model(ckpt, copy_weights=False, source=path).count_parameters()
    loss = ckpt.get("best_val_loss", math.nan)
    return f"{path}: step {ckpt['iter_num']:,}, val loss {loss:.4f}, {n_params:,} parameters"


if __name__ == "__main__":
    cli.run_script(main)
