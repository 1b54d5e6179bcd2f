"""Turn the settings block at the top of a script into --help and typed overrides.

    # ---- settings ----
    batch_size = 32     # windows per micro-batch; halve it when memory runs out
    # ---- end of settings ----

    cfg, overrides = cli.parse_settings(globals())

accepts `--batch_size 16` and `--batch-size=16`; for booleans `--compile`, `--compile False` and `--no-compile`; for
lists of strings `--folders a b`. The default value sets the type, and the comment is the help text. A setting that
is a boolean or a string, such as auto, is written `name: bool | str = False`. A comment line of its own, such as
`# files`, is the heading of the settings below it; text after a colon describes them.
"""
import argparse
import ast
import difflib
import errno
import os
import re
import shlex
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import takewhile
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn, TextIO

# PyTorch reads this when it is imported. Without it, its allocator prints lines of its own before our error.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

BEGIN, END = "# ---- settings", "# ---- end of settings"
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)    # disk full, read-only or broken
CONTROL_CHARS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")    # not \t and \n


class UserError(Exception):
    """An error that the user can fix. `run_script` prints its message and no traceback."""


class Setting(NamedTuple):
    """An assignment of a settings block."""
    comment: str
    is_bool_or_str: bool
    group: str              # heading in --help; "" before the first one


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += "; a value that starts with - must be written --name=-value"
        command = f"python {self.prog.removeprefix('python ')}"
        raise UserError(f"{message}\n       {command} --help lists the settings")


def parse_settings(module_globals: dict[str, Any], argv: list[str] | None = None, out: TextIO | None = None,
                   presets: dict[str, dict[str, Any]] | None = None, epilog: str = "", positional: tuple[str, ...] = (),
                   moved: dict[str, str] | None = None) -> tuple[SimpleNamespace, dict[str, Any]]:
    """Parse a script's settings block and the command line.

    Args:
        out: stream for the list of settings that differ from the block; default stdout.
        presets: the settings of each preset. The setting `preset` selects one; the command line takes precedence.
        positional: settings that may be given without their names, in this order.
        moved: removed flags, and templates of the commands that replace them.
    Returns:
        all settings as attributes, and a dict of the settings from the command line and the preset.
    Raises:
        UserError: for an unknown name, a missing value or a value of the wrong type.
    """
    settings = read_settings_block(Path(module_globals["__file__"]))
    defaults = {name: module_globals[name] for name in settings}
    parser = _build_parser(module_globals, epilog)
    groups = {"": parser}
    for name, setting in settings.items():
        if setting.group not in groups:
            title, _, description = setting.group.partition(": ")
            groups[setting.group] = parser.add_argument_group(title, description or None)
        _add_setting(groups[setting.group], name, setting, defaults[name])
    for name in positional:
        nargs = "*" if isinstance(defaults[name], list) else "?"
        parser.add_argument(name, nargs=nargs, default=argparse.SUPPRESS, help=f"same as --{name}")
    arguments = sys.argv[1:] if argv is None else argv
    known, unknown = parser.parse_known_args([_normalize_flag(argument) for argument in arguments])
    if unknown:
        _check_not_moved(unknown, vars(known), moved or {})
        parser.error(_unknown_setting_message(unknown[0], list(defaults)))
    overrides = vars(known)
    preset = overrides.get("preset", defaults.get("preset", ""))
    if presets and preset:
        if preset not in presets:
            raise UserError(f"unknown preset {preset!r}; expected {', '.join(presets)}")
        overrides = {**presets[preset], **overrides}
    cfg = SimpleNamespace(**{**defaults, **overrides})
    _check_folders(cfg)
    _print_overrides(defaults, overrides, out)
    return cfg, overrides


def read_settings_block(path: Path) -> dict[str, Setting]:
    """Return the settings of a script by name, in order.

    Indented comment lines continue the comment above them. Other comment lines are headings.
    """
    source = "#" + path.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    lines = source.splitlines()
    assignments = [node for node in ast.parse(source).body if isinstance(node, (ast.Assign, ast.AnnAssign))]
    settings = {}
    group = ""
    end = 1                 # the first line is the rest of BEGIN
    for node in assignments:
        is_annotated = isinstance(node, ast.AnnAssign)
        target = node.target if is_annotated else node.targets[0]
        heading = [line.strip("# ") for line in lines[end:node.lineno - 1] if line.startswith("#")]
        group = " ".join(heading) or group
        end = node.end_lineno
        is_bool_or_str = is_annotated and ast.unparse(node.annotation) == "bool | str"
        settings[target.id] = Setting(_comment_after(lines, node), is_bool_or_str, group)
    return settings


def _comment_after(lines: list[str], node: ast.stmt) -> str:
    same_line = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode()      # ast counts in bytes
    next_lines = takewhile(re.compile(r"\s+#").match, lines[node.end_lineno:])
    return " ".join(line.strip(" #") for line in [same_line, *next_lines])


def _build_parser(module_globals: dict[str, Any], epilog: str) -> _Parser:
    path = Path(module_globals["__file__"])
    program = f"python -m tools.{path.stem}" if path.parent.name == "tools" else path.name
    return _Parser(prog=program, description=module_globals["__doc__"], epilog=epilog, allow_abbrev=False,
                   argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)


