"""Addresses, tokens and certificates: who is let in, and that nothing shows a token."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import pickle
import socket
import ssl
import stat
import struct
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest
from certificates import authority, has_ipv6
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from hypothesis import given
from hypothesis import strategies as st
from listeners import accepting
from oracles import examples

from sllm import hosts
from sllm.errors import AuthError, RemoteError
from sllm.wire import auth, tokens
from sllm.wire.auth import Address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PATIENCE = 60.0
TOKEN = "S3cret-Token_that.is/long+enough"

# ---- addresses ---------------------------------------------------------------------------------------------

visible = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=60)
host_names = (
    st.from_regex(r"[a-z0-9]([a-z0-9-]{0,12}[a-z0-9])?(\.[a-z]{1,6}){0,2}", fullmatch=True)
    | st.ip_addresses(v=4).map(str)
    | st.ip_addresses(v=6).map(str)
)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)


@examples(200)
@given(
    host=host_names,
    port=st.integers(1, 65535),
    token=st.none() | visible,
    digest=st.none() | digests,
)
def test_an_address_survives_its_line(host: str, port: int, token: str | None, digest: str | None) -> None:
    address = Address(host, port, token, digest)
    assert Address.parse(address.uri) == address
    assert Address.parse(f"  {address.uri}\n") == address
    if token is not None and len(token) > 8:
        assert token not in repr(address)
        assert token not in address.endpoint


def test_the_parts_of_an_address() -> None:
    digest = hashlib.sha256(b"x").hexdigest()
    assert Address.parse("sllm://localhost") == Address("localhost", hosts.DEFAULT_PORT)
    assert Address.parse("sllm://127.0.0.1:5#insecure") == Address("127.0.0.1", 5, None, None, True)
    assert Address.parse(f"sllm://t@[::1]:7/#sha256={digest}") == Address("::1", 7, "t", digest)
    colons = ":".join(digest[i : i + 2] for i in range(0, 64, 2)).upper()
    assert Address.parse(f"sllm://h#sha256={colons}").fingerprint == digest
    assert Address("::1", 7).endpoint == "[::1]:7"
    assert Address("::1", 7, insecure=True).uri == "sllm://[::1]:7#insecure"


@pytest.mark.parametrize(
    "line",
    [
        "",
        TOKEN,
        f"{TOKEN}@host:1",
        f"http://{TOKEN}@host:1",
        f"sllm:{TOKEN}@host:1",
        "sllm://",
        f"sllm://{TOKEN}@",
        f"sllm://{TOKEN}@:5",
        f"sllm://{TOKEN}@host:port",
        f"sllm://host:{TOKEN}",
        f"sllm://{TOKEN}@host:99999",
        f"sllm://{TOKEN}@host:-1",
        f"sllm://{TOKEN}@[::1:5",
        f"sllm://{TOKEN}@[no]:5",
        f"sllm://user:{TOKEN}@host:5",
        f"sllm://{TOKEN}@host:5/path",
        f"sllm://{TOKEN}@host:5?query=1",
        f"sllm://{TOKEN}@host:5#sha256=12",
        f"sllm://{TOKEN}@host:5#sha256={'g' * 64}",
        f"sllm://{TOKEN}@host:5#sha1={'a' * 64}",
        f"sllm://{TOKEN}@host:5#{TOKEN}",
        f"sllm://{TOKEN}@host:5#insecure",
        f"sllm://{TOKEN}@192.168.1.1:5#insecure",
        f"sllm://{TOKEN}ä@host:5",
        f"sllm://{TOKEN}%20@host:5",
        f"sllm://{TOKEN}%00@host:5",
        f"sllm://{TOKEN}@ho\N{FULLWIDTH SOLIDUS}st:5",
        f"sllm://{TOKEN}\N{FULLWIDTH COMMERCIAL AT}host:5",
    ],
)
def test_the_error_of_a_bad_address_does_not_show_its_token(line: str) -> None:
    with pytest.raises(ValueError, match="address") as caught:
        Address.parse(line)
    shown = "".join(traceback.format_exception(caught.value, chain=True))
    said = "\n".join(row for row in shown.splitlines() if "Address.parse(line)" not in row)
    assert TOKEN not in said
    assert TOKEN.lower() not in said.lower()
    assert caught.value.__cause__ is None


@examples(300)
@given(line=st.text(max_size=80) | st.text(max_size=60).map("sllm://".__add__))
def test_any_text_is_an_address_or_a_value_error(line: str) -> None:
    with suppress(ValueError):
        address = Address.parse(line)
        assert address.host
        assert 0 <= address.port <= 65535


@pytest.mark.parametrize("line", [None, b"sllm://host", 5])
def test_an_address_is_text(line: object) -> None:
    with pytest.raises(TypeError, match="expected str"):
        Address.parse(line)  # type: ignore[arg-type]


@examples(100)
@given(host=host_names, port=st.integers(0, 65535))
def test_host_and_port_come_apart(host: str, port: int) -> None:
    together = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    assert hosts.split_host_port(together) == (host, port)


def test_what_may_be_left_out_of_host_and_port() -> None:
    assert hosts.split_host_port("host") == ("host", hosts.DEFAULT_PORT)
    assert hosts.split_host_port("[::1]") == ("::1", hosts.DEFAULT_PORT)
    assert hosts.split_host_port(":7") == ("0.0.0.0", 7)
    assert hosts.split_host_port("host", 8) == ("host", 8)
    for text in ("", "a:b", "a:99999", "::1", "a:1/b", "u@a:1", "a:1#c", "a:1?d", "[::1"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            hosts.split_host_port(text)


def test_loopback_is_this_machine_alone() -> None:
    for host in ("localhost", "LOCALHOST", "127.0.0.1", "127.8.9.10", "::1"):
        assert hosts.is_loopback(host)
    for host in (
        "0.0.0.0",
        "::",
        "",
        "10.0.0.1",
        "localhost.example.com",
        "127.0.0.1.example.com",
        "fe80::1",
    ):
        assert not hosts.is_loopback(host)


# ---- tokens ------------------------------------------------------------------------------------------------


@examples(100)
@given(token=visible, other=visible | st.binary(max_size=40))
def test_only_the_token_is_the_token(token: str, other: str | bytes) -> None:
    ((name, header),) = auth.bearer(token)
    assert name == "authorization"
    digest = tokens.token_digest(token)
    assert auth.header_digest(header) == digest
    assert auth.header_digest(header.encode()) == digest
    assert (auth.header_digest(other) == digest) == (other in (header, header.encode()))
    assert len(token) < tokens.MIN_TOKEN or token not in digest  # "b" may be a digit of any digest
    for near in (
        token,
        f"bearer {token}",
        f"Bearer {token} ",
        f"Basic {token}",
        f"Bearer {token}x",
        "",
        None,
    ):
        assert auth.header_digest(near) != digest
    assert auth.bearer(None) == ()


@pytest.mark.parametrize(
    "token", ["", "short", "x" * 15, "x" * 15 + " ", "x" * 20 + "\n", "ä" * 20, "x\0" * 10]
)
def test_a_token_has_to_be_long_and_visible(token: str) -> None:
    with pytest.raises(ValueError, match="token") as caught:
        tokens.checked_token(token)
    assert not token or token not in str(caught.value)


def test_a_token_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "token"
    token = tokens.load_or_make_token(path)
    assert tokens.checked_token(token) == token
    assert tokens.load_or_make_token(path) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == ["token"]
    assert tokens.load_or_make_token(tmp_path / "other") != token


def test_those_who_make_a_token_at_once_get_the_same(tmp_path: Path) -> None:
    n = 16
    for i in range(5):
        path = tmp_path / f"{i}" / "token"
        start = threading.Barrier(n)

        def make(_i: int, path: Path = path, start: threading.Barrier = start) -> str:
            start.wait(PATIENCE)
            return tokens.load_or_make_token(path)

        with ThreadPoolExecutor(n) as pool:
            assert len(set(pool.map(make, range(n)))) == 1
        assert [entry.name for entry in path.parent.iterdir()] == ["token"]


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs permissions as of POSIX")
@pytest.mark.parametrize(("file", "folder"), [(0o644, 0o755), (0o620, 0o700), (0o600, 0o777)])
def test_a_token_that_others_may_read_is_refused(tmp_path: Path, file: int, folder: int) -> None:
    path = tmp_path / "state" / "token"
    token = tokens.load_or_make_token(path)
    path.chmod(file)
    path.parent.chmod(folder)
    with pytest.raises(PermissionError, match="others on this machine") as caught:
        tokens.load_or_make_token(path)
    assert "chmod" in str(caught.value)
    assert token not in str(caught.value)
    path.chmod(0o600)
    path.parent.chmod(0o700)
    assert tokens.load_or_make_token(path) == token


@pytest.mark.parametrize("content", [b"", b"\n", b"short\n", b"two words that are long enough", b"\xff" * 40])
def test_a_file_that_holds_no_token_is_an_error_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ValueError, match="holds no token") as caught:
        tokens.load_or_make_token(path)
    assert str(path) in str(caught.value)
    assert content.decode("latin-1").strip() in ("", "short") or content.decode("latin-1") not in str(
        caught.value
    )
    assert path.read_bytes() == content


def test_a_token_that_cannot_be_kept_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "token", tmp_path):
        with pytest.raises(OSError, match=r".") as caught:
            tokens.load_or_make_token(path)
        assert not isinstance(caught.value, RemoteError)


def test_a_pickled_address_is_whole() -> None:
    address = Address("host", 1, TOKEN, "a" * 64)
    assert pickle.loads(pickle.dumps(address)) == address


# ---- certificates ------------------------------------------------------------------------------------------


def test_a_certificate_is_made_once_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    chain, key = auth.load_or_make_certificate(folder)
    assert auth.load_or_make_certificate(folder) == (chain, key)
    path = folder / "worker.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in folder.iterdir()] == ["worker.pem"]
    certificate = x509.load_pem_x509_certificate(chain)
    assert auth.fingerprint(chain) == certificate.fingerprint(hashes.SHA256()).hex()
    # No clock is outside of it.
    assert (certificate.not_valid_before_utc.year, certificate.not_valid_after_utc.year) == (1970, 9999)
    assert b"PRIVATE" not in chain
    assert b"CERTIFICATE" not in key
    other, _ = auth.load_or_make_certificate(tmp_path / "other")
    assert auth.fingerprint(other) != auth.fingerprint(chain)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs permissions as of POSIX")
@pytest.mark.parametrize(("file", "folder"), [(0o666, 0o777), (0o640, 0o700), (0o604, 0o700), (0o600, 0o777)])
def test_a_key_that_others_may_use_is_refused(tmp_path: Path, file: int, folder: int) -> None:
    state = tmp_path / "state"
    both = auth.load_or_make_certificate(state)
    path = state / "worker.pem"
    path.chmod(file)
    state.chmod(folder)
    with pytest.raises(PermissionError, match="others on this machine") as caught:
        auth.load_or_make_certificate(state)
    assert str(path) in str(caught.value)
    path.chmod(0o600)
    state.chmod(0o755)
    assert auth.load_or_make_certificate(state) == both


@pytest.mark.parametrize("years", [(2001, 2002), (2901, 2902)])
def test_a_certificate_outside_its_time_names_the_clock(
    years: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, end = (datetime.datetime(year, 1, 1, tzinfo=datetime.timezone.utc) for year in years)
    monkeypatch.setattr(auth, "_BEGINNING", begin)
    monkeypatch.setattr(auth, "_NO_END", end)
    chain, _ = auth.load_or_make_certificate(tmp_path / "state")
    with pytest.raises(AuthError, match="by the clock of this machine"):
        auth.client_credentials(chain)


def test_those_who_make_a_certificate_at_once_get_the_same(tmp_path: Path) -> None:
    n = 8
    start = threading.Barrier(n)

    def make(_i: int) -> tuple[bytes, bytes]:
        start.wait(PATIENCE)
        return auth.load_or_make_certificate(tmp_path)

    with ThreadPoolExecutor(n) as pool:
        assert len(set(pool.map(make, range(n)))) == 1


def test_a_damaged_certificate_is_an_error_and_kept(tmp_path: Path) -> None:
    auth.load_or_make_certificate(tmp_path)
    path = tmp_path / "worker.pem"
    whole = path.read_bytes()
    _, other_key = auth.load_or_make_certificate(tmp_path / "other")
    at = whole.index(b"-----BEGIN CERTIFICATE")
    damaged = [
        b"",
        b"hello",
        whole[:at],
        whole[at:],
        whole[: at + 200],
        whole[: at - 60] + whole[at:],
        whole[: at + 100] + b"!!!!" + whole[at + 104 :],
        whole.replace(b"A", b"B"),
        other_key + whole[at:],
        b"\xff" * 1000,
    ]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="move it away") as caught:
            auth.load_or_make_certificate(tmp_path)
        assert str(path) in str(caught.value)
        assert path.read_bytes() == data
    path.write_bytes(whole)
    auth.load_or_make_certificate(tmp_path)


@pytest.mark.parametrize("pem", [b"", b"hello", b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_has_no_fingerprint(pem: bytes) -> None:
    with pytest.raises(ValueError, match="no certificate"):
        auth.fingerprint(pem)


# ---- fetching ----------------------------------------------------------------------------------------------


@contextmanager
def listening(answer: Callable[[socket.socket], None], host: str = "127.0.0.1") -> Iterator[Address]:
    """A server that hands each connection to ``answer``."""

    def patiently(connection: socket.socket) -> None:
        connection.settimeout(PATIENCE)
        answer(connection)

    with accepting(patiently, host) as port:
        yield Address(host, port)


def speaking_tls(chain: bytes, key: bytes, folder: Path) -> Callable[[socket.socket], None]:
    """The server's side of a handshake, and nothing after it."""
    files = folder / "chain.pem", folder / "key.pem"
    for path, data in zip(files, (chain, key), strict=True):
        path.write_bytes(data)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(1)

    return answer


