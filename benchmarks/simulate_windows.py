"""What several windows of drafted tokens in flight through a split are worth, by simulation over what real
pairs chose (``ranks.py``); trees grow as in ``simulate_trees.py``.

The client of a split drafts, sends rows through the workers, and selects from what comes back. With one
window in flight it waits for that before it sends more. With several, a window that goes on where the last
one ends follows it through the link, so that of a long run of right tokens only the last ones are waited
for. What comes back of a window tells what follows each of its tokens. Where that is in no window on its
way, all that are on their way are void: the next one begins behind the text as it is known now, and a
worker skips void windows that it has not begun. (The runtime has no more on their way than a worker is
through with by then.) Whatever a pass of the draft or of a worker takes, its rows cost nothing.

A worker keeps the rows of a tree's main path alone (each token's likeliest follower), so a window can only
go on from the end of the main path of the one before it. What it would bring to keep the rows of all
branches is simulated as well (``Split.keeps_all``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest
from pathlib import Path

from sllm.planning.events import Events

from .ranks import MISSING, STORIES_FOLDER, TEMPERATURES, pairs
from .simulate_trees import N_NODES, N_RANKS, WIDTH, WORTH, Node, Text, Tree, elsewhere, texts_of

WORTHS = (0.1, 0.3, 0.6, 1.1)
WINDOWS = (2, 8)
CHAIN_NODES = 16
LIMIT = 512


@dataclass(frozen=True)
class Split:
    """The times, in seconds, and how drafts are sent.

    Attributes:
        ways: from the client to the first worker, from each worker to the next, and from the last one back.
        passes: of each worker, whatever its rows.
        draft_seconds: a pass of the draft.
        n_windows: in flight at most; 1: rounds that wait for each other.
        grows: the draft goes on while a window is on its way.
        first: the window behind the known text is sent when no token is left to draft on from whose chance is
            as large as this, so above 1 at once.
        later: those after it are sent as soon as the first worker is free for them, where they are likely to
            bring so many tokens.
        width, n_ranks: rows of the draft's pass, and candidates of each that become nodes.
        n_nodes: tokens of a window at most.
        keeps_all: windows go on from any token that was sent, not from the end of the main path alone.

    """

    ways: tuple[float, ...]
    passes: tuple[float, ...] = (0.020,)
    draft_seconds: float = 0.003
    n_windows: int = 1
    grows: bool = True
    first: float = 0.3
    later: float = 0.1
    width: int = WIDTH
    n_ranks: int = N_RANKS
    n_nodes: int = N_NODES
    keeps_all: bool = False

    def as_chain(self) -> Split:
        """The same with chains, of as many tokens as those of the runtime."""
        return replace(self, width=1, n_ranks=1, n_nodes=CHAIN_NODES)


@dataclass(frozen=True)
class Sent:
    """``run()``: sums over all texts."""

    n_tokens: int
    seconds: float
    n_windows: int
    n_rows: int
    """That crossed the link, the text's own included."""
    n_void: int
    """Windows of which nothing was of use."""

    @property
    def tokens_per_s(self) -> float:
        return self.n_tokens / self.seconds


def run(texts: Sequence[Text], split: Split, *, seed: int = 0) -> Sent:
    """One text after another, from the moment at which its prompt is computed."""
    others = elsewhere(texts, seed)
    seconds, counts = 0.0, [0] * 3
    for text in texts:
        events = Events()
        client = _Client(text, split, events, Tree(text, others, split.n_ranks))
        client.consider()
        while client.known < len(text):
            events.next()
        seconds += events.now
        found = (client.n_windows, client.n_rows, client.n_void)
        counts = [a + b for a, b in zip(counts, found, strict=True)]
    return Sent(sum(map(len, texts)), seconds, *counts)


@dataclass(frozen=True, eq=False)
class _Window:
    nodes: list[Node]
    age: int
    """How many times the windows before it had become void."""


class _Worker:
    """Computes one window after another, and passes each on."""

    def __init__(self, events: Events, seconds: float, way: float) -> None:
        self._events = events
        self._seconds = seconds
        self._way = way
        self._waiting: list[_Window] = []
        self._busy = False
        self.following: _Worker | _Client

    def hear(self, window: _Window) -> None:
        self._waiting = [other for other in self._waiting if other.age == window.age]
        self._waiting.append(window)
        self._begin()

    def _begin(self) -> None:
        if not self._busy and self._waiting:
            self._busy = True
            window = self._waiting.pop(0)
            self._events.at(self._seconds, lambda: self._end(window))

    def _end(self, window: _Window) -> None:
        self._busy = False
        self._events.at(self._way, lambda: self.following.hear(window))
        self._begin()


