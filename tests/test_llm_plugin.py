"""The plugin for the ``llm`` command (examples/llm-plugin), with the real one where it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from chat_models import with_templates
from oracles import EXACT
from processes import environment

import sllm
from sllm import embedded

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("LLM_LOAD_PLUGINS", "")  # those of others may need what is not installed
    llm = pytest.importorskip("llm", reason="llm is not installed")
    from click.testing import CliRunner
    from llm.cli import cli
    from llm.plugins import pm

if TYPE_CHECKING:
    from collections.abc import Iterator

PLUGIN = Path(__file__).parents[1] / "examples" / "llm-plugin"
ASK = "Tell me a story."
pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plugin in llm, as its entry point would have it, with a folder of its own."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.delenv("SLLM_REMOTE", raising=False)
    monkeypatch.syspath_prepend(str(PLUGIN))
    import llm_sllm

    pm.register(llm_sllm)
    llm_sllm.register_commands(cli)
    yield llm_sllm
    llm_sllm.close_all()
    pm.unregister(llm_sllm)
    cli.commands.pop("sllm")
    del sys.modules["llm_sllm"]


def run(*args: str, fails: bool = False) -> str:
    result = CliRunner().invoke(cli, list(args), catch_exceptions=False)
    assert (result.exit_code != 0) == fails, result.output
    return str(result.output)


def expected(model: sllm.Model, messages: list[dict[str, str]], n: int = 24, **params: Any) -> str:
    sampling = sllm.SamplingParams(**params)
    return sllm.generate(model, model.chat(messages), sampling=sampling, max_tokens=n).text()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_the_embedded_pair(target_model: sllm.Model, temperature: float) -> None:
    model = llm.get_model("sllm")
    response = model.prompt(ASK, system="Be brief.", temperature=temperature, seed=3, max_tokens=24)
    chunks = list(response)
    messages = [{"role": "system", "content": "Be brief."}, user(ASK)]
    assert "".join(chunks) == expected(target_model, messages, temperature=temperature, seed=3)
    assert len(chunks) > 3
    assert response.input_tokens == len(target_model.chat(messages)) and response.output_tokens == 24
    said = response.response_json
    assert (said["finish_reason"], said["seed"]) == ("length", 3)
    assert said["passes"] < 24  # a draft helps


def test_a_conversation_costs_what_is_new(target_model: sllm.Model, plugin: Any) -> None:
    conversation = llm.get_model("sllm").conversation()
    options = {"temperature": 0, "max_tokens": 24}
    first = conversation.prompt(ASK, **options).text()
    target, _ = plugin.opened(plugin.Place())
    before = target.context.memory.tokens(0).tolist()
    second = conversation.prompt("And then?", **options).text()
    told = [user(ASK), {"role": "assistant", "content": first}, user("And then?")]
    assert second == expected(target_model, told, temperature=0)
    n_kept = len(target_model.chat([user(ASK)]))
    assert target.context.memory.tokens(0).tolist()[:n_kept] == before[:n_kept]


def test_the_command_goes_on_with_a_conversation(target_model: sllm.Model) -> None:
    options = ("-o", "temperature", "0", "-o", "max_tokens", "16")
    first = run("-m", "sllm", ASK, *options)
    assert first == expected(target_model, [user(ASK)], 16, temperature=0) + "\n"
    told = [user(ASK), {"role": "assistant", "content": first[:-1]}, user("And then?")]
    assert run("-c", "And then?", *options) == expected(target_model, told, 16, temperature=0) + "\n"


def test_files_are_added(tmp_path: Path, target_model: sllm.Model) -> None:
    run("sllm", "add", "mine", str(embedded.TARGET), "--draft", str(embedded.DRAFT))
    run("sllm", "add", "hubs", "owner/repo:Q4_K_M")
    assert run("sllm", "list").splitlines() == [
        f"mine: {embedded.TARGET}, draft {embedded.DRAFT}",
        "hubs: owner/repo:Q4_K_M",
    ]
    text = llm.get_model("mine").prompt(ASK, temperature=0, max_tokens=12).text()
    assert text == expected(target_model, [user(ASK)], 12, temperature=0)
    run("sllm", "remove", "mine")
    assert "was not added" in run("sllm", "remove", "mine", fails=True)
    assert "is there already" in run("sllm", "add", "sllm", "x.gguf", fails=True)
    with pytest.raises(llm.UnknownModelError):
        llm.get_model("mine")


def test_a_worker(tmp_path: Path, target_model: sllm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(llm.UnknownModelError):
        llm.get_model("sllm-remote")
    with sllm.Worker(target_model, insecure=True, n_ctx=512, **EXACT) as worker:
        (tmp_path / "line").write_text(worker.uri + "\n")
        for given in (worker.uri, f"@{tmp_path / 'line'}"):
            monkeypatch.setenv("SLLM_REMOTE", given)
            model = llm.get_model("sllm-remote")
            text = model.prompt(ASK, temperature=0.9, seed=5, max_tokens=16).text()
            assert text == expected(target_model, [user(ASK)], 16, temperature=0.9, seed=5)
        sys.modules["llm_sllm"].close_all()
    monkeypatch.setenv("SLLM_REMOTE", "nothing")
    with pytest.raises(llm.ModelError, match="holds no sllm:// line"):
        llm.get_model("sllm-remote").prompt(ASK).text()


def test_a_schema_is_kept_to() -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]}
    schema["additionalProperties"] = False
    text = llm.get_model("sllm").prompt(ASK, schema=schema, max_tokens=64, temperature=0).text()
    assert set(json.loads(text)) == {"b"}


def test_reasoning_is_streamed_as_such(tmp_path: Path, plugin: Any) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n<think>{# </think> #}"
    )
    path = with_templates(tmp_path / "m.gguf", {"tokenizer.chat_template": template}, weights=True)
    response = plugin.Sllm("x", plugin.Place(str(path))).prompt(ASK, max_tokens=6, temperature=0)
    kinds = {event.type for event in response.stream_events()}
    assert kinds == {"reasoning"} and response.text() == ""


def test_wrong_options_are_told() -> None:
    assert "temperature" in run("-m", "sllm", ASK, "-o", "temperature", "-1", fails=True)


def test_the_package_names_the_plugin() -> None:
    text = (PLUGIN / "pyproject.toml").read_text()
    assert '[project.entry-points.llm]\nsllm = "llm_sllm"' in text
    assert 'py-modules = ["llm_sllm"]' in text


def test_a_process_ends_without_a_word(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(PLUGIN)!r}); import llm, llm_sllm;"
        " print(llm_sllm.Sllm('x', llm_sllm.Place()).prompt('Hi', max_tokens=3).text() != '')"
    )
    env = environment(LLM_USER_PATH=str(tmp_path), LLM_LOAD_PLUGINS="")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (ended.stdout.strip(), ended.stderr, ended.returncode) == ("True", "", 0)
