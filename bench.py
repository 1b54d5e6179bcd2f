"""Measures the project against other code and against the limits of this machine.

    python bench.py train                           # a training step, and that of transformers.LlamaForCausalLM
    python bench.py train --peer ../llama2.c        # and that of the model.py in another folder
    python bench.py quality --data my_stories --minutes 3      # trains the presets of up to 3 minutes

Contenders take turns, so that a machine that slows down slows all of them; medians are printed.
"""
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import device as devices
import settings
import train
from model import ModelArgs
from plan import Plan, memory
from presets import PRESETS
from settings import UserError

# ---- settings -----------------------------------------------------------------------------------
preset = ""             # train: the model and batch of a preset; empty: the defaults of train.py
peer = ""               # train: a folder with another model.py (ModelArgs, Transformer, loss in last_loss or returned)
rounds = 10             # train: steps of each contender
data = ""               # quality: real stories, as for train_vocab.py
minutes = 3.0           # quality: the longest preset to train
out_dir = "output/bench"            # quality: the runs
device = "auto"
dtype = "auto"
# ---- end of settings ----------------------------------------------------------------------------


def main() -> None:
    commands = {"train": bench_train, "quality": bench_quality}
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        commands[sys.argv[1]](settings.read(globals(), sys.argv[2:])[0])
    else:
        settings.read(globals(), [arg for arg in sys.argv[1:] if arg in ("-h", "--help")])
        raise UserError(f"what is to be measured? python bench.py {' | '.join(commands)}")


# ---- a training step ----------------------------------------------------------------------------

def bench_train(cfg: SimpleNamespace) -> None:
    where = devices.choose(cfg.device, cfg.dtype)
    chosen = ["--preset", cfg.preset] if cfg.preset else []
    block, _ = settings.read(vars(train), chosen, sys.stderr, {name: p.settings for name, p in PRESETS.items()})
    vocab_size = PRESETS[cfg.preset].vocab_size if cfg.preset else ModelArgs.vocab_size
    args = ModelArgs(**{name: getattr(block, name) for name in ModelArgs.__dataclass_fields__ if hasattr(block, name)}
                     | {"vocab_size": vocab_size})
    tokens = torch.randint(0, vocab_size, (block.batch_size, args.max_seq_len + 1), device=where.device)
    batch = (tokens[:, :-1], tokens[:, 1:])
    runs = {"compiled": own_run(block, where, args, True), "eager": own_run(block, where, args, False)}
    steps = {name: partial(train.take_step, run, repeat(batch)) for name, run in runs.items()}
    steps["transformers, float32"] = transformers_step(where, args, batch)
    if cfg.peer:
        steps[f"{cfg.peer}, float32"] = peer_step(Path(cfg.peer), where, args, batch)
    times = take_turns(steps, where, cfg.rounds)
    limit, count = matrix_seconds(args, where, batch[0].numel()), batch[0].numel()
    print(f"{where}: dim {args.dim}, {args.n_layers} layers, {count:,} tokens, one micro-batch a step")
    for name, seconds in times.items():
        print(f"{name:24} {count / seconds:10,.0f} tokens/s "
              f"{times['transformers, float32'] / seconds:6.2f} x transformers "
              f"{limit / seconds:6.0%} of what the matrix products allow")
    print(f"memory: {memory(runs['eager'])}")
    if where.device.type == "cuda":
        print(f"peak of all of them: {torch.cuda.max_memory_reserved() / 1e6:,.0f} MB")


def own_run(block: SimpleNamespace, where: devices.Device, args: ModelArgs, compiled: bool) -> train.Run:
    """What train.py trains, with steps of one micro-batch."""
    once = SimpleNamespace(**{**vars(block), "gradient_accumulation_steps": 1})
    run = train.Run(Plan(once, where, None, None, args, None, False))
    if compiled:
        run.compile()
    return run


def transformers_step(where: devices.Device, args: ModelArgs, batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError("bench.py train needs the package transformers: pip install transformers") from error
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.ffn_dim, rms_norm_eps=args.norm_eps,
        num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads,
        max_position_embeddings=args.max_seq_len, tie_word_embeddings=args.tie_embeddings)).to(where.device)
    return adamw_step(model, lambda: torch.nn.functional.cross_entropy(
        model(input_ids=batch[0]).logits.flatten(0, 1), batch[1].flatten()))


