"""``plan()``: which setup generates a text fastest here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from sllm.draft.drafters import Drafter, ModelDrafter
from sllm.engine._ffi import checked_int, checked_seconds
from sllm.engine.model import Model
from sllm.engine.sampling import SamplingParams
from sllm.planning.planner import Planner
from sllm.planning.ways import Plan

if TYPE_CHECKING:
    from sllm.http_engine.target import EngineTarget
    from sllm.planning.planner import Path, Prompt
    from sllm.remote.connection import Remote

__all__ = ["plan"]


def plan(
    draft: Model | Drafter | Path | None = None,
    *,
    target: Model | Path | None = None,
    remote: Remote | str | Sequence[str] | None = None,
    layers: Remote | str | Sequence[Remote | str] | None = None,
    head: int = 1,
    tail: int | None = 1,
    codec: str = "f16",
    engine: EngineTarget | str | None = None,
    api_key: str | None = None,
    prompts: Sequence[Prompt] | None = None,
    sampling: SamplingParams | None = None,
    max_tokens: int = 256,
    acceptance: float | None = None,
    timeout: float = 20.0,
) -> Plan:
    """Predict which setup generates a text fastest here, and what each costs and reveals to the other side.

    It measures the time of each model's passes by number of rows, the round trip, and where the draft agrees
    with a text of the target, and what it proposes instead elsewhere. On that record each setup is simulated
    with the same rules that the runtime uses (:mod:`sllm.planning.streaming`, :mod:`sllm.planning.in_turns`).
    The plan is for one text at a time. It does not predict that a draft slows down a target that needs the
    same cores; :func:`~sllm.generate` notices that, and pauses the draft.

    Args:
        draft: a small model here: a :class:`~sllm.Model`, a file or its name on the hub, ``"ngram"``, or a
            drafter of :mod:`sllm.draft.drafters`; None: none.
        target: the main model, if it is here: a :class:`~sllm.Model`, a file or its name.
        remote: a worker with the whole main model: a connection, the line that it printed, or several lines.
        layers: a worker with layers of it (``sllm worker MODEL --layers``), or several in their order; the
            ends come from ``target``'s file.
        head, tail, codec: of the split, as for :class:`~sllm.SplitTarget`.
        engine: a serving engine: an :class:`~sllm.EngineTarget` or its address; the vocabulary is
            ``target``'s, or else the draft's.
        api_key: of an engine that is given by its address.
        prompts: texts, token ids, or messages of a conversation: the more they resemble yours, the better the
            prediction. They are sent to each worker and engine given here. None: three built-in ones.
        sampling: how tokens are selected; None: ``SamplingParams()``.
        max_tokens: length in tokens of the texts to plan for; at most 48 are generated for each prompt.
        acceptance: the share of the draft's tokens that are right, if known: then drafting is only timed.
            None: measured.
        timeout: seconds for connecting, and without an answer of a worker or an engine.

    Returns:
        The setups. One that is not possible (no answer, another vocabulary, no trees) is included with the
        reason. Everything that was opened here is closed.

    Raises:
        ValueError, TypeError: an argument out of range or of another type, or no target.
        ModelLoadError: the draft cannot be loaded.

    Examples:
        >>> found = sllm.plan(sllm.embedded.DRAFT, target=sllm.embedded.TARGET, max_tokens=16)
        >>> found.best.name in ("here", "here, draft (chain)", "here, draft (tree)"), found.best.learns
        (True, 'nothing')

    """
    if target is None and remote is None and engine is None and layers is None:
        raise ValueError("plan() needs what decides the texts: target=, remote=, layers= or engine=")
    if isinstance(draft, str) and draft == "mtp":
        raise ValueError('plan() cannot tell what draft="mtp" brings: it takes a model, or "ngram"')
    if layers is not None and target is None:
        raise ValueError("layers= needs target=, the file with the first and last layers")
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise TypeError(f"sampling is {sampling!r}, expected SamplingParams")
    _check_addresses(remote)
    _check_addresses(layers)
    _check_ends(head, tail, codec)
    with ExitStack() as stack:
        if draft is not None and draft != "ngram" and not isinstance(draft, (Model, Drafter)):
            draft = stack.enter_context(Model(draft))
        small = draft.model if isinstance(draft, ModelDrafter) else draft
        vocab = small if target is None and isinstance(small, Model) else target
        if isinstance(engine, str) and vocab is None:
            raise ValueError("engine= needs a model with its vocabulary: target= or draft=")
        planner = Planner(
            draft,
            _checked_prompts(prompts),
            SamplingParams() if sampling is None else sampling,
            checked_int(max_tokens, "max_tokens", 1, 1 << 20),
            _checked_share(acceptance),
            checked_seconds(timeout, "timeout"),
        )
        ways = [
            *planner.here(target),
            *planner.worker(remote),
            *planner.split(target, layers, head, tail, codec),
            *planner.engine(engine, vocab, api_key),
        ]
    return Plan(tuple(ways), planner.figures)


def _check_addresses(given: object) -> None:
    """Raise for a line that is no address of a worker, before anything is measured."""
    given = [given] if isinstance(given, str) else given
    lines = [one for one in given if isinstance(one, str)] if isinstance(given, Sequence) else []
    if lines:
        from sllm.wire.auth import Address

        for line in lines:
            Address.parse(line)


def _check_ends(head: int, tail: int | None, codec: str) -> None:
    """Raise for what no model can be split by."""
    from sllm.wire.codec import CODECS

    checked_int(head, "head", 0)
    if tail is not None:
        checked_int(tail, "tail", 0)
    if codec not in CODECS:
        raise ValueError(f"codec is {codec!r}, expected one of {', '.join(CODECS)}")


def _checked_share(acceptance: float | None) -> float | None:
    if acceptance is None:
        return None
    if isinstance(acceptance, bool) or not isinstance(acceptance, (int, float)):
        raise TypeError(f"acceptance is {acceptance!r}, expected a number from 0 to 1")
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance is {acceptance!r}, expected a number from 0 to 1")
    return float(acceptance)


def _checked_prompts(prompts: Sequence[Prompt] | None) -> Sequence[Prompt] | None:
    if isinstance(prompts, str) or not (prompts is None or isinstance(prompts, Sequence)):
        raise TypeError(f"prompts is {prompts!r}, expected a list of prompts")
    if prompts is not None and (len(prompts) == 0 or not all(len(prompt) for prompt in prompts)):
        raise ValueError("prompts is empty, or one of them is")
    return prompts
