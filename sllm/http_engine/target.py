"""A serving engine as the source of truth: texts over its HTTP API, selected here."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from sllm.engine._ffi import checked_int, checked_seconds
from sllm.engine.arrays import int32_array
from sllm.engine.handle import Closing
from sllm.engine.model import Model
from sllm.engine.sampling import SamplingParams
from sllm.errors import ContextFullError
from sllm.http_engine import scoring
from sllm.http_engine.dialect import SamplingDialect
from sllm.http_engine.generation import Engine, EngineGeneration
from sllm.http_engine.probe import APIS, look
from sllm.http_engine.selection import check_sampling, is_plain_noise
from sllm.http_engine.streamed import StreamedGeneration
from sllm.http_engine.transport import Call, EngineLink
from sllm.targets.base import RemoteStats

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Unpack

    from sllm.engine.vocab import Vocab
    from sllm.http_engine.probe import EngineInfo
    from sllm.messages import ChatOptions
    from sllm.targets.base import Scores

__all__ = ["EngineTarget"]

_MAX_CHAIN = 8
_UNKNOWN_CONTEXT = 1 << 20


class EngineTarget(Closing):
    """A serving engine that somebody runs - vLLM, SGLang or llama-server, nothing of ours on it - as a
    target: what it computes decides the text, at any temperature, with a draft here.

    The engine gives the log-probabilities of the likeliest tokens of each position, and the token is selected
    here with the noise of the seed (:class:`~sllm.SamplingParams`). With ``top_k`` from 1 to as many as it
    gives, everything is decided by them. Elsewhere a token counts where no other one can be the one selected;
    where one can, more log-probabilities are asked for, as far as the engine allows, and then it is an
    UndecidedError. Nothing is approximated.

    The text is that of one token for each request, whatever the draft: a function of the engine's own
    numbers. In bfloat16 these can depend on what an engine computes besides (vLLM does, without
    ``VLLM_BATCH_INVARIANT=1``), so that near-ties may fall either way; the text is a sample of the engine all
    the same.

    Where a vLLM server has sllm's plugin (``examples/vllm-plugin``), its own stream is the text, at any
    temperature: :class:`~sllm.http_engine.streamed.StreamedGeneration`.

    Any number of texts at once, from any threads, as the engine has places.

    Args:
        url: its address, such as ``http://host:8000/v1``. Proxies are taken from the environment.
        vocab: a model with the engine's vocabulary, which stays the caller's to close
            (``Model(path, vocab_only=True)`` will do); or the path of one, or its name on the hub.
        api: ``"vllm"``, ``"sglang"`` or ``"llama-server"``; ``"auto"``: what it turns out to be.
        model: the model's name there; None: the first that it serves.
        api_key: sent as a bearer token.
        logprobs: how many log-probabilities of a position to ask for at first; None: as the parameters need.
        run: so many tokens the engine may go on by itself where there is no draft, at a temperature above 0:
            its likeliest tokens are the draft.
        deadline: seconds for one request, with all that is sent again: a lost connection, and refusals for
            want of time (429, 503) after the pause that they ask for.
        ssl_context: for ``https``; None: the system's certificates.
        experimental: with parameters of the engine's own noise (``SamplingParams(noise="vllm")``), its own
            stream is the text: see :class:`~sllm.http_engine.streamed.StreamedGeneration`, also for what is
            not proved about it. Else such parameters select here, as all others do.

    Raises:
        RemoteError: nothing answers, or none of these engines.
        AuthError: it refuses the key.
        VocabMismatchError: it has another vocabulary.
        ValueError, TypeError: an argument out of range or of another type.
        ImportError: the package for HTTP is not installed (``pip install 'sllm[engines]'``).

    Attributes:
        info: what was found out about the engine (:class:`sllm.http_engine.probe.EngineInfo`).

    Examples:
        >>> with sllm.Model(sllm.embedded.TARGET, vocab_only=True) as vocab:
        ...     try:
        ...         sllm.EngineTarget("http://127.0.0.1:1/v1", vocab)
        ...     except sllm.RemoteError:
        ...         print("nobody there")
        nobody there

    """

    def __init__(
        self,
        url: str,
        vocab: Model | str | os.PathLike[str],
        *,
        api: str = "auto",
        model: str | None = None,
        api_key: str | None = None,
        logprobs: int | None = None,
        run: int = 8,
        deadline: float = 60.0,
        ssl_context: ssl.SSLContext | None = None,
        experimental: bool = False,
    ) -> None:
        if api != "auto" and api not in APIS:
            raise ValueError(f"api is {api!r}, expected 'auto', {', '.join(map(repr, APIS))}")
        self._logprobs = None if logprobs is None else checked_int(logprobs, "logprobs", 1, 1 << 20)
        self._run = checked_int(run, "run", 1, 256)
        self._experimental = experimental
        link = EngineLink(
            url, api_key=api_key, deadline=checked_seconds(deadline, "deadline"), ssl_context=ssl_context
        )
        self._own: Model | None = None
        try:
            if isinstance(vocab, Model):
                self.model = vocab
            else:
                self.model = self._own = Model(vocab, vocab_only=True)
            dialect, info = look(link, Call(RemoteStats()), self.model.vocab, api, model)
            n_vocab = self.model.vocab.n_tokens
            most = n_vocab if info.max_logprobs is None else min(info.max_logprobs, n_vocab)
            if self._logprobs is not None and self._logprobs > most:
                raise ValueError(
                    f"logprobs is {logprobs}, and {link.endpoint} gives {most} of a position"
                    f" ({dialect.max_logprobs_option})"
                )
        except BaseException:
            link.close()
            if self._own is not None:
                self._own.close()
            raise
        self.info: EngineInfo = info
        self._engine = Engine(
            link,
            dialect,
            self.model,
            info.n_ctx or _UNKNOWN_CONTEXT,
            most,
            _MAX_CHAIN if info.n_slots is None else max(min(info.n_slots - 1, _MAX_CHAIN), 1),
            info.round_trip,
        )
        super().__init__()

    @property
    def vocab(self) -> Vocab:
        """The vocabulary, which a draft must share."""
        return self.model.vocab

    @property
    def chat_template(self) -> str | None:
        """The chat template of the vocabulary's file; see :attr:`sllm.Model.chat_template`."""
        return self.model.chat_template

    def chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
    ) -> npt.NDArray[np.int32]:
        """The prompt of a conversation by the template of the vocabulary's file; see
        :meth:`sllm.Model.chat`.
        """
        return self.model.chat(messages, **options)

    def open(
        self, tokens: npt.NDArray[np.int32], sampling: SamplingParams, max_tokens: int | None
    ) -> EngineGeneration | StreamedGeneration:
        """Start a text after ``tokens``, int32 (n,), n >= 1. Nothing is sent yet, unless the engine's stream
        is the text.

        Raises:
            UndecidedError: the parameters select among more tokens than the engine gives log-probabilities
                of; says which, and which option of the server allows more.
            UnsupportedModelError: ``penalty_repeat``, which depends on logits.
            ContextFullError: the prompt does not fit.
            ValueError: no tokens, or one outside the vocabulary.

        """
        self._check_open()
        prompt = int32_array(tokens, "tokens")
        n_vocab = self.vocab.n_tokens
        if len(prompt) == 0 or int(prompt.min()) < 0 or int(prompt.max()) >= n_vocab:
            raise ValueError(f"the prompt needs a token or more, all of the vocabulary of {n_vocab}")
        engine = self._engine
        if len(prompt) >= engine.n_ctx:
            raise ContextFullError(
                f"the prompt has {len(prompt)} tokens, and {engine.link.endpoint} takes {engine.n_ctx - 1}"
            )
        dialect = engine.dialect
        theirs = (
            self._experimental
            and sampling.noise == dialect.api
            and sampling.temperature > 0
            and not sampling.logit_bias
        )
        streams = theirs or (self.info.selects and is_plain_noise(sampling))
        if streams and isinstance(dialect, SamplingDialect):
            invariant = self.info.batch_invariant is True
            return StreamedGeneration(
                engine, dialect, prompt.tolist(), sampling, max_tokens, invariant=invariant
            )
        check_sampling(
            sampling,
            engine.max_logprobs,
            n_vocab,
            engine.link.endpoint,
            engine.dialect.max_logprobs_option,
        )
        return EngineGeneration(engine, prompt.tolist(), sampling, max_tokens, self._logprobs, self._run)

    def score(self, tokens: npt.NDArray[np.int32], start: int) -> Scores:
        """How likely the engine finds ``tokens[start:]``; see :class:`~sllm.targets.base.Scorer`.

        vLLM and SGLang compute it in one pass over the text, without what they have cached of it. SGLang
        tells the ranks 0 to 3; the others come as 2**31 - 1. llama-server scores no text that is there
        already: each token costs it a pass, as if it wrote the text.

        Raises:
            ContextFullError: the text does not fit.
            RemoteError: the engine is lost, or answers with something else.
            ValueError: a token outside the vocabulary, or no ``1 <= start < n``.

        """
        self._check_open()
        return scoring.score(self._engine, tokens, start)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._engine.link.closed

    def close(self) -> None:
        """Close the connections, and the vocabulary that was loaded for it. More calls do nothing."""
        self._engine.link.close()
        if self._own is not None:
            self._own.close()

    def __repr__(self) -> str:
        where = f"{self.info.api} at {self._engine.link.endpoint}"
        return f"<sllm.EngineTarget of {where}{', closed' if self.closed else ''}>"
