"""Line plots as SVG: enough for the reports of the commands, without a library for plots."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Axis", "Curve", "Panel", "figure", "ticks"]

# A viewer without style sheets shows what the attributes say. Paper and ink change together, so an image is
# legible on any page; curves keep their colours.
_STYLE = (
    "<style>.paper{fill:#fff}.ink{fill:#1f2328}.faint{fill:#59636e}.axis{stroke:#1f2328}.grid{stroke:#d8dee4}"
    "@media (prefers-color-scheme:dark){.paper{fill:#0d1117}.ink{fill:#e6edf3}.faint{fill:#9198a1}"
    ".axis{stroke:#e6edf3}.grid{stroke:#30363d}}</style>"
)
_LINE = 16  # pixels from one line of text to the next


@dataclass(frozen=True)
class Axis:
    """One axis, from 0.

    Attributes:
        label: what it shows; "" for no label.
        top: its largest value, above 0.
        ticks: values with the text beside each.

    """

    label: str
    top: float
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Curve:
    """One line of a plot.

    Attributes:
        name: for the legend.
        colour: as SVG has it, such as ``"#1f77b4"``.
        points: (x, y) each, in the units of the axes.
        dots: points to mark.
        dot_title: what a viewer shows for a mark.
        dashes: lengths of dashes and gaps, such as ``"6 3"``; "" for a line without gaps.

    """

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    dots: Sequence[tuple[float, float]] = ()
    dot_title: str = ""
    dashes: str = ""


@dataclass(frozen=True)
class Panel:
    """One plot of a figure.

    Attributes:
        left, top, right, bottom: where the axes lie, in pixels from the figure's upper left corner.
        x, y: the axes.
        curves: the lines; the legend names them in this order.
        title: above the plot.
        marker: a value of ``x`` with a dashed line, None for none.
        limit: a value of ``y`` with a dashed line, and what to call it, None for none.
        legend: where the legend begins, in pixels, and its ``text-anchor``.

    """

    left: float
    top: float
    right: float
    bottom: float
    x: Axis
    y: Axis
    curves: Sequence[Curve]
    title: str = ""
    marker: float | None = None
    limit: tuple[float, str] | None = None
    legend: tuple[float, float, str] | None = None

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies in the figure, in pixels; above the top of ``y`` it is drawn at the top."""
        return (
            self.left + (self.right - self.left) * x / self.x.top,
            self.bottom - (self.bottom - self.top) * min(y, self.y.top) / self.y.top,
        )


def figure(
    width: int, height: int, panels: Sequence[Panel], title: str = "", caption: Sequence[str] = ()
) -> str:
    """An SVG image of panels, light or dark as the viewer is; ``title`` is what a viewer shows for all of it,
    and ``caption`` the lines at the bottom.
    """
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
            f' viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
        ),
    ]
    if title:
        parts.append(f"<title>{escape(title)}</title>")
    parts += [_STYLE, f'<rect width="{width}" height="{height}" fill="white" class="paper"/>']
    for panel in panels:
        parts += [*_axes(panel), *_marks(panel)]
        for curve in panel.curves:
            parts += _curve(panel, curve)
        parts += _legend(panel)
    first = height - 12 - _LINE * (len(caption) - 1)
    parts += [_text(16, first + _LINE * i, words, kind="faint") for i, words in enumerate(caption)]
    return "\n".join([*parts, "</svg>", ""])


def ticks(top: float, most: int = 6) -> list[float]:
    """Round values from 0 to at most ``top``, not many more than ``most`` of them; ``top`` is above 0."""
    step = 10.0 ** math.floor(math.log10(top))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if top / s <= most)
    return [i * step for i in range(int(top / step) + 1)]


def _text(x: float, y: float, words: str, anchor: str = "start", more: str = "", kind: str = "ink") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}"{more}>{escape(words)}</text>'


def _axes(panel: Panel) -> list[str]:
    left, top, right, bottom = panel.left, panel.top, panel.right, panel.bottom
    parts = []
    for value, words in panel.y.ticks:
        y = panel.at(0, value)[1]
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#ddd" class="grid"/>')
        parts.append(_text(left - 6, y + 4, words, "end"))
    parts += [_text(panel.at(value, 0)[0], bottom + 16, words, "middle") for value, words in panel.x.ticks]
    parts.append(f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="black" class="axis"/>')
    middle = (left + right) / 2
    if panel.title:
        parts.append(_text(middle, top - 12, panel.title, "middle"))
    parts.append(_text(middle, bottom + 36, panel.x.label, "middle"))
    if panel.y.label:
        x, y = left - 45, (top + bottom) / 2
        parts.append(_text(x, y, panel.y.label, "middle", f' transform="rotate(-90 {x:.1f} {y:.1f})"'))
    return parts


def _marks(panel: Panel) -> list[str]:
    parts = []
    if panel.marker is not None:
        x = panel.at(panel.marker, 0)[0]
        parts.append(f'<path d="M{x:.1f} {panel.top}V{panel.bottom}" stroke="#888" stroke-dasharray="4 3"/>')
    if panel.limit is not None:
        value, words = panel.limit
        y = panel.at(0, value)[1]
        colour = "#d62728"
        parts.append(
            f'<path d="M{panel.left} {y:.1f}H{panel.right}" stroke="{colour}" stroke-dasharray="5 4"/>'
        )
        parts.append(_text(panel.right, y - 5, words, "end", f' fill="{colour}"', kind="limit"))
    return parts


def _curve(panel: Panel, curve: Curve) -> list[str]:
    parts = []
    if curve.points:
        points = " ".join("{:.1f},{:.1f}".format(*panel.at(*point)) for point in curve.points)
        parts.append(f'<polyline points="{points}" fill="none" {_stroke(curve)}/>')
    shown = f"<title>{escape(curve.dot_title)}</title>" if curve.dot_title else ""
    for point in curve.dots:
        x, y = panel.at(*point)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{curve.colour}">{shown}</circle>')
    return parts


def _stroke(curve: Curve) -> str:
    dashes = f' stroke-dasharray="{curve.dashes}"' if curve.dashes else ""
    return f'stroke="{curve.colour}" stroke-width="2"{dashes}'


def _legend(panel: Panel) -> list[str]:
    x, y, anchor = panel.legend or (panel.left + 12, panel.top + 14, "start")
    towards = -1 if anchor == "end" else 1
    parts = []
    for i, curve in enumerate(panel.curves):
        at = y + _LINE * i
        parts.append(f'<path d="M{x:.1f} {at - 4:.1f}h{18 * towards}" {_stroke(curve)}/>')
        parts.append(_text(x + 24 * towards, at, curve.name, anchor))
    return parts
