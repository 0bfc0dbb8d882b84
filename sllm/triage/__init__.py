"""Three tiers: who answers a request, and what of it may leave this machine."""

from __future__ import annotations

from sllm.triage.calibration import Profile
from sllm.triage.triage import (
    SIGNALS,
    Assessment,
    ContextScorer,
    Grade,
    Policy,
    Tier,
    TimeLimit,
    Triage,
    Wording,
)

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
