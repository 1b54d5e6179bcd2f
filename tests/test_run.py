"""A run: non-finite numbers, memory errors, locks and old versions."""
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, assert_user_error, load_state, read_log, run_captured

import train
from model import Transformer
from tinyllm import checkpoint, files, stops
from tinyllm.cli import UserError
from tinyllm.distributed import DistributedContext
from tinyllm.files import folder_lock
from tinyllm.run import TrainState, oom_advice


def run_after_steps(losses: list[float], norms: list[float] | None = None, scale: float | None = None
                    ) -> SimpleNamespace:
    """Return a run as read_pending_metrics needs it, after one step for each loss."""
    scaler = SimpleNamespace(is_enabled=lambda: scale is not None, get_scale=lambda: scale)
    pairs = zip(losses, norms or [1.0] * len(losses))
    return SimpleNamespace(
        cfg=SimpleNamespace(out_dir="out", learning_rate=0.1), windows_per_step=8,
        state=TrainState(iter_num=len(losses), position=8 * len(losses)), scaler=scaler, last_saved_step=0,
        ranks=DistributedContext(),
        pending_metrics=[(torch.tensor(loss), torch.tensor(norm)) for loss, norm in pairs])


@pytest.mark.parametrize("losses, norms", [([3.0, math.nan, 2.0, 2.0], None), ([3.0, 3.0, 2.0], [1, math.inf, 1])])
def test_first_non_finite_step_is_named(losses, norms):
    with pytest.raises(UserError, match="step 2: .*\n.*resume from step 0 "):
        stops.read_pending_metrics(run_after_steps(losses, norms))


def test_scaler_may_skip_before_the_run_stops():
    assert stops.read_pending_metrics(run_after_steps([3.0, 2.0], [math.inf, math.inf], scale=64.0)) == [2.0, math.inf]
    with pytest.raises(UserError, match="step 1"):
        stops.read_pending_metrics(run_after_steps([3.0, 2.0], [math.inf, math.inf], scale=0.5))


def test_step_between_log_lines_is_named(train_small, monkeypatch):
    step = train.train_step

    def nan_at_step_5(run, batches):
        lr, loss, norm = step(run, batches)
        return lr, loss * math.nan if run.state.iter_num == 5 else loss, norm
    monkeypatch.setattr(train, "train_step", nan_at_step_5)
    with pytest.raises(UserError, match="step 5: .*\n.*resume from step 4 "):
        train_small("out", "--max_iters", 20, "--eval_interval", 4, "--log_interval", 20)
    assert load_state("out")["iter_num"] == 4


def test_older_versions_are_readable(train_small):
    """Older versions logged loss spikes and stored averages in the state."""
    train_small("out", "--max_iters", 4)
    spike = {"iter": 4, "jump": 9.0, "usual": 3.0, "windows": [24, 31]}
    log = Path("out/log.jsonl").read_text(encoding="utf-8") + json.dumps(spike) + "\n"
    Path("out/log.jsonl").write_text(log, encoding="utf-8")
    saved = load_state("out")
    digest = hashlib.sha256("".join(log.splitlines(keepends=True)[1:]).encode()).hexdigest()
    older = {"usual_loss": 3.0, "usual_rise": 0.1, "log_lines": len(log.splitlines()) - 1, "log_sha256": digest}
    checkpoint.save_checkpoint("out/last.pt", {**saved, "state": {**saved["state"], **older}})
    train_small("out", "--max_iters", 6)
    assert load_state("out")["iter_num"] == 6 and "usual_loss" not in load_state("out")["state"]
    assert spike in read_log("out") and not list(Path("out").glob("log.damaged*"))


def test_non_finite_weights_are_not_saved(train_small, monkeypatch):
    train_small("out", "--max_iters", 4, "--eval_interval", 2)
    before = {name: Path("out", name).read_bytes() for name in ("last.pt", "ckpt.pt")}
    step = train.train_step

    def step_to_infinity(run, batches):
        metrics = step(run, batches)
        with torch.no_grad():
            run.model.norm.weight[0] = math.inf
        return metrics
    monkeypatch.setattr(train, "train_step", step_to_infinity)
    with pytest.raises(UserError, match="norm.weight has values.*not saved\n.*step 4 "):
        train_small("out", "--max_iters", 5, "--eval_interval", 2)
    assert before == {name: Path("out", name).read_bytes() for name in before}


