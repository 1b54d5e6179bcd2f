"""Chat templates, and turns of you and the model: `python sample.py --interactive`.

    chat = FORMATS["llama3"](tokenizer)
    ids = chat.encode_dialog_prompt([{"role": "user", "content": "Why is the sky blue?"}])

A message is a dict with role (system, user or assistant) and content. Special tokens are not recognized in a content.
An answer ends at `end_id`.
"""
import io
import sys
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from types import SimpleNamespace
from typing import Any

from tinyllm.cli import UserError, escape_control_chars, escape_for_terminal
from tinyllm.generator import Message, TextGenerator
from tinyllm.project import tokenizer_errors
from tokenizer import BaseTokenizer

SamplingKwargs = Callable[[SimpleNamespace], dict[str, Any]]        # settings to arguments of TextGenerator.generate

HELP = """    >>> {prompt:32}{reply}, then it is your turn again
    >>> /set temperature 0.5            change how tokens are chosen; /set alone shows what can be set,
                                        such as max_new_tokens, after which an answer is cut
    >>> /clear                          start over
    >>> /exit                           or Ctrl-D; Ctrl-C only ends an answer
"""
STORY_HELP = HELP.format(prompt="One day, Lily met a dog.", reply="the model goes on")
CHAT_HELP = HELP.format(prompt="What do dogs like to eat?", reply="the model answers")


# ---- templates ----------------------------------------------------------------------------------

class ChatFormat:
    """Llama 3's template, as in meta-llama/llama3."""
    STARTS_WITH_BOS = True
    MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

    def __init__(self, tokenizer: BaseTokenizer):
        """Raises UserError if the tokenizer lacks the special tokens of the template."""
        self.tokenizer = tokenizer
        with tokenizer_errors():
            self.marks = [tokenizer.special_token_id(mark) for mark in self.MARKS]
        self.end_id = self.marks[-1]

    def encode_header(self, message: Message) -> list[int]:
        """Encode whose turn it is."""
        begin, end, _ = self.marks
        return [begin, *self.tokenizer.encode(message["role"]), end, *self.tokenizer.encode("\n\n")]

    def encode_message(self, message: Message) -> list[int]:
        return [*self.encode_header(message), *self.tokenizer.encode(message["content"].strip()), self.end_id]

    def encode_dialog_prompt(self, dialog: list[Message]) -> list[int]:
        """Encode a dialog and the header of the answer that the model will give."""
        ids = [self.tokenizer.bos_id] if self.STARTS_WITH_BOS else []
        for message in dialog:
            ids += self.encode_message(message)
        return ids + self.encode_header({"role": "assistant"})


class ChatML(ChatFormat):
    """The template of SmolLM2, Qwen and others: <|im_start|>role, a newline, the content, <|im_end|>."""
    STARTS_WITH_BOS = False
    MARKS = ("<|im_start|>", "<|im_end|>")

    def encode_header(self, message: Message) -> list[int]:
        return [self.marks[0], *self.tokenizer.encode(message["role"] + "\n")]

    def encode_message(self, message: Message) -> list[int]:
        content = self.tokenizer.encode(message["role"] + "\n" + message["content"])
        return [self.marks[0], *content, self.end_id, *self.tokenizer.encode("\n")]


FORMATS = {"llama3": ChatFormat, "chatml": ChatML}
# the same templates in Jinja, for the tokenizers of Hugging Face and llama.cpp
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
              "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
              "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
}


def detect_format(name: str, tokenizer: BaseTokenizer) -> ChatFormat | None:
    """Return the template of that name; None if it is unknown, or its marks are plain text to the tokenizer."""
    try:
        return FORMATS[name](tokenizer) if name in FORMATS else None
    except UserError:
        return None


# ---- turns --------------------------------------------------------------------------------------