def test_the_certificate_is_fetched_if_it_has_the_fingerprint(tmp_path: Path) -> None:
    chain, key = auth.load_or_make_certificate(tmp_path)
    with listening(speaking_tls(chain, key, tmp_path)) as address:
        found = auth.fetch_certificate(
            Address(address.host, address.port, TOKEN, auth.fingerprint(chain)), PATIENCE
        )
        assert auth.fingerprint(found) == auth.fingerprint(chain)
        assert auth.fingerprint(auth.fetch_certificate(address, PATIENCE)) == auth.fingerprint(chain)


def test_another_certificate_is_refused(tmp_path: Path) -> None:
    chain, key = auth.load_or_make_certificate(tmp_path)
    with listening(speaking_tls(chain, key, tmp_path)) as address:
        wrong = Address(address.host, address.port, TOKEN, "0" * 64)
        with pytest.raises(AuthError, match=auth.fingerprint(chain)) as caught:
            auth.fetch_certificate(wrong, PATIENCE)
    assert isinstance(caught.value, PermissionError)
    assert "0" * 64 in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_of_a_chain_the_first_certificate_counts(tmp_path: Path) -> None:
    chain, key = authority(tmp_path, x509.DNSName("worker.example"))
    with listening(speaking_tls(chain, key, tmp_path)) as address:
        found = auth.fetch_certificate(address, PATIENCE)
    assert auth.fingerprint(found) == auth.fingerprint(chain)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([x509.DNSName("worker.example")], "worker.example"),
        ([x509.DNSName("*.example")], "any.example"),
        ([x509.IPAddress(ipaddress.ip_address("10.1.2.3"))], "10.1.2.3"),
        ([x509.UniformResourceIdentifier("https://x")], "leaf"),
        ([], "leaf"),
    ],
)
def test_the_name_to_expect_is_one_in_the_certificate(
    tmp_path: Path, names: list[x509.GeneralName], expected: str
) -> None:
    chain, _ = authority(tmp_path, *names)
    assert auth.client_credentials(chain)[1] == expected


