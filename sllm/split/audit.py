"""What hidden states tell: the simple attacks, to be run on one's own split.

Whoever sees what crosses the link of a model that is split by layers, and has the model's weights, which are
public, can try to tell the tokens. Two ways to read what goes up, behind the head layers:

- **Nearest vocabulary embedding** (:func:`nearest_embedding`): every layer adds to what entered it, so for a
  while a hidden state still points to the embedding of its own token. The usual baseline of the papers below.
- **Vocabulary matching** (:func:`match_vocabulary`): a causal model's hidden state at a position depends on
  the tokens up to there and on nothing else. So send every token of the vocabulary through the same layers
  behind what is known already, and take the one whose hidden state is the one that was seen; then the next
  position. 2510.15511 ("Language Models are Injective and Hence Invertible", SipIt) shows why this nearly
  always finds exactly the text, at every depth; 2505.18332 breaks schemes that send hidden states to third
  parties.

And two to read what comes back, before the tail layers:

- **Logit lens** (:func:`logit_lens`): apply the final norm and the head to it, as if no layers were left
  (nostalgebraist, "interpreting GPT: the logit lens", LessWrong 2020).
- **Running the last layers**: they are as public as the others.

More elaborate attacks are known: 2503.09022 (88 % of the tokens from the last possible layer of a 65B model),
2605.23158 (also against added noise), 2602.16760 (59 % behind two layers, 35 % behind eight). What this
module does not recover is therefore not safe.

Numbers like 2510.15511 are those of arXiv.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.engine.arrays import int32_array
from sllm.engine.layers import Embedding, LayerRange, open_layers
from sllm.engine.model import Model
from sllm.wire import codec as wire

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from sllm.engine.layer_file import LayeredFile

__all__ = [
    "AuditReport",
    "HeadFigures",
    "Matched",
    "Nearest",
    "TailFigures",
    "across",
    "audit",
    "check_ends",
    "logit_lens",
    "match_vocabulary",
    "nearest_embedding",
]

_BLOCK_NUMBERS = 1 << 22  # of the embedding at a time
_LOGITS_NUMBERS = 1 << 24  # at a time
_SEQUENCES = 32  # candidates that are fed at a time
_STANDS_OUT = 8.0
"""A candidate so many times nearer than half of those tried is the token, or one much like it.

