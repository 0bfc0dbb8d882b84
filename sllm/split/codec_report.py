"""What a wire codec does to the text of a model that is split by layers, against the whole model.

Along a text, for every position: the next-token distribution of the split (head, codec, middle, codec, tail)
and that of the whole; how far they are apart is their Kullback-Leibler divergence, as in llama.cpp's
``llama-perplexity --kl-divergence``.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.engine.layers import Embedding, LayerRange, open_layers
from sllm.engine.model import Model
from sllm.progress import step
from sllm.split.ends import checked_head, leading_tokens
from sllm.wire.codec import CODECS, across, row_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from sllm.engine.context import Context
    from sllm.engine.layer_file import LayeredFile

__all__ = ["CodecFigures", "CodecReport", "codec_report"]

_WINDOW = 512  # positions, at most: a longer text is taken in pieces
_CHUNK = 64  # positions that go through the layers at once
_LOGITS_NUMBERS = 1 << 21  # that are turned into probabilities at a time


@dataclass(frozen=True)
class CodecFigures:
    """What one codec does.

    Attributes:
        codec: its name.
        row_bytes: bytes that a position takes, in each direction.
        kl: the mean over all positions of KL(whole || split), in nats.
        kl_max: the largest of them.
        same_choice: share of the positions where both have the same likeliest token.
        perplexity: of the text, by the split model.
        refused: why the codec does not take this model's hidden states; the figures are then NaN.

    """

    codec: str
    row_bytes: int
    kl: float
    kl_max: float
    same_choice: float
    perplexity: float
    refused: str | None = None


@dataclass(frozen=True)
class CodecReport:
    """All codecs on one text.

    Attributes:
        model: name of the file.
        n_layer, n_embd: of the model.
        head, tail: layers before and after the link.
        n_tokens: tokens of the text.
        n_positions: positions whose distributions were compared.
        perplexity: of the text, by the whole model.
        codecs: the figures of each.

    """

    model: str
    n_layer: int
    n_embd: int
    head: int
    tail: int
    n_tokens: int
    n_positions: int
    perplexity: float
    codecs: tuple[CodecFigures, ...]


def codec_report(
    path: str | os.PathLike[str],
    text: str,
    *,
    head: int | None = None,
    tail: int = 1,
    codecs: Sequence[str] = CODECS,
    n_gpu_layers: int | None = None,
    n_threads: int | None = None,
    progress: Callable[[float], object] | None = None,
) -> CodecReport:
    """Measure what the codecs do to a model's next-token distributions along a text.

    A text longer than 512 tokens (or than the model's context) is taken in pieces of that length, each from
    an empty context. Both models get their tokens in the same batches, so f32 has a divergence of exactly 0.
    The logits of 64 positions at a time are held, of the whole model and of one split.

    Args:
        path: the model, whole.
        text: at least 2 tokens.
        head, tail: layers before and after the link; head None: 6, or in a small model as many as leave one
            layer to the other side.
        codecs: names of :data:`sllm.wire.codec.CODECS`.
        n_gpu_layers, n_threads: as for :class:`~sllm.LayerRange`.
        progress: called with 0.0 .. 1.0.

    Raises:
        ValueError: fewer than 2 tokens, no layers between head and tail, or no such codec.
        ModelLoadError, UnsupportedModelError: as :func:`~sllm.engine.layers.open_layers`.

    """
    file = open_layers(path)
    head = checked_head(file, head, tail)
    names = _checked_codecs(codecs, file.n_embd)
    with ExitStack() as stack:
        told = stack.enter_context(step("measuring the codecs", progress))
        whole = stack.enter_context(Model(file.paths[0], n_gpu_layers=n_gpu_layers))
        before = leading_tokens(whole)
        tokens = whole.vocab.encode(text, add_special=False)
        if len(tokens) < 2:
            found = "1 token" if len(tokens) == 1 else "no tokens"
            raise ValueError(f"the text has {found}, expected at least 2")
        window = min(_WINDOW, whole.n_ctx_train or _WINDOW)
        n_piece = max(window - len(before), 2)
        n_ctx = min(len(tokens), n_piece) + len(before)
        settings: dict[str, Any] = {
            "n_ctx": n_ctx,
            "n_threads": n_threads,
            "n_batch": _CHUNK,
            "n_rollback": 0,
        }
        context = stack.enter_context(whole.context(**settings))
        split = stack.enter_context(
            _Split(file, head, tail, names, {**settings, "n_gpu_layers": n_gpu_layers})
        )
        plain = _Sums()
        for begin in range(0, len(tokens), n_piece):
            piece = tokens[begin : begin + n_piece]
            _compare(context, split, plain, np.concatenate([before, piece]), len(before))
            if told is not None:
                told((begin + len(piece)) / len(tokens))
        return CodecReport(
            model=file.paths[0].name,
            n_layer=file.n_layer,
            n_embd=file.n_embd,
            head=head,
            tail=tail,
            n_tokens=len(tokens),
            n_positions=plain.n,
            perplexity=plain.perplexity,
            codecs=split.figures(),
        )


def _checked_codecs(names: Sequence[str], n_embd: int) -> list[str]:
    """Each name once.

    Raises:
        ValueError: there is none, or no such codec.

    """
    unique = list(dict.fromkeys(names))
    for name in unique:
        if name not in CODECS:
            row_bytes(name, n_embd)  # raises, and says which there are
    if not unique:
        raise ValueError("codecs is empty, expected at least one")
    return unique


def _compare(
    context: Context, split: _Split, plain: _Sums, ids: npt.NDArray[np.int32], n_leading: int
) -> None:
    """Send one piece of the text through the whole model and the splits; the positions of its ``n_leading``
    first tokens but the last do not count.
    """
    split.begin()
    for at in range(0, len(ids), _CHUNK):
        some = ids[at : at + _CHUNK]
        # The last position has a distribution, too, and no next token in this piece.
        following = ids[at + 1 : at + 1 + _CHUNK]
        first = max(n_leading - 1 - at, 0)
        logits = context.decode(some, pos=at, logits="all")
        assert logits is not None
        plain.compare(logits, logits, following, first)
        split.compare(some, at, logits, following, first)


class _Sums:
    """How far two models are apart, summed over positions."""

    def __init__(self) -> None:
        self.n = 0
        self.refused: str | None = None
        self._kl = 0.0
        self._kl_max = 0.0
        self._same = 0
        self._n_following = 0
        self._surprise = 0.0

    def compare(
        self,
        whole: npt.NDArray[np.float32],
        split: npt.NDArray[np.float32],
        following: npt.NDArray[np.int32],
        first: int,
    ) -> None:
        """Add the rows from ``first`` on of two arrays of logits; ``following`` are the next tokens, of which
        the last may be missing.
        """
        step = max(1, _LOGITS_NUMBERS // whole.shape[1])
        for i in range(first, len(whole), step):
            p, q = _log_softmax(whole[i : i + step]), _log_softmax(split[i : i + step])
            kl = (np.exp(p) * (p - q)).sum(axis=1)
            self.n += len(kl)
            self._kl += float(kl.sum())
            self._kl_max = max(self._kl_max, float(kl.max()))
            self._same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            known = following[i : i + step][: len(q)]
            self._n_following += len(known)
            self._surprise -= float(q[np.arange(len(known)), known].sum())

    @property
    def perplexity(self) -> float:
        return float(np.exp(self._surprise / self._n_following))

    def figures(self, codec: str, n_bytes: int) -> CodecFigures:
        if self.refused is not None:
            nan = float("nan")
            return CodecFigures(codec, n_bytes, nan, nan, nan, nan, self.refused)
        return CodecFigures(
            codec, n_bytes, self._kl / self.n, self._kl_max, self._same / self.n, self.perplexity
        )


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Whole distributions, which a divergence needs; the C code gives the probabilities of single tokens."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _width(codec: str, n_embd: int) -> tuple[int, str | None]:
    """Bytes of a row, or why there are no such rows."""
    try:
        return row_bytes(codec, n_embd), None
    except ValueError as error:
        return 0, str(error)


class _Split:
    """The model in three parts, with a sequence of the middle and of the tail for each codec."""

    def __init__(
        self, file: LayeredFile, head: int, tail: int, codecs: list[str], settings: dict[str, Any]
    ) -> None:
        self._codecs = codecs
        self._sums = {name: _Sums() for name in codecs}
        self._bytes: dict[str, int] = {}
        for name in codecs:
            self._bytes[name], self._sums[name].refused = _width(name, file.n_embd)
        n = file.n_layer
        several = {**settings, "n_seq_max": len(codecs), "n_ctx": settings["n_ctx"] * len(codecs)}
        with ExitStack() as stack:
            self._embedding = stack.enter_context(Embedding(file))
            self._head = stack.enter_context(LayerRange(file, 0, head, **settings)) if head else None
            self._middle = stack.enter_context(LayerRange(file, head, n - tail, **several))
            self._tail = stack.enter_context(LayerRange(file, n - tail, n, output=True, **several))
            self._stack = stack.pop_all()

    def begin(self) -> None:
        """Forget the text so far."""
        for layers in (self._head, self._middle, self._tail):
            if layers is not None:
                layers.memory.clear()

    def compare(
        self,
        tokens: npt.NDArray[np.int32],
        pos: int,
        whole: npt.NDArray[np.float32],
        following: npt.NDArray[np.int32],
        first: int,
    ) -> None:
        """Send tokens through the parts and compare what comes out."""
        leaving = self._embedding.rows(tokens)
        if self._head is not None:
            leaving = self._head.forward(leaving, pos=pos)
        for i, name in enumerate(self._codecs):
            sums = self._sums[name]
            if sums.refused is not None:
                continue
            try:
                up = across(leaving, name)
                down = across(self._middle.forward(up, seq_id=i, pos=pos), name)
            except ValueError as error:
                sums.refused = str(error)
                continue
            sums.compare(whole, self._tail.forward(down, seq_id=i, pos=pos), following, first)

    def figures(self) -> tuple[CodecFigures, ...]:
        return tuple(self._sums[name].figures(name, self._bytes[name]) for name in self._codecs)

    def __enter__(self) -> _Split:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()
