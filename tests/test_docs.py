"""The commands in the docs are valid, and the files that they name exist."""
import ast
import importlib
import re
import shlex
import sys
from collections import Counter

import pytest
from conftest import ROOT

from tinyllm import cli, presets

FOLDERS = ("tinyllm", "extras", "tools")
STEPS = ("train_vocab", "preprocess", "train", "sample")


def commands() -> list[tuple[str, str, list[str]]]:
    """Return (page, script, arguments) of every call of a step in the pages and in the scripts' docstrings."""
    files = [*ROOT.glob("README*.md"), ROOT / ".github" / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    pages = {path.name: path.read_text(encoding="utf-8") for path in files}
    for name in STEPS:
        pages[f"{name}.py"] = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")))
    return [(page, name, shlex.split(rest, comments=True)) for page, text in pages.items()
            for name, rest in re.findall(r"python (\w+)\.py([^`\n]*)", text) if name in STEPS]


@pytest.mark.parametrize("page, name, args", commands())
def test_every_command_has_settings_that_exist(page, name, args):
    known = {name: preset.settings for name, preset in presets.PRESETS.items()}
    if args != ["--help"]:
        cli.parse_settings(vars(importlib.import_module(name)), args, presets=known)


def test_there_are_commands_for_every_step():
    for page in ("README.md", *(f"{name}.py" for name in STEPS)):
        found = {name for where, name, _ in commands() if where == page}
        assert found >= (set(STEPS) if page == "README.md" else {page.removesuffix(".py")})


def test_the_settings_of_quickstart_exist():
    text = (ROOT / "quickstart.sh").read_text(encoding="utf-8")
    known = {name for step in STEPS for name in cli.read_settings_block(ROOT / f"{step}.py")}
    used = set(re.findall(r" --(\w+_\w+|preset|prompt|seed)", text)) - {"setup_only"}
    assert len(used) > 8 and used <= known
    assert set(re.findall(r"--preset (\w+)", text)) <= set(presets.PRESETS)


def test_ci_calls_the_test_command_of_the_readme():
    assert "\nbash test.sh" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").strip().endswith("\nbash test.sh")


def test_github_runs_the_commands_of_the_readme_on_the_versions_that_it_names():
    readme, workflow, lint = ((ROOT / name).read_text(encoding="utf-8")
                              for name in ("README.md", ".github/workflows/test.yml", "ruff.toml"))
    for command in ("bash test.sh", "bash quickstart.sh"):
        assert f"\n{command}\n" in readme and f"- run: {command}\n" in workflow
    oldest, newest = map(int, re.search(r"Python 3\.(\d+) to 3\.(\d+)", readme).groups())
    versions = [int(found) for found in re.findall(r"3\.(\d+)", re.search(r"python: \[.*\]", workflow)[0])]
    assert versions == list(range(oldest, newest + 1)) and f'target-version = "py3{oldest}"' in lint
    assert f"(3, {oldest}) <= sys.version_info < (3, {newest + 1})" in (ROOT / "quickstart.sh").read_text("utf-8")
    others = re.findall(r'os: (\w+)-latest, python: "3\.(\d+)"', workflow)
    assert others == [(system, str(version)) for system in ("macos", "windows") for version in (oldest, newest)]


def test_files_named_in_contributing_exist():
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/.-]+\.(?:py|md|txt|toml|yml))`", text))
    assert len(named) > 9 and not [name for name in named if not (ROOT / name).exists()]
    names = {"tinyllm.optional": ("require_package",), "tinyllm.resume": ("MAY_CHANGE_ON_RESUME",),
             "extras.formats": ("choose_reader", "choose_folder_reader", "WRITERS"),
             "convert": ("FORMAT_BY_SUFFIX", "TOLERANCE")}
    for module in names:
        for name in names[module]:
            assert re.search(rf"`(\w+\.)?{name}`", text) and hasattr(importlib.import_module(module), name), name


def test_the_version_is_the_same_everywhere():
    version, date = re.search(r"\n## \[(.+)\] - (.+)\n", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")).groups()
    assert f"\nversion: {version}\ndate-released: {date}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def module_names(folder: str) -> set[str]:
    return {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}


def test_contributing_names_every_file():
    page = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = re.search(r"(?s)```text\n(train_vocab.py.*?)```", page)[1]
    named = re.findall(r"(?m)^ *(\w+)\.py +# \w", tree)
    modules = module_names(".") | module_names("tinyllm") | module_names("tools")
    assert len(named) == len(set(named)) > 30
    assert set(named) == modules
    assert all(f"\n{folder}/ " in tree for folder in (*FOLDERS, "data", "output", "docs", "tests"))


def test_the_page_of_extras_names_every_file():
    page = (ROOT / "extras" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?m)^\| `([\w/]+)\.py`", page))
    modules = module_names("extras") | {f"formats/{name}" for name in module_names("extras/formats")}
    assert named == modules


def test_the_chinese_readme_has_the_commands_names_and_figures_of_the_english_one():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8").replace(".zh-CN.md", ".md")
                        for name in ("README.md", "README.zh-CN.md"))
    blocks = r"(?ms)^```\w+\n.*?^```$"
    code = [[re.sub("(?m) +#.*$", "", block) for block in re.findall(blocks, page)] for page in (english, chinese)]
    assert code[0] == code[1] != []                     # but for the comments in them
    names, numbers = r'`[^`]+`|\]\(.+?\)|src=".+?"|\*[^*|]{20,}\*', r"\d+(?:[.,]\d+)*"
    parts = [[re.sub(r"\s+", " ", part) for part in re.split("(?m)^## ", re.sub(blocks, "", page))]
             for page in (english, chinese)]
    for one, other in zip(*parts, strict=True):
        assert not set(re.findall(names, one)) - set(re.findall(names, other))
        assert not Counter(re.findall(numbers, one)) - Counter(re.findall(numbers, other))
    rows = [re.findall(r"(?m)^\|.*", page) for page in (english, chinese)]
    for one, other in zip(*rows, strict=True):
        assert sorted(re.findall(numbers, one)) == sorted(re.findall(numbers, other))


def test_five_packages_carry_the_four_steps():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = {re.match(r"\w+", line)[0] for line in lines if line and not line.startswith("#")}
    assert names == {"torch", "numpy", "sentencepiece", "requests", "tqdm"}
    found = set()
    for path in [path for folder in (".", "extras/formats", *FOLDERS) for path in (ROOT / folder).glob("*.py")]:
        found |= set(re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    own = {path.stem for path in ROOT.glob("*.py")} | set(FOLDERS)
    assert found - own - set(sys.stdlib_module_names) - {"urllib3"} == names        # it comes with requests
