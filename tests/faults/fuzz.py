"""Gives damaged files to all that reads one: each must be refused with a message to the user, or be read.

    python -m tests.faults.fuzz --inputs 100000                             # all targets; 10 to 20 minutes on one core
    python -m tests.faults.fuzz --target manifest --seed 0 --only 4711      # one input again, with its traceback

An input is a function of seed, target and number. Inputs are read in child processes, so that a crash, a hang
(10 seconds) and hunger for memory (1 GiB) end one of those, and are told with the number of their input.
"""
import argparse
import contextlib
import gzip
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock, patch

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import preprocess  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
import train_vocab  # noqa: E402
from extras import formats  # noqa: E402
from tinyllm import (  # noqa: E402
    checkpoint,
    cli,
    corpus,
    demo_stories,
    documents,
    project,
    resume,
    runlog,
    shards,
)
from tinyllm.run import TrainRun  # noqa: E402

SECONDS, MEMORY, BATCH = 10, 1 << 30, 1000      # what an input may take, and how many a child process reads
DEEP, DEPTH = "@deep@", 100_000                 # a text that becomes a list in a list in a list ...
MODEL, SHARDS = Path("data/tok300.model"), Path("data/tok300")


# ---- sound files --------------------------------------------------------------------------------

def call(script: Any, *args: Any) -> None:
    with patch.object(sys, "argv", [script.__file__, *map(str, args)]):
        script.main()


