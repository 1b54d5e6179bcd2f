"""The steps that are broken: their commands on little text, how they run, and how their files are compared."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from conftest import ROOT, TINY, assert_same

from tinyllm import checkpoint, corpus, demo_stories, project, shards

from .server import archive, serve

INJECT = Path(__file__).parent / "inject"
OF_THE_CLOCK = ("clock.jsonl", "loss.png")      # no two runs have these alike
LIMIT = 60                                      # seconds that a process, or a child that it left, may take to end


@dataclass
class Stage:
    """A step: the command, typed in a folder of its own, and how a run went that nothing broke."""
    name: str
    command: list[str]
    given: Path | None = None                   # a folder with the files that are there before it
    reference: Path = Path()
    seconds: float = 0.0
    operations: list[tuple[int, str]] = field(default_factory=list)     # on files: number in the process, and kind

    @cached_property
    def begin(self) -> float:
        """Seconds that the imports take."""
        began = time.monotonic()
        run(Stage("help", [self.command[0], "--help"]), self.reference)
        return time.monotonic() - began

    def prepare(self, folder: Path) -> Path:
        """Make a folder with what the step finds there."""
        folder.mkdir(parents=True)
        return shutil.copytree(self.given, folder, dirs_exist_ok=True) if self.given else folder


class Stages:
    """The stages, each made when it is asked for: stages["train"] needs, and makes, those before it."""

    def __init__(self, folder: Path):
        self.folder, self.made, self.stories = folder, {}, folder / "stories"
        self.stories.mkdir(parents=True)
        stories = [{"story": story} for story in demo_stories.generate_stories(300)]
        for i in range(6):                      # four shards of a file each, and one of two files
            text = json.dumps(stories[i::6]) + " " * (corpus.GROUP_BYTES * (i < 4))
            (self.stories / f"{i}.json").write_text(text, encoding="utf-8")

    def __getitem__(self, name: str) -> Stage:
        if name not in self.made:
            self.made[name] = measured(getattr(self, name)(), self.folder)
        return self.made[name]

    def download(self) -> Stage:
        return Stage("download", [str(ROOT / "train_vocab.py"), "--download", "--mirror", serve(archive(self.stories)),
                                  "--vocab_size", "300"])

    def vocabulary(self) -> Stage:
        return Stage("vocabulary", [str(ROOT / "train_vocab.py"), "--data", str(self.stories), "--vocab_size", "512"])

    def preprocess(self) -> Stage:
        return Stage("preprocess", [str(ROOT / "preprocess.py"), "--num_workers", "2"], self["vocabulary"].reference)

    def train(self, name: str = "train", minutes: str = "0") -> Stage:
        return Stage(name, [str(ROOT / "train.py"), *TINY, "--max_iters", "12", "--eval_interval", "4",
                            "--checkpoint_minutes", minutes, "--out_dir", "out",
                            "--data_dir", str(self["preprocess"].reference / "data")])

    def train_seldom(self) -> Stage:
        """Saves at evaluations only, so that a kill costs steps, and the first ckpt.pt is there before a last.pt."""
        return self.train("train_seldom", "5")


def measured(stage: Stage, folder: Path) -> Stage:
    """Make the reference of a stage; take the time and count the file operations of that run."""
    stage.reference, trace = stage.prepare(folder / "reference" / stage.name), folder / "reference" / "trace"
    trace.unlink(missing_ok=True)
    began = time.monotonic()
    result = run(stage, stage.reference, under=str(stage.reference), trace=str(trace))
    assert result.returncode == 0, result.stderr
    stage.seconds = time.monotonic() - began
    lines = [line.split()[1:3] for line in trace.read_text(encoding="utf-8").splitlines()]
    stage.operations = sorted({(int(number), kind) for number, kind in lines})
    return stage


def run(stage: Stage, folder: Path, after: float = 0, act: Callable[[subprocess.Popen], None] | None = None, **fault
        ) -> subprocess.CompletedProcess:
    """Run the command of a stage in a folder.

    Args:
        after, act: seconds, and what is done to the process then, if it has not ended.
        fault: what inject/sitecustomize.py shall do.
    Raises:
        AssertionError: when the process, or a child that has its output too, does not end.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if fault:
        env |= {"PYTHONPATH": str(INJECT), "FAULT": json.dumps(fault)}
    with subprocess.Popen([sys.executable, *stage.command], cwd=folder, env=env, encoding="utf-8", errors="replace",
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        for seconds, then in [(after, act), (LIMIT, abandon)] if act else [(LIMIT, abandon)]:
            try:
                return subprocess.CompletedProcess(stage.command, *ended(process, seconds))
            except subprocess.TimeoutExpired:
                then(process)


def ended(process: subprocess.Popen, timeout: float) -> tuple[int, str, str]:
    output = process.communicate(timeout=timeout)
    return process.returncode, *output


def abandon(process: subprocess.Popen) -> None:
    alive = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
    raise AssertionError(f"{'it' if alive else 'a child of it'} still runs after {LIMIT} s")


def contents(folder: Path) -> dict[str, Path]:
    """What is in a folder and its subfolders, but for what depends on the clock."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))
            if path.name not in OF_THE_CLOCK}


def assert_equal(folder: Path, reference: Path) -> None:
    """The same files, byte for byte, and no others. Of checkpoints every value but the seconds that the run took."""
    found, expected = contents(folder), contents(reference)
    assert found.keys() == expected.keys(), f"left over or missing: {sorted(found.keys() ^ expected.keys())}"
    for name, path in expected.items():
        if path.suffix == ".pt":
            assert_same(checkpoint.load_checkpoint(found[name]), checkpoint.load_checkpoint(path), name)
        elif path.is_file():
            assert found[name].read_bytes() == path.read_bytes(), f"{name} differs"


def assert_usable(folder: Path) -> None:
    """Whatever has its final name can be read."""
    for path in contents(folder).values():
        if path.suffix == ".pt":
            checkpoint.load_checkpoint(path)
        elif path.suffix == ".model":
            project.load_tokenizer(path)
        elif path.name == shards.MANIFEST:
            found = shards.read_manifest(path.parent)
            assert all(len(found.memmap(shard)) == shard.tokens for shard in found.shards), f"{path} lists a cut shard"
