"""Layers of a model and bad input: typed errors that say what is wrong, and never the end of the process."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import random
import subprocess
import sys
import textwrap
import threading
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import random_models
from oracles import EFFORT, EXACT
from random_models import EVERY, N_VOCAB, SHAPES

import sllm
from sllm import embedded
from sllm.engine import gguf
from sllm.engine.layers import Embedding, LayerRange, export_layers, open_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OPTIONS: dict[str, Any] = {"n_ctx": 64, **EXACT}
ROWS = np.ones((3, 64), dtype=np.float32)


@pytest.fixture(params=[False, True], ids=["hidden", "logits"])
def tail(llama: Path, request: pytest.FixtureRequest) -> Iterator[LayerRange]:
    """The last two layers, without and with the output, for two sequences."""
    with LayerRange(llama, 2, 4, output=request.param, n_seq_max=2, **OPTIONS) as one:
        one.forward(ROWS)
        yield one


# ---- ranges ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "stop"), [(-1, 2), (2, 2), (3, 2), (0, 5), (4, 4), (5, 5), (-4, -2), (0, 2**31 - 1)]
)
def test_ranges_that_are_none(llama: Path, tmp_path: Path, start: int, stop: int) -> None:
    said = r"layers \[-?\d+, -?\d+\) are not a range of the 4 layers of llama\.gguf: expected 0 <= start"
    with pytest.raises(ValueError, match=said):
        LayerRange(llama, start, stop, **OPTIONS)
    if (start, stop) != (4, 4):
        with pytest.raises(ValueError, match=said):
            export_layers(llama, tmp_path / "out.gguf", start, stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [1.5, "1", None, 2.0])
def test_layers_are_numbered(llama: Path, tmp_path: Path, bad: Any) -> None:
    for call in (
        lambda: LayerRange(llama, bad, 4, **OPTIONS),
        lambda: LayerRange(llama, 0, bad, **OPTIONS),
        lambda: export_layers(llama, tmp_path / "x", bad, 4),
        lambda: export_layers(llama, tmp_path / "x", 0, bad),
    ):
        with pytest.raises(TypeError, match=r"(start|stop) is .*, expected an integer"):
            call()
    with pytest.raises(ValueError, match="stop is"):
        LayerRange(llama, 0, 2**40, **OPTIONS)
    with LayerRange(llama, np.int64(1), np.int64(2), **OPTIONS) as one:  # type: ignore[arg-type]
        assert (one.start, one.stop) == (1, 2)


def test_ends_that_the_range_does_not_have(llama: Path) -> None:
    with pytest.raises(ValueError, match="the output follows layer 3, and the range ends at 2"):
        LayerRange(llama, 0, 2, output=True, **OPTIONS)
    with sllm.Model(llama, vocab_only=True) as vocabulary, pytest.raises(ValueError, match="output=True"):
        LayerRange(llama, 0, 2, vocabulary=vocabulary, **OPTIONS)
    with pytest.raises(TypeError, match="vocabulary is 'x', expected a Model"):
        LayerRange(llama, 2, 4, output=True, vocabulary="x", **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_batch is 32769"):
        LayerRange(llama, 0, 2, n_batch=32769, **OPTIONS)
    with pytest.raises(MemoryError, match="lower n_ctx"):
        LayerRange(llama, 0, 2, **{**OPTIONS, "n_ctx": 2**31 - 1})


def test_a_vocabulary_of_another_model(llama: Path) -> None:
    said = f"its output has {N_VOCAB} rows, and its vocabulary 2560"
    with (
        sllm.Model(embedded.DRAFT, vocab_only=True) as other,
        pytest.raises(sllm.ModelLoadError, match=said),
    ):
        LayerRange(llama, 2, 4, output=True, vocabulary=other, **OPTIONS)
    with pytest.raises(sllm.ClosedError):
        LayerRange(llama, 2, 4, output=True, vocabulary=other, **OPTIONS)


def test_what_a_part_does_not_hold(llama: Path, tmp_path: Path) -> None:
    head, middle, last = (tmp_path / f"{name}.gguf" for name in ("head", "middle", "last"))
    export_layers(llama, head, 0, 1)
    export_layers(llama, middle, 1, 3)
    export_layers(llama, last, 3, 4)
    for path, start, stop in ((head, 1, 2), (middle, 0, 1), (middle, 0, 3), (middle, 2, 4), (last, 0, 4)):
        held = open_layers(path).layers
        said = (
            rf"{path.name} holds layers \[{held.start}, {held.stop}\), and \[{start}, {stop}\) were asked for"
        )
        for call in (
            partial(LayerRange, path, start, stop, **OPTIONS),
            partial(export_layers, path, tmp_path / "out.gguf", start, stop),
        ):
            with pytest.raises(ValueError, match=said):
                call()
    for path in (head, middle):
        for call in (
            partial(LayerRange, path, 4, 4, output=True, **OPTIONS),
            partial(export_layers, path, tmp_path / "out.gguf", 4, 4),
        ):
            with pytest.raises(ValueError, match=f"{path.name} holds no output"):
                call()
    for path in (middle, last):
        with pytest.raises(ValueError, match=f"{path.name} holds no embedding"):
            Embedding(open_layers(path))
    with pytest.raises(sllm.ModelLoadError):  # a part is no model
        sllm.Model(middle)
    assert len(list(tmp_path.iterdir())) == 3


# ---- hidden states -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "error", "said"),
    [
        (
            np.where(np.arange(192).reshape(3, 64) == 70, np.nan, 1).astype("f4"),
            ValueError,
            r"hidden\[1, 6\] is nan",
        ),
        (
            np.where(np.arange(192).reshape(3, 64) == 191, -np.inf, 1).astype("f4"),
            ValueError,
            r"hidden\[2, 63\] is -inf",
        ),
        (ROWS.astype(np.float64), TypeError, "an array of float64, expected a float32 array"),
        (ROWS.astype(np.float16), TypeError, "an array of float16"),
        (ROWS.astype(">f4"), TypeError, "an array of >f4"),
        (ROWS.astype(np.int32), TypeError, "an array of int32"),
        (ROWS.tolist(), TypeError, "list, expected a float32 array"),
        (None, TypeError, "NoneType, expected"),
        (b"x" * 768, TypeError, "bytes, expected"),
        (ROWS[0], ValueError, r"shape \(64,\), expected \(n, 64\)"),
        (ROWS[None], ValueError, r"shape \(1, 3, 64\), expected \(n, 64\)"),
        (np.ones((3, 65), dtype="f4"), ValueError, r"shape \(3, 65\), expected \(n, 64\)"),
        (np.ones((64, 3), dtype="f4"), ValueError, r"shape \(64, 3\)"),
        (np.asfortranarray(ROWS), ValueError, "not contiguous"),
        (np.ones((6, 64), dtype="f4")[::2], ValueError, "not contiguous"),
        (ROWS[:0], ValueError, "sequence 0 is given no rows"),
        (np.broadcast_to(np.float32(1), (3, 64)), ValueError, "not contiguous"),
    ],
)
def test_hidden_states_that_are_none(
    tail: LayerRange, hidden: Any, error: type[Exception], said: str
) -> None:
    expected = tail.forward(ROWS, pos=0)
    with pytest.raises(error, match=said):
        tail.forward(hidden, pos=0)
    with pytest.raises(error, match=r"hidden|sequence 1 is given no rows"):
        tail.forward([ROWS, hidden], seq_id=[0, 1], pos=[0, 0])
    assert tail.memory.length() == 3
    assert tail.memory.length(1) == 0
    assert np.array_equal(tail.forward(ROWS, pos=0), expected)


@pytest.mark.parametrize("size", [3e38, 1e-45, 0.0])
def test_finite_numbers_of_any_size_do_no_harm(tail: LayerRange, size: float) -> None:
    expected = tail.forward(ROWS, pos=0)
    assert tail.forward(ROWS * np.float32(size), pos=0).shape == expected.shape
    assert np.array_equal(tail.forward(ROWS, pos=0), expected)


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        ({"seq_id": -1}, ValueError, "sequence -1 does not exist"),
        ({"seq_id": 2}, ValueError, "sequence 2 does not exist"),
        ({"seq_id": 2**40}, ValueError, "seq_id"),
        ({"seq_id": 1.5}, TypeError, "seq_id"),
        ({"seq_id": None}, TypeError, "seq_id"),
        ({"seq_id": "0"}, TypeError, "seq_id"),
        ({"seq_id": [0, 1]}, ValueError, "hidden has 1 arrays, expected one for each of 2 sequences"),
        ({"seq_id": [2**40]}, ValueError, "seq_id"),
        ({"seq_id": []}, ValueError, "hidden has 1 arrays"),
        ({"pos": -1}, ValueError, "pos is -1"),
        ({"pos": 4}, ValueError, "position 4 leaves a gap: sequence 0 ends at 3"),
        ({"pos": 2**31}, ValueError, "int32"),
        ({"pos": 2**40}, ValueError, "int32"),
        ({"pos": 1.5}, TypeError, "pos"),
        ({"pos": "0"}, TypeError, "pos"),
        ({"pos": [0, 0]}, ValueError, "pos has 2 items"),
    ],
)
def test_places_that_are_none(
    tail: LayerRange, where: dict[str, Any], error: type[Exception], said: str
) -> None:
    hidden = [ROWS] if "seq_id" in where and not isinstance(where["seq_id"], (int, float)) else ROWS
    with pytest.raises(error, match=said):
        tail.forward(hidden, **where)
    assert tail.memory.length() == 3


def test_sequences_named_twice_or_not_at_all(tail: LayerRange) -> None:
    with pytest.raises(ValueError, match="sequence 1 is named twice"):
        tail.forward([ROWS, ROWS], seq_id=[1, 1])
    with pytest.raises(ValueError, match="no sequences given"):
        tail.forward([], seq_id=[])


def test_a_full_range(tail: LayerRange) -> None:
    room = tail.context.n_ctx_seq
    long = np.ones((room - 2, 64), dtype=np.float32)
    with pytest.raises(sllm.ContextFullError, match=f"{room - 2} tokens at position 3 do not fit"):
        tail.forward(long)
    assert tail.memory.length() == 3
    assert len(tail.forward(long[1:])) == room - 3
    assert tail.memory.length() == room
    with pytest.raises(sllm.ContextFullError):
        tail.forward(ROWS)


# ---- what a range is not for -------------------------------------------------------------------------------


def test_calls_of_a_context_that_take_tokens(tail: LayerRange, target_model: sllm.Model) -> None:
    context = tail.context
    with target_model.context(**OPTIONS) as other:
        other.decode([1, 2])
        state = other.save()
    for call in (
        lambda: context.decode([1]),
        lambda: context.draft([0], [1]),
        lambda: context.verify([0], [1]),
        lambda: context.score([1], [[1]], seq_ids=[1]),
        lambda: context.save(),
        lambda: context.load(state),
        lambda: context.model.vocab.encode("x"),
        lambda: context.model.vocab.fingerprint,
    ):
        with pytest.raises(sllm.UnsupportedModelError):
            call()
    assert tail.memory.length() == 3
    tail.forward(ROWS)


def test_no_text_comes_from_a_range(tail: LayerRange) -> None:
    with pytest.raises(ValueError, match=r"output=True and vocabulary"):
        tail.verify([0], [1], hidden=ROWS[:1])
    with pytest.raises(TypeError, match="expected a Model or a Target"):
        sllm.generate(tail.context.model, [1, 2], max_tokens=2).text()  # type: ignore[arg-type]


def test_hidden_states_are_not_for_a_whole_model(draft_model: sllm.Model) -> None:
    hidden = np.zeros((1, draft_model.n_embd), dtype=np.float32)
    with draft_model.context(**OPTIONS) as context:
        for call in (
            lambda: context.decode([1], hidden=hidden),
            lambda: context.verify([0], [1], hidden=hidden),
        ):
            with pytest.raises(
                ValueError, match="hidden states are for layers of a model, and this is a whole one"
            ):
                call()


def test_verify_checks_what_it_is_given(llama: Path) -> None:
    with (
        sllm.Model(llama, vocab_only=True) as vocabulary,
        LayerRange(llama, 2, 4, output=True, vocabulary=vocabulary, **OPTIONS) as tail,
    ):
        for draft, hidden, said in (
            ([[1, 2]], ROWS[:1], r"shape \(1, 64\), expected \(3, 64\)"),
            (None, ROWS, r"shape \(3, 64\), expected \(1, 64\)"),
            (None, ROWS[:1] * np.float32(np.nan), "not a finite number"),
            ([[1], [2]], ROWS, "draft has 2 rows"),
        ):
            with pytest.raises(ValueError, match=said):
                tail.verify([0], [1], draft, hidden=hidden)
        with pytest.raises(ValueError, match=f"token {N_VOCAB} is not in the vocabulary"):
            tail.verify([0], [N_VOCAB], hidden=ROWS[:1])
        with pytest.raises(sllm.UnsupportedModelError, match="they take hidden states, not tokens"):
            tail.verify([0], [1], hidden=None)  # type: ignore[arg-type]
        assert tail.memory.length() == 0
        # what is no token is a draft that was wrong
        verdict = tail.verify([0], [1], [[-5, 10**6]], hidden=ROWS)
        assert verdict.n_accepted.tolist() == [0]
        assert tail.memory.length() == 1
        vocabulary.close()
        with pytest.raises(sllm.ClosedError):
            tail.verify([0], [1], hidden=ROWS[:1], sampling=sllm.SamplingParams(seed=99))
        tail.forward(ROWS)


# ---- lifetime ----------------------------------------------------------------------------------------------


def test_nothing_works_after_close(llama: Path) -> None:
    with sllm.Model(llama, vocab_only=True) as vocabulary:
        one = LayerRange(llama, 2, 4, output=True, vocabulary=vocabulary, **OPTIONS)
        one.close()
        one.close()
        assert one.closed
        assert "closed" in repr(one)
        for call in (
            lambda: one.forward(ROWS),
            lambda: one.verify([0], [1], hidden=ROWS[:1]),
            lambda: one.memory.length(),
            one.cancel,
            one.__enter__,
        ):
            with pytest.raises(sllm.ClosedError):
                call()


def test_a_range_that_nobody_closed(llama: Path) -> None:
    def lose() -> None:
        LayerRange(llama, 1, 2, **OPTIONS)
        gc.collect()

    gc.collect()
    said = r"unclosed <sllm\.LayerRange \[1, 2\) of 'llama\.gguf'"
    with pytest.warns(ResourceWarning, match=said) as caught:
        lose()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bad in ({"type_k": "x"}, {"n_seq_max": 1000}, {"n_gpu_layers": -7}):
            with contextlib.suppress(ValueError):
                LayerRange(llama, 1, 2, **{**OPTIONS, **bad}).close()
        LayerRange(llama, 1, 2, **OPTIONS).close()
        gc.collect()


def test_loading_can_be_stopped_and_leaves_no_file_open(llama: Path) -> None:
    def stop(done: float) -> None:
        raise LookupError(f"at {done}")

    folder = Path("/proc/self/fd")
    before = len(list(folder.iterdir())) if folder.is_dir() else 0
    with pytest.raises(LookupError, match="at "):
        LayerRange(llama, 1, 2, progress=stop, **OPTIONS)
    with LayerRange(llama, 1, 2, **OPTIONS) as one:
        assert (len(list(folder.iterdir())) if folder.is_dir() else 0) == before
        one.forward(ROWS)


class Inside:
    """A thread that is inside a range while the block runs, and has left it behind the block."""

    def __init__(self, one: LayerRange, hidden: Any) -> None:
        self.one, self.hidden = one, hidden
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        while self._is_kept_out():
            pass

    def _is_kept_out(self) -> bool:
        try:
            self.one.forward(self.hidden)
        except sllm.BusyError:  # __enter__() was asking
            return True
        except sllm.SllmError as error:
            self.error = error
        return False

    def __enter__(self) -> Inside:
        self.thread.start()
        with contextlib.suppress(sllm.BusyError):
            while self.thread.is_alive():
                self.one.memory.length(0)
        return self

    def __exit__(self, *_exception: object) -> None:
        self.thread.join()


@pytest.mark.parametrize("output", [False, True])
def test_other_threads(output: bool) -> None:
    path = Path(embedded.TARGET)
    rows = np.random.default_rng(0).standard_normal((4000, 256), dtype=np.float32)
    with LayerRange(path, 2, 8, output=output, n_ctx=4096, n_ubatch=32, n_batch=64, n_threads=1) as one:
        expected = one.forward(rows[:5])
        with Inside(one, rows) as call:
            try:
                for knock in (
                    lambda: one.forward(rows[:1]),
                    lambda: one.memory.length(),
                    lambda: one.memory.truncate(0, 0),
                ):
                    with pytest.raises(sllm.BusyError, match="thread"):
                        knock()
            finally:
                one.cancel()
        assert isinstance(call.error, sllm.CancelledError)
        assert one.memory.length() == 5
        assert np.array_equal(one.forward(rows[:5], pos=0), expected)
        with Inside(one, rows) as call:
            one.close()
        assert isinstance(call.error, (sllm.CancelledError, sllm.ClosedError))


def test_ctrl_c() -> None:
    said = script(
        """
        rows = np.random.default_rng(0).standard_normal((4000, 256), dtype=np.float32)
        for output in (False, True):
            with LayerRange(sys.argv[1], 2, 8, output=output, n_ctx=4096, n_ubatch=32, n_threads=1) as one:
                expected = one.forward(rows[:5])
                timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
                try:
                    timer.start()
                    one.forward(rows)
                except KeyboardInterrupt:
                    print("interrupted", one.memory.length())
                timer.join()
                assert np.array_equal(one.forward(rows[:5], pos=0), expected)
        """,
        embedded.TARGET,
    )
    assert said.split() == ["interrupted", "5"] * 2


SCRIPT = """
import gc, os, signal, sys, threading
from pathlib import Path
import numpy as np
import sllm
from sllm.engine.layers import Embedding, LayerRange, export_layers, open_layers

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit "ignore"
OPTIONS = {"n_ctx": 64, "n_threads": 1}
"""


def script(body: str, *args: object, options: tuple[str, ...] = ("-W", "error")) -> str:
    """Run a program of its own; it ends well, and nobody complains."""
    ended = subprocess.run(
        [
            sys.executable,
            *options,
            "-X",
            "faulthandler",
            "-c",
            SCRIPT + textwrap.dedent(body),
            *map(str, args),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:] + ended.stdout[-2000:]
    assert not ended.stderr, ended.stderr[-4000:]
    return ended.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_and_may_start_afresh(llama: Path) -> None:
    said = script(
        """
        one = LayerRange(sys.argv[1], 2, 4, output=True, **OPTIONS)
        rows = np.ones((2, 64), dtype=np.float32)
        expected = one.forward(rows)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            for call in (lambda: one.forward(rows), one.memory.length, one.cancel, one.__enter__):
                try:
                    call()
                except sllm.ClosedError as error:
                    assert "fork" in str(error)
                else:
                    raise AssertionError(call)
            repr(one)
            del one
            gc.collect()
            with LayerRange(sys.argv[1], 2, 4, output=True, **OPTIONS) as other:
                assert np.array_equal(other.forward(rows), expected)
            print("child", flush=True)
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert np.array_equal(one.forward(rows, pos=0), expected)
        one.close()
        print("parent")
        """,
        llama,
        options=("-W", "error::ResourceWarning"),
    )
    assert said.split() == ["child", "parent"]


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "values", "tensor", "said"),
    [
        ("baichuan", {}, None, "how its layers find positions"),
        ("gemma3n", {}, None, "every layer looks up embeddings"),
        ("rwkv7", {}, None, "no test proves it equal"),
        ("no such thing", {}, None, "no test proves it equal"),
        ("phi3", {}, b"rope_factors_long.weight", "its rotary factors depend on the length of the context"),
        ("gemma3", {b"block_count": 62}, None, "a model of 62 layers"),
        ("gemma2", {b"block_count": 46}, None, "a model of 46 layers"),
        ("exaone4", {b"block_count": 64}, None, "a model of 64 layers"),
        ("command-r", {b"block_count": 80}, None, "a model of 80 layers"),
        ("smallthinker", {b"attention.sliding_window": 0}, None, "which of its layers rotate"),
        ("llama4", {b"attention.sliding_window": 0}, None, "which of its layers rotate"),
        ("gemma4", {b"embedding_length_per_layer_input": 64}, None, "every layer looks up embeddings"),
        ("gemma4", {b"attention.shared_kv_layers": 2}, None, "look at the memory of others"),
        ("llama", {}, b"dense_2.weight", "no range would have its dense_2.weight"),
        ("qwen3", {b"nextn_predict_layers": 1}, None, "layers that predict further tokens"),
        ("granite", {b"deepstack_mapping": 3}, None, "image"),
        ("llama", {}, b"output.scale", "a scale of its own"),
    ],
)
def test_models_that_do_not_come_apart(
    tmp_path: Path, architecture: str, values: dict[bytes, int], tensor: bytes | None, said: str
) -> None:
    file = random_models.make(SHAPES.get(architecture, SHAPES["llama"]))
    was = bytes(file.metadata[b"general.architecture"][1])
    file.metadata = {
        key.replace(was + b".", architecture.encode() + b"."): value for key, value in file.metadata.items()
    }
    file.metadata[b"general.architecture"] = (8, architecture.encode())
    for key, value in values.items():
        file.metadata[architecture.encode() + b"." + key] = (4, value)
    if tensor is not None:
        file.tensors[tensor] = ([16], 0, bytes(64))
    path = file.write(tmp_path / "m.gguf")
    for call in (
        lambda: open_layers(path),
        lambda: LayerRange(path, 0, 1, **OPTIONS),
        lambda: export_layers(path, tmp_path / "out.gguf", 0, 1),
    ):
        with pytest.raises(sllm.UnsupportedModelError, match=said) as caught:
            call()
        assert "m.gguf" in str(caught.value)
        assert architecture in str(caught.value)


@pytest.mark.parametrize(
    ("name", "start", "stop", "said"),
    [
        ("smollm3", 1, 8, "comes back after 4 layers, so a range begins at a multiple of 4"),
        ("smollm3", 6, 7, "multiple of 4"),
        ("llama4", 2, 4, "multiple of 4"),
        ("gpt-oss", 3, 4, "at least one layer that has a sliding window, which are 0, 2, 4, 6"),
        ("cohere2", 7, 8, "a sliding window, which are 0, 1, 2, 4, 5, 6"),
        ("gemma4", 2, 5, "begins with a layer that has a sliding window, which layer 2 has not"),
        ("gemma4", 0, 1, "at least 2 layers"),
        ("lfm2", 0, 2, "at least one layer that has attention, which are 2, 5, 8"),
        ("lfm2", 2, 3, "at least one layer that is recurrent, which are 0, 1, 3, 4, 6, 7"),
        ("nemotron_h", 3, 5, "is recurrent, which are 0, 2, 5, 7"),
        ("qwen35", 4, 7, "has attention, which are 3, 7, 11"),
        ("qwen35moe", 3, 4, "is recurrent"),
        ("deepseek2", 1, 27, "llama.cpp takes 26 layers for another model"),
    ],
)
def test_ranges_that_do_not_run_apart(
    tmp_path: Path, random_model: Callable[..., Path], name: str, start: int, stop: int, said: str
) -> None:
    """The error says which would."""
    more = {"n_layer": 28} if name == "deepseek2" else {}
    path = random_model(name, **more)
    for call in (
        lambda: LayerRange(path, start, stop, **OPTIONS),
        lambda: export_layers(path, tmp_path / "out.gguf", start, stop),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            call()
        assert path.name in str(caught.value)
        assert f"[{start}, {stop})" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_files_that_are_none(tmp_path: Path) -> None:
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"GGML" + bytes(100))
    for path in (tmp_path / "none.gguf", tmp_path, junk):
        for call in (
            partial(open_layers, path),
            partial(LayerRange, path, 0, 1),
            partial(export_layers, path, junk, 0, 1),
        ):
            with pytest.raises(sllm.ModelLoadError, match=path.name):
                call()


def test_a_file_cut_anywhere(llama: Path, tmp_path: Path) -> None:
    """No part is made of it, since what would be missing there nobody could tell."""
    data = llama.read_bytes()
    rng = random.Random(0)
    body = gguf.read_header(llama).size
    path = tmp_path / "cut.gguf"
    for n in (
        *rng.sample(range(8, body), 10),
        body,
        *rng.sample(range(body, len(data) - 32), 10),
        len(data) - 32,
    ):
        path.write_bytes(data[:n])
        for call in (
            lambda: open_layers(path),
            lambda: LayerRange(path, 0, 2, **OPTIONS),
            lambda: export_layers(path, tmp_path / "out.gguf", 0, 2),
        ):
            with pytest.raises(sllm.ModelLoadError, match=r"cut\.gguf"):
                call()
    assert [f.name for f in tmp_path.iterdir()] == ["cut.gguf"]


def test_a_file_that_shrinks_after_it_was_opened(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "shrunk.gguf"
    path.write_bytes(llama.read_bytes())
    file = open_layers(path)
    with Embedding(file) as embedding:
        os.truncate(path, gguf.read_header(path).tensors["token_embd.weight"].offset + 100)
        with pytest.raises(sllm.ModelLoadError, match=r"shrunk\.gguf"):
            embedding.rows([200])
        for start, stop in ((0, 1), (2, 4)):
            with pytest.raises(sllm.ModelLoadError, match=r"shrunk\.gguf"):
                LayerRange(file, start, stop, **OPTIONS)
            with pytest.raises(sllm.ModelLoadError, match=r"shrunk\.gguf"):
                file.export(tmp_path / "out.gguf", start, stop)
    path.unlink()
    with pytest.raises(OSError, match=r"shrunk\.gguf"):
        LayerRange(file, 0, 1, **OPTIONS)
    assert not list(tmp_path.iterdir())


_ALLOWED = """
def attempt(call):
    try:
        call()
    except (sllm.ModelLoadError, sllm.UnsupportedModelError, ValueError, MemoryError, sllm.InferenceError):
        return 0
    return 1

