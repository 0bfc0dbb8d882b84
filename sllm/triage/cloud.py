"""The cloud of one request: it writes an answer, or reviews one that was written here.

There are two kinds: a :class:`~sllm.Target` takes tokens, and one pass tells how much of a local answer
stands; a :class:`ChatCloud` takes messages and gives text, and is asked in words. Both are sent only what
:class:`~sllm.triage.outgoing.Outgoing` has checked, and no more than a budget allows.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from sllm.draft.drafters import AnswerDrafter, ModelDrafter
from sllm.engine.params import context_length
from sllm.errors import LeakError, RemoteError
from sllm.generation.generate import generate
from sllm.generation.text_stream import Run
from sllm.messages import texts_of
from sllm.privacy import egress_check
from sllm.targets.base import Scorer, Target
from sllm.triage.check_answer import check_answer
from sllm.triage.outgoing import LocalOnly
from sllm.triage.prompt import prompt_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import ExitStack

    import numpy.typing as npt

    from sllm.draft.growth import Shape
    from sllm.draft.tree import DraftedTree
    from sllm.engine.model import Model
    from sllm.engine.sampling import SamplingParams
    from sllm.engine.vocab import Vocab
    from sllm.privacy import Vault
    from sllm.triage.answer import Answer
    from sllm.triage.check_answer import Acceptance
    from sllm.triage.outgoing import Outgoing

__all__ = ["ChatCloud", "CloudBudget", "CloudSide", "MessageCloud", "TokenCloud"]

_TAIL = 64
"""Tokens of the text before a hint that are checked with it: a private value may begin there."""

_RUNAWAY = 4
"""A cloud that takes messages is cut off at so many times the tokens, by estimate, that it was asked for."""

_BLOCK = 512
"""Characters of its answer that are counted together."""

_ACCEPTED = "ACCEPT"
_REVIEW = (
    "Check your answer above. If it is right and complete, reply with the single word ACCEPT. Otherwise reply"
    " with the corrected answer alone, in the language of the question, and keep placeholders in square"
    " brackets as they are."
)


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


class CloudBudget:
    """The tokens that may be sent to and written by the cloud, over the life of a :class:`~sllm.Hybrid`.

    Args:
        max_tokens: in all; None: any number.

    Attributes:
        used: tokens sent and written so far.

    """

    def __init__(self, max_tokens: int | None) -> None:
        self.max_tokens = max_tokens
        self.used = 0

    def spend(self, n: int) -> int:
        """Note ``n`` tokens that are to be sent; returns how many the answer may have.

        Raises:
            LocalOnly: there would be none left for the answer.

        """
        left = None if self.max_tokens is None else self.max_tokens - self.used - n
        if left is not None and left < 1:
            raise LocalOnly(self.budget_spent)
        self.used += n
        return left if left is not None else 1 << 30

    @property
    def budget_spent(self) -> str:
        """The reason to give where nothing is left."""
        return f"the cloud's {self.max_tokens} tokens are spent"


class CloudSide(Protocol):
    """What a request asks of either kind of cloud."""

    def write(self, messages: list[dict[str, Any]]) -> Iterator[Run]:
        """The cloud's own answer to a masked conversation.

        Raises:
            LocalOnly: nothing was sent.
            Exception: anything that goes wrong in the cloud.

        """

    def review(self, messages: list[dict[str, Any]], text: str, *, ended: bool) -> Iterator[Run]:
        """A local answer as far as the cloud lets it stand, and what it goes on with; the first run is there
        with the verdict.

        Args:
            messages: the masked conversation.
            text: the masked answer.
            ended: whether the answer ended by itself.

        Raises:
            LocalOnly: nothing was sent.
            Exception: anything that goes wrong in the cloud.

        """


@dataclass
class _Side:
    """What both kinds of cloud work with."""

    answer: Answer
    outgoing: Outgoing
    budget: CloudBudget
    sampling: SamplingParams
    max_tokens: int

    def _sent(self, n: int) -> int:
        left = self.budget.spend(n)
        self.answer.stats.cloud_in += n
        return left

    def _received(self, n: int) -> None:
        self.budget.used += n
        self.answer.stats.cloud_out += n


@dataclass
class TokenCloud(_Side):
    """A target as the cloud: it gets tokens, and scores a local answer in one pass.

    Attributes:
        target: with ``chat()``.
        accept: when the target lets a token of a local answer stand.
        small: drafts for the target where the two share a vocabulary.
        n_threads: of the small model.
        resources: closed with the answer.
        thinking: whether the target may reason first.

    """

    target: Target
    accept: Acceptance
    small: Model
    n_threads: int | None
    resources: ExitStack
    thinking: bool

    def write(self, messages: list[dict[str, Any]]) -> Iterator[Run]:
        """See :meth:`CloudSide.write`."""
        prompt = self._prepare_outgoing(messages)
        left = self._sent(len(prompt))
        yield from self._continue(prompt, self._guarded_drafter(), self.max_tokens, left)

    def review(self, messages: list[dict[str, Any]], text: str, *, ended: bool) -> Iterator[Run]:
        """See :meth:`CloudSide.review`: one pass over the whole answer."""
        target, stats = self.target, self.answer.stats
        if not isinstance(target, Scorer):
            raise LocalOnly("the cloud cannot score an answer")
        # 1. The conversation and the answer as tokens, checked as what they say.
        n_prompt = len(self._prepare_outgoing(messages))
        tokens = self._prepare_outgoing(messages, text)
        end = target.vocab.eot if target.vocab.eot is not None else target.vocab.eos
        if ended and end is not None:
            tokens = np.append(tokens, np.int32(end)).astype(np.int32)
        prompt, checked = tokens[:n_prompt], tokens[n_prompt:]
        if len(checked) == 0:
            raise LocalOnly("there is nothing to verify")
        # 2. One pass of the target over all of it: how many tokens stand.
        left = self._sent(len(tokens))
        verdict = check_answer(target, prompt, checked, accept=self.accept)
        n_kept = whole_characters(target.vocab, checked, verdict.n_kept)
        if n_kept < len(checked) and self.sampling.has_grammar:
            n_kept = 0  # a grammar begins where a text does
        stats.n_checked, stats.n_kept = len(checked), n_kept
        self.answer.route.append("verified" if n_kept == len(checked) else "corrected")
        # 3. What stands, and from there on the target's own text, with the rest as its draft.
        if n_kept:
            kept = checked[:n_kept]
            yield Run(n_prompt, tuple(kept.tolist()), target.vocab.decode(kept), n_kept, "draft")
        if n_kept < len(checked):
            drafter = AnswerDrafter(checked.tolist(), n_prompt)
            room = max(self.max_tokens - n_kept, 1)
            yield from self._continue(tokens[: n_prompt + n_kept], drafter, room, left)

    def _prepare_outgoing(self, messages: list[dict[str, Any]], answer: str = "") -> npt.NDArray[np.int32]:
        """The tokens that are to be sent, after the last check of what they say, int32 (n,); the
        sampling parameters, which go with them, are checked too.
        """
        prompt = prompt_of(self.target, messages, thinking=self.thinking)
        if answer:
            prompt = np.concatenate([prompt, self.target.vocab.encode(answer, add_special=False)])
        self.outgoing.egress_check(self.target.vocab.decode(prompt, special=True))
        self.outgoing.check_sampling(self.sampling, self.target.vocab)
        return prompt

    def _continue(
        self,
        prompt: npt.NDArray[np.int32],
        drafter: ModelDrafter | AnswerDrafter | None,
        max_tokens: int,
        left: int,
    ) -> Iterator[Run]:
        """What the target writes after a prompt, counted; at most ``left`` tokens may be spent."""
        text = generate(
            self.target, prompt, draft=drafter, sampling=self.sampling, max_tokens=min(max_tokens, left)
        )
        with self.answer.written_by(text) as stream:
            n = 0
            for run in stream:
                self._received(stream.stats.n_tokens - n)
                n = stream.stats.n_tokens
                yield run
            if stream.stats.finish_reason == "length" and left < max_tokens:
                self.answer.reasons.append(f"cut off: {self.budget.budget_spent}")

    def _guarded_drafter(self) -> ModelDrafter | None:
        small, vocab = self.small, self.target.vocab
        if small.vocab.fingerprint != vocab.fingerprint:
            return None
        n_ctx = context_length(small.n_ctx_train)
        drafter = _GuardedDrafter(small, self.outgoing.vault, vocab, n_ctx=n_ctx, n_threads=self.n_threads)
        self.resources.callback(drafter.close)
        return drafter


class _GuardedDrafter(ModelDrafter):
    """A draft whose hints leave the machine: they must not contain what the vault does."""

    def __init__(
        self, model: Model, vault: Vault, vocab: Vocab, *, n_ctx: int, n_threads: int | None
    ) -> None:
        super().__init__(model, n_ctx=n_ctx, n_threads=n_threads)
        self._vault = vault
        self._vocab = vocab

    def draft(self, text: Sequence[int], chain: Sequence[int], n_max: int, p_min: float) -> list[int]:
        """See :meth:`ModelDrafter.draft`; nothing where a hint would give something away."""
        found = super().draft(text, chain, n_max, p_min)
        if self._tells([*text[-_TAIL:], *chain, *found]):
            self.probs = []
            return []
        return found

    def draft_tree(self, text: Sequence[int], shape: Shape, known: DraftedTree | None = None) -> DraftedTree:
        """See :meth:`ModelDrafter.draft_tree`; without the branches that would give something away."""
        tree = super().draft_tree(text, shape, known)
        tail = list(text[-_TAIL:])
        kept: set[int] = set()
        for place in range(len(tree)):
            if place in tree.parents:
                continue
            branch = tree.way_to(place)
            if not self._tells([*tail, *(tree.tokens[i] for i in branch)]):
                kept.update(branch)
        return tree.take(sorted(kept))

    def _tells(self, tokens: Sequence[int]) -> bool:
        """Whether these tokens contain what the vault does."""
        known = [token for token in tokens if 0 <= token < self._vocab.n_tokens]
        try:
            egress_check(self._vocab.decode(known), self._vault, detectors=())
        except LeakError:
            return True
        return False


def whole_characters(vocab: Vocab, tokens: npt.NDArray[np.int32], n: int) -> int:
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


@dataclass
class MessageCloud(_Side):
    """A cloud that takes messages: it is shown a local answer, and says a word that stands for it or a better
    one.

    Attributes:
        cloud: it.

    """

    cloud: ChatCloud

    def write(self, messages: list[dict[str, Any]]) -> Iterator[Run]:
        """See :meth:`CloudSide.write`."""
        said = "\n".join(texts_of(messages, numbers=True))
        # The name of the model, which an OpenAI-compatible endpoint is sent too, may be that of a person.
        self.outgoing.egress_check(f"{getattr(self.cloud, 'model', '')}\n{said}")
        pieces: Iterator[str] | None = None
        try:
            left = self._sent(self.cloud.count(said))
            decoder = codecs.getincrementaldecoder("utf-16-le")("replace")
            pieces = iter(self.cloud.stream(messages, min(self.max_tokens, left)))
            for piece in self._counted(pieces, left):
                # Two halves of a character may come apart; half of one alone cannot be written anywhere.
                text = decoder.decode(piece.encode("utf-16-le", "surrogatepass"))
                yield Run(0, (), text, 0, "target")
            text = decoder.decode(b"", final=True)
            if text:
                yield Run(0, (), text, 0, "target")
        except (RemoteError, LocalOnly):
            raise
        except Exception as error:  # noqa: BLE001 - anybody's errors, which may quote what was sent
            raise RemoteError(f"the cloud has broken off ({type(error).__name__})") from None
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                close()

    def review(self, messages: list[dict[str, Any]], text: str, *, ended: bool) -> Iterator[Run]:  # noqa: ARG002
        """See :meth:`CloudSide.review`: what the cloud writes is held as long as it may be the word."""
        question = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": _REVIEW}]
        runs = self.write(question)
        held = ""
        for run in runs:
            held += run.text
            if not _ACCEPTED.startswith(held.strip().strip(".。!\"'`*").upper()[: len(_ACCEPTED)]):
                break
        if held.strip().strip(".。!\"'`* ").upper() == _ACCEPTED:
            self.answer.route.append("verified")
            yield Run(0, (), text, 0, "draft")
            return
        self.answer.route.append("corrected")
        yield Run(0, (), held, 0, "target")
        yield from runs

    def _counted(self, pieces: Iterator[str], left: int) -> Iterator[str]:
        """The pieces of an answer until they are too many: how much it writes is not left to the cloud."""
        # The count is an estimate; it must not cut off a cloud that keeps to what was asked for.
        limit = min(left, _RUNAWAY * self.max_tokens)
        settled = counted = 0
        block = ""
        for piece in pieces:
            if not isinstance(piece, str):
                raise RemoteError(f"the cloud gave {type(piece).__name__}, expected text")
            block += piece
            n = settled + self.cloud.count(block)
            self._received(n - counted)
            counted = n
            if n > limit:
                why = self.budget.budget_spent if left <= limit else "the cloud does not end its answer"
                self.answer.reasons.append(f"cut off: {why}")
                return
            if len(block) > _BLOCK:  # in blocks, or the rounding of each piece would count
                settled, block = n, ""
            yield piece
