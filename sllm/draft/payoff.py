"""Whether drafts give their target more than they take from it: stretches with and without them, compared."""

from __future__ import annotations

import threading
from typing import Literal

__all__ = ["Payoff"]


class _Stretch:
    """What came in a while in which as many texts were at work all the time."""

    _STALL = 3.0
    """A pass that took so many times as long as the others counts as one that took no longer than that: it
    was something else on the machine.
    """

    def __init__(self, n_texts: int = 0) -> None:
        self.n_texts = n_texts
        self.n_commits = 0  # settled ones, and their tokens
        self.n_tokens = 0.0
        self._times: list[float] = []  # of passes, each of which commits something to every text
        self._begun = (0, 0.0)  # of the next one: commits and seconds

    def add(self, n_commits: int, n_tokens: float, seconds: float, *, settled: bool) -> None:
        """What came after the commits so far, and whether they show yet what drafting is worth."""
        if settled:
            self.n_commits += n_commits
            self.n_tokens += n_tokens
        n, took = self._begun[0] + n_commits, self._begun[1] + seconds
        self._begun = n, took
        if n >= self.n_texts:
            self._times.append(took)
            self._begun = 0, 0.0

    def join(self, other: _Stretch) -> _Stretch:
        """Both as one."""
        whole = _Stretch(self.n_texts)
        for part in (self, other):
            whole.n_commits += part.n_commits
            whole.n_tokens += part.n_tokens
            whole._times += part._times
        return whole

    @property
    def passes(self) -> float:
        """How many have come, without those that show nothing yet."""
        return self.n_commits / max(self.n_texts, 1)

    @property
    def seconds(self) -> float:
        """What all of them took, without stalls."""
        n, total = len(self._times), sum(self._times)
        if n < 4:
            return total
        usual = sorted(self._times)[: n - n // 4]
        # Commits that arrive several at a time have no usual distance from one another.
        longest = max(self._STALL * sum(usual) / len(usual), total / n)
        return sum(min(seconds, longest) for seconds in self._times)

    @property
    def pass_seconds(self) -> float:
        """What one takes."""
        return self.seconds / max(len(self._times), 1)

    @property
    def rate(self) -> float:
        """Tokens per second, all texts together."""
        per_commit = self.n_tokens / max(self.n_commits, 1)
        return per_commit * self.n_texts / max(self.pass_seconds, 1e-9)


class Payoff:
    """Measures whether drafting pays, and pauses it where it does not.

    A draft that computes on the cores (the memory, the interpreter lock) that its target needs makes the
    target's passes slower, which no model of drafting costs knows: so what is compared is what arrives,
    committed tokens per second with drafts and without. A few passes are made without drafts first. Then
    drafting is tried, and judged after 8, 16, 24 and 32 passes, with less and less benefit of the doubt: the
    first look stops what loses a fifth, the last what loses three hundredths. Before it is stopped, a second
    stretch without drafts has to confirm the loss, or a slow moment would be the draft's fault. Drafts that
    do not slow the target down are never stopped: they can but be of no use, and others decide that
    (:class:`~.ahead.DraftAhead`, :class:`~.length.DraftLength`).

    What was stopped is tried again after a pause, and what was kept is compared anew from time to time, and
    as soon as it is slower than the target alone was; both ever less often as long as nothing changes.

    One of these stands for all drafts of one kind that work for one target in this process, since one
    of several drafts on the same cores takes from all texts and gives to one. Any thread may use it; it has
    no clock of its own.
    """

    _BASE_PASSES = 4
    """Passes without drafts to compare with, if they take ``_BASE_SECONDS``; up to four times as many, if
    not."""

    _BASE_SECONDS = 0.01

    _LOOKS = ((8, 0.8), (16, 0.9), (24, 0.94), (32, 0.97))
    """After so many passes with drafts: the ratio of the rates below which drafting is stopped."""

    _CLEAR = 1.1
    """Above this ratio it is kept for longer."""

    _CONFIRMED = 0.98
    """With a second stretch without drafts, drafting is stopped below this ratio."""

    _TAKES = 1.02
    """Where passes take not even so much longer with drafts, these take nothing."""

    _SLOWER = 1.1

    _IN_VAIN = 512
    """Passes in which texts have come and gone so often that nothing could be compared: the last word stands.
    """

    _SUSPECT_PASSES = 16
    _OTHER_LOAD = 1.5
    _FIRST_KEEP, _CLEAR_KEEP, _LONGEST_KEEP = 64, 512, 2048
    _FIRST_PAUSE, _LONGEST_PAUSE = 128, 4096

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase: Literal["before", "trial", "after", "kept", "stopped"] = "before"
        self._n_texts = 0
        self._now = _Stretch()
        self._stretches: dict[int, _Stretch] = {}  # of this phase, by their numbers of texts
        self._before = _Stretch()  # without drafts, before the trial
        self._trial = _Stretch()
        self._n_looks = 0
        self._left = 0.0  # passes until the next comparison, while kept or stopped
        self._keep, self._pause = self._FIRST_KEEP, self._FIRST_PAUSE
        self._stopped_last = False  # the last comparison has stopped drafting
        self._n_in_vain = 0.0  # passes of this comparison
        self._unsettled = False  # what arrives may still owe something to what was done before
        self._settled_at: float | None = None
        self._newest: float | None = None  # when the last commit came, of those without a gap

    # ---- what follows

    @property
    def drafting(self) -> bool:
        """Whether drafts are to be made now."""
        return self._phase in ("trial", "kept")

    @property
    def prepares(self) -> bool:
        """Whether drafting will be tried soon: a draft may read its prompt now."""
        return self._phase == "before"

    # ---- what is measured, as it arrives

    def begin(self) -> None:
        """One more text."""
        self._change_texts(1)

    def end(self) -> None:
        """One text less."""
        self._change_texts(-1)

    def _change_texts(self, change: int) -> None:
        with self._lock:
            self._n_texts += change
            self._newest = None
            if change > 0 and self.drafting:  # its drafts take a while to have an effect
                self._unsettled, self._settled_at = True, None

    def observe(self, n_tokens: int, now: float, lag: float | None) -> None:
        """A commit of ``n_tokens`` has come at ``now`` (seconds of any clock).

        Args:
            n_tokens: committed tokens.
            now: when.
            lag: how long after a draft what it causes comes; None: nothing can be said of this commit, since
                the draft is only getting ready.

        """
        with self._lock:
            if lag is None:
                self._newest = None
                return
            if self._unsettled:
                if self._settled_at is None:
                    self._settled_at = now + lag
                self._unsettled = now < self._settled_at
            before, self._newest = self._newest, now
            if before is not None:
                # The target is slowed down at once. (What is read late is made up for later: to leave out the
                # beginning would be to count the catching up alone.)
                self._add(self._n_texts, 1, n_tokens, now - before, settled=not self._unsettled)

    def observe_pass(self, n_texts: int, n_tokens: float, seconds: float) -> None:
        """A pass for ``n_texts`` has committed ``n_tokens`` in all and has taken ``seconds``, drafting
        included: for who makes the passes, and knows at once what they came to.
        """
        with self._lock:
            self._add(n_texts, n_texts, n_tokens, seconds, settled=True)

    # ---- the comparison; under the lock

    def _add(self, n_texts: int, n_commits: int, n_tokens: float, seconds: float, *, settled: bool) -> None:
        if self._now.n_texts != n_texts:  # stretches are compared where as many texts were at work
            self._now = self._stretches.setdefault(n_texts, _Stretch(n_texts))
            if self._phase in ("before", "trial", "after") and self._n_in_vain > self._IN_VAIN:
                self._left = float(self._pause if self._stopped_last else self._CLEAR_KEEP)
                self._go("stopped" if self._stopped_last else "kept")
        self._now.add(n_commits, n_tokens, seconds, settled=settled)
        self._left -= n_commits / n_texts
        self._n_in_vain += n_commits / n_texts
        self._advance()

    def _advance(self) -> None:
        now = self._now
        comparable = now.n_texts == self._before.n_texts
        if self._phase in ("trial", "after") and not comparable:
            if now.passes >= self._LOOKS[-1][0]:  # it stays like that
                self._go("before" if self._phase == "trial" else "stopped")
                self._left = float(self._FIRST_PAUSE)
        elif self._phase == "before" and self._is_base(now):
            self._before = now
            self._go("trial")
        elif self._phase == "trial" and now.passes >= self._LOOKS[self._n_looks][0]:
            stop_below = self._LOOKS[self._n_looks][1]
            self._n_looks += 1
            ratio = now.rate / self._before.rate
            last = self._n_looks == len(self._LOOKS)
            if self._takes(now, self._before) and ratio < stop_below:
                self._trial = now
                self._go("after")
            elif last and self._takes(self._before, now, self._SLOWER) and self._n_in_vain < self._IN_VAIN:
                self._go("before")  # no draft makes passes quicker: the machine was slow before, for a moment
            elif last:
                self._keep_on(clear=ratio > self._CLEAR)
        elif self._phase == "after" and now.passes >= 2 * self._BASE_PASSES and self._is_base(now):
            base = self._before.join(now)
            if self._takes(self._trial, base) and self._trial.rate < self._CONFIRMED * base.rate:
                self._left = float(self._pause)
                self._pause = min(2 * self._pause, self._LONGEST_PAUSE)
                self._keep = self._FIRST_KEEP
                self._stopped_last = True
                self._go("stopped")
            else:
                self._keep_on(clear=False)
        elif self._phase == "kept":
            full = now.passes >= self._SUSPECT_PASSES
            if self._left <= 0 or (full and self._is_suspect(now)):
                self._go("before")
            elif full:
                self._begin_stretch(now.n_texts)
        elif self._phase == "stopped" and self._left <= 0:
            self._go("before")

    def _keep_on(self, *, clear: bool) -> None:
        self._left = float(max(self._keep, self._CLEAR_KEEP) if clear else self._keep)
        self._keep = min(2 * self._keep, self._LONGEST_KEEP)
        self._pause = self._FIRST_PAUSE
        self._stopped_last = False
        self._go("kept")

    def _go(self, phase: Literal["before", "trial", "after", "kept", "stopped"]) -> None:
        drafted = self.drafting
        if phase == "before":
            if self._phase in ("kept", "stopped"):
                self._n_in_vain = 0.0
        elif phase == "trial":
            self._n_looks = 0
        self._phase = phase
        self._begin_stretch(self._now.n_texts)
        if self.drafting is not drafted:
            self._unsettled, self._settled_at = True, None

    def _begin_stretch(self, n_texts: int) -> None:
        self._now = _Stretch(n_texts)
        self._stretches = {n_texts: self._now}

    def _is_base(self, stretch: _Stretch) -> bool:
        n = stretch.passes
        return n >= 4 * self._BASE_PASSES or (
            n >= self._BASE_PASSES and stretch.seconds >= self._BASE_SECONDS
        )

    def _takes(self, with_drafts: _Stretch, without: _Stretch, bound: float = _TAKES) -> bool:
        return with_drafts.pass_seconds > bound * without.pass_seconds

    def _is_suspect(self, now: _Stretch) -> bool:
        """Whether what was kept has to be compared anew: it is slower than the target alone was, or there are
        many more or fewer texts than then.
        """
        before = self._before
        few, many = sorted((now.n_texts, before.n_texts))
        if few < many:
            return many >= self._OTHER_LOAD * few
        return self._takes(now, before) and now.rate < dict(self._LOOKS)[self._SUSPECT_PASSES] * before.rate
