"""A page of the documentation, run as a reader would: its blocks from top to bottom, in a folder of its own.

- **Files**: ``big.gguf``, ``main.gguf`` and so on are the embedded pair (:data:`FILES`).
- **Python** blocks share a namespace, in which ``sllm`` is imported already.
- **Commands** run in bash with ``sllm`` and ``python`` on the path. Each name before a prompt (``big$``) is a
  machine: it has a state folder and an address of its own, for which ``0.0.0.0`` stands. What a command is
  shown to write is compared (``...`` and the words of :data:`ANYTHING` match anything).
- **Servers** (:data:`SERVERS`) go on until the page ends, or another one begins at the same port of the same
  machine. The line that one is shown to print stands for the line that it printed wherever it comes again;
  the file ``NAME.line`` holds it, or ``worker.line`` where the prompt has no name.
- ``10.0.0.N`` is an address of the loopback network.
- ``http://host:8000/v1`` is an engine on loopback, as vLLM speaks.
"""

from __future__ import annotations

import ast
import asyncio
import doctest
import inspect
import itertools
import os
import re
import shlex
import subprocess
import sys
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from documents import commands
from fake_engine import FakeEngine
from processes import environment

import sllm
from sllm import embedded
from sllm.engine.handle import Closing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path
    from types import TracebackType

    from documents import Block, Command

__all__ = ["FILES", "PageSession"]

FILES = {
    "big.gguf": embedded.TARGET,
    "big-q8_0.gguf": embedded.TARGET,
    "main.gguf": embedded.TARGET,
    "target.gguf": embedded.TARGET,
    "model.gguf": embedded.TARGET,
    "small.gguf": embedded.DRAFT,
    "small-q8_0.gguf": embedded.DRAFT,
    "draft.gguf": embedded.DRAFT,
    "grader.gguf": embedded.TARGET,
    "grader.profile.json": embedded.TARGET_PROFILE,
}
SERVERS = re.compile(r"sllm (worker(?! token)|rpc-server|serve)\b")
ANYTHING = ("TOKEN", "HOST", "FINGERPRINT", "KEY", r"\d{4}-\d\d-\d\dT[\d:]+Z", r"(?<=127\.0\.0\.1:)\d+")
"""What is another in each run, in what a command is shown to write; patterns."""
ADDRESS = "sllm://TOKEN@HOST:50051#sha256=FINGERPRINT"
"""What stands for the line of the newest worker, also on a page that shows none."""
ENGINE = "http://host:8000/v1"
SECONDS = 90.0
"""A command may take so long."""

_pages = itertools.count(1)


