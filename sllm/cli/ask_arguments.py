"""The options of ``sllm ask`` and ``sllm chat --ask``: what grades requests, and what may be sent where."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sllm.cli.addresses import all_addresses
from sllm.cli.arguments import DEFAULT, MODEL, whole
from sllm.cli.console import CommandError
from sllm.cli.run_arguments import check_models

if TYPE_CHECKING:
    import argparse

__all__ = ["add_triage", "check_cloud", "check_tiers"]

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
