"""The texts that everything is compared with: plain requests to the engine, by none of sllm's HTTP code."""

from __future__ import annotations

import http.client
import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.engine._ffi import check, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import sllm
    from benchmarks.engines.servers import Server

K = 20
"""Log-probabilities of a position; vLLM gives no more unless it is told to."""


def neutral() -> dict[str, Any]:
    """Fields that keep vLLM from a model's own settings."""
    return {
        "model": "model",
        "temperature": 0,
        "top_p": 1,
        "top_k": 0,
        "min_p": 0,
        "repetition_penalty": 1,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
    }


def ends(model: sllm.Model) -> list[int]:
    """The tokens that end a text in this vocabulary; ``config.json`` names one of them."""
    return [v for v in range(model.vocab.n_tokens) if model.vocab.is_eog(v)]


def row(server: Server, model: sllm.Model, text: list[int]) -> dict[int, float]:
    """The log-probabilities of the likeliest tokens after a text, in a request of its own."""
    if server.name == "vllm":
        body = {**neutral(), "prompt": text, "max_tokens": 1, "logprobs": K, "ignore_eos": True}
        choice = server.request("/v1/completions", body)["choices"][0]
        tops = choice["logprobs"]["top_logprobs"][0]
        return {int(token.removeprefix("token_id:")): value for token, value in tops.items()}
    letter = int(model.vocab.encode("a", add_special=False)[0])
    body = {
        "prompt": text,
        "n_predict": 1,
        "n_probs": K,
        "temperature": 0,
        "cache_prompt": True,
        # Rows whose token ends inside a character, or ends the text, are withheld: it may "sample" a letter.
        "logit_bias": [[letter, 1e9]],
    }
    tops = server.request("/completion", body)["completion_probabilities"][0]["top_logprobs"]
    return {top["id"]: top["logprob"] for top in tops}


def one_by_one(
    server: Server, model: sllm.Model, prompt: list[int], sampling: sllm.SamplingParams, n: int
) -> list[int]:
    """A text of at most n tokens with a request for each, selected by the core."""
    text, token = list(prompt), ffi.new("int32_t *")
    compiled = model.compiled(sampling)
    while len(text) < len(prompt) + n:
        logits = np.full(model.vocab.n_tokens, -np.inf, dtype=np.float32)
        for v, value in row(server, model, text).items():
            logits[v] = value
        past = np.array(text, dtype=np.int32)
        check(
            lib.sllm_select(
                compiled,
                ffi.from_buffer("float[]", logits),
                len(logits),
                len(text),
                ffi.from_buffer("int32_t[]", past),
                len(prompt),
                token,
                ffi.NULL,
            )
        )
        text.append(int(token[0]))
        if model.vocab.is_eog(text[-1]):
            break
    return text[len(prompt) :]


def whole(server: Server, model: sllm.Model, prompt: list[int], n: int) -> list[int]:
    """The engine's own greedy text of at most n tokens, in one answer."""
    if server.name == "vllm":
        body = {**neutral(), "prompt": prompt, "max_tokens": n, "stop_token_ids": ends(model)}
        return list(server.request("/v1/completions", body)["choices"][0]["token_ids"])
    body = {"prompt": prompt, "n_predict": n, "temperature": 0, "return_tokens": True}
    return list(server.request("/completion", body)["tokens"])


def stream(
    server: Server,
    model: sllm.Model,
    prompt: list[int],
    n: int,
    *,
    port: int | None = None,
    fields: Mapping[str, Any] | None = None,
) -> tuple[list[int], float]:
    """What the engine itself streams for a prompt, greedily but for what ``fields`` say, and the seconds.

    llama-server's events leave out tokens whose text ends inside a character.
    """
    began = time.perf_counter()
    if server.name == "vllm":
        path = "/v1/completions"
        body = {**neutral(), "prompt": prompt, "max_tokens": n, "stop_token_ids": ends(model), "stream": True}
    else:
        path = "/completion"
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "return_tokens": True, "stream": True}
    tokens: list[int] = []
    for event in events(port or server.port, path, {**body, **(fields or {})}):
        if server.name == "vllm":
            for choice in event["choices"]:
                tokens += choice["token_ids"] or []
        else:
            tokens += event["tokens"]
    return tokens, time.perf_counter() - began


def events(port: int, path: str, body: Any) -> Iterator[Any]:
    """The server-sent events of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{path}: {response.status} {response.read()[:500]!r}")
        for line in response:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[len(b"data: ") :])
    finally:
        connection.close()