def make_files() -> None:
    """In the current folder, one file of each kind, as the scripts leave them."""
    stories = list(demo_stories.generate_stories(40))
    Path("texts").mkdir()
    Path("texts/a.json").write_text(json.dumps([{"story": story} for story in stories[:10]]), encoding="utf-8")
    Path("texts/b.jsonl").write_text("\n".join(map(json.dumps, stories[10:20])), encoding="utf-8")
    Path("texts/c.txt").write_text(documents.SEPARATOR.join(stories[20:30]), encoding="utf-8")
    Path("texts/d.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, stories[30:])).encode(), mtime=0))
    call(train_vocab, "--data", "texts", "--vocab_size", 300)
    call(preprocess)
    call(train, "--dim", 16, "--n_layers", 1, "--n_heads", 2, "--n_kv_heads", 1, "--max_seq_len", 32, "--max_iters", 2,
         "--eval_interval", 1, "--batch_size", 2, "--sample_tokens", 4, "--device", "cpu", "--compile", "false")
    for name in ("ckpt.pt", "last.pt"):             # without the time they took they are the same at each making
        state = checkpoint.load_checkpoint(f"output/{name}")
        state["state"] |= {"seconds": 1.0, "setup": 1.0}
        checkpoint.save_checkpoint(f"output/{name}", state)
    for kind, path in (("gguf", "story.gguf"), ("llama2c-int8", "story.bin"), ("hf", "hf")):
        formats.WRITERS[kind](checkpoint.load_checkpoint("output/ckpt.pt"), Path(path))
    call(sample, "--input_file", "texts/c.txt", "--output_file", "out.jsonl", "--max_new_tokens", 2)


# ---- readers ------------------------------------------------------------------------------------

def weights(model: torch.nn.Module) -> dict[str, list]:
    """What can be compared of a model, after a step with it."""
    model(torch.tensor([[1, 2, 2]])[:, :model.args.max_seq_len])
    return {name: [str(w.dtype), *w.shape, w.detach().contiguous().numpy().tobytes()]
            for name, w in model.state_dict().items()}


def read_shards() -> Any:
    found = shards.load_shards(SHARDS, project.load_tokenizer(MODEL).sha256)
    return repr(found), [found.memmap(shard).tobytes() for shard in found.shards]


def read_checkpoint() -> Any:
    state = checkpoint.load_checkpoint("output/ckpt.pt")
    return weights(checkpoint.build_model(state)), checkpoint.build_tokenizer(state).model


def read_last() -> Any:
    cfg, _ = cli.parse_settings(vars(train), ["--init_from", "resume"])
    run = TrainRun(resume.plan_run(cfg, {}))
    return weights(run.model), repr([run.state, run.cfg, [one.state_dict() for one in run.optimizers]])


def read_model(path: str) -> None:
    generator = sample.TextGenerator(path)
    generator.completions(["Once"], max_new_tokens=2)


def read_vocabulary() -> None:
    vocabulary = project.load_tokenizer(MODEL)
    vocabulary.decode(vocabulary.encode("Once upon\u2581a\n time, é 😀", bos=True, eos=True))
    "".join(vocabulary.id_to_piece(token) for token in range(min(vocabulary.n_words, 1000)))


def read_notes() -> None:
    cfg = SimpleNamespace(data="", data_dir="data", tokenizer="", encoding="")
    preprocess.find_source(cfg, MODEL, project.load_tokenizer(MODEL).sha256)


def read_texts() -> None:
    for path in corpus.find_files("texts"):
        for text in documents.read_documents(path):
            text.encode()


def read_log() -> None:
    drawing = MagicMock()                           # a real one takes a quarter of a second
    panels = [MagicMock(**{"get_ylim.return_value": (0.0, 1.0)}) for _ in range(2)]
    drawing.Figure.return_value.subplots.return_value = panels
    mocks = {"matplotlib": MagicMock(), "matplotlib.figure": drawing, "matplotlib.ticker": MagicMock()}
    with patch.dict(sys.modules, mocks):
        runlog.RunLog(Path("output"), {}, 2).write_reports()


def read_stories() -> None:
    sample.count_finished(Path("out.jsonl"), Path("texts/c.txt").read_text(encoding="utf-8").split("\n"))


class Target(NamedTuple):
    """Files, any of which is damaged, and what reads them; exact: changed bytes are refused, or change nothing."""
    files: tuple[str, ...]
    read: Callable[[], Any]
    exact: bool = False
    writes: bool = False


TARGETS = {
    "manifest": Target((f"{SHARDS}/manifest.json",), read_shards, exact=True),
    "shard": Target((f"{SHARDS}/train_0000.bin", f"{SHARDS}/val_0000.bin"), read_shards, exact=True),
    "checkpoint": Target(("output/ckpt.pt",), read_checkpoint, exact=True),
    "sample": Target(("output/ckpt.pt",), lambda: read_model("output/ckpt.pt")),
    "last": Target(("output/last.pt",), read_last, exact=True),
    "tokenizer": Target((str(MODEL),), read_vocabulary),
    "notes": Target((str(MODEL.with_suffix(".json")),), read_notes),
    "text": Target(("texts/a.json", "texts/b.jsonl", "texts/c.txt", "texts/d.jsonl.gz"), read_texts),
    "log": Target(("output/log.jsonl", "output/clock.jsonl"), read_log, writes=True),
    "stories": Target(("out.jsonl",), read_stories, writes=True),
    "gguf": Target(("story.gguf",), lambda: read_model("story.gguf")),
    "llama2c": Target(("story.bin", "story.tokenizer.bin"), lambda: read_model("story.bin")),
    "hf": Target(("hf/config.json", "hf/tokenizer.json", "hf/tokenizer_config.json", "hf/model.safetensors"),
                 lambda: read_model("hf")),
}


# ---- damage -------------------------------------------------------------------------------------

def changed_bytes(rng: random.Random, good: bytes) -> bytes:
    """Some bits flipped, or pieces cut, put in, doubled, moved or overwritten."""
    data = bytearray(good)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at, other, size = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 100))
        number = rng.choice((0, 1, -1, 127, -128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1))
        kind = rng.randrange(7 if rng.random() < 0.8 else 8)
        if kind < 2:
            data[at:at + 1] = [byte ^ 1 << rng.randrange(8) for byte in data[at:at + 1]]
        elif kind == 2:
            del data[at:at + size]
        elif kind == 3:
            data[at:at + size] = (number % 2**64).to_bytes(8, "little")[:size]
        else:
            end = at if kind == 4 else at + size
            data[at:end] = (rng.randbytes(size), data[at:at + size], data[other:other + size], b"")[kind - 4]
            del data[at if kind == 7 else len(data):]
    return bytes(data)