def _add_setting(parser: _Parser | argparse._ArgumentGroup, name: str, setting: Setting, default: Any) -> None:
    text = f"{setting.comment} (default: {default!r})".replace("%", "%%")
    kind = type(default)
    if setting.is_bool_or_str or kind is bool:
        parse = parse_bool_or_str if setting.is_bool_or_str else _parse_bool
        metavar = "BOOL|STR" if setting.is_bool_or_str else "BOOL"
        parser.add_argument(f"--{name}", type=parse, nargs="?", const=True, metavar=metavar, help=text)
        parser.add_argument(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
    elif kind is list:
        parser.add_argument(f"--{name}", nargs="+", metavar="TEXT", help=text)
    else:
        parser.add_argument(f"--{name}", type=kind, metavar=kind.__name__.upper(), help=text)


def _parse_bool(text: str) -> bool:
    if text.lower() not in BOOLS:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return BOOLS[text.lower()]


def parse_bool_or_str(text: str) -> bool | str:
    """Return the boolean that a text spells, otherwise the text."""
    return BOOLS.get(text.lower(), text)


def _normalize_flag(argument: str) -> str:
    """Turn `--max-iters=5` into `--max_iters=5`; values stay unchanged."""
    match = re.fullmatch(r"--([A-Za-z][\w-]*)(=.*)?", argument, flags=re.DOTALL)
    return f"--{match[1].replace('-', '_')}{match[2] or ''}" if match else argument


def _check_not_moved(unknown: list[str], overrides: dict[str, Any], moved: dict[str, str]) -> None:
    """Raise UserError for a moved flag. In its command, {values} are its values and {out_dir} is `--out_dir DIR`."""
    name, _, value = unknown[0].removeprefix("--").partition("=")
    if unknown[0].startswith("--") and name in moved:
        flags = {key: _format_flag(key, value) for key, value in overrides.items()}
        flags["values"] = " ".join(map(shell_quote, filter(None, [value, *unknown[1:]])))
        parts = [part.format_map(defaultdict(str, flags)) for part in moved[name].split(" ")]
        command = " ".join(filter(None, parts))
        raise UserError(f"--{name} is no longer a setting\n       {command}")


def _unknown_setting_message(argument: str, names: list[str]) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}; expected --name value, and quotes around values with spaces"
    similar = difflib.get_close_matches(argument.lstrip("-").split("=")[0], names, n=1)
    return f"unknown setting {argument!r}" + (f"; did you mean --{similar[0]}?" if similar else "")


def _check_folders(cfg: SimpleNamespace) -> None:
    for name in ("data_dir", "out_dir"):
        if getattr(cfg, name, None) == "":
            raise UserError(f"--{name} is empty; expected a folder\n       --{name} . is the current folder")


def _print_overrides(defaults: dict[str, Any], overrides: dict[str, Any], out: TextIO | None) -> None:
    changed = [name for name, default in defaults.items() if overrides.get(name, default) != default]
    if changed:
        changes = [f"{name}={overrides[name]!r} (default {defaults[name]!r})" for name in changed]
        print("settings:", ", ".join(changes), file=out)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main(). A UserError is printed without a traceback; the exit status is 1."""
    _ensure_std_streams()
    try:
        main()
    except UserError as error:
        sys.exit(escape_control_chars(f"error: {error}"))
    except KeyboardInterrupt:
        kill_child_processes()
        print("\ninterrupted; no file is left half-written. Run the same command to continue.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:             # the reader of our output, such as `head`, has finished
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if not error.filename and error.errno not in DISK_ERRNOS:
            raise
        sys.exit(escape_control_chars(f"error: {error.strerror}: {error.filename or 'a file'}"))
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C could only interrupt the interpreter's shutdown now


def _ensure_std_streams() -> None:
    """Print UTF-8 on all systems, and connect streams that a service has closed to devnull."""
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")


def kill_child_processes() -> None:
    """Kill all child processes and wait for them, so that the files they use can be removed."""
    for child in active_children():
        child.kill()
        child.join()


def escape_control_chars(text: str) -> str:
    """Escape control characters and bidirectional marks, which could manipulate a terminal."""
    return CONTROL_CHARS.sub(lambda match: ascii(match[0])[1:-1], text)


def escape_for_terminal(text: str) -> str:
    """Escape control characters if stdout is a terminal; files and pipes get the text unchanged."""
    return escape_control_chars(text) if sys.stdout.isatty() else text


def suggest_path(path: str | Path) -> str:
    """Return '; did you mean X?' if a file with a similar name exists beside a missing path, else ''."""
    path = Path(path)
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    similar = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.with_name(similar[0])}?" if similar else ""


def format_command(script: str, launcher: str = "python", **settings: Any) -> str:
    """Return a command line with all settings that are neither empty nor None."""
    program = f"-m {script}" if "." in script else f"{script}.py"
    flags = [_format_flag(name, value) for name, value in settings.items() if value not in ("", None)]
    return " ".join([launcher, program, *flags])


def _format_flag(name: str, value: Any) -> str:
    if value is True:
        return f"--{name}"
    text = str(value)
    separator = "=" if text.startswith("-") else " "        # argparse reads -1 as a flag, but not --name=-1
    return f"--{name}{separator}{shell_quote(text)}"


def shell_quote(text: str) -> str:
    """Quote a value for the shell if necessary."""
    if os.name == "posix" and re.search(r'["$`!\\]', text):
        return shlex.quote(text)
    return f'"{text}"' if re.search(r"[^\w./\\:~+-]|^~", text) else text       # a leading ~ is the home folder
