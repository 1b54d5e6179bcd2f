"""Step 2 of 4: turn the text into token ids, in files that training maps into memory.

    python preprocess.py                          # the text and the vocabulary of step 1
    python preprocess.py --verify                 # and decode documents again to compare them
    python preprocess.py --tokenizer llama.model --data my_texts      # a vocabulary made elsewhere, or that of a model

Writes data/tok4096/: train_*.bin, val_*.bin and, when all of them are whole, manifest.json. A second
run does only what is missing or changed, so after a break just run it again.
"""
import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from tqdm import tqdm

import corpus
import settings
import shards
from files import load_json, locked, replace, sha256, whole_file
from settings import UserError, shown
from shards import MANIFEST, SPLITS, Shard, ShardSet, Source
from tokenizer import Vocabulary, find, load

# ---- settings -----------------------------------------------------------------------------------
data_dir = "data"       # where step 1 wrote the vocabulary, and where the shards go
data = ""               # the text; empty: what step 1 read
vocab_size = 0          # which vocabulary of data_dir, when there are several; 0: the only one
tokenizer = ""          # a vocabulary from elsewhere, or a model that has one; it is copied to data_dir and used
num_workers = 0         # processes, at most 60; 0: one per core. Each takes about 100 MB
verify = False          # decode documents of every shard and compare them with their source
# ---- end of settings ----------------------------------------------------------------------------

GROUP_BYTES = 4 << 20   # small source files share a shard until they are so large together
BATCH = 1 << 20         # characters encoded at a time
VERIFIED = 50           # documents of each shard that --verify decodes
UNFINISHED = "manifest.part.json"


@dataclass(frozen=True)
class Job:
    """What a worker process needs to write one pair of shards."""
    index: int
    sources: dict[Path, Source]
    folder: Path
    model_path: Path
    threshold: int

    @property
    def names(self) -> dict[str, str]:
        return {split: f"{split}_{self.index:04d}.bin" for split in SPLITS}


def main() -> None:
    cfg, _ = settings.read(globals())
    if cfg.num_workers < 0:
        raise UserError(f"num_workers must be 0 (one per core) or more, not {cfg.num_workers}")
    start = time.monotonic()
    model_path = adopt(Path(cfg.tokenizer), cfg.data_dir) if cfg.tokenizer else find(cfg.data_dir, cfg.vocab_size)
    vocabulary = load(model_path)
    source, threshold = find_source(cfg, model_path, vocabulary)
    files = corpus.find_files(source)
    print(shown(f"text: {source}, {len(files)} files; vocabulary: {model_path}, {vocabulary.n_words} entries"))

    folder = model_path.with_suffix("")
    target = ShardSet(folder, vocabulary.sha256, vocabulary.n_words, threshold, [])
    with locked(folder):
        jobs = [Job(i, group, folder, model_path, threshold) for i, group in enumerate(group_files(files, source))]
        make(target, jobs, cfg.num_workers or os.cpu_count() or 1)
        report(target)
        if cfg.verify:
            checked = sum(compare(job, target, vocabulary) for job in jobs)
            print(f"verified: {checked:,} documents decode to their source")
    print(f"{folder / MANIFEST} is complete after {time.monotonic() - start:.0f} s")
    print("next: python train.py" + (f" --data_dir {cfg.data_dir}" if cfg.data_dir != data_dir else ""))


def adopt(path: Path, folder: str) -> Path:
    """Copy a vocabulary made elsewhere to <folder>/tok<size>.model, where all steps look for it."""
    from formats import read_vocabulary     # here, because it brings torch, which the workers have no use for
    vocabulary = read_vocabulary(path)
    if min(vocabulary.bos_id, vocabulary.eos_id) < 0:
        raise UserError(f"{path} has no bos or no eos; documents could not be told apart")
    target = Path(folder) / f"tok{vocabulary.n_words}.model"
    if target.exists() and load(target).sha256 != vocabulary.sha256:
        raise UserError(f"{target} is another vocabulary of that size\n       name another --data_dir for {path}")
    with locked(folder), whole_file(target) as file:
        file.write(vocabulary.model)
    return target


