"""What the commands write, and how: text to stdout, notes to stderr, figures for people."""

from __future__ import annotations

import errno
import io
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from sllm.cli.columns import width, wrapped
from sllm.engine.model_name import looks_like_model
from sllm.errors import SllmError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "DIM",
    "DIM_ITALIC",
    "GREEN",
    "RED",
    "YELLOW",
    "CommandError",
    "Output",
    "Progress",
    "WriteError",
    "count",
    "expected_utf8",
    "hide_tokens",
    "one_line",
    "paragraph",
    "parameters",
    "read_prompt",
    "reason",
    "size",
    "table",
]

GREEN, YELLOW, RED, DIM, DIM_ITALIC = "\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[2m", "\x1b[2;3m"
_RESET = "\x1b[0m"
_COLUMNS = 80
_LAST_COLUMN = 24  # of a table: where it would be narrower, the rows are written one below the other

# Lines end up in logs and bug reports, where others see them.
_TOKEN = re.compile(r"(?<=sllm://)[^@\s]*(?=@)")

# Text of a model or a file must not control the terminal that shows it.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


class CommandError(SllmError):
    """The command line asks for something that cannot be done."""


class WriteError(Exception):
    """Stdout accepts no more text."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.reader_gone = error.errno == errno.EPIPE
        self.reason = error.strerror or str(error)


class Output:
    """The one place that writes: the answer to stdout, at once, and notes of one line to stderr."""

    def __init__(self) -> None:
        # Where a descriptor was closed by the caller (`>&-`), Python has None.
        self._out: TextIO | None = sys.stdout
        self._err: TextIO | None = sys.stderr
        if isinstance(self._out, io.TextIOWrapper):
            self._out.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
        self.terminal = self._out is not None and self._out.isatty()
        self.colour = self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._line_open = False

    @property
    def columns(self) -> int:
        """How wide a line is to be at most: 80, or what a narrower terminal has."""
        return max(1, min(_COLUMNS, shutil.get_terminal_size().columns)) if self.terminal else _COLUMNS

    @property
    def shows_chinese(self) -> bool:
        """Whether Chinese characters can be written to stdout; where not, each of them is a "?"."""
        try:
            "中文".encode(getattr(self._out, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            return False
        return True

    def text(self, text: str, *, style: str = "") -> None:
        """Write to stdout; ``style`` is a terminal's escape sequence, used only where colours are wanted.

        Raises WriteError where stdout is closed, full, or its reader is gone.
        """
        if not text or self._out is None:
            return
        if self.terminal:
            text = text.translate(_CONTROLS)
        self._line_open = not text.endswith("\n")
        if style and self.colour:
            text = f"{style}{text}{_RESET}"
        try:
            self._out.write(text)
            self._out.flush()
        except OSError as error:
            self.give_up()
            raise WriteError(error) from error

    def line(self, text: str = "") -> None:
        """Write a line to stdout."""
        self.text(f"{text}\n")

    def paragraph(self, text: str, first: str = "") -> None:
        """Write text in lines that fit, with ``first`` before it and as many spaces before the others."""
        for line in wrapped(text, self.columns, first):
            self.line(line)

    def end_line(self) -> None:
        """End the line that is open on stdout, if one is."""
        if self._line_open:
            self.line()

    def note(self, text: str) -> None:
        """Write to stderr; where that fails, there is nowhere to say so."""
        if self._err is not None:
            with suppress(OSError, ValueError):
                if self._line_open and self.terminal and self._err.isatty():
                    text = f"\n{text}"  # both are shown there: not in the middle of a line
                    self._line_open = False
                self._err.write(f"{text}\n")
                self._err.flush()

    def status(self, text: str) -> None:
        """Show what is being done in a line of stderr that the next one replaces, and an empty one removes;
        nothing where stderr is not a terminal, or one that cannot do so.
        """
        if self._err is not None and self._err.isatty() and os.environ.get("TERM") != "dumb":
            with suppress(OSError, ValueError):
                self._err.write(f"\r\x1b[K{text}")
                self._err.flush()

    @property
    def status_columns(self) -> int:
        """How many characters a status line may have."""
        with suppress(OSError, ValueError, AttributeError):
            return max(os.get_terminal_size(self._err.fileno()).columns - 1, 0) or 79  # type: ignore[union-attr]
        return 79

    def flush(self) -> None:
        """Flush what is left in stdout's buffer; raises as :meth:`text` does."""
        try:
            if self._out is not None:
                self._out.flush()
        except OSError as error:
            self.give_up()
            raise WriteError(error) from error

    def give_up(self) -> None:
        """Discard all output from now on, or the interpreter would try to write it at exit, and complain."""
        out, self._out = self._out, None
        with suppress(OSError, ValueError):
            if out is not None:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, out.fileno())
                os.close(nowhere)


