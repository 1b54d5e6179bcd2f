"""Step 1 of 4: learn a vocabulary from text.

    python train_vocab.py --vocab_size 1024                      # the built-in stories; seconds
    python train_vocab.py --data my_texts                        # your own folder or file
    python train_vocab.py --download True --vocab_size 4096      # the real TinyStories; 1.6 GB to fetch

Writes data/tok4096.model, which step 2 and step 3 find by themselves, and data/tok4096.json, which
tells step 2 where the text is and which documents are kept for validation. Those are not read here,
so that validation stays honest; they serve to check that decoding gives back every character.
"""
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

import corpus
import settings
import tokenizer
from files import locked, save_json, whole_file
from settings import UserError

# ---- settings -----------------------------------------------------------------------------------
data_dir = "data"       # where the vocabulary goes; another folder keeps another project apart
data = ""               # your own text: a file or folder of .txt, .json, .jsonl, each also .gz
download = False        # fetch the real TinyStories into data_dir, unless they are there
mirror = ""             # for the download: huggingface, hf-mirror, modelscope or an address; several with commas
vocab_size = 4096       # 512 to 2048 for a small model on a CPU, 4096 for the default, 32000 for a large one
sample_mb = 100.0       # learn from about so much text; more costs memory (4 times it) and changes little
# ---- end of settings ----------------------------------------------------------------------------


def main() -> None:
    cfg, _ = settings.read(globals())
    if cfg.data and cfg.download:
        raise UserError("--data and --download name two sources; give one of them")
    if not cfg.sample_mb > 0:
        raise UserError(f"sample_mb must be above 0, not {cfg.sample_mb}")
    with locked(cfg.data_dir):
        make(cfg)
    print("next: python preprocess.py" + (f" --data_dir {cfg.data_dir}" if cfg.data_dir != data_dir else ""))


def make(cfg) -> None:
    """Find the text, learn from it, check what was learned, and write it."""
    start = time.monotonic()
    source = find_source(cfg)
    files = corpus.find_files(source)
    threshold = corpus.validation_threshold(files)
    size = sum(file.stat().st_size for file in files)
    print(f"text: {source}, {len(files)} files, {size / 1e6:,.1f} MB")

    share = min(1.0, cfg.sample_mb * 1e6 / max(size, 1))
    vocabulary = tokenizer.train(lambda: training_texts(files, threshold, share), cfg.vocab_size)
    if vocabulary.n_words < cfg.vocab_size:
        print(f"vocabulary: {vocabulary.n_words} of {cfg.vocab_size} entries; there is no more to learn from this text")
    documents, tokens, text_bytes = check_round_trip(vocabulary, files, threshold)
    print(f"validation: {documents:,} documents come back exactly, at {text_bytes / tokens:.2f} bytes per token")

    path = Path(cfg.data_dir) / f"tok{cfg.vocab_size}.model"
    save(vocabulary, path, source, threshold)
    print(f"wrote {path} ({vocabulary.n_words} entries) in {time.monotonic() - start:.0f} s")


def find_source(cfg) -> Path:
    if cfg.download:
        return corpus.download(cfg.data_dir, cfg.mirror)
    return Path(cfg.data) if cfg.data else corpus.default_source(cfg.data_dir)


def training_texts(files: list[Path], threshold: int, share: float) -> Iterator[str]:
    """The training documents, or an even share of them (the low bits of the fingerprint choose)."""
    with tqdm(total=sum(file.stat().st_size for file in files), unit="B", unit_scale=True,
              desc="reading", disable=None) as bar:
        for file in files:
            for text in corpus.documents(file, bar.update):
                mark = corpus.fingerprint(text)
                if mark > threshold and (mark & 0xFFFFFFFF) < share * 2**32:
                    yield text


def check_round_trip(vocabulary: tokenizer.Tokenizer, files: list[Path], threshold: int) -> tuple[int, int, int]:
    """Encode and decode validation documents; returns how many, their tokens and their bytes."""
    documents = tokens = text_bytes = 0
    for file in files:
        for text in corpus.documents(file):
            if corpus.fingerprint(text) <= threshold:
                ids = vocabulary.encode(text)
                assert vocabulary.decode(ids) == text, f"the vocabulary loses text of {file}: {text[:80]!r}"
                documents, tokens, text_bytes = documents + 1, tokens + len(ids), text_bytes + len(text.encode())
    return documents, tokens, text_bytes


def save(vocabulary: tokenizer.Tokenizer, path: Path, source: Path, threshold: int) -> None:
    with whole_file(path) as file:
        file.write(vocabulary.model)
    facts = {"sha256": vocabulary.sha256, "source": source.as_posix(), "val_threshold": threshold}
    save_json(path.with_suffix(".json"), facts)


if __name__ == "__main__":
    settings.run(main)
