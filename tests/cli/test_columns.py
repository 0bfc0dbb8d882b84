"""How wide text is in a terminal, and where its lines end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm.cli import console
from sllm.cli.columns import Wrapper, width, wrapped


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("", 0),
        ("abc", 3),
        ("小狐狸", 6),
        ("，。", 4),
        ("e\u0301", 1),  # a combining accent
        ("a\u200bb", 2),  # a space of no width
        ("ｱ", 1),  # a half-width katakana
        ("Ａ", 2),  # a full-width letter
    ],
)
def test_width(text: str, columns: int) -> None:
    assert width(text) == columns


@pytest.mark.parametrize(
    ("text", "columns", "lines"),
    [
        ("one two three", 7, ["one two", "three"]),
        ("one two three", 8, ["one two", "three"]),
        ("one  two", 8, ["one  two"]),
        ("a\n\nb", 8, ["a", "", "b"]),
        ("abcdefgh ij", 4, ["abcd", "efgh", "ij"]),
        ("小狐狸住在山上", 6, ["小狐狸", "住在山", "上"]),
        ("小狐狸，住", 6, ["小狐", "狸，住"]),  # no line begins with a comma
        ("他说（好）", 6, ["他说", "（好）"]),  # or ends with an opening bracket
        ("用 GGUF 文件", 8, ["用 GGUF", "文件"]),
        ("GGUF文件", 6, ["GGUF文", "件"]),
        ("", 5, [""]),
    ],
)
def test_where_lines_end(text: str, columns: int, lines: list[str]) -> None:
    assert wrapped(text, columns) == lines


def test_what_a_paragraph_begins_with() -> None:
    assert wrapped("one two three", 12, "sent: ") == ["sent: one", "      two", "      three"]
    assert wrapped("x", 1, "sent: ") == ["sent: x"]  # there is no room, and it is written all the same


TEXTS = st.text(alphabet="ab 小，。（）\n\u0301", max_size=60)


@given(st.lists(TEXTS, max_size=6), st.integers(2, 20))
def test_pieces_make_the_same_lines(pieces: list[str], columns: int) -> None:
    written: list[str] = []
    wrapper = Wrapper(lambda text, _style: written.append(text), columns)
    for piece in pieces:
        wrapper(piece)
    wrapper.end()
    lines = "".join(written).split("\n")
    assert lines == wrapped("".join(pieces), columns)
    assert all(width(line) <= columns for line in lines)
    # Nothing but space is lost.
    assert "".join("".join(pieces).split()) == "".join("".join(lines).split())


def test_styles_stay_with_their_text() -> None:
    written: list[tuple[str, str]] = []
    wrapper = Wrapper(lambda text, style: written.append((text, style)), 6)
    wrapper("on", "green")
    wrapper("e two", "")
    wrapper(" 三", "green")
    wrapper.end()
    assert written == [("on", "green"), ("e", ""), ("\n", ""), ("two", ""), (" 三", "green")]


# ---- tables

ROWS = [("", "n", "what"), ("小熊", "10", "a word and another one that is long"), ("b", "2", "short")]


def test_table_counts_columns() -> None:
    assert console.table(ROWS, right=(1,)) == [
        "       n  what",
        "小熊  10  a word and another one that is long",
        "b      2  short",
    ]


def test_table_wraps_its_last_column() -> None:
    assert console.table(ROWS, right=(1,), columns=36) == [
        "       n  what",
        "小熊  10  a word and another one",
        "          that is long",
        "b      2  short",
    ]


def test_table_without_room() -> None:
    assert console.table(ROWS, right=(1,), columns=20) == [
        "小熊",
        "n: 10",
        "what: a word and",
        "another one that is",
        "long",
        "b",
        "n: 2",
        "what: short",
    ]
