"""vLLM's HTTP API: ``vllm/entrypoints/openai`` and ``vllm/entrypoints/serve`` (0.32).

Several prompts of one request are a *fan*: each shares its beginning with the one before, which the prefix
cache has, so that a fan costs about as many tokens as it has new ones. Log-probabilities of a prompt
(``prompt_logprobs``, ``echo``) skip that cache, and serve to score a text alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sllm.errors import RemoteError
from sllm.http_engine.dialect import Asked, Found, TokenScores
from sllm.http_engine.rows import Row, RowReader, field_of
from sllm.http_engine.transport import HttpStatusError, NotJsonError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sllm.engine.sampling import SamplingParams
    from sllm.http_engine.transport import Call, EngineLink, Reply

__all__ = ["VLLM", "find"]

_ID = "token_id:"


class VLLM:
    """See :class:`~sllm.http_engine.dialect.Dialect`."""

    api = "vllm"
    max_logprobs_option = "vllm serve --max-logprobs N"
    stream_tokens = 1 << 20

    def __init__(self, found: Found, reader: RowReader, ends: Sequence[int]) -> None:
        self._model = found.model
        self._reader = reader
        self._ends = list(ends)  # it knows the ends of its configuration alone

    def _body(self, prompt: Any, n: int, k: int, *, on: bool) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": n,
            "temperature": 0,
            # Or those of the model's own generation_config.json count.
            "top_p": 1,
            "top_k": 0,
            "min_p": 0,
            "repetition_penalty": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "logprobs": k,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
            **({"stop_token_ids": self._ends} if on else {"ignore_eos": True}),
        }

    def rows_request(self, text: Sequence[int], chain: Sequence[int], k: int) -> Asked:
        """See :class:`~sllm.http_engine.dialect.Dialect`: a fan of prompts."""
        prompts = [[*text, *chain[:i]] for i in range(len(chain) + 1)]
        return Asked("/v1/completions", self._body(prompts, 1, k, on=False))

    def rows(self, reply: Any, chain: Sequence[int], k: int) -> list[Row]:
        """See :class:`~sllm.http_engine.dialect.Dialect`."""
        n = len(chain) + 1
        choices = field_of(reply, "choices")
        if not isinstance(choices, list):
            raise self._reader.wrong("answered without choices")
        places = {field_of(choice, "index"): choice for choice in choices}
        if len(choices) != n or set(places) != set(range(n)):
            raise self._reader.wrong(f"answered with {len(choices)} choices, expected those of {n} prompts")
        found = [self._of_choice(places[i], k) for i in range(n)]
        if any(len(rows) != 1 for rows in found):
            raise self._reader.wrong("answered without the log-probabilities of a position")
        return [rows[0] for rows in found]

    def run_request(self, text: Sequence[int], n: int, k: int) -> Asked:
        """See :class:`~sllm.http_engine.dialect.Dialect`."""
        return Asked("/v1/completions", {**self._body(list(text), n, k, on=True), "stream": True})

    def run_reader(self, k: int, /) -> Callable[[Any], tuple[list[Row], bool]]:
        """See :class:`~sllm.http_engine.dialect.Dialect`."""

        def read(event: Any) -> tuple[list[Row], bool]:
            choice = self._choice_of(event)
            return ([] if choice is None else self._of_choice(choice, k)), True

        return read

    def stream_request(self, text: Sequence[int], n: int, k: int) -> Asked:
        """See :class:`~sllm.http_engine.dialect.Dialect`: without log-probabilities, which cost it time."""
        body = self._body(list(text), n, k, on=True)
        body.update(logprobs=None, return_token_ids=True, stream=True)
        return Asked("/v1/completions", body)

    def stream_reader(self, _k: int, /) -> Callable[[Any], tuple[list[Row], bool]]:
        """See :class:`~sllm.http_engine.dialect.Dialect`."""

        def read(event: Any) -> tuple[list[Row], bool]:
            choice = self._choice_of(event)
            if choice is None:
                return [], True
            tokens = field_of(choice, "token_ids")
            if not isinstance(tokens, list):  # before vLLM 0.10.2
                tokens = [self._token(token) for token in field_of(choice, "logprobs", "tokens") or ()]
            if not tokens:
                raise self._reader.wrong("sent no token_ids: it does not know return_token_ids")
            return [self._reader.likeliest(token) for token in tokens], True

        return read

    def sample_request(self, text: Sequence[int], n: int, sampling: SamplingParams, /) -> Asked:
        """See :class:`~sllm.http_engine.dialect.SamplingDialect`."""
        asked = self.stream_request(text, n, 0)
        names = ("temperature", "top_p", "top_k", "min_p", "seed")
        if sampling.noise == "sllm":
            # For the plugin, beside the temperature of 0 that takes what it leaves; the seed as text, since
            # JSON's numbers may be doubles on their way.
            given = {f"sllm_{name}": getattr(sampling, name) for name in names}
            asked.body["vllm_xargs"] = {**given, "sllm_seed": str(sampling.seed)}
        else:
            asked.body.update((name, getattr(sampling, name)) for name in names)
        return asked

    def sample_reader(self) -> Callable[[Any], list[int]]:
        """See :class:`~sllm.http_engine.dialect.SamplingDialect`."""
        read_rows = self.stream_reader(0)

        def read(event: Any) -> list[int]:
            rows, _ = read_rows(event)
            return [row.sampled for row in rows if row.sampled is not None]

        return read

    def _choice_of(self, event: Any) -> Any:
        """The choice of an event; None: it has the figures at the end."""
        if field_of(event, "error") is not None:
            raise self._reader.wrong("broke a stream off with an error")
        choices = field_of(event, "choices")
        if not isinstance(choices, list):
            raise self._reader.wrong("sent an event without choices")
        return choices[0] if choices else None

    def _of_choice(self, choice: Any, k: int) -> list[Row]:
        tokens, tops = (field_of(choice, "logprobs", key) for key in ("tokens", "top_logprobs"))
        if not isinstance(tokens, list) or not isinstance(tops, list) or len(tokens) != len(tops):
            raise self._reader.wrong("answered without log-probabilities")
        return [
            self._reader.row(
                [(self._token(key), value) for key, value in (top if isinstance(top, dict) else {}).items()],
                k,
                self._token(token),
            )
            for token, top in zip(tokens, tops, strict=True)
        ]

    def _token(self, value: Any) -> int:
        digits = value[len(_ID) :] if isinstance(value, str) and value.startswith(_ID) else ""
        if not (digits.isascii() and digits.isdigit() and len(digits) < 19):
            raise self._reader.wrong(
                f"named a token {str(value)[:40]!r}, expected token_id:N: it does not know"
                " return_tokens_as_token_ids, and texts of tokens are ambiguous"
            )
        return int(digits)

    def score_request(self, tokens: Sequence[int], _start: int, /) -> Asked:
        """See :class:`~sllm.http_engine.dialect.ScoringDialect`."""
        body = self._body(list(tokens), 1, 1, on=False)
        return Asked("/v1/completions", {**body, "logprobs": None, "prompt_logprobs": 1})

    def scores(self, reply: Any, tokens: Sequence[int], start: int, /) -> TokenScores:
        """See :class:`~sllm.http_engine.dialect.ScoringDialect`: each token's rank comes with it."""
        rows = field_of(reply, "choices", 0, "prompt_logprobs")
        found = TokenScores([], [])
        for i in range(start, len(tokens)):
            entry = field_of(rows, i, str(tokens[i]))
            logprob, rank = field_of(entry, "logprob"), field_of(entry, "rank")
            if not isinstance(logprob, (int, float)) or not isinstance(rank, int) or rank < 1:
                raise self._reader.wrong("answered without the log-probabilities of a prompt")
            found.logprobs.append(float(logprob))
            found.ranks.append(rank - 1)
        return found

    def tokenize_request(self, text: str) -> Asked:
        """See :class:`~sllm.http_engine.dialect.Dialect`."""
        return Asked("/tokenize", {"model": self._model, "prompt": text, "add_special_tokens": False})

    def n_cached(self, reply: Reply) -> int | None:
        """See :class:`~sllm.http_engine.dialect.Dialect`: with ``--enable-prompt-tokens-details``."""
        found = field_of(reply.value, "usage", "prompt_tokens_details", "cached_tokens")
        return found if isinstance(found, int) else None


