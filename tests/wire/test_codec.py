"""Hidden states as bytes: how much is lost, how much is sent, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracles import examples

from sllm.wire import codec

F16_MAX = float(np.finfo(np.float16).max)
SHAPES = st.tuples(st.integers(0, 5), st.sampled_from([32, 64, 96, 256]))


def rows_up_to(
    limit: float, shapes: st.SearchStrategy[tuple[int, int]] = SHAPES
) -> st.SearchStrategy[np.ndarray]:
    """Rows of numbers of any size up to a limit, zeros and denormals among them."""
    largest = float(np.float32(limit))
    return hnp.arrays(np.float32, shapes, elements=st.floats(-largest, largest, width=32))


def back(rows: np.ndarray, name: str) -> np.ndarray:
    """Encoded and decoded again, with what holds for every codec."""
    n, width = rows.shape
    data = codec.encode(rows, name)
    assert isinstance(data, bytes)
    assert len(data) == n * codec.row_bytes(name, width)
    out = codec.decode(data, n, width, name)
    assert out.shape == rows.shape
    assert out.dtype == np.float32
    assert out.flags.writeable
    assert out.flags.c_contiguous
    for i in range(n):  # rows are encoded apart, so a batch may be cut anywhere
        assert codec.encode(rows[i : i + 1], name) == data[i * len(data) // n : (i + 1) * len(data) // n]
    return out


# ---- what is lost ------------------------------------------------------------------------------------------


@examples(200)
@given(rows=rows_up_to(3.4e38, st.tuples(st.integers(0, 5), st.integers(1, 70))))
def test_f32_loses_nothing(rows: np.ndarray) -> None:
    assert back(rows, "f32").tobytes() == rows.tobytes()


@examples(200)
@given(rows=rows_up_to(F16_MAX, st.tuples(st.integers(0, 5), st.integers(1, 70))))
def test_f16_loses_half_a_unit_of_the_last_place(rows: np.ndarray) -> None:
    out = back(rows, "f16")
    assert np.array_equal(out, rows.astype(np.float16).astype(np.float32))
    # a unit in the last of 11 bits, or where float16 is denormal 2^-24
    unit = np.maximum(
        2.0 ** (np.floor(np.log2(np.maximum(np.abs(rows).astype(np.float64), 1e-300))) - 10), 2.0**-24
    )
    assert (np.abs(out.astype(np.float64) - rows) <= unit / 2).all()


@examples(200)
@given(rows=rows_up_to(3.4e38, st.tuples(st.integers(0, 5), st.integers(1, 70))))
def test_q8_loses_half_a_step_of_the_row(rows: np.ndarray) -> None:
    out = back(rows, "q8").astype(np.float64)
    peak = np.abs(rows).max(axis=1, initial=0, keepdims=True).astype(np.float64)
    # The scale is a float32, which may be off by half a unit 127 times; that of a denormal peak, by more.
    bound = peak / 254 * (1 + 1e-5) + 127 * 2.0**-149
    assert (np.abs(out - rows) <= bound).all()


@examples(200)
@given(rows=rows_up_to(3e5))
def test_q4_loses_no_more_than_a_step_of_its_block(rows: np.ndarray) -> None:
    n, width = rows.shape
    out = back(rows, "q4").astype(np.float64)
    blocks = rows.reshape(n, width // 32, 32)
    peak = np.abs(blocks).max(axis=2, initial=0, keepdims=True).astype(np.float64)
    # A float16 scale is off by 2^-11 of itself, or by 2^-25 where it is denormal, and counts up to 8 times.
    slack = peak * 2**-9 + 8 * 2.0**-24
    error = np.abs(out.reshape(blocks.shape) - blocks)
    assert (error <= peak / 8 + slack).all()
    # Half a step, but for those near the largest's opposite: 16 codes cannot lie the same way on both sides.
    assert (error <= peak / 16 + slack)[np.abs(blocks) < peak * (15 / 16)].all()


@pytest.mark.parametrize("name", codec.CODECS)
def test_zeros_stay_zeros(name: str) -> None:
    rows = np.zeros((3, 64), dtype=np.float32)
    assert not back(rows, name).any()
    rows[1] = 1
    out = back(rows, name)
    assert not out[[0, 2]].any()
    assert np.abs(out[1] - 1).max() < 1e-3
    assert back(rows[:0], name).shape == (0, 64)


@pytest.mark.parametrize("name", codec.CODECS)
@pytest.mark.parametrize("size", [1e-45, 1e-43, 1e-38, 1e-9, 1.0, 5e4])
def test_numbers_of_every_size(name: str, size: float) -> None:
    """The smallest come out as themselves or as zero, never as something else."""
    rows = (np.random.default_rng(0).uniform(-1, 1, (4, 64)) * size).astype(np.float32)
    out = back(rows, name)
    limit = {"f32": 0.0, "f16": 2.0**-11, "q8": 1 / 250, "q4": 1 / 7.9}[name]
    smallest = {"f32": 0.0, "f16": 2.0**-25, "q8": 64 * 2.0**-149, "q4": 8 * 2.0**-25}[name]
    assert np.abs(out - rows).max() <= limit * size + smallest


def test_the_largest_numbers() -> None:
    rows = np.full((2, 32), np.finfo(np.float32).max, dtype=np.float32)
    rows[0, 3] *= -1
    assert np.array_equal(back(rows, "f32"), rows)
    assert np.allclose(back(rows, "q8"), rows, rtol=1e-6)
    for name in ("f16", "q4"):
        with pytest.raises(ValueError, match=r"3\.40282e\+38 is too large for .*(float16|q4); use .*q8"):
            codec.encode(rows, name)
    for name, largest in (("f16", F16_MAX), ("q4", 8 * F16_MAX)):
        rows = np.full((1, 32), largest, dtype=np.float32)
        assert np.array_equal(back(rows, name), rows)
        with pytest.raises(ValueError, match="too large"):
            codec.encode(rows * np.float32(1.01), name)


@pytest.mark.parametrize(("name", "limit"), [("f16", F16_MAX), ("q4", 8 * F16_MAX)])
def test_what_would_round_to_infinity_is_refused(name: str, limit: float) -> None:
    """Nothing that was encoded is refused when it arrives."""
    for factor in np.linspace(0.999, 1.002, 61):
        rows = np.full((1, 32), limit * factor, dtype=np.float32)
        try:
            data = codec.encode(rows, name)
        except ValueError:
            continue
        assert np.isfinite(codec.decode(data, 1, 32, name)).all()


@pytest.mark.parametrize("name", codec.CODECS)
def test_any_finite_q8_comes_out_finite(name: str) -> None:
    del name
    rng = np.random.default_rng(1)
    for _ in range(200):
        rows = (rng.uniform(0.99, 1, (1, 32)) * np.finfo(np.float32).max).astype(np.float32)
        assert np.isfinite(back(rows, "q8")).all()


# ---- how much is sent --------------------------------------------------------------------------------------


def test_the_sizes_of_a_row() -> None:
    assert [codec.row_bytes(name, 1024) for name in codec.CODECS] == [4096, 2048, 1028, 576]
    for n_embd in range(32, 9000, 32):
        assert codec.row_bytes("q8", n_embd) <= 1.2 * n_embd
        assert codec.row_bytes("q4", n_embd) == 0.5625 * n_embd
    assert [codec.row_bytes(name, 33) for name in ("f32", "f16", "q8")] == [132, 66, 37]


def test_bytes_are_the_same_on_every_machine() -> None:
    """Little-endian, scales before codes, the first number in the low half of its byte."""
    rows = np.zeros((1, 32), dtype=np.float32)
    rows[0, :3] = (7, -3.5, 1)
    assert codec.encode(rows, "f32")[:8] == b"\x00\x00\xe0\x40\x00\x00\x60\xc0"
    assert codec.encode(rows, "f16")[:4] == b"\x00\x47\x00\xc3"
    scale = np.array([7 / 127], dtype="<f4").tobytes()
    assert codec.encode(rows, "q8") == scale + bytes([127, 256 - 64, 18]) + bytes(29)
    assert codec.encode(rows, "q4") == b"\x00\xbb" + bytes([0xC0, 0x87]) + b"\x88" * 14


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", codec.CODECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(name: str, bad: float) -> None:
    rows = np.ones((3, 64), dtype=np.float32)
    rows[1, 40] = bad
    with pytest.raises(ValueError, match="row 1 of the hidden states holds a number that is not finite"):
        codec.encode(rows, name)


@pytest.mark.parametrize(
    ("name", "at", "data"),
    [
        ("f32", 4, b"\x00\x00\xc0\x7f"),
        ("f32", 4, b"\x00\x00\x80\xff"),
        ("f16", 2, b"\x00\x7e"),
        ("f16", 2, b"\x00\x7c"),
        ("q8", 0, b"\x00\x00\xc0\x7f"),
        ("q8", 0, b"\x00\x00\x80\x7f"),
        ("q8", 0, b"\xff\xff\x7f\x7f"),  # the scale is finite, and the numbers are not
        ("q4", 2, b"\x00\xfc"),
        ("q4", 2, b"\x01\x7c"),
    ],
)
def test_received_numbers_that_are_not_finite(name: str, at: int, data: bytes) -> None:
    sent = bytearray(codec.encode(np.ones((1, 64), dtype=np.float32), name))
    sent[at : at + len(data)] = data
    with pytest.raises(ValueError, match="the hidden states hold a number that is not finite"):
        codec.decode(bytes(sent), 1, 64, name)


@examples(200)
@given(name=st.sampled_from(codec.CODECS), seed=st.integers(0, 2**32 - 1))
def test_any_bytes_are_finite_numbers_or_refused(name: str, seed: int) -> None:
    data = np.random.default_rng(seed).bytes(2 * codec.row_bytes(name, 32))
    try:
        rows = codec.decode(data, 2, 32, name)
    except ValueError:
        return
    assert rows.shape == (2, 32)
    assert np.isfinite(rows).all()


@pytest.mark.parametrize("name", codec.CODECS)
def test_another_number_of_bytes(name: str) -> None:
    data = codec.encode(np.ones((2, 64), dtype=np.float32), name)
    for wrong in (b"", data[:-1], data + b"\0", data[: len(data) // 2]):
        with pytest.raises(
            ValueError, match=f"2 rows of 64 numbers are {len(data)} bytes as {name}, not {len(wrong)}"
        ):
            codec.decode(wrong, 2, 64, name)
    assert codec.decode(b"", 0, 64, name).shape == (0, 64)
    with pytest.raises(ValueError, match="rows"):
        codec.decode(b"", -1, 64, name)


def test_unknown_codecs() -> None:
    rows = np.ones((1, 32), dtype=np.float32)
    for call in (
        lambda: codec.row_bytes("q5", 32),
        lambda: codec.encode(rows, "F16"),
        lambda: codec.decode(b"", 0, 32, ""),
    ):
        with pytest.raises(ValueError, match="expected one of f32, f16, q8, q4"):
            call()


@pytest.mark.parametrize("width", [1, 16, 31, 33, 100])
def test_rows_that_q4_cannot_take(width: int) -> None:
    rows = np.ones((1, width), dtype=np.float32)
    for call in (
        lambda: codec.row_bytes("q4", width),
        lambda: codec.encode(rows, "q4"),
        lambda: codec.decode(b"", 0, width, "q4"),
    ):
        with pytest.raises(ValueError, match=f"multiple of 32 numbers, not {width}; use q8"):
            call()
    assert back(rows, "q8").shape == rows.shape


@pytest.mark.parametrize("name", codec.CODECS)
def test_rows_of_another_layout(name: str) -> None:
    """Views with gaps and of the other order are encoded as what they hold."""
    rows = np.arange(256, dtype=np.float32).reshape(4, 64)
    assert codec.encode(np.asfortranarray(rows), name) == codec.encode(rows, name)
    assert codec.encode(rows[::2], name) == codec.encode(rows[::2].copy(), name)
