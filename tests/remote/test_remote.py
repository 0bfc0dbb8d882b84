"""The client of a worker: connecting, what it refuses, texts, and that nothing is left over."""

from __future__ import annotations

import errno
import gc
import http.server
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from oracles import EXACT, GGUF, GREEDY, PLAIN, make_prompt, one_by_one, without_end
from remote_worker import (
    PATIENCE,
    FakeWorker,
    commit,
    done,
    kept_name,
    n_threads,
    opened,
    through,
    wait_until,
)

import sllm
from sllm import embedded
from sllm.cli.slow_link import Link
from sllm.draft.drafters import ModelDrafter
from sllm.draft.tree import DraftedTree
from sllm.engine import gguf
from sllm.remote import vocabulary
from sllm.targets.base import PipelinedGeneration, Target
from sllm.wire import auth
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from oracles import Tokens

    from sllm.draft.growth import Shape
    from sllm.engine.model import Model
    from sllm.generation.text_stream import Run, TextStream
    from sllm.remote.connection import Remote
    from sllm.wire.protocol import pb

N_CTX = 512
TOKEN = "a-token-nobody-may-read"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Vocabularies are kept here."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("SLLM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workers with this folder have the same certificate."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def worker(target_model: Model, state: Path) -> Iterator[Worker]:
    with Worker(target_model, state=state, token=TOKEN, n_ctx=N_CTX, **EXACT) as worker:
        yield worker


@pytest.fixture
def make_worker(target_model: Model, state: Path) -> Iterator[Callable[..., Worker]]:
    """Makes workers of a test's own."""
    with ExitStack() as stack:

        def make(model: Model = target_model, **options: Any) -> Worker:
            options = {"state": state, "n_ctx": N_CTX, **EXACT, **options}
            return stack.enter_context(Worker(model, **options))

        yield make


@pytest.fixture
def remote(worker: Worker) -> Iterator[Remote]:
    with sllm.connect(worker.uri) as remote:
        yield remote
    wait_until(lambda: not worker._scheduler.running(), "the end of every session")
    assert n_threads("sllm-remote") == 0
    assert n_threads("sllm-draft") == 0


def tokens_in(runs: Sequence[Run]) -> list[int]:
    return [t for run in runs for t in run.tokens]


def address_of(worker: Worker) -> tuple[str, int]:
    return worker.address.host, worker.address.port


def endless(model: Model, seed: int = 1) -> sllm.SamplingParams:
    """A text that does not end by itself."""
    return replace(without_end(model, PLAIN), seed=seed)


# ---- connecting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "http://127.0.0.1:1",
        "sllm://",
        f"sllm://{TOKEN}@127.0.0.1:99999",
        f"sllm://{TOKEN}@127.0.0.1:50051/path",
        f"sllm://{TOKEN}@127.0.0.1:50051#sha256=abc",
        f"sllm://{TOKEN}@example.org:50051#insecure",
    ],
)
def test_what_is_no_address_is_refused_without_repeating_it(uri: str) -> None:
    with pytest.raises(ValueError, match="address") as caught:
        sllm.connect(uri)
    assert TOKEN not in str(caught.value)


