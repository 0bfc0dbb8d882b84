"""One request on its way through the tiers: who answers it, what of it is sent, and what is put back."""

from __future__ import annotations

import itertools
import logging
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sllm.errors import CancelledError, LeakError
from sllm.generation.generate import generate
from sllm.generation.text_stream import Run
from sllm.targets.base import Target
from sllm.triage.check_answer import answer_logprobs
from sllm.triage.cloud import MessageCloud, TokenCloud
from sllm.triage.outgoing import ContainsPrivate, LocalOnly
from sllm.triage.prompt import prompt_of
from sllm.triage.triage import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import ExitStack

    import numpy as np
    import numpy.typing as npt

    from sllm.engine.model import Model
    from sllm.engine.sampling import SamplingParams
    from sllm.generation.local import LocalTarget
    from sllm.privacy import Restorer
    from sllm.triage.answer import Answer, HybridStats
    from sllm.triage.check_answer import Acceptance
    from sllm.triage.cloud import ChatCloud, CloudBudget, CloudSide
    from sllm.triage.outgoing import Outgoing, PrivacyMode
    from sllm.triage.triage import Triage, Verify

__all__ = ["Pipeline", "Request", "count_grading", "refusal"]

log = logging.getLogger("sllm.hybrid")


@dataclass(frozen=True)
class Pipeline:
    """What a :class:`~sllm.Hybrid` answers its requests with; its arguments say what is what.

    Attributes:
        small, local: contexts of the two models; one and the same without a local main model.
        knows_local: whether the profile speaks of the local model's answers; a threshold for the confidence
            of another model's says nothing of these.

    """

    triage: Triage
    small: LocalTarget
    local: LocalTarget
    cloud: Target | ChatCloud | None
    privacy: PrivacyMode
    verify: Verify
    accept: Acceptance
    sampling: SamplingParams
    budget: CloudBudget
    n_threads: int | None
    knows_local: bool
    thinking: bool


