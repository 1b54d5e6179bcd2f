"""tools/compare.py: differing settings, and bpb interpolated between evaluations with known values."""
import json
import sys
from pathlib import Path

import pytest
from conftest import SAVE_PICTURE, TINY, assert_user_error, run_captured

from extras import plots
from tinyllm import checkpoint

SHORT = [*TINY, "--eval_interval", "1", "--max_iters"]


def write_run(folder: str, evaluations: list[tuple[int, float, float]], **config) -> None:
    """A log with evaluations at (tokens, minutes, bpb), 10 tokens a step; and between them steps, which count for
    nothing."""
    Path(folder).mkdir(parents=True)
    log = [{"config": {"seed": 1, **config}, "model_args": {"dim": 8}, "parameters": 12345}]
    clock = []
    for tokens, minutes, bpb in evaluations:
        log += [{"iter": tokens // 10, "loss": 9.0, "tokens": tokens},
                {"iter": tokens // 10, "val_loss": 2 * bpb, "bpb": bpb, "tokens": tokens, "samples": []}]
        clock += [{"iter": tokens // 10, "seconds": 60.0 * minutes - 1, "tokens_per_second": 100.0 + tokens},
                  {"iter": tokens // 10, "seconds": 60.0 * minutes}]
    for name, entries in ("log.jsonl", log), ("clock.jsonl", clock):
        Path(folder, name).write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")


def compare(*folders) -> dict[str, list[str]]:
    """Return the rows of all tables by their first column."""
    result = run_captured("compare", *folders)
    assert result.returncode == 0, result.stderr
    rows = [line.rsplit(maxsplit=len(folders)) for line in result.stdout.splitlines()]
    return {"all": result.stdout, **{row[0].strip(): row[1:] for row in rows if len(row) == len(folders) + 1}}


def test_interpolation_between_evaluations():
    write_run("a", [(100, 1, 2.0), (300, 2, 1.0)])
    write_run("b", [(150, 1.5, 3.0), (400, 4, 0.5), (600, 5, 0.25)], seed=2)
    rows = compare("a", "b")
    assert rows["150"] == ["*1.7500", "3.0000"] and rows["300"] == ["*1.0000", "1.5000"]
    assert rows["200"] == ["*1.5000", "2.5000"] and rows["250"] == ["*1.2500", "2.0000"]
    assert rows["1.50"] == ["*1.5000", "3.0000"] and rows["2.00"] == ["*1.0000", "2.5000"]
    assert not {"100", "400", "600", "1.00", "4.00", "5.00"} & rows.keys()
    assert rows["best val bpb"] == ["1.0000", "0.2500"] and rows["at tokens"] == ["300", "600"]
    assert rows["parameters"] == ["12,345", "12,345"] and rows["tokens/s, median"] == ["300", "500"]


def test_only_differing_settings_are_shown():
    write_run("a", [(100, 1, 2.0)], learning_rate=0.1, dim=1, gone=True)
    write_run("b", [(100, 1, 2.5)], learning_rate=0.2, dim=2, optimizer="muon")
    write_run("output/c", [(100, 1, 1.5)], learning_rate=0.1, optimizer="muon")
    rows = compare("a", "b", "output/c")
    assert rows["learning_rate"] == ["0.1", "0.2", "0.1"] and rows["optimizer"] == ["-", "'muon'", "'muon'"]
    assert rows["gone"] == ["True", "-", "-"] and not {"seed", "dim"} & rows.keys()     # dim: the model's own counts
    assert rows["100"] == ["2.0000", "2.5000", "*1.5000"]


def test_no_extrapolation_without_overlap():
    write_run("a", [(100, 1, 2.0), (200, 2, 1.0)])
    write_run("b", [(300, 2, 3.0), (400, 3, 0.5)])
    rows = compare("a", "b")
    assert "do not overlap in tokens" in rows["all"] and rows["2.00"] == ["*1.0000", "3.0000"]
    Path("a/clock.jsonl").unlink()
    printed = compare("a", "b")["all"]
    assert "do not overlap in tokens;" in printed and "do not overlap in minutes;" in printed


def test_errors():
    write_run("a", [(100, 1, 2.0), (200, 2, 1.0)])
    assert_user_error(run_captured("compare", "a"), "two or more runs", "python -m tools.compare output output/old-1")
    assert_user_error(run_captured("compare", "a", "b"), "no b", "log.jsonl")
    write_run("b", [])
    assert_user_error(run_captured("compare", "a", "b"), "has no evaluation")
    for content in ("", "{}\n", '{"config": 5}\n', "hello\n", '{"config": {}, "model_args": 5}\n'):
        Path("b/log.jsonl").write_text(content, encoding="utf-8")
        assert_user_error(run_captured("compare", "a", "b"), "not a log of train.py")


def test_damaged_log_is_read_up_to_the_damage():
    write_run("a", [(100, 1, 2.0), (200, 2, 1.0), (300, 3, 0.5)])
    write_run("b", [(100, 1, 2.0), (300, 3, 0.5)])
    lines = Path("a/log.jsonl").read_text(encoding="utf-8").splitlines()
    Path("a/log.jsonl").write_text("\n".join([*lines[:5], lines[5][:9], lines[6], ""]), encoding="utf-8")
    rows = compare("a", "b")
    assert rows["200"] == ["*1.0000", "1.2500"] and "300" not in rows
    Path("a/log.jsonl").write_text("\n".join([*lines[:5], '{"iter": 30, "val_loss": 1, "bpb": NaN, "tokens": 300}',
                                              '{"iter": 9%s, "bpb": 1, "tokens": 300}' % ("0" * 400),
                                              '{"iter": "x", "bpb": 1, "tokens": 300}', ""]), encoding="utf-8")
    assert "300" not in compare("a", "b")


def test_real_runs_and_an_archived_run(project):
    for args in (["1"], ["3", "--learning_rate", "0.1"]):
        assert run_captured("train", "--data_dir", project, *SHORT, *args).returncode == 0
    rows = compare("output", "output/old-1")
    folders = ("output", "output/old-1")
    want = {folder: checkpoint.load_checkpoint(f"{folder}/ckpt.pt")["best_val_loss"] for folder in folders}
    assert rows["learning_rate"] == ["0.1", "0.006"] and rows["max_iters"] == ["3", "1"] and "seed" not in rows
    logs = {folder: [json.loads(line) for line in Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines()]
            for folder in want}
    assert rows["best val bpb"] == [f"{min(e['bpb'] for e in logs[folder] if e.get('val_loss', 99) == best):.4f}"
                                    for folder, best in want.items()]
    assert [text.strip("*") for text in rows["256"]] == [f"{logs[folder][2]['bpb']:.4f}" for folder in want]
    assert "note: these runs have different text" not in rows["all"]


def test_different_data_gives_a_note(project, run_in_process):
    run_in_process("train_vocab", "--data", project / "stories.jsonl", "--vocab_size", 300, "--data_dir", "other")
    run_in_process("preprocess", "--data_dir", "other")
    for data, out in [(project, "a"), (project, "b"), ("other", "c")]:
        run_in_process("train", "--data_dir", data, "--out_dir", out, *SHORT, 1)
    assert "note: these runs have different text" not in compare("a", "b")["all"]
    assert "note: these runs have different text" in compare("a", "b", "c")["all"]


def test_plot_needs_matplotlib(monkeypatch):
    write_run("a", [(100, 1, 2.0), (300, 2, 1.0)])
    write_run("b", [(150, 1.5, 3.0), (400, 4, 0.5), (600, 5, 0.75)])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert "pip install matplotlib" in compare("a", "b")["all"] and not Path("output/compare.png").exists()
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: (drawn.append(figure), SAVE_PICTURE(figure, path)))
    compare("a", "b")
    assert Path("output/compare.png").read_bytes().startswith(b"\x89PNG")
    for panel, ends in zip(drawn[0].axes, ([300, 400], [2, 4])):
        stars = [(line.get_xdata()[0], line.get_ydata()[0]) for line in panel.lines if line.get_marker() == "*"]
        assert stars == [(ends[0], 1.0), (ends[1], 0.5)]
        assert [text.get_text() for text in panel.get_legend().get_texts()] == ["a, best 1.000", "b, best 0.500"]
