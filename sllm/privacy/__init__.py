"""De-identification that can be undone: detectors, the vault, restoring, and the last check before text leaves."""

from __future__ import annotations

from sllm.privacy.detect import (
    KINDS,
    Detector,
    Finding,
    LabelScorer,
    ModelDetector,
    NameDetector,
    PatternDetector,
    default_detectors,
)

__all__ = [
    "KINDS",
    "Detector",
    "Finding",
    "LabelScorer",
    "ModelDetector",
    "NameDetector",
    "PatternDetector",
    "default_detectors",
]
