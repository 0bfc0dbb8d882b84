"""What two texts have in common, for lists and arrays alike."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sllm.engine.arrays import common_prefix

texts = st.lists(st.integers(0, 2), max_size=12)


@given(texts, texts)
def test_the_common_prefix(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
    assert common_prefix(np.array(a, dtype=np.int32), np.array(b, dtype=np.int32)) == n
    assert common_prefix(a, np.array(b, dtype=np.int32)) == n
