"""The plugin inside a vLLM: its own loop, its own batches, a model of random weights."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

K = 20  # vLLM answers with so many log-probabilities


def texts(llm: Any, prompts: Sequence[list[int]], params: Any) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def some_prompts(n: int) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(2, 500) for _ in range(draw.randrange(1, 30))] for _ in range(n)]


def test_streams_are_the_selection_of_their_own_logits(engine: Callable[..., Any]) -> None:
    """Requests of ours of several kinds in a batch with others, coming and going, more than fit at once."""
    llm = engine(logits_processors=["sllm_vllm.runner_v1:SeededSelection"])
    import torch
    from sllm_vllm.arguments import Selection
    from sllm_vllm.selection import Settings, select
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    draw = random.Random(2)
    prompts = some_prompts(40)
    kinds = [None, (0.8, K, 0.95, 0.05), (0.0, 0, 1.0, 0.0), (1.5, K, 1.0, 0.0), (1.0, 7, 0.8, 0.0)]
    chosen = [
        None if kind is None else Selection(draw.getrandbits(64), *kind)
        for kind in (draw.choice(kinds) for _ in prompts)
    ]
    lengths = [draw.randrange(1, 60) for _ in prompts]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=n,
            ignore_eos=True,
            logprobs=K,
            detokenize=False,
            extra_args=None if s is None else s.xargs(),
        )
        for s, n in zip(chosen, lengths, strict=True)
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    n_noisy = 0
    for prompt, s, n, output in zip(prompts, chosen, lengths, outputs, strict=True):
        found = output.outputs[0]
        assert len(found.token_ids) == n
        for i, (token, best) in enumerate(zip(found.token_ids, found.logprobs, strict=True)):
            row = torch.full((1, 500), -torch.inf)
            for v, x in best.items():
                row[0, v] = x.logprob
            plain = int(row.argmax())
            expected = plain
            if s is not None:
                settings = Settings.of([s], torch.device("cpu"))
                expected = int(select(row, torch.tensor([len(prompt) + i]), settings))
            assert token == expected
            n_noisy += token != plain
    assert n_noisy > 50

    # The same seeds give the same texts, alone and in another order.
    again = texts(llm, prompts[:6][::-1], params[:6][::-1])[::-1]
    assert again == [list(output.outputs[0].token_ids) for output in outputs[:6]]

    for xargs, said in (({"sllm_seed": -1}, "sllm_seed is -1"), ({"sllm_tok": 1}, "sllm_tok")):
        with pytest.raises(VLLMValidationError, match=said):
            texts(llm, prompts[:1], SamplingParams(temperature=0, extra_args=xargs))
    with pytest.raises(VLLMValidationError, match=r"repetition_penalty is 1\.1 beside sllm_seed"):
        texts(llm, prompts[:1], SamplingParams(repetition_penalty=1.1, extra_args={"sllm_seed": 1}))
    assert texts(llm, prompts[:6], params[:6]) == again  # which has done it no harm


def n_passes(llm: Any) -> dict[str, int]:
    """What vLLM's own counters say of speculation."""
    return {
        metric.name.removeprefix("vllm:spec_decode_num_"): metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:spec_decode_num_") and hasattr(metric, "value")
    }


