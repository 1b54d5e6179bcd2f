"""Turns the settings block at the top of a script into --help and typed overrides.

A script writes its settings once, as plain assignments between two rulers:

    # ---- settings ----
    batch_size = 32     # windows per micro-batch; halve it when memory runs out
    # ---- end of settings ----

and calls `cfg, given = settings.read(globals())`. That accepts `--batch_size 16` and
`--batch-size=16`, for booleans `--compile`, `--compile False` and `--no-compile`, and for lists of texts
`--folders a b`. The type comes from the default, the help from the comment, and a typo is an error with a suggestion.
A boolean that may also be a text, such as a file's name or auto, is written `name: bool | str = False`.
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
from collections.abc import Callable
from itertools import takewhile
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, TextIO

BEGIN, END = "# ---- settings", "# ---- end of settings"
USER_FIXABLE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG,                    # a full disk,
                errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO,          # a closed door, a broken one,
                errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,    # something else than should be there,
                errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY,               # a name that cannot be one, or is in use,
                errno.EMFILE, errno.ENFILE)                                 # too many open files
CONTROL_CHARS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")    # not \t and \n


class UserError(Exception):
    """Something that the user can mend. `run` shows its message, and no traceback."""


def escape_control_chars(text: str) -> str:
    """A text without what a terminal would obey: control characters, and marks that turn the direction of writing."""
    return CONTROL_CHARS.sub(lambda found: ascii(found[0])[1:-1], text)


def escape_for_terminal(text: str) -> str:
    """What stdout may have of a text that anybody may have written: a terminal not all, a file or program all of it."""
    return escape_control_chars(text) if sys.stdout.isatty() else text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += "; one that begins with - is given as --name=-value"
        raise UserError(f"{message}\n       python {self.prog} --help lists the settings")


def parse_settings(script: dict[str, Any], argv: list[str] | None = None, out: TextIO | None = None,
         presets: dict[str, dict[str, Any]] | None = None, epilog: str = "", positional: tuple[str, ...] = (),
         moved: dict[str, str] | None = None) -> tuple[SimpleNamespace, dict[str, Any]]:
    """Read a script's settings block and the command line.

    Args:
        script: the `globals()` of the script; `__file__` and `__doc__` are used too.
        argv: the arguments; those of the process when None.
        out: where the settings that differ from the block are printed; stdout when None.
        presets: settings by name, one of which a setting `preset` may choose; the command line takes precedence.
        epilog: what --help shows at its end.
        positional: settings that may stand without their names, in this order.
        moved: flags that earlier versions had, and for each the command that took its place.
    Returns:
        all settings as attributes, and a dict of those that the command line gave, or the preset.
    Raises:
        UserError: for an unknown name, a missing value or a value of the wrong type.
    """
    source = Path(script["__file__"]).read_text(encoding="utf-8")
    defaults = {name: script[name] for name in _setting_comments(source)}
    parser = _parser(script, source, epilog)
    for name in positional:
        nargs = "*" if isinstance(defaults[name], list) else "?"
        parser.add_argument(name, nargs=nargs, default=argparse.SUPPRESS, help=f"the same as --{name}")
    known, unknown = parser.parse_known_args([_normalize_flag(a) for a in (sys.argv[1:] if argv is None else argv)])
    if unknown:
        _check_not_moved(unknown[0], moved or {})
        parser.error(_unknown_setting_message(unknown[0], list(defaults)))
    given = vars(known)
    if presets and (preset := given.get("preset", defaults.get("preset", ""))):
        if preset not in presets:
            parser.error(f"there is no preset {preset!r}; there are {', '.join(presets)}")
        given = {**presets[preset], **given}
    changed = [f"{k}={given[k]!r} (default {v!r})" for k, v in defaults.items() if given.get(k, v) != v]
    if changed:
        print("settings:", ", ".join(changed), file=out)
    return SimpleNamespace(**{**defaults, **given}), given


def run_script(main: Callable[[], None]) -> None:
    """Call a script's main(). What the user can mend ends as a message and status 1."""
    _ensure_std_streams()
    try:
        main()
    except UserError as error:
        sys.exit(escape_control_chars(f"error: {error}"))
    except KeyboardInterrupt:
        kill_child_processes()
        print("\nstopped; no file is half-written: the same command goes on, or begins anew", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:             # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        odd_name = os.name == "nt" and error.errno == errno.EINVAL and error.filename       # such as a?.txt
        if error.errno not in USER_FIXABLE_ERRNOS and not odd_name:
            raise
        sys.exit(escape_control_chars(f"error: {error.strerror}: {error.filename or 'a file'}"))
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)    # all is done, and Ctrl-C would only break into tidying up