In the embedded target, behind 1 and 6 layers, the right one was 19 (q4) to 280 (f32) times nearer than the
median, and of the wrong ones, but for tokens that are nearly alike, the nearest 1.3 times.
"""

_ALL_CANDIDATES = 4096
_BEST_CANDIDATES = 512

_LARGEST = {"f16": 65504.0, "q4": 8 * 65504.0}  # beyond it, encode() refuses


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


@dataclass(frozen=True)
class HeadFigures:
    """What the hidden states behind so many layers tell: shares of the tokens, 0 to 1.

    Attributes:
        layers: how many layers the hidden states went through.
        cosine, dot, l2: recovered by the nearest embedding.
        matched: recovered by vocabulary matching behind the attacker's own finds.
        matched_true_prefix: the same, had every earlier token been known.
        among_candidates: tokens that were among the candidates, so what matching could find at best.
        tried_per_token: candidates that matching fed.

    """

    layers: int
    cosine: float
    dot: float
    l2: float
    matched: float
    matched_true_prefix: float
    among_candidates: float
    tried_per_token: float


@dataclass(frozen=True)
class TailFigures:
    """What the hidden states before the last layers tell of the next tokens: shares, 0 to 1.

    Attributes:
        layers: how many layers are left.
        lens: positions where the logit lens shows the model's own choice.
        lens_text: those where it shows the text's next token.
        run: positions where running the last layers shows the model's own choice.

    """

    layers: int
    lens: float
    lens_text: float
    run: float


@dataclass(frozen=True)
class AuditReport:
    """The attacks on one split, and what they found.

    Attributes:
        model: name of the file.
        n_layer, n_vocab: of the model.
        head, tail, codec: the split.
        n_tokens: tokens of the text that were to be recovered.
        n_candidates: tokens that matching tried at most for each.
        choice_text: share of the text's tokens that the whole model itself would have chosen.
        text: what was to be recovered.
        recovered: what vocabulary matching made of the hidden states behind the ``head`` layers.
        heads, tails: the figures for each number of layers.

    """

    model: str
    n_layer: int
    n_vocab: int
    head: int
    tail: int
    codec: str
    n_tokens: int
    n_candidates: int
    choice_text: float
    text: str
    recovered: str
    heads: tuple[HeadFigures, ...]
    tails: tuple[TailFigures, ...]


def check_ends(file: LayeredFile, head: int, tail: int) -> None:
    """Raise ValueError where ``head`` and ``tail`` layers, here, leave none to the other side; or where the
    file is not of a whole model.
    """
    name = file.paths[0].name
    if file.embedding is None or file.output is None or len(file.layers) != file.n_layer:
        here = f"layers [{file.layers.start}, {file.layers.stop})" if file.layers else "no layers"
        raise ValueError(f"{name} holds {here} of {file.n_layer}, expected a whole model")
    if head < 0 or tail < 0:
        raise ValueError(f"head is {head} and tail is {tail}, expected 0 or more")
    if head + tail >= file.n_layer:
        raise ValueError(
            f"head {head} and tail {tail} leave none of the {file.n_layer} layers of {name} to the other side"
        )


def across(rows: npt.NDArray[np.float32], codec: str) -> npt.NDArray[np.float32]:
    """``rows``, float32 (n, n_embd), as they are on the other side of the link.

    Raises:
        ValueError: as :func:`sllm.wire.codec.encode`.

    """
    return wire.decode(wire.encode(rows, codec), len(rows), rows.shape[1], codec)


# ---- the attacks


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
    """Tell the tokens of ``seen`` by sending candidates through the same layers (see the module).

    Candidates are tried in their order, as many at a time as ``layers`` has sequences, each behind the same
    prefix. What comes out goes through the codec, as what was seen did; the nearest (by the length of the
    difference) is taken. The search for a token ends early where a candidate is the same or 8 times nearer
    than
    the median of those that were tried, and the last ones tried are not: with the right prefix only the token
    itself is, and others that are nearly alike.

    Where the candidates are the whole vocabulary, they are all tried at the second position, and from there
    on
    those come first whose hidden states were nearest there to what is seen now: a search then ends soon.

    Args:
        layers: layers [0, h) of the model; None: h is 0. Whatever its sequences hold is forgotten.
        embedding: of the model.
        seen: the hidden states as they came out of the link, float32 (n, n_embd), from position 0.
        candidates: int32 (n, k), which tokens to try for each.
        codec: which codec they came through.
        known: leading tokens that need no finding, such as BOS.
        prefix: the true tokens, int32 (n,), to go on behind these, whatever was found; None: go on behind
            what was found, errors and all.

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
    at_once = _SEQUENCES if layers is None else layers.context.n_seq_max
    limit = _LARGEST.get(codec)
    # The first position of a text is unlike the others; the second is where the hidden states are learnt.
    learn = max(len(given), 1) if layers is not None and n_candidates == embedding.n_tokens else n
    learnt: npt.NDArray[np.float32] | None = None
    found = np.empty(n, dtype=np.int32)
    n_tried = 0
    for pos in range(n):
        if pos < len(given):
            found[pos] = given[pos]
        else:
            order = candidates[pos]
            if learnt is not None:
                order = np.argsort(np.linalg.norm(learnt - seen[pos], axis=1), kind="stable").astype(np.int32)
            elif pos == learn:
                learnt = np.empty((embedding.n_tokens, seen.shape[1]), dtype=np.float32)
            distances = np.empty(0)
            for start in range(0, n_candidates, at_once):
                some = order[start : start + at_once]
                rows = embedding.rows(some)
                if layers is not None:
                    rows = _at(layers, rows, pos)
                if limit is not None:
                    rows = rows.clip(-limit, limit)
                rows = across(rows, codec)
                latest = np.linalg.norm(rows.astype(np.float64) - seen[pos], axis=1)
                distances = np.append(distances, latest)
                if learnt is not None and pos == learn:
                    learnt[some] = rows
                    continue
                near = np.median(distances) / _STANDS_OUT
                # Tokens that training never saw are nearly alike, and next to one another in the order.
                if distances.min() == 0 or distances.min() <= near < latest.min():
                    break
            n_tried += len(distances)
            found[pos] = order[int(distances.argmin())]
        if layers is not None and pos + 1 < n:
            token = found[pos] if truth is None else truth[pos]
            _at(layers, embedding.rows(np.full(at_once, token, dtype=np.int32)), pos)
    return Matched(found, n_tried)