def changed_tree(rng: random.Random, value: Any) -> Any:
    """The same tree with a leaf or branch of it replaced, removed, doubled or moved."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.05:
        return nasty(rng, value)
    content = dict(value) if isinstance(value, dict) else list(value)
    keys = list(content) if isinstance(value, dict) else range(len(value))
    key, kind = rng.choice(keys), rng.random()
    if kind < 0.1:
        del content[key]
    elif kind < 0.15 and isinstance(content, list):
        content.append(content[key])
    elif kind < 0.15:
        content[rng.choice(("", "x", key + "\n" if isinstance(key, str) else key))] = nasty(rng, content[key])
    else:
        content[key] = content[rng.choice(keys)] if kind < 0.2 else changed_tree(rng, content[key])
    return content


def nasty(rng: random.Random, old: Any) -> Any:
    """A value that has no business where `old` stands."""
    found: list[Any] = [None, True, False, 0, 1, -1, 2**31, 2**63, 10**9, 10**30, -10**30, 0.5, 1e300, math.nan,
                        math.inf, "", "a", "1", "\0", "\ud800", "../../etc/passwd", "/etc/passwd", "a\\b", "x" * 5000,
                        [], {}, [[]], [1, "a", None], {"a": 1}, {"": None}, DEEP, [[[[[[{"a": [1]}]]]]]]]
    if type(old) in (int, float) and rng.random() < 0.5:
        found = [-old, old + 1, old - 1, 2 * old, old * 10**9, str(old), [old], float(old), bool(old)]
    if isinstance(old, str) and rng.random() < 0.5:
        found = [old[1:], old + "\n", old.upper(), "\x1b[31m" + old, old[:5000] * 1000, [old]]
    if isinstance(old, torch.Tensor):
        found = [*found, *nasty_tensors(old)]
    return rng.choice(found)


def nasty_tensors(old: torch.Tensor) -> list[torch.Tensor]:
    plain = old.detach().float()
    flat, one = plain.flatten(), torch.zeros(1)
    holed = torch.where(plain == plain.max(), math.nan, plain)
    return [plain.double(), plain.half(), plain.bfloat16(), plain.long(), plain.bool(), plain.byte(), plain.T, flat,
            plain[None], flat[:0], flat[:1], one[0], holed, plain / 0, one.expand(10**9),
            one[None].expand(10**9, 10**9), flat[:1].expand(flat.shape), plain.to_sparse(), torch.complex(plain, plain),
            torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8), plain.to("meta"), plain.to(torch.float8_e4m3fn)]


def json_tree(rng: random.Random, good: bytes) -> bytes:
    """Changed content, properly written; the lines of a .jsonl are a list here."""
    text = good.decode()
    lines = [json.loads(line) for line in text.split("\n") if line] if text[:1] != "{" or "\n{" in text else None
    value = changed_tree(rng, lines or json.loads(text))
    as_lines = lines and isinstance(value, list)
    text = "\n".join(map(json.dumps, value)) + "\n" if as_lines else json.dumps(value, indent=1)
    return text.replace(json.dumps(DEEP), "[" * DEPTH + "]" * DEPTH).encode("utf-8", "surrogatepass")


def in_gzip(rng: random.Random, good: bytes) -> bytes:
    return gzip.compress(rng.choice((changed_bytes, json_tree))(rng, gzip.decompress(good)), mtime=0)


def in_safetensors(rng: random.Random, good: bytes) -> bytes:
    end = 8 + int.from_bytes(good[:8], "little")
    header = json_tree(rng, good[8:end])
    return len(header).to_bytes(8, "little") + header + good[end:]


def in_zip(rng: random.Random, good: bytes) -> bytes:
    """Changed bytes in one of the members, with the checksum that goes with them."""
    members = unzip(good)
    name = rng.choice([*members, *[name for name in members if name.endswith("data.pkl")] * len(members)])
    members[name] = changed_bytes(rng, members[name])
    return zip_of(members, zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED)


def pt_tree(rng: random.Random, good: bytes) -> bytes:
    value, file = torch.load(io.BytesIO(good), weights_only=True), io.BytesIO()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = changed_tree(rng, value)
    torch.save(value, file)
    members = unzip(file.getvalue())
    text = DEEP.encode()
    deep = {name: content.replace(b"X" + len(text).to_bytes(4, "little") + text, b"]" * DEPTH + b"a" * (DEPTH - 1))
            for name, content in members.items()}
    return file.getvalue() if deep == members else zip_of(deep)


def unzip(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def zip_of(members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    with zipfile.ZipFile(found := io.BytesIO(), "w", how) as file:
        for name, content in members.items():
            file.writestr(zipfile.ZipInfo(name), content, how)
    return found.getvalue()


WAYS = {".json": (json_tree,), ".jsonl": (json_tree,), ".gz": (in_gzip,), ".safetensors": (in_safetensors,),
        ".pt": (in_zip, pt_tree)}


# ---- one input ----------------------------------------------------------------------------------

class Failure(Exception):
    """What must not happen, and is no exception by itself."""


def try_one(target: Target, good: dict[str, bytes], whole: Any, rng: random.Random) -> str:
    """Damage a file and read it: "read" or "refused". Raises whatever else happens."""
    path = rng.choice(target.files)
    way = rng.choice((changed_bytes, *WAYS.get(Path(path).suffix, ())))
    for name, content in good.items():
        Path(name).write_bytes(way(rng, content) if name == path else content)
    before = listing()
    try:
        found = target.read()
        verdict = "read"
    except BaseException as error:
        if not refusal(error):
            raise
        verdict = "refused"
    if target.writes:
        forget({name for name, *_ in listing()} - {name for name, *_ in before})
    elif listing() != before:
        raise Failure("something was written")
    if verdict == "read" and target.exact and way is changed_bytes and found != whole:
        raise Failure("something else was read than was written")
    return verdict


def refusal(error: BaseException) -> bool:
    """Whether an error is a message to the user, as cli.run_script shows it, and not for want of memory."""
    chain, cause = [], error
    while cause:
        chain, cause = [*chain, cause], cause.__cause__
    hungry = any(isinstance(one, MemoryError) or "allocate memory" in str(one) for one in chain)
    of_a_file = isinstance(error, OSError) and (error.filename or error.errno in cli.DISK_ERRNOS)
    return bool(isinstance(error, cli.UserError) or of_a_file) and not hungry


def forget(names: set[str]) -> None:
    """Delete what an input has left; thousands of such files would slow down all that comes after."""
    for name in names:
        Path(name).unlink()


def listing() -> list[tuple]:
    return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in Path().rglob("*"))


# ---- many inputs --------------------------------------------------------------------------------

class Result(NamedTuple):
    number: int
    verdict: str        # read, refused, or what went wrong and where
    seconds: float = 0.0
    grown: int = 0      # bytes that the process had more at most than before


def fuzz(name: str, numbers: range, seed: int) -> Iterator[Result]:
    """Read the damaged files of these numbers, in the current folder, where make_files has been called."""
    target = TARGETS[name]
    good = {file: Path(file).read_bytes() for file in target.files}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        whole = target.read()
    while numbers:
        with tempfile.TemporaryFile("w+") as results:
            if not (child := os.fork()):
                try:
                    read_batch(target, good, whole, f"{seed}/{name}", numbers[:BATCH], results)
                finally:
                    os._exit(0 if sys.exc_info()[0] is None else 1)
            status = os.waitpid(child, 0)[1]
            results.seek(0)
            lines = [json.loads(line) for line in results]
        found = [Result(*line) for line in lines if len(line) > 1]
        yield from found
        if status:
            yield Result(lines[-1][0], "hangs" if status == signal.SIGALRM else f"ends the process, status {status}")
        numbers = numbers[len(found) + bool(status):]
    for file, content in good.items():
        Path(file).write_bytes(content)


def read_batch(target: Target, good: dict[str, bytes], whole: Any, seed: str, numbers: range, results: Any) -> None:
    """In a child process: note each number before it is tried, and what came of it after."""
    def note(*values: Any) -> None:
        print(json.dumps(values), file=results, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import resource  # not on Windows
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * MEMORY, size + 2 * MEMORY))
    first = peak()
    for number in numbers:
        note(number)
        signal.alarm(SECONDS)
        began, before = time.monotonic(), peak()
        try:
            verdict = try_one(target, good, whole, random.Random(f"{seed}/{number}"))
        except BaseException as error:
            verdict = f"{type(error).__name__} at {places(error)} ({str(error)[:100]!a})"
        if peak() - before > MEMORY:
            verdict = f"takes {(peak() - before) >> 20} MiB, {verdict}"
        note(number, verdict, time.monotonic() - began, peak() - first)


def places(error: BaseException) -> str:
    """The last line of the project, and the very last, that an error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if ROOT in Path(frame.filename).parents and frame.filename != __file__]
    return ", ".join(dict.fromkeys(f"{Path(at.filename).name}:{at.lineno}" for at in [*own[-1:], frames[-1]]))


