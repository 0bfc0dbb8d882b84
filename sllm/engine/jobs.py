"""Drafts, verdicts, and jobs: the arguments of a draft or verify call, concatenated into arrays for
sllm.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sllm.engine._ffi import checked_int
from sllm.engine.arrays import (
    INT32,
    float32_array,
    int32_array,
    int_list,
    positions,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt


__all__ = [
    "Draft",
    "Verdict",
    "chains",
    "does_not_fit",
    "last_tokens",
    "lay_out",
    "put_trees",
    "row_limits",
    "row_thresholds",
    "tree_parents",
]


@dataclass(frozen=True, init=False)
class Draft:
    """What :meth:`Context.draft` proposes for B sequences: at most n tokens for each, a chain or a tree.

    Attributes:
        tokens: int32 (B, n), unused places -1.
        lengths: int32 (B,), number of tokens of each chain or tree.
        probs: float32 (B, n), the draft's probability of each drafted token among the candidates that it
            was selected from, at the sampling temperature (at temperature 0: at temperature 1); unused places
            0.
        parents: for trees: int32 (B, n), the index in ``tokens`` of the token that each one follows, always a
            smaller index; -1: right after the committed text, and in unused places. None: chains.
        ranks: for trees: int32 (B, n), the rank of each token among the continuations of its parent, 0 for
            the draft's own selection; unused places -1. None: chains.
        chances: for trees: float32 (B, n), the draft's estimate of the probability that the target accepts
            the whole path to each token; non-increasing, unused places 0. None: chains.
        n_passes: for trees: the number of passes that drafting took; 0: chains.

    Examples:
        >>> greedy = sllm.SamplingParams(temperature=0)
        >>> with sllm.Model(sllm.embedded.DRAFT) as model, model.context(n_ctx=256) as context:
        ...     draft = context.draft([0], [model.vocab.encode("Once upon")], n_max=4, sampling=greedy)
        ...     draft.tokens.shape, draft.lengths.tolist()
        ((1, 4), [4])

    """

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    probs: npt.NDArray[np.float32]
    parents: npt.NDArray[np.int32] | None = None
    ranks: npt.NDArray[np.int32] | None = None
    chances: npt.NDArray[np.float32] | None = None
    n_passes: int = 0

    def __init__(
        self,
        tokens: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int32],
        probs: npt.NDArray[np.float32],
        parents: npt.NDArray[np.int32] | None = None,
        ranks: npt.NDArray[np.int32] | None = None,
        chances: npt.NDArray[np.float32] | None = None,
        n_passes: int = 0,
    ) -> None:
        # what dataclass writes for a frozen class takes twice as long
        fields = self.__dict__
        fields["tokens"] = tokens
        fields["lengths"] = lengths
        fields["probs"] = probs
        fields["parents"] = parents
        fields["ranks"] = ranks
        fields["chances"] = chances
        fields["n_passes"] = n_passes


@dataclass(frozen=True, init=False)
class Verdict:
    """What :meth:`Context.verify` selected for B sequences.

    Attributes:
        tokens: int32 (B, n_max + 1): the ``n_accepted[i] + 1`` tokens that row i commits, then -1.
        n_accepted: int32 (B,): how many of them are accepted drafts; the one after them is the target's own.
        logprobs: float32 like ``tokens``, log-probabilities under the unfiltered softmax at temperature 1, or
            None if not requested.

    Examples:
        >>> greedy = sllm.SamplingParams(temperature=0)
        >>> with sllm.Model(sllm.embedded.TARGET) as model, model.context(n_ctx=256) as context:
        ...     verdict = context.verify([0], [model.vocab.encode("Once upon")], [[-1, -1]], sampling=greedy)
        ...     verdict.n_accepted.tolist(), verdict.tokens.shape
        ([0], (1, 3))

    """

    tokens: npt.NDArray[np.int32]
    n_accepted: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32] | None = None

    def __init__(
        self,
        tokens: npt.NDArray[np.int32],
        n_accepted: npt.NDArray[np.int32],
        logprobs: npt.NDArray[np.float32] | None = None,
    ) -> None:
        # what dataclass writes for a frozen class takes twice as long
        fields = self.__dict__
        fields["tokens"] = tokens
        fields["n_accepted"] = n_accepted
        fields["logprobs"] = logprobs


def last_tokens(tokens: npt.ArrayLike | Sequence[npt.ArrayLike], n_seqs: int) -> list[list[int]]:
    """The ``tokens`` argument of draft and verify: one token for each sequence, or an array for each."""
    if not isinstance(tokens, np.ndarray):
        for token in tokens:  # type: ignore[union-attr]
            if not isinstance(token, (int, np.integer)):
                return _rows(tokens, n_seqs, "tokens")  # type: ignore[arg-type]
    flat = int_list(tokens, "tokens")  # type: ignore[arg-type]
    if len(flat) != n_seqs:
        raise ValueError(f"tokens has {len(flat)} items, expected one for each of {n_seqs} sequences")
    return [flat] if n_seqs == 1 else [[token] for token in flat]


def _rows(rows: Iterable[npt.ArrayLike], n_seqs: int, name: str) -> list[list[int]]:
    if type(rows) is list and len(rows) == n_seqs == 1:
        return [int_list(rows[0], name)]
    lists = [int_list(row, name) for row in rows]
    if len(lists) != n_seqs:
        raise ValueError(f"{name} has {len(lists)} rows, expected one for each of {n_seqs} sequences")
    return lists


def chains(draft: Draft | Sequence[npt.ArrayLike], n_seqs: int) -> tuple[list[list[int]], int]:
    """The ``draft`` argument of verify: a chain for each sequence, and how long the longest may be."""
    if not isinstance(draft, Draft):
        rows = _rows(draft, n_seqs, "draft")
        return rows, len(rows[0]) if n_seqs == 1 else max(map(len, rows), default=0)
    lengths = int_list(draft.lengths, "draft.lengths")
    tokens = draft.tokens
    if tokens.dtype != INT32 or tokens.ndim != 2 or not tokens.flags.c_contiguous:
        raise TypeError("draft.tokens must be a contiguous int32 array of shape (B, n_max)")
    if len(tokens) != n_seqs or len(lengths) != n_seqs:
        raise ValueError(f"the draft has {len(tokens)} rows, expected one for each of {n_seqs} sequences")
    for length in lengths:
        checked_int(length, "a length of the draft", 0, tokens.shape[1])
    return [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)], tokens.shape[1]


def tree_parents(
    draft: Draft | Sequence[npt.ArrayLike] | None,
    parents: Sequence[npt.ArrayLike] | None,
    hints: list[list[int]] | None,
) -> list[int] | None:
    """The parents of all drafted tokens of a verify call, end to end; None: they are chains."""
    if hints is None:
        if parents is not None:
            raise ValueError("there are parents, and no draft that they belong to")
        return None
    if isinstance(draft, Draft):
        if parents is not None:
            raise ValueError("a Draft has parents of its own")
        if draft.parents is None:
            return None
        if draft.parents.dtype != INT32 or draft.parents.shape != draft.tokens.shape:
            raise TypeError("draft.parents must be an int32 array of the shape of draft.tokens")
        rows = [row[: len(hint)] for row, hint in zip(draft.parents.tolist(), hints, strict=True)]
    elif parents is None:
        return None
    else:
        rows = _rows(parents, len(hints), "parents")
        for i, (row, hint) in enumerate(zip(rows, hints, strict=True)):
            if len(row) != len(hint):
                raise ValueError(
                    f"parents[{i}] has {len(row)} items, expected one for each of {len(hint)} drafted tokens"
                )
    return [parent for row in rows for parent in row]


def put_trees(
    trees: Sequence[tuple[Sequence[int], Sequence[int]]],
    tokens: npt.NDArray[np.int32],
    parents: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int32],
) -> None:
    """Write each sequence's tree, tokens and parents, into its row, and its length."""
    if len(trees) != len(lengths):
        raise ValueError(f"known has {len(trees)} items, expected one for each of {len(lengths)} sequences")
    for i, (nodes, links) in enumerate(trees):
        row, above = int32_array(nodes, f"known[{i}]"), int32_array(links, f"the parents of known[{i}]")
        if len(row) != len(above) or len(row) > tokens.shape[1]:
            raise ValueError(
                f"known[{i}] has {len(row)} tokens and {len(above)} parents, expected as many of both, and"
                f" n_nodes at most ({tokens.shape[1]})"
            )
        tokens[i, : len(row)], parents[i, : len(row)], lengths[i] = row, above, len(row)