class Progress:
    """How far something has come: a bar in one line of stderr that is gone afterwards, on a terminal only.

    Args:
        out: where it is shown.
        what: what is being done, in a few words.
        after: seconds after which it appears; what is done sooner needs none.

    """

    def __init__(self, out: Output, what: str, *, after: float = 0.3) -> None:
        self._out = out
        self._what = one_line(what)
        self._appears = time.monotonic() + after
        self._first: tuple[float, float] | None = None
        self._shown = -1

    def __call__(self, share: float) -> None:
        """Show ``share``, from 0 to 1."""
        now = time.monotonic()
        share = min(max(share, 0.0), 1.0)
        if self._first is None:
            self._first = (now, share)
        percent = int(share * 100)
        if percent == self._shown or now < self._appears:
            return
        self._shown = percent
        began, there = self._first
        left = ""
        if there < share < 1 and now > began + 1:
            left = f", {_clock((now - began) * (1 - share) / (share - there))} left"
        self._out.status(_bar(self._what, percent, left, self._out.status_columns))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._shown >= 0:
            self._out.status("")


_LONGEST_BAR = 40


def _bar(what: str, percent: int, left: str, columns: int) -> str:
    """A line of at most ``columns`` characters; the bar goes first where they are few."""
    end = f" {percent:3} %{left}"
    what = what[: max(columns - len(end), 0)]
    room = min(columns - len(what) - len(end) - 4, _LONGEST_BAR)
    if room < 5:
        return f"{what}{end}"[:columns]
    full = percent * room // 100
    return f"{what}  [{'#' * full}{'-' * (room - full)}]{end}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def read_prompt(words: Sequence[str], command: str, *, model_option: str | None = None) -> str:
    """The prompt of ``sllm COMMAND``, from the command line or from stdin, there without the line end that
    ``echo`` adds.

    Args:
        words: what stands on the command line in its place.
        command: the command.
        model_option: the option that takes a model and has not been used: where a model's name stands in the
            prompt's place, that one is taken to be meant.

    Raises:
        CommandError: there is no prompt, there are several, it is a model's name, or it is not UTF-8.

    """
    if words and model_option is not None and looks_like_model(words[0]):
        model, prompt = shlex.quote(words[0]), shlex.quote(words[1]) if len(words) == 2 else "PROMPT"
        talk = f" (A conversation: `sllm {model}`.)" if len(words) == 1 else ""
        raise CommandError(
            f"{words[0]} names a model, and is where the prompt belongs; was `sllm {command} {model_option}"
            f" {model} {prompt}` meant?{talk} (As a prompt, pipe it into stdin.)"
        )
    if len(words) > 1:
        raise CommandError(f"there are {len(words)} prompts; put the words of one in quotes")
    argument = words[0] if words else None
    if argument is not None and argument != "-":
        with expected_utf8("the prompt"):  # whatever the locale makes Python take an argument for
            return os.fsencode(argument).decode("utf-8")
    if sys.stdin is None or (argument is None and sys.stdin.isatty()):
        raise CommandError(
            "there is no prompt: name one, or pipe it into stdin; for a conversation there is sllm chat"
            f" (see sllm {command} --help)"
        )
    with expected_utf8("stdin"):
        text = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    if not text and argument is None:
        raise CommandError(
            f"there is no prompt: none is named, and stdin is empty (see sllm {command} --help)"
        )
    return text


