"""The emulated link: real sockets on both sides of it.

Times are only ever tested from below: a busy machine makes everything later and nothing sooner.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples

from sllm.cli.slow_link import Link, LinkStats
from sllm.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 60.0  # seconds until something that should happen is taken not to
QUIET = 0.2  # seconds in which something that should not happen would have happened


class FarEnd:
    """What is behind a link: a listening socket, whose connections a test holds in its hands."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.listener.settimeout(PATIENCE)
        self.address: tuple[str, int] = self.listener.getsockname()
        self._stack = contextlib.ExitStack()
        self._stack.callback(self.listener.close)

    def dial(self, link: Link) -> socket.socket:
        """Connect to the link; that returns before the far end hears of it."""
        client = self._stack.enter_context(socket.create_connection((link.host, link.port), PATIENCE))
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client

    def accept(self) -> socket.socket:
        """The connection that the link opens."""
        server, _ = self.listener.accept()
        self._stack.enter_context(server)
        server.settimeout(PATIENCE)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return server

    def connect(self, link: Link) -> tuple[socket.socket, socket.socket]:
        """Both ends of a connection through the link."""
        client = self.dial(link)
        return client, self.accept()

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def far_end() -> Iterator[FarEnd]:
    end = FarEnd()
    yield end
    end.close()


def receive(sock: socket.socket, n_bytes: int) -> bytes:
    """So many bytes, or fewer where the stream ends."""
    data = bytearray()
    while len(data) < n_bytes:
        chunk = sock.recv(min(n_bytes - len(data), 1 << 16))
        if not chunk:
            break
        data += chunk
    return bytes(data)


def receive_all(sock: socket.socket) -> tuple[bytes, bool]:
    """All bytes until the stream ends, and whether it was reset."""
    data = bytearray()
    while True:
        try:
            chunk = sock.recv(1 << 16)
        except ConnectionError:
            return bytes(data), True
        if not chunk:
            return bytes(data), False
        data += chunk


def send_until_it_fails(sock: socket.socket, data: bytes) -> bool:
    """Whether the sender has noticed a reset on the way. A socket says so only once: its reader will see an
    end.
    """
    try:
        sock.sendall(data)
    except ConnectionError:
        return True
    return False


def send_until_it_blocks(sock: socket.socket) -> int:
    """Write as long as any is taken; how many bytes that were."""
    sock.setblocking(False)
    block = bytes(1 << 16)
    n_bytes = 0
    while select.select([], [sock], [], QUIET)[1]:
        n_bytes += sock.send(block)
    sock.settimeout(PATIENCE)
    return n_bytes


def is_silent(sock: socket.socket) -> bool:
    """Whether neither bytes nor an end come."""
    return not select.select([sock], [], [], QUIET)[0]


def is_reset(sock: socket.socket) -> bool:
    return receive_all(sock)[1]


def round_trip(client: socket.socket, server: socket.socket, data: bytes = b"ping") -> float:
    """Seconds that ``data`` takes there and back."""
    began = time.monotonic()
    client.sendall(data)
    assert receive(server, len(data)) == data
    server.sendall(data)
    assert receive(client, len(data)) == data
    return time.monotonic() - began


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(int(PATIENCE / 0.01)):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")


def link_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sllm-link"]


def n_descriptors() -> int:
    return len(os.listdir("/dev/fd"))  # noqa: PTH208 - includes the listing's own, each time


