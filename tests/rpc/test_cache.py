"""Kept weights: what a name is worth, who finds what, and how much there may be."""

from __future__ import annotations

import os
import random
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest
from remote_worker import wait_until
from rpc_client import Client, tensor

from sllm.engine._ffi import lib
from sllm.rpc import cache as cache_module
from sllm.rpc.cache import TensorCache
from sllm.rpc.loopback import TELLS_USERS
from sllm.rpc.server import RPCServer

if TYPE_CHECKING:
    from pathlib import Path

RNG = random.Random(3)
HERS, HIS = RNG.randbytes(4096), RNG.randbytes(4096)


def name_of(data: bytes) -> int:
    return int(lib.sllm_rpc_hash(data, len(data), 0))


def store(cache: TensorCache, data: bytes, claimed: int | None = None) -> bool:
    descriptor = cache.begin(len(data) if claimed is None else claimed)
    if descriptor is None:
        return False
    os.write(descriptor, data)
    os.close(descriptor)
    return cache.commit()


def read(found: tuple[int, int] | None) -> bytes | None:
    if found is None:
        return None
    with os.fdopen(found[0], "rb") as file:
        data = file.read()
    assert len(data) == found[1]
    return data


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_a_name_is_the_sha_256_of_what_it_names(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path / "cache", by_name=True)
    assert store(cache, HERS) and store(cache, HERS)
    assert kept(cache.folder) == {sha256(HERS).hexdigest()}
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert read(cache.find(sha256(HERS).digest())) == HERS
    assert read(cache.find_named(name_of(HERS))) == HERS
    assert cache.find(sha256(HIS).digest()) is None and cache.find_named(name_of(HIS)) is None


def test_a_forged_entry_is_not_handed_out(tmp_path: Path) -> None:
    """Whatever put it there: the content is hashed again."""
    cache = TensorCache(tmp_path, by_name=True)
    path = tmp_path / sha256(HERS).hexdigest()
    for forged in (HIS, b"", HERS[:-1], HERS + b"x"):
        path.write_bytes(forged)
        assert cache.find(sha256(HERS).digest()) is None
        assert not path.exists()
    (tmp_path / "elsewhere").write_bytes(HERS)
    path.symlink_to(tmp_path / "elsewhere")
    assert cache.find(sha256(HERS).digest()) is None
    path.unlink()
    path.mkdir()
    assert cache.find(sha256(HERS).digest()) is None
    for text in (sha256(HERS).hexdigest(), "../../etc/passwd", "", "zz" * 32, "ab" * 5):
        (tmp_path / "named" / f"{name_of(HERS):016x}").write_text(text)
        assert cache.find_named(name_of(HERS)) is None