class PageSession:
    """Runs blocks; a context manager that ends the servers and closes what was opened.

    Args:
        name: of the page, for what goes wrong.
        folder: an empty one, in which commands and Python run.

    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self._namespace: dict[str, Any] = {"sllm": sllm, "__name__": "page"}
        self._net = f"127.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
        self._here = [("10.0.0.", f"{self._net}.")]
        self._servers: dict[tuple[str, str], Callable[[], object]] = {}
        self._machines: dict[str, str] = {}
        self._page = next(_pages)
        self._stack = ExitStack()

    def __enter__(self) -> PageSession:
        """Put the files in their places."""
        for name, path in FILES.items():
            (self.folder / name).symlink_to(path)
        programs = self.folder / ".programs"
        programs.mkdir()
        for name, module in (("sllm", "-m sllm "), ("python", ""), ("python3", "")):
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module}"$@"\n')
            program.chmod(0o755)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what blocks have opened and left open, the newest first, and end the servers."""
        with self._stack:
            for end in self._servers.values():
                self._stack.callback(end)
            for value in reversed(list(self._namespace.values())):
                if isinstance(value, Closing):
                    value.close()

    def run(self, blocks: Iterable[Block]) -> int:
        """Run those that are to be run; return how many that were."""
        n_run = 0
        for block in blocks:
            self._here += block.here
            if block.reason is not None or block.language not in ("python", "console"):
                continue
            n_run += 1
            self._python(block.before, block.line, hidden=True)
            if block.language == "python":
                self._python(block.content, block.line)
            else:
                for command in commands(block):
                    self._command(command)
        return n_run

    def _real(self, text: str) -> str:
        """The text with what is something else here in its place, the newest meaning first."""
        if ENGINE in text and not any(seen == ENGINE for seen, _ in self._here):
            model = self._stack.enter_context(sllm.Model(embedded.TARGET))
            self._here.append((ENGINE, self._stack.enter_context(FakeEngine(model, "vllm", n_ctx=512)).url))
        if ADDRESS in text and not any(seen == ADDRESS for seen, _ in self._here):
            worker = self._stack.enter_context(sllm.Worker(embedded.TARGET))
            self._here.append((ADDRESS, worker.uri))
        done: set[str] = set()
        for seen, real in reversed(self._here):
            if seen not in done:
                text = text.replace(seen, real)
                done.add(seen)
        return text

    def _python(self, text: str, line: int, *, hidden: bool = False) -> None:
        if not text.strip():
            return
        where = f"{self.name}, {'before ' if hidden else ''}line {line}"
        tree = ast.parse(self._real(text), where)
        code = compile(
            ast.increment_lineno(tree, line - 1),
            where,
            "exec",
            ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
            dont_inherit=True,
        )
        try:
            awaited = eval(code, self._namespace)
            if inspect.iscoroutine(awaited):
                asyncio.run(awaited)
        except Exception as error:
            if sys.version_info >= (3, 11):
                error.add_note(f"{where}:\n{text}")
            raise

    def _command(self, command: Command) -> None:
        where = f"{self.name}, line {command.line}: {command.text}"
        if SERVERS.match(command.text):
            shown, wrote, noted = command.output, self._serve(command), ""
        else:
            ended = subprocess.run(
                ["bash", "-c", self._on(command.machine, command.text)],
                capture_output=True,
                cwd=self.folder,
                encoding="utf-8",
                env=self._environment(command.machine),
                stdin=subprocess.DEVNULL,
                timeout=SECONDS,
                check=False,
            )
            wrote, noted = ended.stdout, ended.stderr
            shown, _, status = command.output.partition("[exit ")
            assert ended.returncode == int(status.rstrip("]\n") or 0), f"{where}\n{noted}"
        if not shown.strip():
            return
        expected = re.sub(r"(?<=sllm://TOKEN@)\w(?=:)", "HOST", shown)
        expected = re.sub("|".join(ANYTHING), "...", expected)
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        check = doctest.OutputChecker().check_output
        if not check(expected, wrote, flags) and not check(expected, wrote + noted, flags):
            pytest.fail(f"{where}\nshown:\n{shown}\nwritten:\n{wrote}{noted}", pytrace=False)

    def _on(self, machine: str, text: str) -> str:
        """A command as it runs on a machine: at that machine's address."""
        number = self._page * 10 + len(self._machines)
        address = self._machines.setdefault(machine, f"{self._net}.{number % 240 + 10}")
        return self._real(text).replace("0.0.0.0", address)

    def _environment(self, machine: str) -> dict[str, str]:
        return environment(
            PATH=f"{self.folder / '.programs'}{os.pathsep}{os.environ['PATH']}",
            HOME=str(self.folder),
            SLLM_STATE=str(self.folder / f".state-{machine}"),
        )

    def _serve(self, command: Command) -> str:
        """Start a server; return the first line that it writes to stdout."""
        port = re.search(r"--(?:listen|host) \S+", command.text)
        place = command.machine, port[0] if port else ""
        self._servers.pop(place, bool)()
        process = subprocess.Popen(
            ["bash", "-c", f"exec {self._on(command.machine, command.text)}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            encoding="utf-8",
            env=self._environment(command.machine),
        )
        assert process.stdout is not None

        def end() -> None:
            process.terminate()
            process.communicate(timeout=SECONDS)

        self._servers[place] = end
        late = threading.Timer(SECONDS, process.kill)
        late.start()
        line = process.stdout.readline()
        late.cancel()
        assert line, f"{self.name}, line {command.line}: {command.text} ended, or wrote nothing"
        (self.folder / f"{command.machine or 'worker'}.line").write_text(line)
        names = {command.output.strip()} | ({ADDRESS} if line.startswith("sllm://") else set())
        self._here += [(name, line.strip()) for name in names if name]
        return line
