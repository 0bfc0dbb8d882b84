"""Results as plots: speeds by round trip, and from one commit to the next."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sllm.cli.plot import Axis, Curve, Panel, figure, ticks

from .results import Entry, ReportError, Results

# Each has a contrast of 3 to 1 or more with white and with a dark page.
COLOURS = ("#2a78d6", "#d5691b", "#1f9254", "#9a63d8", "#d0464f", "#6f7a87", "#a8780f", "#1a8f9e")
DASHES = ("", "7 4", "2 3", "9 3 2 3")

ROUND_TRIP = "benchmarks/test_round_trip.py"
WAYS = {
    "worker's draft": "a draft beside the large model, on the worker",
    "hints, trees": "hints: a draft here, as trees",
    "hints, chains": "hints: a draft here, as chains",
    "stream": "streaming",
    "llama.cpp RPC": "llama.cpp RPC, split by layers",
}

Points = list[tuple[float, float]]


def round_trips(file: Results) -> str:
    """The README's picture.

    Raises:
        ReportError: the file has no run of ``test_round_trip.py``, or one without some of the ways.

    """
    entries = [one for one in file.entries if one.module.endswith(ROUND_TRIP.rpartition("/")[2])]
    points: dict[str, Points] = {way: [] for way in WAYS}
    about: dict[str, object] = {}
    for one in entries:
        about |= one.values
        if one.mode in points:
            points[one.mode] += _point(one)
    missing = [way for way, found in points.items() if len(found) < 2]
    if missing:
        raise ReportError(
            f"{file.path} has no two round trips of {', '.join(missing)}; run: pytest {ROUND_TRIP}"
            f" --benchmark-json {file.path}"
        )
    curves = [
        Curve(WAYS[way], colour, sorted(found), dots=sorted(found))
        for (way, found), colour in zip(points.items(), COLOURS, strict=False)
    ]
    caption = (
        "{n_texts} texts of {max_tokens} tokens at temperature {temperature:g} by the pair of models that"
        " comes with sllm, the same in all five ways.\n"
        "Paced: a pass of the large model takes {pass_ms:g} ms, a token drafted here {draft_ms:g} ms, on the"
        " worker {worker_draft_ms:g} ms.\n"
        "The draft has {pair_acceptance:.0%} of the tokens right. The link is emulated.\n"
        "{cpu}; {date}, commit {commit}."
    ).format_map({**about, "cpu": file.cpu, "date": file.date, "commit": file.commit or "unknown"})
    return _by_round_trip(
        curves, "Tokens per second by the round trip to the large model", caption.splitlines()
    )


def plots(files: Sequence[Results], labels: Sequence[str]) -> dict[str, str]:
    """Images by the names of their files.

    One for each benchmark that ran at several round trips, with a curve for each mode (and file), and with
    several files one for each benchmark that is in all of them: its speeds as multiples of the first file's.
    """
    return {**_round_trip_plots(files, labels), **_history_plots(files, labels)}


def _round_trip_plots(files: Sequence[Results], labels: Sequence[str]) -> dict[str, str]:
    found: dict[str, dict[tuple[str, int], Points]] = {}
    for i, file in enumerate(files):
        for one in file.entries:
            point = _point(one)
            if not point:
                continue
            rest = [f"{name} {value}" for name, value in one.params.items() if name != "rtt_ms"]
            title = ", ".join([one.function, *rest])
            curve = found.setdefault(title, {}).setdefault((one.mode, i), [])
            curve += point
    images = {}
    for title, by_mode in found.items():
        modes = list(dict.fromkeys(mode for mode, _ in by_mode))
        curves = [
            Curve(
                mode if len(files) == 1 else f"{mode}, {labels[i]}",
                COLOURS[modes.index(mode) % len(COLOURS)],
                sorted(points),
                dots=sorted(points),
                dashes=DASHES[i % len(DASHES)],
            )
            for (mode, i), points in by_mode.items()
            if len(points) > 1
        ]
        if curves:
            images[_file_name(title)] = _by_round_trip(curves, title, _sources(files, labels))
    return images


def _history_plots(files: Sequence[Results], labels: Sequence[str]) -> dict[str, str]:
    if len(files) < 2:
        return {}
    speeds = [{one.key: _speed(one) for one in file.entries} for file in files]
    by_function: dict[str, list[tuple[str, Points]]] = {}
    for one in files[0].entries:
        values = [found.get(one.key) for found in speeds]
        if not all(values):
            continue
        first = values[0]
        points = [(float(i), value / first) for i, value in enumerate(values) if value and first]
        name = ", ".join(filter(None, [one.name, one.mode]))
        by_function.setdefault(one.function, []).append((name, points))
    images = {}
    for function, found in by_function.items():
        curves = [
            Curve(
                name,
                COLOURS[i % len(COLOURS)],
                points,
                dots=points,
                dashes=DASHES[i // len(COLOURS) % len(DASHES)],
            )
            for i, (name, points) in enumerate(found)
        ]
        images[_file_name(f"{function} by file")] = _drawn(
            curves,
            Axis("", len(files) - 1, list(enumerate(labels))),
            "speed / that of the first",
            f"{function}, from one file to the next",
            _sources(files, labels),
        )
    return images


def _point(one: Entry) -> Points:
    """Its speed at its round trip; nothing where one of them is not known."""
    rtt, speed = one.number("rtt_ms"), one.number("tokens_per_s")
    return [] if rtt is None or speed is None else [(rtt, speed)]


def _speed(one: Entry) -> float | None:
    speed, seconds = one.number("tokens_per_s"), one.number("median_s")
    return speed if speed is not None else 1 / seconds if seconds else None


def _sources(files: Sequence[Results], labels: Sequence[str]) -> list[str]:
    return [f"{name}: {file.cpu}; {file.date}" for name, file in zip(labels, files, strict=True)]


def _file_name(title: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", title).strip("-") + ".svg"


def _by_round_trip(curves: Sequence[Curve], title: str, caption: Sequence[str]) -> str:
    at = sorted({x for curve in curves for x, _ in curve.points})
    top = max(at) or 1.0
    marks = [x for i, x in enumerate(at) if i == 0 or (x - at[i - 1]) / top >= 0.04]
    axis = Axis("round trip, ms", top, [(x, f"{x:g}") for x in marks])
    return _drawn(curves, axis, "tokens/s", title, caption)


def _drawn(curves: Sequence[Curve], x: Axis, y_label: str, title: str, caption: Sequence[str]) -> str:
    """Curves above their legend and the caption."""
    top = max(y for curve in curves for _, y in curve.points) * 1.05 or 1.0
    y = Axis(y_label, top, [(value, f"{value:g}") for value in ticks(top)])
    legend = 390 + 28
    height = legend + 16 * len(curves) + 16 * len(caption) + 12
    panel = Panel(64, 48, 736, 368, x, y, curves, title=title, legend=(64, legend + 8, "start"))
    return figure(760, height, [panel], title, caption)