def peak() -> int:
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def report(name: str, found: list[Result], seed: int) -> int:
    """Print a line for a target, and one for each kind of failure; return the number of failures."""
    kinds = [one.verdict.partition(" (")[0] for one in found]
    verdicts = Counter(kinds)
    accepted, refused = verdicts.pop("read", 0), verdicts.pop("refused", 0)
    slowest, most = max(found, key=lambda one: one.seconds), max(one.grown for one in found) >> 20
    print(f"{name:10} {len(found):6,} inputs {accepted:6,} read {refused:6,} refused {verdicts.total():5,} failures "
          f"{sum(one.seconds for one in found):5.0f} s  slowest {slowest.seconds:.2f} s (--only {slowest.number})  "
          f"memory +{most} MiB", flush=True)
    for kind, count in verdicts.most_common():
        first = found[kinds.index(kind)]
        print(f"    {count} x {first.verdict}\n        --target {name} --seed {seed} --only {first.number}", flush=True)
    return verdicts.total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--target", choices=TARGETS, action="append", help="one of them; may be given several times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="read the input of this number in this process")
    cfg = parser.parse_args()
    names = cfg.target or list(TARGETS)
    torch.set_num_threads(1)
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    make_files()
    if cfg.only is not None:
        target = TARGETS[names[0]]
        good, whole = {file: Path(file).read_bytes() for file in target.files}, target.read()
        print(f"the files are in {folder}", flush=True)
        sys.exit(try_one(target, good, whole, random.Random(f"{cfg.seed}/{names[0]}/{cfg.only}")))
    began = time.monotonic()
    numbers = range(cfg.inputs // len(names))
    failures = sum(report(name, list(fuzz(name, numbers, cfg.seed)), cfg.seed) for name in names)
    shutil.rmtree(folder)
    print(f"{failures} failures in {time.monotonic() - began:.0f} s")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
