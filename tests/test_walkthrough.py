"""Run every Python block of docs/, one session per page, and compare the output with the page."""
import io
import re
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT

ENGLISH, CHINESE, SCALING = (ROOT / "docs" / name for name in ("walkthrough.md", "walkthrough.zh-CN.md", "scaling.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXTRA = ("matplotlib", "safetensors")       # a block that imports one of these is left out where it is missing


class Block(NamedTuple):
    """A fenced block: its language, the number of its first line in the page, its text."""
    kind: str
    line: int
    text: str


def blocks(page: str) -> list[Block]:
    return [Block(match[1], page.count("\n", 0, match.start(2)) + 1, match[2]) for match in FENCE.finditer(page)]


def is_missing(package: str, code: str) -> bool:
    return bool(re.search(rf"^\s*(import|from) {package}\b", code, re.MULTILINE)) and find_spec(package) is None


def printed(block: Block, path: Path, names: dict[str, Any]) -> str:
    """Run a block; a traceback shows the lines of the page."""
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile("\n" * (block.line - 1) + block.text, str(path), "exec"), names)
    return out.getvalue()


def check(path: Path) -> int:
    """Run a page, compare each output with the `text` block that follows, and return the number of blocks."""
    found, names, ran = blocks(path.read_text(encoding="utf-8")), {"__name__": "walkthrough"}, 0
    for block, following in zip(found, [*found[1:], Block("", 0, "")]):
        if block.kind != "python" or any(is_missing(package, block.text) for package in EXTRA):
            continue
        got, want = printed(block, path, names), following.text if following.kind == "text" else ""
        if got != want:
            pytest.fail(f"{path.name}:{block.line}: the block prints\n{got}\nbut the page says\n{want}", pytrace=False)
        ran += 1
    return ran


@pytest.fixture
def one_thread():
    """Use one thread, as for the pages' numbers, and restore torch's settings afterwards."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    torch.set_grad_enabled(True)


def test_session_prints_the_page(one_thread):
    assert check(ENGLISH) > 25


def test_the_formulas_of_the_page_about_scaling():
    assert check(SCALING) == 3


def test_the_chinese_page_has_the_same_session():
    english, chinese = ([(block.kind, block.text) for block in blocks(path.read_text(encoding="utf-8"))]
                        for path in (ENGLISH, CHINESE))
    for number, (one, other) in enumerate(zip(english, chinese), 1):
        assert one == other, f"block {number}"
    assert len(english) == len(chinese)


@pytest.mark.parametrize("path", [ENGLISH, CHINESE], ids=lambda path: path.name)
def test_links_exist_and_fences_are_closed(path):
    page = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", FENCE.sub("", page)) if "://" not in link]
    assert len(links) > 5 and not [link for link in links if not (path.parent / link).exists()]
    assert page.count("```") == 2 * len(blocks(page))
    assert (path.parent / "sampling.png").stat().st_size < 60_000


@pytest.mark.parametrize("claim, line", [("2", 0), ("3", 4)])
def test_different_output_is_reported_with_its_line(claim, line):
    page = f"# One\n\n```python\na = 1\nprint(a + 1)\n```\n```text\n{claim}\n```\n"
    Path("page.md").write_text(page, encoding="utf-8")
    if line == 0:
        assert check(Path("page.md")) == 1
    else:
        with pytest.raises(pytest.fail.Exception, match=f"page.md:{line}: the block prints\n2\n"):
            check(Path("page.md"))


def test_block_without_its_package_is_skipped(monkeypatch):
    page = "```python\nfrom safetensors import torch\n```\n```text\nnot so\n```\n"
    Path("page.md").write_text(page, encoding="utf-8")
    monkeypatch.setattr("test_walkthrough.find_spec", lambda package: None)
    assert check(Path("page.md")) == 0


def test_an_error_points_to_its_line_in_the_page():
    Path("page.md").write_text("# One\n\n```python\na = 1\n\n1 / 0\n```\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError) as found:
        check(Path("page.md"))
    assert (found.traceback[-1].path.name, found.traceback[-1].lineno + 1) == ("page.md", 6)