def everything(path, out):
    try:
        file = open_layers(path)
    except (sllm.ModelLoadError, sllm.UnsupportedModelError):
        return 0
    n = min(file.n_layer, 10)

    def run(start, stop, output):
        with LayerRange(file, start, stop, output=output, **OPTIONS) as one:
            one.forward(np.ones((2, file.n_embd), dtype=np.float32))

    def look_up():
        with Embedding(file) as embedding:
            embedding.rows([0, 5])

    return sum(map(attempt, (
        look_up,
        lambda: run(0, 1, False),
        lambda: run(1, 3, False),
        lambda: run(3, n, True),
        lambda: run(n, n, True),
        lambda: file.export(out, 0, 2),
        lambda: file.export(out, n, n),
    )))

"""


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3moe", "qwen35", "gemma4", "bloom"])
def test_flipped_bytes_in_a_header(random_model: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """Typed errors or success, in a process of its own, which lives to tell."""
    said = script(
        _ALLOWED
        + """
import random
data, folder = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
texts, names = data.find(b"tokenizer.ggml.tokens"), data.find(b"token_embd.weight") - 8
size = int(sys.argv[4])
rng = random.Random(sys.argv[1])
good = 0
for _ in range(int(sys.argv[3])):
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.choice((rng.randrange(4, texts), rng.randrange(names, size)))
        changed[at] ^= rng.choice((1 << rng.randrange(8), 255, rng.randrange(1, 256)))
    (folder / "flipped.gguf").write_bytes(changed)
    good += everything(folder / "flipped.gguf", folder / "out.gguf") > 0
