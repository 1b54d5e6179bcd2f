"""You and the model in turns: `python sample.py --interactive`. A story; or a chat, if the model was taught to.

    >>> One day, Lily met a dog.        the model goes on, then it is your turn again
    >>> /set temperature 0.5            change how tokens are chosen; /set alone shows what can be set,
                                        such as max_new_tokens, after which an answer is cut
    >>> /clear                          begin anew
    >>> /exit                           or Ctrl-D; Ctrl-C only ends an answer
"""
import io
import sys
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tinyllm.cli import UserError, escape_control_chars, escape_for_terminal

if TYPE_CHECKING:
    from sample import TextGenerator

Options = Callable[[SimpleNamespace], dict[str, Any]]


def chat_loop(generator: "TextGenerator", cfg: SimpleNamespace, options: Options) -> None:
    """Read lines until /exit or the end of the input. `options` makes the generator's arguments of the settings."""
    try:
        import readline  # noqa: F401    gives input() line editing and history; Windows has its own
    except ImportError:
        pass
    if cfg.system and not generator.chat:
        raise UserError("--system is for a model that was taught to talk; leave it out")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")     # what is no UTF-8 is an error for go_on, not the end
    if sys.stdin.isatty():
        print("/help lists what else can be done, /exit ends", file=sys.stderr)
    said: list[str] = []                        # by you and by the model, in turns
    while (line := read_line()) is not None:
        command, *words = line.split() or [""]
        if command == "/exit":
            return
        if command == "/clear":
            said = []
        elif command.startswith("/"):
            run_slash_command(command, words, generator, cfg, options)
        elif line or not generator.chat:
            said = print_reply(generator, [*said, line], cfg.system, options(cfg))
            cfg.seed += 1                       # the same words shall not always get the same answer


def read_line() -> str | None:
    """The next line that is typed, None at the end of the input; Ctrl-C only takes a line back."""
    while True:
        try:
            return input(">>> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()


def run_slash_command(command: str, words: list[str], generator: "TextGenerator", cfg: SimpleNamespace, options: Options) -> None:
    """Do a command that leaves what was said as it is: /set, or /help, which is also the answer to an unknown one."""
    if command == "/set":
        return set_option(generator, cfg, options, words)
    if command != "/help":
        print(escape_control_chars(f"there is no {command}"), file=sys.stderr)
    print(help_text(bool(generator.chat)), end="")


def help_text(chats: bool) -> str:
    text = __doc__.partition("\n\n")[2]
    return text.replace("One day, Lily met a dog.        the model goes on,",
                        "What do dogs like to eat?       the model answers,") if chats else text


def print_reply(generator: "TextGenerator", said: list[str], system: str, options: dict[str, Any]) -> list[str]:
    """Print the model's turn, and return all that was said. Ctrl-C ends the answer, not the program."""
    answer = ""
    try:
        for piece in generate_reply(generator, said, system, options):
            print(escape_for_terminal(piece), end="", flush=True)
            answer += piece
    except KeyboardInterrupt:
        pass
    except UserError as error:
        print(escape_control_chars(f"error: {error}"), file=sys.stderr)
        return said[:-1]
    print()
    return [*said, answer]


def generate_reply(generator: "TextGenerator", said: list[str], system: str, options: dict[str, Any]) -> Iterator[str]:
    """What the model says: in a chat to the messages, else it goes on with all of it as one text."""
    if not generator.chat:
        return islice(generator.stream(as_single_text(said), **options), 1, None)
    dialog = [{"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), said)]
    return generator.answer([{"role": "system", "content": system}] * bool(system) + dialog, **options)


def as_single_text(said: list[str]) -> str:
    """One text; where a line of yours would stick to the text before it, a space comes between."""
    story = ""
    for number, text in enumerate(said):
        sticks = number % 2 == 0 and story and text and not story[-1].isspace() and not text[0].isspace()
        story += (" " if sticks else "") + text
    return story


def set_option(generator: "TextGenerator", cfg: SimpleNamespace, options: Options, words: list[str]) -> None:
    """/set NAME VALUE, with the value read as the type that the setting has, and taken if the generator takes it."""
    name, value = words[0] if words else "", " ".join(words[1:])
    if name and name not in options(cfg):
        print(escape_control_chars(f"there is no setting {name}"), file=sys.stderr)
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
