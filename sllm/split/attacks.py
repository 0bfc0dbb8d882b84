"""What hidden states reveal of the text: simple attacks, to be run on one's own split.

Whoever sees what crosses the link of a model that is split by layers, and has the model's weights, which are
public, can try to recover the tokens. Two ways to read what goes up, after the head layers:

- **Nearest vocabulary embedding** (:func:`nearest_embedding`): every layer adds to what entered it, so for a
  while a hidden state still points to the embedding of its own token. The usual baseline of the papers below.
- **Vocabulary matching** (:func:`match_vocabulary`): a causal model's hidden state at a position depends on
  the tokens up to there and on nothing else. So send every token of the vocabulary through the same layers
  after the known ones, and take the one whose hidden state is the one that was seen; then the next position.
  2510.15511 ("Language Models are Injective and Hence Invertible", SipIt) shows why this nearly always finds
  exactly the text, at every depth; 2505.18332 breaks schemes that send hidden states to third parties.

And two to read what comes back, before the tail layers:

- **Logit lens** (:func:`logit_lens`): apply the final norm and the head to it, as if no layers were left
  (nostalgebraist, "interpreting GPT: the logit lens", LessWrong 2020).
- **Running the last layers**: they are as public as the others.

More elaborate attacks are known: 2503.09022 (88 % of the tokens from the last possible layer of a 65B model),
2605.23158 (also against added noise), 2602.16760 (59 % after two layers, 35 % after eight). What these do not
recover is therefore not safe.

Numbers like 2510.15511 are those of arXiv.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.engine.arrays import int32_array
from sllm.engine.layers import Embedding, LayerRange
from sllm.wire.codec import across

if TYPE_CHECKING:
    import numpy.typing as npt

    from sllm.engine.layer_file import LayeredFile

__all__ = ["SEQUENCES", "Matched", "Nearest", "logit_lens", "match_vocabulary", "nearest_embedding"]

SEQUENCES = 32
"""Candidates that are sent through the layers at a time."""

_BLOCK_NUMBERS = 1 << 22  # of the embedding at a time
_LOGITS_NUMBERS = 1 << 24  # at a time
_STANDS_OUT = 8.0
"""A candidate so many times nearer than half of those tried is the token, or one much like it.

