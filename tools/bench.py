"""Benchmark training, sampling and preprocessing against other implementations.

    python -m tools.bench train                         # a training step, against transformers.LlamaForCausalLM
    python -m tools.bench train --peer ../llama2.c      # also against the model.py in another folder
    python -m tools.bench quality --data my_stories --minutes 3     # train the presets of up to 3 minutes
    python -m tools.bench sample                        # 1 and 32 sequences (GPU: also 256), against transformers
    python -m tools.bench sample --peer ../llama2.c     # also against the run.c in another folder (needs gcc)
    python -m tools.bench sample --checkpoint output/ckpt.pt        # also the val loss of each dtype
    python -m tools.bench text --data my_stories --text_mb 200      # steps 1 and 2, against tests/plain.py

Contenders take turns, so that a slower phase of the machine affects all of them. The results are medians.
"""
import json
import math
import os
import runpy
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count, cycle, islice, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))         # for python tools/bench.py
import train                            # before torch, whose log level it sets

import torch
from torch import Tensor

from model import ModelArgs, Transformer
from tinyllm import checkpoint as checkpoints
from tinyllm import cli, corpus, documents, optional, shards
from tinyllm import device as devices
from tinyllm.checkpoint import Checkpoint
from tinyllm.cli import UserError
from tinyllm.dataset import IGNORE_INDEX, Task
from tinyllm.device_errors import explain_device_errors
from tinyllm.distributed import SINGLE_PROCESS, DistributedContext
from tinyllm.engine import Engine, build_engine
from tinyllm.estimate import estimate_run_memory, why_not_compilable
from tinyllm.optional import require_package
from tinyllm.presets import PRESETS
from tinyllm.project import find_tokenizer
from tinyllm.resume import RunPlan, shape_from_settings
from tinyllm.run import TrainRun, choose_run_class
from tinyllm.sampling import SamplingParams
from tools import compare

# ---- settings -----------------------------------------------------------------------------------
preset = ""             # train: take model and batch size from this preset; empty: the defaults of train.py
peer = ""               # train: a folder with another model.py (ModelArgs, Transformer, loss in last_loss);
                        # sample: a folder with llama2.c's run.c
rounds = 10             # measurements of each contender; text: at most 3, because each takes long
checkpoint = ""         # sample: a trained Llama or GPT-2; empty: an untrained model of default size
data_dir = "data"       # sample: folder with the val split for the checkpoint's vocabulary
data = ""               # quality, text: real stories, as in train_vocab.py; text: built-in stories if empty
text_mb = 100.0         # text: repeat the stories up to this size in MB
minutes = 3.0           # quality: train the presets of up to this length
out_dir = "output/bench"            # quality: folder for the runs
device = "auto"         # auto, cpu, cuda, cuda:1, mps
dtype = "auto"          # auto, float32, bfloat16, float16
# ---- end of settings ----------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent


@explain_device_errors("choose a smaller model, or use --device cpu")
def main() -> None:
    benchmarks = {"train": bench_train, "quality": bench_quality, "sample": bench_sample, "text": bench_text}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in benchmarks:
        cli.parse_settings(globals(), [arg for arg in sys.argv[1:] if arg in ("-h", "--help")])
        raise UserError(f"choose a benchmark\n       python -m tools.bench {' | '.join(benchmarks)}")
    cfg, _ = cli.parse_settings(globals(), sys.argv[2:])
    if cfg.rounds < 1:
        raise UserError(f"rounds must be at least 1, not {cfg.rounds}")
    benchmarks[name](cfg)


# ---- a training step ----------------------------------------------------------------------------

