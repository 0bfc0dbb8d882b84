"""How far an engine goes on by itself."""

from __future__ import annotations

import numpy as np

from sllm.http_engine.run_length import RunLength


def test_runs_are_as_long_as_their_tokens_hold() -> None:
    always, never, often = RunLength(8), RunLength(8), RunLength(16)
    for _ in range(40):
        always.observe(8, 8)
        never.observe(0, 1)
        often.observe(3, 4)  # each holds three times out of four
    assert (always.choose(100), never.choose(100)) == (8, 1)
    assert 7 <= often.choose(100) <= 9  # a chance of one in ten to be reached: .75**8


def test_no_run_is_longer_than_what_is_left() -> None:
    length = RunLength(8)
    rng = np.random.default_rng(0)
    for _ in range(50):
        room = int(rng.integers(1, 12))
        n = length.choose(room)
        assert 1 <= n <= min(8, room)
        length.observe(int(rng.integers(0, n + 1)), n)
