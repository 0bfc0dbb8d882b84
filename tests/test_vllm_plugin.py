"""What of the vLLM plugin (examples/vllm-plugin) needs neither vLLM nor torch: its noise is the core's, its
arguments are checked, and a draft is followed along a text. Its own tests need vLLM.
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import examples, gumbel

import sllm

if TYPE_CHECKING:
    from collections.abc import Iterator

PLUGIN = Path(__file__).parents[1] / "examples" / "vllm-plugin"


@pytest.fixture(autouse=True, scope="module")
def plugin() -> Iterator[None]:
    """The plugin's folder on the path, and nothing of it left behind."""
    sys.path.insert(0, str(PLUGIN))
    yield
    sys.path.remove(str(PLUGIN))
    for name in [name for name in sys.modules if name.partition(".")[0] == "sllm_vllm"]:
        del sys.modules[name]


# ---- the noise


@examples(60)
@given(
    st.one_of(st.sampled_from([0, 1, 2**63 - 1, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1)),
    st.one_of(st.sampled_from([0, 2**31 - 1]), st.integers(0, 2**31 - 1)),
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40),
)
def test_noise_is_the_cores(seed: int, pos: int, tokens: list[int]) -> None:
    from sllm_vllm import noise  # type: ignore[import-not-found]

    signed = np.array([seed], dtype=np.uint64).view(np.int64)
    key = noise.keys(signed, np.array([pos], dtype=np.int64))
    found = noise.gumbel(key, np.array(tokens, dtype=np.int64), np)
    # Two libraries' logarithms may differ in their last bit.
    np.testing.assert_allclose(found, gumbel(seed, pos, tokens), rtol=1e-14, atol=1e-14)


# ---- the arguments


def selection(**xargs: Any) -> Any:
    from sllm_vllm.arguments import Selection  # type: ignore[import-not-found]

    return Selection.parse(xargs)


def test_no_arguments_are_no_selection() -> None:
    assert selection() is None
    assert selection(other=1) is None
    assert selection(sllm_draft=[1]) is None


def test_defaults_are_those_of_sampling_params() -> None:
    plain = sllm.SamplingParams()
    found = selection(sllm_seed=0)
    for name in ("seed", "temperature", "top_k", "top_p", "min_p"):
        assert getattr(found, name) == getattr(plain, name)