class _Client:
    """Drafts, sends windows, and learns from what comes back."""

    def __init__(self, text: Text, split: Split, events: Events, tree: Tree) -> None:
        self._n_tokens = len(text)
        self._split = split
        self._events = events
        self._tree = tree
        self._drafting: list[Node] = []  # from which the draft goes on right now
        self._age = 0
        self._in_flight: list[_Window] = []
        self._sent: set[Node] = set()  # since the last time that windows became void
        self._tip: Node | None = None  # where the next window goes on; None: nowhere, before all are back
        self._free_at = 0.0  # when the first worker will be, as far as is known here
        self._asked_for = -1.0  # when consider() is called anyway
        self.known = 0
        self.n_windows = self.n_rows = self.n_void = 0
        last: _Worker | _Client = self
        for seconds, way in zip(reversed(split.passes), reversed(split.ways[1:]), strict=True):
            worker = _Worker(events, seconds, way)
            worker.following = last
            last = worker
        assert isinstance(last, _Worker)
        self._worker = last

    def consider(self) -> None:
        """Send what is worth it, and draft on, unless a draft is being made."""
        if self.known == self._n_tokens:
            return
        while self._send():
            pass
        if self._drafting or len(self._tree.nodes) >= LIMIT or (self._in_flight and not self._split.grows):
            return
        rows = self._tree.take(self._split.width, WORTH)
        if rows:
            self._drafting = rows
            self._events.at(self._split.draft_seconds, lambda: self._drafted(rows))

    def _drafted(self, rows: list[Node]) -> None:
        self._drafting = []
        self._tree.decoded(rows)
        self.consider()

    # ---- sending

    def _send(self) -> bool:
        """Send the next window, if it is time for it."""
        split, tree = self._split, self._tree
        if not self._in_flight:
            if self._wants_more():
                return False
            nodes = nsmallest(split.n_nodes, tree.nodes)
            self._sent, self._tip = {tree.root}, tree.root
            self.n_rows += 1
        else:
            if len(self._in_flight) >= split.n_windows or self._tip is None:
                return False
            nodes = self._later()
            if sum(node.chance for node in nodes) < split.later * tree.root.chance:
                return False
            late = self._free_at - (self._events.now + split.ways[0])
            if late > 1e-9:
                if self._asked_for <= self._events.now:
                    self._asked_for = self._events.now + late
                    self._events.at(late, self._consider_again)
                return False
        self._sent.update(nodes)
        self._follow_main_path()
        window = _Window(nodes, self._age)
        self._in_flight.append(window)
        self.n_windows += 1
        self.n_rows += len(nodes)
        arrival = self._events.now + split.ways[0]
        self._free_at = max(arrival, self._free_at) + split.passes[0]
        self._events.at(split.ways[0], lambda: self._worker.hear(window))
        return True

    def _consider_again(self) -> None:
        self._asked_for = -1.0
        self.consider()

    def _wants_more(self) -> bool:
        """Whether the draft is to go on before the first window is sent."""
        tree, split = self._tree, self._split
        best = min((node for node in (tree.best(), *self._drafting) if node and node.alive), default=None)
        if best is None or best.chance < split.first * tree.root.chance or len(tree.nodes) >= LIMIT:
            return False
        if len(tree.nodes) < split.n_nodes:
            return True
        return best.chance > nsmallest(split.n_nodes, tree.nodes)[-1].chance

    def _later(self) -> list[Node]:
        """The tokens that a window after the first one has."""
        if self._split.keeps_all:
            return nsmallest(self._split.n_nodes, (n for n in self._tree.nodes if n not in self._sent))
        assert self._tip is not None
        left, found = list(self._tip.kids), []
        while left:
            node = left.pop()
            found.append(node)
            left += node.kids
        return nsmallest(self._split.n_nodes, found)

    def _follow_main_path(self) -> None:
        assert self._tip is not None
        while self._tip.kids and self._tip.kids[0] in self._sent:
            self._tip = self._tip.kids[0]

    # ---- learning

    def hear(self, window: _Window) -> None:
        """What follows each token of a window has come back."""
        if window.age != self._age:
            self.n_void += 1
            return
        self._in_flight.remove(window)
        n_right = max((node.pos + 1 for node in window.nodes if node.right), default=self.known)
        self.known = min(n_right + 1, self._n_tokens)
        tree = self._tree
        tree.follow(self.known)
        if not any(tree.root in other.nodes for other in self._in_flight):
            self._age += 1
            self._in_flight.clear()
            self._free_at = self._events.now + self._split.ways[0]  # what waits there is skipped
        elif not self._split.keeps_all and not _is_under(self._tip, tree.root):
            self._tip = None
        self.consider()


def _is_under(node: Node | None, root: Node) -> bool:
    while node is not None and node is not root:
        node = node.parent
    return node is root


