"""The text as token ids on disk: flat arrays, and the manifest that lists them.

A folder `data/tok4096/` holds `train_0000.bin`, `val_0000.bin` and so on, each the documents of a
few source files one after another, `bos ... eos` each, as uint16 (or uint32 for a large vocabulary);
and `manifest.json`, written last: without it there is no data set.
"""
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_origin

import numpy as np

from tinyllm.cli import UserError, format_command
from tinyllm.files import load_json, save_json, sha256
from tinyllm.project import MANIFEST, folders_with, path_flags, shorten_list

FORMAT = 2
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
    sha256: str
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
    maps: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "maps": {}}       # another process maps them itself

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)

    @property
    def sha256(self) -> str:
        """A digest of what the shards were made from: the text, its order, the split and the vocabulary."""
        made_of = [self.tokenizer_sha256, self.val_threshold, [asdict(shard) for shard in self.shards]]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    def shards_of(self, split: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    def total(self, split: str, what: str) -> int:
        """Sum of `documents`, `tokens` or `bytes` over a split."""
        return sum(getattr(shard, what) for shard in self.shards_of(split))

    def memmap(self, shard: Shard) -> np.ndarray:
        """Map a shard's ids into memory, read-only, of shape (tokens,).

        It stays mapped, so that who has begun with a text keeps it, also when another takes its place in the folder.
        """
        if shard.file not in self.maps:
            path = self.folder / shard.file
            self.maps[shard.file] = np.memmap(path, self.dtype, "r") if shard.tokens else np.empty(0, self.dtype)
        return self.maps[shard.file]

    def find_damage(self, shard: Shard) -> str:
        """What is wrong with the file of a shard; empty when it is as it was written."""
        path, size = self.folder / shard.file, shard.tokens * self.dtype.itemsize
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != size:
            return f"is cut: {path.stat().st_size:,} bytes of {size:,}" if path.stat().st_size < size else "is too long"
        return "" if sha256(path) == shard.sha256 else "is damaged: its bytes changed after they were written"

    def check_splits_not_empty(self) -> None:
        """Raise UserError when a split has no document."""
        for split in SPLITS:
            if not self.total(split, "documents"):
                raise UserError(f"no document in {self.folder} is for {split}; is this the text of step 1?\n"
                                "       run python train_vocab.py again")

    def save(self, name: str = MANIFEST) -> None:
        save_json(self.folder / name, {
            "format": FORMAT, "dtype": self.dtype.name, "tokenizer_sha256": self.tokenizer_sha256,
            "vocab_size": self.vocab_size, "val_threshold": self.val_threshold,
            "shards": [asdict(shard) for shard in self.shards]})


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type, little-endian, that holds the ids of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def document_starts(ids: np.ndarray) -> np.ndarray:
    """Where the documents of a shard begin: at each bos, or where eos is the same token, at every second one."""
    return np.flatnonzero(ids == ids[:1])[::1 + np.array_equal(ids[:1], ids[-1:])]


def rerun_hint(folder: Path) -> str:
    """What to type when a folder of shards is not as it should be."""
    return f"\n       run {format_command('preprocess', **path_flags(folder.with_suffix('.model')))} again"


def read_manifest(folder: Path, name: str = MANIFEST) -> ShardSet:
    """Read a manifest. Raises UserError when it is missing, damaged or of another format."""
    path = folder / name
    if not path.is_file():
        others = sorted({found.parent for found in folders_with(folder.parent, f"{folder.name}/{name}")})
        text = "" if folder.with_suffix(".json").exists() else "PATH"
        raise UserError(f"no {path}: the text is not tokenised yet, or not all of it\n       "
                        + (f"is it in another --data_dir: {shorten_list(others)}? else " if others else "")
                        + f"run {format_command('preprocess', **path_flags(folder.with_suffix('.model')), data=text)}")
    try:
        content = load_json(path)
        if content["format"] != FORMAT:
            raise UserError(f"{path} is of format {content['format']}, this code reads {FORMAT}{rerun_hint(folder)}")
        found = ShardSet(folder, *(_check_type(content[key], kind, key) for key, kind in
                                   (("tokenizer_sha256", str), ("vocab_size", int), ("val_threshold", int))),
                         [_shard(entry) for entry in _check_type(content["shards"], list, "shards")])
        if content["dtype"] != found.dtype.name or len({shard.file for shard in found.shards}) < len(found.shards):
            raise ValueError(f"dtype {content['dtype']} for {found.vocab_size} ids, or a file that is listed twice")
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}){rerun_hint(folder)}") from error
    return found


def _shard(entry: dict[str, Any]) -> Shard:
    """An entry of the manifest. Raises TypeError or ValueError, also when it names a file outside its folder."""
    shard = _load_dataclass(Shard, entry)
    if shard.split not in SPLITS or not re.fullmatch(rf"{shard.split}_\d+\.bin", shard.file, re.ASCII):
        raise ValueError(f"{shard.file!r} is no file name for the split {shard.split!r}")
    return replace(shard, sources=[_load_dataclass(Source, source) for source in shard.sources])


def _load_dataclass(kind: type, entry: Any) -> Any:
    """The dataclass `kind` of a JSON object that has just its fields, all of their types, and no negative number."""
    made = kind(**_check_type(entry, dict, kind.__name__))
    for each in fields(kind):
        _check_type(getattr(made, each.name), get_origin(each.type) or each.type, each.name)
    return made


def _check_type(value: Any, kind: type, name: str) -> Any:
    if type(value) is not kind or kind is int and not 0 <= value <= 2**64:
        raise TypeError(f"{name} cannot be {value!r:.50}")
    return value


def load_shards(folder: Path, tokenizer_sha256: str) -> ShardSet:
    """Read a manifest for use: every shard must be as it was written, and of this vocabulary.

    Raises:
        UserError: names the files that are wrong.
    """
    found = read_manifest(folder)
    if found.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(f"{folder} was made with another vocabulary than {folder}.model{rerun_hint(folder)}")
    with ThreadPoolExecutor() as pool:
        wrong = [f"{folder / shard.file} {damage}" for shard, damage in
                 zip(found.shards, pool.map(found.find_damage, found.shards)) if damage]
    if wrong:
        raise UserError("\n       ".join(wrong) + rerun_hint(folder))
    for shard in found.shards:
        if shard.tokens and (largest := found.memmap(shard).max()) >= found.vocab_size:
            raise UserError(f"{folder / shard.file} has an id {largest}, beyond the vocabulary of {found.vocab_size}\n"
                            f"       delete {folder} and run python preprocess.py again")
    found.check_splits_not_empty()
    return found