def noise(n_bytes: int, seed: int) -> bytes:
    """Bytes in which every place is telling: none may be lost, doubled or moved without it showing."""
    return b"".join(struct.pack("<IH", i, seed & 0xFFFF) for i in range(n_bytes // 6 + 1))[:n_bytes]


# ---- what arrives


sizes = st.lists(st.integers(1, 60_000), max_size=6)


@examples(15)
@given(
    up=sizes,
    down=sizes,
    delay=st.sampled_from([0.0, 0.0007, 0.004]),
    jitter=st.sampled_from([0.0, 0.003]),
    mbit_s=st.sampled_from([None, 20.0, 900.0]),
    seed=st.integers(0, 1000),
)
def test_bytes_arrive_whole_and_in_order(
    up: list[int], down: list[int], delay: float, jitter: float, mbit_s: float | None, seed: int
) -> None:
    def talk(sock: socket.socket, data: bytes, pieces: list[int]) -> tuple[bytes, bool]:
        def write() -> None:
            at = 0
            for n in pieces:
                sock.sendall(data[at : at + n])
                at += n
            sock.shutdown(socket.SHUT_WR)

        writing = pool.submit(write)
        heard = receive_all(sock)
        writing.result()
        return heard

    data_up, data_down = noise(sum(up), seed), noise(sum(down), seed + 1)
    with (
        contextlib.closing(FarEnd()) as far_end,
        ThreadPoolExecutor() as pool,
        Link(far_end.address, delay=delay, jitter=jitter, mbit_s=mbit_s, seed=seed) as link,
    ):
        client, server = far_end.connect(link)
        at_client = pool.submit(talk, client, data_up, up)
        assert talk(server, data_down, down) == (data_up, False)
        assert at_client.result() == (data_down, False)
        assert link.stats.bytes_up == len(data_up)
        assert link.stats.bytes_down == len(data_down)


@examples(15)
@given(
    up=st.integers(0, 40_000),
    down=st.integers(0, 40_000),
    limit=st.integers(1, 100_000),
    delay=st.sampled_from([0.0, 0.001]),
    mbit_s=st.sampled_from([None, 50.0]),
)
def test_what_a_cut_connection_has_carried_is_a_beginning_of_what_was_sent(
    up: int, down: int, limit: int, delay: float, mbit_s: float | None
) -> None:
    data_up, data_down = noise(up, 1), noise(down, 2)
    with (
        contextlib.closing(FarEnd()) as far_end,
        ThreadPoolExecutor() as pool,
        Link(far_end.address, delay=delay, mbit_s=mbit_s, cut_after_bytes=limit) as link,
    ):
        client, server = far_end.connect(link)
        at_client, at_server = pool.submit(receive_all, client), pool.submit(receive_all, server)
        cut = up + down >= limit
        noticed = []
        for sock, data in ((client, data_up), (server, data_down)):
            noticed.append(send_until_it_fails(sock, data))
            if not cut:
                sock.shutdown(socket.SHUT_WR)
        got_down, client_reset = at_client.result()
        got_up, server_reset = at_server.result()

        assert data_up.startswith(got_up)
        assert data_down.startswith(got_down)
        assert [noticed[0] or client_reset, noticed[1] or server_reset] == [cut, cut]
        assert len(got_up) + len(got_down) == min(limit, up + down)
        assert link.stats.cuts == cut
        assert link.stats.bytes_up == len(got_up)
        assert link.stats.bytes_down == len(got_down)


def test_many_connections_at_once_are_kept_apart(far_end: FarEnd) -> None:
    n = 100
    with Link(far_end.address, delay=0.01, jitter=0.005, mbit_s=200) as link:
        clients = [far_end.dial(link) for _ in range(n)]
        servers = [far_end.accept() for _ in range(n)]
        for i, client in enumerate(clients):
            client.sendall(noise(3000, i))
        seen = set()
        for server in servers:
            data = receive(server, 3000)
            (i,) = struct.unpack("<H", data[4:6])
            assert data == noise(3000, i)
            seen.add(i)
            server.sendall(noise(2000, 1000 + i))
        for i, client in enumerate(clients):
            assert receive(client, 2000) == noise(2000, 1000 + i)
        assert seen == set(range(n))
        assert link.stats == LinkStats(3000 * n, 2000 * n, connections=n, turns=n, cuts=0)


# ---- how late


@pytest.mark.parametrize("delay", [0.001, 0.0123, 0.04])
def test_a_round_trip_takes_two_delays_at_least(far_end: FarEnd, delay: float) -> None:
    with Link(far_end.address, delay=delay) as link:
        client, server = far_end.connect(link)
        for _ in range(10):
            assert round_trip(client, server) >= 2 * delay


def test_opening_a_connection_takes_a_round_trip(far_end: FarEnd) -> None:
    with Link(far_end.address, delay=0.03) as link:
        began = time.monotonic()
        client = far_end.dial(link)
        client.sendall(b"x")
        server = far_end.accept()
        assert receive(server, 1) == b"x"
        assert time.monotonic() - began >= 3 * 0.03


def test_a_side_that_speaks_first_is_heard_a_delay_later(far_end: FarEnd) -> None:
    with Link(far_end.address, delay=0.03) as link:
        client, server = far_end.connect(link)
        began = time.monotonic()
        server.sendall(b"hello")
        assert receive(client, 5) == b"hello"
        assert time.monotonic() - began >= 0.03


def test_a_slow_wire_takes_the_time_of_its_bits(far_end: FarEnd) -> None:
    n_bytes = 125_000  # a megabit
    with Link(far_end.address, delay=0.01, mbit_s=5) as link, ThreadPoolExecutor() as pool:
        client, server = far_end.connect(link)
        for source, sink in ((client, server), (server, client)):
            began = time.monotonic()
            sending = pool.submit(source.sendall, bytes(n_bytes))
            assert len(receive(sink, n_bytes)) == n_bytes
            assert time.monotonic() - began >= 0.2 + 0.01
            sending.result()


def test_connections_share_the_wire_and_directions_do_not(far_end: FarEnd) -> None:
    n_bytes = 62_500  # half a megabit
    with Link(far_end.address, mbit_s=5) as link, ThreadPoolExecutor() as pool:
        pairs = [far_end.connect(link) for _ in range(3)]
        began = time.monotonic()
        sending = [pool.submit(client.sendall, bytes(n_bytes)) for client, _ in pairs]
        pairs[0][1].sendall(b"the other way")
        assert receive(pairs[0][0], 13) == b"the other way"
        for _, server in pairs:
            assert len(receive(server, n_bytes)) == n_bytes
        assert time.monotonic() - began >= 0.3
        for sent in sending:
            sent.result()


def test_jitter_only_adds_and_follows_its_seed(far_end: FarEnd) -> None:
    with Link(far_end.address, delay=0.002, jitter=0.02, seed=3) as link:
        client, server = far_end.connect(link)
        times = [round_trip(client, server) for _ in range(15)]
        assert min(times) >= 2 * 0.002
        assert sum(times) >= 15 * 0.01  # 2 * (.002 + .01) each on average, in this seed not far from it


def test_settings_may_change_while_the_link_runs(far_end: FarEnd) -> None:
    with Link(far_end.address) as link:
        client, server = far_end.connect(link)
        round_trip(client, server)
        link.delay = 0.03
        assert round_trip(client, server) >= 0.06
        link.delay, link.mbit_s = 0.0, 1.0
        assert round_trip(client, server, bytes(2500)) >= 0.04
        link.mbit_s, link.jitter = None, 0.001
        round_trip(client, server)
        assert (link.delay, link.mbit_s, link.jitter) == (0.0, None, 0.001)
        link.cut_after_bytes = 1
        client.sendall(b"x")
        assert is_reset(client)


def test_a_shorter_delay_lets_nothing_overtake(far_end: FarEnd) -> None:
    with Link(far_end.address, delay=0.1) as link:
        client, server = far_end.connect(link)
        client.sendall(b"first")
        time.sleep(0.01)
        link.delay = 0.0
        client.sendall(b"second")
        assert receive(server, 11) == b"firstsecond"


# ---- ends


def test_a_half_close_is_passed_on_after_the_delay(far_end: FarEnd) -> None:
    with Link(far_end.address, delay=0.02) as link:
        client, server = far_end.connect(link)
        began = time.monotonic()
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(server) == (b"question", False)
        assert time.monotonic() - began >= 0.02
        server.sendall(b"answer")
        assert receive(client, 6) == b"answer"
        began = time.monotonic()
        server.close()
        assert receive_all(client) == (b"", False)
        assert time.monotonic() - began >= 0.02
        assert link.stats.cuts == 0


def test_a_reset_is_passed_on_behind_what_came_before_it(far_end: FarEnd) -> None:
    with Link(far_end.address, delay=0.02) as link:
        for turned in (False, True):
            one, other = far_end.connect(link)[:: -1 if turned else 1]
            one.sendall(b"last words")
            time.sleep(0.005)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.close()
            assert receive_all(other) == (b"last words", True)
        assert link.stats.cuts == 0


def test_a_target_that_refuses_resets_the_client(far_end: FarEnd) -> None:
    far_end.listener.close()
    with Link(far_end.address, delay=0.005) as link:
        client = far_end.dial(link)
        assert send_until_it_fails(client, b"anybody there?") or is_reset(client)
        assert link.stats == LinkStats(connections=1)


def test_all_addresses_of_a_name_are_tried(far_end: FarEnd) -> None:
    """localhost is ::1 first on many machines, and the far end listens on 127.0.0.1 alone."""
    with Link(("localhost", far_end.address[1])) as link:
        round_trip(*far_end.connect(link))


# ---- faults


@pytest.mark.parametrize("n_bytes", [1, 999, 300_000])
def test_each_connection_is_cut_at_the_byte(far_end: FarEnd, n_bytes: int) -> None:
    data = noise(400_000, 0)
    with Link(far_end.address, cut_after_bytes=n_bytes) as link, ThreadPoolExecutor() as pool:
        for n in (1, 2):
            client, server = far_end.connect(link)
            sending = pool.submit(send_until_it_fails, client, data)
            assert receive_all(server) == (data[:n_bytes], True)
            assert sending.result() or is_reset(client)
            assert link.stats == LinkStats(bytes_up=n * n_bytes, connections=n, cuts=n)


def test_a_link_that_carries_nothing_at_all(far_end: FarEnd) -> None:
    with Link(far_end.address, delay=0.005, cut_after_bytes=0) as link:
        assert receive_all(far_end.dial(link)) == (b"", True)
        assert link.stats == LinkStats(connections=1, cuts=1)
    with Link(far_end.address, cut_after=0) as link:
        with contextlib.suppress(ConnectionResetError):  # or already while connecting
            assert is_reset(far_end.dial(link))
        wait_until(lambda: link.stats == LinkStats(connections=1, cuts=1))


def test_both_ways_count_together(far_end: FarEnd) -> None:
    with Link(far_end.address, cut_after_bytes=20) as link:
        client, server = far_end.connect(link)
        round_trip(client, server, b"12345678")  # 16 are gone
        client.sendall(b"abcdefgh")
        assert receive_all(server) == (b"abcd", True)
        assert is_reset(client)
        assert link.stats == LinkStats(bytes_up=12, bytes_down=8, connections=1, turns=2, cuts=1)


def test_each_connection_is_cut_at_its_time(far_end: FarEnd) -> None:
    with Link(far_end.address, cut_after=0.15) as link:
        for n in (1, 2):
            began = time.monotonic()
            client, server = far_end.connect(link)
            assert is_reset(client)
            assert is_reset(server)
            assert time.monotonic() - began >= 0.15
            assert link.stats.cuts == n
        link.cut_after = None
        client, server = far_end.connect(link)
        assert is_silent(client)


def test_a_stalled_link_moves_nothing_and_closes_nothing(far_end: FarEnd) -> None:
    with Link(far_end.address, delay=0.005, cut_after=30) as link:
        client, server = far_end.connect(link)
        round_trip(client, server)
        client.sendall(b"under way ")
        link.stall()
        link.stall()
        client.sendall(b"and behind")
        server.sendall(b"back")
        assert is_silent(server)
        assert is_silent(client)
        newcomer = far_end.dial(link)
        newcomer.sendall(b"new")
        assert is_silent(far_end.listener)
        link.resume()
        link.resume()
        assert receive(server, 20) == b"under way and behind"
        assert receive(client, 4) == b"back"
        assert receive(far_end.accept(), 3) == b"new"
        assert link.stats.cuts == 0


def test_the_links_time_stands_still_while_it_is_stalled(far_end: FarEnd) -> None:
    with Link(far_end.address, delay=0.1, cut_after=60) as link:
        client, server = far_end.connect(link)
        began = time.monotonic()
        client.sendall(b"x")
        link.stall()
        time.sleep(0.2)
        link.resume()
        assert receive(server, 1) == b"x"
        assert time.monotonic() - began >= 0.3


def test_a_stalled_link_can_be_cut(far_end: FarEnd) -> None:
    with Link(far_end.address) as link:
        client, server = far_end.connect(link)
        link.stall()
        newcomer = far_end.dial(link)
        link.cut()
        assert link.stats == LinkStats(connections=2, cuts=2)
        assert all(map(is_reset, (client, server, newcomer)))


def test_a_cut_ends_all_connections_and_welcomes_new_ones(far_end: FarEnd) -> None:
    with Link(far_end.address, delay=0.05) as link:
        pairs = [far_end.connect(link) for _ in range(5)]
        pairs[0][0].sendall(b"under way")
        link.cut()
        for client, server in pairs:
            assert receive_all(client) == (b"", True)
            assert receive_all(server) == (b"", True)
        assert link.stats.cuts == 5
        link.cut()
        assert link.stats.cuts == 5
        round_trip(*far_end.connect(link))


def test_a_link_that_is_down_refuses_and_keeps_what_it_has(far_end: FarEnd) -> None:
    with Link(far_end.address) as link:
        client, server = far_end.connect(link)
        address = (link.host, link.port)
        newcomer = far_end.dial(link)  # just in time
        for _ in range(2):
            link.down()
            link.down()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address, PATIENCE)
            round_trip(client, server)
            link.up()
            link.up()
            assert (link.host, link.port) == address
            round_trip(newcomer, far_end.accept())
            newcomer = far_end.dial(link)
        link.down()  # and may be closed so


def test_a_port_that_was_taken_while_the_link_was_down(far_end: FarEnd) -> None:
    with Link(far_end.address) as link:
        link.down()
        with (
            socket.create_server((link.host, link.port)),
            pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)),
        ):
            link.up()
        link.up()
        round_trip(*far_end.connect(link))