print(good)
""",
        random_model(name),
        tmp_path,
        60 * EFFORT,
        gguf.read_header(random_model(name)).size,
    )
    assert int(said) > 0


def _damaged_values() -> Iterator[tuple[bytes, tuple[int, Any] | None]]:
    keys = (
        b"block_count", b"embedding_length", b"attention.head_count", b"attention.head_count_kv",
        b"attention.key_length", b"rope.dimension_count", b"attention.sliding_window",
        b"attention.sliding_window_pattern", b"embedding_scale", b"attention.layer_norm_rms_epsilon",
        b"attention.recurrent_layers", b"full_attention_interval", b"leading_dense_block_count",
        b"nextn_predict_layers", b"logit_scale", b"context_length", b"rope.dimension_sections",
    )  # fmt: skip
    values: tuple[tuple[int, Any] | None, ...] = (
        None, (4, 0), (4, 3), (4, 2**32 - 1), (5, -1), (6, float("nan")), (6, 1e30), (8, b"x"), (10, 2**63),
        (9, (4, [])), (9, (4, [2**32 - 1] * 8)), (9, (7, [True] * 8)), (9, (6, [1.0] * 1000)), (12, 1e300),
    )  # fmt: skip
    for key in keys:
        for value in values:
            yield key, value


@pytest.mark.parametrize("name", ["gemma3", "minicpm", "qwen35"])
def test_damaged_numbers_in_a_header(tmp_path: Path, name: str) -> None:
    shape = dataclasses.replace(EVERY[name], n_layer=4)
    file = random_models.make(shape)
    before = dict(file.metadata)
    for i, (key, value) in enumerate(_damaged_values()):
        file.metadata = {k: v for k, v in before.items() if not k.endswith(b"." + key)}
        if value is not None:
            file.metadata[f"{shape.architecture}.".encode() + key] = value
        file.write(tmp_path / f"{i:04d}.gguf")
    said = script(
        _ALLOWED
        + """
