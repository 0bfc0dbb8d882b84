"""llama.cpp's ``llama-server``: ``/completion`` of ``tools/server``.

A draft is checked by a fan of prompts, one for each of the server's slots. Two things are peculiar. Rows of
tokens after which the text ends inside a UTF-8 character are withheld; so a fan lets the server "sample" a
plain letter, by a bias that the log-probabilities do not see, and where it runs by itself, only the rows up
to the first one that is missing count. And log-probabilities are keyed by ids only in ``/completion``, not in
the OpenAI-compatible address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sllm.errors import RemoteError, UnsupportedModelError
from sllm.http_engine.dialect import Asked, Found
from sllm.http_engine.rows import Row, RowReader, field_of
from sllm.http_engine.transport import HttpStatusError, NotJsonError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sllm.engine.vocab import Vocab
    from sllm.http_engine.transport import Call, EngineLink, Reply

__all__ = ["LlamaServer", "find", "letter_token"]


class LlamaServer:
    """See :class:`~sllm.http_engine.dialect.Dialect`.

    Args:
        reader: makes rows.
        letter: a token that is an ASCII letter (:func:`letter_token`).

    """

    api = "llama-server"
    max_logprobs_option = "llama-server has no limit of its own; see what stands before it"
    stream_tokens = 1 << 20

    def __init__(self, reader: RowReader, letter: int) -> None:
        self._reader = reader
        self._letter = letter

    def _body(self, prompt: list[Any], n: int, k: int) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "n_predict": n,
            "n_probs": k,
            "temperature": 0,
            "repeat_penalty": 1.0,
            "cache_prompt": True,
            "return_tokens": True,
            "response_fields": ["index", "tokens", "completion_probabilities", "timings/cache_n"],
        }

    def rows_request(self, text: Sequence[int], chain: Sequence[int], k: int) -> Asked:
        """See :class:`~sllm.http_engine.dialect.Dialect`: a fan of prompts."""
        prompts = [[*text, *chain[:i]] for i in range(len(chain) + 1)]
        return Asked("/completion", {**self._body(prompts, 1, k), "logit_bias": [[self._letter, 1e9]]})

    def rows(self, reply: Any, chain: Sequence[int], k: int) -> list[Row]:
        """See :class:`~sllm.http_engine.dialect.Dialect`."""
        n = len(chain) + 1
        results = reply if isinstance(reply, list) else [reply]
        places = {field_of(result, "index"): result for result in results}
        if len(results) != n or set(places) != set(range(n)):
            raise self._reader.wrong(f"answered with {len(results)} results, expected those of {n} prompts")
        found = [self._results(places[i], k) for i in range(n)]
        if any(len(rows) != 1 for rows in found):
            raise self._reader.wrong("answered without the log-probabilities of a position")
        return [rows[0] for rows in found]

    def _results(self, result: Any, k: int) -> list[Row]:
        tokens, entries = field_of(result, "tokens"), field_of(result, "completion_probabilities")
        if not isinstance(tokens, list):
            raise self._reader.wrong("answered without tokens")
        rows = []
        for token, entry in zip(tokens, entries if isinstance(entries, list) else [], strict=False):
            if field_of(entry, "id") != token:
                break
            tops = field_of(entry, "top_logprobs")
            pairs = ((field_of(top, "id"), field_of(top, "logprob")) for top in tops or ())
            rows.append(self._reader.row(pairs, k, token))
        return rows

    def run_request(self, text: Sequence[int], n: int, k: int) -> Asked:
        """See :class:`~sllm.http_engine.dialect.Dialect`."""
        body = {**self._body(list(text), n, k), "stream": True}
        del body["response_fields"]
        return Asked("/completion", body)

    def run_reader(self, k: int, /) -> Callable[[Any], tuple[list[Row], bool]]:
        """See :class:`~sllm.http_engine.dialect.Dialect`."""
        return self._reading(lambda event: self._results(event, k))

    def stream_request(self, text: Sequence[int], n: int, _k: int, /) -> Asked:
        """See :class:`~sllm.http_engine.dialect.Dialect`: without log-probabilities, for which it sorts its
        vocabulary.
        """
        return self.run_request(text, n, 0)

    def stream_reader(self, _k: int, /) -> Callable[[Any], tuple[list[Row], bool]]:
        """See :class:`~sllm.http_engine.dialect.Dialect`."""
        return self._reading(lambda event: [self._reader.likeliest(t) for t in field_of(event, "tokens")])

    def _reading(self, rows_of: Callable[[Any], list[Row]]) -> Callable[[Any], tuple[list[Row], bool]]:
        """A reader that ends where a token is left out, as those within a character are: that shows in how
        many tokens the server says it has made.
        """
        n_seen = 0

        def read(event: Any) -> tuple[list[Row], bool]:
            nonlocal n_seen
            if field_of(event, "error") is not None:
                raise self._reader.wrong("broke a stream off with an error")
            if field_of(event, "stop") is True and not field_of(event, "tokens"):
                return [], False
            if not isinstance(field_of(event, "tokens"), list):
                raise self._reader.wrong("answered without tokens")
            rows = rows_of(event)
            if field_of(event, "tokens_predicted") != n_seen + len(rows):
                return [], False
            n_seen += len(rows)
            return rows, True

        return read

    def tokenize_request(self, text: str) -> Asked:
        """See :class:`~sllm.http_engine.dialect.Dialect`."""
        return Asked("/tokenize", {"content": text, "add_special": False, "parse_special": False})

    def n_cached(self, reply: Reply) -> int | None:
        """See :class:`~sllm.http_engine.dialect.Dialect`."""
        result = reply.value[0] if isinstance(reply.value, list) and reply.value else reply.value
        found = field_of(result, "timings/cache_n")
        return found if isinstance(found, int) else None


def letter_token(vocab: Vocab) -> int:
    """A token that is one ASCII letter.

    Raises:
        UnsupportedModelError: the vocabulary has none.

    """
    for letter in "aetos":
        for token in vocab.encode(letter, add_special=False).tolist():
            if vocab.piece(token) == letter.encode():
                return int(token)
    for token in range(vocab.n_tokens):
        piece = vocab.piece(token)
        if len(piece) == 1 and piece.isalpha():
            return token
    raise UnsupportedModelError("llama-server withholds rows where the vocabulary has no letter of its own")


def find(link: EngineLink, call: Call) -> Found | None:
    """See :class:`~sllm.http_engine.dialect.Finder`."""
    try:
        props = link.request("/props", call=call).value
    except (HttpStatusError, NotJsonError):
        return None
    n_slots, n_ctx = field_of(props, "total_slots"), field_of(props, "default_generation_settings", "n_ctx")
    if not isinstance(n_slots, int):
        return None
    version, model = field_of(props, "build_info"), field_of(props, "model_path")
    if not isinstance(n_ctx, int) or n_ctx < 1 or n_slots < 1:
        raise RemoteError(f"{link.endpoint} says that it has {n_slots} slots of {n_ctx} positions")
    return Found(
        version if isinstance(version, str) else "", model if isinstance(model, str) else "", n_ctx, n_slots
    )
