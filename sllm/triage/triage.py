"""Triage: how hard a request is for the small model, and whether it is private.

A small model is asked two questions about the request, but it does not write an answer: only the
probabilities of a few given labels are used (:meth:`Context.score <sllm.Context.score>`). So no text in the
request can make it answer anything else, and there is nothing to parse.

* **The request is data.** It is placed before the question, between two lines with a nonce that does not
  occur in it, and no control token in it is parsed.
* **No label is favoured.** The options are listed in every rotation, and a label's log-probability is
  averaged over them. For privacy, the result of the same question for a text without content is subtracted
  (contextual calibration, Zhao et al., 2102.09690). Not for grades: their thresholds are calibrated anyway,
  and on a model that was trained to grade, the subtraction made them worse.
* **The worst result counts.** Of long input, the beginning, the middle and the end are graded, and the
  hardest grade and the most private verdict are used. Privacy is also judged at the ends of the first
  sentences, so later text cannot undo what the model found in them.
* **It fails closed.** If a scorer or detector raises, returns NaN or takes too long, or the text is too long
  or empty, the request is tier 2 and private, and the reason is given. Without a :class:`Profile` every
  request is tier 2, since an uncalibrated score guarantees nothing.

A third signal needs no model that follows instructions: how likely the small model finds the request's own
text indicates whether it has seen similar text.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from sllm.engine.handle import join
from sllm.messages import Messages, NotTextError, checked_messages, conversation_text
from sllm.triage.certify import CalibrationError, Row
from sllm.triage.check_answer import confidence
from sllm.triage.policy import FORM, Policy
from sllm.triage.profile import Combination, Profile, ProfileError
from sllm.triage.time_limit import TimeLimit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy.typing as npt

    from sllm.privacy import LabelScorer

__all__ = ["SIGNALS", "Assessment", "Grade", "Tier", "Triage", "Verify", "checked_verify"]

SIGNALS = ("easy", "not hard", "request")
"""What a grade rests on, each rising with easiness: the log-odds of the label for easy, the log-odds against
the label for hard, and the mean log-probability of the request's own tokens (0 where the scorer has none)."""

PrivacyVerdict = Literal["public", "private"]
Verify = Literal["always", "uncertain", "never"]
"""Which answers of tier 2 the cloud verifies."""


class FailClosed(Exception):  # noqa: N818 - no error: a reason to take the safe side
    """Why a request is private and tier 2 without having been judged; the text may be shown."""


def checked_verify(value: str) -> Verify:
    """``value``, if it is one of :data:`Verify`.

    Raises:
        ValueError: it is not.

    """
    if value not in get_args(Verify):
        raise ValueError(f"verify is {value!r}, expected 'always', 'uncertain' or 'never'")
    return value  # type: ignore[return-value]


class Tier(IntEnum):
    """Who answers.

    Examples:
        >>> sllm.Tier.SIMPLE < sllm.Tier.ROUTINE < sllm.Tier.HARD, int(sllm.Tier.HARD)
        (True, 3)

    """

    SIMPLE = 1
    """The small model answers."""
    ROUTINE = 2
    """The local main model answers, and the cloud verifies the answer if requested."""
    HARD = 3
    """The cloud answers."""


@dataclass(frozen=True)
class Grade:
    """The result of triage for a request.

    Attributes:
        tier: who should answer. It does not decide what may leave the machine.
        p_easy: how likely the small model's answer is right: with a profile as fitted on its rows, otherwise
            only the share of the label; 0 if nothing could be scored.
        p_hard: the same for a request that needs the big model.
        privacy: ``"private"`` if anything found something private, or if anything failed.
        reasons: the reasons in plain words, with kinds and numbers but never a word of the request.
        profile_id: the profile that the tier is based on, or None.

    Examples:
        >>> from sllm.triage import ContextScorer
        >>> with sllm.Model(sllm.embedded.TARGET) as model, ContextScorer(model) as scorer:
        ...     grade = sllm.Triage(scorer).assess([{"role": "user", "content": "What is 2 + 2?"}])
        >>> grade.tier in sllm.Tier
        True

    """

    tier: Tier
    p_easy: float
    p_hard: float
    privacy: PrivacyVerdict
    reasons: tuple[str, ...]
    profile_id: str | None

    @property
    def private(self) -> bool:
        """Whether the request must not leave the machine as it is."""
        return self.privacy != "public"


