"""Child processes: what they tell, how they end, and that nothing is left of them."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from remote_worker import n_threads, wait_until
from rpc_endpoints import gone

from sllm.rpc.child import Child, ChildEndedError, ParentLink

# ---- what the children run -------------------------------------------------------------------------------


def echo(parent: int, **options: Any) -> None:
    link = ParentLink(parent)
    print("this goes to stderr")
    link.send(options)
    link.send({"pid": os.getpid(), "parent": os.getppid(), "said": parent})
    time.sleep(600)


def answer(parent: int) -> None:
    link = ParentLink(parent, lambda message: link.send({"heard": message}))
    link.send("ready")
    time.sleep(600)


def fail(parent: int, words: str) -> None:
    ParentLink(parent)
    raise ValueError(words)


def stuck(parent: int) -> None:
    """Neither listens to its parent nor to signals that can be ignored."""
    link = ParentLink.__new__(ParentLink)
    link._stdout = os.dup(1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    link.send("ready")
    time.sleep(600)


# ---- tests -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the children import this module: their path is that of their parent."""
    monkeypatch.syspath_prepend(Path(__file__).parent)


def test_a_child_gets_its_options_and_tells_things() -> None:
    options = {"text": "你好 \n \udc80", "number": 1.5, "list": [None, True]}
    with Child("test_child:echo", options) as child:
        assert child.receive() == options
        assert child.receive() == {"pid": child.pid, "parent": os.getpid(), "said": os.getpid()}
        with pytest.raises(TimeoutError, match=r"nothing for 0\.05 s"):
            child.receive(0.05)
    assert gone(child.pid) and not child.alive
    assert n_threads("sllm-child") == 0
    child.close()


def test_a_child_is_told_things() -> None:
    with Child("test_child:answer", {}) as child:
        assert child.receive(60) == "ready"
        messages = [{"text": "你好 \n"}, 1, "x" * 3000, [None], "y" * 10_000]
        for message in messages:
            child.send(message)
        assert [child.receive(60)["heard"] for _ in messages] == messages
        os.kill(child.pid, signal.SIGKILL)
        assert child.has_ended(60)
        child.send("nobody hears this")
    child.send("nor this")
    assert gone(child.pid)


def test_the_exit_reason_of_a_child() -> None:
    with Child("test_child:fail", {"words": "no good"}) as child:
        with pytest.raises(ChildEndedError, match=f"{child.pid} ended with status 1: ValueError: no good"):
            child.receive()
        assert child.has_ended(10)
    with Child("test_child:echo", {}) as child:
        assert child.receive() == {} and child.receive()
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(ChildEndedError, match="ended by signal 9: this goes to stderr"):
            child.receive()
    with Child("no_such_module:f", {}) as child, pytest.raises(ChildEndedError, match="No module named"):
        child.receive()


def test_a_child_that_does_not_listen_is_killed() -> None:
    with Child("test_child:stuck", {}) as child:
        assert child.receive() == "ready"
        assert not child.has_ended(0.05)
    assert gone(child.pid)


def test_a_stopped_child_is_killed() -> None:
    with Child("test_child:echo", {}) as child:
        child.receive()
        os.kill(child.pid, signal.SIGSTOP)
    assert gone(child.pid)


def test_a_forgotten_child_ends_with_a_warning() -> None:
    child = Child("test_child:echo", {})
    child.receive()
    pid = child.pid
    with pytest.warns(ResourceWarning, match=f"unclosed child process {pid}"):
        del child
    wait_until(lambda: gone(pid))


def test_what_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="JSON"):
        Child("test_child:echo", {"object": object()})
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(ChildEndedError, match="no Python"):
        Child("test_child:echo", {})
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(FileNotFoundError):
        Child("test_child:echo", {})
