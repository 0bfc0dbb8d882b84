"""The rules and word lists: that they are what the code takes them for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sllm.privacy import KINDS, data
from sllm.privacy.patterns import labels

HERE = Path(data.__file__).parent
LISTS = sorted(path.stem for path in HERE.glob("*.txt"))


@pytest.mark.parametrize("name", LISTS)
def test_lists_are_used_and_say_what_they_are(name: str) -> None:
    text = (HERE / f"{name}.txt").read_text(encoding="utf-8")
    assert text.startswith("# ") and text.endswith("\n")
    assert data.words(name) and not any("#" in word for word in data.words(name))
    code = "".join(path.read_text(encoding="utf-8") for path in HERE.parent.rglob("*.py"))
    # Lists of English are attributes of one object.
    assert f'"{name}"' in code or re.search(rf"\.{name.removeprefix('names_en_')}\b", code)


def test_labels() -> None:
    table = data.table("labels")
    for rule in (*table["english"], *table["chinese"]):
        assert rule["kind"] in KINDS and rule["form"] in labels._FORMS and rule["labels"]
    english = [label for rule in table["english"] for label in rule["labels"]]
    assert len(set(english)) == len(english)
    assert all(label == label.lower() and re.match("[a-z]", label) for label in english)


def test_secrets_and_codes() -> None:
    secrets, codes = data.table("secrets"), data.table("codes")
    for rule in (*secrets["keys"], *secrets["webhooks"]):
        assert rule["service"] and re.compile(rule["pattern"]).groups == 0
    for rule in (*codes["national"], *codes["words"]):
        assert rule["kind"] in KINDS and rule["name"]
        assert re.compile(rule.get("pattern") or rule["first"] + rule["rest"]).groups == 0
    countries = [country for each in codes["iban lengths"].values() for country in each.split()]
    assert len(set(countries)) == len(countries) > 80


def test_phrases_around_names() -> None:
    table = data.table("names_en_context")
    assert set(table["loose labels"]) <= set(table["labels"])
    assert set(table["loose verbs"]) <= set(table["verbs"])
