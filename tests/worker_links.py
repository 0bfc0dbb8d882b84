"""Workers behind links, and links that break."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from oracles import EXACT
from remote_worker import through, wait_until

import sllm
from sllm import embedded
from sllm.cli.slow_link import Link
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sllm.remote.connection import Remote

__all__ = ["HERE", "N_CTX", "bytes_to_go_on", "cutting", "split_over", "two_workers"]

HERE = ("127.0.0.1/32",)
N_CTX = 512


def split_over(middle: Any, **options: Any) -> sllm.SplitTarget:
    """The embedded target, or the file ``path``, with its middle layers on a worker or several, exactly."""
    options = {"head": 2, "tail": 1, "codec": "f32", "n_ctx": N_CTX, **EXACT, **options}
    return sllm.SplitTarget(options.pop("path", embedded.TARGET), middle=middle, **options)


@contextmanager
def two_workers(state: Path, *, sessions: int, n_ctx: int) -> Iterator[tuple[list[Remote], list[Link]]]:
    """Two workers: connections to them, and the links to the first, to the second, and between them."""
    with ExitStack() as stack:
        limits = Limits(sessions=sessions, hops=HERE)
        workers = [
            stack.enter_context(
                Worker(embedded.TARGET, layers=True, state=state, limits=limits, n_ctx=n_ctx, **EXACT)
            )
            for _ in range(2)
        ]
        ports = [worker.address.port for worker in (*workers, workers[1])]
        links = [stack.enter_context(Link(("127.0.0.1", port))) for port in ports]
        remotes = [
            stack.enter_context(sllm.connect(through(link, worker.uri)))
            for link, worker in zip(links, workers)  # noqa: B905 - the last link is between them
        ]
        yield remotes, links


@contextmanager
def cutting(cuts: Sequence[tuple[Link, int]]) -> Iterator[None]:
    """Let connection after connection die, each after so many bytes of its link, and leave the last ones
    alone; until the block ends.
    """
    over = threading.Event()

    def cut() -> None:
        for link, n_bytes in cuts:
            seen = link.stats.cuts
            link.cut_after_bytes = n_bytes
            while link.stats.cuts == seen and not over.wait(0.002):
                pass
            link.cut_after_bytes = None

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        yield
    finally:
        over.set()
        cutter.join()


def bytes_to_go_on(worker: Worker, prompt: Sequence[int], sampling: sllm.SamplingParams) -> int:
    """What a new connection carries, both ways together, until a text that was cut off goes on. With less,
    no connection would bring anything.
    """
    with Link((worker.address.host, worker.address.port)) as link:
        with sllm.connect(through(link, worker.uri)) as remote:
            # No more than what is asked for is computed, or it would count, too.
            target = remote.target(run_ahead=False)
            generation = target.open(np.array(prompt, dtype=np.int32), sampling, None)
            generation.hint(len(prompt), [prompt[0]])
            next(generation)
            link.reset_stats()
            link.cut()
            wait_until(lambda: generation.remote.n_reconnects == 1)
            generation.close()
        return link.stats.bytes_up + link.stats.bytes_down