def reply(data: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(data)
        connection.recv(1 << 16)

    return answer


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"220 mail ready\r\n",
        b"\x00" * 100,
        b"\x16\x03\x01\xff\xff",
        b"\xff",
    ],
)
def test_a_server_without_tls_is_a_remote_error(data: bytes) -> None:
    with listening(reply(data)) as address, pytest.raises(RemoteError, match=address.endpoint):
        auth.fetch_certificate(address, 0.5)


def test_a_server_that_hangs_up_is_a_remote_error() -> None:
    with listening(lambda connection: None) as address, pytest.raises(RemoteError, match=address.endpoint):
        auth.fetch_certificate(address, PATIENCE)


def test_a_server_that_resets_at_once_leaves_no_socket_open() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as plain,
    ):
        accepted, _ = listener.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()
        with pytest.raises(OSError, match=r"reset|pipe"):
            auth._shown_certificate(plain, context, PATIENCE)


def test_a_silent_server_costs_the_timeout_and_no_more() -> None:
    gone = threading.Event()
    with listening(lambda connection: void(gone.wait(PATIENCE))) as address:
        began = time.monotonic()
        with pytest.raises(RemoteError, match="cannot be reached"):
            auth.fetch_certificate(address, 0.2)
        assert time.monotonic() - began < PATIENCE / 2
        gone.set()


