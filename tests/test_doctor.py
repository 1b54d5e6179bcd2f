"""tools/doctor.py: it tells every state from the others, and following its last line leads to stories."""
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, run_captured

import tokenizer
from tinyllm import checkpoint, demo_stories, shards
from tinyllm.cli import UserError
from tinyllm.files import folder_lock, load_json, save_json

SHORT = [*TINY, "--max_iters", "2", "--eval_interval", "1"]


def doctor(*args) -> tuple[list[str], str]:
    """The states of the steps, in order, and the command that is to be typed next. Nothing on the disk changes."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    result = run_captured("doctor", "--device", "cpu", *args)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    lines = [line for line in result.stdout.splitlines() if not line.startswith("settings:")]
    assert lines[-1].startswith(("next: python ", "next: pip install "))
    return [line.split()[1] for line in lines if line.split()[0].endswith(".py")], lines[-1].removeprefix("next: ")


def follow(command: str) -> None:
    """Type what it says; trainings are short here."""
    python, script, *args = shlex.split(command)
    name = script.removesuffix(".py")
    more = {"train": TINY if "resume" in args else SHORT, "sample": ["--max_new_tokens", "4", "--device", "cpu"]}
    result = run_captured(name, *args, *more.get(name, []))
    assert result.returncode == 0, (command, result.stderr)


def heal(*args) -> list[str]:
    """Follow the doctor until there is nothing but to write stories, and write; returns what was typed."""
    typed = []
    while not typed or not typed[-1].startswith("python sample.py"):
        typed.append(doctor(*args)[1])
        assert len(typed) < 6 and len(set(typed)) == len(typed), typed
        follow(typed[-1])
    return typed


def write_texts() -> None:
    Path("texts").mkdir()
    for i in range(2):
        Path(f"texts/{i}.json").write_text(json.dumps(list(demo_stories.generate_stories(300))[i::2]), encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder where everything is done, with texts of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("whole"))
        write_texts()
        for args in ["train_vocab", "--data", "texts", "--vocab_size", 512], ["preprocess"], ["train", *SHORT]:
            assert run_captured(*args).returncode == 0
    return folder


@pytest.fixture
def here(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)


def test_from_nothing_to_stories():
    write_texts()
    flags = ["--data_dir", "my data", "--out_dir", "out", "--vocab_size", "512"]
    assert doctor(*flags) == (["missing"] * 4,
                              'python train_vocab.py --data_dir "my data" --vocab_size 512 --data PATH')
    follow(doctor(*flags)[1].replace("PATH", "texts"))
    assert doctor(*flags) == (["done", "missing", "missing", "missing"],
                              'python preprocess.py --data_dir "my data" --vocab_size 512')
    follow(doctor(*flags)[1])
    assert doctor(*flags) == (["done", "done", "missing", "missing"],
                              'python train.py --data_dir "my data" --vocab_size 512 --out_dir out --preset cpu_3min')
    follow(doctor(*flags)[1])
    assert doctor(*flags) == (["done", "done", "done", "ready"],
                              "python sample.py --checkpoint out/ckpt.pt")
    follow(doctor(*flags)[1])


def test_the_machine_and_the_facts_are_shown(here):
    printed = run_captured("doctor").stdout
    for part in (f"torch {torch.__version__}", "sentencepiece ", "cpu", "GB for data", "512 entries", "tokens of train",
                 "step 2 of a run of 2 steps", f"{checkpoint.load_checkpoint('output/ckpt.pt')['best_val_loss']:.4f}"):
        assert part in printed, part


def test_a_run_that_was_stopped_goes_on(here):
    state = checkpoint.load_checkpoint("output/last.pt", checkpoint.REQUIRED_TO_RESUME)
    checkpoint.save_checkpoint("output/last.pt", {**state, "config": {**state["config"], "max_iters": 3}})
    assert doctor()[0] == ["done", "done", "unfinished", "ready"]
    assert heal()[0] == "python train.py --init_from resume"
    assert checkpoint.load_checkpoint("output/last.pt")["iter_num"] == 3


@pytest.mark.parametrize("seconds, state", [(59.0, "unfinished"), (60.0, "done")])
def test_minutes_can_end_a_run_too(here, seconds, state):
    last = checkpoint.load_checkpoint("output/last.pt", checkpoint.REQUIRED_TO_RESUME)
    config = {**last["config"], "max_iters": 100, "max_minutes": 1.0}
    checkpoint.save_checkpoint("output/last.pt", {**last, "config": config, "state": {**last["state"], "seconds": seconds}})
    assert doctor()[0][2] == state


def test_shards_of_another_vocabulary(here):
    run_captured("train_vocab", "--data", "texts/0.json", "--vocab_size", 512)
    assert doctor()[0] == ["done", "stale", "stale", "ready"]
    assert heal()[:2] == ["python preprocess.py", "python train.py --preset cpu_3min"]
    assert Path("output/old-1/ckpt.pt").exists() and doctor()[0] == ["done", "done", "done", "ready"]


def test_a_run_on_another_text(here):
    Path("texts/1.json").unlink()
    run_captured("preprocess")
    assert doctor() == (["done", "done", "stale", "ready"], "python train.py --preset cpu_3min")
    heal()
    assert checkpoint.load_checkpoint("output/ckpt.pt")["data_sha256"] == shards.read_manifest(Path("data/tok512")).sha256


def damage(name: str) -> None:
    content = Path(name).read_bytes()
    Path(name).write_bytes(content[:len(content) // 2])


@pytest.mark.parametrize("name, states, first", [
    ("data/tok512.model", ["damaged", "done", "done", "ready"],
     "python train_vocab.py --vocab_size 512 --data texts"),
    ("data/tok512/manifest.json", ["done", "damaged", "done", "ready"], "python preprocess.py"),
    ("data/tok512/val_0000.bin", ["done", "damaged", "done", "ready"], "python preprocess.py"),
    ("output/ckpt.pt", ["done", "done", "damaged", "damaged"],
     "python train.py --init_from resume --max_iters 3 --max_minutes 0"),
    ("output/last.pt", ["done", "done", "damaged", "ready"], "python train.py --init_from output/ckpt.pt")])
def test_what_is_damaged_is_mended(here, name, states, first):
    damage(name)
    assert doctor() == (states, first)
    assert heal()[0] == first
    assert doctor()[0] == ["done", "done", "done", "ready"]


def test_both_checkpoints_are_damaged(here):
    damage("output/ckpt.pt")
    damage("output/last.pt")
    assert doctor() == (["done", "done", "damaged", "damaged"],
                        "python train.py --preset cpu_3min --init_from scratch")


def test_a_text_that_is_gone_is_to_be_named(here):
    shutil.rmtree("texts")
    assert doctor()[1].startswith("python sample.py")
    Path("data/tok512/manifest.json").unlink()
    states, command = doctor("--out_dir", "new")
    assert states == ["done", "missing", "missing", "missing"] and command == "python preprocess.py --data PATH"
    damage("data/tok512.json")
    assert doctor("--out_dir", "new")[1] == "python train_vocab.py --vocab_size 512"


def test_a_package_that_is_missing_is_no_damage(here, monkeypatch):
    """Of a vocabulary that an extra package reads."""
    def load(source):
        raise UserError("this vocabulary needs the package tokenizers\n       pip install tokenizers")
    monkeypatch.setattr(tokenizer, "load_tokenizer", load)
    assert doctor() == (["missing", "done", "missing", "missing"], "pip install tokenizers")
    shutil.rmtree("data")
    assert doctor("--data_dir", "data")[0] == ["missing"] * 4
    assert "needs the package tokenizers" in run_captured("doctor").stdout


def test_a_model_that_is_there_needs_no_text(here):
    shutil.rmtree("data")
    assert doctor()[0] == ["missing", "missing", "done", "ready"] and doctor()[1].startswith("python sample.py")


def test_of_several_vocabularies_the_one_of_the_run_counts(here):
    run_captured("train_vocab", "--data", "texts", "--vocab_size", 300)
    states, command = doctor()
    assert states == ["done", "done", "done", "missing", "done", "ready"] and command.startswith("python sample.py")
    assert doctor("--vocab_size", 300)[1] == "python preprocess.py --vocab_size 300"
    shutil.rmtree("output")
    assert doctor()[1] == "python train.py --vocab_size 512 --preset cpu_3min"      # it has its text tokenised


def test_the_text_of_a_run_is_found_by_its_folder(here):
    Path("data").rename("mine")
    run_captured("train", "--data_dir", "mine", "--out_dir", "own", *SHORT)
    assert doctor("--out_dir", "own")[0] == ["done", "done", "done", "ready"]
    assert doctor("--out_dir", "own", "--data_dir", "other")[0] == ["missing", "missing", "done", "ready"]


@pytest.mark.parametrize("config, damaged", [
    ({}, True), ({"max_minutes": "long", "max_iters": 5}, True), ({"data_dir": "a\0b"}, False),
    ({"data_dir": 5}, False)])
def test_a_state_of_another_version_is_a_line(here, config, damaged):
    state = checkpoint.load_checkpoint("output/last.pt")
    checkpoint.save_checkpoint("output/last.pt", {**state, "config": {**state["config"], **config} if config else {}})
    states, _ = doctor()
    assert len(states) == 4 and (states[2] == "damaged") == damaged


def test_what_is_in_other_folders_is_looked_at(here):
    Path("data/mine").mkdir()
    Path("output/mine").mkdir()
    for path in [*Path("data").glob("tok*"), *Path("output").glob("*.*")]:
        path.rename(path.parent / "mine" / path.name)
    state = checkpoint.load_checkpoint("output/mine/last.pt")
    checkpoint.save_checkpoint("output/mine/last.pt", {**state, "config": {**state["config"], "data_dir": "data/mine"}})
    assert doctor() == (["missing"] * 4, f"python -m tools.doctor --out_dir {Path('output/mine')}")
    assert doctor("--out_dir", "output/mine")[0] == ["done", "done", "done", "ready"]
    assert doctor("--data_dir", "data")[1] == "python train_vocab.py --data_dir data --data PATH"
    assert f"runs in {Path('output/mine')} (look" in run_captured("doctor", "--out_dir", "output/mime").stdout
    assert "elsewhere" not in run_captured("doctor", "--out_dir", "output/mine").stdout
    shutil.rmtree("output")
    assert doctor()[1] == f"python -m tools.doctor --data_dir {Path('data/mine')}"


@pytest.mark.parametrize("step, todo", [
    (0, "python -m tools.doctor"), (1, "python sample.py --checkpoint output/last.pt")])
def test_a_run_that_is_on_is_left_alone(here, step, todo):
    state = checkpoint.load_checkpoint("output/last.pt")
    checkpoint.save_checkpoint("output/last.pt", {**state, "iter_num": step})
    with folder_lock("output"):
        assert doctor() == (["done", "done", "busy", "ready"], todo)


def test_a_device_that_is_not_there_is_a_line():
    assert "--device cuda:99 was not found" in run_captured("doctor", "--device", "cuda:99").stdout


@pytest.mark.parametrize("name, content", [
    ("data", b"a file"), ("output", b"a file"), ("data/tok512.model", None), ("data/tok512", b"a file"),
    ("output/last.pt", None), ("data/tok512/manifest.json", None), ("data/tok512.json", None), ("output/ckpt.pt", b"")])
def test_nothing_that_is_in_the_way_is_a_traceback(here, name, content):
    shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()
    Path(name).mkdir() if content is None else Path(name).write_bytes(content)
    assert len(doctor()[0]) == 4


def test_notes_that_name_no_path(here):
    notes = load_json("data/tok512.json")
    for source in (5, "a\0b", "x" * 5000):
        save_json("data/tok512.json", {**notes, "source": source})
        damage("data/tok512.model") if source == 5 else None
        assert doctor()[1] == "python train_vocab.py --vocab_size 512"
