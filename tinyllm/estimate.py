"""Estimate memory and time before the first step, print them, and decide whether to compile."""
import math
import time
from datetime import timedelta

import torch

from tinyllm import device as devices
from tinyllm.cli import UserError
from tinyllm.dataset import PretokDataset
from tinyllm.device_errors import compiler_problem, is_oom
from tinyllm.machine import free_memory
from tinyllm.memory import MemoryEstimate, estimate_memory
from tinyllm.run import SMALLER_BATCHES, SMALLER_MODEL, TrainRun, oom_advice

LONG_RUN_SECONDS = 2 * 86400        # longer runs on a CPU are probably a mistake
USEFUL_EPOCHS = 5                   # up to 4 epochs are nearly as good as new text (arXiv 2305.16264)
MIN_SECONDS_TO_COMPILE = 100        # compiling takes 10 to 30 seconds; shorter runs save less
FORWARD_SHARE = 1 / 3               # of a step's time: the backward pass has twice as many matrix products


def estimate_and_compile(run: TrainRun) -> None:
    """Print the summary and the estimates of a run, compile its model if that saves time, and set run.eval_seconds."""
    print_config_summary(run)
    is_compiled = run.cfg.compile is True or run.state.compiled
    may_compile = is_compiled or (run.cfg.compile == "auto" and not why_not_compilable(run.backend.device))
    note = memory_note(run, may_compile)
    print(f"memory: {describe_memory(run, is_compiled)}{note}", flush=True)
    forward_seconds = time_forward(run)
    pays, reason = should_compile(run, forward_seconds / FORWARD_SHARE * run.micro_steps_per_rank)
    if run.ranks.broadcast_from_main(pays):
        compiled = estimate_run_memory(run, True, run.cfg.batch_size).total
        print(f"compile: yes ({reason}), in about {compiled / 1e6:,.0f} MB; the first time takes up to a minute, "
              "--compile False skips it", flush=True)
        seconds = compile_or_fall_back(run)
    else:
        print(f"compile: no ({reason}){'' if note else memory_note(run, compiled=False)}", flush=True)
        seconds = time_micro_batch(run)
    n_windows = PretokDataset(run.shard_set, "val", run.cfg.batch_size, run.model.args.max_seq_len).n_windows
    eval_seconds = forward_seconds * n_windows / run.cfg.batch_size / run.ranks.world_size
    run.eval_seconds = run.ranks.broadcast_from_main(eval_seconds)
    print_duration_estimate(run, seconds * run.micro_steps_per_rank)


def print_config_summary(run: TrainRun) -> None:
    args = run.model.args
    n_params = run.model.count_parameters()
    shared = f", shared by {run.ranks.world_size} processes" if run.ranks.world_size > 1 else ""
    sharded = ", each with a part of the model" if run.is_sharded else ""
    print(f"device: {run.backend}\n"
          f"model:  {n_params:,} parameters: dim {args.dim}, {args.n_layers} layers, {args.n_heads} heads, "
          f"{args.n_kv_heads} kv heads, vocabulary {args.vocab_size}, window {args.max_seq_len}\n"
          f"data:   {run.shard_set.folder}: {run.shard_set.total('train', 'tokens'):,} tokens to train on, "
          f"{run.shard_set.total('val', 'tokens'):,} to evaluate on\n"
          f"step:   {run.cfg.batch_size} windows x {run.cfg.gradient_accumulation_steps} = "
          f"{run.tokens_per_step:,} tokens{shared}{sharded}", flush=True)


def describe_memory(run: TrainRun, compiled: bool) -> str:
    """Describe the memory that training needs."""
    estimate = estimate_run_memory(run, compiled, run.cfg.batch_size)
    on_gpu = run.backend.device.type == "cuda"
    more = "CUDA itself takes 300 to 500" if on_gpu else "Python and PyTorch take 300 to 400"
    return (f"about {estimate.total / 1e6:,.0f} MB: {estimate.state / 1e6:,.0f} MB for weights, gradients and "
            f"optimizer, {estimate.batch / 1e6:,.0f} MB for {run.cfg.batch_size} windows; {more} MB more")


def memory_note(run: TrainRun, compiled: bool) -> str:
    """Return a note with settings that fit, on a line of its own, if less memory is free than needed; otherwise "".

    Without it, the system might kill a process on a CPU without a message.
    """
    device = run.backend.device
    free = free_gpu_memory(device) if device.type == "cuda" else free_memory()
    if free is None or estimate_run_memory(run, compiled, run.cfg.batch_size).total <= free:
        return ""
    return f"\nnote:   only {free / 1e9:.1f} GB are free; {advice_to_fit(run, compiled, free, indent=8)}"


def estimate_run_memory(run: TrainRun, compiled: bool, batch_size: int) -> MemoryEstimate:
    """Return the memory of a run whose steps are divided into micro-batches of batch_size windows."""
    accumulation = run.cfg.gradient_accumulation_steps * run.cfg.batch_size // batch_size
    return estimate_memory(run.model, run.cfg.optimizer, batch_size, accumulation // run.ranks.world_size, run.backend,
                           compiled, run.ranks.world_size, run.is_sharded)


