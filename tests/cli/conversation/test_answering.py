"""Reading an answer: what comes is shown, and a Ctrl-C ends it wherever it is."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from remote_worker import n_threads, wait_until

import sllm
from sllm.cli.conversation.answering import read_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sllm.generation.text_stream import Run


def run(text: str) -> Run:
    return sllm.Run(0, (1,), text, 0, "target")


class Scripted:
    """Says some words, and then does what a test wants it to."""

    n_ctx: int | None = None

    def __init__(self, then: Callable[[Scripted], None] = lambda _: None) -> None:
        self.cancelled = threading.Event()
        self.n_cancelled = 0
        self._then = then

    def runs(self, messages: Any, attempt: int) -> Iterator[Run]:
        yield run("Once ")
        yield run(f"upon {attempt}")
        self._then(self)

    def cancel(self) -> None:
        self.n_cancelled += 1
        self.cancelled.set()

    def message(self) -> None:
        return None

    def n_tokens(self, messages: Any) -> int:
        return 1

    def status(self) -> list[str]:
        return []

    def details(self) -> list[str]:
        return []

    def begin_anew(self) -> None:
        pass


def wait_for_cancel(answers: Scripted) -> None:
    assert answers.cancelled.wait(60)
    raise sllm.CancelledError("cancelled")


def read(
    answers: Scripted, press: Callable[[str], None] = lambda _: None, *, interruptible: bool = True
) -> tuple[bool, str]:
    texts: list[str] = []

    def show(one: Run) -> None:
        texts.append(one.text)
        press(one.text)

    before = signal.getsignal(signal.SIGINT)
    complete = read_answer(answers, [], 2, show, interruptible=interruptible)
    assert signal.getsignal(signal.SIGINT) is before
    return complete, "".join(texts)


def ctrl_c(text: str) -> None:
    if text.startswith("upon"):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    wait_until(lambda: n_threads("sllm-answer") == 0)


def test_an_answer_is_shown_as_it_comes() -> None:
    answers = Scripted()
    assert read(answers) == (True, "Once upon 2")
    assert answers.n_cancelled == 0


def test_what_it_ends_with_is_raised() -> None:
    def broken(_: Scripted) -> None:
        raise sllm.RemoteError("lost")

    with pytest.raises(sllm.RemoteError, match="lost"):
        read(Scripted(broken))


def test_ctrl_c_ends_it() -> None:
    assert read(Scripted(wait_for_cancel), ctrl_c) == (False, "Once upon 2")


def test_ctrl_c_is_repeated_where_what_it_is_for_had_not_begun() -> None:
    def not_yet(answers: Scripted) -> None:
        assert answers.cancelled.wait(60)
        answers.cancelled.clear()  # it was for something that is over
        wait_for_cancel(answers)

    answers = Scripted(not_yet)
    assert read(answers, ctrl_c) == (False, "Once upon 2")
    assert answers.n_cancelled >= 2


def test_an_answer_that_ends_just_then_is_interrupted_all_the_same() -> None:
    def ends(answers: Scripted) -> None:
        assert answers.cancelled.wait(60)

    assert read(Scripted(ends), ctrl_c)[0] is False


def test_what_cannot_be_cancelled_is_left_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from sllm.cli.conversation import answering

    monkeypatch.setattr(answering, "_PATIENCE_SECONDS", 0.2)
    go = threading.Event()
    main = threading.get_ident()

    def stuck(_: Scripted) -> None:
        time.sleep(0.5)
        signal.pthread_kill(main, signal.SIGINT)  # pressed again
        assert go.wait(60)

    try:
        with pytest.raises(KeyboardInterrupt):
            read(Scripted(stuck), ctrl_c)
        assert n_threads("sllm-answer") == 1
    finally:
        go.set()


def test_what_fails_to_be_shown_ends_it() -> None:
    answers = Scripted(wait_for_cancel)

    def full(_text: str) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        read(answers, full)
    assert answers.n_cancelled


def test_without_a_person_ctrl_c_is_an_interrupt() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            read(Scripted(wait_for_cancel), ctrl_c, interruptible=False)
    finally:
        signal.signal(signal.SIGINT, before)
