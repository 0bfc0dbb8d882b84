"""Comments and docstrings: paragraphs are wrapped once, and say what they mean in the words of the field."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 110  # of ruff's E501
SLACK = 20
"""A line that ends so much sooner than the next word would fit was wrapped once and edited since."""

RIDDLES = (r"\bthat (is|are) none\b(?! of)", r"\bwho is none\b", r"\b(is|are) told now\b")

KINDS = (".py", ".h", ".c", ".hpp", ".cpp")
FOLDERS = ("sllm", "csrc", "benchmarks", "examples", "training", "vendor/llama.cpp", "docs")
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in KINDS and not {"source", "build"} & set(path.parts) and "_pb2" not in path.stem
)
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="no source tree here")


def blocks(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each docstring and each run of comment lines: the number of its first line, and its lines."""
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    if path.suffix != ".py":
        for match in re.finditer(r"/\*.*?\*/", text, re.DOTALL):
            shown = [re.sub(r"^\s*(/\*|\*)?( |$)|\*/$", "", line).rstrip() for line in match[0].split("\n")]
            yield text.count("\n", 0, match.start()) + 1, shown
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.lineno, lines[node.lineno - 1 : node.end_lineno]
    run: list[int] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        number = token.start[0]
        if token.type == tokenize.COMMENT and lines[number - 1].lstrip().startswith("# "):
            if run and number != run[-1] + 1:
                yield run[0], [lines[i - 1] for i in run]
                run = []
            run.append(number)
    if run:
        yield run[0], [lines[i - 1] for i in run]


def wrapped_twice(first: int, lines: list[str]) -> Iterator[str]:
    """Lines of a paragraph that end long before the next word would not fit."""
    code: int | None = None  # the indent of what announced a block of code
    for number, (here, below) in enumerate(pairwise(lines), first):
        indent = len(here) - len(here.lstrip(" #"))
        if code is not None and here.strip() and indent <= code:
            code = None
        if here.rstrip().endswith("::"):
            code = indent
        content, word = below.strip(" #"), below.strip(" #").split(" ")[0]
        if code is not None or not here.strip(" #") or not word[:1].islower():
            continue
        same = indent == len(below) - len(below.lstrip(" #")) or (number == first and path_is_doc(here))
        special = re.match(r"[\w, ]+:( |$)", content) or "  " in here.strip() or "  " in content
        if same and not special and len(here) + 1 + len(word) <= WIDTH - SLACK:
            yield f"line {number}: {here.strip()!r} goes on with {content!r}"


def path_is_doc(line: str) -> bool:
    """Whether a docstring begins here, whose first line the quotes indent."""
    return line.lstrip().startswith('"""')


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_paragraphs_are_wrapped_once_and_are_no_riddles(path: Path) -> None:
    found = list(blocks(path))
    assert [fault for first, lines in found for fault in wrapped_twice(first, lines)] == []
    said = [line for _, lines in found for line in lines for riddle in RIDDLES if re.search(riddle, line)]
    assert said == []


@pytest.mark.parametrize(
    ("name", "text", "n_faults"),
    [
        ("a.py", '"""A line that was wrapped by somebody once\nand again.\n"""\n', 1),
        ("a.py", '"""What it does::\n\n    with code:\n    in it\n"""\n', 0),
        ("a.py", "# a comment that was cut\n# in two\n", 1),
        ("a.py", "# one\n\n# and another\n", 0),
        ("a.py", f'"""{"word " * 20}\nand more.\n"""\n', 0),
        ("a.h", "/* One that was cut\n * in the middle. */\n", 1),
        ("a.h", "int a; /* one */\nint b; /* another */\n", 0),
    ],
)
def test_what_was_wrapped_twice_is_found(tmp_path: Path, name: str, text: str, n_faults: int) -> None:
    (tmp_path / name).write_text(text)
    found = list(blocks(tmp_path / name))
    assert len([fault for first, lines in found for fault in wrapped_twice(first, lines)]) == n_faults
