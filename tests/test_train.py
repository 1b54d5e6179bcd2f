"""Training: resumed runs equal uninterrupted runs, and the settings work as documented."""
import itertools
import json
import math
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    SAVE_PICTURE,
    TINY,
    assert_same,
    assert_same_run,
    assert_user_error,
    load_state,
    read_log,
    run_captured,
)

import train
from extras import plots
from tinyllm import checkpoint, estimate, run
from tinyllm.cli import UserError


@pytest.mark.parametrize("options", [
    ["--eval_interval", "5"], ["--eval_interval", "7", "--dropout", "0.2"], ["--eval_interval", "1000"],
    ["--dtype", "float32", "--batch_size", "3", "--log_interval", "4", "--eval_interval", "20"]])
def test_resumed_run_equals_uninterrupted_run(train_small, options):
    train_small("whole", "--max_iters", 20, "--lr_decay_iters", 20, *options)
    train_small("parts", "--max_iters", 10, "--lr_decay_iters", 20, *options)
    train_small("parts", "--init_from", "resume", "--max_iters", 20, *options)
    assert_same_run("whole", "parts")
    batch_size = int(dict(zip(options, options[1:])).get("--batch_size", 4))
    assert load_state("whole")["state"]["position"] == 20 * 2 * batch_size


def test_evaluation_interval_does_not_change_weights(train_small):
    train_small("often", "--max_iters", 6, "--eval_interval", 1, "--dropout", 0.1)
    train_small("never", "--max_iters", 6, "--eval_interval", 100, "--dropout", 0.1, "--sample_tokens", 0)
    assert_same(load_state("often")["model"], load_state("never")["model"])
    assert_same(load_state("often")["optimizer"], load_state("never")["optimizer"])


class Killed(BaseException):
    pass


def test_kill_and_rerun_equals_uninterrupted_run(train_small, monkeypatch):
    """Die right after step 7, with checkpoints at steps 2, 4 and 6; the same command resumes."""
    train_small("whole", "--max_iters", 10, "--eval_interval", 2)
    step, count = train.train_step, 0

    def dies(*args):
        nonlocal count
        count += 1
        if count == 8:
            raise Killed
        return step(*args)
    monkeypatch.setattr(train, "train_step", dies)
    with pytest.raises(Killed):
        train_small("parts", "--max_iters", 10, "--eval_interval", 2)
    assert read_log("parts")[-1]["iter"] == 7 and load_state("parts")["iter_num"] == 6
    monkeypatch.setattr(train, "train_step", step)
    train_small("parts", "--max_iters", 10, "--eval_interval", 2)
    assert_same_run("whole", "parts")
    assert_same(load_state("whole", "ckpt.pt"), load_state("parts", "ckpt.pt"))
    clocks = [json.loads(line)["iter"] for line in Path("parts/clock.jsonl").read_text(encoding="utf-8").splitlines()]
    assert clocks == sorted(clocks) and clocks[-1] == 10


def test_rerun_resumes_or_reports_finished(train_small, capsys):
    train_small("out", "--max_iters", 3)
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    capsys.readouterr()
    train_small("out", "--max_iters", 3)
    assert "finished" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_length_and_machine_may_change_on_resume(train_small, capsys):
    train_small("out", "--max_iters", 3)
    train_small("out", "--max_iters", 5, "--log_interval", 2, "--num_workers", 1)
    assert load_state("out")["iter_num"] == 5 and [e["iter"] for e in read_log("out")[1:]] == [1, 2, 3, 4, 5]
    assert not Path("out/old-1").exists()


@pytest.mark.parametrize("change", [["--learning_rate", 0.1], ["--dim", 64], ["--seed", 2]])
def test_other_settings_start_a_new_run_and_archive_the_old(train_small, capsys, change):
    train_small("out", "--max_iters", 3)
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    capsys.readouterr()
    train_small("out", "--max_iters", 2, *change)
    printed = capsys.readouterr().out
    assert f"{change[0][2:]} " in printed and f"(now {change[1]})" in printed and "old-1" in printed
    assert {path.name: path.read_bytes() for path in Path("out/old-1").iterdir()} == before
    assert load_state("out")["iter_num"] == 2


