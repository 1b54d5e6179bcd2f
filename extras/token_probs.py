"""Show the probability of each token: `sample.py --show_probs`, `--logprobs` and `--score`.

The page is one file without scripts. Tooltips are attributes that CSS displays, so copying from the page copies only
the story. Tokens below 80% have a color, whose lightness follows the probability, also for color-blind readers.
"""
import math
import sys
from bisect import bisect
from html import escape
from pathlib import Path
from string import Template
from types import SimpleNamespace

from tinyllm.cli import UserError, escape_control_chars, escape_for_terminal
from tinyllm.files import atomic_write
from tinyllm.generator import Completion, StreamDecoder, TextGenerator, Token, sampling_kwargs
from tokenizer import SPACE_MARK, BaseTokenizer


def tokens_with_alternatives(generator: TextGenerator, completion: Completion, alternatives: int
                             ) -> tuple[list[int], list[Token]]:
    """Return the prompt's ids, and all tokens of prompt and text except the first."""
    prompt_ids = generator.tokenizer.encode_prompt(completion.prompt)
    tokens = generator.read(prompt_ids + completion.tokens, alternatives)
    for i, logprob in enumerate(completion.logprobs, len(prompt_ids) - 1):
        # Beyond max_seq_len, the token was sampled from another context than `read` uses: omit the alternatives.
        top_tokens = tokens[i].top_tokens if i < generator.engine.args.max_seq_len else []
        tokens[i] = Token(tokens[i].piece, logprob, top_tokens)
    return prompt_ids, tokens


def token_texts(tokenizer: BaseTokenizer, prompt_ids: list[int], ids: list[int]) -> list[str]:
    """Return the text of each id after a prompt. A character of several tokens belongs to its last token."""
    decoder = StreamDecoder(tokenizer, prompt_ids, [])
    texts = [decoder.add(i) for i in ids]
    if texts:
        texts[-1] += decoder.flush()
    return texts


def loss_and_perplexity(tokens: list[Token]) -> tuple[float, float]:
    """Return the loss in nats per token, and the perplexity."""
    loss = -sum(token.logprob for token in tokens) / len(tokens)
    return loss, math.exp(loss) if loss < 700 else math.inf


# ---- terminal -----------------------------------------------------------------------------------

def print_token_table(generator: TextGenerator, completion: Completion, cfg: SimpleNamespace) -> None:
    """Print one line per token; with show_probs, also the text in colors and likely alternatives."""
    prompt_ids, tokens = tokens_with_alternatives(generator, completion, alternatives=3)
    first = 1 if cfg.echo else len(prompt_ids)
    tokens = tokens[first - 1:]
    if cfg.show_probs is True:
        texts = token_texts(generator.tokenizer, prompt_ids[:first], (prompt_ids + completion.tokens)[first:])
        first_text = generator.tokenizer.decode(prompt_ids[:1]) if cfg.echo else ""
        colored = [colorize(text, token.logprob) for text, token in zip(texts, tokens)]
        print(escape_for_terminal(first_text) + "".join(colored))
    for token in tokens:
        line = f"{token.logprob:8.3f} {math.exp(token.logprob):4.0%}  {token.piece!r}"
        if cfg.show_probs is True:
            alternatives = [f"{piece!r} {probability:.0%}" for piece, probability in token.top_tokens]
            line += f"   likeliest: {', '.join(alternatives)}"
        print(line, flush=True)


def colorize(text: str, logprob: float) -> str:
    """Return a token's text, colored from red (improbable) to green if stdout is a terminal."""
    if not sys.stdout.isatty():
        return text
    level = min(int(6 * math.exp(logprob)), 5)          # per level 1/5 less red (-36) and 1/5 more green (+6)
    return f"\033[38;5;{196 - 30 * level}m{escape_control_chars(text)}\033[0m"


def print_score(generator: TextGenerator, text: str) -> None:
    """Print the loss, perplexity and bits per byte of a text, and its least probable tokens."""
    text = text.strip()             # step 1 strips documents too
    if not text:
        raise UserError("the file to score contains no text")
    tokenizer = generator.tokenizer
    ids = tokenizer.encode(text, bos=tokenizer.bos_id >= 0, eos=tokenizer.eos_id >= 0)
    first_text = tokenizer.decode(ids[:1])          # without BOS, the first token of the text is not scored
    n_bytes = len(text.encode()) - len(first_text.encode())
    if len(ids) < 2 or n_bytes < 1:
        raise UserError("the text is one token, and this tokenizer has no BOS token; expected a longer text")
    tokens = generator.read(ids, alternatives=0)
    loss, perplexity = loss_and_perplexity(tokens)
    print(f"{len(tokens)} tokens, {n_bytes} bytes: loss {loss:.4f}  perplexity {perplexity:.2f}  "
          f"bits per byte {loss * len(tokens) / math.log(2) / n_bytes:.4f}\nleast expected:")
    first_shown = 0 if first_text else 1            # BOS has no text
    for i in sorted(range(len(tokens)), key=lambda i: tokens[i].logprob)[:10]:
        context = tokenizer.decode(ids[max(i - 7, first_shown):i + 1])
        print(f"{tokens[i].logprob:8.3f}  {context!r} -> {tokens[i].piece!r}")


