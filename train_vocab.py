"""Step 1 of 4: learn a tokenizer from text.

    python train_vocab.py --vocab_size 1024                      # the built-in stories; seconds
    python train_vocab.py --data my_texts                        # your own folder or file
    python train_vocab.py --download True --vocab_size 4096      # the real TinyStories; 1.6 GB to fetch

Writes data/tok4096.model, which step 2 and step 3 find by themselves, and data/tok4096.json, which
tells step 2 where the text is and which documents are for validation. The tokenizer never sees those,
so that validation stays honest; they serve to check that decoding gives back every character.
"""
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from tinyllm import cli, corpus, documents, workers
from tinyllm.cli import UserError
from tinyllm.files import atomic_write, folder_lock
from tinyllm.machine import peak_memory
from tinyllm.project import path_flags, tokenizer_errors
from tinyllm.words import WordCounts
from tokenizer import Tokenizer, check_vocab_size, train_tokenizer

# ---- settings -----------------------------------------------------------------------------------
data_dir = "data"       # where the tokenizer goes; use another folder for each project
data = ""               # your own text: a file or folder of .txt, .json, .jsonl, each also .gz
encoding = ""           # of all files, if not UTF-8: gb18030 for Chinese Windows, cp1252 for western, utf-16, ...
download = False        # fetch the real TinyStories into data_dir, unless they are there
mirror = ""             # for the download: huggingface, hf-mirror, modelscope or an address; several with commas
vocab_size = 4096       # 512 to 2048 for a small model on a CPU, 4096 for the default, 32000 for a large one
num_workers = 0         # processes, at most 60; 0: one per core, if memory allows. Each takes up to 400 MB
# ---- end of settings ----------------------------------------------------------------------------

MAX_LEAD = 8            # parts of the text that may be counted before an earlier one; their counts wait in memory


@dataclass(frozen=True)
class Job:
    """The files whose words a process counts, and how to read them."""
    index: int
    files: list[Path]
    threshold: int
    encoding: str = ""


@dataclass
class CorpusStats:
    """The words of the training documents, and a sample of the validation documents."""
    words: WordCounts = field(default_factory=WordCounts)
    documents: int = 0
    bytes: int = 0
    n_val_documents: int = 0
    val_sample: list[bytes] = field(default_factory=list)       # the first ones, up to VAL_BYTES
    val_sample_bytes: int = 0

    def add(self, texts: list[bytes], threshold: int) -> None:
        train_texts = []
        for text in texts:
            if corpus.document_hash(text) <= threshold:
                self.n_val_documents += 1
                self.add_to_val_sample(text)
            else:
                train_texts.append(text)
        self.words.add(train_texts)
        self.documents += len(train_texts)
        self.bytes += sum(map(len, train_texts))

    def add_to_val_sample(self, text: bytes) -> None:
        if self.val_sample_bytes < corpus.VAL_BYTES:
            self.val_sample.append(text)
            self.val_sample_bytes += len(text)

    def merge(self, other: "CorpusStats") -> None:
        self.words.merge(other.words)
        self.documents += other.documents
        self.bytes += other.bytes
        self.n_val_documents += other.n_val_documents
        for text in other.val_sample:
            self.add_to_val_sample(text)


def main() -> None:
    cfg, _ = cli.parse_settings(globals())
    with tokenizer_errors():
        check_vocab_size(cfg.vocab_size)
    documents.check_encoding(cfg.encoding)
    if cfg.data and cfg.download:
        raise UserError("--data and --download name two sources; give one of them")
    with folder_lock(cfg.data_dir):
        source = find_source(cfg)
        corpus.check_not_nested(source, cfg.data_dir)
        files = corpus.find_files(source)
        with documents.report_all_bad_encodings(files, cfg.encoding):
            path = learn_vocabulary(cfg, source, files)
    print("next:", cli.format_command("preprocess", **path_flags(path)))


def find_source(cfg: SimpleNamespace) -> Path:
    if cfg.download:
        from tinyllm.download import download_tinystories  # only this needs requests
        return download_tinystories(cfg.data_dir, cfg.mirror)
    return Path(cfg.data) if cfg.data else corpus.default_source(cfg.data_dir)


