"""What answers: a target with a draft, or a hybrid. Everything here blocks, and is called on threads."""

from __future__ import annotations

import secrets
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from sllm.draft.drafters import Drafter, ModelDrafter
from sllm.engine.arrays import int32_array
from sllm.engine.chat_template import thinking_off
from sllm.engine.model import Model
from sllm.engine.params import context_length
from sllm.engine.sampling import SamplingParams
from sllm.errors import UnsupportedModelError
from sllm.generation.generate import generate
from sllm.generation.local import LocalTarget
from sllm.generation.text_stream import RunStream, TextStream
from sllm.openai_server.asked import Asked, ChatAsked, CompletionAsked
from sllm.openai_server.logprobs import TokenLogprob, token_logprobs
from sllm.openai_server.problems import RequestError
from sllm.openai_server.tool_calls import writes_tool_calls
from sllm.triage.answer import Answer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from sllm.targets.base import Target
    from sllm.triage.hybrid import Hybrid

__all__ = ["HybridSource", "Place", "Prompt", "Source", "TargetSource"]


@dataclass(frozen=True)
class Place:
    """What one text at a time is written with.

    Attributes:
        draft: as :func:`~sllm.generate` takes it; a drafter keeps what it has in memory for the next text.

    """

    draft: Drafter | Callable[..., Any] | str | None = None

    def cancel(self) -> None:
        """End what the draft computes."""
        if isinstance(self.draft, Drafter):
            self.draft.cancel()


@dataclass(frozen=True)
class Prompt:
    """What a text goes on from.

    Attributes:
        tokens: int32 (n,); None: of a hybrid, whose models make prompts of their own.
        text: of a completion.

    """

    tokens: npt.NDArray[np.int32] | None
    text: str = ""


class Source(Protocol):
    """What answers requests.

    Attributes:
        places: each serves one text at a time.

    """

    places: Sequence[Place]

    def check(self, asked: Asked) -> None:
        """Refuse, at once, what can never be answered here.

        Raises:
            RequestError: says what.

        """

    def reads_calls(self, asked: Asked) -> bool:
        """Whether calls of tools are read out of the answer."""

    def prompts(self, asked: Asked) -> list[Prompt]:
        """The prompts of a request.

        Raises:
            SllmError, ValueError, TypeError: as :meth:`sllm.Model.chat`.

        """

    def prompt_logprobs(self, prompt: Prompt, n_top: int) -> list[TokenLogprob]:
        """How likely the tokens of a prompt are."""

    def open(self, asked: Asked, prompt: Prompt, number: int, place: Place) -> RunStream:
        """Begin with a text: the one of this ``number`` for its prompt.

        Raises:
            SllmError, ValueError, TypeError: as :func:`sllm.generate` and :meth:`sllm.Hybrid.ask`.

        """

    def logprobs(self, prompt: Prompt, written: Sequence[int], new: int, n_top: int) -> list[TokenLogprob]:
        """How likely the last ``new`` tokens of what was ``written`` are."""

    def cancel(self, place: Place) -> None:
        """End what this place computes: a prompt, say; from any thread."""

    def account(self, stream: RunStream) -> Mapping[str, Any] | None:
        """What there is to say about who has answered; None: nothing."""

    def close(self) -> None:
        """Free what was made here."""


