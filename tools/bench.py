"""Measures the project against other code and against the limits of this machine.

    python -m tools.bench train                         # a training step, and that of transformers.LlamaForCausalLM
    python -m tools.bench train --peer ../llama2.c      # and that of the model.py in another folder
    python -m tools.bench quality --data my_stories --minutes 3     # trains the presets of up to 3 minutes
    python -m tools.bench sample                        # writing, alone and 32 at a time (on a GPU 256 too), and that
                                                        # of transformers
    python -m tools.bench sample --peer ../llama2.c     # and that of the run.c in another folder (needs gcc)
    python -m tools.bench sample --checkpoint output/ckpt.pt        # and the val loss of each format of the weights
    python -m tools.bench text --data my_stories --text_mb 200      # steps 1 and 2, and the plain way of doing them
    torchrun --nproc_per_node=2 -m tools.bench scale    # steps and writing of several processes, and of one

Contenders take turns, so that a machine that slows down slows all of them; medians are printed.
"""
import importlib.util
import json
import math
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, cycle, islice, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import train
from extras.formats import llama2c
from extras.gpt2 import GPT2Args
from model import ModelArgs, Transformer
from tinyllm import checkpoint as checkpoints
from tinyllm import cli, corpus, documents, shards
from tinyllm import device as devices
from tinyllm.cli import UserError
from tinyllm.dataset import IGNORE_INDEX, Task
from tinyllm.distributed import SINGLE_PROCESS, DistributedContext
from tinyllm.engine import Engine, build_engine
from tinyllm.estimate import describe_memory
from tinyllm.presets import PRESETS
from tinyllm.project import find_tokenizer
from tinyllm.resume import RunPlan
from tinyllm.run import TrainRun, choose_run_class
from tinyllm.sampling import SamplingParams

# ---- settings -----------------------------------------------------------------------------------
preset = ""             # train, scale: the model and batch of a preset; empty: the defaults of train.py
peer = ""               # train: a folder with another model.py (ModelArgs, Transformer, loss in last_loss or returned)
                        # sample: a folder with llama2.c's run.c
rounds = 10             # turns of each contender; of text, whose turns are long, at most 3
checkpoint = ""         # sample: a trained model, also a GPT-2; empty: the default one, untrained
data_dir = "data"       # sample: where the val split of the checkpoint's vocabulary is
data = ""               # quality, text: real stories, as for train_vocab.py; text: the built-in ones when empty
text_mb = 100.0         # text: the stories are repeated until they are so many MB
minutes = 3.0           # quality: the longest preset to train
out_dir = "output/bench"            # quality: the runs
device = "auto"
dtype = "auto"
# ---- end of settings ----------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    commands = {"train": bench_train, "quality": bench_quality, "sample": bench_sample, "text": bench_text,
                "scale": run_bench_scale}
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        cfg, _ = cli.parse_settings(globals(), sys.argv[2:])
        if cfg.rounds < 1:
            raise UserError(f"rounds must be at least 1, not {cfg.rounds}")
        commands[sys.argv[1]](cfg)
    else:
        cli.parse_settings(globals(), [arg for arg in sys.argv[1:] if arg in ("-h", "--help")])
        raise UserError(f"what is to be measured? python -m tools.bench {' | '.join(commands)}")


def run_bench_scale(cfg: SimpleNamespace) -> None:
    from tools import bench_scale
    bench_scale.bench_scale(cfg)


# ---- a training step ----------------------------------------------------------------------------