def chat_loop(generator: TextGenerator, cfg: SimpleNamespace, sampling_kwargs: SamplingKwargs) -> None:
    """Read lines until /exit or the end of the input, and answer or continue each."""
    if cfg.system and not generator.chat:
        raise UserError("--system is for a model that was taught to talk; leave it out")
    prepare_stdin()
    history: list[str] = []                     # what you typed and what the model wrote, in turns
    while (line := read_line()) is not None:
        command, *args = line.split() or [""]
        if command == "/exit":
            return
        if command == "/clear":
            history = []
        elif command.startswith("/"):
            run_slash_command(command, args, generator, cfg, sampling_kwargs)
        elif line or not generator.chat:
            history = print_reply(generator, [*history, line], cfg.system, sampling_kwargs(cfg))
            cfg.seed += 1                       # the same line gets another answer the next time


def prepare_stdin() -> None:
    try:
        import readline  # noqa: F401    gives input() line editing and history; Windows has its own
    except ImportError:
        pass
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")     # invalid UTF-8 becomes an error of print_reply, not the end
    if sys.stdin.isatty():
        print("/help lists what else can be done, /exit ends", file=sys.stderr)


def read_line() -> str | None:
    """Return the next line, or None at the end of the input. Ctrl-C discards the line."""
    while True:
        try:
            return input(">>> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()


def run_slash_command(command: str, args: list[str], generator: TextGenerator, cfg: SimpleNamespace,
                      sampling_kwargs: SamplingKwargs) -> None:
    """Run /set, or print the help: for /help and for unknown commands."""
    if command == "/set":
        set_option(generator, cfg, sampling_kwargs, args)
        return
    if command != "/help":
        print(escape_control_chars(f"there is no {command}"), file=sys.stderr)
    print(CHAT_HELP if generator.chat else STORY_HELP, end="")


def set_option(generator: TextGenerator, cfg: SimpleNamespace, sampling_kwargs: SamplingKwargs, args: list[str]
               ) -> None:
    """Change a setting: args are its name and its value, of the type it has. Without a value, print all settings."""
    name = args[0] if args else ""
    value = " ".join(args[1:])
    names = list(sampling_kwargs(cfg))
    if name and name not in names:
        print(escape_control_chars(f"there is no setting {name}"), file=sys.stderr)
    if name not in names or not value and name != "stop":
        print(*(f"{known} = {getattr(cfg, known)!r}" for known in names), sep="\n")
        return
    old = getattr(cfg, name)
    try:
        setattr(cfg, name, type(old)(value))
        generator.completions([], **sampling_kwargs(cfg))       # checks the settings, and generates nothing
    except (ValueError, UserError) as error:
        setattr(cfg, name, old)
        reason = error if isinstance(error, UserError) else f"{name} cannot be {value!r}"
        print(f"error: {reason}", file=sys.stderr)


def print_reply(generator: TextGenerator, history: list[str], system: str, options: dict[str, Any]) -> list[str]:
    """Print the model's turn and return the history with it. Ctrl-C ends the reply, not the program."""
    reply = ""
    try:
        for piece in generate_reply(generator, history, system, options):
            print(escape_for_terminal(piece), end="", flush=True)
            reply += piece
    except KeyboardInterrupt:
        pass
    except UserError as error:
        print(escape_control_chars(f"error: {error}"), file=sys.stderr)
        return history[:-1]
    print()
    return [*history, reply]


def generate_reply(generator: TextGenerator, history: list[str], system: str, options: dict[str, Any]
                   ) -> Iterator[str]:
    """Answer the last message of a chat; without a chat template, continue the history as one text."""
    if not generator.chat:
        return islice(generator.stream(as_single_text(history), **options), 1, None)
    dialog = [{"role": "system", "content": system}] if system else []
    for role, content in zip(cycle(("user", "assistant")), history):
        dialog.append({"role": role, "content": content})
    return generator.answer(dialog, **options)


def as_single_text(history: list[str]) -> str:
    """Join the turns to one text. Separate a typed line by a space where no white space is."""
    story = ""
    for turn, text in enumerate(history):
        is_typed = turn % 2 == 0
        if is_typed and story and text and not story[-1].isspace() and not text[0].isspace():
            story += " "
        story += text
    return story
