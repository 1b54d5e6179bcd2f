"""How likely the model found each token: lines in the terminal, or a page for the browser.

    python sample.py --prompt "The dog" --show_probs                # in the terminal
    python sample.py --prompt "The dog" --show_probs probs.html     # a page
    python sample.py --score story.txt                              # a text that is there, in figures

The page is one file that asks for no other and runs no script: what appears beside a token is an attribute of it that
the style sheet shows, so that the text is the story and nothing else, and can be copied. The colours run from orange
to pale blue, and their lightness with them, so that they say the same to every eye and on paper.
"""
import math
import sys
from bisect import bisect
from collections.abc import Iterable
from html import escape
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace

from tinyllm.cli import UserError, escape_control_chars, escape_for_terminal
from tinyllm.files import atomic_write
from tinyllm.generator import Completion, StreamDecoder, TextGenerator, Token
from tokenizer import SPACE, BaseTokenizer


def tokens_with_alternatives(generator: TextGenerator, one: Completion, alternatives: int) -> tuple[list[int], list[Token]]:
    """The ids of the prompt, and all tokens of the text but the first, which nothing comes before."""
    head = generator.tokenizer.encode_prompt(one.prompt)
    tokens = generator.read(head + one.tokens, alternatives)
    for place, logprob in enumerate(one.logprobs, len(head) - 1):
        seen = place < generator.engine.args.max_seq_len    # beyond, it was written after another text than is read
        tokens[place] = Token(tokens[place].piece, logprob, tokens[place].top_tokens if seen else [])
    return head, tokens


def token_texts(tokenizer: BaseTokenizer, before: list[int], ids: list[int]) -> list[str]:
    """The text of each id. A character that is spread over several is with the last of them."""
    reader = StreamDecoder(tokenizer, before, [])
    texts = [reader.add(i) for i in ids]
    return [*texts[:-1], texts[-1] + reader.flush()] if texts else []


def loss_and_perplexity(tokens: list[Token]) -> tuple[float, float]:
    """Loss in nats for a token, and perplexity."""
    loss = -sum(token.logprob for token in tokens) / len(tokens)
    return loss, math.exp(loss) if loss < 700 else math.inf


# ---- the terminal -------------------------------------------------------------------------------

def print_token_table(generator: TextGenerator, one: Completion, cfg: SimpleNamespace) -> None:
    """A line for each token, in colours if asked for."""
    coloured = cfg.show_probs is True
    head, tokens = tokens_with_alternatives(generator, one, alternatives=3)
    first = 1 if cfg.echo else len(head)
    if coloured:
        texts = token_texts(generator.tokenizer, head[:first], (head + one.tokens)[first:])
        print(escape_for_terminal(generator.tokenizer.decode(head[:1]) if cfg.echo else "")
              + "".join(colorize(text, token.logprob) for text, token in zip(texts, tokens[first - 1:])))
    for token in tokens[first - 1:]:
        others = ", ".join(f"{piece!r} {chance:.0%}" for piece, chance in token.top_tokens)
        print(f"{token.logprob:8.3f} {math.exp(token.logprob):4.0%}  {token.piece!r}"
              + (f"   likeliest: {others}" if coloured else ""), flush=True)


def colorize(text: str, logprob: float) -> str:
    """The text of a token, red where the model did not expect it, green where it did."""
    level = min(int(6 * math.exp(logprob)), 5)
    return f"\033[38;5;{16 + 36 * (5 - level) + 6 * level}m{escape_control_chars(text)}\033[0m" if sys.stdout.isatty() else text


