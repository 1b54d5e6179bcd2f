"""bench.py scale: what several processes gain, and what their messages cost.

    torchrun --nproc_per_node=2 -m tools.bench scale

All take turns at the same step of the defaults or of a preset: one process alone, with one share of the cores and with
all of them; the processes of torchrun with DDP, and with `shard`. Then at writing with the model whole and divided.
"""
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import torch

import train
from extras.tensor_parallel import TensorParallelGroup, check_divisible
from model import ModelArgs, Transformer
from tinyllm import device as devices
from tinyllm.cli import UserError
from tinyllm.distributed import DistributedContext, distributed_context
from tinyllm.engine import Engine
from tinyllm.machine import available_cores
from tools import bench


def bench_scale(cfg: SimpleNamespace) -> None:
    """Called by bench.py in each of the processes; the first one prints."""
    with distributed_context() as dist:
        if dist.size == 1:
            raise UserError("several processes are to be measured: torchrun --nproc_per_node=2 -m tools.bench scale")
        where = devices.choose_backend(dist.device(cfg.device), cfg.dtype)
        block, args = bench.default_shape(cfg)
        compare_steps(cfg, block, args, where, dist)
        if problem := cannot_divide(args, dist):
            print(f"writing is left out: {problem}")
            return
        torch.manual_seed(0)
        whole = Engine(Transformer(args).to(where.device), where.dtype)
        divided = TensorParallelGroup(dist).engine(Transformer(args), where, "")
        divided.run(lambda: compare_writing(cfg, whole, divided, where, dist))


def cannot_divide(args: ModelArgs, dist: DistributedContext) -> str:
    try:
        check_divisible(args, dist)
    except UserError as error:
        return str(error)
    return ""


def compare_steps(cfg: SimpleNamespace, block: SimpleNamespace, args: ModelArgs, where: devices.Backend, dist: DistributedContext
                  ) -> None:
    """A step of as many micro-batches as there are processes."""
    tokens = torch.randint(0, args.vocab_size, (block.batch_size, args.max_seq_len + 1), device=where.device)
    rows = dist.size * tokens[:, 1:].numel()

    def stepper(own: DistributedContext, shard: bool) -> Callable[[], object]:
        run = bench.build_run(block, where, args, False, own, gradient_accumulation_steps=dist.size, shard=shard)
        return partial(train.train_step, run, repeat((tokens[:, :-1], tokens[:, 1:])))
    alone = stepper(DistributedContext(), False) if dist.is_main else int         # int() does nothing, while the first one works
    gradients = torch.zeros(Transformer(args).count_parameters(), device=where.device)
    share = max(available_cores() // dist.size, 1)
    contenders = [(f"alone, {share} of {available_cores()} cores", alone, share), ("alone, all cores", alone, available_cores()),
                  (f"{dist.size} processes, DDP", stepper(dist, False), share),
                  (f"{dist.size} processes, shard", stepper(dist, True), share),
                  ("mean of the gradients", partial(torch.distributed.all_reduce, gradients), share)]
    times = bench.time_interleaved({name: partial(timed, step, threads, where, dist) for name, step, threads in contenders},
                             where, cfg.rounds)
    first, second, *_, sending = times.values()
    print(f"{where}: dim {args.dim}, {args.n_layers} layers, {len(gradients):,} parameters, {rows:,} tokens a step\n"
          f"{'':24}   tokens/s   x the first   x the second   MB sent by all")
    for name, step, _ in contenders:
        print(f"{name:24} {rows / times[name]:10,.0f} {first / times[name]:13.2f} {second / times[name]:14.2f} "
              f"{sent(step, dist) / 1e6:16.1f}")
    print(f"with this mean, the formula for DDP says {rows / (first / dist.size + sending):,.0f} tokens/s", flush=True)


def compare_writing(cfg: SimpleNamespace, whole: Engine, divided: Engine, where: devices.Backend, dist: DistributedContext) -> None:
    """For the first process; the others compute along with the divided engine."""
    share = max(available_cores() // dist.size, 1)
    for batch in (1, 32):
        contenders = [(f"alone, {share} of {available_cores()} cores", whole, share), ("alone, all cores", whole, available_cores()),
                      (f"divided among {dist.size}", divided, share)]
        times = bench.time_interleaved({name: partial(timed, partial(bench.generate, engine, batch), threads, where, DistributedContext())
                                  for name, engine, threads in contenders}, where, cfg.rounds)
        new = batch * (bench.LENGTH - len(bench.PROMPT))
        print(f"writing, {batch} at a time: " + "; ".join(f"{name} {new / seconds:,.0f} tokens/s"
                                                          for name, seconds in times.items()), flush=True)


def sent(step: Callable[[], object], dist: DistributedContext) -> int:
    """The bytes of a step's messages, where they go through the loopback of Linux; else 0."""
    def so_far() -> int:
        dist.max(0)
        counters = Path("/proc/net/dev").read_text(encoding="utf-8") if Path("/proc/net/dev").exists() else ""
        return int((counters.partition("lo:")[2].split() or [0])[0])
    begin = so_far()
    step()
    return so_far() - begin


def timed(step: Callable[[], object], threads: int, where: devices.Backend, dist: DistributedContext) -> float:
    """Seconds of a step that all begin at the same time."""
    torch.set_num_threads(threads)
    dist.max(0)
    began = time.perf_counter()
    step()
    if where.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began
