"""The turns of a conversation: messages are no prompt, each turn costs what is new in it, and a turn that is
cancelled leaves the target to the next one.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from oracles import EXACT

from sllm import CancelledError, LocalTarget, Run, SamplingParams, Worker, connect, embedded, generate
from sllm.generation.text_stream import RunStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from sllm.engine.model import Model


def test_messages_for_a_prompt(target_model: Model) -> None:
    message = {"role": "user", "content": "Hi"}
    with pytest.raises(TypeError, match=r"a list of messages, .*: use model\.chat\(messages\)"):
        generate(target_model, [message])  # type: ignore[list-item]
    with LocalTarget(target_model, n_ctx=256, **EXACT) as target:
        with pytest.raises(TypeError, match=r"a list of messages, .*: use target\.chat\(messages\)"):
            generate(target, (message, message))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"a message, .*: use target\.chat\(\[message\]\)"):
            generate(target, message)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["big.gguf", "Hi"], r"target is 'big.gguf', expected .*; sllm\.Model\('big.gguf'\) opens a file"),
        ([embedded.TARGET, "Hi"], r"; sllm\.Model\('.*target.gguf'\) opens a file"),
        ([None, None], r"the prompt is NoneType, expected a text \(str\) or token ids"),
        ([None, b"Hi"], r"the prompt is bytes, expected a text \(str\) or token ids"),
        ([None, "Hi", "small.gguf"], r"draft is 'small.gguf', .* None; sllm\.Model\('small.gguf'\) opens"),
        ([None, "Hi", embedded.DRAFT], r"draft is .*; sllm\.Model\('.*draft.gguf'\) opens a file"),
    ],
)
def test_a_file_for_a_model_and_other_slips(target_model: Model, arguments: list[Any], words: str) -> None:
    target, prompt, *draft = arguments
    with pytest.raises((TypeError, ValueError), match=words):
        generate(target or target_model, prompt, draft=draft[0] if draft else None)


def test_a_connection_for_its_target() -> None:
    with (
        Worker(embedded.DRAFT) as worker,
        connect(worker.uri) as remote,
        pytest.raises(TypeError, match=r"; its target\(\) is one"),
    ):
        generate(remote, "Hi")  # type: ignore[arg-type]


def test_a_conversation_costs_what_is_new(target_model: Model) -> None:
    talk = [{"role": "user", "content": "Tell me a story about a fox."}]
    with LocalTarget(target_model, n_ctx=512, **EXACT) as target:
        first = generate(target, target.chat(talk), max_tokens=30)
        assert first.message == {"role": "assistant", "content": ""}
        assert first.text() == first.message["content"]
        talk.append(first.message)
        assert first.stats.n_reused == 0
        talk.append({"role": "user", "content": "Why?"})
        second = generate(target, target.chat(talk), max_tokens=30)
        text = second.text()
        # All of the first prompt and of its answer, but for what begins the template's end of the turn.
        assert second.stats.n_reused >= first.stats.n_prompt + first.stats.n_tokens - 1
        assert second.stats.n_reused < second.stats.n_prompt
    # It is the text that a target without a past writes.
    with LocalTarget(target_model, n_ctx=512, **EXACT) as target:
        anew = generate(target, target.chat(talk), max_tokens=30)
        assert (anew.text(), anew.stats.n_reused) == (text, 0)


def cancelled_soon(cancel: Callable[[], None], work: Callable[[], object]) -> None:
    """Cancels what another thread does until it ends, as it may not have begun."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        began = time.monotonic()
        while not future.done() and time.monotonic() - began < 120:
            time.sleep(0.02)
            cancel()
        assert isinstance(future.exception(), CancelledError)


def test_a_prompt_is_cancelled_while_it_is_computed(target_model: Model) -> None:
    with LocalTarget(target_model, n_ctx=32768, n_threads=1) as target:
        prompt = target.vocab.encode("word and other words. " * 4000)
        cancelled_soon(target.cancel, lambda: generate(target, prompt))
        assert generate(target, "Once upon a time", max_tokens=4).text()


def test_a_stream_is_cancelled_by_another_thread(target_model: Model, draft_model: Model) -> None:
    with LocalTarget(target_model, n_ctx=4096, n_threads=1) as target:
        endless = SamplingParams(grammar='root ::= "again " root')
        with generate(target, "Once", draft=draft_model, sampling=endless) as stream:
            next(stream)
            cancelled_soon(stream.cancel, stream.text)
        stream.cancel()  # one that has ended
        assert generate(target, "Once upon a time", max_tokens=4).text()


def test_a_message_holds_what_was_said() -> None:
    def run(text: str, kind: str = "text", source: str = "target", withdrawn: tuple[Run, ...] = ()) -> Run:
        return Run(0, (1,), text, 0, source, withdrawn, kind)  # type: ignore[arg-type]

    local = (run("a do", source="local"), run("g", source="local"))
    runs = [
        *(run("<think>", "control"), run("hm", "reasoning"), run("</think>", "control"), run("It is ")),
        *(*local, run("a fox", withdrawn=local), run(".", source="local")),
    ]
    stream = RunStream(iter(runs), ExitStack())
    for _ in range(2):
        next(stream)
    assert stream.message == {"role": "assistant", "content": "", "reasoning_content": "hm"}
    assert stream.text() == "</think>It is a fox."
    said = {"role": "assistant", "content": "It is a fox", "reasoning_content": "hm"}
    assert stream.message == said