def test_a_name_that_two_share_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody can make a second tensor for an FNV-1a; here, all have the same."""
    hashes = cache_module._hashes
    monkeypatch.setattr(
        cache_module, "_hashes", lambda fd, *, with_name: (*hashes(fd, with_name=False)[:2], 7)
    )
    cache = TensorCache(tmp_path, by_name=True)
    assert store(cache, HERS) and read(cache.find_named(7)) == HERS
    assert store(cache, HIS) and cache.find_named(7) is None
    assert store(cache, HERS) and cache.find_named(7) is None  # and no longer can
    assert read(cache.find(sha256(HERS).digest())) == HERS


def test_strangers_find_nothing_by_fnv_1a_and_name_nothing(tmp_path: Path) -> None:
    for_all, ours = TensorCache(tmp_path, by_name=False), TensorCache(tmp_path, by_name=True)
    assert store(for_all, HERS) and ours.find_named(name_of(HERS)) is None
    assert store(ours, HIS) and for_all.find_named(name_of(HIS)) is None
    tmp_path.chmod(0o777)  # anybody could put names there
    assert TensorCache(tmp_path, by_name=True).find_named(name_of(HIS)) is None


def test_the_quota_holds_and_the_least_recently_used_go(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, 10_000, by_name=False)
    three = [RNG.randbytes(3000) for _ in range(3)]
    for i, data in enumerate(three):
        assert store(cache, data)
        os.utime(tmp_path / sha256(data).hexdigest(), (i, i))
    assert read(cache.find(sha256(three[0]).digest())) == three[0]  # used just now
    assert store(cache, HERS)
    assert kept(tmp_path) == {sha256(data).hexdigest() for data in (three[0], HERS)}
    assert cache.begin(10_001) is None and cache.begin(0) is None
    assert store(TensorCache(tmp_path, 10_000, by_name=False), three[1])  # another process's
    assert store(cache, RNG.randbytes(9000))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 10_000
    TensorCache(tmp_path, 100, by_name=False)
    assert kept(tmp_path) == set()


def test_what_is_not_what_was_announced_is_not_kept(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, by_name=False)
    assert not store(cache, HERS, claimed=len(HERS) - 1)
    assert not store(cache, HERS, claimed=len(HERS) + 1)
    assert not cache.commit()
    descriptor = cache.begin(10)
    assert descriptor is not None
    os.close(descriptor)
    cache.abandon()
    assert kept(tmp_path) == set()


def test_a_full_disk_is_not_filled_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TensorCache(tmp_path, by_name=False)
    monkeypatch.setattr(cache_module, "_RESERVE", 1 << 60)
    assert not store(cache, HERS)


def test_leftovers_go(tmp_path: Path) -> None:
    for name in ("0123456789abcdef", "checked.json", ".ab.part", ".cd.part", "notes.txt"):
        (tmp_path / name).write_bytes(b"{}")
    os.utime(tmp_path / ".ab.part", (1, 1))
    TensorCache(tmp_path, by_name=False)
    assert kept(tmp_path) == {".cd.part", "notes.txt"}  # another process may be writing the first
    (tmp_path / "0123456789abcdef").write_bytes(b"of llama.cpp's own server")
    TensorCache(tmp_path, by_name=False)
    assert "0123456789abcdef" in kept(tmp_path)


# ---- over the wire ---------------------------------------------------------------------------------------


def weights(base: int) -> bytes:
    return tensor(buffer=1, data=base, ne=(1024, 1, 1, 1), nb=(4, 4096, 4096, 4096), name=b"x.weight")


@pytest.mark.parametrize("ours", [True, False], ids=["a port for this user", "no port"])
def test_clients_find_what_they_know(tmp_path: Path, ours: bool) -> None:
    with RPCServer(port=0 if ours else None, cache=tmp_path, n_threads=1) as server:
        with Client(server) as client:
            assert client.hello[3] == 1  # it can be asked for SHA-256
            _, base = client.allocate(8192)
            assert not client.has(weights(base), HERS)
            client.set(weights(base), HERS, keep=True)
            client.set(weights(base), HIS)
            assert client.has(weights(base), HERS) and client.get(weights(base), 4096) == HERS
        with Client(server) as client:
            _, base = client.allocate(8192)
            client.set(weights(base), bytes(4096))
            # Neither the name of another tensor nor a wrong SHA-256 gets hers.
            assert not client.has(weights(base), HIS, name=name_of(HERS))
            assert client.get(weights(base), 4096) == bytes(4096)
            by_name = client.has(weights(base), b"", name=name_of(HERS), by_digest=False)
            assert by_name is (ours and TELLS_USERS)
            small = tensor(buffer=1, data=base)
            assert not client.has(small, HERS)  # it does not fit
            assert client.get(weights(base), 4096) == (HERS if by_name else bytes(4096))
    assert sha256(HERS).hexdigest() in kept(tmp_path)


def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    with RPCServer(port=None, cache=tmp_path, n_threads=1, cache_size=5000) as server:
        with Client(server) as client:
            _, base = client.allocate(8192)
            client.send(6, weights(base) + bytes([1]) + bytes(8) + HERS[:100], size=296 + 9 + 4096)
        wait_until(lambda: kept(tmp_path) == set())
        with Client(server) as client:
            _, base = client.allocate(8192)
            client.set(weights(base), HERS, keep=True)
            client.set(weights(base), HIS, keep=True)
            assert client.has(weights(base), HIS) and not client.has(weights(base), HERS)  # over the quota
