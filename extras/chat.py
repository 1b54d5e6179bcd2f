"""Chat templates, and the interactive loop: `python sample.py --interactive`.

    chat = FORMATS["llama3"](tokenizer)
    ids = chat.encode_dialog_prompt([{"role": "user", "content": "Why is the sky blue?"}])

A message is a dict with role (system, user or assistant) and content. The content is encoded as plain text, so special
tokens in it have no effect. An answer ends at `end_id`.
"""
import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle, islice
from types import SimpleNamespace

from tinyllm.cli import UserError, escape_control_chars, escape_for_terminal
from tinyllm.generator import Message, TextGenerator, sampling_kwargs
from tinyllm.project import tokenizer_errors
from tokenizer import BaseTokenizer

HELP = """    >>> One day, Lily met a dog.        the model continues the text; a chat model answers
    >>> /set temperature 0.5            change a setting; /set alone lists all
    >>> /clear                          start over
    >>> /exit                           quit, like Ctrl-D; Ctrl-C only ends an answer
"""


# ---- templates ----------------------------------------------------------------------------------

class ChatFormat:
    """Llama 3's chat template, as in meta-llama/llama3."""
    STARTS_WITH_BOS = True
    MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

    def __init__(self, tokenizer: BaseTokenizer):
        """Look up the template's special tokens. Raises UserError if the tokenizer lacks one."""
        self.tokenizer = tokenizer
        with tokenizer_errors():
            self.marks = [tokenizer.special_token_id(mark) for mark in self.MARKS]
        self.end_id = self.marks[-1]

    def encode_header(self, message: Message) -> list[int]:
        """Encode the start of a message, which names its role."""
        begin, end, _ = self.marks
        return [begin, *self.tokenizer.encode(message["role"]), end, *self.tokenizer.encode("\n\n")]

    def encode_message(self, message: Message) -> list[int]:
        return [*self.encode_header(message), *self.tokenizer.encode(message["content"].strip()), self.end_id]

    def encode_dialog_prompt(self, dialog: list[Message]) -> list[int]:
        """Encode a dialog and the header of the model's answer."""
        ids = [self.tokenizer.bos_id] if self.STARTS_WITH_BOS else []
        for message in dialog:
            ids += self.encode_message(message)
        return ids + self.encode_header({"role": "assistant"})


class ChatML(ChatFormat):
    """The chat template of SmolLM2, Qwen and others: <|im_start|>role, a newline, the content, <|im_end|>."""
    STARTS_WITH_BOS = False
    MARKS = ("<|im_start|>", "<|im_end|>")

    def encode_header(self, message: Message) -> list[int]:
        return [self.marks[0], *self.tokenizer.encode(message["role"] + "\n")]

    def encode_message(self, message: Message) -> list[int]:
        content = self.tokenizer.encode(message["role"] + "\n" + message["content"])
        return [self.marks[0], *content, self.end_id, *self.tokenizer.encode("\n")]


FORMATS = {"llama3": ChatFormat, "chatml": ChatML}
# the same templates in Jinja, for exports to Hugging Face and llama.cpp
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
              "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
              "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
}


def choose_format(name: str, name_in_checkpoint: str, tokenizer: BaseTokenizer) -> ChatFormat | None:
    """Return the template `name`; for "auto" the checkpoint's, or None if the tokenizer lacks its special tokens."""
    if name in FORMATS:
        return FORMATS[name](tokenizer)
    if name != "auto":
        raise UserError(f"--chat {name} is unknown; expected auto, none, {', '.join(FORMATS)}")
    try:
        return FORMATS[name_in_checkpoint](tokenizer)
    except (KeyError, UserError):
        return None


# ---- interactive loop ---------------------------------------------------------------------------

def chat_loop(generator: TextGenerator, cfg: SimpleNamespace) -> None:
    """Read lines until /exit or the end of the input, and answer or continue each."""
    if cfg.system and not generator.chat:
        raise UserError("--system works only with chat models, and this is not one")
    prepare_stdin()
    history: list[str] = []                     # lines and replies, alternating
    while (line := read_line()).strip() != "/exit":
        command, *args = line.split() or [""]
        if command == "/clear":
            history = []
        elif command == "/set":
            set_option(generator, cfg, args)
        elif command.startswith("/"):           # /help or a typo
            print(HELP, end="")
        elif line or not generator.chat:
            history = print_reply(generator, [*history, line], cfg)
            cfg.seed += 1                       # the same line gets another answer next time


def prepare_stdin() -> None:
    with suppress(ImportError):
        import readline  # noqa: F401    gives input() line editing and history; Windows has its own
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")     # print_reply reports invalid UTF-8 as an error
    if sys.stdin.isatty():
        print("/help lists the commands, /exit quits", file=sys.stderr)


def read_line() -> str:
    """Return the next line, or /exit at the end of the input. Ctrl-C discards the line."""
    while True:
        try:
            return input(">>> ")
        except EOFError:
            print()
            return "/exit"
        except KeyboardInterrupt:
            print()


def set_option(generator: TextGenerator, cfg: SimpleNamespace, args: list[str]) -> None:
    """Change a setting; args are its name and new value. Without a value, print all settings."""
    settings = {known_name: getattr(cfg, known_name) for known_name in sampling_kwargs(cfg)}
    name = args[0] if args else ""
    value = " ".join(args[1:])
    if name not in settings or not value and name != "stop":
        print("\n".join(f"{known_name} = {current!r}" for known_name, current in settings.items()))
        return
    try:
        setattr(cfg, name, type(settings[name])(value))
        generator.completions([], **sampling_kwargs(cfg))       # checks the settings, generates nothing
    except (ValueError, UserError) as error:
        setattr(cfg, name, settings[name])
        print(f"error: {name} cannot be {value!r}: {error}", file=sys.stderr)


def print_reply(generator: TextGenerator, history: list[str], cfg: SimpleNamespace) -> list[str]:
    """Print the model's reply and return the history with it. Ctrl-C ends the reply, not the program."""
    reply = ""
    try:
        with suppress(KeyboardInterrupt):
            for piece in generate_reply(generator, history, cfg):
                print(escape_for_terminal(piece), end="", flush=True)
                reply += piece
    except UserError as error:
        print(escape_control_chars(f"error: {error}"), file=sys.stderr)
        return history[:-1]
    print()
    return [*history, reply]


def generate_reply(generator: TextGenerator, history: list[str], cfg: SimpleNamespace) -> Iterator[str]:
    """Answer the last message of a chat; without a chat template, continue the history as one text."""
    if not generator.chat:
        return islice(generator.stream(as_single_text(history), **sampling_kwargs(cfg)), 1, None)
    dialog = [{"role": "system", "content": cfg.system}] if cfg.system else []
    dialog += [{"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), history)]
    return generator.answer(dialog, **sampling_kwargs(cfg))


def as_single_text(history: list[str]) -> str:
    """Join lines and replies into one text. Insert a space before a line if no white space separates it."""
    story = ""
    for i, text in enumerate(history):
        is_line = i % 2 == 0
        if is_line and story[-1:].strip() and text[:1].strip():
            story += " "
        story += text
    return story
