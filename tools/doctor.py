"""Print the state of the machine and of the four steps, and the next command to type. Nothing is written.

    python -m tools.doctor
    python -m tools.doctor --data_dir data/tuned --out_dir output/tuned
"""
import os
import platform
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

import preprocess
import tokenizer
from tinyllm import checkpoint, cli, corpus, shards
from tinyllm import device as devices
from tinyllm.cli import UserError, escape_control_chars, format_command
from tinyllm.files import folder_lock, load_json
from tinyllm.machine import available_cores, free_memory
from tinyllm.project import (
    find_tokenizer,
    folders_with,
    load_tokenizer,
    shorten_list,
    tokenizer_files,
    vocab_size_in_name,
)
from tinyllm.resume import is_finished

# ---- settings -----------------------------------------------------------------------------------
data_dir = "data"                   # where steps 1 and 2 wrote
out_dir = "output"                  # where step 3 wrote
vocab_size = 0                      # which vocabulary of data_dir; 0: all of them
device = "auto"                     # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                      # auto, float32, bfloat16, float16
# ---- end of settings ----------------------------------------------------------------------------

DONE, UNFINISHED, STALE, MISSING, DAMAGED, BUSY = "done", "unfinished", "stale", "missing", "damaged", "busy"


class Finding(NamedTuple):
    """The state of a thing, facts about it, the command that brings it further, and what other checks need of it."""
    state: str
    facts: str
    fix_command: str = ""
    value: Any = None


def main() -> None:
    diagnose(*cli.parse_settings(globals()))


def diagnose(cfg: SimpleNamespace, given: dict[str, Any]) -> None:
    """Print everything. `given`: the settings that the command line names."""
    for name, look in machine_probes(cfg).items():
        print_finding(name, run_check(lambda: Finding("", look()))._replace(state=""))
    project = Project(cfg, given)
    steps = project.text_steps()
    for vocabulary, data in steps.values():
        print_finding("train_vocab.py", vocabulary)
        print_finding("preprocess.py", data)
    found = [*steps[project.path], project.training(*steps[project.path])]
    print_finding("train.py", found[2])
    print_finding("sample.py", project.best._replace(state="ready" if project.best.value else project.best.state))
    others, look = try_value(lambda: other_runs(cfg.out_dir, project.data)) or ("", "")
    if others:
        print_finding("elsewhere", Finding("", others))
    named = "data_dir" in given or "out_dir" in given       # then it is these folders that are meant
    print("next:", escape_control_chars(next_command(project, found, "" if named else look)))


def next_command(project: "Project", found: list[Finding], look: str) -> str:
    """What to type after such findings of steps 1 to 3: `look`, unless it is empty, where nothing of them is there."""
    if look and all(finding.state == MISSING for finding in found):
        return look
    todo = [finding for finding in found if finding.state != DONE]
    has_model = found[2].state == DONE and all(finding.state == MISSING for finding in todo)    # which needs no text
    if todo and not has_model:
        return todo[0].fix_command
    chats = bool(project.best.value and project.best.value.get("chat"))
    return format_command("sample", checkpoint=project.out / "ckpt.pt", interactive=chats or "")


def print_finding(name: str, finding: Finding) -> None:
    print(escape_control_chars(f"{name:15} {finding.state:11}{finding.facts}" if finding.state else f"{name:15} {finding.facts}"))


def run_check(check: Callable[[], Finding], fix_command: str = "") -> Finding:
    """What a check finds; one that fails has found damage, or that a package is missing."""
    try:
        return check()
    except Exception as error:              # of any kind: the other checks go on
        install = re.search(r"pip install \S+", str(error))
        return Finding(MISSING if install else DAMAGED, first_line(error), install[0] if install else fix_command)


def try_value(look: Callable[[], Any]) -> Any:
    """What a look gives, None where it fails."""
    return run_check(lambda: Finding("", "", value=look())).value


