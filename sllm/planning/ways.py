"""The result of :func:`sllm.plan`: the possible setups, side by side."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Plan", "Way"]

_COLUMNS = 80
_CLOSE = 1.02
"""Ways whose speeds differ by no more are equally fast, as far as a prediction can tell."""


@dataclass(frozen=True)
class Way:
    """A setup and its predicted figures, which are None if it is not possible here.

    Attributes:
        name: its name, such as ``"worker, hints (tree)"``.
        learns: what of the text the other side learns.
        use: the command or the code for it.
        tokens_per_s: after the prompt.
        first_token: seconds from the request to the first token.
        round_trips: average number of round trips that a token waits for; 0 if nothing waits for them.
        bytes_per_token: on the wire, in both directions together, without the prompt.
        why_not: why it is not possible; None if it is.

    """

    name: str
    learns: str
    use: str
    tokens_per_s: float | None = None
    first_token: float | None = None
    round_trips: float | None = None
    bytes_per_token: float | None = None
    why_not: str | None = None


@dataclass(frozen=True)
class Plan:
    """The result of :func:`sllm.plan`. ``str()`` is a table of 80 columns.

    Attributes:
        ways: the setups, the simple ones first.
        measured: the measurements behind the predictions, by name; seconds, shares and bytes.

    """

    ways: tuple[Way, ...]
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def best(self) -> Way | None:
        """The fastest setup; among those within 2 % of it, the first. None: no setup is possible."""
        possible = [(way.tokens_per_s, way) for way in self.ways if way.tokens_per_s is not None]
        fastest = max((speed for speed, _ in possible), default=0.0)
        return next((way for speed, way in possible if speed * _CLOSE >= fastest), None)

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON; ``best`` is the name of a way, or None."""
        best = self.best
        return {
            "best": None if best is None else best.name,
            "ways": [asdict(way) for way in self.ways],
            "measured": dict(self.measured),
        }

    def __str__(self) -> str:
        best = self.best
        possible = [way for way in self.ways if way.why_not is None]
        rows = [("way", "tokens/s", "first s", "trips", "bytes", "the other side learns")]
        rows += [
            (
                f"{'* ' if way is best else ''}{way.name}",
                _cell(way.tokens_per_s, ".1f"),
                _cell(way.first_token, ".2f"),
                _cell(way.round_trips, ".2f"),
                _cell(way.bytes_per_token, ".0f"),
                way.learns,
            )
            for way in possible
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = []
        if possible:
            for name, *figures, learns in rows:
                cells = [cell.rjust(width) for cell, width in zip(figures, widths[1:], strict=True)]
                lines.append("  ".join([name.ljust(widths[0]), *cells, learns]))
            lines.append("")
            lines += _paragraph(
                "* the fastest. tokens/s: predicted. first s: seconds to the first token."
                " trips: round trips that a token waits for. bytes: a token's, on the wire."
            )
            lines.append("")
        if any("(*)" in way.learns for way in possible):
            lines += _paragraph("(*) from which whoever has the weights can usually tell the text")
            lines.append("")
        for way in possible:
            lines += _paragraph(f"{way.name}: {way.use}")
        if possible and len(possible) < len(self.ways):
            lines.append("")
        for way in self.ways:
            if way.why_not is not None:
                lines += _paragraph(f"not {way.name}: {way.why_not}")
        return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, _COLUMNS, subsequent_indent="  ", break_on_hyphens=False)
