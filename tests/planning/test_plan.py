"""``sllm.plan()``: what it measures, what it says, and that nothing is left of it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from oracles import EXACT, GGUF

import sllm
from sllm.draft.drafters import ModelDrafter, NGramDrafter
from sllm.embedded import DRAFT, TARGET
from sllm.planning.measure import measure_passes
from sllm.planning.ways import Plan, Way
from sllm.worker.passes import Pace

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("one_core")

PROMPTS = ["Once upon a time, there was a little fox who", "Tom and his sister went to the"]
BRIEF: dict[str, Any] = {"prompts": PROMPTS, "max_tokens": 24, "sampling": sllm.SamplingParams(seed=3)}
HERE = ["here", "here, draft (chain)", "here, draft (tree)"]
WORKER = ["worker, stream", "worker, hints (chain)", "worker, hints (tree)"]
SPLIT = ["split", "split, draft (chain)", "split, draft (tree)"]
OWN = "worker, its own draft"


def possible(found: Plan) -> list[str]:
    return [way.name for way in found.ways if way.why_not is None]


def why_not(found: Plan, name: str) -> str:
    (reason,) = [way.why_not for way in found.ways if way.name == name]
    assert reason is not None
    return reason


@pytest.fixture(scope="module")
def worker() -> Iterator[sllm.Worker]:
    with sllm.Worker(TARGET, n_ctx=512, pass_seconds=0.005, **EXACT) as worker:
        yield worker


@pytest.fixture
def left_as_it_was() -> Iterator[None]:
    """No thread of a client is left; what is not closed warns, and warnings are errors."""
    yield
    names = ("sllm-remote", "sllm-draft", "sllm-fleet", "sllm-layers", "sllm-engine", "sllm-hop")
    assert [thread for thread in threading.enumerate() if thread.name.startswith(names)] == []


# ---- the ways


@pytest.mark.usefixtures("left_as_it_was")
def test_two_models_here(target_model: sllm.Model, draft_model: sllm.Model) -> None:
    found = sllm.plan(draft_model, target=target_model, **BRIEF)
    assert possible(found) == HERE
    assert found.best is not None
    assert found.best.name in HERE
    for way in found.ways[:3]:
        assert way.tokens_per_s is not None and way.first_token is not None
        assert way.tokens_per_s > 0
        assert way.first_token > 0
        assert (way.round_trips, way.bytes_per_token, way.learns) == (0.0, 0.0, "nothing")
    assert str(target_model.path) in found.ways[0].use
    assert "trees=False" in found.ways[1].use
    assert 0.0 < found.measured["acceptance"] < 1.0
    assert {"draft_seconds", "here_pass_seconds", "here_pass_seconds_8_rows"} <= found.measured.keys()
    assert "remote=" in why_not(found, WORKER[0])
    assert "layers=" in why_not(found, SPLIT[0])


@pytest.mark.usefixtures("left_as_it_was")
def test_a_worker(worker: sllm.Worker, draft_model: sllm.Model) -> None:
    found = sllm.plan(draft_model, remote=worker.uri, **BRIEF)
    assert possible(found) == WORKER
    assert "--draft" in why_not(found, OWN)
    assert why_not(found, "here") == "there is no main model here (target=)"
    for way in found.ways[1:4]:
        assert way.learns == "all of the text"
        assert way.round_trips == 0.0
        assert way.bytes_per_token is not None
        assert way.bytes_per_token > 10
        assert "@FILE" in way.use or "uri" in way.use
    speeds = {way.name: way.tokens_per_s or 0.0 for way in found.ways}
    # What streams, streams at the worker's pace: 5 ms a pass at least.
    assert 0 < speeds[WORKER[0]] < 200
    assert speeds[WORKER[1]] >= speeds[WORKER[0]]
    assert speeds[WORKER[2]] >= speeds[WORKER[0]]
    token = worker.uri.partition("//")[2].partition("@")[0]
    assert token not in str(found) + json.dumps(found.as_dict())
    with sllm.connect(worker.uri) as remote:
        assert remote.status().sessions == 0
        again = sllm.plan(remote=remote, **BRIEF)
        assert not remote.closed
    assert possible(again) == WORKER[:1]
    assert why_not(again, WORKER[1]) == "there is no draft (draft=)"


@pytest.mark.usefixtures("left_as_it_was")
def test_a_worker_with_a_draft_of_its_own(draft_model: sllm.Model) -> None:
    pace = Pace(0.005, draft_seconds=0.0005)
    with sllm.Worker(TARGET, draft=DRAFT, n_ctx=512, pass_seconds=pace, **EXACT) as worker:
        found = sllm.plan(draft_model, remote=worker.uri, **BRIEF)
    assert possible(found) == [OWN, "both sides (chain)", "both sides (tree)"]
    assert why_not(found, WORKER[0]) == "the worker drafts by itself, whoever asks"


@pytest.mark.usefixtures("left_as_it_was")
def test_a_split(target_model: sllm.Model, draft_model: sllm.Model) -> None:
    # Passes so long, and a text so easy, that drafting pays on any machine.
    easy = {**BRIEF, "prompts": ["Once upon a time"]}
    with sllm.Worker(TARGET, layers=True, n_ctx=512, pass_seconds=0.05) as worker:
        found = sllm.plan(draft_model, target=TARGET, layers=worker.uri, head=2, **easy)
        assert possible(found) == HERE + SPLIT
        wrong = sllm.plan(target=TARGET, layers=worker.uri, head=7, tail=7, **BRIEF)
        assert "split" not in possible(wrong)
        assert "here" in possible(wrong)
    alone, chain, tree = (way for way in found.ways if way.name in SPLIT)
    assert alone.round_trips == 1.0
    assert (chain.round_trips or 9) < 1.0
    assert (tree.round_trips or 9) < 1.0
    assert alone.learns == "hidden states (*)"
    # A row of 2 bytes for each of n_embd numbers, there and back, and what is around them.
    row = 2 * target_model.n_embd
    assert 2 * row < (alone.bytes_per_token or 0) < 2 * row + 400
    assert "--head 2 --tail 1" in alone.use
    assert "usually" in str(found)


@pytest.mark.usefixtures("left_as_it_was")
@pytest.mark.parametrize("api", ["vllm", "llama-server"])
def test_an_engine(target_model: sllm.Model, draft_model: sllm.Model, api: str) -> None:
    greedy = {**BRIEF, "sampling": sllm.SamplingParams(temperature=0)}
    with FakeEngine(target_model, api, pace=0.005) as engine:
        found = sllm.plan(draft_model, engine=engine.url, **greedy)
        with sllm.EngineTarget(engine.url, target_model) as served:
            same = sllm.plan(engine=served, **greedy)
    assert possible(found) == ["engine", "engine, draft (chain)"]
    assert possible(same) == ["engine"]
    assert found.measured["engine_pass_seconds"] > 0


# ---- what is drafted with, and after what


def test_prompts_of_all_kinds(target_model: sllm.Model) -> None:
    tokens = target_model.vocab.encode(PROMPTS[0])
    prompts: list[Any] = [tokens, tokens.tolist(), [{"role": "user", "content": "Hello!"}]]
    found = sllm.plan("ngram", target=target_model, prompts=prompts, max_tokens=8)
    assert possible(found) == HERE[:2]
    assert why_not(found, HERE[2]) == "the draft makes chains alone"
    assert found.ways[2].use.endswith("--draft ngram")


def test_drafters_stay_the_caller_s(target_model: sllm.Model, draft_model: sllm.Model) -> None:
    with ModelDrafter(draft_model, trees=False, n_ctx=512) as drafter:
        found = sllm.plan(drafter, target=target_model, **BRIEF)
        assert not drafter.context.closed
    assert possible(found) == HERE[:2]
    assert possible(sllm.plan(NGramDrafter(), target=target_model, **BRIEF)) == HERE[:2]


def test_a_draft_that_is_the_target_is_always_right(target_model: sllm.Model) -> None:
    found = sllm.plan(target_model, target=target_model, **BRIEF)
    assert found.measured["acceptance"] > 0.95  # but for near-ties


def test_an_acceptance_that_is_known(target_model: sllm.Model, draft_model: sllm.Model) -> None:
    found = {
        a: sllm.plan(draft_model, target=target_model, acceptance=a, **{**BRIEF, "max_tokens": 400})
        for a in (0.0, 1.0)
    }
    assert found[0.0].measured["acceptance"] == 0.0
    assert found[1.0].measured["acceptance"] == 1.0


def test_a_slow_target_writes_less(target_model: sllm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sllm.planning.measure._SECONDS", 0.0)
    told: list[float] = []
    prompts = [target_model.vocab.encode(prompt) for prompt in PROMPTS]
    with sllm.LocalTarget(target_model, n_ctx=256, **EXACT) as target:
        found = measure_passes(target, prompts, sllm.SamplingParams(seed=3), 24, told.append)
    assert [len(text.truth) for text in found.texts] == [8, 8]
    assert told == [0.0, pytest.approx(1 / 3)]
    assert not found.passes.known(2)
    assert found.tokens_per_s > 0


# ---- what does not go


@pytest.mark.usefixtures("left_as_it_was")
def test_nobody_there_is_a_row(target_model: sllm.Model, draft_model: sllm.Model) -> None:
    nowhere = "sllm://" + "t" * 32 + "@127.0.0.1:1#sha256=" + "0" * 64
    found = sllm.plan(
        draft_model,
        target=target_model,
        remote=nowhere,
        layers=[nowhere],
        engine="http://127.0.0.1:1/v1",
        timeout=2,
        **BRIEF,
    )
    assert possible(found) == HERE
    for name in [*WORKER, *SPLIT, "engine"]:
        assert "127.0.0.1:1" in why_not(found, name)
    assert max(map(len, str(found).splitlines())) <= 80


@pytest.mark.usefixtures("left_as_it_was")
def test_a_silent_worker_is_a_row() -> None:
    with sllm.Worker(TARGET, n_ctx=512, pass_seconds=1.5, **EXACT) as worker:
        found = sllm.plan(remote=worker.uri, timeout=0.4, **BRIEF)
    assert possible(found) == []
    assert found.best is None
    assert "for 0.4 seconds" in why_not(found, WORKER[0])
    assert str(found).startswith("not here: ")


def test_another_vocabulary_is_a_row(target_model: sllm.Model, tmp_path: Path) -> None:
    changed = GGUF(Path(DRAFT))
    texts = changed.array("tokenizer.ggml.tokens")
    texts[300], texts[301] = texts[301], texts[300]
    found = sllm.plan(changed.write(tmp_path / "other.gguf"), target=target_model, **BRIEF)
    assert possible(found) == ["here"]
    assert "token 300 is" in why_not(found, HERE[1])


def test_a_model_that_does_not_load_is_a_row(tmp_path: Path) -> None:
    found = sllm.plan(DRAFT, target=tmp_path / "none.gguf", **BRIEF)
    assert possible(found) == []
    assert "none.gguf" in why_not(found, "here")
    with pytest.raises(sllm.ModelLoadError):
        sllm.plan(tmp_path / "none.gguf", target=TARGET, **BRIEF)


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"target": None}, ValueError, "what decides the texts"),
        ({"draft": "mtp"}, ValueError, 'draft="mtp"'),
        ({"target": None, "layers": "sllm://t@h#sha256=" + "0" * 64}, ValueError, "needs target="),
        ({"remote": "http://h:1"}, ValueError, "sllm://"),
        ({"layers": ["sllm://"]}, ValueError, "sllm://"),
        ({"target": None, "draft": None, "engine": "http://h:1/v1"}, ValueError, "its vocabulary"),
        ({"head": -1}, ValueError, "head is -1"),
        ({"tail": 1.5}, TypeError, "tail is 1.5"),
        ({"codec": "q2"}, ValueError, "codec is 'q2'"),
        ({"prompts": "Once"}, TypeError, "a list of prompts"),
        ({"prompts": []}, ValueError, "empty"),
        ({"prompts": [""]}, ValueError, "one of them"),
        ({"sampling": 1.0}, TypeError, "SamplingParams"),
        ({"max_tokens": 0}, ValueError, "max_tokens is 0"),
        ({"acceptance": 1.5}, ValueError, "acceptance is 1.5"),
        ({"acceptance": "high"}, TypeError, "acceptance is 'high'"),
        ({"timeout": 0}, ValueError, "timeout is 0"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        sllm.plan(**{"draft": DRAFT, "target": TARGET, **wrong})


@pytest.mark.usefixtures("left_as_it_was")
def test_an_interrupt_leaves_nothing_open(
    worker: sllm.Worker, draft_model: sllm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sllm.planning.planner.record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sllm.plan(draft_model, remote=worker.uri, **BRIEF)


# ---- the result


def way(name: str, speed: float | None, **more: Any) -> Way:
    return Way(name, "nothing", "sllm chat", speed, None if speed is None else 0.1, 0.0, 0.0, **more)


def test_the_best_is_the_first_of_those_that_are_as_fast() -> None:
    plan = Plan((way("a", 10.0), way("b", 50.0), way("c", 50.5), way("d", None, why_not="no")))
    assert plan.best is plan.ways[1]
    assert Plan((way("d", None, why_not="no"),)).best is None
    assert Plan(()).best is None


def test_a_plan_is_frozen_and_goes_into_json() -> None:
    plan = Plan((way("a", 10.0), way("b", None, why_not="no")), {"acceptance": 0.5})
    with pytest.raises(AttributeError):
        plan.ways = ()  # type: ignore[misc]
    told = json.loads(json.dumps(plan.as_dict()))
    assert told["best"] == "a"
    assert told["measured"] == {"acceptance": 0.5}
    assert told["ways"][1]["why_not"] == "no"
    assert np.isclose(told["ways"][0]["tokens_per_s"], 10.0)


def test_the_table_fits_80_columns() -> None:
    long = "https://" + "x" * 30 + " " + "word " * 40
    plan = Plan((way("worker, hints (chain)", 123456.78), way("split, draft (chain)", None, why_not=long)))
    lines = str(plan).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("* worker, hints (chain)")
    assert "123456.8" in lines[1]
    assert any(line.startswith("not split, draft (chain): https://") for line in lines)


def test_here_needs_no_package_for_networks() -> None:
    program = (
        "import sys; sys.modules.update({'grpc': None, 'google.protobuf': None}); import sllm;"
        f" print(sllm.plan('ngram', target={str(TARGET)!r}, max_tokens=8).best.learns)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "nothing\n"
