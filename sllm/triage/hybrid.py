"""The whole pipeline: who answers a request, and what may leave the machine.

A small model grades the request. Tier 1: it answers itself. Tier 2: the local main model answers, and the
cloud verifies the answer in one pass if requested. Tier 3: the cloud answers. What is private stays here, or
is masked before it leaves and restored in the answer. Any failure on the way to that decision keeps the
request here.

:meth:`Hybrid.ask` grades; :meth:`Request.runs <sllm.triage.request.Request.runs>` is the way through the
tiers.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sllm.engine.handle import Closing
from sllm.engine.sampling import SamplingParams
from sllm.generation.local import LocalTarget
from sllm.messages import checked_messages
from sllm.privacy import Detector, Vault, default_detectors
from sllm.targets.base import Target
from sllm.triage.answer import Answer, HybridStats, exclusive
from sllm.triage.check_answer import Acceptance
from sllm.triage.cloud import ChatCloud, CloudBudget
from sllm.triage.outgoing import Outgoing, find_private
from sllm.triage.profile import ProfileError
from sllm.triage.request import Pipeline, Request, count_grading, refusal
from sllm.triage.scorer import ContextScorer
from sllm.triage.time_limit import TimeLimit
from sllm.triage.triage import Tier, Triage, checked_verify

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sllm.engine.model import Model
    from sllm.triage.outgoing import PrivacyMode
    from sllm.triage.triage import Verify

__all__ = ["Answer", "ChatCloud", "Hybrid", "HybridStats"]

log = logging.getLogger("sllm.hybrid")


class Hybrid(Closing):
    """Answers requests with a small model, a local main model and a cloud, and keeps private matters on this
    machine.

    Used by one thread at a time, with one answer at a time: the next :meth:`ask` ends the previous answer.

    Args:
        small: the model that grades, and that answers tier 1.
        local: the model that answers tier 2; None: ``small`` does.
        cloud: for tier 3 and for verifying: a :class:`~sllm.Target` with ``chat()``
            (``connect(uri).target()``, a :class:`~sllm.SplitTarget`), or a :class:`ChatCloud`; None:
            everything stays here.
        triage: the grading; None: one with ``small`` and without a profile, so that every request is tier 2.
        privacy: what happens to a private request: ``"local"`` (nothing of it leaves), ``"deidentify"`` (what
            was found is masked and restored in the answer; if something private cannot be masked, or the
            model finds the masked request private, nothing leaves), or ``"refuse"`` (as local, but LeakError
            if only the cloud could answer).
        detectors: detectors of private matters; None: :func:`sllm.privacy.default_detectors`.
        verify: which tier-2 answers the cloud verifies: ``"always"``, ``"uncertain"`` (by the profile) or
            ``"never"``.
        accept: the condition under which the cloud accepts a token of a local answer.
        sampling: for every answer except a :class:`ChatCloud`'s; None: temperature 0, at which ``sllm
            calibrate`` labels answers; a profile guarantees nothing for other parameters. With a grammar,
            masked requests do not leave, since a grammar that accepts a placeholder need not accept its
            value; and an answer that is not accepted is written anew by the cloud, since a grammar applies
            from the beginning of a text.
        max_tokens: maximum number of tokens of an answer.
        max_cloud_tokens: maximum number of tokens sent to and written by the cloud in total, over the life of
            this object; for a :class:`ChatCloud` as its ``count`` estimates them; None: no limit.
        n_ctx, n_threads: for the contexts of ``small`` and ``local``.
        detect_seconds: time limit of the detectors; exceeding it counts as a failure.
        thinking: False: models answer without reasoning first, if their chat templates have a switch for that
            (:func:`sllm.engine.chat_template.thinking_off`); a :class:`ChatCloud` is not told.

    Raises:
        ValueError, TypeError: an argument out of range or of another type, or a grammar for a
            :class:`ChatCloud`, which could not enforce it.
        ProfileError: the profile belongs to another model than ``small``.

    Attributes:
        vault: the vault of the conversation; :meth:`new_conversation` starts a new one.

    Examples:
        >>> from sllm.triage import ContextScorer
        >>> with sllm.Model(sllm.embedded.TARGET) as model, ContextScorer(model) as scorer:
        ...     with sllm.Hybrid(model, model, None, triage=sllm.Triage(scorer)) as hybrid:
        ...         answer = hybrid.ask([{"role": "user", "content": "Tell me a story."}], max_tokens=8)
        ...         len(answer.text()) > 0
        True

    """

    def __init__(
        self,
        small: Model,
        local: Model | None = None,
        cloud: Target | ChatCloud | None = None,
        *,
        triage: Triage | None = None,
        privacy: PrivacyMode = "local",
        detectors: Sequence[Detector] | None = None,
        verify: Verify = "uncertain",
        accept: Acceptance | None = None,
        sampling: SamplingParams | None = None,
        max_tokens: int = 512,
        max_cloud_tokens: int | None = None,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        detect_seconds: float = 10.0,
        thinking: bool = True,
    ) -> None:
        if privacy not in ("local", "deidentify", "refuse"):
            raise ValueError(f"privacy is {privacy!r}, expected 'local', 'deidentify' or 'refuse'")
        verify = checked_verify(verify)
        _check_cloud(cloud, sampling)
        _check_count("max_tokens", max_tokens)
        if max_cloud_tokens is not None:
            _check_count("max_cloud_tokens", max_cloud_tokens)
        _check_seconds(detect_seconds)
        self._detectors = _checked_detectors(detectors)
        self._limit = TimeLimit(detect_seconds)
        self._max_tokens = max_tokens
        self._turn = threading.Lock()
        self._closed = False
        self._answer: Answer | None = None
        with ExitStack() as stack:
            if triage is None:
                triage = Triage(stack.enter_context(ContextScorer(small, n_threads=n_threads)))
            knows_local = _knows_local(triage, small, local or small)
            here = stack.enter_context(LocalTarget(small, n_ctx=n_ctx, n_threads=n_threads))
            main = here
            if local is not None and local is not small:
                main = stack.enter_context(LocalTarget(local, n_ctx=n_ctx, n_threads=n_threads))
            self._stack = stack.pop_all()
        self._pipeline = Pipeline(
            triage=triage,
            small=here,
            local=main,
            cloud=cloud,
            privacy=privacy,
            verify=verify,
            accept=accept or Acceptance(),
            sampling=sampling or SamplingParams(temperature=0.0),
            budget=CloudBudget(max_cloud_tokens),
            n_threads=n_threads,
            knows_local=knows_local,
            thinking=bool(thinking),
        )
        self.vault = Vault(self._detectors)
        super().__init__()

    @property
    def triage(self) -> Triage:
        """What grades the requests."""
        return self._pipeline.triage

    @property
    def privacy(self) -> PrivacyMode:
        """What happens to a private request, as given."""
        return self._pipeline.privacy

    @property
    def verify(self) -> Verify:
        """Which tier-2 answers the cloud verifies, as given."""
        return self._pipeline.verify

    @property
    def max_cloud_tokens(self) -> int | None:
        """How many tokens may be sent to and written by the cloud, as given."""
        return self._pipeline.budget.max_tokens

    @property
    def cloud_tokens(self) -> int:
        """How many have been sent and written so far."""
        return self._pipeline.budget.used

    def new_conversation(self) -> None:
        """Start a new conversation with an empty vault. An answer in progress keeps its own vault."""
        self.vault = Vault(self._detectors)

    def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
    ) -> Answer:
        """Answer a conversation.

        Args:
            messages: mappings with ``role`` and ``content``, the whole conversation.
            max_tokens: of this answer; None: as for all answers.
            sampling: of this answer; None: as for all answers.

        Returns:
            The answer. Text that is checked first (tier 1 and verified tier 2) comes after the check; other
            text is streamed as it is written. Errors of a model or the cloud are raised when the answer is
            read: UnsupportedModelError (no chat template), ContextFullError (the conversation does not fit),
            RemoteError (the cloud failed after part of its answer was shown).

        Raises:
            TypeError, ValueError: malformed messages, max_tokens below 1, or a grammar for a
                :class:`ChatCloud`.
            LeakError: with ``privacy="refuse"``, a private request that needs the cloud; also raised when the
                answer is read, if it is only noticed then.
            BusyError: another thread is using this object.
            ClosedError: after :meth:`close`, or in a forked process.

        """
        if max_tokens is not None:
            _check_count("max_tokens", max_tokens)
        _check_cloud(self._pipeline.cloud, sampling)
        with exclusive(self._turn):
            self._check_open()
            # 1. One answer at a time: this request ends the one before.
            if self._answer is not None:
                self._answer.close()
            began = time.perf_counter()
            pipeline, stats = self._pipeline, HybridStats()
            if sampling is not None:
                pipeline = replace(pipeline, sampling=sampling)
            with count_grading(stats, pipeline.triage):
                # 2. A copy: what was judged is what is sent, whatever becomes of the caller's lists.
                copied = [copy.deepcopy(dict(message)) for message in checked_messages(messages)]
                # 3. What the detectors find, and the grade of the small model.
                kinds, trouble = find_private(copied, self._detectors, self._limit)
                grade = pipeline.triage.assess(copied, findings=kinds)
            answer = Answer(grade, stats, resources := ExitStack(), self._turn, self, self.cancel)
            if trouble is not None:
                answer.reasons.append(trouble)
            log.info("tier %d, %s, found %s", int(grade.tier), grade.privacy, sorted(set(kinds)) or "nothing")
            # 4. What is private and needs the cloud is refused at once, where that is asked for.
            private = grade.private or trouble is not None
            if private and pipeline.privacy == "refuse" and grade.tier is Tier.HARD:
                raise refusal(answer)
            # 5. The way through the tiers, gone as the answer is read.
            grammar = pipeline.sampling.has_grammar
            request = Request(
                pipeline=pipeline,
                answer=answer,
                resources=resources,
                messages=copied,
                outgoing=Outgoing(
                    self.vault, self._detectors, self._limit, pipeline.privacy, grammar=grammar
                ),
                max_tokens=max_tokens or self._max_tokens,
                stays_here=self._stays_here(private, bool(kinds), trouble),
            )
            self._answer = answer
            answer.follow(request.runs(), began)
            return answer

    def _stays_here(self, private: bool, found: bool, trouble: str | None) -> str | None:
        """Why nothing of a request may be sent to the cloud; None: it may, masked or as it is."""
        if self._pipeline.cloud is None:
            return "there is no cloud"
        if trouble is not None or (private and not found):
            return "it is private, and nothing was found that could be masked"
        if private and self.privacy != "deidentify":
            return f"it is private, and privacy is {self.privacy}"
        return None

    def cancel(self) -> None:
        """End :meth:`ask` or its answer in another thread, which gets CancelledError; may be called from any
        thread.

        A scoring pass or an HTTP request of a :class:`ChatCloud` that is already running is completed first.
        """
        if self._closed:
            return
        for inside in (self.triage.scorer, self._pipeline.small, self._pipeline.local):
            if callable(cancel := getattr(inside, "cancel", None)):
                cancel()
        if (answer := self._answer) is not None:
            answer.end()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """End the answer and free the contexts; the caller closes models and cloud. Further calls do
        nothing.
        """
        self._closed = True
        if self._answer is not None:
            self._answer.close()
            self._answer = None
        self._stack.close()

    def __repr__(self) -> str:
        return f"<sllm.Hybrid, privacy {self.privacy}{', closed' if self._closed else ''}>"


def _knows_local(triage: Triage, small: Model, local: Model) -> bool:
    """Whether the profile speaks of the local model's answers, or there is none.

    Raises:
        ProfileError: it is of another small model.

    """
    profile = getattr(triage, "profile", None)
    if profile is None:
        return True
    if profile.model_id != small.id:
        raise ProfileError(
            f"the profile is for model {profile.model_id}, and the small model is {small.path.name}"
        )
    return profile.verify_model_id is not None and profile.verify_model_id == local.id


def _checked_detectors(detectors: Sequence[Detector] | None) -> tuple[Detector, ...]:
    checked = default_detectors() if detectors is None else tuple(detectors)
    for detector in checked:
        if not isinstance(detector, Detector):
            raise TypeError(f"a detector is {type(detector).__name__}, expected something with detect()")
    return checked


def _check_seconds(seconds: object) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"detect_seconds is {seconds!r}, expected a number")
    if not 0 < seconds < math.inf:
        raise ValueError(f"detect_seconds is {seconds}, expected a finite number above 0")


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
    elif sampling is not None and sampling.has_grammar:
        raise ValueError(
            f"sampling has a grammar, to which {type(cloud).__name__} would not keep;"
            " leave it out, or use a Target (a worker, a split) as the cloud"
        )


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected an integer >= 1")
