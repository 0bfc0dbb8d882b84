"""What may leave for one request: what is masked, what is refused, the last check, and the budget."""

from __future__ import annotations

import time
from typing import Any

import pytest

from sllm.privacy import Finding, Vault, default_detectors
from sllm.triage.cloud import CloudBudget
from sllm.triage.outgoing import ContainsPrivate, LocalOnly, Outgoing, PrivacyMode, find_private
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
