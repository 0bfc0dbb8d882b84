"""What hints and run-ahead are worth behind a slow link, by simulation of discrete events.

A client drafts, a worker behind the link has the target, and both follow the rules of the runtime:

- The client drafts on behind what it has not seen confirmed, as long as its depth rule says so, and sends
  each new token in a hint that carries its whole unconfirmed chain. On a commit that disagrees it drops the
  chain and starts from the truth.
- The worker checks the usable part of the newest hint in its next pass. What it commits it sends at once.
  With run-ahead it passes on also without a hint; else it waits for one.

How far the client drafts is a rule of a fixed depth, or the runtime's own code (``depth="runtime"``:
``sllm.planning``, by which ``sllm.plan()`` predicts).

Beside them stand cloud streaming (the worker alone) and drafting a few tokens, then waiting for their
verification, as it has to be where a model is split by layers; with the runtime's own code it is that which
says how many, and drafting goes on while the answer is under way. `python -m benchmarks.simulate` prints the
table of all four, `python -m benchmarks.simulate trees` those of ``simulate_trees.py``, and
`python -m benchmarks.simulate windows` those of ``simulate_windows.py``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sllm.cli.console import Output, Progress
from sllm.draft.length import PassTimes
from sllm.planning import in_turns, streaming
from sllm.planning.events import Events, Simulated
from sllm.planning.recorded import Recorded
from sllm.progress import step, told_to
from sllm.worker.session import MAX_HINT_ROWS

Mode = Literal["stream", "wait", "hints", "run-ahead"]

N_MAX = 16
DEPTH = 48


@dataclass(frozen=True)
class Unconfirmed:
    """What a client knows when it decides whether to draft one more token."""

    n_tokens: int
    """The length of its unconfirmed chain."""
    probability: float
    """That all of the chain is right, by the draft's own estimate."""
    rtt: float
    target_seconds: float
    draft_seconds: float


DepthRule = Callable[[Unconfirmed], bool]


def at_most(n_tokens: int) -> DepthRule:
    """The rule of a fixed depth."""
    return lambda chain: chain.n_tokens < n_tokens


def simulate(
    mode: Mode,
    *,
    acceptance: float | None = None,
    outcomes: Sequence[bool] | None = None,
    probabilities: Sequence[float] | None = None,
    rtt: float,
    target_seconds: float,
    draft_seconds: float,
    row_seconds: float = 0.0,
    n_max: int = N_MAX,
    depth: DepthRule | Literal["runtime"] | None = None,
    n_tokens: int = 4000,
    seed: int = 0,
) -> Simulated:
    """One text in one mode; all times are in seconds.

    Args:
        mode: "stream", "wait", "hints" (the worker computes on hints only) or "run-ahead" (with hints, too).
        acceptance: the chance of a drafted token behind right ones to be right, drawn for each position; or
        outcomes: whether the draft, behind the text itself, has the token of each position right, as recorded
            from a real pair; their number is the length of the text.
        probabilities: the draft's own estimates of that, for the depth rule; else the share of the outcomes.
            Behind a wrong token they stand in for those that nobody has recorded.
        rtt: a round trip; half of it each way.
        target_seconds: a pass of the target, whose weights are read once.
        row_seconds: what each drafted token adds to it.
        draft_seconds: a drafted token.
        n_max: the most tokens to check in a pass; with "wait" also the length of a draft.
        depth: whether the client drafts on; by default until 48 tokens are unconfirmed. "runtime": client and
            worker decide by the runtime's own code. That is ``DraftAhead`` for how far to draft and how often
            to send a hint, and ``rows_to_check`` for how much of a hint a pass checks; and a draft that has
            become void is waited for before the next begins, as the runtime's thread cannot be called back.
        n_tokens, seed: of a text that is drawn.

    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(get_args(Mode))}")
    if (acceptance is None) == (outcomes is None):
        raise ValueError("expected either acceptance or outcomes")
    if acceptance is not None:
        rng = random.Random(seed)
        outcomes = [rng.random() < acceptance for _ in range(n_tokens)]
    assert outcomes is not None
    if not outcomes:
        raise ValueError("the text has no tokens")
    if probabilities is None:
        probabilities = [sum(outcomes) / len(outcomes)] * len(outcomes)
    elif len(probabilities) != len(outcomes):
        raise ValueError(f"{len(probabilities)} probabilities for {len(outcomes)} outcomes")
    if n_max < 1:
        raise ValueError(f"n_max is {n_max}, expected 1 or more")
    world = _World(
        outcomes,
        probabilities,
        rtt=rtt,
        target_seconds=target_seconds,
        row_seconds=row_seconds,
        draft_seconds=draft_seconds,
        n_max=n_max,
    )
    if depth == "runtime" and mode != "stream":
        return _runtime(world, mode)
    if mode == "wait":
        return _wait(world)
    return _converse(world, mode, depth if callable(depth) else at_most(DEPTH))


@dataclass(frozen=True)
class _World:
    outcomes: Sequence[bool]
    probabilities: Sequence[float]
    rtt: float
    target_seconds: float
    row_seconds: float
    draft_seconds: float
    n_max: int

    def pass_seconds(self, n_drafted: int) -> float:
        return self.target_seconds + self.row_seconds * n_drafted


def _n_right(chain: Sequence[bool]) -> int:
    """How many tokens of a chain are right before the first that is not."""
    return next((i for i, right in enumerate(chain) if not right), len(chain))


def _wait(world: _World) -> Simulated:
    """Draft, send, wait for the answer: nothing happens at the same time."""
    n_tokens = len(world.outcomes)
    seconds = 0.0
    pos = n_passes = n_drafted = n_accepted = 0
    while pos < n_tokens:
        draft = world.outcomes[pos : pos + world.n_max]
        right = _n_right(draft)
        seconds += len(draft) * world.draft_seconds + world.rtt + world.pass_seconds(len(draft))
        pos += right + 1
        n_passes += 1
        n_drafted += len(draft)
        n_accepted += right
    return Simulated(
        n_tokens, seconds, n_passes=n_passes, n_hints=n_passes, n_drafted=n_drafted, n_accepted=n_accepted
    )


def _runtime(world: _World, mode: Mode) -> Simulated:
    """By the runtime's own rules; its worker has served other texts before."""
    text = Recorded.of_outcomes(world.outcomes, world.probabilities)
    passes, draft = PassTimes(), PassTimes()
    draft.add(1, world.draft_seconds)
    away = world.rtt if mode == "wait" else 0.0
    for n in range(MAX_HINT_ROWS + 1):
        passes.add(n + 1, away + world.pass_seconds(n))
    if mode == "wait":
        return in_turns.chains(text, passes, draft, overlaps=True, far=True)
    return streaming.with_hints(text, passes, draft, world.rtt, trees=False, run_ahead=mode != "hints")


