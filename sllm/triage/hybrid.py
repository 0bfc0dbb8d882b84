"""The whole pipeline, like graded medical care: who answers a request, and what may leave the machine.

A small model grades the request. Tier 1: it answers itself. Tier 2: the local main model answers, and the
cloud verifies where that is asked for, in one pass. Tier 3: straight to the cloud. What is private stays
here, or is masked before it leaves and put back in the answer. Whatever goes wrong on the way to that
decision keeps the request here.
"""

from __future__ import annotations

import codecs
import copy
import logging
import math
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from sllm.draft.drafters import AnswerDrafter, ModelDrafter
from sllm.engine import gguf
from sllm.engine.messages import checked_messages
from sllm.engine.model import Model
from sllm.engine.sampling import SamplingParams
from sllm.errors import BusyError, ClosedError, LeakError, RemoteError
from sllm.generation.generate import generate
from sllm.generation.local import LocalTarget
from sllm.generation.text_stream import Run, RunStream
from sllm.privacy import Detector, Restorer, Vault, default_detectors, egress_check
from sllm.targets.base import Scorer, Target
from sllm.triage.calibration import ProfileError
from sllm.triage.check_answer import Acceptance, answer_logprobs, check_answer
from sllm.triage.triage import ContextScorer, Grade, Tier, TimeLimit, Triage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy.typing as npt
    from typing_extensions import Self

    from sllm.engine.vocab import Vocab
    from sllm.triage.triage import Verify

__all__ = ["Answer", "ChatCloud", "Hybrid", "HybridStats"]

log = logging.getLogger("sllm.hybrid")

_T = TypeVar("_T")

Privacy = Literal["local", "deidentify", "refuse"]