def print_score(generator: TextGenerator, text: str) -> None:
    if not text:
        raise UserError("there is no text in the file to score")
    vocabulary = generator.tokenizer
    ids = vocabulary.encode(text, bos=vocabulary.bos_id >= 0, eos=vocabulary.eos_id >= 0)
    unread = vocabulary.decode(ids[:1])             # without bos, what nothing comes before is not expected
    size = len(text.encode()) - len(unread.encode())
    if len(ids) < 2 or size < 1:
        raise UserError("the text is one token, and this vocabulary has no bos to expect it after; score a longer one")
    tokens = generator.read(ids, alternatives=0)
    loss, perplexity = loss_and_perplexity(tokens)
    print(f"{len(tokens)} tokens, {size} bytes: loss {loss:.4f}  perplexity {perplexity:.2f}  "
          f"bits per byte {loss * len(tokens) / math.log(2) / size:.4f}")
    print("least expected:")
    for place in sorted(range(len(tokens)), key=lambda place: tokens[place].logprob)[:10]:
        before = vocabulary.decode(ids[max(place - 7, 0 if unread else 1):place + 1])
        print(f"{tokens[place].logprob:8.3f}  {before!r} -> {tokens[place].piece!r}")


# ---- the page -----------------------------------------------------------------------------------

TITLE = "How likely the model found each token"
LEVELS = (0.01, 0.05, 0.2, 0.5, 0.8)            # between two of them, a probability has the same colour
STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --faint: #5c5c5c; --line: #c8c8c8; --box: #fff;
  --p0: #ee8a2c; --p1: #f6ad60; --p2: #f9cb95; --p3: #f5e0c0; --p4: #e6e9e4; --p5: #def0ff; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececec; --paper: #15171a; --faint: #a8a8a8; --line: #4a4e55;
  --box: #22262c; --p0: #a65200; --p1: #8a4a0c; --p2: #65401a; --p3: #463626; --p4: #2a333c; --p5: #1c3048; } }
