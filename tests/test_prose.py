"""The English of product code and docs stays free of phrases that readers stumbled over."""
import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

PHRASES = {
    "a clause as a noun": r"\bwhat(?:ever)?\b(?![^.;:\n]*\?)",
    "go on": r"\b(?:go|goes|going|gone|went) on\b",
    "a pronoun for a noun": r"\b(?:that|those|these) of\b|\bof others\b|\bas of\b(?! November)",
    "an odd word": r"\banew\b|\bmend(?:s|ed|ing)?\b|\bpolite\w*|\bwant of\b|\bat hand\b|\bby heart\b|\bput aside\b"}
EXCEPTIONS = ("What to expect", "what-to-expect", "and what was expected", "and what you expected")
PAGES = ["*.md", "docs/*.md", "data/README.md", "output/README.md", "extras/README.md", ".github/CONTRIBUTING.md",
         "quickstart.sh", "test.sh", "requirements*.txt"]
CODE = ["*.py", "tinyllm/*.py", "extras/*.py", "extras/formats/*.py", "tools/*.py"]


def files(patterns: list[str]) -> list[Path]:
    return [path for pattern in patterns for path in ROOT.glob(pattern) if "zh-CN" not in path.name]


def comments_and_strings(path: Path) -> list[str]:
    """Return comments, in blocks, and strings, with adjacent ones joined."""
    source = path.read_text(encoding="utf-8")
    comments, end = [""], 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            comments[-1:] = [f"{comments[-1]} {text}"] if token.start[0] == end + 1 else [comments[-1], text]
            end = token.start[0]
    strings = [node.value for node in ast.walk(ast.parse(source))
               if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return comments + strings


def texts(path: Path) -> list[str]:
    return comments_and_strings(path) if path.suffix == ".py" else [path.read_text(encoding="utf-8")]


def findings(text: str) -> list[str]:
    for exception in EXCEPTIONS:
        text = text.replace(exception, "")
    text = re.sub(r"\s+", " ", text)
    return [f"{kind}: ...{text[max(match.start() - 40, 0):match.end() + 40]}..."
            for kind, phrase in PHRASES.items() for match in re.finditer(phrase, text, re.IGNORECASE)]


def test_no_phrase_that_readers_stumbled_over():
    found = [f"{path.relative_to(ROOT).as_posix()}: {finding}" for path in files(PAGES) + files(CODE)
             for text in texts(path) for finding in findings(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("sentence", ["It prints what fits.", "The run goes on with it.", "like that of Llama",
                                      "learned by heart", "Begin anew."])
def test_each_phrase_is_found(sentence):
    assert findings(sentence)


def docstrings() -> list[tuple[str, str]]:
    """Return (place, first line) of the docstrings of functions and classes."""
    found = []
    for path in files(CODE):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
                place = f"{path.relative_to(ROOT).as_posix()}:{node.lineno} {node.name}"
                found.append((place, ast.get_docstring(node).split("\n")[0]))
    return found


NO_VERBS = "A|An|The|This|That|These|Whether|What|Which|How|Where|It|In|Of|For|As|No|All|One|Its|If|When|With|Without"


def test_docstrings_of_functions_begin_with_a_verb():
    wrong = [f"{place}: {line}" for place, line in docstrings() if re.match(rf"(?:{NO_VERBS})\b", line)]
    assert not wrong, "\n".join(wrong)
