"""``generate(draft="mtp")``: the target's own heads as its draft."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import random_models
from oracles import EXACT
from random_models import HEADS, N_VOCAB

import sllm
from sllm.draft.drafters import Drafter, MtpDrafter
from sllm.engine.mtp import has_mtp

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from oracles import Tokens

pytestmark = pytest.mark.skipif(not has_mtp(), reason="this build cannot draft with MTP heads")


class Forced(MtpDrafter):
    """Whether a draft pays is measured, and differs from machine to machine: with this one it does."""

    adaptive = False


@pytest.fixture(scope="module", params=["glm4moe, head", "qwen35, head"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = random_models.make_agreeing(replace(HEADS[request.param], routers="q8_0"))
    return file.write(tmp_path_factory.mktemp("models") / "agreeing.gguf")


def prompt_of(n: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(10, N_VOCAB, n).astype(np.int32)


def sampling_of(target: sllm.LocalTarget, **more: Any) -> sllm.SamplingParams:
    ends = [(token, -np.inf) for token in range(N_VOCAB) if target.vocab.is_eog(token)]
    return sllm.SamplingParams(temperature=1.0, seed=3, logit_bias=ends, **more)


def test_the_text_is_the_same_and_takes_fewer_passes(path: Path) -> None:
    """One text after the other on one target; the second prompt begins with the first text."""
    with (
        sllm.LocalTarget(path, n_ctx=512, **EXACT) as plain,
        sllm.LocalTarget(path, n_ctx=512, **EXACT) as other,
    ):
        sampling = sampling_of(plain)
        prompt = prompt_of(90)
        drafter = Forced(other.heads())
        assert isinstance(drafter, Drafter)
        for _ in range(3):
            expected = sllm.generate(plain, prompt, sampling=sampling, max_tokens=40)
            tokens = [token for run in expected for token in run.tokens]
            for draft in ("mtp", drafter):
                stream = sllm.generate(other, prompt, draft=draft, sampling=sampling, max_tokens=40)
                assert [token for run in stream for token in run.tokens] == tokens
            assert stream.stats.n_tokens >= 1.5 * stream.stats.n_passes
            assert stream.stats.n_accepted <= stream.stats.n_drafted
            prompt = np.concatenate([prompt, np.array(tokens, np.int32), prompt_of(7, 1)])
        assert repr(other.heads()) in repr(drafter)


def test_a_model_gets_its_target_and_a_draft_ends_with_the_context(path: Path) -> None:
    with sllm.Model(path) as model:
        stream = sllm.generate(model, prompt_of(500), draft="mtp", sampling=sllm.SamplingParams(seed=1))
        assert stream.text()
        assert stream.stats.finish_reason in ("context", "eog")


def test_a_text_with_a_grammar_or_penalties(path: Path) -> None:
    for more in ({"grammar": 'root ::= ("a" | "th" | " ")*'}, {"penalty_last_n": 9, "penalty_repeat": 1.2}):
        with sllm.LocalTarget(path, n_ctx=256, **EXACT) as target:
            sampling = sampling_of(target, **more)
            plain = sllm.generate(target, prompt_of(20), sampling=sampling, max_tokens=30).text()
            drafter = Forced(target.heads())
            text = sllm.generate(
                target, prompt_of(20), draft=drafter, sampling=sampling, max_tokens=30
            ).text()
            assert text == plain


def test_a_closed_target_and_a_running_text(path: Path) -> None:
    with sllm.LocalTarget(path, n_ctx=256, **EXACT) as target:
        first = sllm.generate(target, prompt_of(20), max_tokens=9)
        next(first)
        with pytest.raises(sllm.BusyError):
            target.heads()
        first.close()
        stream = sllm.generate(target, prompt_of(20), draft="mtp", sampling=sampling_of(target))
        next(stream)
        stream.close()
    with pytest.raises(sllm.ClosedError):
        sllm.generate(target, prompt_of(20), draft="mtp")


def test_targets_without_heads_here_say_so(path: Path, target_model: sllm.Model) -> None:
    with pytest.raises(sllm.UnsupportedModelError, match="no MTP heads"):
        sllm.generate(target_model, "Once", draft="mtp")
    with (
        sllm.Worker(path, insecure=True) as worker,
        sllm.connect(worker.uri) as remote,
        pytest.raises(sllm.UnsupportedModelError, match="sllm worker --mtp"),
    ):
        sllm.generate(remote.target(), prompt_of(9), draft="mtp")
    with pytest.raises(ValueError, match='"mtp", "ngram"'):
        sllm.generate(target_model, "Once", draft="eagle3")


def test_the_commands(path: Path, command: Callable[..., Any]) -> None:
    common = ("run", "Once upon a time", "--target", str(path), "--n-ctx", "256", "-n", "12", "--seed", "1")
    plain, drafted = command(*common, "--draft", "none"), command(*common, "--draft", "mtp")
    assert drafted.returncode == plain.returncode == 0, drafted.stderr
    assert drafted.stdout == plain.stdout
    shown = command("inspect", str(path))
    assert "MTP heads" in shown.stdout
    assert "--draft mtp" in shown.stdout
    refused = command("run", "Once", "--draft", "mtp", "-n", "3")
    assert refused.returncode != 0
    assert "no MTP heads" in refused.stderr
