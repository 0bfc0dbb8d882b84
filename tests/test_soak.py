"""Long runs (``pytest -m soak``). Ten thousand losses of links and workers, over every target that is reached
through one: the text stays the target's own. An hour of eight sessions: neither side grows.

SLLM_SOAK_LOSSES sets how many losses there are (10,000 take some 10 minutes on two idle cores), and
SLLM_SOAK_SECONDS how long the sessions go on (3600).
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from oracles import EXACT, PLAIN, make_prompt, one_by_one
from remote_worker import Spares, WorkerProcess, n_threads, settled, through

import sllm
from sllm import embedded
from sllm.cli.slow_link import Link
from sllm.draft.drafters import ModelDrafter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from oracles import Tokens
    from typing_extensions import Self

    from sllm.engine.model import Model

LOSSES = int(os.environ.get("SLLM_SOAK_LOSSES", "10000"))
SECONDS = float(os.environ.get("SLLM_SOAK_SECONDS", "3600"))
pytestmark = [pytest.mark.soak, pytest.mark.timeout(max(3600, 2 * SECONDS))]

N_CTX = 256
N_READERS = 4
KILLS = 0.02  # of all losses: a worker takes a second or two to start


@dataclass
class Losses:
    """What has been lost so far."""

    kills: int = 0
    outages: int = 0
    texts: int = 0
    runs: int = 0
    reconnects: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Storm:
    """Breaks a link and kills what is behind it, on a thread of its own, until so much is lost."""

    def __init__(self, link: Link, spares: Spares, losses: Losses, budget: int, seed: int) -> None:
        self._link, self._spares, self._losses, self._budget = link, spares, losses, budget
        self._rng = random.Random(seed)
        self._over = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="storm")

    @property
    def over(self) -> bool:
        """Whether everything has been lost that was to be."""
        return self._over.is_set()

    def _lost(self) -> int:
        return self._link.stats.cuts + self._losses.kills

    def _run(self) -> None:
        try:
            while self._lost() < self._budget and not self._over.is_set():
                self._one()
        except BaseException as error:  # noqa: BLE001
            self._failed = error
        finally:
            self._link.cut_after_bytes = None
            self._over.set()

    def _one(self) -> None:
        link, rng, before = self._link, self._rng, self._lost()
        what = rng.random()
        if what < KILLS * N_READERS / 2:
            self._spares.kill()
            link.retarget(self._spares.current.address)
            self._losses.kills += 1
        elif what < 0.2:
            link.down()
            link.cut()
            time.sleep(rng.uniform(0, 0.05))
            link.up()
            self._losses.outages += 1
        elif what < 0.5:
            link.cut()
        else:  # in the middle of a message, or of a handshake
            link.cut_after_bytes = int(10 ** rng.uniform(1, 4.7))
            until = time.monotonic() + 1.0
            while self._lost() == before and time.monotonic() < until and not self._over.is_set():
                time.sleep(0.002)
            link.cut_after_bytes = None
        time.sleep(rng.uniform(0, 0.15))
        if rng.random() < 0.3:  # calm until something has come through, however slow the machine
            runs, until = self._losses.runs, time.monotonic() + 10.0
            while self._losses.runs == runs and time.monotonic() < until and not self._over.is_set():
                time.sleep(0.002)

    def stop(self) -> None:
        """End it, whatever there is left of it."""
        self._over.set()
        self._thread.join()
        self._link.cut_after_bytes = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()
        if self._failed is not None:
            raise self._failed


@dataclass(frozen=True)
class Text:
    """A text and its tokens as the model says them on its own."""

    prompt: Tokens
    sampling: sllm.SamplingParams
    wanted: list[int]


def texts_of(model: Model) -> list[Text]:
    rng = random.Random(0)
    texts = []
    for seed in range(16):
        sampling = replace(
            PLAIN,
            temperature=rng.choice([0.0, 0.7, 1.2]),
            top_k=rng.choice([0, 40]),
            penalty_repeat=rng.choice([1.0, 1.1]),
            seed=rng.randrange(1 << 64),
        )
        prompt = make_prompt(model, rng.choice([1, 5, 30, 90]), seed)
        n_tokens = rng.choice([5, 30, 60])
        texts.append(Text(prompt, sampling, one_by_one(model, prompt, sampling, n_tokens, N_CTX)))
    return texts


# ---- the targets -------------------------------------------------------------------------------------------


@contextmanager
def remote_target(link: Link, uri: str, _model: Path) -> Iterator[Any]:
    with sllm.connect(through(link, uri), keepalive=1.0, timeout=60.0, deadline=600.0) as remote:
        yield remote.target(on_loss="wait")


@contextmanager
def with_local_text(link: Link, uri: str, _model: Path) -> Iterator[Any]:
    """The draft's own text goes on while there is no link, and is taken back where it was wrong."""
    with sllm.connect(through(link, uri), keepalive=1.0, timeout=60.0, deadline=600.0) as remote:
        yield remote.target(on_loss="local", run_ahead=False)


def split_target(tail: int | None) -> Callable[..., Any]:
    @contextmanager
    def opened(link: Link, uri: str, model: Path) -> Iterator[Any]:
        options: dict[str, Any] = {"codec": "f32", "n_ctx": N_CTX, **EXACT}
        with (
            sllm.connect(through(link, uri), keepalive=1.0, timeout=60.0, deadline=600.0) as remote,
            sllm.SplitTarget(model, head=1, tail=tail, middle=remote, **options) as split,
        ):
            yield split

    return opened