@dataclass(frozen=True)
class Assessment:
    """The scores of a request, before any threshold.

    Attributes:
        signals: :data:`SIGNALS`, each the worst of all windows.
        p_easy, p_hard: the shares of the labels, the worst of all windows.
        n_tokens: the length of the request (in characters where the scorer has no tokens).

    """

    signals: tuple[float, ...]
    p_easy: float
    p_hard: float
    n_tokens: int


class Triage:
    """Grades requests with a small model.

    Used by one thread at a time, unless the scorer supports more.

    Args:
        scorer: what scores labels: a :class:`~sllm.triage.ContextScorer`, or anything with ``label_logprobs``
            (:class:`sllm.privacy.LabelScorer`). It may also have that class's ``text_logprobs``, ``windows``,
            ``cancel``, and ``model_id`` and ``template_id``, without which no profile can be used with it.
        policy: the questions to ask; None: ``Policy()``.
        profile: the result of calibrating this scorer under this policy; None: every request is tier 2.
        detectors: objects with ``detect(text)`` that returns findings, called with every text. A finding
            makes the request private.

    Raises:
        TypeError: the scorer has no ``label_logprobs``, or a detector no ``detect``.
        ProfileError: the profile belongs to another model, chat template, policy or set of signals, or the
            scorer cannot say which model it is.

    Examples:
        >>> from sllm.triage import ContextScorer
        >>> with sllm.Model(sllm.embedded.TARGET) as model, ContextScorer(model) as scorer:
        ...     triage = sllm.Triage(scorer)
        ...     triage.assess([{"role": "user", "content": "My phone is 13800138000."}]).privacy
        'private'

    """

    def __init__(
        self,
        scorer: LabelScorer,
        policy: Policy | None = None,
        profile: Profile | None = None,
        *,
        detectors: Sequence[Any] = (),
    ) -> None:
        if not callable(getattr(scorer, "label_logprobs", None)):
            raise TypeError(
                f"the scorer is {type(scorer).__name__}, expected something with label_logprobs()"
            )
        for detector in detectors:
            if not callable(getattr(detector, "detect", None)):
                raise TypeError(f"a detector is {type(detector).__name__}, expected something with detect()")
        self.scorer = scorer
        self.policy = Policy() if policy is None else policy
        self.profile = profile
        self._detectors = tuple(detectors)
        self._limit = TimeLimit(self.policy.timeout)
        self._baselines: dict[tuple[str, str], list[float]] = {}
        if profile is not None:
            self._check(profile)

    def _check(self, profile: Profile) -> None:
        for what, wanted in (
            ("model_id", getattr(self.scorer, "model_id", None)),
            ("template_id", getattr(self.scorer, "template_id", None)),
            ("policy_id", self.policy.id),
        ):
            found = getattr(profile, what)
            if wanted is None:
                name = type(self.scorer).__name__
                raise ProfileError(
                    f"the profile is for the {what} {found}, and a scorer of the type {name} has no"
                    f" {what} to compare it with"
                )
            if found != wanted:
                raise ProfileError(
                    f"the profile is for the {what} {found}, and this scorer and policy have {wanted}:"
                    " calibrate again (sllm calibrate)"
                )
        if profile.signals != SIGNALS:
            raise ProfileError(
                f"the profile is for the signals {', '.join(profile.signals)}, and grades rest on"
                f" {', '.join(SIGNALS)}"
            )

    # ---- grades

    def assess(self, messages: Messages, *, findings: Iterable[Any] | None = None) -> Grade:
        """Grade a conversation, in the form that :meth:`Model.chat <sllm.Model.chat>` takes.

        Args:
            messages: mappings with ``role`` and ``content``.
            findings: private matters found in it elsewhere, objects with a ``kind``, or kinds. Any of them
                makes the request private; an empty iterable only says that it has been searched.

        Raises:
            TypeError, ValueError: malformed or no messages. Any other failure gives a grade: tier 2, private.

        """
        reasons: list[str] = []
        private = False
        p_easy = p_hard = 0.0
        tier = Tier.ROUTINE
        profile = self.profile
        checked = checked_messages(messages)
        try:
            with self._in_time() as check:
                text = conversation_text(checked)
                kinds, looked = self._kinds(text, findings)
                if kinds:
                    private = True
                    reasons.append(f"found: {', '.join(kinds)}")
                scored = self._score(text, check)
                p_easy, p_hard = scored.p_easy, scored.p_hard
                if self.policy.ask_privacy:
                    p_private = self._privacy(text, check)
                    if p_private >= self.policy.private_at:
                        private = True
                        reasons.append(f"the model finds it private: {p_private:.2f}")
                elif not looked:
                    private = True
                    reasons.append("nothing has looked for private matters")
                if profile is None:
                    reasons.append("no profile, so no promise: tier 2")
                else:
                    tier, p_easy, p_hard, why = _tier(profile, scored.signals)
                    reasons.append(why)
        except (FailClosed, NotTextError) as reason:
            tier, private = Tier.ROUTINE, True
            reasons.append(f"failed closed: {reason}")
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing may leave the machine for it
            # Its text may quote the request, so its kind has to do.
            tier, private = Tier.ROUTINE, True
            reasons.append(f"failed closed: {type(error).__name__}")
        return Grade(
            tier,
            p_easy,
            p_hard,
            "private" if private else "public",
            tuple(reasons),
            None if profile is None else profile.id,
        )

    def finds_private(self, messages: Messages) -> bool:
        """Whether the model finds a conversation private, regardless of the detectors.

        For masked conversations: if the model finds something private in the rest, it must not leave just
        because something else was masked. False without ``ask_privacy``; True if anything fails.

        Raises:
            TypeError, ValueError: as :meth:`assess`.

        """
        checked = checked_messages(messages)
        if not self.policy.ask_privacy:
            return False
        try:
            with self._in_time() as check:
                return self._privacy(conversation_text(checked), check) >= self.policy.private_at
        except Exception:  # noqa: BLE001 - whatever it is, nothing may leave the machine for it
            return True

    def row(
        self,
        messages: Messages,
        *,
        correct: bool,
        answer_logprobs: npt.ArrayLike | None = None,
        hard: bool | None = None,
    ) -> Row:
        """A labelled request for :func:`~sllm.triage.calibration.calibrate`, scored as by :meth:`assess`.

        Raises:
            CalibrationError: it cannot be scored.
            TypeError, ValueError: as :meth:`assess`, and what the scorer raises.

        """
        checked = checked_messages(messages)
        try:
            with self._in_time() as check:
                scored = self._score(conversation_text(checked), check)
        except (FailClosed, NotTextError) as reason:
            raise CalibrationError(f"a request cannot be scored: {reason}") from None
        sure = None if answer_logprobs is None else confidence(answer_logprobs)
        return Row(scored.signals, bool(correct), scored.n_tokens, sure, hard)

    def escalates(self, answer_logprobs: npt.ArrayLike) -> bool:
        """Whether the small model's answer is too uncertain, so that tier 2 must answer.

        Args:
            answer_logprobs: (n,) log-probabilities of the answer's tokens under the small model.

        """
        return self.profile is None or self.profile.escalates(confidence(answer_logprobs))

    def verifies(self, grade: Grade, verify: Verify, answer_logprobs: npt.ArrayLike | None = None) -> bool:
        """Whether the cloud should verify the local main model's answer.

        This concerns the quality of the answer; what may leave the machine is decided elsewhere.

        Args:
            grade: of the request; only tier 2 is verified.
            verify: ``"always"``, ``"never"``, or ``"uncertain"``: unless the profile has a threshold for the
                local model and the answer's confidence reaches it.
            answer_logprobs: (n,) log-probabilities of the answer's tokens under the local main model.

        Raises:
            ValueError: ``verify`` is none of these.

        """
        checked_verify(verify)
        if grade.tier is not Tier.ROUTINE or verify == "never":
            return False
        if verify == "always" or self.profile is None or answer_logprobs is None:
            return True
        return self.profile.verifies(confidence(answer_logprobs))

    # ---- what is scored

    def _score(self, text: str, check: Callable[[], None]) -> Assessment:
        """The signals of a text."""
        pieces, n_tokens = self._windows(text)
        worst: list[float] = []
        p_easy, p_hard = 1.0, 0.0
        for piece in pieces:
            wording, nonce = self.policy.wording(piece), _nonce(piece)
            request = self._request(piece, nonce)
            check()
            easy, _, hard = self._shares(
                piece, nonce, wording.difficulty, wording.grades, wording.comma, check
            )
            signals = [_log_odds(easy), -_log_odds(hard), request]
            worst = [min(pair) for pair in zip(worst, signals, strict=True)] if worst else signals
            p_easy, p_hard = min(p_easy, math.exp(easy)), max(p_hard, math.exp(hard))
        return Assessment(tuple(worst), p_easy, p_hard, n_tokens)

    def _request(self, text: str, nonce: str) -> float:
        """The mean log-probability of the text's tokens; 0 where the scorer cannot say."""
        score = getattr(self.scorer, "text_logprobs", None)
        if score is None:
            return 0.0
        values = np.asarray(score(FORM.partition("{text}")[0].format(nonce=nonce), text), dtype=np.float64)
        if values.size == 0:
            raise FailClosed("the request has no tokens")
        mean = float(values.mean())
        if not math.isfinite(mean):
            raise FailClosed("the scorer returned a number that is not finite")
        return mean

    def _privacy(self, text: str, check: Callable[[], None]) -> float:
        """The share of the label for private, the largest that any window and any first sentences have."""
        pieces, _ = self._windows(text)
        # Each is judged as a text of its own, whatever follows it: by its own language and its own nonce.
        starts = [text[:end] for end in _sentence_ends(text, self.policy.sentences)]
        starts = [start for start in starts if self._windows(start)[0] == [start]]
        p = 0.0
        for piece in [*starts, *pieces]:
            check()
            wording, nonce = self.policy.wording(piece), _nonce(piece)
            asked = (wording.privacy, wording.verdicts, wording.conjunction)
            p = max(p, math.exp(self._shares(piece, nonce, *asked, check, self.policy.content_free)[1]))
        return p

    def _shares(
        self,
        text: str,
        nonce: str,
        question: str,
        labels: Sequence[str],
        between: str,
        check: Callable[[], None],
        free: str | None = None,
    ) -> list[float]:
        """The logarithm of each label's share, averaged over the orders in which the options are listed.

        What the text ``free`` gives is subtracted.
        """
        turns = range(len(labels)) if self.policy.rotations else range(1)
        total = np.zeros(len(labels))
        for turn in turns:
            options = between.join([*labels[turn:], *labels[:turn]])
            total += self._labels(text, nonce, question, options, labels)
            if free is not None:
                key = (question, options)
                if key not in self._baselines:
                    check()
                    self._baselines[key] = self._labels(free, _nonce(free), question, options, labels)
                total -= self._baselines[key]
            check()
        mean = total / len(turns)
        mean -= mean.max()
        logs: list[float] = (mean - math.log(float(np.exp(mean).sum()))).tolist()
        return logs

    def _labels(
        self, text: str, nonce: str, question: str, options: str, labels: Sequence[str]
    ) -> list[float]:
        asked = question.replace("{options}", options).replace("{nonce}", nonce)
        before, _, after = FORM.partition("{text}")
        prompt = before.format(nonce=nonce) + text + after.format(nonce=nonce, question=asked)
        found = list(self.scorer.label_logprobs(prompt, labels))
        if len(found) != len(labels):
            raise FailClosed(f"the scorer returned {len(found)} numbers for {len(labels)} labels")
        scores = [float(score) for score in found]
        if not all(math.isfinite(score) for score in scores):
            raise FailClosed("the scorer returned a number that is not finite")
        if max(scores) > 1e-3:
            raise FailClosed("the scorer returned a number above 0, which is no log-probability")
        return scores

    def _windows(self, text: str) -> tuple[list[str], int]:
        p = self.policy
        cut = getattr(self.scorer, "windows", None)
        if cut is not None:
            pieces, n = cut(text, p.head, p.middle, p.tail)
        else:
            n = len(text)
            centre = (n - p.middle) // 2
            pieces = [text[: p.head], text[centre : centre + p.middle], text[n - p.tail :]]
            if n <= p.window:
                pieces = [text]
        if n > p.max_tokens:
            raise FailClosed(f"{n} tokens, and more than {p.max_tokens} are not judged")
        return pieces, n

    # ---- what else can make it private

    def _kinds(self, text: str, findings: Iterable[Any] | None) -> tuple[list[str], bool]:
        """The kinds of all findings, each with how many there are; and whether anything was searched."""
        counts: dict[str, int] = {}
        looked = findings is not None or bool(self._detectors)
        sources = [list(findings or ())]
        if self._detectors:
            try:
                sources += self._limit.run(lambda: [list(one.detect(text)) for one in self._detectors])
            except TimeoutError as error:
                raise FailClosed(f"a detector: {error}") from None
        for source in sources:
            for finding in source:
                kind = finding if isinstance(finding, str) else getattr(finding, "kind", None)
                # A detector from elsewhere might give as the kind the very text that it found.
                name = kind if isinstance(kind, str) and _KIND.fullmatch(kind) else "something"
                counts[name] = counts.get(name, 0) + 1
        return [f"{n} {name}" for name, n in sorted(counts.items())], looked

    @contextmanager
    def _in_time(self) -> Iterator[Callable[[], None]]:
        """A check that fails closed once the time is over; a scorer with ``cancel`` is stopped then."""
        seconds = self.policy.timeout
        if seconds is None:
            yield lambda: None
            return
        deadline = time.monotonic() + seconds
        over = threading.Event()

        def check() -> None:
            if over.is_set() or time.monotonic() > deadline:
                raise FailClosed(f"no grade within {seconds:g} seconds")

        def stop() -> None:
            over.set()
            cancel = getattr(self.scorer, "cancel", None)
            if cancel is not None:
                cancel()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            try:
                yield check
            except Exception:
                check()  # whatever a cancelled scorer raises, the time is the reason
                raise
            check()
        finally:
            timer.cancel()
            join(timer)


