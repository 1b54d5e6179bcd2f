"""tools/doctor.py: prints a line for each missing or damaged file, and the next command."""
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, run_captured

from tinyllm import checkpoint, demo_stories

SHORT = [*TINY, "--max_iters", "2", "--eval_interval", "1"]
STEPS = ["train_vocab.py", "preprocess.py", "train.py", "sample.py"]


def doctor(*args) -> tuple[list[str], str]:
    """Return the steps with a problem, and the next command. Nothing on the disk changes."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    result = run_captured("doctor", "--device", "cpu", *args)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    lines = [line for line in result.stdout.splitlines() if not line.startswith("settings:")]
    assert lines[-1].startswith("next: python ")
    problems = [line.split()[0] for line in lines if line.split()[1] == "problem:"]
    return problems, lines[-1].removeprefix("next: ")


def follow(command: str) -> None:
    """Run a command that the doctor printed, with short training runs."""
    python, script, *args = shlex.split(command)
    name = script.removesuffix(".py")
    more = {"train": TINY if "resume" in args else SHORT, "sample": ["--max_new_tokens", "4", "--device", "cpu"]}
    result = run_captured(name, *args, *more.get(name, []))
    assert result.returncode == 0, (command, result.stderr)


@pytest.fixture(scope="module")
def finished_project(tmp_path_factory) -> Path:
    """A folder with all four steps finished on its own text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("finished"))
        Path("texts.json").write_text(json.dumps(list(demo_stories.generate_stories(300))), encoding="utf-8")
        for args in ["train_vocab", "--data", "texts.json", "--vocab_size", 512], ["preprocess"], ["train", *SHORT]:
            assert run_captured(*args).returncode == 0
    return folder


@pytest.fixture
def here(finished_project, tmp_path):
    shutil.copytree(finished_project, tmp_path, dirs_exist_ok=True)


def test_commands_lead_to_stories(finished_project):
    flags = ["--data_dir", "my data", "--out_dir", "out", "--vocab_size", "512"]
    commands = ['python train_vocab.py --data_dir "my data" --vocab_size 512',
                'python preprocess.py --data_dir "my data"',
                'python train.py --data_dir "my data" --out_dir out --preset cpu_3min',
                "python sample.py --checkpoint out/ckpt.pt"]
    for i, command in enumerate(commands):
        assert doctor(*flags) == (STEPS[i:] if i < 3 else [], command)
        follow(f"{command} --data {finished_project / 'texts.json'}" if i == 0 else command)


def test_the_machine_and_the_files_are_shown(here):
    printed = run_captured("doctor").stdout
    score = f"{checkpoint.load_checkpoint('output/ckpt.pt')['best_val_loss']:.4f}"
    for part in (f"torch {torch.__version__}", "sentencepiece ", "cpu", ", disk: ", "512 tokens", "tokens of train",
                 "step 2, finished (max_iters 2", score):
        assert part in printed, part


def test_stopped_run_is_resumed(here):
    state = checkpoint.load_checkpoint("output/last.pt", checkpoint.REQUIRED_TO_RESUME)
    checkpoint.save_checkpoint("output/last.pt", {**state, "config": {**state["config"], "max_iters": 3}})
    assert doctor() == (["train.py"], "python train.py --init_from resume")
    follow(doctor()[1])
    assert checkpoint.load_checkpoint("output/last.pt")["iter_num"] == 3 and doctor()[0] == []


@pytest.mark.parametrize("name, problems, command", [
    ("data/tok512.model", ["train_vocab.py", "preprocess.py"], "python train_vocab.py"),
    ("data/tok512/manifest.json", ["preprocess.py"], "python preprocess.py"),
    ("data/tok512/val_0000.bin", ["preprocess.py"], "python preprocess.py"),
    ("output/last.pt", ["train.py"], "python train.py --init_from resume"),
    ("output/ckpt.pt", ["sample.py"], "python train.py --init_from resume")])
def test_damaged_file_is_a_problem(here, name, problems, command):
    content = Path(name).read_bytes()
    Path(name).write_bytes(content[:len(content) // 2])
    assert doctor() == (problems, command)
    Path(name).unlink()
    Path(name).mkdir()
    assert set(doctor()[0]) >= set(problems) - {"train_vocab.py"}


def test_vocabulary_of_the_run_is_chosen(here):
    run_captured("train_vocab", "--data", "texts.json", "--vocab_size", 300)
    assert doctor() == ([], "python sample.py --checkpoint output/ckpt.pt")
    assert doctor("--vocab_size", 300) == (["preprocess.py"], "python preprocess.py --vocab_size 300")
    shutil.rmtree("output")
    assert doctor()[1] == "python train.py --vocab_size 512 --preset cpu_3min"      # the one with shards


def test_missing_device_is_a_problem():
    printed = run_captured("doctor", "--device", "cuda:99").stdout
    assert "problem: " in next(line for line in printed.splitlines() if line.startswith("device "))