def _converse(world: _World, mode: Mode, depth: DepthRule) -> Simulated:
    """Client and worker, each at its own pace."""
    events = Events()
    worker = _Worker(world, events, run_ahead=mode != "hints")
    client = _Client(world, events, at_most(0) if mode == "stream" else depth)
    worker.client, client.worker = client, worker
    events.at(world.rtt / 2, worker.begin)
    client.consider()
    while client.known < len(world.outcomes):
        events.next()
    return Simulated(
        len(world.outcomes),
        events.now,
        n_passes=worker.n_passes,
        n_hints=client.n_hints,
        n_drafted=client.n_drafted,
        n_accepted=worker.n_accepted,
    )


# Of a token nothing matters but whether it is the text's own at its position: so a chain is a list of that.


class _Worker:
    """Has the target, and so the truth."""

    client: _Client

    def __init__(self, world: _World, events: Events, *, run_ahead: bool) -> None:
        self._world = world
        self._events = events
        self._run_ahead = run_ahead
        self._committed = 0
        self._hint: tuple[int, list[bool]] = (0, [])
        self._busy = False
        self._begun = False
        self.n_passes = 0
        self.n_accepted = 0

    def begin(self) -> None:
        """The request has come."""
        self._begun = True
        self._pass()

    def hear(self, start: int, chain: list[bool]) -> None:
        """A hint: the chain behind the ``start`` tokens that its sender knew to be committed."""
        if all(chain[: self._committed - start]):
            self._hint = (start, chain)  # it replaces all earlier ones
        self._pass()

    def _candidates(self) -> list[bool]:
        """What of the hint could be checked next; nothing, where it contradicts what is committed."""
        start, chain = self._hint
        behind = self._committed - start
        return chain[behind:] if all(chain[:behind]) else []

    def _pass(self) -> None:
        if self._busy or not self._begun or self._committed == len(self._world.outcomes):
            return
        checked = self._candidates()[: self._world.n_max]
        if not (checked or self._run_ahead):
            return
        self._busy = True
        self.n_passes += 1
        self._events.at(self._world.pass_seconds(len(checked)), lambda: self._commit(checked))

    def _commit(self, checked: list[bool]) -> None:
        self._busy = False
        right = _n_right(checked)
        self.n_accepted += right
        self._committed = committed = min(self._committed + right + 1, len(self._world.outcomes))
        self._events.at(self._world.rtt / 2, lambda: self.client.learn(committed))
        self._pass()