def bench_train(cfg: SimpleNamespace) -> None:
    backend = devices.choose_backend(cfg.device, cfg.dtype)
    train_cfg, args = default_shape(cfg)
    batch = random_batch(train_cfg.batch_size, args, backend)
    steps: dict[str, Callable[[], object]] = {}
    runs: dict[str, TrainRun] = {}
    if reason := why_not_compilable(backend.device):
        print(f"note: without a compiled model: {reason}", file=sys.stderr)
    else:
        runs["compiled"] = build_run(train_cfg, backend, args, compiled=True, gradient_accumulation_steps=1)
    runs["eager"] = build_run(train_cfg, backend, args, compiled=False, gradient_accumulation_steps=1)
    for name, run in runs.items():
        steps[name] = partial(train.train_step, run, repeat(batch))
    steps["transformers, float32"] = transformers_step(backend, args, batch)
    if cfg.peer:
        steps[f"{cfg.peer}, float32"] = peer_step(Path(cfg.peer), backend, args, batch)
    times = time_interleaved(steps, backend, cfg.rounds)

    n_tokens = batch[0].numel()
    limit = matrix_seconds(runs["eager"].model, backend, n_tokens)
    print(f"{backend}: dim {args.dim}, {args.n_layers} layers, {n_tokens:,} tokens, one micro-batch a step")
    for name, seconds in times.items():
        print(f"{name:24} {n_tokens / seconds:10,.0f} tokens/s "
              f"{times['transformers, float32'] / seconds:6.2f} x transformers "
              f"{limit / seconds:6.0%} of the limit set by matrix products")
    for name, run in runs.items():
        estimate = estimate_run_memory(run, name == "compiled", run.cfg.batch_size)
        print(f"memory, {name}: about {estimate.total / 1e6:,.0f} MB, estimated")
    if backend.device.type == "cuda":
        print(f"peak memory of all contenders: {torch.cuda.max_memory_reserved() / 1e6:,.0f} MB")


def default_shape(cfg: SimpleNamespace) -> tuple[SimpleNamespace, ModelArgs]:
    """Return the settings of train.py or of a preset, and their ModelArgs."""
    argv = ["--preset", cfg.preset] if cfg.preset else []
    settings_of_presets = {name: preset.settings for name, preset in PRESETS.items()}
    train_cfg, _ = cli.parse_settings(vars(train), argv, sys.stderr, settings_of_presets)
    vocab_size = PRESETS[cfg.preset].vocab_size if cfg.preset else ModelArgs.vocab_size
    return train_cfg, shape_from_settings(train_cfg, vocab_size)


def random_batch(batch_size: int, args: ModelArgs, backend: devices.Backend) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, args.vocab_size, (batch_size, args.max_seq_len + 1), device=backend.device)
    return tokens[:, :-1], tokens[:, 1:]                        # x, y: (batch_size, max_seq_len)


def build_run(train_cfg: SimpleNamespace, backend: devices.Backend, args: ModelArgs, compiled: bool,
              ranks: DistributedContext = SINGLE_PROCESS, **changes: Any) -> TrainRun:
    """Build a TrainRun without data. `changes` override train_cfg."""
    cfg = SimpleNamespace(**{**vars(train_cfg), **changes})
    run = choose_run_class(cfg, ranks)(RunPlan(cfg, backend, None, None, args, None, False, ranks))
    if compiled:
        run.compile()
    return run


def transformers_step(backend: devices.Backend, args: ModelArgs, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    model = transformers_model(args, backend)
    x, y = batch

    def loss() -> Tensor:
        logits = model(input_ids=x).logits                      # (B, T, vocab_size)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    return adamw_step(model, loss)


def transformers_model(args: Any, backend: devices.Backend) -> torch.nn.Module:
    transformers = require_package("transformers", "this comparison")
    if not isinstance(args, ModelArgs):
        config = transformers.GPT2Config(
            vocab_size=args.vocab_size, n_positions=args.max_seq_len, n_embd=args.dim, n_layer=args.n_layers,
            n_head=args.n_heads)
        return transformers.GPT2LMHeadModel(config).to(backend.device)
    config = transformers.LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.ffn_dim, rms_norm_eps=args.norm_eps,
        num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads,
        max_position_embeddings=args.max_seq_len, tie_word_embeddings=args.tie_embeddings)
    return transformers.LlamaForCausalLM(config).to(backend.device)


def peer_step(folder: Path, backend: devices.Backend, args: ModelArgs, batch: tuple[Tensor, Tensor]
              ) -> Callable[[], None]:
    """Return a training step of another folder's model.py, which must have llama2.c's interface."""
    path = folder / "model.py"
    if not path.is_file():
        raise UserError(f"no model.py in {folder.resolve()}")
    peer = runpy.run_path(str(path))
    shape = {name: getattr(args, name) for name in peer["ModelArgs"].__dataclass_fields__ if hasattr(args, name)}
    model = peer["Transformer"](peer["ModelArgs"](**{**shape, "hidden_dim": args.ffn_dim})).to(backend.device)
    x, y = (part.contiguous() for part in batch)                # llama2.c calls view(), which needs contiguous tensors

    def loss() -> Tensor:
        output = model(x, y)
        return getattr(model, "last_loss", output)
    return adamw_step(model, loss)


