"""The protocol of ``sllm.proto`` in Python: its version, methods, sizes of messages, and how exceptions and
sampling parameters cross.

The messages are in ``sllm_pb2``, which is generated (CONTRIBUTING.md says how).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from sllm.engine.sampling import SamplingParams
from sllm.errors import (
    AuthError,
    BusyError,
    ClosedError,
    ContextFullError,
    InferenceError,
    RemoteError,
    UnsupportedModelError,
)
from sllm.extras import needs
from sllm.wire.traces import raised_at

with needs("remote"):
    import grpc

    from sllm.wire import sllm_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from google.protobuf.message import Message

__all__ = [
    "CHANNEL_OPTIONS",
    "FEATURES",
    "FRAMING",
    "NOISES",
    "PIECE_BYTES",
    "PROTOCOL",
    "RELAY_OPTIONS",
    "SERVICE",
    "abort",
    "check_offered",
    "failure",
    "forget",
    "from_sampling",
    "hint_parents",
    "method",
    "not_offered",
    "padded",
    "pb",
    "required",
    "size_limit",
    "to_hint",
    "to_sampling",
]

log = logging.getLogger("sllm.wire")

PROTOCOL = 1
SERVICE = "sllm.v1.Worker"
NOISES = ("noise-vllm", "noise-sglang")
"""The features of everybody who selects: whose noise may do it besides our own."""

FEATURES = ("generate", "hints", "run-ahead", "score", "vocabulary", "status", "echo", *NOISES)
"""What every worker of this version offers; ``"grammar"``, ``"json-schema"``, ``"worker-draft"``, ``"trees"``
and ``"rpc"`` depend on its options and its model.
"""

PIECE_BYTES = 1 << 18
"""The most that a message ``Piece`` carries."""

RELAY_OPTIONS: tuple[tuple[str, int], ...] = (("grpc.http2.lookahead_bytes", 1 << 23),)
"""For both ends of a relay: bytes that may be in flight before the receiver asks for more. The usual 64 KiB
would let a link with a round trip of 50 ms carry 10 Mbit/s.
"""

FRAMING = 5 + 9 + 22
"""Bytes around a message on the wire: gRPC's prefix, one HTTP/2 frame header, one TLS 1.3 record."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A ping with every piece of data, for windows that these messages never fill.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.enable_http_proxy", 0),
)
"""For both ends."""

_SMALLEST = 64

_MAX_DETAILS = 400
"""Characters of an error's text on the wire: it travels in a header block, whose size clients limit, and it
may repeat what it is about (a grammar, say).
"""

_NOT_OFFERED = "the worker does not offer"

_RETRY_AFTER = "sllm-retry-after-ms"
"""Trailing metadata of a refusal: :attr:`~sllm.BusyError.retry_after` in milliseconds."""

_M = TypeVar("_M", bound="Message")
_E = TypeVar("_E", bound=Exception)


def method(name: str) -> str:
    """The path of a method of the service."""
    return f"/{SERVICE}/{name}"


def padded(message: _M) -> _M:
    """``message``, its padding filled so that it takes 64 bytes, or the next power of two."""
    message.ClearField("padding")
    bare = message.ByteSize()
    size = _SMALLEST
    while True:
        for n_length in range(1, 5):  # bytes that the padding's length takes
            n = size - bare - 1 - n_length
            if n >= 1 and _varint_size(n) == n_length:  # an empty field is not sent
                message.padding = bytes(n)  # type: ignore[attr-defined]
                return message
        size *= 2


