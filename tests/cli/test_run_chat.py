"""``sllm run --chat``: a system message, a prefilled answer, the template's variables, reasoning shown."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import pytest
from chat_models import with_templates
from processes import ONE

import sllm
from sllm import embedded
from sllm.cli import chat_arguments, console
from sllm.cli.console import CommandError
from sllm.cli.run_report import ShownText
from sllm.engine import exact

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ [enable_thinking, mood] | tojson }}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def parsed(*args: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--chat", action="store_true")
    chat_arguments.add_chat(parser)
    return parser.parse_args(["--chat", *args])


def prompt(path: pathlib.Path, *args: str, template: str = TEMPLATE) -> str:
    """The prompt that these arguments make of a message."""
    with_templates(path / "m.gguf", {"tokenizer.chat_template": template})
    given = parsed(*args)
    chat_arguments.check_chat(given)
    with sllm.Model(path / "m.gguf", vocab_only=True) as model:
        tokens = chat_arguments.chat_prompt(given, model, "hi")
        return model.vocab.decode(tokens, special=True)


def test_the_prompt(tmp_path: pathlib.Path) -> None:
    asked = "<|im_start|>user\nhi<|im_end|>\n"
    template = TEMPLATE.replace("[enable_thinking, mood]", "[enable_thinking is defined, mood is defined]")
    assert prompt(tmp_path, template=template) == asked + "[false, false]<|im_start|>assistant\n"
    told = ("--system", "Be brief.", "--no-thinking", "--var", "mood=calm")
    assert prompt(tmp_path, *told) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + asked + '[false, "calm"]<|im_start|>assistant\n'
    )
    begun = prompt(tmp_path, *told[2:], "--prefill", "Once upon")
    assert begun == asked + "<|im_start|>assistant\nOnce upon"


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("calm", '"calm"'),
        ("", '""'),
        ("a=b", '"a=b"'),
        ("true", "true"),
        ("null", "null"),
        ('"true"', '"true"'),
        ("1.50", "1.5"),
        ('{"a": [1]}', '{"a": [1]}'),
        ("NaN", '"NaN"'),
        ("[" * 100_000, '"' + "[" * 100_000 + '"'),
        ("狐狸", '"狐狸"'),
    ],
)
def test_values_of_variables(tmp_path: pathlib.Path, given: str, value: str) -> None:
    args = ("--var", f"mood={given}", "--var", "enable_thinking=true")
    assert f"[true, {value}]" in prompt(tmp_path, *args)


@pytest.mark.parametrize("name", ["enable_thinking", "thinking", "thinking_mode", "thinking_budget"])
def test_the_switch_is_the_one_that_the_template_has(tmp_path: pathlib.Path, name: str) -> None:
    off = {"thinking_mode": '"disabled"', "thinking_budget": "0"}.get(name, "false")
    template = f"{{{{ {name} | tojson }}}}{{% set thinking_option = 1 %}}{{{{ thinking_option }}}}"
    assert prompt(tmp_path, "--no-thinking", template=template) == off + "1"


def test_what_does_not_go_together(tmp_path: pathlib.Path) -> None:
    for args in (["--system", "x"], ["--prefill", "x"], ["--no-thinking"], ["--var", "x=y"]):
        given = parsed(*args)
        given.chat = False
        with pytest.raises(CommandError, match=f"^{args[0]} is for a chat: add --chat"):
            chat_arguments.check_chat(given)
    with pytest.raises(CommandError, match="--prefill is empty"):
        chat_arguments.check_chat(parsed("--prefill", ""))
    with pytest.raises(CommandError, match="--var x is given twice"):
        chat_arguments.check_chat(parsed("--var", "x=1", "--var", "x=2"))
    with pytest.raises(CommandError, match="--no-thinking and --var enable_thinking exclude each other"):
        prompt(tmp_path, "--no-thinking", "--var", "enable_thinking=true")
    with pytest.raises(CommandError, match="--no-thinking: the model's chat template has no switch"):
        prompt(tmp_path, "--no-thinking", template="{{ messages[0].content }}")
    for wrong, words in (
        ("x", "'x' is not NAME=VALUE"),
        ("=x", "'=x' is not NAME=VALUE"),
        ("a b=x", "'a b=x' is not NAME=VALUE"),
        ("messages=[]", "messages is not a template's to be told; sllm sets it"),
        ("bos_token=x", "bos_token is not a template's"),
        ("strftime_now=x", "strftime_now is not a template's"),
    ):
        with pytest.raises(argparse.ArgumentError, match=words):
            parsed("--var", wrong)


def test_prefill_is_a_part_of_the_answer(command: Callable[..., Any], refused: Callable[..., str]) -> None:
    args = ("--chat", *ONE, "-n", "16", "--temperature", "0", "--prefill", "Once upon a", "Tell me a story.")
    ended = command("run", *args)
    assert (ended.returncode, ended.stderr) == (0, "")
    with sllm.LocalTarget(embedded.TARGET, n_threads=1, **exact.SETTINGS) as target:
        talk = [
            {"role": "user", "content": "Tell me a story."},
            {"role": "assistant", "content": "Once upon a"},
        ]
        told = sllm.generate(
            target,
            target.chat(talk, continue_final_message=True),
            sampling=sllm.SamplingParams(temperature=0),
            max_tokens=16,
        ).text()
    assert ended.stdout == f"Once upon a{told}\n"
    assert told.strip()
    assert refused("run", "--prefill", "x", "hi").startswith("--prefill is for a chat")


def test_reasoning_can_be_told_apart_on_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    def show(**more: bool) -> str:
        out = console.Output()
        for name, value in more.items():
            setattr(out, name, value)
        answer = ShownText(out)
        local = (sllm.Run(0, (1,), "a do", 0, "local"),)
        for one in (
            sllm.Run(0, (1,), "<think>", 0, "target", kind="control"),
            sllm.Run(0, (1,), "\nhm", 0, "target", kind="reasoning"),
            *local,
            sllm.Run(0, (1,), "</think>", 0, "target", local, kind="control"),
            sllm.Run(0, (1,), "yes\n", 0, "target"),
        ):
            answer.add(one)
        return capfd.readouterr().out

    assert show() == "<think>\nhm</think>yes\n"
    begin, end = console.DIM_ITALIC, "\x1b[0m"
    assert show(terminal=True, colour=True) == (
        f"{begin}<think>{end}{begin}\nhm{end}{console.DIM}a do{end}\n{begin}hm{end}{begin}</think>{end}yes\n"
    )
