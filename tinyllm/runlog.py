"""What a run tells about itself: log.jsonl, and clock.jsonl, samples.txt and loss.png beside it; and how all of its
files make room for another run.

The log holds what a repetition of the run would give again, to the byte: the settings in the first
line, then one JSON object per logged step or evaluation. What depends on the clock has its own file.
"""
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from extras import plots
from tinyllm.files import atomic_replace, atomic_write, json_line

RUN_FILES = ("last.pt", "ckpt.pt", "log*.jsonl", "clock.jsonl", "samples.txt", "loss.png")       # files in its folder
ARCHIVE_TMP = "old.part"                           # the folder of an old run while its files are moved to it
NEW_CHECKPOINT = "new.pt"                              # the first state of a run, until the old run is out of its way


class RunLog:
    """The log of a run in a folder: `entries` are those after the first line."""

    def __init__(self, folder: Path, first: dict[str, Any], lines: int = 0, sha256: str = ""):
        """Begin the log with its first line, and keep `lines` entries of an earlier part of the run, whose digest
        is known; if they have another now, they are put aside."""
        self.folder, log = folder, folder / "log.jsonl"
        self.entries = read_log(log)[1:lines + 1]
        self.digest = hashlib.sha256("".join(map(json_line, self.entries)).encode())
        if lines and self.sha256 != sha256:
            self.entries, self.digest = [], hashlib.sha256()
            print(f"note: {log} is damaged or gone, and begins anew")
            if log.exists():
                aside = next(path for i in range(1, 10_000) if not (path := folder / f"log.damaged-{i}.jsonl").exists())
                atomic_replace(log, aside)
                print(f"      what was left of it is {aside}")
        with atomic_write(folder / "log.jsonl") as file:
            file.write("".join(map(json_line, [first, *self.entries])).encode())
        step = self.entries[-1]["iter"] if self.entries else 0
        self.clock = [entry for entry in read_log(folder / "clock.jsonl") if _is_clock_entry(entry) and entry["iter"] <= step]
        with atomic_write(folder / "clock.jsonl") as file:
            file.write("".join(map(json_line, self.clock)).encode())

    @property
    def sha256(self) -> str:
        return self.digest.hexdigest()

    def write(self, entry: dict[str, Any], clock: dict[str, Any]) -> None:
        """Append an entry to the log, and what the clock said to the other file."""
        clock = {"iter": entry["iter"], **clock}
        self.entries.append(entry)
        self.digest.update(json_line(entry).encode())
        self.clock.append(clock)
        for name, content in (("log.jsonl", entry), ("clock.jsonl", clock)):
            with open(self.folder / name, "a", encoding="utf-8", newline="\n") as file:
                file.write(json_line(content))

    def sync(self) -> None:
        """Have the log on the disk before a checkpoint counts its lines."""
        with open(self.folder / "log.jsonl", "ab") as file:
            os.fsync(file.fileno())

    def write_reports(self, expected: Sequence[tuple[float, float]] = ()) -> None:
        """Write samples.txt, and loss.png where matplotlib is installed, anew from the log.

        Args:
            expected: (minutes, bits per byte) of the run to compare with, drawn in grey.
        """
        with atomic_write(self.folder / "samples.txt") as file:
            for entry in filter(lambda entry: "val_loss" in entry, self.entries):
                file.write(f"=== step {entry['iter']}, val loss {entry['val_loss']:.4f}\n\n".encode())
                file.writelines(f"{text}\n---\n".encode() for text in entry["samples"])
        with suppress(ImportError):         # without matplotlib, no picture
            self.draw_losses(expected)

    def draw_losses(self, expected: Sequence[tuple[float, float]]) -> None:
        figure, *panels = plots.new_figure("loss (nats per token)")
        ratio = next((entry["bpb"] / entry["val_loss"] for entry in self.entries if entry.get("val_loss")), 1.0)
        expected = [(x, bpb / ratio) for x, bpb in expected]
        minutes = {entry["iter"]: entry["seconds"] / 60 for entry in self.clock}
        tokens = {entry["iter"]: entry["tokens"] for entry in self.entries if "tokens" in entry}
        for panel, places in zip(panels, (tokens, minutes)):
            plots.plot_smoothed(panel, self.curve("loss", places), "train", "C1")
            plots.plot_evals(panel, self.curve("val_loss", places), "val", "C0",
                           lambda loss: f"{loss:.3f}\n{ratio * loss:.3f} bpb")
        plots.zoom_y_axis(panels[0], [self.curve("loss", tokens), self.curve("val_loss", tokens), expected])
        plots.add_right_axis(panels[1], ratio, "bits per byte (bpb) of val")
        plots.plot_reference(panels[1], expected, "val of the preset, where it was measured")
        for panel in panels:
            panel.legend()
        plots.save(figure, self.folder / "loss.png")

    def curve(self, name: str, places: dict[int, float]) -> list[tuple[float, float]]:
        """The values of that name in the log, each after the place of its step."""
        return [(places[entry["iter"]], entry[name]) for entry in self.entries
                if name in entry and entry["iter"] in places]


class NullRunLog:
    """Stands in for a Record where another process writes it."""
    entries, sha256 = (), ""

    def write(self, *args: Any) -> None:
        """Write nothing."""

    sync = write_reports = write


def _is_clock_entry(entry: dict[str, Any]) -> bool:
    return isinstance(entry.get("iter"), int) and isinstance(entry.get("seconds"), float)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Entries of a file, up to the first line that is not whole, as a kill may leave one."""
    entries = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
            try:
                entry = json.loads(line)
                json_line(entry).encode()       # fails for half of a character, which JSON can spell
            except (ValueError, RecursionError):
                break
            if not isinstance(entry, dict):
                break
            entries.append(entry)
    return entries


def archive_run(out_dir: str) -> None:
    """Move the files of an old run to a folder old-1, old-2, ... so that nothing is lost."""
    folder = Path(out_dir)
    files = [path for name in RUN_FILES for path in folder.glob(name)]
    if any(path.suffix == ".pt" for path in files):
        old = next(place for i in range(1, 10_000) if not (place := folder / f"old-{i}").exists())
        (half := folder / ARCHIVE_TMP).mkdir()
        for path in files:
            atomic_replace(path, half / path.name)
        atomic_replace(half, old)
        print(f"the old run is in {old}")


def undo_partial_archive(out_dir: str) -> None:
    """Undo a set_aside that was killed half-way; after a whole one, finish what was to follow it."""
    folder, half, new = Path(out_dir), Path(out_dir, ARCHIVE_TMP), Path(out_dir, NEW_CHECKPOINT)
    if half.is_dir():
        for path in half.iterdir():
            atomic_replace(path, folder / path.name)
        half.rmdir()
    if new.exists() and not any(Path(folder, name).exists() for name in ("last.pt", "ckpt.pt")):
        atomic_replace(new, folder / "last.pt")
    new.unlink(missing_ok=True)
