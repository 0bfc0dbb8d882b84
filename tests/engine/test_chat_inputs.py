"""Tools, variables, prefilled answers, and messages in the forms that programs send them."""

from __future__ import annotations

import doctest
import json
from typing import TYPE_CHECKING, Any

import pytest
from chat_models import with_templates

import sllm
from sllm.engine.chat_template import render, segments
from sllm.errors import UnsupportedModelError

if TYPE_CHECKING:
    from pathlib import Path

ARGUMENTS = {"city": "北京", "days": 2, "note": None, "tags": ["a", {"b": True}]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

AS_JSON = "{{ call.function.arguments | tojson }}"
AS_TEXT = "{{ '' + call.function.arguments }}"
AS_ITEMS = "{% for key, value in call.function.arguments.items() %}[{{ key }}={{ value }}]{% endfor %}"
AS_EITHER = (
    "{% set a = call.function.arguments %}{% if a is string %}{{ a }}{% else %}{{ a | tojson }}{% endif %}"
)


def with_calls(arguments: str, content: str = "{{ m.content or '' }}") -> str:
    """A template that prints tool calls in one of the ways above."""
    return (
        "{% for m in messages %}<{{ m.role }}>"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}:" + arguments + "{% endfor %}"
        "{% if not m.tool_calls %}" + content + "{% endif %}{% endfor %}"
    )


def talk(arguments: Any, **more: Any) -> list[dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call], **more}]


# ---- keys that are null


def test_a_key_that_is_null_is_absent() -> None:
    template = (
        "{% for m in messages %}{{ m.keys() | list }}"
        "{% if m.name is defined %}name{% endif %}{% if 'tool_calls' in m %}calls{% endif %}{% endfor %}"
    )
    message = {"role": "user", "content": "x", "name": None, "tool_calls": None, "refusal": None}
    assert render(template, [message]) == "['role', 'content']"
    assert message["name"] is None  # what was given is left alone


def test_a_null_within_arguments_and_schemas_stays() -> None:
    assert '"note": null' in render(with_calls(AS_JSON), talk(ARGUMENTS))
    tool = {"type": "function", "function": {"name": "f", "default": None}}
    assert '"default": null' in render("{{ tools | tojson }}", talk({}), tools=[tool])


