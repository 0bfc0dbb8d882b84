"""Models, contexts and hypothesis settings for all tests."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from oracles import EXACT

import sllm
from sllm import embedded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Reproducible by default, and without shrinking, which could outlast the time limit of a test.
# SLLM_HYPOTHESIS_PROFILE=explore takes other examples every time and shrinks failures; SLLM_TEST_EFFORT=10
# takes ten times as many.
_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "sllm",
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=_QUIET,
)
settings.register_profile("explore", deadline=None, suppress_health_check=_QUIET)
settings.load_profile(os.environ.get("SLLM_HYPOTHESIS_PROFILE", "sllm"))


@pytest.fixture(scope="session", autouse=True)
def away_from_the_checkout(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let child interpreters find the installed package: the checkout's has no compiled core."""
    os.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def target_model() -> Iterator[sllm.Model]:
    """The embedded target."""
    with sllm.Model(embedded.TARGET) as model:
        yield model


@pytest.fixture(scope="session")
def draft_model() -> Iterator[sllm.Model]:
    """The embedded draft: the same vocabulary, cheap, so also the model for tests that need just any."""
    with sllm.Model(embedded.DRAFT) as model:
        yield model


@pytest.fixture
def make_context() -> Iterator[Callable[..., sllm.Context]]:
    """Makes contexts with the exactness conditions, unless told otherwise; they are closed after the test."""
    with ExitStack() as stack:

        def make(model: sllm.Model, **options: Any) -> sllm.Context:
            return stack.enter_context(model.context(**{"n_ctx": 512, **EXACT, **options}))

        yield make
