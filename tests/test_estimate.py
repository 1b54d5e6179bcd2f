"""The estimates before the first step: time, memory, and whether to compile."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same, load_state
from torch._dynamo.exc import BackendCompilerFailed

from tinyllm import estimate, memory
from tinyllm.cli import UserError
from tinyllm.run import TrainRun, TrainState


def test_trial_step_leaves_no_trace(planned_run):
    run = planned_run("--dropout", 0.5)
    weights = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    random = torch.get_rng_state()
    assert estimate.time_forward(run) > 0 and estimate.time_micro_batch(run) > 0
    assert torch.equal(torch.get_rng_state(), random) and run.model.training
    assert all(weight.grad is None for weight in run.model.parameters())
    assert_same(weights, dict(run.model.state_dict()))


def test_compiled_run_takes_no_uncompiled_step(planned_run, monkeypatch):
    """An uncompiled step before the run would set the peak of its memory."""
    calls = []
    monkeypatch.setattr(TrainRun, "compile", lambda run: setattr(run.state, "compiled", True))
    run = planned_run("--compile", "True")
    run.model.register_forward_hook(lambda *_: calls.append((torch.is_grad_enabled(), run.state.compiled)))
    estimate.estimate_and_compile(run)
    assert calls == [(False, False)] * 2 + [(True, True)] * 2


@pytest.mark.parametrize("done, max_minutes, seconds, steps", [
    (0, 0, 1000 * 0.1 + 4 * 2.0, 1000), (300, 0, 700 * 0.1 + 3 * 2.0, 700), (900, 0, 100 * 0.1 + 2.0, 100),
    (0, 1, 60 - 5, round((60 - 5 - 2.0) / (0.1 + 2.0 / 300))), (900, 1, 12, 100)])
def test_remaining_time_includes_evaluations(done, max_minutes, seconds, steps):
    """1000 steps of 0.1 s, with evaluations of 2 s every 300 steps and at the end."""
    run = SimpleNamespace(cfg=SimpleNamespace(max_iters=1000, eval_interval=300, max_minutes=max_minutes),
                          state=TrainState(iter_num=done), eval_seconds=2.0, seconds=lambda: 5.0)
    assert estimate.estimate_rest(run, 0.1) == (pytest.approx(seconds), steps)


def test_epochs_are_counted_in_tokens(planned_run, capsys):
    """Windows are not counted: they start at documents and overlap."""
    run = planned_run("--max_iters", 500)
    estimate.print_duration_estimate(run, 0.1)
    read = 500 * run.tokens_per_step / run.shard_set.total("train", "tokens")
    assert f" 500 steps, {read:.1f} epochs" in capsys.readouterr().out


@pytest.mark.parametrize("note", ["--dropout 0.1", "--preset cpu_3min"])
def test_long_run_gets_notes(planned_run, monkeypatch, capsys, note):
    """A micro-batch takes 5 seconds."""
    monkeypatch.setattr(estimate, "time_micro_batch", lambda run: 5.0)
    estimate.estimate_and_compile(planned_run("--max_iters", 100_000))
    assert any(note in text for text in capsys.readouterr().out.split("\nnote: ")[1:])
    estimate.estimate_and_compile(planned_run("--max_iters", 3))
    assert "note: " not in capsys.readouterr().out


COMPILER_ERROR = BackendCompilerFailed.__new__(BackendCompilerFailed)      # its arguments depend on the release
COMPILER_ERROR.inner_exception = ImportError("main.so: file too short")


@pytest.mark.parametrize("error, says, use", [
    (COMPILER_ERROR, "main.so: file too short", "--compile False"),
    (SystemError("a kernel of another processor"), "another processor", "--compile False"),
    (UnicodeDecodeError("gbk", b"\x94 ", 0, 1, "illegal"), "PYTHONUTF8=1", "--compile False")])
def test_compiler_failure_names_the_fix(train_small, monkeypatch, capsys, error, says, use):
    """The last case is a failed import on a Chinese Windows."""
    def fails(run):
        raise error
    monkeypatch.setattr(TrainRun, "compile", fails)
    with pytest.raises(UserError, match=f"compiling failed: .*{says}.*\n.*{use}"):
        train_small("out", "--max_iters", 1, "--compile", "True")
    monkeypatch.setattr(estimate, "should_compile", lambda run, seconds: (True, "it pays"))
    try:
        train_small("auto", "--max_iters", 1, "--compile", "auto")
    finally:
        torch.compiler.set_stance("default")
    found = capsys.readouterr().out
    assert "note:   compiling failed: " in found and says in found and "this run continues without" in found
    assert load_state("auto")["iter_num"] == 1 and not load_state("auto")["state"]["compiled"]


@pytest.mark.parametrize("device, compiler, triton, why", [
    ("cpu", True, False, ""), ("cpu", False, False, "C++ compiler"), ("mps", True, True, "mps"),
    ("cuda", False, True, ""), ("cuda", True, False, "triton")])
def test_when_to_compile(monkeypatch, device, compiler, triton, why):
    monkeypatch.setattr(estimate.devices, "why_no_compiler", lambda: "" if compiler else "there is no C++ compiler")
    monkeypatch.setattr(estimate.devices, "why_no_headers", lambda: "")
    monkeypatch.setattr(estimate.devices, "why_no_triton", lambda device: "" if triton else "triton is missing")
    found = estimate.why_not_compilable(torch.device(device))
    assert why in found if why else found == ""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("free, note", [
    (1e12, ""), (None, ""), (0.6, "--batch_size 4 --gradient_accumulation_steps 4"),
    (0.4, "--batch_size 2 --gradient_accumulation_steps 8"), (0.0, "use a smaller model")])
def test_too_little_memory_gets_settings_that_fit(planned_run, monkeypatch, device, free, note):
    """free: a share of the activations' memory, beside weights and optimizer. The run has 8 windows, twice a step."""
    run = planned_run("--max_seq_len", 256, "--batch_size", 8)
    monkeypatch.setattr(run, "backend", replace(run.backend, device=torch.device(device)))
    constants = {"CPU_LIBRARIES": 0, "MATRIX_WORKSPACES": 0}
    for name, value in constants.items():
        monkeypatch.setattr(memory, name, value)
    needed = estimate.estimate_run_memory(run, False, 8)
    enough = None if free is None else needed.total * free
    monkeypatch.setattr(estimate, "free_memory", lambda: enough)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1e18 if enough is None else enough, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    text = estimate.describe_memory(run, compiled=False) + estimate.memory_note(run, compiled=False)
    assert note in text and ("note:" in text) == bool(note)
    assert ("CUDA itself" in text) == (device == "cuda")


def test_memory_is_printed_before_the_trial(planned_run, monkeypatch, capsys):
    """A trial that needs too much memory may end the process."""
    def killed(run):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(estimate, "time_forward", killed)
    with pytest.raises(torch.OutOfMemoryError):
        estimate.estimate_and_compile(planned_run())
    assert "\nmemory: about" in capsys.readouterr().out


@pytest.mark.parametrize("device, free, advice", [
    ("cpu", 0.0, "--batch_size 4 --gradient_accumulation_steps 4"), ("cuda", 0.0, "use a smaller model"),
    ("cuda", 1e12, "--batch_size 4 --gradient_accumulation_steps 4")])
def test_advice_after_memory_ran_out(planned_run, monkeypatch, device, free, advice):
    """On a GPU it is the same as in the note before the first step. The run has 8 windows, twice a step."""
    run = planned_run("--batch_size", 8)
    monkeypatch.setattr(run, "backend", replace(run.backend, device=torch.device(device)))
    monkeypatch.setattr(estimate, "free_gpu_memory", lambda device: free)
    assert advice in estimate.run_oom_advice(run)