folder = Path(sys.argv[1])
paths = sorted(folder.glob("*.gguf"))
print(len(paths), sum(everything(path, folder / "out") > 0 for path in paths))
""",
        tmp_path,
    )
    n_files, n_good = map(int, said.split())
    assert n_files == i + 1
    assert 0 < n_good < n_files


@pytest.mark.parametrize(
    ("dims", "kind", "said"),
    [
        ([], 8, "token_embd.weight has the shape"),
        ([0, 4], 8, "shape"),
        ([64, 2**40], 8, "shape"),
        ([2**63, 2**63], 8, "shape"),
        ([N_VOCAB, 64], 0, "shape|bytes"),
        ([64, N_VOCAB, 1], 8, r"shape \(64, 304, 1\), expected \(64, n_vocab\)"),
        ([32, N_VOCAB], 8, r"shape \(32, 304\), expected \(64, n_vocab\)"),
        (
            [64, N_VOCAB + 1],
            8,
            f"has {N_VOCAB * 68} bytes for token_embd.weight, expected {(N_VOCAB + 1) * 68}",
        ),
        ([64, N_VOCAB], 0, "bytes for token_embd.weight"),
        ([64, N_VOCAB], 12, "ggml's type 12"),
        ([64, N_VOCAB], 99, "ggml's type 99"),
        ([64, N_VOCAB], 2**32 - 1, "ggml's type 4294967295"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, dims: list[int], kind: int, said: str) -> None:
    file = random_models.make(SHAPES["llama"])
    _dims, _kind, data = file.tensors[b"token_embd.weight"]
    file.tensors[b"token_embd.weight"] = (dims, kind, data)
    path = file.write(tmp_path / "m.gguf")
    with pytest.raises(sllm.ModelLoadError, match=said):
        open_layers(path)


@pytest.mark.parametrize("kind", [24, 25, 26, 27, 28, 9, 15, 4, 5, 31, 36])
@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.attn_q.weight"])
def test_types_that_are_not_for_weights(tmp_path: Path, name: str, kind: int) -> None:
    """Integers, doubles, and what ggml keeps to itself or gave up: a crash, were they loaded."""
    file = random_models.make(dataclasses.replace(SHAPES["llama"], n_embd=256, n_head=8))
    dims, _kind, _data = file.tensors[name.encode()]
    file.tensors[name.encode()] = (dims, kind, bytes(8 * dims[0] * dims[1]))
    with pytest.raises(sllm.ModelLoadError, match=rf"{name} .*ggml's type {kind}, which"):
        open_layers(file.write(tmp_path / "m.gguf"))


@pytest.mark.parametrize("name", ["blk.1.attn_norm.weight", "output_norm.weight", "blk.0.attn_q.bias"])
def test_norms_and_biases_are_float32(tmp_path: Path, name: str) -> None:
    file = random_models.make(SHAPES["llama, biases"])
    dims, _kind, data = file.tensors[name.encode()]
    file.tensors[name.encode()] = (dims, 1, data)
    with pytest.raises(sllm.ModelLoadError, match=f"{name} is of ggml's type 1, which is not for such"):
        open_layers(file.write(tmp_path / "m.gguf"))


def test_a_model_without_some_of_its_tensors(tmp_path: Path) -> None:
    file = random_models.make(SHAPES["llama"])
    del file.tensors[b"blk.1.attn_q.weight"]
    path = file.write(tmp_path / "m.gguf")
    with pytest.raises(sllm.ModelLoadError, match=r"layers \[0, 2\) of .*m\.gguf: (?s:.*)blk\.1\.attn_q"):
        LayerRange(path, 0, 2, **OPTIONS)
    with LayerRange(path, 2, 4, output=True, **OPTIONS) as one:
        one.forward(ROWS)


# ---- writing a part ----------------------------------------------------------------------------------------


def test_a_part_is_never_written_over_its_model(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(llama.read_bytes())
    (tmp_path / "link.gguf").symlink_to(path)
    for out in (path, tmp_path / "link.gguf", tmp_path / ".." / tmp_path.name / "m.gguf"):
        with pytest.raises(FileExistsError, match="is the model itself"):
            export_layers(path, out, 0, 2)
    assert path.read_bytes() == llama.read_bytes()
    first = random_models.write_in_parts(tmp_path, "m", SHAPES["llama"], 2)
    with pytest.raises(FileExistsError, match="is the model itself"):
        export_layers(first, tmp_path / "m-00002-of-00002.gguf", 0, 2)


def test_places_that_cannot_be_written(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    for out in (tmp_path / "none" / "out.gguf", tmp_path / "file" / "out.gguf", tmp_path / "folder"):
        with pytest.raises(OSError, match=out.name):
            export_layers(llama, out, 0, 2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder"]
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_a_full_disk_leaves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def full(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode != "xb":
            return real(path, mode, *args, **kwargs)
        real(path, mode).close()
        return real(Path("/dev/full"), "wb", 0)

    monkeypatch.setattr(Path, "open", full)
    (tmp_path / "out.gguf").write_bytes(b"what was there")
    with pytest.raises(OSError, match="No space left"):
        export_layers(llama, tmp_path / "out.gguf", 0, 2)
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("out.gguf", b"what was there")]


def test_two_exports_to_one_place(llama: Path, tmp_path: Path) -> None:
    """Neither takes the other's unfinished file away."""
    out = tmp_path / "out.gguf"
    sizes: list[int] = []

    def meanwhile(_done: float) -> None:
        if not sizes:
            sizes.append(0)
            sizes.append(export_layers(llama, out, 0, 1))
            assert out.stat().st_size == sizes[-1]

    size = export_layers(llama, out, 0, 2, progress=meanwhile)
    assert out.stat().st_size == size > sizes[-1]
    assert open_layers(out).layers == range(2)
    assert len(list(tmp_path.iterdir())) == 1


def test_an_export_can_be_stopped(llama: Path, tmp_path: Path) -> None:
    def stop(done: float) -> None:
        raise KeyboardInterrupt(done)

    with pytest.raises(KeyboardInterrupt):
        export_layers(llama, tmp_path / "out.gguf", 0, 2, progress=stop)
    assert not list(tmp_path.iterdir())
