"""How likely a worker finds a text that is there already."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sllm.engine._ffi import checked_int
from sllm.engine.arrays import int32_array
from sllm.errors import ContextFullError, RemoteError, UnsupportedModelError
from sllm.targets.base import Scores
from sllm.wire.protocol import padded, pb

if TYPE_CHECKING:
    import numpy.typing as npt

    from sllm.remote.fleet import Fleet

__all__ = ["score"]


def score(fleet: Fleet, tokens: npt.NDArray[np.int32], start: int, timeout: float | None) -> Scores:
    """Log-probabilities and ranks of ``tokens[start:]``; see :meth:`sllm.remote.connection.Remote.score`."""
    info, endpoint = fleet.link.info, fleet.link.endpoint
    if "score" not in info.features:
        raise UnsupportedModelError(f"{endpoint} does not score texts; update sllm there")
    text = int32_array(tokens, "tokens")
    checked_int(start, "start", 1, max(len(text) - 1, 1))
    if len(text) > info.max_prompt:
        raise ContextFullError(f"the text has {len(text)} tokens, and the worker takes {info.max_prompt}")
    if len(text) < 2 or int(text.min()) < 0 or int(text.max()) >= info.n_vocab:
        raise ValueError(f"the text needs two tokens or more, all of the vocabulary of {info.n_vocab}")
    request = padded(pb.ScoreRequest(tokens=text.tolist(), start=start, model_id=info.model_id))
    reply: pb.ScoreReply = fleet.call("Score", request, pb.ScoreReply, timeout, text.tolist())
    n = len(text) - start
    logprobs = np.array(reply.logprobs, dtype=np.float32)
    ranks = np.array(reply.ranks, dtype=np.int64)
    # Rounding may lift the logarithm of a probability next to 1 a little above 0.
    if (
        len(logprobs) != n
        or len(ranks) != n
        or not (np.isfinite(logprobs) & (logprobs < 1e-3)).all()
        or ranks.max() >= info.n_vocab
    ):
        raise RemoteError(
            f"{endpoint} sent {len(logprobs)} log-probabilities and {len(ranks)} ranks,"
            f" expected {n} of each, finite and <= 0, and below {info.n_vocab}"
        )
    return Scores(logprobs, ranks.astype(np.int32), reply.n_reused, reply.compute_us * 1e-6)