def find_source(cfg, model_path: Path, vocabulary: Vocabulary) -> tuple[Path, int]:
    """The text to read and the rule of its validation split: those of step 1 unless told otherwise."""
    notes, known, threshold = model_path.with_suffix(".json"), None, 0
    if notes.exists():
        try:
            facts = load_json(notes)
            digest, known, threshold = facts["sha256"], Path(facts["source"]), int(facts["val_threshold"])
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise UserError(f"{notes} is damaged ({error})\n       run python train_vocab.py again") from error
        if digest != vocabulary.sha256:
            raise UserError(f"{model_path} is not as step 1 wrote it: {notes} has another SHA-256\n       "
                            "run python train_vocab.py again")
    elif not cfg.data and not cfg.tokenizer:
        raise UserError(f"{notes} is gone, which tells what text {model_path.name} is for\n       name it: --data PATH")
    source = Path(cfg.data) if cfg.data else known or corpus.default_source(cfg.data_dir)
    return source, threshold if source == known else corpus.validation_threshold(corpus.find_files(source))


def group_files(files: list[Path], root: Path) -> list[dict[Path, Source]]:
    """Arrange the source files into groups, one for each pair of shards."""
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256, files))
    groups, room = [], 0
    for path, digest in zip(files, digests):
        if room <= 0:
            groups.append({})
            room = GROUP_BYTES
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name
        groups[-1][path] = Source(name, path.stat().st_size, digest)
        room -= path.stat().st_size
    return groups


def make(target: ShardSet, jobs: list[Job], workers: int) -> None:
    """Bring the shards up to date. Until all are whole, their list has another name than the manifest."""
    done = reusable(target, jobs)
    todo = [job for job in jobs if job.index not in done]
    target.shards = [shard for index in sorted(done) for shard in done[index]]
    if done:
        print(f"{len(done)} of {len(jobs)} pairs of shards are up to date")
    if todo and (target.folder / MANIFEST).exists():
        replace(target.folder / MANIFEST, target.folder / UNFINISHED)
    for index, pair in run(todo, workers):
        done[index] = pair
        target.shards = [shard for index in sorted(done) for shard in done[index]]
        target.save(UNFINISHED)
    target.require_both()
    target.save()
    (target.folder / UNFINISHED).unlink(missing_ok=True)
    for path in target.folder.glob("*_*.bin*"):
        if path.name not in {shard.file for shard in target.shards}:
            path.unlink()


def reusable(target: ShardSet, jobs: list[Job]) -> dict[int, list[Shard]]:
    """The shards of an earlier run, by job, that this run would write just the same."""
    old = {}
    for name in (UNFINISHED, MANIFEST):
        try:
            found = shards.read(target.folder, name)
        except UserError:
            continue
        if (found.tokenizer_sha256, found.val_threshold) == (target.tokenizer_sha256, target.val_threshold):
            old |= {shard.file: shard for shard in found.shards if not found.damage(shard)}
    pairs = {job.index: [old.get(name) for name in job.names.values()] for job in jobs}
    return {job.index: pairs[job.index] for job in jobs
            if all(shard and shard.sources == list(job.sources.values()) for shard in pairs[job.index])}


def run(jobs: list[Job], workers: int) -> Iterator[tuple[int, list[Shard]]]:
    """Do the jobs in worker processes; yield (index, shards) of each as it ends.

    After an error nothing new is begun, and what is under way is finished and yielded before the
    error is raised.
    """
    if not jobs:
        return
    context, failure = get_context("spawn"), None
    counter = context.Value("q", 0)
    total = sum(source.size for job in jobs for source in job.sources.values())
    with (tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar,
          ProcessPoolExecutor(min(workers, len(jobs), 60), context, _start_worker, (counter,)) as pool):
        with deaf():
            waiting = {pool.submit(write_shards, job) for job in jobs}
        while waiting:
            done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            bar.update(counter.value - bar.n)
            for future in done:
                if not future.cancelled() and not future.exception():
                    yield future.result()
                elif not future.cancelled():
                    failure = failure or future.exception()
                    for other in waiting:
                        other.cancel()
    if isinstance(failure, BrokenProcessPool):
        raise UserError("a worker process was killed, most likely for want of memory\n       run this again with "
                        "--num_workers 1; it continues with what is missing")
    if failure:
        raise failure


