"""Find the text files, arrange them for several processes, and decide which documents are for validation.

Every step reads the same documents in the same order, and keeps the same ones for validation.
"""
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyllm import demo_stories
from tinyllm.cli import UserError, suggest_path
from tinyllm.documents import SEPARATOR, group_by_size, read_documents
from tinyllm.files import load_json, save_json

SUFFIXES = (".txt", ".json", ".jsonl", ".txt.gz", ".json.gz", ".jsonl.gz")
VAL_FRACTION = 0.02                     # share of the documents for validation; at least one document is
VAL_BYTES = 2_000_000                   # limit of the validation text, because each evaluation reads all of it
GROUP_BYTES = 4 << 20                   # small files are grouped up to this size; a group is one job and one shard
TINYSTORIES_DIR = "TinyStories_all_data"        # in the data folder, where the real stories are unpacked


def find_files(path: str | Path) -> list[Path]:
    """Return the text files of a folder sorted by name, or the one file given. Raises UserError if there is none."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no file or folder at {path.resolve()}{suggest_path(path)}")
    files = [path] if path.is_file() else _list_files(path)
    files = [file for file in files if _is_text_file(file)]
    if not files:
        raise UserError(f"no text in {path.resolve()}\n       files must end in {', '.join(SUFFIXES)}")
    return files


def _list_files(folder: Path) -> list[Path]:
    """Return the files of a folder and its subfolders sorted by name, without hidden ones and linked folders."""
    files = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            files += _list_files(path)
        elif path.is_file():
            files.append(path)
    return sorted(files, key=Path.as_posix)


def _is_text_file(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def summarize_skipped(path: Path) -> str:
    """Summarize the files of a folder that are not read by extension, e.g. '3 .md, 1 .pdf'; empty if none."""
    files = _list_files(path) if path.is_dir() else []
    counts = Counter(file.suffix or "without extension" for file in files if not _is_text_file(file))
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))


def format_count(count: int, noun: str) -> str:
    """Return e.g. '1 file', '1,234 files'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def check_not_nested(source: str | Path, data_dir: str | Path) -> None:
    """Raise UserError if the data folder is inside the text, where its files would be read as text next time."""
    folder = Path(data_dir).resolve()
    if Path(source).resolve() in (folder, *folder.parents):
        raise UserError(f"--data_dir {data_dir} is in the text, and its files would be read as text\n"
                        f"       name a folder outside {Path(source).resolve()}, such as --data_dir ../data")


def group_small_files(files: list[Path]) -> Iterator[list[Path]]:
    """Arrange files into groups for one process to work on; small ones share a group."""
    return group_by_size(files, lambda path: path.stat().st_size, GROUP_BYTES)


@dataclass(frozen=True)
class TextSource:
    """The text that a tokenizer is used for: a file or folder, the rule of its validation split, and its encoding."""
    path: Path
    val_threshold: int
    encoding: str = ""


def save_source(model_path: Path, model_sha256: str, source: TextSource) -> None:
    """Write the source of a tokenizer's text beside the tokenizer."""
    save_json(model_path.with_suffix(".json"), {
        "sha256": model_sha256, "source": source.path.as_posix(), "val_threshold": source.val_threshold,
        "encoding": source.encoding})


def load_source(model_path: Path, model_sha256: str) -> TextSource | None:
    """Read what save_source wrote; None if it does not exist. Raises UserError if it is damaged or of another model."""
    path = model_path.with_suffix(".json")
    if not path.exists():
        return None
    try:
        content = load_json(path)
        source = TextSource(Path(content["source"]), content["val_threshold"], content.get("encoding", ""))
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error})\n       run python train_vocab.py again") from error
    if content.get("sha256") != model_sha256:
        raise UserError(f"{model_path} is not as step 1 wrote it: {path} has another SHA-256\n"
                        "       run python train_vocab.py again")
    return source


def default_source(data_dir: str | Path) -> Path:
    """Return the downloaded stories if they exist, else the built-in ones, which are written at first use."""
    real = Path(data_dir) / TINYSTORIES_DIR
    return real if real.is_dir() else demo_stories.write_stories()


def document_hash(text: bytes) -> int:
    """Return 64 bits of a document, in UTF-8, that decide its split: the same text never lands in both."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def split_texts(texts: list[bytes], threshold: int) -> dict[str, list[bytes]]:
    """Return the documents for "train" and for "val", each in their order."""
    splits: dict[str, list[bytes]] = {"train": [], "val": []}
    for text in texts:
        split = "val" if document_hash(text) <= threshold else "train"
        splits[split].append(text)
    return splits


def find_val_threshold(files: list[Path], encoding: str = "") -> int:
    """Return the rule of the split: documents whose hash is at most this are for validation.

    The rule looks at each text by itself, so it holds in any order, for any number of processes, and when files are
    added. Small collections are read to the end, so that both splits get at least one document. Raises UserError
    without two different documents.
    """
    size = sum(file.stat().st_size for file in files)
    limit = int(min(VAL_FRACTION, VAL_BYTES / max(size, 1)) * 2**64)
    lowest, highest = 2**64, -1
    for file in files:
        for text in read_documents(file, encoding=encoding):
            digest = document_hash(text.encode())
            lowest, highest = min(lowest, digest), max(highest, digest)
            if lowest <= limit < highest:
                return limit
    if lowest >= highest:
        problem = "only one document" if lowest == highest else "no text"
        raise UserError(f"{problem} in {', '.join(map(str, files[:3]))}; training needs two or more, one of them for "
                        f"validation\n       in a .txt, put {SEPARATOR} between them")
    return lowest
