"""One pass through the layers of a worker: one request each of several sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sllm.engine.sampling import SamplingParams
from sllm.worker.layer_sequence import LayerAnswer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sllm.engine.layers import LayerRange
    from sllm.worker.layer_sequence import Batch, LayerRequest, LayerSequence

__all__ = ["LayerPass"]


class LayerPass:
    """One pass through the layers: one request each of several sequences.

    Args:
        layers: the range.
        batch: the sequences and their requests.
        hold: called with a sequence and how many of its positions are in memory, whenever that has changed.

    """

    def __init__(
        self, layers: LayerRange, batch: Batch, hold: Callable[[LayerSequence, int], object]
    ) -> None:
        self._layers = layers
        self._batch = batch
        self._hold = hold

    def forward(self) -> list[LayerAnswer]:
        """Hidden states in, hidden states out."""
        rows = self._layers.forward(
            [request.hidden for _, request in self._batch],
            seq_id=[sequence.slot.seq_id for sequence, _ in self._batch],
            pos=[request.pos for _, request in self._batch],
            parents=[request.parents for _, request in self._batch],
        )
        answers, at = [], 0
        for sequence, request in self._batch:
            n = len(request.hidden)
            self._hold(sequence, request.end)
            hidden = None if request.silent else rows[at : at + n]
            answers.append(LayerAnswer(request.pos, n, hidden, (), 0, 0, 0.0))
            at += n
        return answers

    def select(self) -> list[LayerAnswer]:
        """Hidden states in, tokens out: what is text already is decoded, and what is drafted verified."""
        # 1. Decode the rows of known text.
        self._decode([one for one in self._batch if len(one[1].hidden) > one[1].n_select])
        # 2. Verify the others, as many at once as the context keeps logits of.
        committed: dict[LayerSequence, tuple[int, ...]] = {}
        left = [one for one in self._batch if one[1].n_select]
        while left:
            n_fit = self._n_fit(left)
            self._verify(left[:n_fit], committed)
            left = left[n_fit:]
        # 3. Answer in the order of the requests.
        answers = []
        for sequence, request in self._batch:
            n, k = len(request.hidden), request.n_select
            if k == 0:
                answers.append(LayerAnswer(request.pos, n, None, (), 0, 0, 0.0))
            else:
                tokens, pos = committed[sequence], request.pos + n - k + 1
                answers.append(LayerAnswer(pos, n, None, tokens, len(tokens) - 1, k - 1, 0.0))
        return answers

    def _decode(self, batch: Batch) -> None:
        if not batch:
            return
        lengths = [len(request.hidden) - request.n_select for _, request in batch]
        self._layers.context.decode(
            [list(request.tokens[:n]) for (_, request), n in zip(batch, lengths, strict=True)],
            seq_id=[sequence.slot.seq_id for sequence, _ in batch],
            pos=[request.pos for _, request in batch],
            hidden=np.concatenate(
                [request.hidden[:n] for (_, request), n in zip(batch, lengths, strict=True)]
            ),
        )
        for (sequence, request), n in zip(batch, lengths, strict=True):
            self._hold(sequence, request.pos + n)

    def _n_fit(self, left: Batch) -> int:
        """How many of the requests, one at least, the context keeps logits for at once."""
        n_rows = 0
        for n, (_, request) in enumerate(left):
            n_rows += request.n_select
            if n_rows > self._layers.context.n_outputs_max:
                return max(n, 1)
        return len(left)

    def _verify(
        self,
        batch: Batch,
        committed: dict[LayerSequence, tuple[int, ...]],
    ) -> None:
        """Verify the last rows of each request, and note the tokens that this commits."""
        starts = [len(request.hidden) - request.n_select for _, request in batch]
        verdict = self._layers.verify(
            [sequence.slot.seq_id for sequence, _ in batch],
            [[request.tokens[n]] for (_, request), n in zip(batch, starts, strict=True)],
            [list(request.tokens[n + 1 :]) for (_, request), n in zip(batch, starts, strict=True)],
            hidden=np.concatenate(
                [request.hidden[n:] for (_, request), n in zip(batch, starts, strict=True)]
            ),
            parents=[_parents(request) for _, request in batch],
            sampling=[sequence.sampling or SamplingParams() for sequence, _ in batch],
            pos=[request.pos + n for (_, request), n in zip(batch, starts, strict=True)],
            start=[sequence.text_start for sequence, _ in batch],
        )
        for i, (sequence, _) in enumerate(batch):
            n_accepted = int(verdict.n_accepted[i])
            self._hold(sequence, self._layers.memory.length(sequence.slot.seq_id))
            committed[sequence] = tuple(verdict.tokens[i, : n_accepted + 1].tolist())


def _parents(request: LayerRequest) -> Sequence[int]:
    """For each drafted token of a request the one that it follows."""
    return request.parents or range(-1, request.n_select - 2)
