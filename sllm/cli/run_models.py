"""The models of ``sllm run`` and ``sllm chat``: on this machine, on a worker, in an engine, or split between
both.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import sllm
from sllm import embedded
from sllm.cli.addresses import engine_key, worker_addresses
from sllm.cli.arguments import NO_HOPS
from sllm.cli.console import CommandError
from sllm.cli.run_arguments import is_split
from sllm.engine import exact
from sllm.rpc import server as rpc

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from contextlib import ExitStack
    from pathlib import Path

    from sllm.targets.base import Target

    _Opened = tuple[sllm.Model, sllm.Model | Target, sllm.Model | str | None]

__all__ = ["open_models"]


def open_models(args: argparse.Namespace, sampling: sllm.SamplingParams, stack: ExitStack) -> _Opened:
    """A model that has the vocabulary, the target, and what is to draft, as the options say."""
    workers = [worker_addresses(given) for given in args.remote or ()]
    if args.engine is not None:
        return _open_engine(args, sampling, stack)
    if not workers:
        return _open_local(args, sampling, stack)
    if not is_split(args):
        return _open_remote([uri for several in workers for uri in several], args, sampling, stack)
    return _open_split(workers, args, sampling, stack)


def _open_local(args: argparse.Namespace, sampling: sllm.SamplingParams, stack: ExitStack) -> _Opened:
    """Load a model on this machine, perhaps with layers on the devices of other ones (``--rpc``)."""
    for option in ("no_run_ahead", "on_loss", "deadline", "hedge"):
        if getattr(args, option):
            raise CommandError(f"--{option.replace('_', '-')} is for --remote alone")
    ours = args.target is None
    name = embedded.TARGET if ours else args.target
    settings = exact.SETTINGS if ours else {}
    if args.rpc is not None:
        isolated = _open_rpc(args, name, settings, stack)
        _check_grammar(isolated.model, sampling, args.grammar_file or args.json_schema)
        return isolated.model, isolated, _open_draft(args, embedded.DRAFT if ours else None, stack)
    model = stack.enter_context(sllm.Model(name, n_gpu_layers=args.n_gpu_layers))
    _check_grammar(model, sampling, args.grammar_file or args.json_schema)
    draft = _open_draft(args, embedded.DRAFT if ours else None, stack)
    if not ours and args.n_ctx is None and args.threads is None:
        # generate() makes the context as large as the text needs, and shares out the cores.
        return model, model, draft
    target = sllm.LocalTarget(model, n_ctx=args.n_ctx, n_threads=args.threads, **settings)
    return model, stack.enter_context(target), draft


def _open_rpc(
    args: argparse.Namespace, name: Any, settings: Mapping[str, Any], stack: ExitStack
) -> sllm.LocalTarget:
    """A model in a process of its own, with layers on the devices that ``--rpc`` names: HOST:PORT of a
    server, or the address of a worker that relays to one.
    """
    if args.rpc.startswith(("sllm://", "@")):
        remote = stack.enter_context(sllm.connect(worker_addresses(args.rpc)))
        devices = remote.rpc_devices()
    else:
        devices = rpc.add_server(args.rpc)
    target = sllm.LocalTarget(
        name,
        devices=devices,
        n_gpu_layers=args.n_gpu_layers,
        n_ctx=args.n_ctx,
        n_threads=args.threads,
        **settings,
    )
    return stack.enter_context(target)


def _open_remote(
    uris: list[str], args: argparse.Namespace, sampling: sllm.SamplingParams, stack: ExitStack
) -> _Opened:
    """Connect to a worker that has the whole model, or to several."""
    if args.rpc is not None:
        raise CommandError("--rpc is for models that run here, and --remote names one that does not")
    on_loss, deadline = args.on_loss or "wait", args.deadline or 60.0
    hedge = args.hedge or False
    remote = stack.enter_context(sllm.connect(uris, on_loss=on_loss, deadline=deadline, hedge=hedge))
    model = remote.vocabulary_model()
    _check_grammar(model, sampling, args.grammar_file or args.json_schema)
    default = None
    if args.draft is None:
        with sllm.Model(embedded.DRAFT, vocab_only=True) as ours:
            if ours.vocab.fingerprint == remote.info.vocab_fingerprint:
                default = embedded.DRAFT
    draft = _open_draft(args, default, stack)
    if on_loss == "local" and draft is None:
        raise CommandError(
            "--on-loss local lets the draft go on alone, and there is none: name it by --draft"
        )
    return model, remote.target(run_ahead=not args.no_run_ahead), draft


def _open_engine(args: argparse.Namespace, sampling: sllm.SamplingParams, stack: ExitStack) -> _Opened:
    """Find a serving engine; the target's file has its vocabulary."""
    for option in ("no_run_ahead", "on_loss", "hedge"):
        if getattr(args, option):
            raise CommandError(f"--{option.replace('_', '-')} is for --remote alone")
    ours = args.target is None
    name = embedded.TARGET if ours else args.target
    model = stack.enter_context(sllm.Model(name, vocab_only=True))
    _check_grammar(model, sampling, args.grammar_file or args.json_schema)
    target = sllm.EngineTarget(
        args.engine,
        model,
        model=args.engine_model,
        api_key=engine_key(),
        deadline=args.deadline or 60.0,
        experimental=args.experimental,
    )
    return model, stack.enter_context(target), _open_draft(args, embedded.DRAFT if ours else None, stack)


