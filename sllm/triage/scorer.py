"""A model as the scorer of triage, for labels, a request's own text, and an answer."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sllm.engine._ffi import checked_int
from sllm.engine.arrays import common_prefix
from sllm.engine.handle import Closing

if TYPE_CHECKING:
    import numpy.typing as npt

    from sllm.engine.model import Model
    from sllm.messages import Messages

__all__ = ["ContextScorer"]


class ContextScorer(Closing):
    """Scores labels with a model, in one pass over the part of the prompt that differs from the previous one.

    The prompt is a user's message in the model's chat template, or the plain text if there is none. Control
    tokens in it are not parsed. Any number of threads may use it, one after the other.

    Args:
        model: the model; it is not closed.
        n_ctx: maximum number of tokens of prompt and label; None: what the model was trained for, at most
            2048.
        n_threads: CPU threads; None: as :class:`sllm.Context` chooses.

    Raises:
        UnsupportedModelError: its chat template does not render.
        ValueError, MemoryError: as for :class:`sllm.Context`.

    Attributes:
        model: the model.
        n_computed: tokens computed so far.

    """

    _SEQS = 4  # labels that run side by side

    def __init__(self, model: Model, *, n_ctx: int | None = None, n_threads: int | None = None) -> None:
        self.model = model
        self.n_computed = 0
        self._templated = model.chat_template is not None
        if n_ctx is None:
            n_ctx = min(model.n_ctx_train or 2048, 2048)
        checked_int(n_ctx, "n_ctx", 1)
        self._lock = threading.Lock()
        self._model_id: str | None = None
        self._cached = np.empty(0, dtype=np.int32)
        self._wrap("")
        self._context = model.context(n_ctx=n_ctx * self._SEQS, n_seq_max=self._SEQS, n_threads=n_threads)
        super().__init__()

    @property
    def model_id(self) -> str:
        """The model's :attr:`~sllm.Model.id`."""
        return self.model.id

    @property
    def template_id(self) -> str:
        """SHA-256 (hex) of the chat template; of nothing where there is none."""
        return hashlib.sha256((self.model.chat_template or "").encode()).hexdigest()

    def _wrap(self, text: str) -> npt.NDArray[np.int32]:
        if self._templated:
            return self.model.chat([{"role": "user", "content": text}])
        return self.model.vocab.encode(text, add_special=True, parse_special=False)

    def _label(self, label: str) -> npt.NDArray[np.int32]:
        # After a template's assistant header a word begins; in running text it follows a space.
        return self.model.vocab.encode(label if self._templated else f" {label}", add_special=False)

    def label_logprobs(self, prompt: str, labels: Sequence[str]) -> list[float]:
        """The log-probability of each label, summed over its tokens.

        Raises:
            ValueError: there are no labels, or one is empty.
            ContextFullError, CancelledError, InferenceError, ClosedError.

        """
        tokens = self._wrap(prompt)
        parts = [self._label(label) for label in labels]
        with self._lock:
            scores = self._context.score(tokens, parts, seq_ids=range(self._SEQS))
            self._count(tokens, len(tokens) - 1, sum(map(len, parts)))
        found: list[float] = scores.tolist()
        return found

    def text_logprobs(self, before: str, text: str) -> npt.NDArray[np.float64]:
        """The log-probability of each token of ``text`` after ``before`` in a prompt, float64 (n,).

        A token that begins in ``before`` counts for it. The text is then cached for prompts that begin alike.

        Raises:
            ContextFullError, CancelledError, InferenceError, ClosedError.

        """
        tokens, head = self._wrap(before + text), self._wrap(before)
        tail = self._wrap("x")
        start = max(common_prefix(tokens, head), 1)
        end = max(len(tokens) - common_prefix(tokens[::-1], tail[::-1]), start)
        with self._lock:
            found = self._logprobs(tokens[:end], start)
            self._count(tokens[: end - 1], start - 1, end - start)
        return found

    def answer_logprobs(
        self, messages: Messages, answer: str, *, ended: bool = True
    ) -> npt.NDArray[np.float64]:
        """The log-probability of each token of ``answer`` to a conversation, in one pass, float64 (n,).

        For :func:`~sllm.triage.check_answer.confidence` of an existing answer of any writer.

        Args:
            messages: as :meth:`Model.chat <sllm.Model.chat>` takes them.
            answer: the text.
            ended: whether it ended there by itself: the end of turn counts as its last token.

        Raises:
            UnsupportedModelError: the model has no chat template.
            ValueError: malformed messages.
            ContextFullError, CancelledError, InferenceError, ClosedError.

        """
        vocab = self.model.vocab
        prompt = self.model.chat(messages)
        end = vocab.eot if vocab.eot is not None else vocab.eos
        tail = [end] if ended and end is not None else []
        tokens = np.concatenate(
            [prompt, vocab.encode(answer, add_special=False), np.array(tail, dtype=np.int32)]
        )
        with self._lock:
            found = self._logprobs(tokens, len(prompt))
            self._count(tokens[:-1], len(prompt) - 1, len(tokens) - len(prompt))
        return found

    def _logprobs(self, tokens: npt.NDArray[np.int32], start: int) -> npt.NDArray[np.float64]:
        """Log-probabilities of ``tokens[start:]``; all tokens but the last are then in sequence 0."""
        if start == len(tokens):
            return np.empty(0)
        self._context.decode(tokens[: start - 1], seq_id=0, pos=0)
        logprobs, _ = self._context.token_logprobs(tokens[start - 1 :], seq_id=0, pos=start - 1)
        return logprobs.astype(np.float64)

    def _count(self, tokens: npt.NDArray[np.int32], n: int, more: int) -> None:
        """Count the first ``n`` of ``tokens`` as far as they were not cached, and ``more`` in any case."""
        self.n_computed += max(n - common_prefix(tokens, self._cached), 0) + more
        self._cached = tokens

    def windows(self, text: str, head: int, middle: int, tail: int) -> tuple[list[str], int]:
        """The windows in which a text is judged, and how many tokens the text has.

        A text of at most ``head + middle + tail`` tokens is one window; a longer one has three of these
        lengths, from its beginning, its middle and its end.
        """
        tokens = self.model.vocab.encode(text, add_special=False)
        n = len(tokens)
        if n <= head + middle + tail:
            return [text], n
        centre = (n - middle) // 2
        parts = (tokens[:head], tokens[centre : centre + middle], tokens[n - tail :])
        decode = self.model.vocab.decode
        return [decode(part, special=True, goes_on=i > 0) for i, part in enumerate(parts)], n

    def cancel(self) -> None:
        """End the call that another thread is making, if there is one."""
        self._context.cancel()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._context.closed

    def close(self) -> None:
        """Free the context. Further calls do nothing."""
        self._context.close()

    def __repr__(self) -> str:
        return f"<sllm.triage.ContextScorer of {self.model.path.name!r}>"
