"""What can happen to a run. Each fault takes a Trial, breaks one run of it, and returns whether it came to that."""
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from conftest import assert_user_error

from .stages import Stage, assert_equal, assert_usable, run

DISK = 24                               # MB, of the file system that is filled


@dataclass
class Trial:
    """One round: a folder in which a stage is broken, and then run to its end."""
    stage: Stage
    place: Path
    chance: random.Random
    number: int = 0                     # of the file operation to break at; 0: drawn
    story: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.place / "run"

    @property
    def trace(self) -> Path:
        return self.place / "trace"

    def run(self, after: float = 0, act: Callable | None = None, **fault) -> subprocess.CompletedProcess:
        self.trace.unlink(missing_ok=True)
        if "how" in fault:
            fault |= {"under": str(self.folder), "trace": str(self.trace)}
        result = run(self.stage, self.folder, after, act, **fault)
        if act and not result.returncode:       # too late: the machine is faster than when the reference was made
            self.stage.seconds = 0.9 * self.stage.seconds + 0.1 * self.stage.begin
        what = fault or (f"after {after:.2f} s" if act else "in peace")
        self.story.append(f"{what}: status {result.returncode}\n{result.stderr}")
        return result

    def moment(self) -> float:
        return self.chance.uniform(0.9 * self.stage.begin, self.stage.seconds)

    def operation(self) -> int:
        """The number of a file operation, drawn so that every kind is as likely; most of them are writes."""
        kind = self.chance.choice(sorted({kind for _, kind in self.stage.operations}))
        return self.number or self.chance.choice([number for number, each in self.stage.operations if each == kind])


def attempt(trial: Trial, fault: Callable[[Trial], bool], breaks: int) -> int:
    """Break a stage some times, run it in peace and compare. Returns how many breaks came before the end of a run."""
    trial.stage.prepare(trial.folder)
    landed = 0
    for _ in range(breaks):
        landed += fault(trial)
        assert_usable(trial.folder)
    result = trial.run()
    assert result.returncode == 0, "the last run, which nothing broke, ended with an error"
    assert_equal(trial.folder, trial.stage.reference)
    return landed


def one_line(result: subprocess.CompletedProcess, *parts: str) -> None:
    """What the user can mend ends with status 1 and one error, and no traceback."""
    assert_user_error(result, *parts)
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1, result.stderr


# ---- the process --------------------------------------------------------------------------------

def kill(trial: Trial) -> bool:
    result = trial.run(trial.moment(), subprocess.Popen.kill)
    assert result.returncode in (0, -signal.SIGKILL), result.stderr
    return result.returncode != 0


def kill_at(trial: Trial) -> bool:
    """Killed at a file operation. A worker process may be the one that dies; then the main one says so."""
    result = trial.run(at=trial.operation(), how="kill")
    if result.returncode not in (0, -signal.SIGKILL):
        one_line(result, "a worker process was killed")
    return result.returncode != 0


def ctrl_c(trial: Trial) -> bool:
    """SIGINT goes to the workers too, as a terminal sends it."""
    return stopped(trial, signal.SIGINT, lambda process: os.killpg(process.pid, signal.SIGINT))


def terminate(trial: Trial) -> bool:
    return stopped(trial, signal.SIGTERM, subprocess.Popen.terminate)


def stopped(trial: Trial, number: int, act: Callable[[subprocess.Popen], None]) -> bool:
    """A signal ends a run, and without a traceback once its first line is out; the imports before may show one."""
    result = trial.run(trial.moment(), act)
    if result.stdout:
        assert result.returncode in (0, -number, 128 + number), result.stderr
        assert "Traceback" not in result.stderr, result.stderr
    return result.returncode != 0


# ---- the disk -----------------------------------------------------------------------------------

def full(trial: Trial) -> bool:
    """From one operation on there is no space, not even to delete a file, as with some file systems."""
    at = trial.operation()
    result = trial.run(at=at, how=errno.ENOSPC)
    reached = any(int(line.split()[1]) >= at for line in trial.trace.read_text(encoding="utf-8").splitlines())
    if reached:
        one_line(result, "No space left on device")
    else:
        assert result.returncode == 0, result.stderr
    return reached


def full_disk(trial: Trial) -> bool:
    """A real file system is filled at a random moment, but for 1 byte to 600 kB."""
    room = int(10 ** trial.chance.uniform(0, 5.8))
    with own_disk(trial.folder):
        result = trial.run(trial.moment(), lambda process: fill(trial.folder / "filler", room))
        (trial.folder / "filler").unlink(missing_ok=True)
    if result.returncode:
        one_line(result)
    return result.returncode != 0


def read_only(trial: Trial) -> bool:
    """Every operation is refused, in an empty folder or in one with the remains of a run."""
    return refused(trial, lambda: trial.run(at=1, how=errno.EROFS))


def locked_disk(trial: Trial) -> bool:
    """The same with a real file system that is mounted read-only."""
    def locked() -> subprocess.CompletedProcess:
        call("mount", "--bind", trial.folder, trial.folder)
        try:
            call("mount", "-o", "remount,bind,ro", trial.folder)
            return trial.run()
        finally:
            call("umount", trial.folder)
    return refused(trial, locked)


def refused(trial: Trial, locked: Callable[[], subprocess.CompletedProcess]) -> bool:
    if trial.chance.random() < 0.5:
        kill_at(trial)
    before = snapshot(trial.folder)
    result = locked()
    if result.returncode:               # else the run was finished already, and says so
        one_line(result, "Read-only file system")
    assert snapshot(trial.folder) == before, "a folder that is read-only was changed"
    return result.returncode != 0


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@contextmanager
def own_disk(folder: Path) -> Iterator[None]:
    """Let a folder be a small file system of its own for a while."""
    aside = folder.rename(folder.with_name("aside"))
    folder.mkdir()
    call("mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", folder)
    try:
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        yield
        shutil.rmtree(aside)
        shutil.copytree(folder, aside)
    finally:
        call("umount", folder)
        folder.rmdir()
        aside.rename(folder)


def fill(path: Path, room: int) -> None:
    """Write a file until no more than `room` bytes are free, or a little less."""
    with open(path, "wb", buffering=0) as file:
        while (free := shutil.disk_usage(path.parent).free) > room:
            file.write(bytes(min(free - room, 1 << 20)))


def call(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


@cache
def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            call("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder)
            call("umount", folder)
        except (OSError, subprocess.CalledProcessError):
            return False
    return sys.platform == "linux"


# ---- the clock ----------------------------------------------------------------------------------

def clock(trial: Trial) -> bool:
    """It leaps by days; that breaks nothing."""
    result = trial.run(clock=trial.chance.randrange(2**32))
    assert result.returncode == 0, result.stderr
    assert_equal(trial.folder, trial.stage.reference)
    return True


FAULTS = {"kill": kill, "kill_at": kill_at, "ctrl_c": ctrl_c, "terminate": terminate, "full": full,
          "full_disk": full_disk, "read_only": read_only, "locked_disk": locked_disk, "clock": clock}
AT_OPERATIONS, WITH_MOUNT, ONCE = ("kill_at", "full"), ("full_disk", "locked_disk"), ("clock",)
