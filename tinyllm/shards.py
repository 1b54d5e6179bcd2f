"""Read and write shards: the text as token ids in flat files, and a manifest that lists the files.

A folder such as `data/tok4096/` holds `train_0000.bin`, `val_0000.bin` and so on. A shard holds the documents of a few
source files one after another, `bos ... eos` each, as uint16 (uint32 for vocabularies of more than 65,536 tokens).
`manifest.json` is written last; a folder without it is incomplete.
"""
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.cli import UserError, format_command
from tinyllm.files import load_json, save_json, sha256
from tinyllm.project import MANIFEST, path_flags, shorten_list

FORMAT = 2
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Source:
    """A text file: its path, its size in bytes and its SHA-256."""
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """A file of token ids. `bytes` is the size of its documents in UTF-8, for bits per byte."""
    file: str
    sha256: str
    split: str
    sources: list[Source]
    documents: int
    tokens: int
    bytes: int


@dataclass
class ShardSet:
    """The shards of a folder, and the tokenizer and validation threshold that made them."""
    folder: Path
    tokenizer_sha256: str
    vocab_size: int
    val_threshold: int
    shards: list[Shard]
    maps: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "maps": {}}       # every process maps the files itself

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)

    @property
    def sha256(self) -> str:
        """Digest of the text, its order, the split and the tokenizer."""
        identity = [self.tokenizer_sha256, self.val_threshold, [asdict(shard) for shard in self.shards]]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def shards_of(self, split: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    def total(self, split: str, field_name: str) -> int:
        """Return the sum of `documents`, `tokens` or `bytes` over a split."""
        return sum(getattr(shard, field_name) for shard in self.shards_of(split))

    def memmap(self, shard: Shard) -> np.ndarray:
        """Return a shard's ids (tokens,), mapped into memory. The map stays valid after step 2 replaces the file."""
        if shard.file not in self.maps:
            path = self.folder / shard.file
            self.maps[shard.file] = np.memmap(path, self.dtype, "r") if shard.tokens else np.empty(0, self.dtype)
        return self.maps[shard.file]

    def is_intact(self, shard: Shard) -> bool:
        """True if a shard's file has the recorded size and SHA-256."""
        path = self.folder / shard.file
        size = path.stat().st_size if path.is_file() else -1
        return size == shard.tokens * self.dtype.itemsize and sha256(path) == shard.sha256

    def check_splits_not_empty(self) -> None:
        """Raise UserError if a split has no document."""
        for split in SPLITS:
            if not self.total(split, "documents"):
                raise UserError(f"no document in {self.folder} is for {split}; expected the text of step 1\n"
                                "       run python train_vocab.py again")

    def save(self, name: str = MANIFEST) -> None:
        save_json(self.folder / name, {
            "format": FORMAT, "dtype": self.dtype.name, "tokenizer_sha256": self.tokenizer_sha256,
            "vocab_size": self.vocab_size, "val_threshold": self.val_threshold,
            "shards": [asdict(shard) for shard in self.shards]})


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest little-endian dtype that holds the ids of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def document_starts(ids: np.ndarray) -> np.ndarray:
    """Return the start of each document of a shard: each bos, or every second one if eos and bos are the same."""
    starts = np.flatnonzero(ids == ids[:1])
    return starts[::2] if np.array_equal(ids[:1], ids[-1:]) else starts


def rerun_hint(folder: Path) -> str:
    """Return the last line of an error: the command that repairs a folder of shards."""
    return f"\n       run {format_command('preprocess', **path_flags(folder.with_suffix('.model')))} again"


def read_manifest(folder: Path, name: str = MANIFEST) -> ShardSet:
    """Read a manifest. Raises UserError if it is missing, damaged or has another format."""
    path = folder / name
    if not path.is_file():
        text = "" if folder.with_suffix(".json").exists() else "PATH"
        command = format_command("preprocess", **path_flags(folder.with_suffix(".model")), data=text)
        raise UserError(f"no {path}: the text is not tokenized yet, or not all of it\n       run {command}")
    try:
        content = load_json(path)
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']}; expected {FORMAT}{rerun_hint(folder)}")
        return ShardSet(folder, content["tokenizer_sha256"], content["vocab_size"], content["val_threshold"],
                        [_parse_shard(**entry) for entry in content["shards"]])
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}){rerun_hint(folder)}") from error


def _parse_shard(file: str, sources: list[dict[str, Any]], **entry: Any) -> Shard:
    """Parse an entry of the manifest. Raises ValueError if it names a file outside its folder."""
    if not re.fullmatch(r"(train|val)_[0-9]+\.bin", file):
        raise ValueError(f"{file!r} is not the name of a shard")
    return Shard(file=file, sources=[Source(**source) for source in sources], **entry)


def load_shards(folder: Path, tokenizer_sha256: str) -> ShardSet:
    """Load the shards of a folder. Raises UserError unless all are intact and made with this tokenizer."""
    shard_set = read_manifest(folder)
    if shard_set.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(f"{folder} was made with another vocabulary than {folder}.model{rerun_hint(folder)}")
    with ThreadPoolExecutor() as pool:
        intact = pool.map(shard_set.is_intact, shard_set.shards)
        damaged = [folder / shard.file for shard, is_intact in zip(shard_set.shards, intact) if not is_intact]
    if damaged:
        raise UserError(f"missing or damaged: {shorten_list(damaged)}{rerun_hint(folder)}")
    for shard in shard_set.shards:
        shard_set.memmap(shard)         # map it before step 2 can replace the file
    return shard_set