def test_new_connections_go_to_the_new_target(far_end: FarEnd) -> None:
    with contextlib.closing(FarEnd()) as other, Link(far_end.address) as link:
        old = far_end.connect(link)
        link.retarget(other.address)
        round_trip(*other.connect(link))
        round_trip(*old)
        assert f"-> 127.0.0.1:{other.address[1]}" in repr(link)


# ---- back-pressure


@pytest.mark.parametrize("fault", ["reader", "stall", "rate"])
def test_a_sender_is_made_to_wait(far_end: FarEnd, fault: str) -> None:
    far_end.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    with Link(far_end.address) as link:
        client, server = far_end.connect(link)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        if fault == "stall":
            link.stall()
        elif fault == "rate":
            link.mbit_s = 0.5
        n_bytes = send_until_it_blocks(client)

        # What fills 20 ms of 1 Gbit/s and 256 kB, four sockets' buffers (the kernel doubles what it is asked
        # for), and some.
        assert n_bytes < 2_500_000 + (1 << 18) + 6 * (1 << 19)
        link.resume()
        link.mbit_s = None
        assert len(receive(server, n_bytes)) == n_bytes


def test_a_reader_that_is_slow_holds_up_nobody_else(far_end: FarEnd) -> None:
    with Link(far_end.address, mbit_s=800) as link:
        stuck, _ = far_end.connect(link)
        pair = far_end.connect(link)
        send_until_it_blocks(stuck)
        for _ in range(5):
            round_trip(*pair)


