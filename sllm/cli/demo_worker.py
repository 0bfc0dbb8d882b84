"""The worker of ``sllm demo``, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sllm.cli.console import CommandError
from sllm.cli.signals import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["demo_worker"]


@contextmanager
def demo_worker(pass_seconds: float, n_threads: int) -> Iterator[str]:
    """Start a worker on the embedded target, and yield its address.

    The worker ends when this process ends, however it ends: the worker's stdin ends with it.

    Args:
        pass_seconds: how long each pass of the worker is to take at least.
        n_threads: its CPU threads.

    Raises:
        CommandError: the worker did not start; the message says why.

    """
    options = ["--listen", "127.0.0.1:0", "--sessions", "1", "--drain", "0", "--until-eof"]
    options += ["--pass-seconds", str(pass_seconds), "--threads", str(n_threads)]
    with tempfile.TemporaryFile() as stderr_file:
        # The folder holds token and certificate, which a running worker does not look at again.
        with tempfile.TemporaryDirectory(prefix="sllm-demo-") as state:
            command = [sys.executable, "-m", "sllm", "worker", *options, "--state", state]
            child = None
            try:
                with uninterrupted():
                    child = subprocess.Popen(
                        command,
                        cwd=state,  # not here: a checkout has a folder sllm/ that is not what is installed
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=stderr_file,
                        start_new_session=True,  # a Ctrl-C in the terminal is for this process alone
                    )
                assert child.stdout is not None
                uri = child.stdout.readline().decode("utf-8", "replace").strip()
            except BaseException:
                if child is not None:
                    _end(child, at_once=True)
                raise
        try:
            if not uri:
                child.wait()
                stderr_file.seek(0)
                lines = stderr_file.read().decode("utf-8", "replace").splitlines()
                reason = lines[-1].removeprefix("sllm: ") if lines else f"exit status {child.returncode}"
                raise CommandError(f"the demo's worker did not start: {reason}")
            yield uri
        except BaseException:
            _end(child, at_once=True)
            raise
        _end(child, at_once=False)


def _end(child: subprocess.Popen[bytes], *, at_once: bool) -> None:
    if at_once:
        child.terminate()  # not kill(): its socket is in a folder that it removes
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
