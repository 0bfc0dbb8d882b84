"""The rules and word lists: that they are what the code takes them for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sllm.privacy import KINDS, data
from sllm.privacy.patterns import rules

HERE = Path(data.__file__).parent
LISTS = sorted(path.stem for path in HERE.glob("*.txt"))


@pytest.mark.parametrize("name", LISTS)
def test_lists_are_used_and_say_what_they_are(name: str) -> None:
    text = (HERE / f"{name}.txt").read_text(encoding="utf-8")
    assert text.startswith("# ") and text.endswith("\n")
    assert data.words(name) and not any("#" in word for word in data.words(name))
    code = "".join(path.read_text(encoding="utf-8") for path in HERE.parent.rglob("*.py"))
    rules = "".join(path.read_text(encoding="utf-8") for path in HERE.glob("*.ini"))
    # Lists of English are attributes of one object; patterns are made of others.
    used = rf"\.{name.removeprefix('names_en_')}\b"
    assert f'"{name}"' in code or re.search(used, code) or re.search(rf"<<[a-z ]* {name}>>", rules)


FIELDS = {
    "kind", "score", "pattern", "needs", "head", "before", "unless", "near", "after", "digits", "length",
    "whole", "check", "checked", "verify",
}  # fmt: skip
RULE_FILES = sorted(path.stem for path in HERE.glob("*.ini"))


@pytest.mark.parametrize("file", RULE_FILES)
def test_patterns_are_used_and_rules_are_whole(file: str) -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in HERE.parent.rglob("*.py"))
    sections = data.sections(file)
    for name, pattern in sections.get("patterns", {}).items():
        re.compile(pattern)
        assert re.search(rf"\b_[A-Z]+\.{name}\b", code) or f'"{name}"' in code, name
    for name, row in sections.items():
        if name not in ("patterns", "links"):
            assert name.startswith(("rule ", "form ")) and row.keys() <= FIELDS
            assert name.startswith("form ") or (row["kind"] in KINDS and 0 < float(row["score"]) <= 1)
            groups = {key for field in FIELDS & row.keys() for key in re.compile(row[field]).groupindex}
            assert groups <= {"value", "gap", "first"}
    assert not any("<<" in re.sub(r"\[[^]]*\]", "", row.get("pattern", "")) for row in sections.values())


@pytest.mark.parametrize("key", ["patterns", "rule x"])
def test_parts_are_put_in(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some.ini").write_text(
        f"# a comment\n[parts]\nb = [b]\nc =\n    <<b>>\n    c\n[{key}]\n# more\na = a<<c>> = #d\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(data, "_HERE", tmp_path)
    assert data.sections("some") == {key: {"a": "a[b]c = #d"}}
    data.sections.cache_clear()


def test_labels() -> None:
    table = data.table("labels")
    forms = {name.removeprefix("form ") for name in data.sections("labels") if name.startswith("form ")}
    rows = [*table["english"], *table["chinese"]]
    assert {form for rule in rows for form in rule["forms"]} == forms
    assert all(rule["kind"] in KINDS and rule["labels"] for rule in rows)
    english = [label for rule in table["english"] for label in rule["labels"]]
    assert len(set(english)) == len(english)
    assert all(label == label.lower() and re.match("[a-z]", label) for label in english)


def test_secrets() -> None:
    secrets = data.table("secrets")
    for rule in secrets["keys"]:
        assert rule["service"] and re.compile(rule["pattern"]).groups == 0
    assert set(secrets["strong words"] + secrets["weak words"]) <= set(secrets["words"])


def test_each_country_has_one_length_of_ibans() -> None:
    pattern = next(rule.pattern for rule in rules.rules("codes") if rule.check == "iban")
    for country, bban in (("NO", 11), ("DE", 18), ("de", 18), ("GB", 18), ("FR", 23), ("MT", 27), ("RU", 29)):
        fitting = [n for n in range(5, 35) if pattern.fullmatch(f"{country}89" + "7" * n)]
        assert fitting == [bban], country
    assert not pattern.search("ZZ8937040044053201300012")


def test_phrases_around_names() -> None:
    table = data.table("names_en_context")
    phrases = {phrase + sign for sign, each in table["phrases"].items() for phrase in each}
    assert set(table["loose"]) <= phrases and set(table["phrases"]) == {"", ":", "?", ",", "."}


def test_words_of_lists_in_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "few.txt").write_text("# some\nab\nacd e\n", encoding="utf-8")
    (tmp_path / "some.ini").write_text(
        "[patterns]\na = <<any few>>\nb = [<<chars few>>][<<heads few>>]\nc = [ae](?:<<tails few>>)\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(data, "_HERE", tmp_path)
    assert data.sections("some")["patterns"] == {
        "a": "(?:acd|ab|e)", "b": "[abcde][ae]", "c": "[ae](?:cd(?<=acd)|b(?<=ab)|(?<=e))",
    }  # fmt: skip
    data.sections.cache_clear()
