"""What a run tells about itself: log.jsonl, and clock.jsonl, samples.txt and loss.png beside it.

The log holds what a repetition of the run would give again, to the byte: the settings in the first
line, then one JSON object per logged step or evaluation. What depends on the clock has its own file.
"""
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from files import replace, whole_file


class Record:
    """The log of a run in a folder: `entries` are those after the first line."""

    def __init__(self, folder: Path, first: dict[str, Any], lines: int = 0, sha256: str = ""):
        """Begin the log with its first line, and keep `lines` entries of an earlier part of the run, whose digest
        is known; if they have another now, they are put aside."""
        self.folder, log = folder, folder / "log.jsonl"
        self.entries = _read(log)[1:lines + 1]
        self.digest = hashlib.sha256("".join(map(_line, self.entries)).encode())
        if lines and self.sha256 != sha256:
            self.entries, self.digest = [], hashlib.sha256()
            print(f"note: {log} is damaged or gone, and begins anew")
            if log.exists():
                aside = next(path for i in range(1, 10_000) if not (path := folder / f"log.damaged-{i}.jsonl").exists())
                replace(log, aside)
                print(f"      what was left of it is {aside}")
        with whole_file(folder / "log.jsonl") as file:
            file.write("".join(map(_line, [first, *self.entries])).encode())
        step = self.entries[-1]["iter"] if self.entries else 0
        self.clock = [entry for entry in _read(folder / "clock.jsonl") if _is_time(entry) and entry["iter"] <= step]
        with whole_file(folder / "clock.jsonl") as file:
            file.write("".join(map(_line, self.clock)).encode())

    @property
    def sha256(self) -> str:
        return self.digest.hexdigest()

    def write(self, entry: dict[str, Any], clock: dict[str, Any]) -> None:
        """Append an entry to the log, and what the clock said to the other file."""
        clock = {"iter": entry["iter"], **clock}
        self.entries.append(entry)
        self.digest.update(_line(entry).encode())
        self.clock.append(clock)
        for name, content in (("log.jsonl", entry), ("clock.jsonl", clock)):
            with open(self.folder / name, "a", encoding="utf-8", newline="\n") as file:
                file.write(_line(content))

    def sync(self) -> None:
        """Have the log on the disk before a checkpoint counts its lines."""
        with open(self.folder / "log.jsonl", "ab") as file:
            os.fsync(file.fileno())

    def draw(self, expected: Sequence[tuple[float, float]] = ()) -> None:
        """Write samples.txt, and loss.png where matplotlib is installed, anew from the log.

        Args:
            expected: (minutes, bits per byte) of the run to compare with, drawn in grey.
        """
        evaluations = [entry for entry in self.entries if "val_loss" in entry]
        with whole_file(self.folder / "samples.txt") as file:
            for entry in evaluations:
                file.write(f"=== step {entry['iter']}, val loss {entry['val_loss']:.4f}\n\n".encode())
                file.writelines(f"{text}\n---\n".encode() for text in entry["samples"])
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        steps = [entry for entry in self.entries if "loss" in entry]
        minutes = {entry["iter"]: entry["seconds"] / 60 for entry in self.clock}
        timed = [entry for entry in evaluations if entry["iter"] in minutes]
        left, right = (figure := Figure(figsize=(11, 4.5), layout="constrained")).subplots(1, 2)
        left.plot([e["tokens"] for e in steps], [e["loss"] for e in steps], label="train", color="C1", linewidth=1)
        left.plot([e["tokens"] for e in evaluations], [e["val_loss"] for e in evaluations], "o-", label="val")
        left.set(xlabel="tokens", ylabel="loss (nats per token)", ylim=(0, None))
        right.plot([minutes[e["iter"]] for e in timed], [e["bpb"] for e in timed], "o-", label="val")
        right.plot(*zip(*expected) if expected else ([], []), color="0.6", label="the preset, where it was measured")
        right.set(xlabel="minutes", ylabel="bits per byte", ylim=(0, None))
        left.legend()
        right.legend()
        with whole_file(self.folder / "loss.png") as file:
            figure.savefig(file, format="png", dpi=100)


class NoRecord:
    """Stands in for a Record where another process writes it."""
    entries, sha256 = (), ""

    def write(self, *args: Any) -> None:
        """Write nothing."""

    sync = draw = write


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _is_time(entry: dict[str, Any]) -> bool:
    return isinstance(entry.get("iter"), int) and isinstance(entry.get("seconds"), float)


def _read(path: Path) -> list[dict[str, Any]]:
    """Entries of a file, up to the first line that is not whole, as a kill may leave one."""
    entries = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
            try:
                entry = json.loads(line)
                _line(entry).encode()               # fails for half of a character, which JSON can spell
            except (ValueError, RecursionError):
                break
            if not isinstance(entry, dict):
                break
            entries.append(entry)
    return entries
