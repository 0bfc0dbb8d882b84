"""The pair of small models that comes with the package, so that the demo and the tests need no download.

``TARGET`` writes short texts about a small invented world in English and Chinese; ``DRAFT`` costs at most an
eighth of it, shares its vocabulary and was distilled from it. ``README.md`` next to the files is their model
card. ``TARGET_PROFILE`` is the result of ``sllm calibrate`` for the target on the labelled requests of
``training/labelled_requests.py``.
"""

from __future__ import annotations

from pathlib import Path

TARGET = Path(__file__).with_name("target.gguf")
"""The path of the larger model."""
DRAFT = Path(__file__).with_name("draft.gguf")
"""The path of its draft."""
TARGET_PROFILE = Path(__file__).with_name("target.profile.json")
"""The path of the profile with which it grades requests (``sllm.triage.Profile.load``)."""

__all__ = ["DRAFT", "TARGET", "TARGET_PROFILE"]
