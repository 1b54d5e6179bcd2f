"""The text as token ids on disk: flat arrays, and the manifest that lists them.

A folder `data/tok4096/` holds `train_0000.bin`, `val_0000.bin` and so on, each the documents of a
few source files one after another, `bos ... eos` each, as uint16 (or uint32 for a large vocabulary);
and `manifest.json`, written last: without it there is no data set.
"""
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from files import whole_file
from settings import UserError

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Source:
    """A file that text came from: its path, its size in bytes and its SHA-256."""
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """A file of token ids. `bytes` counts the UTF-8 text of its documents, and makes bits per byte exact."""
    file: str
    split: str
    sources: list[Source]
    documents: int
    tokens: int
    bytes: int


@dataclass
class ShardSet:
    """The shards of a folder, and what they were made with: a vocabulary and the rule of the split."""
    folder: Path
    tokenizer_sha256: str
    vocab_size: int
    val_threshold: int
    shards: list[Shard]

    @property
    def dtype(self) -> np.dtype:
        return dtype(self.vocab_size)

    @property
    def sha256(self) -> str:
        """A digest of what the shards were made from: the text, its order, the split and the vocabulary."""
        made_of = [self.tokenizer_sha256, self.val_threshold, [asdict(shard) for shard in self.shards]]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    def of(self, split: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    def count(self, split: str, what: str) -> int:
        """Sum of `documents`, `tokens` or `bytes` over a split."""
        return sum(getattr(shard, what) for shard in self.of(split))

    def open(self, shard: Shard) -> np.ndarray:
        """Map a shard's ids into memory, read-only, of shape (tokens,)."""
        path = self.folder / shard.file
        return np.memmap(path, self.dtype, "r") if shard.tokens else np.empty(0, self.dtype)

    def is_whole(self, shard: Shard) -> bool:
        """Whether the file of a shard is there in its full length."""
        path = self.folder / shard.file
        return path.is_file() and path.stat().st_size == shard.tokens * self.dtype.itemsize

    def require_both(self) -> None:
        """Raise UserError when a split has no document."""
        for split in SPLITS:
            if not self.count(split, "documents"):
                raise UserError(f"no document in {self.folder} is for {split}; is this the text of step 1?\n"
                                "       run python train_vocab.py again")

    def save(self, name: str = MANIFEST) -> None:
        content = {"format": FORMAT, "dtype": self.dtype.name, "tokenizer_sha256": self.tokenizer_sha256,
                   "vocab_size": self.vocab_size, "val_threshold": self.val_threshold,
                   "shards": [asdict(shard) for shard in self.shards]}
        with whole_file(self.folder / name) as file:
            file.write(json.dumps(content, indent=1).encode())


def dtype(vocab_size: int) -> np.dtype:
    """The smallest type, little-endian, that holds the ids of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def document_starts(ids: np.ndarray) -> np.ndarray:
    """Where the documents of a shard begin: at each bos, or where eos is the same token, at every second one."""
    return np.flatnonzero(ids == ids[:1])[::1 + np.array_equal(ids[:1], ids[-1:])]


def read(folder: Path, name: str = MANIFEST) -> ShardSet:
    """Read a manifest. Raises UserError when it is missing, damaged or of another format."""
    path = folder / name
    again = "\n       run python preprocess.py again"
    if not path.is_file():
        raise UserError(f"no {path}: the text is not tokenised yet, or not all of it{again}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content["format"], content["dtype"]) != (FORMAT, dtype(content["vocab_size"]).name):
            raise UserError(f"{path} is of format {content['format']} with {content['dtype']}, this code reads "
                            f"{FORMAT} with {dtype(content['vocab_size']).name} for that vocabulary{again}")
        shards = [Shard(**{**entry, "sources": [Source(**s) for s in entry["sources"]]}) for entry in content["shards"]]
        found = ShardSet(folder, content["tokenizer_sha256"], content["vocab_size"], content["val_threshold"], shards)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}){again}") from error
    if any(Path(shard.file).name != shard.file or shard.split not in SPLITS for shard in shards):
        raise UserError(f"{path} names a file outside its folder, or an unknown split{again}")
    return found


def load(folder: Path, tokenizer_sha256: str) -> ShardSet:
    """Read a manifest for use: every shard must be whole and of this vocabulary.

    Raises:
        UserError: names the file that is wrong.
    """
    found = read(folder)
    if found.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(f"{folder} was made with another vocabulary than {folder}.model\n"
                        "       run python preprocess.py again")
    for shard in found.shards:
        if not found.is_whole(shard):
            raise UserError(f"{folder / shard.file} is missing or cut: {shard.tokens:,} ids of {found.dtype.itemsize} "
                            "bytes were written\n       run python preprocess.py again")
    found.require_both()
    return found