def test_a_full_link_is_cut_and_closed_all_the_same(far_end: FarEnd) -> None:
    with Link(far_end.address, delay=0.01) as link:
        first, second = far_end.connect(link), far_end.connect(link)
        send_until_it_blocks(first[0])
        send_until_it_blocks(second[1])
        link.cut()
        assert is_reset(first[0])
        assert is_reset(second[1])
        third, _ = far_end.connect(link)
        send_until_it_blocks(third)
    assert is_reset(third)


# ---- counting


def test_counts(far_end: FarEnd) -> None:
    with Link(far_end.address) as link:
        assert link.stats == LinkStats()
        client, server = far_end.connect(link)
        for _ in range(3):
            round_trip(client, server, b"abc")
        expected = LinkStats(bytes_up=9, bytes_down=9, connections=1, turns=5)
        assert link.stats == expected
        assert link.reset_stats() == expected
        assert link.stats == LinkStats()
        client.sendall(b"abc")
        receive(server, 3)
        assert link.stats == LinkStats(bytes_up=3, turns=1)
    assert link.stats == LinkStats(bytes_up=3, turns=1)


# ---- life and death


def test_nothing_is_left_after_close(far_end: FarEnd) -> None:
    threads, descriptors = threading.active_count(), n_descriptors()
    for state in ("idle", "busy", "stalled", "down", "ended"):
        with contextlib.closing(FarEnd()) as end:
            link = Link(end.address, delay=0.01, mbit_s=10)
            pairs = [end.connect(link) for _ in range(3)]
            if state == "busy":
                for client, _ in pairs:
                    client.sendall(bytes(50_000))
            elif state == "stalled":
                link.stall()
            elif state == "down":
                link.down()
            elif state == "ended":
                for client, server in pairs:
                    client.close()
                    server.close()
            link.close()
            link.close()
            if state != "ended":
                assert all(is_reset(client) for client, _ in pairs)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((link.host, link.port), PATIENCE)
        assert threading.active_count() == threads
        assert n_descriptors() == descriptors