def void(_result: object) -> None:
    """For expressions that are statements."""


def test_a_server_that_drips_does_not_outlast_the_timeout() -> None:
    gone = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"\x16\x03\x03\x3f\xff" + b"\x02\x00\x20\x00")  # the head of a long ServerHello
        while not gone.wait(0.05):
            connection.sendall(b"\x00")

    with listening(drip) as address:
        began = time.monotonic()
        try:
            with pytest.raises(RemoteError, match=address.endpoint):
                auth.fetch_certificate(address, 0.5)
        finally:
            gone.set()
        assert time.monotonic() - began < PATIENCE


def test_nobody_there_is_a_remote_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(RemoteError, match="cannot be reached"):
        auth.fetch_certificate(Address("127.0.0.1", port), PATIENCE)


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".invalid", "ä" * 64, "host.invalid", "with space"])
def test_an_invalid_host_name_is_a_remote_error(host: str) -> None:
    with pytest.raises(RemoteError, match="cannot be reached"):
        auth.fetch_certificate(Address(host, 1), PATIENCE)


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_the_other_loopback(tmp_path: Path) -> None:
    chain, key = auth.load_or_make_certificate(tmp_path)
    with listening(speaking_tls(chain, key, tmp_path), "::1") as address:
        found = auth.fetch_certificate(Address.parse(address.uri), PATIENCE)
    assert auth.fingerprint(found) == auth.fingerprint(chain)