@contextmanager
def deaf() -> Iterator[None]:
    """Ctrl-C has to wait, also in processes that begin here, until they listen: it would be a traceback of imports."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        listen()


def listen() -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


_counter = None         # in a worker process: the bytes read by all of them


def _start_worker(counter) -> None:
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C ends a worker without a traceback
    listen()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)                                         # else a worker would outlive a killed parent, and go on writing


def _count(size: int) -> None:
    with _counter.get_lock():
        _counter.value += size


def write_shards(job: Job) -> tuple[int, list[Shard]]:
    """Tokenize the files of a job into its train and its val shard. Runs in a worker process."""
    vocabulary = load(job.model_path)
    dtype = shards.dtype(vocabulary.n_words)
    counts = {split: np.zeros(3, np.int64) for split in SPLITS}          # documents, tokens, bytes of text
    digests = {split: hashlib.sha256() for split in SPLITS}
    with ExitStack() as stack:
        out = {split: stack.enter_context(whole_file(job.folder / name)) for split, name in job.names.items()}
        for split, texts in batches(job, _count):
            ids = vocabulary.encode_batch(texts, bos=True, eos=True)
            flat = np.fromiter(chain.from_iterable(ids), dtype)
            out[split].write(flat.tobytes())
            digests[split].update(flat.tobytes())
            counts[split] += (len(texts), len(flat), sum(len(text.encode()) for text in texts))
    sources = list(job.sources.values())
    return job.index, [Shard(name, digests[split].hexdigest(), split, sources, *counts[split].tolist())
                       for split, name in job.names.items()]


def batches(job: Job, progress: Callable[[int], None]) -> Iterator[tuple[str, list[str]]]:
    """Yield (split, documents) in the order of the source, about BATCH characters at a time."""
    pending, sizes = {split: [] for split in SPLITS}, dict.fromkeys(SPLITS, 0)
    for path in job.sources:
        for text in corpus.documents(path, progress):
            split = "val" if corpus.fingerprint(text) <= job.threshold else "train"
            pending[split].append(text)
            sizes[split] += len(text)
            if sizes[split] >= BATCH:
                yield split, pending[split]
                pending[split], sizes[split] = [], 0
    yield from pending.items()


def report(found: ShardSet) -> None:
    for split in SPLITS:
        documents, tokens, size = (found.count(split, what) for what in ("documents", "tokens", "bytes"))
        print(f"{split}: {documents:,} documents, {tokens:,} tokens, {size / 1e6:,.1f} MB of text, "
              f"{size / tokens:.2f} bytes per token")


def compare(job: Job, found: ShardSet, vocabulary: Vocabulary) -> int:
    """Decode a sample of a job's documents and compare them with their source; returns how many."""
    checked, number, chosen, ids, starts = 0, dict.fromkeys(SPLITS, 0), {}, {}, {}
    for split, name in job.names.items():
        ids[split] = found.open(next(shard for shard in found.shards if shard.file == name))
        starts[split] = [*shards.document_starts(ids[split]), len(ids[split])]
        count = len(starts[split]) - 1
        chosen[split] = set(random.Random(job.index).sample(range(count), min(VERIFIED, count)))
    for split, texts in batches(job, lambda size: None):
        for text in texts:
            if number[split] in chosen[split]:
                begin, end = starts[split][number[split]:][:2]
                document = ids[split][begin:end].tolist()
                if not same(document, text, vocabulary):
                    raise UserError(f"{found.folder / job.names[split]}: document {number[split]} is not its source, "
                                    f"{text[:60]!r}...\n       delete {found.folder} and run this again")
                checked += 1
            number[split] += 1
    return checked


def same(ids: list[int], text: str, vocabulary: Vocabulary) -> bool:
    """Whether ids stand for a text. A vocabulary that changes text on the way is compared by its ids."""
    return vocabulary.decode(ids) == text if vocabulary.exact else ids == vocabulary.encode(text, bos=True, eos=True)


if __name__ == "__main__":
    settings.run(main)
