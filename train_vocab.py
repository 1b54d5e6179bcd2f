"""Step 1 of 4: learn a tokenizer from text.

    python train_vocab.py --vocab_size 1024                      # the built-in stories, until you download TinyStories
    python train_vocab.py --data my_texts                        # your own folder or file
    python train_vocab.py --download True --vocab_size 4096      # the real TinyStories; downloads 1.6 GB

Writes data/tok<vocab_size>.model, which steps 2 and 3 find by themselves, and a .json file of the same name with the
path of the text and the threshold of the validation split. The tokenizer never sees the validation documents.
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
data_dir = "data"       # folder for the tokenizer; use another one for each project
data = ""               # a .txt, .json or .jsonl file (or .gz) or a folder; empty: downloaded stories, or built-in ones
encoding = ""           # encoding of the text, if not UTF-8: gb18030 (Chinese Windows), cp1252 (Western), utf-16, ...
download = False        # download the real TinyStories into data_dir, unless they exist
mirror = ""             # download from huggingface, hf-mirror, modelscope or a URL; separate several with commas
vocab_size = 4096       # 512 to 2048 for a small model on a CPU, 4096 for the default model, 32000 for a large one
num_workers = 0         # processes, at most 60, up to 400 MB each; 0: one per core, if memory allows
# ---- end of settings ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Text files whose words one process counts."""
    files: list[Path]
    val_threshold: int
    encoding: str = ""


@dataclass
class CorpusStats:
    """Word counts and size of the training documents, and the number of validation documents."""
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
        raise UserError("--data and --download are both set; expected one source of text")
    with folder_lock(cfg.data_dir):
        source = find_source(cfg)
        corpus.check_not_nested(source, cfg.data_dir)
        files = corpus.find_files(source)
        path = learn_vocabulary(cfg, source, files)
    print("next:", cli.format_command("preprocess", **path_flags(path)))


def find_source(cfg: SimpleNamespace) -> Path:
    if cfg.download:
        from tinyllm.download import download_tinystories  # imports requests, which only a download needs
        return download_tinystories(cfg.data_dir, cfg.mirror)
    return Path(cfg.data) if cfg.data else corpus.default_source(cfg.data_dir)


def learn_vocabulary(cfg: SimpleNamespace, source: Path, files: list[Path]) -> Path:
    """Count the words of the text, train a tokenizer and write it. Returns its path."""
    start = time.perf_counter()
    val_threshold = corpus.find_val_threshold(files, cfg.encoding)
    jobs = [Job(group, val_threshold, cfg.encoding) for group in corpus.group_small_files(files)]
    num_workers = workers.choose_num_workers(cfg.num_workers, len(jobs))
    skipped = corpus.summarize_skipped(source)
    note = f"; skipped: {skipped}" if skipped else ""
    print(f"text: {source}, {corpus.format_count(len(files), 'file')}{note}; workers: {num_workers}")
    stats = CorpusStats()
    size = sum(file.stat().st_size for file in files)
    for _, part in workers.run_jobs(count_part, jobs, num_workers, size, "counting words"):
        stats.merge(part)           # in job order, so that every run prunes the same words
    print_stats(stats)
    with tokenizer_errors():
        tokenizer = train_tokenizer(stats.words.counts, cfg.vocab_size)
    if tokenizer.vocab_size < cfg.vocab_size:
        print(f"note: the text yields only {tokenizer.vocab_size:,} of {cfg.vocab_size:,} vocabulary entries; with a "
              "smaller --vocab_size, the model learns faster")
    path = Path(cfg.data_dir) / f"tok{cfg.vocab_size}.model"
    with atomic_write(path) as file:
        file.write(tokenizer.model)
    corpus.save_source(path, tokenizer.sha256, corpus.TextSource(source, val_threshold, cfg.encoding))
    print(f"wrote {path} ({tokenizer.vocab_size} entries) in {time.perf_counter() - start:.0f} s")
    return path


def count_part(job: Job, progress: Callable[[int], None]) -> CorpusStats:
    """Count the words of a job, possibly in a worker process."""
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
    print(f"read: {corpus.format_count(stats.documents, 'document')}, {stats.bytes / 1e6:,.1f} MB of training "
          f"text, {n_words + n_pruned:,} distinct words")
    if n_pruned:
        print(f"note: {n_pruned:,} rare words exceed the memory limit; the tokenizer is trained on the other "
              f"{n_words:,}")
    if stats.n_val_documents > stats.documents:
        print(f"note: {stats.n_val_documents:,} documents are for validation and only {stats.documents:,} for "
              "training, because the text repeats the same few documents")


if __name__ == "__main__":
    cli.run_script(main)
