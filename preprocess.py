"""Step 2 of 4: turn the text into token ids, in files that training maps into memory.

    python preprocess.py                          # the text and the vocabulary of step 1
    python preprocess.py --verify                 # and encode and decode every document in the plain, slow way
    python preprocess.py --tokenizer llama.model --data my_texts      # a vocabulary made elsewhere, or that of a model

Writes data/tok4096/: train_*.bin, val_*.bin and, when all of them are whole, manifest.json. A second
run does only what is missing or changed, so after a break just run it again.
"""
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tinyllm import cli, corpus, documents, shards, workers
from tinyllm.cli import UserError, escape_for_terminal
from tinyllm.files import atomic_replace, atomic_write, folder_lock, load_json, save_json, sha256
from tinyllm.project import DATA, find_tokenizer, load_tokenizer, path_flags
from tinyllm.shards import MANIFEST, SPLITS, Shard, ShardSet, Source
from tinyllm.words import DocumentEncoder
from tokenizer import BaseTokenizer

# ---- settings -----------------------------------------------------------------------------------
data_dir = "data"       # where step 1 wrote the vocabulary, and where the shards go
data = ""               # the text; empty: what step 1 read
encoding = ""           # of all files, such as gb18030; empty: that of step 1
vocab_size = 0          # which vocabulary of data_dir, when there are several; 0: the only one
tokenizer = ""          # a vocabulary from elsewhere, or a model that has one; it is copied to data_dir and used
num_workers = 0         # processes, at most 60; 0: one per core, if there is memory. Each takes up to 400 MB
verify = False          # compare all shards with their text, encoded in the plain way, which is much slower
# ---- end of settings ----------------------------------------------------------------------------

PARTIAL_MANIFEST = "manifest.part.json"


@dataclass(frozen=True)
class Job:
    """What a worker process needs to write one pair of shards."""
    index: int
    sources: dict[Path, Source]
    folder: Path
    model_path: Path
    model_sha256: str
    threshold: int
    encoding: str = ""

    @property
    def names(self) -> dict[str, str]:
        return {split: f"{split}_{self.index:04d}.bin" for split in SPLITS}


def main() -> None:
    cfg, _ = cli.parse_settings(globals())
    start = time.perf_counter()
    if cfg.data:
        corpus.check_not_nested(cfg.data, cfg.data_dir)
    model_path = import_tokenizer(Path(cfg.tokenizer), cfg.data_dir) if cfg.tokenizer else find_tokenizer(cfg.data_dir, cfg.vocab_size)
    vocabulary = load_tokenizer(model_path)
    source, threshold, encoding = find_source(cfg, model_path, vocabulary)
    files = corpus.find_files(source)
    save_source_info(model_path, vocabulary, source, threshold, encoding)
    print(escape_for_terminal(f"text: {source}, {len(files)} file{'s' * (len(files) != 1)}; vocabulary: {model_path}, "
                f"{vocabulary.n_words} entries"))
    encoder = DocumentEncoder(vocabulary)
    if encoder.why_not_wordwise:
        print("encoding: whole texts, not word by word, which would be faster: "
              + escape_for_terminal(encoder.why_not_wordwise))

    folder = model_path.with_suffix("")
    target = ShardSet(folder, vocabulary.sha256, vocabulary.n_words, threshold, [])
    with folder_lock(folder), documents.report_all_bad_encodings(files, encoding):
        jobs = [Job(i, group, folder, model_path, vocabulary.sha256, threshold, encoding)
                for i, group in enumerate(group_files(files, source, encoding))]
        build_shards(target, jobs, cfg.num_workers, encoder)
        if cfg.verify:
            verify_all(jobs, cfg.num_workers)
    print(f"{folder / MANIFEST} is complete after {time.perf_counter() - start:.0f} s")
    print_next_step(cfg, model_path)


