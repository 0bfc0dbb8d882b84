"""Old names of modules."""

from __future__ import annotations

import importlib
import sys

import pytest

import sllm
from sllm import _moved
from sllm.engine import hub
from sllm.triage.calibration import Profile


@pytest.mark.parametrize("old", sorted(_moved.MOVED))
def test_an_old_name_warns_and_gives_what_the_new_one_has(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    new = importlib.import_module(_moved.MOVED[old])
    with pytest.warns(DeprecationWarning, match=f"{old} is now {_moved.MOVED[old]}") as caught:
        module = importlib.import_module(old)
    assert caught[0].filename != _moved.__file__
    for name in new.__all__:
        assert getattr(module, name) is getattr(new, name)
    with pytest.raises(AttributeError):
        module.nothing_of_the_kind  # noqa: B018


def test_names_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sllm.hub", raising=False)
    monkeypatch.delattr(sllm, "hub", raising=False)
    assert sllm.hub is hub
    assert importlib.import_module("sllm.hub") is hub
    assert sllm.hub is hub  # an import sets the attribute


def test_the_readmes_old_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sllm.calibration", raising=False)
    names: dict[str, object] = {}
    with pytest.warns(DeprecationWarning, match="calibration"):
        exec("from sllm.calibration import Profile as found", names)
    assert names["found"] is Profile


def test_other_names_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("sllm.nothing_of_the_kind")
    assert not hasattr(sllm, "nothing_of_the_kind")
