"""Which layers each worker of a split serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm.errors import RemoteError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sllm.engine.layer_file import LayeredFile
    from sllm.remote.info import LayersInfo
    from sllm.remote.link import WorkerLink

__all__ = ["worker_ranges"]


def worker_ranges(
    links: Sequence[WorkerLink], file: LayeredFile, start: int, stop: int, *, output: bool
) -> list[tuple[int, int]]:
    """The layers (first, end) of each worker, in order, which together are [start, stop): those that it was
    started for, and for workers with all layers even shares of what lies between.

    Args:
        links: to the workers, in the order of their layers.
        file: of the model.
        start, stop: the layers between head and tail.
        output: the last worker has to have the model's output.

    Raises:
        ValueError: no worker, or layers that do not fit in between, or do not run apart.
        RemoteError: a worker of another model, or one whose offer is impossible.

    """
    if not links:
        raise ValueError("middle names no worker")
    offers = [_checked_offer(link, file) for link in links]
    found: list[tuple[int, int]] = []
    at = start
    for i, offer in enumerate(offers):
        if offer.fixed:
            own = (offer.start, offer.stop)
        else:
            n_open, end = next(
                ((j, later.start) for j, later in enumerate(offers[i:]) if later.fixed),
                (len(offers) - i, stop),
            )
            own = (at, _share(file, at, end, n_open))
        found.append(own)
        at = own[1]
    chained = [start, *(b for _, b in found)]
    if [a for a, _ in found] != chained[:-1] or at != stop or any(a >= b for a, b in found):
        given = ", ".join(f"[{a}, {b})" for a, b in found)
        raise ValueError(f"the workers have layers {given}, and [{start}, {stop}) lie between head and tail")
    for link, offer, (a, b) in zip(links, offers, found, strict=True):
        if not offer.start <= a < b <= offer.stop:
            raise ValueError(
                f"{link.endpoint} has layers [{offer.start}, {offer.stop}), and [{a}, {b}) are needed"
            )
    for a, b in found:
        file.check_kinds(a, b)
    if output and not offers[-1].output:
        raise ValueError(f"{links[-1].endpoint} has no output, and tail=None leaves that to it")
    return found


def _share(file: LayeredFile, at: int, end: int, n_open: int) -> int:
    """Where the layers of the first of ``n_open`` workers end, which share [at, end): evenly, or as near to
    that as the layers run apart.
    """
    if n_open == 1:
        return end
    even = at + max(end - at, 0) // n_open
    near = sorted(range(at + 1, end), key=lambda stop: (abs(stop - even), stop))
    apart = (stop for stop in near if not (file.obstacle(at, stop) or file.obstacle(stop, end)))
    return next(apart, even)


def _checked_offer(link: WorkerLink, file: LayeredFile) -> LayersInfo:
    """What a worker offers, of the file's model."""
    link.live()
    info, name = link.info.layers, link.endpoint
    if info is None:
        raise ValueError(f"{name} serves texts, not layers: start it with `sllm worker MODEL --layers`")
    if not 0 <= info.start <= info.stop <= info.n_layer or info.max_rows < 1 or link.info.n_ctx < 1:
        raise RemoteError(
            f"{name} offers layers [{info.start}, {info.stop}) of {info.n_layer}, {info.max_rows} rows at"
            f" once and {link.info.n_ctx} positions, which is impossible"
        )
    if (info.n_layer, info.n_embd) != (file.n_layer, file.n_embd):
        raise RemoteError(
            f"{name} has a model of {info.n_layer} layers of width {info.n_embd},"
            f" and {file.paths[0].name} has {file.n_layer} of {file.n_embd}"
        )
    return info
