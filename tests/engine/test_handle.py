"""What ``close()``, ``with`` and a forgotten object mean, for all that holds something outside Python."""

from __future__ import annotations

import gc
import os
import threading
import warnings

import pytest

from sllm import ClosedError
from sllm.engine.handle import Closing, join


class Thing(Closing):
    def __init__(self, log: list[str], *, fails: bool = False) -> None:
        self._log = log
        if fails:
            raise ValueError("no thing")
        self._closed = False
        super().__init__()

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        if self._closed or self._in_fork:
            return
        self._closed = True
        self._log.append("closed")

    def use(self) -> None:
        self._check_open()

    def __repr__(self) -> str:
        return "<thing>"


def test_it_is_closed_once_and_not_used_after_that() -> None:
    log: list[str] = []
    with Thing(log) as thing:
        thing.use()
        assert not thing.closed and log == []
    thing.close()
    assert log == ["closed"]
    with pytest.raises(ClosedError, match="Thing is closed"):
        thing.use()
    with pytest.raises(ClosedError, match="Thing is closed"), thing:
        pass


def test_it_says_that_it_is_closed() -> None:
    thing = Thing([])
    thing.close()
    assert thing.closed


def test_a_forgotten_one_warns_and_is_closed() -> None:
    log: list[str] = []
    thing = Thing(log)
    with pytest.warns(ResourceWarning, match="unclosed <thing>"):
        del thing
    assert log == ["closed"]


def test_one_that_was_never_made_is_not_complained_about() -> None:
    log: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="no thing"):
            Thing(log, fails=True)
        gc.collect()
    assert log == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_can_neither_use_nor_close_it() -> None:
    log: list[str] = []
    reader, writer = os.pipe()
    with Thing(log) as thing:
        pid = os.fork()
        if pid == 0:
            try:
                thing.use()
                said = "used"
            except ClosedError as error:
                said = str(error)
            thing.close()
            os.write(writer, f"{said}; {log}".encode())
            os._exit(0)
        os.waitpid(pid, 0)
        said = os.read(reader, 4096).decode()
        assert f"Thing belongs to process {os.getpid()} and was used in its fork {pid}" in said
        assert said.endswith("; []")
        thing.use()
    os.close(reader)
    os.close(writer)


def test_a_thread_that_was_never_started_is_not_waited_for() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    join(thread)  # Ctrl-C came in Thread.start()
    thread.start()
    join(thread, 0.01)
    assert thread.is_alive()
    done.set()
    join(thread)
    assert not thread.is_alive()
