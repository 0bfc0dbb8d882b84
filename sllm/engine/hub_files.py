"""Which of a repository's files is meant where the repository alone is named, or a quantisation of it.

The rules are llama.cpp's (``common/download.cpp``: ``find_best_model``), but for one: where several files are
left, none of them is taken.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sllm.engine.model_name import PART, QUANT
from sllm.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sllm.engine.model_name import HubName

__all__ = ["choose"]

_DEFAULTS = ("Q4_K_M", "Q8_0")
_BESIDE_A_MODEL = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
"""What the names of GGUF files hold that are no models of their own."""

_MOST_LISTED = 16
_LABEL = re.compile(rf"(?<![A-Za-z0-9])(?:{QUANT})(?![A-Za-z0-9_])", re.ASCII | re.IGNORECASE)


def choose(name: HubName, files: Iterable[str]) -> str:
    """The path of the one file that ``name`` means, of those in its repository; of a split model the first.

    Args:
        name: with a ``tag``, a ``folder``, both or neither.
        files: the paths of all files in the repository.

    Raises:
        ModelLoadError: there is none, or several are left; lists what the tag could be.

    Examples:
        >>> from sllm.engine import hub_files, model_name
        >>> hub_files.choose(model_name.parse("me/it:q8_0"), ["it-Q4_K_M.gguf", "it-Q8_0.gguf", "README.md"])
        'it-Q8_0.gguf'

    """
    below = name.folder.strip("/") + "/" if name.folder else ""
    names = sorted(file for file in files if file.startswith(below))
    ggufs = [file for file in names if file.lower().endswith(".gguf")]
    if name.tag is not None:
        named = [file for file in ggufs if name.tag.lower() in (file.lower(), _base(file).lower())]
        if len(named) == 1:
            return named[0]
    models = [file for file in ggufs if _is_model(file)]
    where = name.repo_id if name.revision is None else f"{name.repo_id} at revision {name.revision!r}"
    if below:
        where += f" in folder {below!r}"
    if not models:
        raise ModelLoadError(f"cannot load {name.uri}: {where} has no GGUF file{_instead(names)}")
    if name.tag is None or name.tag.lower() == "latest":
        if len(models) == 1:
            return models[0]
        found = next((of_tag for tag in _DEFAULTS if len(of_tag := _of_tag(models, tag)) == 1), [])
        if found:
            return found[0]
        reason = f"{where} has {len(models)} GGUF files"
    else:
        found = _of_tag(models, name.tag)
        if len(found) == 1:
            return found[0]
        if found:
            reason = f"{where} has {len(found)} GGUF files of {name.tag}"
            models = found
        else:
            reason = f"{where} has no GGUF file of {name.tag}"
    raise ModelLoadError(f"cannot load {name.uri}: {reason}; name one of its own: {_listed(name, models)}")


def _base(file: str) -> str:
    return file.rpartition("/")[2]


def _is_model(file: str) -> bool:
    """Not what belongs to a model, nor a later part of one."""
    base = _base(file).lower()
    part = PART.fullmatch(_base(file))
    return not any(word in base for word in _BESIDE_A_MODEL) and (part is None or int(part["index"]) == 1)


def _of_tag(models: Sequence[str], tag: str) -> list[str]:
    """Those in whose path the tag is a word; ``UD-Q4_K_M`` is no ``Q4_K_M``."""
    word = re.compile(rf"(?<![A-Za-z0-9])(?<!UD-){re.escape(tag)}(?![A-Za-z0-9_])", re.IGNORECASE)
    return [file for file in models if word.search(file)]


def _listed(name: HubName, models: Sequence[str]) -> str:
    """What a user can write instead: tags where they tell the files apart, else the files."""
    labels = []
    for file in models:
        found = _LABEL.findall(_base(file)) or _LABEL.findall(file)
        labels.append(found[-1] if found and len(_of_tag(models, found[-1])) == 1 else "")
    at = "" if name.revision is None else f"@{name.revision}"
    if all(labels) and len(labels) > 1:
        shown, one = sorted(labels), f"{'' if name.hub == 'hf' else 'ms://'}{name.repo_id}{at}:"
    else:
        shown, one = list(models), f"{name.hub}://{name.repo_id}{at}/"
    more = len(shown) - _MOST_LISTED
    return one + (", ".join(shown[:_MOST_LISTED])) + (f" and {more} more" if more > 0 else "")


def _instead(names: Sequence[str]) -> str:
    if any(name.endswith(".safetensors") for name in names):
        return (
            ", but a safetensors checkpoint; look for a repository of the same name with -GGUF at its end, or"
            " convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    return "; look at the repository's files"
