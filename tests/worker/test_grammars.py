"""Clients' grammars: hostile ones leave the others' texts alone, and nothing of them is written anywhere."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from hostile_grammars import HOSTILE
from oracles import EXACT, GREEDY, PLAIN, make_prompt, one_by_one, without_end
from raw_client import TOKEN, Client, Code, Stream, opening, wait_until

import sllm
from sllm import embedded
from sllm.worker.server import Limits, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    state: Path = tmp_path_factory.mktemp("state")
    limits = Limits(sessions=8, queue=8, max_grammar=1 << 17)
    with Worker(embedded.TARGET, state=state, limits=limits, n_ctx=256, token=TOKEN, **EXACT) as worker:
        yield worker


def test_hostile_ones_leave_the_others_alone(worker: Worker, target_model: sllm.Model) -> None:
    """Two honest texts, one of them by a schema, are at work until all hostile ones have ended."""
    samplings = [
        without_end(target_model, replace(PLAIN, seed=3)),
        replace(PLAIN, seed=4, json_schema=SCHEMA, temperature=0.7),
    ]
    prompt = make_prompt(target_model, 6, seed=3).tolist()
    wanted = [one_by_one(target_model, prompt, sampling, 60, n_ctx=256) for sampling in samplings]
    with Client(worker.address) as client, Client(worker.address) as hostile:
        waiting = list(HOSTILE.values())
        while waiting:
            some = [
                hostile.generate(
                    opening(prompt, replace(GREEDY, temperature=1.0, **waiting.pop()), 60, run_ahead=True)
                )
                for _ in range(min(6, len(waiting)))
            ]
            honest = [client.generate(opening(prompt, s, 60, run_ahead=True)) for s in samplings]
            for stream, text in zip(honest, wanted, strict=True):
                assert stream.run() == text
            for stream in some:
                assert end_of(stream) in (Code.OK, Code.INVALID_ARGUMENT, Code.ABORTED)
        assert client.info().features
    wait_until(lambda: not worker._scheduler.running())


def end_of(stream: Stream) -> grpc.StatusCode:
    """How a call ended that may fail."""
    try:
        stream.run()
    except grpc.RpcError as error:
        return error.code()
    return Code.OK


def test_nothing_of_a_grammar_is_written(
    worker: Worker, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), Client(worker.address) as client:
        for more in (
            {"grammar": "root ::= canary-one"},
            {"grammar": 'root ::= "canary-two'},
            {"grammar": 'root ::= "canary-three" [z-a]'},
            {"grammar": 'root ::= s "canary-four"\ns ::= s s s | . | ""'},
            {"json_schema": {"type": "canary-five"}},
            {"json_schema": {"type": "string", "pattern": "(canary-six"}},
        ):
            sampling = replace(PLAIN, **more)
            code, _ = client.generate(opening([5, 6], sampling, 60, run_ahead=True)).end()
            assert code in (Code.INVALID_ARGUMENT, Code.ABORTED)
    assert "canary" not in "".join(capfd.readouterr())
    assert "canary" not in caplog.text


@pytest.mark.parametrize("draft", [None, "ngram", "model"])
def test_a_schema_from_afar(
    worker: Worker, target_model: sllm.Model, draft_model: sllm.Model, draft: str | None
) -> None:
    sampling = sllm.SamplingParams(seed=8, json_schema=SCHEMA)
    with sllm.LocalTarget(target_model, **EXACT) as local:
        wanted = sllm.generate(local, "Once", draft=None, sampling=sampling, max_tokens=60).text()
    drafter: Any = draft_model if draft == "model" else draft
    with sllm.connect(worker.uri) as remote:
        assert "json-schema" in remote.info.features
        stream = sllm.generate(remote.target(), "Once", draft=drafter, sampling=sampling, max_tokens=60)
        assert stream.text() == wanted


def test_a_worker_that_does_not_know_schemas_is_not_asked(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sllm.connect(worker.uri) as remote:
        link = remote.target().remote.fleet.link
        older = tuple(name for name in link.info.features if name != "json-schema")
        monkeypatch.setattr(link, "info", replace(link.info, features=older))
        sampling = sllm.SamplingParams(json_schema=SCHEMA)
        with pytest.raises(sllm.UnsupportedModelError, match="json-schema"):
            sllm.generate(remote.target(), "Once", sampling=sampling, max_tokens=3)


def test_what_is_wrong_is_said_before_anything_is_sent(worker: Worker) -> None:
    with sllm.connect(worker.uri) as remote:
        before = remote.status().sessions_total
        for more, complaint in (
            ({"grammar": "root ::= other"}, "line 1: undefined rule 'other'"),
            (HOSTILE["deep"], "needs too much"),
            ({"json_schema": {"type": "fish"}}, "fish"),
            ({"json_schema": {"contentMediaType": 1, "unevaluatedItems": False}}, "unevaluatedItems"),
        ):
            with pytest.raises(ValueError, match=complaint):
                sllm.generate(remote.target(), "Once", sampling=sllm.SamplingParams(**more), max_tokens=3)
        assert remote.status().sessions_total == before
