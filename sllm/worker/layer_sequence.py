"""One sequence of a worker of layers: what its client asks for, the answers, and the slot of its memory.

The stream of a sequence has two sides: the client's, which the network's threads use, and the scheduler's.
Nothing here computes, and nothing knows of the network.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sllm.errors import ContextFullError, UnsupportedModelError
from sllm.targets.tree import TokenTree
from sllm.worker.passes import Slot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from sllm.engine.sampling import SamplingParams
    from sllm.worker.passes import Limits
    from sllm.worker.users import Account

__all__ = ["Batch", "LayerAnswer", "LayerRequest", "LayerSequence", "LayerSlot", "SequenceHost"]

_BACKLOG = 32
"""Requests of one sequence whose answers its client has not been sent yet; further ones have to wait."""

_BACKLOG_BYTES = 1 << 26
"""Bytes of their hidden states. One request of any size is taken."""


@dataclass(frozen=True)
class LayerRequest:
    """Hidden states that enter the first layer.

    Attributes:
        pos: of the first.
        hidden: float32 (n, n_embd).
        silent: the hidden states that come out are not needed.
        tokens: with an output, those of the rows.
        n_select: with an output, the last so many rows are the text's last token and drafted ones.
        parents: of a tree: for each of the last rows, which of these it follows; -1: the row before them.
        spent: seconds that the layers before, on other workers, took for it.
        before: of a request that is computed in parts, what the parts before this one came to.

    """

    pos: int
    hidden: npt.NDArray[np.float32]
    silent: bool = False
    tokens: tuple[int, ...] = ()
    n_select: int = 0
    parents: tuple[int, ...] = ()
    spent: float = 0.0
    before: tuple[LayerAnswer, ...] = ()

    @property
    def n_tied(self) -> int:
        """The last so many rows cannot be parted."""
        return max(self.n_select, len(self.parents) + 1 if self.parents else 0)

    @property
    def end(self) -> int:
        """The position after the last row that stays; of a tree it is the main path that does."""
        n = len(self.hidden)
        if not self.parents:
            return self.pos + n
        nodes = TokenTree(tuple(range(len(self.parents))), self.parents)
        return self.pos + n - len(nodes) + len(nodes.main_path())

    def split(self, n: int) -> tuple[LayerRequest, LayerRequest]:
        """The first ``n`` rows, none of which is tied to the last, and the others."""
        first = replace(
            self, hidden=self.hidden[:n], tokens=self.tokens[:n], n_select=0, parents=(), spent=0.0
        )
        rest = replace(self, pos=self.pos + n, hidden=self.hidden[n:], tokens=self.tokens[n:])
        return first, rest


@dataclass(frozen=True)
class LayerAnswer:
    """What a request came to: hidden states (None: not needed), or selected tokens."""

    pos: int
    n_rows: int
    hidden: npt.NDArray[np.float32] | None
    tokens: tuple[int, ...]
    n_accepted: int
    n_verified: int
    seconds: float

    def after(self, before: tuple[LayerAnswer, ...]) -> LayerAnswer:
        """The answer to a whole request, of which this is the last part."""
        if not before:
            return self
        seconds = self.seconds + sum(part.seconds for part in before)
        n_rows = self.n_rows + sum(part.n_rows for part in before)
        if self.tokens:
            return replace(self, n_rows=n_rows, seconds=seconds)
        parts = [part.hidden for part in (*before, self) if part.hidden is not None]
        hidden = np.concatenate(parts) if parts else None
        return replace(self, pos=before[0].pos, n_rows=n_rows, hidden=hidden, seconds=seconds)


class SequenceHost(Protocol):
    """What a sequence needs of the scheduler that it belongs to."""

    limits: Limits

    @property
    def max_rows(self) -> int:
        """Rows of one request."""

    @property
    def max_select(self) -> int:
        """Rows of one request after which a token may be selected."""

    @property
    def n_ctx(self) -> int:
        """Positions of one sequence."""

    @property
    def has_output(self) -> bool:
        """Whether the layers end in the output."""

    @property
    def can_branch(self) -> bool:
        """Whether the layers' memory holds trees."""

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise ValueError if one of these is outside the vocabulary."""

    def wake(self) -> None:
        """Look for something to do."""

    def let_go(self, sequence: LayerSequence, *, keep: bool) -> None:
        """The stream of a sequence has ended."""


class LayerSequence:
    """The stream of one sequence. Its client's side may be used from any thread: :meth:`submit`,
    :meth:`answers`, :meth:`detach`, :meth:`release`.

    Attributes:
        slot: where its memory is.
        account: of the user whose sequence it is, and ``user``, that one's name.
        n_kept: positions that were in memory when it began.
        pending: requests that no pass has taken.
        ended: why it has ended; None: it has not.

    """

    def __init__(
        self,
        scheduler: SequenceHost,
        sequence_id: int,
        slot: LayerSlot,
        sampling: SamplingParams | None,
        text_start: int,
        account: Account,
    ) -> None:
        self._scheduler = scheduler
        self.account = account
        self.user = account.name
        self.sequence_id = sequence_id
        self.slot = slot
        self.sampling = sampling
        self.compiled: object = None  # what it is compiled to, which others' then do not push out
        self.text_start = text_start
        self.n_kept = 0
        self.next_pos = 0  # after everything that was asked for
        self.pending: deque[LayerRequest] = deque()
        self.ended: str | None = None
        self.turn = 0  # the pass that it was in last
        self.heard = time.monotonic()  # when it asked for something last
        self._answered = self.heard  # when its client had all that it had asked for
        self._waited = 0.0  # seconds before that in which it had asked for nothing
        self._rest: LayerRequest | None = None  # of the one that is being computed
        self.handed: float | None = None  # when its client's side took the answer that it is sending
        self.on_stuck: Callable[[], object] = lambda: None
        """Called when an answer could not be sent for the idle time: the client does not read."""
        self._answers: deque[LayerAnswer | Exception] = deque()
        self._sizes: deque[int] = deque()  # bytes of the requests whose answers were not sent
        self._finished = False
        self._changed = threading.Condition()

    @property
    def length(self) -> int:
        """Positions in memory."""
        return self.slot.length

    def _is_over(self) -> bool:
        return self.ended is not None

    def submit(self, request: LayerRequest) -> None:
        """Ask for rows; blocks while many requests or answers are waiting. Does nothing once it has ended.

        Raises:
            ValueError: a position that leaves a gap, no rows, a wrong number of tokens, or parents that make
                no tree.
            UnsupportedModelError: a tree that these layers' memory cannot hold.
            ContextFullError: no room for them.
            BusyError: the user has had its tokens of this minute.

        """
        if self._is_over():
            return  # others may use other layers by now
        self._check(request)
        self.account.check_rate()
        size = request.hidden.nbytes

        def room() -> bool:
            few = len(self._sizes) < _BACKLOG and sum(self._sizes) + size <= _BACKLOG_BYTES
            return not self._sizes or few or self._is_over()

        with self._changed:
            self._changed.wait_for(room)
            if self._is_over():
                return
            self.next_pos = request.end
            self.heard = time.monotonic()
            if not self._sizes:
                self._waited += self.heard - self._answered
            self._sizes.append(size)
            self.pending.append(request)
        self._scheduler.wake()

    def _check(self, request: LayerRequest) -> None:
        n, scheduler = len(request.hidden), self._scheduler
        if not 1 <= n <= scheduler.max_rows:
            raise ValueError(f"{n} rows at once, expected 1 to {scheduler.max_rows}")
        if not 0 <= request.pos <= self.next_pos:
            raise ValueError(
                f"rows at position {request.pos} leave a gap: the sequence ends at {self.next_pos}"
            )
        if request.pos + n > scheduler.n_ctx:
            raise ContextFullError(f"the worker holds {scheduler.n_ctx} positions of a sequence")
        if scheduler.has_output:
            most = min(n, scheduler.max_select)
            if len(request.tokens) != n or not 0 <= request.n_select <= most:
                raise ValueError(
                    f"{n} rows with {len(request.tokens)} tokens, {request.n_select} to select; expected as"
                    f" many tokens as rows and at most {most} to select"
                )
            scheduler.check_tokens(request.tokens)
            if request.parents and request.n_select != len(request.parents) + 1:
                raise ValueError(
                    f"a tree of {len(request.parents)} tokens with {request.n_select} to select, expected"
                    " one more than it has"
                )
        elif request.tokens or request.n_select:
            raise ValueError("these layers end before the output: they take no tokens")
        if request.parents:
            self._check_tree(request)

    def _check_tree(self, request: LayerRequest) -> None:
        n, n_nodes = len(request.hidden), len(request.parents)
        if not self._scheduler.can_branch:
            raise UnsupportedModelError("the memory of these layers holds no trees")
        if n_nodes >= n:
            raise ValueError(f"{n} rows, {n_nodes} of them of a tree, expected at least one before it")
        TokenTree(request.tokens[-n_nodes:] or tuple(range(n_nodes)), request.parents)  # raises ValueError

    def finish(self) -> None:
        """Nothing more will be asked for: the sequence ends after the last answer; its memory is kept."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def answers(self) -> Iterator[LayerAnswer]:
        """What the requests come to, in their order, until the sequence ends; :attr:`ended` then says why.
        Blocks.

        Raises:
            SllmError, ValueError: the computation failed.

        """
        idle = self._scheduler.limits.idle_seconds

        def news() -> bool:
            over = self._finished and not self._sizes
            return bool(self._answers) or self.ended is not None or over

        while True:
            with self._changed:
                heard = self._changed.wait_for(news, idle)
                if self._answers:
                    answer = self._answers.popleft()
                    self.handed = time.monotonic()
                elif self.ended is not None:
                    return
                elif not self._sizes and (self._finished or not heard):
                    self.ended = "finished" if self._finished else "idle"
                    break
                else:  # it is being computed
                    continue
            if isinstance(answer, Exception):
                self.handed = None
                self._forget("failed")
                raise answer
            yield answer
            with self._changed:
                self.handed = None
                self._sizes.popleft()
                self._answered = time.monotonic()
                self._changed.notify_all()
        self._let_go()

    def detach(self) -> None:
        """The client is gone, perhaps to return; the memory is kept."""
        self.end("detached")
        self._let_go()

    def release(self) -> None:
        """The client does not need the sequence any more; its memory is freed."""
        self._forget("released")

    def _forget(self, reason: str) -> None:
        """End for good, whatever else has ended it."""
        with self._changed:
            self.ended = reason
            self._changed.notify_all()
        self._let_go()

    def _let_go(self) -> None:
        """Leave the slot.

        The thread that reads and the one that answers both come here, in any order; so what has ended the
        sequence decides whether its memory is kept, and not who comes first.
        """
        self._scheduler.let_go(self, keep=self.ended not in ("failed", "released"))

    # ---- the scheduler's side

    def end(self, reason: str) -> None:
        """No more answers."""
        with self._changed:
            if self.ended is None:
                self.ended = reason
            self._changed.notify_all()

    def waited(self) -> float:
        """Seconds, altogether, in which its client has asked for nothing; 0 where it has now."""
        with self._changed:
            return 0.0 if self._sizes else self._waited + time.monotonic() - self._answered

    def take(self, n_rows: int) -> LayerRequest | None:
        """The next request; the first ``n_rows`` of it where they are fewer and it can be split there."""
        with self._changed:
            if not self.pending or self.ended is not None:
                return None
            request = self.pending.popleft()
            n_known = len(request.hidden) - request.n_tied
            if n_rows >= len(request.hidden) or n_known == 0:
                self._rest = None
                return request
            first, self._rest = request.split(min(n_rows, n_known))
            return first

    def put_back(self, done: LayerAnswer) -> bool:
        """Let the rest of a request that was split be next; whether there is one."""
        with self._changed:
            rest, self._rest = self._rest, None
            if rest is not None:
                self.pending.appendleft(replace(rest, before=(*rest.before, done)))
            return rest is not None

    def tell(self, answer: LayerAnswer | Exception) -> None:
        """Hand an answer to the client's side."""
        with self._changed:
            self._answers.append(answer)
            self._changed.notify_all()


@dataclass
class LayerSlot(Slot["LayerSequence"]):
    """A sequence of the range's memory.

    Attributes:
        sequence_id: whose memory it holds; 0: nobody's, or that of one who will not return.
        user: whose sequence that is; another's may have the same number.
        length: positions in memory.
        busy: a pass writes to it, perhaps for a stream that has ended meanwhile.

    """

    sequence_id: int = 0
    user: str = ""
    length: int = 0
    busy: bool = False

    def holds(self, sequence: LayerSequence) -> bool:
        """Whether the memory is that of this stream, or of a later one of the same sequence."""
        return self.owner is sequence or self.is_of(sequence.sequence_id, sequence.user)

    def is_of(self, sequence_id: int, user: str) -> bool:
        """Whether the memory is that of this sequence."""
        return sequence_id != 0 and (sequence_id, user) == (self.sequence_id, self.user)


Batch = list[tuple[LayerSequence, LayerRequest]]
