"""What may leave for one request: what is masked, what is refused, the last check, and the budget."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import pytest

from sllm.engine.model import Model
from sllm.engine.sampling import SamplingParams
from sllm.privacy import Finding, Vault, default_detectors
from sllm.triage.cloud import CloudBudget
from sllm.triage.outgoing import (
    _GRAMMAR_PART,
    ContainsPrivate,
    LocalOnly,
    Outgoing,
    PrivacyMode,
    find_private,
)
from sllm.triage.time_limit import TimeLimit

EMAIL = "li.wei@example.com"
MESSAGES = [{"role": "user", "content": f"Write to {EMAIL}."}]


class Failing:
    def detect(self, text: str) -> list[Finding]:
        raise RuntimeError(text)


class Slow:
    def detect(self, _text: str) -> list[Finding]:
        time.sleep(0.2)
        return []


def outgoing(
    privacy: PrivacyMode = "deidentify", *, grammar: bool = False, detectors: Any = None
) -> Outgoing:
    used = default_detectors() if detectors is None else detectors
    return Outgoing(Vault(used), used, TimeLimit(10.0), privacy, grammar=grammar)


def test_what_is_masked_comes_back() -> None:
    out = outgoing()
    masked = out.mask_messages(MESSAGES)
    assert masked.counts == {"EMAIL": 1}
    assert EMAIL not in str(masked.messages)
    out.egress_check(str(masked.messages[0]["content"]))
    answer = out.mask_answer(f"Dear {EMAIL}")
    restorer = out.restorer()
    assert restorer.feed(answer.text) + restorer.finish() == f"Dear {EMAIL}"


@pytest.mark.parametrize("privacy", ["local", "refuse"])
def test_nothing_private_leaves_without_deidentify(privacy: PrivacyMode) -> None:
    out = outgoing(privacy)
    assert out.mask_messages([{"role": "user", "content": "Hello"}]).counts == {}
    for call in (lambda: out.mask_messages(MESSAGES), lambda: out.mask_answer(EMAIL)):
        with pytest.raises(ContainsPrivate, match="something private was found in"):
            call()


def test_nothing_masked_leaves_with_a_grammar() -> None:
    out = outgoing(grammar=True)
    with pytest.raises(LocalOnly, match="grammar") as caught:
        out.mask_messages(MESSAGES)
    assert not isinstance(caught.value, ContainsPrivate)  # masked, it would have been fit to leave


def test_the_last_check() -> None:
    with pytest.raises(ContainsPrivate, match="the last check before sending"):
        outgoing().egress_check(f"Write to {EMAIL}.")


NUMBER = "13800138000"


@pytest.mark.parametrize(
    "grammar",
    [
        f'root ::= "{NUMBER}"',
        f'root ::= "yes" # ask {NUMBER}',
        'root ::= "138" "0013" ("8000")',
        'root ::= [1] "38001" # and\n [3] "8000"',
        "root ::= " + '"' + "".join(f"\\x{ord(char):02x}" for char in NUMBER) + '"',
        "root ::= " + '"' + "".join(f"\\u{ord(char):04X}" for char in EMAIL) + '"',
        "root ::= " + '"' + "".join(f"\\U{ord(char):08X}" for char in NUMBER) + '"',
    ],
)
def test_a_grammar_is_checked(grammar: str, target_model: Model) -> None:
    with pytest.raises(ContainsPrivate, match="the last check before sending"):
        outgoing().check_sampling(SamplingParams(grammar=grammar), target_model.vocab)


@dataclass(frozen=True)
class Later(SamplingParams):
    """With parameters that are not there yet."""

    rules: Any = None
    notes: frozenset[str] = frozenset()


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"phone": {"const": NUMBER}}},
        {"properties": {"phone": {"const": int(NUMBER)}}},
        {"properties": {NUMBER: {}}},
        {"enum": ["a", {"b": [EMAIL]}]},
        {"description": f"请打{NUMBER}"},
        f'{{"const": "{NUMBER}"}}',
        f'{{"const": {NUMBER}}}',
        json.dumps({"const": NUMBER}).replace("138", r"\u0031\u0033\u0038"),
        EMAIL,
    ],
)
def test_every_text_in_the_parameters_is_checked(schema: Any, target_model: Model) -> None:
    for sampling in (Later(rules=schema), Later(rules=[schema])):
        with pytest.raises(ContainsPrivate, match="the last check before sending"):
            outgoing().check_sampling(sampling, target_model.vocab)
    with pytest.raises(ContainsPrivate):
        outgoing().check_sampling(Later(notes=frozenset([EMAIL])), target_model.vocab)


def test_parameters_that_say_nothing(target_model: Model) -> None:
    schema = {"type": "object", "properties": {"season": {"enum": ["spring", "夏"], "maxLength": 9}}}
    for value in (schema, json.dumps(schema), None, "12", "true", "{"):
        outgoing().check_sampling(Later(rules=value), target_model.vocab)


@pytest.mark.parametrize("value", [{"a": {1: 2}}, {"a": object()}, [b"x"], b"x"])
def test_what_cannot_be_searched_does_not_leave(value: Any, target_model: Model) -> None:
    with pytest.raises(LocalOnly, match="cannot be searched"):
        outgoing().check_sampling(Later(rules=value), target_model.vocab)


@pytest.mark.parametrize("unit", ['"', '"\\"', "[", "[\\]", "#", "(", "\\", '"\\'])
def test_reading_a_grammar_takes_one_step_for_each_part(unit: str) -> None:
    """Nothing that is not closed is read to the end more than once."""
    text = unit * 2000
    found = list(_GRAMMAR_PART.finditer(text))
    assert "".join(part[0] for part in found) == text
    unclosed = [part for part in found if part[0][0] in '"[' and part.end() == len(text)]
    assert len(unclosed) <= 1


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "{" ws "\\"season\\":" ws [a-z]{1,9} "}"\nws ::= [ \\t\\n]*',
        'root ::= [0-9]{11} | "\\x41\\uD800\\U00110000" | [^"\\\\]+',
        'root ::= "138" | "0013" | "8000"',
    ],
)
def test_a_grammar_without_anything_private_may_leave(grammar: str, target_model: Model) -> None:
    outgoing().check_sampling(SamplingParams(grammar=grammar), target_model.vocab)


def test_the_tokens_of_biases_are_checked(target_model: Model) -> None:
    vocab = target_model.vocab
    out = outgoing()
    spelled = vocab.encode(EMAIL, add_special=False).tolist()
    biased = SamplingParams(logit_bias=dict.fromkeys(spelled, -1.0))
    out.check_sampling(biased, vocab)  # nobody has said this address here
    out.mask_messages(MESSAGES)
    with pytest.raises(ContainsPrivate, match="tokens that have a bias"):
        out.check_sampling(biased, vocab)
    out.check_sampling(SamplingParams(logit_bias=dict.fromkeys(spelled[1:2], 1.0)), vocab)
    out.check_sampling(SamplingParams(logit_bias={vocab.n_tokens + 5: 1.0}), vocab)  # its own error, later


def test_a_detector_that_fails_keeps_everything_here() -> None:
    out = outgoing(detectors=(Failing(),))
    for call in (
        lambda: out.mask_messages(MESSAGES),
        lambda: out.mask_answer(EMAIL),
        lambda: out.egress_check(EMAIL),
    ):
        with pytest.raises(ContainsPrivate) as caught:
            call()
        assert EMAIL not in str(caught.value)


def test_what_is_found() -> None:
    limit = TimeLimit(10.0)
    assert find_private(MESSAGES, default_detectors(), limit) == (["EMAIL"], None)
    assert find_private([{"role": "user", "content": "Hello"}], default_detectors(), limit) == ([], None)
    assert find_private(MESSAGES, (Failing(),), limit) == (["SOMETHING"], "failed closed: LeakError")
    kinds, trouble = find_private(MESSAGES, (Slow(),), TimeLimit(0.01))
    assert kinds == ["SOMETHING"]
    assert trouble == "failed closed: a detector: no result within 0.01 seconds"
    with pytest.raises(TypeError, match="expected text"):
        find_private([{"role": "user", "content": b"bytes"}], default_detectors(), limit)


def test_the_budget() -> None:
    budget = CloudBudget(100)
    assert budget.spend(60) == 40
    budget.used += 30
    with pytest.raises(LocalOnly, match="the cloud's 100 tokens are spent"):
        budget.spend(10)
    assert budget.used == 90  # what was refused costs nothing
    assert budget.spend(9) == 1
    unlimited = CloudBudget(None)
    assert unlimited.spend(10**6) > 10**6
    assert unlimited.used == 10**6