def print_next_step(cfg: SimpleNamespace, model_path: Path) -> None:
    """Print the command that trains on the shards; with a model's vocabulary, one that goes on from the model."""
    where = path_flags(model_path)
    train = cli.format_command("train", **where)
    if cfg.tokenizer and is_model(cfg.tokenizer):
        out = Path("output") / (Path(cfg.data_dir).name if Path(cfg.data_dir) != DATA else "tuned")
        out = Path(f"{out}-tuned") if out.exists() else out     # a run that is there stays
        print("next:", cli.format_command("train", **where, init_from=cfg.tokenizer, out_dir=out, batch_size=4,
                                        learning_rate="3e-4", max_iters=200))
        return
    print(f"next: {train}\n      on a CPU, a first story after 3 minutes: {train} --preset cpu_3min")
    if cfg.tokenizer:
        print(f"      to go on from a model that has this vocabulary: {train} --init_from CKPT --out_dir output/tuned "
              "--batch_size 4 --learning_rate 3e-4 --max_iters 200")


def is_model(path: str) -> bool:
    """True for a model, False for a tokenizer file."""
    from tinyllm import checkpoint  # loads torch, which workers do not need
    return checkpoint.is_model(path)


def import_tokenizer(path: Path, folder: str) -> Path:
    """Copy a vocabulary made elsewhere to <folder>/tok<size>.model, where all steps look for it."""
    from tinyllm import checkpoint  # loads torch, which workers do not need
    vocabulary = checkpoint.read_tokenizer(path)
    if min(vocabulary.bos_id, vocabulary.eos_id) < 0:
        raise UserError(f"{path} has no bos or no eos; documents could not be told apart")
    target = Path(folder) / f"tok{vocabulary.n_words}.model"
    if target.exists() and load_tokenizer(target).sha256 != vocabulary.sha256:
        raise UserError(f"{target} is another vocabulary of that size\n       name another --data_dir for {path}")
    with folder_lock(folder), atomic_write(target) as file:
        file.write(vocabulary.model)
    return target


def find_source(cfg: SimpleNamespace, model_path: Path, vocabulary: BaseTokenizer) -> tuple[Path, int, str]:
    """The text to read, the rule of its validation split, and its encoding: those of step 1 unless told otherwise."""
    notes, known, threshold, encoding = model_path.with_suffix(".json"), None, 0, cfg.encoding
    if notes.exists():
        try:
            facts = load_json(notes)
            digest, known, threshold = facts["sha256"], Path(facts["source"]), int(facts["val_threshold"])
            encoding = encoding or str(facts.get("encoding", ""))
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise UserError(f"{notes} is damaged ({error})\n       run python train_vocab.py again") from error
        if digest != vocabulary.sha256:
            raise UserError(f"{model_path} is not as step 1 wrote it: {notes} has another SHA-256\n       "
                            "run python train_vocab.py again")
    elif not cfg.data and not cfg.tokenizer:
        raise UserError(f"no {notes}, which would tell what text {model_path.name} is for\n       name it: --data PATH")
    documents.check_encoding(encoding)
    source = Path(cfg.data) if cfg.data else known or corpus.default_source(cfg.data_dir)
    if source != known:
        threshold = corpus.val_hash_threshold(corpus.find_files(source), encoding)
    return source, threshold, encoding


def save_source_info(model_path: Path, vocabulary: BaseTokenizer, source: Path, threshold: int, encoding: str) -> None:
    """Write beside a vocabulary, as step 1 does, what text it is used for, unless that is known."""
    notes = model_path.with_suffix(".json")
    if not notes.exists():
        save_json(notes, {"sha256": vocabulary.sha256, "source": source.as_posix(), "val_threshold": threshold,
                          "encoding": encoding})


def group_files(files: list[Path], root: Path, encoding: str = "") -> list[dict[Path, Source]]:
    """Arrange the source files into groups, one for each pair of shards. In another encoding they are other files."""
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256, files))
    if encoding:
        digests = [hashlib.sha256(f"{digest} {encoding}".encode()).hexdigest() for digest in digests]
    names = [path.relative_to(root).as_posix() if root.is_dir() else path.name for path in files]
    sources = {path: Source(name, path.stat().st_size, digest) for path, name, digest in zip(files, names, digests)}
    return [{path: sources[path] for path in group} for group in corpus.group_small_files(files)]


