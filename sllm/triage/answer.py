"""The answer to a request: its text as it comes, who has written it, and its statistics."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllm.errors import BusyError, CancelledError
from sllm.generation.text_stream import RunStream

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator
    from contextlib import ExitStack

    from sllm.generation.text_stream import Run, TextStream
    from sllm.triage.triage import Grade

__all__ = ["Answer", "HybridStats", "exclusive"]


@dataclass
class HybridStats:
    """Statistics of an answer. Times are in seconds.

    Attributes:
        grade_seconds: time of grading and of the search for private matters.
        grade_tokens: tokens that the small model computed for grading.
        n_small, n_local: tokens that the small and the local main model wrote.
        cloud_in: tokens sent to the cloud: prompts, and answers to be verified.
        cloud_out: tokens that the cloud wrote.
        n_kept: accepted tokens of a verified answer.
        n_checked: all tokens of a verified answer.
        n_restored: placeholders replaced by their values.
        n_unknown: strings of the cloud that look like placeholders but were never issued; they are left
            unchanged.
        n_in_links: placeholders that were not restored because they are in a URL, a link or an HTML tag: a
            program that shows the answer might send the value there (:class:`sllm.privacy.Restorer`).
        seconds: until the end of the answer.

    """

    grade_seconds: float = 0.0
    grade_tokens: int = 0
    n_small: int = 0
    n_local: int = 0
    cloud_in: int = 0
    cloud_out: int = 0
    n_kept: int = 0
    n_checked: int = 0
    n_restored: int = 0
    n_unknown: int = 0
    n_in_links: int = 0
    seconds: float = 0.0


class Answer(RunStream):
    """An answer in progress: an iterator of :class:`~sllm.Run`, made by :meth:`sllm.Hybrid.ask`.

    The tokens of a run are those of its writer; in its text the placeholders are restored.

    Attributes:
        grade: the grade of the request.
        route: the steps so far, in order: ``"small"``, ``"local"``, ``"cloud"``, and ``"verified"`` or
            ``"corrected"`` for the cloud's verdict on a local answer.
        reasons: the reasons for the route, without a word of the request.
        masked: kind -> number of places masked in what has left the machine.
        complete: whether it has ended regularly, without being closed early or failing.
        stats: its statistics.

    """

    def __init__(
        self,
        grade: Grade,
        stats: HybridStats,
        resources: ExitStack,
        turn: threading.Lock,
        owner: object,
        cancel: Callable[[], None],
    ) -> None:
        super().__init__(iter(()), resources, cancel)
        self._turn = turn
        self._ended = False
        self._writing: TextStream | None = None
        self._owner: object = owner  # would be closed if it was forgotten while its answer is read
        self.complete = False
        self.grade = grade
        self.route: list[str] = []
        self.reasons: list[str] = list(grade.reasons)
        self.masked: dict[str, int] = {}
        self.stats = stats

    def follow(self, runs: Iterator[Run], began: float) -> None:
        """Take the text from ``runs``; ``began``, by :func:`time.perf_counter`, is when the request came."""
        self._runs = self._timed(runs, began)

    @contextmanager
    def written_by(self, stream: TextStream) -> Iterator[TextStream]:
        """Around reading a text that becomes a part of the answer: :meth:`end` ends it.

        Raises:
            CancelledError: the answer has been ended already.

        """
        self._writing = stream
        try:
            with stream:
                self._check_not_ended()
                yield stream
        finally:
            self._writing = None

    def end(self) -> None:
        """End the text, from any thread; :meth:`sllm.Hybrid.cancel` also ends what is being computed."""
        self._ended = True
        if (stream := self._writing) is not None:
            stream.cancel()

    def _check_not_ended(self) -> None:
        if self._ended:
            raise CancelledError("the answer was cancelled")

    def _timed(self, runs: Iterator[Run], began: float) -> Iterator[Run]:
        for run in runs:
            self._check_not_ended()
            self.stats.seconds = time.perf_counter() - began
            yield run
        self.stats.seconds = time.perf_counter() - began
        self.complete = True

    def close(self) -> None:
        """Stop generating. Further calls do nothing."""
        super().close()
        self._owner = self._cancel = None

    def __next__(self) -> Run:
        # Outside of what closes the answer on an exception: a second thread must not end it for the first.
        with exclusive(self._turn):
            return super().__next__()

    def __repr__(self) -> str:
        return f"<sllm.triage.Answer: tier {int(self.grade.tier)}, {' > '.join(self.route) or 'not begun'}>"


@contextmanager
def exclusive(turn: threading.Lock) -> Iterator[None]:
    """Holds the lock of a :class:`~sllm.Hybrid`, which serves one thread at a time.

    Raises:
        BusyError: another thread holds it.

    """
    if not turn.acquire(blocking=False):
        raise BusyError(
            "another thread is inside this Hybrid, which serves one at a time; wait for it, or make another"
        )
    try:
        yield
    finally:
        turn.release()