TARGETS: dict[str, tuple[Callable[..., Any], dict[str, Any], str | None]] = {
    "text": (remote_target, {}, None),
    "text, local meanwhile": (with_local_text, {}, None),
    "text of a hybrid model": (remote_target, {"n_rollback": 16}, "qwen35"),
    "layers, the tail here": (split_target(1), {"layers": True}, None),
    "layers, the tail there": (split_target(None), {"layers": True}, None),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_the_text_survives_losses(
    kind: str, random_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("SLLM_CACHE", str(tmp_path / "cache"))
    target, options, shape = TARGETS[kind]
    path = embedded.TARGET if shape is None else random_model(shape)
    budget = LOSSES // len(TARGETS)
    losses = Losses()
    numbers = itertools.count()
    limits = {"sessions": N_READERS + 4, "prefill": 16}

    def start() -> WorkerProcess:
        return WorkerProcess(
            tmp_path / "state", token="soak-" * 4, model=path, n_ctx=N_CTX, limits=limits, **options
        )

    with ExitStack() as stack:
        model = stack.enter_context(sllm.Model(path))
        draft = stack.enter_context(sllm.Model(embedded.DRAFT)) if shape is None else None
        texts = texts_of(model)
        spares = stack.enter_context(Spares(start))
        uri = spares.current.uri
        link = stack.enter_context(Link(spares.current.address))
        with sllm.connect(through(link, uri)) as remote:
            assert options.get("layers") or remote.vocab.n_tokens  # fetched in fair weather
        # Connected in fair weather: connect() is told of a loss, and is not to hide it.
        targets = [stack.enter_context(target(link, uri, path)) for _ in range(N_READERS)]
        storm = stack.enter_context(Storm(link, spares, losses, budget, 7))

        def read(opened: Any, drafts: list[Any]) -> None:
            text = texts[next(numbers) % len(texts)]
            stream = sllm.generate(
                opened,
                text.prompt,
                draft=drafts[next(numbers) % len(drafts)],
                sampling=text.sampling,
                max_tokens=len(text.wanted),
            )
            runs = []
            for run in stream:
                runs.append(run)
                losses.runs += 1
            told = settled(runs, len(text.prompt))
            assert [t for run in told for t in run.tokens] == text.wanted
            with losses.lock:
                losses.texts += 1
                assert stream.stats.remote is not None
                losses.reconnects += stream.stats.remote.n_reconnects

        def reader(opened: Any) -> None:
            with ExitStack() as own:
                drafts: list[Any] = [None, "ngram"]
                if draft is not None:
                    drafts += [own.enter_context(ModelDrafter(draft, n_ctx=N_CTX, **EXACT))]
                while not storm.over:
                    read(opened, drafts)
                read(opened, drafts)  # and one in fair weather

        with ThreadPoolExecutor(N_READERS) as readers:
            running = [readers.submit(reader, one) for one in targets]
            try:
                for done in running:
                    done.result()
            finally:
                storm.stop()
    lost = link.stats.cuts + losses.kills
    with capsys.disabled():
        print(
            f"\n{kind}: {link.stats.cuts} connections cut ({losses.outages} outages), {losses.kills} workers"
            f" killed, {losses.texts} texts, {losses.reconnects} times the link was found again"
        )
    assert lost >= budget
    assert losses.texts > N_READERS
    assert n_threads("sllm-remote") == n_threads("sllm-draft") == 0


# ---- growth ------------------------------------------------------------------------------------------------

N_SESSIONS = 8
GROWTH = 1.05  # from the second tenth of the time to the last


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_eight_sessions_do_not_grow(
    target_model: Model, draft_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("SLLM_CACHE", str(tmp_path / "cache"))
    texts = texts_of(target_model)
    over = threading.Event()
    numbers = itertools.count()
    seen: dict[str, list[int]] = {"worker": [], "client": []}
    worker = WorkerProcess(
        tmp_path / "state", n_ctx=N_CTX, pass_seconds=0.02, limits={"sessions": N_SESSIONS}
    )

    def session(remote: Any) -> int:
        n_texts = 0
        with ModelDrafter(draft_model, n_ctx=N_CTX, **EXACT) as drafter:
            while not over.is_set():
                text = texts[next(numbers) % len(texts)]
                draft: Any = [None, "ngram", drafter][next(numbers) % 3]
                stream = sllm.generate(
                    remote.target(),
                    text.prompt,
                    draft=draft,
                    sampling=text.sampling,
                    max_tokens=len(text.wanted),
                )
                assert [t for run in stream for t in run.tokens] == text.wanted
                n_texts += 1
        return n_texts

    with worker, ThreadPoolExecutor(N_SESSIONS) as sessions, sllm.connect(worker.uri) as remote:
        running = [sessions.submit(session, remote) for _ in range(N_SESSIONS)]
        until = time.monotonic() + SECONDS
        try:
            while time.monotonic() < until and not any(one.done() for one in running):
                time.sleep(SECONDS / 300)
                seen["worker"].append(resident(worker.process.pid))
                seen["client"].append(resident(os.getpid()))
        finally:
            over.set()
        n_texts = sum(one.result() for one in running)
    tenth = len(seen["worker"]) // 10
    grown = {
        side: statistics.median(sizes[-tenth:]) / statistics.median(sizes[tenth : 2 * tenth])
        for side, sizes in seen.items()
    }
    with capsys.disabled():
        print(f"\n{n_texts} texts of {N_SESSIONS} sessions in {SECONDS:g} s; grown to: {grown}")
    assert max(grown.values()) < GROWTH
