"""What :func:`sllm.plan` measures: passes of a target by their rows, a stream's pace, what a draft knows."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from sllm.draft.drafters import draft_probs, drafts_trees
from sllm.draft.growth import Shape, TreeGrowth
from sllm.draft.length import DraftLength, PassTimes
from sllm.errors import RemoteError
from sllm.generation.tree_ahead import TreeAhead
from sllm.planning.recorded import Position, Recorded
from sllm.targets.base import PipelinedGeneration, RemoteWork
from sllm.targets.lockstep import LockstepGeneration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from sllm.draft.drafters import Drafter
    from sllm.engine.sampling import SamplingParams
    from sllm.remote.connection import Remote
    from sllm.targets.base import Commit, Generation, Target

    Prompts = Sequence[npt.NDArray[np.int32]]
    Told = Callable[[float], object]

__all__ = ["Measured", "Written", "measure_passes", "measure_worker", "record"]

_SECONDS, _LEAST = 10.0, 8
"""A text is not longer than it gets in so many seconds, but has so many tokens."""

_HINTED = (1, 3, 7, 15, 31)
"""Hinted tokens of passes that are measured: 2, 4, 8, 16 and 32 rows."""

_TIMES = 2
"""So often is each of them."""

_N_CANDIDATES = 6
"""Of a position: as many as follow a token of a tree (``csrc/tree.cpp``)."""

_WIDTHS = (TreeGrowth.WIDTHS[-1], TreeAhead.WIDTH)
"""Rows of a draft's pass over a tree."""


@dataclass(frozen=True)
class Written:
    """A prompt, and the target's text after it: token ids."""

    prompt: tuple[int, ...]
    truth: tuple[int, ...]


@dataclass
class Measured:
    """What was measured of a place that decides texts. Times are seconds.

    Attributes:
        texts: that it has written.
        passes: what one takes by its rows, the way there and back included where it is waited for.
        own_pace: what a token takes that comes without a pass of its own, from an engine that goes on by
            itself; None: each has one.
        first_tokens: from opening a text to its first token.
        commits: tokens and seconds of each pass, in the order of the texts.
        round_trip: 0 where the target is here.
        bytes_of_pass, bytes_of_row: on the wire, both ways together.
        limit: drafted tokens that one pass checks.
        can_branch: whether it checks all branches of a tree.
        overlaps: whether a draft goes on while the target verifies.
        streams: whether its tokens come without being asked for one by one.

    """

    texts: list[Written] = field(default_factory=list)
    passes: PassTimes = field(default_factory=PassTimes)
    own_pace: float | None = None
    first_tokens: list[float] = field(default_factory=list)
    commits: list[tuple[int, float]] = field(default_factory=list)
    round_trip: float = 0.0
    bytes_of_pass: float = 0.0
    bytes_of_row: float = 0.0
    limit: int = DraftLength.LIMIT
    can_branch: bool = False
    overlaps: bool = False
    streams: bool = False

    @property
    def first_token(self) -> float:
        """Seconds from opening a text to its first token."""
        return median(self.first_tokens)

    @property
    def tokens_per_s(self) -> float:
        """Without a draft of this side."""
        if self.streams:
            return sum(n for n, _ in self.commits) / sum(seconds for _, seconds in self.commits)
        return 1 / (self.passes.estimate(1) if self.own_pace is None else self.own_pace)


