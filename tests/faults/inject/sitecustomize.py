"""Breaks the disk or the clock of each Python process that finds this on its PYTHONPATH, as its variable FAULT says.

FAULT holds, as JSON: under, the folder whose file operations count; at, the number of the one that breaks (0: none);
how, "kill" (the process dies at it) or an errno (it fails, and all after it, unless lasts is false); trace, a file that
gets a line for each operation; clock, a seed for the leaps of the clock.
"""
import builtins
import io
import json
import os
import random
import signal
import time
from collections.abc import Callable

CALLS = ("replace", "rename", "mkdir", "unlink", "remove", "rmdir", "fsync")


class Disk:
    """Counts what a process does to the files below a folder, and breaks at one of these operations."""

    def __init__(self, under: str, at: int = 0, how: str | int = "", lasts: bool = True,
                 trace: str = os.devnull):
        self.under, self.at, self.how, self.lasts = os.path.realpath(under) + os.sep, at, how, lasts
        self.count, self.real_open, self.trace = 0, io.open, os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def holds(self, path: object) -> bool:
        return (isinstance(path, (str, bytes, os.PathLike))
                and (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(self.under))

    def operation(self, what: str, path: object = None, half: Callable[[], object] = bool) -> None:
        """Count an operation that is about to be done. The one that breaks is done by `half` first."""
        self.count += 1
        os.write(self.trace, f"{os.getpid()} {self.count} {what} {path or ''}\n".encode())
        if self.count == self.at:
            half()
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        if self.count == self.at or self.lasts and 0 < self.at < self.count:
            raise OSError(self.how, os.strerror(self.how), *([os.fspath(path)] if path else []))

    def open(self, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        """The built-in open(), for a file to write with a raw layer that counts."""
        if not set(mode) & set("wax+") or not self.holds(file):
            return self.real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        self.operation("open", file)
        raw = _File(self, file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if not buffering:
            return raw
        binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding, errors, newline)


class _File(io.FileIO):
    def __init__(self, disk: Disk, *args):
        super().__init__(*args)
        self.disk = disk

    def write(self, data) -> int:
        self.disk.operation("write", None, lambda: super(_File, self).write(data[:len(data) // 2]))
        return super().write(data)


class _Call:
    """A function of os that counts when it is about a file of the folder, or about an open one."""

    def __init__(self, disk: Disk, name: str):
        self.disk, self.name, self.real = disk, name, getattr(os, name)

    def __call__(self, path, *args, **options):
        if self.name == "fsync" or self.disk.holds(path):
            self.disk.operation(self.name, None if self.name == "fsync" else path)
        return self.real(path, *args, **options)


class _Clock:
    """A clock that leaps by up to ten days at every tenth look at it."""

    def __init__(self, name: str, seed: int, back: bool):
        self.real, self.chance, self.back, self.offset = getattr(time, name), random.Random(seed), back, 0.0

    def __call__(self) -> float:
        if self.chance.random() < 0.1:
            self.offset += self.chance.uniform(-864_000 * self.back, 864_000)
        return self.real() + self.offset


def install(patch: Callable[[object, str, object], object] = setattr, clock: int | None = None, **disk) -> Disk | None:
    """Put the faults into this process. patch: what sets an attribute, such as pytest's monkeypatch.setattr."""
    if clock is not None:
        for name, back in (("time", True), ("monotonic", False), ("perf_counter", False)):
            patch(time, name, _Clock(name, clock, back))
    if not disk:
        return None
    broken = Disk(**disk)
    for module in (builtins, io):
        patch(module, "open", broken.open)
    for name in CALLS:
        patch(os, name, _Call(broken, name))
    return broken


if "FAULT" in os.environ:
    install(**json.loads(os.environ["FAULT"]))
