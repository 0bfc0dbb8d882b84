"""How much of a text the simple attacks on a split's hidden states recover (:mod:`sllm.split.attacks`)."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.engine.layers import Embedding, LayerRange, open_layers
from sllm.engine.model import Model
from sllm.progress import step
from sllm.split.attacks import SEQUENCES, Matched, logit_lens, match_vocabulary, nearest_embedding
from sllm.split.ends import checked_head, leading_tokens
from sllm.wire.codec import across, row_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from sllm.engine.layer_file import LayeredFile

__all__ = ["AuditReport", "HeadFigures", "TailFigures", "audit"]

_ALL_CANDIDATES = 4096
_BEST_CANDIDATES = 512


@dataclass(frozen=True)
class HeadFigures:
    """What the hidden states after so many layers reveal: shares of the tokens, 0 to 1.

    Attributes:
        layers: how many layers the hidden states went through.
        cosine, dot, l2: recovered by the nearest embedding.
        matched: recovered by vocabulary matching after the attacker's own finds.
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
    """What the hidden states before the last layers reveal of the next tokens: shares, 0 to 1.

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
        recovered: what vocabulary matching made of the hidden states after the ``head`` layers.
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
    progress: Callable[[float], object] | None = None,
) -> AuditReport:
    """Run the attacks on a model that is split after ``head`` layers and before its last ``tail`` layers.

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
        progress: called with 0.0 .. 1.0.

    Returns:
        The figures. On one machine they are the same every time.

    Raises:
        ValueError: no tokens, no layers between head and tail, or an argument out of range; also a hidden
            state that the codec does not take.
        ModelLoadError, UnsupportedModelError: as :func:`~sllm.engine.layers.open_layers`.

    """
    file = open_layers(path)
    head = checked_head(file, head, tail)
    row_bytes(codec, file.n_embd)
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected 1 or more")
    n_candidates = _n_candidates(candidates, file.n_vocab)
    settings: dict[str, Any] = {"n_gpu_layers": n_gpu_layers, "n_threads": n_threads, "n_rollback": 0}
    with ExitStack() as stack:
        told = stack.enter_context(step("attacking", progress)) or (lambda _share: None)
        model = stack.enter_context(Model(file.paths[0], vocab_only=True))
        embedding = stack.enter_context(Embedding(file))
        tokens, n_known = _tokens(model, text, max_tokens)
        attack = _Attack(file, embedding, tokens, n_known, codec, n_candidates, settings)
        heads, found = [], tokens
        n = file.n_layer
        sweep = [k for k in _sweep(head, n - tail) if k == 0 or not file.obstacle(0, k)]
        for i, layers in enumerate(sweep):
            told(i / (len(sweep) + 1))
            figures, matched = attack.head(layers)
            heads.append(figures)
            if layers == head:
                found = matched
        told(len(sweep) / (len(sweep) + 1))
        left = [
            k
            for k in _sweep(tail, n - 1)
            if k == 0 or not (file.obstacle(0, n - k) or file.obstacle(n - k, n))
        ]
        tails, choice_text = attack.tails(left)
        told(1.0)
        return AuditReport(
            model=file.paths[0].name,
            n_layer=file.n_layer,
            n_vocab=file.n_vocab,
            head=head,
            tail=tail,
            codec=codec,
            n_tokens=len(tokens) - n_known,
            n_candidates=n_candidates,
            choice_text=choice_text,
            text=model.vocab.decode(tokens[n_known:], goes_on=n_known > 0),
            recovered=model.vocab.decode(found[n_known:], goes_on=n_known > 0),
            heads=tuple(heads),
            tails=tuple(tails),
        )


def _n_candidates(asked: int | None, n_vocab: int) -> int:
    if asked is None:
        return n_vocab if n_vocab <= _ALL_CANDIDATES else _BEST_CANDIDATES
    if asked < 1:
        raise ValueError(f"candidates is {asked}, expected 1 or more")
    return min(asked, n_vocab)


def _tokens(model: Model, text: str, max_tokens: int) -> tuple[npt.NDArray[np.int32], int]:
    """The tokens, and how many of them stand before every text."""
    tokens = model.vocab.encode(text)
    if len(tokens) == len(model.vocab.encode("")):
        raise ValueError("the text has no tokens")
    n_known = len(leading_tokens(model))
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
    """The attacks on one text in one model."""

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
                        self.file, 0, n_layers, n_seq_max=SEQUENCES, n_ctx=n * SEQUENCES, **self.settings
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
        first = max(self.n_known - 1, 0)  # what follows BOS is the first token that nobody knows
        choice = logit_lens(file, rows, 0, **self.settings)[first:]
        following = self.tokens[first + 1 :]
        found, at = [], 0
        for left in sorted(numbers, reverse=True):
            cut = n - left
            if cut > at and file.obstacle(at, cut):
                rows, at = self.embedding.rows(self.tokens), 0  # from the first layer once more
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