def test_error_keeps_the_old_run_in_place(train_small):
    train_small("out", "--max_iters", 3)
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    with pytest.raises(UserError, match="dim 33"):
        train_small("out", "--dim", 33)
    with pytest.raises(UserError, match="has dim 32, which cannot change"):
        train_small("out", "--init_from", "resume", "--max_iters", 9, "--dim", 64)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_damaged_checkpoint_is_an_error(train_small):
    train_small("out", "--max_iters", 1)
    Path("out/last.pt").write_bytes(Path("out/last.pt").read_bytes()[:-100])
    with pytest.raises(UserError, match="last.pt .* damaged"):
        train_small("out", "--max_iters", 3)


def test_resume_uses_the_settings_of_the_run(run_in_process, project, capsys):
    run_in_process("train", "--data_dir", project, "--out_dir", "out", *TINY, "--max_iters", 2, "--learning_rate", 1e-3)
    run_in_process("train", "--out_dir", "out", "--init_from", "resume", "--max_iters", 4)
    assert load_state("out")["config"]["learning_rate"] == 1e-3 and load_state("out")["config"]["dim"] == 32
    assert load_state("out")["iter_num"] == 4
    last = load_state("out")             # of an earlier version
    for compile in ("False", "auto"):
        checkpoint.save_checkpoint("out/last.pt", {**last, "config": {**last["config"], "compile": compile}})
        run_in_process("train", "--out_dir", "out", "--init_from", "resume", "--max_iters", 5)
        assert load_state("out")["iter_num"] == 5


def test_scratch_archives_the_old_run(train_small):
    train_small("out", "--max_iters", 2)
    old = Path("out/last.pt").read_bytes()
    train_small("out", "--max_iters", 3, "--init_from", "scratch")
    train_small("out", "--max_iters", 4, "--init_from", "scratch")
    assert Path("out/old-1/last.pt").read_bytes() == old and Path("out/old-1/log.jsonl").exists()
    assert load_state("out/old-2")["iter_num"] == 3 and load_state("out")["iter_num"] == 4


def test_checkpoint_keys(train_small):
    train_small("out", "--max_iters", 2)
    for name in ("ckpt.pt", "last.pt"):
        found = torch.load(Path("out") / name, weights_only=True)
        assert {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"} <= found.keys()
        assert not [key for key in found["model"] if key.startswith("_orig_mod")]
        assert type(found["best_val_loss"]) is float and found["config"]["min_lr"] == 0.0
        assert not [path for path in Path("out").iterdir() if path.suffix == ".tmp"]


def test_best_checkpoint_is_kept(train_small, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.2])
    monkeypatch.setattr(train, "evaluate", lambda run: {"val_loss": next(losses), "perplexity": 1.0, "bpb": 1.0})
    train_small("out", "--max_iters", 4, "--eval_interval", 1)
    assert load_state("out", "ckpt.pt")["iter_num"] == 2 and load_state("out")["iter_num"] == 4
    assert load_state("out")["best_val_loss"] == 2.0


@pytest.mark.parametrize("problem", ["missing", "cut", "other text", "other model"])
def test_lost_best_checkpoint_is_written_again(train_small, capsys, problem):
    train_small("out", "--max_iters", 4, "--eval_interval", 3)
    best, log_of_it = load_state("out", "ckpt.pt"), Path("out/log.jsonl").read_bytes()
    path = Path("out/ckpt.pt")
    if problem == "missing":
        path.unlink()
    elif problem == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    elif problem == "other text":
        torch.save({**best, "data_sha256": "another"}, path)
    else:
        train_small("wide", "--max_iters", 1, "--dim", 64)
        path.write_bytes(Path("wide/ckpt.pt").read_bytes())
    train_small("out", "--max_iters", 4, "--eval_interval", 3)
    assert "the next evaluation writes it again" in (said := capsys.readouterr().out) and "is finished" in said
    found = load_state("out", "ckpt.pt")
    assert_same(found["model"], best["model"])
    assert found["iter_num"] == 4 and Path("out/log.jsonl").read_bytes() == log_of_it


def test_short_run_writes_checkpoint_and_samples(train_small):
    train_small("out", "--max_iters", 1, "--warmup_iters", 1)
    assert load_state("out", "ckpt.pt")["iter_num"] == 1
    first, step, evaluation = read_log("out")
    assert first["config"]["max_iters"] == 1 and step["loss"] > 0 and evaluation["bpb"] > 0
    assert len(evaluation["samples"]) == 3 and evaluation["samples"][1].startswith("Once upon a time")
    assert all(text in Path("out/samples.txt").read_text(encoding="utf-8") for text in evaluation["samples"])