def test_arguments_are_checked(worker: Worker) -> None:
    with pytest.raises(TypeError):
        sllm.connect(7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the address"):
        sllm.connect([])
    with pytest.raises(ValueError, match="on_loss"):
        sllm.connect(worker.uri, on_loss="panic")
    for name in ("timeout", "deadline", "keepalive"):
        for value in (0, -1, float("nan"), float("inf"), None, True):
            with pytest.raises(ValueError, match=name):
                sllm.connect(worker.uri, **{name: value})  # type: ignore[arg-type]


def test_a_connection_tells_what_the_worker_offers(
    worker: Worker, remote: Remote, target_model: Model
) -> None:
    info = remote.info
    assert info.model_name == target_model.path.name
    assert info.model_id == gguf.model_id(target_model.path)
    assert info.vocab_fingerprint == target_model.vocab.fingerprint
    assert (info.n_vocab, info.n_ctx) == (target_model.vocab.n_tokens, N_CTX)
    assert (info.n_params, info.size_bytes) == (target_model.n_params, target_model.size_bytes)
    assert info.sessions == Limits().sessions
    assert "hints" in info.features
    assert info.software == f"sllm {sllm.__version__}"
    assert info.chat_template == target_model.chat_template is not None
    for shown in (repr(remote), repr(remote.target()), repr(remote.address)):
        assert str(worker.address.port) in shown
        assert TOKEN not in shown
    assert isinstance(remote.target(), Target)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for end in ("", "#insecure", f"#sha256={'0' * 64}"):
        with pytest.raises(sllm.RemoteError, match=f"127.0.0.1:{port}"):
            sllm.connect(f"sllm://{TOKEN}@127.0.0.1:{port}{end}", timeout=2.0)
    with pytest.raises(sllm.RemoteError, match=r"no-such-host\.invalid"):
        sllm.connect(f"sllm://{TOKEN}@no-such-host.invalid:1#sha256={'0' * 64}", timeout=2.0)


def test_another_certificate(worker: Worker) -> None:
    address = replace(worker.address, fingerprint="0" * 64)
    with pytest.raises(sllm.AuthError, match="fingerprint") as caught:
        sllm.connect(address.uri)
    assert TOKEN not in str(caught.value)
    # Without a fingerprint an authority has to vouch for it, and none does.
    with pytest.raises(sllm.RemoteError):
        sllm.connect(replace(worker.address, fingerprint=None).uri, timeout=2.0)


@pytest.mark.parametrize(
    "token", [None, "another-token-altogether", "ein-schlüssel-aus-umlauten", "two words"]
)
def test_no_token_or_a_wrong_one(worker: Worker, token: str | None) -> None:
    before = worker.stats.sessions_total
    with pytest.raises((sllm.AuthError, ValueError), match="token") as caught:
        sllm.connect(replace(worker.address, token=token).uri)
    assert TOKEN not in str(caught.value)
    assert not token or token not in str(caught.value)
    assert worker.stats.sessions_total == before


def test_tls_against_plain_text(worker: Worker, make_worker: Callable[..., Worker]) -> None:
    plain = make_worker(insecure=True)
    with pytest.raises(sllm.RemoteError, match="TLS"):
        sllm.connect(replace(worker.address, port=plain.address.port).uri, timeout=3.0)
    with pytest.raises(sllm.RemoteError):
        sllm.connect(replace(plain.address, port=worker.address.port).uri, timeout=3.0)
    with sllm.connect(plain.uri) as remote:
        assert remote.info.n_ctx == N_CTX


class Silence(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_args: Any) -> None:
        pass

    def do_POST(self) -> None:
        self.send_error(404)


def test_a_web_server(worker: Worker) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silence)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        for address in (worker.address, auth.Address("127.0.0.1", 1, insecure=True)):
            with pytest.raises(sllm.RemoteError):
                sllm.connect(replace(address, port=server.server_port).uri, timeout=3.0)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_somebody_who_never_answers(worker: Worker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for address in (worker.address, auth.Address("127.0.0.1", 1, insecure=True)):
            began = time.monotonic()
            with pytest.raises(sllm.RemoteError, match=str(port)):
                sllm.connect(replace(address, port=port).uri, timeout=0.5)
            assert 0.4 < time.monotonic() - began < PATIENCE / 2
        # Who does not answer does not take the others' time.
        uris = [replace(worker.address, port=port).uri, worker.uri]
        with sllm.connect(uris, timeout=3.0) as remote:
            assert remote.address == worker.address


def test_no_worker_of_this_version(target_model: Model) -> None:
    another = FakeWorker(target_model, info={"protocol": 2})
    with another, pytest.raises(sllm.RemoteError, match="version 2 of the protocol, expected 1"):
        sllm.connect(another.uri)
    stranger = FakeWorker(target_model, service="somebody.Else")
    with stranger, pytest.raises(sllm.RemoteError, match="not an sllm worker"):
        sllm.connect(stranger.uri)


def test_a_fingerprint_is_no_path(target_model: Model, cache: Path, tmp_path: Path) -> None:
    """It becomes the name of a file, which is deleted where it does not hold the vocabulary."""
    precious = tmp_path / "precious.gguf"
    precious.write_bytes(b"weights")
    for path in (str(precious)[: -len(".gguf")], f"../../{tmp_path.name}/precious", ""):
        fake = FakeWorker(target_model, info={"vocab_fingerprint": path})
        with fake, pytest.raises(sllm.RemoteError, match="fingerprint"):
            sllm.connect(fake.uri)
    assert precious.read_bytes() == b"weights"


def test_ping_and_status(worker: Worker, remote: Remote) -> None:
    with Link(address_of(worker), delay=0.02) as link, sllm.connect(through(link, worker.uri)) as far:
        ping = far.ping()
        assert ping.round_trip >= 0.04
        assert (ping.mbit_s_up, ping.mbit_s_down) == (None, None)
        link.mbit_s = 20
        ping = far.ping(bandwidth=True)
        assert ping.mbit_s_up is not None
        assert ping.mbit_s_down is not None
        assert 0 < ping.mbit_s_up < 40
        assert 0 < ping.mbit_s_down < 40
    before = remote.status()
    assert (before.sessions, before.queued) == (0, 0)
    n_tokens = sllm.generate(remote.target(), "Once upon", sampling=GREEDY, max_tokens=5)
    n_tokens.text()
    after = remote.status()
    assert after.sessions_total == before.sessions_total + 1
    assert after.tokens == before.tokens + n_tokens.stats.n_tokens


# ---- the vocabulary ----------------------------------------------------------------------------------------


def test_chat_is_the_models_own(remote: Remote, target_model: Model) -> None:
    messages = [{"role": "user", "content": "你好 <|im_end|>"}, {"role": "assistant", "content": "Hello"}]
    assert remote.chat(messages).tolist() == target_model.chat(messages).tolist()
    assert (
        remote.chat(messages, add_generation_prompt=False).tolist()
        == target_model.chat(messages, add_generation_prompt=False).tolist()
    )
    text = "Once upon a time 从前"
    assert remote.vocab.encode(text).tolist() == target_model.vocab.encode(text).tolist()


def test_a_vocabulary_is_not_taken_for_one_with_another_template(
    make_worker: Callable[..., Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLLM_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        for template in ("one {{ messages[0].content }}", "two {{ messages[0].content }}"):
            file = GGUF(embedded.DRAFT)
            file.metadata[b"tokenizer.chat_template"] = (8, template.encode())
            with (
                sllm.Model(file.write(tmp_path / f"{template[:3]}.gguf")) as model,
                make_worker(model) as worker,
                sllm.connect(worker.uri) as remote,
            ):
                prompt = remote.chat([{"role": "user", "content": "x"}])
                assert remote.vocab.decode(prompt) == f"{template[:3]} x"


def test_the_vocabulary_crosses_once(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLLM_CACHE", str(tmp_path / "cache"))
    kept = tmp_path / "cache" / "vocabularies" / kept_name(worker._scheduler._context.model)

    def fetch() -> int:
        with Link(address_of(worker)) as link, sllm.connect(through(link, worker.uri)) as remote:
            link.reset_stats()
            assert remote.vocab is remote.vocab
            assert remote.vocab.fingerprint == remote.info.vocab_fingerprint
            assert remote.vocabulary_model().path == kept
            return link.stats.bytes_down

    assert fetch() > 20_000
    data = kept.read_bytes()
    assert fetch() == 0
    for damage in (b"", b"GGUF", data[: len(data) // 2], b"\0" * len(data)):
        kept.write_bytes(damage)
        assert fetch() > 20_000
        assert kept.read_bytes() == data
    assert list(kept.parent.iterdir()) == [kept]


def test_a_cache_that_cannot_be_written(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SLLM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with sllm.connect(worker.uri) as remote:
        assert remote.vocab.fingerprint == remote.info.vocab_fingerprint
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_full_disk_while_the_vocabulary_is_fetched(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: Path, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("SLLM_CACHE", str(tmp_path / "cache"))
    with sllm.connect(worker.uri) as remote:
        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.write_bytes", full)
            with pytest.raises(sllm.RemoteError, match="No space left on device"):
                remote.vocab  # noqa: B018
        assert remote.vocab.fingerprint == remote.info.vocab_fingerprint


def squeezed(data: bytes) -> list[bytes]:
    packed = zlib.compress(data)
    return [packed[i : i + 10_000] for i in range(0, len(packed), 10_000)]


def bomb() -> Iterator[bytes]:
    squeeze = zlib.compressobj()
    while True:
        yield squeeze.compress(bytes(1 << 20))


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        (lambda: iter(squeezed(gguf.vocabulary_only(embedded.TARGET)[:-1000])), "does not load"),
        (lambda: iter(squeezed(b"GGUF")), "does not load"),
        (lambda: iter([b"no zlib"]), "damaged"),
        (lambda: iter([]), "does not load"),
        (bomb, "without an end"),
    ],
    ids=["cut off", "no model", "no zlib", "nothing", "endless"],
)
def test_a_worker_that_sends_no_vocabulary(
    target_model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pieces: Callable[[], Iterator[bytes]],
    complaint: str,
) -> None:
    monkeypatch.setenv("SLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(vocabulary, "_MAX_BYTES", 1 << 23)
    with FakeWorker(target_model, vocabulary=pieces) as fake, sllm.connect(fake.uri) as remote:
        with pytest.raises(sllm.RemoteError, match=complaint):
            sllm.generate(remote.target(), "Once", max_tokens=1)
        assert not fake.opens
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "lie", [{"vocab_fingerprint": "0" * 64}, {"n_vocab": 1 << 20}], ids=["other", "longer"]
)
def test_a_worker_that_lies_about_its_vocabulary(
    target_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: dict[str, Any]
) -> None:
    monkeypatch.setenv("SLLM_CACHE", str(tmp_path))
    data = gguf.vocabulary_only(embedded.TARGET)
    fake = FakeWorker(target_model, info=lie, vocabulary=lambda: iter(squeezed(data)))
    with fake, sllm.connect(fake.uri) as remote, pytest.raises(sllm.RemoteError, match="not its own"):
        remote.vocab.encode("Once")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_closing_while_the_vocabulary_does_not_come(
    target_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLLM_CACHE", str(tmp_path))
    over, asked = threading.Event(), threading.Event()

    def stuck() -> Iterator[bytes]:
        asked.set()
        over.wait(PATIENCE)
        yield b""

    with ThreadPoolExecutor(1) as executor, FakeWorker(target_model, vocabulary=stuck) as fake:
        remote = sllm.connect(fake.uri)
        waiting = executor.submit(lambda: remote.vocab)
        assert asked.wait(PATIENCE)
        remote.close()
        with pytest.raises(sllm.ClosedError):
            waiting.result(PATIENCE)
        over.set()


def test_a_draft_with_another_vocabulary_is_refused_before_any_text_is_sent(
    make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    changed = GGUF(Path(embedded.DRAFT))
    texts = changed.array("tokenizer.ggml.tokens")
    texts[300], texts[301] = texts[301], texts[300]
    worker = make_worker()
    with Link(address_of(worker)) as link, sllm.connect(through(link, worker.uri)) as remote:
        assert remote.vocab.n_tokens
        link.reset_stats()
        other = sllm.Model(changed.write(tmp_path / "other.gguf"))
        said = r"token 300 is .* in the model of 127\.0\.0\.1:\d+ and .* in other\.gguf"
        with other, pytest.raises(sllm.VocabMismatchError, match=said):
            sllm.generate(remote.target(), "Once upon a time", draft=other)
        assert link.stats.bytes_up == 0
        assert worker.stats.sessions_total == 0


# ---- refusals ----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_at_once(remote: Remote, target_model: Model) -> None:
    before = remote.status().sessions_total
    with pytest.raises(sllm.ContextFullError, match=f"{N_CTX + 1} tokens"):
        sllm.generate(remote.target(), make_prompt(target_model, N_CTX + 1, 0))
    for bad in (-1, target_model.vocab.n_tokens):
        with pytest.raises(ValueError, match="not in the vocabulary"):
            sllm.generate(remote.target(), [5, bad])
    with pytest.raises(ValueError, match="no tokens"):
        sllm.generate(remote.target(), [])
    with pytest.raises(ValueError, match="on_loss"):
        remote.target(on_loss="panic")
    full = sllm.generate(remote.target(), make_prompt(target_model, N_CTX, 0))
    assert full.text() == ""
    assert full.stats.finish_reason == "context"
    assert remote.status().sessions_total == before


def test_what_the_worker_refuses_is_raised_where_the_text_is_read(
    make_worker: Callable[..., Worker], target_model: Model
) -> None:
    worker = make_worker(limits=Limits(sessions=1, queue=0, max_grammar=100), pass_seconds=0.01)
    with sllm.connect(worker.uri) as remote:
        with pytest.raises(ValueError, match="line 1"):  # and this is raised before anything is sent
            remote.target().open(np.array([5], np.int32), replace(PLAIN, grammar="root ::= ("), 3)
        long = replace(PLAIN, grammar=f'root ::= "{"a" * 200}"')
        stream = sllm.generate(remote.target(), "Once", sampling=long, max_tokens=3)
        with pytest.raises(ValueError, match="100 bytes"):
            next(stream)
        first = sllm.generate(remote.target(), "Once", sampling=endless(target_model))
        next(first)
        second = sllm.generate(remote.target(), "Twice", max_tokens=3)
        with pytest.raises(sllm.BusyError, match="1 texts at once"):
            next(second)
        first.close()
        wait_until(lambda: not worker._scheduler.running())
        assert sllm.generate(remote.target(), "Thrice", sampling=GREEDY, max_tokens=3).text()


# ---- texts -------------------------------------------------------------------------------------------------

DRAFTS = ["none", "model", "ngram"]


@pytest.mark.parametrize("run_ahead", [True, False])
@pytest.mark.parametrize("drafting", DRAFTS)
def test_ends_of_texts(
    remote: Remote, target_model: Model, draft_model: Model, drafting: str, run_ahead: bool
) -> None:
    target = remote.target(run_ahead=run_ahead)
    draft: Any = {"none": None, "model": draft_model, "ngram": "ngram"}[drafting]
    chat = target_model.chat([{"role": "user", "content": "Hello, who are you?"}])
    with sllm.LocalTarget(target_model, n_ctx=N_CTX, **EXACT) as local:
        cases: list[tuple[Any, dict[str, Any], str]] = [
            ("Once upon a time", {"max_tokens": 1}, "length"),
            ("Once upon a time", {"max_tokens": 40, "sampling": endless(target_model)}, "length"),
            (chat, {"sampling": GREEDY}, "eog"),
            ("Once upon a time", {"max_tokens": 60, "sampling": GREEDY, "stop": [" the", "你"]}, "stop"),
            (make_prompt(target_model, N_CTX - 9, 3), {"sampling": endless(target_model)}, "context"),
        ]
        for prompt, options, reason in cases:
            wanted = sllm.generate(local, prompt, **options)
            shown = wanted.text()
            stream = sllm.generate(target, prompt, draft=draft, **options)
            runs = list(stream)
            assert "".join(run.text for run in runs) == shown
            assert stream.stats.finish_reason == wanted.stats.finish_reason == reason
            check_stats(stream, runs)
            with pytest.raises(StopIteration):
                next(stream)


def check_stats(stream: TextStream, runs: Sequence[Run]) -> None:
    """What holds for every text without a loss."""
    stats = stream.stats
    assert stats.n_tokens == len(tokens_in(runs))
    assert stats.remote is not None
    if stats.finish_reason != "stop":
        n_drafted = sum(len(run.tokens) for run in runs if run.source == "draft")
        assert n_drafted == stats.n_accepted
        assert stats.n_tokens == stats.n_passes + n_drafted
    assert 0 <= stats.n_accepted <= stats.n_drafted
    assert stats.remote.bytes_down >= 64 * stats.n_passes
    assert stats.remote.bytes_up >= 64 * (1 + stats.remote.n_hints)
    assert (stats.remote.n_reconnects, stats.remote.lost_seconds) == (0, 0.0)
    assert stats.prompt_seconds >= 0
    assert stats.seconds >= 0
    assert stats.n_local == 0


def test_a_generation_by_itself(remote: Remote, target_model: Model) -> None:
    prompt = make_prompt(target_model, 5, 1)
    wanted = one_by_one(target_model, prompt, endless(target_model), 20)
    generation = remote.target().open(prompt, endless(target_model), 20)
    assert isinstance(generation, PipelinedGeneration)
    assert (generation.end, generation.max_hint) == (25, 256)
    # Hints that are no tokens, or out of all bounds, change nothing.
    for pos, hint in ((5, wanted[:4]), (5, [-1, 2**31]), (2**31, [5]), (0, [7] * 1000), (5, [])):
        generation.hint(pos, hint)
    commits = list(generation)  # ends
    assert [t for c in commits for t in c.tokens] == wanted
    assert [c.pos for c in commits] == [
        5 + sum(len(c.tokens) for c in commits[:i]) for i in range(len(commits))
    ]
    assert generation.finish_reason == "length"
    assert generation.poll(None) is None
    with pytest.raises(StopIteration):
        next(generation)
    generation.cancel()  # too late
    generation.close()
    generation.close()
    assert generation.closed


def test_several_texts_on_one_connection(
    make_worker: Callable[..., Worker], target_model: Model, draft_model: Model
) -> None:
    worker = make_worker(limits=Limits(sessions=3, queue=8))
    before = n_threads("sllm-remote")
    with sllm.connect(worker.uri) as remote, ThreadPoolExecutor(8) as executor:

        def tell(i: int) -> list[int]:
            draft: Any = [None, draft_model, "ngram"][i % 3]
            target = remote.target(run_ahead=i % 2 == 0)
            sampling = endless(target_model, seed=i)
            return tokens_in(
                list(sllm.generate(target, [5, 6, i], draft=draft, sampling=sampling, max_tokens=25))
            )

        for i, told in enumerate(executor.map(tell, range(8))):
            assert told == one_by_one(target_model, [5, 6, i], endless(target_model, seed=i), 25)
        assert remote.status().sessions_total == 8
    assert n_threads("sllm-remote") == before


def test_figures_of_the_link(
    make_worker: Callable[..., Worker], draft_model: Model, target_model: Model
) -> None:
    worker = make_worker(pass_seconds=0.01)
    with Link(address_of(worker), delay=0.03) as link, sllm.connect(through(link, worker.uri)) as remote:
        assert remote.vocab.n_tokens
        link.reset_stats()
        stream = sllm.generate(
            remote.target(), "Once upon", draft=draft_model, sampling=endless(target_model), max_tokens=40
        )
        runs = list(stream)
        check_stats(stream, runs)
        figures = stream.stats.remote
        assert figures is not None
        assert figures.n_hints >= 1
        assert figures.round_trip >= 0.06
        # Of the last hints some are still on their way when the text is there, and some are never sent.
        wait_until(lambda: figures.bytes_up < 1.2 * link.stats.bytes_up, "the last hints")
        assert figures.bytes_down < link.stats.bytes_down
        assert link.stats.connections == 0
        # The next text knows the round trip already, and the worker still has the prompt.
        generation = remote.target().open(remote.vocab.encode("Once upon"), GREEDY, 3)
        assert generation.remote.round_trip >= 0.06
        list(generation)
        assert generation.remote.n_reused > 0
        generation.close()


def test_a_late_reader_does_not_count_as_the_prompt(remote: Remote) -> None:
    stream = sllm.generate(remote.target(), "Once upon", sampling=GREEDY, max_tokens=3)
    time.sleep(0.3)
    stream.text()
    assert stream.stats.prompt_seconds >= 0
    assert stream.stats.seconds >= 0


def test_drafts_of_both_sides_are_told_apart(
    make_worker: Callable[..., Worker], draft_model: Model, target_model: Model
) -> None:
    """What the client counts is what the worker does, also where one pass has checked drafts of both."""
    worker = make_worker(draft=draft_model, draft_threads=1, pass_seconds=0.02)
    with sllm.connect(worker.uri) as remote:
        for draft in (None, draft_model, "ngram"):
            before = worker.stats.own_accepted
            stream = sllm.generate(
                remote.target(), "Once upon", draft=draft, sampling=endless(target_model), max_tokens=60
            )
            stream.text()
            assert stream.stats.remote is not None
            assert stream.stats.remote.n_own_draft == worker.stats.own_accepted - before
            by = stream.stats.tokens_by_source
            assert by["draft"] + by["worker draft"] == stream.stats.n_accepted


def test_drafts_of_the_worker(
    make_worker: Callable[..., Worker], draft_model: Model, target_model: Model
) -> None:
    worker = make_worker(draft=draft_model, draft_threads=1, pass_seconds=0.02)
    with sllm.connect(worker.uri) as remote:
        assert "worker-draft" in remote.info.features
        stream = sllm.generate(remote.target(), "Once upon", sampling=endless(target_model), max_tokens=60)
        runs = list(stream)
        check_stats(stream, runs)
        assert stream.stats.remote is not None
        n_accepted = stream.stats.n_accepted
        assert stream.stats.remote.n_own_draft == n_accepted > 0
        assert stream.stats.tokens_by_source == {
            "draft": 0,
            "worker draft": n_accepted,
            "target": 60 - n_accepted,
        }
        wanted = one_by_one(target_model, remote.vocab.encode("Once upon"), endless(target_model), 60)
        assert tokens_in(runs) == wanted


def test_a_reader_who_pauses_longer_than_the_worker_waits(
    make_worker: Callable[..., Worker], target_model: Model
) -> None:
    worker = make_worker(limits=Limits(idle_seconds=0.6))
    with sllm.connect(worker.uri) as remote:
        stream = sllm.generate(
            remote.target(run_ahead=False), [5, 6, 7], sampling=endless(target_model), max_tokens=4
        )
        told: list[int] = []
        for run in stream:
            told += run.tokens
            wait_until(lambda: not worker._scheduler.running(), "the worker's giving up")
        assert told == one_by_one(target_model, [5, 6, 7], endless(target_model), 4)
        assert stream.stats.remote is not None
        assert stream.stats.remote.n_reconnects == 0


# ---- drafters that misbehave -------------------------------------------------------------------------------


@pytest.mark.parametrize("run_ahead", [True, False])
def test_what_a_draft_raises_reaches_the_reader(remote: Remote, run_ahead: bool) -> None:
    def fail(tokens: Tokens, _n_max: int) -> list[int]:
        if len(tokens) > 8:
            raise LookupError("no more")
        return [5]

    stream = sllm.generate(
        remote.target(run_ahead=run_ahead), "Once upon a time", draft=fail, sampling=GREEDY
    )
    with pytest.raises(LookupError, match="no more"):
        stream.text()
    with pytest.raises(StopIteration):
        next(stream)
    wait_until(lambda: remote.status().sessions == 0)
    stream = sllm.generate(remote.target(run_ahead=run_ahead), "Once", draft=lambda *_: "x", sampling=GREEDY)
    with pytest.raises(TypeError, match="the draft"):
        stream.text()


@pytest.mark.parametrize("run_ahead", [True, False])
@pytest.mark.parametrize("max_hint", [0, 1, 3, 256])
def test_chains_longer_than_the_worker_takes(
    make_worker: Callable[..., Worker], target_model: Model, max_hint: int, run_ahead: bool
) -> None:
    """Nobody must end up waiting for the other."""
    worker = make_worker(limits=Limits(max_hint=max_hint))
    sampling = endless(target_model, seed=5)
    wanted = one_by_one(target_model, [5, 6, 7], sampling, 50)
    n_vocab = target_model.vocab.n_tokens
    drafts: list[Any] = [
        lambda tokens, _n: wanted[len(tokens) - 3 :],
        lambda tokens, _n: [*wanted[len(tokens) - 3 :][:1], -1, 5],
        lambda _tokens, _n: [n_vocab],
        lambda tokens, _n: [] if len(tokens) % 2 else wanted[len(tokens) - 3 :][:2],
    ]
    with sllm.connect(worker.uri) as remote:
        for draft in drafts:
            stream = sllm.generate(
                remote.target(run_ahead=run_ahead), [5, 6, 7], draft=draft, sampling=sampling, max_tokens=50
            )
            assert tokens_in(list(stream)) == wanted


class Slow(ModelDrafter):
    """Reads a prompt again and again before it drafts."""

    def __init__(self, model: Model) -> None:
        super().__init__(model, n_ctx=1024, n_threads=1)
        self.begun = threading.Event()

    def draft(self, text: Sequence[int], chain: Sequence[int], n_max: int, p_min: float) -> list[int]:
        self.begun.set()
        prompt = make_prompt(self.model, 1000, 0)
        with suppress(sllm.CancelledError):
            for i in range(10_000):
                self.context.decode(np.roll(prompt, i), pos=0)  # what is there already would not be computed
            raise AssertionError("nobody has cancelled this")
        return []

    def draft_tree(self, text: Sequence[int], _shape: Shape, known: DraftedTree | None = None) -> DraftedTree:
        self.draft(text, [], 0, 0.0)
        return known or DraftedTree()


def test_closing_while_a_long_draft_is_being_made(remote: Remote, draft_model: Model) -> None:
    with Slow(draft_model) as drafter:
        stream = sllm.generate(remote.target(run_ahead=False), "Once upon", draft=drafter, sampling=GREEDY)
        with ThreadPoolExecutor(1) as executor:
            reading = executor.submit(next, stream, None)
            assert drafter.begun.wait(PATIENCE)
            stream.close()
            with suppress(sllm.ClosedError):  # or a token that came just before
                reading.result(PATIENCE)
    assert n_threads("sllm-draft") == 0


# ---- ending in the middle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("drafting", DRAFTS)
def test_closing_a_text_in_the_middle(
    make_worker: Callable[..., Worker], target_model: Model, draft_model: Model, drafting: str
) -> None:
    worker = make_worker(pass_seconds=0.005)
    draft: Any = {"none": None, "model": draft_model, "ngram": "ngram"}[drafting]
    with sllm.connect(worker.uri) as remote:
        for how in ("close", "with", "forget", "before"):
            stream = sllm.generate(remote.target(), "Once", draft=draft, sampling=endless(target_model))
            if how != "before":
                next(stream)
            if how == "with":
                with stream:
                    next(stream)
            elif how == "forget":
                del stream
                gc.collect()
            else:
                stream.close()
                stream.close()
            wait_until(lambda: n_threads("sllm-remote") == 0, "the end of the thread")
            wait_until(lambda: not worker._scheduler.running(), "the end of the session")
        assert n_threads("sllm-draft") == 0
        assert sllm.generate(remote.target(), "Once", sampling=GREEDY, max_tokens=3).text()


def test_cancelling_from_another_thread(make_worker: Callable[..., Worker], target_model: Model) -> None:
    worker = make_worker(pass_seconds=0.05)  # a text of 12 s, to be cancelled before its end
    with sllm.connect(worker.uri) as remote, ThreadPoolExecutor(1) as executor:
        for run_ahead in (True, False):  # the second one waits for ever
            target = remote.target(run_ahead=run_ahead)
            generation = target.open(remote.vocab.encode("Once"), endless(target_model), None)
            reading = executor.submit(lambda g: [c for c in g], generation)  # noqa: C416
            wait_until(lambda: worker._scheduler.running())
            time.sleep(0.05)
            generation.cancel()
            with pytest.raises(sllm.CancelledError):
                reading.result(PATIENCE)
            with pytest.raises(sllm.CancelledError):
                generation.poll(None)
            generation.close()
            wait_until(lambda: not worker._scheduler.running())


def test_waking_from_another_thread(remote: Remote) -> None:
    generation = remote.target(run_ahead=False).open(remote.vocab.encode("Once"), GREEDY, None)
    with ThreadPoolExecutor(1) as executor, closing(generation):
        waiting = executor.submit(generation.poll, None)
        generation.wake()
        assert waiting.result(PATIENCE) is None
        generation.wake()
        assert generation.poll(None) is None  # not lost
        assert generation.poll(0.01) is None


def test_closing_the_connection_in_the_middle(
    make_worker: Callable[..., Worker], target_model: Model
) -> None:
    worker = make_worker(pass_seconds=0.005)
    with ThreadPoolExecutor(2) as executor:
        remote = sllm.connect(worker.uri)
        target = remote.target()
        streams = [sllm.generate(target, [5, i], sampling=endless(target_model)) for i in range(2)]
        for stream in streams:
            next(stream)
        reading = [executor.submit(stream.text) for stream in streams]
        remote.close()
        remote.close()
        for one in reading:
            with pytest.raises(sllm.ClosedError):
                one.result(PATIENCE)
        assert n_threads("sllm-remote") == 0
        wait_until(lambda: not worker._scheduler.running())
        assert remote.closed
        assert "closed" in repr(remote)
        uses: list[Callable[[], Any]] = [
            remote.ping,
            remote.status,
            remote.target,
            lambda: remote.vocab,
            lambda: remote.chat([{"role": "user", "content": "x"}]),
            lambda: sllm.generate(target, [5], max_tokens=1),
            lambda: target.open(make_prompt(target_model, 2, 0), GREEDY, 1),
        ]
        for use in uses:
            with pytest.raises(sllm.ClosedError):
                use()


def test_closing_a_connection_while_it_is_being_renewed(worker: Worker, target_model: Model) -> None:
    """Over a link on which nothing moves every attempt takes its time."""
    with Link(address_of(worker)) as link:
        remote = sllm.connect(through(link, worker.uri), timeout=30.0)
        stream = sllm.generate(remote.target(), "Once", sampling=endless(target_model))
        next(stream)
        link.cut()
        link.stall()
        with ThreadPoolExecutor(1) as executor:
            reading = executor.submit(stream.text)
            wait_until(lambda: remote.link._calls or reading.done(), "an attempt to connect again")
            began = time.monotonic()
            remote.close()
            assert time.monotonic() - began < PATIENCE / 2
            with pytest.raises(sllm.ClosedError):
                reading.result(PATIENCE)
        stream.close()
        assert n_threads("sllm-remote") == 0
    wait_until(lambda: not worker._scheduler.running())


def test_an_unclosed_connection_warns(worker: Worker) -> None:
    remote = sllm.connect(worker.uri)
    kept = [remote]
    del remote
    with pytest.warns(ResourceWarning, match=r"unclosed <sllm\.Remote"):
        kept.clear()


def script(code: str, *arguments: str) -> str:
    """Run a program that must not complain; what it prints."""
    head = "import gc, os, signal, sys, threading, time, sllm\nfrom sllm import embedded\n"
    ran = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", head + textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_use_in_a_forked_child_raises(worker: Worker, cache: Path) -> None:
    said = script(
        """
        remote = sllm.connect(sys.argv[1])
        draft = sllm.Model(embedded.DRAFT)
        target = remote.target()
        stream = sllm.generate(target, "Once", draft=draft)
        generation = target.open(remote.vocab.encode("Once"), sllm.SamplingParams(), 5)
        next(stream)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            calls = [
                remote.ping, remote.status, remote.target, lambda: remote.vocab, lambda: next(stream),
                lambda: sllm.generate(target, "Once"), lambda: next(generation), generation.cancel,
                lambda: generation.hint(1, [5]), lambda: generation.poll(None),
            ]
            for i, call in enumerate(calls):
                try:
                    call()
                except sllm.ClosedError as error:
                    assert "process" in str(error) or "fork" in str(error), (i, error)
                else:
                    raise AssertionError(i)
            repr(remote), repr(stream)
            generation.close(); stream.close(); remote.close()
            del remote, stream, generation, target, calls, call
            gc.collect()
            print("child", flush=True)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status == 0, status
        stream.close()
        assert [c for c in generation]
        generation.close()
        assert sllm.generate(target, "Once", max_tokens=3).text()
        remote.close()
        draft.close()
        print("parent")
        """,
        worker.uri,
    )
    assert said.split() == ["child", "parent"]


def test_a_program_may_end_with_everything_open(worker: Worker, cache: Path) -> None:
    code = """
        remote = sllm.connect(sys.argv[1])
        stream = sllm.generate(remote.target(), "Once", draft="ngram")
        next(stream)
        print("end", flush=True)
        {how}
    """
    for how in ("os._exit(0)", "sys.exit(0)"):
        assert script(code.format(how=how), worker.uri).split() == ["end"]
        wait_until(lambda: not worker._scheduler.running(), "the end of the session")


def test_a_client_that_is_killed_leaves_its_place(make_worker: Callable[..., Worker], cache: Path) -> None:
    worker = make_worker(limits=Limits(sessions=1, queue=0), pass_seconds=0.01)
    code = """
        remote = sllm.connect(sys.argv[1])
        bias = {t: -float("inf") for t in range(remote.vocab.n_tokens) if remote.vocab.is_eog(t)}
        stream = sllm.generate(remote.target(), "Once", sampling=sllm.SamplingParams(logit_bias=bias))
        next(stream)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with pytest.raises(AssertionError):
        script(code, worker.uri)
    assert worker.stats.sessions_total == 1
    wait_until(lambda: not worker._scheduler.running(), "the end of the session")
    with sllm.connect(worker.uri) as remote:
        assert sllm.generate(remote.target(), "Once", sampling=GREEDY, max_tokens=3).text()


# ---- workers that lie --------------------------------------------------------------------------------------


def tell(*messages: pb.Down | bytes) -> Callable[[pb.Open], Iterator[pb.Down | bytes]]:
    return lambda _open: iter([opened(), *messages])


@pytest.mark.parametrize(
    "messages",
    [
        [commit(4, [5])],
        [commit(2, [5])],
        [commit(3, [5]), commit(3, [5])],
        [commit(3, [5]), commit(5, [5])],
        [commit(3, [])],
        [commit(3, [1 << 20])],
        [commit(3, [5] * 11)],
        [commit(3, [5]), done("eog")],
        [commit(3, [5]), done("length")],
        [done("length")],
        [done("eog")],
        [done("a whim")],
        [commit(3, [5]), b"\xff\xff\xff"],
    ],
)
def test_a_worker_that_does_not_keep_to_the_protocol(
    target_model: Model, cache: Path, messages: list[Any]
) -> None:
    with FakeWorker(target_model, generate=tell(*messages), vocabulary=whole_vocabulary) as fake:
        with sllm.connect(fake.uri) as remote:
            stream = sllm.generate(remote.target(), [5, 6, 7], max_tokens=10)
            with pytest.raises(sllm.RemoteError):
                stream.text()
            wait_until(lambda: fake.n_calls == 0, "the end of the call")
        assert len(fake.opens) == 1


def whole_vocabulary() -> Iterator[bytes]:
    return iter(squeezed(gguf.vocabulary_only(embedded.TARGET)))


def test_a_worker_that_boasts(target_model: Model, cache: Path) -> None:
    """More accepted than committed, and drafted than checked: the text ends all the same."""
    story = [commit(3, [70, 71], n_accepted=9, n_verified=1), commit(5, [72], n_accepted=9), done("length")]
    fake = FakeWorker(target_model, generate=tell(*story), vocabulary=whole_vocabulary)
    with fake, sllm.connect(fake.uri) as remote:
        stream = sllm.generate(remote.target(), [5, 6, 7], max_tokens=3)
        assert stream.text() == b"".join(map(target_model.vocab.piece, (70, 71, 72))).decode()
        assert stream.stats.finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "n_own"),
    [
        ({"n_own_verified": 2, "n_own_accepted": 1, "own_draft": False}, 1),
        ({"n_own_verified": 3, "own_draft": True}, 0),
        ({"own_draft": True}, 2),  # an older worker, which says no more
        ({}, 0),
        ({"n_own_verified": 9, "n_own_accepted": 9, "own_draft": True}, 2),  # one that boasts
    ],
)
def test_whose_drafts_were_accepted(
    target_model: Model, cache: Path, fields: dict[str, Any], n_own: int
) -> None:
    story = [commit(3, [70, 71, 72], n_accepted=2, n_verified=5, **fields), done("length")]
    fake = FakeWorker(target_model, generate=tell(*story), vocabulary=whole_vocabulary)
    with fake, sllm.connect(fake.uri) as remote:
        stream = sllm.generate(remote.target(), [5, 6, 7], max_tokens=3)
        stream.text()
        assert stream.stats.remote is not None
        assert stream.stats.remote.n_own_draft == n_own
        assert stream.stats.tokens_by_source == {"draft": 2 - n_own, "worker draft": n_own, "target": 1}


def test_a_worker_whose_context_is_shorter_than_it_said(target_model: Model, cache: Path) -> None:
    """It was restarted since, at the same address."""
    vocab = target_model.vocab
    half = next(t for t in range(vocab.n_tokens) if vocab.piece(t) == b"\xe4")
    for told, shown in (([70], vocab.piece(70).decode()), ([half], "\ufffd"), ([], "")):
        story = [*(commit(3, [token]) for token in told), done("context")]
        fake = FakeWorker(target_model, generate=tell(*story), vocabulary=whole_vocabulary)
        with fake, sllm.connect(fake.uri) as remote:
            stream = sllm.generate(remote.target(), [5, 6, 7], max_tokens=30)
            assert stream.text() == shown
            assert stream.stats.finish_reason == "context"
