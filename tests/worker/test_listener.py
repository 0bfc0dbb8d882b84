"""The open port: what strangers get of it, and that clients are carried byte for byte."""

from __future__ import annotations

import contextlib
import queue
import random
import socket
import stat
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from remote_worker import PATIENCE, n_threads, wait_until

from sllm.worker import listener as listening
from sllm.worker import rate
from sllm.worker.listener import Listener
from sllm.worker.passes import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OTHER = pytest.mark.skipif(sys.platform != "linux", reason="loopback has one address there")


class Server:
    """Stands where gRPC does: accepts what the listener brings."""

    def __init__(self, endpoint: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(endpoint.removeprefix("unix:"))
        self._listener.listen(64)
        self._accepted: queue.SimpleQueue[tuple[socket.socket, str]] = queue.SimpleQueue()
        self._all: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, name = self._listener.accept()
                connection.settimeout(PATIENCE)
                self._all.append(connection)
                self._accepted.put((connection, f"unix:{name}"))

    def next(self) -> tuple[socket.socket, str]:
        """A connection, and gRPC's name of its peer."""
        return self._accepted.get(timeout=PATIENCE)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for one in self._all:
            one.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[Listener, Server]]]:
    with contextlib.ExitStack() as stack:

        def make(**limits: Any) -> tuple[Listener, Server]:
            made = Listener("127.0.0.1", 0, Limits(**{"stranger_seconds": 60.0, **limits}))
            stack.callback(made.close)
            server = stack.enter_context(closing(Server(made.endpoint)))
            made.start()
            return made, server

        yield make
    assert n_threads("sllm-listener") == n_threads("sllm-connection") == 0


def connect(to: Listener, source: str = "127.0.0.1") -> socket.socket:
    made = socket.create_connection(("127.0.0.1", to.port), PATIENCE, (source, 0))
    made.settimeout(PATIENCE)
    return made


