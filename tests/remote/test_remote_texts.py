"""The contract of the remote target: whatever drafts, whatever the link does and whoever dies, the text is
the target's own, and no token is lost or told twice.
"""

from __future__ import annotations

import math
import random
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import EXACT, examples, make_prompt, one_by_one
from remote_worker import Spares, WorkerProcess, settled, through, wait_until

import sllm
from sllm.cli.slow_link import Link
from sllm.draft.drafters import ModelDrafter
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from oracles import Tokens
    from typing_extensions import Self

    from sllm.draft.drafters import Drafter
    from sllm.engine.model import Model
    from sllm.generation.text_stream import TextStream

N_CTX = 256


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def worker(target_model: Model, state: Path) -> Iterator[Worker]:
    """Slow enough for something to happen meanwhile. Its memory holds what earlier examples left there."""
    limits = Limits(sessions=3, prefill=16)
    with Worker(target_model, state=state, n_ctx=N_CTX, limits=limits, pass_seconds=0.002, **EXACT) as worker:
        yield worker


@pytest.fixture(scope="module")
def drafting_worker(target_model: Model, draft_model: Model, state: Path) -> Iterator[Worker]:
    """Drafts by itself as well."""
    options = {**EXACT, "draft": draft_model, "draft_threads": 1}
    limits = Limits(sessions=3, prefill=16)
    with Worker(
        target_model, state=state, n_ctx=N_CTX, limits=limits, pass_seconds=0.002, **options
    ) as worker:
        yield worker


@pytest.fixture(scope="module")
def spares(state: Path) -> Iterator[Spares]:
    with Spares(lambda: WorkerProcess(state, n_ctx=N_CTX, pass_seconds=0.004)) as spares:
        yield spares


@pytest.fixture(scope="module")
def drafter(draft_model: Model) -> Iterator[ModelDrafter]:
    """One for all texts, so that it begins with the memory of the one before."""
    with ModelDrafter(draft_model, n_ctx=N_CTX, **EXACT) as drafter:
        yield drafter


# ---- what may happen ---------------------------------------------------------------------------------------


class Weather:
    """Does one thing after the other to a link, on a thread of its own, until the text is told."""

    def __init__(self, link: Link, events: Sequence[tuple[str, float]], kill: Callable[[], None]) -> None:
        self._link = link
        self._events = events
        self._kill = kill
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weather")

    def _run(self) -> None:
        link = self._link
        for what, amount in self._events:
            if self._over.is_set():
                return
            if what == "bytes":  # the connection dies with this byte
                cuts = link.stats.cuts
                link.cut_after_bytes = int(amount)
                while link.stats.cuts == cuts and not self._over.wait(0.001):
                    pass
                link.cut_after_bytes = None
                continue
            self._over.wait(amount)
            if what == "cut":
                link.cut()
            elif what == "down":
                link.down()
                link.cut()
                self._over.wait(0.15)
                link.up()
            elif what == "stall":
                link.stall()
                self._over.wait(3.5)
                link.resume()
            elif what == "kill":
                self._kill()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self._thread.join()
        self._link.cut_after_bytes = None


biases = st.sampled_from([(), ((0, -math.inf), (2, -math.inf)), ((300, 4.0),)])
grammars = st.sampled_from([None, None, None, "root ::= [a-z ,.]{3,40}", 'root ::= ("你" | "好" | "\\n")*'])
samplings = st.builds(
    sllm.SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 1, 40]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.05]),
    penalty_repeat=st.sampled_from([1.0, 1.2]),
    penalty_freq=st.sampled_from([0.0, 0.5]),
    logit_bias=biases,
    grammar=grammars,
    seed=st.integers(0, 2**64 - 1),
).map(lambda s: replace(s, logit_bias=()) if s.grammar else s)  # a grammar must be able to end

