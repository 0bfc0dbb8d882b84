"""Labelled requests for ``sllm calibrate``: the format of the file, and its reader."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sllm.cli.console import CommandError, expected_utf8

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["FORMAT", "LabelledRequest", "check_references", "read_labelled"]

FORMAT = (
    'Each line of ROWS is a JSON object: "prompt" (a text) or "messages" (role and content); then either'
    ' "correct" (true or false: was MODEL\'s own answer right?), with "answer" (that answer) or without, or'
    ' "reference" (a right answer, or a list of them, empty if MODEL can have none): MODEL then answers at'
    " temperature 0 and is right if it says the same but for case, spaces and the full stop at the end; and,"
    ' if you like, "label" ("easy", "medium" or "hard": hard requests go straight to the cloud). With --local'
    " every row needs a reference, for that model answers, too. The rows must be drawn like the requests of"
    " later use, each on its own: the promise holds for no others."
)

_FIELDS = {"prompt", "messages", "correct", "answer", "reference", "label"}
_LABELS = ("easy", "medium", "hard")


@dataclass(frozen=True)
class LabelledRequest:
    """One line of the file: a request, and what is known of its answer."""

    line: int
    messages: list[dict[str, Any]]
    correct: bool | None
    answer: str | None
    references: list[str] | None
    hard: bool | None


def read_labelled(path: Path) -> list[LabelledRequest]:
    """The requests of a file; see ``sllm calibrate --help`` for the format.

    Raises:
        CommandError: a line is not such a request, which the message names; or the file is empty.

    """
    with expected_utf8(path):
        text = path.read_text(encoding="utf-8")
    lines = enumerate(text.split("\n"), 1)
    rows = [_labelled(line, f"{path}, line {number}", number) for number, line in lines if line.strip()]
    if not rows:
        raise CommandError(f"{path} is empty, expected labelled requests, JSON lines")
    return rows


def _labelled(line: str, where: str, number: int) -> LabelledRequest:
    def fail(what: str) -> CommandError:
        return CommandError(f"{where}: {what} (see sllm calibrate --help)")

    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise fail(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise fail(f"a {type(found).__name__}, expected an object")
    unknown = sorted(set(found) - _FIELDS)
    if unknown:
        raise fail(f"the unknown field {unknown[0]!r}, expected {', '.join(sorted(_FIELDS))}")
    messages = found.get("messages")
    if ("prompt" in found) == ("messages" in found):
        raise fail("expected either prompt or messages")
    if "prompt" in found:
        if not isinstance(found["prompt"], str):
            raise fail(f"prompt is {found['prompt']!r}, expected a text")
        messages = [{"role": "user", "content": found["prompt"]}]
    if not isinstance(messages, list):
        raise fail(f"messages is {messages!r}, expected a list")
    correct, answer, reference = (found.get(name) for name in ("correct", "answer", "reference"))
    if (correct is None) == (reference is None):
        raise fail("expected either correct or reference")
    if correct is not None and not isinstance(correct, bool):
        raise fail(f"correct is {correct!r}, expected true or false")
    if answer is not None and (not isinstance(answer, str) or reference is not None):
        raise fail("answer is MODEL's own answer, a text, beside correct")
    references = [reference] if isinstance(reference, str) else reference
    if references is not None and not (
        isinstance(references, list) and all(isinstance(one, str) for one in references)
    ):
        raise fail(f"reference is {reference!r}, expected a text or a list of texts")
    label = found.get("label")
    if label is not None and label not in _LABELS:
        raise fail(f"label is {label!r}, expected {', '.join(_LABELS)}")
    hard = None if label is None else label == "hard"
    return LabelledRequest(number, messages, correct, answer, references, hard)


def check_references(labelled: Sequence[LabelledRequest], path: str) -> None:
    """Raise CommandError unless every request has a right answer to compare with."""
    for one in labelled:
        if one.references is None:
            raise CommandError(
                f"{path}, line {one.line}: with --local a row needs a reference, by which that model's answer"
                " is judged, and this one has correct"
            )