class TargetSource:
    """A target, with or without a draft; see :class:`Source`.

    Args:
        target: a :class:`~sllm.Model` gets a :class:`~sllm.LocalTarget` that stays for all texts.
        draft: as :func:`~sllm.generate` takes it. A model gets a context for each place.
        sampling: what requests leave open.
        seed: of requests that name none; None: another one for each.
        texts: how many are written at once.
        n_ctx, n_threads: of contexts that are made here; None: the models' own.

    """

    def __init__(
        self,
        target: Target | Model,
        draft: Model | Drafter | Callable[..., Any] | str | None,
        sampling: SamplingParams,
        seed: int | None,
        texts: int,
        n_ctx: int | None,
        n_threads: int | None,
    ) -> None:
        if isinstance(draft, Drafter) and texts > 1:
            raise ValueError(f"texts is {texts}, and a drafter serves one text at a time; pass its model")
        if getattr(target, "on_loss", None) == "local":
            raise ValueError('on_loss is "local", which may take text back, and what was sent cannot be')
        with ExitStack() as stack:
            if isinstance(target, Model):
                # Snapshots, by which recurrent models take a draft back, cost a plain token some percent.
                n_rollback = 0 if draft is None else None
                target = stack.enter_context(
                    LocalTarget(target, n_ctx=n_ctx, n_threads=n_threads, n_rollback=n_rollback)
                )
            if isinstance(target, LocalTarget) and texts > 1:
                raise ValueError(
                    f"texts is {texts}, and a model here writes one text at a time; a worker writes several"
                )
            self.places: Sequence[Place] = [
                Place(_drafter(draft, n_ctx, n_threads, stack)) for _ in range(texts)
            ]
            self._resources = stack.pop_all()
        self._target = target
        self._sampling, self._seed = sampling, seed
        self._rows = target if isinstance(target, LocalTarget) and not target.isolated else None
        if draft == "mtp":
            self._rows = None  # the heads read what the target has computed last
        self._template: str | None = getattr(target, "chat_template", None)
        self._reads_calls: bool | None = None

    def check(self, asked: Asked) -> None:
        """See :meth:`Source.check`."""
        if asked.logprobs is not None and self._rows is None:
            raise RequestError(
                400,
                "logprobs are there for a model in the server's own process alone, and without its own heads"
                " as the draft: others give out no logits",
                param="logprobs",
                code="unsupported_by_model",
            )
        if isinstance(asked, ChatAsked) and asked.reasoning_effort is not None:
            self._effort(asked.reasoning_effort)

    def _effort(self, effort: str) -> Mapping[str, Any]:
        """The variables that this effort means to the chat template."""
        if effort == "none" and (off := thinking_off(self._template)):
            return off
        if self._template is not None and "reasoning_effort" in self._template:
            return {"reasoning_effort": effort}
        raise RequestError(
            400,
            "the model's chat template knows no reasoning_effort; what it knows goes into"
            " chat_template_kwargs",
            param="reasoning_effort",
            code="unsupported_by_model",
        )

    def reads_calls(self, asked: Asked) -> bool:
        """See :meth:`Source.reads_calls`."""
        if not (isinstance(asked, ChatAsked) and asked.tools):
            return False
        if self._reads_calls is None:
            self._reads_calls = writes_tool_calls(self._template, self._target.vocab)
        return self._reads_calls

    def prompts(self, asked: Asked) -> list[Prompt]:
        """See :meth:`Source.prompts`."""
        if isinstance(asked, CompletionAsked):
            return [self._completion_prompt(given) for given in asked.prompts]
        assert isinstance(asked, ChatAsked)
        chat = getattr(self._target, "chat", None)
        if chat is None:
            raise UnsupportedModelError(
                f"a {type(self._target).__name__} makes no prompts of messages; use /v1/completions"
            )
        variables = dict(asked.variables)
        if asked.reasoning_effort is not None:
            variables |= self._effort(asked.reasoning_effort)
        return [Prompt(chat(asked.messages, tools=asked.tools or None, variables=variables))]

    def _completion_prompt(self, given: str | tuple[int, ...]) -> Prompt:
        vocab = self._target.vocab
        if isinstance(given, str):
            return Prompt(vocab.encode(given), given)
        wrong = next((token for token in given if token >= vocab.n_tokens), None)
        if wrong is not None:
            raise ValueError(f"token {wrong} is not in the vocabulary of {vocab.n_tokens} tokens")
        return Prompt(int32_array(given, "prompt"), vocab.decode(given, special=True))

    def prompt_logprobs(self, prompt: Prompt, n_top: int) -> list[TokenLogprob]:
        """See :meth:`Source.prompt_logprobs`."""
        assert self._rows is not None
        assert prompt.tokens is not None
        return token_logprobs(self._rows.context, prompt.tokens.tolist(), 0, n_top)

    def open(self, asked: Asked, prompt: Prompt, number: int, place: Place) -> TextStream:
        """See :meth:`Source.open`."""
        assert prompt.tokens is not None
        return generate(
            self._target,
            prompt.tokens,
            draft=place.draft,
            sampling=_sampling(self._sampling, self._seed, asked, number),
            max_tokens=asked.max_tokens,
            stop=asked.stop,
        )

    def logprobs(self, prompt: Prompt, written: Sequence[int], new: int, n_top: int) -> list[TokenLogprob]:
        """See :meth:`Source.logprobs`."""
        assert self._rows is not None
        assert prompt.tokens is not None
        text = [*prompt.tokens.tolist(), *written]
        return token_logprobs(self._rows.context, text, len(text) - new, n_top)

    def cancel(self, place: Place) -> None:
        """See :meth:`Source.cancel`. Where several texts are written at once, a target's prompt is computed
        to its end.
        """
        place.cancel()
        cancel = getattr(self._target, "cancel", None)
        if len(self.places) == 1 and cancel is not None:
            cancel()

    def account(self, stream: RunStream) -> None:  # noqa: ARG002 - the target has answered
        """See :meth:`Source.account`."""
        return

    def close(self) -> None:
        """See :meth:`Source.close`."""
        self._resources.close()


