"""What drafted trees are worth against chains, by simulation over what real pairs chose (``ranks.py``).

A tree is grown from the best candidate: of all nodes that the draft has named and not yet decoded, each pass
of the draft decodes the ``width`` likeliest, of whatever depth, as rows of one batch, and each row names
``n_ranks`` more. How likely a node is to be the target's is the product of the shares on its path
(``shares()``). The likeliest ``n_nodes`` nodes, decoded or not, are verified in one pass of the target: the
longest right path is committed, and the target's own token behind it. A chain is the tree of width 1 and one
rank.

``local()`` drafts and verifies in turns. ``remote()`` has a round trip in between and a target that runs
ahead: whole trees are hints that replace each other, and what the client keeps of its tree is what lies
behind the newest committed token.

Along the true text the draft's candidates are the recorded ones. Behind a wrong token nobody knows what it
would have said: there, candidates of another position of the same pair stand in, drawn at random.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, nsmallest
from pathlib import Path
from typing import Any

from sllm.planning.events import Events

from .ranks import MISSING, STORIES_FOLDER, TEMPERATURES, Ranks, pairs, shares
from .simulate import simulate

N_RANKS = 8
WIDTH = 4
N_NODES = 32
WORTH = 0.02
HINT_NODES = 128


@dataclass(frozen=True)
class Text:
    """One recorded text: at each position, which candidate is right (-1: none) and how likely each is."""

    rank: Sequence[int]
    shares: Sequence[Sequence[float]]

    def __len__(self) -> int:
        return len(self.rank)


def texts_of(recorded: Iterable[Ranks], temperature: float) -> list[Text]:
    return [Text(one.rank.tolist(), shares(one.gaps, temperature).tolist()) for one in recorded]


class Node:
    """A drafted token at ``pos`` of the text; ``right``: it is the text's own, and all before it are."""

    __slots__ = ("alive", "chance", "kids", "parent", "pos", "right")

    def __init__(self, parent: Node | None, pos: int, right: bool, chance: float) -> None:
        self.parent = parent
        self.pos = pos
        self.right = right
        self.chance = chance
        self.kids: list[Node] = []
        self.alive = True

    def __lt__(self, other: Node) -> bool:
        return (-self.chance, self.pos) < (-other.chance, other.pos)


class Tree:
    """What is drafted behind the text as far as it is known. ``n_ranks`` 1 makes a chain of it."""

    def __init__(self, text: Text, elsewhere: Iterator[Sequence[float]], n_ranks: int) -> None:
        self._text = text
        self._elsewhere = elsewhere
        self._n_ranks = n_ranks
        self._nodes: list[Node] = []
        self.root = Node(None, -1, True, 1.0)
        self.start(0)

    def start(self, known: int) -> None:
        """Nothing is drafted behind ``known`` tokens."""
        for node in (self.root, *self._nodes):
            node.alive = False  # it may be being decoded
        self.root = Node(None, known - 1, True, 1.0)
        self._candidates = [self.root]
        self._nodes = []

    @property
    def nodes(self) -> list[Node]:
        """Without the root."""
        return self._nodes

    def best(self) -> Node | None:
        """The likeliest token that the draft could go on from; None: there is none."""
        last = len(self._text) - 1
        while self._candidates and not (self._candidates[0].alive and self._candidates[0].pos < last):
            heappop(self._candidates)
        return self._candidates[0] if self._candidates else None

    def take(self, width: int, worth: float) -> list[Node]:
        """What the next pass of the draft decodes; each of at least the chance ``worth``."""
        taken: list[Node] = []
        while len(taken) < width:
            node = self.best()
            if node is None or node.chance < worth * self.root.chance:
                break
            taken.append(heappop(self._candidates))
        return taken

    def decoded(self, rows: Iterable[Node]) -> None:
        """The draft's candidates behind these nodes are known now."""
        for node in rows:
            if not node.alive:
                continue
            pos = node.pos + 1
            rank = self._text.rank[pos] if node.right else -1
            row = self._text.shares[pos] if node.right else next(self._elsewhere)
            for i, share in enumerate(row[: self._n_ranks]):
                if share > 1e-4:
                    kid = Node(node, pos, i == rank, node.chance * share)
                    node.kids.append(kid)
                    self._nodes.append(kid)
                    heappush(self._candidates, kid)

    def follow(self, known: int) -> None:
        """So many tokens are known now: keep what lies behind them, or begin anew where nothing does."""
        at: Node | None = self.root
        while at is not None and at.pos < known - 1:
            at = next((kid for kid in at.kids if kid.right), None)
        if at is None:
            self.start(known)
            return
        if at is self.root:
            return
        left, keep = [self.root], []
        while left:  # all but what is under the new root
            node = left.pop()
            if node is not at:
                node.alive = False
                left += node.kids
        left = list(at.kids)
        while left:
            node = left.pop()
            keep.append(node)
            left += node.kids
        at.parent = None
        self.root, self._nodes = at, keep
        self._candidates = [node for node in self._candidates if node.alive]
        heapify(self._candidates)


