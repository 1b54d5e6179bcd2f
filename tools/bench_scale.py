"""Benchmark training and generation with several processes against one process.

    torchrun --nproc_per_node=2 -m tools.bench_scale
    torchrun --nproc_per_node=2 -m tools.bench_scale --preset cpu_3min

The contenders take turns at the same training step: one process with its share of the cores, one process with all
cores, and all processes with DDP and with --shard. Generation follows, without and with tensor parallelism.
"""
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))         # for python tools/bench_scale.py
import train
from extras.tensor_parallel import TensorParallelGroup, check_divisible
from model import ModelArgs
from tinyllm import checkpoint, cli
from tinyllm.cli import UserError
from tinyllm.device import Backend, choose_backend
from tinyllm.distributed import SINGLE_PROCESS, DistributedContext, distributed_context
from tinyllm.engine import Engine
from tinyllm.machine import available_cores
from tools.bench import N_NEW_TOKENS, build_run, default_shape, generate, random_batch, time_interleaved

# ---- settings -----------------------------------------------------------------------------------
preset = ""             # take model and batch size from this preset; empty: the defaults of train.py
rounds = 10             # measurements of each contender
device = "auto"         # auto, cpu, cuda, mps
dtype = "auto"          # auto, float32, bfloat16, float16
# ---- end of settings ----------------------------------------------------------------------------

COMMAND = "torchrun --nproc_per_node=2 -m tools.bench_scale"


def main() -> None:
    with distributed_context() as ranks:
        with ranks.fail_together():
            cfg, _ = cli.parse_settings(globals())
            if ranks.world_size == 1:
                raise UserError(f"bench_scale needs at least 2 processes\n       {COMMAND}")
            backend = choose_backend(ranks.device(cfg.device), cfg.dtype)
            train_cfg, args = default_shape(cfg)
        cores = max(available_cores() // ranks.world_size, 1)
        bench_steps(cfg, train_cfg, args, backend, ranks, cores)
        try:
            check_divisible(args, ranks.world_size)
        except UserError as error:
            print(f"skipping generation: {error}")
            return
        bench_generation(cfg, args, backend, ranks, cores)


def bench_steps(cfg: SimpleNamespace, train_cfg: SimpleNamespace, args: ModelArgs, backend: Backend,
                ranks: DistributedContext, cores: int) -> None:
    """Measure a training step with one micro-batch per process. cores: CPU cores per process."""
    batch = random_batch(train_cfg.batch_size, args, backend)

    def build_step(context: DistributedContext, shard: bool) -> Callable[[], object]:
        run = build_run(train_cfg, backend, args, False, context, gradient_accumulation_steps=ranks.world_size,
                        shard=shard)
        return partial(train.train_step, run, repeat(batch))
    alone = build_step(SINGLE_PROCESS, False) if ranks.is_main else int      # other ranks call int(), a no-op
    n_params = checkpoint.new_model(args).count_parameters()
    gradients = torch.zeros(n_params, device=backend.device)
    steps = {
        f"alone, {cores} of {available_cores()} cores": (alone, cores),
        "alone, all cores": (alone, available_cores()),
        f"{ranks.world_size} processes, DDP": (build_step(ranks, False), cores),
        f"{ranks.world_size} processes, shard": (build_step(ranks, True), cores),
        "mean of the gradients": (partial(torch.distributed.all_reduce, gradients), cores)}
    timed = {name: partial(time_together, step, threads, backend, ranks) for name, (step, threads) in steps.items()}
    times = time_interleaved(timed, backend, cfg.rounds)

    n_tokens = ranks.world_size * batch[0].numel()
    share_seconds, all_cores_seconds, *_, mean_seconds = times.values()
    print(f"{backend}: dim {args.dim}, {args.n_layers} layers, {n_params:,} parameters, {n_tokens:,} tokens a step\n"
          f"{'':24}   tokens/s   x the first   x the second   MB sent by all")
    for name, (step, _) in steps.items():
        print(f"{name:24} {n_tokens / times[name]:10,.0f} {share_seconds / times[name]:13.2f} "
              f"{all_cores_seconds / times[name]:14.2f} {bytes_sent(step, ranks) / 1e6:16.1f}")
    expected = n_tokens / (share_seconds / ranks.world_size + mean_seconds)
    print(f"estimate for DDP from the time of the mean: {expected:,.0f} tokens/s", flush=True)


def bench_generation(cfg: SimpleNamespace, args: ModelArgs, backend: Backend, ranks: DistributedContext, cores: int
                     ) -> None:
    """Measure generation on one process and on all. Other ranks follow rank 0 in the divided engine."""
    torch.manual_seed(0)
    whole = Engine(checkpoint.new_model(args).to(backend.device), backend.dtype)
    divided = TensorParallelGroup(ranks).engine(checkpoint.new_model(args), backend, "")
    engines = {f"alone, {cores} of {available_cores()} cores": (whole, cores),
               "alone, all cores": (whole, available_cores()),
               f"divided among {ranks.world_size}": (divided, cores)}

    def measure() -> None:
        for batch_size in (1, 32):
            steps = {}
            for name, (engine, threads) in engines.items():
                step = partial(generate, engine, batch_size)
                steps[name] = partial(time_together, step, threads, backend, SINGLE_PROCESS)
            times = time_interleaved(steps, backend, cfg.rounds)
            n_tokens = batch_size * N_NEW_TOKENS
            speeds = [f"{name} {n_tokens / seconds:,.0f} tokens/s" for name, seconds in times.items()]
            print(f"generation, batch size {batch_size}: {'; '.join(speeds)}", flush=True)
    divided.run(measure)


def bytes_sent(step: Callable[[], object], ranks: DistributedContext) -> int:
    """Return the bytes that a step sends over Linux's loopback interface; 0 on other systems."""
    path = Path("/proc/net/dev")
    if not path.exists():
        return 0
    counts = []
    for action in (int, step):
        action()
        ranks.max(0)                     # waits for all ranks
        counts.append(int(path.read_text(encoding="utf-8").partition("lo:")[2].split()[0]))
    return counts[1] - counts[0]


def time_together(step: Callable[[], object], threads: int, backend: Backend, ranks: DistributedContext) -> float:
    """Return the seconds of a step that all ranks start together."""
    torch.set_num_threads(threads)
    ranks.max(0)
    start = time.perf_counter()
    step()
    if backend.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    cli.run_script(main)
