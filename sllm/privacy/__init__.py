"""Reversible de-identification: detectors, the vault, restoring, and the check before text leaves."""

from __future__ import annotations

from sllm.privacy.detect import PatternDetector, default_detectors
from sllm.privacy.egress import egress_check
from sllm.privacy.findings import KINDS, Detector, Finding, LabelScorer
from sllm.privacy.names.census import CensusDetector
from sllm.privacy.names.detectors import ModelDetector, NameDetector
from sllm.privacy.names.tagger import TaggerDetector
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
