"""Loading: files that are no models, arguments that are none, callbacks that do what they should not."""

from __future__ import annotations

import math
import os
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import random_models

import sllm
from sllm import embedded
from sllm.engine.devices import devices

if TYPE_CHECKING:
    from collections.abc import Callable

DRAFT = embedded.DRAFT


# ---- files that are no models -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"G", "is not a GGUF file"),
        (b"once upon a time\n" * 100, "is not a GGUF file"),
        (b"\x00" * 4096, "is not a GGUF file"),
        (b"FUGG" + b"\x00" * 60, "is not a GGUF file"),
        (b"GGUF", ""),
        (b"GGUF" + b"\xff" * 400, ""),
        (b"GGUF\x03\x00\x00\x00" + b"\x00" * 16, ""),  # no tensors, no metadata
        (b"GGUF\x00\x00\x00\x03" + b"\x00" * 400, ""),  # the other byte order
        (b"GGUF\x01\x00\x00\x00" + b"\x00" * 400, ""),  # a version long gone
        (b"GGUF\x63\x00\x00\x00" + b"\x00" * 400, ""),  # a version to come
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, ""),  # 2**64 - 1 of everything
    ],
)
def test_files_that_are_no_models(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "no.gguf"
    path.write_bytes(content)

    with pytest.raises(sllm.ModelLoadError) as caught:
        sllm.Model(path)

    text = str(caught.value)
    assert text.startswith(str(path)) and said in text
    assert len(text) > len(str(path)) + 2  # and something about why
    assert "\n" not in text


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(sllm.ModelLoadError, match="does not exist"):
        sllm.Model(tmp_path / "missing.gguf")
    with pytest.raises(sllm.ModelLoadError, match="is a directory"):
        sllm.Model(tmp_path)
    with pytest.raises(sllm.ModelLoadError, match="is a directory"):
        sllm.Model("")
    with pytest.raises(sllm.ModelLoadError):
        sllm.Model(DRAFT / "inside a file")
    with pytest.raises(sllm.ModelLoadError):
        sllm.Model(os.devnull)
    with pytest.raises(sllm.ModelLoadError):
        sllm.Model(tmp_path / ("x" * 5000))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(sllm.ModelLoadError):
        sllm.Model(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(sllm.ModelLoadError):
        sllm.Model(tmp_path / "dangling")
    with pytest.raises(sllm.ModelLoadError):
        sllm.Model("http://127.0.0.1:9/model.gguf")
    with pytest.raises((sllm.ModelLoadError, ValueError)):
        sllm.Model("a\0b")


PIPE = """
import os, sys, sllm
os.mkfifo(sys.argv[1])
try:
    sllm.Model(sys.argv[1])
except sllm.ModelLoadError as error:
    print(error)
"""


def test_pipes_and_sockets_are_refused_without_waiting_for_them(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", PIPE, str(tmp_path / "pipe.gguf")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert said.stdout.startswith(str(tmp_path / "pipe.gguf"))

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "s"))  # a socket's name may not be as long as a path
        with pytest.raises(sllm.ModelLoadError):
            sllm.Model(tmp_path / "s")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_files_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(DRAFT.read_bytes())
    path.chmod(0)

    with pytest.raises(sllm.ModelLoadError, match="cannot be read"):
        sllm.Model(path)

    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(DRAFT.read_bytes())
    folder.chmod(0)
    try:
        with pytest.raises(sllm.ModelLoadError):
            sllm.Model(folder / "model.gguf")
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("value", [None, 5, 1.5, ["model.gguf"], object()])
def test_paths_are_paths(value: Any) -> None:
    with pytest.raises(TypeError):
        sllm.Model(value)


@pytest.mark.parametrize("use_mmap", [True, False])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, use_mmap: bool) -> None:
    whole = DRAFT.read_bytes()
    chance = random.Random(1)
    # All over the file; in its header, which is short; and just short of the end.
    places = [chance.randrange(4, len(whole)) for _ in range(20)]
    places += [chance.randrange(4, 200) for _ in range(5)] + [len(whole) - 1, len(whole) - 4096]
    path = tmp_path / "cut.gguf"

    for n in places:
        path.write_bytes(whole[:n])
        with pytest.raises(sllm.ModelLoadError):
            sllm.Model(path, use_mmap=use_mmap)

    path.write_bytes(whole)
    sllm.Model(path, use_mmap=use_mmap).close()


