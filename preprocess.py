"""Step 2 of 4: turn the text into token ids, in files that training maps into memory.

    python preprocess.py                          # the text and the tokenizer of step 1
    python preprocess.py --tokenizer llama.model --data my_texts   # a tokenizer file, or a model that contains one

Writes a folder such as data/tok4096/: train_*.bin, val_*.bin and, when all of them are complete, manifest.json. Rerun
it after an interruption: it only writes shards that are missing or outdated.
"""
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tinyllm import cli, corpus, documents, shards, workers
from tinyllm.cli import UserError, escape_for_terminal
from tinyllm.corpus import TextSource
from tinyllm.files import atomic_replace, atomic_write, folder_lock, sha256, unused_path
from tinyllm.project import find_tokenizer, load_tokenizer, path_flags
from tinyllm.shards import MANIFEST, SPLITS, Shard, ShardSet, Source
from tinyllm.words import DocumentEncoder

# ---- settings -----------------------------------------------------------------------------------
data_dir = "data"       # folder of the tokenizer from step 1; the shards are written there
data = ""               # your text: a file or folder; empty: the text of step 1
encoding = ""           # encoding of the text, such as gb18030; empty: the encoding from step 1
vocab_size = 0          # selects the tokenizer if data_dir has several; 0: the only one
tokenizer = ""          # a tokenizer file, or a model that contains one, copied to data_dir; empty: from step 1
num_workers = 0         # processes, at most 60, up to 400 MB each; 0: one per core, if memory allows
# ---- end of settings ----------------------------------------------------------------------------

PARTIAL_MANIFEST = "manifest.part.json"         # lists the finished shards of an incomplete set
MOVED_FLAGS = {"verify": "bash test.sh -k preprocess       # the tests compare shards with the plain encoding"}


@dataclass(frozen=True)
class Job:
    """The source files of one pair of shards, and the settings for writing it."""
    index: int
    sources: dict[Path, Source]
    folder: Path
    tokenizer_path: Path
    tokenizer_sha256: str
    val_threshold: int
    encoding: str = ""

    @property
    def names(self) -> dict[str, str]:
        return {split: f"{split}_{self.index:04d}.bin" for split in SPLITS}


def main() -> None:
    cfg, _ = cli.parse_settings(globals(), moved=MOVED_FLAGS)
    start = time.perf_counter()
    if cfg.data:
        corpus.check_not_nested(cfg.data, cfg.data_dir)
    if cfg.tokenizer:
        tokenizer_path = import_tokenizer(Path(cfg.tokenizer), cfg.data_dir)
    else:
        tokenizer_path = find_tokenizer(cfg.data_dir, cfg.vocab_size)
    tokenizer = load_tokenizer(tokenizer_path)
    source = find_source(cfg, tokenizer_path, tokenizer.sha256)
    files = corpus.find_files(source.path)
    if not tokenizer_path.with_suffix(".json").exists():
        corpus.save_source(tokenizer_path, tokenizer.sha256, source)
    text = f"{source.path}, {corpus.format_count(len(files), 'file')}"
    print(escape_for_terminal(f"text: {text}; vocabulary: {tokenizer_path}, {tokenizer.vocab_size} entries"))
    folder = tokenizer_path.with_suffix("")
    shard_set = ShardSet(folder, tokenizer.sha256, tokenizer.vocab_size, source.val_threshold, [])
    with folder_lock(folder):
        build_shards(shard_set, make_jobs(files, source, tokenizer_path, shard_set), cfg.num_workers)
    print_stats(shard_set)
    print(f"{folder / MANIFEST} is complete after {time.perf_counter() - start:.0f} s")
    print_next_step(cfg, tokenizer_path)


