"""What is wrong with a model file, in words for whoever named it.

llama.cpp reports a login page, an unfinished download and a projector for images alike: "failed to load
model".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sllm.engine import gguf
from sllm.engine._ffi import lib
from sllm.engine.file_kind import N_BYTES, not_gguf
from sllm.engine.model_name import PART, suggestion
from sllm.errors import ModelLoadError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["check_file", "explained"]

_MOST_NAMED = 5

_OTHER_TYPES = {
    "adapter": "a LoRA adapter, which is no model of its own; name the model that it was made for",
    "mmproj": "a projector for images or sound; name the language model beside it",
    "imatrix": "an importance matrix, from which models are quantised; name a model",
}
"""``general.type`` of GGUF files that are no models."""


def check_file(path: Path) -> None:
    """Refuse what is no GGUF file, and a model in several files that is not complete or not named by its
    first one. Costs the reading of a few bytes.

    Raises:
        ModelLoadError: says what is there instead, and what to do.

    """
    _check_kind(path)
    part = PART.fullmatch(path.name)
    if part is None or int(part["count"]) < 2:
        return
    count = int(part["count"])
    names = [f"{part['stem']}-{i:05d}-of-{part['count']}.gguf" for i in range(1, count + 1)]
    about = _split_facts(path)
    if about is None:
        return  # a whole model that is only called so
    index, said = about
    if said != count:
        raise ModelLoadError(
            f"{path} was renamed: it is a part of a model in {said} files, and its name says {count};"
            " llama.cpp finds the others by name, so give it back the one that it came with"
        )
    if index != 0:
        raise ModelLoadError(
            f"{path} is part {index + 1} of {count} of a split model; name the first part,"
            f" {path.with_name(names[0])}"
        )
    missing = [name for name in names if not path.with_name(name).exists()]
    if missing:
        raise ModelLoadError(
            f"{path} is the first of {count} parts of a model, and {_listed(missing)} {_are(missing)} missing"
            " beside it; download all parts into one folder"
        )
    for name in names[1:]:
        _check_kind(path.with_name(name))


def explained(path: Path, error: ModelLoadError) -> ModelLoadError:
    """``error``, which llama.cpp gave for this file, with the reason before it where the file shows one: a
    download that was cut off, a file of another kind or of some layers alone, another byte order.
    """
    try:
        reason = _reason(path)
    except ModelLoadError as damage:
        reason = str(damage)
    except OSError:
        return error
    return error if reason is None else ModelLoadError(f"{reason} ({str(error).removeprefix(f'{path}: ')})")


def _reason(path: Path) -> str | None:
    header = gguf.read_header(path)
    kind = header.value("general.type")
    if kind in _OTHER_TYPES:
        return f"{path} is {_OTHER_TYPES[kind]}"
    if header.value("general.architecture") == "clip":
        return f"{path} is {_OTHER_TYPES['mmproj']}"
    start, stop = header.value("sllm.layers.start"), header.value("sllm.layers.stop")
    if start is not None:
        return (
            f"{path} holds layers [{start}, {stop}) of a model, and no whole one; such a file is for"
            " LayerRange, SplitTarget and `sllm worker --layers`"
        )
    said = header.value("split.count") or 0
    if said > 1 and PART.fullmatch(path.name) is None:
        return (
            f"{path} was renamed: it is a part of a model in {said} files, which llama.cpp finds by names"
            f" that end in -00001-of-{said:05d}.gguf"
        )
    for part in gguf.parts(path):
        cut = _missing_bytes(part)
        if cut:
            size = part.stat().st_size
            return (
                f"{part} is not complete: it has {size:,} bytes, and its last tensor ends at {size + cut:,};"
                " download it again"
            )
    return None


def _missing_bytes(path: Path) -> int:
    """How many bytes a file lacks at its end, by the shapes of its tensors; 0: none."""
    end = 0
    for tensor in gguf.read_header(path).tensors.values():
        if tensor.kind < 1 << 31 and tensor.dims and all(0 < dim < 1 << 31 for dim in tensor.dims):
            row = lib.sllm_row_size(tensor.kind, tensor.dims[0])
            end = max(end, tensor.offset + row * math.prod(tensor.dims[1:]))
    return max(end - path.stat().st_size, 0)


def _split_facts(path: Path) -> tuple[int, int] | None:
    """``split.no`` and ``split.count`` of a file, or None where it says neither or is damaged."""
    try:
        header = gguf.read_header(path)
    except (ModelLoadError, OSError):
        return None  # llama.cpp says what is wrong with it
    index, count = header.value("split.no"), header.value("split.count")
    return (index, count) if isinstance(index, int) and isinstance(count, int) and count > 1 else None


def _check_kind(path: Path) -> None:
    try:
        if path.is_dir():
            raise ModelLoadError(f"{path} is a directory, expected a GGUF file{_inside(path)}")
        if path.exists() and not path.is_file():
            # opening a pipe would wait for somebody to write
            raise ModelLoadError(f"{path} is not a regular file, expected a GGUF file")
        with path.open("rb") as file:
            head = file.read(N_BYTES)
    except ModelLoadError:
        raise
    except FileNotFoundError:
        raise ModelLoadError(f"{path} does not exist, expected a GGUF file{suggestion(path)}") from None
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name
        raise ModelLoadError(f"{path!r} is no path: {error}") from None
    if not head:
        raise ModelLoadError(f"{path} is empty, expected a GGUF file")
    if not head.startswith(b"GGUF"):
        raise ModelLoadError(f"{path} is not a GGUF file: {not_gguf(head)}")


def _inside(folder: Path) -> str:
    """What of a folder may have been meant."""
    names = sorted(entry.name for entry in folder.iterdir())
    models = [name for name in names if name.lower().endswith(".gguf")]
    if models:
        return f"; {_listed(models)} {_are(models)} in it"
    if any(name.endswith(".safetensors") for name in names):
        return "; it holds a safetensors checkpoint, which llama.cpp's convert_hf_to_gguf.py makes one of"
    return ""


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
