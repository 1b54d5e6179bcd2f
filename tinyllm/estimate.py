"""What a training will be like, printed before its first step: its shape, its time and memory, compiled or not."""
import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from tinyllm import device as devices
from tinyllm.cli import UserError
from tinyllm.dataset import PretokDataset, fits_on_gpu
from tinyllm.machine import free_memory
from tinyllm.presets import PRESETS
from tinyllm.resume import CHECKPOINT_BYTES_PER_PARAM

STATE_BYTES = 16                            # per parameter: weight, gradient and two moments, 4 bytes each, at most
LONG_RUN_SECONDS = 2 * 86400                            # seconds of training on a CPU that few will want
ACTIVATION_PEAK_FACTOR = 2                                    # times what a micro-batch keeps is taken at its peak, about
USEFUL_EPOCHS = 5                                   # epochs; 4 are nearly as good as new text, says arXiv 2305.16264
MIN_SECONDS_TO_COMPILE = 100                            # seconds of training from which on compiling, 10 to 30 seconds, pays


def print_run_summary(run: Any) -> None:
    """Print what will happen, and learn how long an evaluation will take.

    To know the time to go, one micro-batch is tried out, which leaves no trace in the run.
    """
    print_config_summary(run)
    seconds = time_micro_batch(run)
    batches = PretokDataset(run.data, "val", run.cfg.batch_size, run.model.args.max_seq_len).n_windows
    evaluation = run.dist.broadcast_from_main(seconds / 3 * batches / run.cfg.batch_size / run.dist.size)
    asked, why = should_compile(run, seconds * run.micro_steps_per_rank)
    compiles = bool(run.dist.broadcast_from_main(asked))
    how_long = "; it takes up to a minute the first time, and --compile False none" * compiles
    print(f"compile: {'yes' if compiles else 'no'} ({why}){how_long}", flush=True)
    if compiles:
        seconds = compile_or_fall_back(run)
    run.eval_seconds = evaluation
    print_duration_estimate(run, seconds * run.micro_steps_per_rank)


def print_config_summary(run: Any) -> None:
    cfg, args, data, dist, parameters = run.cfg, run.model.args, run.data, run.dist, run.model.count_parameters()
    print(f"device: {run.backend}")
    print(f"model:  {parameters:,} parameters: dim {args.dim}, {args.n_layers} layers, {args.n_heads} heads, "
          f"{args.n_kv_heads} kv heads, vocabulary {args.vocab_size}, window {args.max_seq_len}")
    print(f"data:   {data.folder}: {data.total('train', 'tokens'):,} tokens to train on, "
          f"{data.total('val', 'tokens'):,} to evaluate on"
          + (", all in the GPU's memory" if not cfg.num_workers and fits_on_gpu(data, "train", run.backend.device) else ""))
    print(f"step:   {cfg.batch_size} windows x {cfg.gradient_accumulation_steps} = {run.tokens_per_step:,} tokens"
          + (f", shared by {dist.size} processes" if dist.size > 1 else "")
          + (", each with a part of the model" if run.is_sharded else ""))
    kept = 0 if run.is_sharded else count_activations(run)
    each = CHECKPOINT_BYTES_PER_PARAM * parameters / 1e6
    print(f"memory: {describe_memory(run, kept)}\ndisk:   up to {each:,.0f} MB each for last.pt and ckpt.pt", flush=True)
    warn_of_memory(run, kept)


def print_duration_estimate(run: Any, seconds_per_step: float) -> None:
    """Print how long the run will be, and what of that is not likely to be meant."""
    cfg, done = run.cfg, run.state.iter_num
    left, steps = run.seconds_left(seconds_per_step), run.steps_left(seconds_per_step)
    epochs = steps * run.tokens_per_step / run.data.total("train", "tokens")
    print(f"time:   about {format_hms(left)} for {steps:,} steps, {epochs:.1f} epochs, and evaluations"
          + (f", after the {done:,} steps that are done" if done else ""), flush=True)
    if left > LONG_RUN_SECONDS and run.backend.device.type == "cpu":
        print(f"note:   that is {left / 86400:.1f} days; --preset cpu_3min, or --max_minutes 60, fits a run to the "
              "time you have", flush=True)
    if epochs > USEFUL_EPOCHS:
        seldom = cfg.eval_interval > max(2 * steps / epochs, 1)
        keep = f"; --eval_interval {max(round(steps / epochs), 1)} lets ckpt.pt keep the best" if seldom else ""
        print(f"note:   the text is read {epochs:.0f} times, and known by heart after {USEFUL_EPOCHS}; more text or fewer "
              f"steps help most{'' if cfg.dropout else ', --dropout 0.1 too'}{keep}", flush=True)
    if cfg.preset and (made_for := PRESETS[cfg.preset].vocab_size) != run.model.args.vocab_size:
        print(f"note:   {cfg.preset} was measured with a vocabulary of {made_for}, this one has "
              f"{run.model.args.vocab_size}", flush=True)
    if not done and cfg.warmup_iters > steps / 2:
        print(f"note:   the learning rate grows over {cfg.warmup_iters} steps, which is most of the run; "
              f"--warmup_iters {steps // 10} would leave room for what follows", flush=True)


def compile_or_fall_back(run: Any) -> float:
    """Compile a run's model; the seconds that a micro-batch takes then.

    What was only chosen, and not asked for, may fail: on CUDA it needs a C compiler, and Python's own headers.
    """
    try:
        with compiler_errors():
            run.compile()
            return time_micro_batch(run)
    except UserError as error:
        if run.cfg.compile != "auto" or run.dist.size > 1:     # of several, the others would wait for ever
            raise
        print(f"note:   {str(error).splitlines()[0]}\n        this run goes on without", flush=True)
        torch.compiler.set_stance("force_eager")
        run.state.compiled = False
        return time_micro_batch(run)


