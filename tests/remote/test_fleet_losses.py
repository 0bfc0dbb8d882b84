"""Workers of a fleet are killed and drained at random, hundreds of times, and every text is whole."""

from __future__ import annotations

import random
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from oracles import EFFORT, EXACT, PLAIN, one_by_one, without_end
from remote_worker import PATIENCE, n_threads, through, wait_until

import sllm
from sllm.cli.slow_link import Link
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sllm.engine.model import Model
    from sllm.remote.connection import Remote

N_EVENTS = 500 * EFFORT
N_CLIENTS = 4
LONGEST = 40
PROMPTS = [[5, 6, 7], [9], list(range(30, 70)), [5, 6, 7, 8, 9, 10, 11]]
SEEDS = 3


class Place:
    """One worker after the other at the same address, behind a link that ends when one is killed."""

    def __init__(self, model: Model, rng: random.Random) -> None:
        self._model = model
        self._rng = rng
        self.worker = self._start()
        self.link = Link((self.worker.address.host, self.worker.address.port))
        self.uri = through(self.link, self.worker.uri)

    def _start(self) -> Worker:
        limits = Limits(sessions=self._rng.choice([1, 2, 4]))
        return Worker(self._model, insecure=True, n_ctx=128, limits=limits, pass_seconds=0.002, **EXACT)

    def kill(self) -> None:
        """Let it vanish without a word: its connections break, and what it held is lost."""
        self.link.down()
        self.link.cut()
        self.worker.close()
        self._replace()
        time.sleep(self._rng.uniform(0, 0.03))
        self.link.up()

    def drain(self) -> None:
        """Shut it down in order, with little time for its texts or with much."""
        self.worker.drain(self._rng.choice([0.0, 0.01, 0.05]), notice=self._rng.choice([0.0, 0.05, 10.0]))
        self.worker.close()
        self._replace()

    def break_link(self) -> None:
        """Break its connections; it goes on."""
        self.link.cut()

    def _replace(self) -> None:
        self.worker = self._start()
        self.link.retarget((self.worker.address.host, self.worker.address.port))

    def close(self) -> None:
        self.link.close()
        self.worker.close()


@pytest.fixture
def places(target_model: Model) -> Iterator[list[Place]]:
    with ExitStack() as stack:
        found = []
        for i in range(3):
            found.append(Place(target_model, random.Random(i)))
            stack.callback(found[-1].close)
        yield found
    assert n_threads("sllm-") == 0


def test_every_text_is_whole(places: list[Place], target_model: Model) -> None:
    params = [replace(without_end(target_model, PLAIN), seed=seed) for seed in range(SEEDS)]
    wanted = {
        (i, seed): one_by_one(target_model, prompt, params[seed], LONGEST)
        for i, prompt in enumerate(PROMPTS)
        for seed in range(SEEDS)
    }
    over = threading.Event()
    wrong: list[object] = []
    counts = {"texts": 0, "moves": 0, "reconnects": 0, "hedged": 0}
    lock = threading.Lock()

    def write(number: int, remote: Remote) -> None:
        rng = random.Random(1000 + number)
        target = remote.target(hedge=0.03 if number == 0 else False, run_ahead=number != 3)
        while not over.is_set() and not wrong:
            i, seed, n = rng.randrange(len(PROMPTS)), rng.randrange(SEEDS), rng.randint(1, LONGEST)
            try:
                draft = "ngram" if number == 1 else None  # whose hints go wherever the text goes
                stream = sllm.generate(target, PROMPTS[i], draft=draft, sampling=params[seed], max_tokens=n)
                tokens = [t for run in stream for t in run.tokens]
            except sllm.SllmError as error:
                wrong.append(error)
                return
            if tokens != wanted[i, seed][:n] or stream.stats.finish_reason != "length":
                wrong.append((i, seed, n, tokens, stream.stats))
            link = stream.stats.remote
            assert link is not None
            with lock:
                counts["texts"] += 1
                counts["moves"] += link.n_moves
                counts["reconnects"] += link.n_reconnects
                counts["hedged"] += link.n_hedged

    with sllm.connect([place.uri for place in places], deadline=PATIENCE) as remote:
        clients = [threading.Thread(target=write, args=(i, remote)) for i in range(N_CLIENTS)]
        for client in clients:
            client.start()
        rng = random.Random(7)
        try:
            for _ in range(N_EVENTS):
                place = rng.choice(places)
                rng.choice([place.kill, place.drain, place.drain, place.kill, place.break_link])()
                over.wait(rng.expovariate(1 / 0.02))
                if wrong:
                    break
        finally:
            over.set()
            for client in clients:
                client.join(PATIENCE)
        assert not wrong
        assert not any(client.is_alive() for client in clients)
        # They did hit texts, and not all of them.
        assert counts["moves"] > N_EVENTS / 10, counts
        assert counts["reconnects"] > 0 and counts["hedged"] > 0, counts
        assert counts["texts"] > N_EVENTS / 5, counts
        wait_until(lambda: all(state.state == "up" for state in remote.workers))
        assert all(state.n_texts == 0 for state in remote.workers)
    assert n_threads("sllm-fleet") == n_threads("sllm-remote") == n_threads("sllm-hedge") == 0
