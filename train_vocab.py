"""Step 1 of 4: learn a tokenizer from text.

    python train_vocab.py --vocab_size 1024                      # the built-in stories; seconds
    python train_vocab.py --data my_texts                        # your own folder or file
    python train_vocab.py --download True --vocab_size 4096      # the real TinyStories; 1.6 GB to fetch

Writes data/tok4096.model, which step 2 and step 3 find by themselves, and data/tok4096.json, which
tells step 2 where the text is and which documents are for validation. The tokenizer never sees those,
so that validation stays honest.
"""
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from tinyllm import cli, corpus, documents, workers
from tinyllm.cli import UserError
from tinyllm.files import atomic_write, folder_lock
from tinyllm.project import path_flags, tokenizer_errors
from tinyllm.words import WordCounts
from tokenizer import check_vocab_size, train_tokenizer

# ---- settings -----------------------------------------------------------------------------------
data_dir = "data"       # where the tokenizer goes; use another folder for each project
data = ""               # your own text: a file or folder of .txt, .json, .jsonl, each also .gz
encoding = ""           # of all files, if not UTF-8: gb18030 for Chinese Windows, cp1252 for western, utf-16, ...
download = False        # fetch the real TinyStories into data_dir, unless they are there
mirror = ""             # for the download: huggingface, hf-mirror, modelscope or an address; several with commas
vocab_size = 4096       # 512 to 2048 for a small model on a CPU, 4096 for the default, 32000 for a large one
num_workers = 0         # processes, at most 60; 0: one per core, if memory allows. Each takes up to 400 MB
# ---- end of settings ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """The files whose words a process counts, and how to read them."""
    files: list[Path]
    val_threshold: int
    encoding: str = ""


@dataclass
class CorpusStats:
    """The words and the size of the training documents, and the number of validation documents."""
    words: WordCounts = field(default_factory=WordCounts)
    documents: int = 0
    bytes: int = 0
    n_val_documents: int = 0

    def merge(self, other: "CorpusStats") -> None:
        self.words.merge(other.words)
        self.documents += other.documents
        self.bytes += other.bytes
        self.n_val_documents += other.n_val_documents


def main() -> None:
    cfg, _ = cli.parse_settings(globals())
    with tokenizer_errors():
        check_vocab_size(cfg.vocab_size)
    if cfg.data and cfg.download:
        raise UserError("--data and --download name two sources; give one of them")
    with folder_lock(cfg.data_dir):
        source = find_source(cfg)
        corpus.check_not_nested(source, cfg.data_dir)
        files = corpus.find_files(source)
        path = learn_vocabulary(cfg, source, files)
    print("next:", cli.format_command("preprocess", **path_flags(path)))


def find_source(cfg: SimpleNamespace) -> Path:
    if cfg.download:
        from tinyllm.download import download_tinystories  # only this needs requests
        return download_tinystories(cfg.data_dir, cfg.mirror)
    return Path(cfg.data) if cfg.data else corpus.default_source(cfg.data_dir)


def learn_vocabulary(cfg: SimpleNamespace, source: Path, files: list[Path]) -> Path:
    """Count the words of the text, train a tokenizer on them and write it. Returns its path."""
    start = time.perf_counter()
    val_threshold = corpus.find_val_threshold(files, cfg.encoding)
    jobs = [Job(group, val_threshold, cfg.encoding) for group in corpus.group_small_files(files)]
    num_workers = workers.choose_num_workers(cfg.num_workers, len(jobs))
    skipped = corpus.summarize_skipped(source)
    note = f"; passed over: {skipped}" if skipped else ""
    print(f"text: {source}, {corpus.format_count(len(files), 'file')}{note}; workers: {num_workers}")
    stats = CorpusStats()
    size = sum(file.stat().st_size for file in files)
    for _, part in workers.run_jobs(count_part, jobs, num_workers, size, "counting words"):
        stats.merge(part)           # in the order of the jobs, so that every run prunes the same words
    print_stats(stats)
    with tokenizer_errors():
        tokenizer = train_tokenizer(stats.words.counts, cfg.vocab_size)
    if tokenizer.n_words < cfg.vocab_size:
        print(f"vocabulary: {tokenizer.n_words:,} of {cfg.vocab_size:,} entries, all that can be learned from this "
              "text; with a smaller --vocab_size, a model learns faster")
    path = Path(cfg.data_dir) / f"tok{cfg.vocab_size}.model"
    with atomic_write(path) as file:
        file.write(tokenizer.model)
    corpus.save_source(path, tokenizer.sha256, corpus.TextSource(source, val_threshold, cfg.encoding))
    print(f"wrote {path} ({tokenizer.n_words} entries) after {time.perf_counter() - start:.0f} s")
    return path


def count_part(job: Job, progress: Callable[[int], None]) -> CorpusStats:
    """Count the words of a job. May run in a worker process."""
    stats = CorpusStats()
    for batch in documents.read_batches(job.files, progress, job.encoding):
        splits = corpus.split_texts(batch, job.val_threshold)
        stats.words.add(splits["train"])
        stats.documents += len(splits["train"])
        stats.bytes += sum(map(len, splits["train"]))
        stats.n_val_documents += len(splits["val"])
    stats.words.flush()
    return stats


def print_stats(stats: CorpusStats) -> None:
    n_words = len(stats.words.counts)
    n_pruned = stats.words.n_pruned
    print(f"read: {corpus.format_count(stats.documents, 'document')}, {stats.bytes / 1e6:,.1f} MB of text to learn "
          f"from, {n_words + n_pruned:,} distinct words")
    if n_pruned:
        print(f"note: {n_pruned:,} rare words, or long ones as of Chinese, do not fit into memory; the vocabulary is "
              f"learned from the {n_words:,} others")
    if stats.n_val_documents > stats.documents:
        print(f"note: {stats.n_val_documents:,} documents are for validation, and only {stats.documents:,} to learn "
              "from: they are the same ones again and again")


if __name__ == "__main__":
    cli.run_script(main)
