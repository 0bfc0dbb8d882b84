"""What models make of placeholders when they reword a text, and how much of that comes back restored.

Texts with one to six private values each are masked, and a model is asked to translate, summarise or list
them or to write them as JSON. A *mention* is a place of its answer that is meant as a placeholder, as far as
its index or its nonce can be seen; each is restored, left because of the link it stands in, or a miss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from sllm.privacy import Finding, Restorer, Vault, egress_check

# Each value stands between the marks with its kind before it, so that what is masked does not depend on what
# detectors find.
_MARKED = re.compile(r"«([A-Z]+):([^»]+)»")

# A text in each line; behind an empty line the Chinese ones.
ENGLISH, CHINESE = (
    tuple(block.splitlines())
    for block in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").split("\n\n")
)
INSTRUCTIONS = {
    "translate": ("Translate this text into French: ", "把下面的文字翻译成英文："),
    "summarise": ("Summarise this text in one sentence: ", "用一句话概括下面的文字："),
    "list": (
        "List the people and their details in this text, one per line: ",
        "列出下面文字中的人和他们的信息，每行一项：",
    ),
    "json": ("Write the details in this text as a JSON object: ", "把下面文字中的信息写成一个 JSON 对象："),
}

# The last task again, with an answer that has to be an instance of this.
TO_SCHEMA = "json to a schema"
SCHEMA = {
    "type": "object",
    "properties": {
        "who": {"type": "string", "maxLength": 40},
        "details": {"type": "string", "maxLength": 80},
    },
    "required": ["who", "details"],
    "additionalProperties": False,
}

# A kind (any words, or none), an index and one of the nonces: how a mention is read here, to find out which
# kind it names. Apart from the nonce this is independent of the restorer's way of reading.
_JOINT = r"(?:\\?[\s_*‐‑–＿－-]){0,4}"
_MENTION = rf"(?P<kind>[^\W\d_]{{0,24}}){_JOINT}[0-9]{{1,9}}{_JOINT}"
# What models call kinds, in lower case.
_OTHER_NAMES = {
    "NAME": ("name", "names", "nom", "person", "people", "fullname", "姓名", "名字", "人名"),
    "EMAIL": ("email", "mail", "邮箱", "邮件", "电子邮件"),
    "PHONE": ("phone", "tel", "telephone", "téléphone", "number", "电话", "手机"),
    "ADDRESS": ("address", "adresse", "addresses", "地址"),
    "ACCOUNT": ("account", "compte", "账号", "账户"),
    "CARD": ("card", "carte", "银行卡"),
    "PASSPORT": ("passport", "passeport", "护照"),
    "BIRTHDATE": ("birthdate", "birthday", "date", "born", "生日", "出生日期"),
}


@dataclass(frozen=True)
class Counts:
    """What became of the placeholders in an answer, or in several.

    Attributes:
        sent: placeholders in what was sent.
        exact: mentions in the answer exactly as issued, in links or not.
        restored: mentions replaced by a value.
        in_links: mentions that stay because of where they stand.
        unknown: misses.
        wrong: restored mentions that name another kind than that of the value.
        json_before, json_after: answers that are JSON, or hold an object, before restoring, and also after.

    """

    sent: int = 0
    exact: int = 0
    restored: int = 0
    in_links: int = 0
    unknown: int = 0
    wrong: int = 0
    json_before: int = 0
    json_after: int = 0

    @property
    def mentions(self) -> int:
        return self.restored + self.in_links + self.unknown

    @classmethod
    def sum(cls, counts: Iterable[Counts]) -> Counts:
        rows = list(counts)
        return cls(**{one.name: sum(getattr(row, one.name) for row in rows) for one in fields(cls)})


class Marked:
    """Finds the values that a text says it has."""

    def __init__(self, values: Sequence[tuple[str, str]]) -> None:
        self._values = values

    def detect(self, text: str) -> list[Finding]:
        return [
            Finding(found.start(), found.end(), kind)
            for kind, value in self._values
            for found in re.finditer(re.escape(value), text)
        ]


def masked(marked: str) -> tuple[Vault, str]:
    """A vault, and a marked text with placeholders for the values in it."""
    vault = Vault([Marked(_MARKED.findall(marked))])
    text = vault.mask(_MARKED.sub(r"\2", marked)).text
    egress_check(text, vault)
    return vault, text


def count(vault: Vault, sent: str, answer: str) -> Counts:
    """What became of the placeholders of a vault in an answer to what was sent."""
    placeholders = re.findall(rf"\[[A-Z]+_[0-9]+_(?:{'|'.join(vault.placeholders.nonces)})\]", sent)
    restorer = Restorer(vault.placeholders)
    back = restorer.feed(answer) + restorer.finish()
    before = holds_json(answer)
    return Counts(
        sent=len(placeholders),
        exact=sum(answer.count(placeholder) for placeholder in set(placeholders)),
        restored=restorer.n_restored,
        in_links=restorer.n_in_links,
        unknown=restorer.n_unknown,
        wrong=sum(_contradicts(vault, mention) for mention in _mentions(vault, answer)),
        json_before=before,
        json_after=before and holds_json(back),
    )


def holds_json(answer: str) -> bool:
    """Whether an answer is an object or an array of JSON, or has an object in it, between other words."""
    try:
        return isinstance(json.loads(answer), dict | list)
    except ValueError:
        pass
    at = answer.find("{")
    if at < 0:
        return False
    try:
        json.JSONDecoder().raw_decode(answer, at)
    except ValueError:
        return False
    return True


def _mentions(vault: Vault, answer: str) -> list[re.Match[str]]:
    nonces = "|".join(vault.placeholders.nonces)
    return list(re.finditer(f"{_MENTION}(?:{nonces})", answer, re.IGNORECASE))


def _contradicts(vault: Vault, mention: re.Match[str]) -> bool:
    """Whether a mention, restored by itself, becomes a value of another kind than it names."""
    named = next((kind for kind, names in _OTHER_NAMES.items() if mention["kind"].lower() in names), None)
    if named is None:
        return False
    found = vault.find_known(vault.restore(f"[{mention[0]}]"))
    return any(one.kind != named for one in found)