def import_tokenizer(path: Path, data_dir: str) -> Path:
    """Copy a tokenizer to <data_dir>/tok<size>.model, where all steps look for it. Returns that path."""
    from tinyllm import checkpoint  # loads torch, which workers do not need
    imported = checkpoint.read_tokenizer(path)
    if min(imported.bos_id, imported.eos_id) < 0:
        raise UserError(f"{path} has no bos or no eos token; expected both, to separate documents")
    tokenizer_path = Path(data_dir) / f"tok{imported.vocab_size}.model"
    if tokenizer_path.exists() and load_tokenizer(tokenizer_path).sha256 != imported.sha256:
        raise UserError(f"{tokenizer_path} holds another vocabulary of that size\n       choose another --data_dir")
    with folder_lock(data_dir), atomic_write(tokenizer_path) as file:
        file.write(imported.model)
    return tokenizer_path


def find_source(cfg: SimpleNamespace, tokenizer_path: Path, tokenizer_sha256: str) -> TextSource:
    """Return the text of step 1, unless the settings name another one."""
    recorded = corpus.load_source(tokenizer_path, tokenizer_sha256)
    if not recorded and not cfg.data and not cfg.tokenizer:
        raise UserError(f"no {tokenizer_path.with_suffix('.json')}; expected the file of step 1 that names the text\n"
                        "       name the text with --data PATH")
    text_encoding = cfg.encoding or (recorded.encoding if recorded else "")
    if recorded and (not cfg.data or Path(cfg.data) == recorded.path):
        return replace(recorded, encoding=text_encoding)
    path = Path(cfg.data) if cfg.data else corpus.default_source(cfg.data_dir)
    return TextSource(path, corpus.find_val_threshold(corpus.find_files(path), text_encoding), text_encoding)


def make_jobs(files: list[Path], source: TextSource, tokenizer_path: Path, shard_set: ShardSet) -> list[Job]:
    """Group the source files into jobs, one for each pair of shards."""
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256, files))
    if source.encoding:             # in another encoding, the same bytes are another text
        digests = [hashlib.sha256(f"{digest} {source.encoding}".encode()).hexdigest() for digest in digests]
    sources = {}
    for path, digest in zip(files, digests):
        name = path.relative_to(source.path).as_posix() if source.path.is_dir() else path.name
        sources[path] = Source(name, path.stat().st_size, digest)
    jobs = []
    for i, group in enumerate(corpus.group_small_files(files)):
        jobs.append(Job(i, {path: sources[path] for path in group}, shard_set.folder, tokenizer_path,
                        shard_set.tokenizer_sha256, source.val_threshold, source.encoding))
    return jobs


def build_shards(shard_set: ShardSet, jobs: list[Job], num_workers: int) -> None:
    """Write the missing and outdated shards, then the manifest. PARTIAL_MANIFEST lists the shards until then."""
    finished = find_reusable_shards(shard_set, jobs)
    todo = [job for job in jobs if job.index not in finished]
    if finished:
        print(f"{len(finished)} of {len(jobs)} pairs of shards are up to date")
    manifest = shard_set.folder / MANIFEST
    partial_manifest = shard_set.folder / PARTIAL_MANIFEST
    if todo and manifest.exists():
        atomic_replace(manifest, partial_manifest)
    num_workers = workers.choose_num_workers(num_workers, len(todo))
    size = sum(source.size for job in todo for source in job.sources.values())
    for job, pair in workers.run_jobs(write_shards, todo, num_workers, size, "tokenizing"):
        finished[job.index] = pair
        shard_set.shards = [shard for pair in finished.values() for shard in pair]
        shard_set.save(PARTIAL_MANIFEST)
    shard_set.shards = [shard for job in jobs for shard in finished[job.index]]
    shard_set.check_splits_not_empty()
    shard_set.save()
    partial_manifest.unlink(missing_ok=True)
    delete_unlisted_shards(shard_set)


