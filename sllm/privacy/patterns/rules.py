"""Values that a pattern identifies, with what has to stand before it, or a check: rows of data files."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, NamedTuple

from sllm.privacy import data
from sllm.privacy.findings import Budget, Finding
from sllm.privacy.patterns import checksums
from sllm.privacy.regex import lazy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["scan"]

_NEAR = 40  # characters that are read before a value


class _Rule(NamedTuple):
    """A section ``rule ...`` of a data file.

    Attributes:
        kind: of what is found.
        score: how sure that is.
        checked: whether the pattern says as much as a checksum does.
        pattern: of the value; if it has a group ``value``, that is the value.
        needs: of these strings the text needs one: that spares most texts the pattern.
        before: what the text right before the value has to end in; None is anything.
        check: what the value has to pass; None is nothing.
        verify: what makes it surer if the value passes; None is nothing.

    """

    kind: str
    score: float
    checked: bool
    pattern: re.Pattern[str]
    needs: tuple[str, ...]
    before: re.Pattern[str] | None
    check: Callable[[str], bool] | None
    verify: Callable[[str], bool] | None


@functools.cache
def _rules(file: str) -> list[_Rule]:
    return [
        _Rule(
            kind=row["kind"],
            score=float(row["score"]),
            checked="checked" in row or "check" in row,
            pattern=lazy(row["pattern"]),
            needs=tuple(row.get("needs", "").split()),
            before=lazy(rf"(?:{row['before']})\Z") if "before" in row else None,
            check=functools.partial(checksums.valid, row["check"]) if "check" in row else None,
            verify=functools.partial(checksums.valid, row["verify"]) if "verify" in row else None,
        )
        for name, row in data.sections(file).items()
        if name.startswith("rule ")
    ]


def scan(text: str, file: str, budget: Budget) -> Iterator[Finding]:
    """What the rules of a data file find in a plain view (:func:`sllm.privacy.text.plain`)."""
    for rule in _rules(file):
        if rule.needs and not any(sign in text for sign in rule.needs):
            continue
        for found in budget.each(rule.pattern.finditer(text)):
            start, end = found.span("value" if "value" in found.re.groupindex else 0)
            if rule.before and not rule.before.search(text[max(0, start - _NEAR) : start]):
                continue
            value = text[start:end]
            if rule.check and not rule.check(value):
                continue
            verified = rule.verify is not None and rule.verify(value)
            yield Finding(start, end, rule.kind, 0.9 if verified else rule.score, verified or rule.checked)