# ---- the tables


def best(texts: Sequence[Text], split: Split, worths: Iterable[float] = WORTHS) -> tuple[float, Sent]:
    """With the ``first`` at which it is fastest."""
    found = [(worth, run(texts, replace(split, first=worth))) for worth in worths]
    return max(found, key=lambda one: one[1].tokens_per_s)


def table(
    texts: Sequence[Text], rtts: Sequence[float], draft_seconds: Sequence[float], *, target_seconds: float
) -> list[str]:
    """Tokens per second with one worker, as Markdown; in brackets against the better of chains and trees
    whose draft goes on while they are on their way, one window at a time.
    """
    columns = ["RTT, pass of the draft", "chain", "tree, draft waits", "tree", "windows of chains"]
    columns += [*(f"{n} windows" for n in WINDOWS), f"{WINDOWS[-1]}, all rows kept"]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for rtt in rtts:
        for seconds in draft_seconds:
            tree = Split((rtt / 2, rtt / 2), (target_seconds,), seconds)
            most = replace(tree, n_windows=WINDOWS[-1])
            kinds = [tree.as_chain(), replace(tree, grows=False), tree, most.as_chain()]
            kinds += [*(replace(tree, n_windows=n) for n in WINDOWS), replace(most, keeps_all=True)]
            rates = [best(texts, kind)[1].tokens_per_s for kind in kinds]
            today = max(rates[0], rates[2])
            cells = [f"{rate:.0f} ({rate / today:.2f})" for rate in rates]
            rows.append(f"| {rtt * 1e3:g} ms, {seconds * 1e3:g} ms | {' | '.join(cells)} |")
    return rows


def chain_table(
    texts: Sequence[Text], rtt: float, draft_seconds: Sequence[float], *, target_seconds: float
) -> list[str]:
    """Tokens per second with two workers, each ``rtt`` from the client and from the other and with half of
    the layers, as Markdown; in brackets against trees on one worker, one window at a time.
    """
    columns = ["pass of the draft", "one worker: chain", "tree", f"{WINDOWS[-1]} windows"]
    columns += ["two: chain", "tree", f"{WINDOWS[-1]} windows", f"{WINDOWS[-1]}, all rows kept"]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for seconds in draft_seconds:
        one = Split((rtt / 2, rtt / 2), (target_seconds,), seconds)
        two = replace(one, ways=(rtt / 2,) * 3, passes=(target_seconds / 2,) * 2)
        kinds = [
            kind
            for tree in (one, two)
            for kind in (tree.as_chain(), tree, replace(tree, n_windows=WINDOWS[-1]))
        ]
        kinds.append(replace(two, n_windows=WINDOWS[-1], keeps_all=True))
        rates = [best(texts, kind)[1].tokens_per_s for kind in kinds]
        cells = [f"{rate:.0f} ({rate / rates[1]:.2f})" for rate in rates]
        rows.append(f"| {seconds * 1e3:g} ms | {' | '.join(cells)} |")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate windows",
        description="Prints the tables of windows in flight through a split.",
    )
    parser.add_argument("--pair", nargs="+", default=["stories", "embedded"], choices=["stories", "embedded"])
    parser.add_argument("--stories", type=Path, help=f"their folder (default: ${STORIES_FOLDER})")
    parser.add_argument("--temperature", type=float, nargs="+", default=list(TEMPERATURES))
    parser.add_argument("--positions", type=int, default=1300, help="of each pair and temperature")
    parser.add_argument("--rtt-ms", type=float, nargs="+", default=[50.0, 100.0])
    parser.add_argument("--draft-ms", type=float, nargs="+", default=[1.0, 3.0, 10.0], help="a pass of it")
    parser.add_argument("--target-ms", type=float, default=20.0, help="a pass of all workers together")
    args = parser.parse_args(argv)
    here = pairs(args.stories)
    drafts = [ms / 1e3 for ms in args.draft_ms]
    rtts = [ms / 1e3 for ms in args.rtt_ms]
    for name in args.pair:
        if name not in here:
            print(f"{name}: {MISSING}", file=sys.stderr)
            continue
        for temperature in args.temperature:
            texts = texts_of(here[name].record(temperature, n_positions=args.positions), temperature)
            print(f"\n{name}, temperature {temperature:g}, {sum(map(len, texts))} positions\n")
            seconds = args.target_ms / 1e3
            print(*table(texts, rtts, drafts, target_seconds=seconds), sep="\n", flush=True)
            print(f"\nTwo workers, {args.rtt_ms[0]:g} ms apart\n")
            print(*chain_table(texts, rtts[0], drafts, target_seconds=seconds), sep="\n", flush=True)
    return 0
