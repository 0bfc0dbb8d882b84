"""The process that serves RPC, from the side of clients that do not keep to the rules."""

from __future__ import annotations

import random
import re
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pinned_source import VENDOR
from remote_worker import n_threads, wait_until
from rpc_client import (
    ADD,
    ALLOC,
    ALLOC_SIZE,
    BASE,
    CLEAR,
    COMPUTE,
    COPY,
    COUNT,
    FOREIGN,
    FREE,
    GET,
    HASH,
    HELLO,
    INIT,
    MEMORY,
    MEMSET,
    RECOMPUTE,
    SCALE,
    SET,
    TRAINING,
    Client,
    graph,
    tensor,
)
from rpc_endpoints import OURS, gone

from sllm.errors import RPCError
from sllm.rpc.server import RPCServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EIGHT = struct.pack("<8f", *range(8))
BIG = 2**64 - 1


@pytest.fixture(scope="module")
def server() -> Iterator[RPCServer]:
    with RPCServer(port=None, cache=False, n_threads=1) as server:
        yield server


def reasons(server: RPCServer) -> list[str]:
    assert server._child is not None
    return list(server._child._lines)


def one(base: int, buffer: int = 1, **fields: Any) -> bytes:
    return tensor(buffer=buffer, data=base, **fields)


def doubled(base: int, **fields: Any) -> list[bytes]:
    """A graph's tensors: 2 is twice 1."""
    factor = struct.unpack("<i", struct.pack("<f", 2.0))[0]
    node = {"id": 2, "op": SCALE, "op_params": (factor,), "src": (1,), "flags": 16, **fields}
    return [one(base), one(base + 64, **node)]


# ---- what is right -------------------------------------------------------------------------------------


def test_everything_that_honest_clients_do(server: RPCServer) -> None:
    with Client(server) as client:
        assert client.hello[:3] == OURS and not any(client.hello[4:])
        assert struct.unpack("<I", client.ask(COUNT)) == (1,)
        assert struct.unpack("<QQ", client.ask(MEMORY, bytes(4))) == server.memory[0]
        number, base = client.allocate(4096)
        t = one(base, number)
        client.set(t, EIGHT)
        assert client.get(t, 32) == EIGHT
        client.set(t, EIGHT[:8], 8)
        assert client.get(t, 16) == EIGHT[:8] * 2
        client.send(MEMSET, t + struct.pack("<QQB", 4, 4, 7))
        assert client.get(t, 8, 4) == b"\7" * 4 + EIGHT[:4]
        assert client.ask(COPY, t + one(base + 64, number)) == b"\1"
        assert client.get(one(base + 64, number), 32) == client.get(t, 32)
        assert client.ask(COPY, t + one(base + 64, number, type=1, nb=(2, 16, 16, 16))) == b"\0"
        client.send(INIT, t)
        assert struct.unpack("<Q", client.ask(ALLOC_SIZE, bytes(4) + t + tensor(id=0) * 10)) == (32,)
        client.set(t, EIGHT)
        client.send(COMPUTE, graph([2], doubled(base)))
        result = one(base + 64, number)
        assert struct.unpack("<8f", client.get(result, 32)) == tuple(2.0 * i for i in range(8))
        client.set(t, EIGHT[::-1])
        client.send(RECOMPUTE, bytes(4))
        assert client.get(result, 32) != EIGHT
        client.send(CLEAR, struct.pack("<QB", number, 9))
        assert client.get(t, 32) == b"\x09" * 32
        client.send(FREE, struct.pack("<Q", number))
        client.send(RECOMPUTE, bytes(4))  # it would read what is freed
        assert client.hung_up()


def test_no_address_of_the_process_leaves_it(server: RPCServer) -> None:
    for _ in range(2):
        with Client(server) as client:
            assert [client.allocate(1 << 20)[0] for _ in range(3)] == [1, 2, 3]
            number, base = client.allocate(1)
            assert (number, base) == (4, (1 << 32) + 3 * (3 << 20))


