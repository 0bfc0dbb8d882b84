"""HTTP to an engine: one thread with the connections, requests that may be sent again, and streams of events.

Every request here is idempotent: it asks what an engine says of a text that is sent with it. So whatever was
lost on the way is sent again, until a deadline: a connection that the engine closed while it was idle (vLLM
does after 5 seconds), a refusal with ``Retry-After``. The connections live on an asyncio loop of their own,
since a task of it can be cancelled from any thread, and its connection is closed with it.
"""

from __future__ import annotations

import asyncio
import json
import queue
import re
import threading
import time
from concurrent.futures import CancelledError as FutureCancelledError
from contextlib import aclosing, contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from sllm.engine.handle import Closing, join
from sllm.errors import AuthError, BusyError, CancelledError, RemoteError
from sllm.extras import needs

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
    from concurrent.futures import Future

    from sllm.targets.base import RemoteStats

with needs("engines"):
    import httpx2

__all__ = [
    "Call",
    "EngineLink",
    "EventStream",
    "HttpStatusError",
    "LinkLostError",
    "NotJsonError",
    "Reply",
    "limit_of",
]

_T = TypeVar("_T")

MAX_BODY = 256 << 20
"""Bytes of an answer; a row of a whole vocabulary takes some 20 MB."""

MAX_EVENT = 64 << 20
"""Bytes of one event of a stream."""

_AGAIN = frozenset({429, 502, 503, 504})
_BUSY = frozenset({429, 503})
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_CONNECT_SECONDS = 10.0


class HttpStatusError(RemoteError):
    """An engine answered with an HTTP status that is no success.

    Attributes:
        status: the status.
        said: what the engine said about it, shortened.

    """

    def __init__(self, where: str, status: int, said: str) -> None:
        super().__init__(f"{where} answered with HTTP status {status}" + (f": {said}" if said else ""))
        self.status = status
        self.said = said


class LinkLostError(RemoteError):
    """The connection broke within an answer."""


class NotJsonError(RemoteError):
    """An engine answered with something else than JSON."""


class Sink(Protocol):
    """Takes events, on another thread."""

    def put(self, event: Any, /) -> None:
        """The next one."""


class Reply(NamedTuple):
    """A JSON answer, and its headers in lower case."""

    value: Any
    headers: dict[str, str]


class Call:
    """The requests of one text, which another thread may cancel.

    Args:
        stats: what they cost is counted there.

    """

    def __init__(self, stats: RemoteStats) -> None:
        self.stats = stats
        self._lock = threading.Lock()
        self._cancelled = False
        self._future: Future[Any] | None = None

    def _begin(self, future: Future[Any]) -> None:
        with self._lock:
            self._future = future
            cancelled = self._cancelled
        if cancelled:
            future.cancel()

    def _end(self) -> None:
        with self._lock:
            self._future = None

    def cancel(self) -> None:
        """End the request under way, and every later one; from any thread."""
        with self._lock:
            self._cancelled = True
            future = self._future
        if future is not None:
            future.cancel()  # not with the lock: what waits for its end may be called right here


def limit_of(error: HttpStatusError) -> int | None:
    """The limit that vLLM names where more log-probabilities were asked for."""
    named = re.search(r"max allowed: (-?\d+)", error.said)
    return None if named is None else int(named[1])


