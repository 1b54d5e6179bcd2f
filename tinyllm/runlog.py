"""The log of a run, the reports made from it, and the archive of the old run in a folder.

log.jsonl has the settings in its first line, the header, then one JSON object per logged step or evaluation. Repeating
the run writes the same bytes, because all figures that depend on the clock are in clock.jsonl.
"""
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinyllm import optional
from tinyllm.cli import UserError
from tinyllm.files import atomic_replace, atomic_write, json_line, unused_path

RUN_FILES = ("last.pt", "ckpt.pt", "log*.jsonl", "clock.jsonl", "samples.txt", "loss.png")     # archive_run moves these
ARCHIVE_TMP = "old.part"            # the archive until all files are in it
NEW_CHECKPOINT = "new.pt"           # the first checkpoint of a new run, until the old run is archived


class RunLog:
    """The log of a run in a folder. `entries` are its lines after the header."""

    def __init__(self, folder: Path, header: dict[str, Any], n_entries: int = 0, sha256: str = ""):
        """Start a log, or reopen one with its first n_entries. If their SHA-256 differs, the log starts over."""
        self.folder = folder
        self.entries = read_log(folder / "log.jsonl")[1:n_entries + 1]
        self.digest = hashlib.sha256(encode_lines(self.entries))
        if n_entries and self.sha256 != sha256:
            print(f"note: {folder / 'log.jsonl'} is damaged or missing; the log starts over")
            if (folder / "log.jsonl").exists():
                atomic_replace(folder / "log.jsonl", unused_path(folder, "log.damaged-{}.jsonl"))
            self.entries = []
            self.digest = hashlib.sha256()
        last_step = self.entries[-1]["iter"] if self.entries else 0
        self.clock = [entry for entry in read_clock(folder / "clock.jsonl") if entry["iter"] <= last_step]
        for name, entries in (("log.jsonl", [header, *self.entries]), ("clock.jsonl", self.clock)):
            with atomic_write(folder / name) as file:
                file.write(encode_lines(entries))

    @property
    def sha256(self) -> str:
        return self.digest.hexdigest()

    def write(self, entry: dict[str, Any], clock: dict[str, Any]) -> None:
        """Append an entry to log.jsonl, and its figures that depend on the clock to clock.jsonl."""
        clock = {"iter": entry["iter"], **clock}
        self.entries.append(entry)
        self.clock.append(clock)
        self.digest.update(encode_lines([entry]))
        for name, content in (("log.jsonl", entry), ("clock.jsonl", clock)):
            with open(self.folder / name, "ab") as file:
                file.write(encode_lines([content]))

    def sync(self) -> None:
        """Flush the log to disk, before a checkpoint stores the number of its lines."""
        with open(self.folder / "log.jsonl", "ab") as file:
            os.fsync(file.fileno())

    def write_reports(self, expected: Sequence[tuple[float, float]] = ()) -> None:
        """Write samples.txt and loss.png from the whole log. expected: (minutes, bits per byte) of the run's preset."""
        with atomic_write(self.folder / "samples.txt") as file:
            for entry in self.entries:
                if "val_loss" in entry:
                    file.write(f"=== step {entry['iter']}, val loss {entry['val_loss']:.4f}\n\n".encode())
                    file.writelines(f"{text}\n---\n".encode() for text in entry["samples"])
        with suppress(UserError):               # no picture without extras/ or matplotlib
            optional.load("plots").draw_losses(self.folder / "loss.png", self.entries, self.clock, expected)


class NullRunLog:
    """A log that writes nothing, for all ranks but the main process."""
    entries = ()
    sha256 = ""

    def write(self, *args: Any) -> None:
        pass

    sync = write_reports = write


def encode_lines(entries: Iterable[dict[str, Any]]) -> bytes:
    return "".join(map(json_line, entries)).encode()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return a file's entries up to the first damaged line, which a kill may leave; [] if the file is missing."""
    entries = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
            encode_lines([entry])               # fails for a lone surrogate, which JSON can contain
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries


def read_clock(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a clock.jsonl that have a step and a time."""
    return [entry for entry in read_log(path) if has_numbers(entry, "iter", "seconds")]


def has_numbers(entry: dict[str, Any], *keys: str) -> bool:
    """True if an entry has a finite number under each key."""
    return all(type(entry.get(key)) in (int, float) and abs(entry[key]) < 1e300 for key in keys)


# ---- the archive --------------------------------------------------------------------------------

def archive_run(out_dir: str) -> None:
    """Move the files of the old run to old-1, old-2, ... and make new.pt the last.pt of the new run."""
    folder = Path(out_dir)
    partial, new = folder / ARCHIVE_TMP, folder / NEW_CHECKPOINT
    files = [path for pattern in RUN_FILES for path in folder.glob(pattern)]
    if partial.is_dir() or any(path.suffix == ".pt" for path in files):
        partial.mkdir(exist_ok=True)
        for path in files:
            atomic_replace(path, partial / path.name)
        archive = unused_path(folder, "old-{}")
        atomic_replace(partial, archive)
        print(f"the old run is in {archive}")
    if new.exists():
        atomic_replace(new, folder / "last.pt")


def finish_archive(out_dir: str) -> None:
    """Finish archive_run if a kill interrupted it. If it had not started, delete new.pt and keep the old run."""
    folder = Path(out_dir)
    new = folder / NEW_CHECKPOINT
    has_run = (folder / "last.pt").exists() or (folder / "ckpt.pt").exists()
    if (folder / ARCHIVE_TMP).is_dir() or (new.exists() and not has_run):
        archive_run(out_dir)
    new.unlink(missing_ok=True)