def elsewhere(texts: Sequence[Text], seed: int) -> Iterator[Sequence[float]]:
    """What stands in behind wrong tokens: the shares of other positions, drawn at random."""
    rows = [row for text in texts for row in text.shares]
    rng = random.Random(seed)
    while True:
        yield rows[rng.randrange(len(rows))]


# ---- in turns


@dataclass(frozen=True)
class Turns:
    """``local()``: sums over all texts."""

    n_tokens: int
    n_passes: int
    n_rows: int
    """Drafted tokens that the draft has decoded."""

    @property
    def tokens_per_pass(self) -> float:
        return self.n_tokens / self.n_passes

    @property
    def rows_per_pass(self) -> float:
        return self.n_rows / self.n_passes


def local(
    texts: Sequence[Text],
    depth: int,
    *,
    width: int = WIDTH,
    n_nodes: int = N_NODES,
    n_ranks: int = N_RANKS,
    worth: float = WORTH,
    seed: int = 0,
) -> Turns:
    """``depth`` passes of the draft, then one of the target, and so on to the end of each text.

    Args:
        texts: as recorded.
        depth: passes of the draft for each pass of the target; a chain has as many tokens.
        width: rows of each pass of the draft, but for the first, which has one.
        n_nodes: the most tokens that are verified at once.
        n_ranks: candidates of each row that become nodes.
        worth: a token with a smaller chance is not decoded; the first of each draft is.
        seed: of what stands in behind wrong tokens.

    """
    others = elsewhere(texts, seed)
    n_passes = n_rows = 0
    for text in texts:
        tree, known = Tree(text, others, n_ranks), 0
        while known < len(text):
            tree.start(known)
            for _ in range(depth):
                rows = tree.take(width, worth)
                if not rows:
                    break
                n_rows += len(rows)
                tree.decoded(rows)
            right = {node.pos for node in nsmallest(n_nodes, tree.nodes) if node.right}
            known += next(n for n in range(depth + 1) if known + n not in right) + 1
            n_passes += 1
    return Turns(sum(map(len, texts)), n_passes, n_rows)


def chain(texts: Sequence[Text], depth: int) -> Turns:
    """The same with chains."""
    return local(texts, depth, width=1, n_ranks=1, worth=0.0)


# ---- behind a link


@dataclass(frozen=True)
class Streamed:
    """``remote()``: sums over all texts."""

    n_tokens: int
    seconds: float
    n_passes: int
    n_drafts: int
    n_rows: int
    n_hints: int
    n_hinted: int

    @property
    def tokens_per_s(self) -> float:
        return self.n_tokens / self.seconds