def first_line(error: Exception) -> str:
    """The first line of an error; further ones of a UserError are what to type."""
    line = str(error).split("\n")[0]
    return line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"


def other_runs(out_dir: str, data_dir: Path) -> tuple[str, str]:
    """Runs and vocabularies in other folders, in words, and the command that looks at the newest."""
    runs, texts = folders_with(out_dir, "last.pt"), folders_with(data_dir, "tok*.model")
    parts = [f"{what} in {shorten_list(found)} (look with --{name})"
             for what, found, name in (("runs", runs, "out_dir"), ("vocabularies", texts, "data_dir")) if found]
    newest = {"out_dir": runs[0]} if runs else {"data_dir": texts[0]} if texts else {}
    return "; ".join(parts), format_command("tools.doctor", **newest) if newest else ""


# ---- the machine --------------------------------------------------------------------------------

def machine_probes(cfg: SimpleNamespace) -> dict[str, Callable[[], str]]:
    return {"python": lambda: f"{platform.python_version()} on {platform.platform()}, {platform.machine()}",
            "packages": lambda: packages("requirements.txt"),
            "extras": lambda: packages("requirements-extra.txt"),
            "device": lambda: str(devices.choose_backend(cfg.device, cfg.dtype)),
            "gpus": gpus,
            "threads": lambda: f"{torch.get_num_threads()}, of {available_cores()} cores; OMP_NUM_THREADS is "
                               f"{os.environ.get('OMP_NUM_THREADS', 'not set')}",
            "to compile": lambda: f"for a CPU: {devices.why_no_compiler() or devices.why_no_headers() or 'yes'}, "
                                  f"triton: {'yes' if find_spec('triton') else 'no'}",
            "free memory": memory,
            "free disk": lambda: ", ".join(free_disk(folder) for folder in (cfg.data_dir, cfg.out_dir))}


def packages(requirements: str) -> str:
    """The packages of a list that are there, with their versions, and those that are not."""
    lines = (Path(__file__).parent.parent / requirements).read_text(encoding="utf-8")
    there, missing = [], []
    for name in re.findall(r"^[\w-]+", lines, re.MULTILINE):
        try:
            there.append(f"{name} {torch.__version__ if name == 'torch' else version(name)}")     # +cpu, +cu130
        except PackageNotFoundError:
            missing.append(name)
    return "; ".join([", ".join(there)] * bool(there) + [f"not there: {', '.join(missing)}"] * bool(missing))


def gpus() -> str:
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} with {gpu.total_memory / 1e9:.1f} GB" for gpu in found) or "none with CUDA"


def memory() -> str:
    free = free_memory()
    return f"{free / 1e9:.1f} GB" if free is not None else "not known on this system"


def free_disk(folder: str) -> str:
    there = next(path for path in (Path(folder).resolve(), *Path(folder).resolve().parents) if path.exists())
    return f"{shutil.disk_usage(there).free / 1e9:.1f} GB for {folder}"


# ---- the steps ----------------------------------------------------------------------------------

