"""Contexts: decoding, batched draft and verify, scoring."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.engine import state
from sllm.engine._ffi import Handle, check, checked_int, ffi, lib, take_log
from sllm.engine.arrays import (
    FLOAT32,
    INT32,
    hidden_array,
    int32_array,
    int_list,
    positions,
    ragged_int32,
)
from sllm.engine.jobs import (
    Draft,
    Verdict,
    chains,
    does_not_fit,
    last_tokens,
    lay_out,
    put_trees,
    row_limits,
    row_thresholds,
    tree_parents,
)
from sllm.engine.memory import Memory
from sllm.engine.sampling import SamplingParams
from sllm.engine.tree import MAX_NODES
from sllm.engine.weights import ROLLBACK
from sllm.errors import ContextFullError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from sllm.engine.params import ContextParams
    from sllm.engine.weights import Weights

__all__ = ["MOST_DRAFTED", "Context"]

_LOGITS = {"none": lib.SLLM_LOGITS_NONE, "last": lib.SLLM_LOGITS_LAST, "all": lib.SLLM_LOGITS_ALL}


# Looked up once: verify() and draft() are called for every few tokens, and what they touch is cold in the
# caches after every pass of the model.
_INTS = ffi.typeof("int32_t[]")
_FLOATS = ffi.typeof("float[]")
_NULL = ffi.NULL
_from_buffer = ffi.from_buffer


_JOB_HEADER: int = lib.SLLM_JOB_HEADER

MOST_DRAFTED = 4 * MAX_NODES
"""A drafted tree has so many at most; of those :data:`MAX_NODES` are computed and the others follow them."""


# One class for one llama_context: its methods share the pointer and the checks, and half of these lines are
# the docstrings of the public methods.
class Context(Handle):
    """Memory and compute state for sequences of one model (``llama_context``); one thread at a time.

    Made by :meth:`Model.context`. A call during a call of another thread raises BusyError; only
    :meth:`cancel` may be called from any thread. Ctrl-C ends a call on the main thread within about 100 ms.
    After an error, a cancel or a Ctrl-C the memory is at its committed length, and the next call continues
    from there.

    Args:
        model: the model.
        params: how it computes.

    Raises:
        ValueError: an argument out of range, or one that does not fit the model.
        MemoryError: the KV cache does not fit into the machine.

    Attributes:
        model, n_ctx, n_ctx_seq, n_batch, n_ubatch, n_seq_max, n_outputs_max: the values in force;
            ``n_ctx_seq`` is what one sequence holds.
        can_rollback: the cost of rolling back tokens: ``"free"`` (attention), ``"snapshots"`` (free for up to
            ``n_rollback`` tokens, at the memory of ``n_rollback`` states per sequence; beyond that as
            ``"recompute"``) or ``"recompute"`` (an earlier state is restored and the tokens since then are
            computed again).
        n_rollback: tokens that snapshots can roll back; 0 without them.
        max_draft: drafted tokens of one sequence that :meth:`verify` checks at once; more are rejected.
        memory: the KV cache or recurrent state of the sequences.

    Examples:
        >>> with sllm.Model(sllm.embedded.DRAFT) as model, model.context(n_ctx=256) as context:
        ...     tokens = model.vocab.encode("Once upon a time")
        ...     logits = context.decode(tokens, logits="last")
        ...     logits.shape == (model.vocab.n_tokens,), context.memory.length() == len(tokens)
        (True, True)

    """

    def __init__(self, model: Weights, params: ContextParams) -> None:
        model.vocab.turn_ends()  # the context ends texts with them, too
        given, _keep = params.as_c(n_ctx_train=model.n_ctx_train, size_bytes=model.size_bytes)
        given.state_bytes = model.state_bytes
        out = ffi.new("sllm_context **")
        take_log()
        try:
            check(lib.sllm_context_new(model._live, given, out), model.path.name)
        finally:
            take_log()
        super().__init__(out[0], lib.sllm_context_release)
        self.model = model
        self.n_threads: int = given.n_threads
        self.n_threads_batch: int = given.n_threads_batch
        info = ffi.new("struct sllm_context_info *")
        lib.sllm_context_get_info(out[0], info)
        self.n_ctx: int = info.n_ctx
        self.n_ctx_seq: int = info.n_ctx_seq
        self.n_batch: int = info.n_batch
        self.n_ubatch: int = info.n_ubatch
        self.n_seq_max: int = info.n_seq_max
        self.n_outputs_max: int = info.n_outputs_max
        self.can_rollback: str = ROLLBACK[info.rollback]
        self.n_rollback: int = info.n_rollback
        self.max_draft: int = self.n_outputs_max - 1
        if self.can_rollback == "snapshots":
            self.max_draft = min(self.max_draft, self.n_rollback)
        self._n_vocab: int = info.n_vocab
        self.memory = Memory(self, self.n_ctx_seq, self.n_seq_max)
        model._contexts.add(self)

    @property
    def state_bytes(self) -> int:
        """Bytes of one recurrent state of one sequence; snapshots and checkpoints are copies of it. 0 with
        attention only, and before anything was decoded.
        """
        info = ffi.new("struct sllm_context_info *")
        lib.sllm_context_get_info(self._live, info)
        return int(info.state_bytes)

    def decode(
        self,
        tokens: npt.ArrayLike | Sequence[npt.ArrayLike],
        *,
        seq_id: int | Sequence[int] = 0,
        pos: int | Sequence[int] | None = None,
        logits: str = "none",
        hidden: npt.NDArray[np.float32] | None = None,
    ) -> npt.NDArray[np.float32] | None:
        """Append tokens to sequences and compute them (``llama_decode``).

        Args:
            tokens: int32 (n,) for one sequence; for several, one such array per sequence.
            seq_id: the sequence, or a list of them.
            pos: position of the first token, at most the sequence's length; None: at its end. Whatever was
                stored at or after it is discarded.
            logits: ``"none"``, ``"last"`` (the row after the last token of each sequence) or ``"all"``.
            hidden: only for the context of a :class:`~sllm.LayerRange`: float32 (tokens, n_embd), the input
                of its first layer for each token.

        Returns:
            None, or float32 logits, read-only: (n_vocab,) for one sequence and ``"last"``, else (rows,
            n_vocab) in the order of the tokens. Up to ``n_outputs_max`` rows are a view of llama.cpp's own
            buffer: it can be read at any time, but the next call on this context overwrites it. More rows are
            a copy.

        Raises:
            ValueError: a token, position or sequence out of range.
            TypeError: a wrong dtype.
            ContextFullError: no room; nothing was decoded.
            CancelledError, BusyError, InferenceError, ClosedError.

        """
        pointer = self._live
        if logits not in _LOGITS:
            raise ValueError(f"logits is {logits!r}, expected 'none', 'last' or 'all'")
        if isinstance(seq_id, (int, np.integer)):
            flat = int32_array(tokens, "tokens")  # type: ignore[arg-type]
            lengths = np.array([len(flat)], dtype=np.int32)
            seqs = int32_array([seq_id], "seq_id")
        else:
            seqs = int32_array(seq_id, "seq_id")
            flat, lengths = ragged_int32(tokens, len(seqs), "tokens")  # type: ignore[arg-type]
        n_rows = {"none": 0, "last": len(seqs), "all": len(flat)}[logits]
        view = ffi.new("const float **")
        own = np.empty((n_rows, self._n_vocab), dtype=np.float32) if n_rows > self.n_outputs_max else None
        check(
            lib.sllm_decode(
                pointer,
                len(seqs),
                _from_buffer(_INTS, seqs),
                _from_buffer(_INTS, flat),
                _from_buffer(_INTS, lengths),
                _NULL
                if pos is None
                else _from_buffer(_INTS, int32_array(positions(pos, len(seqs), "pos"), "pos")),
                _NULL
                if hidden is None
                else _from_buffer(_FLOATS, hidden_array(hidden, len(flat), self.model.n_embd)),
                _LOGITS[logits],
                _NULL if own is None else _from_buffer(_FLOATS, own),
                view,
            )
        )
        if n_rows == 0:
            return None
        rows = self._logits_view(pointer, view[0], n_rows) if own is None else own
        rows.flags.writeable = False
        return rows[0] if logits == "last" and isinstance(seq_id, (int, np.integer)) else rows

    def _logits_view(self, pointer: Any, first: Any, n_rows: int) -> npt.NDArray[np.float32]:
        """Rows of the last decode, on llama.cpp's memory, which they keep alive even past close()."""
        pid = self._pid

        def release(_rows: object) -> None:
            if os.getpid() == pid:
                lib.sllm_context_release(pointer)

        owner = ffi.gc(first, release)
        view: npt.NDArray[np.float32] = np.frombuffer(
            ffi.buffer(owner, n_rows * self._n_vocab * 4), dtype=np.float32
        ).reshape(n_rows, self._n_vocab)
        return view

    def _samplings(
        self, sampling: SamplingParams | Sequence[SamplingParams] | None, n_seqs: int
    ) -> list[Any]:
        """A compiled sampling for each sequence; the list keeps them alive during the call."""
        if sampling is None:
            sampling = SamplingParams()
        if isinstance(sampling, SamplingParams):
            return [self.model.compiled(sampling)] * n_seqs
        compiled = [self.model.compiled(one) for one in sampling]
        if len(compiled) != n_seqs:
            raise ValueError(
                f"sampling has {len(compiled)} items, expected one for each of {n_seqs} sequences"
            )
        return compiled

    def draft(
        self,
        seq_ids: Sequence[int] | npt.NDArray[np.int32],
        tokens: npt.ArrayLike | Sequence[npt.ArrayLike],
        *,
        n_max: int | Sequence[int] = 16,
        p_min: float | Sequence[float] = 0.0,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        pos: int | Sequence[int] | None = None,
        start: int | Sequence[int] | None = None,
        width: int = 1,
        n_nodes: int | Sequence[int] | None = None,
        known: Sequence[tuple[Sequence[int], Sequence[int]]] | None = None,
    ) -> Draft:
        """Draft up to ``n_max`` tokens for each of B sequences, one batched pass per token.

        Each token is selected from this model's logits with the same position-keyed noise as the target will
        use, so the two agree far more often than independent samples would. Drafted tokens stay cached after
        the committed length, so a draft that continues from accepted tokens computes only new ones.

        With ``n_nodes`` the draft is a tree, which also contains the runners-up of each selection under the
        same noise. Each of ``n_max`` passes computes the ``width`` most likely tokens, on any branch, and the
        ``n_nodes`` most likely of all form the tree. A memory that cannot branch (:attr:`can_branch`) gives a
        chain.

        Args:
            seq_ids: B distinct sequences.
            tokens: (B,) the last committed token of each, not in memory yet; or B arrays of the committed
                tokens that are not in memory yet.
            n_max: maximum number of tokens, one number or B; for a tree: number of passes.
            p_min: a chain ends before a token less probable than this (see :attr:`Draft.probs`), and a branch
                of a tree is not continued after a token with a smaller chance (:attr:`Draft.chances`); one
                number or B.
            sampling: how to select, one or B; None: ``SamplingParams()``.
            pos: position of ``tokens``, at most the committed length; None: the committed length.
            start: the position of the first generated token, for grammars; None: remembered from the
                sequence's first call since a decode.
            width: for a tree: tokens computed per pass, 1 or more.
            n_nodes: for a tree: maximum number of tokens, one number or B, up to 256. None: a chain.
            known: for trees: for each sequence the tokens and parents (:attr:`Draft.parents`) of a tree to
                continue, such as the rest of an earlier one, which the first pass computes as well. None:
                none.

        Returns:
            The chains or trees. They end early after an end-of-generation token, at the end of the context,
            and after :meth:`cancel`.

        Raises:
            ValueError, TypeError, ContextFullError, CancelledError (before anything was drafted), BusyError,
            InferenceError, ClosedError.

        """
        if n_nodes is not None:
            return self._draft_trees(
                seq_ids,
                tokens,
                n_max,
                p_min,
                sampling,
                pos,
                start,
                checked_int(width, "width", 1),
                n_nodes,
                known,
            )
        if width != 1 or known is not None:
            raise ValueError(f"width is {width}, and without n_nodes the draft is a chain")
        return self._drafted(lib.sllm_draft, seq_ids, tokens, n_max, p_min, sampling, pos, start)

    def _draft_trees(
        self,
        seq_ids: Sequence[int] | npt.NDArray[np.int32],
        tokens: npt.ArrayLike | Sequence[npt.ArrayLike],
        n_max: int | Sequence[int],
        p_min: float | Sequence[float],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        pos: int | Sequence[int] | None,
        start: int | Sequence[int] | None,
        width: int,
        n_nodes: int | Sequence[int],
        known: Sequence[tuple[Sequence[int], Sequence[int]]] | None,
    ) -> Draft:
        pointer = self._live
        seqs = int_list(seq_ids, "seq_ids")
        n_seqs = len(seqs)
        rows = last_tokens(tokens, n_seqs)
        samplings = self._samplings(sampling, n_seqs)
        sizes = row_limits(n_nodes, n_seqs, "n_nodes")
        n_passes = row_limits(n_max, n_seqs)
        stride = max(sizes, default=0)
        checked_int(stride, "n_nodes", 0, MOST_DRAFTED)
        jobs = lay_out(seqs, pos, start, rows, sizes, None)
        shape = (n_seqs, stride)
        drafted, parents, ranks = np.empty(shape, INT32), np.empty(shape, INT32), np.empty(shape, INT32)
        probs, chances = np.empty(shape, FLOAT32), np.empty(shape, FLOAT32)
        lengths = np.zeros(n_seqs, INT32)
        if known is not None:
            put_trees(known, drafted, parents, lengths)
        computed = ffi.new("int32_t *")
        fields = [_from_buffer(_INTS, drafted), _from_buffer(_INTS, parents), _from_buffer(_INTS, ranks)]
        fields += [_from_buffer(_FLOATS, probs), _from_buffer(_FLOATS, chances), _from_buffer(_INTS, lengths)]
        out = ffi.new("struct sllm_tree *", [*fields, computed])
        try:
            status = lib.sllm_draft_tree(
                pointer,
                n_seqs,
                jobs,
                len(jobs),
                samplings,
                n_passes,
                row_thresholds(p_min, n_seqs),
                width,
                stride,
                out,
            )
        except OverflowError:
            raise does_not_fit(jobs) from None
        if status:
            check(status)
        return Draft(drafted, lengths, probs, parents, ranks, chances, computed[0])

    @property
    def can_branch(self) -> bool:
        """Whether :meth:`draft` makes trees here and :meth:`verify` checks all their branches: with attention
        only, no MTP heads in use, and a llama.cpp that has sllm's patch. Otherwise only a tree's main path is
        verified, from each token to its first child.
        """
        can = ffi.new("int32_t *")
        check(lib.sllm_context_can_branch(self._live, can))
        return bool(can[0])

    def _drafted(
        self,
        call: Callable[..., int],
        seq_ids: Sequence[int] | npt.NDArray[np.int32],
        tokens: npt.ArrayLike | Sequence[npt.ArrayLike],
        n_max: int | Sequence[int],
        p_min: float | Sequence[float],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        pos: int | Sequence[int] | None,
        start: int | Sequence[int] | None,
    ) -> Draft:
        """What ``sllm_draft``, or a call like it, drafts."""
        pointer = self._live
        seqs = int_list(seq_ids, "seq_ids")
        n_seqs = len(seqs)
        rows = last_tokens(tokens, n_seqs)
        samplings = self._samplings(sampling, n_seqs)
        n_maxes = [n_max] * n_seqs if type(n_max) is int else row_limits(n_max, n_seqs)
        p_mins = [p_min] * n_seqs if type(p_min) is float else row_thresholds(p_min, n_seqs)
        stride = max(n_maxes, default=0)
        if stride > self.n_ctx_seq:
            raise ValueError(
                f"n_max is {stride}, and a sequence of this context holds {self.n_ctx_seq} tokens"
            )
        jobs = lay_out(seqs, pos, start, rows, n_maxes, None)
        drafted = np.empty((n_seqs, max(stride, 0)), INT32)
        lengths = np.empty(n_seqs, INT32)
        probs = np.empty((n_seqs, max(stride, 0)), FLOAT32)
        try:
            status = call(
                pointer,
                n_seqs,
                jobs,
                len(jobs),
                samplings,
                p_mins,
                max(stride, 0),
                _from_buffer(_INTS, drafted),
                _from_buffer(_INTS, lengths),
                _from_buffer(_FLOATS, probs),
            )
        except OverflowError:
            raise does_not_fit(jobs) from None
        if status:
            check(status)
        return Draft(drafted, lengths, probs)

    def verify(
        self,
        seq_ids: Sequence[int] | npt.NDArray[np.int32],
        tokens: npt.ArrayLike | Sequence[npt.ArrayLike],
        draft: Draft | Sequence[npt.ArrayLike] | None = None,
        *,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        pos: int | Sequence[int] | None = None,
        start: int | Sequence[int] | None = None,
        logprobs: bool = False,
        hidden: npt.NDArray[np.float32] | None = None,
        parents: Sequence[npt.ArrayLike] | None = None,
    ) -> Verdict:
        """Verify drafts of B sequences in one pass and commit what this model itself selects.

        One batch decodes the last committed token and the chain ``h1..hk`` of each sequence; y1..y(k+1) are
        selected, and accepted while ``y_i == h_i``; y1..y(a+1) are returned. The memory is then at exactly
        the committed length: the tokens passed in and the ``a`` accepted ones. Without a draft this is plain
        decoding of one token. All branches of a tree are decoded in the same batch, and the longest path that
        agrees is accepted; accepted tokens of a side branch are computed again in the next pass, because the
        memory needs them in order.

        Args:
            seq_ids: B distinct sequences.
            tokens: as in :meth:`draft`.
            draft: the draft to verify: a :class:`Draft`, or B token arrays of any lengths, or None. Ids
                outside the vocabulary, and tokens that do not fit into the context, are treated as rejected.
            sampling, pos, start: as in :meth:`draft`.
            logprobs: also return the log-probability of every selected token.
            hidden: only for the context of a :class:`~sllm.LayerRange`: float32 (tokens, n_embd), the input
                of its first layer for the tokens and the draft of each sequence, one after the other.
            parents: if the token arrays are trees: B int arrays as long as those of ``draft``, in the form of
                :attr:`Draft.parents`. None: chains, or the Draft's own.

        Raises:
            ValueError: also if the drafts together need more than ``n_outputs_max`` rows, or if parents do
                not form a tree: a parent that does not precede its child, two equal children, more than 256
                tokens.
            TypeError, ContextFullError, CancelledError, BusyError, InferenceError, ClosedError.

        """
        pointer = self._live
        seqs = int_list(seq_ids, "seq_ids")
        n_seqs = len(seqs)
        rows = last_tokens(tokens, n_seqs)
        samplings = self._samplings(sampling, n_seqs)
        hints, stride = (None, 0) if draft is None else chains(draft, n_seqs)
        links = tree_parents(draft, parents, hints)
        jobs = lay_out(seqs, pos, start, rows, None, hints)
        selected = np.empty((n_seqs, stride + 1), INT32)
        n_accepted = np.empty(n_seqs, INT32)
        scores = np.empty((n_seqs, stride + 1), FLOAT32) if logprobs else None
        try:
            status = lib.sllm_verify(
                pointer,
                n_seqs,
                jobs,
                len(jobs),
                samplings,
                stride,
                _NULL if links is None else links,
                _NULL
                if hidden is None
                else _from_buffer(
                    _FLOATS, hidden_array(hidden, len(jobs) - _JOB_HEADER * n_seqs, self.model.n_embd)
                ),
                _from_buffer(_INTS, selected),
                _from_buffer(_INTS, n_accepted),
                _NULL if scores is None else _from_buffer(_FLOATS, scores),
            )
        except OverflowError:
            raise does_not_fit(jobs) from None
        if status:
            check(status)
        return Verdict(selected, n_accepted, scores)

    def score(
        self,
        prefix: npt.ArrayLike,
        continuations: Sequence[npt.ArrayLike],
        *,
        seq_ids: Sequence[int] | None = None,
    ) -> npt.NDArray[np.float64]:
        """The log-probability of each whole continuation after ``prefix``, under the unfiltered softmax.

        The prefix is computed once, and reused if the next call begins with the same tokens; continuations
        are computed in parallel, as many as there are free sequences.

        Args:
            prefix: int32 (n,), at least one token.
            continuations: int32 arrays of at least one token.
            seq_ids: sequences to use; their contents are lost. None: the empty ones. All are empty
                afterwards.

        Returns:
            float64 (len(continuations),): the sums of the log-probabilities of their tokens.

        Raises:
            ValueError: the prefix or a continuation is empty, or no sequence is free.
            ContextFullError: prefix and continuation do not fit.

        """
        head = int32_array(prefix, "prefix")
        parts = [int32_array(c, f"continuations[{i}]") for i, c in enumerate(continuations)]
        if len(head) == 0 or not parts or any(len(p) == 0 for p in parts):
            raise ValueError("score needs a prefix and continuations of at least one token each")
        longest = len(head) + max(len(p) for p in parts)
        if longest - 1 > self.n_ctx_seq:
            raise ContextFullError(
                f"prefix and continuation have {longest} tokens,"
                f" and a sequence of this context holds {self.n_ctx_seq}"
            )
        if seq_ids is None:
            seq_ids = [i for i in range(self.n_seq_max) if self.memory.length(i) == 0]
            if not seq_ids:
                raise ValueError(
                    "every sequence of this context is in use; name those that score may use in seq_ids"
                )
        if not seq_ids:
            raise ValueError("seq_ids is empty; score needs a sequence to work in")
        first = checked_int(seq_ids[0], "seq_ids[0]", 0, self.n_seq_max - 1)
        shared = head[:-1]
        totals = np.empty(len(parts), dtype=np.float64)
        try:
            self.decode(shared, seq_id=first, pos=0)
            for begin in range(0, len(parts), len(seq_ids)):
                group = parts[begin : begin + len(seq_ids)]
                used = list(seq_ids[: len(group)])
                for other in used[1:]:
                    self.memory.copy(first, other)
                totals[begin : begin + len(group)] = self._score(
                    used, [np.concatenate([head[-1:], p]) for p in group]
                )
                self.memory.truncate(first, len(shared))
        finally:
            if not self.closed:
                check(lib.sllm_memory_forget(self._live, first))
                for other in seq_ids[1:]:
                    self.memory.clear(other)
        return totals

    def token_logprobs(
        self, tokens: npt.ArrayLike, *, seq_id: int = 0, pos: int | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """How likely each token of a text is after those before it, under the unfiltered softmax.

        The tokens but the last are written to the sequence.

        Args:
            tokens: int32 (n,), n >= 2; the first one is not scored.
            seq_id: the sequence.
            pos: position of the first token, at most the sequence's length; None: at its end.

        Returns:
            Log-probabilities, float32 (n - 1,), and ranks, int32 (n - 1,), of ``tokens[1:]``; rank 0 is the
            most likely token.

        Raises:
            ValueError: fewer than two tokens, or one outside the vocabulary.
            ContextFullError, CancelledError, BusyError, InferenceError, ClosedError.

        """
        array = int32_array(tokens, "tokens")
        if len(array) < 2:
            raise ValueError(
                f"tokens has {len(array)} items, and the first one is not scored: expected 2 or more"
            )
        sequence = checked_int(seq_id, "seq_id")
        if pos is not None:
            # Truncating comes first, so what the C side would refuse has to be refused before it.
            n_vocab = self._n_vocab
            bad = array[(array < 0) | (array >= n_vocab)]
            if len(bad):
                raise ValueError(f"token {bad[0]} is not in the vocabulary of {n_vocab} tokens")
            if pos + len(array) - 1 > self.n_ctx_seq:
                raise ContextFullError(
                    f"{len(array) - 1} tokens at position {pos} do not fit:"
                    f" a sequence of this context holds {self.n_ctx_seq}"
                )
            self.memory.truncate(sequence, pos)
        logprobs = np.empty(len(array) - 1, FLOAT32)
        ranks = np.empty(len(array) - 1, INT32)
        check(
            lib.sllm_score(
                self._live,
                1,
                [sequence],
                _from_buffer(_INTS, array),
                [len(array)],
                _from_buffer(_FLOATS, logprobs),
                _from_buffer(_INTS, ranks),
            )
        )
        return logprobs, ranks

    def _score(self, seq_ids: list[int], tokens: list[npt.NDArray[np.int32]]) -> list[float]:
        """The log-probabilities of each array's tokens after its first, summed; they stay in memory but for
        the last.
        """
        flat, lengths = ragged_int32(tokens, len(tokens), "continuations")
        out = np.empty(int(lengths.sum()) - len(tokens), dtype=np.float32)
        check(
            lib.sllm_score(
                self._live,
                len(tokens),
                _from_buffer(_INTS, int32_array(seq_ids, "seq_ids")),
                _from_buffer(_INTS, flat),
                _from_buffer(_INTS, lengths),
                _from_buffer(_FLOATS, out),
                _NULL,
            )
        )
        return [float(part.sum(dtype=np.float64)) for part in np.split(out, np.cumsum(lengths - 1)[:-1])]

    def save(self, seq_id: int = 0) -> bytes:
        """The state of one sequence, to be given to :meth:`load` of a context of the same model and shape.

        The shape is that of the memory: type_k, type_v, n_seq_max and kv_unified.

        The bytes contain the sequence's tokens unencrypted.
        """
        pointer = self._live
        checked_int(seq_id, "seq_id")
        size = ffi.new("uint64_t *")
        check(lib.sllm_state_size(pointer, seq_id, size))
        buffer = bytearray(size[0])
        check(lib.sllm_state_get(pointer, seq_id, ffi.from_buffer("uint8_t[]", buffer), len(buffer), size))
        tokens = self.memory.tokens(seq_id)
        return state.pack(self.model.vocab.fingerprint, tokens, bytes(buffer[: size[0]]))

    def load(self, data: bytes, seq_id: int = 0) -> None:
        """Restore a saved state into a sequence and discard its present contents.

        Raises:
            ValueError: not a saved state, damaged, of another model, or of a context of another shape. The
                sequence is then empty or unchanged.
            ContextFullError: it does not fit.

        """
        checked_int(seq_id, "seq_id")
        tokens, saved = state.unpack(data, self.model.vocab.fingerprint)
        check(
            lib.sllm_state_set(
                self._live,
                seq_id,
                ffi.from_buffer("uint8_t[]", saved),
                len(saved),
                _from_buffer(_INTS, tokens),
                len(tokens),
            )
        )

    def set_threads(self, n_threads: int, n_threads_batch: int | None = None) -> None:
        """Set the number of CPU threads for single tokens and for batches (``llama_set_n_threads``)."""
        checked_int(n_threads, "n_threads", 1)
        batch = n_threads if n_threads_batch is None else checked_int(n_threads_batch, "n_threads_batch", 1)
        check(lib.sllm_context_set_threads(self._live, n_threads, batch))
        self.n_threads, self.n_threads_batch = n_threads, batch

    def cancel(self) -> None:
        """End the call that another thread is making, if there is one; may be called from any thread.

        That call raises CancelledError; :meth:`draft` instead returns what it has.
        """
        lib.sllm_context_cancel(self._live)

    def close(self) -> None:
        """Free the context; a running call of another thread is cancelled first. Further calls do nothing."""
        pointer = self._pointer
        if pointer is not None and self._pid == os.getpid():
            check(lib.sllm_context_close(pointer))
        super().close()

    def __repr__(self) -> str:
        if self.closed:
            return f"<sllm.Context of {self.model.path.name!r}, closed>"
        return f"<sllm.Context of {self.model.path.name!r}, {self.n_seq_max} x {self.n_ctx_seq} positions>"
