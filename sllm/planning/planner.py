"""The places that decide texts: each is measured, and its ways are predicted."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

from sllm.draft.drafters import ModelDrafter, NGramDrafter, drafts_trees
from sllm.draft.length import PassTimes
from sllm.engine.arrays import int32_array
from sllm.engine.model import Model
from sllm.engine.params import context_length
from sllm.errors import SllmError
from sllm.generation.generate import can_overlap, make_drafter, share_cores
from sllm.generation.local import LocalTarget
from sllm.planning import in_turns
from sllm.planning.measure import Measured, Written, measure_passes, measure_worker, record
from sllm.planning.recorded import Recorded
from sllm.planning.ways import Way
from sllm.progress import step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    import numpy.typing as npt

    from sllm.draft.drafters import Drafter
    from sllm.engine.sampling import SamplingParams
    from sllm.http_engine.target import EngineTarget
    from sllm.planning.events import Simulated
    from sllm.remote.connection import Remote
    from sllm.targets.base import Target

    Prompt = str | npt.NDArray[np.int32] | Sequence[int] | Sequence[Mapping[str, Any]]
    Path = str | os.PathLike[str]

__all__ = ["Planner"]

_ASKED = (
    "Tell me a short story about a fox who looks for its way home.",
    "What should I pack for a week in the mountains?",
    "请讲一个关于狐狸的故事。",
)
_BEGUN = (
    "Once upon a time, there was a little fox who",
    "Before a long walk you should",
    "从前有一只小狐狸，",
)

_MEASURED = 48
"""Tokens that are written after each prompt, where the texts that are planned for are not shorter."""

_NOTHING, _TEXT, _STATES = "nothing", "all of the text", "hidden states (*)"
_NO_DRAFT = "there is no draft (draft=)"


class Planner:
    """Measures one place after the other; the arguments are those of :func:`sllm.plan`, checked.

    Attributes:
        figures: what was measured, by name.

    """

    def __init__(
        self,
        draft: Model | Drafter | str | None,
        prompts: Sequence[Prompt] | None,
        sampling: SamplingParams,
        max_tokens: int,
        acceptance: float | None,
        timeout: float,
    ) -> None:
        self._draft = draft
        self._prompts = prompts
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._n_written = min(max_tokens, _MEASURED)
        self._acceptance = acceptance
        self._timeout = timeout
        self.figures: dict[str, float] = {}

    # ---- the places

    def here(self, target: Model | Path | None) -> Iterator[Way]:
        """The main model on this machine."""
        names = ("here", "here, draft (chain)", "here, draft (tree)")
        option = f"sllm chat {_word(target)}"
        code = f"sllm.generate(sllm.Model({_name(target)!r}), prompt"
        uses = (option, self._chain_code(code), f"{option} --draft {self._draft_name}")
        if target is None:
            yield Way(names[0], _NOTHING, uses[0], why_not="there is no main model here (target=)")
            return

        def ways(stack: ExitStack) -> Iterator[Way]:
            model = target if isinstance(target, Model) else stack.enter_context(Model(target))
            threads, draft_threads = share_cores(model, self._draft)
            prompts = self._encoded(model)
            n_ctx = max(map(len, prompts)) + self._n_written + 257
            n_ctx = min(n_ctx, model.n_ctx_train or context_length(0))
            local = stack.enter_context(LocalTarget(model, n_ctx=n_ctx, n_threads=threads))
            with step("measuring the model here", None) as told:
                found = measure_passes(local, prompts, self._sampling, self._n_written, told)
            self._note("here", found)
            yield self._alone(names[0], _NOTHING, uses[0], found)
            yield from self._drafted(names[1:], _NOTHING, uses[1:], found, local, draft_threads)

        yield from self._unless(names, _NOTHING, uses, ways)

    def worker(self, given: Remote | str | Sequence[str] | None) -> Iterator[Way]:
        """A worker with the whole model."""
        option, code = "sllm chat --remote @FILE", "sllm.generate(sllm.connect(uri).target(), prompt"
        drafted = f"{option} --draft {self._draft_name}"
        names = ("worker, stream", "worker, hints (chain)", "worker, hints (tree)")
        uses = (f"{option} --draft none", self._chain_code(code), drafted)
        if given is None:
            yield Way(names[0], _TEXT, uses[0], why_not="there is no worker (remote=)")
            return

        def ways(stack: ExitStack) -> Iterator[Way]:
            from sllm.remote.connection import Remote, connect

            remote = given
            if not isinstance(remote, Remote):
                remote = stack.enter_context(connect(remote, timeout=self._timeout, on_loss="raise"))
            target = remote.target()
            with step("measuring the worker", None) as told:
                prompts = self._encoded(target)
                own = "worker-draft" in remote.info.features
                # Such a worker is sooner at their end, and learns meanwhile how much to draft.
                n = min(2 * self._n_written, self._max_tokens) if own else self._n_written
                found = measure_worker(remote, prompts, self._sampling, n, self._timeout, told)
            self._note("worker", found)
            if own:
                yield Way(names[0], _TEXT, uses[0], why_not="the worker drafts by itself, whoever asks")
            yield self._alone("worker, its own draft" if own else names[0], _TEXT, uses[0], found)
            hints = ("both sides (chain)", "both sides (tree)") if own else names[1:]
            yield from self._drafted(hints, _TEXT, uses[1:], found, target, None, own=own)
            if not own:
                reason = "the worker has no draft: start it with --draft"
                yield Way("worker, its own draft", _TEXT, "sllm worker MODEL --draft GGUF", why_not=reason)

        yield from self._unless(names, _TEXT, uses, ways)

    def split(
        self,
        target: Model | Path | None,
        given: Remote | str | Sequence[Remote | str] | None,
        head: int,
        tail: int | None,
        codec: str,
    ) -> Iterator[Way]:
        """The ends of the model here, and the layers between on workers."""
        names = ("split", "split, draft (chain)", "split, draft (tree)")
        learns = _STATES if tail is not None else _TEXT
        several = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        ends = f"--head {head} --tail {'none' if tail is None else tail} --codec {codec}"
        option = f"sllm chat --target {_word(target)}{' --remote @FILE' * len(several)} {ends}"
        parts = f"{_name(target)!r}, head={head}, tail={tail}, middle=remote"
        code = f"sllm.generate(sllm.SplitTarget({parts}), prompt"
        uses = (f"{option} --draft none", self._chain_code(code), f"{option} --draft {self._draft_name}")
        if given is None:
            why_not = "there is no worker with layers (layers=): sllm worker MODEL --layers"
            yield Way(names[0], learns, uses[0], why_not=why_not)
            return

        def ways(stack: ExitStack) -> Iterator[Way]:
            from sllm.remote.connection import Remote, connect
            from sllm.split.target import SplitTarget

            assert target is not None
            middle = [
                one
                if isinstance(one, Remote)
                else stack.enter_context(connect(one, timeout=self._timeout, on_loss="raise"))
                for one in several
                if one is not None
            ]
            path = target.path if isinstance(target, Model) else target
            split = stack.enter_context(
                SplitTarget(path, head=head, tail=tail, middle=middle, codec=codec, on_loss="raise")
            )
            with step("measuring the split", None) as told:
                found = measure_passes(split, self._encoded(split), self._sampling, self._n_written, told)
            found.round_trip = sum(remote.ping(n=3).round_trip for remote in middle)
            self._note("split", found)
            yield self._alone(names[0], learns, uses[0], found)
            yield from self._drafted(names[1:], learns, uses[1:], found, split, None)

        # A worker may have other layers than are left for it.
        yield from self._unless(names, learns, uses, ways, ValueError)

    def engine(
        self, given: EngineTarget | str | None, vocab: Model | Path | None, api_key: str | None
    ) -> Iterator[Way]:
        """A serving engine; nothing, where none is given."""
        if given is None:
            return
        names = ("engine", "engine, draft (chain)")
        option = f"sllm chat --engine URL --target {_word(vocab)}"
        uses = (f"{option} --draft none", f"{option} --draft {self._draft_name}")

        def ways(stack: ExitStack) -> Iterator[Way]:
            from sllm.http_engine.target import EngineTarget

            served = given
            if not isinstance(served, EngineTarget):
                assert vocab is not None
                served = EngineTarget(served, vocab, api_key=api_key, deadline=self._timeout)
                stack.enter_context(served)
            with step("measuring the engine", None) as told:
                found = measure_passes(served, self._encoded(served), self._sampling, self._n_written, told)
            self._note("engine", found)
            yield self._alone(names[0], _TEXT, uses[0], found)
            if found.streams:
                reason = "it streams, and what a draft brings beside that is not predicted"
                yield Way(names[1], _TEXT, uses[1], why_not=reason)
                return
            yield from self._drafted(names[1:], _TEXT, uses[1:], found, served, None)

        yield from self._unless(names, _TEXT, uses, ways)

    # ---- what they have in common

    def _unless(
        self,
        names: Sequence[str],
        learns: str,
        uses: Sequence[str],
        ways: Callable[[ExitStack], Iterator[Way]],
        also: type[Exception] = SllmError,
    ) -> Iterator[Way]:
        """The ways of a place; where it fails, with an error of ours or of the type ``also``, those that are
        missing say why.
        """
        done: set[str] = set()
        try:
            with ExitStack() as stack:
                for way in ways(stack):
                    done.add(way.name)
                    yield way
        except (SllmError, ImportError, also) as error:
            for name, use in zip(names, uses, strict=True):
                if name not in done:
                    yield Way(name, learns, use, why_not=" ".join(str(error).split()))

    def _alone(self, name: str, learns: str, use: str, found: Measured) -> Way:
        """Without a draft of this side."""
        waits = found.round_trip > 0 and not found.streams
        n_passes = len(found.commits) / max(sum(n for n, _ in found.commits), 1)
        per_pass = found.bytes_of_pass + (0.0 if found.streams else found.bytes_of_row)
        return Way(
            name,
            learns,
            use,
            found.tokens_per_s,
            found.first_token,
            n_passes if waits else 0.0,
            _on_wire(per_pass, 1 if found.streams else 2) * n_passes if found.round_trip else 0.0,
        )

    def _drafted(
        self,
        names: Sequence[str],
        learns: str,
        uses: Sequence[str],
        found: Measured,
        target: Target,
        n_threads: int | None,
        *,
        own: bool = False,
    ) -> Iterator[Way]:
        """With a draft here, as a chain and as a tree."""
        if self._draft is None:
            for name, use in zip(names, uses, strict=True):
                yield Way(name, learns, use, why_not=_NO_DRAFT)
            return
        times = PassTimes()
        with ExitStack() as stack:
            drafter = make_drafter(self._draft, target, n_threads, stack)
            assert drafter is not None
            trees = drafts_trees(drafter)
            with step("measuring the draft", None) as told:
                text = self._recorded(drafter, found.texts, times, told)
            if isinstance(target, LocalTarget):
                with closing(
                    target.open(int32_array(found.texts[0].prompt, "prompt"), self._sampling, 1)
                ) as one:
                    found.overlaps = can_overlap(target, drafter, one)
            else:
                found.overlaps = found.round_trip > 0 and isinstance(drafter, ModelDrafter)
        for name, use in zip(names, uses, strict=True):
            as_tree = name.endswith("(tree)")
            if as_tree and not (trees and found.can_branch):
                who = "the target's side takes no trees" if trees else "the draft makes chains alone"
                yield Way(name, learns, use, why_not=who)
                continue
            yield self._predicted(name, learns, use, found, text, times, as_tree=as_tree, own=own)

    def _recorded(
        self,
        drafter: Drafter,
        texts: Sequence[Written],
        times: PassTimes,
        told: Callable[[float], object] | None,
    ) -> Recorded:
        """What the draft says of the texts, as one that is as long as the texts that are planned for."""
        if self._acceptance is not None:
            record(drafter, Written(texts[0].prompt, texts[0].truth[:8]), self._sampling, times)
            text = Recorded.drawn(self._acceptance, self._max_tokens)
        else:
            parts = []
            for i, one in enumerate(texts):
                parts.append(record(drafter, one, self._sampling, times))
                if told is not None:
                    told((i + 1) / len(texts))
            text = Recorded(
                tuple(token for part in parts for token in part.truth),
                tuple(position for part in parts for position in part.positions),
            )
        self.figures["acceptance"] = text.acceptance
        self.figures["draft_seconds"] = times.estimate(1)
        return text.repeated(self._max_tokens)

    def _predicted(
        self,
        name: str,
        learns: str,
        use: str,
        found: Measured,
        text: Recorded,
        times: PassTimes,
        *,
        as_tree: bool,
        own: bool,
    ) -> Way:
        if found.streams:
            from sllm.planning.streaming import with_hints

            commits = found.commits if own else ()
            came = with_hints(text, found.passes, times, found.round_trip, trees=as_tree, own=commits)
            # From when the client hears that the prompt is computed; a draft that loses is paused.
            speed = max(came.n_tokens / (came.seconds - found.round_trip), found.tokens_per_s)
            carried = came.bytes_up + found.bytes_of_pass * came.n_passes
            n_messages, trips = came.n_hints + came.n_passes, 0.0
        else:
            came = self._in_turns(found, text, times, as_tree=as_tree)
            speed = came.tokens_per_s
            carried = found.bytes_of_pass * came.n_passes + found.bytes_of_row * (came.n_passes + came.n_rows)
            n_messages, trips = 2 * came.n_passes, came.passes_per_token
        if not found.round_trip:
            return Way(name, learns, use, speed, found.first_token, 0.0, 0.0)
        n_bytes = _on_wire(carried, n_messages) / came.n_tokens
        return Way(name, learns, use, speed, found.first_token, trips, n_bytes)

    def _in_turns(self, found: Measured, text: Recorded, times: PassTimes, *, as_tree: bool) -> Simulated:
        if as_tree:
            return in_turns.trees(text, found.passes, times, limit=found.limit, round_trip=found.round_trip)
        return in_turns.chains(
            text,
            found.passes,
            times,
            limit=found.limit,
            overlaps=found.overlaps,
            far=found.round_trip > 0,
            own_pace=found.own_pace,
        )

    def _note(self, place: str, found: Measured) -> None:
        """Keep what was measured of a place for the result."""
        self.figures[f"{place}_pass_seconds"] = found.passes.estimate(1)
        for rows in (2, 4, 8, 16, 32):
            if found.passes.known(rows):
                self.figures[f"{place}_pass_seconds_{rows}_rows"] = found.passes.estimate(rows)
        if found.round_trip:
            self.figures[f"{place}_round_trip"] = found.round_trip

    def _encoded(self, target: Any) -> list[npt.NDArray[np.int32]]:
        """The prompts in a target's tokens: by its chat template where they are messages, or ours."""
        if self._prompts is None:
            if target.chat_template is not None:
                return [target.chat([{"role": "user", "content": asked}]) for asked in _ASKED]
            return [target.vocab.encode(begun) for begun in _BEGUN]
        return [
            target.vocab.encode(prompt)
            if isinstance(prompt, str)
            else target.chat(prompt)
            if isinstance(prompt[0], Mapping)
            else int32_array(prompt, "a prompt")  # type: ignore[arg-type]
            for prompt in self._prompts
        ]

    # ---- how to use them

    @property
    def _draft_name(self) -> str:
        if isinstance(self._draft, NGramDrafter):
            return "ngram"
        return _word(self._draft.model if isinstance(self._draft, ModelDrafter) else self._draft)

    def _chain_code(self, code: str) -> str:
        draft = self._draft_name
        return (
            f"{code}, draft={draft!r})"
            if draft == "ngram"
            else f"{code}, draft=ModelDrafter(small, trees=False))"
        )


def _name(model: object) -> str:
    """The path or the name of a model."""
    if isinstance(model, Model):
        return str(model.path)
    return os.fspath(model) if isinstance(model, (str, os.PathLike)) else "GGUF"


def _word(model: object) -> str:
    """The same for a shell."""
    return shlex.quote(_name(model))


def _on_wire(n_bytes: float, n_messages: float) -> float:
    """Bytes of messages with what is around them."""
    from sllm.wire.protocol import FRAMING

    return n_bytes + FRAMING * n_messages
