"""A serving engine as the target: texts over its HTTP API, with the tokens selected here."""

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
    """A serving engine (vLLM, SGLang or llama-server, without anything of ours installed there) as a target:
    its probabilities decide the text, at any temperature, with a local draft.

    The engine returns the log-probabilities of the most likely tokens of each position, and the token is
    selected here with the noise of the seed (:class:`~sllm.SamplingParams`). With ``top_k`` from 1 to the
    number that it returns, these decide every selection. Otherwise a token is accepted if no other one can be
    the selected one; if one can, more log-probabilities are requested, up to the engine's limit, and beyond
    that an UndecidedError is raised. Nothing is approximated.

    Whatever the draft, the text is the one that single-token requests would give: a function of the engine's
    own numbers. In bfloat16 these can depend on what else the engine computes (in vLLM without
    ``VLLM_BATCH_INVARIANT=1``), so near-ties may fall either way; the text is still a sample of the engine.

    If a vLLM server has sllm's plugin (``examples/vllm-plugin``), its own stream is the text, at any
    temperature: :class:`~sllm.http_engine.streamed.StreamedGeneration`.

    Any number of texts at once, from any threads, up to the engine's capacity.

    Args:
        url: its address, such as ``http://host:8000/v1``. Proxies are taken from the environment.
        vocab: a model with the engine's vocabulary, which the caller closes (``Model(path, vocab_only=True)``
            is enough); or the path of one, or its name on the hub.
        api: ``"vllm"``, ``"sglang"`` or ``"llama-server"``; ``"auto"``: detected.
        model: the model's name on the engine; None: the first that it serves.
        api_key: sent as a bearer token.
        logprobs: number of log-probabilities per position to request at first; None: as many as the
            parameters need.
        run: number of tokens that the engine may decode ahead if there is no draft, at a temperature above 0:
            its most likely tokens are the draft.
        deadline: seconds for one request including retries: after a lost connection, and after 429 or 503
            with the requested pause.
        ssl_context: for ``https``; None: the system's certificates.
        experimental: with the engine's own noise (``SamplingParams(noise="vllm")``), its own stream is the
            text: see :class:`~sllm.http_engine.streamed.StreamedGeneration`, also for what is not proved
            about it. If false, tokens are selected here with such parameters as with all others.

    Raises:
        RemoteError: nothing answers, or none of the supported engines.
        AuthError: the engine refuses the key.
        VocabMismatchError: the engine has another vocabulary.
        ValueError, TypeError: an argument out of range or of another type.
        ImportError: the package for HTTP is not installed (``pip install 'sllm[engines]'``).

    Attributes:
        info: the detected properties of the engine (:class:`sllm.http_engine.probe.EngineInfo`).

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
        """The prompt of a conversation, made with the template of the vocabulary's file; see
        :meth:`sllm.Model.chat`.
        """
        return self.model.chat(messages, **options)

    def open(
        self, tokens: npt.NDArray[np.int32], sampling: SamplingParams, max_tokens: int | None
    ) -> EngineGeneration | StreamedGeneration:
        """Start a text after ``tokens``, int32 (n,), n >= 1. Nothing is sent before the first token is read,
        unless the engine's stream is the text.

        Raises:
            UndecidedError: the parameters select among more tokens than the engine returns log-probabilities
                for; the message names the parameter and the server option that allows more.
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

        vLLM and SGLang compute it in one pass over the text, without using their cache. SGLang reports only
        ranks 0 to 3; the others are given as 2**31 - 1. llama-server cannot score an existing text in one
        pass: each token takes a pass, as if it wrote the text.

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
        """Close the connections, and the vocabulary if it was loaded here. Further calls do nothing."""
        self._engine.link.close()
        if self._own is not None:
            self._own.close()

    def __repr__(self) -> str:
        where = f"{self.info.api} at {self._engine.link.endpoint}"
        return f"<sllm.EngineTarget of {where}{', closed' if self.closed else ''}>"