@dataclass(frozen=True)
class Link:
    """The times, in seconds, and how trees are grown and sent.

    Attributes:
        rtt: a round trip, half of it each way.
        target_seconds: a pass of the target, whatever its rows.
        draft_seconds: a pass of the draft.
        row_seconds: what each further row adds to that.
        width, n_ranks, worth: as for ``local()``.
        n_nodes: the most tokens that the worker verifies at once: the first of those in the hint that still
            can be right.
        hint_nodes: the longest hint.
        limit: the largest tree.
        timed: a hint waits for a draft that will be ready before the target begins its next pass, which the
            client knows from when news came; else each draft is sent at once.
        margin: of that, in seconds.

    """

    rtt: float
    target_seconds: float = 0.030
    draft_seconds: float = 0.010
    row_seconds: float = 0.0
    width: int = 2 * WIDTH
    n_ranks: int = N_RANKS
    worth: float = WORTH
    n_nodes: int = N_NODES
    hint_nodes: int = HINT_NODES
    limit: int = 1024
    timed: bool = True
    margin: float = 0.002


def remote(texts: Sequence[Text], link: Link, *, seed: int = 0) -> Streamed:
    """Hints and run-ahead, one text after another."""
    others = elsewhere(texts, seed)
    seconds, counts = 0.0, [0] * 5
    for text in texts:
        events = Events()
        worker = _Worker(text, link, events)
        client = _Client(text, link, events, Tree(text, others, link.n_ranks))
        worker.client, client.worker = client, worker
        events.at(link.rtt / 2, worker.begin)
        client.consider()
        while client.known < len(text):
            events.next()
        seconds += events.now
        found = (worker.n_passes, client.n_drafts, client.n_rows, client.n_hints, client.n_hinted)
        counts = [a + b for a, b in zip(counts, found, strict=True)]
    return Streamed(sum(map(len, texts)), seconds, *counts)


class _Worker:
    """Has the target, and so the truth."""

    client: _Client

    def __init__(self, text: Text, link: Link, events: Events) -> None:
        self._n_tokens = len(text)
        self._link = link
        self._events = events
        self._committed = 0
        self._hint: tuple[int, list[Node]] = (0, [])
        self._busy = True  # until the request has come
        self.n_passes = 0

    def begin(self) -> None:
        self._busy = False
        self._pass()

    def hear(self, start: int, nodes: list[Node]) -> None:
        """A hint: a tree behind the ``start`` tokens that its sender knew to be committed, in the order in
        which it is to be checked, each node behind its parent.
        """
        self._hint = (start, nodes)
        self._pass()

    def _candidates(self) -> list[Node]:
        """The nodes of the hint behind what is committed."""
        start, nodes = self._hint
        if start == self._committed:
            return nodes
        under: set[int] = set()
        left: list[Node] = []
        for node in nodes:
            if node.right and node.pos == self._committed - 1:
                under.add(id(node))
            elif id(node.parent) in under:
                under.add(id(node))
                left.append(node)
        return left

    def _pass(self) -> None:
        if self._busy or self._committed == self._n_tokens:
            return
        self._busy = True
        self.n_passes += 1
        right = {node.pos for node in self._candidates()[: self._link.n_nodes] if node.right}
        n = 1
        while self._committed + n - 1 in right:
            n += 1
        self._events.at(self._link.target_seconds, lambda: self._commit(n))

    def _commit(self, n: int) -> None:
        self._busy = False
        self._committed = committed = min(self._committed + n, self._n_tokens)
        self._events.at(self._link.rtt / 2, lambda: self.client.learn(committed))
        self._pass()


