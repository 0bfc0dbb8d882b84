"""De-identification that can be undone: detectors, the vault, restoring, the check before text leaves."""

from __future__ import annotations

from sllm.privacy.detect import (
    KINDS,
    CensusDetector,
    Detector,
    Finding,
    LabelScorer,
    ModelDetector,
    NameDetector,
    PatternDetector,
    TaggerDetector,
    default_detectors,
)
from sllm.privacy.egress import egress_check
from sllm.privacy.restore import Restorer
from sllm.privacy.vault import Masked, MaskedMessages, Vault

__all__ = [
    "KINDS",
    "CensusDetector",
    "Detector",
    "Finding",
    "LabelScorer",
    "Masked",
    "MaskedMessages",
    "ModelDetector",
    "NameDetector",
    "PatternDetector",
    "Restorer",
    "TaggerDetector",
    "Vault",
    "default_detectors",
    "egress_check",
]