def build_shards(target: ShardSet, jobs: list[Job], num_workers: int, encoder: DocumentEncoder) -> None:
    """Bring the shards up to date. Until all are whole, their list has another name than the manifest."""
    done = find_reusable_shards(target, jobs)
    todo = [job for job in jobs if job.index not in done]
    target.shards = [shard for index in sorted(done) for shard in done[index]]
    if done:
        print(f"{len(done)} of {len(jobs)} pairs of shards are up to date")
    processes, why = workers.choose_num_workers(num_workers, len(todo))
    if todo:
        print_plan(target, todo, encoder, processes, why)
        if (target.folder / MANIFEST).exists():
            atomic_replace(target.folder / MANIFEST, target.folder / PARTIAL_MANIFEST)
    start, written, most = time.perf_counter(), 0, 0
    for (index, pair), peak in workers.run_jobs(write_shards, todo, processes, total_bytes(todo), "tokenizing"):
        done[index], most, written = pair, max(most, peak), written + sum(shard.bytes for shard in pair)
        target.shards = [shard for index in sorted(done) for shard in done[index]]
        target.save(PARTIAL_MANIFEST)
    print_stats(target)
    if todo:
        print(f"speed: {workers.format_throughput(written, time.perf_counter() - start, most)}")
    target.check_splits_not_empty()
    target.save()
    (target.folder / PARTIAL_MANIFEST).unlink(missing_ok=True)
    for path in [path for split in SPLITS for path in target.folder.glob(f"{split}_*.bin*")]:
        if path.name not in {shard.file for shard in target.shards}:
            path.unlink()


def total_bytes(jobs: list[Job]) -> int:
    return sum(source.size for job in jobs for source in job.sources.values())


def print_plan(target: ShardSet, todo: list[Job], encoder: DocumentEncoder, processes: int, why: str) -> None:
    """Say what is to come, from a try with the first texts. Raises UserError when there is no room for it."""
    size, tokens = total_bytes(todo), []
    read, seconds = workers.measure_throughput((path for job in todo for path in job.sources),
                                 lambda texts: tokens.append(len(encoder.encode(texts))), todo[0].encoding)
    if not tokens:
        return                          # the first text cannot be read, as will be told in its turn
    need, free = sum(tokens) * target.dtype.itemsize * size / read, shutil.disk_usage(target.folder).free
    old = sum(path.stat().st_size for job in todo for name in job.names.values()
              if (path := target.folder / name).exists())               # gives its room to what replaces it
    print(f"plan: {workers.format_bytes(size)} to read, about {workers.format_bytes(need)} to write "
          f"({free / 1e6:,.0f} MB are free), {why}, {workers.format_eta(seconds * size / read, processes)}")
    if need > free + old:
        raise UserError(f"no room: about {workers.format_bytes(need)} are to be written, {workers.format_bytes(free)} are free on "
                        f"the disk of {target.folder.resolve()}")


def find_reusable_shards(target: ShardSet, jobs: list[Job]) -> dict[int, list[Shard]]:
    """The shards of an earlier run, by job, that this run would write just the same."""
    old = {}
    for name in (PARTIAL_MANIFEST, MANIFEST):
        try:
            found = shards.read_manifest(target.folder, name)
        except UserError:
            continue
        if (found.tokenizer_sha256, found.val_threshold) == (target.tokenizer_sha256, target.val_threshold):
            old |= {shard.file: shard for shard in found.shards if not found.find_damage(shard)}
    pairs = {job.index: [old.get(name) for name in job.names.values()] for job in jobs}
    return {job.index: pairs[job.index] for job in jobs
            if all(shard and shard.sources == list(job.sources.values()) for shard in pairs[job.index])}


@lru_cache(1)
def shared_encoder(path: Path, sha256: str) -> DocumentEncoder:
    """One encoder, with the words that it knows, for all jobs of a process.

    sha256 is only a key of the cache: a file with other content, under the same name, is loaded anew.
    """
    return DocumentEncoder(load_tokenizer(path))