@contextmanager
def expected_utf8(name: object) -> Iterator[None]:
    """Around reading text from ``name``: where it is not UTF-8, raises a CommandError that says where."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise CommandError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None


def hide_tokens(text: str) -> str:
    """``text`` with the tokens in addresses of workers replaced by dots."""
    return _TOKEN.sub("...", text)


def one_line(text: object) -> str:
    """Text as one line, without a worker's token, and with control characters made visible."""
    return " ".join(hide_tokens(str(text)).split()).translate(_CONTROLS)


def reason(error: Exception) -> str:
    """An exception as one line that needs no knowledge of Python."""
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return one_line(f"{place}{error.strerror}")
    text = one_line(error)
    if isinstance(error, MemoryError):
        return f"out of memory{': ' if text else ''}{text}"
    if text and (isinstance(error, (SllmError, OSError, ValueError, TypeError)) or _names_an_extra(error)):
        return text
    return f"{type(error).__name__}: {text} (unexpected; SLLM_DEBUG=1 shows where)"


def _names_an_extra(error: Exception) -> bool:
    """Whether the message says which package is missing and what to type; see :func:`sllm.extras.needs`."""
    return isinstance(error, ImportError) and isinstance(error.__cause__, ModuleNotFoundError)


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), columns: int | None = None) -> list[str]:
    """Rows in columns, two spaces apart; the columns in ``right`` are aligned there.

    Where ``columns`` is given, no line is wider: the text of the last column is wrapped, and where that does
    not do, each row is written as lines ``heading: cell``.
    """
    widths = [max(width(row[column]) for row in rows) for column in range(len(rows[0]))]
    if columns is not None and sum(widths) + 2 * len(widths) - 2 > columns:
        widths[-1] = columns - sum(widths[:-1]) - 2 * len(widths) + 2
        if widths[-1] < _LAST_COLUMN or len(widths) - 1 in right:
            return _stacked(rows, columns)
    lines = []
    for row in rows:
        last = wrapped(row[-1], widths[-1])
        for n, part in enumerate(last):
            cells = [
                " " * (room - width(cell)) + cell if column in right else cell + " " * (room - width(cell))
                for column, (cell, room) in enumerate(
                    zip([*("" if n else cell for cell in row[:-1]), part], widths, strict=True)
                )
            ]
            lines.append("  ".join(cells).rstrip())
    return lines


def _stacked(rows: Sequence[Sequence[str]], columns: int) -> list[str]:
    """The cells of each row one below the other, behind the headings of the first row."""
    lines = []
    headings, *others = rows
    for row in others:
        for heading, cell in zip(headings, row, strict=True):
            if cell:
                lines += wrapped(f"{heading}: {cell}" if heading else cell, columns)
    return lines


def paragraph(text: str) -> list[str]:
    """The lines of a paragraph, of up to 100 columns."""
    return textwrap.wrap(text, 100, break_on_hyphens=False)


def size(n_bytes: int) -> str:
    """Bytes for people: 5.8 MB."""
    return _scaled(n_bytes, [("B", 1), ("kB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12)])


def parameters(n_params: int) -> str:
    """The number of weights for people: 7.6 B."""
    return _scaled(n_params, [("", 1), ("k", 10**3), ("M", 10**6), ("B", 10**9), ("T", 10**12)])


def _scaled(number: int, units: Sequence[tuple[str, int]]) -> str:
    unit, factor = next(((u, f) for u, f in reversed(units) if number >= f), units[0])
    return f"{number / factor:.1f} {unit}" if factor > 1 else f"{number} {unit}".rstrip()


def count(number: int, what: str, plural: str = "") -> str:
    """So many of something: 1 token, 2 tokens."""
    return f"{number} {what if number == 1 else plural or f'{what}s'}"
