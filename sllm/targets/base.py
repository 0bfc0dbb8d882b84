"""The one interface of every source of truth: a local model, a remote worker, a model split over two
machines.
"""

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
        pos: the absolute position of the first one (the prompt's tokens are 0 .. n-1).
        tokens: at least one token id.
        n_accepted: how many of them, from the first on, had been hinted.
        n_verified: how many hinted tokens the pass checked, accepted or not.
        seconds: how long the pass took; in a split, from when it was sent to its answer, also where others
            were on their way.
        n_own_accepted, n_own_verified: of these, how many the target alone had drafted itself.

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
        """Whether the target itself had drafted most of what was accepted, or else of what was checked."""
        if self.n_accepted:
            return 2 * self.n_own_accepted > self.n_accepted
        return 2 * self.n_own_verified > self.n_verified


@dataclass
class RemoteStats:
    """What a generation has cost on the link to a remote target. Times are in seconds; bytes are those of
    messages, without framing and TLS (:data:`sllm.wire.protocol.FRAMING`).

    Attributes:
        round_trip: a running estimate; 0 before the first hint has come back.
        bytes_up, bytes_down: sent and received.
        n_hints: hints sent.
        workers: which workers have served the text, ``HOST:PORT`` each, in their order; one that it came
            back to is there once more.
        n_moves: how often it went on with another worker.
        n_hedged: how often a second worker was asked because the first one had not answered in time.
        n_hedges_won: how often that one answered first.
        hedge_tokens: of the text, that the workers whose answer came too late may have computed in vain.
        n_reconnects: how often the link was lost and found again.
        lost_seconds: without a link.
        n_own_draft: accepted tokens that the remote side had drafted itself.
        n_again: rows of a split that crossed once more: of accepted tokens beside a tree's main path, and one
            of each window that was sent ahead.
        n_ahead: windows of a split that were sent before the one before them had come back.
        n_void: windows of a split whose answers nobody needed, as a token before them was wrong.
        n_reused: tokens of the prompt that the remote side had in memory.
        prompt_seconds: what the rest of the prompt took to compute.
        queued_seconds: how long the text waited for a place.
        n_hops: of a split with several workers: from how many of them rows went to the next one directly.
        relayed: from which to which they went through here, and why.

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
        """A message went there and back in ``seconds``: TCP's smoothing (RFC 6298)."""
        seconds = max(seconds, 0.0)
        self.round_trip = seconds if self.round_trip == 0.0 else 0.875 * self.round_trip + 0.125 * seconds


@dataclass(frozen=True)
class Scores:
    """How likely a target finds the tokens of a text that is there already.

    Attributes:
        logprobs: float32 (n,), under the unfiltered softmax at temperature 1.
        ranks: int32 (n,); 0: the likeliest token.
        n_reused: tokens of the text that were still in memory.
        seconds: of computing.

    """

    logprobs: npt.NDArray[float32]
    ranks: npt.NDArray[int32]
    n_reused: int
    seconds: float


@runtime_checkable
class Scorer(Protocol):
    """A target that can score a text besides writing one."""

    def score(self, tokens: npt.NDArray[int32], start: int) -> Scores:
        """Score ``tokens[start:]``, int32 (n,), 1 <= start < n, in one pass.

        What was computed stays in memory: a text that begins with it costs only what is new.
        """


class Generation(Protocol):
    """One text on its way, made by :meth:`Target.open`. All but :meth:`cancel` belong to one thread."""

    finish_reason: str | None
    """None until it ends; then ``"eog"`` (the model ended it), ``"length"`` (``max_tokens``) or
    ``"context"`` (full)."""

    def __next__(self) -> Commit:
        """The next commit; StopIteration after the last. Blocks while the target computes."""

    @property
    def can_branch(self) -> bool:
        """Whether all branches of a hint that is a tree are checked; else its main path is."""

    def hint(self, pos: int, tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """Propose the tokens from ``pos`` on: the whole unconfirmed draft. It replaces every earlier hint.

        A hint changes when tokens come and never which. It is compared with what is committed by now; where
        it disagrees it is dropped.

        Args:
            pos: where they go, at most the committed length for the hint to be of use.
            tokens: the likeliest first, where they are a tree: fewer may be checked than there are.
            parents: for each token the place in ``tokens`` of the one that it follows, always an earlier
                place; -1: it comes at ``pos``. See :class:`~sllm.targets.tree.TokenTree`. None: each follows
                the one before it.

        Raises:
            ValueError: tokens and parents are no tree.

        """

    def cancel(self) -> None:
        """End the generation, from any thread; a blocked ``__next__`` raises CancelledError."""

    def close(self) -> None:
        """Let go of what the generation holds."""


@runtime_checkable
class RemoteWork(Protocol):
    """A generation whose passes are computed on another machine."""

    remote: RemoteStats


@runtime_checkable
class PipelinedGeneration(Generation, Protocol):
    """A generation whose commits come by themselves, some time after what caused them: the target is far
    away.

    Hints travel while earlier ones are being verified, and nobody waits for an answer.
    """

    run_ahead: bool
    """Whether the target generates without hints; else every pass needs a hint, which may be empty.
    """

    on_loss: str
    """``"wait"``, ``"raise"`` or ``"local"``: what to do when the link is lost."""

    remote: RemoteStats

    @property
    def learnt(self) -> dict[str, Any]:
        """What loops have found out about the target, by names of their own: shared by its texts in this
        process.
        """

    @property
    def end(self) -> int:
        """The position where the text ends at the latest."""

    @property
    def max_hint(self) -> int:
        """So many tokens of a hint are sent at most, on all branches together."""

    opened_at: float | None
    """When the prompt had been computed (``time.perf_counter()``); None before."""

    @property
    def lost(self) -> bool:
        """Whether there is no link to the target at the moment."""

    def poll(self, timeout: float | None = 0.0) -> Commit | None:
        """The next commit if there is one within ``timeout`` seconds (None: any time).

        None comes also when :meth:`wake` was called, when the link is lost or found, and at the end.
        """

    def wake(self) -> None:
        """Let a blocked :meth:`poll` return; from any thread."""


@runtime_checkable
class Target(Protocol):
    """What decides a text: a pure function of its weights, the prompt's tokens and the sampling
    parameters.

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
            BusyError: the target serves no more generations at once.

        """

    def close(self) -> None:
        """Free what the target holds."""


@runtime_checkable
class MtpTarget(Target, Protocol):
    """A target whose model's output is computed here, and with it, perhaps, the model's own heads for
    multi-token prediction.
    """

    def heads(self) -> Heads:
        """The heads, which draft for this target from now on.

        Raises:
            UnsupportedModelError: there are none here that can draft.
            BusyError: a generation is open, and the heads are not yet.

        """
