"""Workers to connect to: in a process that can be killed, and ones that lie."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from typing import IO, TYPE_CHECKING, Any

import grpc
import pytest
from oracles import EXACT

from sllm import embedded
from sllm.wire import auth
from sllm.wire.protocol import PROTOCOL, SERVICE, padded, pb

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from typing_extensions import Self

    from sllm.cli.slow_link import Link
    from sllm.engine.model import Model
    from sllm.generation.text_stream import Run

PATIENCE = 60.0  # seconds until something that should happen is taken not to


def wait_until(
    true: Callable[[], Any], what: str = "what was waited for", patience: float = PATIENCE
) -> None:
    until = time.monotonic() + patience
    while not true():
        assert time.monotonic() < until, f"{what} did not happen"
        time.sleep(0.05)  # a worker lets one address connect 20 times a second


def n_threads(name: str) -> int:
    """How many threads there are whose names begin like this."""
    return sum(thread.name.startswith(name) for thread in threading.enumerate())


def through(link: Link, uri: str) -> str:
    """The address of a worker as its client sees it behind a link."""
    return replace(auth.Address.parse(uri), host=link.host, port=link.port).uri


def kept_name(model: Model) -> str:
    """The name of the file in which a client keeps the vocabulary and the chat template of a model."""
    digest = sha256((model.chat_template or "").encode()).hexdigest()[:16]
    return f"{model.vocab.fingerprint}-{digest}.gguf"


@contextmanager
def vocabulary_kept(cache: Path, model: Model) -> Iterator[None]:
    """Clients of this process have the vocabulary of the embedded target already, in this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLLM_CACHE", str(cache))
        (cache / "vocabularies").mkdir()
        (cache / "vocabularies" / kept_name(model)).symlink_to(embedded.TARGET)
        yield


_SERVE = """
import json, os, signal, sys, threading
from sllm.cli.allocator import bound_arenas
from sllm.worker.server import Limits, Worker
bound_arenas()  # as `sllm worker` does
options = json.loads(sys.argv[1])
options["limits"] = Limits(**options.pop("limits"))
worker = Worker(**options)
over = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: over.set())
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
print(worker.uri, flush=True)
over.wait()
worker.close()
"""


class WorkerProcess:
    """A worker in a process of its own; a context manager. It ends with this process, too. What it says goes
    to ``stderr``, a file; None: to that of this process.

    Attributes:
        uri: its line.
        address: host and port, for a :class:`~sllm.cli.slow_link.Link`.

    """

    def __init__(
        self,
        state: os.PathLike[str],
        *,
        model: os.PathLike[str] = embedded.TARGET,
        limits: dict[str, Any] | None = None,
        n_ctx: int = 512,
        stderr: IO[bytes] | None = None,
        **options: Any,
    ) -> None:
        options |= {"model": str(model), "state": str(state), "limits": limits or {}, "n_ctx": n_ctx, **EXACT}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        self._uri: str | None = None

    @property
    def uri(self) -> str:
        if self._uri is None:
            assert self.process.stdout is not None
            self._uri = self.process.stdout.readline().strip()
            assert self._uri, "the worker did not start"
        return self._uri

    @property
    def address(self) -> tuple[str, int]:
        address = auth.Address.parse(self.uri)
        return address.host, address.port

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        with self.process:
            self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


