"""What the documents say can be typed, and what they promise of the repository is so."""
import ast
import importlib
import re
import shlex
import sys

import pytest

import presets
import settings
from conftest import ROOT

STEPS = ("train_vocab", "preprocess", "train", "sample")


def commands() -> list[tuple[str, str, list[str]]]:
    """(page, script, arguments) of every call of a step in the pages and in the scripts' docstrings."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    pages = {path.name: path.read_text(encoding="utf-8") for path in files}
    for name in STEPS:
        pages[f"{name}.py"] = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")))
    return [(page, name, shlex.split(rest, comments=True)) for page, text in pages.items()
            for name, rest in re.findall(r"python (\w+)\.py([^`\n]*)", text) if name in STEPS]


@pytest.mark.parametrize("page, name, args", commands())
def test_every_command_has_settings_that_exist(page, name, args):
    known = {name: preset.settings for name, preset in presets.PRESETS.items()}
    if args != ["--help"]:
        settings.read(vars(importlib.import_module(name)), args, presets=known)


def test_there_are_commands_for_every_step():
    for page in ("README.md", *(f"{name}.py" for name in STEPS)):
        found = {name for where, name, _ in commands() if where == page}
        assert found >= (set(STEPS) if page == "README.md" else {page.removesuffix(".py")})


def test_the_settings_of_quickstart_exist():
    text = (ROOT / "quickstart.sh").read_text(encoding="utf-8")
    known = {name for step in STEPS for name in settings._comments((ROOT / f"{step}.py").read_text(encoding="utf-8"))}
    used = set(re.findall(r" --(\w+_\w+|preset|prompt|seed)", text)) - {"setup_only"}
    assert len(used) > 8 and used <= known
    assert set(re.findall(r"--preset (\w+)", text)) <= set(presets.PRESETS)


def test_ci_calls_the_test_command_of_the_readme():
    assert "\nbash test.sh" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").strip().endswith("\nbash test.sh")


def test_the_readme_names_every_file():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in ROOT.glob("*.py") if f"`{path.name}`" not in readme]


def test_five_packages_carry_the_four_steps():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = {re.match(r"\w+", line)[0] for line in lines if line and not line.startswith("#")}
    assert names == {"torch", "numpy", "sentencepiece", "requests", "tqdm"}
    found = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("formats/*.py")]:
        found |= set(re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert found - {path.stem for path in ROOT.glob("*.py")} - {"formats"} - set(sys.stdlib_module_names) == names