def is_over(connection: socket.socket) -> bool:
    """Whether the other side has closed it; waits for that."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def stands(connection: socket.socket, server: socket.socket) -> bool:
    connection.sendall(b"?")
    if server.recv(1) != b"?":
        return False
    server.sendall(b"!")
    return connection.recv(1) == b"!"


def exactly(connection: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        piece = connection.recv(n - len(data))
        assert piece
        data += piece
    return data


def test_of_a_stranger_24_kib_are_read_until_it_is_admitted(serve: Callable[..., Any]) -> None:
    listener, server = serve()
    sent = random.Random(1).randbytes(1 << 20)
    with connect(listener) as client:
        upload = threading.Thread(target=client.sendall, args=(sent,))
        upload.start()
        connection, peer = server.next()
        seen = exactly(connection, 24 << 10)
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(PATIENCE)
        connection.sendall(b"the way down is open")
        assert exactly(client, 20) == b"the way down is open"
        assert listener.admit(peer)
        assert seen + exactly(connection, len(sent) - len(seen)) == sent
        upload.join()
    assert listener.stats.admitted == 1


def test_what_a_call_has_sent_that_had_no_place_does_not_stand_in_the_way_of_the_next(
    serve: Callable[..., Any],
) -> None:
    listener, server = serve(connections=1)
    with connect(listener) as first, connect(listener) as client:
        by_name = dict(reversed(server.next()) for _ in range(2))
        first_peer, peer = sorted(by_name, key=lambda name: int(name.rpartition("/")[2]))
        assert listener.admit(first_peer)
        for _ in range(3):  # a window of HTTP/2, and the next call
            assert not listener.admit(peer)
            client.sendall(bytes(64 << 10) + b"the next call's headers")
            assert exactly(by_name[peer], (64 << 10) + 23).endswith(b"headers")
        assert stands(first, by_name[first_peer])


def test_bytes_are_carried_as_they_are_both_ways_at_once(serve: Callable[..., Any]) -> None:
    listener, server = serve()
    up, down = (random.Random(n).randbytes(8 << 20) for n in (1, 2))
    with connect(listener) as client:
        client.sendall(b"?")
        connection, peer = server.next()
        assert listener.admit(peer)
        senders = [
            threading.Thread(target=client.sendall, args=(up,)),
            threading.Thread(target=connection.sendall, args=(down,)),
        ]
        found: list[bytes] = []
        reader = threading.Thread(target=lambda: found.append(exactly(client, len(down))))
        for thread in (*senders, reader):
            thread.start()
        assert exactly(connection, 1 + len(up)) == b"?" + up
        for thread in (*senders, reader):
            thread.join()
        assert found == [down]
        connection.sendall(b"last words")
        connection.close()
        assert exactly(client, 10) == b"last words"
        assert is_over(client)


def test_a_stranger_has_its_time_and_a_client_all_of_it(serve: Callable[..., Any]) -> None:
    listener, server = serve(stranger_seconds=0.4)
    with connect(listener) as client:
        client.sendall(b"?")
        known, peer = server.next()
        assert listener.admit(peer)
        with connect(listener) as stranger, connect(listener) as chatty:
            chatty.sendall(bytes(1 << 16))
            assert is_over(stranger)
            assert is_over(chatty)
        wait_until(lambda: listener.stats.cut == 2)
        assert exactly(known, 1) == b"?"
        assert stands(client, known)


def test_the_oldest_stranger_makes_room(serve: Callable[..., Any]) -> None:
    listener, server = serve(strangers=8)
    with contextlib.ExitStack() as stack:
        clients, ends = [], []
        for _ in range(4):  # one after the other: threads bring them
            clients.append(stack.enter_context(connect(listener)))
            ends.append(server.next())
        assert listener.admit(ends[0][1])
        last = stack.enter_context(connect(listener))
        server.next()
        late = stack.enter_context(connect(listener))
        server.next()
        assert is_over(clients[1])  # the oldest that is not admitted
        assert listener.stats.evicted == 1
        for client, (connection, _) in zip(clients[2:], ends[2:], strict=True):
            assert stands(client, connection)
        assert stands(clients[0], ends[0][0])
        for one in (last, late):
            one.setblocking(False)
            with pytest.raises(BlockingIOError):
                one.recv(1)


@OTHER
def test_one_address_has_half_of_the_places(serve: Callable[..., Any]) -> None:
    listener, server = serve(strangers=4)
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(connect(listener, "127.0.0.9"))
        end, _ = server.next()
        for _ in range(10):
            stack.enter_context(connect(listener))
            server.next()
        assert listener.stats.evicted == 8
        assert stands(other, end)  # older than all of them
        for n in range(10, 14):
            stack.enter_context(connect(listener, f"127.0.0.{n}"))
            server.next()
        assert is_over(other)  # all places are taken, and it came first


def test_clients_have_places_of_their_own_and_no_more(serve: Callable[..., Any]) -> None:
    listener, server = serve(strangers=2, connections=2)
    with contextlib.ExitStack() as stack:
        ends = []
        for n in range(3):
            client = stack.enter_context(connect(listener))
            connection, peer = server.next()
            ends.append((client, connection))
            assert listener.admit(peer) == (n < 2)
        for pair in ends:
            assert stands(*pair)
        for one in ends.pop(0):
            one.close()
        wait_until(lambda: len(listener._places) == 2)
        assert listener.admit(peer)
        assert listener.admit(peer)
        assert listener.stats.admitted == 3


def test_calls_without_the_token_end_a_connection_and_count(
    serve: Callable[..., Any],
) -> None:
    listener, server = serve()
    with connect(listener) as client:
        client.sendall(b"?")
        connection, peer = server.next()
        assert exactly(connection, 1) == b"?"
        for _ in range(listening._REFUSALS - 1):
            listener.refuse(peer)
        assert stands(client, connection)
        for _ in range(int(2 * listening._BURST_SECONDS * listening._ACCEPTS_PER_ADDRESS)):
            listener.refuse(peer)
        connection.sendall(b"no")
        assert exactly(client, 2) == b"no"
        with contextlib.suppress(OSError):
            client.sendall(b"more")
        assert is_over(client)
    with connect(listener) as next_one:
        assert is_over(next_one)
    assert listener.stats.refused == 1
    assert listener.stats.cut == 1


def test_connections_that_show_a_token_do_not_count_among_those_of_strangers(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "_ACCEPTS_PER_ADDRESS", 2)
    monkeypatch.setattr(listening, "_ADMITTED_PER_ADDRESS", 4)
    monkeypatch.setattr(rate, "time", Clock())  # which stands still
    listener, server = serve()
    with contextlib.ExitStack() as stack:
        for n in range(4 * 4):  # a burst of them
            stack.enter_context(connect(listener))
            assert listener.admit(server.next()[1]), n
        for _ in range(10 * 2):  # and one of strangers
            stack.enter_context(connect(listener))
            _, peer = server.next()
        assert is_over(stack.enter_context(connect(listener)))
        assert listener.admit(peer)  # one more than that counts
        assert is_over(stack.enter_context(connect(listener)))
    assert listener.stats.refused == 2


class Clock:
    """A module ``time`` whose clock stands still."""

    @staticmethod
    def monotonic() -> float:
        return 0.0


def test_a_client_that_was_admitted_is_not_cut_for_a_wrong_call(serve: Callable[..., Any]) -> None:
    listener, server = serve()
    with connect(listener) as client:
        connection, peer = server.next()
        assert listener.admit(peer)
        for _ in range(100):
            listener.refuse(peer)
        assert stands(client, connection)


def test_nobody_else_reaches_the_server(serve: Callable[..., Any]) -> None:
    listener, _ = serve()
    folder = Path(listener.endpoint.removeprefix("unix:")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    listener.close()
    assert not folder.exists()
    listener.close()


def test_a_port_in_use(serve: Callable[..., Any]) -> None:
    listener, _ = serve()
    with pytest.raises(OSError, match="is the port in use"):
        Listener("127.0.0.1", listener.port, Limits())


def test_networks() -> None:
    same = listening._network("2001:db8:1:2::5"), listening._network("2001:db8:1:2:ffff::")
    assert same[0] == same[1] == "2001:db8:1:2::/64"
    assert listening._network("2001:db8:1:3::5") != same[0]
    assert listening._network("::ffff:192.0.2.7") == listening._network("192.0.2.7") == "192.0.2.7"
    assert listening._network("fe80::1%eth0") == "fe80::/64"


@pytest.mark.parametrize("name", ["connections", "strangers"])
def test_limits_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Limits(**{name: 0})  # type: ignore[arg-type] # hops are no number