def measure_passes(
    target: Target, prompts: Prompts, sampling: SamplingParams, n_tokens: int, told: Told | None = None
) -> Measured:
    """Let a target that is asked pass by pass write ``n_tokens`` after each prompt, and then check tokens of
    its own text that are hinted, which are all right.

    Args:
        target: the target.
        prompts: token ids.
        sampling: how tokens are selected.
        n_tokens: of each text, if it gets that far in ten seconds.
        told: is called with the share that is done.

    Raises:
        SllmError: whatever the target raises.

    """
    found = Measured()
    carried: list[tuple[int, int]] = []  # rows and bytes of passes
    own_pace = False
    with closing(target.open(prompts[0][-1:], sampling, 1)) as generation:
        next(iter(_observed(generation, 0.0)), None)  # what is made once is no text's time
    # 1. The texts, a token at a time.
    for i, prompt in enumerate(prompts):
        if told is not None:
            told(i / (len(prompts) + 1))
        began = time.perf_counter()
        with closing(target.open(prompt, sampling, n_tokens)) as generation:
            own_pace = isinstance(generation, LockstepGeneration) and generation.own_pace
            found.streams = isinstance(generation, PipelinedGeneration)
            found.can_branch = generation.can_branch
            found.limit = getattr(generation, "max_chain", found.limit)
            truth: list[int] = []
            for commit, seconds, n_bytes in _observed(generation, began):
                if truth or generation.finish_reason is not None:  # the first comes along with the prompt
                    found.commits.append((len(commit.tokens), seconds))
                    carried.append((1, n_bytes))
                    found.passes.add(1, commit.seconds / len(commit.tokens))
                if not truth:
                    found.first_tokens.append(seconds)
                truth += commit.tokens
                if _is_long_enough(truth, began):
                    break
        found.texts.append(Written(tuple(prompt.tolist()), tuple(truth)))
    if own_pace:
        found.own_pace = sum(s for _, s in found.commits) / sum(n for n, _ in found.commits)
    if isinstance(generation, RemoteWork):
        found.round_trip = generation.remote.round_trip
    # 2. Passes that check more.
    prompt, longest = max(zip(prompts, found.texts, strict=True), key=lambda one: len(one[1].truth))
    truth = list(longest.truth)
    began = time.perf_counter()
    for n_hinted in _HINTED if not found.streams else ():
        if n_hinted > found.limit or n_hinted + 1 >= len(truth) or _is_long_enough(truth, began):
            break
        with closing(target.open(prompt, sampling, n_tokens)) as generation:
            pos = len(next(generation).tokens)
            for _ in range(_TIMES):
                if pos + n_hinted + 1 > len(truth):
                    break
                generation.hint(len(prompt) + pos, truth[pos : pos + n_hinted])
                commit, _, n_bytes = next(_observed(generation, 0.0))
                found.passes.add(1 + commit.n_verified, commit.seconds)
                carried.append((1 + commit.n_verified, n_bytes))
                pos += len(commit.tokens)
    found.bytes_of_pass, found.bytes_of_row = _line(carried)
    return found


def _is_long_enough(truth: Sequence[int], began: float) -> bool:
    return len(truth) >= _LEAST and time.perf_counter() - began > _SECONDS


def _observed(generation: Generation, since: float) -> Iterator[tuple[Commit, float, int]]:
    """Each commit, the seconds since the one before (or ``since``), and the bytes that it took."""
    remote = generation.remote if isinstance(generation, RemoteWork) else None
    before = 0 if remote is None else remote.bytes_up + remote.bytes_down
    while True:
        try:
            commit = next(generation)
        except StopIteration:
            return
        now = time.perf_counter()
        after = 0 if remote is None else remote.bytes_up + remote.bytes_down
        yield commit, now - since, after - before
        since, before = now, after