# ---- texts -------------------------------------------------------------------------------------------------


_KIND = re.compile("[A-Z][A-Z_]{0,31}")
# Sentences end after a full stop and before a line end; a point within a number or a name ends none.
# Alternatives that could match at every character of a long run match only at its first, or are short: the
# time is linear in the text.
_SENTENCE = re.compile(r"[。！？；!?…]+[”’」』\"')）]*|(?<!\.)\.+[”’\"')）]{0,4}(?=\s)|(?=[^\S\n]{0,8}\n)")
_WORD = re.compile(r"\S")
_NONCES = re.compile("(?=([0-9a-f]{8}))")


def _nonce(text: str) -> str:
    """A mark that does not occur in the text.

    It need not be secret, for it is chosen after the text is known; and as the same text gets the same mark,
    it gets the same grade.
    """
    taken = set(_NONCES.findall(text.lower()))  # once, so that a text full of marks costs no more than others
    i = 0
    while True:
        nonce = hashlib.sha256(b"sllm triage %d" % i).hexdigest()[:8]
        if nonce not in taken:
            return nonce
        i += 1


def _sentence_ends(text: str, n: int) -> list[int]:
    """Where the first ``n`` sentences end, but for the text's own end."""
    ends: list[int] = []
    last = len(text.rstrip())
    word = _WORD.search(text)  # a sentence has something in it
    for match in _SENTENCE.finditer(text):
        end = match.end()
        if len(ends) == n or end >= last or word is None:
            break
        if end > word.start():
            ends.append(end)
            word = _WORD.search(text, end)
    return ends


