"""Estimate a run before its first step, and print it: memory, time, and whether to compile."""
import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tinyllm import device as devices
from tinyllm.cli import UserError
from tinyllm.dataset import PretokDataset, fits_on_gpu
from tinyllm.machine import free_memory
from tinyllm.presets import PRESETS
from tinyllm.resume import CHECKPOINT_BYTES_PER_PARAM
from tinyllm.run import TrainRun

STATE_BYTES_PER_PARAM = 16          # weight, gradient and two moments in float32
ACTIVATION_BYTES = 90               # kept for the backward pass, per token, layer and dimension; without dropout
PEAK_FACTOR = 2                     # peak memory of a micro-batch, in multiples of what it keeps
LONG_RUN_SECONDS = 2 * 86400        # a run on a CPU that takes longer is probably not meant
USEFUL_EPOCHS = 5                   # up to 4 epochs are nearly as good as new text (arXiv 2305.16264)
MIN_SECONDS_TO_COMPILE = 100        # compiling takes 10 to 30 seconds; shorter runs do not gain that


def print_run_summary(run: TrainRun) -> None:
    """Print what the run will do, compile it if that pays, and set run.eval_seconds.

    A micro-batch is timed for that, which leaves no trace in the run.
    """
    print_config_summary(run)
    seconds = time_micro_batch(run)
    n_windows = PretokDataset(run.data, "val", run.cfg.batch_size, run.model.args.max_seq_len).n_windows
    eval_seconds = run.dist.broadcast_from_main(seconds / 3 * n_windows / run.cfg.batch_size / run.dist.size)
    pays, reason = should_compile(run, seconds * run.micro_steps_per_rank)
    if run.dist.broadcast_from_main(pays):
        print(f"compile: yes ({reason}); the first time takes up to a minute, --compile False skips it", flush=True)
        seconds = compile_or_fall_back(run)
    else:
        print(f"compile: no ({reason})", flush=True)
    run.eval_seconds = eval_seconds
    print_duration_estimate(run, seconds * run.micro_steps_per_rank)


def print_config_summary(run: TrainRun) -> None:
    args, data = run.model.args, run.data
    print(f"device: {run.backend}")
    print(f"model:  {run.model.count_parameters():,} parameters: dim {args.dim}, {args.n_layers} layers, "
          f"{args.n_heads} heads, {args.n_kv_heads} kv heads, vocabulary {args.vocab_size}, window {args.max_seq_len}")
    on_gpu = not run.cfg.num_workers and fits_on_gpu(data, "train", run.backend.device)
    print(f"data:   {data.folder}: {data.total('train', 'tokens'):,} tokens to train on, "
          f"{data.total('val', 'tokens'):,} to evaluate on{', all in GPU memory' if on_gpu else ''}")
    shared = f", shared by {run.dist.size} processes" if run.dist.size > 1 else ""
    sharded = ", each with a part of the model" if run.is_sharded else ""
    print(f"step:   {run.cfg.batch_size} windows x {run.cfg.gradient_accumulation_steps} = "
          f"{run.tokens_per_step:,} tokens{shared}{sharded}")
    megabytes = CHECKPOINT_BYTES_PER_PARAM * run.model.count_parameters() / 1e6
    print(f"memory: {describe_memory(run)}\ndisk:   up to {megabytes:,.0f} MB each for last.pt and ckpt.pt", flush=True)
    warn_of_memory(run)


# ---- time ---------------------------------------------------------------------------------------

def print_duration_estimate(run: TrainRun, seconds_per_step: float) -> None:
    """Print how long the run will take, and warn of a length that is probably not meant."""
    step = run.state.iter_num
    seconds, steps = run.seconds_left(seconds_per_step), run.steps_left(seconds_per_step)
    epochs = steps * run.tokens_per_step / run.data.total("train", "tokens")
    done = f", after the {step:,} steps that are done" if step else ""
    print(f"time:   about {format_hms(seconds)} for {steps:,} steps, {epochs:.1f} epochs, and evaluations{done}")
    if seconds > LONG_RUN_SECONDS and run.backend.device.type == "cpu":
        print(f"note:   that is {seconds / 86400:.1f} days; --preset cpu_3min or --max_minutes 60 fit a run to the "
              "time you have")
    if epochs > USEFUL_EPOCHS:
        print(f"note:   {describe_overfitting(run, steps, epochs)}")
    preset = PRESETS.get(run.cfg.preset)
    if preset and preset.vocab_size != run.model.args.vocab_size:
        print(f"note:   {run.cfg.preset} was measured with a vocabulary of {preset.vocab_size}, this one has "
              f"{run.model.args.vocab_size}")
    if not step and run.cfg.warmup_iters > steps / 2:
        print(f"note:   the learning rate grows over {run.cfg.warmup_iters} steps, which is most of the run; use "
              f"--warmup_iters {steps // 10}")
    print(end="", flush=True)


def describe_overfitting(run: TrainRun, steps: int, epochs: float) -> str:
    advice = "" if run.cfg.dropout else ", --dropout 0.1 too"
    steps_per_epoch = max(round(steps / epochs), 1)
    if run.cfg.eval_interval > 2 * steps_per_epoch:
        advice += f"; --eval_interval {steps_per_epoch} lets ckpt.pt keep the best model"
    return (f"the text is read {epochs:.0f} times, and memorized after {USEFUL_EPOCHS}; more text or fewer steps help "
            f"most{advice}")


