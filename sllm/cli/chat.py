"""``sllm chat``: a conversation in the terminal, with a model here, a worker's, an engine's, or by tiers."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sllm
from sllm.cli.arguments import ENGINE_SECRET, FAILED, MODEL, SECRET, utf8
from sllm.cli.ask_arguments import add_triage, check_tiers
from sllm.cli.chat_arguments import add_variables, check_variables, template_variables
from sllm.cli.console import DIM, CommandError
from sllm.cli.conversation.answering import HybridAnswers, ModelAnswers
from sllm.cli.conversation.lines import open_lines
from sllm.cli.conversation.talk import COMMANDS, Talk
from sllm.cli.conversation.transcript import Transcript
from sllm.cli.run_arguments import add_models, add_places, add_sampling, add_text, is_split, sampling_of
from sllm.cli.run_models import open_models
from sllm.cli.signals import INTERRUPTED, interrupts_call
from sllm.draft.drafters import ModelDrafter
from sllm.engine.params import context_length
from sllm.folders import state_folder

if TYPE_CHECKING:
    import argparse

    from sllm.cli.console import Output
    from sllm.cli.conversation.answering import Answers

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = (
    "`sllm MODEL` is short for `sllm chat MODEL`. Ctrl-C ends an answer, Ctrl-D the conversation; /help lists"
    " what else may be typed. Where stdin is no terminal, each line of it is a message, and the status is 2"
    " if one was not answered."
    f" {SECRET} {ENGINE_SECRET}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm chat``."""
    add = parser.add_argument
    # Any number of words, so that what is meant by `sllm model.gguf 'Hello'` can be said.
    add("model", metavar="MODEL", nargs="*", help=f"{MODEL} (default: the package's own small model)")
    add("--system", metavar="TEXT", type=utf8, help="a system message before the conversation")
    add("--load", metavar="FILE", help="go on with a conversation that /save has written")
    add("--no-history", action="store_true", help="keep nothing of what is typed")
    add_variables(parser)
    add_models(parser)
    add_text(parser)
    add_sampling(parser)
    parser.set_defaults(temperature=None)
    add_places(parser)
    tiers = parser.add_argument_group("tiers (MODEL is the one that answers tier 2)")
    tiers.add_argument(
        "--ask",
        action="store_true",
        help="answer each message by the model that suits it, here or in a cloud (--remote, --engine or"
        " --cloud-url), as sllm ask does; at temperature 0 unless another one is named",
    )
    add_triage(tiers, tiers)


def run(args: argparse.Namespace, out: Output) -> int:
    """Run ``sllm chat``."""
    _take_model(args)
    check_tiers(args)
    check_variables(args)
    if args.temperature is None:
        args.temperature = 0.0 if args.ask else sllm.SamplingParams().temperature
    sampling = sampling_of(args)
    transcript = Transcript() if args.load is None else _loaded(args.load)
    if args.system is not None:
        transcript.system = args.system
    interactive = sys.stdin is not None and sys.stdin.isatty()
    with ExitStack() as stack:
        opened = _open_hybrid if args.ask else _open_target
        answers, name = opened(args, sampling, out, stack)
        history = None if args.no_history else state_folder() / "chat-history"
        lines = open_lines(out, history, list(COMMANDS))
        if interactive and out.terminal:
            where = "" if answers.n_ctx is None else f", {answers.n_ctx} positions"
            out.text(f"{name}{where}; /help lists the commands, Ctrl-D ends\n", style=DIM)
        talk = Talk(lines, answers, out, transcript, interactive=interactive, max_tokens=args.max_tokens)
        # Between an answer and the next prompt a Ctrl-C has nothing to end.
        stack.enter_context(interrupts_call(lambda: None) if interactive else nullcontext())
        if not talk.run():
            return INTERRUPTED
        # A person has seen what failed; a program looks at the status.
        return FAILED if talk.failed and not interactive else 0


def _take_model(args: argparse.Namespace) -> None:
    """The model, which ``--target`` may name as well."""
    words = args.model
    if len(words) > 1:
        model, prompt = shlex.quote(words[0]), shlex.quote(" ".join(words[1:]))
        raise CommandError(
            "a conversation is typed, and there is a prompt behind the model; was `sllm run --chat --target"
            f" {model} {prompt}` meant?"
        )
    if words and args.target is not None:
        raise CommandError(f"{words[0]} and --target name two models; leave one out")
    args.target = words[0] if words else args.target


def _loaded(name: str) -> Transcript:
    return Transcript.load(Path(name).expanduser())


def _open_target(
    args: argparse.Namespace, sampling: sllm.SamplingParams, _out: Output, stack: ExitStack
) -> tuple[Answers, str]:
    """Answers by one target, and its name."""
    model, target, draft = open_models(args, sampling, stack)
    if model.chat_template is None:
        raise CommandError(
            f"{model.path.name} has no chat template; sllm run writes the text that follows a prompt"
        )
    variables = template_variables(args, model.chat_template)
    if isinstance(target, sllm.Model):
        # Snapshots, by which recurrent models take a draft back, cost a plain token some percent.
        target = stack.enter_context(
            sllm.LocalTarget(
                target, n_ctx=args.n_ctx, n_threads=args.threads, n_rollback=0 if draft is None else None
            )
        )
    name, n_ctx = _place(target, model, args)
    drafter: ModelDrafter | str | None = None
    if isinstance(draft, sllm.Model):
        target.vocab.check_same(draft.vocab)
        here = n_ctx if args.remote is None and args.engine is None else args.n_ctx
        n_draft = min(here or context_length(0), draft.n_ctx_train or context_length(0))
        drafter = stack.enter_context(ModelDrafter(draft, n_ctx=n_draft, n_threads=args.threads))
    else:
        drafter = draft
    answers = ModelAnswers(model, target, drafter, sampling, args.max_tokens, args.stop, variables, n_ctx)
    return answers, name


def _place(target: Any, model: sllm.Model, args: argparse.Namespace) -> tuple[str, int | None]:
    """What the target is called, and how many positions a text has there; None: it does not say.

    By the options, as the classes of targets elsewhere need packages that one here does without.
    """
    if args.engine is not None:
        return f"{target.info.model} on {target.info.api}", target.info.n_ctx
    if is_split(args):
        return model.path.name, target.n_ctx
    if args.remote is not None:
        link = target.remote.fleet.link
        return f"{link.info.model_name} on {link.endpoint}", min(link.info.n_ctx, link.info.max_prompt)
    if target.isolated:
        return model.path.name, args.n_ctx or context_length(model.n_ctx_train)
    return model.path.name, target.context.n_ctx_seq


def _open_hybrid(
    args: argparse.Namespace, sampling: sllm.SamplingParams, out: Output, stack: ExitStack
) -> tuple[Answers, str]:
    """Answers by tiers, and the name of the model that answers here."""
    # Slow to import, and with packages of its own.
    from sllm.cli.ask import explained
    from sllm.cli.ask_models import open_hybrid

    hybrid, model, _ = open_hybrid(args, sampling, out, stack)
    if model.chat_template is None:
        raise CommandError(f"{model.path.name} has no chat template")
    n_ctx = args.n_ctx or context_length(model.n_ctx_train)
    return HybridAnswers(hybrid, model, n_ctx, explained), f"{model.path.name}, by tiers"