def test_one_client_takes_its_process_along() -> None:
    before = n_threads("sllm-rpc-handover")
    with RPCServer(port=None, cache=False, n_threads=1, one_client=True) as server:
        pid = server.pid
        with Client(server) as client:
            assert client.ask(COUNT)
        with Client(server) as client:  # it was only asked
            assert client.allocate(64)[0] and server.alive
        wait_until(lambda: not server.alive and gone(pid))
        with pytest.raises(RPCError, match="has ended"):
            server.connect()
    assert n_threads("sllm-rpc-handover") == before


def test_done_is_told_when_it_is_known_whether_another_is_served() -> None:
    """Right after a client's end, the process that ends with it seems to be there still."""
    seen: list[bool] = []
    with RPCServer(port=None, cache=False, n_threads=1, one_client=True) as server:
        for n_bytes, served in ((0, True), (64, False)):
            with Client(server.connect(on_done=lambda: seen.append(server.alive))) as client:
                assert client.ask(COUNT)
                assert n_bytes == 0 or client.allocate(n_bytes)
            wait_until(lambda: seen)
            assert seen.pop() is served


def test_a_process_that_dies_closes_its_connections() -> None:
    with (
        RPCServer(cache=False, n_threads=1) as server,
        Client(server) as client,
        Client(server, greet=False) as waiting,
    ):
        client.send(COUNT)
        assert client.answer()
        server._child._process.kill()  # type: ignore[union-attr]
        assert client.hung_up() and waiting.hung_up()
        wait_until(lambda: not server.alive)


# ---- what is wrong -------------------------------------------------------------------------------------