@dataclass
class Request:
    """One request on its way.

    Attributes:
        pipeline: what answers.
        answer: what it becomes.
        resources: closed with the answer.
        messages: the conversation, as it came.
        outgoing: what of it may be sent.
        max_tokens: of the answer.
        stays_here: why nothing of it may be sent; None: something may.

    """

    pipeline: Pipeline
    answer: Answer
    resources: ExitStack
    messages: list[dict[str, Any]]
    outgoing: Outgoing
    max_tokens: int
    stays_here: str | None
    _masked: list[dict[str, Any]] | None = field(default=None, init=False)
    _ended: bool = field(default=False, init=False)  # whether the local answer ended by itself

    def runs(self) -> Iterator[Run]:
        """The answer, by the tiers from the top: what a tier does not answer goes on to the next."""
        answer, pipeline = self.answer, self.pipeline
        # 1. Hard: the cloud answers, unless the request has to stay here.
        if answer.grade.tier is Tier.HARD and self.stays_here is None:
            try:
                yield from self._written_by_cloud()
                return
            except LocalOnly as reason:
                self.stays_here = str(reason)
                if isinstance(reason, ContainsPrivate) and pipeline.privacy == "refuse":
                    raise refusal(answer) from None
        if self.stays_here is not None and answer.grade.tier is not Tier.SIMPLE:
            answer.reasons.append(f"stays here: {self.stays_here}")
        # 2. Simple: the small model answers, and an answer that it is sure of stands.
        if answer.grade.tier is Tier.SIMPLE:
            answer.route.append("small")
            runs, logprobs = self._written(pipeline.small)
            if not pipeline.triage.escalates(logprobs):
                yield from runs
                return
            answer.reasons.append("the small model is not sure of its answer")
            answer.grade = replace(answer.grade, tier=Tier.ROUTINE)
        # 3. Routine, and what is hard but stays here: the local main model answers, and that is it where
        #    nothing will verify it.
        answer.route.append("local")
        routine = answer.grade.tier is Tier.ROUTINE
        if not routine or pipeline.verify == "never" or self.stays_here is not None:
            yield from self._streamed(pipeline.local)
            return
        # 4. An answer that is sure enough needs no verification.
        runs, logprobs = self._written(pipeline.local)
        known = logprobs if pipeline.knows_local else None
        if not pipeline.triage.verifies(answer.grade, pipeline.verify, known):
            yield from runs
            return
        # 5. The cloud verifies the rest. Where that fails before a verdict, the local answer stands.
        try:
            yield from self._verified_by_cloud("".join(run.text for run in runs))
        except LocalOnly as reason:
            answer.reasons.append(f"not verified: {reason}")
            yield from runs

    # ---- answers that are written here

    def _streamed(self, target: LocalTarget) -> Iterator[Run]:
        """The answer of a model here, as it is written."""
        pipeline, stats = self.pipeline, self.answer.stats
        self._ended = False
        text = generate(
            target,
            prompt_of(target, self.messages, thinking=pipeline.thinking),
            draft=self._draft_of(target),
            sampling=pipeline.sampling,
            max_tokens=self.max_tokens,
        )
        with self.answer.written_by(text) as stream:
            for run in stream:
                if target is pipeline.small:
                    stats.n_small = stream.stats.n_tokens
                else:
                    stats.n_local = stream.stats.n_tokens
                self._ended = stream.stats.finish_reason == "eog"
                yield run

    def _written(self, target: LocalTarget) -> tuple[list[Run], npt.NDArray[np.float64]]:
        """The whole answer of a model here, and the log-probabilities of its tokens, float64 (n,)."""
        runs = list(self._streamed(target))
        tokens = [token for run in runs for token in run.tokens]
        prompt = prompt_of(target, self.messages, thinking=self.pipeline.thinking)
        return runs, answer_logprobs(target, prompt, tokens)

    def _draft_of(self, target: LocalTarget) -> Model | None:
        """The small model drafts for the local one where the two share a vocabulary."""
        small = self.pipeline.small
        if target is small or small.vocab.fingerprint != target.vocab.fingerprint:
            return None
        return small.model

    # ---- answers of the cloud

    def _written_by_cloud(self) -> Iterator[Run]:
        """The cloud's own answer, with its placeholders restored.

        Raises:
            LocalOnly: nothing was sent, or the cloud did not answer.

        """
        answer = self.answer
        shown = False
        try:
            runs = self._cloud_side().write(self._masked_messages())
            for run in restored(runs, self.outgoing.restorer(), answer.stats):
                if not shown:
                    answer.route.append("cloud")
                    shown = True
                yield run
            if not shown:
                answer.route.append("cloud")  # it has answered nothing
        except LocalOnly:
            answer.masked = {}  # nothing has left
            raise
        except CancelledError:
            raise  # nobody waits for an answer, nor for one that is written here
        except Exception as error:
            if shown:
                raise
            raise _no_answer(error) from None

    def _verified_by_cloud(self, text: str) -> Iterator[Run]:
        """A local answer as far as the cloud lets it stand, and what the cloud goes on with.

        Raises:
            LocalOnly: nothing was sent, or there was no verdict.

        """
        answer = self.answer
        route = list(answer.route)
        try:
            messages = self._masked_messages()
            masked = self.outgoing.mask_answer(text)
            for kind, n in masked.counts.items():
                answer.masked[kind] = answer.masked.get(kind, 0) + n
            runs = self._cloud_side().review(messages, masked.text, ended=self._ended)
            verdict = list(itertools.islice(runs, 1))  # until then the local answer can stand in
        except LocalOnly:
            answer.masked = {}  # nothing has left
            raise
        except CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the local answer stands
            answer.route = route
            raise _no_answer(error) from None
        # An answer that stands as a whole was written here, and nobody has put a link into it.
        restorer = self.outgoing.restorer(in_links=answer.route[-1] == "verified")
        yield from restored(itertools.chain(verdict, runs), restorer, answer.stats)

    def _masked_messages(self) -> list[dict[str, Any]]:
        """The conversation with placeholders for what is private; masked once."""
        if self._masked is None:
            masked = self.outgoing.mask_messages(self.messages)
            if masked.counts:
                with count_grading(self.answer.stats, self.pipeline.triage):
                    private = self.pipeline.triage.finds_private(masked.messages)
                if private:
                    raise ContainsPrivate("the model finds private what masking has left")
            self.answer.masked = dict(masked.counts)
            self._masked = masked.messages
        return self._masked

    def _cloud_side(self) -> CloudSide:
        pipeline, cloud = self.pipeline, self.pipeline.cloud
        common = (self.answer, self.outgoing, pipeline.budget, pipeline.sampling, self.max_tokens)
        if isinstance(cloud, Target):
            small = pipeline.small.model
            return TokenCloud(
                *common, cloud, pipeline.accept, small, pipeline.n_threads, self.resources, pipeline.thinking
            )
        assert cloud is not None
        return MessageCloud(*common, cloud)


def refusal(answer: Answer) -> LeakError:
    """The error of ``privacy="refuse"`` for a private request that only the cloud could answer."""
    return LeakError(
        "the request is private and needs the cloud, and privacy='refuse' sends nothing private"
        f" ({'; '.join(answer.reasons)}); 'local' answers it here, 'deidentify' masks what was found"
    )


@contextmanager
def count_grading(stats: HybridStats, triage: Triage) -> Iterator[None]:
    """Counts what is done within as cost of the grade."""
    began, before = time.perf_counter(), getattr(triage.scorer, "n_computed", 0)
    try:
        yield
    finally:
        stats.grade_seconds += time.perf_counter() - began
        stats.grade_tokens += getattr(triage.scorer, "n_computed", 0) - before


def restored(runs: Iterator[Run], restorer: Restorer, stats: HybridStats) -> Iterator[Run]:
    """Runs whose texts have their placeholders replaced by what these stand for."""
    last: Run | None = None
    for run in runs:
        if run.source == "local":
            continue  # a draft of the cloud's answer that may be withdrawn: restoring goes forward alone
        last = replace(run, text=restorer.feed(run.text), withdrawn=())
        _count_restored(restorer, stats)
        yield last
    rest = restorer.finish()
    _count_restored(restorer, stats)
    if last is not None and rest:
        yield Run(last.pos + len(last.tokens), (), rest, 0, last.source, kind=last.kind)


def _count_restored(restorer: Restorer, stats: HybridStats) -> None:
    stats.n_restored, stats.n_unknown = restorer.n_restored, restorer.n_unknown
    stats.n_in_links = restorer.n_in_links


def _no_answer(error: Exception) -> LocalOnly:
    """For the answer's reasons: the kind of the error alone, for its text may be anybody's."""
    log.info("the cloud does not answer (%s)", type(error).__name__)
    return LocalOnly(f"the cloud does not answer ({type(error).__name__})")
