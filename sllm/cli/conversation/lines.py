"""Where the messages of a conversation are typed, or come from.

A message is a line, or several: where a line ends with a backslash the next one belongs to it, and everything
between three double quotes and the next three is one message. On a terminal prompt_toolkit edits it, with a
history, and what is pasted is one message as well.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

from sllm.cli.console import expected_utf8
from sllm.engine.handle import join
from sllm.extras import needs
from sllm.folders import make_private_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sllm.cli.console import Output

__all__ = ["Lines", "PipedLines", "message_of", "open_lines", "unfinished"]

_BLOCK = '"""'
_PROMPT, _MORE = "> ", ". "

_AGAIN_SECONDS = 0.05
"""After which a Ctrl-C is sent on once more."""

_MOST_HISTORY_BYTES = 1_000_000
"""A longer history loses its older half when a conversation begins."""


class Lines(Protocol):
    """Gives messages, one after the other."""

    def read(self) -> str | None:
        """The next message as it was typed; None: there are no more.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            CommandError: what comes is no text.

        """


def unfinished(text: str) -> bool:
    """Whether what was typed goes on in the next line."""
    stripped = text.strip()
    if stripped.startswith(_BLOCK):
        return len(stripped) < 2 * len(_BLOCK) or not stripped.endswith(_BLOCK)
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


def message_of(text: str) -> str:
    """What a message says, without the marks that it was typed with."""
    stripped = text.strip()
    if stripped.startswith(_BLOCK):
        return stripped.removeprefix(_BLOCK).removesuffix(_BLOCK).strip("\n")
    return text.replace("\\\n", "\n")


def open_lines(out: Output, history: Path | None, commands: Sequence[str]) -> Lines:
    """Messages from this process's terminal; from stdin, where that is a pipe or a file.

    Args:
        out: where it is said that something is missing.
        history: the file that keeps what was typed; None: it is forgotten.
        commands: words that Tab completes.

    """
    if sys.stdin is None or not sys.stdin.isatty():
        return PipedLines()
    try:
        return _EditedLines(history, commands, out)
    except ImportError as error:
        out.note(f"sllm: {error} (until then lines are edited as this Python does, and not kept)")
        return _PlainLines()


class PipedLines:
    """Messages from stdin, from a file or another program."""

    def read(self) -> str | None:
        """See :meth:`Lines.read`; what is unfinished at the end of stdin is a message as it is."""
        text = self._line()
        while text is not None and unfinished(text.removesuffix("\n")):
            more = self._line()
            if more is None:
                break
            text += more
        return None if text is None else text.removesuffix("\n").removesuffix("\r")

    def _line(self) -> str | None:
        if sys.stdin is None:
            return None
        with expected_utf8("stdin"):
            return sys.stdin.buffer.readline().decode("utf-8") or None


class _PlainLines:
    """Messages from a terminal, by Python's own line editor."""

    def __init__(self) -> None:
        with suppress(ImportError):  # not every Python has it
            import readline  # noqa: F401

    def read(self) -> str | None:
        """See :meth:`Lines.read`."""
        with _interrupted_in_any_case():
            try:
                text = input(_PROMPT)
                while unfinished(text):
                    text += "\n" + input(_MORE)
            except EOFError:
                return None
            return text


@contextmanager
def _interrupted_in_any_case() -> Iterator[None]:
    """Around ``input()``: one Ctrl-C raises KeyboardInterrupt, whenever it comes.

    CPython's ``input()`` looks for signals when one breaks off its wait for a key (``Modules/readline.c``,
    ``Parser/myreadline.c``). One that comes after the prompt is shown and before it waits, or on another
    thread, is not noticed before the next key. So a thread hears of signals by ``signal.set_wakeup_fd`` and
    sends this one on to the main thread until it has been noticed.
    """
    done = threading.Event()
    main = threading.get_ident()
    told, tells = os.pipe()
    os.set_blocking(tells, False)

    def interrupt(_number: int, _frame: object) -> None:
        if not done.is_set():
            done.set()
            raise KeyboardInterrupt

    def send_on() -> None:
        while not done.is_set():
            if signal.SIGINT in os.read(told, 64):
                while not done.wait(_AGAIN_SECONDS):
                    signal.pthread_kill(main, signal.SIGINT)

    sender = threading.Thread(target=send_on, name="sllm-interrupts", daemon=True)
    sender.start()
    told_before = signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(told_before)
        os.write(tells, b"\0")
        join(sender)
        signal.signal(signal.SIGINT, before)  # what was sent on and not noticed comes before that
        os.close(told)
        os.close(tells)


class _EditedLines:
    """Messages from a terminal, by prompt_toolkit.

    Raises:
        ImportError: it is not installed; says what to type.

    """

    def __init__(self, history: Path | None, commands: Sequence[str], out: Output) -> None:
        with needs("chat"):
            from prompt_toolkit import PromptSession
            from prompt_toolkit.completion import WordCompleter
            from prompt_toolkit.history import InMemoryHistory
            from prompt_toolkit.output import create_output
        self._session: Any = PromptSession(
            history=InMemoryHistory() if history is None else _kept_history(history, out),
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation=_MORE,
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            output=create_output(always_prefer_tty=True),  # where stdout is a file, stderr may be a terminal
        )

    def read(self) -> str | None:
        """See :meth:`Lines.read`."""
        try:
            text: str = self._session.prompt(_PROMPT)
        except EOFError:
            return None
        return text


def _keys() -> Any:
    """Enter sends what is finished and begins a line where it is not; Alt-Enter begins one."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if unfinished(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")  # what a terminal makes of it that was typed before there was a prompt
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _kept_history(path: Path, out: Output) -> Any:
    """The history in a file that this user alone can read; in memory, where there can be no such file."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk is no reason to lose the conversation
                super().store_string(string)

    try:
        make_private_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            os.fchmod(descriptor, 0o600)
            _shorten(file)
    except OSError as error:
        out.note(f"sllm: {path}: {error.strerror}; what is typed is not kept")
        return InMemoryHistory()
    return Kept(str(path))


def _shorten(file: Any) -> None:
    """Keep the newer half of a history that has grown long, from the beginning of an entry on."""
    data: bytes = file.read()
    if len(data) <= _MOST_HISTORY_BYTES:
        return
    begin = data.find(b"\n# ", len(data) - _MOST_HISTORY_BYTES // 2)
    file.seek(0)
    file.write(data[begin:] if begin >= 0 else b"")
    file.truncate()