class _Client:
    """Has the draft: one token at a time, each sent at once, and what is void is called back."""

    worker: _Worker

    def __init__(self, world: _World, events: Events, depth: DepthRule) -> None:
        self._world = world
        self._events = events
        self._depth = depth
        self._chain: list[bool] = []  # behind what is known
        self._probs: list[float] = []
        self._draft: tuple[int, bool] | None = None  # being made: where, and what
        self._hinted: tuple[int, int] | None = None  # end of the text and of the chain as last sent
        self.known = 0
        self.n_hints = 0
        self.n_drafted = 0

    def consider(self) -> None:
        """Draft on, unless a draft is being made, the text is full, or the rule is against it; and send what
        has not been sent.
        """
        world, end = self._world, self.known + len(self._chain)
        if self._draft is None and end < len(world.outcomes):
            times = (world.rtt, world.target_seconds, world.draft_seconds)
            if self._depth(Unconfirmed(len(self._probs), math.prod(self._probs), *times)):
                self._draft = draft = (end, all(self._chain) and world.outcomes[end])
                self._events.at(world.draft_seconds, lambda: self._drafted(draft))
        self._send_hint()

    def _drafted(self, draft: tuple[int, bool]) -> None:
        if draft is not self._draft:
            return  # it was called back meanwhile
        self._draft = None
        pos, right = draft
        self.n_drafted += 1
        self._chain.append(right)
        self._probs.append(self._world.probabilities[pos])
        self.consider()

    def learn(self, committed: int) -> None:
        """The worker has committed so many tokens in all."""
        n_new = committed - self.known
        n_right = _n_right(self._chain[:n_new])
        if n_right < min(n_new, len(self._chain)):
            self._chain, self._probs, self._hinted = [], [], None
            self._draft = None
        else:
            if n_new > len(self._chain):
                self._draft = None  # what it says is known now
            del self._chain[:n_new], self._probs[:n_new]
        self.known = committed
        self.consider()

    def _send_hint(self) -> None:
        state = (self.known, self.known + len(self._chain))
        if not self._chain or (self._hinted is not None and state[1] <= self._hinted[1]):
            return  # the worker has all of this chain
        self._hinted = state
        known, chain = self.known, self._chain.copy()
        self.n_hints += 1
        self._events.at(self._world.rtt / 2, lambda: self.worker.hear(known, chain))


# ---- the table


def best_wait(longest: int = 32, **world: Any) -> tuple[int, Simulated]:
    """The best fixed length for drafting and waiting, and what comes of it."""
    tried = {n: simulate("wait", n_max=n, **world) for n in range(1, longest + 1)}
    best = max(tried, key=lambda n: tried[n].tokens_per_s)
    return best, tried[best]


def table(
    rtts: Sequence[float],
    acceptances: Sequence[float],
    *,
    depth: DepthRule | Literal["runtime"],
    n_max: int = N_MAX,
    **world: Any,
) -> list[str]:
    """Tokens per second in all modes, and what run-ahead costs for each token, as Markdown."""
    columns = [
        "RTT, acceptance",
        "cloud streaming",
        "draft-then-wait (best n_max)",
        "hints, no run-ahead",
        "hints + run-ahead",
        "its passes per token",
        "hints per token",
        "wasted drafts per token",
    ]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    with step("simulating", None) as told:
        for i, (rtt, acceptance) in enumerate(itertools.product(rtts, acceptances)):
            if told is not None:
                told(i / (len(rtts) * len(acceptances)))
            here = {"rtt": rtt, "acceptance": acceptance, **world}
            stream = simulate("stream", **here)
            n, wait = best_wait(**here)
            hints = simulate("hints", depth=depth, n_max=n_max, **here)
            ahead = simulate("run-ahead", depth=depth, n_max=n_max, **here)
            rows.append(
                f"| {rtt * 1e3:g} ms, {acceptance:g} | {stream.tokens_per_s:.1f}"
                f" | {wait.tokens_per_s:.1f} ({n}) | {hints.tokens_per_s:.1f} | {ahead.tokens_per_s:.1f}"
                f" | {ahead.passes_per_token:.2f} | {ahead.hints_per_token:.2f}"
                f" | {ahead.n_wasted / ahead.n_tokens:.2f} |"
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["trees"]:
        from . import simulate_trees  # which compares with what is here

        return simulate_trees.main(argv[1:])
    if argv[:1] == ["windows"]:
        from . import simulate_windows  # with the trees of that

        return simulate_windows.main(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description="Prints the table.")
    parser.add_argument("--target-ms", type=float, default=30.0, help="a pass of the target")
    parser.add_argument("--row-ms", type=float, default=0.0, help="more for each drafted token in it")
    parser.add_argument("--draft-ms", type=float, default=10.0, help="a drafted token")
    parser.add_argument("--rtt-ms", type=float, nargs="+", default=[0.0, 20.0, 50.0, 100.0, 200.0])
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.6, 0.8, 0.9, 0.95])
    parser.add_argument("--n-max", type=int, default=N_MAX, help="drafted tokens in a pass, with hints")
    parser.add_argument(
        "--depth",
        type=lambda text: "runtime" if text == "runtime" else at_most(int(text)),
        default=at_most(DEPTH),
        help=f"unconfirmed tokens (default: {DEPTH}), or 'runtime': the rules of the runtime itself",
    )
    parser.add_argument("--tokens", type=int, default=4000, help="the length of each text")
    args = parser.parse_args(argv)
    rows = table(
        [ms / 1e3 for ms in args.rtt_ms],
        args.acceptance,
        depth=args.depth,
        target_seconds=args.target_ms / 1e3,
        row_seconds=args.row_ms / 1e3,
        draft_seconds=args.draft_ms / 1e3,
        n_max=args.n_max,
        n_tokens=args.tokens,
    )
    print(*rows, sep="\n")
    return 0


if __name__ == "__main__":
    with told_to(lambda what: Progress(Output(), what)):
        sys.exit(main())