def adamw_step(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def matrix_seconds(model: Transformer, backend: devices.Backend, n_tokens: int) -> float:
    """Return the seconds that a step's matrix products take, without attention."""
    counts = Counter(part.weight.shape for part in model.modules() if isinstance(part, torch.nn.Linear))
    return sum(n * product_seconds(*shape, backend, n_tokens) for shape, n in counts.items())


def product_seconds(dim_out: int, dim_in: int, backend: devices.Backend, n_tokens: int) -> float:
    """Return the seconds of one matrix product, forward and backward."""
    new_matrix = partial(torch.randn, device=backend.device, dtype=backend.dtype)
    x = new_matrix(n_tokens, dim_in)
    w = new_matrix(dim_out, dim_in)
    y = new_matrix(n_tokens, dim_out)
    products = {"forward": lambda: x @ w.T, "to x": lambda: y @ w, "to w": lambda: y.T @ x}
    return sum(time_interleaved(products, backend, 10).values())


def time_interleaved(steps: dict[str, Callable[[], object]], backend: devices.Backend, rounds: int) -> dict[str, float]:
    """Return the median seconds of each step, after two warm-up rounds. A step may return its own time."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_index in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            measured = step()
            if backend.device.type != "cpu":
                torch.accelerator.synchronize()
            seconds = measured if isinstance(measured, float) else time.perf_counter() - start
            if round_index >= 2:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


# ---- generation ---------------------------------------------------------------------------------

PROMPT = [1, 10, 20, 30, 40]
N_NEW_TOKENS = 251                      # 256 tokens with the prompt
SAMPLING = SamplingParams(temperature=0.8, top_k=300)


def bench_sample(cfg: SimpleNamespace) -> None:
    """Measure new tokens per second, including the prompt's time, summed over the sequences of a batch."""
    backend = devices.choose_backend(cfg.device, cfg.dtype, training=False)
    ckpt = checkpoints.read_model(cfg.checkpoint) if cfg.checkpoint else None
    model = checkpoints.build_model(ckpt) if ckpt else checkpoints.new_model(ModelArgs())
    model.to(backend.device)
    engines = build_engines(model, backend)
    peer = transformers_model(model.args, backend).eval()
    with tempfile.TemporaryDirectory() as tmp_dir:
        for batch_size in (1, 32) if backend.device.type == "cpu" else (1, 32, 256):
            steps = {name: partial(generate, engine, batch_size) for name, engine in engines.items()}
            steps["transformers, float32"] = partial(generate_with_transformers, peer, batch_size)
            if cfg.peer and batch_size == 1:
                steps["run.c, float32"] = run_c_step(Path(cfg.peer), model, Path(tmp_dir))
            times = time_interleaved(steps, backend, cfg.rounds)
            print(f"{backend}: dim {model.args.dim}, {model.args.n_layers} layers, batch size {batch_size}")
            for name, seconds in times.items():
                print(f"{name:24} {batch_size * N_NEW_TOKENS / seconds:10,.0f} tokens/s "
                      f"{times['transformers, float32'] / seconds:6.2f} x transformers")
    for name, engine in engines.items():
        if ckpt and "compiled" not in name:
            print(f"{name:24} val loss {val_loss(engine, ckpt, cfg.data_dir):.4f}")


def build_engines(model: torch.nn.Module, backend: devices.Backend) -> dict[str, Engine]:
    """Return an engine for each dtype of the device, and a compiled engine."""
    dtype = str(backend.dtype).removeprefix("torch.")
    engines = {dtype: build_engine(model, backend.dtype)}
    if backend.device.type == "cpu":
        engines["float32"] = build_engine(model)
        engines["int8"] = build_engine(model, quantize="int8")
    if backend.device.type != "cpu" or isinstance(model, Transformer):
        engines[f"{dtype}, compiled"] = build_engine(model, backend.dtype, compiled=True)
    return engines


def generate(engine: Engine, batch_size: int) -> None:
    for _ in engine.generate([PROMPT] * batch_size, N_NEW_TOKENS, SAMPLING):
        pass


@torch.inference_mode()
def generate_with_transformers(model: torch.nn.Module, batch_size: int) -> None:
    prompts = torch.tensor([PROMPT] * batch_size, device=model.device)
    model.generate(prompts, max_new_tokens=N_NEW_TOKENS, min_new_tokens=N_NEW_TOKENS, do_sample=True,
                   temperature=SAMPLING.temperature, top_k=SAMPLING.top_k, pad_token_id=0)


def run_c_step(folder: Path, model: torch.nn.Module, tmp_dir: Path) -> Callable[[], float]:
    """Compile llama2.c's run.c, and return a step that runs it and returns the seconds for N_NEW_TOKENS.

    run.c starts from bos alone and samples without top_k.
    """
    if not isinstance(model, Transformer):
        raise UserError("run.c runs only Llama models; this is a GPT-2\n       omit --peer")
    if not (folder / "run.c").is_file() or not shutil.which("gcc"):
        raise UserError(f"--peer needs gcc and a run.c in {folder.resolve()}")
    program = tmp_dir / "run"
    weights = tmp_dir / "model.bin"
    tokenizer = tmp_dir / "tokenizer.bin"
    gcc = ["gcc", "-Ofast", "-fopenmp", "-march=native", folder / "run.c", "-lm", "-o", program]
    subprocess.run(gcc, check=True)
    optional.load("formats").llama2c.write_weights(checkpoints.model_state(model), weights, version=0)
    tokens = struct.pack("<fi2s", 0.0, 2, b"aa") * model.args.vocab_size       # each has the text "aa"
    tokenizer.write_bytes(struct.pack("<i", 2) + tokens)
    n_tokens = len(PROMPT) + N_NEW_TOKENS
    command = [program, weights, "-z", tokenizer, "-n", n_tokens, "-t", SAMPLING.temperature, "-p", 1, "-s"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    seeds = count(1)

    def step() -> float:
        while True:                     # a text that ends early is too short to time
            words = map(str, [*command, next(seeds)])
            done = subprocess.run(words, capture_output=True, env=environment, check=True)
            if len(done.stdout) > min(n_tokens, model.args.max_seq_len):       # two letters per token
                return N_NEW_TOKENS / float(done.stderr.split()[-1])
    return step


def val_loss(engine: Engine, ckpt: Checkpoint, data_dir: str) -> float:
    """Return the val loss in nats per token, as in train.py."""
    digest = checkpoints.build_tokenizer(ckpt).sha256
    data = shards.load_shards(find_tokenizer(data_dir, digest=digest).with_suffix(""), digest)
    nats = 0.0
    n_tokens = 0
    for x, y in Task.iter_split(data, "val", 1, engine.args.max_seq_len):
        targets = y[0][y[0] != IGNORE_INDEX]                                    # (T,)
        logprobs = next(engine.logprobs([*x[0].tolist(), 0]))[:len(targets)]        # (T, vocab_size)
        nats -= logprobs.gather(1, targets.to(engine.device)[:, None]).sum().item()
        n_tokens += len(targets)
    return nats / n_tokens


# ---- text to tokens -----------------------------------------------------------------------------

PROCESSES = 2


def bench_text(cfg: SimpleNamespace) -> None:
    """Measure steps 1 and 2 against tests/plain.py, with PROCESSES processes each."""
    if not 0.1 <= cfg.text_mb <= 100_000:
        raise UserError(f"text_mb must be 0.1 to 100,000, not {cfg.text_mb}")
    with tempfile.TemporaryDirectory() as tmp_dir:
        stories = Path(tmp_dir, "stories")
        model = Path(tmp_dir, "data", "tok4096.model")
        megabytes = write_stories(cfg, stories) / 1e6
        ours = ["--data_dir", model.parent, "--num_workers", PROCESSES]
        plain = Path("tests", "plain.py")
        commands = {
            "train_vocab.py": ["train_vocab.py", *ours, "--data", stories],
            "plain vocabulary": [plain, "vocabulary", stories, 4096, f"{tmp_dir}/plain.model"],
            "preprocess.py": ["preprocess.py", *ours],
            "plain shards": [plain, "shards", stories, model, f"{tmp_dir}/plain", PROCESSES]}
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(min(cfg.rounds, 3)):
            for name, command in commands.items():
                shutil.rmtree(model.with_suffix(""), ignore_errors=True)
                results[name].append(time_script(*command))
    print(f"{megabytes:,.0f} MB of stories, {PROCESSES} processes")
    for name, plain_name in (("train_vocab.py", "plain vocabulary"), ("preprocess.py", "plain shards")):
        seconds, memory = print_text_result(name, results[name], megabytes)
        plain_seconds, plain_memory = print_text_result(plain_name, results[plain_name], megabytes)
        memory_ratio = f", {memory / plain_memory:.2f} x the memory" if plain_memory else ""     # Linux only
        print(f"{'':20} {plain_seconds / seconds:7.2f} x the speed{memory_ratio}")


def print_text_result(name: str, results: list[tuple[float, float]], megabytes: float) -> tuple[float, float]:
    """Print and return the median seconds and the median memory in bytes."""
    seconds = statistics.median(seconds for seconds, memory in results)
    memory = statistics.median(memory for seconds, memory in results)
    print(f"{name:20} {seconds:7.1f} s {megabytes / seconds:7.1f} MB/s {memory / 1e6:8,.0f} MB of memory")
    return seconds, memory


def write_stories(cfg: SimpleNamespace, folder: Path) -> int:
    """Write repeated stories to 10 files of text_mb / 10 each; return their total size in bytes."""
    source = Path(cfg.data) if cfg.data else corpus.default_source(cfg.data_dir)
    texts = [text for path in corpus.find_files(source) for text in documents.read_documents(path)]
    folder.mkdir()
    for i in range(10):
        stories = []
        size = 0
        for text in islice(cycle(texts), i * len(texts) // 10, None):
            stories.append({"story": text})
            size += len(text.encode())
            if size > cfg.text_mb * 1e5:
                break
        (folder / f"{i}.json").write_text(json.dumps(stories, ensure_ascii=False), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.iterdir())


def time_script(script: str | Path, *args: Any) -> tuple[float, float]:
    """Run a script. Return its seconds, and on Linux the peak memory of its processes in bytes (0 elsewhere)."""
    command = [sys.executable, *map(str, (ROOT / script, *args))]
    memory = 0
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
        while process.poll() is None:
            memory = max(memory, session_memory(process.pid))
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        seconds = time.perf_counter() - start
        if process.returncode:
            errors.seek(0)
            raise UserError(f"{script} failed:\n{errors.read().decode(errors='replace')[-2000:]}")
    return seconds, memory


def session_memory(session: int) -> int:
    """Return the memory of all processes of a session in bytes. Shared memory counts once (PSS)."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text(encoding="utf-8")
            if int(stat.rpartition(")")[2].split()[3]) == session:
                memory = (folder / "smaps_rollup").read_text(encoding="utf-8")
                total += int(memory.partition("\nPss:")[2].split()[0]) * 1024
        except (OSError, IndexError):           # the process has ended
            continue
    return total


# ---- quality after a given time -----------------------------------------------------------------

def bench_quality(cfg: SimpleNamespace) -> None:
    """Train each preset of up to cfg.minutes from scratch, and print its validation scores over time."""
    if not cfg.data:
        raise UserError("quality needs real stories\n       python -m tools.bench quality --data PATH")
    names = [name for name, preset in PRESETS.items() if preset.settings.get("max_minutes", math.inf) <= cfg.minutes]
    if not names:
        raise UserError(f"the shortest preset takes 3 minutes, not {cfg.minutes:g}\n       use --minutes 3")
    corpus.find_files(cfg.data)             # raises UserError if no file is found
    print("| preset | vocabulary | parameters | tokens/s | wall minutes | bpb at minutes |\n|---|---|---|---|---|---|")
    for name in names:
        print(quality_row(name, cfg), flush=True)


def quality_row(name: str, cfg: SimpleNamespace) -> str:
    vocab_size = PRESETS[name].vocab_size
    source_id = zlib.crc32(str(Path(cfg.data).resolve()).encode())
    data_dir = Path(cfg.out_dir, f"data-{source_id:08x}")
    out_dir = Path(cfg.out_dir, name)
    if not (data_dir / f"tok{vocab_size}" / "manifest.json").exists():
        time_script("train_vocab.py", "--data", cfg.data, "--data_dir", data_dir, "--vocab_size", vocab_size)
        time_script("preprocess.py", "--data_dir", data_dir, "--vocab_size", vocab_size)
    seconds, _ = time_script(
        "train.py", "--preset", name, "--init_from", "scratch", "--data_dir", data_dir, "--out_dir", out_dir,
        "--vocab_size", vocab_size, "--device", cfg.device, "--dtype", cfg.dtype)
    run = compare.read_run(str(out_dir))
    scores = ", ".join(f"{bpb:.3f} at {minutes:.1f}" for minutes, bpb in run.by_minutes)
    return (f"| {name} | {vocab_size} | {run.parameters:,} | {statistics.median(run.speeds):,.0f} | {seconds / 60:.2f} "
            f"| {scores} |")


if __name__ == "__main__":
    cli.run_script(main)
