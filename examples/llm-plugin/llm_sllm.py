"""sllm's models for the ``llm`` command and library (https://llm.datasette.io/)."""

from __future__ import annotations

import atexit
import json
import os
import secrets
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import llm
from llm.parts import StreamEvent, TextPart
from pydantic import Field

import sllm

if TYPE_CHECKING:
    from collections.abc import Iterator

REMOTE_VARIABLE = "SLLM_REMOTE"


@dataclass(frozen=True)
class Place:
    """Where a text comes from.

    Attributes:
        model: a GGUF file or a name of the hub; None: the package's own pair.
        draft: likewise, or "ngram"; None: nothing.
        remote: what :data:`REMOTE_VARIABLE` holds; then there is no model here.
    """

    model: str | None = None
    draft: str | None = None
    remote: str | None = None

    def open(self, stack: ExitStack) -> tuple[Any, Any]:
        """The target and what drafts for it, closed with ``stack``."""
        if self.remote is not None:
            lines = Path(self.remote[1:]).read_text() if self.remote.startswith("@") else self.remote
            uris = [word for word in lines.split() if word.startswith("sllm://")]
            if not uris:
                raise llm.ModelError(f"{REMOTE_VARIABLE} holds no sllm:// line, nor @FILE with one")
            target = stack.enter_context(sllm.connect(uris)).target()
            with sllm.Model(sllm.embedded.DRAFT, vocab_only=True) as ours:
                known = ours.vocab.fingerprint == target.vocab.fingerprint
            draft: Any = sllm.embedded.DRAFT if known else None
        elif self.model is None:
            target, draft = self._target(sllm.embedded.TARGET, stack), sllm.embedded.DRAFT
        else:
            target, draft = self._target(self.model, stack), self.draft
        if draft is not None and draft != "ngram":
            draft = stack.enter_context(sllm.Model(draft))
        return target, draft

    def _target(self, path: str | Path, stack: ExitStack) -> sllm.LocalTarget:
        # Kept for the turns of a conversation, of which each then costs what is new in it.
        return stack.enter_context(sllm.LocalTarget(stack.enter_context(sllm.Model(path))))


_opened: dict[Place, tuple[ExitStack, Any, Any]] = {}


def opened(place: Place) -> tuple[Any, Any]:
    """The target and the draft of a place, opened once in a process."""
    if place not in _opened:
        with ExitStack() as stack:
            target, draft = place.open(stack)
            if not _opened:
                atexit.register(close_all)  # after sllm's own function, which would warn of them
            _opened[place] = (stack.pop_all(), target, draft)
    return _opened[place][1:]


def close_all() -> None:
    """Close what was opened."""
    while _opened:
        _opened.popitem()[1][0].close()
    atexit.unregister(close_all)


class Sllm(llm.Model):
    """A model of sllm."""

    can_stream = True
    supports_schema = True

    class Options(llm.Options):
        temperature: float | None = Field(
            description="Divides the logits; 0 selects the likeliest token", ge=0, default=None
        )
        seed: int | None = Field(
            description="Of the noise that selects tokens: the same seed, the same text", ge=0, default=None
        )
        max_tokens: int | None = Field(description="At most so many tokens", ge=1, default=None)

    def __init__(self, model_id: str, place: Place) -> None:
        self.model_id, self.place = model_id, place

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,  # noqa: ARG002 - llm joins what it does not stream
        response: llm.Response,
        conversation: Any,  # noqa: ARG002 - prompt.messages has it
    ) -> Iterator[str | StreamEvent]:
        target, draft = opened(self.place)
        options = prompt.options
        chosen: dict[str, Any] = {} if options.temperature is None else {"temperature": options.temperature}
        seed = secrets.randbits(62) if options.seed is None else options.seed
        sampling = sllm.SamplingParams(**chosen, seed=seed, json_schema=prompt.schema)
        tokens = target.chat(messages_of(prompt))
        with sllm.generate(
            target, tokens, draft=draft, sampling=sampling, max_tokens=options.max_tokens
        ) as text:
            for run in text:
                if run.kind == "reasoning" and run.text:
                    yield StreamEvent(type="reasoning", chunk=run.text)
                elif run.kind == "text" and run.text:
                    yield run.text
        stats = text.stats
        response.set_usage(input=stats.n_prompt, output=stats.n_tokens)
        response.response_json = {
            "finish_reason": stats.finish_reason,
            "seed": seed,
            "passes": stats.n_passes,
            "accepted": stats.n_accepted,
        }


def messages_of(prompt: llm.Prompt) -> list[dict[str, str]]:
    """The whole conversation, as sllm takes it."""
    found = []
    for message in prompt.messages:
        text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
        if text:
            found.append({"role": message.role, "content": text})
    return found


# ---- the models that there are


def _list() -> Path:
    return llm.user_dir() / "sllm-models.json"


def added() -> dict[str, Place]:
    """The models that were added, by name."""
    try:
        return {name: Place(**place) for name, place in json.loads(_list().read_text()).items()}
    except FileNotFoundError:
        return {}


def _write(places: dict[str, Place]) -> None:
    _list().write_text(json.dumps({name: asdict(place) for name, place in places.items()}, indent=2))


@llm.hookimpl
def register_models(register: Any) -> None:
    register(Sllm("sllm", Place()))
    if remote := os.environ.get(REMOTE_VARIABLE):
        register(Sllm("sllm-remote", Place(remote=remote)))
    for name, place in added().items():
        register(Sllm(name, place))


@llm.hookimpl
def register_commands(cli: click.Group) -> None:
    @cli.group(name="sllm")
    def group() -> None:
        "Models that sllm runs"

    @group.command()
    @click.argument("name")
    @click.argument("model")
    @click.option("--draft", help="a smaller model with the same vocabulary, or ngram")
    def add(name: str, model: str, draft: str | None) -> None:
        "Add MODEL, a GGUF file or a name of the Hugging Face hub, as NAME"
        if name in ("sllm", "sllm-remote"):
            raise click.ClickException(f"{name} is the name of a model that is there already")
        given = [word for word in (model, draft) if word is not None]
        model, *rest = [str(Path(word).absolute()) if Path(word).is_file() else word for word in given]
        _write({**added(), name: Place(model, *rest)})

    @group.command()
    @click.argument("name")
    def remove(name: str) -> None:
        "Remove a model that was added"
        places = added()
        if places.pop(name, None) is None:
            raise click.ClickException(f"{name} was not added")
        _write(places)

    @group.command(name="list")
    def show() -> None:
        "List the models that were added"
        for name, place in added().items():
            click.echo(f"{name}: {place.model}" + (f", draft {place.draft}" if place.draft else ""))