def learn_vocabulary(cfg: SimpleNamespace, source: Path, files: list[Path]) -> Path:
    """Count the words of the text, train a tokenizer on them, check it and write it. Returns its path."""
    start = time.perf_counter()
    threshold = corpus.val_hash_threshold(files, cfg.encoding)
    groups = corpus.group_small_files(files)
    jobs = [Job(i, group, threshold, cfg.encoding) for i, group in enumerate(groups)]
    num_workers, reason = workers.choose_num_workers(cfg.num_workers, len(jobs))
    print_plan(source, files, num_workers, reason, cfg.encoding)
    stats, peak = count_words(jobs, num_workers)
    print_stats(stats, workers.format_throughput(stats.bytes, time.perf_counter() - start, peak))
    with tokenizer_errors():
        tokenizer = train_tokenizer(stats.words.counts, cfg.vocab_size)
    if tokenizer.n_words < cfg.vocab_size:
        print(f"vocabulary: {tokenizer.n_words:,} of {cfg.vocab_size:,} entries, all that can be learned from this "
              "text; with a smaller --vocab_size, a model learns faster")
    check_round_trip(tokenizer, stats)
    path = Path(cfg.data_dir) / f"tok{cfg.vocab_size}.model"
    with atomic_write(path) as file:
        file.write(tokenizer.model)
    corpus.save_source(path, tokenizer.sha256, corpus.TextSource(source, threshold, cfg.encoding))
    memory = f", with {peak_memory() / 1e6:,.0f} MB of memory" if peak_memory() else ""
    print(f"wrote {path} ({tokenizer.n_words} entries) after {time.perf_counter() - start:.0f} s{memory}")
    return path


def print_plan(source: Path, files: list[Path], num_workers: int, reason: str, encoding: str) -> None:
    """Print the text, the files that are not read, and an estimate that is measured on the first texts."""
    skipped = corpus.summarize_skipped(source)
    note = f"; passed over: {skipped}" if skipped else ""
    print(f"text: {source}, {workers.format_count(len(files), 'file')}{note}")
    size = sum(file.stat().st_size for file in files)
    read, seconds = workers.measure_throughput(files, WordCounts().add, encoding)
    eta = workers.format_eta(seconds * size / read, num_workers)
    print(f"plan: {workers.format_bytes(size)} to read, {reason}, {eta}")


def count_words(jobs: list[Job], num_workers: int) -> tuple[CorpusStats, int]:
    """Count the words of all jobs. Returns the counts and the largest peak memory of a process."""
    stats, peak = CorpusStats(), 0
    pending: dict[int, CorpusStats] = {}
    next_index = 0
    size = sum(file.stat().st_size for job in jobs for file in job.files)
    for (index, part), memory in workers.run_jobs(count_part, jobs, num_workers, size, "counting words", MAX_LEAD):
        peak = max(peak, memory)
        pending[index] = part
        while next_index in pending:    # in the order of the jobs, so that every run prunes the same words
            stats.merge(pending.pop(next_index))
            next_index += 1
    return stats, peak


def count_part(job: Job, progress: Callable[[int], None]) -> tuple[int, CorpusStats]:
    """Count the words of a job. May run in a worker process."""
    stats = CorpusStats()
    for texts in documents.read_batches(job.files, progress, job.encoding):
        stats.add(texts, job.threshold)
    stats.words.flush()
    return job.index, stats


def print_stats(stats: CorpusStats, throughput: str) -> None:
    """Print how much text there is to learn from, and warn if much of it is not used."""
    words, n_pruned = stats.words.counts, stats.words.n_pruned
    print(f"read: {workers.format_count(stats.documents, 'document')}, {workers.format_bytes(stats.bytes)} of text to "
          f"learn from, {len(words) + n_pruned:,} distinct words, {throughput}")
    if n_pruned:
        print(f"note: {n_pruned:,} rare words, or long ones as of Chinese, do not fit into memory; the vocabulary is "
              f"learned from the {len(words):,} others, {workers.format_bytes(sum(map(len, words)))}")
    if stats.n_val_documents > stats.documents:
        print(f"note: {stats.n_val_documents:,} documents are for validation, and only {stats.documents:,} to learn "
              "from: they are the same ones again and again")


def check_round_trip(tokenizer: Tokenizer, stats: CorpusStats) -> None:
    """Encode and decode the validation documents, from which nothing was learned."""
    texts = [text.decode() for text in stats.val_sample]
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch):
        assert tokenizer.decode(ids) == text, f"the tokenizer loses text: {text[:80]!r}"
    bytes_per_token = stats.val_sample_bytes / sum(map(len, batch))
    some = f"{len(texts):,} of " if len(texts) < stats.n_val_documents else ""
    print(f"validation: {some}{workers.format_count(stats.n_val_documents, 'document')} encoded and decoded exactly, "
          f"at {bytes_per_token:.2f} bytes per token")


if __name__ == "__main__":
    cli.run_script(main)