def test_a_plot_is_drawn(train_small, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "save", SAVE_PICTURE)
    train_small("out", "--max_iters", 3, "--eval_interval", 1)
    assert Path("out/loss.png").read_bytes().startswith(b"\x89PNG")


def test_gradient_accumulation_equals_one_batch(planned_run):
    """2 x 4 windows and 1 x 8 windows give the same step."""
    def gradient(*args):
        run = planned_run("--dtype", "float32", *args)
        batches = train.Task.iter_batches(run.shard_set, "train", run.cfg.batch_size, 32, seed=1)
        _, loss, norm = train.train_step(run, batches)
        assert run.state.position == 8
        return loss.item(), norm.item(), run.model.state_dict()
    one, two = gradient("--batch_size", 8, "--gradient_accumulation_steps", 1), gradient()
    assert one[0] == pytest.approx(two[0], rel=1e-5) and one[1] == pytest.approx(two[1], rel=1e-4)
    for name, weight in one[2].items():
        torch.testing.assert_close(weight, two[2][name], rtol=1e-3, atol=1e-5)


def test_a_step_is_adamw_on_the_mean_loss(planned_run):
    run = planned_run("--dtype", "float32", "--grad_clip", 0, "--warmup_iters", 0, "--decay_lr", "False",
                      "--optimizer", "adamw")
    twin = planned_run("--dtype", "float32").model
    batches = list(zip(range(2), train.Task.iter_batches(run.shard_set, "train", 4, 32, seed=run.cfg.seed)))
    (sum(twin(x, y) for _, (x, y) in batches) / 2).backward()
    lr, loss, norm = train.train_step(run, iter([batch for _, batch in batches]))
    total = math.sqrt(sum(weight.grad.square().sum().item() for weight in twin.parameters()))
    assert lr == run.cfg.learning_rate and norm.item() == pytest.approx(total, rel=1e-4)
    for (name, weight), after in zip(twin.named_parameters(), run.model.parameters(), strict=True):
        decay = run.cfg.weight_decay if weight.dim() > 1 else 0.0
        # the first step of Adam: the moments, corrected, are the gradient and its square
        rate = lr if name.startswith("layers") and weight.dim() > 1 else lr * run.cfg.embedding_lr_ratio
        want = weight * (1 - rate * decay) - rate * weight.grad / (weight.grad.abs() + 1e-8)
        torch.testing.assert_close(after, want, rtol=1e-4, atol=1e-6, msg=name)


def test_learning_rate_schedule(planned_run):
    run = planned_run("--max_iters", 100, "--warmup_iters", 9, "--learning_rate", 1.0, "--min_lr", 0.1)
    rates = []
    for run.state.iter_num in range(100):
        rates.append(train.get_lr(run))
    assert rates[0] > 0.09 and rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[50] == pytest.approx(0.1 + 0.9 * 0.5) and 0.1 < rates[-1] < 0.11
    flat = planned_run("--decay_lr", "False", "--warmup_iters", 0)
    flat.state.iter_num = 99_999
    assert train.get_lr(flat) == flat.cfg.learning_rate
    equal = planned_run("--max_iters", 5, "--warmup_iters", 5)
    assert all(train.get_lr(equal) > 0 for equal.state.iter_num in range(5))


@pytest.fixture
def ticking(monkeypatch):
    """A clock that advances by 0.1 s at each reading."""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: next(ticks) / 10)
    for module in (train, run, estimate):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.mark.parametrize("minutes", [0.5, 1])
def test_max_minutes_fits_the_schedule_to_the_time(train_small, ticking, minutes, capsys):
    train_small("out", "--max_minutes", minutes, "--eval_interval", 10)
    assert 56 * minutes < ticking.perf_counter() < 64 * minutes
    rates = [entry["lr"] for entry in read_log("out") if "lr" in entry]
    assert rates[-1] < 0.05 * max(rates) and rates[2:] == sorted(rates[2:], reverse=True)
    assert load_state("out")["iter_num"] == len(rates)
    train_small("out", "--max_minutes", minutes / 4)                 # has already passed
    assert float(capsys.readouterr().out.rpartition("--out_dir out --max_minutes ")[2].split()[0]) >= 1.5 * minutes


def test_perf_counter_is_used(train_small, monkeypatch):
    """time.monotonic has steps of 16 ms on Windows, too coarse for short training steps."""
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    train_small("out", "--max_iters", 2)


