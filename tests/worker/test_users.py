"""Users of a worker: what their tokens allow, and what happens when these change while texts run."""

from __future__ import annotations

import hmac
import logging
import os
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from oracles import EXACT, GREEDY, PLAIN, make_prompt, one_by_one, without_end
from raw_client import TOKEN, Client, Code, hint, opening, wait_until

import sllm
from sllm import embedded
from sllm.wire import auth, tokens
from sllm.worker import users as module
from sllm.worker.layer_scheduler import LayerScheduler, RangeKey
from sllm.worker.layer_sequence import LayerRequest
from sllm.worker.server import Limits, Worker
from sllm.worker.token_file import Allowance, TokenFile
from sllm.worker.users import Account, Users

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sllm.engine.model import Model


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module.Users.__init__, "__kwdefaults__", {"open_to_all": False, "poll_seconds": 0.02})
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "sllm-tokens"]


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / "state" / "tokens.json")


def worker_of(file: TokenFile, model: Any = embedded.TARGET, **options: Any) -> Worker:
    limits = Limits(**options.pop("limits", {}))
    options = {"token": TOKEN, "n_ctx": 256, "state": file.path.parent, **EXACT, **options}
    return Worker(model, tokens=file.path, limits=limits, **options)


def line(worker: Worker, token: str) -> str:
    return replace(worker.address, token=token).uri


def runs(worker: Worker) -> int:
    return len(worker._scheduler.running())


# ---- accounts


class Clock:
    """A clock that stands still until it is moved."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_minutes_tokens_may_come_at_once_and_then_have_to_come_back(clock: Clock) -> None:
    account = Account("alice", Allowance(tokens_per_minute=600))
    account.spend(599)
    account.check_rate()
    account.spend(1)
    with pytest.raises(
        sllm.BusyError, match=r"alice may have 600 tokens per minute .* in 15 seconds"
    ) as caught:
        account.check_rate()
    assert caught.value.retry_after == 15
    clock.now += 14.9
    with pytest.raises(sllm.BusyError, match=r"in 1 second$"):
        account.check_rate()
    clock.now += 0.1
    account.check_rate()
    account.spend(149)
    account.check_rate()
    account.spend(1)
    with pytest.raises(sllm.BusyError):
        account.check_rate()


def test_over_many_minutes_the_rate_is_kept(clock: Clock) -> None:
    account = Account("alice", Allowance(tokens_per_minute=120))
    spent = 0
    for _ in range(10 * 60):
        clock.now += 1
        for _ in range(7):
            try:
                account.check_rate()
            except sllm.BusyError:
                break
            account.spend(1)
            spent += 1
    assert 10 * 120 <= spent <= 11 * 120


def test_limits_that_change_count_from_now_on(clock: Clock) -> None:
    account = Account("alice", Allowance(tokens_per_minute=10))
    account.spend(1000)
    with pytest.raises(sllm.BusyError, match="10 tokens per minute"):
        account.check_rate()
    account.allowance = Allowance(tokens_per_minute=100_000)
    clock.now += 1
    account.check_rate()
    account.allowance = Allowance()
    account.spend(10**9)
    account.check_rate()


def test_every_limit_names_itself() -> None:
    account = Account("alice", Allowance(sessions=1, max_prompt=4, grammars=False))
    account.check_sessions(0)
    with pytest.raises(sllm.BusyError, match="alice may have 1 text at once and has it"):
        account.check_sessions(1)
    account.check_prompt(4, grammar=False)
    with pytest.raises(sllm.ContextFullError, match="5 tokens, and alice may send 4"):
        account.check_prompt(5, grammar=False)
    with pytest.raises(ValueError, match="alice may not use grammars"):
        account.check_prompt(4, grammar=True)


def test_a_text_that_was_written_here_is_no_prompt() -> None:
    account = Account("alice")
    for text_id in range(1, 400):
        account.note_text(text_id, 5, 20)
    assert account.wrote(399, 5, 20)
    assert not account.wrote(399, 6, 20)  # it began elsewhere
    assert not account.wrote(399, 5, 21)  # so far it has not been written
    assert not account.wrote(1, 5, 20)  # too long ago
    account.note_text(0, 5, 20)
    assert not account.wrote(0, 5, 20)


# ---- who is known


class Context:
    """What a call's context is asked for here."""

    def __init__(self, token: str | None) -> None:
        self.metadata = auth.bearer(token)
        self.cancelled = threading.Event()
        self.callbacks: list[Callable[[], object]] = []

    def invocation_metadata(self) -> Any:
        return self.metadata

    def add_callback(self, call: Callable[[], object]) -> bool:
        self.callbacks.append(call)
        return True

    def cancel(self) -> None:
        self.cancelled.set()


