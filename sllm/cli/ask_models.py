"""The models of ``sllm ask``, and of ``--ask`` elsewhere: what grades and answers here, and the cloud."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sllm
from sllm import embedded
from sllm.cli.addresses import all_addresses, engine_key
from sllm.cli.console import CommandError, one_line
from sllm.engine.chat_template import thinking_off
from sllm.triage.calibration import Profile
from sllm.triage.hybrid import Hybrid
from sllm.triage.openai_cloud import OpenAICloud
from sllm.triage.policy import Policy
from sllm.triage.scorer import ContextScorer
from sllm.triage.triage import Triage

if TYPE_CHECKING:
    import argparse
    from contextlib import ExitStack

    from sllm.cli.console import Output
    from sllm.targets.base import Target
    from sllm.triage.hybrid import ChatCloud

__all__ = ["open_hybrid"]


def open_hybrid(
    args: argparse.Namespace, sampling: sllm.SamplingParams, out: Output, stack: ExitStack
) -> tuple[Hybrid, sllm.Model, str | None]:
    """What answers by tiers, its model for tier 2, and why it has no cloud although one was named."""
    # What can be refused at once is refused before the models are loaded.
    uris = None if args.remote is None else all_addresses(args.remote)
    profile = None if args.profile is None else Profile.load(args.profile)
    cloud, trouble = _open_cloud(args, uris, out, stack)
    small, triage = _open_small(args, profile, stack)
    local = None if args.local is None else stack.enter_context(sllm.Model(args.local))
    if args.engine is not None:
        cloud, trouble = _open_engine(args, local or small, out, stack)
    if args.no_thinking:
        _check_switch(small, local, cloud)
    hybrid = stack.enter_context(
        Hybrid(
            small,
            local,
            cloud,
            triage=triage,
            privacy=args.privacy,
            verify=args.verify,
            sampling=sampling,
            max_tokens=args.max_tokens or 512,
            max_cloud_tokens=args.max_cloud_tokens,
            n_ctx=args.n_ctx,
            n_threads=args.threads,
            thinking=not args.no_thinking,
        )
    )
    return hybrid, local or small, trouble


def _check_switch(*models: object) -> None:
    """Whether one of the models, or of the targets, has a switch for reasoning."""
    if not any(thinking_off(getattr(model, "chat_template", None)) for model in models):
        raise CommandError("--no-thinking: no model's chat template has a switch for reasoning that is known")


def _open_small(
    args: argparse.Namespace, profile: Profile | None, stack: ExitStack
) -> tuple[sllm.Model, Triage]:
    """The small model, and the triage by it."""
    ours = args.small is None
    small = stack.enter_context(sllm.Model(embedded.TARGET if ours else args.small))
    scorer = stack.enter_context(ContextScorer(small, n_threads=args.threads))
    if ours and profile is None:
        profile = Profile.load(embedded.TARGET_PROFILE)
    # Our own model is too small to judge privacy: there the detectors decide alone.
    return small, Triage(scorer, Policy(ask_privacy=not ours), profile)


def _open_cloud(
    args: argparse.Namespace, uris: list[str] | None, out: Output, stack: ExitStack
) -> tuple[Target | ChatCloud | None, str | None]:
    """The cloud, and why there is none although one was named."""
    if args.cloud_url is not None:
        try:
            cloud = OpenAICloud(args.cloud_model, base_url=args.cloud_url)
        except ImportError as error:
            raise CommandError(str(error)) from None
        return stack.enter_context(cloud), None
    if uris is None:
        return None, None
    try:
        return stack.enter_context(sllm.connect(uris)).target(), None
    except sllm.AuthError:
        raise  # a wrong token, or a wrong worker: neither goes away by itself
    except sllm.RemoteError as error:
        # What can be answered here does not need it.
        out.note(f"sllm: {one_line(error)}; answering without it")
        return None, "the worker does not answer"


def _open_engine(
    args: argparse.Namespace, vocab: sllm.Model, out: Output, stack: ExitStack
) -> tuple[Target | None, str | None]:
    """The engine as the cloud, and why there is none although one was named."""
    if args.engine_vocab is not None:
        vocab = stack.enter_context(sllm.Model(args.engine_vocab, vocab_only=True))
    try:
        target = sllm.EngineTarget(args.engine, vocab, model=args.engine_model, api_key=engine_key())
    except sllm.AuthError:
        raise
    except sllm.RemoteError as error:
        out.note(f"sllm: {one_line(error)}; answering without it")
        return None, "the engine does not answer"
    return stack.enter_context(target), None
