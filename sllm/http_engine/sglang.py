"""SGLang's own API: ``/generate`` of ``python/sglang/srt/entrypoints/http_server.py``.

A draft is checked in one prompt, the text with the draft after it: ``logprob_start_len`` says from where on
the log-probabilities of the prompt are wanted, and what comes before is taken from the radix cache. The first
entry of such a list is empty, since it would stand for the token at that place itself.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sllm.http_engine.dialect import Asked, Found, TokenScores
from sllm.http_engine.rows import Row, RowReader, field_of
from sllm.http_engine.transport import HttpStatusError, NotJsonError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sllm.engine.sampling import SamplingParams
    from sllm.http_engine.transport import Call, EngineLink, Reply

__all__ = ["SGLang", "find"]

_SCORE_TOP = 4


class SGLang:
    """See :class:`~sllm.http_engine.dialect.Dialect`."""

    api = "sglang"
    max_logprobs_option = "SGLang has no limit of its own; see what stands before it"
    stream_tokens = 64  # every event repeats all that came before

    def __init__(self, reader: RowReader, ends: Sequence[int]) -> None:
        self._reader = reader
        self._ends = list(ends)

    def _body(
        self, ids: list[int], n: int, k: int, *, on: bool = False, start: int = -1, stream: bool = False
    ) -> Asked:
        return Asked(
            "/generate",
            {
                "input_ids": ids,
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": n,
                    "skip_special_tokens": False,
                    **({"stop_token_ids": self._ends} if on else {"ignore_eos": True}),
                },
                "return_logprob": True,
                "logprob_start_len": start,
                "top_logprobs_num": k,
                "return_text_in_logprobs": False,
                "stream": stream,
            },
        )

    def rows_request(self, text: Sequence[int], chain: Sequence[int], k: int) -> Asked:
        """See :class:`~sllm.http_engine.dialect.Dialect`: one prompt."""
        return self._body([*text, *chain], 1, k, start=len(text) - 1 if chain else -1)

    def rows(self, reply: Any, chain: Sequence[int], k: int) -> list[Row]:
        """See :class:`~sllm.http_engine.dialect.Dialect`."""
        rows = [self._row(top, k) for top in self._prompt_part(reply, "input_top_logprobs", len(chain))]
        entries = self._prompt_part(reply, "input_token_logprobs", len(chain))
        if [field_of(entry, 1) for entry in entries] != list(chain):
            raise self._reader.wrong("answered with the log-probabilities of other tokens than the draft's")
        return [*rows, self._row(field_of(reply, "meta_info", "output_top_logprobs", 0), k)]

    def _prompt_part(self, reply: Any, name: str, n: int) -> list[Any]:
        """The last ``n`` entries of a list about the prompt."""
        if n == 0:
            return []
        entries = field_of(reply, "meta_info", name)
        if not isinstance(entries, list) or len(entries) < n:
            raise self._reader.wrong("answered without the log-probabilities of a prompt")
        return entries[-n:]

    def run_request(self, text: Sequence[int], n: int, k: int) -> Asked:
        """See :class:`~sllm.http_engine.dialect.Dialect`."""
        return self._body(list(text), n, k, on=True, stream=True)

    stream_request = run_request  # the ids of tokens come with their log-probabilities

    def run_reader(self, k: int, /) -> Callable[[Any], tuple[list[Row], bool]]:
        """See :class:`~sllm.http_engine.dialect.Dialect`."""
        n_seen = 0

        def read(event: Any) -> tuple[list[Row], bool]:
            nonlocal n_seen
            if field_of(event, "error") is not None:
                raise self._reader.wrong("broke a stream off with an error")
            n_made = field_of(event, "meta_info", "completion_tokens")
            tops = field_of(event, "meta_info", "output_top_logprobs")
            # All that was generated, or with --incremental-streaming-output what is new.
            repeated = isinstance(tops, list) and len(tops) == n_made
            rows = self._generated(event, k, n_seen if repeated else 0)
            n_seen += len(rows)
            return rows, n_seen == n_made

        return read

    stream_reader = run_reader

    def sample_request(self, text: Sequence[int], n: int, sampling: SamplingParams, /) -> Asked:
        """See :class:`~sllm.http_engine.dialect.SamplingDialect`. A filter that keeps everything says that a
        token's place counts, whatever requests are computed besides (``csrc/engine_noise.cpp``).
        """
        selects = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or self._reader.n_vocab,
            "min_p": 0.0,
            "sampling_seed": sampling.seed,
        }
        asked = self._body(list(text), n, 0, on=True, stream=True)
        asked.body["sampling_params"].update(selects)
        return asked

    def sample_reader(self) -> Callable[[Any], list[int]]:
        """See :class:`~sllm.http_engine.dialect.SamplingDialect`."""
        n_seen = 0

        def read(event: Any) -> list[int]:
            nonlocal n_seen
            if field_of(event, "error") is not None:
                raise self._reader.wrong("broke a stream off with an error")
            n_made = field_of(event, "meta_info", "completion_tokens")
            ids = field_of(event, "output_ids")
            if not isinstance(ids, list) or not isinstance(n_made, int):
                raise self._reader.wrong("answered without the ids of its tokens")
            # All that was generated, or with --incremental-streaming-output what is new.
            tokens = [self._reader.token(token) for token in (ids[n_seen:] if len(ids) == n_made else ids)]
            n_seen += len(tokens)
            if n_seen != n_made:
                raise self._reader.wrong(f"sent {n_seen} tokens of {n_made}")
            return tokens

        return read

    def _generated(self, reply: Any, k: int, begin: int) -> list[Row]:
        tops = field_of(reply, "meta_info", "output_top_logprobs")
        tokens = field_of(reply, "meta_info", "output_token_logprobs")
        if not isinstance(tops, list) or not isinstance(tokens, list) or len(tops) != len(tokens):
            raise self._reader.wrong("answered without log-probabilities")
        return [
            self._row(top, k, field_of(token, 1))
            for top, token in zip(tops[begin:], tokens[begin:], strict=True)
        ]

    def _row(self, entries: Any, k: int, sampled: Any = None) -> Row:
        if not isinstance(entries, list):
            raise self._reader.wrong("answered without the log-probabilities of a position")
        return self._reader.row(((field_of(e, 1), field_of(e, 0)) for e in entries), k, sampled)

    def score_request(self, tokens: Sequence[int], start: int, /) -> Asked:
        """See :class:`~sllm.http_engine.dialect.ScoringDialect`."""
        return self._body(list(tokens), 1, _SCORE_TOP, start=start - 1)

    def scores(self, reply: Any, tokens: Sequence[int], start: int, /) -> TokenScores:
        """See :class:`~sllm.http_engine.dialect.ScoringDialect`: ranks as far as the likeliest
        tokens tell them.
        """
        wanted = list(tokens[start:])
        entries = self._prompt_part(reply, "input_token_logprobs", len(wanted))
        tops = self._prompt_part(reply, "input_top_logprobs", len(wanted))
        found = TokenScores([], [])
        for token, entry, top in zip(wanted, entries, tops, strict=True):
            logprob = field_of(entry, 0)
            if field_of(entry, 1) != token or not isinstance(logprob, (int, float)):
                raise self._reader.wrong("answered with the log-probabilities of other tokens")
            likeliest = self._row(top, _SCORE_TOP).tokens.tolist()
            found.logprobs.append(float(logprob))
            found.ranks.append(likeliest.index(token) if token in likeliest else None)
        return found

    def tokenize_request(self, text: str) -> Asked:
        """See :class:`~sllm.http_engine.dialect.Dialect`."""
        return Asked("/tokenize", {"prompt": text, "add_special_tokens": False})

    def n_cached(self, reply: Reply) -> int | None:
        """See :class:`~sllm.http_engine.dialect.Dialect`."""
        found = field_of(reply.value, "meta_info", "cached_tokens")
        return found if isinstance(found, int) else None


def find(link: EngineLink, call: Call) -> Found | None:
    """See :class:`~sllm.http_engine.dialect.Finder`."""
    info = _first(link, call, "/model_info", "/get_model_info")
    model = field_of(info, "model_path")
    if not isinstance(model, str):
        return None
    server = _first(link, call, "/server_info", "/get_server_info")
    version, n_ctx = field_of(server, "version"), field_of(server, "context_length")
    if not isinstance(n_ctx, int):
        n_ctx = field_of(server, "max_req_input_len")
    deterministic = field_of(server, "enable_deterministic_inference")
    no_cache = field_of(server, "disable_radix_cache")
    return Found(
        version if isinstance(version, str) else "",
        model,
        n_ctx if isinstance(n_ctx, int) and n_ctx > 0 else None,
        None,
        deterministic if isinstance(deterministic, bool) else None,
        not no_cache if isinstance(no_cache, bool) else None,
    )


def _first(link: EngineLink, call: Call, *paths: str) -> object:
    """What the first of some addresses says that is there: newer versions have other names for them."""
    for path in paths:
        with suppress(HttpStatusError, NotJsonError):
            return link.request(path, call=call).value
    return None
