"""The random models of tests: each is one that llama.cpp runs, and no two tokens leave the same behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from oracles import EXACT
from random_models import EVERY, N_VOCAB, SHAPES

import sllm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("name", [name for name in EVERY if name not in SHAPES])
def test_every_shape_is_a_model(random_model: Callable[..., Path], name: str) -> None:
    """With its layers and not the heads behind them; those of the other shapes are in test_layers.py."""
    shape = EVERY[name]
    tokens = np.random.default_rng(0).integers(0, N_VOCAB, 24).astype(np.int32)
    with sllm.Model(random_model(name)) as model, model.context(n_ctx=64, **EXACT) as context:
        assert model.n_layer == shape.n_layer
        assert model.metadata["general.architecture"] == shape.architecture
        rows = context.decode(tokens, logits="all")
        assert rows is not None
        assert np.isfinite(rows).all()
        assert np.ptp(rows, axis=0).max() > 0.5
