"""A long training keeps its memory and its open files; many interruptions in a row change nothing.

    python -m tests.faults.soak --minutes 60        # evaluation and a checkpoint about every minute; Linux
    python -m tests.faults.soak --resumes 200       # the same run in 201 parts, a process each

Both work in a temporary folder, the first on the built-in stories.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .stages import ROOT, TINY, Stages, assert_equal

SMALL = ["--dim", "128", "--n_layers", "4", "--n_heads", "4", "--n_kv_heads", "2", "--device", "cpu"]
EVERY = 10          # seconds between two looks at a process


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--eval_interval", type=int, default=100, help="steps; choose about a minute of them")
    parser.add_argument("--resumes", type=int, default=0)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    if asked.minutes:
        soak(folder, asked.minutes, asked.eval_interval)
    if asked.resumes:
        resume(folder, asked.resumes)


def script(folder: Path, name: str, *args: object) -> list[str]:
    return [sys.executable, str(ROOT / f"{name}.py"), *map(str, args)]


def soak(folder: Path, minutes: float, eval_interval: int) -> None:
    """Train for so long; print memory and open files of each tenth of the time, and how often it was saved."""
    for command in (script(folder, "train_vocab", "--vocab_size", 1024), script(folder, "preprocess")):
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    command = script(folder, "train", *SMALL, "--max_minutes", minutes, "--eval_interval", eval_interval,
                     "--checkpoint_minutes", 1, "--compile", "False")
    looks, saves, last = [], set(), folder / "output" / "last.pt"
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
        began = time.monotonic()
        while process.poll() is None:
            time.sleep(EVERY)
            if look := look_at(process.pid):
                looks.append((time.monotonic() - began, *look))
            saves |= {last.stat().st_mtime_ns} if last.exists() else set()
    print(f"{minutes:g} minutes, status {process.returncode}, {len(saves)} checkpoints seen; largest in each tenth:")
    for tenth in range(10):
        part = [look for look in looks if tenth <= 10 * look[0] / looks[-1][0] < tenth + 1 or look[0] * tenth < 0]
        if part:
            print(f"from minute {part[0][0] / 60:4.1f}: {max(look[1] for look in part):,.0f} MB of memory, "
                  f"{max(look[2] for look in part)} open files")


def look_at(pid: int) -> tuple[float, int] | None:
    """Resident memory in MB and number of open files of a process; None when it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir(f"/proc/{pid}/fd"))
    except (FileNotFoundError, IndexError):
        return None


def resume(folder: Path, times: int) -> None:
    """Train for times + 1 steps at once and in a process each, and compare."""
    data, steps = Stages(folder / "stages")["preprocess"].reference / "data", times + 1
    begin = script(folder, "train", *TINY, "--data_dir", data, "--lr_decay_iters", steps, "--eval_interval", 20)
    for name, parts in (("whole", [steps]), ("parts", range(1, steps + 1))):
        (folder / name).mkdir()
        for done in parts:
            subprocess.run([*begin, "--max_iters", str(done)], cwd=folder / name, check=True, stdout=subprocess.DEVNULL)
    assert_equal(folder / "parts", folder / "whole")
    print(f"{times} resumes: weights, optimizer, log and samples equal those of one run of {steps} steps")


if __name__ == "__main__":
    main()