def test_out_of_memory_names_smaller_micro_batches(train_small, monkeypatch):
    train_small("out", "--max_iters", 4)
    forward = Transformer.forward

    def too_large(model, tokens, targets=None):
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, tokens, targets)
    monkeypatch.setattr(Transformer, "forward", too_large)
    with pytest.raises(UserError, match="not enough memory\n.*:\n *--batch_size 2 --gradient_accumulation_steps 4$"):
        train_small("out", "--max_iters", 8)
    train_small("out", "--max_iters", 8, "--batch_size", 2, "--gradient_accumulation_steps", 4)
    assert load_state("out")["iter_num"] == 8 and load_state("out")["state"]["position"] == 64


@pytest.mark.parametrize("batch_size, steps, advice", [
    (32, 1, "--batch_size 16 --gradient_accumulation_steps 2"), (1, 8, "--max_seq_len"),
    (15, 4, "--batch_size 5 --gradient_accumulation_steps 12"),
    (7, 1, "--batch_size 1 --gradient_accumulation_steps 7")])
def test_smaller_batches_keep_the_steps(batch_size, steps, advice):
    cfg = SimpleNamespace(batch_size=batch_size, gradient_accumulation_steps=steps, eval_only=False)
    assert advice in oom_advice(cfg)
    cfg.eval_only = True
    assert "gradient_accumulation_steps" not in oom_advice(cfg)


# ---- one process at a time ----------------------------------------------------------------------

def test_lock_refuses_a_second_process_and_ends_with_it(project):
    command = [sys.executable, str(ROOT / "train.py"), "--data_dir", str(project), "--out_dir", "out", *TINY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as first:
        next(line for line in first.stdout if line.startswith("step 2"))
        second = run_captured("train", "--data_dir", project, "--out_dir", "out", *TINY, "--max_iters", 2)
        assert_user_error(second, "another process is writing to", "out")
        first.kill()
        first.stdout.read()             # until it ends: on Windows, Popen starts a parent of the process
    with folder_lock("out"):
        pass


@pytest.fixture(params=["here", "Windows"])
def locks(request, monkeypatch):
    """The locks of this system, and on Linux and macOS also the file locks of Windows."""
    if request.param == "Windows":
        fcntl = pytest.importorskip("fcntl")
        how = fcntl.LOCK_EX | fcntl.LOCK_NB
        msvcrt = SimpleNamespace(LK_NBLCK=how, locking=lambda handle, how, _: fcntl.flock(handle, how))
        monkeypatch.setattr(files, "fcntl", None)
        monkeypatch.setattr(files, "msvcrt", msvcrt, raising=False)


def test_locks_are_per_folder_and_leave_no_files(locks):
    with folder_lock("a/b"), folder_lock("c"):
        with pytest.raises(UserError, match="another process"), folder_lock("c"):
            pass
        Path("c/file").touch()
    assert not Path("a/b").exists() and [path.name for path in Path("c").iterdir()] == ["file"]


# ---- resuming -----------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    {"optimizer": []}, {"optimizer": {}},
    {"scaler": {"scale": 1}, "rng": {}}, {"rng": {"cpu": 3, "cuda": []}}, {"config": {"batch_size": "four"}},
    {"format": 99}, {"model_args": {"dim": 10**12}}, {"model_args": {"n_layers": 10**9}}])
def test_other_version_is_a_user_error(train_small, change):
    train_small("out", "--max_iters", 2)
    saved = load_state("out")
    for key, value in change.items():
        saved[key] = {**saved[key], **value} if key in ("config", "model_args") else value
    checkpoint.save_checkpoint("out/last.pt", saved)
    before = Path("out/last.pt").read_bytes()
    with pytest.raises(UserError):
        train_small("out", "--max_iters", 4, "--init_from", "resume")
    assert Path("out/last.pt").read_bytes() == before


def test_optimizer_settings_may_change_on_resume(train_small):
    train_small("out", "--max_iters", 2)
    train_small("out", "--max_iters", 4, "--init_from", "resume", "--weight_decay", 0.7)
    assert load_state("out")["optimizer"][0]["param_groups"][0]["weight_decay"] == 0.7
