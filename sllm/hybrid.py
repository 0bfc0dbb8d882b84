"""The whole pipeline, like graded medical care: who answers a request, and what may leave the machine.

A small model grades the request. Tier 1: it answers itself. Tier 2: the local main model answers, and the
cloud verifies where that is asked for, in one pass. Tier 3: straight to the cloud. What is private stays
here, or is masked before it leaves and put back in the answer. Whatever goes wrong on the way to that
decision keeps the request here.
"""

from __future__ import annotations

import codecs
import logging
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from sllm import gguf
from sllm.calibration import ProfileError
from sllm.check_answer import Acceptance, check_answer
from sllm.drafters import AnswerDrafter, ModelDrafter
from sllm.errors import BusyError, ClosedError, ContextFullError, LeakError, RemoteError
from sllm.generation import generate
from sllm.model import Model
from sllm.privacy import Restorer, Vault, default_detectors, egress_check
from sllm.sampling import SamplingParams
from sllm.targets.base import Scorer, Target
from sllm.targets.local import LocalTarget
from sllm.text_stream import Run, RunStream
from sllm.triage import ContextScorer, Grade, Tier, Triage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy.typing as npt
    from typing_extensions import Self

    from sllm.model import Vocab
    from sllm.privacy import Detector
    from sllm.triage import Verify

__all__ = ["Answer", "ChatCloud", "Hybrid", "HybridStats"]

log = logging.getLogger("sllm.hybrid")

_T = TypeVar("_T")

Privacy = Literal["local", "deidentify", "refuse"]


