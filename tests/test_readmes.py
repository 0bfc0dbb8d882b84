"""Documents in two languages say the same: headings, code, links, tables and names agree."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

ROOT = Path(__file__).parents[1]
PAIRS = (
    (ROOT / "README.md", ROOT / "README.zh.md"),
    *(
        (ROOT / "docs" / page, ROOT / "docs" / "zh" / page)
        for page in ("faq.md", "tutorials/chat.md", "tutorials/tunnel.md")
    ),
)
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="no source tree here")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@dataclass
class Parts:
    """What of a document does not depend on its language, in the order in which it stands there."""

    headings: list[str] = field(default_factory=list)
    """Their levels: ``h1``, ``h2``, ..."""
    titles: list[str] = field(default_factory=list)
    code: list[tuple[str, str]] = field(default_factory=list)
    """Language and content of each block."""
    links: list[str] = field(default_factory=list)
    """Of links and pictures."""
    tables: list[tuple[int, int]] = field(default_factory=list)
    """Rows and cells of each."""
    items: list[int] = field(default_factory=list)
    """Of each list."""
    spans: list[str] = field(default_factory=list)
    """Code within text."""
    texts: list[str] = field(default_factory=list)


def parts(text: str) -> Parts:
    found = Parts()
    for node in SyntaxTreeNode(MarkdownIt("commonmark").enable("table").parse(text)).walk():
        if node.type == "heading":
            found.headings.append(node.tag)
            found.titles.append(node.children[0].content)
        elif node.type == "fence":
            found.code.append((node.info, node.content))
        elif node.type == "link":
            found.links.append(str(node.attrs["href"]))
        elif node.type == "image":
            found.links.append(str(node.attrs["src"]))
        elif node.type == "table":
            rows = [row for half in node.children for row in half.children]
            found.tables.append((len(rows), sum(len(row.children) for row in rows)))
        elif node.type in ("bullet_list", "ordered_list"):
            found.items.append(len(node.children))
        elif node.type == "code_inline":
            found.spans.append(node.content)
        elif node.type == "text":
            found.texts.append(node.content)
    return found


def read(path: Path) -> Parts:
    """The parts of a file, with its links as they are from the top of the repository."""
    found = parts(path.read_text(encoding="utf-8"))
    folder = path.parent.relative_to(ROOT)
    found.links = [link if "://" in link else posixpath.normpath(folder / link) for link in found.links]
    return found


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: pair[0].stem)
def pair(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    found: tuple[Path, Path] = request.param
    return found


@pytest.fixture(scope="module")
def english(pair: tuple[Path, Path]) -> Parts:
    return read(pair[0])


@pytest.fixture(scope="module")
def chinese(pair: tuple[Path, Path]) -> Parts:
    return read(pair[1])


def test_the_headings_have_the_same_levels(english: Parts, chinese: Parts) -> None:
    assert len(english.headings) > 5
    assert english.headings == chinese.headings


def test_headings_that_name_the_same_thing_stand_in_the_same_places(
    pair: tuple[Path, Path], english: Parts, chinese: Parts
) -> None:
    """A title that is a name in both languages is the same line of the outline."""
    shared = [title for title in english.titles if title in chinese.titles]
    assert shared or pair[0].parent.name == "tutorials"  # whose titles are sentences
    for title in shared:
        assert english.titles.index(title) == chinese.titles.index(title)


def test_the_code_is_the_same(english: Parts, chinese: Parts) -> None:
    assert english.code
    assert english.code == chinese.code


def test_each_links_to_the_other_first(pair: tuple[Path, Path], english: Parts, chinese: Parts) -> None:
    first = [ROOT / english.links[0], ROOT / chinese.links[0]]
    assert first == [pair[1], pair[0]]


def test_the_links_lead_to_the_same_places(english: Parts, chinese: Parts) -> None:
    """A Chinese page may lead to another one, and says where its readers begin."""
    same = [link.replace("docs/zh/", "docs/").replace("README.zh.", "README.") for link in chinese.links[1:]]
    if "README.md" not in english.links[1:] and "README.md" in same:
        same.remove("README.md")
    assert english.links[1:] == same


@pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="a source distribution has no benchmarks and no training"
)
@pytest.mark.parametrize("path", [path for pair in PAIRS for path in pair], ids=name)
def test_linked_files_are_there(path: Path) -> None:
    links = read(path).links
    files = [link for link in links if "://" not in link]
    assert len(files) > 5
    assert [link for link in files if not (ROOT / link.partition("#")[0]).is_file()] == []


def test_tables_and_lists_have_the_same_size(english: Parts, chinese: Parts) -> None:
    assert english.tables == chinese.tables
    assert english.items == chinese.items


def test_the_same_names_and_commands_are_mentioned(english: Parts, chinese: Parts) -> None:
    """Options, functions and files in the text; sentences may name one of them once more in one language."""
    assert set(english.spans) == set(chinese.spans)


@pytest.mark.parametrize("path", [path for pair in PAIRS for path in pair], ids=name)
def test_nothing_is_left_of_the_marks_for_emphasis(path: Path) -> None:
    """Between Chinese punctuation and a character, ``**`` does not end what it began."""
    assert [text for text in parts(path.read_text(encoding="utf-8")).texts if "**" in text] == []


def test_parts_of_a_text() -> None:
    found = parts(
        "# One\n\n[a](b.md) `c` **d。**e\n\n## Two\n\n- x\n- y\n\n  | 1 | 2 |\n  |---|---|\n  | 3 | 4 |\n\n"
        "```sh\n# f\n```\n"
    )
    assert found.headings == ["h1", "h2"]
    assert found.titles == ["One", "Two"]
    assert found.code == [("sh", "# f\n")]
    assert found.links == ["b.md"]
    assert found.tables == [(2, 4)]
    assert found.items == [2]
    assert found.spans == ["c"]
    assert any("**" in text for text in found.texts)
