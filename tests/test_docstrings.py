"""Every public name has a docstring with an example, and the example is true."""

from __future__ import annotations

import doctest
import inspect
import tempfile

import numpy as np
import pytest

import sllm


@pytest.mark.parametrize("name", sllm.__all__)
def test_the_example_of_a_public_name_runs(name: str) -> None:
    value = getattr(sllm, name)
    said = inspect.getdoc(value)
    assert said, f"{name} has no docstring"
    known = {"sllm": sllm, "np": np, "tempfile": tempfile}
    test = doctest.DocTestParser().get_doctest(said, known, name, None, 0)
    assert test.examples, f"{name} has no example"
    shown: list[str] = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=shown.append)
    assert failed == 0, "".join(shown)
