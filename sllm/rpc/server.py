"""An RPC server of ggml in a child process, and the devices of servers that run already."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm import folders, hosts
from sllm.engine import ggml_rpc
from sllm.engine._ffi import check, checked_int, checked_seconds, ffi, lib
from sllm.engine.devices import Device
from sllm.engine.devices import devices as local_devices
from sllm.engine.handle import Closing
from sllm.errors import RPCError
from sllm.rpc.child import Child, ChildEndedError, ParentLink

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DEFAULT_PORT", "RPCServer", "add_server", "devices"]

DEFAULT_PORT = ggml_rpc.DEFAULT_PORT

log = logging.getLogger("sllm.rpc")

_START_SECONDS = 120.0
"""A server has to listen after this time: drivers are slow to start."""

_ATTEMPTS = 5
"""Ports to try where another process takes the one that was free."""

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

    It serves one client at a time, and ends with this process in whatever way that ends. A client can crash
    the server and can read and write the memory of its process: let nobody reach the port who may not use the
    machine.

    Args:
        host: where to listen: an IPv4 address, or ``"localhost"``.
        port: 0: any that is free, see :attr:`port`.
        cache: keep the weights that clients upload, so that a second load sends next to nothing: True: in
            ``rpc`` in the user's cache folder for sllm (``$SLLM_CACHE``); a path: there. The folder grows
            with every model; empty it by hand.
        devices: what to serve, from :func:`sllm.engine.devices.devices`, or names; None: the GPUs, or the CPU
            where there is none.
        n_threads: CPU threads; None: all cores.
        allow_public: listen on an address that others can reach. The protocol has no authentication and no
            encryption: only in a network where everybody may use this machine.

    Raises:
        ValueError: an argument out of range; an address that others can reach without ``allow_public``.
        OSError: the address is in use, or not this machine's; the cache folder cannot be made.
        RPCError: the server does not start; says why.
        UnsupportedModelError: this build has no RPC backend.

    Attributes:
        host, port: where it listens.
        memory: bytes that were free at the start and in all, for each device.

    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        cache: bool | str | os.PathLike[str] = True,
        devices: Sequence[Device | str] | None = None,
        n_threads: int | None = None,
        *,
        allow_public: bool = False,
    ) -> None:
        ggml_rpc.version()
        checked_int(port, "port", 0, 65535)
        if not hosts.is_loopback(host) and not allow_public:
            raise ValueError(
                f"an RPC server on {host} could be used by everybody who reaches its port, without a"
                " password: use 127.0.0.1 and `sllm worker --rpc`, which relays it over TLS with a token,"
                " or say allow_public=True"
            )
        try:
            address = socket.inet_ntoa(socket.inet_aton("127.0.0.1" if host == "localhost" else host))
        except OSError:
            raise ValueError(f"host is {host!r}, expected an IPv4 address of this machine") from None
        if n_threads is not None:
            checked_int(n_threads, "n_threads", 1, 4096)
        options = {
            "host": address,
            "cache": None
            if cache is False
            else str(_made(folders.cache_folder("rpc") if cache is True else Path(cache))),
            "devices": None if devices is None else _checked_names(devices),
            "n_threads": n_threads or os.cpu_count() or 1,
        }
        self.host = address
        self.port = port
        self.memory: tuple[tuple[int, int], ...] = ()
        self._child: Child | None = None
        super().__init__()
        for attempt in range(_ATTEMPTS):
            number = _free_port(address, port)
            if self._start(number, options):
                return
            if port or attempt == _ATTEMPTS - 1:
                raise OSError(f"cannot listen on {address}:{number}: somebody else does")

    def _start(self, port: int, options: dict[str, Any]) -> bool:
        """Start the process; False if another process has taken the port meanwhile."""
        child = Child("sllm.rpc.server:_serve", {"port": port, **options})
        try:
            reply = child.receive(_START_SECONDS)
            if "error" in reply:
                raise RPCError(f"the RPC server did not start: {reply['error']}")
            reached = "127.0.0.1" if self.host == "0.0.0.0" else self.host
            until = time.monotonic() + _START_SECONDS
            while not self._answers(f"{reached}:{port}"):
                if not child.alive or time.monotonic() > until:
                    if _is_taken(self.host, port):
                        child.close()
                        return False
                    raise RPCError(f"the RPC server did not start: {child.exit_reason()}")
                time.sleep(0.01)
            if not child.alive:  # another process has answered
                child.close()
                return False
        except (ChildEndedError, TimeoutError) as error:
            child.close()
            raise RPCError(f"the RPC server did not start: {error}") from None
        except BaseException:
            child.close()
            raise
        self.port, self._child = port, child
        return True

    def _answers(self, endpoint: str) -> bool:
        try:
            info = ggml_rpc.probe(endpoint, 1.0)
        except ggml_rpc.SilentError:
            return True  # it serves a client already
        except RPCError:
            return False
        self.memory = info.memory
        return True

    @property
    def endpoint(self) -> str:
        """``HOST:PORT``, for :func:`add_server`."""
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
        return self._child is not None and self._child.alive

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
        if child is not None:
            child.close()

    def __repr__(self) -> str:
        return f"<sllm.rpc.RPCServer {self.endpoint}{', closed' if self.closed else ''}>"


def _made(folder: Path) -> Path:
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _checked_names(wanted: Sequence[Device | str]) -> list[str]:
    names = [device.name if isinstance(device, Device) else device for device in wanted]
    known = [device.name for device in local_devices()]
    for name in names:
        if name not in known:
            raise ValueError(f"there is no device {name!r} to serve; there are {', '.join(known)}")
    if not names:
        raise ValueError("devices is empty, expected at least one; None: the GPUs, or the CPU")
    return names


def _free_port(host: str, port: int) -> int:
    """``port``, if no process listens there; for 0 any such port.

    Raises:
        OSError: the port is in use, or the address is not this machine's.

    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot listen on {host}:{port}: {error.strerror or error}"
            ) from error
        number: int = probe.getsockname()[1]
        return number