In the embedded target, after 1 and 6 layers, the right one was 19 (q4) to 280 (f32) times nearer than the
median, and of the wrong ones, but for tokens that are nearly alike, the nearest 1.3 times.
"""

_LARGEST = {"f16": 65504.0, "q4": 8 * 65504.0}
"""Numbers beyond which encode() refuses."""


@dataclass(frozen=True)
class Nearest:
    """The tokens whose embeddings are nearest to some hidden states.

    Attributes:
        cosine, dot, l2: int32 (n,), the nearest by each measure.
        order: int32 (n, n_best), the nearest by cosine, nearest first.

    """

    cosine: npt.NDArray[np.int32]
    dot: npt.NDArray[np.int32]
    l2: npt.NDArray[np.int32]
    order: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Matched:
    """What vocabulary matching found.

    Attributes:
        tokens: int32 (n,), one for each hidden state; those that were known are as they were given.
        n_tried: candidates that were sent through the layers, in all.

    """

    tokens: npt.NDArray[np.int32]
    n_tried: int


def nearest_embedding(embedding: Embedding, rows: npt.NDArray[np.float32], n_best: int = 1) -> Nearest:
    """The tokens whose embeddings are nearest to ``rows``, float32 (n, n_embd).

    The matrix is read block by block, so a large vocabulary takes no more memory than a small one. Of equals
    the lowest id comes first.

    Raises:
        ValueError: ``n_best`` is not between 1 and the number of tokens.

    """
    if not 1 <= n_best <= embedding.n_tokens:
        raise ValueError(f"n_best is {n_best}, expected 1 to {embedding.n_tokens}")
    n = len(rows)
    step = max(1, _BLOCK_NUMBERS // embedding.n_embd)
    dot, l2 = _Best(n, 1), _Best(n, 1)
    cosine = _Best(n, n_best)
    for start in range(0, embedding.n_tokens, step):
        ids = np.arange(start, min(start + step, embedding.n_tokens), dtype=np.int32)
        block = embedding.rows(ids)
        products = rows @ block.T
        squares = np.einsum("ij,ij->i", block, block)
        dot.add(ids, products)
        cosine.add(ids, products / np.maximum(np.sqrt(squares), 1e-30))
        l2.add(ids, 2 * products - squares)
    return Nearest(cosine.ids[:, 0], dot.ids[:, 0], l2.ids[:, 0], cosine.ids)


class _Best:
    """The ids with the highest scores so far, for each of n rows."""

    def __init__(self, n: int, keep: int) -> None:
        self.ids = np.empty((n, 0), dtype=np.int32)
        self._scores = np.empty((n, 0), dtype=np.float32)
        self._keep = keep

    def add(self, ids: npt.NDArray[np.int32], scores: npt.NDArray[np.float32]) -> None:
        """``scores``: (n, len(ids))."""
        all_ids = np.concatenate([self.ids, np.broadcast_to(ids, scores.shape)], axis=1)
        all_scores = np.concatenate([self._scores, scores], axis=1)
        order = (
            np.argmax(all_scores, axis=1)[:, None]
            if self._keep == 1
            else np.argsort(-all_scores, axis=1, kind="stable")[:, : self._keep]
        )
        self.ids = np.take_along_axis(all_ids, order, axis=1)
        self._scores = np.take_along_axis(all_scores, order, axis=1)


def match_vocabulary(
    layers: LayerRange | None,
    embedding: Embedding,
    seen: npt.NDArray[np.float32],
    candidates: npt.NDArray[np.int32],
    *,
    codec: str,
    known: npt.ArrayLike = (),
    prefix: npt.ArrayLike | None = None,
) -> Matched:
    """Recover the tokens of ``seen`` by sending candidates through the same layers (see the module).

    Candidates are tried in their order, as many at a time as ``layers`` has sequences, each after the same
    prefix. What comes out goes through the codec, as what was seen did; the nearest (by the length of the
    difference) is taken. The search for a token ends early where a candidate is the same, or 8 times nearer
    than the median of those that were tried while the last ones tried are not: with the right prefix only the
    token itself is, and others that are nearly alike.

    Where the candidates are the whole vocabulary, they are all tried at the second position, and from there
    on those come first whose hidden states were nearest there to what is seen now: a search then ends soon.

    Args:
        layers: layers [0, h) of the model; None: h is 0. Whatever its sequences hold is forgotten.
        embedding: of the model.
        seen: the hidden states as they came out of the link, float32 (n, n_embd), from position 0.
        candidates: int32 (n, k), which tokens to try for each.
        codec: which codec they came through.
        known: leading tokens that need no finding, such as BOS.
        prefix: the true tokens, int32 (n,), which candidates follow whatever was found; None: they follow
            what was found, errors included.

    Raises:
        ValueError: arrays that do not fit together.
        ContextFullError: a sequence of ``layers`` holds fewer than n positions.

    """
    n, n_candidates = candidates.shape if candidates.ndim == 2 else (-1, 0)
    given = int32_array(known, "known")
    truth = None if prefix is None else int32_array(prefix, "prefix")
    if n != len(seen) or n_candidates < 1:
        raise ValueError(f"candidates has shape {candidates.shape}, expected ({len(seen)}, k)")
    if truth is not None and len(truth) != n:
        raise ValueError(f"prefix has {len(truth)} tokens, expected {n}")
    # The first position of a text is unlike the others; the second is where the hidden states are learnt.
    learns = layers is not None and n_candidates == embedding.n_tokens
    search = _Search(layers, embedding, codec, max(len(given), 1) if learns else n)
    found = np.empty(n, dtype=np.int32)
    found[: len(given)] = given[:n]
    for pos in range(n):
        if pos >= len(given):
            found[pos] = search.find(pos, seen[pos], candidates[pos])
        if pos + 1 < n:
            search.append(pos, int(found[pos] if truth is None else truth[pos]))
    return Matched(found, search.n_tried)


class _Search:
    """Vocabulary matching, one position after the other.

    Args:
        layers: layers [0, h); None: h is 0.
        embedding: of the model.
        codec: which what is seen came through.
        learn_at: the position at which the hidden states of all tokens are kept; beyond the text: none.

    Attributes:
        n_tried: candidates that were sent through the layers so far.

    """

    def __init__(self, layers: LayerRange | None, embedding: Embedding, codec: str, learn_at: int) -> None:
        self.n_tried = 0
        self._layers = layers
        self._embedding = embedding
        self._codec = codec
        self._limit = _LARGEST.get(codec)
        self._learn_at = learn_at
        self._learnt: npt.NDArray[np.float32] | None = None  # (n_tokens, n_embd)
        self._at_once = SEQUENCES if layers is None else layers.context.n_seq_max
        # No recurrent state can forget a candidate: one sequence has the text alone, and the others copy it.
        self._trunk: int | None = None
        if layers is not None and layers.context.can_rollback != "free":
            self._at_once -= 1
            self._trunk = self._at_once

    def find(self, pos: int, seen: npt.NDArray[np.float32], candidates: npt.NDArray[np.int32]) -> int:
        """The candidate at ``pos`` whose hidden state is nearest to ``seen``."""
        if self._learnt is not None:
            apart = np.linalg.norm(self._learnt - seen, axis=1)
            candidates = np.argsort(apart, kind="stable").astype(np.int32)
        elif pos == self._learn_at:
            self._learnt = np.empty((self._embedding.n_tokens, len(seen)), dtype=np.float32)
        distances = np.empty(0)
        for start in range(0, len(candidates), self._at_once):
            some = candidates[start : start + self._at_once]
            rows = self._hidden_states(some, pos)
            latest = np.linalg.norm(rows.astype(np.float64) - seen, axis=1)
            distances = np.append(distances, latest)
            if self._learnt is not None and pos == self._learn_at:
                self._learnt[some] = rows
                continue
            near = np.median(distances) / _STANDS_OUT
            # Tokens that training never saw are nearly alike, and next to one another in the order.
            if distances.min() == 0 or distances.min() <= near < latest.min():
                break
        self.n_tried += len(distances)
        return int(candidates[int(distances.argmin())])

    def append(self, pos: int, token: int) -> None:
        """Put a token at ``pos`` of the text."""
        if self._layers is not None and self._trunk is not None:
            self._layers.forward(self._embedding.rows([token]), seq_id=self._trunk, pos=pos)
        elif self._layers is not None:
            tokens = np.full(self._at_once, token, dtype=np.int32)
            self._forward(self._layers, self._embedding.rows(tokens), pos)

    def _hidden_states(self, tokens: npt.NDArray[np.int32], pos: int) -> npt.NDArray[np.float32]:
        """What each token at ``pos`` looks like on the other side of the link."""
        rows = self._embedding.rows(tokens)
        if self._layers is not None:
            rows = self._forward(self._layers, rows, pos)
        if self._limit is not None:
            rows = rows.clip(-self._limit, self._limit)
        return across(rows, self._codec)

    def _forward(
        self, layers: LayerRange, rows: npt.NDArray[np.float32], pos: int
    ) -> npt.NDArray[np.float32]:
        """Send each row through the layers, at ``pos`` of a separate sequence."""
        seqs = list(range(len(rows)))
        if self._trunk is not None:
            for seq in seqs:
                layers.memory.copy(self._trunk, seq)
        return layers.forward(list(rows[:, None, :]), seq_id=seqs, pos=[pos] * len(rows))


def logit_lens(
    file: LayeredFile, rows: npt.NDArray[np.float32], start: int | None = None, **settings: Any
) -> npt.NDArray[np.int32]:
    """The token with the highest logit for each of ``rows``, float32 (n, n_embd), as if they had left the
    last layer; int32 (n,).

    Args:
        file: the model.
        rows: hidden states from position 0.
        start: run the layers [start, n_layer) before it; None: no layers.
        settings: ``n_gpu_layers``, ``n_threads`` and the like for :class:`~sllm.LayerRange`.

    """
    at_once = max(1, min(512, _LOGITS_NUMBERS // file.n_vocab))
    out = np.empty(len(rows), dtype=np.int32)
    with LayerRange(
        file,
        file.n_layer if start is None else start,
        file.n_layer,
        output=True,
        n_ctx=max(len(rows), 1),
        **settings,
    ) as layers:
        for i in range(0, len(rows), at_once):
            some = rows[i : i + at_once]
            out[i : i + at_once] = layers.forward(some, pos=i).argmax(axis=1)
    return out
