"""Whatever clients and strangers send, none of it is in what a worker writes, however much that is."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import floods
import grpc
import pytest
from oracles import GREEDY
from raw_client import PATIENCE, Client, hint, opening

from sllm import embedded
from sllm.wire import auth
from sllm.wire.protocol import PROTOCOL, method, pb

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sllm.engine.model import Model

CANARY = "ca9ar1es"
NUMBER = 7130952684
"""Neither is in anything that a worker says by itself."""

RAW = b"\x1b[31m" + CANARY.encode() + b"\r\nsllm: forged: a line of its own\n"

PROMPT = (1201, 2377, 1453, 2433, 1019)

LIBRARY = """
import json, logging, sys
logging.basicConfig(level=logging.DEBUG)
from sllm.worker.server import Worker
options = json.loads(sys.argv[1])
with Worker(**options, n_ctx=256) as worker:
    print(worker.uri, flush=True)
    sys.stdin.read()
"""
WORKERS = {
    "library": ("-c", LIBRARY, '{"model": "TARGET", "state": "STATE"}'),
    "library, layers": ("-c", LIBRARY, '{"model": "TARGET", "state": "STATE", "layers": true}'),
    "command": (
        *("-m", "sllm", "worker", "--listen", "127.0.0.1:0", "--until-eof"),
        *("--n-ctx", "256", "--state", "STATE"),
    ),
}


@contextlib.contextmanager
def running(kind: str, state: Path) -> Iterator[tuple[auth.Address, list[bytes]]]:
    """The address of a worker that writes all that it can, and a list: what it wrote, once it has ended."""
    names = {"TARGET": str(embedded.TARGET), "STATE": str(state)}
    arguments = [re.sub("TARGET|STATE", lambda found: names[found[0]], text) for text in WORKERS[kind]]
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    written: list[bytes] = []
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**environment, "SLLM_DEBUG": "1"},
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        stderr = process.stderr
        reader = threading.Thread(target=lambda: written.append(stderr.read()))
        reader.start()
        try:
            yield auth.Address.parse(process.stdout.readline().decode()), written
        finally:
            process.stdin.close()
            written.append(process.stdout.read())
            process.wait(PATIENCE)
            reader.join()


def texts(address: auth.Address) -> list[int]:
    """A client's texts, most of which are refused; the tokens of those that are not."""
    tokens: list[int] = []
    with Client(address, token=address.token) as client:
        client.metadata = (*client.metadata, ("x-canary", CANARY), ("x-canary-bin", RAW))  # type: ignore[arg-type]
        for message in (
            opening(PROMPT, max_tokens=20),
            opening(PROMPT, max_tokens=20, text_id=NUMBER),
            opening(PROMPT, max_tokens=20, model_id=CANARY),
            opening(PROMPT, max_tokens=20, require=[CANARY]),
            opening((*PROMPT, NUMBER % 2**32), max_tokens=20),
            opening(PROMPT * 200),
            opening(PROMPT, replace(GREEDY, grammar=f'root ::= "{CANARY}"')),
            opening(PROMPT, replace(GREEDY, grammar=f'root ::= "{CANARY}"' + " " * 100_000)),
            opening(PROMPT, replace(GREEDY, logit_bias=[(NUMBER % 2**31, 1.0)])),
            RAW,
            hint(NUMBER % 2**32, PROMPT, 1),
        ):
            with contextlib.suppress(grpc.RpcError):
                tokens += client.generate(message).run()
        stream = client.generate(opening(PROMPT, max_tokens=200), hint(3, [NUMBER % 2**32], NUMBER % 2**32))
        stream.send(RAW)
        with contextlib.suppress(grpc.RpcError):
            stream.run()
        for name, request in (
            ("Info", pb.InfoRequest(protocol=NUMBER % 2**31)),
            ("Info", RAW),
            ("Score", pb.ScoreRequest(tokens=PROMPT, start=1, model_id=CANARY)),
            ("Score", pb.ScoreRequest(tokens=[*PROMPT, NUMBER % 2**32], start=1)),
            ("Score", pb.ScoreRequest(tokens=PROMPT, start=NUMBER % 2**32)),
            ("Echo", pb.EchoRequest(padding=RAW, reply_bytes=NUMBER % 2**32)),
            ("Vocabulary", RAW),
            ("Relay", pb.Piece(data=RAW)),
            (CANARY, RAW),
            (f"/{CANARY}/{CANARY}", RAW),
            ("/grpc.health.v1.Health/Check", b"\x0a" + bytes([len(CANARY)]) + CANARY.encode()),
            ("/grpc.health.v1.Health/Watch", RAW),
        ):
            with contextlib.suppress(grpc.RpcError):
                client.call(name, request, timeout=5.0)
        for layers in (
            pb.LayersUp(open=pb.LayersOpen(model_id=CANARY, codec=CANARY, sequence_id=NUMBER)),
            pb.LayersUp(rows=pb.Rows(data=RAW, n_rows=1)),
            RAW,
        ):
            data = layers if isinstance(layers, bytes) else layers.SerializeToString()
            stub: Any = client.channel.stream_stream(method("Layers"), None, None)
            with contextlib.suppress(grpc.RpcError):
                list(stub(iter([data]), metadata=client.metadata, timeout=5.0))
    return tokens