def test_max_iters_ends_a_run_with_minutes_left(train_small):
    train_small("out", "--max_minutes", 30, "--max_iters", 3)
    assert load_state("out")["iter_num"] == 3 and load_state("out")["state"]["seconds"] < 600
    train_small("out", "--init_from", "resume", "--max_iters", 5)
    assert load_state("out")["iter_num"] == 5


def test_evaluation_does_not_depend_on_batch_size(planned_run):
    scores = [train.evaluate(planned_run("--dtype", "float32", "--batch_size", size)) for size in (1, 5, 64)]
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], rel=1e-5)
    run = planned_run("--dtype", "float32")
    nats, count = 0.0, 0
    for shard in run.shard_set.shards_of("val"):            # window by window, with nothing of dataset.py
        ids = torch.from_numpy(run.shard_set.memmap(shard).astype("int64"))
        for document in ids.tensor_split(torch.where(ids == run.tokenizer.bos_id)[0])[1:]:
            for start in range(0, len(document) - 1, 32):
                window = document[start:start + 33]
                logits = run.model(window[None, :-1])
                nats -= logits[0].log_softmax(-1).gather(1, window[1:, None]).sum().item()
                count += len(window) - 1
    assert count == run.shard_set.total("val", "tokens") - run.shard_set.total("val", "documents")
    assert scores[0]["val_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert scores[0]["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert scores[0]["bpb"] == pytest.approx(nats / math.log(2) / run.shard_set.total("val", "bytes"), rel=1e-5)


def test_eval_only_scores_a_checkpoint_and_writes_nothing(train_small, capsys):
    train_small("out", "--max_iters", 3)
    loss = read_log("out")[-1]["val_loss"]
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    for args in (["--init_from", "out/ckpt.pt"], []):
        capsys.readouterr()
        train_small("out", "--eval_only", *args)
        assert f"val loss {loss:.4f}" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    with pytest.raises(UserError, match="no checkpoint"):
        train_small("nothing", "--eval_only")


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_non_finite_loss_stops_the_run_before_saving(train_small, monkeypatch, bad):
    step = train.train_step

    def poisoned(run, batches):
        lr, loss, norm = step(run, batches)
        if run.state.iter_num < 5:
            return lr, loss, norm
        return lr, loss * math.nan if bad == "loss" else loss, norm * math.inf if bad == "gradient" else norm
    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(UserError, match="step 5: .*(nan|inf)") as error:
        train_small("out", "--max_iters", 20, "--eval_interval", 2, "--learning_rate", 0.001)
    assert "--learning_rate 0.0005" in str(error.value) and load_state("out")["iter_num"] == 4


def test_another_vocabulary_is_refused(train_small, run_in_process, project, tmp_path):
    train_small("out", "--max_iters", 2)
    run_in_process("train_vocab", "--data", project / "stories.jsonl", "--vocab_size", 300)
    with pytest.raises(UserError, match="preprocess.py"):
        run_in_process("train", *TINY)
    run_in_process("preprocess")
    with pytest.raises(UserError, match="another vocabulary .*\n.*preprocess.py --tokenizer out.last.pt --data PATH"):
        run_in_process("train", "--out_dir", "out", *TINY, "--init_from", "resume", "--data_dir", "data")
    run_in_process("train_vocab", "--data", project / "stories.jsonl", "--vocab_size", 301)
    with pytest.raises(UserError, match="300, 301"):
        run_in_process("train", *TINY)
    run_in_process("train", "--vocab_size", 300, *TINY, "--max_iters", 1)
    assert load_state("output")["model_args"]["vocab_size"] == 300
    for name in "data/mine", "data/other":
        Path(name).mkdir()
    Path("data/mine/tok400.model").write_bytes(load_state("out")["tokenizer"])
    Path("data/other/tok300.model").write_bytes(load_state("output")["tokenizer"])
    with pytest.raises(UserError, match="choose its --data_dir, or encode the text"):
        run_in_process("train", "--init_from", "out/ckpt.pt", "--vocab_size", 300)


def test_from_the_command_line(project):
    result = run_captured("train", "--data_dir", project, *TINY, "--batch_size", "0", "--max_iter", "3")
    assert_user_error(result, "did you mean --max_iters?")
    assert_user_error(run_captured("train", "--data_dir", "empty"), "no vocabulary", "python train_vocab.py")
    Path("a_file").write_text("x", encoding="utf-8")
    assert_user_error(run_captured("train", "--data_dir", project, *TINY, "--out_dir", "a_file"), "a_file is a file")
    result = run_captured("train", "--data_dir", project, *TINY, "--max_iters", "2", "--compile", "False")
    assert result.returncode == 0, result.stderr
    for part in ("parameters", "tokens", "memory", "epochs", "device: cpu", "next: python sample.py"):
        assert part in result.stdout, part
    assert os.name == "nt" or re.search(r"peak memory: \d[\d,]+ MB\n", result.stdout)     # not known on Windows


def test_a_second_vocabulary_does_not_stop_a_run(train_small, run_in_process, project, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(project, data)
    train_small("out", "--data_dir", data, "--max_iters", 4)
    run_in_process("train_vocab", "--data", project / "stories.jsonl", "--data_dir", data, "--vocab_size", 300)
    for args in (["--max_iters", 5], ["--max_iters", 6, "--vocab_size", 512]):
        train_small("out", "--data_dir", data, *args)
        run_in_process("train", "--out_dir", "out", "--init_from", "resume", *args)
    run_in_process("train", "--eval_only", "--out_dir", "out", "--data_dir", data)
    assert load_state("out")["iter_num"] == 6 and not Path("out/old-1").exists()
    with pytest.raises(UserError, match="trained with another vocabulary"):
        run_in_process("preprocess", "--data_dir", data, "--vocab_size", 300, "--data", project / "stories.jsonl")
        run_in_process("train", "--out_dir", "out", "--init_from", "resume", "--vocab_size", 300)


def test_changed_text_starts_a_new_run(train_small, run_in_process, project, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(project, data)
    train_small("out", "--data_dir", data, "--max_iters", 4)
    stories = (project / "stories.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(stories[:200]), encoding="utf-8")
    run_in_process("preprocess", "--data_dir", data, "--data", tmp_path / "fewer.jsonl")
    with pytest.raises(UserError, match=f"--init_from {Path('out') / 'last.pt'}".replace("\\", ".")):
        run_in_process("train", "--out_dir", "out", "--init_from", "resume", "--max_iters", 8)
    train_small("out", "--data_dir", data, "--max_iters", 2)
    assert "another text" in capsys.readouterr().out and load_state("out/old-1")["iter_num"] == 4


def test_other_spelling_of_a_folder_is_the_same_run(train_small, project):
    train_small("out", "--max_iters", 4)
    train_small("out", "--data_dir", f"{project}/", "--max_iters", 6)
    assert load_state("out")["iter_num"] == 6 and not Path("out/old-1").exists()


def test_intact_checkpoint_replaces_a_damaged_one(train_small):
    train_small("out", "--max_iters", 4, "--eval_interval", 2)
    Path("out/last.pt").write_bytes(Path("out/last.pt").read_bytes()[:3000])
    with pytest.raises(UserError, match="--init_from out.ckpt.pt"):
        train_small("out", "--max_iters", 6, "--eval_interval", 2)
    train_small("out", "--max_iters", 2, "--init_from", "out/ckpt.pt")
    assert load_state("out")["iter_num"] == 2 and Path("out/old-1/last.pt").stat().st_size == 3000


@pytest.mark.skipif(bool(WHY_NOT := estimate.why_not_compilable(torch.device("cpu"))), reason=WHY_NOT)
def test_compiled_run_resumes_exactly(train_small):
    """Compiled kernels round differently but learn the same, and resuming is exact."""
    options = ["--eval_interval", 3, "--lr_decay_iters", 8, "--dtype", "float32", "--dropout", 0.1, "--n_layers", 1]
    train_small("eager", "--max_iters", 8, *options)
    train_small("whole", "--max_iters", 8, *options, "--compile", "True")
    train_small("parts", "--max_iters", 4, *options, "--compile", "True")
    train_small("parts", "--max_iters", 8, *options, "--compile", "auto")
    assert load_state("parts")["state"]["compiled"] and not load_state("eager")["state"]["compiled"]
    assert_same({**load_state("whole"), "config": 0}, {**load_state("parts"), "config": 0})
    for a, b in zip(read_log("eager")[1:], read_log("whole")[1:], strict=True):
        assert a.get("loss", a.get("val_loss")) == pytest.approx(b.get("loss", b.get("val_loss")), rel=1e-3)