cuts = st.one_of(
    st.tuples(st.just("bytes"), st.integers(1, 12_000)),
    st.tuples(st.just("cut"), st.floats(0, 0.15)),
)
losses = st.one_of(cuts, st.tuples(st.just("down"), st.floats(0, 0.1)))


def make_draft(
    kind: str, rng: random.Random, drafter: ModelDrafter, wanted: list[int], n_prompt: int, n_vocab: int
) -> Drafter | str | Callable[[Tokens, int], Any] | None:
    """One of everything that may draft."""

    def perfect(tokens: Tokens, n_max: int) -> list[int]:
        return wanted[len(tokens) - n_prompt :][:n_max]

    def flawed(tokens: Tokens, n_max: int) -> list[int]:
        return [t if rng.random() < 0.8 else rng.randrange(n_vocab) for t in perfect(tokens, n_max)]

    def garbage(tokens: Tokens, n_max: int) -> list[int]:
        some = [-1, -(2**31), 2**31 - 1, n_vocab, 0, 2, rng.randrange(n_vocab)]
        right = perfect(tokens, rng.randint(0, n_max))
        return right + [rng.choice(some) for _ in range(rng.randint(0, 40))]

    drafts: dict[str, Any] = {
        "none": None,
        "model": drafter,
        "ngram": "ngram",
        "perfect": perfect,
        "flawed": flawed,
        "garbage": garbage,
        "nothing": lambda _tokens, _n_max: None,
    }
    draft: Drafter | str | Callable[[Tokens, int], Any] | None = drafts[kind]
    return draft


@dataclass(frozen=True)
class Case:
    """A text and what may draft for it."""

    prompt: Any
    sampling: sllm.SamplingParams
    max_tokens: int
    drafting: str
    run_ahead: bool
    on_loss: str
    seed: int


DRAFTING = ["model", "model", "flawed", "flawed", "garbage", "perfect", "ngram", "none", "nothing"]

cases = st.builds(
    Case,
    prompt=st.sampled_from(["Once upon a time", "你好，我的名字是", "the cat the cat the cat", 7, 40]),
    sampling=samplings,
    max_tokens=st.integers(1, 60),
    drafting=st.sampled_from(DRAFTING),
    run_ahead=st.booleans(),
    on_loss=st.sampled_from(["wait", "local"]),
    seed=st.integers(0, 999),
)


def check(
    case: Case,
    model: Model,
    drafter: ModelDrafter,
    uri: str,
    link: Link,
    events: Sequence[tuple[str, float]],
    kill: Callable[[], None] = lambda: None,
) -> TextStream:
    """Tell the text while the events happen, and compare."""
    vocab, prompt = model.vocab, case.prompt
    ids = make_prompt(model, prompt, case.seed) if isinstance(prompt, int) else vocab.encode(prompt)
    wanted = one_by_one(model, ids, case.sampling, case.max_tokens, n_ctx=N_CTX)
    rng = random.Random(case.seed)
    draft = make_draft(case.drafting, rng, drafter, wanted, len(ids), vocab.n_tokens)
    with sllm.connect(through(link, uri), keepalive=1.0, timeout=20.0) as remote:
        assert remote.vocab.n_tokens  # fetched in fair weather
        target = remote.target(run_ahead=case.run_ahead, on_loss=case.on_loss)
        with Weather(link, events, kill):
            stream = sllm.generate(
                target, ids, draft=draft, sampling=case.sampling, max_tokens=case.max_tokens
            )
            runs = list(stream)
    told = settled(runs, len(ids))
    assert [t for run in told for t in run.tokens] == wanted
    whole = b"".join(map(vocab.piece, wanted)).decode("utf-8", "replace")
    assert "".join(run.text for run in told) == whole
    stats = stream.stats
    assert stats.finish_reason == ("eog" if vocab.is_eog(wanted[-1]) else "length")
    assert stats.n_tokens == len(wanted) == stats.n_passes + stats.n_accepted
    assert stats.n_local == sum(len(run.tokens) for run in runs if run.source == "local")
    assert stats.n_local == 0 or case.on_loss == "local"
    assert stats.remote is not None
    assert stats.remote.lost_seconds > 0 or stats.remote.n_reconnects == 0
    return stream


