"""The profile: the thresholds that calibration found for one model file, read from JSON and checked.

:mod:`sllm.triage.calibration` makes profiles and explains what they guarantee.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sllm import embedded
from sllm.errors import SllmError
from sllm.folders import read_trusted, replacing
from sllm.triage.bounds import upper_bound

if TYPE_CHECKING:
    from sllm.triage.bounds import Bools, Floats

__all__ = ["Combination", "Profile", "ProfileError", "Threshold"]

_VERSION = 1
_RIDGE = 0.05
_HEX = frozenset("0123456789abcdef")
_T = TypeVar("_T")


class ProfileError(SllmError, ValueError):
    """A profile that is damaged, or that belongs to another model, chat template or policy."""


@dataclass(frozen=True)
class Combination:
    """Several signals combined into one score: a sum with weights of at least 0, so it never falls when a
    signal rises.

    Attributes:
        weights: one for each signal.
        bias: what is added.

    """

    weights: tuple[float, ...]
    bias: float

    def score(self, signals: Sequence[float] | Floats) -> float:
        """The score of one request, unbounded; its logistic function estimates a probability."""
        # Added up one by one, so that a score in use is the calibrated one to the last bit.
        total = self.bias
        for weight, signal in zip(self.weights, signals, strict=True):
            total += weight * float(signal)
        return total

    def scores(self, signals: Floats) -> Floats:
        """:meth:`score` of many requests: float64 (n, k) signals, float64 (n,)."""
        total = np.full(len(signals), self.bias)
        for column, weight in enumerate(self.weights):
            total += weight * signals[:, column]
        return total

    @staticmethod
    def probability(score: float) -> float:
        """The logistic function."""
        return 1 / (1 + math.exp(-score)) if score > -700 else 0.0

    @classmethod
    def fit(cls, signals: Floats, positive: Bools) -> Combination:
        """Logistic regression with a small ridge on standardised signals.

        A signal whose weight would be negative is left out.

        Args:
            signals: float64 (n, k).
            positive: bool (n,).

        """
        mean, spread = signals.mean(axis=0), signals.std(axis=0)
        spread[spread < 1e-12] = np.inf  # a constant signal says nothing
        x = np.column_stack([np.ones(len(signals)), (signals - mean) / spread])
        y = positive.astype(np.float64)
        used = np.ones(x.shape[1], dtype=np.bool_)
        while True:
            beta = np.zeros(x.shape[1])
            beta[used] = _logistic(x[:, used], y)
            worst = 1 + int(np.argmin(beta[1:]))
            if beta[worst] >= 0:
                break
            used[worst] = False
        weights = beta[1:] / spread
        return cls(tuple(weights.tolist()), float(beta[0] - weights @ mean))


def _logistic(x: Floats, y: Floats) -> Floats:
    """Newton's method; the ridge spares the bias, which is column 0."""
    ridge = np.full(x.shape[1], _RIDGE * len(y) / 10)
    ridge[0] = 1e-3  # where all rows are of one kind, it must not go to infinity
    beta = np.zeros(x.shape[1])
    for _ in range(25):
        p = 1 / (1 + np.exp(-np.clip(x @ beta, -30, 30)))
        gradient = x.T @ (y - p) - ridge * beta
        curvature = (x * (p * (1 - p))[:, None]).T @ x + np.diag(ridge)
        step = np.linalg.solve(curvature, gradient)
        beta += step * min(1.0, 5 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-8:
            break
    return np.asarray(beta)


@dataclass(frozen=True)
class Threshold:
    """A threshold and the statistics of what passes it.

    Attributes:
        score: the minimum score to pass.
        confidence: if not None, also the minimum confidence of the answer.
        alpha, delta: at most ``alpha`` of what passes is wrong, at confidence ``1 - delta``.
        n_tested: rows that it was tested on.
        n_passed: how many of them passed.
        n_wrong: how many of those were wrong.

    """

    score: float
    confidence: float | None
    alpha: float
    delta: float
    n_tested: int
    n_passed: int
    n_wrong: int

    @property
    def bound(self) -> float:
        """The upper bound on the share of wrong ones among what passes."""
        return upper_bound(self.n_wrong, self.n_passed, self.delta)

    @property
    def coverage(self) -> float:
        """The share of the tested rows that passed."""
        return self.n_passed / self.n_tested

    @property
    def error(self) -> float:
        """The share of wrong ones among those that passed."""
        return self.n_wrong / max(self.n_passed, 1)

    def passes(self, score: float, confidence: float | None = None) -> bool:
        """Whether something passes; NaN does not, nor a missing confidence where one is asked for."""
        if not score >= self.score:
            return False
        return self.confidence is None or (confidence is not None and confidence >= self.confidence)


@dataclass(frozen=True)
class Profile:
    """The result of calibration for one model file: frozen, stored as JSON.

    Attributes:
        model_id: :func:`sllm.engine.gguf.model_id` of the scoring model.
        template_id: SHA-256 (hex) of its chat template.
        policy_id: of the policy whose questions were scored (:attr:`sllm.triage.Policy.id`).
        signals: the names of the signals, in order.
        n: labelled rows, those for fitting included.
        alpha, delta: the requested guarantee.
        seed: of the split.
        easy: the score that ``tier1`` is a threshold of.
        tier1: the threshold of tier 1; None: the rows prove the guarantee for no threshold, and tier 1 is
            never used.
        hard: the score for being hard, of the signals with their signs changed; None: no row said which
            requests are hard.
        gate: a request with this score for being hard is not tier 1, however easy it seems; None: there is no
            such score.
        tier3: a request whose score reaches the gate goes straight to the cloud; wrong is what was not hard.
            None: the rows do not show that few enough of them are not hard, and they are tier 2.
        verify: an answer of the local main model in tier 2 with this confidence needs no verification; None:
            the rows prove the guarantee for no threshold, so every answer is verified. Its delta is the share
            that :func:`~sllm.triage.calibration.calibrate_verify` leaves it.
        verify_model_id: that model.

    """

    model_id: str
    template_id: str
    policy_id: str
    signals: tuple[str, ...]
    n: int
    alpha: float
    delta: float
    seed: int
    easy: Combination
    tier1: Threshold | None
    hard: Combination | None = None
    gate: float | None = None
    tier3: Threshold | None = None
    verify: Threshold | None = None
    verify_model_id: str | None = None

    @property
    def id(self) -> str:
        """Sixteen hex digits over everything in it."""
        text = json.dumps(self._content(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def escalates(self, answer: float) -> bool:
        """Whether tier 1's answer of this :func:`~sllm.triage.check_answer.confidence` goes on to tier 2."""
        tier1 = self.tier1
        return tier1 is None or not tier1.passes(tier1.score, answer)

    def verifies(self, answer: float | None) -> bool:
        """Whether tier 2's answer of this confidence is to be verified where only uncertain ones are."""
        return self.verify is None or answer is None or not self.verify.passes(answer)

    def _content(self) -> dict[str, Any]:
        def plain(value: Any) -> Any:
            if isinstance(value, (Combination, Threshold)):
                return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
            return list(value) if isinstance(value, tuple) else value

        return {"version": _VERSION, **{f.name: plain(getattr(self, f.name)) for f in fields(self)}}

    def to_json(self) -> str:
        """The profile as JSON, with its id, by which damage is noticed."""
        return json.dumps({**self._content(), "id": self.id}, indent=2) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to a file, which its owner alone may change, as a whole or not at all."""
        with replacing(Path(path)) as draft:
            draft.write_text(self.to_json(), encoding="utf-8")
            draft.chmod(draft.stat().st_mode & ~0o022)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a file.

        Raises:
            ProfileError: as :meth:`from_json`.
            OSError: it cannot be read.
            PermissionError: every user of this machine may change it, and with it what leaves the machine.

        """
        try:
            # The one that comes with the package is to be trusted as much as its programs are.
            ours = Path(path) == embedded.TARGET_PROFILE
            text = (Path(path).read_bytes() if ours else read_trusted(Path(path))).decode()
        except UnicodeDecodeError as error:
            raise ProfileError(f"{os.fspath(path)} is no profile: it is not UTF-8 ({error.reason})") from None
        return cls.from_json(text, name=os.fspath(path))

    @classmethod
    def from_json(cls, text: str, *, name: str = "the profile") -> Profile:
        """Read and check a profile.

        Raises:
            ProfileError: no JSON, another version, a field missing, unknown or out of range, a threshold
                whose rows do not prove what it promises, or an id that does not match.

        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProfileError(f"{name} is no profile: no JSON ({error})") from None
        try:
            return _read_profile(found)
        except _UnusableError as error:
            raise ProfileError(
                f"{name} is no usable profile: {error}; make it again with sllm calibrate"
            ) from None


# ---- reading -----------------------------------------------------------------------------------------------


class _UnusableError(Exception):
    """What is wrong with the content of a profile."""


_Check = Callable[[Any, str], Any]
"""Takes a value of JSON and its name; returns it as the profile holds it, or raises _UnusableError."""


def _read_profile(found: Any) -> Profile:
    """A profile of what JSON says: each field, then what they say together."""
    if not isinstance(found, dict):
        raise _UnusableError(f"it is a {type(found).__name__}, expected an object")
    if found.get("version") != _VERSION:
        raise _UnusableError(f"version {found.get('version')!r}, expected {_VERSION}")
    content = {name: value for name, value in found.items() if name not in ("version", "id")}
    profile = _read(Profile, content, "it")
    for name in ("easy", "hard"):
        one: Combination | None = getattr(profile, name)
        if one is not None and len(one.weights) != len(profile.signals):
            raise _UnusableError(
                f"{name} has the weights {list(one.weights)!r}, expected {len(profile.signals)} numbers"
            )
    if profile.gate is not None and profile.hard is None:
        raise _UnusableError("gate is there and hard, its score, is not")
    if profile.tier3 is not None and profile.tier3.score != profile.gate:
        raise _UnusableError(f"tier3 begins at {profile.tier3.score!r}, and the gate is {profile.gate!r}")
    if (profile.verify is None) != (profile.verify_model_id is None):
        raise _UnusableError("of verify and verify_model_id one is missing")
    if profile.tier1 is not None and (
        profile.tier1.alpha != profile.alpha or profile.tier1.delta != profile.delta
    ):
        raise _UnusableError("tier1 keeps another promise than the profile")
    if found.get("id") != profile.id:
        raise _UnusableError(f"its id is {found.get('id')!r}, and what it says has {profile.id!r}")
    return profile


def _read(cls: type[_T], found: Any, what: str) -> _T:
    """A dataclass of a JSON object: no field missing, none unknown, and each checked by its name."""
    if not isinstance(found, dict):
        raise _UnusableError(f"{what} is a {type(found).__name__}, expected an object")
    types = {f.name: str(f.type) for f in fields(cls)}  # type: ignore[arg-type]
    odd = sorted(set(found) ^ set(types))
    if odd:
        raise _UnusableError(f"{what} {'lacks' if odd[0] in types else 'has the unknown'} {odd[0]!r}")
    checked = {
        name: None if found[name] is None and kind.endswith("| None") else _CHECKS[name](found[name], name)
        for name, kind in types.items()
    }
    return cls(**checked)


def _combination(value: Any, what: str) -> Combination:
    one = _read(Combination, value, what)
    if min(one.weights, default=0) < 0:
        raise _UnusableError(f"{what} has the weight {min(one.weights)!r}, expected 0 or more")
    return one


def _threshold(value: Any, what: str) -> Threshold:
    one = _read(Threshold, value, what)
    if not one.n_wrong <= one.n_passed <= one.n_tested < 1 << 31:
        raise _UnusableError(f"{what} has {one.n_wrong} wrong of {one.n_passed} passed")
    if one.bound > one.alpha * (1 + 1e-9):
        raise _UnusableError(f"{what} promises {one.alpha}, and its rows show {one.bound:.4f}")
    return one


def _expect(expected: str, fits: Callable[[Any], bool], convert: Callable[[Any], Any]) -> _Check:
    def check(value: Any, name: str) -> Any:
        if not fits(value):
            raise _UnusableError(f"{name} is {value!r}, expected {expected}")
        return convert(value)

    return check


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # a bool is an int, too


def _names(value: Any) -> bool:
    good = isinstance(value, list) and bool(value) and all(isinstance(one, str) and one for one in value)
    return good and len(set(value)) == len(value)


def _digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= _HEX


def _finite_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_number, value))


def _whole(low: int) -> _Check:
    return _expect(f"a whole number from {low}", lambda v: type(v) is int and v >= low, int)


_CHECKS: dict[str, _Check] = {
    name: check
    for names, check in (
        ("easy hard", _combination),
        ("tier1 tier3 verify", _threshold),
        ("model_id template_id policy_id verify_model_id", _expect("64 hex digits", _digest, str)),
        ("n n_tested n_passed", _whole(1)),
        ("seed n_wrong", _whole(0)),
        ("alpha delta", _expect("a number above 0 and below 1", lambda v: _number(v) and 0 < v < 1, float)),
        ("score confidence gate bias", _expect("a finite number", _number, float)),
        ("weights", _expect("finite numbers", _finite_numbers, lambda v: tuple(map(float, v)))),
        ("signals", _expect("different names", _names, tuple)),
    )
    for name in names.split()
}