def row_limits(n_max: int | Sequence[int], n_seqs: int, name: str = "n_max") -> list[int]:
    """The ``n_max`` argument of draft, or another of its numbers, for each sequence."""
    items = [int(n_max)] * n_seqs if isinstance(n_max, (int, np.integer)) else int_list(n_max, name)
    if len(items) != n_seqs:
        raise ValueError(f"{name} has {len(items)} items, expected one for each of {n_seqs} sequences")
    return items


def row_thresholds(p_min: float | Sequence[float], n_seqs: int) -> list[float]:
    """The ``p_min`` argument of draft, for each sequence."""
    array = float32_array([p_min] * n_seqs if isinstance(p_min, (int, float, np.number)) else p_min, "p_min")
    if len(array) != n_seqs:
        raise ValueError(f"p_min has {len(array)} items, expected one for each of {n_seqs} sequences")
    items: list[float] = array.tolist()
    return items


def lay_out(
    seq_ids: list[int],
    pos: int | Sequence[int] | None,
    start: int | Sequence[int] | None,
    tokens: list[list[int]],
    n_more: list[int] | None,
    hints: list[list[int]] | None,
) -> list[int]:
    """What sllm.h calls jobs: all the numbers of a call, as one list that cffi lays out for C.

    Either ``n_more`` says how many tokens to draft, or ``hints`` what to verify, or neither.
    """
    jobs: list[int] = []
    n_seqs = len(seq_ids)
    begins = positions(pos, n_seqs, "pos")
    starts = positions(start, n_seqs, "start")
    for i in range(n_seqs):
        row = tokens[i]
        hint = hints[i] if hints is not None else ()
        more = len(hint) if n_more is None else n_more[i]
        jobs += (seq_ids[i], begins[i], starts[i], len(row), more, *row, *hint)
    return jobs


def does_not_fit(jobs: list[int]) -> ValueError:
    """The error that names the number which cffi could not convert to int32."""
    number = next(item for item in jobs if not -(2**31) <= item < 2**31)
    return ValueError(f"{number} among the sequences, tokens and positions does not fit into int32")
