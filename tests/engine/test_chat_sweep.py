"""Our texts are those of transformers, for templates that use what the field uses and conversations of each
kind.

Where transformers is not installed (the extra ``chat-test``), the environment that its documentation gives
stands for it.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
from chat_sweep import CONVERSATIONS, TEMPLATES
from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sllm.engine.chat_template import render, segments
from sllm.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from jinja2.parser import Parser

TOKENS: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "[INST]",
    "<|channel|>",
    "<|message|>",
]


class Generation(Extension):
    """``{% generation %}`` as a call block, which is a scope."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller: Callable[[], str]) -> str:
        return caller()


def by_its_documentation(template: str, given: dict[str, Any]) -> str:
    """What the environment of transformers' documentation makes of a conversation."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    messages = []
    for given_message in given["messages"]:
        message = {key: value for key, value in given_message.items() if value is not None}
        names = ("reasoning_content", "thinking", "reasoning")
        thought = next((message[name] for name in names if name in message), None)
        if thought is not None:
            message = {"thinking": thought, **message, "reasoning_content": thought}
        messages.append(message)
    goes_on = given.get("continue_final_message")
    if goes_on:  # only what this sweep needs of it: the texts stand in the prompt once
        field = "content" if goes_on is True else goes_on
        for name in ("content",) if goes_on is True else ("reasoning_content", "thinking"):
            messages[-1][name] = (
                messages[-1][field].removesuffix("CONTINUE_FINAL_MESSAGE_TAG ")
                + "CONTINUE_FINAL_MESSAGE_TAG "
            )
    text = environment.from_string(template).render(
        messages=messages,
        tools=given.get("tools"),
        add_generation_prompt=given.get("add_generation_prompt", True) and not goes_on,
        **{"documents": None, **given.get("variables", {}), **TOKENS},
    )
    if not goes_on:
        return text
    before, mark, after = text.rpartition("CONTINUE_FINAL_MESSAGE_TAG")
    last = given["messages"][-1]["content" if goes_on is True else goes_on]
    if not mark or last.strip() not in text:
        raise TemplateError("the last message is not there")
    return before if after.startswith(" ") else before.rstrip()


def by_transformers(template: str, given: dict[str, Any]) -> str:
    """What ``transformers.PreTrainedTokenizerFast.apply_chat_template`` makes of a conversation."""
    tokenizers: Any = importlib.import_module("tokenizers")
    transformers: Any = importlib.import_module("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0}, "x"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **TOKENS)
    goes_on = given.get("continue_final_message", False)
    text: str = tokenizer.apply_chat_template(
        copy.deepcopy(given["messages"]),
        tools=given.get("tools"),
        chat_template=template,
        add_generation_prompt=given.get("add_generation_prompt", True) and not goes_on,
        continue_final_message=goes_on,
        tokenize=False,
        **given.get("variables", {}),
    )
    return text


@pytest.fixture(params=["documentation", "transformers"])
def oracle(request: pytest.FixtureRequest) -> Callable[[str, dict[str, Any]], str]:
    """Who says what a text has to be."""
    if request.param == "documentation":
        return by_its_documentation
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed (pip install 'sllm[chat-test]')")
    return by_transformers


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str, oracle: Callable[[str, dict[str, Any]], str]) -> None:
    template, n_rendered = TEMPLATES[name], 0
    for title, given in CONVERSATIONS.items():
        options = {key: value for key, value in given.items() if key not in ("messages", "parts")}
        before = copy.deepcopy(given)
        try:
            wanted = oracle(template, given)
        except Exception as error:  # noqa: BLE001 - whatever it is, we must refuse it, too, or do better
            wanted = None
            reason = error
        found = ours(template, given["messages"], options)
        assert given == before
        if wanted is not None and "final_message_tag" in wanted.casefold():
            # The template prints the message that goes on more than once: transformers leaves its tag there.
            assert isinstance(found, UnsupportedModelError) or "FINAL_MESSAGE" not in found.upper()
            continue
        if isinstance(found, UnsupportedModelError):
            assert wanted is None, f"{title}: {found}"
            continue
        if wanted is None:
            assert may_be_better(given, reason), f"{title}: {reason!r}, and ours is {found!r}"
            continue
        if given.get("parts") and name != "parts of a content":
            continue  # a template that knows texts only gets the parts joined
        assert found == wanted, title
        n_rendered += 1
        cut = segments(template, given["messages"], SPECIAL, **TOKENS, **options)
        assert "".join(text for text, _ in cut) == wanted
    assert n_rendered >= 8


def ours(template: str, messages: Any, options: dict[str, Any]) -> str | UnsupportedModelError:
    try:
        return render(template, messages, **TOKENS, **options)
    except UnsupportedModelError as error:
        return error


def may_be_better(given: dict[str, Any], reason: Exception) -> bool:
    """Whether ours may render what the oracle does not: messages in a form that this template does not take,
    and gets from us in one that it does.
    """
    form = any(not isinstance(m.get("content"), str) for m in given["messages"])
    return form or "not an accepted field" in str(reason)


def test_the_templates_use_what_the_field_uses() -> None:
    """Names that published templates use; each must stand in a template of the sweep."""
    used = "\n".join(TEMPLATES.values())
    for name in [
        *(
            "namespace(",
            "raise_exception(",
            "strftime_now(",
            "range(",
            "dict(",
            "caller()",
            "{% call",
            "{% macro",
        ),
        *(
            "{% generation",
            "{% break",
            "{% continue",
            "{% filter",
            "{% set head %}",
            "{% with",
            "{% raw",
            "{%+",
        ),
        *(
            "recursive",
            "loop.first",
            "loop.last",
            "loop.index",
            "loop.index0",
            "loop.length",
            "loop.revindex",
        ),
        *("loop.previtem", "loop.nextitem", "loop.cycle", "tojson(indent=", "ensure_ascii=", "separators="),
        *(
            "| items",
            "| dictsort",
            "selectattr(",
            "rejectattr(",
            "map(attribute=",
            "map('",
            "| join(",
            "| unique",
        ),
        *(
            "| sort(attribute=",
            "groupby(",
            "| default(",
            "| trim",
            "| indent(",
            "| safe",
            "| length",
            "| list",
        ),
        *("is defined", "is undefined", "is none", "is string", "is mapping", "is iterable", "is sequence"),
        *(
            "is boolean",
            "is number",
            "is false",
            "is true",
            "not in",
            ".split(",
            ".strip(",
            ".lstrip(",
            ".rstrip(",
        ),
        *(
            ".startswith(",
            ".endswith(",
            ".replace(",
            ".items()",
            ".keys()",
            ".get(",
            ".format(",
            "[::-1]",
            "[1:]",
        ),
        *("reasoning_content", "tool_calls", "tool_call_id", "enable_thinking", "documents", "date_string"),
        *("add_generation_prompt", "bos_token", "eos_token", "tools", " ~ "),
    ]:
        assert name in used, name
