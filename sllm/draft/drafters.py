"""Sources of drafts: a small model, the model's own heads, the text itself, or any callable. A draft is only
a hint and never changes the text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, runtime_checkable

import numpy as np

from sllm.draft.confidence import UNKNOWN_PROB
from sllm.draft.tree import DraftedTree
from sllm.engine.arrays import common_prefix, int32_array
from sllm.errors import CancelledError, ContextFullError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt
    from typing_extensions import Self, Unpack

    from sllm.draft.growth import Shape
    from sllm.engine.jobs import Draft
    from sllm.engine.model import Model
    from sllm.engine.mtp import Heads
    from sllm.engine.params import ContextOptions, ContextParams
    from sllm.engine.sampling import SamplingParams

__all__ = [
    "AnswerDrafter",
    "CallableDrafter",
    "Drafter",
    "ModelDrafter",
    "MtpDrafter",
    "NGramDrafter",
    "TreeDrafter",
    "draft_probs",
    "drafts_trees",
]


@runtime_checkable
class Drafter(Protocol):
    """The interface of all drafters: one text at a time, one thread at a time except for :meth:`cancel`."""

    adaptive: bool
    """Whether the draft length follows measured costs and gains; otherwise it is always the maximum."""

    n_caught_up: int
    """Number of committed tokens that the last draft had to compute before its own."""

    def open(self, tokens: Sequence[int], sampling: SamplingParams) -> None:
        """Begin a new text after the prompt ``tokens``."""

    def draft(self, text: Sequence[int], chain: Sequence[int], n_max: int, p_min: float) -> list[int]:
        """At most ``n_max`` tokens to follow the committed ``text`` (prompt included) and the unconfirmed
        ``chain``.
        """

    def cancel(self) -> None:
        """End early a draft that another thread is computing."""

    def close(self) -> None:
        """Free what the drafter holds."""


@runtime_checkable
class TreeDrafter(Drafter, Protocol):
    """A drafter that can propose several continuations, for targets that can check them at once."""

    def draft_tree(self, text: Sequence[int], shape: Shape, known: DraftedTree | None = None) -> DraftedTree:
        """A tree of this ``shape`` to follow the committed ``text`` (prompt included); ``known`` is the part
        of an earlier tree to continue.
        """


def drafts_trees(drafter: object) -> TypeGuard[TreeDrafter]:
    """Whether to ask a drafter for trees.

    False for a subclass that overrides only ``draft`` (to check what leaves the machine, for example), which
    ``draft_tree`` would bypass, and for a drafter whose attribute ``trees`` is false.
    """
    if not isinstance(drafter, TreeDrafter) or not getattr(drafter, "trees", True):
        return False
    for kind in type(drafter).__mro__:
        if "draft_tree" in vars(kind):
            return True
        if "draft" in vars(kind):
            return False
    return True  # neither is its class's: it passes both on


def draft_probs(drafter: Drafter, n: int, unknown: float = UNKNOWN_PROB) -> list[float]:
    """The probabilities of the ``n`` tokens that a drafter has just drafted; ``unknown`` if it gives none."""
    probs = list(getattr(drafter, "probs", ()))[:n]
    return probs + [unknown] * (n - len(probs))


class ModelDrafter:
    """A small model as a drafter, with a context of its own.

    It selects with the target's noise (same seed, same position), so the two agree far more often than
    independent samples would.

    Args:
        model: the model, which the caller closes.
        params, options: how its context computes, as for :meth:`Model.context`.
        trees: whether it drafts trees for targets that check all their branches; False: only chains.

    """

    adaptive = True

    def __init__(
        self,
        model: Model,
        params: ContextParams | None = None,
        *,
        trees: bool = True,
        **options: Unpack[ContextOptions],
    ) -> None:
        self.model = model
        self.trees = trees
        # Chains grow token by token, which snapshots do not go back over: checkpoints do.
        options.setdefault("n_rollback", 0)
        self.context = model.context(params, **options)
        self._sampling: SamplingParams | None = None
        self._start = 0
        self._held: list[int] = []  # committed in the context: text, and a chain that may have been wrong
        self._agreed = 0  # so much of it is text for good
        self.n_caught_up = 0
        self.probs: list[float] = []  # the model's confidence in each token of the last draft

    def open(self, tokens: Sequence[int], sampling: SamplingParams) -> None:
        """See :meth:`Drafter.open`; the prompt is computed with the first draft."""
        # A padded vocabulary may be shorter than the target's; a bias for what this model lacks is none of
        # its business.
        known = [(t, b) for t, b in sampling.logit_bias if t < self.model.vocab.n_tokens]  # type: ignore[misc]
        self._sampling = (
            sampling if len(known) == len(tuple(sampling.logit_bias)) else replace(sampling, logit_bias=known)
        )
        self._start = len(tokens)
        self._held = self.context.memory.tokens(0).tolist()
        self._agreed = 0

    def draft(self, text: Sequence[int], chain: Sequence[int], n_max: int, p_min: float) -> list[int]:
        """See :meth:`Drafter.draft`. Nothing, where the context is full or a token is beyond this model's
        vocabulary.
        """
        draft = self._drafted(text, chain, n_max=n_max, p_min=p_min)
        if draft is None:
            return []
        tokens: list[int] = draft.tokens[0, : draft.lengths[0]].tolist()
        self.probs = draft.probs[0, : len(tokens)].tolist()
        return tokens

    def draft_tree(self, text: Sequence[int], shape: Shape, known: DraftedTree | None = None) -> DraftedTree:
        """See :meth:`TreeDrafter.draft_tree`; nothing in the cases of :meth:`draft`."""
        draft = self._drafted(
            text,
            (),
            n_max=shape.n_passes,
            width=shape.width,
            n_nodes=shape.n_nodes,
            p_min=shape.p_min,
            known=None if known is None else [(known.tokens, known.parents)],
        )
        return DraftedTree() if draft is None else DraftedTree.of_draft(draft, 0)

    def _drafted(self, text: Sequence[int], chain: Sequence[int], **how: Any) -> Draft | None:
        """What the model drafts after ``text`` and ``chain``; None: it cannot."""
        assert self._sampling is not None, "open() comes first"
        base = self._agreed
        wanted = [*text[base:], *chain]
        held = self._held[base:]
        # The last token is computed in any case: its logits are where drafting starts.
        same = min(common_prefix(held, wanted), len(wanted) - 1)
        new = wanted[same:]
        self.n_caught_up = len(new) - 1
        if max(new) >= self.model.vocab.n_tokens:
            return None
        try:
            draft = self.context.draft(
                [0], [new], sampling=self._sampling, pos=base + same, start=self._start, **how
            )
        except (ContextFullError, CancelledError):
            self._held = self.context.memory.tokens(0).tolist()
            return None
        self._held[base + same :] = new
        self._agreed = max(len(text) - 1, 0)
        return draft

    def cancel(self) -> None:
        """See :meth:`Drafter.cancel`."""
        if not self.context.closed:
            self.context.cancel()

    def close(self) -> None:
        """Free the context. Further calls do nothing."""
        self.context.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<sllm.ModelDrafter of {self.model.path.name!r}{', closed' if self.context.closed else ''}>"


class MtpDrafter:
    """A model's own heads for multi-token prediction as a drafter of one text.

    They read the hidden states of the model's last pass, so the target's context, or that of its last layers,
    must be in this process, and drafting and verifying take turns.

    Args:
        heads: the heads of the target's context.

    Attributes:
        seq_id: the context's sequence that holds the text.

    """

    adaptive = True

    def __init__(self, heads: Heads) -> None:
        self.heads = heads
        self.seq_id = 0
        self._sampling: SamplingParams | None = None
        self._start = 0
        self._n_known = 0  # tokens of the text with which the heads have computed
        self.n_caught_up = 0
        self.probs: list[float] = []  # the heads' confidence in each token of the last draft

    def open(self, tokens: Sequence[int], sampling: SamplingParams) -> None:
        """See :meth:`Drafter.open`."""
        self._sampling = sampling
        self._start = len(tokens)
        self._n_known = 0

    def draft(self, text: Sequence[int], chain: Sequence[int], n_max: int, p_min: float) -> list[int]:
        """See :meth:`Drafter.draft`. The context holds ``text`` but for its last token; nothing is drafted
        where it is full.
        """
        assert self._sampling is not None, "open() comes first"
        self.n_caught_up = max(len(text) - 1 - self._n_known, 0)
        try:
            draft = self.heads.draft(
                [self.seq_id],
                [[text[-1], *chain]],
                n_max=n_max,
                p_min=p_min,
                sampling=self._sampling,
                pos=len(text) - 1,
                start=self._start,
            )
        except (ContextFullError, CancelledError):
            return []
        self._n_known = len(text)
        tokens: list[int] = draft.tokens[0, : draft.lengths[0]].tolist()
        self.probs = draft.probs[0, : len(tokens)].tolist()
        return tokens

    def cancel(self) -> None:
        """See :meth:`Drafter.cancel`."""
        if not self.heads.context.closed:
            self.heads.cancel()

    def close(self) -> None:
        """Nothing to free: the heads live as long as their context."""

    def __repr__(self) -> str:
        return f"<sllm.MtpDrafter of {self.heads!r}>"


class NGramDrafter:
    """Drafts what followed the same last tokens earlier in the text ("prompt lookup decoding", Saxena 2023).

    Costs next to nothing, and helps if an answer repeats its prompt: summaries, edits, code. With documents
    of the caller's own it helps if an answer quotes these, even though a target on another machine has never
    seen them.

    Args:
        n_max: the longest run of last tokens to look for.
        n_min: the shortest.
        documents: token ids of further texts to search, besides the prompt and the answer so far.

    """

    adaptive = True
    n_caught_up = 0

    def __init__(
        self,
        *,
        n_max: int = 4,
        n_min: int = 2,
        documents: Sequence[Sequence[int] | npt.NDArray[np.int32]] = (),
    ) -> None:
        if not 1 <= n_min <= n_max:
            raise ValueError(f"n_min is {n_min} and n_max {n_max}, expected 1 <= n_min <= n_max")
        self._sizes = range(n_max, n_min - 1, -1)
        self._followers: dict[
            tuple[int, ...], int
        ] = {}  # run of tokens -> the position after its last occurrence
        self._indexed = 0
        # The documents as one: a run over the border of two is seldom met, and wrong only as a guess.
        self._library = [
            token for document in documents for token in int32_array(document, "a document").tolist()
        ]
        self._known: dict[tuple[int, ...], int] = {}
        self._index(self._library, 0, self._known)

    def open(self, tokens: Sequence[int], sampling: SamplingParams) -> None:  # noqa: ARG002
        """See :meth:`Drafter.open`."""
        self._followers.clear()
        self._indexed = 0

    def draft(self, text: Sequence[int], chain: Sequence[int], n_max: int, p_min: float) -> list[int]:  # noqa: ARG002
        """See :meth:`Drafter.draft`."""
        # The run that ends the text is indexed only when something follows it, or it would find itself.
        self._index(text, max(self._indexed, 1), self._followers)
        self._indexed = len(text)
        last = [*text[-self._sizes[0] :], *chain][-self._sizes[0] :]
        for size in self._sizes:
            if size <= len(last):
                run = tuple(last[-size:])
                after = self._followers.get(run)
                if after is not None:
                    return list(text[after : after + n_max])
                after = self._known.get(run)
                if after is not None:
                    return self._library[after : after + n_max]
        return []

    def _index(self, tokens: Sequence[int], start: int, followers: dict[tuple[int, ...], int]) -> None:
        """Note what stands before each position from ``start`` on."""
        for end in range(start, len(tokens)):
            for size in self._sizes:
                if size <= end:
                    followers[tuple(tokens[end - size : end])] = end

    def cancel(self) -> None:
        """Nothing to do: a look-up takes microseconds."""

    def close(self) -> None:
        """Forget the text."""
        self._followers.clear()

    def __repr__(self) -> str:
        return f"<sllm.NGramDrafter of {self._sizes[-1]}..{self._sizes[0]} tokens>"


class AnswerDrafter:
    """Drafts an existing answer of another writer, for a target that writes its own.

    If the text departs from the answer, drafting continues after the nearest place in the answer that ends
    with the text's last few tokens, since what follows there may be right again. If only slightly earlier
    tokens agree, the tokens since then are assumed to replace as many of the answer's, or, if the answer has
    the last of them nearby, those up to there: a few tokens are proposed on that assumption, and the next
    pass verifies them. (Edited texts take 8 to 36 % fewer passes that way: tests/test_check_answer.py.)

    Args:
        answer: its token ids.
        start: the position of its first token in the text.
        n_min: number of last tokens that must agree.

    """

    adaptive = False  # it costs nothing
    n_caught_up = 0
    _LONGEST = 8  # tokens that are compared
    _STRAY = 4  # tokens at the text's end that may agree with nothing
    _GUESS = 8  # tokens that are proposed after those

    def __init__(self, answer: Sequence[int], start: int, *, n_min: int = 2) -> None:
        if n_min < 1 or start < 0:
            raise ValueError(f"n_min is {n_min} and start {start}, expected n_min >= 1 and start >= 0")
        self._answer = list(answer)
        self._start = start
        self._n_min = n_min
        self._places: dict[tuple[int, ...], list[int]] = {}  # the last n_min tokens -> positions after them
        for end in range(n_min, len(self._answer)):
            self._places.setdefault(tuple(self._answer[end - n_min : end]), []).append(end)

    def open(self, tokens: Sequence[int], sampling: SamplingParams) -> None:
        """See :meth:`Drafter.open`; there is nothing to prepare."""

    def draft(self, text: Sequence[int], chain: Sequence[int], n_max: int, p_min: float) -> list[int]:  # noqa: ARG002
        """See :meth:`Drafter.draft`."""
        begin = max(len(text) - self._LONGEST, self._start)
        last = [*text[begin:], *chain]
        at = len(text) + len(chain) - self._start  # where the answer is now, if the text has followed it
        size = len(last)
        if 0 <= at <= len(self._answer) and self._answer[at - size : at] == last:
            return self._answer[at : at + n_max]
        for n_stray in range(min(self._STRAY, size) + 1):
            place = self._place(last[: size - n_stray], at - n_stray)
            if place is not None and n_stray == 0:
                return self._answer[place : place + n_max]
            if place is not None:
                place += self._n_replaced(place, last[size - n_stray :])
                return self._answer[place : place + min(n_max, self._GUESS)]
        return []

    def _place(self, last: list[int], at: int) -> int | None:
        """Where in the answer the text's ``last`` tokens end, if they do: most of them, then nearest."""
        if at == 0:
            return 0
        places = self._places.get(tuple(last[-self._n_min :]), ())
        return max(places, key=lambda end: (self._agreeing(last, end), -abs(end - at)), default=None)

    def _n_replaced(self, place: int, stray: list[int]) -> int:
        """For how many of the answer's tokens from ``place`` on the text has the ``stray`` ones."""
        ahead = self._answer[place : place + len(stray) + self._STRAY]
        same = [n for n, token in enumerate(ahead, 1) if token == stray[-1]]
        return min(same, key=lambda n: abs(n - len(stray)), default=len(stray))

    def _agreeing(self, last: list[int], end: int) -> int:
        """How many tokens in front of ``end`` are the text's last ones."""
        n = 0
        while n < len(last) and n < end and self._answer[end - 1 - n] == last[-1 - n]:
            n += 1
        return n

    def cancel(self) -> None:
        """Nothing to do: a look-up takes microseconds."""

    def close(self) -> None:
        """Nothing to free."""

    def __repr__(self) -> str:
        return f"<sllm.AnswerDrafter of {len(self._answer)} tokens>"


class CallableDrafter:
    """Any callable as a drafter: ``propose(tokens, n_max)`` gets the text so far as int32 (n,) and returns
    token ids.

    Invalid ids count as wrong guesses. Its exceptions are raised where the text is being read.
    """

    adaptive = True
    n_caught_up = 0

    def __init__(self, propose: Callable[[npt.NDArray[np.int32], int], Any]) -> None:
        self._propose = propose

    def open(self, tokens: Sequence[int], sampling: SamplingParams) -> None:
        """See :meth:`Drafter.open`."""

    def draft(self, text: Sequence[int], chain: Sequence[int], n_max: int, p_min: float) -> list[int]:  # noqa: ARG002
        """See :meth:`Drafter.draft`.

        Raises:
            TypeError: the callable returned something else than token ids.

        """
        proposed = self._propose(np.array([*text, *chain], dtype=np.int32), n_max)
        tokens: list[int] = int32_array(() if proposed is None else proposed, "the draft").tolist()
        return tokens[:n_max]

    def cancel(self) -> None:
        """Nothing to do: what the callable computes is its own business."""

    def close(self) -> None:
        """Nothing to free."""

    def __repr__(self) -> str:
        return f"<sllm.CallableDrafter of {self._propose!r}>"
