"""Values that a pattern identifies, with what has to stand before it, or a check: rows of data files."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from sllm.privacy import data
from sllm.privacy.findings import Budget, Finding
from sllm.privacy.patterns import checksums
from sllm.privacy.regex import lazy

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["Rule", "rules", "scan"]

_NEAR = "64"  # characters that are read before a value


class Rule:
    """A section ``rule ...`` of a data file, or another one of that form.

    Attributes:
        name: of the section, without its first word.
        kind: of what is found.
        score: how sure that is.
        checked: whether pattern and check say as much as a checksum does.
        pattern: of the value; if it has a group ``value``, that is the value.
        needs: of these strings the text needs one: that spares most texts the pattern.
        head: what has to stand right before that, and belongs to the value; None is nothing. If it has a
            group ``value``, the value begins there.
        before: what the text right before the value has to end in; None is anything.
        unless: what it must not end in.
        near: how many characters before the value are read for these.
        after: what has to follow.
        check: the scheme of :func:`~sllm.privacy.patterns.checksums.valid` that the value has to pass.
        verify: one that makes it surer if the value passes.
        fewest: how many digits the value has at least.
        most: how many at most.
        length: how many characters it has at least.
        whole: it is a whole run of groups of digits.

    """

    def __init__(self, name: str, row: Mapping[str, str]) -> None:
        def at_end(key: str) -> re.Pattern[str] | None:
            return lazy(rf"(?:{row[key]})\Z") if key in row else None

        self.name = name
        self.kind = row.get("kind", "")
        self.score = float(row.get("score", "1"))
        self.checked = row.get("checked", "yes" if "check" in row else "no") == "yes"
        self.pattern = lazy(row["pattern"])
        self.needs = row.get("needs", "").split()
        self.head, self.before, self.unless = at_end("head"), at_end("before"), at_end("unless")
        self.near = int(row.get("near", _NEAR))
        self.after = lazy(row["after"]) if "after" in row else None
        self.check, self.verify = row.get("check"), row.get("verify")
        fewest, _, most = row.get("digits", "0-0").partition("-")
        self.fewest, self.most = int(fewest), int(most or fewest)
        self.length = int(row.get("length", "1"))
        self.whole = row.get("whole") == "yes"

    def judge(
        self, text: str, found: re.Match[str], valid: Callable[[str, str], bool] = checksums.valid
    ) -> Finding | None:
        """The finding that a match of the pattern is, if all else agrees."""
        start, end = found.span("value" if "value" in found.re.groupindex else 0)
        if self.head:
            low = max(0, start - self.near)
            head = self.head.search(text[low:start])
            if not head:
                return None
            start = low + head.start("value" if "value" in head.re.groupindex else 0)
        ahead = text[max(0, start - self.near) : start] if self.before or self.unless else ""
        if (self.before and not self.before.search(ahead)) or (self.unless and self.unless.search(ahead)):
            return None
        if self.after and not self.after.match(text, end):
            return None
        value = text[start:end]
        if self.most and not self.fewest <= sum(map(str.isdigit, value)) <= self.most:
            return None
        if len(value) < self.length:
            return None
        if self.check and not valid(self.check, value):
            return None
        verified = self.verify is not None and valid(self.verify, value)
        return Finding(start, end, self.kind, 0.9 if verified else self.score, verified or self.checked)


@functools.cache
def rules(file: str, prefix: str = "rule ") -> list[Rule]:
    """The rules of a data file, in their order: its sections of which the name begins so."""
    return [
        Rule(name.removeprefix(prefix), row)
        for name, row in data.sections(file).items()
        if name.startswith(prefix)
    ]


def scan(text: str, file: str, valid: Callable[[str, str], bool] = checksums.valid) -> Iterator[Finding]:
    """What the rules of a data file find in a plain view (:func:`sllm.privacy.text.plain`); ``valid`` knows
    their checks.
    """
    for rule in rules(file):
        if rule.needs and not any(sign in text for sign in rule.needs):
            continue
        budget = None
        for found in rule.pattern.finditer(text):
            budget = budget or Budget(text)
            if not budget.spend(found.start()):
                break
            one = rule.judge(text, found, valid)
            if one:
                yield one
        if budget:
            yield from budget.rest(rule.kind)
