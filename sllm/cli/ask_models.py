"""The models of ``sllm ask``, and of ``--ask`` elsewhere: what grades and answers here, and the cloud."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import sllm
from sllm import embedded
from sllm.cli.addresses import all_addresses, engine_key
from sllm.cli.arguments import DEFAULT, MODEL, whole
from sllm.cli.console import CommandError, one_line
from sllm.cli.run_arguments import check_models
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

__all__ = ["add_triage", "check_cloud", "check_tiers", "open_hybrid"]

# What the tiers of --ask have no place for, and what is for them alone.
_NOT_WITH_ASK = (
    *("draft", "head", "hops", "rpc", "no_run_ahead", "on_loss", "hedge", "deadline"),
    *("experimental", "stop", "var"),
)
_WITH_ASK = ("small", "profile", "cloud_url", "cloud_model", "engine_vocab", "max_cloud_tokens")


def add_triage(models: argparse._ActionsContainer, cloud: argparse._ActionsContainer) -> None:
    """Declare what grades the requests, and what may be sent to the cloud."""
    models.add_argument(
        "--small",
        metavar="GGUF",
        help=f"grades, and answers tier 1: {MODEL} (default: the package's own)",
    )
    models.add_argument("--profile", metavar="FILE", help="what sllm calibrate found of --small")
    cloud.add_argument(
        "--cloud-url", metavar="URL", help="an OpenAI-compatible endpoint, such as https://host/v1"
    )
    cloud.add_argument("--cloud-model", metavar="NAME", help="the model's name there")
    cloud.add_argument(
        "--engine-vocab",
        metavar="GGUF",
        help=f"a model with its vocabulary and chat template: {MODEL} (default: --local, or else --small)",
    )
    cloud.add_argument(
        "--privacy",
        choices=("local", "deidentify", "refuse"),
        default="local",
        help="local: nothing of a private request leaves; deidentify: what was found in it is masked before"
        " it leaves, and put back in the answer; refuse: as local, and an error where only the cloud could"
        f" answer {DEFAULT}",
    )
    cloud.add_argument(
        "--verify",
        choices=("always", "uncertain", "never"),
        default="uncertain",
        help=f"which answers of tier 2 the cloud verifies {DEFAULT}",
    )
    cloud.add_argument(
        "--max-cloud-tokens",
        metavar="N",
        type=whole(1),
        help="send and receive no more (default: any number)",
    )


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


def check_tiers(args: argparse.Namespace) -> None:
    """Refuse what does not go together: options of ``--ask`` without it, and options of one target with it.

    Raises:
        CommandError: they do not.

    """
    for name in _NOT_WITH_ASK if args.ask else _WITH_ASK:
        if getattr(args, name):
            option = f"--{name.replace('_', '-')}"
            raise CommandError(f"{option} is not for --ask" if args.ask else f"{option} is for --ask: add it")
    if args.ask:
        args.local = args.target
        check_cloud(args)
    elif args.privacy != "local" or args.verify != "uncertain":
        raise CommandError("--privacy and --verify are for --ask: add it")
    else:
        check_models(args)


def check_cloud(args: argparse.Namespace) -> None:
    """Refuse what does not go together, before anything is loaded.

    Raises:
        CommandError: an option that needs another one, or excludes it.

    """
    if args.engine is None and (args.engine_vocab is not None or args.engine_model is not None):
        raise CommandError("--engine-vocab and --engine-model need --engine, the address of the engine")
    if sum(given is not None for given in (args.remote, args.cloud_url, args.engine)) > 1:
        raise CommandError("--remote, --cloud-url and --engine exclude each other")
    if args.remote is not None:
        all_addresses(args.remote)
    if args.cloud_url is None:
        if args.cloud_model is not None:
            raise CommandError("--cloud-model needs --cloud-url, which says where the model is")
        return
    if args.cloud_model is None:
        raise CommandError("--cloud-url needs --cloud-model, the model's name there")
    try:
        found = urlsplit(args.cloud_url)
        good = found.scheme in ("http", "https") and found.hostname and found.port != 0
    except ValueError:
        good = False
    if not good:
        raise CommandError("--cloud-url is not an address, expected one such as https://host/v1")
    if found.username is not None:
        raise CommandError("--cloud-url holds a user or a key; leave it out, and set OPENAI_API_KEY")


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