@runtime_checkable
class ChatCloud(Protocol):
    """A cloud that takes messages and gives text, such as :class:`sllm.openai_cloud.OpenAICloud`."""

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
        stats: what it has cost.

    """

    def __init__(self, grade: Grade, resources: ExitStack) -> None:
        super().__init__(iter(()), resources)
        self.grade = grade
        self.route: list[str] = []
        self.reasons: list[str] = list(grade.reasons)
        self.masked: dict[str, int] = {}
        self.stats = HybridStats()

    def __repr__(self) -> str:
        return f"<sllm.hybrid.Answer: tier {int(self.grade.tier)}, {' > '.join(self.route) or 'not begun'}>"


class _StaysHere(Exception):  # noqa: N818 - no error: the reason not to use the cloud
    """Why nothing may be sent; the text may be shown."""


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
    masked: list[dict[str, Any]] | None = None  # once it was asked for
    max_tokens: int = 0
    ended: bool = False  # the answer that was written here, by itself
    sampling: SamplingParams = field(default_factory=SamplingParams)


class Hybrid:
    """Answers requests with a small model, a local one and a cloud, and keeps to itself what is private.

    One thread at a time, and one answer: the next :meth:`ask` ends the one before.

    Args:
        small: the model that grades, and that answers tier 1.
        local: the model that answers tier 2; None: ``small`` does.
        cloud: for tier 3 and for verifying: a :class:`~sllm.Target` (``connect(uri).target()``, a
            :class:`~sllm.SplitTarget`), or a :class:`ChatCloud`; None: everything stays here.
        triage: None: one with ``small`` and without a profile, so that every request is tier 2.
        privacy: what becomes of a private request: ``"local"`` (nothing of it leaves), ``"deidentify"`` (what
            was found is masked and put back in the answer; where something is private that cannot be masked,
            nothing leaves), or ``"refuse"`` (as local, and LeakError where only the cloud could answer).
        detectors: what finds private matters; None: :func:`sllm.privacy.default_detectors`.
        verify: which tier-2 answers the cloud verifies: ``"always"``, ``"uncertain"`` (by the profile) or
            ``"never"``.
        accept: when the cloud lets a token of a local answer stand.
        sampling: of every answer; None: temperature 0, at which ``sllm calibrate`` labels answers. A profile
            promises nothing of others.
        max_tokens: of an answer.
        max_cloud_tokens: so many tokens are sent to and written by the cloud in all, over the life of this
            object; None: any number.
        n_ctx, n_threads: of the contexts of ``small`` and ``local``.
        detect_seconds: detectors that take longer have failed.

    Raises:
        ValueError, TypeError: an argument out of range or of another type.
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
        if cloud is not None and not isinstance(cloud, (Target, ChatCloud)):
            raise TypeError(f"cloud is {type(cloud).__name__}, expected a Target, a ChatCloud or None")
        for name, value in (("max_tokens", max_tokens), ("max_cloud_tokens", max_cloud_tokens)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}, expected an integer >= 1")
        self.privacy: Privacy = privacy
        self.verify: Verify = verify
        self.max_cloud_tokens = max_cloud_tokens
        self.cloud_tokens = 0
        self._cloud = cloud
        self._sampling = sampling or SamplingParams(temperature=0.0)
        self._max_tokens = max_tokens
        self._accept = accept or Acceptance()
        self._detectors = default_detectors() if detectors is None else tuple(detectors)
        self._detect_seconds = detect_seconds
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
        self._hanging: threading.Thread | None = None
        self.vault = Vault(self._detectors)

    def new_conversation(self) -> None:
        """Forget what was masked: from here on there is another vault."""
        self.vault = Vault(self._detectors)

    # ---- asking

    def ask(self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int | None = None) -> Answer:
        """Answer a conversation.

        Args:
            messages: mappings with ``role`` and ``content``, the whole conversation.
            max_tokens: of this answer; None: as said to the constructor.

        Returns:
            The answer. A text that is checked before it counts (tier 1 and verified tier 2) comes when it
            is; the others come as they are written.

        Raises:
            TypeError, ValueError: malformed messages.
            LeakError: with ``privacy="refuse"``, a private request that needs the cloud.
            UnsupportedModelError: a model without a chat template.
            ContextFullError: the conversation does not fit.

        """
        if self._closed:
            raise ClosedError("Hybrid is closed")
        if self._answer is not None:
            self._answer.close()
        began = time.perf_counter()
        before = getattr(self.triage.scorer, "n_computed", 0)
        kinds, trouble = self._find(messages)
        grade = self.triage.assess(messages, findings=kinds)
        resources = ExitStack()
        answer = Answer(grade, resources)
        if trouble is not None:
            answer.reasons.append(trouble)
        answer.stats.grade_seconds = time.perf_counter() - began
        answer.stats.grade_tokens = getattr(self.triage.scorer, "n_computed", 0) - before
        sides = _Sides([dict(m) for m in messages], max_tokens=max_tokens or self._max_tokens)
        sides.sampling = self._sampling
        private = grade.private or trouble is not None
        if private and self.privacy == "refuse" and grade.tier is Tier.HARD:
            raise LeakError(
                "the request is private and needs the cloud, and privacy='refuse' sends nothing private"
                f" ({'; '.join(answer.reasons)})"
            )
        log.info("tier %d, %s, found %s", int(grade.tier), grade.privacy, sorted(set(kinds)) or "nothing")
        self._answer = answer
        answer._runs = self._timed(answer, began, self._route(answer, sides, private, bool(kinds), trouble))
        return answer

    def _timed(self, answer: Answer, began: float, runs: Iterator[Run]) -> Iterator[Run]:
        for run in runs:
            answer.stats.seconds = time.perf_counter() - began
            yield run
        answer.stats.seconds = time.perf_counter() - began

    def _find(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[str], str | None]:
        """The kinds of what the detectors find in all that the messages say, and what went wrong."""
        probe = Vault(self._detectors)
        try:
            counts = self._in_time(lambda: probe.mask_messages(messages)).counts
        except TypeError:
            raise  # no messages
        except _StaysHere as stays:
            return ["SOMETHING"], f"failed closed: {stays}"
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing may leave the machine for it
            return ["SOMETHING"], f"failed closed: {type(error).__name__}"
        return [kind for kind, n in counts.items() for _ in range(n)], None

    def _in_time(self, search: Callable[[], _T]) -> _T:
        """What ``search`` returns or raises, unless that takes too long: detectors run beside, so that one
        that hangs cannot hold an answer.
        """
        if self._hanging is not None and self._hanging.is_alive():
            raise _StaysHere("a detector still hangs")
        found: list[_T] = []
        trouble: list[Exception] = []

        def run() -> None:
            try:
                found.append(search())
            except Exception as error:  # noqa: BLE001 - raised again below
                trouble.append(error)

        thread = threading.Thread(target=run, name="sllm-detect", daemon=True)
        thread.start()
        thread.join(self._detect_seconds)
        if thread.is_alive():
            self._hanging = thread
            raise _StaysHere(f"no search within {self._detect_seconds:g} seconds")
        if trouble:
            raise trouble[0]
        return found[0]

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

    def _prompt(self, target: LocalTarget, messages: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.int32]:
        return target.model.chat(messages)

    def _streamed(self, target: LocalTarget, answer: Answer, sides: _Sides, which: str) -> Iterator[Run]:
        """The answer of a model here, as it is written."""
        prompt = self._prompt(target, sides.messages)
        with generate(
            target,
            prompt,
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
        prompt = self._prompt(target, sides.messages)
        written = [token for run in runs for token in run.tokens]
        if not written:
            return runs, np.empty(0)
        text = np.concatenate([prompt, np.array(written, dtype=np.int32)])
        return runs, np.asarray(target.score(text, len(prompt)).logprobs, dtype=np.float64)

    def _draft_of(self, target: LocalTarget) -> Model | None:
        """The small model drafts for the local one where the two share a vocabulary."""
        if target is self._small:
            return None
        mine, theirs = self._small_model.vocab, target.vocab
        return self._small_model if mine.fingerprint == theirs.fingerprint else None

    # ---- the cloud

    def _by_cloud(self, answer: Answer, sides: _Sides) -> Iterator[Run]:
        """The cloud's own answer."""
        messages = self._masked(answer, sides)
        restorer = Restorer(self.vault)
        cloud = self._cloud
        shown = False
        try:
            if isinstance(cloud, Target):
                prompt = self._leave(cloud, messages)
                runs = self._generated(answer, cloud, prompt, sides)
            else:
                assert cloud is not None
                runs = self._chatted(answer, cloud, messages, sides)
            for run in _restored(runs, restorer):
                if not shown:
                    answer.route.append("cloud")
                    shown = True
                answer.stats.n_restored = restorer.n_restored
                yield run
            if not shown:
                answer.route.append("cloud")  # it has answered nothing
        except _StaysHere:
            answer.masked = {}  # nothing has left
            raise
        except (RemoteError, BusyError, ContextFullError) as error:
            if shown:
                raise
            raise _StaysHere(f"the cloud does not answer ({type(error).__name__})") from error

    def _verified(self, answer: Answer, sides: _Sides, text: str) -> Iterator[Run]:
        """A local answer as far as the cloud lets it stand, and what the cloud goes on with."""
        restorer = Restorer(self.vault)
        cloud = self._cloud
        try:
            messages = self._masked(answer, sides)
            masked = self._checked_mask(answer, text)
            if isinstance(cloud, Target):
                runs = self._checked(answer, cloud, messages, masked, sides)
            else:
                assert cloud is not None
                runs = self._asked(answer, cloud, messages, masked, sides)
            first = next(runs, None)  # the verdict: until then the local answer can stand in
        except _StaysHere:
            answer.masked = {}  # nothing has left
            raise
        except (RemoteError, BusyError, ContextFullError) as error:
            raise _StaysHere(f"the cloud does not answer ({type(error).__name__})") from error
        for run in _restored(_with(first, runs), restorer):
            answer.stats.n_restored = restorer.n_restored
            yield run

    def _masked(self, answer: Answer, sides: _Sides) -> list[dict[str, Any]]:
        """The conversation with placeholders for what is private."""
        if sides.masked is None:
            try:
                masked = self._in_time(lambda: self.vault.mask_messages(sides.messages))
            except LeakError as error:
                raise _StaysHere(f"it cannot be masked ({type(error).__name__})") from None
            if masked.counts and self.privacy != "deidentify":
                raise _StaysHere("something private was found")
            answer.masked = dict(masked.counts)
            sides.masked = masked.messages
        return sides.masked

    def _checked_mask(self, answer: Answer, text: str) -> str:
        try:
            masked = self._in_time(lambda: self.vault.mask(text))
        except LeakError as error:
            raise _StaysHere(f"the answer cannot be masked ({type(error).__name__})") from None
        if masked.counts and self.privacy != "deidentify":
            raise _StaysHere("something private was found in the answer")
        for kind, n in masked.counts.items():
            answer.masked[kind] = answer.masked.get(kind, 0) + n
        return masked.text

    def _leave(
        self, cloud: Target, messages: list[dict[str, Any]], answer: str = ""
    ) -> npt.NDArray[np.int32]:
        """The tokens that are to leave, after the last look at what they say."""
        prompt: npt.NDArray[np.int32] = _chat_of(cloud)(messages)
        if answer:
            prompt = np.concatenate([prompt, cloud.vocab.encode(answer, add_special=False)])
        self._look(cloud.vocab.decode(prompt, special=True))
        return prompt

    def _look(self, text: str) -> None:
        try:
            self._in_time(lambda: egress_check(text, self.vault, detectors=self._detectors))
        except LeakError as error:
            log.warning("nothing was sent: %s", error)
            raise _StaysHere("the last look found something private") from None

    def _spend(self, n: int) -> int:
        """Note ``n`` tokens that are to be sent; returns how many the answer may have."""
        left = None if self.max_cloud_tokens is None else self.max_cloud_tokens - self.cloud_tokens - n
        if left is not None and left < 1:
            raise _StaysHere(f"the cloud's {self.max_cloud_tokens} tokens are spent")
        self.cloud_tokens += n
        return left if left is not None else 1 << 30

    def _generated(
        self, answer: Answer, cloud: Target, prompt: npt.NDArray[np.int32], sides: _Sides
    ) -> Iterator[Run]:
        left = self._spend(len(prompt))
        answer.stats.cloud_in += len(prompt)
        drafter = self._guarded(cloud, answer)
        with generate(
            cloud, prompt, draft=drafter, sampling=sides.sampling, max_tokens=min(sides.max_tokens, left)
        ) as stream:
            n = 0
            for run in stream:
                self.cloud_tokens += stream.stats.n_tokens - n
                answer.stats.cloud_out += stream.stats.n_tokens - n
                n = stream.stats.n_tokens
                yield run

    def _guarded(self, cloud: Target, answer: Answer) -> ModelDrafter | None:
        """The largest model here that shares the cloud's vocabulary drafts for it."""
        for target in (self._small,):
            if target.vocab.fingerprint == cloud.vocab.fingerprint and target.model.can_rollback:
                n_ctx = min(target.model.n_ctx_train or 4096, 4096)
                drafter = _GuardedDrafter(
                    target.model, self.vault, cloud.vocab, n_ctx=n_ctx, n_threads=self._settings["n_threads"]
                )
                answer._resources.callback(drafter.close)
                return drafter
        return None

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
        n_prompt = len(self._leave(cloud, messages))
        tokens = self._leave(cloud, messages, masked)
        end = _end_of_turn(cloud.vocab)
        if sides.ended and end is not None:
            tokens = np.append(tokens, np.int32(end)).astype(np.int32)
        left = self._spend(len(tokens))
        answer.stats.cloud_in += len(tokens)
        verdict = check_answer(cloud, tokens[:n_prompt], tokens[n_prompt:], accept=self._accept)
        answer.stats.n_checked = len(tokens) - n_prompt
        n_kept = _to_a_character(cloud.vocab, tokens[n_prompt:], verdict.n_kept)
        answer.stats.n_kept = n_kept
        kept = tokens[n_prompt : n_prompt + n_kept]
        whole = n_kept == len(tokens) - n_prompt
        answer.route.append("verified" if whole else "corrected")
        if len(kept):
            text = cloud.vocab.decode(kept)
            yield Run(n_prompt, tuple(kept.tolist()), text, len(kept), "draft")
        if whole:
            return
        drafter = AnswerDrafter(tokens[n_prompt:].tolist(), n_prompt)
        room = min(max(sides.max_tokens - len(kept), 1), left)
        with generate(
            cloud,
            tokens[: n_prompt + n_kept],
            draft=drafter,
            sampling=sides.sampling,
            max_tokens=room,
        ) as stream:
            n = 0
            for run in stream:
                self.cloud_tokens += stream.stats.n_tokens - n
                answer.stats.cloud_out += stream.stats.n_tokens - n
                n = stream.stats.n_tokens
                yield run

    # ---- a cloud that takes messages

    def _chatted(
        self, answer: Answer, cloud: ChatCloud, messages: list[dict[str, Any]], sides: _Sides
    ) -> Iterator[Run]:
        said = "\n".join(_texts(messages))
        self._look(said)
        n = cloud.count(said)
        left = self._spend(n)
        answer.stats.cloud_in += n
        for piece in cloud.stream(messages, min(sides.max_tokens, left)):
            n = cloud.count(piece)
            answer.stats.cloud_out += n
            self.cloud_tokens += n
            yield Run(0, (), piece, 0, "target")

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


_ACCEPTED = "ACCEPT"
_REVIEW = (
    "Check your answer above. If it is right and complete, reply with the single word ACCEPT. Otherwise reply"
    " with the corrected answer alone, in the language of the question, and keep placeholders in square"
    " brackets as they are."
)


def _texts(value: Any) -> Iterator[str]:
    """Every text in messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _chat_of(target: Target) -> Any:
    """What makes a prompt of messages for a target."""
    chat = getattr(target, "chat", None)
    if chat is None:
        raise TypeError(f"{type(target).__name__} has no chat(), which makes a prompt of messages")
    return chat


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


def _restored(runs: Iterator[Run], restorer: Restorer) -> Iterator[Run]:
    """Runs whose texts have their placeholders back."""
    last: Run | None = None
    for run in runs:
        if last is not None:
            yield replace(last, text=restorer.feed(last.text))
        last = run
    if last is not None:
        yield replace(last, text=restorer.feed(last.text) + restorer.finish())
