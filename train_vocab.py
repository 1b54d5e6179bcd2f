"""Step 1 of 4: learn a vocabulary from text.

    python train_vocab.py --vocab_size 1024                      # the built-in stories; seconds
    python train_vocab.py --data my_texts                        # your own folder or file
    python train_vocab.py --download True --vocab_size 4096      # the real TinyStories; 1.6 GB to fetch

Writes data/tok4096.model, which step 2 and step 3 find by themselves, and data/tok4096.json, which
tells step 2 where the text is and which documents are kept for validation. Those are not read here,
so that validation stays honest; they serve to check that decoding gives back every character.
"""
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokenizer
from tinyllm import cli, corpus, documents, workers
from tinyllm.cli import UserError
from tinyllm.files import atomic_write, folder_lock, save_json
from tinyllm.machine import peak_memory
from tinyllm.project import path_flags, tokenizer_errors
from tinyllm.words import WordCounts

# ---- settings -----------------------------------------------------------------------------------
data_dir = "data"       # where the vocabulary goes; another folder keeps another project apart
data = ""               # your own text: a file or folder of .txt, .json, .jsonl, each also .gz
encoding = ""           # of all files, if not UTF-8: gb18030 for Chinese Windows, cp1252 for western Windows, utf-16, ...
download = False        # fetch the real TinyStories into data_dir, unless they are there
mirror = ""             # for the download: huggingface, hf-mirror, modelscope or an address; several with commas
vocab_size = 4096       # 512 to 2048 for a small model on a CPU, 4096 for the default, 32000 for a large one
num_workers = 0         # processes, at most 60; 0: one per core, if there is memory. Each takes up to 400 MB
# ---- end of settings ----------------------------------------------------------------------------

MAX_LEAD = 8               # parts of the text that may be counted before an earlier one is, and then wait in memory


@dataclass(frozen=True)
class Job:
    """What a process needs to count the words of some files."""
    index: int
    files: list[Path]
    threshold: int
    encoding: str = ""


@dataclass
class CorpusStats:
    """The words to learn from, and of how many documents and bytes; and the documents that are held out of it."""
    words: WordCounts = field(default_factory=WordCounts)
    documents: int = 0
    bytes: int = 0
    n_val_documents: int = 0                  # documents that are for validation,
    val_sample: list[bytes] = field(default_factory=list)     # and the first of them, up to VAL_BYTES
    held_bytes: int = 0

    def add(self, texts: list[bytes], threshold: int) -> None:
        learned = []
        for text in texts:
            if corpus.document_hash(text) <= threshold:
                self.n_val_documents += 1
                self.hold_out(text)
            else:
                learned.append(text)
        self.words.add(learned)
        self.documents += len(learned)
        self.bytes += sum(map(len, learned))

    def hold_out(self, text: bytes) -> None:
        if self.held_bytes < corpus.VAL_BYTES:
            self.val_sample.append(text)
            self.held_bytes += len(text)

    def merge(self, other: "CorpusStats") -> None:
        self.words.merge(other.words)
        self.documents += other.documents
        self.bytes += other.bytes
        self.n_val_documents += other.n_val_documents
        for text in other.val_sample:
            self.hold_out(text)


def main() -> None:
    cfg, _ = cli.parse_settings(globals())
    with tokenizer_errors():
        tokenizer.check_vocab_size(cfg.vocab_size)
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


def learn_vocabulary(cfg: SimpleNamespace, source: Path, files: list[Path]) -> Path:
    """Count the words of the text, learn from them, check what was learned, and write it; returns where."""
    start = time.perf_counter()
    threshold = corpus.val_hash_threshold(files, cfg.encoding)
    jobs = [Job(i, group, threshold, cfg.encoding) for i, group in enumerate(corpus.group_small_files(files))]
    processes, why = workers.choose_num_workers(cfg.num_workers, len(jobs))
    size = sum(file.stat().st_size for file in files)
    read, seconds = workers.measure_throughput(files, WordCounts().add, cfg.encoding)
    print_plan(source, len(files), size, f"{why}, {workers.format_eta(seconds * size / read, processes)}")
    found, peak = count_words(jobs, processes, size)
    print_stats(found, workers.format_throughput(found.bytes, time.perf_counter() - start, peak))
    with tokenizer_errors():
        vocabulary = tokenizer.train_tokenizer(found.words.counts, cfg.vocab_size)
    if vocabulary.n_words < cfg.vocab_size:
        print(f"vocabulary: {vocabulary.n_words:,} of {cfg.vocab_size:,} entries, all that can be learned from this "
              "text; with a smaller --vocab_size, a model learns faster")
    check_round_trip(vocabulary, found)
    path = Path(cfg.data_dir) / f"tok{cfg.vocab_size}.model"
    save(vocabulary, path, {"source": source.as_posix(), "val_threshold": threshold, "encoding": cfg.encoding})
    print(f"wrote {path} ({vocabulary.n_words} entries) after {time.perf_counter() - start:.0f} s"
          + (f", with {memory / 1e6:,.0f} MB of memory" if (memory := peak_memory()) else ""))
    return path