def test_drafts_of_clients(engine: Callable[..., Any]) -> None:
    llm = engine(
        scheduler_cls="sllm_vllm.scheduler.ClientDrafts",
        speculative_config={
            "method": "custom_class",
            "model": "sllm_vllm.proposer.NoDrafts",
            "num_speculative_tokens": 8,
        },
    )
    from vllm import SamplingParams

    def greedy(**xargs: Any) -> Any:
        return SamplingParams(
            temperature=0, max_tokens=60, ignore_eos=True, detokenize=False, extra_args=xargs or None
        )

    prompts = some_prompts(12)
    plain = texts(llm, prompts, greedy())
    assert n_passes(llm)["accepted_tokens"] == 0

    # Right drafts: of 60 tokens one comes with the prompt and the others 9 with each pass.
    assert texts(llm, prompts, [greedy(sllm_draft=text) for text in plain]) == plain
    said = n_passes(llm)
    assert said["accepted_tokens"] == said["draft_tokens"] >= 12 * 50
    assert said["drafts"] == 12 * 7

    # Drafts that are right but for a token, and drafts that are wrong.
    changed = [[*text[:20], (text[20] + 1) % 500, *text[21:]] for text in plain]
    assert texts(llm, prompts, [greedy(sllm_draft=text) for text in changed]) == plain
    now = n_passes(llm)
    assert now["accepted_tokens"] - said["accepted_tokens"] >= 12 * 40
    assert texts(llm, prompts, [greedy(sllm_draft=text) for text in [*plain[1:], plain[0]]]) == plain

    # Some texts with a draft and some without, and positions within the prompt.
    mixed = [
        greedy(sllm_draft=prompt[-1:] + text, sllm_pos=len(prompt) - 1) if i % 2 else greedy()
        for i, (prompt, text) in enumerate(zip(prompts, plain, strict=True))
    ]
    assert texts(llm, prompts, mixed) == plain

    # What is no draft is left out: the engine goes on, and so do the others.
    bad = [{"sllm_draft": [500]}, {"sllm_draft": [-1]}, {"sllm_draft": "a"}, {"sllm_nonsense": 1}]
    bad += [
        {"sllm_draft": [1], "sllm_about": "nobody", "sllm_pos": 3},
        {"sllm_draft": [1], "sllm_pos": 10**9},
    ]
    assert texts(llm, prompts[:6], [greedy(**xargs) for xargs in bad]) == plain[:6]


def test_drafts_that_come_while_the_text_is_written(engine: Callable[..., Any]) -> None:
    llm = engine(
        scheduler_cls="sllm_vllm.scheduler.ClientDrafts",
        speculative_config={
            "method": "custom_class",
            "model": "sllm_vllm.proposer.NoDrafts",
            "num_speculative_tokens": 4,
        },
    )
    from vllm import SamplingParams

    (prompt,) = some_prompts(1)
    options = {"temperature": 0, "max_tokens": 60, "ignore_eos": True, "detokenize": False}
    (plain,) = texts(llm, [prompt], SamplingParams(**options))

    engine_loop = llm.llm_engine
    engine_loop.add_request(
        "a", {"prompt_token_ids": prompt}, SamplingParams(**options, extra_args={"sllm_stream": "s"})
    )
    written: list[int] = []
    steps = sent = 0
    while engine_loop.has_unfinished_requests():
        for output in engine_loop.step():
            if output.request_id == "a":
                written = list(output.outputs[0].token_ids)
        steps += 1
        if len(written) >= 10 and sent < 2:
            # The second one begins where the text has not been yet.
            at = len(written) if sent == 0 else 40
            hint = {"sllm_about": "s", "sllm_pos": len(prompt) + at, "sllm_draft": plain[at : at + 20]}
            about = SamplingParams(**{**options, "max_tokens": 1}, extra_args=hint)
            engine_loop.add_request(f"hint {sent}", {"prompt_token_ids": [2]}, about)
            sent += 1 if sent == 0 or len(written) >= 30 else 0
    assert written == plain
    assert n_passes(llm)["accepted_tokens"] >= 16
    assert steps < 60


def test_a_scheduler_without_speculation_says_what_to_add(engine: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="--speculative-config"):
        engine(scheduler_cls="sllm_vllm.scheduler.ClientDrafts")


def test_v1_takes_no_processor_beside_speculation(engine: Callable[..., Any]) -> None:
    """So what README says of it can be lifted when this fails."""
    with pytest.raises(ValueError, match="not supported when speculative decoding"):
        engine(
            logits_processors=["sllm_vllm.runner_v1:SeededSelection"],
            speculative_config={
                "method": "custom_class",
                "model": "sllm_vllm.proposer.NoDrafts",
                "num_speculative_tokens": 4,
            },
        )
