"""What a training notices about itself: losses that are not finite or that jump, and memory that runs out."""
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tinyllm.cli import UserError, format_command
from tinyllm.device import is_oom
from tinyllm.estimate import time_micro_batch

EMA_STEPS = 50             # of about so many losses come what is usual: their average, and how far they rise above it
JUMP, MIN_RELATIVE_RISE = 15, 0.1   # A loss jumps when it rises 15 times as far (6 standard deviations of noise), and by a tenth
SMALLEST_SCALE = 1.0    # of a GradScaler; it begins at 65,536 and halves with every gradient that is too large


def check_pending_steps(run: Any) -> tuple[float, float, list[dict[str, Any]]]:
    """Look at the steps since the last look, all at once, for this waits for the device.

    Returns:
        loss and gradient length of the newest step; an entry for the log for each step whose loss jumped.
    Raises:
        UserError: when one is not finite. A GradScaler skips such steps itself, and may until its scale is used up.
    """
    jumps, first = [], run.state.iter_num - len(run.pending_metrics) + 1
    numbers = torch.stack([torch.stack(pair) for pair in run.pending_metrics])
    numbers = (run.dist.sum(numbers) / run.dist.size).tolist()    # the loss is that of a process, the length of all
    run.pending_metrics.clear()
    for step, (loss, norm) in enumerate(numbers, first):
        if not math.isfinite(loss + norm):
            if not run.scaler.is_enabled() or run.scaler.get_scale() < SMALLEST_SCALE:
                raise non_finite_error(run, step, f"the loss is {loss}, the gradient's length {norm}")
        elif is_loss_spike(run.state, step, loss):
            jumps.append({"iter": step, "jump": loss, "usual": run.state.usual_loss, "windows": windows_of_step(run, step)})
        update_loss_ema(run.state, step, loss)
    return *numbers[-1], jumps


def is_loss_spike(state: Any, step: int, loss: float) -> bool:
    return step > EMA_STEPS and loss - state.usual_loss > max(JUMP * state.usual_rise, MIN_RELATIVE_RISE * state.usual_loss)


def update_loss_ema(state: Any, step: int, loss: float) -> None:
    """Let a loss count for what is usual: averages in which older steps fade."""
    if math.isfinite(loss):
        share = 1 / min(step, EMA_STEPS)
        rise = max(loss - state.usual_loss, 0.0) if step > 1 else 0.0
        state.usual_rise += share * (rise - state.usual_rise)
        state.usual_loss += share * (loss - state.usual_loss)


def windows_of_step(run: Any, step: int) -> list[int]:
    """The first and the last window of a step, numbered in the order of training."""
    in_step = run.cfg.batch_size * run.cfg.gradient_accumulation_steps
    end = run.state.position - (run.state.iter_num - step) * in_step
    return [end - in_step, end - 1]


def require_finite(run: Any) -> None:
    """Raise UserError when weights are about to be saved that are not finite."""
    for name, weight in run.model.named_parameters():
        if not weight.isfinite().all():
            raise non_finite_error(run, run.state.iter_num, f"{name} has values that are no numbers")


def non_finite_error(run: Any, step: int, what: str) -> UserError:
    """What to say, and to type, when a loss, a gradient or a weight is not finite; `what` tells which."""
    out, (begin, end) = run.cfg.out_dir, windows_of_step(run, step)
    return UserError(
        f"step {step:,}, windows {begin:,} to {end:,}: {what}; this is not saved\n"
        f"       the last good state is step {run.last_saved_step:,}, in {Path(out) / 'last.pt'}; go on from it, more "
        "slowly: " + format_command("train", run.dist.launch_command, init_from="resume", out_dir=out,
                             learning_rate=f"{run.cfg.learning_rate / 2:g}"))


@contextmanager
def explain_oom(cfg: SimpleNamespace, run: Any = None) -> Iterator[None]:
    """Turn PyTorch's error about memory into what to type; with a run, after trying what fits."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_oom(error):
            raise
        traceback.clear_frames(error.__traceback__)         # they hold what did not fit
        raise UserError(f"there is not enough memory for batch_size {cfg.batch_size}\n       "
                        + oom_advice(cfg, run)) from error


def oom_advice(cfg: SimpleNamespace, run: Any = None) -> str:
    """What to type when memory ran out."""
    size = suggest_batch_size(run) if run else 0
    if not size:
        return (f"use a smaller --batch_size{'' if cfg.eval_only else ', --max_seq_len, --dim or --n_layers'}, or "
                "close what else uses the memory")
    again = (format_command("train", run.dist.launch_command, init_from="resume", out_dir=cfg.out_dir) + " "
             if run.state.iter_num else "")
    return (f"the same steps in less: {again}--batch_size {size} --gradient_accumulation_steps "
            f"{cfg.gradient_accumulation_steps * cfg.batch_size // size}")


def suggest_batch_size(run: Any) -> int:
    """A part of a batch that fits; of several processes, the others are not there to try it, and a half may do."""
    if run.dist.size == 1:
        return largest_batch_that_fits(run)
    return run.cfg.batch_size // 2 if run.cfg.batch_size % 2 == 0 else 0


def largest_batch_that_fits(run: Any) -> int:
    """The largest part of a batch that goes through the model now; 0 when none does."""
    run.model.zero_grad(set_to_none=True)
    begun = any(optimizer.state for optimizer in run.optimizers)
    for size in (size for size in range(run.cfg.batch_size // 2, 0, -1) if run.cfg.batch_size % size == 0):
        try:
            if run.backend.device.type == "cuda":
                torch.cuda.empty_cache()
            time_micro_batch(run, size, spare=0 if begun else 2 * run.model.count_parameters())
            return size
        except (RuntimeError, MemoryError) as error:
            if not is_oom(error):
                raise
            traceback.clear_frames(error.__traceback__)
    return 0