def _open_split(
    workers: list[list[str]], args: argparse.Namespace, sampling: sllm.SamplingParams, stack: ExitStack
) -> _Opened:
    """Load the first and the last layers here, and connect to the workers that have those between, each of
    which may have several addresses.
    """
    if args.no_run_ahead or args.on_loss == "local" or args.hedge:
        raise CommandError("--no-run-ahead, --hedge and --on-loss local are not for a split by layers")
    on_loss, deadline = args.on_loss or "wait", args.deadline or 60.0
    remotes = [
        stack.enter_context(sllm.connect(uris, on_loss=on_loss, deadline=deadline)) for uris in workers
    ]
    ours = args.target is None
    name = embedded.TARGET if ours else args.target
    target = stack.enter_context(
        sllm.SplitTarget(
            name,
            head=args.head,
            tail=args.tail,
            middle=remotes,
            codec=args.codec,
            hops=True if not args.hops else False if NO_HOPS in args.hops else args.hops,
            n_ctx=args.n_ctx,
            n_threads=args.threads,
            n_gpu_layers=args.n_gpu_layers,
            load_mtp=args.draft == "mtp",
            **(exact.SETTINGS if ours else {}),
        )
    )
    model = stack.enter_context(sllm.Model(name, vocab_only=True))
    _check_grammar(model, sampling, args.grammar_file or args.json_schema)
    return model, target, _open_draft(args, embedded.DRAFT if ours else None, stack)


def _open_draft(args: argparse.Namespace, default: Path | None, stack: ExitStack) -> sllm.Model | str | None:
    """What ``--draft`` names."""
    name: str | os.PathLike[str] | None = default if args.draft is None else args.draft
    if name is None or name == "none":
        return None
    if name in ("mtp", "ngram"):
        return str(name)
    try:
        return stack.enter_context(sllm.Model(name, n_gpu_layers=0 if args.n_gpu_layers == 0 else None))
    except sllm.ModelLoadError as error:
        raise CommandError(f"--draft: {error} (or mtp, ngram or none)") from error


def _check_grammar(model: sllm.Model, sampling: sllm.SamplingParams, name: str) -> None:
    """Compile the grammar or JSON Schema of the file ``name``, if there is one."""
    if not sampling.has_grammar:
        return
    try:
        model.compiled(sampling)
    except ValueError as error:
        raise CommandError(f"{name}: {error}") from None