def bench_train(cfg: SimpleNamespace) -> None:
    where = devices.choose_backend(cfg.device, cfg.dtype)
    block, args = default_shape(cfg)
    tokens = torch.randint(0, args.vocab_size, (block.batch_size, args.max_seq_len + 1), device=where.device)
    batch = (tokens[:, :-1], tokens[:, 1:])
    runs = {name: build_run(block, where, args, name == "compiled", gradient_accumulation_steps=1)
            for name in ("compiled", "eager")}
    steps = {name: partial(train.train_step, run, repeat(batch)) for name, run in runs.items()}
    steps["transformers, float32"] = transformers_step(where, args, batch)
    if cfg.peer:
        steps[f"{cfg.peer}, float32"] = peer_step(Path(cfg.peer), where, args, batch)
    times = time_interleaved(steps, where, cfg.rounds)
    limit, rows = matrix_seconds(args, where, batch[0].numel()), batch[0].numel()
    print(f"{where}: dim {args.dim}, {args.n_layers} layers, {rows:,} tokens, one micro-batch a step")
    for name, seconds in times.items():
        print(f"{name:24} {rows / seconds:10,.0f} tokens/s "
              f"{times['transformers, float32'] / seconds:6.2f} x transformers "
              f"{limit / seconds:6.0%} of what the matrix products allow")
    print(f"memory: {describe_memory(runs['eager'])}")
    if where.device.type == "cuda":
        print(f"peak of all of them: {torch.cuda.max_memory_reserved() / 1e6:,.0f} MB")


def default_shape(cfg: SimpleNamespace) -> tuple[SimpleNamespace, ModelArgs]:
    """The settings of train.py, or of a preset, and the model that they make."""
    chosen = ["--preset", cfg.preset] if cfg.preset else []
    block, _ = cli.parse_settings(vars(train), chosen, sys.stderr, {name: p.settings for name, p in PRESETS.items()})
    vocab_size = PRESETS[cfg.preset].vocab_size if cfg.preset else ModelArgs.vocab_size
    shape = {name: getattr(block, name) for name in ModelArgs.__dataclass_fields__ if hasattr(block, name)}
    return block, ModelArgs(**{**shape, "vocab_size": vocab_size})


def build_run(block: SimpleNamespace, where: devices.Backend, args: ModelArgs, compiled: bool,
              dist: DistributedContext = SINGLE_PROCESS, **changes: Any) -> TrainRun:
    """What train.py trains, with some settings changed."""
    cfg = SimpleNamespace(**{**vars(block), **changes})
    run = choose_run_class(cfg, dist)(RunPlan(cfg, where, None, None, args, None, False, dist))
    if compiled:
        run.compile()
    return run


def transformers_step(where: devices.Backend, args: ModelArgs, batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    model = transformers_model(args, where)
    return adamw_step(model, lambda: torch.nn.functional.cross_entropy(
        model(input_ids=batch[0]).logits.flatten(0, 1), batch[1].flatten()))


def transformers_model(args: ModelArgs | GPT2Args, where: devices.Backend) -> torch.nn.Module:
    try:
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError("bench.py needs the package transformers: pip install transformers") from error
    if isinstance(args, GPT2Args):
        return GPT2LMHeadModel(GPT2Config(
            vocab_size=args.vocab_size, n_positions=args.max_seq_len, n_embd=args.dim, n_layer=args.n_layers,
            n_head=args.n_heads)).to(where.device)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.ffn_dim, rms_norm_eps=args.norm_eps,
        num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads,
        max_position_embeddings=args.max_seq_len, tie_word_embeddings=args.tie_embeddings)).to(where.device)


