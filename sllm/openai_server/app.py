"""The routes: requests in, replies and streams out, and nothing computed for a client that has left."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sllm.openai_server.asked import Asked, asked_chat, asked_completion
from sllm.openai_server.body import read_json
from sllm.openai_server.guard import AddressGuard, KeyGuard, problem_response
from sllm.openai_server.places import Places
from sllm.openai_server.problems import RequestError, problem_of
from sllm.openai_server.replies import reply_for
from sllm.openai_server.writing import Piece, Writing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from typing import TypeAlias

    from starlette.types import Receive, Scope, Send

    from sllm.openai_server.source import Place, Source

    Read: TypeAlias = Callable[[Mapping[str, Any]], Asked]

__all__ = ["App", "ServeLimits"]

log = logging.getLogger("sllm.openai_server")

_LAST_WORDS_SECONDS = 2.0
"""How long a client that reads nothing may keep the reason for which its stream ends from being sent."""


@dataclass(frozen=True)
class ServeLimits:
    """What clients may take of a server.

    Attributes:
        queue: requests that may wait for a place; more are refused with status 429.
        queue_seconds: for how long.
        body_bytes: of a request.
        body_seconds: until it has come.
        text_seconds: for a request from its first byte to the last one of the reply.
        max_tokens: of a text, whatever is asked for; None: as many as the context holds.

    """

    queue: int = 16
    queue_seconds: float = 60.0
    body_bytes: int = 8 << 20
    body_seconds: float = 30.0
    text_seconds: float = 3600.0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("queue_seconds", "body_seconds", "text_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected seconds above 0")
        if self.queue < 0 or self.body_bytes < 1 or (self.max_tokens is not None and self.max_tokens < 1):
            raise ValueError("queue has to be 0 or more, and body_bytes and max_tokens 1 or more")

    def tokens(self, asked: int | None) -> int | None:
        """How many a text gets that is asked for with so many."""
        both = [n for n in (asked, self.max_tokens) if n is not None]
        return min(both) if both else None


class App:
    """The application: what uvicorn calls.

    Args:
        source: what answers.
        name: of the model, by which requests ask for it.
        limits: what clients may take.
        key: what requests have to bring; None: nothing.
        hosts: names by which the server may be asked for besides loopback's; None: any.
        origins: web pages that may ask.

    """

    def __init__(
        self,
        source: Source,
        name: str,
        limits: ServeLimits,
        key: str | None,
        hosts: Collection[str] | None,
        origins: Collection[str],
    ) -> None:
        self._name = name
        self._created = int(time.time())
        self._ending = asyncio.Event()
        self.draining = False
        places: Places[Place] = Places(source.places, limits.queue, limits.queue_seconds)

        def texts(path: str, read: Read) -> Route:
            return Route(path, _Texts(source, places, name, limits, self._ending, read), methods=["POST"])

        layers = [Middleware(AddressGuard, hosts=hosts, origins=origins)]
        if origins:
            layers.append(
                Middleware(
                    CORSMiddleware,
                    allow_origins=list(origins),
                    allow_methods=["GET", "POST"],
                    allow_headers=["authorization", "content-type"],
                    expose_headers=["retry-after", "x-sllm-route"],
                )
            )
        if key is not None:
            layers.append(Middleware(KeyGuard, key=key))
        self._starlette = Starlette(
            routes=[
                texts("/v1/chat/completions", asked_chat),
                texts("/v1/completions", asked_completion),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/health", self._health),
            ],
            middleware=layers,
            exception_handlers={HTTPException: _http_problem},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await self._starlette(scope, receive, send)

    def end_texts(self) -> None:
        """End the texts that are still being written; in the event loop."""
        self._ending.set()

    def _card(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._created, "owned_by": "sllm"}

    async def _models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self._name:
            return problem_response(no_such_model(request.path_params["name"], self._name))
        return JSONResponse(self._card())

    async def _health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ending"}, 503) if self.draining else JSONResponse({"status": "ok"})


def no_such_model(asked: str, served: str) -> RequestError:
    """What a client is told that names another model."""
    shown = asked if len(asked) <= 100 else f"{asked[:100]}..."
    return RequestError(
        404, f"there is no model {shown!r} here, only {served!r}", param="model", code="model_not_found"
    )


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    said = str(error.detail)
    if error.status_code == 404:
        said = "there is nothing at this address, only /v1/chat/completions, /v1/completions and /v1/models"
        if not request.url.path.startswith("/v1/"):
            said += "; the base URL of a client ends with /v1"
    return problem_response(RequestError(error.status_code, said, code=code))


class _Texts:
    """A route that writes texts, as an ASGI application: it looks after whether the client is still there.

    Args:
        source: what answers.
        places: of it.
        name: the model's.
        limits: what clients may take.
        ending: set when texts are to end at once.
        read: what a request asks for.

    """

    def __init__(
        self,
        source: Source,
        places: Places[Place],
        name: str,
        limits: ServeLimits,
        ending: asyncio.Event,
        read: Read,
    ) -> None:
        self._source, self._places, self._name = source, places, name
        self._limits, self._ending, self._read = limits, ending, read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        began = time.monotonic()
        request, out = Request(scope, receive), _Output(send)
        limits = self._limits
        try:
            # 1. What is asked for. While it comes, `receive` is the body's.
            body = await asyncio.wait_for(read_json(request, limits.body_bytes), limits.body_seconds)
            asked = self._read(body)
            asked = replace(asked, max_tokens=limits.tokens(asked.max_tokens))
            if asked.model not in (None, self._name):
                raise no_such_model(str(asked.model), self._name)
            self._source.check(asked)
            # 2. The texts, until they are written, or nobody waits for them any more.
            await self._while_wanted(self._answer(asked, out), receive, began + limits.text_seconds)
        except ClientDisconnect:
            log.info("%s: the client has left", scope["path"])
            return
        except asyncio.TimeoutError:
            await out.problem(RequestError(408, "the request did not come in time", code="timeout"))
        except Exception as error:  # noqa: BLE001 - whatever it is, the client is told, and the server goes on
            await out.problem(problem_of(error))
        log.info("%s: %s in %.2f s", scope["path"], out.status, time.monotonic() - began)

    async def _while_wanted(self, work: Any, receive: Receive, until: float) -> None:
        """Await ``work``, unless the client leaves, the server ends or it takes too long.

        Raises:
            ClientDisconnect: the client has left.
            RequestError: one of the others.

        """
        working = asyncio.ensure_future(work)
        left = asyncio.ensure_future(_left(receive))
        ending = asyncio.ensure_future(self._ending.wait())
        others = (left, ending)
        try:
            await asyncio.wait(
                (working, *others),
                timeout=until - time.monotonic(),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for task in others:
                task.cancel()
            if not working.done():
                working.cancel()  # which ends what is computed
                await asyncio.wait((working,))
        if not working.cancelled():
            working.result()
        elif left.done() and not left.cancelled():
            raise ClientDisconnect
        elif self._ending.is_set():
            raise RequestError(503, "the server is ending; ask another, or later", code="shutting_down")
        else:
            raise RequestError(
                504, f"the text took longer than {self._limits.text_seconds:g} s", code="timeout"
            )

    async def _answer(self, asked: Asked, out: _Output) -> None:
        blame = asked.schema_from or ("logit_bias" if "logit_bias" in asked.sampling else asked.prompt_field)
        try:
            async with self._places.taken() as place:
                writing = Writing(self._source, asked, place)
                async with aclosing(writing.pieces()) as pieces:
                    await (self._stream if asked.stream else self._whole)(asked, writing, pieces, out)
        except Exception as error:  # noqa: BLE001 - as above
            await out.problem(problem_of(error, blame))

    async def _stream(self, asked: Asked, writing: Writing, pieces: Any, out: _Output) -> None:
        reply = reply_for(asked, self._name)
        async for piece in pieces:
            for chunk in reply.chunks(piece):
                await out.event(chunk)
        for chunk in reply.last(writing.usage):
            await out.event(chunk)
        await out.event("[DONE]")
        await out.end()

    async def _whole(self, asked: Asked, writing: Writing, pieces: Any, out: _Output) -> None:
        texts: dict[int, Piece] = {}
        async for piece in pieces:
            texts.setdefault(piece.index, Piece(piece.index)).add(piece)
        reply = reply_for(asked, self._name).whole(list(texts.values()), writing.usage)
        route = reply.get("sllm", {}).get("route")
        await out.json(200, reply, {} if route is None else {"x-sllm-route": ", ".join(route)})


async def _left(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Output:
    """The reply to a request: one object, or a stream of events.

    Args:
        send: of ASGI.

    Attributes:
        status: of HTTP; None: nothing was sent yet.

    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self._ended = False

    async def json(self, status: int, body: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        """Send one object as the whole reply."""
        data = _as_json(body)
        await self._begin(status, "application/json", {"content-length": str(len(data)), **headers})
        await self._body(data, more=False)

    async def event(self, data: Mapping[str, Any] | str) -> None:
        """Send a server-sent event; the first begins the reply."""
        if self.status is None:
            await self._begin(200, "text/event-stream", {"cache-control": "no-cache"})
        text = data.encode() if isinstance(data, str) else _as_json(data)
        await self._body(b"data: " + text + b"\n\n", more=True)

    async def end(self) -> None:
        """End a stream."""
        await self._body(b"", more=False)

    async def problem(self, problem: RequestError) -> None:
        """Say why the request has failed: by the reply's status, or in the stream where that has begun."""
        if self._ended:
            return
        if self.status is None:
            await self.json(problem.status, problem.body(), problem.headers)
            return

        async def last_words() -> None:
            await self.event(problem.body())
            await self.end()

        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(last_words(), _LAST_WORDS_SECONDS)

    async def _begin(self, status: int, kind: str, headers: Mapping[str, str]) -> None:
        self.status = status
        every = {"content-type": kind, "x-content-type-options": "nosniff", **headers}
        pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in every.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def _body(self, data: bytes, *, more: bool) -> None:
        self._ended = not more
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def _as_json(value: Any) -> bytes:
    # Half a surrogate pair, which JSON can name and UTF-8 cannot, comes back as "?".
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")
