"""A part whose packages are missing says which extra brings them."""

from __future__ import annotations

import importlib

import pytest

from sllm.extras import needs


def test_a_missing_package_names_its_extra() -> None:
    wanted = pytest.raises(ImportError, match=r"no_such_package, .* pip install 'sllm\[remote\]'")
    with wanted as caught, needs("remote"):
        import no_such_package.part  # type: ignore[import-not-found] # noqa: F401
    assert caught.value.name == "no_such_package"


def test_a_missing_part_of_our_own_is_no_matter_of_extras() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_part"), needs("hub"):
        importlib.import_module("sllm.no_such_part")


def test_what_is_installed_passes() -> None:
    with needs("privacy"):
        import json  # noqa: F401