class _Client:
    """Has the draft, and grows the tree."""

    worker: _Worker

    def __init__(self, text: Text, link: Link, events: Events, tree: Tree) -> None:
        self._n_tokens = len(text)
        self._link = link
        self._events = events
        self._tree = tree
        self._drafting = False
        self._news_at = 0.0
        self._hinted: tuple[Node, int] | None = None  # root and size of the tree as last sent
        self._ready_at = 0.0  # when the draft that is being made will be done
        self.known = 0
        self.n_drafts = 0
        self.n_rows = 0
        self.n_hints = 0
        self.n_hinted = 0

    def consider(self) -> None:
        """Draft on, unless a draft is being made; and send what is new."""
        if not self._drafting and len(self._tree.nodes) < self._link.limit:
            rows = self._tree.take(self._link.width, self._link.worth)
            if rows:
                self._drafting = True
                self.n_drafts += 1
                self.n_rows += len(rows)
                seconds = self._link.draft_seconds + self._link.row_seconds * (len(rows) - 1)
                self._ready_at = self._events.now + seconds
                self._events.at(seconds, lambda: self._drafted(rows))
        self._send_hint()

    def _drafted(self, rows: list[Node]) -> None:
        self._drafting = False
        self._tree.decoded(rows)
        self.consider()

    def learn(self, committed: int) -> None:
        self.known = committed
        self._news_at = self._events.now
        self._tree.follow(committed)
        self.consider()

    def _send_hint(self) -> None:
        tree = self._tree
        if self._hinted is not None and self._hinted[0] is tree.root and self._hinted[1] == len(tree.nodes):
            return
        if self._link.timed and self._drafting and self._ready_at <= self._last_call():
            return
        nodes = self._useful()[: self._link.hint_nodes]
        if not nodes:
            return
        self._hinted = (tree.root, len(tree.nodes))
        self.n_hints += 1
        self.n_hinted += len(nodes)
        known = self.known
        self._events.at(self._link.rtt / 2, lambda: self.worker.hear(known, nodes))

    def _useful(self) -> list[Node]:
        """The nodes that the target can still check when they arrive, and those that lead there, in the order
        of their chances. Meanwhile it commits at least a token a pass.
        """
        late = self._link.rtt + self._events.now - self._news_at
        passed = self.known + int(late / self._link.target_seconds + 1e-9)
        best: dict[int, float] = {}
        for node in sorted(self._tree.nodes, key=lambda node: -node.pos):
            chance = max(best.get(id(node), 0.0), node.chance if node.pos >= passed else 0.0)
            best[id(node)] = chance
            if node.parent is not None:
                best[id(node.parent)] = max(best.get(id(node.parent), 0.0), chance)
        useful = [node for node in self._tree.nodes if best[id(node)] > 0]
        return sorted(useful, key=lambda node: (-best[id(node)], node.pos))

    def _last_call(self) -> float:
        """Until when a hint has to be sent that the next pass of the target is to see."""
        link = self._link
        first = self._news_at - link.rtt - link.margin
        ago = max(0.0, self._events.now - first)
        return first + math.ceil(ago / link.target_seconds - 1e-9) * link.target_seconds


# ---- the tables


def local_table(
    texts: Sequence[Text], depths: Sequence[int], *, widths: Sequence[int], n_nodes: int
) -> list[str]:
    """Tokens per pass of the target, of trees and of chains with as many passes of the draft, as Markdown."""
    columns = ["passes of the draft", "chain", *(f"tree, width {width}" for width in widths)]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for depth in depths:
        alone = chain(texts, depth).tokens_per_pass
        cells = [f"{depth}", f"{alone:.2f}"]
        for width in widths:
            found = local(texts, depth, width=width, n_nodes=n_nodes)
            ratio = found.tokens_per_pass / alone
            cells.append(f"{found.tokens_per_pass:.2f} ({ratio:.2f} x, {found.rows_per_pass:.0f} rows)")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def remote_table(
    recorded: Sequence[Ranks],
    temperature: float,
    rtts: Sequence[float],
    draft_seconds: Sequence[float],
    *,
    target_seconds: float,
    shapes: Sequence[dict[str, Any]],
) -> list[str]:
    """Tokens per second of trees as hints, against what the runtime makes of chains, as Markdown."""
    columns = ["RTT, pass of the draft", "chain", *(_name(shape) for shape in shapes)]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    texts = texts_of(recorded, temperature)
    for rtt in rtts:
        for seconds in draft_seconds:
            alone = runtime_chain(recorded, rtt=rtt, target_seconds=target_seconds, draft_seconds=seconds)
            cells = [f"{rtt * 1e3:g} ms, {seconds * 1e3:g} ms", f"{alone:.1f}"]
            for shape in shapes:
                found = remote(texts, Link(rtt, target_seconds, seconds, **shape))
                cells.append(
                    f"{found.tokens_per_s:.1f} ({found.tokens_per_s / alone:.2f} x,"
                    f" {found.n_hinted / found.n_tokens:.0f} nodes)"
                )
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def _name(shape: dict[str, Any]) -> str:
    return f"tree, width {shape['width']}, from {shape['worth']:g}, hints of {shape['hint_nodes']}"


