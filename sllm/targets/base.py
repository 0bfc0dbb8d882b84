"""The common interface of all targets: a local model, a remote worker, a split model, a serving engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from numpy import float32, int32

    from sllm.engine.mtp import Heads
    from sllm.engine.sampling import SamplingParams
    from sllm.engine.vocab import Vocab

__all__ = [
    "Commit",
    "Generation",
    "MtpTarget",
    "PipelinedGeneration",
    "RemoteStats",
    "RemoteWork",
    "Scorer",
    "Scores",
    "Target",
]


@dataclass(frozen=True)
class Commit:
    """Tokens that are now part of the text.

    Attributes:
        pos: the absolute position of the first token (the prompt's tokens are 0 .. n-1).
        tokens: at least one token id.
        n_accepted: how many of them, from the first on, had been hinted before.
        n_verified: how many hinted tokens the pass checked, accepted or not.
        seconds: duration of the pass; in a split, from sending to the answer, even if other windows were in
            transit.
        n_own_accepted, n_own_verified: of these, how many only the target itself had drafted.

    """

    pos: int
    tokens: tuple[int, ...]
    n_accepted: int
    n_verified: int
    seconds: float
    n_own_accepted: int = 0
    n_own_verified: int = 0

    @property
    def own_draft(self) -> bool:
        """Whether the target itself had drafted most of the accepted tokens; if none was accepted, most of
        the checked ones.
        """
        if self.n_accepted:
            return 2 * self.n_own_accepted > self.n_accepted
        return 2 * self.n_own_verified > self.n_verified


@dataclass
class RemoteStats:
    """Statistics of a generation's link to a remote target. Times are in seconds; bytes are those of
    messages, without framing and TLS (:data:`sllm.wire.protocol.FRAMING`).

    Attributes:
        round_trip: a running estimate; 0 before the first hint has come back.
        bytes_up, bytes_down: sent and received.
        n_hints: hints sent.
        workers: the workers that have served the text, as ``HOST:PORT``, in order; a worker to which it
            returned is listed again.
        n_moves: how often the text moved to another worker.
        n_hedged: how often a second worker was asked because the first one had not answered in time.
        n_hedges_won: how often the second worker answered first.
        hedge_tokens: tokens of the text that the slower workers may have computed in vain.
        n_reconnects: how often the link was lost and restored.
        lost_seconds: without a link.
        n_own_draft: accepted tokens that the remote side had drafted itself.
        n_again: rows of a split that were sent again: those of accepted tokens off a tree's main path, and
            one of each window that was sent ahead.
        n_ahead: windows of a split that were sent before the answer to the previous one.
        n_void: windows of a split whose answers were dropped because a token before them was wrong.
        n_reused: tokens of the prompt that the remote side had in memory.
        prompt_seconds: time to compute the rest of the prompt.
        queued_seconds: how long the text waited for a place.
        n_hops: in a split with several workers: how many of them sent rows directly to the next one.
        relayed: between which workers the rows were relayed by this process, and why.

    """

    round_trip: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    n_hints: int = 0
    n_reconnects: int = 0
    lost_seconds: float = 0.0
    n_own_draft: int = 0
    n_again: int = 0
    n_ahead: int = 0
    n_void: int = 0
    n_reused: int = 0
    prompt_seconds: float = 0.0
    queued_seconds: float = 0.0
    n_hops: int = 0
    relayed: tuple[str, ...] = ()
    workers: tuple[str, ...] = ()
    n_moves: int = 0
    n_hedged: int = 0
    n_hedges_won: int = 0
    hedge_tokens: int = 0

    def observe_round_trip(self, seconds: float) -> None:
        """Update the round trip with a measurement of ``seconds``, smoothed as in TCP (RFC 6298)."""
        seconds = max(seconds, 0.0)
        self.round_trip = seconds if self.round_trip == 0.0 else 0.875 * self.round_trip + 0.125 * seconds


@dataclass(frozen=True)
class Scores:
    """How likely a target finds the tokens of a given text.

    Attributes:
        logprobs: float32 (n,), under the unfiltered softmax at temperature 1.
        ranks: int32 (n,); 0: the most likely token.
        n_reused: tokens of the text that were still in memory.
        seconds: computing time.

    """

    logprobs: npt.NDArray[float32]
    ranks: npt.NDArray[int32]
    n_reused: int
    seconds: float


@runtime_checkable
class Scorer(Protocol):
    """A target that can also score a given text."""

    def score(self, tokens: npt.NDArray[int32], start: int) -> Scores:
        """Score ``tokens[start:]``, int32 (n,), 1 <= start < n, in one pass.

        The result stays in memory: for a longer text that begins with this one, only the new tokens are
        computed.
        """


class Generation(Protocol):
    """A text in progress, made by :meth:`Target.open`. All methods except :meth:`cancel` belong to one
    thread.
    """

    finish_reason: str | None
    """None until it ends; then ``"eog"`` (the model ended it), ``"length"`` (``max_tokens``) or
    ``"context"`` (full)."""

    def __next__(self) -> Commit:
        """The next commit; StopIteration after the last. Blocks while the target computes."""

    @property
    def can_branch(self) -> bool:
        """Whether all branches of a tree hint are checked; otherwise only its main path."""

    def hint(self, pos: int, tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """Propose the tokens from ``pos`` on: the whole unconfirmed draft. It replaces all earlier hints.

        A hint changes when tokens come, never which. It is compared with what is committed by now, and
        dropped if it disagrees.

        Args:
            pos: position of the first token; a hint after the committed length is useless.
            tokens: the token ids; of a tree the most likely first, since fewer may be checked than there are.
            parents: for each token the index in ``tokens`` of the one that it follows, always a smaller
                index; -1: it comes at ``pos``. See :class:`~sllm.targets.tree.TokenTree`. None: each follows
                the one before it.

        Raises:
            ValueError: tokens and parents do not form a tree.

        """

    def cancel(self) -> None:
        """End the generation, from any thread; a blocked ``__next__`` raises CancelledError."""

    def close(self) -> None:
        """Free what the generation holds."""


@runtime_checkable
class RemoteWork(Protocol):
    """A generation whose passes are computed on another machine."""

    remote: RemoteStats


@runtime_checkable
class PipelinedGeneration(Generation, Protocol):
    """A generation on a distant target, whose commits arrive asynchronously.

    Hints travel while earlier ones are being verified, and neither side waits for an answer.
    """

    run_ahead: bool
    """Whether the target decodes without hints; otherwise every pass needs a hint, which may be empty."""

    on_loss: str
    """``"wait"``, ``"raise"`` or ``"local"``: what to do when the link is lost."""

    remote: RemoteStats

    @property
    def learnt(self) -> dict[str, Any]:
        """What generation loops have measured of the target, under names of their own; shared by its texts in
        this process.
        """

    @property
    def end(self) -> int:
        """The position at which the text ends at the latest."""

    @property
    def max_hint(self) -> int:
        """Maximum number of tokens sent per hint, on all branches together."""

    opened_at: float | None
    """When the prompt had been computed (``time.perf_counter()``); None before."""

    @property
    def lost(self) -> bool:
        """Whether there is no link to the target at the moment."""

    def poll(self, timeout: float | None = 0.0) -> Commit | None:
        """The next commit, if there is one within ``timeout`` seconds (None: no limit).

        Also returns None when :meth:`wake` was called, when the link is lost or restored, and at the end.
        """

    def wake(self) -> None:
        """Let a blocked :meth:`poll` return; from any thread."""


@runtime_checkable
class Target(Protocol):
    """What decides a text, which is a pure function of the target's weights, the prompt's tokens and the
    sampling parameters.

    Examples:
        >>> with sllm.LocalTarget(sllm.embedded.TARGET) as target:
        ...     isinstance(target, sllm.Target)
        True

    """

    @property
    def vocab(self) -> Vocab:
        """The vocabulary, which a draft must share."""

    def open(
        self, tokens: npt.NDArray[int32], sampling: SamplingParams, max_tokens: int | None
    ) -> Generation:
        """Start a text after ``tokens``, int32 (n,), n >= 1.

        Raises:
            ContextFullError: the prompt does not fit.
            BusyError: the target cannot serve another generation now.

        """

    def close(self) -> None:
        """Free what the target holds."""


@runtime_checkable
class MtpTarget(Target, Protocol):
    """A target whose model's output is computed in this process, and which can also run the model's own heads
    for multi-token prediction.
    """

    def heads(self) -> Heads:
        """The heads, which draft for this target from now on.

        Raises:
            UnsupportedModelError: there are no heads here that can draft.
            BusyError: a generation is open, and the heads are not loaded yet.

        """
