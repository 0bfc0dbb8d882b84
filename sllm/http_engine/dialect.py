"""What an engine is asked, and how its answers are read: one protocol, a module for each engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sllm.engine.sampling import SamplingParams
    from sllm.http_engine.rows import Row
    from sllm.http_engine.transport import Call, EngineLink, Reply

__all__ = ["Asked", "Dialect", "Finder", "Found", "SamplingDialect", "ScoringDialect", "TokenScores"]


class Asked(NamedTuple):
    """A request: where it goes, and its body."""

    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What an engine says of itself.

    Attributes:
        version: as it writes it; "" where it does not say.
        model: the name by which the model is asked for.
        n_ctx: positions of a text, prompt and answer together; None: it does not say.
        n_slots: prompts that it computes at once where that is a fixed number; None: many.
        batch_invariant: whether it says that its numbers do not depend on what else it computes; None: it
            says nothing.
        prefix_cache: likewise, whether what a prompt shares with an earlier one is not computed again.
        selects: whether it selects as sllm does where a request says so (``examples/vllm-plugin``).

    """

    version: str
    model: str
    n_ctx: int | None
    n_slots: int | None = None
    batch_invariant: bool | None = None
    prefix_cache: bool | None = None
    selects: bool = False


class TokenScores(NamedTuple):
    """Log-probabilities of given tokens, and their ranks; a rank is None where it is not known."""

    logprobs: list[float]
    ranks: list[int | None]


class Dialect(Protocol):
    """One engine's requests and answers. Rows are those of the unfiltered softmax, at temperature 0."""

    api: str
    """The engine's name, as in ``EngineTarget(api=...)``."""

    max_logprobs_option: str
    """What is said about the option of the server that allows more log-probabilities for each position."""

    stream_tokens: int
    """So many tokens may be asked for in one stream."""

    def rows_request(self, text: Sequence[int], chain: Sequence[int], k: int) -> Asked:
        """Ask for the rows after ``text``, after ``text + chain[:1]``, ..., after ``text + chain``."""

    def rows(self, reply: Any, chain: Sequence[int], k: int) -> list[Row]:
        """The ``len(chain) + 1`` rows of the answer to :meth:`rows_request`, in order.

        Raises:
            RemoteError: it is not such an answer.

        """

    def run_request(self, text: Sequence[int], n: int, k: int) -> Asked:
        """Let the engine go on with its likeliest tokens, for ``n`` at most, and send their rows one by
        one.
        """

    def run_reader(self, k: int, /) -> Callable[[Any], tuple[list[Row], bool]]:
        """Takes the events of such a stream in order: the rows that came with one, with what was sampled, and
        whether the next rows are sure to be the next ones of the text.
        """

    def stream_request(self, text: Sequence[int], n: int, k: int, /) -> Asked:
        """As :meth:`run_request`, of which the tokens alone are wanted; with ``k`` log-probabilities each
        where the engine does not tell tokens without them.
        """

    def stream_reader(self, k: int, /) -> Callable[[Any], tuple[list[Row], bool]]:
        """As :meth:`run_reader`; rows may hold no more than the token that was sampled."""

    def tokenize_request(self, text: str) -> Asked:
        """Ask for the tokens of a text, without any that are added."""

    def n_cached(self, reply: Reply) -> int | None:
        """How many tokens of the prompt an answer to :meth:`rows_request` says were not computed again; None:
        it does not say.
        """


@runtime_checkable
class ScoringDialect(Dialect, Protocol):
    """A dialect of an engine that scores a text which is there already, in one pass."""

    def score_request(self, tokens: Sequence[int], start: int, /) -> Asked:
        """Ask for the log-probabilities of ``tokens[start:]``."""

    def scores(self, reply: Any, tokens: Sequence[int], start: int, /) -> TokenScores:
        """The answer to :meth:`score_request`."""


@runtime_checkable
class SamplingDialect(Dialect, Protocol):
    """A dialect of an engine that selects with seeded noise, as ``SamplingParams(noise=api)`` does, or with
    sllm's plugin as any do.
    """

    def sample_request(self, text: Sequence[int], n: int, sampling: SamplingParams, /) -> Asked:
        """Let the engine go on as ``sampling`` selects, for ``n`` tokens at most, token by token."""

    def sample_reader(self) -> Callable[[Any], list[int]]:
        """Takes the events of such a stream in order: the tokens that came with one."""


class Finder(Protocol):
    """Looks whether an engine of one kind stands at an address."""

    def __call__(self, link: EngineLink, call: Call) -> Found | None:
        """What it says of itself; None: it is another engine."""
