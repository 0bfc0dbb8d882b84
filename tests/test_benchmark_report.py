"""``python -m benchmarks report``: what pytest-benchmark writes becomes tables and plots, and a file of
another kind is refused by name.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
SVG = "{http://www.w3.org/2000/svg}"

pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks/report.py").is_file(), reason="a source distribution has no benchmarks"
)

BENCHMARKS = """
import pytest

def test_one(benchmark):
    benchmark.extra_info.update(tokens_per_s=20.0, peer="a | b", ratio=2.0, aim="ratio >= 3", aim_met=False)
    benchmark.pedantic(lambda: None, rounds=3)

@pytest.mark.parametrize("rtt_ms", [0, 50])
@pytest.mark.parametrize("paced", [True])
def test_round_trip(benchmark, rtt_ms, paced):
    modes = ["hints, trees", "stream", "worker's draft", "hints, chains", "llama.cpp RPC"]
    figures = [
        {"rtt_ms": rtt_ms, "mbit_s": None, "mode": mode, "tokens_per_s": 100.0 - 10 * i - rtt_ms / 5}
        for i, mode in enumerate(modes)
    ]
    more = {"n_texts": 2, "max_tokens": 72, "temperature": 0.8, "pair_acceptance": 0.92, "pass_ms": 30.0}
    figures[0] |= {**more, "draft_ms": 10.0, "worker_draft_ms": 3.0}
    benchmark.extra_info.update(figures[0], modes=figures)
    benchmark.pedantic(lambda: None, rounds=3)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What pytest-benchmark writes of two benchmarks, in a repository of its own."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "test_round_trip.py").write_text(BENCHMARKS, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-json", "out.json"],
        cwd=folder,
        # Not as a part of this run, of which there may be several processes, in which nothing is measured.
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found: dict[str, Any] = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert found["machine_info"]["cpu"]["count"] > 0
    found["machine_info"]["node"] = "a-name-of-mine"
    found["commit_info"] |= {"id": "0123456789abcdef", "dirty": False}
    found["datetime"] = "2026-11-30T12:00:00+00:00"
    return found


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])  # last: sllm is the installed one
    main: Callable[..., int] = importlib.import_module("benchmarks.report").main
    return main


def keep(path: Path, found: dict[str, Any], **more: Any) -> str:
    path.write_text(json.dumps({**found, **more}), encoding="utf-8")
    return str(path)


def rows(text: str, begin: str) -> list[list[str]]:
    """The cells of the rows of tables that begin so."""
    return [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in text.splitlines()
        if line.startswith(f"| {begin}")
    ]