def test_a_load_that_failed_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(DRAFT.read_bytes()[:100_000])

    def n_open() -> int:
        folder = Path("/proc/self/fd")
        return len(list(folder.iterdir())) if folder.is_dir() else 0

    with pytest.raises(sllm.ModelLoadError) as first:
        sllm.Model(path)
    before = n_open()
    for _ in range(50):
        with pytest.raises(sllm.ModelLoadError) as again:
            sllm.Model(path)
        assert str(again.value) == str(first.value)  # and not one line longer each time

    assert n_open() == before


# ---- arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"split_mode": "diagonal"}, ValueError),
        ({"split_mode": None}, ValueError),
        ({"devices": ["no such device"]}, ValueError),
        ({"devices": [0]}, ValueError),
        ({"devices": 0}, TypeError),
        ({"tensor_split": []}, ValueError),
        ({"tensor_split": [0.0, 0.0]}, ValueError),
        ({"tensor_split": [math.nan]}, ValueError),
        ({"tensor_split": [math.inf]}, ValueError),
        ({"tensor_split": [-1.0]}, ValueError),
        ({"tensor_split": [1.0] * 1000}, ValueError),
        ({"tensor_split": 1.0}, TypeError),
        ({"n_gpu_layers": 2**31}, ValueError),
        ({"n_gpu_layers": -(2**40)}, ValueError),
        ({"n_gpu_layers": "all"}, TypeError),
        ({"n_gpu_layers": 1.5}, TypeError),
        ({"use_mmap": "yes"}, TypeError),
        ({"n_gpu_layer": 1}, TypeError),
    ],
    ids=str,
)
def test_arguments_are_checked(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        sllm.Model(DRAFT, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"use_mmap": False},
        {"use_mlock": True},
        {"check_tensors": True},
        {"n_gpu_layers": 0},
        {"n_gpu_layers": -7},
        {"n_gpu_layers": 2**31 - 1},
        {"split_mode": "none"},
        {"split_mode": "row"},
        {"tensor_split": [1]},
        {"tensor_split": [3e38, 3e38]},
        {"devices": []},
        {"devices": [device for device in devices() if device.type == "cpu"]},
        {"devices": [device.name for device in devices() if device.type == "cpu"] * 2},
    ],
    ids=str,
)
def test_every_way_to_load_gives_a_model_that_computes(options: dict[str, Any]) -> None:
    with sllm.Model(DRAFT, **options) as model, model.context(n_ctx=256, n_threads=1) as context:
        assert context.decode([5, 6, 7], logits="last") is not None


def test_devices_are_described() -> None:
    found = devices()

    assert [device.index for device in found] == list(range(len(found)))
    assert any(device.type == "cpu" for device in found)
    assert all(device.name and device.memory_total >= device.memory_free >= 0 for device in found)


# ---- what a model says of itself ----------------------------------------------------------------------


def test_attributes_are_those_of_the_file(draft_model: sllm.Model) -> None:
    metadata = draft_model.metadata
    prefix = metadata["general.architecture"]

    assert draft_model.architecture == prefix
    assert draft_model.n_layer == int(metadata[f"{prefix}.block_count"])
    assert draft_model.n_embd == int(metadata[f"{prefix}.embedding_length"])
    assert draft_model.n_head == int(metadata[f"{prefix}.attention.head_count"])
    assert draft_model.n_ctx_train == int(metadata[f"{prefix}.context_length"])
    assert 0 < draft_model.size_bytes < DRAFT.stat().st_size
    assert draft_model.n_params > 0
    assert draft_model.can_rollback == "free"
    assert draft_model.path == DRAFT
    assert prefix in draft_model.description


def test_metadata_is_read_only(draft_model: sllm.Model) -> None:
    with pytest.raises(TypeError):
        draft_model.metadata["general.architecture"] = "else"  # type: ignore[index]


