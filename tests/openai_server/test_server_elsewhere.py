"""The server over what is elsewhere: a worker, a split, an engine of others, tiers with a cloud; and a real
model.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from fake_engine import FakeEngine
from held_target import HeldTarget
from oracles import EXACT
from remote_worker import WorkerProcess, wait_until

import sllm
from sllm import embedded
from sllm.triage.scorer import ContextScorer

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from sllm.openai_server.server import OpenAIServer  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_core")

PROMPT = "Once upon a time"
ASK = [{"role": "user", "content": "Tell me a story."}]
PHONE = "13800138000"


@contextmanager
def asking(target: Any, **options: Any) -> Iterator[Any]:
    """A client of a server over a target."""
    with OpenAIServer(target, port=0, **options) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60)
        with client:
            yield client


def name_of(client: Any) -> str:
    return str(client.models.list().data[0].id)


@pytest.fixture(scope="module")
def worker(target_model: sllm.Model) -> Iterator[sllm.Worker]:
    with sllm.Worker(target_model, insecure=True, n_ctx=1024, **EXACT) as made:
        yield made


@pytest.fixture(scope="module")
def story(target_model: sllm.Model) -> str:
    """What the target answers at temperature 0."""
    with sllm.LocalTarget(target_model, **EXACT) as target:
        sampling = sllm.SamplingParams(temperature=0)
        return sllm.generate(target, target.chat(ASK), sampling=sampling, max_tokens=24).text()


def test_a_worker_serves_eight_at_once(
    worker: sllm.Worker, target_model: sllm.Model, draft_model: sllm.Model
) -> None:
    def one(client: Any, seed: int) -> str:
        options = {"model": "target", "prompt": PROMPT, "max_tokens": 16, "seed": seed}
        return "".join(c.choices[0].text for c in client.completions.create(**options, stream=True))

    with (
        sllm.connect(worker.uri) as remote,
        asking(remote.target(), draft=draft_model, texts=4) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        assert name_of(client) == "target"
        texts = list(pool.map(lambda seed: one(client, seed), range(8)))
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="target", prompt=PROMPT, logprobs=1)
        assert caught.value.param == "logprobs" and caught.value.code == "unsupported_by_model"
    with sllm.LocalTarget(target_model, **EXACT) as target:
        for seed, text in enumerate(texts):
            sampling = sllm.SamplingParams(seed=seed)
            assert text == sllm.generate(target, PROMPT, sampling=sampling, max_tokens=16).text()


def test_who_leaves_frees_the_workers_session(worker: sllm.Worker) -> None:
    with sllm.connect(worker.uri) as remote, asking(remote.target()) as client:
        chunks = client.chat.completions.create(model="target", messages=ASK, stream=True, temperature=1.5)
        next(chunks)
        assert remote.status().sessions == 1
        chunks.close()
        wait_until(lambda: remote.status().sessions == 0)


def test_a_worker_that_is_lost(tmp_path: Path) -> None:
    with (
        WorkerProcess(tmp_path) as process,
        sllm.connect(process.uri, on_loss="raise") as remote,
        asking(remote.target()) as client,
    ):
        asks = {"model": "target", "prompt": PROMPT, "max_tokens": 400, "temperature": 1.5}
        assert client.completions.create(**{**asks, "max_tokens": 2}).choices[0].text
        process.kill()
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(**asks, stream=stream)
            assert caught.value.status_code == 503 and caught.value.code == "target_lost"
            assert str(process.address[1]) not in str(caught.value.body)


def test_what_may_take_text_back_is_not_served(worker: sllm.Worker, draft_model: sllm.Model) -> None:
    with (
        sllm.connect(worker.uri, on_loss="local") as remote,
        pytest.raises(ValueError, match='on_loss is "local"'),
    ):
        OpenAIServer(remote.target(), draft=draft_model, port=0)


def test_a_split(draft_model: sllm.Model, story: str) -> None:
    path = embedded.TARGET
    with (
        sllm.Worker(path, layers=(2, 7), insecure=True, **EXACT) as layers,
        sllm.connect(layers.uri) as remote,
        sllm.SplitTarget(path, head=2, tail=1, middle=remote, codec="f32", **EXACT) as target,
        asking(target, draft=draft_model, name="split") as client,
    ):
        got = client.chat.completions.create(model="split", messages=ASK, max_tokens=24, temperature=0)
        assert got.choices[0].message.content == story


def test_an_engine(target_model: sllm.Model, story: str) -> None:
    with (
        FakeEngine(target_model, "vllm") as engine,
        sllm.EngineTarget(engine.url, target_model) as target,
        asking(target, draft="ngram", texts=2) as client,
    ):
        name = name_of(client)
        assert name == target.info.model
        got = client.chat.completions.create(model=name, messages=ASK, max_tokens=24, temperature=0)
        assert got.choices[0].message.content == story
        with pytest.raises(openai.BadRequestError) as caught:  # it gives 20 log-probabilities of a position
            wide: dict[str, Any] = {"temperature": 2, "top_p": 1, "extra_body": {"top_k": 0, "min_p": 0}}
            client.completions.create(model=name, prompt=PROMPT, **wide)
        assert caught.value.code == "unsupported_value"


# ---- tiers


@contextmanager
def tiers(
    small: sllm.Model, local: sllm.Model, cloud: Any, privacy: Any = "local"
) -> Iterator[tuple[Any, sllm.Hybrid]]:
    with (
        ContextScorer(small, n_threads=1) as scorer,
        sllm.Hybrid(
            small, local, cloud, triage=sllm.Triage(scorer), verify="never", privacy=privacy, n_threads=1
        ) as hybrid,
        asking(hybrid) as client,
    ):
        yield client, hybrid


def test_tiers_say_who_has_answered(draft_model: sllm.Model, target_model: sllm.Model) -> None:
    with tiers(draft_model, target_model, None) as (client, _):
        name = name_of(client)
        asks: dict[str, Any] = {"model": name, "messages": ASK, "max_tokens": 12}
        got = client.chat.completions.with_raw_response.create(**asks)
        whole = got.parse()
        assert whole.sllm["route"] == ["local"] and got.headers["x-sllm-route"] == "local"
        assert whole.sllm["stats"]["n_local"] == 12 and whole.choices[0].finish_reason == "length"
        chunks = list(client.chat.completions.create(**asks, stream=True))
        assert chunks[-1].sllm["route"] == ["local"]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.choices[0].message.content  # at temperature 0
        warm = [
            client.chat.completions.create(**asks, temperature=1.5, seed=seed).choices[0].message.content
            for seed in (1, 1, 2)
        ]
        assert warm[0] == warm[1] != warm[2]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": "x"}, "stop"),
        ({"extra_body": {"chat_template_kwargs": {"a": 1}}}, "chat_template_kwargs"),
    ],
)
def test_what_tiers_have_not(
    draft_model: sllm.Model, target_model: sllm.Model, more: dict[str, Any], param: str
) -> None:
    with tiers(draft_model, target_model, None) as (client, _):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=name_of(client), messages=ASK, **more)
        assert caught.value.param == param
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=name_of(client), prompt=PROMPT)


def test_one_clients_values_are_not_known_to_the_next(
    draft_model: sllm.Model, target_model: sllm.Model, worker: sllm.Worker
) -> None:
    with (
        sllm.connect(worker.uri) as remote,
        tiers(draft_model, target_model, remote.target(), "deidentify") as (client, hybrid),
    ):
        asks: dict[str, Any] = {"model": name_of(client), "max_tokens": 4}
        private = [{"role": "user", "content": f"My phone is {PHONE}."}]
        said = client.chat.completions.create(**asks, messages=private)
        assert said.sllm["privacy"] == "private"
        first = hybrid.vault
        client.chat.completions.create(**asks, messages=ASK)
        assert hybrid.vault is not first
        assert PHONE not in str(said.sllm)


def test_who_leaves_ends_an_answer_by_tiers(draft_model: sllm.Model, target_model: sllm.Model) -> None:
    target = HeldTarget(target_model, " and on")
    target.let(2)
    hard = sllm.Grade(sllm.Tier.HARD, 0.0, 1.0, "public", ("a test says so",), None)
    graded = SimpleNamespace(scorer=None, profile=None, assess=lambda *_args, **_more: hard)
    with (
        sllm.Hybrid(draft_model, target_model, target, triage=cast("Any", graded), n_threads=1) as hybrid,
        asking(hybrid, name="tiers") as client,
    ):
        chunks = client.chat.completions.create(model="tiers", messages=ASK, stream=True)
        next(chunks)
        chunks.close()
        wait_until(lambda: target.ended == 1)


# ---- a real model


def test_a_real_model(smollm2: Path) -> None:
    with sllm.Model(smollm2) as model, asking(model, draft="ngram", n_ctx=1024) as client:
        name = name_of(client)
        capital = [{"role": "user", "content": "What is the capital of France? One word."}]
        asks: dict[str, Any] = {"model": name, "messages": capital, "temperature": 0, "max_tokens": 32}
        got = client.chat.completions.create(**asks, logprobs=True)
        content = got.choices[0].message.content
        assert "Paris" in content
        entries = got.choices[0].logprobs.content
        shown = b"".join(bytes(entry.bytes) for entry in entries).decode()
        assert shown == content
        chunks = client.chat.completions.create(**asks, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == content
        told = [
            *capital,
            {"role": "assistant", "content": content},
            {"role": "user", "content": "And Italy?"},
        ]
        more = client.chat.completions.create(**{**asks, "messages": told, "max_tokens": 8})
        assert more.usage.prompt_tokens_details.cached_tokens > got.usage.prompt_tokens