def test_a_file(
    written: dict[str, Any], report: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report([keep(tmp_path / "a.json", written)]) == 0
    text = capsys.readouterr().out
    (head,) = rows(text, "0123456")
    cores = written["machine_info"]["cpu"]["count"]
    assert head[:3] == ["012345678", "012345678", "2026-11-30"]
    assert f"{cores} core" in head[3]
    assert "a-name-of-mine" not in text
    (one,) = rows(text, "test_one")
    assert {"20", "a \\| b", "2", "MISSED: ratio >= 3"} <= set(one)
    names = [row[1] for row in rows(text, "test_round_trip[True-50]")]
    assert names == ["hints, trees", "stream", "worker's draft", "hints, chains", "llama.cpp RPC"]
    assert "mbit_s" not in text  # which none of them knows


def test_two_files_side_by_side(
    written: dict[str, Any], report: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faster = json.loads(json.dumps(written))
    for one in faster["benchmarks"]:
        for figures in one["extra_info"].get("modes", [one["extra_info"]]):
            figures["tokens_per_s"] *= 1.5
    faster["commit_info"] = {**written["commit_info"], "id": "fedcba9876543210", "dirty": True}
    files = [keep(tmp_path / "a.json", written), keep(tmp_path / "b.json", faster)]
    assert report([*files, "--figures", "tokens_per_s", "--plots", str(tmp_path / "plots")]) == 0
    text = capsys.readouterr().out
    assert "| benchmark | mode | figure | 012345678 | fedcba987+ | last / first |" in text
    assert ["test_one", "", "tokens_per_s", "20", "30", "1.500"] in rows(text, "test_one")
    found = rows(text, "test_round_trip[True-50]")
    assert ["test_round_trip[True-50]", "stream", "tokens_per_s", "80", "120", "1.500"] in found
    assert len(found) == 5
    plots = {path.name: path for path in (tmp_path / "plots").iterdir()}
    assert set(plots) == {
        "test-round-trip-paced-True.svg",
        "test-one-by-file.svg",
        "test-round-trip-by-file.svg",
    }
    assert all(f"]({name})" in text for name in plots)
    image = ElementTree.fromstring(plots["test-round-trip-paced-True.svg"].read_text(encoding="utf-8"))
    assert len(list(image.iter(f"{SVG}polyline"))) == 10
    words = [item.text for item in image.iter(f"{SVG}text")]
    assert "stream, fedcba987+" in words


def test_other_cpus_are_told(
    written: dict[str, Any], report: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = {**written["machine_info"], "cpu": {"brand_raw": "Another", "count": 1, "flags": ["avx2"]}}
    files = [keep(tmp_path / "a.json", written), keep(tmp_path / "b.json", written, machine_info=machine)]
    assert report(files) == 0
    text = capsys.readouterr().out
    assert "The CPUs are not the same" in text
    assert "Another, 1 core, AVX2" in text
    assert rows(text, "a |")  # of one commit, so the files' names tell them apart


def test_the_picture(written: dict[str, Any], report: Callable[..., int], tmp_path: Path) -> None:
    """Speeds over round trips, as text and lines, in a light and in a dark page."""
    out = tmp_path / "images" / "round-trip.svg"
    assert report([keep(tmp_path / "a.json", written), "--picture", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "prefers-color-scheme:dark" in text
    image = ElementTree.fromstring(text)
    lines = [line.get("points", "").split() for line in image.iter(f"{SVG}polyline")]
    assert [len(points) for points in lines] == [2] * 5
    left, right = (float(point.split(",")[0]) for point in lines[0])
    assert left < right
    words = " ".join(item.text or "" for item in image.iter(f"{SVG}text"))
    for part in ("streaming", "llama.cpp RPC", "30 ms", "92%", "2026-11-30", "commit 012345678"):
        assert part in words
    width = float(image.get("width", "0"))
    # the widest caption: some 6.2 pixels a character of this size
    assert max(len(item.text or "") for item in image.iter(f"{SVG}text")) * 6.2 < width


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff\xfe", "is not JSON"),
        (b"tokens/s", "is not JSON"),
        (b"[]", "no result of pytest-benchmark"),
        (b'{"benchmarks": {}}', "no result of pytest-benchmark"),
        (b'{"benchmarks": [1]}', "no result of pytest-benchmark"),
    ],
)
def test_what_is_no_result(
    report: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    message: str,
) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    assert report([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"report: {path}")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("damage", ["machine_info", "commit_info", "datetime", "benchmarks"])
def test_a_part_that_is_missing_or_of_another_kind(
    written: dict[str, Any],
    report: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    without = {name: value for name, value in written.items() if name != damage}
    assert report([keep(tmp_path / "a.json", without)]) == 2
    if damage != "datetime":
        assert report([keep(tmp_path / "a.json", written, **{damage: 3})]) == 2
        assert "no result of pytest-benchmark" in capsys.readouterr().err


def test_what_cannot_be_shown(
    written: dict[str, Any], report: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = keep(tmp_path / "a.json", written)
    assert report([path, "--figures", "tokens_per_s,nothing"]) == 2
    assert "no benchmark has nothing; there are: median_s, tokens_per_s" in capsys.readouterr().err
    assert report([path, path, "--picture", str(tmp_path / "p.svg")]) == 2
    assert "--picture draws one file" in capsys.readouterr().err
    empty = keep(tmp_path / "empty.json", written, benchmarks=[])
    assert report([empty]) == 2
    assert "holds no benchmark" in capsys.readouterr().err
    odd = json.loads(json.dumps(written))
    for one in odd["benchmarks"]:
        for figures in one["extra_info"].get("modes", []):
            figures["rtt_ms"] = "far"
    assert report([keep(tmp_path / "odd.json", odd), "--plots", str(tmp_path)]) == 0
    assert report([keep(tmp_path / "odd.json", odd), "--picture", str(tmp_path / "p.svg")]) == 2
    assert "no two round trips" in capsys.readouterr().err
    only = [one for one in written["benchmarks"] if one["name"] == "test_one"]
    other = keep(tmp_path / "one.json", written, benchmarks=only)
    assert report([other, "--picture", str(tmp_path / "p.svg")]) == 2
    assert "run: pytest benchmarks/test_round_trip.py --benchmark-json" in capsys.readouterr().err
    assert not (tmp_path / "p.svg").exists()
    assert report([path, "-o", str(tmp_path / "a.json" / "out.md")]) == 2
    assert "cannot be written" in capsys.readouterr().err