def should_compile(run: Any, seconds_per_step: float) -> tuple[bool, str]:
    """Whether to compile the model, and why. A run that goes on keeps to what it began with, where that can be."""
    asked, left = run.cfg.compile, run.seconds_left(seconds_per_step)
    if asked != "auto":
        return asked, "as asked"
    if why := cannot_compile(run.backend.device):
        return False, why
    if run.state.iter_num:
        return run.state.compiled, "as when the run began"
    return left > MIN_SECONDS_TO_COMPILE, (f"without, the steps would take over {MIN_SECONDS_TO_COMPILE} seconds" if left > MIN_SECONDS_TO_COMPILE else
                               f"the steps take under {MIN_SECONDS_TO_COMPILE} seconds, of which it saves less than it takes")


def cannot_compile(device: torch.device) -> str:
    """Why a model cannot be compiled for a device; empty when it can, as far as one can tell."""
    if device.type not in ("cpu", "cuda"):
        return f"not for {device.type}"
    if device.type == "cpu":
        why = devices.why_no_compiler() or devices.why_no_headers()
        return f"{why}; compiled, training is faster" if why else ""
    if not importlib.util.find_spec("triton"):
        return "there is no triton package for it"
    return "" if torch.cuda.get_device_capability(device) >= (7, 0) else "the GPU is too old for it"


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Turn whatever fails into what to type: uncompiled, the same has just gone through.

    A file of an earlier time that was cut off by a kill makes it fail, for example, or one of another processor.
    """
    try:
        yield
    except Exception as error:
        if devices.is_oom(error):
            raise
        from torch._inductor.runtime.cache_dir_utils import cache_dir  # here, since it takes time
        inner = getattr(error, "inner_exception", error)
        line = devices.NOT_UTF8 if isinstance(inner, UnicodeError) else str(inner).strip().split("\n")[0]
        raise UserError(f"compiling failed: {line:.200}\n       train without it: --compile False; or delete what is "
                        f"left of an earlier time, {cache_dir()}, and try again") from error


def describe_memory(run: Any, kept: int) -> str:
    """What a run takes, in words; kept: by count_activations."""
    aside = 4 * (run.dist.size > 1 and run.micro_steps_per_rank > 1 and not run.is_sharded)      # DDP keeps sums apart from its own
    state = (STATE_BYTES + aside) * run.model.count_parameters() / 1e6
    if run.is_sharded:
        return f"{state / run.dist.size:,.0f} MB in each process for weights, gradients, optimizer; more for windows"
    return (f"{state:,.0f} MB for weights, gradients and optimizer, about {kept / 1e6:,.0f} MB for "
            f"{run.cfg.batch_size} windows")


def warn_of_memory(run: Any, kept: int) -> None:
    """On a CPU, whoever takes more memory than there is gets killed without a word."""
    free = free_memory() if run.backend.device.type == "cpu" else None
    size, state = run.cfg.batch_size, STATE_BYTES * run.model.count_parameters()
    if free is not None and state + ACTIVATION_PEAK_FACTOR * kept > free:
        most = min(int(max(free - state, 0) / (ACTIVATION_PEAK_FACTOR * kept / size)), size - 1)
        part = next((part for part in range(most, 0, -1) if size % part == 0), 0)
        less = (f"the same steps in less: --batch_size {part} --gradient_accumulation_steps "
                f"{run.cfg.gradient_accumulation_steps * size // part}" if part else "use a smaller model")
        print(f"note:   {free / 1e9:.1f} GB of memory are free, which may be too little; {less}", flush=True)


def count_activations(run: Any) -> int:
    """The bytes that a micro-batch keeps for its backward pass; a compiled model keeps less."""
    one, more = _measure_activations(run, 1), run.cfg.batch_size - 1
    return one + more * (_measure_activations(run, 2) - one) if more else one       # all of them at once may not fit


def _measure_activations(run: Any, windows: int) -> int:
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()              # the tensor itself would hold what holds it, for ever

    tokens = torch.zeros((windows, run.model.args.max_seq_len), dtype=torch.long, device=run.backend.device)
    with preserve_rng_and_grads(run), saved_tensors_hooks(note, lambda tensor: tensor), run.backend.autocast():
        run.model(tokens, tokens)
    weights = {weight.untyped_storage().data_ptr() for weight in run.model.parameters()}
    return sum(size for place, size in kept.items() if place not in weights)


def time_micro_batch(run: Any, batch_size: int = 0, spare: int = 0) -> float:
    """Seconds that a micro-batch takes, of another batch_size if it is given, and beside `spare` numbers in memory."""
    others = torch.empty(spare, device=run.backend.device)  # noqa: F841    no use but to be there
    shape = (batch_size or run.cfg.batch_size, run.model.args.max_seq_len)
    tokens = torch.zeros(shape, dtype=torch.long, device=run.backend.device)
    with preserve_rng_and_grads(run):
        for _ in range(2):                                  # the first one warms up, or compiles
            began = time.perf_counter()
            with run.backend.autocast():
                loss = run.ddp_model(tokens, tokens)
            loss.backward()
            loss.item()
        return time.perf_counter() - began


@contextmanager
def preserve_rng_and_grads(run: Any) -> Iterator[None]:
    """Leave the run's random numbers and gradients as they were."""
    with torch.random.fork_rng([run.backend.device] if run.backend.device.type == "cuda" else []):
        yield
    run.model.zero_grad(set_to_none=True)


def format_hms(seconds: float) -> str:
    minutes, seconds = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
