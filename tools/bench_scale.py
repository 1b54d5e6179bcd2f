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
from extras.tensor_parallel import Team, check
from model import ModelArgs, Transformer
from tinyllm import device as devices
from tinyllm.cli import UserError
from tinyllm.distributed import World, joined
from tinyllm.engine import Engine
from tinyllm.machine import cores
from tools import bench


def bench_scale(cfg: SimpleNamespace) -> None:
    """Called by bench.py in each of the processes; the first one prints."""
    with joined() as world:
        if world.size == 1:
            raise UserError("several processes are to be measured: torchrun --nproc_per_node=2 -m tools.bench scale")
        where = devices.choose(world.device(cfg.device), cfg.dtype)
        block, args = bench.default_shape(cfg)
        compare_steps(cfg, block, args, where, world)
        if problem := cannot_divide(args, world):
            print(f"writing is left out: {problem}")
            return
        torch.manual_seed(0)
        whole = Engine(Transformer(args).to(where.device), where.dtype)
        divided = Team(world).engine(Transformer(args), where, "")
        divided.work(lambda: compare_writing(cfg, whole, divided, where, world))


def cannot_divide(args: ModelArgs, world: World) -> str:
    try:
        check(args, world)
    except UserError as error:
        return str(error)
    return ""


def compare_steps(cfg: SimpleNamespace, block: SimpleNamespace, args: ModelArgs, where: devices.Device, world: World
                  ) -> None:
    """A step of as many micro-batches as there are processes."""
    tokens = torch.randint(0, args.vocab_size, (block.batch_size, args.max_seq_len + 1), device=where.device)
    rows = world.size * tokens[:, 1:].numel()

    def stepper(own: World, shard: bool) -> Callable[[], object]:
        run = bench.own_run(block, where, args, False, own, gradient_accumulation_steps=world.size, shard=shard)
        return partial(train.take_step, run, repeat((tokens[:, :-1], tokens[:, 1:])))
    alone = stepper(World(), False) if world.first else int         # int() does nothing, while the first one works
    gradients = torch.zeros(Transformer(args).count_parameters(), device=where.device)
    share = max(cores() // world.size, 1)
    contenders = [(f"alone, {share} of {cores()} cores", alone, share), ("alone, all cores", alone, cores()),
                  (f"{world.size} processes, DDP", stepper(world, False), share),
                  (f"{world.size} processes, shard", stepper(world, True), share),
                  ("mean of the gradients", partial(torch.distributed.all_reduce, gradients), share)]
    times = bench.take_turns({name: partial(timed, step, threads, where, world) for name, step, threads in contenders},
                             where, cfg.rounds)
    first, second, *_, sending = times.values()
    print(f"{where}: dim {args.dim}, {args.n_layers} layers, {len(gradients):,} parameters, {rows:,} tokens a step\n"
          f"{'':24}   tokens/s   x the first   x the second   MB sent by all")
    for name, step, _ in contenders:
        print(f"{name:24} {rows / times[name]:10,.0f} {first / times[name]:13.2f} {second / times[name]:14.2f} "
              f"{sent(step, world) / 1e6:16.1f}")
    print(f"with this mean, the formula for DDP says {rows / (first / world.size + sending):,.0f} tokens/s", flush=True)


def compare_writing(cfg: SimpleNamespace, whole: Engine, divided: Engine, where: devices.Device, world: World) -> None:
    """For the first process; the others compute along with the divided engine."""
    share = max(cores() // world.size, 1)
    for batch in (1, 32):
        contenders = [(f"alone, {share} of {cores()} cores", whole, share), ("alone, all cores", whole, cores()),
                      (f"divided among {world.size}", divided, share)]
        times = bench.take_turns({name: partial(timed, partial(bench.write, engine, batch), threads, where, World())
                                  for name, engine, threads in contenders}, where, cfg.rounds)
        new = batch * (bench.LENGTH - len(bench.PROMPT))
        print(f"writing, {batch} at a time: " + "; ".join(f"{name} {new / seconds:,.0f} tokens/s"
                                                          for name, seconds in times.items()), flush=True)


def sent(step: Callable[[], object], world: World) -> int:
    """The bytes of a step's messages, where they go through the loopback of Linux; else 0."""
    def so_far() -> int:
        world.max(0)
        counters = Path("/proc/net/dev").read_text(encoding="utf-8") if Path("/proc/net/dev").exists() else ""
        return int((counters.partition("lo:")[2].split() or [0])[0])
    begin = so_far()
    step()
    return so_far() - begin


def timed(step: Callable[[], object], threads: int, where: devices.Device, world: World) -> float:
    """Seconds of a step that all begin at the same time."""
    torch.set_num_threads(threads)
    world.max(0)
    began = time.perf_counter()
    step()
    if where.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began