ATTACKS: dict[str, tuple[str, Any]] = {
    "a command that is none": ("no command", lambda c, b: c.send(18)),
    "another greeting": ("no command", lambda c, b: c.send(HELLO, bytes(24))),
    "too many bytes": ("the size of its command's", lambda c, b: c.send(COUNT, b"x")),
    "a request of 2**64 - 1 bytes": ("the size of its command's", lambda c, b: c.send(FREE, size=BIG)),
    "a tensor of 2**64 - 1 bytes": ("a tensor that is too large", lambda c, b: c.send(SET, size=BIG)),
    "half a tensor": ("not there", lambda c, b: c.send(SET, bytes(100))),
    "half a tensor's hash": ("the size of its command's", lambda c, b: c.send(HASH, bytes(313))),
    "a device that is not there": ("no such device", lambda c, b: c.send(ALLOC, struct.pack("<IQ", 1, 8))),
    "a buffer by its address": ("no such buffer", lambda c, b: c.send(BASE, struct.pack("<Q", b))),
    "a buffer freed twice": ("no such buffer", lambda c, b: [c.send(FREE, struct.pack("<Q", 1))] * 2),
    "data before the buffer": ("outside its buffer", lambda c, b: c.set(one(b - 1), EIGHT)),
    "data behind the buffer": ("outside its buffer", lambda c, b: c.set(one(b + 4065), EIGHT)),
    "data at the end of memory": ("outside its buffer", lambda c, b: c.set(one(BIG - 31), EIGHT)),
    "data without a buffer": ("data in no buffer", lambda c, b: c.send(INIT, tensor(data=b))),
    "data in another's buffer": ("data in no buffer", lambda c, b: c.send(INIT, one(b, buffer=9))),
    "no data": ("without data", lambda c, b: c.set(tensor(), EIGHT)),
    "bytes behind a tensor": ("bytes outside", lambda c, b: c.set(one(b), EIGHT, 4)),
    "bytes far behind a tensor": ("bytes outside", lambda c, b: c.set(one(b), EIGHT, BIG - 3)),
    "to read behind a tensor": (
        "bytes outside",
        lambda c, b: c.send(GET, one(b) + struct.pack("<QQ", 8, 32)),
    ),
    "to read 2**64 - 1 bytes": (
        "bytes outside",
        lambda c, b: c.send(GET, one(b) + struct.pack("<QQ", 1, BIG)),
    ),
    "to fill behind a tensor": (
        "bytes outside",
        lambda c, b: c.send(MEMSET, one(b) + struct.pack("<QQB", 0, 33, 1)),
    ),
    "a type that is none": ("no type", lambda c, b: c.set(one(b, type=1000), EIGHT)),
    "a type that is no more": ("no more", lambda c, b: c.set(one(b, type=4), EIGHT)),
    "part of a block": ("part of a block", lambda c, b: c.set(one(b, type=8), EIGHT)),
    "dimensions that wrap around": (
        "too large",
        lambda c, b: c.set(one(b, ne=(1 << 30, 1 << 30, 4, 1), nb=(0, 0, 0, 0)), EIGHT),
    ),
    "strides that wrap around": (
        "too large",
        lambda c, b: c.set(one(b, ne=(1, 2**31 - 1, 1, 1), nb=(4, 2**32 - 1, 0, 0)), EIGHT),
    ),
    "an operation that is none": ("no operation", lambda c, b: c.send(INIT, one(b, op=101))),
    "a graph that was not computed": ("never computed", lambda c, b: c.send(RECOMPUTE, bytes(4))),
    "a graph without nodes": ("too many nodes", lambda c, b: c.send(COMPUTE, graph([], []))),
    "nodes that are not sent": (
        "too many nodes",
        lambda c, b: c.send(COMPUTE, struct.pack("<III", 0, 2**32 - 1, 0)),
    ),
    "tensors that are not sent": (
        "the size that it says",
        lambda c, b: c.send(COMPUTE, struct.pack("<IIQI", 0, 1, 1, 2**32 - 1)),
    ),
    "a graph of 2**40 bytes": ("too large", lambda c, b: c.send(COMPUTE, size=1 << 40)),
    "a node that is not there": (
        "not there, or there twice",
        lambda c, b: c.send(COMPUTE, graph([3], doubled(b))),
    ),
    "a node twice": (
        "not there, or there twice",
        lambda c, b: c.send(COMPUTE, graph([2, 2], doubled(b))),
    ),
    "node 0": ("not there, or there twice", lambda c, b: c.send(COMPUTE, graph([0], doubled(b)))),
    "a source that is not there": (
        "a source that is not there",
        lambda c, b: c.send(COMPUTE, graph([2], doubled(b, src=(7,)))),
    ),
    "a source without data": (
        "data in no buffer",
        lambda c, b: c.send(COMPUTE, graph([2], [tensor(), doubled(b)[1]])),
    ),
    "a result without room": (
        "without room",
        lambda c, b: c.send(COMPUTE, graph([2], [one(b), tensor(id=2, op=ADD, src=(1, 1), flags=16)])),
    ),
    "two tensors with one name": (
        "with one name",
        lambda c, b: c.send(COMPUTE, graph([2], [*doubled(b), one(b)])),
    ),
    "a view of itself": (
        "a view of a view",
        lambda c, b: c.send(COMPUTE, graph([2], doubled(b, view_src=2))),
    ),
}
for _name, _number in FOREIGN.items():
    ATTACKS[_name] = (
        "a function to call",
        lambda c, b, n=_number: c.send(COMPUTE, graph([2], doubled(b, op=n, op_params=(0x41414141, 0x4141)))),
    )
for _name, _number in TRAINING.items():
    ATTACKS[_name] = (
        "of training",
        lambda c, b, n=_number: c.send(COMPUTE, graph([2], doubled(b, op=n))),
    )


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_refused(server: RPCServer, attack: str) -> None:
    words, act = ATTACKS[attack]
    with Client(server) as client:
        _, base = client.allocate(4096)
        act(client, base)
        if attack == "a buffer freed twice":
            client.send(FREE, struct.pack("<Q", 1))
        assert client.hung_up()
    with Client(server) as client:  # the next one is served by the same process
        assert client.ask(COUNT)
    assert server.alive
    wait_until(lambda: words in reasons(server)[-1], words)