@pytest.mark.parametrize(
    ("template", "printed"),
    [
        ("{{ m.content if m.content is defined else 'absent' }}", "absent"),
        ("{% if m.content is none %}none{% else %}{{ m['content'] + '' }}{% endif %}", "none"),
        ("[{{ m.content.strip() }}]", "[]"),
        ("[{{ m.content + '' }}]", "[]"),
    ],
)
@pytest.mark.parametrize("given", [{}, {"content": None}])
def test_no_content_beside_tool_calls_is_what_the_template_can_print(
    template: str, printed: str, given: dict[str, Any]
) -> None:
    whole = (
        "{% for m in messages %}{% if m.tool_calls %}" + template + "{% for call in m.tool_calls %}"
        "{{ call.function.name }}" + AS_JSON + "{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert render(whole, talk({}, **given)) == "?" + printed + "weather{}"


def test_a_template_that_tells_calls_by_a_null_content_gets_it_for_an_empty_one() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' and m['content'] is none %}"
        "{% for call in m.tool_calls %}{{ call.function.name }}" + AS_JSON + "{% endfor %}"
        "{% elif m.role == 'assistant' %}{{ m['content'] + '.' }}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    for content in ({}, {"content": None}, {"content": ""}):
        assert render(template, talk({}, **content)) == "?weather{}"
    assert render(template, [{"role": "assistant", "content": ""}]) == "."


def test_a_template_without_tool_calls_gets_a_content() -> None:
    assert render("{% for m in messages %}<{{ m.content + '' }}>{% endfor %}", talk({})) == "<?><>"


def test_reasoning_has_three_names() -> None:
    for name in ("reasoning_content", "thinking", "reasoning"):
        message = {"role": "assistant", "content": "x", name: "hm"}
        for shown in ("reasoning_content", "thinking"):
            assert render("{{ messages[0]." + shown + " }}", [message]) == "hm"
    alone = [{"role": "assistant", "content": None, "reasoning_content": "hm"}]
    assert render("{{ messages[0].reasoning_content }}{{ messages[0].content }}", alone) == "hm"
    with pytest.raises(ValueError, match="None only beside 'tool_calls' or 'reasoning_content'"):
        render("x", [{"role": "assistant", "content": None, "reasoning_content": None}])


# ---- arguments of tool calls


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": "hm"}])
@pytest.mark.parametrize("as_text", [False, True])
def test_arguments_come_in_the_form_that_the_template_prints(as_text: bool, content: dict[str, Any]) -> None:
    text = json.dumps(ARGUMENTS, ensure_ascii=False)
    messages = talk(text if as_text else ARGUMENTS, **content)
    wanted = "<user>?<assistant>weather:"
    for way in (AS_JSON, AS_TEXT, AS_EITHER):
        assert render(with_calls(way), messages) == wanted + text
    shown = "[city=北京][days=2][note=None][tags=['a', {'b': True}]]"
    assert render(with_calls(AS_ITEMS), messages) == wanted + shown
    assert messages == talk(text if as_text else ARGUMENTS, **content)


def test_a_template_that_prints_both_forms_gets_the_text_as_it_was() -> None:
    spaced = '{ "city":"x",  "n":1.0 }'
    assert render(with_calls(AS_EITHER), talk(spaced)).endswith(spaced)
    assert render(with_calls(AS_JSON), talk(spaced)).endswith('{"city": "x", "n": 1.0}')


@pytest.mark.parametrize("text", ["not JSON", "[1]", '"x"', "{" * 100_000, '{"a": 1'])
def test_arguments_that_are_no_object_stay_as_they_are(text: str) -> None:
    assert render(with_calls(AS_TEXT), talk(text)).endswith(text)
    assert render(with_calls(AS_JSON), talk(text)).endswith(json.dumps(text))


def test_no_arguments_at_all() -> None:
    assert render(with_calls(AS_JSON), talk("")).endswith("weather:{}")
    assert render(with_calls(AS_JSON), talk(" \n")).endswith("weather:{}")


def test_calls_without_a_function_around_them() -> None:
    flat = {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": '{"a": 1}'}]}
    shown = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set c = c.function or c %}"
        "{{ c.name }}{{ c.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    assert render(shown, [flat]) == 'weather{"a": 1}'
    odd = {"role": "assistant", "content": "", "tool_calls": ["x", 1]}
    assert render("{{ messages[0].tool_calls }}", [odd]) == "['x', 1]"


def test_what_is_parsed_is_guarded() -> None:
    hidden = r'{"city": "\u003c|im_end|\u003e"}'
    for way, shown in ((AS_JSON, '{"city": "<|im_end|>"}'), (AS_ITEMS, "[city=<|im_end|>]")):
        cut = segments(with_calls(way), talk(hidden), ["<|im_end|>"])
        assert "".join(text for text, _ in cut).endswith(shown)
        assert ("<|im_end|>", False) in cut


# ---- variables


def test_variables() -> None:
    template = "{{ enable_thinking }} {{ documents[0].title }} {{ date_string }}"
    given = {"enable_thinking": False, "documents": [{"title": "t"}], "date_string": "1 Jan"}
    assert render(template, [{"role": "user", "content": "x"}], variables=given) == "False t 1 Jan"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ([1], "variables is a list; expected a mapping"),
        ("x", "variables is a str"),
        ({1: "x"}, "variables has the key 1"),
        ({"": "x"}, "variables has the key ''"),
        ({"sllm budget": "x"}, "variables has the key 'sllm budget'"),
        ({"x": object()}, r"variables\['x'\] is an object"),
        ({"x": {"y": b"z"}}, r"variables\['x'\]\['y'\] is a bytes"),
        *[
            ({name: "x"}, f"variables holds '{name}', which is an argument of its own")
            for name in ("messages", "tools", "bos_token", "eos_token", "add_generation_prompt")
        ],
        ({"continue_final_message": True}, "variables holds 'continue_final_message'"),
        *[
            ({name: "x"}, f"variables holds '{name}', which every template is given already")
            for name in ("raise_exception", "strftime_now", "namespace", "range")
        ],
    ],
)
def test_variables_that_are_refused(variables: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        render("x", [{"role": "user", "content": "x"}], variables=variables)


# ---- a last message that goes on

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
REASONED = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}</s>{% endfor %}"
)


def begun(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": content, **more}]


def test_the_prompt_ends_with_the_last_message() -> None:
    wanted = "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    own = "CONTINUE_FINAL_MESSAGE_TAG"
    for content in ("Once", "Once ", "", "<|im_end|>", f"{own} x", f"{own} {own}_1 {own} "):
        assert render(CHATML, begun(content), continue_final_message=True) == wanted + content
        cut = segments(CHATML, begun(content), ["<|im_start|>", "<|im_end|>"], continue_final_message=True)
        assert "".join(text for text, _ in cut) == wanted + content
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]
    assert render(CHATML, begun(parts), continue_final_message=True) == wanted + "a\nb "
    template = "{{ add_generation_prompt }} {{ messages[-1].content }}"
    assert render(template, begun("Once"), continue_final_message=True) == "False Once"
    # a template that trims what it prints trims this, too
    assert render(TRIMMED, begun(" Once "), continue_final_message=True) == "<user>?</s><assistant>Once"


def test_reasoning_can_go_on() -> None:
    for name in ("reasoning_content", "thinking", "reasoning"):
        messages = begun("", **{name: "Let me"})
        shown = render(REASONED, messages, continue_final_message=name)
        assert shown == "<user>?</s><assistant><think>Let me"


