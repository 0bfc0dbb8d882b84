"""The body of a request: read within limits, and taken apart field by field."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, NoReturn

from sllm.openai_server.problems import RequestError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from starlette.requests import Request

__all__ = ["Fields", "read_json"]


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object that a request brings.

    Raises:
        RequestError: it is larger than ``max_bytes``, of another type, or not such an object.
        starlette.requests.ClientDisconnect: the client has left.

    """
    # A web page can send a "simple" request to any address without asking; never one of this type.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, "the content-type has to be application/json", code="unsupported_media_type")
    data = bytearray()
    async for block in request.stream():
        data += block
        if len(data) > max_bytes:
            raise RequestError(413, f"the request is larger than {max_bytes} bytes", code="request_too_large")
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise RequestError(400, "the request is not valid JSON", code="invalid_json") from None
    if not isinstance(body, dict):
        raise RequestError(400, "the request is not a JSON object", code="invalid_json")
    return body


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity, which JSON does not have


class Fields:
    """The fields of a request, each of them taken once; what is left in the end is not known.

    A field that is null is one that is absent, as with OpenAI.

    Args:
        body: the request.

    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str) -> Any:
        """The value as it is, or None."""
        return self._left.pop(name, None)

    def flag(self, name: str) -> bool | None:
        """A truth value, or None."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise wrong(name, "expected true or false")
        return value

    def text(self, name: str) -> str | None:
        """A text, or None."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise wrong(name, "expected a string")
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        """An integer from ``low`` to ``high``, or None."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON knows one kind of number
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise wrong(name, f"expected an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number from ``low`` to ``high``, or None."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise wrong(name, f"expected a number from {low} to {high}")
        return float(value) if math.isfinite(value) else value

    def done(self, unsupported: Collection[str]) -> None:
        """Refuse what is left.

        Args:
            unsupported: fields that OpenAI's API has and this server has not.

        Raises:
            RequestError: something is left.

        """
        for name in self._left:
            if name in unsupported:
                raise RequestError(
                    400,
                    f"{name} is not supported by this server; leave it out",
                    param=name,
                    code="unsupported_parameter",
                )
            shown = name if len(name) <= 60 else f"{name[:60]}..."
            raise RequestError(400, f"unknown parameter: {shown!r}", param=shown, code="unknown_parameter")


def wrong(name: str, expected: str) -> RequestError:
    """A field of a wrong type or out of range. Its value is not repeated: it may be a message's."""
    return RequestError(400, f"invalid value of {name}: {expected}", param=name, code="invalid_value")