def _log_odds(log_share: float) -> float:
    """log(p / (1 - p)) from log p."""
    log_share = min(log_share, -1e-12)
    return log_share - math.log(-math.expm1(log_share))


def _tier(profile: Profile, signals: Sequence[float]) -> tuple[Tier, float, float, str]:
    """The tier by a profile, its two probabilities, and why."""
    easy = profile.easy.score(signals)
    p_easy, p_hard = Combination.probability(easy), 0.0
    tier1, gate = profile.tier1, profile.gate
    if profile.hard is not None:
        hard = profile.hard.score([-signal for signal in signals])
        p_hard = Combination.probability(hard)
        # Before tier 1, as in calibration: both promises are about what then remains.
        if gate is not None and hard >= gate:
            why = f"hard: {hard:.3f}, from {gate:.3f} on"
            if profile.tier3 is None:
                return Tier.ROUTINE, p_easy, p_hard, f"{why}, and the profile proves no tier 3"
            return Tier.HARD, p_easy, p_hard, why
    if tier1 is not None and easy >= tier1.score:
        return Tier.SIMPLE, p_easy, p_hard, f"easy: {easy:.3f}, from {tier1.score:.3f} on"
    if tier1 is None:
        return Tier.ROUTINE, p_easy, p_hard, "the profile proves no threshold for tier 1"
    return Tier.ROUTINE, p_easy, p_hard, f"neither hard nor easy: {easy:.3f}, below {tier1.score:.3f}"