def test_a_template_that_prints_the_message_twice() -> None:
    twice = "{{ messages[-1].content }}|{{ messages[-1].content | trim }}|{{ messages[-1].content }}</s>"
    assert render(twice, begun("Once "), continue_final_message=True) == "Once |Once |Once "


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}{% endfor %}",  # drops it
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content[:2] }}{% endfor %}",
        "{% for m in messages %}{{ m.content | replace('_', '-') }}{% endfor %}",
    ],
)
def test_a_message_that_the_template_drops_or_changes_cannot_go_on(template: str) -> None:
    for function in (
        lambda: render(template, begun("Once upon"), continue_final_message=True),
        lambda: segments(template, begun("Once upon"), ["O"], continue_final_message=True),
    ):
        with pytest.raises(UnsupportedModelError, match="drops or changes the last message's 'content'"):
            function()


@pytest.mark.parametrize(
    ("messages", "continued", "words"),
    [
        (
            [{"role": "user", "content": "x"}],
            True,
            r"messages\[0\]\['role'\] is 'user'; continue_final_message",
        ),
        (
            begun(None, tool_calls=[{"function": {"name": "f"}}]),
            True,
            r"messages\[1\]\['content'\] has no text",
        ),
        (begun([]), True, "has no text"),
        (begun("x"), "reasoning_content", r"messages\[1\]\['reasoning_content'\] has no text"),
        (begun("x"), 1, "continue_final_message is an int"),
        (begun("x"), None, "continue_final_message is missing or None"),
        (begun("x"), "", "continue_final_message is an empty string"),
    ],
)
def test_what_cannot_go_on(messages: Any, continued: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        render(CHATML, messages, continue_final_message=continued)


# ---- a model


@pytest.mark.parametrize(
    ("templates", "default", "with_tools"),
    [
        ({"": "d"}, "d", "d"),
        ({"": "d", ".tool_use": "t"}, "d", "t"),
        ({".default": "d", ".tool_use": "t"}, "d", "t"),
        ({".tool_use": "t"}, "t", "t"),
        ({".rag": "r", ".chat": "c"}, "c", "c"),
        ({"": "d", ".default": "other", "s": "not one"}, "d", "d"),
        ({}, None, None),
    ],
)
def test_templates_by_name(
    tmp_path: Path, templates: dict[str, str], default: str | None, with_tools: str | None
) -> None:
    named = {f"tokenizer.chat_template{name}": text for name, text in templates.items()}
    messages = [{"role": "user", "content": "x"}]
    with sllm.Model(with_templates(tmp_path / "m.gguf", named), vocab_only=True) as model:
        assert model.chat_template == default
        assert "not one" not in model.chat_templates.values()
        if default is None or with_tools is None:
            with pytest.raises(UnsupportedModelError, match="has no chat template"):
                model.chat(messages)
            return
        assert model.vocab.decode(model.chat(messages)) == default
        assert model.vocab.decode(model.chat(messages, tools=[])) == default
        assert model.vocab.decode(model.chat(messages, tools=[TOOL])) == with_tools


def test_every_chat_takes_the_same(tmp_path: Path) -> None:
    """Model, target here, worker, and split: the same prompt from the same arguments."""
    template = (
        "{{ tools | tojson }}{{ mood }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}"
    )
    path = with_templates(tmp_path / "m.gguf", {"tokenizer.chat_template": template})
    given: Any = {"tools": [TOOL], "variables": {"mood": "calm"}, "continue_final_message": True}
    with sllm.Model(path, vocab_only=True) as model:
        prompt = model.chat(begun("Once"), **given)
        text = model.vocab.decode(prompt, special=True)
    assert text == json.dumps([TOOL]) + "calm<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\nOnce"
    given["variables"] = {}
    with (
        sllm.Worker(sllm.embedded.TARGET, layers=(2, 7)) as layers,
        sllm.connect(layers.uri) as middle,
        sllm.SplitTarget(sllm.embedded.TARGET, head=2, tail=1, middle=middle) as split,
        sllm.Worker(sllm.embedded.TARGET) as worker,
        sllm.connect(worker.uri) as remote,
        sllm.LocalTarget(sllm.embedded.TARGET) as local,
        sllm.LocalTarget(sllm.embedded.TARGET, isolated=True) as isolated,
    ):
        wanted = local.model.chat(begun("Once"), **given).tolist()
        for chat in (local.chat, isolated.chat, remote.chat, remote.target().chat, split.chat):
            assert chat(begun("Once"), **given).tolist() == wanted
            with pytest.raises(TypeError, match="nosuch"):
                chat(begun("Once"), nosuch=1)  # type: ignore[call-arg]
            with pytest.raises(ValueError, match="variables holds 'messages'"):
                chat(begun("Once"), variables={"messages": []})


def test_the_example_of_chat_runs() -> None:
    test = doctest.DocTestParser().get_doctest(sllm.Model.chat.__doc__ or "", {"sllm": sllm}, "chat", None, 0)
    shown: list[str] = []
    assert doctest.DocTestRunner().run(test, out=shown.append) == (0, len(test.examples)), "".join(shown)
