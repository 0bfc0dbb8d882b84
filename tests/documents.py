"""The blocks of code in a Markdown document, and what is said there about running them.

A block has a language. Right before a ``python`` or ``console`` block an HTML comment may say more, which
readers do not see:

- ``<!-- not run: REASON -->``: the block cannot run where tests do.
- ``<!-- before`` and lines of Python, ``-->``: they run first.
- ``<!-- here: SEEN = REAL -->``, any number of them: from this block on, what reads SEEN is REAL.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt

if TYPE_CHECKING:
    from pathlib import Path

RUN = ("python", "console")
SHOWN = ("sh", "text", "toml", "yaml", "json", "ini", "gbnf", "http", "dockerfile", "markdown", "powershell")
"""Languages of blocks that show something; ``sh``: commands to copy that set a machine up."""


@dataclass(frozen=True)
class Block:
    """A block of code: its language, its content, and the line in which the content begins, from 1."""

    language: str
    content: str
    line: int
    reason: str | None = None
    """Why it is not run; None: it is."""
    before: str = ""
    """Python to run first."""
    here: tuple[tuple[str, str], ...] = ()
    """What is something else here than in the document."""


def blocks(text: str) -> list[Block]:
    """All blocks of a document, but for directives of MyST (``{toctree}``)."""
    found: list[Block] = []
    comment = ""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "html_block":
            comment += token.content
            continue
        if token.type == "fence" and not token.info.startswith("{"):
            assert token.map is not None
            found.append(_block(token.info, token.content, token.map[0] + 2, comment))
        comment = ""
    return found


def _block(language: str, content: str, line: int, comment: str) -> Block:
    reason, before, here = None, "", []
    for said in re.findall(r"<!--(.*?)-->", comment, re.DOTALL):
        kind, _, rest = said.strip().partition("\n" if said.strip().startswith("before") else ":")
        if kind == "not run":
            reason = rest.strip()
        elif kind == "before":
            before += rest + "\n"
        elif kind == "here":
            here += [(seen.strip(), real.strip()) for seen, _, real in [rest.partition(" = ")]]
        elif language in RUN:
            raise ValueError(f"line {line}: a comment before a block says {kind!r}, which nothing reads")
    return Block(language, content, line, reason, before, tuple(here))


@dataclass(frozen=True)
class Command:
    """A command of a ``console`` block: on which machine, what, what it is shown to write, and its line."""

    machine: str
    text: str
    output: str
    line: int


def commands(block: Block) -> list[Command]:
    """The commands behind the prompts of a block, ``$`` or ``NAME$``."""
    found: list[Command] = []
    continues = False
    for number, line in enumerate(block.content.splitlines(), block.line):
        prompt = re.match(r"([\w-]*)\$ +(.*)", line)
        if prompt and not continues:
            found.append(Command(prompt[1], prompt[2], "", number))
        elif not found:
            raise ValueError(f"line {number}: a block of commands begins without a prompt: {line!r}")
        elif continues:
            last = found.pop()
            found.append(Command(last.machine, f"{last.text}\n{line}", "", last.line))
        else:
            last = found.pop()
            found.append(Command(last.machine, last.text, f"{last.output}{line}\n", last.line))
        continues = line.endswith("\\") and not found[-1].output
    return found


def read(path: Path) -> list[Block]:
    """The blocks of a file."""
    return blocks(path.read_text(encoding="utf-8"))