class FakeWorker:
    """Says what a test wants it to, without TLS; a context manager.

    Args:
        model: what it claims to have.
        info: fields of InfoReply to be changed.
        vocabulary: the pieces that it sends.
        generate: what it answers to a text: gets Open, yields messages or bytes.
        layers: what it answers to a sequence: gets the messages, yields messages or bytes.
        service: under another name it is no worker at all.

    """

    def __init__(
        self,
        model: Model,
        *,
        info: dict[str, Any] | None = None,
        vocabulary: Callable[[], Iterator[bytes]] = lambda: iter(()),
        generate: Callable[[pb.Open], Iterator[pb.Down | bytes]] = lambda _open: iter(()),
        layers: Callable[[Iterator[pb.LayersUp]], Iterator[pb.LayersDown | bytes]] | None = None,
        service: str = SERVICE,
    ) -> None:
        fields: dict[str, Any] = {
            "protocol": PROTOCOL,
            "model_name": "fake",
            "model_id": "fake",
            "vocab_fingerprint": model.vocab.fingerprint,
            "n_vocab": model.vocab.n_tokens,
            "chat_template": model.chat_template or "",
            "n_ctx": 512,
            "sessions": 4,
            "max_prompt": 512,
            "max_hint": 256,
        }
        self.info = pb.InfoReply(**{**fields, **(info or {})})
        self.generate = generate
        self.opens: list[pb.Open] = []
        self.n_calls = 0  # under way

        def send(message: pb.Down | bytes) -> bytes:
            return message if isinstance(message, bytes) else padded(message).SerializeToString()

        def answer(requests: Iterator[pb.Up], context: grpc.ServicerContext) -> Iterator[pb.Down | bytes]:
            self.n_calls += 1
            context.add_callback(self._ended)
            opening = next(requests).open
            self.opens.append(opening)
            yield from self.generate(opening)

        def answer_layers(
            requests: Iterator[pb.LayersUp], context: grpc.ServicerContext
        ) -> Iterator[pb.LayersDown | bytes]:
            self.n_calls += 1
            context.add_callback(self._ended)
            assert layers is not None
            yield from layers(requests)

        def bare(message: pb.LayersDown | bytes) -> bytes:
            data: bytes = message if isinstance(message, bytes) else message.SerializeToString()
            return data

        handlers = {
            "Layers": grpc.stream_stream_rpc_method_handler(answer_layers, pb.LayersUp.FromString, bare),
            "Info": grpc.unary_unary_rpc_method_handler(
                lambda _request, _context: self.info,
                pb.InfoRequest.FromString,
                pb.InfoReply.SerializeToString,
            ),
            "Vocabulary": grpc.unary_stream_rpc_method_handler(
                lambda _request, _context: (pb.Piece(data=data) for data in vocabulary()),
                pb.VocabularyRequest.FromString,
                pb.Piece.SerializeToString,
            ),
            "Generate": grpc.stream_stream_rpc_method_handler(answer, pb.Up.FromString, send),
        }
        self._executor = ThreadPoolExecutor(8)
        self._server = grpc.server(
            self._executor, handlers=[grpc.method_handlers_generic_handler(service, handlers)]
        )
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        self.uri = f"sllm://127.0.0.1:{self.port}#insecure"

    def _ended(self) -> None:
        self.n_calls -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._server.stop(grace=None).wait()
        self._executor.shutdown()


def commit(pos: int, tokens: list[int], **fields: Any) -> pb.Down:
    return pb.Down(commit=pb.Commit(pos=pos, tokens=tokens, **fields))


def opened() -> pb.Down:
    return pb.Down(opened=pb.Opened())


def done(reason: str) -> pb.Down:
    return pb.Down(done=pb.Done(reason=reason))


class Spares:
    """A worker, and another one that has been started already and takes its place; a context manager."""

    def __init__(self, start: Callable[[], WorkerProcess]) -> None:
        self._start = start
        self.current = start()
        self._next = start()
        assert self.current.uri

    def kill(self) -> None:
        """Kill the one and go on with the other."""
        self.current.close()
        self.current, self._next = self._next, self._start()
        assert self.current.uri

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.current.close()
        self._next.close()


def settled(runs: Sequence[Run], n_prompt: int) -> list[Run]:
    """The runs that count in the end; checks that they follow each other, withdrawn ones and all."""
    kept: list[Run] = []
    pos = n_prompt
    for run in runs:
        if run.withdrawn:
            n = len(run.withdrawn)
            assert tuple(kept[-n:]) == run.withdrawn
            assert all(one.source == "local" for one in run.withdrawn)
            pos = run.withdrawn[0].pos
            del kept[-n:]
        assert run.source == "local" or all(one.source != "local" for one in kept)
        assert run.pos == pos
        assert run.tokens or run.text
        assert run.n_accepted == (len(run.tokens) if run.source == "draft" else 0)
        pos += len(run.tokens)
        kept.append(run)
    assert all(run.source in ("draft", "target") for run in kept)
    return kept