def print_plan(source: Path, files: int, size: int, how: str) -> None:
    """Say what is to be read, and what is not."""
    left = corpus.summarize_skipped(source)
    print(f"text: {source}, {files} file{'s' * (files != 1)}" + (f"; passed over: {left}" if left else ""))
    print(f"plan: {workers.format_bytes(size)} to read, {how}")


def print_stats(found: CorpusStats, cost: str) -> None:
    """Say what there is to learn from, and what of it is not as one may think."""
    words, left_out = found.words.counts, found.words.n_pruned
    print(f"read: {found.documents:,} document{'s' * (found.documents != 1)}, {workers.format_bytes(found.bytes)} of text to "
          f"learn from, {len(words) + left_out:,} distinct words, {cost}")
    if left_out:
        print(f"note: {left_out:,} rare words, or long ones as of Chinese, do not fit into memory; the vocabulary is "
              f"learned from the {len(words):,} others, {workers.format_bytes(sum(map(len, words)))}")
    if found.n_val_documents > found.documents:
        print(f"note: {found.n_val_documents:,} documents are for validation, and only {found.documents:,} to learn from: "
              "they are the same ones again and again")


def find_source(cfg: SimpleNamespace) -> Path:
    if cfg.download:
        from tinyllm.download import download_tinystories  # here, because only this needs requests
        return download_tinystories(cfg.data_dir, cfg.mirror)
    return Path(cfg.data) if cfg.data else corpus.default_source(cfg.data_dir)


def count_words(jobs: list[Job], processes: int, size: int) -> tuple[CorpusStats, int]:
    """Count the words of all jobs; returns what was found and the largest peak memory of a process."""
    found, waiting, turn, peak = CorpusStats(), {}, 0, 0
    for (index, part), memory in workers.run_jobs(count_part, jobs, processes, size, "counting words", MAX_LEAD):
        waiting[index], peak = part, max(peak, memory)
        while turn in waiting:          # in the order of the jobs, so that the same words are left out in every run
            found.merge(waiting.pop(turn))
            turn += 1
    return found, peak


def count_part(job: Job, progress: Callable[[int], None]) -> tuple[int, CorpusStats]:
    """Count the words of a job. May run in a worker process."""
    found = CorpusStats()
    for batch in documents.text_batches(text for path in job.files for text in documents.read_documents(path, progress, job.encoding)):
        found.add(batch, job.threshold)
    found.words.flush()
    return job.index, found


def check_round_trip(vocabulary: tokenizer.Tokenizer, found: CorpusStats) -> None:
    """Encode and decode documents that nothing was learned from."""
    texts = [text.decode() for text in found.val_sample]
    ids = vocabulary.encode_batch(texts)
    for text, back in zip(texts, map(vocabulary.decode, ids)):
        assert back == text, f"the vocabulary loses text: {text[:80]!r}"
    per_token = found.held_bytes / sum(map(len, ids))
    some = f"{len(texts):,} of " if len(texts) < found.n_val_documents else ""
    print(f"validation: {some}{found.n_val_documents:,} document{'s' * (found.n_val_documents != 1)} encoded and decoded exactly, "
          f"at {per_token:.2f} bytes per token")


def save(vocabulary: tokenizer.Tokenizer, path: Path, facts: dict[str, Any]) -> None:
    """Write the vocabulary, and beside it the facts about its text that step 2 needs."""
    with atomic_write(path) as file:
        file.write(vocabulary.model)
    save_json(path.with_suffix(".json"), {"sha256": vocabulary.sha256, **facts})


if __name__ == "__main__":
    cli.run_script(main)
