"""A sample of tests/faults, and a full disk at every file operation."""
import errno
import hashlib
import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_same
from faults.faults import FAULTS, Trial, attempt
from faults.inject import sitecustomize
from faults.stages import Stages

from tinyllm import checkpoint, shards
from tinyllm.files import atomic_write
from tinyllm.runlog import RunLog

FIRST, ENTRIES = {"config": {}}, [{"iter": i, "loss": 1 / i} for i in range(1, 4)]
DIGESTS = [hashlib.sha256("".join(f"{json.dumps(entry)}\n" for entry in ENTRIES[:n]).encode()).hexdigest()
           for n in range(4)]


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Stages:
    return Stages(tmp_path_factory.mktemp("faults") / "stages")


@pytest.mark.xdist_group("stages")          # so that one worker makes them for all
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("name, fault, breaks", [
    ("download", "kill_at", 2), ("download", "full", 1), ("vocabulary", "kill_at", 2), ("vocabulary", "read_only", 1),
    ("preprocess", "kill_at", 2), ("preprocess", "full", 1), ("preprocess", "clock", 1), ("train", "kill_at", 1)])
def test_rerun_gives_the_same_files(stages, tmp_path, name, fault, breaks):
    trial = Trial(stages[name], tmp_path / "trial", random.Random(f"{name} {fault}"))
    assert attempt(trial, FAULTS[fault], breaks) > 0, "the fault did not come before the end of the run"


@pytest.fixture
def full_at_each(monkeypatch, tmp_path):
    """Do something on a disk that is full from its first, second, ... operation on, with a check after each.

    With lasts=False only that operation fails, as where something small still fits; it may be one that does not matter.
    """
    def each(action: Callable[[], object], check: Callable[[], object], lasts: bool = True) -> None:
        with monkeypatch.context() as patch:
            disk = sitecustomize.install(patch.setattr, under=str(tmp_path))
            action()
        for at in range(1, disk.count + 1):
            fails = pytest.raises(OSError, match="No space left") if lasts else suppress(OSError)
            with monkeypatch.context() as patch, fails:
                sitecustomize.install(patch.setattr, under=str(tmp_path), at=at, how=errno.ENOSPC, lasts=lasts)
                action()
            check()
        action()
        assert disk.count > 3 and not list(tmp_path.glob("*.tmp"))
    return each


def test_a_full_disk_keeps_the_old_file(full_at_each):
    def write(content: bytes) -> None:
        with atomic_write("a.bin") as file:
            file.write(content * 20_000)
            file.write(content)

    def check() -> None:
        found = Path("a.bin").read_bytes()
        assert found in (b"old" * 20_001, b"new" * 20_001)
        write(b"old")
    full_at_each(lambda: write(b"new"), check)


@pytest.mark.parametrize("lasts", [True, False])
def test_a_full_disk_keeps_the_old_checkpoint(full_at_each, lasts):
    def state(step: int) -> dict:
        return {"architecture": "llama", "model": {f"w{i}": torch.full((50, 50), float(step)) for i in range(5)},
                "model_args": {}, "iter_num": step, "config": {}}

    def check() -> None:
        found = checkpoint.load_checkpoint("last.pt")
        assert found["iter_num"] in (1, 2)
        assert_same(found, state(found["iter_num"]))
        checkpoint.save_checkpoint("last.pt", state(1))
    full_at_each(lambda: checkpoint.save_checkpoint("last.pt", state(2)), check, lasts)


def test_a_full_disk_keeps_the_old_manifest(full_at_each, project, tmp_path):
    manifest = replace(shards.read_manifest(project / "tok512"), folder=tmp_path)
    old, new = replace(manifest, val_threshold=1), replace(manifest, val_threshold=2)

    def check() -> None:
        assert shards.read_manifest(tmp_path) in (old, new)
        old.save()
    full_at_each(new.save, check)


def test_full_disk_keeps_log_lines_of_the_checkpoint(full_at_each, tmp_path):
    """A resumed run never loses the two entries on the disk, wherever the third write fails."""
    def begin() -> None:
        record = RunLog(tmp_path, FIRST)
        for entry in ENTRIES[:2]:
            record.write(entry, {"seconds": 1.0})
        record.sync()

    def go_on() -> None:
        record = RunLog(tmp_path, FIRST, 2, DIGESTS[2])
        record.write(ENTRIES[2], {"seconds": 1.0})
        record.sync()

    def check() -> None:
        assert RunLog(tmp_path, FIRST, 2, DIGESTS[2]).entries == ENTRIES[:2]
    begin()
    full_at_each(go_on, check)
    assert RunLog(tmp_path, FIRST, 3, DIGESTS[3]).entries == ENTRIES