def peer_step(folder: Path, where: devices.Backend, args: ModelArgs,
              batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    """A step of the Transformer in another folder's model.py, with the interface of llama2.c."""
    if not (folder / "model.py").is_file():
        raise UserError(f"no model.py in {folder.resolve()}")
    spec = importlib.util.spec_from_file_location("peer_model", folder / "model.py")
    sys.modules["peer_model"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = {name: getattr(args, name) for name in module.ModelArgs.__dataclass_fields__ if hasattr(args, name)}
    model = module.Transformer(module.ModelArgs(**{**shape, "hidden_dim": args.ffn_dim})).to(where.device)
    whole = [part.contiguous() for part in batch]       # as the views of llama2.c want them

    def loss() -> Tensor:
        out = model(*whole)
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


def matrix_seconds(args: ModelArgs, where: devices.Backend, rows: int) -> float:
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
            known[shape] = sum(time_interleaved(products, where, 10).values())
        total += known[shape]
    return total


def time_interleaved(steps: dict[str, Callable[[], object]], where: devices.Backend, rounds: int) -> dict[str, float]:
    """Median seconds of each, after two turns that do not count. A step that returns a float has measured itself."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            own = step()
            if where.device.type != "cpu":
                torch.accelerator.synchronize()
            if turn > 1:
                times[name].append(own if isinstance(own, float) else time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in times.items()}


# ---- writing ------------------------------------------------------------------------------------

PROMPT, LENGTH, SAMPLING = [1, 10, 20, 30, 40], 256, SamplingParams(temperature=0.8, top_k=300)


def bench_sample(cfg: SimpleNamespace) -> None:
    """Tokens per second from a prompt of 5 tokens to 256, the prompt's time included; a batch counts all its tokens."""
    where = devices.choose_backend(cfg.device, cfg.dtype, training=False)
    state = checkpoints.read_model(cfg.checkpoint) if cfg.checkpoint else None
    model = (checkpoints.build_model(state) if state else checkpoints.new_model(ModelArgs())).to(where.device)
    name = str(where.dtype).removeprefix("torch.")
    build, on_cpu = partial(build_engine, model), where.device.type == "cpu"
    engines = {name: build(where.dtype)}
    if on_cpu:
        engines |= {"float32": build(), "int8": build(quantize="int8")}
    compiled = {}
    if isinstance(model, Transformer) or not on_cpu:
        compiled[f"{name}, compiled"] = build(where.dtype, compiled=True)
    if isinstance(model, Transformer) and on_cpu:
        compiled["int8, compiled"] = build(where.dtype, "int8", compiled=True)
    theirs = transformers_model(model.args, where).eval()
    for batch in (1, 32) if on_cpu else (1, 32, 256):
        steps = {name: partial(generate, engine, batch) for name, engine in {**engines, **compiled}.items()}
        steps["transformers, float32"] = partial(write_with_transformers, theirs, batch)
        with tempfile.TemporaryDirectory() as home:
            if cfg.peer and batch == 1:
                steps["run.c, float32"] = run_c(Path(cfg.peer), model, Path(home))
            times = time_interleaved(steps, where, cfg.rounds)
        print(f"{where}: dim {model.args.dim}, {model.args.n_layers} layers, {batch} at a time")
        for name, seconds in times.items():
            print(f"{name:24} {batch * (LENGTH - len(PROMPT)) / seconds:10,.0f} tokens/s "
                  f"{times['transformers, float32'] / seconds:6.2f} x transformers")
    if state:
        for name, engine in engines.items():
            print(f"{name:24} val loss {val_loss(engine, state, cfg.data_dir):.4f}")


def generate(engine: Engine, batch: int) -> None:
    for _ in engine.generate([PROMPT] * batch, LENGTH - len(PROMPT), SAMPLING):
        pass


@torch.inference_mode()
def write_with_transformers(model: torch.nn.Module, batch: int) -> None:
    new = LENGTH - len(PROMPT)
    model.generate(torch.tensor([PROMPT] * batch, device=model.device), max_new_tokens=new, min_new_tokens=new,
                   do_sample=True, temperature=SAMPLING.temperature, top_k=SAMPLING.top_k, pad_token_id=0)


def run_c(folder: Path, model: Transformer, home: Path) -> Callable[[], float]:
    """Build llama2.c's run.c in home, give it the model, and return what runs it and reads the time that it reports.

    It begins with bos alone and draws from all tokens.
    """
    if not isinstance(model, Transformer):
        raise UserError("run.c is for Llama models, and this is a GPT-2; leave --peer out")
    if not (folder / "run.c").is_file() or not shutil.which("gcc"):
        raise UserError(f"--peer needs gcc, and a run.c in {folder.resolve()}")
    build = ["gcc", "-Ofast", "-fopenmp", "-march=native", folder / "run.c", "-lm", "-o", home / "run"]
    subprocess.run(build, check=True)
    llama2c.write_weights(checkpoints.model_state(model), home / "model.bin", version=0)
    words = struct.pack("<fi2s", 0.0, 2, b"aa") * model.args.vocab_size
    (home / "tokenizer.bin").write_bytes(struct.pack("<i", 2) + words)
    seeds = count(1)

    def step() -> float:
        while True:         # a text that ends early is too short to time
            done = subprocess.run([home / "run", home / "model.bin", "-z", home / "tokenizer.bin", "-n", str(LENGTH),
                                   "-t", str(SAMPLING.temperature), "-p", "1", "-s", str(next(seeds))], capture_output=True,
                                  env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}, check=True)
            if len(done.stdout) > min(LENGTH, model.args.max_seq_len):          # two letters for each token
                return (LENGTH - len(PROMPT)) / float(done.stderr.split()[-1])
    return step


def val_loss(engine: Engine, state: dict[str, Any], data_dir: str) -> float:
    """Nats per token over the val split, as train.py scores it."""
    vocabulary = checkpoints.build_tokenizer(state)
    data = shards.load_shards(find_tokenizer(data_dir, digest=vocabulary.sha256).with_suffix(""), vocabulary.sha256)
    nats = scored = 0.0
    for x, y in Task.iter_split(data, "val", 1, engine.args.max_seq_len):
        targets = y[0][y[0] != IGNORE_INDEX]
        logprobs = next(engine.read([*x[0].tolist(), 0]))[:len(targets)]
        nats, scored = nats - logprobs.gather(1, targets.to(engine.device)[:, None]).sum().item(), scored + len(targets)
    return nats / scored


# ---- text to tokens -----------------------------------------------------------------------------

PROCESSES = 2


def bench_text(cfg: SimpleNamespace) -> None:
    """Steps 1 and 2 from their start to their end, in turns with tests/plain.py, with PROCESSES for both."""
    if not 0.1 <= cfg.text_mb <= 100_000:
        raise UserError(f"text_mb must be 0.1 to 100,000, not {cfg.text_mb}; below 100, starting up tells most")
    with tempfile.TemporaryDirectory() as home:
        stories, model = Path(home, "stories"), Path(home, "data", "tok4096.model")
        size = write_stories(cfg, stories)
        workers = ["--num_workers", str(PROCESSES)]
        plain = [sys.executable, ROOT / "tests" / "plain.py"]
        commands = {
            "train_vocab.py": [sys.executable, ROOT / "train_vocab.py", "--data", stories, "--data_dir", model.parent,
                               *workers],
            "plain vocabulary": [*plain, "vocabulary", stories, "4096", Path(home, "plain.model")],
            "preprocess.py": [sys.executable, ROOT / "preprocess.py", "--data_dir", model.parent, *workers],
            "plain shards": [*plain, "shards", stories, model, Path(home, "plain"), str(PROCESSES)]}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(min(cfg.rounds, 3)):
            for name, command in commands.items():
                shutil.rmtree(model.with_suffix(""), ignore_errors=True)
                taken[name].append(time_process(command))
    print(f"{size / 1e6:,.0f} MB of stories, {PROCESSES} processes")
    for own, other in (("train_vocab.py", "plain vocabulary"), ("preprocess.py", "plain shards")):
        (seconds, memory), (their_seconds, their_memory) = (map(statistics.median, zip(*taken[name]))
                                                            for name in (own, other))
        for name, time_taken, peak in ((own, seconds, memory), (other, their_seconds, their_memory)):
            print(f"{name:20} {time_taken:7.1f} s {size / 1e6 / time_taken:7.1f} MB/s {peak / 1e6:8,.0f} MB of memory")
        print(f"{'':20} {their_seconds / seconds:7.2f} x the speed"
              + (f", {memory / their_memory:.2f} x the memory" if their_memory else ""))       # known on Linux only


def write_stories(cfg: SimpleNamespace, folder: Path) -> int:
    """Write the stories again and again, in files of 1/10 of text_mb; returns their size in bytes."""
    source = Path(cfg.data) if cfg.data else corpus.default_source(cfg.data_dir)
    texts = [text for path in corpus.find_files(source) for text in documents.read_documents(path)]
    folder.mkdir()
    for number in range(10):
        chosen, size = [], 0
        for text in islice(cycle(texts), number * len(texts) // 10, None):
            chosen.append({"story": text})
            size += len(text.encode())
            if size > cfg.text_mb * 1e5:
                break
        (folder / f"{number}.json").write_text(json.dumps(chosen, ensure_ascii=False), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.iterdir())


def time_process(command: list[Any]) -> tuple[float, float]:
    """Seconds, and on Linux the peak of the memory that the processes of a command take together, in bytes."""
    began = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               start_new_session=True)
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            peak[0] = max(peak[0], sum(memory_of_session(process.pid)))
    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    if process.returncode:
        raise UserError(f"{command[1]} failed:\n{errors.decode(errors='replace')[-2000:]}")
    return seconds, peak[0]


def memory_of_session(session: int) -> Iterator[int]:
    """Bytes of each process of a session; what several share is divided among them (PSS)."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[3]) == session:
                shares = (folder / "smaps_rollup").read_text(encoding="utf-8")
                yield int(shares.partition("\nPss:")[2].split()[0]) * 1024
        except (OSError, IndexError):       # it has ended
            continue


# ---- what a span of time gives ------------------------------------------------------------------

def bench_quality(cfg: SimpleNamespace) -> None:
    """Train each preset up to cfg.minutes from nothing, and print what it reached and when."""
    if not cfg.data:
        raise UserError("bench.py quality needs real stories: --data PATH")
    chosen = [name for name, preset in PRESETS.items() if preset.settings.get("max_minutes", math.inf) <= cfg.minutes]
    if not chosen:
        raise UserError(f"no preset is as short as {cfg.minutes:g} minutes; the shortest takes 3: --minutes 3")
    print("| preset | vocabulary | parameters | tokens/s | wall minutes | bpb at minutes |\n|---|---|---|---|---|---|")
    for name in chosen:
        print(quality_row(name, PRESETS[name].vocab_size, cfg), flush=True)


def quality_row(name: str, vocab_size: int, cfg: SimpleNamespace) -> str:
    source = zlib.crc32(str(Path(cfg.data).resolve()).encode())
    data_dir, out = Path(cfg.out_dir, f"data-{source:08x}"), Path(cfg.out_dir, name)
    if not (data_dir / f"tok{vocab_size}" / "manifest.json").exists():
        run_step("train_vocab.py", "--data", cfg.data, "--data_dir", data_dir, "--vocab_size", vocab_size)
        run_step("preprocess.py", "--data_dir", data_dir, "--vocab_size", vocab_size)
    began = time.monotonic()
    run_step("train.py", "--preset", name, "--init_from", "scratch", "--data_dir", data_dir, "--out_dir", out,
             "--vocab_size", vocab_size, "--device", cfg.device, "--dtype", cfg.dtype)
    wall = (time.monotonic() - began) / 60
    log, clock = ([json.loads(line) for line in (out / file).read_text(encoding="utf-8").splitlines()]
                  for file in ("log.jsonl", "clock.jsonl"))
    points = [(entry["bpb"], when["seconds"] / 60) for entry, when in zip(log[1:], clock) if "bpb" in entry]
    speed = statistics.median(when["tokens_per_second"] for when in clock if "tokens_per_second" in when)
    return (f"| {name} | {vocab_size} | {log[0]['parameters']:,} | {speed:,.0f} | {wall:.2f} | "
            + ", ".join(f"{bpb:.3f} at {minutes:.1f}" for bpb, minutes in points) + " |")


def run_step(script: str, *args) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"{script} failed")


if __name__ == "__main__":
    cli.run_script(main)
