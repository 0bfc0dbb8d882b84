"""Where a worker may be told to connect to."""

from __future__ import annotations

import socket

import pytest

import sllm
from sllm.worker.destinations import Destinations
from sllm.worker.server import Limits, Worker


@pytest.mark.parametrize(
    ("entries", "host", "port"),
    [
        (["10.0.0.5"], "10.0.0.5", 50051),
        (["10.0.0.0/8"], "10.9.9.9", 1),
        (["10.0.0.0/8:50051"], "10.9.9.9", 50051),
        (["192.168.0.1", "10.0.0.5:7"], "10.0.0.5", 7),
        (["fd00::/8"], "fd00::5", 50051),
        (["[fd00::/8]:50051"], "fd00::5", 50051),
        (["::1"], "::1", 50051),
        (["*"], "10.9.9.9", 50051),
        (["*"], "8.8.8.8", 50051),
        (["*:50051"], "8.8.8.8", 50051),
        (["127.0.0.1"], "127.0.0.1", 50051),
        (["127.0.0.0/8"], "::ffff:127.0.0.1", 50051),
    ],
)
def test_what_is_allowed(entries: list[str], host: str, port: int) -> None:
    expected = host.removeprefix("::ffff:")
    assert Destinations(entries).resolve(host, port) == expected


@pytest.mark.parametrize(
    ("entries", "host", "port"),
    [
        ([], "10.0.0.5", 50051),
        (["10.0.0.5:50051"], "10.0.0.5", 22),
        (["10.0.0.0/8"], "11.0.0.1", 50051),
        (["10.0.0.0/8"], "no.such.host.invalid", 50051),
        (["gpu.internal"], "other.internal", 50051),
        (["*:50051"], "8.8.8.8", 22),
        # "*" leaves out this machine, and what a network keeps for itself.
        (["*"], "127.0.0.1", 50051),
        (["*"], "localhost", 50051),
        (["*"], "::1", 50051),
        (["*"], "::ffff:127.0.0.1", 50051),
        (["*"], "0.0.0.0", 50051),
        (["*"], "169.254.169.254", 80),
        (["*"], "fe80::1", 50051),
        (["*"], "224.0.0.1", 50051),
        (["*"], "2130706433", 50051),  # 127.0.0.1 as one number
        (["*"], "a" * 300, 50051),
        (["*"], "\ud800", 50051),
    ],
)
def test_what_is_not(entries: list[str], host: str, port: int) -> None:
    with pytest.raises(sllm.RemoteError, match="not an address that this worker may connect to"):
        Destinations(entries).resolve(host, port)


def test_a_name_is_looked_up_once_and_only_where_that_can_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that was checked is the one to be used: a name may mean another one the next time."""
    asked: list[str] = []

    def look_up(host: str, port: int, **_: object) -> list[object]:
        asked.append(host)
        where = "10.0.0.5" if host == "gpu.internal" else "169.254.169.254"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (where, port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    named = Destinations(["GPU.internal:50051"])
    assert named.resolve("gpu.INTERNAL".lower(), 50051) == "10.0.0.5"
    with pytest.raises(sllm.RemoteError):
        named.resolve("evil.example", 50051)
    assert asked == ["gpu.internal"]
    with pytest.raises(sllm.RemoteError):
        Destinations(["*"]).resolve("evil.example", 50051)
    with pytest.raises(sllm.RemoteError):
        Destinations(["10.0.0.0/8"]).resolve("evil.example", 50051)


@pytest.mark.parametrize(
    "entry",
    ["", ":", "*:0", "a:99999", "a:b", "10.0.0.0/33", "10.0.0.1/8", "a b", "a/b", "[::1", "::1]:5", "\n", 7],
    ids=repr,
)
def test_what_is_no_address(entry: str) -> None:
    with pytest.raises((ValueError, TypeError), match=r"limits\.hops holds"):
        Destinations([entry])
    with pytest.raises((ValueError, TypeError), match=r"limits\.hops holds"):
        Worker(sllm.embedded.TARGET, layers=True, insecure=True, limits=Limits(hops=(entry,)))