def _ensure_std_streams() -> None:
    """Make output UTF-8, which a Windows pipe is not by itself; what is closed, as in some services, leads nowhere.

    Else the next file that is opened would take its number, and get what libraries print.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w", encoding="utf-8") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")


def suggest_path(path: str | Path) -> str:
    """'; did you mean X?' for a path that does not exist, or nothing: X is what lies beside it with a similar name."""
    path = Path(path)
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.with_name(close[0])}?" if close else ""


def format_command(script: str, launcher: str = "python", **settings: Any) -> str:
    """What to type, with those settings that say something."""
    texts = {name: str(value) for name, value in settings.items() if value not in ("", None)}
    words = [f"--{name}" if settings[name] is True else f"--{name}{'=' if text.startswith('-') else ' '}{shell_quote(text)}"
             for name, text in texts.items()]
    program = f"-m {script}" if "." in script else f"{script}.py"
    return " ".join([f"{launcher} {program}", *words])


def shell_quote(text: str) -> str:
    """A value as it is typed in a shell."""
    if os.name == "posix" and re.search(r'["$`!\\]', text):
        return shlex.quote(text)
    return f'"{text}"' if re.search(r"[^\w./\\:~+-]|^~", text) else text       # a first ~ is the home folder


def kill_child_processes() -> None:
    """End the processes that this one has begun, before what they would look for is gone."""
    for child in active_children():
        child.kill()
        child.join()


def _setting_comments(source: str) -> dict[str, str]:
    """Map each name of the settings block to its comment, with the indented lines that continue it, in order."""
    lines = source.splitlines()
    found = {}
    for name, node in _assignments(source).items():
        tail = lines[node.end_lineno - 1][node.end_col_offset:].lstrip(" #")
        more = [line.strip(" #") for line in takewhile(re.compile(r"\s+#").match, lines[node.end_lineno:])]
        found[name] = " ".join([tail, *more])
    return found


def _assignments(source: str) -> dict[str, ast.Assign | ast.AnnAssign]:
    """Map each name of the settings block to its assignment, in order."""
    lines = source.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(BEGIN))
    last = next(i for i, line in enumerate(lines) if line.startswith(END))
    return {(node.target if isinstance(node, ast.AnnAssign) else node.targets[0]).id: node
            for node in ast.parse(source).body
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and first < node.lineno <= last}


def _program_name(path: Path) -> str:
    """Return what follows `python` on the command line of a script, or of a tool."""
    return f"-m tools.{path.stem}" if path.parent.name == "tools" else path.name


def _parser(script: dict[str, Any], source: str, epilog: str) -> _Parser:
    parser = _Parser(prog=_program_name(Path(script["__file__"])), description=script["__doc__"], epilog=epilog,
                     allow_abbrev=False, argument_default=argparse.SUPPRESS,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    annotated = {name for name, node in _assignments(source).items() if isinstance(node, ast.AnnAssign)}
    for name, comment in _setting_comments(source).items():
        default, kind = script[name], type(script[name])
        text = f"{comment} (default: {default!r})".replace("%", "%%")
        if kind is bool or name in annotated:
            read_as, metavar = (parse_bool_or_str, "BOOL|STR") if name in annotated else (_parse_bool, "BOOL")
            parser.add_argument(f"--{name}", type=read_as, nargs="?", const=True, metavar=metavar, help=text)
            parser.add_argument(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
        elif isinstance(default, list):
            parser.add_argument(f"--{name}", nargs="+", metavar="TEXT", help=text)
        else:
            parser.add_argument(f"--{name}", type=kind, metavar=kind.__name__.upper(), help=text)
    return parser


def _normalize_flag(arg: str) -> str:
    """`--max-iters=5` becomes `--max_iters=5`; anything that is not a name stays as it is."""
    match = re.fullmatch(r"--([A-Za-z][\w-]*)(=.*)?", arg, flags=re.DOTALL)
    return f"--{match[1].replace('-', '_')}{match[2] or ''}" if match else arg


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return text.lower() in ("true", "1", "yes")


def parse_bool_or_str(text: str) -> bool | str:
    """The boolean that a text says, or else the text."""
    try:
        return _parse_bool(text)
    except argparse.ArgumentTypeError:
        return text


def _check_not_moved(arg: str, moved: dict[str, str]) -> None:
    """Raise UserError for a flag of an earlier version, with the command that took its place."""
    name = arg.removeprefix("--").split("=")[0]
    if arg.startswith("--") and name in moved:
        raise UserError(f"--{name} is a command of its own now\n       {moved[name]}")


def _unknown_setting_message(arg: str, names: list[str]) -> str:
    if not arg.startswith("-"):
        return f"{arg!r} stands alone; settings are given as --name value, and a text with spaces in quotes"
    name = arg.lstrip("-").split("=")[0]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean --{close[0]}?" if close else ""
    return f"unknown setting {arg!r}{hint}"
