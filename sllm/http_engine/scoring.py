"""How likely an engine finds the tokens of a text that is there already."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np

from sllm.engine._ffi import checked_int
from sllm.engine.arrays import int32_array
from sllm.errors import ContextFullError, RemoteError
from sllm.http_engine.dialect import ScoringDialect, TokenScores
from sllm.http_engine.transport import Call
from sllm.targets.base import RemoteStats, Scores

if TYPE_CHECKING:
    import numpy.typing as npt

    from sllm.http_engine.generation import Engine

__all__ = ["score"]

UNKNOWN_RANK = 2**31 - 1
"""The rank of a token that is not among those whose ranks the engine tells."""

_FAN_K = 64


def score(engine: Engine, tokens: npt.NDArray[np.int32], start: int) -> Scores:
    """Log-probabilities and ranks of ``tokens[start:]``; see :meth:`sllm.EngineTarget.score`."""
    text = int32_array(tokens, "tokens")
    checked_int(start, "start", 1, max(len(text) - 1, 1))
    n_vocab = engine.model.vocab.n_tokens
    if len(text) < 2 or int(text.min()) < 0 or int(text.max()) >= n_vocab:
        raise ValueError(f"the text needs two tokens or more, all of the vocabulary of {n_vocab}")
    if len(text) >= engine.n_ctx:
        raise ContextFullError(
            f"the text has {len(text)} tokens, and {engine.link.endpoint} takes {engine.n_ctx - 1}"
        )
    call = Call(RemoteStats())
    given = text.tolist()
    began = time.perf_counter()
    dialect = engine.dialect
    if isinstance(dialect, ScoringDialect):
        reply = engine.link.request(*dialect.score_request(given, start), call=call)
        found = dialect.scores(reply.value, given, start)
    else:
        found = _by_fans(engine, call, given, start)
    logprobs = np.array(found.logprobs, dtype=np.float32)
    ranks = np.array([UNKNOWN_RANK if r is None else r for r in found.ranks], dtype=np.int32)
    # Rounding may lift the logarithm of a probability next to 1 a little above 0.
    if not (np.isfinite(logprobs) & (logprobs < 1e-3)).all():
        raise RemoteError(f"{engine.link.endpoint} sent what is no log-probability of a prompt")
    return Scores(logprobs, ranks, 0, time.perf_counter() - began)


def _by_fans(engine: Engine, call: Call, text: list[int], start: int) -> TokenScores:
    """By the rows before each token: a pass of the engine for each, several in one request."""
    found = TokenScores([], [])
    for begin in range(start, len(text), engine.max_chain + 1):
        end = min(begin + engine.max_chain + 1, len(text))
        k = min(_FAN_K, engine.max_logprobs)
        chain = text[begin : end - 1]
        reply = engine.link.request(*engine.dialect.rows_request(text[:begin], chain, k), call=call)
        for place, row in enumerate(engine.dialect.rows(reply.value, chain, k), begin):
            token = text[place]
            at = np.flatnonzero(row.tokens == token)
            more = k
            while not len(at) and more < engine.max_logprobs:
                more = min(8 * more, engine.max_logprobs)
                asked = engine.dialect.rows_request(text[:place], [], more)
                row = engine.dialect.rows(engine.link.request(*asked, call=call).value, [], more)[0]
                at = np.flatnonzero(row.tokens == token)
            found.logprobs.append(float(row.logprobs[at[0]]) if len(at) else -math.inf)
            found.ranks.append(int(at[0]) if len(at) else None)
    return found