def strangers(address: auth.Address) -> None:
    """What those send who have no token, or are no clients."""
    with Client(address, token=CANARY * 3) as client:
        for name in ("Info", f"/{CANARY}/{CANARY}", "/grpc.health.v1.Health/Check"):
            with contextlib.suppress(grpc.RpcError):
                client.call(name, RAW)
    options = [("grpc.primary_user_agent", CANARY), ("grpc.default_authority", CANARY)]
    credentials, name = auth.client_credentials(auth.fetch_certificate(address, PATIENCE))
    options.append(("grpc.ssl_target_name_override", name))
    with grpc.secure_channel(address.endpoint, credentials, options) as channel:
        stub: Any = channel.unary_unary(method("Info"), None, None)
        for metadata in ((), auth.bearer(address.token)):
            with contextlib.suppress(grpc.RpcError):
                stub(pb.InfoRequest(protocol=PROTOCOL).SerializeToString(), metadata=metadata, timeout=5.0)
    where = (address.host, address.port)
    with socket.create_connection(where, PATIENCE) as plain:
        plain.sendall(RAW * 3)
        with contextlib.suppress(OSError):
            plain.recv(1000)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for alpn, sent in (([CANARY], b""), (["h2"], RAW), *((["h2"], floods.HELLO + f) for f in frames())):
        context.set_alpn_protocols(alpn)
        with (
            contextlib.suppress(OSError),
            socket.create_connection(where, PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname=CANARY) as secure,
        ):
            secure.settimeout(0.05)
            secure.sendall(sent)
            while secure.recv(1000):
                pass


def frames() -> Iterator[bytes]:
    """What HTTP/2 has for texts and what may be wrong with it."""
    yield floods.frame(7, 0, 0, bytes(8) + RAW)  # GOAWAY with its debug text
    yield floods.frame(7, 0, 0, bytes(4) + (11).to_bytes(4, "big") + RAW)  # "enhance your calm"
    yield floods.frame(floods.PING, 0, 0, CANARY.encode())
    yield floods.frame(99, 0, 0, RAW)
    yield floods.frame(floods.SETTINGS, 0, 0, RAW)
    for name, value in (
        (CANARY.encode(), RAW),
        (RAW, b"value"),
        (b":" + CANARY.encode(), b"value"),
        (b"grpc-timeout", RAW),
        (b"content-type", RAW),
        (b"grpc-encoding", RAW),
        (b"x-bin", RAW),
        (b"x-large", RAW * 300),
    ):
        yield floods.blocks(1, floods.request(b"/" + CANARY.encode(), floods.literal(name, value)))
    yield floods.blocks(1, b"\x83\x87\x04" + floods.text(RAW))
    yield floods.frame(floods.HEADERS, floods.END_HEADERS, 1, RAW)


@pytest.mark.parametrize("kind", WORKERS)
def test_nothing_that_is_sent_is_written(kind: str, tmp_path: Path, target_model: Model) -> None:
    with running(kind, tmp_path) as (address, written):
        generated = texts(address)
        strangers(address)
        with Client(address, token=address.token) as client:
            assert client.info().protocol == PROTOCOL
    log = b"".join(written).decode("utf-8", "replace")
    assert "serving" in log
    assert bool(generated) == ("layers" not in kind)
    assert "\x1b" not in log and "forged" not in log
    for number in (NUMBER, NUMBER % 2**32, NUMBER % 2**31):
        assert str(number) not in log
    for canary in (CANARY, CANARY.encode().hex()):
        assert canary not in log.lower()
    for tokens in (PROMPT, generated):
        for one, other in itertools.pairwise(tokens):
            assert one + other < 1000 or re.search(rf"\b{one}\D{{1,3}}{other}\b", log) is None
        text = target_model.vocab.decode(list(tokens))
        assert not text or text[:12] not in log
    token = address.token
    assert token is not None
    assert token not in log  # the command's first line is not part of it