def free_gpu_memory(device: torch.device) -> int:
    """Return the bytes that this process may still allocate, or has allocated for the model already."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def advice_to_fit(run: TrainRun, compiled: bool, free: float, indent: int = 7) -> str:
    """Return the flags of the same steps in `free` bytes, or other advice if no batch size fits."""
    cfg = run.cfg
    for factor in range(2, cfg.batch_size + 1):
        batch_size = cfg.batch_size // factor
        if cfg.batch_size % factor == 0 and estimate_run_memory(run, compiled, batch_size).total <= free:
            accumulation = cfg.gradient_accumulation_steps * factor
            flags = f"--batch_size {batch_size} --gradient_accumulation_steps {accumulation}"
            return f"{SMALLER_BATCHES}\n{' ' * indent}{flags}"
    return SMALLER_MODEL


def run_oom_advice(run: TrainRun) -> str:
    """Return the settings to try after memory ran out in a run."""
    if run.backend.device.type != "cuda":
        return oom_advice(run.cfg)
    return advice_to_fit(run, run.state.compiled, free_gpu_memory(run.backend.device))


def print_duration_estimate(run: TrainRun, seconds_per_step: float) -> None:
    """Print the estimated duration, with a note if the run takes days on a CPU or reads the text too often."""
    seconds, steps = estimate_rest(run, seconds_per_step)
    epochs = steps * run.tokens_per_step / run.shard_set.total("train", "tokens")
    done = f", after the {run.state.iter_num:,} steps that are done" if run.state.iter_num else ""
    print(f"time:   about {format_hms(seconds)} for {steps:,} steps, {epochs:.1f} epochs, and evaluations{done}",
          flush=True)
    if seconds > LONG_RUN_SECONDS and run.backend.device.type == "cpu":
        print(f"note:   that is {seconds / 86400:.1f} days\n"
              "        for a shorter run, use --preset cpu_3min or --max_minutes 60", flush=True)
    if epochs > USEFUL_EPOCHS:
        print(f"note:   the run reads the text {epochs:.0f} times; after {USEFUL_EPOCHS}, the model memorizes it\n"
              "        use more text, fewer steps or --dropout 0.1", flush=True)


def estimate_rest(run: TrainRun, seconds_per_step: float) -> tuple[float, int]:
    """Return the remaining seconds of the run, including evaluations, and the remaining steps."""
    cfg = run.cfg
    steps = cfg.max_iters - run.state.iter_num
    evaluations = math.ceil(cfg.max_iters / cfg.eval_interval) - run.state.iter_num // cfg.eval_interval
    seconds = steps * seconds_per_step + evaluations * run.eval_seconds
    if not cfg.max_minutes:
        return seconds, steps
    seconds_left = 60 * cfg.max_minutes - run.seconds()
    steps_in_time = (seconds_left - run.eval_seconds) / (seconds_per_step + run.eval_seconds / cfg.eval_interval)
    return min(seconds, seconds_left), min(steps, max(round(steps_in_time), 0))


@torch.no_grad()
def time_forward(run: TrainRun) -> float:
    """Return the seconds of an uncompiled forward pass, as in an evaluation.

    It decides whether to compile, because a whole uncompiled step needs more memory than a compiled one.
    """
    tokens = trial_batch(run)
    run.model.eval()
    for _ in range(2):                                          # the first pass warms up
        start = time.perf_counter()
        with run.backend.autocast():
            run.model(tokens, tokens).item()
        seconds = time.perf_counter() - start
    run.model.train()
    return seconds


def time_micro_batch(run: TrainRun) -> float:
    """Return the seconds of a micro-batch, forward and backward, without changing random state or gradients."""
    tokens = trial_batch(run)
    with torch.random.fork_rng([run.backend.device] if run.backend.device.type == "cuda" else []):
        for _ in range(2):                                      # the first one warms up, or compiles
            start = time.perf_counter()
            with run.backend.autocast():
                loss = run.wrapped_model(tokens, tokens)
            loss.backward()
            loss.item()
        seconds = time.perf_counter() - start
    run.model.zero_grad(set_to_none=True)
    return seconds


def trial_batch(run: TrainRun) -> torch.Tensor:
    """Return a micro-batch of token ids, all 0."""
    return torch.zeros(run.cfg.batch_size, run.model.args.max_seq_len, dtype=torch.long, device=run.backend.device)


def format_hms(seconds: float) -> str:
    return str(timedelta(seconds=max(round(seconds), 0)))


def should_compile(run: TrainRun, seconds_per_step: float) -> tuple[bool, str]:
    """Return True if the model should be compiled, and the reason. With auto, a resumed run keeps its choice."""
    if run.cfg.compile != "auto":
        return run.cfg.compile, f"--compile {run.cfg.compile}"
    if reason := why_not_compilable(run.backend.device):
        return False, reason
    if run.state.iter_num:
        return run.state.compiled, "as when the run began"
    if estimate_rest(run, seconds_per_step)[0] > MIN_SECONDS_TO_COMPILE:
        return True, f"without it the run takes over {MIN_SECONDS_TO_COMPILE} seconds"
    return False, f"the run takes under {MIN_SECONDS_TO_COMPILE} seconds, so compiling costs more than it saves"


def why_not_compilable(device: torch.device) -> str:
    """Return why a model cannot be compiled for a device; "" if it can."""
    if device.type == "cpu":
        return devices.why_no_compiler() or devices.why_no_headers()
    if device.type == "cuda":
        return devices.why_no_triton(device)
    return f"not for {device.type}"


def compile_or_fall_back(run: TrainRun) -> float:
    """Compile the model and return the seconds of a micro-batch.

    Raises UserError if that fails. With --compile auto in a single process, print a note and train uncompiled.
    """
    try:
        run.compile()
        return time_micro_batch(run)
    except Exception as error:              # probably from the compiler: an evaluation has just worked
        if is_oom(error) or "CUDA error:" in str(error):
            raise
        problem = compiler_problem(error)
        if run.cfg.compile != "auto" or run.ranks.world_size > 1:
            raise UserError(f"compiling failed: {problem}\n       train without it: --compile False") from error
    print(f"note:   compiling failed: {problem}\n        this run continues without compiling", flush=True)
    torch.compiler.set_stance("force_eager")
    run.state.compiled = False
    return time_micro_batch(run)
