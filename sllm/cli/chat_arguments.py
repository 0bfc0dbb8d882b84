"""The options of a chat: what stands beside the user's message, and what the template is told."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sllm.cli.arguments import utf8
from sllm.cli.console import CommandError
from sllm.engine.chat_inputs import checked_variables
from sllm.engine.chat_template import thinking_off
from sllm.messages import MessageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    import sllm

__all__ = [
    "add_chat",
    "add_variables",
    "chat_prompt",
    "check_chat",
    "check_variables",
    "template_variables",
]


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Declare what goes with ``--chat``."""
    chat = parser.add_argument_group("chat (with --chat)")
    chat.add_argument("--system", metavar="TEXT", type=utf8, help="a system message before PROMPT")
    chat.add_argument(
        "--prefill",
        metavar="TEXT",
        type=utf8,
        help="what the answer begins with; it is shown as a part of the answer",
    )
    add_variables(chat)


def add_variables(chat: argparse._ActionsContainer) -> None:
    """Declare what the template is told."""
    add = chat.add_argument
    add(
        "--no-thinking",
        action="store_true",
        help="answer without reasoning first, where the template has a switch for that",
    )
    add(
        "--var",
        metavar="NAME=VALUE",
        type=_variable,
        action="append",
        default=[],
        help="a variable that the template documents, such as reasoning_effort=low; VALUE is JSON, or else a"
        " text; may be repeated",
    )


def _variable(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``, the value as JSON where it is."""
    name, equals, given = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    value: Any = given
    with suppress(ValueError, RecursionError):
        value = json.loads(given, parse_constant=lambda constant: constant)
    try:
        checked_variables({name: value})
    except MessageError:
        raise argparse.ArgumentTypeError(f"{name} is not a template's to be told; sllm sets it") from None
    return name, value


def check_chat(args: argparse.Namespace) -> None:
    """Refuse what does not go together, before a model is loaded.

    Raises:
        CommandError: an option that needs another one, or excludes it.

    """
    given = {
        "--system": args.system is not None,
        "--prefill": args.prefill is not None,
        "--no-thinking": args.no_thinking,
        "--var": bool(args.var),
    }
    needing = [option for option, is_given in given.items() if is_given]
    if needing and not args.chat:
        raise CommandError(f"{needing[0]} is for a chat: add --chat, and PROMPT is a message")
    if args.prefill == "":
        raise CommandError("--prefill is empty")
    check_variables(args)


def check_variables(args: argparse.Namespace) -> None:
    """Refuse a variable that is given twice.

    Raises:
        CommandError: one is.

    """
    names = [name for name, _ in args.var]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise CommandError(f"--var {twice} is given twice")


def chat_prompt(args: argparse.Namespace, model: sllm.Model, text: str) -> npt.NDArray[np.int32]:
    """The prompt of a chat whose last message by the user is ``text``.

    Raises:
        CommandError: as :func:`template_variables`.
        UnsupportedModelError: as :meth:`sllm.Model.chat`.

    """
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages.append({"role": "user", "content": text})
    if args.prefill is not None:
        messages.append({"role": "assistant", "content": args.prefill})
    variables = template_variables(args, model.chat_template)
    return model.chat(messages, variables=variables, continue_final_message=args.prefill is not None)


def template_variables(args: argparse.Namespace, template: str | None) -> dict[str, Any]:
    """What this chat template is told.

    Raises:
        CommandError: ``--no-thinking`` where the template has no switch for that, or ``--var`` sets it too.

    """
    variables = dict(args.var)
    if args.no_thinking:
        off = thinking_off(template)
        if not off:
            raise CommandError(
                "--no-thinking: the model's chat template has no switch for reasoning that is known; if it"
                " documents one, set it by --var"
            )
        both = sorted(off.keys() & variables.keys())
        if both:
            raise CommandError(f"--no-thinking and --var {both[0]} exclude each other")
        variables |= off
    return variables
