"""The plots of the reports: well-formed SVG, with points where they belong."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from sllm.cli.plot import Axis, Curve, Panel, figure, ticks

SVG = "{http://www.w3.org/2000/svg}"


def panel(*curves: Curve, **more: object) -> Panel:
    x, y = Axis("layers", 4, [(0, "none"), (4, "all")]), Axis("share <of> all", 1, [(1, "100%")])
    return Panel(100, 50, 300, 250, x, y, curves, **more)  # type: ignore[arg-type]


def test_points_lie_where_the_axes_say() -> None:
    curve = Curve("a & b", "#123456", [(0, 0), (2, 0.5), (4, 1)], dots=[(4, 1)], dot_title="<best>")
    image = ElementTree.fromstring(figure(400, 300, [panel(curve)], "all of <it>"))
    (line,) = image.iter(f"{SVG}polyline")
    assert line.get("points") == "100.0,250.0 200.0,150.0 300.0,50.0"
    (dot,) = image.iter(f"{SVG}circle")
    assert (dot.get("cx"), dot.get("cy")) == ("300.0", "50.0")
    assert [title.text for title in image.iter(f"{SVG}title")] == ["all of <it>", "<best>"]
    texts = {text.text for text in image.iter(f"{SVG}text")}
    assert texts == {"none", "all", "100%", "layers", "share <of> all", "a & b"}


def test_what_is_above_the_top_is_drawn_at_the_top() -> None:
    assert panel().at(4, 7) == (300, 50)


def test_marks() -> None:
    image = ElementTree.fromstring(figure(400, 300, [panel(marker=2, limit=(0.25, "a quarter"))]))
    paths = {path.get("d") for path in image.iter(f"{SVG}path")}
    assert {"M200.0 50V250", "M100 200.0H300"} <= paths
    assert "a quarter" in {text.text for text in image.iter(f"{SVG}text")}


@pytest.mark.parametrize(
    ("top", "expected"),
    [(1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.11, [0, 0.02, 0.04, 0.06, 0.08, 0.1]), (7, [0, 2, 4, 6])],
)
def test_ticks(top: float, expected: list[float]) -> None:
    assert ticks(top) == pytest.approx(expected)


def test_ticks_are_few() -> None:
    for i in range(1, 1000):
        found = ticks(i / 100)
        assert 2 <= len(found) <= 7
        assert found[-1] <= i / 100