def find(link: EngineLink, call: Call) -> Found | None:
    """See :class:`~sllm.http_engine.dialect.Finder`."""
    version = field_of(_ask(link, "/version", call), "version")
    card = field_of(_ask(link, "/v1/models", call), "data", 0)
    if not isinstance(version, str) and field_of(card, "owned_by") != "vllm":
        return None
    name, n_ctx = field_of(card, "id"), field_of(card, "max_model_len")
    if not isinstance(name, str):
        raise RemoteError(f"{link.endpoint} serves no model")
    # With VLLM_SERVER_DEV_MODE=1 it shows its settings.
    settings = _ask(link, "/server_info?config_format=json", call)
    invariant = field_of(settings, "vllm_env", "VLLM_BATCH_INVARIANT")
    return Found(
        version if isinstance(version, str) else "",
        name,
        n_ctx if isinstance(n_ctx, int) and n_ctx > 0 else None,
        None,
        bool(invariant) if isinstance(invariant, (bool, int)) else None,
        selects=_has_plugin(link, name, call),
    )


def _has_plugin(link: EngineLink, model: str, call: Call) -> bool:
    """Whether the plugin of ``examples/vllm-plugin`` selects there: it refuses a seed that is no number,
    which a server without it never looks at.
    """
    body = {
        "model": model,
        "prompt": [0],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": None,
        "vllm_xargs": {"sllm_seed": "?"},
    }
    try:
        link.request("/v1/completions", body, call=call)
    except HttpStatusError as error:
        return error.status == 400 and "sllm_seed" in str(error)
    except NotJsonError:
        pass
    return False


def _ask(link: EngineLink, path: str, call: Call) -> Any:
    """What stands at an address; None where it has no JSON."""
    try:
        return link.request(path, call=call).value
    except (HttpStatusError, NotJsonError):
        return None
