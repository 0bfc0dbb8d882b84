"""The house stays as docs/architecture.md draws it: no import upwards, no circle, no stray file."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "docs" / "house.py").is_file(), reason="there is no source tree here"
)


def load() -> Any:
    spec = importlib.util.spec_from_file_location("house", ROOT / "docs" / "house.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["house"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def house() -> Any:
    return load()


def test_imports_run_downwards_and_never_in_a_circle(house: Any) -> None:
    found = house.modules()
    assert len(found) > 100
    assert house.faults(found, house.arrows(found)) == []


def test_the_page_shows_the_house_as_it_is(house: Any) -> None:
    found = house.modules()
    shown = house.PAGE.read_text(encoding="utf-8").partition(house.BEGIN)[2].partition(house.END)[0]
    assert shown == f"\n{house.drawing(found, house.arrows(found))}\n", "python docs/house.py --write"


def test_pytest_goes_into_every_folder_of_tests(pytestconfig: pytest.Config) -> None:
    """Its own list of folders to pass over has ``build``, and what is never collected never fails."""
    folders = {file.parent.name for file in (ROOT / "tests").rglob("test_*.py")}
    assert "build" in folders
    passed_over = pytestconfig.getini("norecursedirs")
    assert [name for name in folders for pattern in passed_over if fnmatch.fnmatch(name, pattern)] == []


def test_every_file_that_the_page_names_is_there(house: Any) -> None:
    page = house.PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:sllm|csrc|docs|tests|training|benchmarks)/[\w./]+)`", page))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def package(folder: Path, **texts: str) -> Path:
    """A made-up ``sllm`` of these modules, dots written as double underscores."""
    for name, text in {"__init__": "", **texts}.items():
        path = folder / "sllm" / Path(*name.split("__") if not name.startswith("__") else [name])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(text)
    return folder / "sllm"


@pytest.mark.parametrize(
    ("texts", "wrong"),
    [
        ({"errors": "", "engine__model": "from sllm.errors import SllmError"}, None),
        (
            {"errors": "from sllm.engine import model", "engine__model": ""},
            "errors, line 1: imports",
        ),
        ({"engine__model": "def f():\n    from sllm.cli import main", "cli__main": ""}, r"line 2: imports"),
        (
            {"engine__a": "if TYPE_CHECKING:\n    import sllm.worker.b", "worker__b": ""},
            r"engine\.a, line 2: imports sllm\.worker\.b, which is not below it",
        ),
        ({"engine__a": "from sllm import privacy", "privacy____init__": ""}, "not below"),
        (
            {"engine__a": "from sllm.engine import b", "engine__b": "from sllm.engine.a import x"},
            "a circle: sllm",
        ),
        ({"attic": ""}, "sllm.attic is in no room"),
    ],
)
def test_what_is_wrong_is_found(house: Any, tmp_path: Path, texts: dict[str, str], wrong: str | None) -> None:
    found = house.modules(package(tmp_path, **texts))
    said = "\n".join(house.faults(found, house.arrows(found)))
    assert said == "" if wrong is None else re.search(wrong, said), said