@pytest.mark.parametrize(
    ("xargs", "said"),
    [
        ({"sllm_temperature": 1}, "no sllm_seed"),
        ({"sllm_seed": -1}, "sllm_seed is -1, expected an integer from 0 to 18446744073709551615"),
        ({"sllm_seed": 2**64}, "sllm_seed is 18446744073709551616"),
        ({"sllm_seed": 1.5}, "sllm_seed is 1.5"),
        ({"sllm_seed": "probe"}, "sllm_seed is 'probe'"),
        ({"sllm_seed": 1, "sllm_topk": 3}, "vllm_xargs has sllm_topk; known are sllm_about, "),
        ({"sllm_seed": 1, "sllm_top_k": -1}, "sllm_top_k is -1"),
        ({"sllm_seed": 1, "sllm_top_p": 0}, "sllm_top_p is 0.0, expected > 0 and <= 1"),
        ({"sllm_seed": 1, "sllm_min_p": 2}, "sllm_min_p is 2.0"),
        ({"sllm_seed": 1, "sllm_temperature": float("nan")}, "sllm_temperature is nan"),
        ({"sllm_seed": 1, "sllm_temperature": "1"}, "sllm_temperature is '1'"),
    ],
)
def test_wrong_selection(xargs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        selection(**xargs)


@examples(30)
@given(st.integers(0, 2**64 - 1), st.floats(0, 10), st.integers(0, 100), st.floats(0.01, 1), st.floats(0, 1))
def test_what_is_sent_is_what_is_read(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    from sllm_vllm.arguments import request_fields

    params = sllm.SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    sent = request_fields(params, {7, 2})
    assert sent["stop_token_ids"] == [2, 7]
    assert sent["temperature"] == 0
    found = selection(**sent["vllm_xargs"])
    for name in ("seed", "temperature", "top_k", "top_p", "min_p"):
        assert getattr(found, name) == getattr(params, name)


def test_what_vllm_would_do_in_another_way_is_refused() -> None:
    from sllm_vllm.arguments import request_fields

    with pytest.raises(ValueError, match="penalties"):
        request_fields(sllm.SamplingParams(penalty_repeat=1.1), [2])
    with pytest.raises(ValueError, match="logit_bias"):
        request_fields(sllm.SamplingParams(logit_bias={3: False}), [2])
    with pytest.raises(ValueError, match="grammar"):
        request_fields(sllm.SamplingParams(grammar='root ::= "a"'), [2])
    assert request_fields(sllm.SamplingParams(logit_bias={3: -100}), [2])["logit_bias"] == {"3": -100}


@pytest.mark.parametrize(
    ("xargs", "said"),
    [
        ({"sllm_draft": "text"}, "sllm_draft is 'text'"),
        ({"sllm_draft": [1, 10]}, "sllm_draft holds 10, expected token ids from 0 to 9"),
        ({"sllm_draft": [True]}, "sllm_draft holds True"),
        ({"sllm_draft": [-1]}, "sllm_draft holds -1"),
        ({"sllm_draft": [1.0]}, "sllm_draft holds 1.0"),
        ({"sllm_draft": [1], "sllm_pos": -1}, "sllm_pos is -1"),
        ({"sllm_draft": [1], "sllm_stream": 3}, "sllm_stream is 3"),
        ({"sllm_draft": [1], "sllm_about": "a"}, "sllm_about needs sllm_pos"),
    ],
)
def test_wrong_draft(xargs: dict[str, Any], said: str) -> None:
    from sllm_vllm.arguments import Draft

    with pytest.raises(ValueError, match=re.escape(said)):
        Draft.parse(xargs, 10)


def test_a_draft_is_read_as_it_was_sent() -> None:
    from sllm_vllm.arguments import Draft

    for draft in (Draft((1, 2)), Draft((), 3, "a"), Draft((4,), 9, None, "a")):
        assert Draft.parse(draft.xargs(), 10) == draft
    assert Draft.parse({"sllm_seed": 1}, 10) is None


# ---- a draft along a text


def drafted(draft: list[int], pos: int, text: list[int], n: int = 4) -> list[int]:
    """How many tokens of the text are drafted right, for each pass that a verifier would make."""
    from sllm_vllm.expected import Expectation  # type: ignore[import-not-found]

    expected = Expectation(draft, pos)
    at, right = pos, []
    while at < len(text):
        expected.follow(text[expected.length : at])
        ahead = expected.ahead(n)
        assert len(ahead) <= n
        agreed = 0
        while agreed < len(ahead) and at + agreed < len(text) and ahead[agreed] == text[at + agreed]:
            agreed += 1
        right.append(agreed)
        at += agreed + 1
    assert expected.length <= len(text)
    return right


def test_a_right_draft_is_right_to_its_end() -> None:
    text = list(range(40))
    assert drafted(text[10:30], 10, text) == [4, 4, 4, 4, *[0] * 10]


def test_a_changed_token_costs_a_few() -> None:
    text = list(range(40))
    draft = text.copy()
    draft[12] = 99
    # Up to the change; its right token comes with the pass, then three more until the draft is found again.
    assert drafted(draft, 0, text) == [4, 4, 2, 0, 0, 0, 4, 4, 4, 4, 4]


def test_what_is_left_out_or_put_in_is_passed_over() -> None:
    text = list(range(60))
    for draft in (text[:20] + text[30:], [*text[:20], 91, 92, 93, 94, *text[20:]]):
        found = drafted(draft, 0, text)
        assert sum(found) >= 36
        assert found[-2] == 4


def test_a_place_that_comes_twice_is_found_where_the_text_left_it() -> None:
    refrain = [1, 2, 3]
    draft = [*refrain, 10, 11, 12, 13, *refrain, 20, 21, 22, 23, *refrain, 30, 31, 32, 33]
    text = [*refrain, 10, 11, 12, 13, 50, *refrain, 20, 21, 22, 23]
    assert drafted(draft, 0, text)[-1] == 4


@examples(200)
@given(st.data())
def test_any_draft_of_any_text(data: st.DataObject) -> None:
    draw = random.Random(data.draw(st.integers(0, 2**32)))
    text = [draw.randrange(4) for _ in range(30)]
    draft = [draw.randrange(4) for _ in range(draw.randrange(30))]
    pos = draw.randrange(10)
    found = drafted(draft, pos, text, n=draw.randrange(1, 6))
    assert sum(n + 1 for n in found) - (len(text) - pos) in (0, 1)  # the last pass may bring one too many