def test_a_file_without_a_chat_template_says_so(tmp_path: Path) -> None:
    # The key is renamed in place, so that every offset stays.
    path = tmp_path / "no_template.gguf"
    path.write_bytes(DRAFT.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_templatX"))

    with sllm.Model(path) as model, pytest.raises(sllm.UnsupportedModelError, match="no chat template"):
        model.chat([{"role": "user", "content": "hello"}])


def test_unusual_paths(tmp_path: Path) -> None:
    content = DRAFT.read_bytes()
    for name in ["with space.gguf", "mit Umlaut ä.gguf", "模型.gguf", "no suffix", "-dash.gguf", "%s%n.gguf"]:
        path = tmp_path / name
        path.write_bytes(content)
        for spelled in (path, str(path), os.fsencode(path)):
            with sllm.Model(spelled) as model:  # type: ignore[arg-type]
                assert model.path == path
                assert "\n" not in repr(model)


# ---- progress callbacks -------------------------------------------------------------------------------


def test_progress_runs_from_zero_to_one() -> None:
    seen: list[float] = []

    sllm.Model(DRAFT, progress=seen.append).close()

    assert seen[0] == 0.0 and seen[-1] == 1.0 and seen == sorted(seen)


class Stop(BaseException):
    """What no library code catches by accident."""


def test_what_a_progress_callback_raises_comes_out_wherever_it_raises() -> None:
    calls: list[float] = []
    sllm.Model(DRAFT, progress=calls.append).close()

    for n in range(len(calls)):
        left = [n]

        def progress(_part: float, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Stop(f"call {left[0]}")

        with pytest.raises(Stop, match="call -1"):  # the first time is the last
            sllm.Model(DRAFT, progress=progress)

    # Nothing of that comes up later, where something else goes wrong.
    with sllm.Model(DRAFT) as model, pytest.raises(ValueError, match="vocabulary"):
        model.vocab.piece(-1)


@pytest.mark.parametrize("progress", [5, "tqdm", object()])
def test_a_progress_callback_that_cannot_be_called(progress: Any) -> None:
    with pytest.raises(TypeError, match="not callable"):
        sllm.Model(DRAFT, progress=progress)


def test_a_progress_callback_that_takes_nothing() -> None:
    wrong: Callable[..., Any] = lambda: None  # noqa: E731
    with pytest.raises(TypeError, match="positional"):
        sllm.Model(DRAFT, progress=wrong)


@pytest.mark.parametrize("answer", [False, 0, None, "no"])
def test_what_a_progress_callback_returns_means_nothing(answer: Any) -> None:
    sllm.Model(DRAFT, progress=lambda _part: answer).close()


def test_a_progress_callback_may_use_the_library() -> None:
    def progress(_part: float) -> None:
        with pytest.raises(sllm.ModelLoadError, match="does not exist"):
            sllm.Model("/nowhere/model.gguf")
        with sllm.Model(DRAFT) as inner, inner.context(n_ctx=256, n_threads=1) as context:
            context.decode([5, 6])
            with pytest.raises(ValueError, match="vocabulary"):
                context.decode([-1])

    sllm.Model(DRAFT, progress=progress).close()


def test_loads_on_several_threads_at_once_keep_their_callbacks_apart() -> None:
    class MineError(Exception):
        pass

    outcomes: dict[int, object] = {}

    def load(i: int) -> None:
        def progress(part: float) -> None:
            if i % 2 and part > 0:
                raise MineError(i)

        try:
            with sllm.Model(DRAFT, progress=progress) as model:
                outcomes[i] = model.n_layer
        except MineError as error:
            outcomes[i] = error.args[0]

    threads = [threading.Thread(target=load, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    with sllm.Model(DRAFT) as model:
        assert outcomes == {i: i if i % 2 else model.n_layer for i in range(8)}


def test_a_model_that_would_rotate_nothing(tmp_path: Path) -> None:
    """ggml would look for the end of an endless loop, where no Ctrl-C reaches it."""
    for name in ("gemma3", "phi3"):
        file = random_models.make(random_models.SHAPES[name])
        file.metadata[f"{name}.rope.dimension_count".encode()] = (4, 0)
        path = file.write(tmp_path / f"{name}.gguf")
        with pytest.raises(sllm.ModelLoadError, match=r"rope\.dimension_count is 0"):
            sllm.Model(path)