def time_micro_batch(run: TrainRun) -> float:
    """Return the seconds that a micro-batch takes, forward and backward."""
    shape = (run.cfg.batch_size, run.model.args.max_seq_len)
    tokens = torch.zeros(shape, dtype=torch.long, device=run.backend.device)
    with preserve_rng_and_grads(run):
        for _ in range(2):                                  # the first one warms up, or compiles
            start = time.perf_counter()
            with run.backend.autocast():
                loss = run.ddp_model(tokens, tokens)
            loss.backward()
            loss.item()
        return time.perf_counter() - start


@contextmanager
def preserve_rng_and_grads(run: TrainRun) -> Iterator[None]:
    """Restore the random numbers after the block, and drop its gradients."""
    with torch.random.fork_rng([run.backend.device] if run.backend.device.type == "cuda" else []):
        yield
    run.model.zero_grad(set_to_none=True)


def format_hms(seconds: float) -> str:
    minutes, seconds = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


# ---- compile ------------------------------------------------------------------------------------

def should_compile(run: TrainRun, seconds_per_step: float) -> tuple[bool, str]:
    """Return whether to compile the model, and why. A resumed run stays as it was."""
    if run.cfg.compile != "auto":
        return run.cfg.compile, f"--compile {run.cfg.compile}"
    if reason := why_not_compilable(run.backend.device):
        return False, reason
    if run.state.iter_num:
        return run.state.compiled, "as when the run began"
    if run.seconds_left(seconds_per_step) > MIN_SECONDS_TO_COMPILE:
        return True, f"without it the run takes over {MIN_SECONDS_TO_COMPILE} seconds"
    return False, f"the run takes under {MIN_SECONDS_TO_COMPILE} seconds, of which compiling saves less than it takes"


def why_not_compilable(device: torch.device) -> str:
    """Return why a model cannot be compiled for a device; "" if it can."""
    if device.type == "cpu":
        reason = devices.why_no_compiler() or devices.why_no_headers()
        return f"{reason}; compiled, training is faster" if reason else ""
    if device.type != "cuda":
        return f"not for {device.type}"
    if not importlib.util.find_spec("triton"):
        return "the package triton is missing"
    return "" if torch.cuda.get_device_capability(device) >= (7, 0) else "the GPU is too old for it"


def compile_or_fall_back(run: TrainRun) -> float:
    """Compile the model, and return the seconds of a micro-batch.

    With --compile auto a failure is only a note, except in several processes, which have to do the same.
    """
    try:
        with explain_compiler_errors():
            run.compile()
            return time_micro_batch(run)
    except UserError as error:
        if run.cfg.compile != "auto" or run.dist.size > 1:
            raise
        print(f"note:   {str(error).splitlines()[0]}\n        this run continues without compiling", flush=True)
        torch.compiler.set_stance("force_eager")
        run.state.compiled = False
        return time_micro_batch(run)


@contextmanager
def explain_compiler_errors() -> Iterator[None]:
    """Turn any error into a UserError, since the same model has just run uncompiled.

    One cause is a file in the compiler's cache that a kill has cut off, or that is for another processor.
    """
    try:
        yield
    except Exception as error:
        if devices.is_oom(error):
            raise
        from torch._inductor.runtime.cache_dir_utils import cache_dir  # a slow import
        cause = getattr(error, "inner_exception", error)
        line = devices.NOT_UTF8 if isinstance(cause, UnicodeError) else str(cause).strip().split("\n")[0]
        raise UserError(f"compiling failed: {line:.200}\n       train without it: --compile False; or delete the "
                        f"compiler's cache, {cache_dir()}, and try again") from error


# ---- memory -------------------------------------------------------------------------------------

def activation_bytes(run: TrainRun) -> int:
    """Estimate what a micro-batch keeps for its backward pass."""
    args = run.model.args
    return ACTIVATION_BYTES * run.cfg.batch_size * args.max_seq_len * args.n_layers * args.dim


def describe_memory(run: TrainRun) -> str:
    has_ddp_buffers = run.dist.size > 1 and run.micro_steps_per_rank > 1 and not run.is_sharded
    bytes_per_param = STATE_BYTES_PER_PARAM + (4 if has_ddp_buffers else 0)     # DDP sums gradients in its own buffers
    megabytes = bytes_per_param * run.model.count_parameters() / 1e6
    if run.is_sharded:
        return f"{megabytes / run.dist.size:,.0f} MB per process for weights, gradients and optimizer, more for windows"
    windows = f"about {activation_bytes(run) / 1e6:,.0f} MB for {run.cfg.batch_size} windows"
    return f"{megabytes:,.0f} MB for weights, gradients and optimizer, {windows}"


def warn_of_memory(run: TrainRun) -> None:
    """Warn when a run on a CPU may not fit, since the system kills such a process without a message."""
    free = free_memory() if run.backend.device.type == "cpu" else None
    needed = STATE_BYTES_PER_PARAM * run.model.count_parameters() + PEAK_FACTOR * activation_bytes(run)
    if free is not None and needed > free:
        print(f"note:   {free / 1e9:.1f} GB of memory are free, and the run may need {needed / 1e9:.1f} GB; halve "
              "--batch_size and double --gradient_accumulation_steps for the same steps in less", flush=True)
