"""What the measurements of a split have in common: where it is cut, and what stands before every text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from sllm.engine.layer_file import LayeredFile
    from sllm.engine.model import Model

__all__ = ["checked_head", "leading_tokens"]

_HEAD = 6
"""Layers before the link by default."""


def checked_head(file: LayeredFile, head: int | None, tail: int) -> int:
    """``head``, the number of layers before the link; None: 6, or in a small model as many as leave one layer
    to the other side, or the nearest number of which all parts run apart.

    Raises:
        ValueError: ``head`` and the ``tail`` layers after the link leave none to the other side, or do not
            run apart, or the file is not of a whole model.

    """
    if head is None:
        best = max(0, min(_HEAD, file.n_layer - tail - 1))
        near = sorted(range(max(file.n_layer - tail, 1)), key=lambda n: (abs(n - best), n))
        head = next((n for n in near if _runs(file, n, tail)), best)
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
    cut = file.n_layer - tail
    for start, stop in ((0, head), (head, cut), (cut, file.n_layer)):
        if start < stop:
            file.check_kinds(start, stop)
    return head


def _runs(file: LayeredFile, head: int, tail: int) -> bool:
    """Whether the layers before the link run apart, and those behind it."""
    cut = file.n_layer - tail
    return (head == 0 or not file.obstacle(0, head)) and (head >= cut or not file.obstacle(head, cut))


def leading_tokens(model: Model) -> npt.NDArray[np.int32]:
    """What the model puts before every text, int32 (n,): BOS, or nothing."""
    always, one = model.vocab.encode(""), model.vocab.encode("a")
    n = 0
    while n < min(len(always), len(one)) and always[n] == one[n]:
        n += 1
    return always[:n]
