"""Three tiers: who answers a request, and what of it may leave this machine."""

from __future__ import annotations

from sllm.triage.policy import Policy, Wording
from sllm.triage.profile import Profile
from sllm.triage.scorer import ContextScorer
from sllm.triage.time_limit import TimeLimit
from sllm.triage.triage import SIGNALS, Assessment, Grade, Tier, Triage

__all__ = [
    "SIGNALS",
    "Assessment",
    "ContextScorer",
    "Grade",
    "Policy",
    "Profile",
    "Tier",
    "TimeLimit",
    "Triage",
    "Wording",
]