def peer_step(folder: Path, where: devices.Device, args: ModelArgs,
              batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    """A step of the Transformer in another folder's model.py, with the interface of llama2.c."""
    if not (folder / "model.py").is_file():
        raise UserError(f"no model.py in {folder.resolve()}")
    spec = importlib.util.spec_from_file_location("peer_model", folder / "model.py")
    sys.modules["peer_model"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = {name: getattr(args, name) for name in module.ModelArgs.__dataclass_fields__ if hasattr(args, name)}
    model = module.Transformer(module.ModelArgs(**{**shape, "hidden_dim": args.ffn_dim})).to(where.device)

    def loss() -> Tensor:
        out = model(*batch)
        return out[1] if isinstance(out, tuple) else getattr(model, "last_loss", out)
    return adamw_step(model, loss)


def adamw_step(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def matrix_seconds(args: ModelArgs, where: devices.Device, rows: int) -> float:
    """What the matrix products of a step take by themselves: no attention, nothing between them."""
    kv = args.n_kv_heads * args.head_dim
    shapes = [(args.dim, args.dim), (args.dim, kv), (args.dim, kv), (args.dim, args.dim),
              (args.dim, args.ffn_dim), (args.dim, args.ffn_dim), (args.ffn_dim, args.dim)] * args.n_layers
    shapes.append((args.dim, args.vocab_size))
    total, known = 0.0, {}
    for shape in shapes:
        if shape not in known:
            x, w, y = (torch.randn(s, device=where.device, dtype=where.dtype)
                       for s in ((rows, shape[0]), shape[::-1], (rows, shape[1])))
            products = {"forward": lambda: x @ w.T, "to x": lambda: y @ w, "to w": lambda: y.T @ x}
            known[shape] = sum(take_turns(products, where, 10).values())
        total += known[shape]
    return total


def take_turns(steps: dict[str, Callable[[], object]], where: devices.Device, rounds: int) -> dict[str, float]:
    """Median seconds of each, after two turns that do not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if where.device.type == "cuda":
                torch.cuda.synchronize()
            if turn > 1:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in times.items()}


# ---- what a span of time gives ------------------------------------------------------------------

def bench_quality(cfg: SimpleNamespace) -> None:
    """Train each preset up to cfg.minutes from nothing, and print what it reached and when."""
    if not cfg.data:
        raise UserError("bench.py quality needs real stories: --data PATH")
    print("| preset | vocabulary | parameters | tokens/s | wall minutes | bpb at minutes |\n|---|---|---|---|---|---|")
    for name, preset in PRESETS.items():
        if preset.settings.get("max_minutes", float("inf")) <= cfg.minutes:
            print(quality_row(name, preset.vocab_size, Path(cfg.out_dir), cfg.data), flush=True)


def quality_row(name: str, vocab_size: int, folder: Path, text: str) -> str:
    data_dir, out = folder / f"data{vocab_size}", folder / name
    if not (data_dir / f"tok{vocab_size}" / "manifest.json").exists():
        run_step("train_vocab.py", "--data", text, "--data_dir", data_dir, "--vocab_size", vocab_size)
        run_step("preprocess.py", "--data_dir", data_dir)
    began = time.monotonic()
    run_step("train.py", "--preset", name, "--init_from", "scratch", "--data_dir", data_dir, "--out_dir", out)
    wall = (time.monotonic() - began) / 60
    log, clock = ([json.loads(line) for line in (out / file).read_text(encoding="utf-8").splitlines()]
                  for file in ("log.jsonl", "clock.jsonl"))
    points = [(entry["bpb"], when["seconds"] / 60) for entry, when in zip(log[1:], clock) if "bpb" in entry]
    speed = statistics.median(when["tokens_per_second"] for when in clock if "tokens_per_second" in when)
    return (f"| {name} | {vocab_size} | {log[0]['parameters']:,} | {speed:,.0f} | {wall:.2f} | "
            + ", ".join(f"{bpb:.3f} at {minutes:.1f}" for bpb, minutes in points) + " |")


def run_step(script: str, *args) -> None:
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, args)]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"{script} failed")


if __name__ == "__main__":
    settings.run(main)