class Project:
    """What the steps left in data_dir and out_dir. `path` is the vocabulary that train.py would take, or None."""

    def __init__(self, cfg: SimpleNamespace, given: dict[str, Any]):
        self.out, self.size = Path(cfg.out_dir), cfg.vocab_size
        self.last, self.best = run_check(self.read_last), run_check(self.read_best)
        known = self.last.value or {"config": {}, "tokenizer_sha256": ""}
        own = known["config"].get("data_dir")
        self.given = {name: given.get(name) for name in ("data_dir", "vocab_size")}
        if "data_dir" not in given and isinstance(own, str) and own != cfg.data_dir:
            self.given["data_dir"] = own                # as train.py --init_from resume takes it
        self.data = Path(self.given["data_dir"] or cfg.data_dir)
        self.paths = try_value(lambda: tokenizer_files(self.data)) or []
        found = try_value(lambda: find_tokenizer(self.data, self.size, known["tokenizer_sha256"]))
        self.path = found or (self.paths[0] if self.paths and not self.size else None)
        self.run = {"out_dir": given.get("out_dir"), "preset": self.suggested(cfg)}

    @staticmethod
    def suggested(cfg: SimpleNamespace) -> str:
        """The preset to begin with: the settings of the block take days on a CPU."""
        where = try_value(lambda: devices.choose_backend(cfg.device, cfg.dtype))
        return "cpu_3min" if where and where.device.type == "cpu" else ""

    def text(self, path: Path | None) -> dict[str, Any]:
        """The settings, to be typed, that lead to a vocabulary and its text."""
        return {**self.given, "vocab_size": vocab_size_in_name(path)} if path and len(self.paths) > 1 else self.given

    def text_steps(self) -> dict[Path | None, tuple[Finding, Finding]]:
        """Steps 1 and 2 of each vocabulary, and under the key None of one that is not there."""
        found = {}
        for path in [*self.paths, *[None] * (self.path is None)]:
            first = run_check(lambda: self.vocabulary(path), self.train_vocab_command(path))
            again = format_command("preprocess", **self.text(path))
            second = run_check(lambda: self.shards(path, first.value), again)._replace(fix_command=again)
            found[path] = first, self.with_text(path, first, second)
        return found

    def vocabulary(self, path: Path | None) -> Finding:
        if path is None:
            name = f"tok{self.size}.model" if self.size else "vocabulary"
            return Finding(MISSING, f"no {name} in {self.data}", self.train_vocab_command(None))
        found = load_tokenizer(path)
        return Finding(DONE, f"{path}: {found.n_words:,} entries", value=found)

    def train_vocab_command(self, path: Path | None) -> str:
        """Step 1; to be repeated, it needs the text that it had."""
        if path is None:                    # another folder is for a text of one's own
            return format_command("train_vocab", **self.given, data="PATH" if self.given["data_dir"] else "")

        def text() -> dict[str, str]:
            notes = load_json(path.with_suffix(".json"))
            known = {"data": notes["source"], "encoding": notes.get("encoding", "")}
            return known if Path(notes["source"]).exists() else {}

        return format_command("train_vocab", **{**self.given, "vocab_size": vocab_size_in_name(path)}, **(try_value(text) or {}))

    def shards(self, path: Path | None, vocabulary: tokenizer.BaseTokenizer | None) -> Finding:
        folder = path.with_suffix("") if path else self.data
        if not (folder / shards.MANIFEST).is_file():
            part = (folder / preprocess.PARTIAL_MANIFEST).is_file()
            return Finding(UNFINISHED if part else MISSING, f"no {shards.MANIFEST} in {folder}")
        own = shards.read_manifest(folder).tokenizer_sha256
        if vocabulary and own != vocabulary.sha256:
            return Finding(STALE, f"{folder} was made with another vocabulary than {path}")
        found = shards.load_shards(folder, own)
        counts = ", ".join(f"{found.total(split, 'documents'):,} documents and {found.total(split, 'tokens'):,} tokens "
                           f"of {split}" for split in shards.SPLITS)
        return Finding(DONE, f"{folder}: {counts}", value=found)

    def with_text(self, path: Path | None, first: Finding, second: Finding) -> Finding:
        """Step 2, and where it is to be done and its text is not known or not there, how to name one."""
        if second.state == DONE or not first.value:
            return second
        source = None
        try:
            own = SimpleNamespace(data="", tokenizer="", encoding="")
            source = preprocess.find_source(own, path, first.value)[0]
            corpus.find_files(source)
            return second
        except Exception as error:          # of any kind, as in attempt
            anew = path.with_suffix(".json").exists() and not source
            return second._replace(facts=f"{second.facts}; {first_line(error)}",
                                   fix_command=self.train_vocab_command(path) if anew else f"{second.fix_command} --data PATH")

    def read_last(self) -> Finding:
        path = self.out / "last.pt"
        if not path.is_file():
            return Finding(MISSING, f"no {path}")
        state = checkpoint.load_checkpoint(path, checkpoint.REQUIRED_TO_RESUME, mmap=True)
        checkpoint.build_model(state, copy_weights=False, name=path)
        config, step = state["config"], state["iter_num"]
        minutes, steps = config["max_minutes"], config["max_iters"]
        length = f"{minutes:g} minutes" if minutes else f"{steps:,} steps"
        best = state["best_val_loss"]
        score = f"best val loss {best:.4f}" if best < float("inf") else "not evaluated yet"
        facts = f"{path}: step {step:,} of a run of {length}, {score}"
        return Finding(DONE if is_finished(state) else UNFINISHED, facts, value=state)

    def read_best(self) -> Finding:
        path = self.out / "ckpt.pt"
        if not path.is_file():
            return Finding(MISSING, f"no {path}")
        state = checkpoint.load_checkpoint(path, mmap=True)
        count = checkpoint.build_model(state, copy_weights=False, name=path).count_parameters()
        entries = checkpoint.build_tokenizer(state).n_words
        return Finding(DONE, f"{path}: step {state['iter_num']:,}, {count:,} parameters, with its vocabulary of "
                             f"{entries:,} entries", value=state)

    def is_locked(self) -> bool:
        try:
            with folder_lock(self.out) if self.out.is_dir() else nullcontext():
                return False
        except UserError:
            return True
        except OSError:                     # may not be opened, as the other checks will tell
            return False

    def training(self, vocabulary: Finding, data: Finding) -> Finding:
        """Step 3: is there a run, is it of this text, and how far is it?"""
        last, best = (check_matches(finding, vocabulary.value, data.value) for finding in (self.last, self.best))
        begin = {**self.text(self.path), **self.run}
        resume = {**begin, "preset": "", "init_from": "resume"}
        if self.is_locked():
            return last._replace(state=BUSY, facts=f"a process is training in {self.out} now; saved last: {last.facts}",
                                 fix_command=self.watch())
        if last.state == STALE:
            return last._replace(fix_command=format_command("train", **begin))
        if last.state == MISSING:
            return best._replace(facts=f"{last.facts}; {best.facts}", fix_command=format_command("train", **begin))
        if last.state == DAMAGED or best.state == STALE:
            anew = format_command("train", **begin, init_from="scratch")
            weights = format_command("train", **{**begin, "preset": "", "init_from": self.out / "ckpt.pt"})
            return (last if last.state == DAMAGED else best)._replace(fix_command=weights if best.state == DONE else anew)
        if last.state == UNFINISHED:
            return last._replace(fix_command=format_command("train", **resume))
        # where ckpt.pt is not there or damaged, one more step ends with an evaluation, which writes it
        more = format_command("train", **resume, max_iters=last.value["iter_num"] + 1, max_minutes="0")
        return last if best.state == DONE else best._replace(fix_command=best.fix_command or more)

    def watch(self) -> str:
        """A look at a run that is on: a story, or another look when nothing is saved that has learned."""
        if self.last.value and self.last.value["iter_num"]:
            return format_command("sample", checkpoint=self.out / "last.pt")
        return format_command("tools.doctor", **self.given, out_dir=self.run["out_dir"])


def check_matches(finding: Finding, vocabulary: tokenizer.BaseTokenizer | None, data: shards.ShardSet | None) -> Finding:
    """The finding of a checkpoint; a sound one is stale when it is of another vocabulary or text, if they are known."""
    own = finding.value or {}
    if own and vocabulary and own.get("tokenizer_sha256") != vocabulary.sha256:
        return finding._replace(state=STALE, facts=f"{finding.facts}; not of the vocabulary above")
    if own and vocabulary and data and own.get("data_sha256") != data.sha256:
        return finding._replace(state=STALE, facts=f"{finding.facts}; not of the text above")
    return finding


if __name__ == "__main__":
    cli.run_script(main)
