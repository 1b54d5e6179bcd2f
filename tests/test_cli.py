"""Settings: types, booleans, spelling, errors, and the settings blocks of the four scripts."""
import ast
import importlib
import os
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, assert_user_error, run_captured, run_subprocess
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import train
from tinyllm import cli

SCRIPTS = ["train_vocab", "preprocess", "train", "sample"]


@pytest.fixture
def block(tmp_path):
    path = tmp_path / "tool.py"
    path.write_text("""\"\"\"A tool.\"\"\"
# ---- settings ----
rate = 0.5      # 100% of the rate
count = 2 * 8   # how many,
                # on two lines
name = "a#b"    # a text
on = False      # a switch
page: bool | str = False    # a switch, or a name
when: bool | str = "auto"   # the same
# ---- end of settings ----
other = 1
""", encoding="utf-8")
    values = {"rate": 0.5, "count": 16, "name": "a#b", "on": False, "page": False, "when": "auto"}
    return {"__file__": str(path), "__doc__": "A tool.", **values}


def read(block, *argv):
    return vars(cli.parse_settings(block, list(argv))[0])


def test_defaults_come_from_the_settings_block(block):
    assert read(block) == {"rate": 0.5, "count": 16, "name": "a#b", "on": False, "page": False, "when": "auto"}


@pytest.mark.parametrize("argv, name, value", [
    (["--rate", "1"], "rate", 1.0), (["--rate=1e-4"], "rate", 1e-4), (["--count=3"], "count", 3),
    (["--name", "x=y z"], "name", "x=y z"), (["--name=--odd"], "name", "--odd"), (["--name="], "name", ""),
    (["--on"], "on", True), (["--on", "True"], "on", True), (["--on", "False"], "on", False),
    (["--on=false"], "on", False), (["--no-on"], "on", False), (["--no_on"], "on", False),
    (["--page"], "page", True), (["--page", "--on"], "page", True), (["--page", "yes"], "page", True),
    (["--page", "False"], "page", False), (["--no_page"], "page", False), (["--page", "a.html"], "page", "a.html"),
    (["--when"], "when", True), (["--when", "false"], "when", False), (["--when", "auto"], "when", "auto")])
def test_overrides_are_typed(block, argv, name, value):
    assert read(block, *argv)[name] == value and type(read(block, *argv)[name]) is type(value)


def test_names_with_hyphens(block):
    block["max_iters"] = 1
    path = Path(block["__file__"])
    text = path.read_text(encoding="utf-8").replace("on = False", "max_iters = 1  # steps\non = False")
    path.write_text(text, encoding="utf-8")
    assert read(block, "--max-iters", "7")["max_iters"] == read(block, "--max_iters=7")["max_iters"] == 7


def test_list_takes_values_up_to_the_next_flag(block):
    text = Path(block["__file__"]).read_text(encoding="utf-8").replace("on = False", "names = []\non = False")
    Path(block["__file__"]).write_text(text, encoding="utf-8")
    block["names"] = []
    assert read(block)["names"] == [] and read(block, "--names=a")["names"] == ["a"]
    found = read(block, "--names", "a b", "c", "--count", "3")
    assert found["names"] == ["a b", "c"] and found["count"] == 3
    with pytest.raises(cli.UserError, match="names: expected at least one argument"):
        read(block, "--names", "--count", "3")


@pytest.mark.parametrize("argv, message", [
    (["--cuont", "3"], "did you mean --count?"), (["--rat", "3"], "did you mean --rate?"), (["stray"], "'stray'"),
    (["--count", "3.5"], "--count"), (["--count"], "--count"), (["--on", "perhaps"], "True or False")])
def test_mistakes_are_errors(block, argv, message):
    with pytest.raises(cli.UserError, match=message.replace("?", r"\?")):
        read(block, *argv)


WORDS = ["--rate", "--count", "--name", "--on", "--no_on", "--no-on", "--", "-", "=", "nan", "1e999", "9" * 5000, "%s",
         "--help", "-h", "--on=", "--count=", "--name=x", "@file", "{}"]


@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(argv=st.lists(st.one_of(st.text(max_size=20), st.sampled_from(WORDS),
                               st.tuples(st.sampled_from(WORDS), st.text(max_size=9)).map("=".join)), max_size=6))
def test_any_command_line_is_parsed_or_refused(block, argv):
    """No other exception is raised, and no file is created."""
    try:
        found = read(block, *argv)
        assert [type(found[name]) for name in ("rate", "count", "name", "on")] == [float, int, str, bool]
    except cli.UserError as error:
        assert str(error)
    except SystemExit as end:
        assert end.code == 0 and {"--help", "-h"} & set(argv)


def test_overrides_contain_only_given_flags(block, capsys):
    _, given = cli.parse_settings(block, ["--count", "16"])
    assert given == {"count": 16} and capsys.readouterr().out == ""
    cli.parse_settings(block, ["--count", "17"])
    assert "count=17 (default 16)" in capsys.readouterr().out


