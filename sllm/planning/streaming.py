"""A draft and a worker that run at their own pace, a round trip apart, simulated.

The rules are the runtime's own. What a client does is what :class:`sllm.generation.pipelined.PipelinedRuns`
does: :class:`~sllm.draft.ahead.DraftAhead` says how far a chain goes and how often a hint is sent, and
:class:`~sllm.generation.tree_ahead.TreeAhead` grows a tree. The worker is that of
:mod:`sllm.worker.scheduler`: it also decodes without a hint (run-ahead), and verifies as many tokens of the
newest hint as :func:`~sllm.worker.scheduler.rows_to_check` finds worth their time.
docs/how-it-works/run-ahead.md explains why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm.draft.ahead import DraftAhead
from sllm.draft.confidence import UNKNOWN_PROB
from sllm.draft.streak import HintTrust
from sllm.draft.tree import DraftedTree
from sllm.generation.tree_ahead import MOST_SHOWN, TreeAhead
from sllm.planning.events import Events, Simulated
from sllm.planning.recorded import Replay
from sllm.targets.tree import TokenTree
from sllm.wire.protocol import padded, pb, to_hint
from sllm.worker.branches import Branches
from sllm.worker.scheduler import rows_to_check
from sllm.worker.session import MAX_HINT_ROWS, MAX_TREE_ROWS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sllm.draft.length import PassTimes
    from sllm.planning.recorded import Recorded

__all__ = ["with_hints"]


def with_hints(
    text: Recorded,
    passes: PassTimes,
    draft: PassTimes,
    round_trip: float,
    *,
    trees: bool,
    run_ahead: bool = True,
    own: Sequence[tuple[int, float]] = (),
) -> Simulated:
    """Simulate a text with hints, from when the client begins to draft until it has the last token.

    Args:
        text: as recorded.
        passes: time of a pass of the worker by number of rows, until the next one can begin.
        draft: time of a pass of the draft by number of rows.
        round_trip: seconds; half of it each way.
        trees: whether hints are trees; otherwise chains.
        run_ahead: whether the worker decodes without hints.
        own: if the worker drafts itself: how many tokens each pass committed and how long it took when the
            text was streamed. Where a hint gives fewer tokens, a pass gives as many as then.

    """
    events = Events()
    worker = _Worker(text, passes, events, round_trip, trees=trees, run_ahead=run_ahead, own=own)
    client = _Client(text, draft, events, round_trip, trees=trees, run_ahead=run_ahead)
    worker.client, client.worker = client, worker
    events.at(round_trip / 2, worker.begin)
    client.consider()
    while client.known < len(text.truth):
        events.next()
    return Simulated(
        len(text.truth),
        events.now,
        worker.n_passes,
        client.n_hints,
        client.n_drafted,
        worker.n_accepted,
        worker.n_rows,
        client.n_bytes,
    )


class _Worker:
    """Has the target, and so the truth."""

    client: _Client

    def __init__(
        self,
        text: Recorded,
        passes: PassTimes,
        events: Events,
        round_trip: float,
        *,
        trees: bool,
        run_ahead: bool,
        own: Sequence[tuple[int, float]],
    ) -> None:
        self._truth = text.truth
        self._passes = passes
        self._events = events
        self._half = round_trip / 2
        self._most = MAX_TREE_ROWS if trees else MAX_HINT_ROWS
        self._run_ahead = run_ahead
        self._branches = Branches(HintTrust())
        self._own = _Own(own, len(text.truth)) if own else None
        self._committed = self._n_again = 0
        self._hint: tuple[int, TokenTree] = (0, TokenTree())
        self._asked = False  # for a pass, by a hint that none has answered
        self._busy = True  # until the request has come
        self.n_passes = self.n_accepted = self.n_rows = 0

    def begin(self) -> None:
        """The request has come."""
        self._busy = False
        self._pass()

    def hear(self, pos: int, tree: TokenTree) -> None:
        """A hint has come, which replaces all earlier ones."""
        self._hint = (pos, tree)
        self._asked = self._rest() is not None
        self._pass()

    def _rest(self) -> TokenTree | None:
        """What the hint says behind what is committed; None: it disagrees with that."""
        pos, tree = self._hint
        behind = self._committed - pos
        return tree.after(self._truth[pos : self._committed]) if behind <= len(tree) else None

    def _pass(self) -> None:
        left = len(self._truth) - self._committed
        rest = self._rest()
        if self._busy or left == 0 or not (rest or (self._asked and rest is not None) or self._run_ahead):
            return
        # The last token of a text is the target's own in any case.
        usable = (rest or TokenTree()).usable(1 << 31, min(left - 1, MAX_HINT_ROWS), self._most)
        (n,) = rows_to_check(self._passes, [self._branches.worths(usable)], self._n_again)
        checked = usable.head(n)
        n_right = len(checked.path(self._truth[self._committed : len(self._truth) - 1]))
        seconds = self._passes.estimate(1 + len(checked) + self._n_again)
        n_tokens = n_right + 1
        if self._own is not None:
            alone, took = self._own.at(self._committed)
            if alone > n_tokens or not checked:  # it goes by its own draft where that says more
                n_tokens, seconds = max(alone, n_tokens), max(took, seconds)
        self._asked, self._busy = False, True
        self.n_passes += 1
        self.n_rows += len(checked) + self._n_again
        truth = self._truth[self._committed : self._committed + n_tokens]
        self._events.at(seconds, lambda: self._commit(truth, usable, checked, n_right, seconds))

    def _commit(
        self, tokens: tuple[int, ...], hint: TokenTree, checked: TokenTree, n_right: int, seconds: float
    ) -> None:
        self._busy = False
        self._branches.observe_truth(hint, tokens)
        self._n_again = checked.n_beside(tokens[:n_right])
        self._committed += len(tokens)
        self.n_accepted += n_right
        hinted = len(checked) > 0
        self._events.at(self._half, lambda: self.client.learn(tokens, seconds, hinted=hinted))
        self._pass()


class _Own:
    """What the worker commits by its own draft: to where it came the last time, from any position on."""

    def __init__(self, passes: Sequence[tuple[int, float]], n_tokens: int) -> None:
        self._ends: list[int] = []
        seconds, end = [took for _, took in passes], 0
        while end < n_tokens:
            for n, _ in passes:
                self._ends += [end + n] * n
                end += n
        self._seconds = sorted(seconds)[len(seconds) // 2]
        self._n_tokens = n_tokens

    def at(self, pos: int) -> tuple[int, float]:
        """So many tokens from ``pos`` on, in so many seconds."""
        return min(self._ends[pos], self._n_tokens) - pos, self._seconds


class _Client:
    """Has the draft."""

    worker: _Worker

    def __init__(
        self,
        text: Recorded,
        draft: PassTimes,
        events: Events,
        round_trip: float,
        *,
        trees: bool,
        run_ahead: bool,
    ) -> None:
        self._truth = text.truth
        self._replay = Replay(text, draft)
        self._events = events
        self._round_trip = round_trip
        self._run_ahead = run_ahead
        self._ahead = DraftAhead(run_ahead=run_ahead)
        self._ahead.observe_round_trip(round_trip)  # the texts before this one have told
        self._trees = TreeAhead() if trees else None
        self._chain: list[int] = []
        self._probs: list[float] = []
        self._drafting = False
        self._void = False  # what is being drafted goes on from something wrong
        self._exhausted = False
        self._hinted: tuple[int, int] | None = None
        self._hinted_at = float("-inf")
        self._news_at = 0.0
        self._looks = False  # again, when the next hint may be sent
        self.known = 0
        self.n_hints = self.n_bytes = 0

    @property
    def n_drafted(self) -> int:
        return self._replay.n_drafted

    def consider(self) -> None:
        """Draft on, if that is worth it and nothing is being drafted; and send what has not been sent."""
        self._draft_more()
        self._send_hint()

    # ---- the draft

    def _draft_more(self) -> None:
        room, ahead, trees = len(self._truth) - self.known, self._ahead, self._trees
        if self._drafting or self._exhausted or room <= (len(self._chain) if trees is None else 0):
            return
        waited = self._events.now - self._news_at
        if not ahead.worth_more(self._probs if trees is None else (), waited):
            return
        pos = self.known
        if trees is None:
            begin = pos + len(self._chain)
            n = min(ahead.step, room - len(self._chain))
            tokens, probs, seconds = self._replay.chain(pos, self._chain, n)
            self._events.at(seconds, lambda: self._take_chain(tokens, probs, begin, seconds))
        else:
            shape = trees.shape(room, ahead.pass_seconds, ahead.draft_seconds)
            if shape is None:
                self._exhausted = True
                return
            tree, seconds = self._replay.tree(pos, shape, trees.known())
            self._events.at(seconds, lambda: self._take_tree(tree, pos, seconds))
        self._drafting, self._void = True, False

    def _take_chain(self, tokens: list[int], probs: list[float], begin: int, seconds: float) -> None:
        self._drafting = False
        self._ahead.observe_draft(len(tokens), seconds)
        passed = max(self.known - begin, 0)  # tokens that were committed meanwhile
        agrees = tuple(tokens[:passed]) == self._truth[begin : begin + passed][: len(tokens)]
        if not self._void and agrees:
            self._exhausted = not tokens
            self._chain += tokens[passed:]
            self._probs += probs[passed:]
        self.consider()

    def _take_tree(self, tree: DraftedTree, pos: int, seconds: float) -> None:
        assert self._trees is not None
        self._drafting = False
        self._ahead.observe_draft(tree.n_passes, seconds)
        if self._trees.take(tree, self._truth[pos : self.known]):
            self._chain, self._probs = self._trees.main_path()
        else:
            self._exhausted = not tree.tokens
        self.consider()

    # ---- the news

    def learn(self, tokens: tuple[int, ...], seconds: float, *, hinted: bool) -> None:
        """The worker has committed ``tokens``, in a pass of so many seconds."""
        n, ahead, trees = len(tokens), self._ahead, self._trees
        self._news_at = self._events.now
        if trees is None or not trees.tree.tokens:
            n_right = ahead.observe_truth(self._chain, self._probs, tokens)
        else:
            n_right = trees.follow(tokens)
            path = [*tokens[:n_right], -1]
            ahead.observe_truth(path, [UNKNOWN_PROB] * len(path), tokens)
        ahead.observe_pass(seconds, None if hinted else n)
        ahead.observe_round_trip(self._round_trip)
        self.known += n
        self._exhausted = False
        if trees is not None:
            self._chain, self._probs = trees.main_path()
            known = bool(self._chain) and self._hinted is not None and not trees.was_cut
            self._hinted = (self.known, trees.version) if known else None
        elif n_right < min(n, len(self._chain)):
            self._chain, self._probs, self._hinted, self._void = [], [], None, True
        else:
            del self._chain[:n], self._probs[:n]
        self.consider()

    # ---- the hints

    def _send_hint(self) -> None:
        trees = self._trees
        size = self.known + len(self._chain) if trees is None else trees.version
        state = (self.known, size)
        if state == self._hinted:
            return
        if not self._chain:
            if not self._run_ahead and not self._drafting:
                self._hint(state)  # nothing to say, but the worker waits to be asked
            return
        grown = self._hinted is None or state[1] > self._hinted[1]
        wait = self._hinted_at + self._ahead.interval - self._events.now
        if grown and (wait <= 1e-9 or not self._drafting):
            self._hint(state)
        elif grown and not self._looks:
            self._looks = True
            self._events.at(wait, self._look)

    def _look(self) -> None:
        self._looks = False
        self.consider()

    def _hint(self, state: tuple[int, int]) -> None:
        now = self._events.now
        tree = TokenTree.chain(self._chain)
        if self._trees is not None and self._trees.tree.tokens:
            shown = self._trees.hint(MOST_SHOWN, self._ahead.n_passed(now - self._news_at))
            tree = TokenTree(shown.tokens, shown.parents)
        self._hinted, self._hinted_at = state, now
        pos = self.known
        self.n_hints += 1
        parents = None if tree.is_chain else tree.parents
        message = padded(pb.Up(hint=to_hint(pos, tree.tokens, parents, self.n_hints)))
        self.n_bytes += message.ByteSize()
        self._events.at(self._round_trip / 2, lambda: self.worker.hear(pos, tree))