@runtime_checkable
class ChatCloud(Protocol):
    """A cloud that takes messages and gives text, such as :class:`sllm.triage.openai_cloud.OpenAICloud`.

    It selects tokens as it likes: no sampling parameters go there.
    """

    def stream(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> Iterator[str]:
        """The answer to a conversation, piece by piece.

        Raises:
            RemoteError: it does not answer.

        """
        ...

    def count(self, text: str) -> int:
        """About how many tokens a text has there."""
        ...


@dataclass
class HybridStats:
    """What an answer has cost. Times are seconds.

    Attributes:
        grade_seconds: for the grade and the search for private matters.
        grade_tokens: tokens that the small model computed for it.
        n_small, n_local: tokens that the small and the local main model wrote.
        cloud_in: tokens sent to the cloud: prompts, and answers to be verified.
        cloud_out: tokens that the cloud wrote.
        n_kept: of a verified answer, the tokens that stood.
        n_checked: of a verified answer, its tokens.
        n_restored: placeholders put back.
        n_unknown: what the cloud wrote that looks like a placeholder and was never issued; it stays.
        seconds: until the end of the answer.

    """

    grade_seconds: float = 0.0
    grade_tokens: int = 0
    n_small: int = 0
    n_local: int = 0
    cloud_in: int = 0
    cloud_out: int = 0
    n_kept: int = 0
    n_checked: int = 0
    n_restored: int = 0
    n_unknown: int = 0
    seconds: float = 0.0


class Answer(RunStream):
    """An answer on its way: an iterator of :class:`~sllm.Run`, made by :meth:`Hybrid.ask`.

    The tokens of a run are those that its writer has; in its text placeholders have their values back.

    Attributes:
        grade: what triage says of the request.
        route: who has had to do with it so far, in order: ``"small"``, ``"local"``, ``"cloud"``, and
            ``"verified"`` or ``"corrected"`` for what the cloud made of a local answer.
        reasons: why, without a word of the request.
        masked: kind -> how many places were masked in what has left the machine.
        complete: whether it has come to its end: not one that was left, or that broke off.
        stats: what it has cost.

    """

    def __init__(self, grade: Grade, resources: ExitStack, turn: threading.Lock) -> None:
        super().__init__(iter(()), resources)
        self._turn = turn
        self.complete = False
        self.grade = grade
        self.route: list[str] = []
        self.reasons: list[str] = list(grade.reasons)
        self.masked: dict[str, int] = {}
        self.stats = HybridStats()

    def __next__(self) -> Run:
        # Outside of what closes the answer on an exception: a second thread must not end it for the first.
        with _alone(self._turn):
            return super().__next__()

    def __repr__(self) -> str:
        return f"<sllm.triage.Answer: tier {int(self.grade.tier)}, {' > '.join(self.route) or 'not begun'}>"


@contextmanager
def _alone(turn: threading.Lock) -> Iterator[None]:
    if not turn.acquire(blocking=False):
        raise BusyError(
            "another thread is inside this Hybrid, which serves one at a time; wait for it, or make another"
        )
    try:
        yield
    finally:
        turn.release()


class _StaysHere(Exception):  # noqa: N818 - no error: the reason not to use the cloud
    """Why nothing may be sent; the text may be shown."""


class _HoldsPrivate(_StaysHere):
    """What was to be sent holds something private."""


class _GuardedDrafter(ModelDrafter):
    """A draft whose hints leave the machine: they must not hold what the vault does."""

    def __init__(self, model: Model, vault: Vault, vocab: Vocab, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._vault = vault
        self._vocab = vocab

    def draft(self, text: Sequence[int], chain: Sequence[int], n_max: int, p_min: float) -> list[int]:
        """See :meth:`ModelDrafter.draft`; nothing where a hint would give something away."""
        found = super().draft(text, chain, n_max, p_min)
        tail = [*text[-_TAIL:], *chain, *found]
        known = [token for token in tail if 0 <= token < self._vocab.n_tokens]
        try:
            egress_check(self._vocab.decode(known), self._vault, detectors=())
        except LeakError:
            self.probs = []
            return []
        return found


_TAIL = 64
"""Tokens of the text in front of a hint that are looked at with it: a value may begin there."""


@dataclass
class _Sides:
    """What one answer works with."""

    messages: list[dict[str, Any]]
    vault: Vault
    sampling: SamplingParams
    max_tokens: int
    masked: list[dict[str, Any]] | None = None  # once it was asked for
    ended: bool = False  # the answer that was written here, by itself


class Hybrid:
    """Answers requests with a small model, a local one and a cloud, and keeps to itself what is private.

    One thread at a time, and one answer: the next :meth:`ask` ends the one before.

    Args:
        small: the model that grades, and that answers tier 1.
        local: the model that answers tier 2; None: ``small`` does.
        cloud: for tier 3 and for verifying: a :class:`~sllm.Target` with ``chat()``
            (``connect(uri).target()``, a :class:`~sllm.SplitTarget`), or a :class:`ChatCloud`; None:
            everything stays here.
        triage: None: one with ``small`` and without a profile, so that every request is tier 2.
        privacy: what becomes of a private request: ``"local"`` (nothing of it leaves), ``"deidentify"`` (what
            was found is masked and put back in the answer; where something is private that cannot be masked,
            or the model finds private what masking has left, nothing leaves), or ``"refuse"`` (as local, and
            LeakError where only the cloud could answer).
        detectors: what finds private matters; None: :func:`sllm.privacy.default_detectors`.
        verify: which tier-2 answers the cloud verifies: ``"always"``, ``"uncertain"`` (by the profile) or
            ``"never"``.
        accept: when the cloud lets a token of a local answer stand.
        sampling: of every answer but a :class:`ChatCloud`'s; None: temperature 0, at which ``sllm calibrate``
            labels answers. A profile promises nothing of others. With a grammar, nothing that was masked
            leaves: what a grammar says of placeholders it need not say of values. An answer that does not
            stand is then the cloud's from its beginning, where a grammar begins.
        max_tokens: of an answer.
        max_cloud_tokens: so many tokens are sent to and written by the cloud in all, over the life of this
            object, as the cloud's ``count`` estimates them for a :class:`ChatCloud`; None: any number.
        n_ctx, n_threads: of the contexts of ``small`` and ``local``.
        detect_seconds: detectors that take longer have failed.

    Raises:
        ValueError, TypeError: an argument out of range or of another type, or a grammar for a
            :class:`ChatCloud`, which would not keep to it.
        ProfileError: the profile is of another model than ``small``, whose answers it speaks of.

    Attributes:
        vault: of the conversation; :meth:`new_conversation` begins another one.
        cloud_tokens: sent and written so far.

    """

    def __init__(
        self,
        small: Model,
        local: Model | None = None,
        cloud: Target | ChatCloud | None = None,
        *,
        triage: Triage | None = None,
        privacy: Privacy = "local",
        detectors: Sequence[Detector] | None = None,
        verify: Verify = "uncertain",
        accept: Acceptance | None = None,
        sampling: SamplingParams | None = None,
        max_tokens: int = 512,
        max_cloud_tokens: int | None = None,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        detect_seconds: float = 10.0,
    ) -> None:
        if privacy not in ("local", "deidentify", "refuse"):
            raise ValueError(f"privacy is {privacy!r}, expected 'local', 'deidentify' or 'refuse'")
        if verify not in ("always", "uncertain", "never"):
            raise ValueError(f"verify is {verify!r}, expected 'always', 'uncertain' or 'never'")
        _check_cloud(cloud, sampling)
        for name, value in (("max_tokens", max_tokens), ("max_cloud_tokens", max_cloud_tokens)):
            if value is not None:
                _check_count(name, value)
        if isinstance(detect_seconds, bool) or not isinstance(detect_seconds, (int, float)):
            raise TypeError(f"detect_seconds is {detect_seconds!r}, expected a number")
        if not 0 < detect_seconds < math.inf:
            raise ValueError(f"detect_seconds is {detect_seconds}, expected a finite number above 0")
        self.privacy: Privacy = privacy
        self.verify: Verify = verify
        self.max_cloud_tokens = max_cloud_tokens
        self.cloud_tokens = 0
        self._cloud = cloud
        self._sampling = sampling or SamplingParams(temperature=0.0)
        self._max_tokens = max_tokens
        self._accept = accept or Acceptance()
        self._detectors = default_detectors() if detectors is None else tuple(detectors)
        for detector in self._detectors:
            if not isinstance(detector, Detector):
                raise TypeError(f"a detector is {type(detector).__name__}, expected something with detect()")
        self._limit = TimeLimit(detect_seconds)
        self._turn = threading.Lock()
        self._closed = False
        self._answer: Answer | None = None
        self._settings: dict[str, Any] = {"n_ctx": n_ctx, "n_threads": n_threads}
        with ExitStack() as stack:
            if triage is None:
                triage = Triage(stack.enter_context(ContextScorer(small, n_threads=n_threads)))
            self.triage = triage
            profile = getattr(triage, "profile", None)
            if profile is not None and profile.model_id != gguf.model_id(small.path):
                raise ProfileError(
                    f"the profile is for model {profile.model_id}, and the small model is {small.path.name}"
                )
            # A threshold for the confidence of another model's answers says nothing of these.
            self._knows_local = profile is None or (
                profile.verify_model_id is not None
                and profile.verify_model_id == gguf.model_id((local or small).path)
            )
            self._small_model = small
            self._small = stack.enter_context(LocalTarget(small, **self._settings))
            self._local = self._small
            if local is not None and local is not small:
                self._local = stack.enter_context(LocalTarget(local, **self._settings))
            self._stack = stack.pop_all()
        self.vault = Vault(self._detectors)

    def new_conversation(self) -> None:
        """Forget what was masked: from here on there is another vault. An answer on its way keeps its own."""
        self.vault = Vault(self._detectors)

    # ---- asking

    def ask(self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int | None = None) -> Answer:
        """Answer a conversation.

        Args:
            messages: mappings with ``role`` and ``content``, the whole conversation.
            max_tokens: of this answer; None: as said to the constructor.

        Returns:
            The answer. A text that is checked before it counts (tier 1 and verified tier 2) comes when it
            is; the others come as they are written. What a model or the cloud raises on the way comes where
            the answer is read: UnsupportedModelError (no chat template), ContextFullError (the conversation
            does not fit), RemoteError (the cloud has broken off within an answer that was shown in part).

        Raises:
            TypeError, ValueError: malformed messages, or max_tokens below 1.
            LeakError: with ``privacy="refuse"``, a private request that needs the cloud; also where the
                answer is read, for what is noticed only then.
            BusyError: another thread is inside.
            ClosedError: after :meth:`close`.

        """
        if max_tokens is not None:
            _check_count("max_tokens", max_tokens)
        with _alone(self._turn):
            if self._closed:
                raise ClosedError("Hybrid is closed")
            if self._answer is not None:
                self._answer.close()
            began = time.perf_counter()
            before = getattr(self.triage.scorer, "n_computed", 0)
            # A copy: what was judged is what is sent, whatever becomes of the caller's lists meanwhile.
            copied = [copy.deepcopy(dict(message)) for message in checked_messages(messages)]
            kinds, trouble = self._find(copied)
            grade = self.triage.assess(copied, findings=kinds)
            answer = Answer(grade, ExitStack(), self._turn)
            if trouble is not None:
                answer.reasons.append(trouble)
            answer.stats.grade_seconds = time.perf_counter() - began
            answer.stats.grade_tokens = getattr(self.triage.scorer, "n_computed", 0) - before
            sides = _Sides(copied, self.vault, self._sampling, max_tokens or self._max_tokens)
            private = grade.private or trouble is not None
            log.info("tier %d, %s, found %s", int(grade.tier), grade.privacy, sorted(set(kinds)) or "nothing")
            if private and self.privacy == "refuse" and grade.tier is Tier.HARD:
                raise self._refusal(answer)
            self._answer = answer
            answer._runs = self._timed(
                answer, began, self._route(answer, sides, private, bool(kinds), trouble)
            )
            return answer

    def _refusal(self, answer: Answer) -> LeakError:
        return LeakError(
            "the request is private and needs the cloud, and privacy='refuse' sends nothing private"
            f" ({'; '.join(answer.reasons)}); 'local' answers it here, 'deidentify' masks what was found"
        )

    def _timed(self, answer: Answer, began: float, runs: Iterator[Run]) -> Iterator[Run]:
        for run in runs:
            answer.stats.seconds = time.perf_counter() - began
            yield run
        answer.stats.seconds = time.perf_counter() - began
        answer.complete = True

    def _find(self, messages: list[dict[str, Any]]) -> tuple[list[str], str | None]:
        """The kinds of what the detectors find in all that the messages say, and what went wrong."""
        probe = Vault(self._detectors)
        try:
            counts = self._in_time(lambda: probe.mask_messages(messages)).counts
        except TypeError:
            raise  # a message that holds something else than text, numbers, lists and mappings
        except _StaysHere as stays:
            return ["SOMETHING"], f"failed closed: {stays}"
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing may leave the machine for it
            return ["SOMETHING"], f"failed closed: {type(error).__name__}"
        return [kind for kind, n in counts.items() for _ in range(n)], None

    def _in_time(self, search: Callable[[], _T]) -> _T:
        """What ``search`` returns or raises, unless that takes too long: a detector that hangs must not hold
        an answer.
        """
        try:
            return self._limit.run(search)
        except TimeoutError as error:
            raise _StaysHere(f"a detector: {error}") from None

    # ---- the route

    def _route(
        self, answer: Answer, sides: _Sides, private: bool, found: bool, trouble: str | None
    ) -> Iterator[Run]:
        why: str | None = None
        if self._cloud is None:
            why = "there is no cloud"
        elif trouble is not None or (private and not found):
            why = "it is private, and nothing was found that could be masked"
        elif private and self.privacy != "deidentify":
            why = f"it is private, and privacy is {self.privacy}"
        tier = answer.grade.tier
        if tier is Tier.HARD and why is None:
            try:
                yield from self._by_cloud(answer, sides)
            except _StaysHere as stays:
                why = str(stays)
                if isinstance(stays, _HoldsPrivate) and self.privacy == "refuse":
                    raise self._refusal(answer) from None
            else:
                return
        if why is not None and tier is not Tier.SIMPLE:
            answer.reasons.append(f"stays here: {why}")
        if tier is Tier.SIMPLE:
            answer.route.append("small")
            runs, logprobs = self._written(self._small, answer, sides, "n_small")
            if not self.triage.escalates(logprobs):
                yield from runs
                return
            answer.reasons.append("the small model is not sure of its answer")
            answer.grade = replace(answer.grade, tier=Tier.ROUTINE)
        answer.route.append("local")
        which = "n_small" if self._local is self._small else "n_local"
        wanted = self.verify != "never" and why is None and answer.grade.tier is Tier.ROUTINE
        if not wanted:
            yield from self._streamed(self._local, answer, sides, which)
            return
        runs, logprobs = self._written(self._local, answer, sides, which)
        if not self.triage.verifies(answer.grade, self.verify, logprobs if self._knows_local else None):
            yield from runs
            return
        try:
            yield from self._verified(answer, sides, "".join(run.text for run in runs))
        except _StaysHere as stays:
            answer.reasons.append(f"not verified: {stays}")
            yield from runs

    def _streamed(self, target: LocalTarget, answer: Answer, sides: _Sides, which: str) -> Iterator[Run]:
        """The answer of a model here, as it is written."""
        sides.ended = False
        with generate(
            target,
            target.chat(sides.messages),
            draft=self._draft_of(target),
            sampling=sides.sampling,
            max_tokens=sides.max_tokens,
        ) as stream:
            for run in stream:
                setattr(answer.stats, which, stream.stats.n_tokens)
                sides.ended = stream.stats.finish_reason == "eog"
                yield run

    def _written(
        self, target: LocalTarget, answer: Answer, sides: _Sides, which: str
    ) -> tuple[list[Run], npt.NDArray[np.float64]]:
        """The whole answer of a model here, and the log-probabilities of its tokens."""
        runs = list(self._streamed(target, answer, sides, which))
        written = [token for run in runs for token in run.tokens]
        return runs, answer_logprobs(target, target.chat(sides.messages), written)

    def _draft_of(self, target: LocalTarget) -> Model | None:
        """The small model drafts for the local one where the two share a vocabulary."""
        if target is self._small:
            return None
        mine, theirs = self._small_model.vocab, target.vocab
        return self._small_model if mine.fingerprint == theirs.fingerprint else None

    # ---- the cloud

    def _by_cloud(self, answer: Answer, sides: _Sides) -> Iterator[Run]:
        """The cloud's own answer."""
        restorer = Restorer(sides.vault.placeholders)
        cloud = self._cloud
        shown = False
        try:
            messages = self._masked(answer, sides)
            if isinstance(cloud, Target):
                prompt = self._leave(cloud, messages, sides)
                runs = self._generated(answer, cloud, prompt, sides)
            else:
                assert cloud is not None
                runs = self._chatted(answer, cloud, messages, sides)
            for run in _restored(runs, restorer, answer.stats):
                if not shown:
                    answer.route.append("cloud")
                    shown = True
                yield run
            if not shown:
                answer.route.append("cloud")  # it has answered nothing
        except _StaysHere:
            answer.masked = {}  # nothing has left
            raise
        except Exception as error:
            if shown:
                raise
            raise _unanswered(error) from None

    def _verified(self, answer: Answer, sides: _Sides, text: str) -> Iterator[Run]:
        """A local answer as far as the cloud lets it stand, and what the cloud goes on with."""
        restorer = Restorer(sides.vault.placeholders)
        cloud = self._cloud
        route = list(answer.route)
        try:
            messages = self._masked(answer, sides)
            masked = self._checked_mask(answer, sides, text)
            if isinstance(cloud, Target):
                runs = self._checked(answer, cloud, messages, masked, sides)
            else:
                assert cloud is not None
                runs = self._asked(answer, cloud, messages, masked, sides)
            first = next(runs, None)  # the verdict: until then the local answer can stand in
        except _StaysHere:
            answer.masked = {}  # nothing has left
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the local answer stands
            answer.route = route
            raise _unanswered(error) from None
        yield from _restored(_with(first, runs), restorer, answer.stats)

    def _masked(self, answer: Answer, sides: _Sides) -> list[dict[str, Any]]:
        """The conversation with placeholders for what is private."""
        if sides.masked is None:
            try:
                masked = self._in_time(lambda: sides.vault.mask_messages(sides.messages))
            except LeakError as error:
                raise _HoldsPrivate(f"it cannot be masked ({type(error).__name__})") from None
            self._check_masked(masked.counts, sides, "it")
            if masked.counts:
                before, began = getattr(self.triage.scorer, "n_computed", 0), time.perf_counter()
                private = self.triage.finds_private(masked.messages)
                answer.stats.grade_seconds += time.perf_counter() - began
                answer.stats.grade_tokens += getattr(self.triage.scorer, "n_computed", 0) - before
                if private:
                    raise _HoldsPrivate("the model finds private what masking has left")
            answer.masked = dict(masked.counts)
            sides.masked = masked.messages
        return sides.masked

    def _checked_mask(self, answer: Answer, sides: _Sides, text: str) -> str:
        try:
            masked = self._in_time(lambda: sides.vault.mask(text))
        except LeakError as error:
            raise _HoldsPrivate(f"the answer cannot be masked ({type(error).__name__})") from None
        self._check_masked(masked.counts, sides, "the answer")
        for kind, n in masked.counts.items():
            answer.masked[kind] = answer.masked.get(kind, 0) + n
        return masked.text

    def _check_masked(self, counts: Mapping[str, int], sides: _Sides, what: str) -> None:
        """Whether so much may be masked in what is to be sent."""
        if counts and self.privacy != "deidentify":
            raise _HoldsPrivate(f"something private was found in {what}")
        if counts and sides.sampling.grammar is not None:
            # It may demand eleven digits where a placeholder stands, or not the escapes that a value needs.
            raise _StaysHere("a grammar holds for values, and what was masked comes back as a placeholder")

    def _leave(
        self, cloud: Target, messages: list[dict[str, Any]], sides: _Sides, answer: str = ""
    ) -> npt.NDArray[np.int32]:
        """The tokens that are to leave, after the last look at what they say."""
        prompt: npt.NDArray[np.int32] = cloud.chat(messages)  # type: ignore[attr-defined]
        if answer:
            prompt = np.concatenate([prompt, cloud.vocab.encode(answer, add_special=False)])
        self._look(cloud.vocab.decode(prompt, special=True), sides)
        return prompt

    def _look(self, text: str, sides: _Sides) -> None:
        try:
            self._in_time(lambda: egress_check(text, sides.vault, detectors=self._detectors))
        except LeakError as error:
            log.warning("nothing was sent: %s", error)
            raise _HoldsPrivate("the last look found something private") from None

    def _spend(self, n: int) -> int:
        """Note ``n`` tokens that are to be sent; returns how many the answer may have."""
        left = None if self.max_cloud_tokens is None else self.max_cloud_tokens - self.cloud_tokens - n
        if left is not None and left < 1:
            raise _StaysHere(self._spent)
        self.cloud_tokens += n
        return left if left is not None else 1 << 30

    @property
    def _spent(self) -> str:
        return f"the cloud's {self.max_cloud_tokens} tokens are spent"

    def _generated(
        self, answer: Answer, cloud: Target, prompt: npt.NDArray[np.int32], sides: _Sides
    ) -> Iterator[Run]:
        left = self._spend(len(prompt))
        answer.stats.cloud_in += len(prompt)
        drafter = self._guarded(cloud, answer, sides)
        yield from self._going_on(answer, cloud, prompt, drafter, sides, sides.max_tokens, left)

    def _going_on(
        self,
        answer: Answer,
        cloud: Target,
        prompt: npt.NDArray[np.int32],
        drafter: ModelDrafter | AnswerDrafter | None,
        sides: _Sides,
        max_tokens: int,
        left: int,
    ) -> Iterator[Run]:
        """What a target writes behind a prompt, counted; ``left`` tokens may be spent."""
        with generate(
            cloud, prompt, draft=drafter, sampling=sides.sampling, max_tokens=min(max_tokens, left)
        ) as stream:
            n = 0
            for run in stream:
                self.cloud_tokens += stream.stats.n_tokens - n
                answer.stats.cloud_out += stream.stats.n_tokens - n
                n = stream.stats.n_tokens
                yield run
            if stream.stats.finish_reason == "length" and left < max_tokens:
                answer.reasons.append(f"cut off: {self._spent}")

    def _guarded(self, cloud: Target, answer: Answer, sides: _Sides) -> ModelDrafter | None:
        """The small model drafts for the cloud where the two share a vocabulary."""
        small = self._small_model
        if small.vocab.fingerprint != cloud.vocab.fingerprint or not small.can_rollback:
            return None
        n_ctx = min(small.n_ctx_train or 4096, 4096)
        drafter = _GuardedDrafter(
            small, sides.vault, cloud.vocab, n_ctx=n_ctx, n_threads=self._settings["n_threads"]
        )
        answer._resources.callback(drafter.close)
        return drafter

    def _checked(
        self,
        answer: Answer,
        cloud: Target,
        messages: list[dict[str, Any]],
        masked: str,
        sides: _Sides,
    ) -> Iterator[Run]:
        """One pass of the cloud over the whole local answer; it goes on from where that does not stand."""
        if not isinstance(cloud, Scorer):
            raise _StaysHere("the cloud cannot score an answer")
        n_prompt = len(self._leave(cloud, messages, sides))
        tokens = self._leave(cloud, messages, sides, masked)
        end = _end_of_turn(cloud.vocab)
        if sides.ended and end is not None:
            tokens = np.append(tokens, np.int32(end)).astype(np.int32)
        if len(tokens) == n_prompt:
            raise _StaysHere("there is nothing to verify")
        left = self._spend(len(tokens))
        answer.stats.cloud_in += len(tokens)
        verdict = check_answer(cloud, tokens[:n_prompt], tokens[n_prompt:], accept=self._accept)
        answer.stats.n_checked = len(tokens) - n_prompt
        n_kept = _to_a_character(cloud.vocab, tokens[n_prompt:], verdict.n_kept)
        whole = n_kept == len(tokens) - n_prompt
        if not whole and sides.sampling.grammar is not None:
            n_kept = 0  # a grammar begins where a text does
        answer.stats.n_kept = n_kept
        kept = tokens[n_prompt : n_prompt + n_kept]
        answer.route.append("verified" if whole else "corrected")
        if len(kept):
            text = cloud.vocab.decode(kept)
            yield Run(n_prompt, tuple(kept.tolist()), text, len(kept), "draft")
        if whole:
            return
        drafter = AnswerDrafter(tokens[n_prompt:].tolist(), n_prompt)
        room = max(sides.max_tokens - len(kept), 1)
        yield from self._going_on(answer, cloud, tokens[: n_prompt + n_kept], drafter, sides, room, left)

    # ---- a cloud that takes messages

    def _chatted(
        self, answer: Answer, cloud: ChatCloud, messages: list[dict[str, Any]], sides: _Sides
    ) -> Iterator[Run]:
        said = "\n".join(_texts(messages))
        self._look(said, sides)
        pieces: Iterator[str] | None = None
        try:
            n = cloud.count(said)
            left = self._spend(n)
            answer.stats.cloud_in += n
            decoder = codecs.getincrementaldecoder("utf-16-le")("replace")
            pieces = iter(cloud.stream(messages, min(sides.max_tokens, left)))
            for piece in self._counted(answer, cloud, pieces, sides, left):
                # Two halves of a character may come apart; half of one alone cannot be written anywhere.
                text = decoder.decode(piece.encode("utf-16-le", "surrogatepass"))
                yield Run(0, (), text, 0, "target")
            text = decoder.decode(b"", final=True)
            if text:
                yield Run(0, (), text, 0, "target")
        except (RemoteError, _StaysHere):
            raise
        except Exception as error:  # noqa: BLE001 - anybody's errors, which may quote what was sent
            raise RemoteError(f"the cloud has broken off ({type(error).__name__})") from None
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                close()

    def _counted(
        self, answer: Answer, cloud: ChatCloud, pieces: Iterator[str], sides: _Sides, left: int
    ) -> Iterator[str]:
        """The pieces of an answer until they are too many: how much it writes is not left to the cloud."""
        # The count is an estimate, which must cut nobody short who keeps to what was asked for.
        limit = min(left, _RUNAWAY * sides.max_tokens)
        settled = counted = 0
        block = ""
        for piece in pieces:
            if not isinstance(piece, str):
                raise RemoteError(f"the cloud gave {type(piece).__name__}, expected text")
            block += piece
            n = settled + cloud.count(block)
            answer.stats.cloud_out += n - counted
            self.cloud_tokens += n - counted
            counted = n
            if n > limit:
                why = self._spent if left <= limit else "the cloud does not end its answer"
                answer.reasons.append(f"cut off: {why}")
                return
            if len(block) > _BLOCK:  # in blocks, or the rounding of each piece would count
                settled, block = n, ""
            yield piece

    def _asked(
        self,
        answer: Answer,
        cloud: ChatCloud,
        messages: list[dict[str, Any]],
        masked: str,
        sides: _Sides,
    ) -> Iterator[Run]:
        """The cloud is shown the local answer, and says a word that stands for it or a better one."""
        question = [*messages, {"role": "assistant", "content": masked}, {"role": "user", "content": _REVIEW}]
        pieces = self._chatted(answer, cloud, question, sides)
        held = ""
        for run in pieces:
            held += run.text
            if not _ACCEPTED.startswith(held.strip().strip(".。!\"'`*").upper()[: len(_ACCEPTED)]):
                break
        if held.strip().strip(".。!\"'`* ").upper() == _ACCEPTED:
            answer.route.append("verified")
            yield Run(0, (), masked, 0, "draft")
            return
        answer.route.append("corrected")
        yield Run(0, (), held, 0, "target")
        yield from pieces

    # ---- lifetime

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """End the answer and free the contexts; models and cloud stay the caller's. More calls do nothing."""
        self._closed = True
        if self._answer is not None:
            self._answer.close()
            self._answer = None
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<sllm.Hybrid, privacy {self.privacy}{', closed' if self._closed else ''}>"


_RUNAWAY = 4
"""Times as many tokens, by estimate, as a cloud that takes messages was asked for end its answer."""

_BLOCK = 512
"""Characters of its answer that are counted together."""

_ACCEPTED = "ACCEPT"
_REVIEW = (
    "Check your answer above. If it is right and complete, reply with the single word ACCEPT. Otherwise reply"
    " with the corrected answer alone, in the language of the question, and keep placeholders in square"
    " brackets as they are."
)


def _check_cloud(cloud: object, sampling: SamplingParams | None) -> None:
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise TypeError(f"sampling is {sampling!r}, expected SamplingParams or None")
    if cloud is None:
        return
    if isinstance(cloud, Target):
        if not callable(getattr(cloud, "chat", None)):
            raise TypeError(f"{type(cloud).__name__} has no chat(), which makes a prompt of messages")
    elif not isinstance(cloud, ChatCloud):
        raise TypeError(f"cloud is {type(cloud).__name__}, expected a Target, a ChatCloud or None")
    elif sampling is not None and sampling.grammar is not None:
        raise ValueError(
            f"sampling has a grammar, to which {type(cloud).__name__} would not keep;"
            " leave it out, or use a Target (a worker, a split) as the cloud"
        )


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected an integer >= 1")


def _unanswered(error: Exception) -> _StaysHere:
    """For the answer's reasons: the kind of the trouble alone, for its text may be anybody's."""
    log.info("the cloud does not answer (%s)", type(error).__name__)
    return _StaysHere(f"the cloud does not answer ({type(error).__name__})")


def _texts(value: Any) -> Iterator[str]:
    """Everything that messages say: texts, numbers, and the keys of what is nested."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield str(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _end_of_turn(vocab: Vocab) -> int | None:
    return vocab.eot if vocab.eot is not None else vocab.eos


def _to_a_character(vocab: Vocab, tokens: npt.NDArray[np.int32], n: int) -> int:
    """``n``, or less where the first ``n`` tokens end within a character: its other bytes would be lost."""
    if n == len(tokens):
        return n
    while n:
        pieces = [vocab.piece(token) for token in tokens[max(0, n - 4) : n].tolist()]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(pieces))
        if not decoder.getstate()[0]:
            break
        n -= 1
    return n


def _with(first: Run | None, rest: Iterator[Run]) -> Iterator[Run]:
    if first is not None:
        yield first
    yield from rest


def _restored(runs: Iterator[Run], restorer: Restorer, stats: HybridStats) -> Iterator[Run]:
    """Runs whose texts have their placeholders back."""
    last: Run | None = None
    for run in runs:
        if run.source == "local":
            continue  # a draft of the cloud's answer that may be withdrawn: restoring goes forward alone
        last = replace(run, text=restorer.feed(run.text), withdrawn=())
        stats.n_restored, stats.n_unknown = restorer.n_restored, restorer.n_unknown
        yield last
    rest = restorer.finish()
    stats.n_restored, stats.n_unknown = restorer.n_restored, restorer.n_unknown
    if last is not None and rest:
        yield Run(last.pos + len(last.tokens), (), rest, 0, last.source)
