"""Plain English: product code and English docs stay free of phrases that readers stumbled over."""
import io
import re
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

PHRASES = {
    "a clause as a noun": r"\bwhat(?:ever)?\b(?![^.;:]*\?)",
    "go on": r"\b(?:go|goes|going|gone|went) on\b",
    "a pronoun for a noun": r"\b(?:that|those) of\b(?! the\b.*\bis\b)|\bof others\b|\bas of\b",
    "an odd word": r"\banew\b|\bmend(?:s|ed|ing)?\b|\bpolite\w*|\bfor want of\b|\bwant of\b|\bat hand\b|\bby heart\b|\bput aside\b"}


def comments_and_strings(path: Path) -> list[tuple[int, str]]:
    source = io.StringIO(path.read_text(encoding="utf-8"))
    kinds = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
    return [(token.start[0], token.string) for token in tokenize.generate_tokens(source.readline) if token.type in kinds]


def texts() -> list[tuple[str, int, str]]:
    """Return (file, line, text) of all English that a person reads."""
    code = [path for folder in (".", "tinyllm", "extras", "extras/formats", "tools") for path in (ROOT / folder).glob("*.py")]
    found = [(path.relative_to(ROOT).as_posix(), *part) for path in code for part in comments_and_strings(path)]
    pages = [path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / ".github" / "CONTRIBUTING.md",
                               *ROOT.glob("*/README.md"), ROOT / "quickstart.sh"] if "zh-CN" not in path.name]
    for path in pages:
        lines = path.read_text(encoding="utf-8").split("\n")
        found += [(path.relative_to(ROOT).as_posix(), number, line) for number, line in enumerate(lines, 1)]
    return found
