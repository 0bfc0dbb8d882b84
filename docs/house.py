"""Draws the house of docs/architecture.md from the imports of ``sllm/``, and finds what is wrong with it.

Commands::

    python docs/house.py            # the drawing
    python docs/house.py --write    # into docs/architecture.md
    python docs/house.py --figures  # rooms, floors, arrows, the longest file, class and function

A room is a folder of ``sllm/``, or a module beside them. A room imports from lower floors alone, and no
modules import each other in a circle; that counts imports inside functions and for type checkers, too.
``tests/test_architecture.py`` holds the package to it.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by docs/house.py -->", "<!-- end of the drawing -->"

FLOORS = (
    ("errors", "hosts", "messages", "extras", "folders", "progress", "embedded", "_moved"),
    ("engine",),
    ("privacy", "targets", "draft", "wire"),
    ("rpc",),
    ("remote", "worker", "http_engine"),
    ("split", "generation"),
    ("triage", "planning"),
    ("openai_server",),
    ("sllm",),
    ("cli",),
    ("__main__",),
)
"""From the ground up; "sllm" is ``sllm/__init__.py``."""

WHAT = {
    "errors": "the exceptions",
    "hosts": "names of hosts and ports",
    "messages": "chat messages: checks, and iteration over their texts",
    "extras": "the extra that a missing package belongs to",
    "folders": "folders of state and caches",
    "progress": "reports of progress",
    "embedded": "the pair of small models",
    "_moved": "old names of modules",
    "engine": "models, contexts, layers, files: local computing",
    "privacy": "finding, masking and restoring what is private",
    "targets": "the interface of targets, which decide the text",
    "draft": "sources of drafts, and draft lengths",
    "wire": "protocol, credentials, encoding of hidden states",
    "rpc": "ggml's RPC in a sandboxed process",
    "remote": "SYSTEM 2, this side: the client of a worker",
    "http_engine": "serving engines (vLLM, SGLang, llama-server) as targets",
    "worker": "SYSTEM 2, the big machine: many clients, one model",
    "split": "SYSTEM 1: first and last layers here, the rest there",
    "generation": "generation loops over a target and a draft",
    "triage": "SYSTEM 3: which model answers, and what may leave",
    "planning": "prediction of the fastest setup",
    "openai_server": "an OpenAI-compatible server",
    "sllm": "the public names",
    "cli": "the commands",
    "__main__": "python -m sllm",
}

EXCEPTIONS = {
    # `sllm doctor` has to say something where the package cannot be imported, and so has to be reached from
    # the import that fails.
    ("sllm", "sllm.cli.doctor"),
}


class Arrow(NamedTuple):
    """Module ``origin`` imports module ``target``, on a line of its file."""

    origin: str
    target: str
    line: int


def modules(package: Path = ROOT / "sllm") -> dict[str, Path]:
    """Every module of the package by its dotted name, generated ones left out."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        if not path.stem.endswith("_pb2"):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(found: dict[str, Path]) -> list[Arrow]:
    """Which module imports which; a name that is a module counts as one, and not as one of its package."""
    out = []
    for name, path in found.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                targets = [
                    inner if (inner := f"{node.module}.{alias.name}") in found else node.module
                    for alias in node.names
                ]
            else:
                continue
            out += [Arrow(name, t, node.lineno) for t in dict.fromkeys(targets) if t in found and t != name]
    return out


def room(module: str) -> str:
    """The room that a module is in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def faults(found: dict[str, Path], drawn: list[Arrow]) -> list[str]:
    """What is wrong: rooms without a floor, arrows upwards or along a floor, circles of modules."""
    floor = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}
    wrong = [f"{name} is in no room of FLOORS" for name in found if room(name) not in floor]
    for arrow in drawn:
        if (arrow.origin, arrow.target) in EXCEPTIONS or wrong:
            continue
        below, above = floor[room(arrow.target)], floor[room(arrow.origin)]
        if room(arrow.origin) != room(arrow.target) and below >= above:
            wrong.append(f"{arrow.origin}, line {arrow.line}: imports {arrow.target}, which is not below it")
    graph: dict[str, set[str]] = {name: set() for name in found}
    for arrow in drawn:
        if (arrow.origin, arrow.target) not in EXCEPTIONS:
            graph[arrow.origin].add(arrow.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.append("a circle: " + " -> ".join(reversed(error.args[1])))
    return wrong


def drawing(found: dict[str, Path], drawn: list[Arrow]) -> str:
    """The house as two blocks of text, top floor first: what each room is; its files, and what it imports."""
    width = max(map(len, WHAT))
    rooms = [
        f"{number:>2}  {name:<{width}}  {WHAT[name]}"
        for number in range(len(FLOORS), 0, -1)
        for name in FLOORS[number - 1]
    ]
    told = "The modules of each room, and how often it imports another room:"
    return "\n".join(["```text", *rooms, "```", "", told, "", "```text", _contents(found, drawn), "```"])


def _contents(found: dict[str, Path], drawn: list[Arrow]) -> str:
    between = Counter((room(a.origin), room(a.target)) for a in drawn if room(a.origin) != room(a.target))
    lines = []
    for number in range(len(FLOORS), 0, -1):
        for name in FLOORS[number - 1]:
            inside = [m.split(".", 2)[2] for m in found if room(m) == name and m.count(".") > 1]
            below = [f"{target} {n}" for (origin, target), n in sorted(between.items()) if origin == name]
            if name == "sllm" or not (inside or below):
                continue
            lines += [f"{number:>2}  {name}", *_wrapped(", ".join(inside))]
            lines += [*_wrapped(f"-> {', '.join(below)}" if below else ""), ""]
    return "\n".join(lines).rstrip()


def _wrapped(text: str, columns: int = 76) -> list[str]:
    margin, lines, line = " " * 4, [], ""  # columns: what a page of the site shows without scrolling
    for word in text.split(" "):
        if line and len(margin) + len(line) + len(word) + 1 > columns:
            lines.append(margin + line)
            line = ""
        line = f"{line} {word}".strip()
    return [*lines, margin + line] if line else lines


def figures(found: dict[str, Path], drawn: list[Arrow]) -> str:
    """Sizes: rooms, floors, arrows, lines, and the longest file, class and function."""
    between = {(a.origin, a.target) for a in drawn if room(a.origin) != room(a.target)}
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in found.items()}
    longest: dict[type, tuple[int, str]] = {}
    for name, path in found.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                size = (node.end_lineno or 0) - node.lineno + 1
                longest[type(node)] = max(longest.get(type(node), (0, "")), (size, f"{name}.{node.name}"))
    file = max(lines, key=lines.__getitem__)
    rooms = {(room(origin), room(target)) for origin, target in between}
    return (
        f"rooms {len({room(name) for name in found})}, floors {len(FLOORS)}, arrows between rooms"
        f" {len(rooms)} ({len(between)} between modules), modules {len(found)}, lines {sum(lines.values())}\n"
        f"longest file: {file} {lines[file]}; class: {longest[ast.ClassDef]};"
        f" function: {longest[ast.FunctionDef]}"
    )


def main(arguments: list[str]) -> int:
    """The command line; 1 where something is wrong with the house."""
    found = modules()
    drawn = arrows(found)
    if "--figures" in arguments:
        sys.stdout.write(figures(found, drawn) + "\n")
    elif "--write" in arguments:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{drawing(found, drawn)}\n{END}{after}", encoding="utf-8")
    else:
        sys.stdout.write(drawing(found, drawn) + "\n")
    wrong = faults(found, drawn)
    sys.stderr.writelines(f"{line}\n" for line in wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
