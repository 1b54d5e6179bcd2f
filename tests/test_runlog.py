"""The log of a run, and the archive of an old run after a kill at any point."""
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import assert_same, load_state, read_log

from tinyllm import checkpoint, runlog


class Killed(BaseException):
    pass


def die_after(n_moves: int) -> Callable[[Path, Path], None]:
    """Return an atomic_replace that is killed at its next call after n_moves."""
    moved = []

    def move(source: Path, target: Path) -> None:
        if len(moved) == n_moves:
            raise Killed
        moved.append(source)
        source.rename(target)
    return move


def write_folder(**files: str) -> None:
    Path("out").mkdir()
    for name, text in files.items():
        Path("out", name.replace("_", ".")).write_text(text, encoding="utf-8")


def contents(folder: str) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in Path(folder).iterdir() if path.is_file()}


@pytest.mark.parametrize("n_moves", range(5))
def test_interrupted_archive_is_finished(monkeypatch, n_moves):
    """A kill may stop the move of each of three files, the folder or the new checkpoint."""
    write_folder(last_pt="old", ckpt_pt="best", log_jsonl="log", new_pt="new", notes_txt="mine")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runlog, "atomic_replace", die_after(n_moves))
        runlog.archive_run("out")
    runlog.finish_archive("out")
    assert contents("out/old-1") == {"last.pt": "old", "ckpt.pt": "best", "log.jsonl": "log"}
    assert contents("out") == {"last.pt": "new", "notes.txt": "mine"}
    assert not Path("out", runlog.ARCHIVE_TMP).exists()


@pytest.mark.parametrize("old", ["last_pt", "ckpt_pt"])
def test_new_checkpoint_is_deleted_beside_the_old_run(old):
    write_folder(**{old: "old", "new_pt": "new"})
    runlog.finish_archive("out")
    assert list(contents("out").values()) == ["old"] and not Path("out/old-1").exists()


def test_a_new_checkpoint_alone_is_the_run():
    write_folder(new_pt="new")
    runlog.finish_archive("out")
    assert contents("out") == {"last.pt": "new"}


def test_failed_first_save_keeps_the_old_run(train_small, monkeypatch):
    train_small("out", "--max_iters", 2)
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(checkpoint, "save_checkpoint", full)
        train_small("out", "--max_iters", 2, "--seed", 5)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_kill_after_archiving_keeps_the_new_run(train_small, monkeypatch, capsys):
    """Includes a run that starts from the old run's weights, which the archive has moved."""
    command = ["out", "--max_iters", 2, "--init_from", "out/last.pt"]
    train_small("out", "--max_iters", 2)
    train_small("whole", "--max_iters", 2, "--init_from", "out/last.pt")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runlog, "atomic_replace", die_after(7))       # all but the new last.pt
        train_small(*command)
    assert not Path("out/last.pt").exists() and Path("out/old-1/last.pt").exists()
    runlog.finish_archive("out")
    train_small("out", "--init_from", "resume")
    assert load_state("out")["iter_num"] == 2 and load_state("out")["config"]["init_from"] == "out/last.pt"
    assert not Path("out", runlog.NEW_CHECKPOINT).exists() and not Path("out/old-2").exists()
    assert_same(load_state("out")["model"], load_state("whole")["model"])


def test_damaged_log_is_renamed(train_small, capsys):
    train_small("out", "--max_iters", 4)
    lines = Path("out/log.jsonl").read_text(encoding="utf-8").replace('"loss": ', '"loss": 1', 1)
    Path("out/log.jsonl").write_text(lines, encoding="utf-8")
    Path("out/clock.jsonl").write_text('{"iter": "x"}\n{"iter": 1}\n[]\n', encoding="utf-8")
    train_small("out", "--max_iters", 8)
    assert "log.jsonl is damaged or missing" in capsys.readouterr().out
    assert Path("out/log.damaged-1.jsonl").read_text(encoding="utf-8") == lines
    assert [entry["iter"] for entry in read_log("out")[1:]] == [5, 6, 7, 8, 8]       # and an evaluation
    assert [json.loads(line)["iter"] for line in Path("out/clock.jsonl").read_text().splitlines()] == [5, 6, 7, 8, 8]