body { max-width: 42rem; margin: 0 auto; padding: 1rem 1rem 12rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; line-height: 1.25; } h2 { font-size: 1.1rem; margin-bottom: 0; }
.legend, .facts, footer { color: var(--faint); font-size: .875rem; overflow-wrap: anywhere; }
.legend { line-height: 1.8; } .legend span { color: var(--ink); margin-right: .3rem; white-space: nowrap; }
.story { font: 1.125rem/2 Georgia, serif; white-space: pre-wrap; overflow-wrap: anywhere; }
[data-tip] { position: relative; cursor: help; }
span { border-radius: .2rem; padding: .15em .06em; margin: 0 .03em; }
.p0 { background: var(--p0); } .p1 { background: var(--p1); } .p2 { background: var(--p2); }
.p3 { background: var(--p3); } .p4 { background: var(--p4); } .p5 { background: var(--p5); }
.prompt { border-bottom: .15em solid; border-radius: .2rem .2rem 0 0; }
.line::before { content: "\\21b5"; } [data-tip]:empty::before { content: "\\b7"; }
[data-tip]:hover, [data-tip]:focus { outline: .12em solid var(--ink); }
[data-tip]:hover::after, [data-tip]:focus::after { content: attr(data-tip); position: fixed; z-index: 1;
  inset: auto 0 0; padding: .7rem 1rem; background: var(--box); color: var(--ink); border-top: 1px solid var(--line);
  box-shadow: 0 0 1rem #0004; font: .875rem/1.45 ui-monospace, Consolas, monospace; white-space: pre-wrap; }
body:has([data-tip]:hover) [data-tip]:focus:not(:hover)::after { display: none; }
footer { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: .5rem; }
@media (min-width: 80rem) { [data-tip]:hover::after, [data-tip]:focus::after { position: absolute;
  inset: 100% auto auto 0; width: max-content; max-width: 15rem; margin-top: .3rem; border: 1px solid var(--line);
  border-radius: .4rem; } }
"""
PAGE = """<!DOCTYPE html>
<html lang="">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p class="legend">Probability: {legend} <span class="prompt">prompt</span><br>
Point at a token, tap it, or go from one to the next with Tab.</p>
{stories}<footer>{model}<br>{how}</footer>
</body>
</html>
"""


def check_html_path(name: bool | str) -> None:
    """Raise UserError for the name of a page that cannot be written."""
    if isinstance(name, bool):
        return
    path = Path(name)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--show_probs {name} is neither True, False nor a page to write; name it {name}.html")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name another page for --show_probs")
    if blocked := next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None):
        raise UserError(f"{blocked} is a file, so that {path} cannot be in it; name another page for --show_probs")


def write_html_page(generator: TextGenerator, done: list[Completion], cfg: SimpleNamespace,
               options: Iterable[str]) -> None:
    """Write the page that cfg.show_probs names. options: names of the settings that the stories depend on."""
    stories = [story_html(generator, one, f"Story {number}" if len(done) > 1 else "", cfg.echo)
               for number, one in enumerate(done, 1)]
    how = ", ".join(f"{name} {value}" for name in options if (value := getattr(cfg, name)) != "")
    legend = "\n".join(f'<span class="p{level}">{100 * low:g} to {100 * high:g}%</span>'
                       for level, (low, high) in enumerate(pairwise([0, *LEVELS, 1])))
    page = PAGE.format(title=TITLE, style=STYLE, legend=legend, stories="".join(stories),
                       model=escape_html(generator.description), how=escape_html(how))
    with atomic_write(cfg.show_probs) as file:
        file.write(page.encode(errors="replace"))       # the name of a checkpoint may be no text
    print(f"{cfg.show_probs}: each token with its probability; open it in a browser", file=sys.stderr)


def story_html(generator: TextGenerator, one: Completion, title: str, echo: bool) -> str:
    head, tokens = tokens_with_alternatives(generator, one, alternatives=5)
    parts = {"Prompt": tokens[:len(head) - 1] if echo else [], "Written": tokens[len(head) - 1:]}
    facts = "<br>".join(summary_line(what, part) for what, part in parts.items() if part)
    given = prompt_html(generator.tokenizer, head, parts["Prompt"]) if echo else ""
    texts = token_texts(generator.tokenizer, head, one.tokens)
    begins = accumulate(map(len, texts), initial=0)
    written = "".join(token_span(text[:max(len(one.text) - begin, 0)], token)      # without a text that ends the story
                      for text, token, begin in zip(texts, parts["Written"], begins))
    heading = f"<h2>{title}</h2>\n" if title else ""
    return f'<article>\n{heading}<p class="facts">{facts}</p>\n<p class="story">{given}{written}</p>\n</article>\n'


def prompt_html(tokenizer: BaseTokenizer, head: list[int], tokens: list[Token]) -> str:
    """The elements of a prompt; its first token has no probability where no bos is before it."""
    first, texts = tokenizer.decode(head[:1]), token_texts(tokenizer, head[:1], head[1:])
    rest = "".join(token_span(text, token, " prompt") for text, token in zip(texts, tokens))
    return f'<span class="prompt">{escape_html(first)}</span>{rest}' if first else rest


def summary_line(what: str, tokens: list[Token]) -> str:
    loss, perplexity = loss_and_perplexity(tokens)
    return f"{what}: {len(tokens)} tokens, loss {loss:.4f}, perplexity {perplexity:.2f}"


def token_span(text: str, token: Token, kind: str = "") -> str:
    """A token in its colour. Spaces in front of it stand before the element, where a line can end."""
    bare = text.lstrip(" ") or text
    level = bisect(LEVELS, math.exp(token.logprob))
    line = " line" if "\n" in bare else ""
    return (f'{text[:len(text) - len(bare)]}<span class="p{level}{kind}{line}" tabindex="0" '
            f'data-tip="{escape(tooltip(token))}">{escape_html(bare)}</span>')


def tooltip(token: Token) -> str:
    """What appears beside a token."""
    lines = [quote_piece(token.piece), f"probability      {format_percent(math.exp(token.logprob)).strip()}",
             f"log-probability  {token.logprob:.3f} nats"]
    if token.top_tokens:
        lines += ["likeliest here:"] + [f"{format_percent(chance)}  {quote_piece(piece)}" for piece, chance in token.top_tokens]
    return "\n".join(lines)


def format_percent(chance: float) -> str:
    return f"{chance:7.2%}" if chance >= 1e-4 else f"{100 * chance:6.0e}%"


def quote_piece(piece: str) -> str:
    return repr(piece.replace(SPACE, " "))


def escape_html(text: str) -> str:
    return escape(escape_control_chars(text))