class EventStream:
    """Server-sent events of one request, in order. All but :meth:`close` belong to one thread."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call: Call | None = None
        self._future: Future[None] | None = None
        self.ended = False

    @property
    def ready(self) -> bool:
        """Whether :meth:`get` would not wait."""
        return self.ended or not self._events.empty()

    def get(self) -> Any:
        """The next event, JSON; None after the last.

        Raises:
            RemoteError: the stream broke off.
            CancelledError: the call was cancelled.

        """
        if self.ended:
            return None
        event = self._events.get()
        if event is None or isinstance(event, BaseException):
            self.ended = True
            if self._call is not None:
                self._call._end()
        if isinstance(event, BaseException):
            raise event
        return event

    def leave(self) -> None:
        """Read no more, and let a request that ends soon end by itself: its connection can be used again."""
        if not self.ended and self._call is not None:
            self._call._end()
        self.ended = True

    def close(self) -> None:
        """End the request, if it has not ended yet: the engine stops computing."""
        if self._future is not None:
            self._future.cancel()
        if not self.ended and self._call is not None:
            self._call._end()
        self.ended = True


class EngineLink(Closing):
    """The connections to one engine. Any number of threads may use it.

    Args:
        url: its address, such as ``http://host:8000/v1``; what is asked is asked relative to its root.
        api_key: sent as a bearer token.
        deadline: seconds for one request with everything that is sent again, and between events of a stream.
        ssl_context: for ``https``; None: the system's certificates.

    Raises:
        ImportError: the package for it is not installed.
        ValueError: not an address.

    Attributes:
        url: the address as given.

    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        deadline: float = 60.0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.url = url
        self.deadline = deadline
        root = _root_of(url)
        self.endpoint = f"{root.host}:{root.port or (443 if root.scheme == 'https' else 80)}"
        headers = {"accept": "application/json"}
        if api_key is not None:
            if not (api_key.isascii() and api_key.isprintable()):
                raise ValueError("api_key holds a character that no HTTP header can")
            headers["authorization"] = f"Bearer {api_key}"
        self._loop = asyncio.new_event_loop()
        self._client = httpx2.AsyncClient(
            base_url=root,
            headers=headers,
            verify=True if ssl_context is None else ssl_context,
            timeout=httpx2.Timeout(deadline, connect=min(_CONNECT_SECONDS, deadline)),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=8, keepalive_expiry=None),
            follow_redirects=False,
        )
        self._closed = False
        self._submitting = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="sllm-engine", daemon=True)
        self._thread.start()
        super().__init__()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def request(self, path: str, body: Any = None, *, call: Call, patient: bool = True) -> Reply:
        """POST ``body`` as JSON, or GET where there is none.

        Args:
            path: from the root of the engine's address, such as ``/v1/completions``.
            body: what JSON can hold.
            call: the text that it belongs to.
            patient: whether to send it again where the engine cannot be reached; where it has no time, it is
                sent again in any case.

        Raises:
            HttpStatusError: an answer that is no success; AuthError for 401 and 403.
            BusyError: 429 or 503 to the end of the deadline.
            RemoteError: it cannot be reached, does not answer in time, or answers with something else than
                JSON; the message does not repeat what was sent.
            CancelledError: the call was cancelled.

        """
        return self._run(self._request(path, _encoded(body), call, patient), call)

    def begin(self, path: str, body: Any, *, call: Call, done: Callable[[Reply | Exception], object]) -> None:
        """:meth:`request` without waiting: ``done`` is called on another thread with the reply, or with what
        :meth:`request` would have raised.
        """
        future = self._submit(self._request(path, _encoded(body), call, patient=True))
        call._begin(future)

        def tell(future: Future[Reply | Exception]) -> None:
            call._end()
            cancelled = CancelledError("the generation was cancelled")
            done(cancelled if future.cancelled() else future.result())

        future.add_done_callback(tell)

    def stream(self, path: str, body: Any, *, call: Call, events: Sink | None = None) -> EventStream:
        """POST ``body``, and read the answer event by event. Errors come with the events.

        ``events``: where these go as they come, an error or None the last, instead of to the stream's own
        queue.
        """
        stream = EventStream(self.endpoint)
        sink = stream._events if events is None else events
        future = self._submit(self._pump(path, _encoded(body), call, sink))
        stream._call, stream._future = call, future
        call._begin(future)
        return stream

    def _submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        try:
            with self._submitting:  # what comes before the end of the loop is cancelled by it
                self._check_open()
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        except BaseException:
            work.close()
            raise

    def _run(self, work: Coroutine[Any, Any, Reply | Exception], call: Call) -> Reply:
        future = self._submit(work)
        call._begin(future)
        try:
            outcome = future.result()
        except FutureCancelledError:
            raise CancelledError("the generation was cancelled") from None
        finally:
            future.cancel()  # after Ctrl-C; else it is done
            call._end()
        if isinstance(outcome, Exception):
            try:
                raise outcome
            finally:
                del outcome, future  # which would keep this frame, and what called it
        return outcome

    # ---- on the thread of the loop

    async def _request(
        self, path: str, content: bytes | None, call: Call, patient: bool
    ) -> Reply | Exception:
        """A reply, or the error in its place: raised here, it would be in a cycle with the task's frames."""
        try:
            with _own_words(self.endpoint):
                return await asyncio.wait_for(self._persist(path, content, call, patient), self.deadline)
        except Exception as error:  # noqa: BLE001 - raised by the thread that asked
            error.__context__ = None
            return error.with_traceback(None)

    async def _persist(self, path: str, content: bytes | None, call: Call, patient: bool) -> Reply:
        until = time.monotonic() + self.deadline
        while True:
            response = await self._send(path, content, call, patient, until)
            try:
                data = await _read(response, MAX_BODY, self.endpoint)
            except httpx2.TransportError:  # broken off within the answer
                if not patient or time.monotonic() + _FIRST_PAUSE >= until:
                    raise
                call.stats.n_reconnects += 1
                await asyncio.sleep(_FIRST_PAUSE)
                continue
            finally:
                call.stats.bytes_down += response.num_bytes_downloaded
                await response.aclose()
            try:
                return Reply(json.loads(data), {k.lower(): v for k, v in response.headers.items()})
            except (ValueError, RecursionError):
                raise NotJsonError(f"{self.endpoint} answered {path} with something else than JSON") from None

    async def _pump(self, path: str, content: bytes | None, call: Call, events: Sink) -> None:
        last: BaseException | None = None
        try:
            with _own_words(self.endpoint):
                await self._pump_events(path, content, call, events)
        except asyncio.CancelledError:
            last = CancelledError("the generation was cancelled")
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the events are read
            last = error
        finally:
            events.put(last)

    async def _pump_events(self, path: str, content: bytes | None, call: Call, events: Sink) -> None:
        until = time.monotonic() + self.deadline
        sending = self._send(path, content, call, patient=True, until=until)
        response = await asyncio.wait_for(sending, self.deadline)
        try:
            async with aclosing(_events(response, self.endpoint)) as lines:
                async for data in lines:
                    if data == b"[DONE]":
                        return
                    try:
                        events.put(json.loads(data))
                    except (ValueError, RecursionError):
                        raise RemoteError(f"{self.endpoint} sent an event that is no JSON") from None
        finally:
            call.stats.bytes_down += response.num_bytes_downloaded
            await response.aclose()

    async def _send(
        self, path: str, content: bytes | None, call: Call, patient: bool, until: float
    ) -> httpx2.Response:
        """Send a request until it is answered with success; the answer's body has yet to be read."""
        method = "GET" if content is None else "POST"
        headers = {} if content is None else {"content-type": "application/json"}
        pause = _FIRST_PAUSE
        while True:
            request = self._client.build_request(method, path.lstrip("/"), content=content, headers=headers)
            call.stats.bytes_up += len(content or b"")
            wait = 0.0
            try:
                response = await self._client.send(request, stream=True)
                if response.is_success:
                    return response
                wait = _retry_after(response)
                refused = await self._refusal(response)
                again = response.status_code in _AGAIN
            except httpx2.TransportError as error:
                refused, again = error, patient
                call.stats.n_reconnects += 1
            wait = max(wait, pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            try:
                if not again or time.monotonic() + wait >= until:
                    raise refused
            finally:
                del refused  # which keeps the frame that raised it
            call.stats.lost_seconds += wait
            await asyncio.sleep(wait)

    async def _refusal(self, response: httpx2.Response) -> Exception:
        data = b""
        with suppress(httpx2.TransportError, RemoteError):
            data = await _read(response, 1 << 16, self.endpoint)
        await response.aclose()
        said = _said(data)
        status = response.status_code
        if status in (401, 403):
            return AuthError(f"{self.endpoint} refused the key (HTTP status {status}); pass api_key=")
        if status in _BUSY:
            return BusyError(f"{self.endpoint} has no time (HTTP status {status})")
        return HttpStatusError(self.endpoint, status, said)

    # ---- the end

    def close(self) -> None:
        """Cancel what is under way, close the connections, and end the thread. More calls do nothing."""
        with self._submitting:
            if self._closed:
                return
            self._closed = True
        if not self._in_fork and self._thread.ident is not None:
            with suppress(RuntimeError):  # the loop was closed already
                asyncio.run_coroutine_threadsafe(self._shut(), self._loop)
            join(self._thread, 10.0)
        if not self._loop.is_running():
            self._loop.close()

    async def _shut(self) -> None:
        try:
            own = asyncio.current_task()
            tasks = [task for task in asyncio.all_tasks() if task is not own]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.aclose()
            await self._loop.shutdown_asyncgens()
        finally:
            self._loop.stop()

    def __repr__(self) -> str:
        return f"<sllm EngineLink to {self.endpoint}{', closed' if self.closed else ''}>"


# ---- parts


def _root_of(url: str) -> httpx2.URL:
    try:
        given = httpx2.URL(url)
        good = given.scheme in ("http", "https") and bool(given.host) and not given.userinfo
    except (httpx2.InvalidURL, TypeError):
        good = False
    if not good:
        raise ValueError(
            "the address of an engine is not one such as http://host:8000/v1 (a key belongs into api_key)"
        )
    path = given.path.rstrip("/")
    return given.copy_with(path=path.removesuffix("/v1") + "/", query=None, fragment=None)


def _encoded(body: Any) -> bytes | None:
    return None if body is None else json.dumps(body, separators=(",", ":"), allow_nan=False).encode()


async def _read(response: httpx2.Response, most: int, where: str) -> bytes:
    data = bytearray()
    async for block in response.aiter_bytes():
        data += block
        if len(data) > most:
            raise RemoteError(f"{where} sent more than {most} bytes for one answer")
    return bytes(data)


async def _events(response: httpx2.Response, where: str) -> AsyncGenerator[bytes, None]:
    """The data of server-sent events, one line each."""
    buffer = bytearray()
    async for block in response.aiter_bytes():
        buffer += block
        if len(buffer) > MAX_EVENT:
            raise RemoteError(f"{where} sent an event of more than {MAX_EVENT} bytes")
        while (end := buffer.find(b"\n")) >= 0:
            line = bytes(buffer[:end]).rstrip(b"\r")
            del buffer[: end + 1]
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that ``Retry-After`` asks for, as a number or a date; 0: none."""
    given = response.headers.get("retry-after", "")
    with suppress(ValueError, OverflowError):
        return min(max(float(given), 0.0), 1e6)
    with suppress(ValueError, TypeError, OverflowError):
        return min(max(parsedate_to_datetime(given).timestamp() - time.time(), 0.0), 1e6)
    return 0.0


def _said(data: bytes) -> str:
    """The message of an error in one line, in the forms that engines give it, shortened."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    for key in ("error", "detail", "message"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    return " ".join(value.split())[:300] if isinstance(value, str) else ""


@contextmanager
def _own_words(where: str) -> Iterator[None]:
    """Errors of HTTP and of time as ours."""
    try:
        yield
    except (asyncio.TimeoutError, TimeoutError, httpx2.TimeoutException):
        raise RemoteError(f"{where} does not answer in time") from None
    except httpx2.ConnectError as error:
        raise RemoteError(f"nothing answers at {where}: {error}") from None
    except httpx2.HTTPError as error:
        raise LinkLostError(f"the connection to {where} broke ({type(error).__name__})") from None
