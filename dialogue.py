"""A story that you and the model write in turns: `python sample.py --interactive`.

    >>> One day, Lily met a dog.        the model goes on, then it is your turn again
    >>> /set temperature 0.5            change how tokens are chosen; /set alone shows what can be set
    >>> /clear                          begin a new story
    >>> /exit                           or Ctrl-D; Ctrl-C only ends an answer
"""
import sys
from itertools import islice
from types import SimpleNamespace
from typing import TYPE_CHECKING

from settings import UserError

if TYPE_CHECKING:
    from sample import TextGenerator

CHANGEABLE = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed")


def talk(generator: "TextGenerator", cfg: SimpleNamespace) -> None:
    """Read lines until /exit or the end of the input."""
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
            change(cfg, words)
        elif command.startswith("/"):
            print(__doc__.partition("\n\n")[2], end="")
        else:
            story = go_on(generator, cfg, story + line)


def go_on(generator: "TextGenerator", cfg: SimpleNamespace, story: str) -> str:
    """Print how the model continues the story, and return all of it. Ctrl-C ends the answer, not the program."""
    options = {name: getattr(cfg, name) for name in CHANGEABLE} | {"stop": cfg.stop.split("|")}
    try:
        for _, piece in islice(generator.stream(story, 1, **options), 1, None):
            print(piece, end="", flush=True)
            story += piece
    except KeyboardInterrupt:
        pass
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    print()
    cfg.seed += 1                       # the same beginning shall not always get the same answer
    return story


def change(cfg: SimpleNamespace, words: list[str]) -> None:
    """/set NAME VALUE, with the value read as the type that the setting has."""
    name, value = words[0] if words else "", " ".join(words[1:])
    if name not in CHANGEABLE or not value:
        print(*(f"{known} = {getattr(cfg, known)!r}" for known in CHANGEABLE), sep="\n")
        return
    try:
        setattr(cfg, name, type(getattr(cfg, name))(value))
    except ValueError:
        print(f"error: {name} cannot be {value!r}", file=sys.stderr)