# ---- HTML page ----------------------------------------------------------------------------------

LEVELS = (0.01, 0.05, 0.2, 0.5, 0.8)            # where the color changes; p0: below 1%; p5 has no color
PAGE = Path(__file__).with_suffix(".html")       # template with $stories, $model and $settings


def write_html_page(generator: TextGenerator, completions: list[Completion], cfg: SimpleNamespace) -> None:
    """Write the stories and their sampling settings to the page cfg.show_probs."""
    stories = []
    for number, completion in enumerate(completions, 1):
        title = f"Story {number}" if len(completions) > 1 else ""
        stories.append(story_html(generator, completion, title, cfg.echo))
    settings = [f"{name} {getattr(cfg, name)}" for name in sampling_kwargs(cfg) if getattr(cfg, name) != ""]
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        stories="".join(stories), model=escape_html(generator.description), settings=escape_html(", ".join(settings)))
    with atomic_write(cfg.show_probs) as file:
        file.write(page.encode(errors="replace"))       # a checkpoint's path may not be valid UTF-8
    print(f"wrote {cfg.show_probs}; open it in a browser", file=sys.stderr)


def story_html(generator: TextGenerator, completion: Completion, title: str, echo: bool) -> str:
    prompt_ids, tokens = tokens_with_alternatives(generator, completion, alternatives=5)
    n_prompt = len(prompt_ids) - 1
    prompt_tokens = tokens[:n_prompt] if echo else []
    new_tokens = tokens[n_prompt:]
    facts = []
    for name, part in (("Prompt", prompt_tokens), ("Generated", new_tokens)):
        if part:
            loss, perplexity = loss_and_perplexity(part)
            facts.append(f"{name}: {len(part)} tokens, loss {loss:.4f}, perplexity {perplexity:.2f}")
    heading = f"<h2>{title}</h2>\n" if title else ""
    story = prompt_html(generator.tokenizer, prompt_ids, prompt_tokens) if echo else ""
    n_left = len(completion.text)                   # characters to show; the text ends before a stop string
    for text, token in zip(token_texts(generator.tokenizer, prompt_ids, completion.tokens), new_tokens):
        story += token_span(text[:max(n_left, 0)], token)
        n_left -= len(text)
    return f'<article>\n{heading}<p class="facts">{"<br>".join(facts)}</p>\n<p class="story">{story}</p>\n</article>\n'


def prompt_html(tokenizer: BaseTokenizer, prompt_ids: list[int], tokens: list[Token]) -> str:
    """Return a prompt's elements. Its first token is BOS or has no context, so it has no probability."""
    first_text = tokenizer.decode(prompt_ids[:1])
    first_span = f'<span class="prompt">{escape_html(first_text)}</span>' if first_text else ""
    texts = token_texts(tokenizer, prompt_ids[:1], prompt_ids[1:])
    return first_span + "".join(token_span(text, token, " prompt") for text, token in zip(texts, tokens))


def token_span(text: str, token: Token, css_class: str = "") -> str:
    """Return a token's element. Leading spaces precede it, because a line can break there."""
    bare = text.lstrip(" ") or text
    spaces = text[:len(text) - len(bare)]
    level = bisect(LEVELS, math.exp(token.logprob))
    line_class = " line" if "\n" in bare else ""
    return (f'{spaces}<span class="p{level}{css_class}{line_class}" tabindex="0" '
            f'data-tip="{escape(tooltip(token))}">{escape_html(bare)}</span>')


def tooltip(token: Token) -> str:
    probability = format_percent(math.exp(token.logprob)).strip()
    lines = [quote_piece(token.piece), f"probability      {probability}", f"log-probability  {token.logprob:.3f} nats"]
    if token.top_tokens:
        top_lines = [f"{format_percent(probability)}  {quote_piece(piece)}" for piece, probability in token.top_tokens]
        lines += ["likeliest here:", *top_lines]
    return "\n".join(lines)


def format_percent(probability: float) -> str:
    return f"{probability:7.2%}" if probability >= 1e-4 else f"{100 * probability:6.0e}%"


def quote_piece(piece: str) -> str:
    return repr(piece.replace(SPACE_MARK, " "))


def escape_html(text: str) -> str:
    return escape(escape_control_chars(text))
