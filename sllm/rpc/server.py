"""An RPC server of ggml in a child process, and the devices of servers that run already."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm import folders, hosts
from sllm.engine import ggml_rpc
from sllm.engine._ffi import checked_int, checked_seconds
from sllm.engine.devices import Device
from sllm.engine.devices import devices as local_devices
from sllm.engine.handle import Closing
from sllm.errors import RPCError
from sllm.rpc import confine
from sllm.rpc.cache import DEFAULT_BYTES, TensorCache
from sllm.rpc.child import Child, ChildEndedError
from sllm.rpc.handover import Handover
from sllm.rpc.loopback import LOOPBACK, TELLS_USERS, LoopbackPort, keep_alive

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["DEFAULT_PORT", "RPCServer", "add_server", "devices"]

DEFAULT_PORT = ggml_rpc.DEFAULT_PORT

log = logging.getLogger("sllm.rpc")

_START_SECONDS = 120.0
"""A server has to be ready after this time: drivers are slow to start."""

_known: dict[str, list[Device]] = {}
_lock = threading.Lock()


def add_server(endpoint: str, *, timeout: float = 5.0) -> list[Device]:
    """The devices of an RPC server, for ``Model(devices=...)`` and ``LocalTarget(devices=...)``.

    The server is asked, in at most ``timeout`` seconds, and nothing is loaded or registered yet. An endpoint
    that was added before has the same devices, also while a model occupies the server.

    Args:
        endpoint: ``"HOST:PORT"``, a name or an IPv4 address; without a port, 50052.
        timeout: seconds.

    Raises:
        RPCError: says which: a closed port, no answer, a web server or another that speaks no RPC, a server
            of another version of the protocol, one that says nothing.
        ValueError: not ``HOST:PORT``.
        UnsupportedModelError: this build has no RPC backend.

    """
    timeout = checked_seconds(timeout, "timeout")
    host, port = ggml_rpc.split(endpoint)
    endpoint = f"{host}:{port}"
    with _lock:
        known = _known.get(endpoint)
    try:
        info = ggml_rpc.probe(endpoint, timeout if known is None else min(timeout, 1.0))
    except ggml_rpc.SilentError:
        if known is None:
            raise
        return list(known)  # busy, most likely with a model of this process
    found = [
        Device(
            i, f"RPC{i}[{endpoint}]", f"device {i} of the RPC server {endpoint}", "gpu", free, total, endpoint
        )
        for i, (free, total) in enumerate(info.memory)
    ]
    with _lock:
        if known is None or len(known) != len(found):
            _known[endpoint] = found
        return list(_known[endpoint])


def devices(endpoint: str | None = None) -> list[Device]:
    """The devices of all servers added so far, or of one of them, as they were then."""
    with _lock:
        if endpoint is None:
            return [device for found in _known.values() for device in found]
        host, port = ggml_rpc.split(endpoint)
        return list(_known.get(f"{host}:{port}", ()))


class RPCServer(Closing):
    """Serves this machine's devices by ggml's RPC, from a process of its own, until :meth:`close`.

    This process takes the connections, of this user alone where the system tells (Linux does), and hands them
    over one at a time; it keeps the cache, too. The other one has neither its environment nor its open files,
    checks what clients send (csrc/rpc_server.cpp), and is confined where the system can do that
    (:attr:`confinement`): whoever gets the better of it has the devices and no more. It ends with this
    process in whatever way that ends.

    Args:
        host: where to listen: an IPv4 address, or ``"localhost"``.
        port: 0: any that is free, see :attr:`port`; None: nowhere, for :meth:`connect` alone.
        cache: keep the weights that clients upload, so that a second load sends next to nothing: True: in
            ``rpc`` in the user's cache folder for sllm (``$SLLM_CACHE``); a path: there.
        devices: what to serve, from :func:`sllm.engine.devices.devices`, or names; None: the GPUs, or the CPU
            where there is none.
        n_threads: CPU threads; None: all cores.
        allow_public: listen on an address that others can reach. The protocol has no authentication and no
            encryption: only in a network where everybody may use this machine.
        cache_size: bytes of all kept weights together; those that were not used the longest go first.
        one_client: end the process behind a client that has had memory there, so that none meets what another
            has left; then :attr:`alive` is False, and another server has to be made.

    Raises:
        ValueError: an argument out of range; an address that others can reach without ``allow_public``.
        OSError: the address is in use, or not this machine's; the cache folder cannot be made.
        RPCError: the server does not start; says why.
        UnsupportedModelError: this build has no RPC backend.

    Attributes:
        host, port: where it listens; ``port`` is None where it does not.
        memory: bytes that were free at the start and in all, for each device.
        confinement: what keeps the process from doing more than it should.

    """

    def __init__(
        self,
        host: str = LOOPBACK,
        port: int | None = 0,
        cache: bool | str | os.PathLike[str] = True,
        devices: Sequence[Device | str] | None = None,
        n_threads: int | None = None,
        *,
        allow_public: bool = False,
        cache_size: int = DEFAULT_BYTES,
        one_client: bool = False,
    ) -> None:
        ggml_rpc.version()
        if port is not None:
            checked_int(port, "port", 0, 65535)
        checked_int(cache_size, "cache_size", 1, 1 << 62)
        if not hosts.is_loopback(host) and not allow_public:
            raise ValueError(
                f"an RPC server on {host} could be used by everybody who reaches its port, without a"
                " password: use 127.0.0.1 and `sllm worker --rpc`, which relays it over TLS with a token,"
                " or say allow_public=True"
            )
        try:
            address = socket.inet_ntoa(socket.inet_aton(LOOPBACK if host == "localhost" else host))
        except OSError:
            raise ValueError(f"host is {host!r}, expected an IPv4 address of this machine") from None
        if n_threads is not None:
            checked_int(n_threads, "n_threads", 1, 4096)
        options = {
            "devices": None if devices is None else _checked_names(devices),
            "n_threads": n_threads or os.cpu_count() or 1,
            "once": one_client,
        }
        only_ours = port is not None and hosts.is_loopback(address) and TELLS_USERS
        kept = None
        if cache is not False:
            folder = folders.cache_folder("rpc") if cache is True else Path(cache)
            kept = TensorCache(folder, cache_size, by_name=only_ours)
        self.host = address
        self.port = port
        self._child: Child | None = None
        with ExitStack() as stack:
            control = self._start(kept is not None, options, stack)
            lost = _Lost()
            self._handover = Handover(control, kept, once=one_client, on_end=lost)
            stack.callback(self._handover.close)
            self._port: LoopbackPort | None = None
            if port is not None:
                self._port = self._listen(port, for_all=not hosts.is_loopback(address))
                self.port = self._port.port
                lost.watch(self._port)
            stack.pop_all()
        super().__init__()

    def _start(self, cache: bool, options: dict[str, Any], stack: ExitStack) -> socket.socket:
        """Start the process; this end of the socket to it."""
        control, theirs = socket.socketpair()
        with theirs:
            stack.callback(control.close)
            options = {**options, "control": theirs.fileno(), "cache": cache}
            child = Child(
                "sllm.rpc.serving:serve",
                options,
                environment=confine.environment(),
                descriptors=[theirs.fileno()],
            )
        stack.callback(child.close)
        try:
            reply = child.receive(_START_SECONDS)
        except (ChildEndedError, TimeoutError) as error:
            raise RPCError(f"the RPC server did not start: {error}") from None
        self.memory: tuple[tuple[int, int], ...] = tuple((free, total) for free, total in reply["memory"])
        self.confinement = confine.Confinement(**reply["confinement"])
        self._child = child
        log.log(
            logging.INFO if self.confinement.complete else logging.WARNING,
            "the RPC server's process %d is %s",
            child.pid,
            self.confinement,
        )
        return control

    def _listen(self, port: int, *, for_all: bool) -> LoopbackPort:
        try:
            return LoopbackPort(
                _without_delay(self._handover), "sllm-rpc-server", host=self.host, port=port, for_all=for_all
            )
        except OSError as error:
            raise OSError(
                error.errno, f"cannot listen on {self.host}:{port}: {error.strerror or error}"
            ) from error

    def connect(self, on_done: Callable[[], object] | None = None) -> socket.socket:
        """A connection to the server that goes over no port: one end of a pair of sockets. It is served when
        those before it have ended.

        Args:
            on_done: called on another thread when the process is done with this connection, or has ended;
                that is some time after this end is closed.

        Raises:
            RPCError: the server has ended.

        """
        if not self.alive:
            raise RPCError("the RPC server has ended")
        ours, theirs = socket.socketpair()

        def serve() -> None:
            try:
                self._handover.serve(theirs)
            finally:
                if on_done is not None:
                    on_done()

        threading.Thread(target=serve, name="sllm-rpc-connection", daemon=True).start()
        return ours

    @property
    def endpoint(self) -> str:
        """``HOST:PORT``, for :func:`add_server`.

        Raises:
            ValueError: the server listens nowhere.

        """
        if self.port is None:
            raise ValueError("the RPC server listens on no port; use connect()")
        return f"{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """The server's process id."""
        if self._child is None:
            raise ValueError("the RPC server is closed")
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._child is not None and self._child.alive and not self._handover.ended

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._child is None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the process has ended by itself, ``timeout`` seconds at most; whether it has."""
        until = None if timeout is None else time.monotonic() + timeout
        while self.alive and (until is None or time.monotonic() < until):
            time.sleep(0.05 if until is None else min(0.05, max(until - time.monotonic(), 0.0)))
        return not self.alive

    def close(self) -> None:
        """End the process and wait until it is gone. More calls do nothing."""
        if self._in_fork:
            return
        child, self._child = self._child, None
        if child is None:
            return
        if self._port is not None:
            self._port.hang_up()
        child.close()
        self._handover.close()
        if self._port is not None:
            self._port.join()

    def __repr__(self) -> str:
        where = "without a port" if self.port is None else self.endpoint
        return f"<sllm.rpc.RPCServer {where}{', closed' if self.closed else ''}>"


class _Lost:
    """Stops listening when there is nobody any more to hand connections to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lost = False
        self._port: LoopbackPort | None = None

    def watch(self, port: LoopbackPort) -> None:
        with self._lock:
            self._port = port
            if self._lost:
                port.hang_up()

    def __call__(self) -> None:
        with self._lock:
            self._lost = True
            if self._port is not None:
                self._port.hang_up()


def _without_delay(handover: Handover) -> Callable[[socket.socket], None]:
    """Small requests are not to wait for each other, nor a connection for a machine that is gone."""

    def serve(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(connection)
        handover.serve(connection)

    return serve


def _checked_names(wanted: Sequence[Device | str]) -> list[str]:
    names = [device.name if isinstance(device, Device) else device for device in wanted]
    known = [device.name for device in local_devices()]
    for name in names:
        if name not in known:
            raise ValueError(f"there is no device {name!r} to serve; there are {', '.join(known)}")
    if not names:
        raise ValueError("devices is empty, expected at least one; None: the GPUs, or the CPU")
    return names
