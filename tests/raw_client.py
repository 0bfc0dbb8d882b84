"""A client that says on the wire whatever a test wants."""

from __future__ import annotations

import queue
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import remote_worker
from oracles import GREEDY

from sllm.wire import auth
from sllm.wire.protocol import CHANNEL_OPTIONS, PROTOCOL, method, padded, pb, to_sampling

if TYPE_CHECKING:
    from sllm.engine.sampling import SamplingParams


PATIENCE = 120.0  # seconds until something that should happen is taken not to


TOKEN = "a-token-that-is-long-enough"


Code = grpc.StatusCode


wait_until = partial(remote_worker.wait_until, patience=PATIENCE)


class Client:
    """A channel, and calls without any of the client's own cautions."""

    def __init__(self, address: auth.Address, *, token: str | None = TOKEN, port: int | None = None) -> None:
        options: list[tuple[str, Any]] = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        endpoint = address.endpoint if port is None else f"127.0.0.1:{port}"
        if address.insecure:
            self.channel = grpc.insecure_channel(endpoint, options)
        else:
            credentials, name = auth.client_credentials(auth.fetch_certificate(address, PATIENCE))
            options.append(("grpc.ssl_target_name_override", name))
            self.channel = grpc.secure_channel(endpoint, credentials, options)
        self.metadata = auth.bearer(token)

    def call(self, name: str, request: Any, reply: Any = None, **options: Any) -> Any:
        data = request if isinstance(request, bytes) else request.SerializeToString()
        path = name if name.startswith("/") else method(name)
        stub: Any = self.channel.unary_unary(path, None, None)
        options = {"timeout": PATIENCE, "metadata": self.metadata, **options}
        answer = stub(data, **options)
        return reply.FromString(answer) if reply else answer

    def info(self) -> Any:
        return self.call("Info", pb.InfoRequest(protocol=PROTOCOL), pb.InfoReply)

    def status(self) -> Any:
        return self.call("Status", pb.StatusRequest(), pb.StatusReply)

    def generate(self, *messages: Any) -> Stream:
        return Stream(self, messages)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.channel.close()


class Stream:
    """One Generate call, raw: what goes up is bytes or messages."""

    def __init__(self, client: Client, messages: tuple[Any, ...]) -> None:
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for message in messages:
            self.send(message)
        stub: Any = client.channel.stream_stream(method("Generate"), None, None)
        self.call: Any = stub(iter(self._outbox.get, None), metadata=client.metadata, timeout=PATIENCE)
        self.text: list[int] = []
        self.opened: Any = None
        self.reason: str | None = None
        self.notices: list[int] = []  # milliseconds until the worker ends

    def send(self, message: Any) -> None:
        self._outbox.put(message if isinstance(message, bytes) else padded(message).SerializeToString())

    def next(self) -> Any:
        message = pb.Down.FromString(next(self.call))
        kind = message.WhichOneof("kind")
        if kind == "opened":
            self.opened = message.opened
        elif kind == "commit":
            self.text += message.commit.tokens
        elif kind == "draining":
            self.notices.append(message.draining.milliseconds)
        else:
            self.reason = message.done.reason
        return message

    def run(self) -> list[int]:
        try:
            while self.reason is None:
                self.next()
        finally:
            self._outbox.put(None)
        return self.text

    def until(self, n_tokens: int) -> None:
        while len(self.text) < n_tokens:
            self.next()

    def end(self) -> tuple[grpc.StatusCode, str]:
        """The status of a call that has to fail."""
        with pytest.raises(grpc.RpcError) as caught:
            self.run()
        return caught.value.code(), caught.value.details() or ""

    def cancel(self) -> None:
        self.call.cancel()
        self._outbox.put(None)


def opening(
    prompt: Any = (5, 6, 7), sampling: SamplingParams = GREEDY, max_tokens: int = 8, **more: Any
) -> Any:
    more = {"start": len(prompt), "run_ahead": True, **more}
    return pb.Up(
        open=pb.Open(tokens=list(prompt), sampling=to_sampling(sampling), max_tokens=max_tokens, **more)
    )


def hint(pos: int, tokens: Any, number: int, parents: Any = ()) -> Any:
    """``parents`` as they are on the wire: 0 is what was committed, 1 the first token."""
    return pb.Up(hint=pb.Hint(pos=pos, tokens=tokens, id=number, parents=parents))
