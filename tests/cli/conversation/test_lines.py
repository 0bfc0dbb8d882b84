"""What is typed, and the messages that it makes."""

from __future__ import annotations

import io
import stat
import sys
from typing import TYPE_CHECKING

import pytest

from sllm.cli.console import Output
from sllm.cli.conversation import lines
from sllm.cli.conversation.lines import PipedLines, message_of, unfinished

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("typed", "goes_on", "message"),
    [
        ("Hi", False, "Hi"),
        ("Hi \\", True, None),
        ("Hi \\\nthere", False, "Hi \nthere"),
        (r"C:\\", False, r"C:\\"),
        ('"""', True, None),
        ('"""""', True, None),
        ('""""""', False, ""),
        ('"""one', True, None),
        ('"""one\\\n', True, None),
        ('"""\none\n\ntwo\n"""', False, "one\n\ntwo"),
        ('"""one"""', False, "one"),
        ('say """one', False, 'say """one'),
        ("第一行\\\n第二行", False, "第一行\n第二行"),
    ],
)
def test_messages_of_several_lines(typed: str, goes_on: bool, message: str | None) -> None:
    assert unfinished(typed) is goes_on
    if message is not None:
        assert message_of(typed) == message


def test_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = '从前\r\n\nHi \\\nthere\n"""\none\n\ntwo"""\n"""cut off\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
    piped = PipedLines()
    read = [piped.read() for _ in range(6)]
    assert read == ["从前", "", "Hi \\\nthere", '"""\none\n\ntwo"""', '"""cut off', None]
    assert message_of(str(read[4])) == "cut off"
    monkeypatch.setattr(sys, "stdin", None)  # closed by the caller
    assert piped.read() is None


def test_a_long_history_loses_its_older_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("prompt_toolkit")
    monkeypatch.setattr(lines, "_MOST_HISTORY_BYTES", 1000)
    path = tmp_path / "new" / "history"
    kept = lines._kept_history(path, Output())
    for i in range(100):
        kept.store_string(f"message {i}\nand more")
    assert len(path.read_bytes()) > 1000
    path.chmod(0o644)
    again = list(lines._kept_history(path, Output()).load_history_strings())
    assert again[0] == "message 99\nand more"
    assert 5 <= len(again) < 50
    assert all(entry.endswith("\nand more") for entry in again)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.unlink()
    path.parent.rmdir()
    kept.store_string("nowhere to write it")  # is no reason to end a conversation
    assert capfd.readouterr().err == ""
