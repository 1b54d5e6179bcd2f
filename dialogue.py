"""A story that you and the model write in turns: `python sample.py --interactive`.

    >>> One day, Lily met a dog.        the model goes on, then it is your turn again
    >>> /set temperature 0.5            change how tokens are chosen; /set alone shows what can be set
    >>> /clear                          begin a new story
    >>> /exit                           or Ctrl-D; Ctrl-C only ends an answer
"""
import sys
from collections.abc import Callable
from itertools import islice
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from settings import UserError

if TYPE_CHECKING:
    from sample import TextGenerator

Options = Callable[[SimpleNamespace], dict[str, Any]]


def talk(generator: "TextGenerator", cfg: SimpleNamespace, options: Options) -> None:
    """Read lines until /exit or the end of the input. `options` makes the generator's arguments of the settings."""
    try:
        import readline     # noqa: F401    gives input() line editing and history; Windows has its own
    except ImportError:
        pass
    story = ""
    while True:
        try:
            line = input(">>> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        command, *words = line.split() or [""]
        if command == "/exit":
            return
        if command == "/clear":
            story = ""
        elif command == "/set":
            change(generator, cfg, options, words)
        elif command.startswith("/"):
            print(__doc__.partition("\n\n")[2], end="")
        else:
            gap = " " if story and not story[-1].isspace() else ""
            story = go_on(generator, story + gap + line, options(cfg))
            cfg.seed += 1                       # the same beginning shall not always get the same answer


def go_on(generator: "TextGenerator", story: str, options: dict[str, Any]) -> str:
    """Print how the model continues the story, and return all of it. Ctrl-C ends the answer, not the program."""
    try:
        for piece in islice(generator.stream(story, **options), 1, None):
            print(piece, end="", flush=True)
            story += piece
    except KeyboardInterrupt:
        pass
    print()
    return story


def change(generator: "TextGenerator", cfg: SimpleNamespace, options: Options, words: list[str]) -> None:
    """/set NAME VALUE, with the value read as the type that the setting has, and taken if the generator takes it."""
    name, value = words[0] if words else "", " ".join(words[1:])
    if name not in options(cfg) or not value and name != "stop":
        print(*(f"{known} = {getattr(cfg, known)!r}" for known in options(cfg)), sep="\n")
        return
    old = getattr(cfg, name)
    try:
        setattr(cfg, name, type(old)(value))
        generator.completions([], **options(cfg))
    except (ValueError, UserError) as error:
        setattr(cfg, name, old)
        print(f"error: {error if isinstance(error, UserError) else f'{name} cannot be {value!r}'}", file=sys.stderr)