def _drafter(
    draft: Model | Drafter | Callable[..., Any] | str | None,
    n_ctx: int | None,
    n_threads: int | None,
    stack: ExitStack,
) -> Drafter | Callable[..., Any] | str | None:
    if not isinstance(draft, Model):
        return draft
    n_ctx = context_length(draft.n_ctx_train) if n_ctx is None else min(n_ctx, draft.n_ctx_train or n_ctx)
    return stack.enter_context(closing(ModelDrafter(draft, n_ctx=n_ctx, n_threads=n_threads)))


def _sampling(defaults: SamplingParams, seed: int | None, asked: Asked, number: int) -> SamplingParams:
    """The parameters of the text of this number: without a seed every text is another one."""
    given = dict(asked.sampling)
    seed = given.pop("seed", seed)
    if seed is None:
        seed = secrets.randbits(62)  # noise of other engines takes 63 bits
    return replace(defaults, **given, seed=(seed + number) % 2**64)


class HybridSource:
    """A :class:`~sllm.Hybrid`, which serves one text at a time; see :class:`Source`.

    Every request is a conversation of its own: what was masked in one is not known in the next, which may be
    somebody else's.
    """

    def __init__(self, hybrid: Hybrid, sampling: SamplingParams, seed: int | None) -> None:
        self.places: Sequence[Place] = [Place()]
        self._hybrid = hybrid
        self._sampling, self._seed = sampling, seed

    def check(self, asked: Asked) -> None:
        """See :meth:`Source.check`."""
        if isinstance(asked, CompletionAsked):
            raise RequestError(
                404, "this server triages conversations: use /v1/chat/completions", code="not_found"
            )
        assert isinstance(asked, ChatAsked)
        missing = {
            "tools": bool(asked.tools),
            "logprobs": asked.logprobs is not None,
            "stop": bool(asked.stop),
            "chat_template_kwargs": bool(asked.variables),
            "reasoning_effort": asked.reasoning_effort is not None,
        }
        for name, is_asked in missing.items():
            if is_asked:
                raise RequestError(
                    400,
                    f"{name} is not supported where requests are triaged; leave it out",
                    param=name,
                    code="unsupported_parameter",
                )

    def reads_calls(self, asked: Asked) -> bool:  # noqa: ARG002 - there are no tools
        """See :meth:`Source.reads_calls`."""
        return False

    def prompts(self, asked: Asked) -> list[Prompt]:  # noqa: ARG002
        """See :meth:`Source.prompts`."""
        return [Prompt(None)]

    def prompt_logprobs(self, prompt: Prompt, n_top: int) -> list[TokenLogprob]:  # noqa: ARG002
        """See :meth:`Source.prompt_logprobs`."""
        return []

    def open(self, asked: Asked, prompt: Prompt, number: int, place: Place) -> Answer:  # noqa: ARG002
        """See :meth:`Source.open`."""
        assert isinstance(asked, ChatAsked)
        self._hybrid.new_conversation()
        return self._hybrid.ask(
            asked.messages,
            max_tokens=asked.max_tokens,
            sampling=_sampling(self._sampling, self._seed, asked, number),
        )

    def logprobs(
        self,
        prompt: Prompt,  # noqa: ARG002 - without logprobs, it is not called
        written: Sequence[int],  # noqa: ARG002
        new: int,  # noqa: ARG002
        n_top: int,  # noqa: ARG002
    ) -> list[TokenLogprob]:
        """See :meth:`Source.logprobs`."""
        return []

    def cancel(self, place: Place) -> None:  # noqa: ARG002
        """See :meth:`Source.cancel`."""
        self._hybrid.cancel()

    def account(self, stream: RunStream) -> Mapping[str, Any]:
        """See :meth:`Source.account`: who has answered, why, and what was masked, without a word of it."""
        assert isinstance(stream, Answer)
        return {
            "tier": int(stream.grade.tier),
            "privacy": stream.grade.privacy,
            "route": list(stream.route),
            "reasons": list(stream.reasons),
            "masked": dict(stream.masked),
            "stats": asdict(stream.stats),
        }

    def close(self) -> None:
        """See :meth:`Source.close`: the hybrid is the caller's."""
