"""Who may ask at all: the name in the address, the web page, the key. Layers of ASGI around the routes.

A web page can make its visitor's browser send requests to addresses on the visitor's own machine, and, with a
name of its own that it lets point there, read the answers ("DNS rebinding"). The name that a browser asks for
is in Host, and the page that asks is in Origin, and neither can be changed by the page.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from sllm.hosts import is_loopback
from sllm.openai_server.problems import RequestError
from sllm.wire.tokens import token_digest

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["AddressGuard", "KeyGuard", "problem_response"]


def problem_response(problem: RequestError) -> JSONResponse:
    """The reply to a request that fails."""
    return JSONResponse(problem.body(), problem.status, dict(problem.headers))


class AddressGuard:
    """Refuses requests for other names than this server's, and of web pages that are not let in.

    Args:
        app: what is guarded.
        hosts: names, besides those of loopback, by which the server may be asked for; None: any, which needs
            a key.
        origins: web pages that may ask, such as ``https://app.example``; ``"*"``: any.

    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, origins: Collection[str]) -> None:
        self._app = app
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let it through."""
        if scope["type"] == "http" and (problem := self._problem(Headers(scope=scope))) is not None:
            await problem_response(problem)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _problem(self, headers: Headers) -> RequestError | None:
        if self._hosts is not None:
            name = _host_name(headers.get("host", ""))
            if not is_loopback(name) and name not in self._hosts:
                return RequestError(
                    403, "this server does not have the name that was asked for", code="host_not_allowed"
                )
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and "*" not in self._origins:
            return RequestError(403, "web pages of this origin may not ask here", code="origin_not_allowed")
        return None


def _host_name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


class KeyGuard:
    """Asks for the key, but of who only asks whether the server is there.

    Args:
        app: what is guarded.
        key: what requests have to bring, as ``Authorization: Bearer KEY``.

    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._digest = token_digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let it through."""
        if scope["type"] == "http" and scope["path"] != "/health":
            given = Headers(scope=scope).get("authorization", "")
            kind, _, key = given.partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(token_digest(key.strip()), self._digest):
                problem = RequestError(
                    401, "the API key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key"
                )
                await problem_response(problem)(scope, receive, send)
                return
        await self._app(scope, receive, send)
