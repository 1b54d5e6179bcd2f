"""Resume, start over or start from a checkpoint: checks, and the archive of an old run."""
from pathlib import Path

import pytest

from tinyllm.cli import UserError


def test_all_problems_are_reported_at_once(train_small):
    with pytest.raises(UserError) as error:
        train_small("out", "--dim", 33, "--learning_rate", -1, "--device", "abacus", "--beta2", 1.5, "--seed", 2**32,
                    "--max_minutes", "nan")
    for part in ("dim 33", "learning_rate must be at least 1e-30 and below inf, not -1", "abacus",
                 "beta2 must be at least 0 and below 1", "seed must be at least 0 and below 4294967296", "max_minutes"):
        assert part in str(error.value), part
    assert not Path("out").exists()
    with pytest.raises(UserError, match="sample_prompts .*not valid UTF-8"):
        train_small("out", "--sample_prompts", "caf\udce9")


@pytest.mark.parametrize("shape, says", [
    ({"n_layers": 2**31 - 1}, "n_layers must be"), ({"dim": 2 * 10**9, "n_heads": 10**8}, "not enough memory"),
    ({"hidden_dim": 2**31 - 1, "dim": 2 * 10**9, "n_heads": 10**8}, "not enough memory")])
def test_huge_model_is_refused_at_once(train_small, shape, says):
    with pytest.raises(UserError, match=says):
        train_small("out", "--n_kv_heads", 1, *(word for name, value in shape.items() for word in (f"--{name}", value)))
    assert not Path("out").exists()


def test_only_files_of_a_run_are_archived(train_small):
    """Other files in the folder, such as a converted model, stay."""
    Path("out").mkdir()
    Path("out/smol.pt").write_bytes(b"a model")
    Path("out/notes.txt").write_text("mine", encoding="utf-8")
    train_small("out", "--max_iters", 1)
    assert not Path("out/old-1").exists()
    train_small("out", "--max_iters", 2, "--seed", 2)
    assert Path("out/smol.pt").exists() and Path("out/notes.txt").exists()
    assert {path.name for path in Path("out/old-1").iterdir()} >= {"last.pt", "ckpt.pt", "log.jsonl", "clock.jsonl"}


def test_finished_run_names_the_command(train_small, run_in_process, capsys):
    train_small("out", "--max_iters", 2, "--learning_rate", 0.001)
    run_in_process("train", "--init_from", "resume", "--out_dir", "out")
    printed = capsys.readouterr().out
    assert "resume:     python train.py --init_from resume --out_dir out --max_iters 4\n" in printed


def test_missing_run_names_the_command(run_in_process):
    with pytest.raises(UserError, match="no checkpoint at .*mine.last.pt\n.*\n *start over: python train.py"):
        run_in_process("train", "--init_from", "resume", "--out_dir", "runs/mine")


def test_scratch_warns_that_it_starts_over(train_small, capsys):
    train_small("out", "--max_iters", 1, "--init_from", "scratch")
    assert "--init_from resume resumes this run" in capsys.readouterr().out


def test_start_over_names_no_damaged_checkpoint(train_small, run_in_process):
    train_small("out", "--max_iters", 2)
    for name, start in [("last.pt", "out.ckpt.pt"), ("ckpt.pt", "scratch")]:
        Path("out", name).write_bytes(b"damaged")
        with pytest.raises(UserError, match=f"last.pt .*damaged.*\n *start over: .*--init_from {start}$"):
            run_in_process("train", "--init_from", "resume", "--out_dir", "out")
