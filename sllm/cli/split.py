"""``sllm split``: layers of a model, written into files of their own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm.cli.arguments import MODEL, add_json, layer_counts, layer_range
from sllm.cli.console import CommandError, count, one_line, size, table
from sllm.engine.layers import open_source

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from sllm.cli.console import Output
    from sllm.engine.layer_file import LayeredFile

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sllm split``."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--layers",
        metavar="START:STOP",
        type=layer_range,
        help="one file, of the layers START to STOP - 1",
    )
    which.add_argument(
        "--parts",
        metavar="N,N,...",
        type=layer_counts,
        help="as many files, of so many layers each, all layers together; a last 0: the output alone",
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE|PREFIX",
        help="with --layers the file, with --parts what the files' names begin with (default: the model's"
        " name, in this folder: MODEL-layers-0-6.gguf)",
    )
    add_json(parser)


@dataclass(frozen=True)
class _Part:
    """A file to write."""

    start: int
    stop: int
    path: Path

    def holds(self, file: LayeredFile) -> str:
        """What goes into it."""
        n = self.stop - self.start
        inside = (
            [f"layers {self.start} to {self.stop - 1}"] if n > 1 else [f"layer {self.start}"] if n else []
        )
        if self.start == 0:
            inside.insert(0, "the embedding")
        if self.stop == file.n_layer:
            inside.append("the output")
        return ", ".join(inside) if len(inside) < 2 else f"{', '.join(inside[:-1])} and {inside[-1]}"

    def knows(self, file: LayeredFile) -> str:
        """What its holder can do with it alone."""
        if self.start == 0 and self.stop == file.n_layer:
            return "the whole model"
        if self.start == 0:
            return "turns text into hidden states; has the vocabulary"
        if self.stop == file.n_layer:
            return "turns hidden states into text; has the vocabulary"
        return "hidden states in and out; no vocabulary"


def run(args: argparse.Namespace, out: Output) -> int:
    """Write layers of a model into files."""
    file = open_source(args.model)
    parts = _parts(args, file)
    for part in parts:  # all of them, before the first is written
        _check(part, file)
    written = [(part, file.export(part.path, part.start, part.stop)) for part in parts]
    if args.json:
        out.line(json.dumps(_as_object(file, written), indent=2))
        return 0
    rows = [(str(part.path), size(n_bytes), part.holds(file), part.knows(file)) for part, n_bytes in written]
    for line in table([tuple(one_line(cell) for cell in row) for row in rows], right=(1,)):
        out.line(line)
    return 0


def _check(part: _Part, file: LayeredFile) -> None:
    """Whether a part can be written, as far as that can be known before."""
    file.check_range(part.start, part.stop, output=part.start == part.stop)
    if any(isinstance(path, Path) and part.path.exists() and part.path.samefile(path) for path in file.paths):
        raise CommandError(f"{part.path} is the model itself; name another file by -o")
    if part.path.is_dir():
        raise CommandError(f"{part.path} is a directory, expected a file's name")
    if not part.path.parent.is_dir():
        raise CommandError(f"{part.path.parent} is not a directory, so {part.path} cannot be written")


def _as_object(file: LayeredFile, written: Sequence[tuple[_Part, int]]) -> dict[str, Any]:
    return {
        "model": str(file.paths[0]),
        "n_layer": file.n_layer,
        "files": [
            {
                "file": str(part.path),
                "start": part.start,
                "stop": part.stop,
                "bytes": n_bytes,
                "embedding": part.start == 0,
                "output": part.stop == file.n_layer,
                "vocabulary": part.start == 0 or part.stop == file.n_layer,
            }
            for part, n_bytes in written
        ],
    }


def _parts(args: argparse.Namespace, file: LayeredFile) -> list[_Part]:
    if args.layers is not None:
        start, stop = args.layers
        return [_Part(start, stop, Path(args.out) if args.out else _named(None, file, start, stop))]
    n = file.n_layer
    if sum(args.parts) != n:
        shown = "+".join(map(str, args.parts))
        raise CommandError(
            f"--parts {shown} are {count(sum(args.parts), 'layer')}, and {file.paths[0].name} has {n}:"
            f" name how many each part has, such as {n - n // 2},{n // 2}"
        )
    if 0 in args.parts[:-1]:
        raise CommandError("--parts has a part of 0 layers, which only the last one may be: the output alone")
    parts, start = [], 0
    for number in args.parts:
        parts.append(_Part(start, start + number, _named(args.out, file, start, start + number)))
        start += number
    return parts


def _named(prefix: str | None, file: LayeredFile, start: int, stop: int) -> Path:
    beginning = Path(prefix) if prefix else Path(Path(file.paths[0].name).stem)
    return beginning.with_name(f"{beginning.name}-layers-{start}-{stop}.gguf")