def find_reusable_shards(shard_set: ShardSet, jobs: list[Job]) -> dict[int, list[Shard]]:
    """Return the intact shards of earlier runs that this run would write with the same content, by job index."""
    intact: dict[str, Shard] = {}
    for name in (PARTIAL_MANIFEST, MANIFEST):
        try:
            old = shards.read_manifest(shard_set.folder, name)
        except UserError:
            continue
        if (old.tokenizer_sha256, old.val_threshold) == (shard_set.tokenizer_sha256, shard_set.val_threshold):
            intact |= {shard.file: shard for shard in old.shards if old.is_intact(shard)}
    reusable = {}
    for job in jobs:
        pair = [intact.get(name) for name in job.names.values()]
        if all(shard and shard.sources == list(job.sources.values()) for shard in pair):
            reusable[job.index] = pair
    return reusable


def delete_unlisted_shards(shard_set: ShardSet) -> None:
    listed = {shard.file for shard in shard_set.shards}
    for split in SPLITS:
        for path in shard_set.folder.glob(f"{split}_*.bin*"):
            if path.name not in listed:
                path.unlink()


@lru_cache(1)
def shared_encoder(path: Path, sha256: str) -> DocumentEncoder:
    """Return the encoder that all jobs of a process share. sha256 is only a cache key."""
    return DocumentEncoder(load_tokenizer(path))


def write_shards(job: Job, progress: Callable[[int], None]) -> list[Shard]:
    """Tokenize the files of a job and write its train and val shards."""
    encoder = shared_encoder(job.tokenizer_path, job.tokenizer_sha256)
    dtype = shards.token_dtype(encoder.tokenizer.vocab_size)
    counts = {split: np.zeros(3, np.int64) for split in SPLITS}          # documents, tokens, bytes of text
    digests = {split: hashlib.sha256() for split in SPLITS}
    with ExitStack() as stack:
        files = {split: stack.enter_context(atomic_write(job.folder / name)) for split, name in job.names.items()}
        for split, texts in split_batches(job, progress):
            ids = encoder.encode(texts).astype(dtype)
            files[split].write(ids)
            digests[split].update(ids)
            counts[split] += (len(texts), len(ids), sum(map(len, texts)))
    pair = []
    for split, name in job.names.items():
        sources = list(job.sources.values())
        pair.append(Shard(name, digests[split].hexdigest(), split, sources, *counts[split].tolist()))
    return pair


def split_batches(job: Job, progress: Callable[[int], None]) -> Iterator[tuple[str, list[bytes]]]:
    """Yield batches (split, documents in UTF-8) in source order; large batches encode faster."""
    pending: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    for batch in documents.read_batches(job.sources, progress, job.encoding):
        for split, texts in corpus.split_texts(batch, job.val_threshold).items():
            pending[split] += texts
            if sum(map(len, pending[split])) > documents.BATCH_BYTES // 2:
                yield split, pending[split]
                pending[split] = []
    yield from pending.items()


def print_stats(shard_set: ShardSet) -> None:
    for split in SPLITS:
        count = corpus.format_count(shard_set.total(split, "documents"), "document")
        n_tokens = shard_set.total(split, "tokens")
        n_bytes = shard_set.total(split, "bytes")
        print(f"{split}: {count}, {n_tokens:,} tokens, {n_bytes / 1e6:,.1f} MB of text, "
              f"{n_bytes / max(n_tokens, 1):.2f} bytes per token")


def print_next_step(cfg: SimpleNamespace, tokenizer_path: Path) -> None:
    """Print the command for step 3. If the tokenizer is from a model, the command fine-tunes that model."""
    flags = path_flags(tokenizer_path)
    if cfg.tokenizer:
        from tinyllm import checkpoint  # loads torch, which workers do not need
        if checkpoint.is_model(cfg.tokenizer):
            out_dir = Path("output/tuned")
            if out_dir.exists():
                out_dir = unused_path(out_dir.parent, "tuned-{}")
            flags |= {"init_from": cfg.tokenizer, "out_dir": out_dir, "batch_size": 4, "learning_rate": "3e-4",
                      "max_iters": 200}
    train = cli.format_command("train", **flags)
    print(f"next: {train}")
    if "init_from" not in flags:
        print(f"      on a CPU, for a first story after 3 minutes: {train} --preset cpu_3min")


if __name__ == "__main__":
    cli.run_script(main)
