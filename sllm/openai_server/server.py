"""An OpenAI-compatible server: any target, with a draft, or a hybrid, for programs that cannot embed the
library.

Thin on purpose: what decides and speeds up the text is :func:`sllm.generate`'s business and
:meth:`sllm.Hybrid.ask`'s. Here requests are checked, queued and cancelled, and answers put into OpenAI's
objects. What is supported: ``docs/guides/serve.md``.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm.engine.handle import Closing, join
from sllm.engine.model import Model
from sllm.engine.sampling import SamplingParams
from sllm.extras import needs
from sllm.hosts import host_port, is_loopback
from sllm.openai_server.source import HybridSource, Source, TargetSource
from sllm.targets.base import Target
from sllm.triage.hybrid import Hybrid
from sllm.wire.tokens import checked_token

with needs("serve"):
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from sllm.openai_server.app import App, ServeLimits

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from sllm.draft.drafters import Drafter

__all__ = ["DEFAULT_PORT", "OpenAIServer", "ServeLimits"]

DEFAULT_PORT = 8080
_MAX_CONNECTIONS = 256
_FIRST_REQUEST_SECONDS = 15.0
"""How long a connection may take to send the head of its first request."""

_CLOSING_SECONDS = 5.0
"""How long connections may take to close when their texts have ended."""


class OpenAIServer(Closing):
    """Serves a target or a hybrid at OpenAI's addresses (``/v1/chat/completions``, ``/v1/completions``,
    ``/v1/models``) from a thread of this process.

    On loopback it is open to every program of this machine, but to no web page, unless there is a key.
    Elsewhere it needs one, and something in front of it that does TLS.

    Args:
        target: what answers; a :class:`~sllm.Model` gets a :class:`~sllm.LocalTarget`. It stays the caller's
            to close, after this.
        draft: as :func:`~sllm.generate` takes it; of a hybrid None.
        name: of the model, by which requests ask for it; None: the file's.
        host, port: where to listen; port 0: any that is free.
        api_key: what requests have to bring, at least 16 characters.
        sampling: for what requests leave open; None: ``SamplingParams()``, and of a hybrid temperature 0.
            Its seed is not used.
        seed: for requests that name none; None: each gets another one.
        texts: how many are written at once: 1 for what has one context, and for others what they have places
            for.
        n_ctx, n_threads: of contexts that are made here; None: the models' own.
        limits: what clients may take.
        allowed_hosts: names besides loopback's by which clients may ask for it, such as that of a proxy in
            front of it; none: on loopback no other, and elsewhere any.
        cors_origins: web pages that may ask, such as ``https://app.example``; ``"*"``: any, which needs a
            key.

    Raises:
        ValueError, TypeError: an argument out of range, or options that do not go together.
        OSError: the address cannot be listened on.
        ImportError: starlette or uvicorn is not installed (``pip install 'sllm[serve]'``).

    Attributes:
        name: of the model.
        address: where it listens, (host, port).

    Examples:
        >>> import json, urllib.request
        >>> with sllm.Model(sllm.embedded.DRAFT) as model, OpenAIServer(model, port=0) as server:
        ...     with urllib.request.urlopen(f"{server.url}/models") as reply:
        ...         len(json.load(reply)["data"])
        1

    """

    def __init__(
        self,
        target: Model | Target | Hybrid,
        *,
        draft: Model | Drafter | Callable[..., Any] | str | None = None,
        name: str | None = None,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        api_key: str | None = None,
        sampling: SamplingParams | None = None,
        seed: int | None = None,
        texts: int = 1,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        limits: ServeLimits | None = None,
        allowed_hosts: Collection[str] = (),
        cors_origins: Collection[str] = (),
    ) -> None:
        if isinstance(texts, bool) or not isinstance(texts, int) or not 1 <= texts <= 1024:
            raise ValueError(f"texts is {texts!r}, expected an integer from 1 to 1024")
        check_access(host, api_key, cors_origins)
        with ExitStack() as stack:
            source: Source
            if isinstance(target, Hybrid):
                if draft is not None or texts != 1:
                    raise ValueError("a Hybrid has drafts of its own, and writes one text at a time")
                source = HybridSource(target, sampling or SamplingParams(temperature=0.0), seed)
            elif isinstance(target, (Model, Target)):
                sampling = sampling or SamplingParams()
                source = TargetSource(target, draft, sampling, seed, texts, n_ctx, n_threads)
            else:
                raise TypeError(f"target is {target!r}, expected a Model, a Target or a Hybrid")
            stack.callback(source.close)
            self.name = name or _name_of(target)
            listener = stack.enter_context(_listening(host, port))
            self.address: tuple[str, int] = listener.getsockname()[:2]
            # Elsewhere the key, which no web page has, keeps them out, and names may be many.
            hosts = frozenset(allowed_hosts) if allowed_hosts or is_loopback(host) else None
            self._app = App(source, self.name, limits or ServeLimits(), api_key, hosts, cors_origins)
            self._uvicorn = _Uvicorn(_config(self._app))
            self._ready = threading.Event()
            self._loop: asyncio.AbstractEventLoop | None = None
            self._failures: list[BaseException] = []
            self._thread = threading.Thread(
                target=self._run, args=(listener,), name="sllm-openai-server", daemon=True
            )
            self._thread.start()
            self._ready.wait()
            if self._failures:
                self._thread.join()
                raise self._failures[0]
            self._resources = stack.pop_all()
        self._closed = False
        super().__init__()

    @property
    def url(self) -> str:
        """What OpenAI's clients call the base URL."""
        return f"http://{host_port(*self.address)}/v1"

    def _run(self, listener: socket.socket) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._uvicorn.serve_until_told(listener, self._ready)

        try:
            asyncio.run(serve())
        except BaseException as error:  # noqa: BLE001 - the constructor's to raise
            self._failures.append(error)
        finally:
            self._ready.set()

    @property
    def running(self) -> bool:
        """Whether it still serves."""
        return self._thread.is_alive()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def drain(self, seconds: float) -> bool:
        """Take no more requests, and wait until the texts have ended that are being written, for at most so
        many seconds; whether they have.
        """
        self._app.draining = True
        self._uvicorn.should_exit = True
        join(self._thread, seconds)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Take no more requests, and end the texts that are being written. More calls do nothing."""
        if self._closed or self._in_fork:
            return
        self._closed = True
        if not self.drain(0.0) and self._loop is not None:
            with suppress(RuntimeError):  # the loop has just ended
                self._loop.call_soon_threadsafe(self._app.end_texts)
            join(self._thread, _CLOSING_SECONDS)
            self._uvicorn.force_exit = True  # what is sent to clients that do not read
        join(self._thread)
        self._resources.close()

    def __repr__(self) -> str:
        return f"<sllm.OpenAIServer of {self.name!r} at {self.url}{', closed' if self._closed else ''}>"


def check_access(host: str, key: str | None, origins: Collection[str]) -> None:
    """Whether a server may listen there with this key, or none.

    Raises:
        ValueError: it may not.

    """
    if key is None and not is_loopback(host):
        raise ValueError(
            f"{host} is not a loopback address, and a server that others can reach needs an API key"
        )
    if key is None and "*" in origins:
        raise ValueError("any web page could use a server with cors_origins '*': give it an API key, too")
    if key is not None:
        checked_token(key)


def _name_of(target: object) -> str:
    """The name of a model's file, wherever it is, or an engine's name for it."""
    engine = getattr(getattr(target, "info", None), "model", None)
    if isinstance(engine, str):
        return engine
    for owner in (target, getattr(target, "model", None)):
        if isinstance(owner, Model):
            return owner.path.stem
    worker = getattr(getattr(getattr(target, "remote", None), "info", None), "model_name", None)
    return Path(worker).stem if isinstance(worker, str) else "sllm"


def _listening(host: str, port: int) -> socket.socket:
    with ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except OSError as error:  # socket.gaierror among them
            where = host_port(host, port)
            raise OSError(error.errno, f"cannot listen on {where}: {error.strerror or error}") from None
        stack.pop_all()
    return listener


def _config(app: App) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
    )


class _Connection(H11Protocol):
    """A connection: nothing of it is logged, for a query may hold anything, and one that asks for nothing is
    closed.
    """

    _silence: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.access_log = False  # the option of this name would change the loggers of the whole process

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        self._silence = self.loop.call_later(_FIRST_REQUEST_SECONDS, self._end_silence)

    def _end_silence(self) -> None:
        cycle: object = self.cycle  # None, before there was a request
        if cycle is None:  # uvicorn has a limit for the requests that follow the first alone
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        if self._silence is not None:
            self._silence.cancel()
        super().connection_lost(exc)


class _Uvicorn(uvicorn.Server):
    """uvicorn in a thread: told when it listens, and leaving no connection behind."""

    _listens: threading.Event | None = None

    async def serve_until_told(self, listener: socket.socket, listens: threading.Event) -> None:
        """Serve until :meth:`end`; ``listens`` is set when it does."""
        self._listens = listens
        await self.serve(sockets=[listener])
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await asyncio.sleep(0)  # in which they close

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets=sockets)
        if self._listens is not None:
            self._listens.set()