def _line(points: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Height and slope of the line through the points, by least squares; neither falls below 0."""
    if not points:
        return 0.0, 0.0
    n = len(points)
    x, y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((one - x) ** 2 for one, _ in points)
    slope = sum((one - x) * (other - y) for one, other in points) / spread if spread else 0.0
    slope = max(slope, 0.0)
    return max(y - slope * x, 0.0), slope


# ---- a worker


def measure_worker(
    remote: Remote,
    prompts: Prompts,
    sampling: SamplingParams,
    n_tokens: int,
    patience: float,
    told: Told | None = None,
) -> Measured:
    """Let a worker stream ``n_tokens`` after each prompt, then check what is hinted; and measure the link.

    Args:
        remote: the connection.
        prompts, sampling, n_tokens, told: as for :func:`measure_passes`.
        patience: seconds of silence after which the worker is given up.

    Raises:
        RemoteError: nothing came for so long; and whatever else the worker refuses with.

    """
    found = Measured(can_branch="trees" in remote.info.features, streams=True)
    found.round_trip = remote.ping(n=5).round_trip
    target = remote.target(on_loss="raise", hedge=False)
    commits: list[Commit] = []
    n_first = 0  # of the first text
    between: list[float] = []  # seconds from one to the next
    for i, prompt in enumerate(prompts):
        if told is not None:
            told(i / (len(prompts) + 1))
        began = time.perf_counter()
        with closing(target.open(prompt, sampling, n_tokens)) as generation:
            truth: list[int] = []
            arrivals: list[float] = []
            while (commit := _patient(generation, patience, remote)) is not None:
                arrivals.append(time.perf_counter())
                truth += commit.tokens
                commits.append(commit)
                n_first += len(found.texts) == 0
                if _is_long_enough(truth, began):
                    break
            stats = generation.remote
        found.first_tokens.append(arrivals[0] - began)
        between += [(arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)] if len(arrivals) > 1 else []
        found.texts.append(Written(tuple(prompt.tolist()), tuple(truth)))
        found.bytes_of_pass = stats.bytes_down / len(arrivals)
    # What passes take beyond computing: the scheduler, and the messages.
    computing = sum(commit.seconds for commit in commits) / len(commits)
    beyond = max(median(between) - computing, 0.0) if between else 0.0
    for seconds in [commit.seconds for commit in commits if not commit.n_verified] or [computing]:
        found.passes.add(1, seconds + beyond)
    # A worker with a draft makes some passes without it, to compare, and learns in its first text how much to
    # draft.
    later = [commit for commit in commits[n_first if len(prompts) > 1 else 0 :] if commit.n_own_verified]
    drafted = later or commits
    found.commits = [(len(commit.tokens), commit.seconds + beyond) for commit in drafted]
    asked = remote.target(run_ahead=False, on_loss="raise", hedge=False)
    for prompt, text in zip(prompts, found.texts, strict=True):
        with closing(asked.open(prompt, sampling, n_tokens)) as generation:
            _check_hinted(generation, text, found, beyond, patience, remote)
    return found


def _check_hinted(
    generation: PipelinedGeneration,
    text: Written,
    found: Measured,
    beyond: float,
    patience: float,
    remote: Remote,
) -> None:
    """Let the worker check the text's own tokens. How many of a hint it takes is for the worker to say."""
    pos = 0
    for n_hinted in _HINTED[:4] * _TIMES:
        if pos + n_hinted >= len(text.truth):
            return
        generation.hint(len(text.prompt) + pos, text.truth[pos : pos + n_hinted])
        commit = _patient(generation, patience, remote)
        if commit is None:
            return
        if commit.n_verified > 0 and not commit.n_own_verified:
            found.passes.add(1 + commit.n_verified, commit.seconds + beyond)
        pos += len(commit.tokens)


def _patient(generation: PipelinedGeneration, patience: float, remote: Remote) -> Commit | None:
    """The next commit; None: the text is at its end.

    Raises:
        RemoteError: nothing came in ``patience`` seconds.

    """
    until = time.monotonic() + patience
    while generation.finish_reason is None:
        left = until - time.monotonic()
        if left <= 0:
            raise RemoteError(f"{remote.link.endpoint} has sent nothing of a text for {patience:g} seconds")
        commit = generation.poll(left)
        if commit is not None:
            return commit
    return None


# ---- a draft


def record(drafter: Drafter, text: Written, sampling: SamplingParams, times: PassTimes) -> Recorded:
    """What a draft says at each position of a target's text. ``times`` learns what its passes take."""
    drafter.open(text.prompt, sampling)
    positions: list[Position] = []
    so_far = list(text.prompt)
    for i, true in enumerate(text.truth):
        began = time.perf_counter()
        tokens = drafter.draft(so_far, [], 1, 0.0)[:1]
        if i > 0:  # with the first one it reads the prompt
            times.add(1, time.perf_counter() - began)
        probs = draft_probs(drafter, len(tokens))
        position = Position(tuple(tokens), tuple(probs), probs[0] if probs else 0.0)
        if drafts_trees(drafter):
            tree = drafter.draft_tree(so_far, Shape(1, 1, _N_CANDIDATES, 0.0))
            if tree.tokens:
                position = Position(tree.tokens, tree.shares, position.prob)
        positions.append(position)
        so_far.append(true)
    if not times.seen:
        times.add(1, time.perf_counter() - began)
    _measure_wide(drafter, so_far, times)
    return Recorded(text.truth, tuple(positions))


def _measure_wide(drafter: Drafter, text: Sequence[int], times: PassTimes) -> None:
    """What a draft's passes over several tokens take."""
    if not drafts_trees(drafter):
        return
    for width in _WIDTHS:
        began = time.perf_counter()
        tree = drafter.draft_tree(text, Shape(6, width, 64, 0.0))
        if tree.n_passes > 1:
            first = times.estimate(1)
            rest = time.perf_counter() - began - first
            times.add(width, max(rest / (tree.n_passes - 1), first))  # more rows never take less
    known = tree.take(tree.likeliest(48))
    if known.tokens:
        began = time.perf_counter()
        drafter.draft_tree(text, Shape(1, 1, 256, 0.0), known)
        times.add(1 + len(known), time.perf_counter() - began)
