"""Commands and messages: what each does to the conversation, and what is said of what cannot be."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

import sllm
from sllm.cli.console import Output
from sllm.cli.conversation.talk import COMMANDS, Talk
from sllm.cli.conversation.transcript import Transcript
from sllm.generation.text_stream import RunStream

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sllm.generation.text_stream import Run


class Echo:
    """Says what it is asked, or raises what a test wants it to after a part of that."""

    n_ctx: int | None = None

    def __init__(self) -> None:
        self.asked: list[tuple[list[dict[str, Any]], int]] = []
        self.error: Exception | None = None
        self.kind = "text"
        self.tokens_each: int | None = 10
        self.n_begun = 0

    def runs(self, messages: Sequence[Any], attempt: int) -> Iterator[Run]:
        self._stream = RunStream(self._runs(messages, attempt), ExitStack())
        yield from self._stream

    def message(self) -> dict[str, str]:
        return self._stream.message

    def _runs(self, messages: Sequence[Any], attempt: int) -> Iterator[Run]:
        self.asked.append((list(messages), attempt))
        text = messages[-1]["content"]
        if self.error is not None and text == "fail":
            raise self.error
        yield sllm.Run(0, (1,), "hm ", 0, "target", kind="reasoning")
        local = sllm.Run(0, (1,), "wrong", 0, "local")
        yield local
        yield sllm.Run(0, (1,), text, 0, "target", (local,), kind=self.kind)  # type: ignore[arg-type]
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        pass

    def n_tokens(self, messages: Sequence[Any]) -> int:
        if self.tokens_each is None:
            raise sllm.UnsupportedModelError("no template")
        return self.tokens_each * len(messages)

    def status(self) -> list[str]:
        return ["fast"]

    def details(self) -> list[str]:
        return ["figure"] if self.asked else []

    def begin_anew(self) -> None:
        self.n_begun += 1


class Typed:
    """Keys that are pressed; a KeyboardInterrupt among them is Ctrl-C."""

    def __init__(self, *keys: Any) -> None:
        self._keys = list(keys)

    def read(self) -> str | None:
        key = self._keys.pop(0) if self._keys else None
        if isinstance(key, BaseException):
            raise key
        return key


def talk(echo: Echo, *keys: Any, interactive: bool = True) -> tuple[Transcript, bool]:
    transcript = Transcript()
    made = Talk(Typed(*keys), echo, Output(), transcript, interactive=interactive, max_tokens=None)
    by_itself = made.run()
    return made._transcript, by_itself


def notes(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return [line.removeprefix("sllm: ") for line in capfd.readouterr().err.splitlines()]


def test_messages_and_answers(capfd: pytest.CaptureFixture[str]) -> None:
    echo = Echo()
    transcript, by_itself = talk(echo, "one", "", "  ", " /two", '"""\nthree\nfour"""', "/etc/fstab:\nx")
    assert by_itself
    assert [turn.message for turn in transcript.turns] == ["one", " /two", "three\nfour", "/etc/fstab:\nx"]
    assert all(turn.answer == turn.message and turn.reasoning == "hm " for turn in transcript.turns)
    assert echo.asked[1][0][:2] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "one", "reasoning_content": "hm "},
    ]
    shown = capfd.readouterr()
    assert shown.out.startswith("hm one\nhm  /two\n")
    assert shown.err == ""  # figures are for terminals


def test_an_error_costs_an_answer(capfd: pytest.CaptureFixture[str]) -> None:
    echo = Echo()
    echo.error = sllm.RemoteError("the worker\nis lost")
    transcript, _ = talk(echo, "half", "fail")
    # What there was of an answer stays; a message without any goes.
    assert [(turn.message, turn.answer) for turn in transcript.turns] == [("half", "half")]
    assert notes(capfd) == ["the worker is lost"] * 2
    echo.error = ZeroDivisionError("oops")
    talk(echo, "fail")
    assert notes(capfd) == ["ZeroDivisionError: oops (unexpected; SLLM_DEBUG=1 shows where)"]
    # One that has not begun has nothing of the one before it.
    echo = Echo()
    made = Talk(Typed(), echo, Output(), Transcript(), interactive=True, max_tokens=None)
    made.take("one")
    echo.n_ctx, echo.tokens_each = 100, None
    made.take("two")
    assert [turn.message for turn in made._transcript.turns] == ["one"]
    assert notes(capfd) == ["no template"]
    echo = Echo()
    echo.error = sllm.ContextFullError("400 tokens, and the context holds 256")
    talk(echo, "fail")
    assert notes(capfd) == [f"{echo.error}; a shorter message, /clear or a larger --n-ctx helps"]


def test_retry_and_undo(capfd: pytest.CaptureFixture[str]) -> None:
    echo = Echo()
    transcript, _ = talk(echo, "/retry", "/undo", "one", "two", "/retry", "/retry", "three", "/undo")
    assert [turn.message for turn in transcript.turns] == ["one", "two"]
    assert [(len(messages), attempt) for messages, attempt in echo.asked] == [
        *((1, 0), (3, 0), (3, 1), (3, 2), (5, 0))
    ]
    assert notes(capfd) == ["there is no message yet", "there is nothing to take back", "taken back: three"]
    # What got no answer is asked again as it was.
    echo = Echo()
    echo.error = sllm.RemoteError("lost")
    made = Talk(Typed(), echo, Output(), Transcript(), interactive=True, max_tokens=None)
    made.take("fail")
    echo.error = None
    made.take("/retry")
    assert [attempt for _, attempt in echo.asked] == [0, 0]
    assert [turn.answer for turn in made._transcript.turns] == ["fail"]


def test_an_answer_that_is_all_thought_is_none(capfd: pytest.CaptureFixture[str]) -> None:
    echo = Echo()
    echo.kind, echo.error = "reasoning", sllm.RemoteError("lost")
    transcript, _ = talk(echo, "one")
    assert transcript.turns == []
    echo.error = None  # at its end, it is what the model has said
    transcript, _ = talk(echo, "one")
    assert (transcript.turns[0].answer, transcript.turns[0].reasoning) == ("", "hm one")


def test_the_other_commands(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    echo = Echo()
    path = tmp_path / "my talk.json"
    keys = ("/system", "/system Be brief.", "one", f"/save {path}", "/clear", "two", f"/load {path}", "three")
    transcript, _ = talk(echo, *keys, "/system none", "/stats", "/exit", "never")
    assert [turn.message for turn in transcript.turns] == ["one", "three"]
    assert transcript.system is None
    assert echo.n_begun == 2
    assert [len(messages) for messages, _ in echo.asked] == [2, 2, 4]
    shown = capfd.readouterr()
    assert shown.out.endswith("figure\n")
    assert [line.removeprefix("sllm: ") for line in shown.err.splitlines()] == [
        "system: none",
        "system: Be brief.",
        f"1 turn in {path}",
        "a new conversation",
        f"1 turn from {path}",
        "system: none",
    ]
    talk(echo, "/help")
    told = capfd.readouterr().out
    assert all(name in told for name in COMMANDS)
    assert max(map(len, told.splitlines())) <= 80


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("/hlep", "/hlep is no command; was /help meant?"),
        ("/quit", "/quit is no command; was /exit meant?"),
        ("/Retry", "/Retry is no command; was /retry meant?"),
        ("/", "/ is no command; /help lists those there are."),
        ("/etc/passwd says what?", "A message that begins with / needs a space before it."),
        ("/save", "/save needs the name of a file"),
        ("/undo twice", "/undo takes nothing after it"),
        ("/load missing.json", "missing.json: No such file or directory"),
        ("/save missing/talk.json", "missing/talk.json"),
        ("/stats", "there is no answer yet"),
    ],
)
def test_wrong_commands(
    typed: str,
    words: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    echo = Echo()
    transcript, _ = talk(echo, typed)
    told = notes(capfd)
    assert len(told) == 1 and words in told[0]
    assert transcript.turns == [] and echo.asked == []


def test_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    press = KeyboardInterrupt()
    assert talk(Echo(), "one", press, "two", press, press, "three")[1] is False
    assert len(notes(capfd)) == 2
    assert talk(Echo(), "one", press, interactive=False)[1] is False
    assert notes(capfd) == []
    assert talk(Echo(), "/exit")[1] is True


def test_the_oldest_turns_leave_with_a_notice(capfd: pytest.CaptureFixture[str]) -> None:
    echo = Echo()
    echo.n_ctx = 100
    transcript, _ = talk(echo, *"abcdefgh")
    assert len(transcript.turns) == 8
    assert max(len(messages) for messages, _ in echo.asked) == 7
    told = notes(capfd)
    assert told[0] == "the context of 100 positions is full; left out from here on: the oldest 2 turns"
    assert len(told) == 2