def test_help_shows_comments_and_defaults(block, capsys):
    with pytest.raises(SystemExit) as end:
        read(block, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "how many, on two lines (default: 16)" in text and "100% of the rate (default: 0.5)" in text


def test_help_has_a_heading_for_each_group(block, capsys):
    path = Path(block["__file__"])
    text = path.read_text(encoding="utf-8")
    text = text.replace("name =", "# files: 100% of them,\n# on two lines\nname =").replace("page:", "# display\npage:")
    path.write_text(text, encoding="utf-8")
    groups = {name: setting.group for name, setting in cli.read_settings_block(path).items()}
    files = "files: 100% of them, on two lines"
    assert groups == {"rate": "", "count": "", "name": files, "on": files, "page": "display", "when": "display"}
    assert read(block, "--name", "x", "--no-on", "--page")["page"] is True
    with pytest.raises(SystemExit):
        read(block, "--help")
    text = capsys.readouterr().out
    assert [line for line in text.splitlines()[2:] if line.endswith(":")] == ["options:", "files:", "display:"]
    assert "\nfiles:\n  100% of them, on two lines\n\n  --name STR" in text and "\ndisplay:\n  --page" in text


@pytest.mark.parametrize("module", [*SCRIPTS, "convert", "tools.bench", "tools.bench_scale", "tools.compare",
                                    "tools.doctor"])
def test_the_help_of_every_script_lists_its_settings_by_group(module, capsys):
    tool = importlib.import_module(module)
    with pytest.raises(SystemExit) as end:
        cli.parse_settings(vars(tool), ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    position = 0
    for name, setting in cli.read_settings_block(Path(tool.__file__)).items():
        heading = setting.group.partition(": ")[0]
        position = max(position, text.index(f"\n{heading}:\n") if heading else 0)
        position = text.index(f"\n  --{name} ", position)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_setting_of_a_script_is_explained_or_plain(name):
    settings = cli.read_settings_block(ROOT / f"{name}.py")
    plain = {"dim", "n_layers", "norm_eps", "weight_decay", "beta1", "beta2", "min_lr", "seed"}
    assert settings and {key for key, setting in settings.items() if not setting.comment} <= plain
    assert all(hasattr(importlib.import_module(name), key) for key in settings)


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_function_bypasses_the_command_line(name):
    """A function that read a constant of the block itself would not see an override."""
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    names = set(cli.read_settings_block(ROOT / f"{name}.py"))
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            bound = {arg.arg for arg in ast.walk(function.args) if isinstance(arg, ast.arg)}
            bound |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            read_here = {n.id for part in function.body for n in ast.walk(part)
                         if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            leaks = (read_here & names) - bound
            assert not leaks, (function.name, leaks)


@pytest.mark.parametrize("name", SCRIPTS)
def test_typo_gives_status_1_and_a_suggestion(name):
    first = next(iter(cli.read_settings_block(ROOT / f"{name}.py")))
    assert_user_error(run_captured(name, f"--{first}x", "1"), f"did you mean --{first}?")


def test_typo_in_a_subprocess():
    assert_user_error(run_subprocess("preprocess", "--dataa", "1"), "did you mean --data?")


@pytest.mark.skipif(os.name == "nt", reason="quoting is that of a POSIX shell")
@pytest.mark.parametrize("value", ["my run", 'He said "hi"|x', "$HOME", "a`b", "it's", "back\\slash", "plain/path.pt"])
def test_formatted_commands_parse_back(value):
    assert shlex.split(cli.format_command("sample", checkpoint=value)) == ["python", "sample.py", "--checkpoint", value]


def test_values_like_flags_or_home_are_quoted(block):
    words = shlex.split(cli.format_command("tool", name="-dash", rate=-1.5))
    assert words == ["python", "tool.py", "--name=-dash", "--rate=-1.5"] and read(block, *words[2:])["name"] == "-dash"
    assert cli.shell_quote("~/x") == '"~/x"' and cli.shell_quote("a~") == "a~"


def test_positional_list(block):
    text = Path(block["__file__"]).read_text(encoding="utf-8").replace("on = False", "names = []\non = False")
    Path(block["__file__"]).write_text(text, encoding="utf-8")
    block["names"] = []
    for argv in (["a b", "c", "--count", "3"], ["--count", "3", "a b", "c"]):
        cfg, _ = cli.parse_settings(block, argv, positional=("names",))
        assert cfg.names == ["a b", "c"] and cfg.count == 3
    assert cli.parse_settings(block, [], positional=("names",))[0].names == []


@pytest.mark.parametrize("argv", [["--gone"], ["--gone", "a", "b"], ["--gone=a"], ["--count", "3", "--gone"]])
def test_moved_flag_names_its_command(block, argv):
    with pytest.raises(cli.UserError, match="--gone is no longer a setting\n       python -m tools.gone"):
        cli.parse_settings(block, argv, moved={"gone": "python -m tools.gone"})


@pytest.mark.parametrize("argv, command", [
    (["--doctor"], "doctor"), (["--compare", "a", "b c", "--seed", "1"], 'compare a "b c"'),
    (["--data_dir", "d", "--doctor", "--out_dir=my o"], 'doctor --data_dir d --out_dir "my o"'),
    (["--compare=a"], "compare a"), (["--out_dir", "o", "--compare"], "compare --out_dir o")])
def test_command_of_moved_flag_keeps_other_flags(argv, command):
    with pytest.raises(cli.UserError, match=f"\n       python -m tools.{command}$"):
        cli.parse_settings(vars(train), argv, moved=train.MOVED_FLAGS)


@pytest.mark.parametrize("script, argv", [("train", ["--out_dir", ""]), ("preprocess", ["--data_dir="])])
def test_empty_folder_is_refused(script, argv):
    with pytest.raises(cli.UserError, match="_dir is empty; expected a folder\n.*_dir . is the current folder"):
        cli.parse_settings(vars(importlib.import_module(script)), argv)


def test_only_the_annotation_of_a_bool_or_str_changes_the_type(tmp_path):
    path = tmp_path / "script.py"
    block = "# ---- settings\nsteps: int = 5\ncompile: bool | str = False\n# ---- end of settings\n"
    path.write_text(block, encoding="utf-8")
    block = {"__file__": str(path), "__doc__": "", "steps": 5, "compile": False}
    assert cli.parse_settings(block, ["--steps", "7", "--compile", "auto"])[1] == {"steps": 7, "compile": "auto"}
