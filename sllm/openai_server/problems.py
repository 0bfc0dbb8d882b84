"""What a client is told when a request fails: OpenAI's error objects and their HTTP status."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from sllm.errors import (
    BusyError,
    CancelledError,
    ClosedError,
    ContextFullError,
    LeakError,
    RemoteError,
    UndecidedError,
    UnsupportedModelError,
)
from sllm.messages import MessageError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["RequestError", "problem_of"]

log = logging.getLogger("sllm.openai_server")

_BUSY_SECONDS = 5.0
"""After which a client may try again, where nothing says when."""


class RequestError(Exception):
    """A request that fails, as its client is told.

    Args:
        status: of HTTP.
        message: for people.
        param: the field of the request that is to blame; None: not one.
        code: for programs.
        retry_after: seconds until trying again may help.

    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the reply."""
        found = {}
        if self.retry_after is not None:
            found["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        elif self.status >= 500:
            kind = "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def problem_of(error: Exception, param: str | None = None) -> RequestError:
    """What a client is told of an exception: nothing of other machines, and nothing of what is unexpected.

    Args:
        error: what was raised.
        param: the field of the request to blame for a wrong value.

    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, BusyError):
        retry_after = error.retry_after or _BUSY_SECONDS
        return RequestError(
            429, "the model is busy; try again later", code="rate_limit_exceeded", retry_after=retry_after
        )
    if isinstance(error, ContextFullError):
        return RequestError(400, str(error), param=param, code="context_length_exceeded")
    if isinstance(error, LeakError):
        return RequestError(403, str(error), code="stays_local")
    if isinstance(error, UndecidedError):
        return RequestError(400, str(error), param="temperature", code="unsupported_value")
    if isinstance(error, UnsupportedModelError):
        return RequestError(400, str(error), param=param, code="unsupported_by_model")
    if isinstance(error, MessageError):
        return RequestError(400, str(error), param="messages", code="invalid_value")
    if isinstance(error, (RemoteError, ClosedError, CancelledError)):
        # Its text may name machines that are nobody's business but the operator's.
        log.warning("a text has ended: %s: %s", type(error).__name__, error)
        return RequestError(
            503,
            "what this server gets its text from is out of reach; try again later",
            code="target_lost",
            retry_after=_BUSY_SECONDS,
        )
    if isinstance(error, ImportError):  # an extra that is not installed (sllm.extras)
        return RequestError(
            400, f"not supported by this server: {error}", param=param, code="unsupported_value"
        )
    if isinstance(error, (ValueError, TypeError)):
        return RequestError(400, str(error), param=param, code="invalid_value")
    # The message might quote what a client has sent.
    log.error("a request has failed: %s", type(error).__name__)
    return RequestError(500, "the server has failed; its log says where", code="internal_error")
