"""Other PyTorch releases: the oldest one, the note, safe loading, and the choice of quickstart.sh."""
import os
import re
import shutil
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.torch_version import TorchVersion

from tinyllm import checkpoint, compat
from tinyllm.cli import UserError


@pytest.fixture
def release(monkeypatch):
    """Pretend that this release of PyTorch is installed."""
    def pretend(version: str) -> None:
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        compat.check_pytorch.cache_clear()
    yield pretend
    compat.check_pytorch.cache_clear()


@pytest.mark.parametrize("version, process, notes", [("2.6.0+cu124", "0", 1), ("2.11.0", "0", 1), ("2.14.1", "0", 1),
                                                     ("2.11.0", "1", 0), ("2.13.0", "0", 0), ("2.13.0+cpu", "0", 0)])
def test_another_pytorch_gets_one_note(release, monkeypatch, capsys, version, process, notes):
    release(version)
    monkeypatch.setenv("RANK", process)
    for _ in range(2):
        compat.check_pytorch()
    assert capsys.readouterr().err == f"note: PyTorch {version}; the tests run with 2.13.0\n" * notes


def test_the_tested_pytorch_is_that_of_requirements():
    pinned = re.search(r"(?m)^torch==(.*)$", (ROOT / "requirements.txt").read_text(encoding="utf-8"))[1]
    assert pinned == compat.TESTED_PYTORCH


def test_cpu_features_of_older_releases(monkeypatch):
    new = compat.cpu_features()
    names = ("_is_avx2_supported", "_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported")
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(**{name: getattr(torch.cpu, name) for name in names}))
    old = compat.cpu_features()
    assert set(old) <= set(new) and all(old[name] == bool(new[name]) for name in old)


# ---- safe loading -------------------------------------------------------------------------------

STATE = {"model": OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.ones(3, dtype=torch.bfloat16)),
         "tokenizer": b"\0\1", "steps": [(1, 2.5), None, "x"], "rng": torch.zeros(8, dtype=torch.uint8)}


@pytest.mark.parametrize("is_zip", [True, False])
def test_structure_of_valid_files(is_zip):
    torch.save(STATE, "valid.pt", _use_new_zipfile_serialization=is_zip)
    compat.check_structure(Path("valid.pt"))
    assert list(compat.load_tensors(Path("valid.pt"), mmap=False)) == list(STATE)


def save_with_pickle(old: bytes, new: bytes) -> Path:
    """Write a file of torch.save with other bytes in its pickle."""
    torch.save({"model": torch.arange(6.0)}, "original.pt")
    with zipfile.ZipFile("original.pt") as original, zipfile.ZipFile("evil.pt", "w") as evil:
        for name in original.namelist():
            content = original.read(name)
            if name.endswith("data.pkl"):
                assert content.count(old) == 1
                content = content.replace(old, new)
            evil.writestr(name, content)
    return Path("evil.pt")


LENGTH, END = b"cpuq\x06K\x06", b"q\rs."               # of the 6 numbers; of the tensor and the dict
EVIL = {"longer": (LENGTH, b"cpuq\x06K\x07"), "shorter": (LENGTH, b"cpuq\x06K\x05"),
        "huge": (LENGTH, b"cpuq\x06J\xff\xff\xff\x7f"), "negative": (LENGTH, b"cpuq\x06J\xfa\xff\xff\xff"),
        "text": (LENGTH, b"cpuq\x06X\x01\0\0\x006"), "item of a tensor": (END, b"q\rK\0Kcss."),
        "items of a tensor": (END, b"q\r(K\0KcK\1Kcus.")}


@pytest.mark.parametrize("old, new", EVIL.values(), ids=EVIL)
def test_files_that_could_overwrite_memory_are_refused(old, new):
    """The two ways of CVE-2026-24747: declared lengths that differ from the data, and items set in tensors."""
    path = save_with_pickle(old, new)
    with pytest.raises((ValueError, TypeError)):
        compat.check_structure(path)
    with pytest.raises(UserError, match="evil.pt"):
        checkpoint.read_tensors(path)


def test_the_same_file_without_a_change_loads():
    path = save_with_pickle(LENGTH, LENGTH)
    compat.check_structure(path)
    assert checkpoint.read_tensors(path)["model"].tolist() == [0, 1, 2, 3, 4, 5]


# ---- quickstart.sh ------------------------------------------------------------------------------

PYTHON = """#!/bin/bash
# A Python that logs its arguments and makes copies of itself. TORCH: where a PyTorch that works is installed
case "$0" in *.venv*) where=venv;; *) where=system;; esac
echo "$where: $*" >> log
case "$*" in
    "-m tinyllm.compat") [[ "$TORCH" == *$where* ]] && echo "note: PyTorch 2.11.0";;
    *sys.prefix*) [[ "$KIND" != environment* ]];;
    *"import pip"*) [ "$KIND" != "environment without pip" ];;
    "-m venv --without-pip"*) cp "$0" .venv/bin/python;;
    "-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; [ "$KIND" != "no pip" ];;
esac
"""
OTHERS = "-m pip install --quiet numpy>=1.26 sentencepiece>=0.2.3 requests>=2.31 tqdm>=4.66"
ALL = "-m pip install --quiet -r requirements.txt"
SHARED = "system: -m venv --system-site-packages .venv"


@pytest.mark.skipif(os.name == "nt", reason="the Python of the test is a shell script")
@pytest.mark.parametrize("torch_in, kind, commands", [
    ("", "", ["system: -m venv .venv", f"venv: {ALL}"]),
    ("", "old .venv", [f"venv: {ALL}"]),
    ("venv", "old .venv", [f"venv: {OTHERS}"]),
    ("system", "old .venv", [f"venv: {ALL}"]),
    ("system and venv", "", [SHARED, f"venv: {OTHERS}"]),
    ("system and venv", "no pip", [SHARED, "system: -m venv --without-pip --system-site-packages .venv",
                                   f"venv: {OTHERS}"]),
    ("system", "environment", [f"system: {OTHERS}"])])
def test_quickstart_keeps_a_pytorch_that_works(tmp_path, torch_in, kind, commands):
    for path in (Path("bin/python3"), *([Path(".venv/bin/python")] if kind == "old .venv" else [])):
        path.parent.mkdir(parents=True)
        path.write_text(PYTHON, encoding="utf-8")
        path.chmod(0o755)
    for name in ("quickstart.sh", "requirements.txt"):
        shutil.copy(ROOT / name, name)
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "TORCH": torch_in, "KIND": kind}
    result = subprocess.run(["bash", "quickstart.sh", "--setup_only"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    log = Path("log").read_text(encoding="utf-8").splitlines()
    assert [line for line in log if ": -m venv" in line or ": -m pip" in line and "--index-url" not in line] == commands
    assert OTHERS not in commands[-1] or "--index-url" not in "".join(log)
    assert result.stdout.count("note: PyTorch 2.11.0\n") == (OTHERS in commands[-1])


@pytest.mark.skipif(os.name == "nt", reason="the Python of the test is a shell script")
def test_quickstart_explains_a_missing_pip(tmp_path):
    """As in an environment of uv."""
    Path("bin").mkdir()
    Path("bin/python3").write_text(PYTHON, encoding="utf-8")
    Path("bin/python3").chmod(0o755)
    for name in ("quickstart.sh", "requirements.txt"):
        shutil.copy(ROOT / name, name)
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "TORCH": "system", "KIND": "environment without pip"}
    result = subprocess.run(["bash", "quickstart.sh", "--setup_only"], env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and "python3 has no pip" in result.stderr and "-m ensurepip\n" in result.stderr