# ---- the properties ----------------------------------------------------------------------------------------


@examples(40)
@given(
    case=cases,
    delay=st.sampled_from([0.0, 0.0, 0.005, 0.02]),
    jitter=st.sampled_from([0.0, 0.0, 0.01]),
    seed=st.integers(0, 99),
)
def test_on_any_link(
    worker: Worker,
    target_model: Model,
    drafter: ModelDrafter,
    case: Case,
    delay: float,
    jitter: float,
    seed: int,
) -> None:
    address = worker.address
    with Link((address.host, address.port), delay=delay, jitter=jitter, seed=seed) as link:
        stream = check(case, target_model, drafter, worker.uri, link, ())
    assert stream.stats.remote is not None
    assert stream.stats.remote.n_reconnects == 0


@examples(40)
@given(
    case=cases,
    delay=st.sampled_from([0.0, 0.0, 0.005]),
    events=st.lists(losses, min_size=1, max_size=3),
)
def test_over_a_link_that_breaks(
    worker: Worker,
    target_model: Model,
    drafter: ModelDrafter,
    case: Case,
    delay: float,
    events: list[tuple[str, float]],
) -> None:
    address = worker.address
    with Link((address.host, address.port), delay=delay) as link:
        check(case, target_model, drafter, worker.uri, link, events)


@examples(40)
@given(
    case=cases,
    delay=st.sampled_from([0.0, 0.0, 0.005, 0.02]),
    events=st.lists(losses, max_size=2),
)
def test_with_drafts_on_both_sides(
    drafting_worker: Worker,
    target_model: Model,
    drafter: ModelDrafter,
    case: Case,
    delay: float,
    events: list[tuple[str, float]],
) -> None:
    address = drafting_worker.address
    with Link((address.host, address.port), delay=delay) as link:
        check(case, target_model, drafter, drafting_worker.uri, link, events)


def test_both_sides_have_drafted(drafting_worker: Worker) -> None:
    wait_until(lambda: not drafting_worker._scheduler.running(), "the end of all sessions")
    stats = drafting_worker.stats
    assert stats.own_drafted > stats.own_accepted > 0
    assert stats.drafted - stats.own_drafted > stats.accepted - stats.own_accepted > 0


@examples(2)
@given(case=cases, seconds=st.floats(0, 0.05))
def test_over_a_link_that_stalls(
    worker: Worker, target_model: Model, drafter: ModelDrafter, case: Case, seconds: float
) -> None:
    address = worker.address
    case = replace(case, max_tokens=60, sampling=replace(case.sampling, grammar=None))
    with Link((address.host, address.port)) as link:
        check(case, target_model, drafter, worker.uri, link, [("stall", seconds)])


@examples(6)
@given(
    case=cases,
    kills=st.lists(st.tuples(st.just("kill"), st.floats(0, 0.2)), min_size=1, max_size=2),
    cut=st.lists(cuts, max_size=1),
)
def test_with_workers_that_die(
    spares: Spares,
    target_model: Model,
    drafter: ModelDrafter,
    case: Case,
    kills: list[tuple[str, float]],
    cut: list[tuple[str, float]],
) -> None:
    """Another one takes over at another port."""
    current = spares.current
    with Link(current.address) as link:

        def kill() -> None:
            spares.kill()
            link.retarget(spares.current.address)

        check(case, target_model, drafter, current.uri, link, [*kills, *cut], kill)


def test_the_worker_is_unharmed(worker: Worker) -> None:
    wait_until(lambda: not worker._scheduler.running(), "the end of all sessions")
    assert worker._scheduler.n_queued == 0