def write_shards(job: Job, progress: Callable[[int], None]) -> tuple[int, list[Shard]]:
    """Tokenize the files of a job into its train and its val shard. May run in a worker process."""
    encoder = shared_encoder(job.model_path, job.model_sha256)
    dtype = shards.token_dtype(encoder.tokenizer.n_words)
    counts = {split: np.zeros(3, np.int64) for split in SPLITS}          # documents, tokens, bytes of text
    digests = {split: hashlib.sha256() for split in SPLITS}
    with ExitStack() as stack:
        out = {split: stack.enter_context(atomic_write(job.folder / name)) for split, name in job.names.items()}
        for split, texts in batches(job, progress):
            ids = encoder.encode(texts).astype(dtype)
            out[split].write(ids)
            digests[split].update(ids)
            counts[split] += (len(texts), len(ids), sum(map(len, texts)))
    sources = list(job.sources.values())
    return job.index, [Shard(name, digests[split].hexdigest(), split, sources, *counts[split].tolist())
                       for split, name in job.names.items()]


def batches(job: Job, progress: Callable[[int], None]) -> Iterator[tuple[str, list[bytes]]]:
    """Yield (split, documents in UTF-8) in the order of the source, about BATCH_BYTES at a time."""
    pending, sizes = {split: [] for split in SPLITS}, dict.fromkeys(SPLITS, 0)
    for path in job.sources:
        for text in map(str.encode, documents.read_documents(path, progress, job.encoding)):
            split = "val" if corpus.document_hash(text) <= job.threshold else "train"
            pending[split].append(text)
            sizes[split] += len(text)
            if sizes[split] >= documents.BATCH_BYTES:
                yield split, pending[split]
                pending[split], sizes[split] = [], 0
    yield from ((split, texts) for split, texts in pending.items() if texts)


def print_stats(found: ShardSet) -> None:
    for split in SPLITS:
        documents, tokens, size = (found.total(split, what) for what in ("documents", "tokens", "bytes"))
        print(f"{split}: {documents:,} document{'s' * (documents != 1)}, {tokens:,} tokens, "
              f"{workers.format_bytes(size)} of text, {size / max(tokens, 1):.2f} bytes per token")


def verify_all(jobs: list[Job], num_workers: int) -> None:
    processes, _ = workers.choose_num_workers(num_workers, len(jobs))
    checked = sum(count for count, _ in workers.run_jobs(check_shards, jobs, processes, total_bytes(jobs), "verifying"))
    print(f"verified: {checked:,} documents have the ids of the plain way")


def check_shards(job: Job, progress: Callable[[int], None]) -> int:
    """Compare every document of a job with its shards: encoded as a whole it has these ids, and they decode to it.

    Returns how many. May run in a worker process.
    """
    vocabulary = load_tokenizer(job.model_path)
    found = shards.read_manifest(job.folder)
    ids = {shard.split: found.memmap(shard) for shard in found.shards if shard.file in job.names.values()}
    place = dict.fromkeys(SPLITS, 0)
    checked = 0
    for split, texts in batches(job, progress):
        strings = [text.decode() for text in texts]
        for text, want in zip(strings, vocabulary.encode_batch(strings, bos=True, eos=True)):
            end = place[split] + len(want)
            if ids[split][place[split]:end].tolist() != want or vocabulary.is_lossless and vocabulary.decode(want) != text:
                raise UserError(f"{job.folder / job.names[split]}: the ids from {place[split]:,} on are not those of "
                                f"{text[:60]!r}...\n       delete {job.folder} and run this again")
            place[split], checked = end, checked + 1
    for split, known in ids.items():
        if place[split] != len(known):
            raise UserError(f"{job.folder / job.names[split]} has {len(known) - place[split]:,} ids that are of no "
                            f"document\n       delete {job.folder} and run this again")
    return checked


if __name__ == "__main__":
    cli.run_script(main)