def runtime_chain(recorded: Sequence[Ranks], **times: float) -> float:
    """Tokens per second with the chains, and by the rules, of the runtime."""
    found = [
        simulate(
            "run-ahead",
            outcomes=(one.rank == 0).tolist(),
            probabilities=one.probs[:, 0].tolist(),
            depth="runtime",
            **times,  # type: ignore[arg-type]
        )
        for one in recorded
    ]
    return sum(one.n_tokens for one in found) / sum(one.seconds for one in found)


SHAPES: list[dict[str, Any]] = [
    {"width": 4, "worth": 0.02, "hint_nodes": 64},
    {"width": 8, "worth": 0.01, "hint_nodes": 128},
    {"width": 16, "worth": 0.005, "hint_nodes": 128},
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate trees", description="Prints the tables of drafted trees."
    )
    parser.add_argument("--pair", nargs="+", default=["stories", "embedded"], choices=["stories", "embedded"])
    parser.add_argument("--stories", type=Path, help=f"their folder (default: ${STORIES_FOLDER})")
    parser.add_argument("--temperature", type=float, nargs="+", default=list(TEMPERATURES))
    parser.add_argument("--filters", action="store_true", help="llama.cpp's default top-k, top-p and min-p")
    parser.add_argument("--positions", type=int, default=2400, help="of each pair and temperature")
    parser.add_argument("--depth", type=int, nargs="+", default=[3, 4, 6, 8, 12], help="passes of the draft")
    parser.add_argument("--width", type=int, nargs="+", default=[2, 4, 8], help="rows of each")
    parser.add_argument("--nodes", type=int, default=N_NODES, help="verified at once")
    parser.add_argument("--rtt-ms", type=float, nargs="*", default=[50.0, 100.0])
    parser.add_argument("--draft-ms", type=float, nargs="+", default=[3.0, 10.0], help="a pass of the draft")
    parser.add_argument("--target-ms", type=float, default=30.0, help="a pass of the target")
    args = parser.parse_args(argv)
    here = pairs(args.stories)
    for name in args.pair:
        if name not in here:
            print(f"{name}: {MISSING}", file=sys.stderr)
            continue
        for temperature in args.temperature:
            recorded = here[name].record(temperature, n_positions=args.positions, plain=not args.filters)
            texts = texts_of(recorded, temperature)
            print(f"\n{name}, temperature {temperature:g}, {sum(map(len, texts))} positions\n")
            print(*local_table(texts, args.depth, widths=args.width, n_nodes=args.nodes), "", sep="\n")
            if args.rtt_ms:
                rows = remote_table(
                    recorded,
                    temperature,
                    [ms / 1e3 for ms in args.rtt_ms],
                    [ms / 1e3 for ms in args.draft_ms],
                    target_seconds=args.target_ms / 1e3,
                    shapes=SHAPES,
                )
                print(*rows, sep="\n", flush=True)
    return 0