def _at(layers: LayerRange, rows: npt.NDArray[np.float32], pos: int) -> npt.NDArray[np.float32]:
    """Each row at ``pos`` of a sequence of its own."""
    seqs = list(range(len(rows)))
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


# ---- all of them


def audit(
    path: str | os.PathLike[str],
    text: str,
    *,
    head: int | None = None,
    tail: int = 1,
    codec: str = "q8",
    max_tokens: int = 64,
    candidates: int | None = None,
    n_gpu_layers: int | None = None,
    n_threads: int | None = None,
    progress: Callable[[str], object] | None = None,
) -> AuditReport:
    """Run the attacks on a model that is split behind ``head`` layers and before its last ``tail`` layers.

    Args:
        path: the model, whole.
        text: what is to be recovered; its first ``max_tokens`` tokens are used. What the model puts before
            every text (BOS) is known to everybody and does not count.
        head, tail: the split; head None: 6, or in a small model as many as leave one layer to the other side.
            Other numbers of layers are reported as well: powers of two, up to twice these.
        codec: how hidden states cross the link.
        max_tokens: at most so many tokens.
        candidates: tokens to try for each in vocabulary matching, those with the nearest embeddings first;
            None: all of up to 4096, else the best 512.
        n_gpu_layers, n_threads: as for :class:`~sllm.LayerRange`.
        progress: called with what is being done.

    Returns:
        The figures. On one machine they are the same every time.

    Raises:
        ValueError: no tokens, no layers between head and tail, or an argument out of range; also a hidden
            state that the codec does not take.
        ModelLoadError, UnsupportedModelError: as :func:`~sllm.engine.layers.open_layers`.

    """
    file = open_layers(path)
    if head is None:
        head = max(0, min(6, file.n_layer - tail - 1))
    check_ends(file, head, tail)
    wire.row_bytes(codec, file.n_embd)
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected 1 or more")
    if candidates is not None and candidates < 1:
        raise ValueError(f"candidates is {candidates}, expected 1 or more")
    n_vocab = file.n_vocab
    default = n_vocab if n_vocab <= _ALL_CANDIDATES else _BEST_CANDIDATES
    n_candidates = min(candidates or default, n_vocab)
    tell = progress or (lambda _what: None)
    settings: dict[str, Any] = {"n_gpu_layers": n_gpu_layers, "n_threads": n_threads}
    with ExitStack() as stack:
        model = stack.enter_context(Model(file.paths[0], vocab_only=True))
        embedding = stack.enter_context(Embedding(file))
        tokens, n_known = _tokens(model, text, max_tokens)
        attack = _Attack(file, embedding, tokens, n_known, codec, n_candidates, settings)
        last = file.n_layer - tail
        heads, found = [], tokens
        for layers in _sweep(head, last):
            tell(f"{layers} head layers")
            figures, matched = attack.head(layers)
            heads.append(figures)
            if layers == head:
                found = matched
        tell("the way back")
        tails, choice_text = attack.tails(_sweep(tail, file.n_layer - 1))
        return AuditReport(
            model=file.paths[0].name,
            n_layer=file.n_layer,
            n_vocab=n_vocab,
            head=head,
            tail=tail,
            codec=codec,
            n_tokens=len(tokens) - n_known,
            n_candidates=n_candidates,
            choice_text=choice_text,
            text=model.vocab.decode(tokens[n_known:]),
            recovered=model.vocab.decode(found[n_known:]),
            heads=tuple(heads),
            tails=tuple(tails),
        )


