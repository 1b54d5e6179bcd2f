"""Reasons to stop a run early: another run in its folder, a signal, a loss or weight that is not finite."""
import io
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from typing import Any

import torch

from tinyllm.cli import UserError, format_command
from tinyllm.distributed import DistributedContext
from tinyllm.files import folder_lock
from tinyllm.run import TrainRun
from tinyllm.runlog import finish_archive

SIGHUP = getattr(signal, "SIGHUP", None)            # Windows has none
STOP_SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, SIGHUP) if number]
MIN_LOSS_SCALE = 1.0            # GradScaler starts at 65,536 and halves its scale after each overflow


@contextmanager
def lock_output_dir(out_dir: str, ranks: DistributedContext) -> Iterator[None]:
    """Lock out_dir during the block; the main process holds the lock for all ranks."""
    with ExitStack() as stack:
        with ranks.fail_together():
            if ranks.is_main:
                stack.enter_context(folder_lock(out_dir))
                finish_archive(out_dir)
        yield


# ---- signals ------------------------------------------------------------------------------------

@contextmanager
def save_on_signals(run: TrainRun) -> Iterator[None]:
    """Finish the step, save and exit on SIGINT, SIGTERM or SIGHUP; a second signal exits at once."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def request_stop(number: int, frame: Any) -> None:
        run.local_stop_signal = number
        signal.signal(number, signal.SIG_IGN if number == SIGHUP else handlers[number])
        if number == SIGHUP:                            # a closing terminal sends it twice and shows nothing
            redirect_to_devnull(1, 2)
        if run.ranks.is_main:
            with suppress(OSError):                     # not print(): the signal may have interrupted one
                os.write(1, b"\nstopping after this step, then saving\n")

    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:                   # nohup ignores SIGHUP
            signal.signal(number, request_stop)
    try:
        with redirect_stdout(StopOnClosedStdout(run)):
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class StopOnClosedStdout(io.TextIOBase):
    """A stdout that does not fail when its reader has ended (`| head`), but stops the run."""

    def __init__(self, run: TrainRun):
        self.run = run
        self.stdout = sys.stdout

    def write(self, text: str) -> int:
        try:
            self.stdout.write(text)
            self.stdout.flush()
        except OSError:
            redirect_to_devnull(1)
            self.run.local_stop_signal = self.run.local_stop_signal or signal.SIGTERM
        return len(text)


def redirect_to_devnull(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


# ---- values that are not finite -----------------------------------------------------------------

def read_pending_metrics(run: TrainRun) -> tuple[float, float]:
    """Return loss and gradient norm of the newest step, after checking all steps since the last call.

    Raises UserError if one is not finite. GradScaler skips such steps as long as its scale is at least MIN_LOSS_SCALE.
    """
    metrics = torch.stack([torch.stack(pair) for pair in run.pending_metrics])      # (steps, 2)
    metrics = (run.ranks.sum(metrics) / run.ranks.world_size).tolist()    # losses differ between ranks, norms do not
    run.pending_metrics.clear()
    first_step = run.state.iter_num - len(metrics) + 1
    for step, (loss, grad_norm) in enumerate(metrics, first_step):
        if not math.isfinite(loss + grad_norm) and not may_skip_steps(run):
            raise non_finite_error(run, step, f"the loss is {loss}, the gradient norm {grad_norm}")
    return metrics[-1]


def may_skip_steps(run: TrainRun) -> bool:
    """True if GradScaler can still lower its scale, so that float16 gradients no longer overflow."""
    return run.scaler.is_enabled() and run.scaler.get_scale() >= MIN_LOSS_SCALE


def require_finite_weights(run: TrainRun) -> None:
    checks = {name: weight.isfinite().all() for name, weight in run.model.named_parameters()}
    if not torch.stack(list(checks.values())).all():            # reads one number from the device
        name = next(name for name, is_finite in checks.items() if not is_finite)
        raise non_finite_error(run, run.state.iter_num, f"{name} has values that are not finite")


def non_finite_error(run: TrainRun, step: int, problem: str) -> UserError:
    command = format_command("train", run.ranks.launch_command, init_from="resume", out_dir=run.cfg.out_dir,
                             learning_rate=f"{run.cfg.learning_rate / 2:g}")
    return UserError(f"step {step:,}: {problem}; this state is not saved\n"
                     f"       resume from step {run.last_saved_step:,} with a lower learning rate: {command}")
