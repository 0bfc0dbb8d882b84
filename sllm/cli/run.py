"""``sllm run``: the text that follows a prompt, by a model here, a worker's, an engine's, or one split."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import sllm
from sllm.cli.arguments import ENGINE_SECRET, SECRET
from sllm.cli.chat_arguments import add_chat, chat_prompt, check_chat
from sllm.cli.console import read_prompt
from sllm.cli.run_arguments import add_models, add_places, add_sampling, add_text, check_models, sampling_of
from sllm.cli.run_models import open_models
from sllm.cli.run_report import ShownText, summary
from sllm.draft.drafters import ModelDrafter

if TYPE_CHECKING:
    import argparse

    from sllm.cli.console import Output

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = f"{SECRET} {ENGINE_SECRET}"

_CHAT = "sllm run goes on with the prompt; for an answer to it there is --chat, or sllm chat"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm run``."""
    # Any number of words, so that what is meant by `sllm run model.gguf 'Hello'` can be said.
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="*", help="the prompt; '-', or none and a pipe: stdin"
    )
    add_models(parser)
    parser.add_argument(
        "--chat", action="store_true", help="PROMPT is a message, for the model's chat template"
    )
    add_text(parser)
    add_chat(parser)
    add_sampling(parser)
    add_places(parser)
    parser.add_argument(
        "--stats", action="store_true", help="write to stderr what the text took: seconds, passes, bytes"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Run ``sllm run``."""
    sampling = sampling_of(args)
    check_chat(args)
    check_models(args)
    option = "--target" if args.target is None and args.remote is None else None
    text = read_prompt(args.prompt, "run", model_option=option)
    with ExitStack() as stack:
        model, target, draft = open_models(args, sampling, stack)
        prompt = chat_prompt(args, model, text) if args.chat else text
        drafter: sllm.Model | ModelDrafter | str | None = draft
        elsewhere = bool(args.remote) or args.engine is not None
        if isinstance(draft, sllm.Model) and (args.threads is not None or elsewhere):
            n_ctx = min(n for n in (args.n_ctx, draft.n_ctx_train, 4096) if n)
            drafter = stack.enter_context(ModelDrafter(draft, n_ctx=n_ctx, n_threads=args.threads))
        stream = stack.enter_context(
            sllm.generate(
                target, prompt, draft=drafter, sampling=sampling, max_tokens=args.max_tokens, stop=args.stop
            )
        )
        shown = ShownText(out)
        if args.prefill is not None:
            shown.add(sllm.Run(0, (), args.prefill, 0, "target"))
        for part in stream:
            shown.add(part)
        out.end_line()
        if not args.chat and model.chat_template is not None:
            if stream.stats.finish_reason == "eog" and stream.stats.n_tokens <= 1:
                out.note(f"sllm: the model has ended the text at once; {_CHAT}")
            elif out.terminal and args.target is None and not elsewhere:
                out.note(f"({_CHAT})")
        if args.stats:
            for line in summary(stream.stats):
                out.note(line)
    return 0