def _varint_size(number: int) -> int:
    return max(1, (number.bit_length() + 6) // 7)


def size_limit(n_ctx: int) -> int:
    """The largest message that a worker with ``n_ctx`` positions takes: a prompt, a grammar, many biases, and
    padding.
    """
    return 2 * (5 * n_ctx + (1 << 17))


# What a worker refuses with, as gRPC's status codes, and what a client raises for it. UNAVAILABLE is a lost
# link, not a refusal.
_REFUSALS: list[tuple[type[Exception], str]] = [
    (AuthError, "UNAUTHENTICATED"),
    (BusyError, "RESOURCE_EXHAUSTED"),
    (ContextFullError, "OUT_OF_RANGE"),
    (UnsupportedModelError, "UNIMPLEMENTED"),
    (RemoteError, "FAILED_PRECONDITION"),
    (ClosedError, "UNAVAILABLE"),
    (InferenceError, "ABORTED"),
    (TypeError, "INVALID_ARGUMENT"),
    (ValueError, "INVALID_ARGUMENT"),
]


def abort(context: grpc.ServicerContext, error: Exception) -> NoReturn:
    """End a call with the status that stands for ``error``; the text goes along only of those in
    :data:`_REFUSALS`, which are meant for clients.
    """
    for kind, code in _REFUSALS:
        if isinstance(error, kind):
            text = str(error)
            if len(text) > _MAX_DETAILS:
                text = f"{text[:_MAX_DETAILS]} ..."
            if isinstance(error, BusyError) and error.retry_after is not None:
                context.set_trailing_metadata(((_RETRY_AFTER, f"{error.retry_after * 1000:.0f}"),))
            forget(error)
            context.abort(grpc.StatusCode[code], text)
    log.error("a call failed: %s", raised_at(error))
    forget(error)
    context.abort(grpc.StatusCode.INTERNAL, f"the worker failed ({type(error).__name__}); see its log")
    raise AssertionError("abort() raises")


def forget(error: _E) -> _E:
    """Take from an exception, and from those before it, their tracebacks, on the worker.

    A traceback keeps the call alive, and where the call keeps the exception, as gRPC does with its own, it
    does so until Python looks for garbage. Of a connection gRPC refuses calls while so many others are alive,
    ended or not, as may be under way at once (RST_STREAM 7).

    Examples:
        >>> try:
        ...     int("five")
        ... except ValueError as error:
        ...     known = sllm.wire.protocol.forget(error)
        >>> known.__traceback__ is None
        True

    """
    found: BaseException | None = error
    while found is not None:
        found.__traceback__ = None
        found = found.__context__
    return error


def failure(error: grpc.RpcError, endpoint: str) -> Exception | None:
    """The exception that a failed call stands for, or None for a lost link, where trying again may help."""
    code, details = error.code().name, error.details() or ""
    if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN", "DATA_LOSS"):
        return None
    if code == "INTERNAL" and "RST_STREAM" in details:
        return None
    if code == "INVALID_ARGUMENT":
        return ValueError(details)
    if code == "RESOURCE_EXHAUSTED" and "larger than max" in details:
        return ValueError(f"{endpoint}: the message is too large for this link: {details}")
    if code == "UNIMPLEMENTED" and not details.startswith(_NOT_OFFERED):
        return RemoteError(f"{endpoint} is not an sllm worker: {details or 'it does not know the call'}")
    for kind, name in _REFUSALS:
        if name == code:
            found = kind(details if kind is ContextFullError else f"{endpoint}: {details}")
            if isinstance(found, BusyError):
                found.retry_after = _retry_after(error)
            return found
    return RemoteError(f"{endpoint}: {details} ({code.lower()})")


def _retry_after(error: grpc.RpcError) -> float | None:
    """What a refusal says of when to try again, in seconds; None: nothing that can be read."""
    pairs: Any = error.trailing_metadata() or ()
    found = dict(pairs).get(_RETRY_AFTER)
    return int(found) / 1000 if isinstance(found, str) and found.isdecimal() and len(found) < 10 else None


def not_offered(features: Iterable[str]) -> UnsupportedModelError:
    """What a worker refuses with where a client wants more than it offers."""
    return UnsupportedModelError(f"{_NOT_OFFERED} {', '.join(map(repr, features))}")


def required(sampling: SamplingParams) -> list[str]:
    """The features without which a worker would not select by these parameters: one that does not know a
    field of a message passes over it.
    """
    features = [] if sampling.json_schema is None else ["json-schema"]
    return features if sampling.noise == "sllm" else [*features, f"noise-{sampling.noise}"]


def check_offered(sampling: SamplingParams, features: Iterable[str]) -> None:
    """Refuse parameters that a worker with these features would not select by.

    Raises:
        UnsupportedModelError: it lacks one of :func:`required`.

    """
    lacking = set(required(sampling)).difference(features)
    if lacking:
        raise not_offered(sorted(lacking))


def to_hint(pos: int, tokens: Sequence[int], parents: Sequence[int] | None, number: int) -> pb.Hint:
    """A hint for the wire: a tree from ``pos`` on, with ``parents`` as a target takes them, or a chain
    (None); ``number`` counts the hints.
    """
    return pb.Hint(pos=pos, tokens=tokens, parents=[parent + 1 for parent in parents or ()], id=number)


def hint_parents(message: pb.Hint) -> list[int] | None:
    """The parents of a hint from the wire, unchecked; None: it is a chain."""
    return [parent - 1 for parent in message.parents] or None


def to_sampling(sampling: SamplingParams) -> pb.Sampling:
    """Sampling parameters for the wire, which has them as float32, as selection does."""
    pairs: tuple[tuple[int, float], ...] = tuple(sampling.logit_bias)  # type: ignore[arg-type]
    return pb.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        penalty_last_n=sampling.penalty_last_n,
        penalty_repeat=sampling.penalty_repeat,
        penalty_freq=sampling.penalty_freq,
        penalty_present=sampling.penalty_present,
        bias_tokens=[token for token, _ in pairs],
        bias_values=[bias for _, bias in pairs],
        grammar=sampling.grammar or "",
        json_schema=str(sampling.json_schema or ""),
        seed=sampling.seed,
        noise="" if sampling.noise == "sllm" else sampling.noise,
    )


def from_sampling(message: pb.Sampling) -> SamplingParams:
    """Sampling parameters from the wire.

    Raises:
        ValueError: a value out of its range.

    """
    if len(message.bias_tokens) != len(message.bias_values):
        raise ValueError(
            f"logit_bias has {len(message.bias_tokens)} tokens and {len(message.bias_values)} values"
        )
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        penalty_last_n=message.penalty_last_n,
        penalty_repeat=message.penalty_repeat,
        penalty_freq=message.penalty_freq,
        penalty_present=message.penalty_present,
        logit_bias=list(zip(message.bias_tokens, message.bias_values, strict=True)),
        grammar=message.grammar or None,
        json_schema=message.json_schema or None,
        seed=message.seed,
        noise=message.noise or "sllm",
    )