def _is_taken(host: str, port: int) -> bool:
    try:
        _free_port(host, port)
    except OSError:
        return True
    return False


# ---- the server's process


def _serve(
    parent: int, *, host: str, port: int, cache: str | None, devices: list[str] | None, n_threads: int
) -> None:
    """What the child process runs."""
    link = ParentLink(parent)
    every = local_devices()
    if devices is None:
        chosen = [d.index for d in every if d.type in ("gpu", "igpu")]
        chosen = chosen or [d.index for d in every if d.type == "cpu"]
    else:
        chosen = [d.index for name in devices for d in every if d.name == name]
    try:
        if cache is not None:
            _check_cache(Path(cache))
    except OSError as error:
        link.send({"error": f"the cache in {cache} cannot be used: {error.strerror or error}"})
        sys.exit(1)
    link.send({})
    indices = ffi.new("int32_t[]", chosen)
    folder = ffi.NULL if cache is None else ffi.new("char[]", os.fsencode(cache))
    check(lib.sllm_rpc_serve(f"{host}:{port}".encode(), folder, n_threads, indices, len(chosen)))


def _check_cache(folder: Path) -> None:
    """Delete files whose content does not have the hash that they are named by: the server would load them
    all the same, and one that was killed leaves half a file. A file is only hashed again when it has changed.
    """
    journal = folder / "checked.json"
    try:
        before = json.loads(journal.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    checked: dict[str, list[int]] = {}
    for path in sorted(folder.iterdir()):
        name = path.name
        if len(name) != 16 or set(name) - set("0123456789abcdef") or not path.is_file():
            continue
        state = path.stat()
        seen = [state.st_size, state.st_mtime_ns]
        if not isinstance(before, dict) or before.get(name) != seen:
            data = path.read_bytes()
            if f"{lib.sllm_rpc_hash(data, len(data)):016x}" != name:
                log.warning("%s is damaged and is deleted", path)
                path.unlink()
                continue
        checked[name] = seen
    with folders.replacing(journal) as draft:
        draft.write_text(json.dumps(checked), encoding="utf-8")
