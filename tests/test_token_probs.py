"""Token probabilities: the HTML page and the terminal output."""
import errno
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import assert_user_error, run_captured

from extras.token_probs import (
    LEVELS,
    PAGE,
    Token,
    format_percent,
    print_token_table,
    quote_piece,
    story_html,
    token_span,
    token_texts,
)
from sample import Completion, TextGenerator
from tinyllm.cli import escape_control_chars

EVIL = '<script>alert(1)</script> "two"  & \'one\'\n&lt; \u732b \U0001f600'


class Page(HTMLParser):
    """Parser of a page: its stories, the text, kind and tooltip of each token, all tags and attributes."""

    def __init__(self, source: str):
        super().__init__()
        self.stories, self.tokens, self.tags, self.attributes, self.open = [], [], set(), [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.add(tag)
        self.attributes += attributes
        self.open.append((tag, found))
        if found.get("class") == "story":
            self.stories.append("")
            self.tokens.append([])
        if "data-tip" in found:
            self.tokens[-1].append(["", found["class"].split(), found["data-tip"].split("\n")])

    def handle_endtag(self, tag):
        while self.open.pop()[0] != tag:
            pass                                        # meta and br have no end

    def handle_data(self, data):
        if any(found.get("class") == "story" for _, found in self.open):
            self.stories[-1] += data
            if "data-tip" in self.open[-1][1]:
                self.tokens[-1][-1][0] += data


def page_of(path: Path, *args) -> Page:
    result = run_captured("sample", "--checkpoint", path, "--max_new_tokens", 30, *args,
                          "--show_probs=new/folder/page.html")
    assert result.returncode == 0, result.stderr
    return Page(Path("new/folder/page.html").read_text(encoding="utf-8"))


def test_page_has_stories_and_token_probabilities(byte_checkpoint):
    page, generator = page_of(byte_checkpoint, "--prompt", EVIL, "--num_samples", 2), TextGenerator(byte_checkpoint)
    done, head = generator.completions([EVIL] * 2, 30), generator.tokenizer.encode_prompt(EVIL)
    assert page.stories == [escape_control_chars(EVIL + one.text) for one in done] and done[0].text != done[1].text
    for one, found in zip(done, page.tokens, strict=True):
        read = generator.read(head + one.tokens, 5)
        for (_, _, lines), token in zip(found, read, strict=True):
            assert lines[0] == quote_piece(token.piece)
            assert float(lines[1].split()[1].rstrip("%")) == pytest.approx(100 * math.exp(token.logprob), abs=0.006)
            assert float(lines[2].split()[1]) == pytest.approx(token.logprob, abs=0.002)
            top = [f"{format_percent(chance)}  {quote_piece(piece)}" for piece, chance in token.top_tokens]
            assert lines[4:] == top
            assert len(lines) == 4 + 5
        given = ["prompt" in kinds for _, kinds, _ in found]
        assert given == [True] * (len(head) - 1) + [False] * len(one.tokens)
        assert [text for text, _, _ in found if "\u732b" in text] == ["\u732b"]     # once, though it is three tokens


def test_page_without_echo_has_no_prompt(byte_checkpoint):
    page = page_of(byte_checkpoint, "--prompt", EVIL, "--no_echo")
    assert page.stories == [escape_control_chars(TextGenerator(byte_checkpoint).completions([EVIL], 30)[0].text)]
    assert len(page.tokens[0]) == 30


def test_nothing_in_the_page_is_executed_or_fetched(byte_checkpoint):
    page = page_of(byte_checkpoint, "--prompt", EVIL, "--stop", "<img src=x onerror=alert(1)>")
    assert page.tags == {"html", "head", "meta", "title", "style", "body", "h1", "p", "span", "br", "article", "footer"}
    assert {name for name, _ in page.attributes} == {"lang", "charset", "name", "content", "http-equiv", "class",
                                                     "tabindex", "data-tip"}
    source = Path("new/folder/page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in source and "stop &lt;img src=x onerror=alert(1)&gt;" in source
    assert not re.search(r"url\(|@import|https?:", source)


def test_attributes_are_escaped():
    source = '<p class="story">' + token_span("x", Token('">\u2581<b>', -1.0, [('" onfocus="a()', 0.5)])) + "</p>"
    page = Page(source)
    assert page.tags == {"p", "span"} and {name for name, _ in page.attributes} == {"class", "tabindex", "data-tip"}
    assert page.tokens[0][0][2][::4] == ["'\"> <b>'", " 50.00%  '\" onfocus=\"a()'"]


def test_average_and_colours(byte_checkpoint):
    generator, one = TextGenerator(byte_checkpoint), Completion("", text="ab c")
    one.tokens = generator.tokenizer.encode("ab c")
    chances = [0.005, 0.03, 0.1, 0.3, 0.6, 0.9][:len(one.tokens)]
    one.logprobs = [math.log(chance) for chance in chances]
    source = story_html(generator, one, "", echo=True)
    loss = -sum(one.logprobs) / len(chances)
    assert f"Generated: {len(chances)} tokens, loss {loss:.4f}, perplexity {math.exp(loss):.2f}<" in source
    assert "Prompt:" not in source and len(chances) > 2
    assert [kinds for _, kinds, _ in Page(source).tokens[0]] == [[f"p{level}"] for level in range(len(chances))]


def test_tokens_below_80_percent_have_colors_in_both_themes_and_the_others_none():
    style, legend = PAGE.read_text(encoding="utf-8").split("</style>")
    levels = [str(level) for level in range(len(LEVELS))]
    colors = re.findall(r"--p(\d): (#\w{6});", style)
    assert [level for level, _ in colors] == 2 * levels and len({color for _, color in colors}) == len(colors)
    assert re.findall(r"\.p(\d) \{ background: var\(--p(\d)\)", style) == list(zip(levels, levels))
    assert re.findall(r'<span class="p(\d)">', legend) == levels
    assert "<span>80 to 100%: no color</span>" in legend


def test_end_token_has_no_text(byte_checkpoint):
    generator, one = TextGenerator(byte_checkpoint), Completion("", text="ab", stop_reason="stop")
    one.tokens = generator.tokenizer.encode("abc")
    one.logprobs = [-1.0] * len(one.tokens)
    page = Page(story_html(generator, one, "", echo=True))
    assert page.stories == ["ab"] and len(page.tokens[0]) == len(one.tokens)


def test_first_token_without_bos_has_no_probability(byte_checkpoint):
    generator, one = TextGenerator(byte_checkpoint), Completion("abc" + EVIL, text="\nab")
    generator.tokenizer.bos_id = -1
    one.tokens, one.logprobs = generator.tokenizer.encode("x\nab")[-2:], [-1.0] * 2
    ids, page = generator.tokenizer.encode(one.prompt), Page(story_html(generator, one, "", echo=True))
    assert page.stories == ["abc" + EVIL + "\nab"] and generator.tokenizer.decode(ids[:1])
    assert len(page.tokens[0]) == len(ids) - 1 + 2


def test_character_is_shown_at_its_last_token(byte_checkpoint):
    tokenizer = TextGenerator(byte_checkpoint).tokenizer
    head = tokenizer.encode_prompt("a")
    ids = tokenizer.encode_prompt("a\u732bb")[len(head):]
    assert token_texts(tokenizer, head, ids) == ["", "", "\u732b", "b"]
    assert token_texts(tokenizer, head, ids[:2]) == ["", "\ufffd" * 2] and token_texts(tokenizer, head, []) == []


@pytest.mark.parametrize("given, listed", [([], True), (["True"], True), (["False"], False), (["perhaps"], None)])
def test_page_needs_a_file_name(byte_checkpoint, given, listed):
    command = ["sample", "--checkpoint", byte_checkpoint, "--prompt", "ab", "--max_new_tokens", 5]
    result = run_captured(*command, "--show_probs", *given)
    if listed is None:
        assert_user_error(result, "--show_probs must be True, False or the name of a page, such as output/probs.html")
    else:
        assert ("likeliest:" in result.stdout) is listed and not list(Path().iterdir())
        assert listed or result.stdout == run_captured(*command).stdout


def test_full_disk_keeps_the_old_page(byte_checkpoint, monkeypatch):
    Path("page.html").write_text("old", encoding="utf-8")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    command = ["sample", "--checkpoint", byte_checkpoint, "--prompt", "ab", "--max_new_tokens", 5]
    result = run_captured(*command, "--show_probs", "page.html")
    assert_user_error(result, "No space left on device: page.html")
    assert result.stdout == run_captured(*command).stdout
    assert [path.name for path in Path().iterdir()] == ["page.html"] and Path("page.html").read_text() == "old"


def test_no_alternatives_beyond_the_context(byte_checkpoint, monkeypatch, capsys):
    generator, one = TextGenerator(byte_checkpoint), Completion("")
    one.tokens, one.logprobs = [97] * 264, [-1.0] * 264
    cfg = SimpleNamespace(echo=True, show_probs=True)
    print_token_table(generator, one, cfg)
    lines = [line.split("likeliest: ")[1] for line in capsys.readouterr().out.splitlines() if "likeliest:" in line]
    assert len(lines) == 264 and all(lines[:256]) and not any(lines[256:])