def test_a_connection_that_both_ends_have_closed_is_forgotten(far_end: FarEnd) -> None:
    with Link(far_end.address, cut_after=3600) as link:
        descriptors = n_descriptors()
        for _ in range(20):
            client, server = far_end.connect(link)
            client.close()
            assert receive_all(server) == (b"", False)
            server.close()
        wait_until(lambda: n_descriptors() <= descriptors)
        assert link.stats == LinkStats(connections=20)


def test_a_closed_link_says_so(far_end: FarEnd) -> None:
    link = Link(far_end.address, delay=0.025, mbit_s=50)
    shown = (
        f"<sllm.cli.slow_link.Link 127.0.0.1:{link.port} -> 127.0.0.1:{far_end.address[1]}, 25 ms, 50 Mbit/s"
    )
    assert repr(link) == f"{shown}>"
    closed = [link.closed]
    link.close()
    assert [*closed, link.closed] == [False, True]
    assert repr(link) == f"{shown}, closed>"
    for method in (link.stall, link.resume, link.cut, link.down, link.up, link.__enter__):
        with pytest.raises(ClosedError, match="link is closed"):
            method()
    with pytest.raises(ClosedError):
        link.retarget(far_end.address)


def test_a_link_that_is_lost_unclosed_warns_and_ends(far_end: FarEnd) -> None:
    def lose() -> socket.socket:
        client = far_end.dial(Link(far_end.address))
        gc.collect()
        return client

    gc.collect()
    before = link_threads()
    with pytest.warns(ResourceWarning, match=r"unclosed <sllm\.cli\.slow_link\.Link 127\.0\.0\.1"):
        client = lose()
    assert is_reset(client)
    wait_until(lambda: link_threads() == before)


