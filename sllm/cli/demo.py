"""``sllm demo``: a worker, a slow link and a draft on one machine, and what each way over the link brings.

After it :mod:`sllm.cli.demo_triage` shows with the same worker who answers what, and what leaves the
machine.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import sllm
from sllm import embedded
from sllm.cli.console import GREEN, CommandError, count, one_line, parameters, size, table
from sllm.cli.demo_triage import show_triage
from sllm.cli.remote import quiet_grpc
from sllm.cli.slow_link import Link
from sllm.draft.drafters import ModelDrafter
from sllm.engine import exact
from sllm.engine.cpu import available_cores
from sllm.remote.connection import connect
from sllm.wire.auth import Address

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from sllm.cli.console import Output
    from sllm.generation.text_stream import Run
    from sllm.remote.connection import Remote

__all__ = ["DRAFT_SECONDS", "PASS_SECONDS", "PROMPT", "demo"]

PROMPT = "Tell me a short story about a little fox called Oscar who makes a wish."

PASS_SECONDS = 0.030
"""What a pass of a large model on a GPU takes."""

DRAFT_SECONDS = 0.010
"""What a token of a small model on a laptop takes."""

_WAIT_DRAFT = 8
"""Tokens that draft-then-wait drafts at a time."""

_FAILED = 1

_STREAMING = "cloud streaming"


class _PacedDrafter(ModelDrafter):
    """Takes its time for each token, as a larger model does."""

    seconds_per_token = 0.0

    def draft(self, text: Sequence[int], chain: Sequence[int], n_max: int, p_min: float) -> list[int]:
        """See :meth:`~sllm.draft.drafters.Drafter.draft`."""
        began = time.perf_counter()
        tokens = super().draft(text, chain, n_max, p_min)
        time.sleep(max(0.0, began + self.seconds_per_token * len(tokens) - time.perf_counter()))
        return tokens


@dataclass(frozen=True)
class _Told:
    """One way to the demo's text, and what it took."""

    how: str
    tokens: tuple[int, ...]
    n_passes: int = 0
    seconds: float = 0.0
    n_bytes: int = 0

    @property
    def tokens_per_s(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class _Stage:
    """What all ways have in common."""

    remote: Remote
    link: Link
    drafter: _PacedDrafter
    prompt: npt.NDArray[np.int32]
    sampling: sllm.SamplingParams
    max_tokens: int


def demo(args: argparse.Namespace, out: Output) -> int:
    """Show the text arrive, compare the ways, and show who answers what."""
    quiet_grpc()
    sampling = sllm.SamplingParams(temperature=args.temperature, seed=args.seed)
    # Worker and draft work at the same time, and threads that wait by spinning take each other's cores.
    n_threads = args.threads or max(1, min(4, available_cores() // 2))
    with ExitStack() as stack:
        target = stack.enter_context(sllm.Model(embedded.TARGET))
        draft = stack.enter_context(sllm.Model(embedded.DRAFT))
        out.line(f"target: {_model_line(target)}, behind a link of {args.rtt:g} ms round trip")
        out.line(f"draft:  {_model_line(draft)}, on this side of it")
        if not args.unpaced:
            out.line(
                f"pace:   that of large models: each pass of the target takes {PASS_SECONDS * 1e3:.0f} ms and"
                f" each drafted token {DRAFT_SECONDS * 1e3:.0f} ms (see --unpaced)"
            )
        uri = stack.enter_context(_worker(0.0 if args.unpaced else PASS_SECONDS, n_threads))
        address = Address.parse(uri)
        link = stack.enter_context(Link((address.host, address.port), delay=args.rtt / 2e3))
        remote = stack.enter_context(
            connect(replace(address, host=link.host, port=link.port).uri, timeout=30)
        )
        drafter = stack.enter_context(_PacedDrafter(draft, n_threads=n_threads))
        drafter.seconds_per_token = 0.0 if args.unpaced else DRAFT_SECONDS
        prompt = remote.chat([{"role": "user", "content": args.prompt}])
        stage = _Stage(remote, link, drafter, prompt, sampling, args.max_tokens)
        # Untimed: the first text pays for pages, graphs and code that the others find ready.
        _pipelined("warm-up", replace(stage, max_tokens=min(args.max_tokens, 8)), draft=True)

        out.text("green" if out.colour else "[in brackets]", style=GREEN)
        out.line(": drafted here, and accepted by the target; everything else is the target's own\n")
        out.line(f"> {one_line(args.prompt)}\n")

        def show(run: Run) -> None:
            drafted = run.source == "draft"
            text = _bracketed(run.text) if drafted and not out.colour else run.text
            out.text(text, style=GREEN if drafted else "")

        ahead = _pipelined("hints + run-ahead", stage, draft=True, show=show)
        out.end_line()
        out.line()
        ways = [
            _pipelined(_STREAMING, stage, draft=False),
            _draft_then_wait("draft, then wait", stage),
            _pipelined("hints", stage, draft=True, run_ahead=False),
            ahead,
        ]
        alone = _alone(target, stage, n_threads)
        for line in _comparison(ways):
            out.line(line)
        for one in ways:
            difference = _difference(one, alone)
            if difference is not None:
                out.note(f"sllm: {difference}")
                return _FAILED
        tokens = count(len(alone.tokens), "token")
        out.line(f"All {len(ways)} texts are the same, the target's own: {tokens}, compared one by one.\n")
        return 0 if show_triage(remote, target, n_threads, out) else _FAILED


@contextmanager
def _worker(pass_seconds: float, n_threads: int) -> Iterator[str]:
    """A worker on the embedded target as a process of its own, and its address.

    It ends with this process, however that ends: its stdin does.
    """
    options = ["--listen", "127.0.0.1:0", "--sessions", "1", "--drain", "0", "--until-eof"]
    options += ["--pass-seconds", str(pass_seconds), "--threads", str(n_threads)]
    with tempfile.TemporaryFile() as told:
        # The folder holds token and certificate, which a running worker does not look at again.
        with tempfile.TemporaryDirectory(prefix="sllm-demo-") as state:
            command = [sys.executable, "-m", "sllm", "worker", *options, "--state", state]
            child = None
            try:
                with _uninterrupted():
                    child = subprocess.Popen(
                        command,
                        cwd=state,  # not here: a checkout has a folder sllm/ that is not what is installed
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=told,
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
                told.seek(0)
                lines = told.read().decode("utf-8", "replace").splitlines()
                reason = lines[-1].removeprefix("sllm: ") if lines else f"exit status {child.returncode}"
                raise CommandError(f"the demo's worker did not start: {reason}")
            yield uri
        except BaseException:
            _end(child, at_once=True)
            raise
        _end(child, at_once=False)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a Ctrl-C wait: in the middle of Popen() it would leave a child that nobody knows."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _end(child: subprocess.Popen[bytes], *, at_once: bool) -> None:
    if at_once:
        child.kill()  # it holds nothing that outlives it
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


# ---- the ways


def _pipelined(
    how: str,
    stage: _Stage,
    *,
    draft: bool,
    run_ahead: bool = True,
    show: Callable[[Run], None] = lambda _run: None,
) -> _Told:
    """The text by generate()."""
    stage.link.reset_stats()
    tokens: list[int] = []
    with sllm.generate(
        stage.remote.target(run_ahead=run_ahead),
        stage.prompt,
        draft=stage.drafter if draft else None,
        sampling=stage.sampling,
        max_tokens=stage.max_tokens,
    ) as stream:
        for run in stream:
            tokens.extend(run.tokens)
            show(run)
        return _Told(how, tuple(tokens), stream.stats.n_passes, stream.stats.seconds, _carried(stage.link))


def _draft_then_wait(how: str, stage: _Stage) -> _Told:
    """The text by what others do over a network: draft a few tokens, send them, wait for the verdict."""
    stage.link.reset_stats()
    text: list[int] = stage.prompt.tolist()
    n_prompt, n_passes, began, ended = len(text), 0, 0.0, 0.0
    generation = stage.remote.target(run_ahead=False).open(stage.prompt, stage.sampling, stage.max_tokens)
    try:
        stage.drafter.open(text, stage.sampling)
        while generation.finish_reason is None:
            chain = stage.drafter.draft(text, [], _WAIT_DRAFT, 0.0)
            generation.hint(len(text), chain)
            # Usually one pass: the worker may check a long hint in parts.
            waiting = True
            while waiting and generation.finish_reason is None:
                commit = next(generation)
                n_passes += 1
                n, ended = len(commit.tokens), time.perf_counter()
                began = began or generation.opened_at or ended
                text.extend(commit.tokens)
                waiting = len(chain) > n and tuple(chain[:n]) == commit.tokens
                del chain[:n]
    finally:
        generation.close()
    return _Told(how, tuple(text[n_prompt:]), n_passes, ended - began, _carried(stage.link))


def _alone(model: sllm.Model, stage: _Stage, n_threads: int) -> _Told:
    """The text of the target alone, on this machine, with nothing in between."""
    with sllm.LocalTarget(model, n_threads=n_threads, **exact.SETTINGS) as target:
        stream = sllm.generate(target, stage.prompt, sampling=stage.sampling, max_tokens=stage.max_tokens)
        return _Told("target alone", tuple(token for run in stream for token in run.tokens))


def _carried(link: Link) -> int:
    """Bytes on the wire, both ways, TLS and HTTP/2 included."""
    stats = link.stats
    return stats.bytes_up + stats.bytes_down


# ---- what is told of them


def _bracketed(text: str) -> str:
    """Mark drafted text where there are no colours; space around it stays outside, so that it reads well."""
    inside = text.strip()
    if not inside:
        return text
    before, _, behind = text.partition(inside)
    return f"{before}[{inside}]{behind}"


def _model_line(model: sllm.Model) -> str:
    weights = f"{parameters(model.n_params)} parameters, {size(model.size_bytes)}"
    return f"{model.path.name}, {model.n_layer} layers, {weights}"


def _comparison(ways: Sequence[_Told]) -> list[str]:
    """The demo's table, and in words what it does and does not show."""
    streaming = next(one for one in ways if one.how == _STREAMING)
    rows = [("", "tokens/s", "x streaming", "passes/token", "bytes/token")]
    for one in ways:
        n = max(len(one.tokens), 1)
        ratio = f"{one.tokens_per_s / streaming.tokens_per_s:.2f}" if streaming.tokens_per_s else "-"
        rows.append(
            (one.how, f"{one.tokens_per_s:.1f}", ratio, f"{one.n_passes / n:.2f}", f"{one.n_bytes / n:.0f}")
        )
    lines = table(rows, right=(1, 2, 3, 4))
    if ways[-1].tokens_per_s < 1.1 * streaming.tokens_per_s:
        lines.append(
            "Hints bring little in this run: they pay where a pass of the target takes longer than a drafted"
            " token."
        )
    return lines


def _difference(one: _Told, alone: _Told) -> str | None:
    """Where two texts differ, in words, or None where they do not."""
    if one.tokens == alone.tokens:
        return None
    pairs = enumerate(zip(one.tokens, alone.tokens, strict=False))
    shorter = min(len(one.tokens), len(alone.tokens))
    at = next((index for index, (mine, other) in pairs if mine != other), shorter)
    return f"the text by {one.how!r} is NOT the target's own: it differs from token {at} of the answer on"
