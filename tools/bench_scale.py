"""Measure what several processes gain.

    torchrun --nproc_per_node=2 -m tools.bench_scale
    torchrun --nproc_per_node=2 -m tools.bench_scale --preset cpu_3min

The contenders take turns at the same training step: one process alone, with its share of the cores and with all; the
processes of torchrun with DDP, and with --shard. Then at generation, with the model whole and divided.
"""
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat
from types import SimpleNamespace

import torch
from torch.distributed import all_reduce

import train
from extras.tensor_parallel import TensorParallelGroup, check_divisible
from model import ModelArgs
from tinyllm import checkpoint, cli
from tinyllm.cli import UserError
from tinyllm.device import Backend, choose_backend
from tinyllm.distributed import SINGLE_PROCESS, DistributedContext, distributed_context
from tinyllm.engine import Engine
from tinyllm.machine import available_cores
from tools.bench import N_NEW_TOKENS, build_run, default_shape, generate, time_interleaved

# ---- settings -----------------------------------------------------------------------------------
preset = ""             # the model and batch of a preset; empty: the defaults of train.py
rounds = 10             # turns of each contender
device = "auto"
dtype = "auto"
# ---- end of settings ----------------------------------------------------------------------------


def main() -> None:
    with distributed_context() as dist:
        with dist.all_or_none():
            cfg, _ = cli.parse_settings(globals())
            if dist.size == 1:
                raise UserError("this measures several processes\n"
                                "       torchrun --nproc_per_node=2 -m tools.bench_scale")
            backend = choose_backend(dist.device(cfg.device), cfg.dtype)
            train_cfg, args = default_shape(cfg)
        cores = max(available_cores() // dist.size, 1)
        bench_steps(cfg, train_cfg, args, backend, dist, cores)
        try:
            check_divisible(args, dist)
        except UserError as error:
            print(f"generation is left out: {error}")
            return
        bench_generation(cfg, args, backend, dist, cores)


def bench_steps(cfg: SimpleNamespace, train_cfg: SimpleNamespace, args: ModelArgs, backend: Backend,
                dist: DistributedContext, cores: int) -> None:
    """Measure a step with one micro-batch for each process. `cores` is the share of a process."""
    tokens = torch.randint(0, args.vocab_size, (train_cfg.batch_size, args.max_seq_len + 1), device=backend.device)
    batch = (tokens[:, :-1], tokens[:, 1:])                     # x, y: (batch_size, max_seq_len)

    def build_step(context: DistributedContext, shard: bool) -> Callable[[], object]:
        run = build_run(train_cfg, backend, args, False, context, gradient_accumulation_steps=dist.size, shard=shard)
        return partial(train.train_step, run, repeat(batch))
    alone = build_step(SINGLE_PROCESS, False) if dist.is_main else do_nothing       # the other ranks wait for it
    gradients = torch.zeros(checkpoint.new_model(args).count_parameters(), device=backend.device)
    steps = {
        "alone, its cores": partial(time_together, alone, cores, backend, dist),
        "alone, all cores": partial(time_together, alone, available_cores(), backend, dist),
        "together, DDP": partial(time_together, build_step(dist, False), cores, backend, dist),
        "together, shard": partial(time_together, build_step(dist, True), cores, backend, dist),
        "mean of the gradients": partial(time_together, partial(all_reduce, gradients), cores, backend, dist)}
    times = time_interleaved(steps, backend, cfg.rounds)

    n_tokens = dist.size * batch[0].numel()
    print(f"{backend}: dim {args.dim}, {args.n_layers} layers, {n_tokens:,} tokens a step, {dist.size} processes\n"
          f"{'':24}   tokens/s   x the first   x the second")
    for name, seconds in times.items():
        print(f"{name:24} {n_tokens / seconds:10,.0f} {times['alone, its cores'] / seconds:13.2f} "
              f"{times['alone, all cores'] / seconds:14.2f}")
    expected = n_tokens / (times["alone, its cores"] / dist.size + times["mean of the gradients"])
    print(f"with this mean, the formula for DDP says {expected:,.0f} tokens/s", flush=True)


def bench_generation(cfg: SimpleNamespace, args: ModelArgs, backend: Backend, dist: DistributedContext, cores: int
                     ) -> None:
    """Measure generation by one process and by all; the other processes follow the divided engine."""
    torch.manual_seed(0)
    whole = Engine(checkpoint.new_model(args).to(backend.device), backend.dtype)
    divided = TensorParallelGroup(dist).engine(checkpoint.new_model(args), backend, "")
    engines = {"alone, its cores": (whole, cores), "alone, all cores": (whole, available_cores()),
               "divided": (divided, cores)}

    def measure() -> None:
        for batch_size in (1, 32):
            steps = {}
            for name, (engine, threads) in engines.items():
                step = partial(generate, engine, batch_size)
                steps[name] = partial(time_together, step, threads, backend, SINGLE_PROCESS)
            times = time_interleaved(steps, backend, cfg.rounds)
            n_tokens = batch_size * N_NEW_TOKENS
            speeds = [f"{name} {n_tokens / seconds:,.0f} tokens/s" for name, seconds in times.items()]
            print(f"generation, {batch_size} at a time: {'; '.join(speeds)}", flush=True)
    divided.run(measure)


def do_nothing() -> None:
    pass


def time_together(step: Callable[[], object], threads: int, backend: Backend, dist: DistributedContext) -> float:
    """Return the seconds of a step that all ranks begin at the same time."""
    torch.set_num_threads(threads)
    dist.max(0)
    start = time.perf_counter()
    step()
    if backend.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    cli.run_script(main)