def test_an_unclosed_link_does_not_keep_the_process() -> None:
    code = (
        "from sllm.cli.slow_link import Link; link = Link(('127.0.0.1', 1)); link.stall(); print(link.port)"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert int(ended.stdout)
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": -0.1}, "delay is -0.1"),
        ({"delay": float("nan")}, "delay is nan"),
        ({"jitter": float("inf")}, "jitter is inf"),
        ({"mbit_s": 0}, "mbit_s is 0"),
        ({"mbit_s": -5}, "mbit_s is -5"),
        ({"cut_after": -1}, "cut_after is -1"),
        ({"cut_after_bytes": -1}, "cut_after_bytes is -1"),
        ({"cut_after_bytes": 1.5}, r"cut_after_bytes is 1\.5"),
    ],
)
def test_numbers_out_of_range(far_end: FarEnd, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Link(far_end.address, **options)
    with Link(far_end.address) as link:
        for name, value in options.items():
            with pytest.raises(ValueError, match=message):
                setattr(link, name, value)
        round_trip(*far_end.connect(link))


def test_addresses_that_cannot_be(far_end: FarEnd) -> None:
    gc.collect()
    for target, port in ((("127.0.0.1", 65536), 0), (far_end.address, -1)):
        with pytest.raises(ValueError, match="expected 0 to 65535"):
            Link(target, port=port)
    descriptors = n_descriptors()
    with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
        Link(far_end.address, port=far_end.address[1])
    with pytest.raises(OSError, match=r"\[Errno"):
        Link(("no.such.host.invalid", 1))
    assert n_descriptors() == descriptors
    assert not link_threads()


# ---- the command line


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], tuple[str, int]]]:
    """``python -m sllm.cli.slow_link`` on a free port, and where it says that it listens."""
    with subprocess.Popen(
        [sys.executable, "-m", "sllm.cli.slow_link", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line.startswith("listening on 127.0.0.1:"), process.communicate(timeout=PATIENCE)
            yield process, ("127.0.0.1", int(line.split()[2].rpartition(":")[2]))
        finally:
            process.kill()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_command_line(far_end: FarEnd, ending: signal.Signals) -> None:
    target = f"127.0.0.1:{far_end.address[1]}"
    options = ["--delay-ms", "20", "--mbit", "50", "--jitter-ms", "1", "--cut-after-bytes", "12"]
    with running(target, *options) as (process, address):
        with socket.create_connection(address, PATIENCE) as client:
            server = far_end.accept()
            assert round_trip(client, server) >= 0.04
            client.sendall(b"abcdefgh")
            assert receive_all(server) == (b"abcd", True)
        process.send_signal(ending)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert out == "bytes_up=8 bytes_down=4 connections=1 turns=2 cuts=1\n"
    assert err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["0", "nowhere"],
        ["0", "localhost:99999"],
        ["0", "localhost:1", "--mbit", "0"],
        ["0", "localhost:1", "--delay-ms", "soon"],
        ["0", "localhost:1", "--cut-after-bytes", "-1"],
        ["70000", "localhost:1"],
        ["0", "no.such.host.invalid:1"],
    ],
)
def test_command_line_errors_are_one_line(arguments: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "sllm.cli.slow_link", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="sets the limits of another process")
def test_a_link_outlives_a_lack_of_descriptors(far_end: FarEnd) -> None:
    with running(f"127.0.0.1:{far_end.address[1]}") as (process, address):
        # Enough to run, and for a few connections.
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (20, 20))
        with contextlib.ExitStack() as stack:
            for _ in range(40):
                with contextlib.suppress(ConnectionResetError):  # no descriptor is left for the other side
                    stack.enter_context(socket.create_connection(address, PATIENCE))
            served = far_end.accept()
            newest = stack.enter_context(socket.create_connection(address, PATIENCE))
            assert is_silent(newest)  # left waiting until there are descriptors again
        answering = threading.Event()

        def serve() -> None:
            while not answering.is_set():
                with far_end.accept() as server:
                    send_until_it_fails(server, b"yes")

        with ThreadPoolExecutor() as pool:
            serving = pool.submit(serve)
            served.close()
            for _ in range(100):
                with (
                    contextlib.suppress(ConnectionResetError),
                    socket.create_connection(address, PATIENCE) as client,
                ):
                    if receive_all(client)[0] == b"yes":
                        break
            else:
                pytest.fail("the link has not come back")
            answering.set()
            with socket.create_connection(address, PATIENCE):
                serving.result()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
