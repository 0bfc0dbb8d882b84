"""Tables, plots and the README's picture out of what ``pytest benchmarks --benchmark-json FILE`` has kept.

``python -m benchmarks report FILE`` prints all figures of a file, in Markdown. Of several files it puts those
of each benchmark side by side, in the order of the files: two commits, or two machines.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import picture
from .results import Entry, ReportError, Results, Scalar, read

NO_FIGURES = ("aim", "aim_met", "missed")


def markdown(files: Sequence[Results], figures: Sequence[str] = (), images: Sequence[Path] = ()) -> str:
    """The whole report.

    Args:
        files: one, or several that are compared.
        figures: the keys to show; with none all of one file, and of several the times, speeds and ratios.
        images: paths of plots that it ends with.

    Raises:
        ReportError: the files have nothing in common, or none of the figures.

    """
    known = list(dict.fromkeys(name for file in files for one in file.entries for name in one.values))
    unknown = [name for name in figures if name not in known]
    if unknown:
        raise ReportError(f"no benchmark has {', '.join(unknown)}; there are: {', '.join(known)}")
    if not figures:
        figures = [
            name
            for name in known
            if name not in NO_FIGURES
            and (len(files) == 1 or name in ("median_s", "tokens_per_s") or name.startswith("ratio"))
        ]
    labels = label(files)
    lines = ["# Benchmarks", "", *_table(["", "commit", "date", "CPU", "system"], _heads(files, labels))]
    if len({file.cpu for file in files}) > 1:
        lines += ["", "The CPUs are not the same: compare ratios, not times."]
    for module in dict.fromkeys(one.module for file in files for one in file.entries):
        lines += ["", f"## {_cell(module)}", ""]
        lines += (
            _one(files[0], module, figures)
            if len(files) == 1
            else _side_by_side(files, labels, module, figures)
        )
    for image in images:
        lines += ["", f"![{image.stem}]({image.name})"]
    return "\n".join([*lines, ""])


def label(files: Sequence[Results]) -> list[str]:
    """A short name for each file: its commit, or what tells them apart."""
    for names in ([file.commit for file in files], [file.path.stem for file in files]):
        if all(names) and len(set(names)) == len(names):
            return names
    return [str(file.path) for file in files]


def _heads(files: Sequence[Results], labels: Sequence[str]) -> list[list[str]]:
    return [
        [name, file.commit, file.date, file.cpu, file.system]
        for name, file in zip(labels, files, strict=True)
    ]


def _one(file: Results, module: str, figures: Sequence[str]) -> list[str]:
    """A row for each mode of each benchmark, a column for each figure that one of them has."""
    entries = [one for one in file.entries if one.module == module]
    names = [name for name in figures if any(name in one.values for one in entries)]
    modes = any(one.mode for one in entries)
    aims = any("aim" in one.values for one in entries)
    rows = [
        [
            one.name,
            *([one.mode] if modes else []),
            *(_number(one.values.get(name)) for name in names),
            *([_aim(one)] if aims else []),
        ]
        for one in entries
    ]
    return _table(["benchmark", *(["mode"] if modes else []), *names, *(["aim"] if aims else [])], rows)


def _side_by_side(
    files: Sequence[Results], labels: Sequence[str], module: str, figures: Sequence[str]
) -> list[str]:
    """A row for each number, a column for each file."""
    by_key = [{one.key: one for one in file.entries} for file in files]
    keys = dict.fromkeys(one.key for file in files for one in file.entries if one.module == module)
    rows = []
    for key in keys:
        for name in figures:
            values = [found[key].number(name) if key in found else None for found in by_key]
            if sum(value is not None for value in values) < 2:
                continue
            first, last = values[0], values[-1]
            change = f"{last / first:.3f}" if first and last is not None else ""
            rows.append([key[1], key[2], name, *map(_number, values), change])
    if not rows:
        return ["No two of the files have the same benchmark here."]
    return _table(["benchmark", "mode", "figure", *labels, "last / first"], rows)


def _aim(one: Entry) -> str:
    aim = one.values.get("aim")
    if aim is None:
        return ""
    if one.values.get("aim_met"):
        return f"met: {aim}"
    return f"MISSED: {one.values.get('missed', aim)}"


def _number(value: Scalar | None) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def _cell(text: str) -> str:
    """Text that Markdown takes for text."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(map(_cell, line)) + " |" for line in lines]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="what --benchmark-json has written"
    )
    parser.add_argument("-o", "--output", type=Path, help="where the report goes; else to stdout")
    parser.add_argument("--figures", default="", help="show these alone: keys of extra_info, with commas")
    parser.add_argument(
        "--plots",
        type=Path,
        metavar="FOLDER",
        help="draw speeds by round trip, and by file of several, as SVG",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="SVG",
        help="draw the README's picture from test_round_trip.py, and no report",
    )
    options = parser.parse_args(arguments)
    try:
        files = [read(path) for path in options.files]
        if options.picture is not None:
            if len(files) > 1:
                raise ReportError(f"--picture draws one file, and {len(files)} are named")
            _write(options.picture, picture.round_trips(files[0]))
            return 0
        images = []
        if options.plots is not None:
            for name, image in picture.plots(files, label(files)).items():
                images.append(options.plots / name)
                _write(images[-1], image)
        text = markdown(files, [name for name in options.figures.split(",") if name], images)
        if options.output is None:
            sys.stdout.write(text)
        else:
            _write(options.output, text)
    except ReportError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror or error}") from error
