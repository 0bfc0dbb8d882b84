"""One text on a worker: what its client asks for, what happens to it, and how far it has come."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from sllm.draft.confidence import Confidence
from sllm.draft.growth import Shares
from sllm.draft.streak import HintTrust
from sllm.targets.tree import TokenTree
from sllm.worker.branches import Branches
from sllm.worker.passes import Slot
from sllm.worker.token_file import DEFAULT_NAME
from sllm.worker.users import Account

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from sllm.engine.sampling import SamplingParams
    from sllm.targets.base import Commit
    from sllm.worker.draft_budget import Chance
    from sllm.worker.passes import PassLoop

__all__ = [
    "MAX_HINT_ROWS",
    "MAX_TREE_ROWS",
    "Draining",
    "Event",
    "Finished",
    "Hint",
    "Opened",
    "Scored",
    "Session",
    "TextSlot",
]

MAX_HINT_ROWS = 16
"""Hinted tokens one after the other that one pass checks at most: longer hints are seldom right to their end.
"""

MAX_TREE_ROWS = 32
"""Hinted tokens of one session that one pass checks at most, on all branches together."""


@dataclass(frozen=True)
class Opened:
    """The prompt is computed; times are seconds."""

    n_reused: int
    prompt_seconds: float
    queued_seconds: float


@dataclass(frozen=True)
class Scored:
    """The scores of a text: float32 and int32 (n,), and seconds of computing."""

    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]
    n_reused: int
    seconds: float


@dataclass(frozen=True)
class Draining:
    """The worker is being shut down: what is not at its end in so many seconds is handed back."""

    seconds: float


@dataclass(frozen=True)
class Finished:
    """The end of a text. ``error`` is what went wrong, if something did."""

    reason: str
    error: Exception | None = None


Event: TypeAlias = "Opened | Commit | Scored | Draining | Finished"
"""What happens to a session."""


@dataclass(frozen=True)
class Hint:
    """What a client expects at ``pos``; ``id`` grows with each hint, 0: none has come yet.

    ``received`` is by ``time.monotonic()``.
    """

    pos: int
    tree: TokenTree
    id: int
    received: float


@dataclass
class TextSlot(Slot["Session"]):
    """A sequence of the context, and of the worker's own draft.

    Attributes:
        held: tokens in its memory while no session has it.
        user: whose they are.
        n_in_draft: committed tokens that the draft's context holds.

    """

    held: list[int] = field(default_factory=list)
    user: str = ""
    n_in_draft: int = 0


class Session:
    """One text on a worker. Its client's side may be used from any thread: :meth:`hint`, :meth:`cancel`,
    :meth:`events`.

    Args:
        loop: what computes it.
        tokens: prompt and text so far, int32 (n,).
        start: the first of them that is generated text.
        sampling: how to select.
        end: the text's length at which it ends, in tokens with the prompt.
        asked_end: the one that the client asked for; None: the context's.
        run_ahead: whether passes go on without hints.
        text_id: the client's name for the text; 0: none.
        score_from: the first token to be scored; None: the text is to be continued.
        can_branch: whether one can check those of several branches.
        account: of the user whose text it is; None: of anybody.

    Attributes:
        user: the name of that user; texts of one user may use each other's memory.

    """

    def __init__(
        self,
        loop: PassLoop[Session],
        tokens: npt.NDArray[np.int32],
        start: int,
        sampling: SamplingParams,
        end: int,
        asked_end: int | None,
        *,
        run_ahead: bool,
        text_id: int = 0,
        score_from: int | None = None,
        can_branch: bool = False,
        account: Account | None = None,
    ) -> None:
        self._loop = loop
        self.account = account or Account(DEFAULT_NAME)
        self.user = self.account.name
        self.text: list[int] = tokens.tolist()
        self.start = start
        self.sampling = sampling
        self.compiled: object = None  # what it is compiled to, which others' then do not push out
        self.end = end
        self.asked_end = asked_end
        self.run_ahead = run_ahead
        self.text_id = text_id
        self.score_from = score_from
        self.n_prompt = len(self.text)
        self.n_computed = 0  # of the text
        self.slot: TextSlot | None = None
        self.created = self.heard = time.monotonic()
        self.queued_seconds = self.prompt_seconds = 0.0
        self.waited_seconds = 0.0  # for its client, with a place
        self.waiting_since: float | None = None
        self.n_reused = 0
        self.n_passes = self.n_drafted = self.n_accepted = 0
        self.newest = Hint(0, TokenTree(), 0, self.created)  # replaces every earlier one
        self._can_branch = can_branch
        self._rest: tuple[Hint, int, TokenTree | None] = (self.newest, self.n_prompt, None)  # see _rest_of()
        self.answered = 0  # id of the last hint that a pass has answered
        self.hint_trust = HintTrust()
        self.branches = Branches(self.hint_trust)
        self.own_trust = Confidence()  # what the worker's own draft's word is worth
        self.own_shares = Shares()  # the same, where it is a tree
        self.own_chances: dict[int, Chance] = {}  # that it goes on rightly, by the rows of its passes
        self.n_again = 0  # tokens that the next pass computes again: see TokenTree.n_beside
        self.can_draft = True  # False: the worker's own draft cannot follow the text
        self.scores: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]] = []
        self.on_stuck: Callable[[], object] = lambda: None
        """Called on the scheduler's thread when the session has ended because its client does not read: no
        status would reach it, and its call would hold a thread.
        """
        self.ending: Finished | None = None  # how it is to end at the next opportunity
        self.finished = False
        self._events: queue.SimpleQueue[Opened | Commit | Scored | Draining | Finished] = queue.SimpleQueue()

    # ---- the client's side

    def hint(
        self, pos: int, tokens: Sequence[int], hint_id: int, parents: Sequence[int] | None = None
    ) -> None:
        """Say what probably comes at ``pos``: a tree, or without ``parents`` a chain; replaces every earlier
        hint.

        Raises:
            ValueError: tokens and parents are no tree.

        """
        now = time.monotonic()
        tree = TokenTree.of(tokens, parents)
        if not self._can_branch and not tree.is_chain:
            tree = TokenTree.chain(tree.main_path())
        self.newest = Hint(pos, tree, hint_id, now)  # heard of when it leads to a pass
        self._loop.wake()

    def cancel(self) -> None:
        """End the session; its memory is kept for a while."""
        self.end_with(Finished("cancelled"))
        self._loop.wake()

    def refuse(self, error: Exception) -> None:
        """End the session with an error, which its client gets."""
        self.end_with(Finished("failed", error))
        self._loop.wake()

    def events(self) -> Iterator[Event]:
        """What happens to the session, until :class:`Finished`; blocks."""
        while True:
            event = self._events.get()
            self.heard = time.monotonic()
            if self.backlog >= self._loop.limits.backlog - 1:  # it may go on
                self._loop.wake()
            yield event
            if isinstance(event, Finished):
                return

    # ---- the scheduler's side

    def end_with(self, event: Finished) -> None:
        """End the session at the next opportunity; the first reason counts."""
        if self.ending is None:
            self.ending = event

    def tell(self, event: Event) -> None:
        """Hand an event to the client's side."""
        self._events.put(event)

    @property
    def backlog(self) -> int:
        """Events that the client's side has not taken."""
        return self._events.qsize()

    @property
    def is_blocked(self) -> bool:
        """Whether the client's side has to take events before the text goes on."""
        return self.backlog >= self._loop.limits.backlog

    @property
    def n_to_compute(self) -> int:
        """Tokens that are not in memory yet, without the last one: that is decoded by the next pass."""
        return len(self.text) - 1 - self.n_computed

    @property
    def scores_next(self) -> bool:
        """Whether the next tokens to be computed are scored."""
        return self.score_from is not None and self.n_computed >= self.score_from - 1

    @property
    def is_full(self) -> bool:
        """Whether the text has the length at which it ends."""
        return len(self.text) >= self.end

    @property
    def end_reason(self) -> str:
        """Why a text ends that is full."""
        return "length" if self.end == self.asked_end else "context"

    def waits_for_client(self, n_vocab: int) -> bool:
        """Whether there is nothing to compute until its client reads, or asks for something."""
        if self.is_blocked:
            return True
        return self.n_to_compute == 0 and not self.run_ahead and not self.usable_hint(n_vocab, 1)[1]

    def observe_waiting(self, now: float, *, waits: bool) -> None:
        """Note at ``now``, by ``time.monotonic()``, whether it waits for its client."""
        if self.waiting_since is not None:
            self.waited_seconds += now - self.waiting_since
        self.waiting_since = now if waits else None

    def usable_hint(self, n_vocab: int, max_rows: int) -> tuple[TokenTree, bool, int]:
        """What the newest hint says after the committed text: at most ``max_rows`` tokens, on every branch
        those before the first one outside the vocabulary; whether its client asks for a pass; and its id.

        A hint that disagrees with the text is unusable, and its sender will see the commit that it disagrees
        with.
        """
        hint = self.newest
        rest = self._rest_of(hint)
        if rest is None:
            return TokenTree(), False, hint.id
        n_deep = min(self.end - len(self.text) - 1, MAX_HINT_ROWS)
        usable = rest.usable(n_vocab, n_deep, max_rows)
        return usable, len(rest) > 0 or hint.id > self.answered, hint.id

    def _rest_of(self, hint: Hint) -> TokenTree | None:
        """What a hint says after the committed text; None: it disagrees with that."""
        n_text = len(self.text)
        if self._rest[0] is not hint or self._rest[1] != n_text:
            agrees = 0 <= n_text - hint.pos <= len(hint.tree)
            self._rest = (hint, n_text, hint.tree.after(self.text[hint.pos :]) if agrees else None)
        return self._rest[2]
