"""Find the text files, group them into jobs, and split the documents into training and validation.

All steps read the same documents in the same order, with the same split.
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
VAL_FRACTION = 0.02                     # share of the documents for validation, at least one document
VAL_BYTES = 2_000_000                   # largest validation text, because each evaluation reads all of it
GROUP_BYTES = 4 << 20                   # small files are grouped up to this size; a group is one job
TINYSTORIES_DIR = "TinyStories_all_data"        # folder of the real stories in data_dir


def find_files(path: str | Path) -> list[Path]:
    """Return the text files of a folder, sorted by name, or the given file. Raises UserError if none is found."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no file or folder at {path.resolve()}{suggest_path(path)}")
    files = [path] if path.is_file() else _list_files(path)
    files = [file for file in files if _is_text_file(file)]
    if not files:
        raise UserError(f"no text in {path.resolve()}; expected files that end in {', '.join(SUFFIXES)}")
    return files


def _list_files(folder: Path) -> list[Path]:
    """Return the files of a folder and its subfolders, sorted by name. Skips hidden files and linked folders."""
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
    """Summarize the skipped files of a folder by extension, e.g. '3 .md, 1 .pdf'; empty if none."""
    files = _list_files(path) if path.is_dir() else []
    counts = Counter(file.suffix or "without extension" for file in files if not _is_text_file(file))
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))


def format_count(count: int, noun: str) -> str:
    """Return a count with its noun, e.g. '1 file' or '1,234 files'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def check_not_nested(source: str | Path, data_dir: str | Path) -> None:
    """Raise UserError if data_dir is inside the text folder, where its files would be read as text."""
    folder = Path(data_dir).resolve()
    if Path(source).resolve() in (folder, *folder.parents):
        raise UserError(f"--data_dir {data_dir} is in the text folder, so its files would be read as text\n"
                        f"       choose a folder outside {Path(source).resolve()}, such as --data_dir ../data")


def group_small_files(files: list[Path]) -> Iterator[list[Path]]:
    """Yield the files of each job; small files share a job."""
    return group_by_size(files, lambda path: path.stat().st_size, GROUP_BYTES)


@dataclass(frozen=True)
class TextSource:
    """A text: its file or folder, the threshold of its validation split, and its encoding."""
    path: Path
    val_threshold: int
    encoding: str = ""


def save_source(tokenizer_path: Path, tokenizer_sha256: str, source: TextSource) -> None:
    """Write the source of a tokenizer's text to a .json file beside the tokenizer."""
    save_json(tokenizer_path.with_suffix(".json"), {
        "sha256": tokenizer_sha256, "source": source.path.as_posix(), "val_threshold": source.val_threshold,
        "encoding": source.encoding})


def load_source(tokenizer_path: Path, tokenizer_sha256: str) -> TextSource | None:
    """Load the file of save_source. Return None if it is missing.

    Raises UserError if it is damaged or belongs to another tokenizer.
    """
    path = tokenizer_path.with_suffix(".json")
    if not path.exists():
        return None
    try:
        content = load_json(path)
        source = TextSource(Path(content["source"]), content["val_threshold"], content.get("encoding", ""))
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error})\n       run python train_vocab.py again") from error
    if content.get("sha256") != tokenizer_sha256:
        raise UserError(f"{tokenizer_path} has changed since step 1; expected the SHA-256 in {path}\n"
                        "       run python train_vocab.py again")
    return source


def default_source(data_dir: str | Path) -> Path:
    """Return the folder of the real stories if they were downloaded, else of the built-in ones, written if missing."""
    real = Path(data_dir) / TINYSTORIES_DIR
    return real if real.is_dir() else demo_stories.write_stories()


def document_hash(text: bytes) -> int:
    """Return the 64-bit hash of a document in UTF-8, which decides its split. Equal documents are in the same split."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def split_texts(texts: list[bytes], threshold: int) -> dict[str, list[bytes]]:
    """Split documents into "train" and "val", each in the original order."""
    splits: dict[str, list[bytes]] = {"train": [], "val": []}
    for text in texts:
        split = "val" if document_hash(text) <= threshold else "train"
        splits[split].append(text)
    return splits


def find_val_threshold(files: list[Path], encoding: str = "") -> int:
    """Return the threshold of the split: documents with a hash up to this value are for validation.

    Step 1 stores the threshold. The split of a document then depends on its text alone, so the order of files, the
    number of processes and files added for step 2 do not change it. A small text is read to the end, so that both
    splits get at least one document. Raises UserError unless the text has 2 different documents.
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
        raise UserError(f"{problem} in {', '.join(map(str, files[:3]))}; expected 2 or more documents, one of them for "
                        f"validation\n       put {SEPARATOR} between the documents of a .txt file")
    return lowest