@pytest.mark.parametrize(
    "first", [b"", bytes([COUNT]) + bytes(8), struct.pack("<BQ", HELLO, BIG), struct.pack("<BQ", HELLO, 0)]
)
def test_what_is_no_greeting(server: RPCServer, first: bytes) -> None:
    with Client(server, greet=False) as client:
        client.socket.sendall(first)
        client.socket.shutdown(1)
        assert client.hung_up()
    with Client(server) as client:
        assert client.ask(COUNT)


def test_memory_has_bounds(server: RPCServer) -> None:
    total = server.memory[0][1]
    with Client(server) as client:
        assert client.allocate(BIG) == client.allocate(total + 1) == (0, 0)
        assert client.allocate(total - (1 << 20))[0]  # none of it is touched
        assert client.allocate(2 << 20) == (0, 0)
        client.send(FREE, struct.pack("<Q", 1))
        assert client.allocate(2 << 20)[0]
    with Client(server) as client:
        made = 0
        for _ in range((1 << 14) // 128 + 1):  # many at a time
            for _ in range(128):
                client.send(ALLOC, struct.pack("<IQ", 0, 1))
            made += sum(client.answer() != bytes(16) for _ in range(128))
        assert made == 1 << 14


def session(client: Client, mutate: Callable[[bytes], bytes]) -> None:
    """An honest client's requests, with one chance each to become something else."""
    _, base = client.allocate(4096)
    t = one(base)
    client.send(SET, mutate(t + struct.pack("<BQ", 0, 0) + EIGHT))
    client.send(HASH, mutate(t + bytes(16)))
    client.send(MEMSET, mutate(t + struct.pack("<QQB", 0, 8, 1)))
    client.send(COPY, mutate(t + one(base + 64)))
    client.send(INIT, mutate(t))
    client.send(ALLOC_SIZE, mutate(bytes(4) + t + tensor(id=0) * 10))
    client.send(BASE, mutate(struct.pack("<Q", 1)))
    client.send(GET, mutate(t + struct.pack("<QQ", 0, 32)))
    client.send(FREE, mutate(struct.pack("<Q", 1)))
    client.socket.shutdown(1)
    while client.socket.recv(1 << 16):
        pass


def test_mutants_end_their_connection_at_most(server: RPCServer) -> None:
    rng = random.Random(14)
    pid = server.pid

    def mutate(request: bytes) -> bytes:
        data = bytearray(request)
        if rng.random() < 0.3:
            at = rng.randrange(len(data))
            width = rng.choice([1, 4, 8])
            data[at : at + width] = rng.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * len(
                data[at : at + width]
            )
        return bytes(data) if rng.random() < 0.97 else bytes(data[: rng.randrange(len(data))])

    for _ in range(400):
        with Client(server) as client, suppress(OSError):
            session(client, mutate)
    with Client(server) as client:
        assert client.ask(COUNT)
    assert server.pid == pid and server.alive


def test_the_pinned_protocol_is_the_one_that_is_served() -> None:
    source = VENDOR / "source/ggml/src/ggml-rpc/ggml-rpc.cpp"
    if not source.is_file():
        pytest.skip("llama.cpp's sources are not here")
    text = source.read_text(encoding="utf-8")
    commands = re.findall(r"^    RPC_CMD_(\w+)", text.partition("enum rpc_cmd {")[2].partition("};")[0], re.M)
    ours = (Path(__file__).parents[2] / "csrc/rpc_server.cpp").read_text(encoding="utf-8")
    served = re.findall(r"\w+", ours.partition("enum Command : uint8_t {")[2].partition("};")[0])
    assert commands == [*served, "NONE", "COUNT"]
    header = (VENDOR / "source/ggml/include/ggml.h").read_text(encoding="utf-8")
    listed = header.partition("enum ggml_op {")[2].partition("};")[0]
    order = re.findall(r"^ +GGML_OP_(\w+)", listed, re.M)
    assert {name: order.index(name) for name in (*FOREIGN, *TRAINING)} == FOREIGN | TRAINING
    assert [name for name in order if "CUSTOM" in name] == list(FOREIGN)