def _tokens(model: Model, text: str, max_tokens: int) -> tuple[npt.NDArray[np.int32], int]:
    """The tokens, and how many of them stand before every text."""
    tokens, always = model.vocab.encode(text), model.vocab.encode("")
    n_known = 0
    while n_known < min(len(tokens), len(always)) and tokens[n_known] == always[n_known]:
        n_known += 1
    if len(tokens) == len(always):
        raise ValueError("the text has no tokens")
    return tokens[: n_known + max_tokens], n_known


def _sweep(value: int, limit: int) -> list[int]:
    """0, 1, 2, 4, ..., ``value`` and what lies beyond it, up to ``limit``."""
    top = max(2 * value, 4)
    powers = [1 << i for i in range(top.bit_length()) if 1 << i <= top]
    return sorted({min(n, limit) for n in (0, *powers, value, top)})


def _share(found: npt.NDArray[Any], true: npt.NDArray[Any]) -> float:
    return float((found == true).mean()) if len(true) else 0.0


@dataclass(frozen=True)
class _Attack:
    """One text on its way through one model."""

    file: LayeredFile
    embedding: Embedding
    tokens: npt.NDArray[np.int32]
    n_known: int
    codec: str
    n_candidates: int
    settings: dict[str, Any]

    def head(self, n_layers: int) -> tuple[HeadFigures, npt.NDArray[np.int32]]:
        """Read what leaves after the first ``n_layers`` layers; the figures, and what matching found."""
        rows = self.embedding.rows(self.tokens)
        n, k = len(self.tokens), self.n_known
        with ExitStack() as stack:
            layers = None
            if n_layers:
                layers = stack.enter_context(
                    LayerRange(
                        self.file, 0, n_layers, n_seq_max=_SEQUENCES, n_ctx=n * _SEQUENCES, **self.settings
                    )
                )
                rows = layers.forward(rows, pos=0)
            seen = across(rows, self.codec)
            near = nearest_embedding(self.embedding, seen, self.n_candidates)

            def match(known: npt.NDArray[np.int32], prefix: npt.NDArray[np.int32] | None) -> Matched:
                if layers is not None:
                    layers.memory.clear()
                return match_vocabulary(
                    layers, self.embedding, seen, near.order, codec=self.codec, known=known, prefix=prefix
                )

            own = match(self.tokens[:k], None)
            helped = own.tokens
            wrong = np.flatnonzero(own.tokens != self.tokens)
            if len(wrong) and wrong[0] + 1 < n:
                # Up to the first error the two are the same search.
                same = int(wrong[0]) + 1
                after = match(self.tokens[:same], self.tokens).tokens
                helped = np.concatenate([own.tokens[:same], after[same:]])
        true = self.tokens[k:]
        figures = HeadFigures(
            layers=n_layers,
            cosine=_share(near.cosine[k:], true),
            dot=_share(near.dot[k:], true),
            l2=_share(near.l2[k:], true),
            matched=_share(own.tokens[k:], true),
            matched_true_prefix=_share(helped[k:], true),
            among_candidates=float((near.order[k:] == true[:, None]).any(axis=1).mean()),
            tried_per_token=own.n_tried / (n - k),
        )
        return figures, own.tokens

    def tails(self, numbers: Sequence[int]) -> tuple[list[TailFigures], float]:
        """Read what comes back before the last so many layers, for each number; and how many of the text's
        tokens the model itself would choose.
        """
        file, n = self.file, self.file.n_layer
        rows = self.embedding.rows(self.tokens)
        first = max(self.n_known - 1, 0)  # what is behind BOS is the first token that nobody knows
        choice = logit_lens(file, rows, 0, **self.settings)[first:]
        following = self.tokens[first + 1 :]
        found, at = [], 0
        for left in sorted(numbers, reverse=True):
            cut = n - left
            if cut > at:
                with LayerRange(file, at, cut, n_ctx=len(rows), **self.settings) as layers:
                    rows = layers.forward(rows)
            at = cut
            seen = across(rows, self.codec)
            lens = logit_lens(file, seen, **self.settings)[first:]
            run = logit_lens(file, seen, cut, **self.settings)[first:] if left else lens
            found.append(
                TailFigures(
                    layers=left,
                    lens=_share(lens, choice),
                    lens_text=_share(lens[: len(following)], following),
                    run=_share(run, choice),
                )
            )
        return found[::-1], _share(choice[: len(following)], following)