def make_users(*args: Any, **options: Any) -> Any:
    return Users(*args, **options)


def test_all_hashes_are_compared_whichever_it_is(file: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [file.add(f"user{i}") for i in range(5)]
    users = make_users(TOKEN, file.path)
    try:
        compared: list[tuple[str, str]] = []
        compare = hmac.compare_digest

        def counting(one: str, other: str) -> bool:
            compared.append((one, other))
            return compare(one, other)

        monkeypatch.setattr(hmac, "compare_digest", counting)
        for token in (*tokens, TOKEN, "a-token-of-nobody", ""):
            compared.clear()
            known = users.knows(f"Bearer {token}")
            assert known == (token in (*tokens, TOKEN))
            assert len(compared) == 6
            assert all(len(one) == len(other) == 64 for one, other in compared)
        assert users.caller(Context(tokens[3])).name == "user3"
        assert users.caller(Context(TOKEN)).name == "default"
        with pytest.raises(sllm.AuthError):
            users.caller(Context(None))
    finally:
        users.close()


def test_the_file_is_watched(file: TokenFile, caplog: pytest.LogCaptureFixture) -> None:
    users = make_users(TOKEN, file.path)
    try:

        def knows(token: str) -> Callable[[], bool]:
            return lambda: bool(users.knows(f"Bearer {token}"))

        alice = file.add("alice")
        wait_until(knows(alice))
        bob = file.add("bob", Allowance(sessions=3))
        wait_until(knows(bob))
        account = users.caller(Context(bob))
        file.limit("bob", Allowance(sessions=1))
        wait_until(lambda: account.allowance.sessions == 1)
        new = file.rotate("alice", keep_seconds=1.5)
        wait_until(knows(new))
        wait_until(lambda: not users.knows(f"Bearer {alice}"))
        assert users.knows(f"Bearer {new}")
        file.revoke("bob")
        wait_until(lambda: not users.knows(f"Bearer {bob}"))
        with caplog.at_level(logging.WARNING):
            good = file.path.read_bytes()
            for damage in (b"", good[:-20], b"{}", b"\xff"):
                file.path.write_bytes(damage)
                wait_until(lambda: "go on to count" in caplog.text)
                assert users.knows(f"Bearer {new}") and not users.knows(f"Bearer {bob}")
                caplog.clear()
            file.path.unlink()
            wait_until(lambda: "is gone" in caplog.text)
            assert users.knows(f"Bearer {new}") and not users.knows(f"Bearer {bob}")
            file.path.write_bytes(good)
            file.path.chmod(0o666)
            wait_until(lambda: "others on this machine" in caplog.text)
            file.path.chmod(0o600)
            file.revoke("alice")
            wait_until(lambda: not users.knows(f"Bearer {new}"))
        assert users.knows(f"Bearer {TOKEN}")
        assert alice not in caplog.text and new not in caplog.text
    finally:
        users.close()


def test_a_change_within_the_clocks_resolution_is_seen(file: TokenFile) -> None:
    """Of the same size, in the same inode, at the same time."""
    old = file.add("alice")
    users = make_users(TOKEN, file.path)
    try:
        wait_until(lambda: users.knows(f"Bearer {old}"))
        found = file.path.stat()
        text = file.path.read_text().replace(tokens.token_digest(old), "0" * 64)
        file.path.write_text(text)
        os.utime(file.path, ns=(found.st_atime_ns, found.st_mtime_ns))
        wait_until(lambda: not users.knows(f"Bearer {old}"))
    finally:
        users.close()


def test_a_file_that_cannot_be_read_at_the_start_is_an_error(file: TokenFile) -> None:
    file.add("alice")
    file.path.write_bytes(b"{")
    with pytest.raises(ValueError, match="damaged"):
        make_users(TOKEN, file.path)
    with pytest.raises(ValueError, match="damaged"):
        worker_of(file)


def test_revoked_calls_are_told_and_then_cut(file: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GOODBYE_SECONDS", 0.2)
    token = file.add("alice")
    users = make_users(TOKEN, file.path)
    try:
        polite, rude, late, own = (Context(t) for t in (token, token, token, TOKEN))
        told: list[Exception] = []
        visits = [users.visit(context) for context in (polite, rude, late, own)]
        visits[0].when_revoked(lambda _error: polite.callbacks[0]())  # its call ends
        visits[1].when_revoked(told.append)
        visits[3].when_revoked(told.append)
        file.revoke("alice")
        wait_until(lambda: told)
        assert isinstance(told[0], sllm.AuthError) and "alice" in str(told[0])
        visits[2].when_revoked(told.append)  # said too late, and heard at once
        assert len(told) == 2
        wait_until(rude.cancelled.is_set)
        wait_until(late.cancelled.is_set)
        assert not polite.cancelled.is_set() and not own.cancelled.is_set()
        with pytest.raises(sllm.AuthError):
            users.visit(Context(token))
    finally:
        users.close()


# ---- over the wire


def test_a_text_under_a_token_that_is_revoked_ends(file: TokenFile, target_model: Model) -> None:
    """Another user's text, and one of the worker's own token, do not notice."""
    alice, bob = file.add("alice"), file.add("bob")
    sampling = without_end(target_model, GREEDY)
    with worker_of(file, target_model, pass_seconds=0.005) as worker:
        with (
            sllm.connect(line(worker, alice)) as a,
            sllm.connect(line(worker, bob)) as b,
            sllm.connect(worker.uri) as own,
        ):
            streams = [
                sllm.generate(remote.target(), "Once", sampling=sampling, max_tokens=200)
                for remote in (a, b, own)
            ]
            first = [next(iter(stream)) for stream in streams]
            assert all(first)
            waiting = a.target(run_ahead=False).open(make_prompt(target_model, 5, seed=1), sampling, 9)
            waiting.hint(5, [])
            next(waiting)
            assert {s.user for s in worker._scheduler.running()} == {"alice", "bob", "default"}
            file.revoke("alice")
            with pytest.raises(sllm.AuthError, match="token of alice was revoked"):
                list(streams[0])
            with pytest.raises(sllm.AuthError, match="token of alice was revoked"):
                waiting.poll(60)
            waiting.close()
            streams[0].close()
            assert streams[1].text() == streams[2].text()
            with pytest.raises(sllm.AuthError):
                sllm.connect(line(worker, alice))
            with pytest.raises(sllm.AuthError):
                a.status()
        wait_until(lambda: not worker._scheduler.running())


def test_rotation_lets_a_client_change_over(file: TokenFile) -> None:
    old = file.add("alice", Allowance(sessions=1))
    with worker_of(file) as worker, sllm.connect(line(worker, old)) as remote:
        new = file.rotate("alice", keep_seconds=600)
        wait_until(lambda: worker._users.knows(f"Bearer {new}"))
        assert remote.status() is not None
        with sllm.connect(line(worker, new)) as changed:
            newest = file.rotate("alice")
            wait_until(lambda: worker._users.knows(f"Bearer {newest}"))
            for gone in (remote, changed):
                with pytest.raises(sllm.AuthError):
                    gone.status()


def test_users_do_not_share_prefixes(file: TokenFile, target_model: Model) -> None:
    """How much is computed tells it: the same user pays for a text once, another one again."""
    alice, bob = file.add("alice"), file.add("bob")
    prompt = make_prompt(target_model, 60, seed=4).tolist()
    with worker_of(file, target_model, limits={"sessions": 4}) as worker:

        def reused(token: str) -> int:
            with Client(worker.address, token=token) as client:
                stream = client.generate(opening(prompt, GREEDY, 2))
                text = stream.run()
                assert text == one_by_one(target_model, prompt, GREEDY, 2)
                wait_until(lambda: not worker._scheduler.running())
                return int(stream.opened.n_reused)

        assert [reused(alice), reused(alice)] == [0, 59]
        assert [reused(bob), reused(TOKEN)] == [0, 0]
        assert [reused(bob), reused(TOKEN), reused(alice)] == [59, 59, 59]
        score = sllm.connect(line(worker, bob))
        with score:
            assert score.score(make_prompt(target_model, 60, seed=4), 50).n_reused == 49
        assert worker.stats.prompt_tokens - worker.stats.reused_tokens == 3 * 60 + 4 + 11


def test_another_users_text_cannot_be_ended_by_its_number(file: TokenFile, target_model: Model) -> None:
    alice, bob = file.add("alice"), file.add("bob")
    endless = without_end(target_model, GREEDY)
    with (
        worker_of(file, target_model) as worker,
        Client(worker.address, token=alice) as a,
        Client(worker.address, token=bob) as b,
    ):
        stream = a.generate(opening((5, 6), endless, 9, run_ahead=False, text_id=77))
        stream.next()
        other = b.generate(opening((5, 6), GREEDY, 3, text_id=77))
        other.run()
        for number in range(9):
            stream.send(hint(2 + len(stream.text), [], number + 1))
            stream.until(number + 1)
        stream.run()
        assert stream.reason == "length"


def test_limits_over_the_wire(file: TokenFile, target_model: Model) -> None:
    alice = file.add("alice", Allowance(sessions=1, max_prompt=9, grammars=False))
    with (
        worker_of(file, target_model) as worker,
        Client(worker.address, token=alice) as client,
        Client(worker.address) as own,
    ):
        info = client.info()
        assert (info.sessions, info.max_prompt, "grammar" in info.features) == (1, 9, False)
        assert "json-schema" not in info.features
        assert (own.info().sessions, own.info().max_prompt) == (4, 256)
        assert client.generate(opening([5] * 10)).end()[0] is Code.OUT_OF_RANGE
        code, details = client.generate(opening(sampling=replace(GREEDY, grammar="not one"))).end()
        assert code is Code.INVALID_ARGUMENT and "alice may not use grammars" in details
        held = client.generate(opening(run_ahead=False))
        held.next()
        code, details = client.generate(opening()).end()
        assert code is Code.RESOURCE_EXHAUSTED and "alice may have 1 text at once" in details
        theirs = own.generate(opening(run_ahead=False))
        theirs.next()
        assert len(client.status().running) == 1
        assert len(own.status().running) == 2
        theirs.cancel()
        held.cancel()
        wait_until(lambda: not worker._scheduler.running())
        assert len(client.generate(opening()).run()) == 8
        file.limit("alice", Allowance())
        wait_until(lambda: client.info().max_prompt == 256)
        assert client.generate(opening([5] * 10)).run()


def test_a_rate_holds_a_text_up_and_nothing_is_lost(
    file: TokenFile, target_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client goes on when it may. A limit of prompts does not count what was written meanwhile."""
    sampling = without_end(target_model, replace(PLAIN, seed=3))
    prompt = make_prompt(target_model, 6, seed=3)
    wanted = one_by_one(target_model, prompt.tolist(), sampling, 90, n_ctx=256)
    alice = file.add("alice", Allowance(tokens_per_minute=1200, max_prompt=8))
    with worker_of(file, target_model) as worker, sllm.connect(line(worker, alice)) as remote:
        account = worker._users._accounts["alice"]
        account.spend(1200 - 40)  # a little is left, and then a quarter of it has to come back
        monkeypatch.setattr(module, "_REST", 0.02)
        generation = remote.target().open(prompt, sampling, 90)
        text = [token for commit in generation for token in commit.tokens]
        assert text == wanted
        assert generation.remote.n_reconnects >= 1
        generation.close()
        assert worker.stats.refused + worker.stats.sessions_total > 1


def test_a_rate_that_does_not_let_a_text_begin(file: TokenFile, target_model: Model) -> None:
    alice = file.add("alice", Allowance(tokens_per_minute=60))
    with worker_of(file, target_model) as worker, sllm.connect(line(worker, alice)) as remote:
        worker._users._accounts["alice"].spend(120)
        generation = remote.target().open(make_prompt(target_model, 5, seed=1), GREEDY, 5)
        with pytest.raises(
            sllm.BusyError, match=r"alice may have 60 tokens per minute .* in 7\d seconds"
        ) as caught:
            next(generation)
        generation.close()
        assert 60 < (caught.value.retry_after or 0) <= 75
        with pytest.raises(sllm.BusyError, match="per minute"):
            remote.score(make_prompt(target_model, 5, seed=1), 2)


def test_one_users_many_texts_do_not_keep_another_out(file: TokenFile, target_model: Model) -> None:
    alice, bob = file.add("alice"), file.add("bob")
    with (
        worker_of(file, target_model, limits={"sessions": 2, "queue": 8}) as worker,
        Client(worker.address, token=alice) as a,
        Client(worker.address, token=bob) as b,
    ):
        held, kept = (a.generate(opening(run_ahead=False)) for _ in range(2))
        held.next()
        kept.next()
        hers = [a.generate(opening([7 + i], run_ahead=False)) for i in range(3)]
        wait_until(lambda: worker._scheduler.n_queued == 3)
        his = b.generate(opening([5], run_ahead=False))
        wait_until(lambda: worker._scheduler.n_queued == 4)
        held.cancel()
        wait_until(lambda: {s.user for s in worker._scheduler.running()} == {"alice", "bob"})
        for stream in (*hers, his, kept):
            stream.cancel()
        wait_until(lambda: worker._scheduler.n_queued == 0 and not runs(worker))


# ---- layers


@contextmanager
def chain(worker: Worker, token: str) -> Iterator[sllm.SplitTarget]:
    with (
        sllm.connect(line(worker, token)) as remote,
        sllm.SplitTarget(
            embedded.TARGET, middle=remote, head=2, tail=1, codec="f32", n_ctx=256, **EXACT
        ) as target,
    ):
        yield target


def test_users_of_layers(file: TokenFile, target_model: Model) -> None:
    """Limits, numbers of sequences and revocation are those of texts."""
    alice, bob = file.add("alice", Allowance(sessions=1)), file.add("bob")
    sampling = without_end(target_model, GREEDY)
    prompt = make_prompt(target_model, 6, seed=3)
    wanted = one_by_one(target_model, prompt.tolist(), sampling, 60, n_ctx=256)
    with worker_of(file, embedded.TARGET, layers=True, limits={"sessions": 4}) as worker:
        scheduler = worker._scheduler
        with chain(worker, alice) as a, chain(worker, bob) as b, chain(worker, alice) as second:
            hers, his = (target.open(prompt, sampling, 60) for target in (a, b))
            first = [next(generation).tokens for generation in (hers, his)]
            assert first[0] == first[1]
            assert {s.user for s in scheduler.running()} == {"alice", "bob"}
            with pytest.raises(sllm.BusyError, match="alice may have 1 text at once"):
                next(second.open(prompt, sampling, 60))
            file.revoke("alice")
            with pytest.raises(sllm.AuthError, match=r"alice was revoked|missing or wrong"):
                list(hers)
            text = [*first[1], *(token for commit in his for token in commit.tokens)]
            assert text == wanted


def test_a_rate_of_layers(file: TokenFile, target_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REST", 0.02)
    sampling = without_end(target_model, replace(PLAIN, seed=3))
    prompt = make_prompt(target_model, 6, seed=3)
    wanted = one_by_one(target_model, prompt.tolist(), sampling, 60, n_ctx=256)
    alice = file.add("alice", Allowance(tokens_per_minute=1200))
    with (
        worker_of(file, embedded.TARGET, layers=True) as worker,
        chain(worker, alice) as target,
    ):
        worker._users._accounts["alice"].spend(1200 - 40)
        generation = target.open(prompt, sampling, 60)
        assert [token for commit in generation for token in commit.tokens] == wanted
        assert generation.remote.n_reconnects >= 1


def test_sequences_of_others_are_not_taken_up(file: TokenFile) -> None:
    del file
    found = LayerScheduler(embedded.TARGET, (2, 7), Limits(sessions=3), n_ctx=256)
    try:
        key = RangeKey(2, 7, output=False)
        alice, bob = Account("alice"), Account("bob")
        rows = np.ones((5, 256), np.float32)
        first = found.open(key, 77, account=alice)
        first.submit(LayerRequest(0, rows))
        next(first.answers())
        other = found.open(key, 77, account=bob)
        assert other.n_kept == 0 and other.slot is not first.slot
        assert first.ended is None
        first.detach()
        other.detach()
        assert found.open(key, 77, account=alice).n_kept == 5
        assert found.open(key, 77, account=bob).n_kept == 0
    finally:
        found.close()


def test_a_worker_that_is_told_nothing_watches_its_state(draft_model: Model, tmp_path: Path) -> None:
    """One that is given a token has no users besides, unless it is given their file."""
    token = TokenFile(tmp_path / "tokens.json").add("alice")
    options: dict[str, Any] = {"state": tmp_path, "n_ctx": 256, **EXACT}
    with Worker(draft_model, **options) as worker, sllm.connect(line(worker, token)) as remote:
        assert remote.status() is not None
    with Worker(draft_model, token=TOKEN, **options) as worker, pytest.raises(sllm.AuthError):
        sllm.connect(line(worker, token))


def test_without_access_control_there_are_no_users(draft_model: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="insecure means"):
        Worker(draft_model, insecure=True, tokens=tmp_path / "tokens.json")
    with Worker(draft_model, insecure=True, n_ctx=256, **EXACT) as worker, sllm.connect(worker.uri) as remote:
        assert sllm.generate(remote.target(), "Once", max_tokens=3).text()
        assert worker._scheduler.running() == [] or worker._scheduler.running()[0].user == "default"
