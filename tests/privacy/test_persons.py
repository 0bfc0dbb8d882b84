"""Which names are one person's, and which are not certain to be."""

from __future__ import annotations

import re

import pytest

from sllm.privacy import NameDetector, PatternDetector, Vault
from sllm.privacy.names.persons import People


def groups(*batches: list[str]) -> list[list[str]]:
    """The names by person, in the order in which they came."""
    people = People()
    for batch in batches:
        people.learn(batch)
    found: dict[str | None, list[str]] = {}
    for name in dict.fromkeys(name for batch in batches for name in batch):
        found.setdefault(people.key(name), []).append(name)
    assert None not in found
    return list(found.values())


@pytest.mark.parametrize(
    ("names", "people"),
    [
        (["Desmond Hargrove", "Mr Hargrove", "Desmond"], [["Desmond Hargrove", "Mr Hargrove", "Desmond"]]),
        (["Desmond", "Hargrove", "Desmond Hargrove"], [["Desmond", "Hargrove", "Desmond Hargrove"]]),
        (["王建国", "王先生", "建国"], [["王建国", "王先生", "建国"]]),
        (["王先生", "王建国先生", "小王"], [["王先生", "王建国先生", "小王"]]),
        (["欧阳静", "欧阳女士", "欧阳老师"], [["欧阳静", "欧阳女士", "欧阳老师"]]),
        (["Hargrove, Desmond", "DESMOND HARGROVE"], [["Hargrove, Desmond", "DESMOND HARGROVE"]]),
        (["Desmond A. Hargrove", "Desmond Hargrove"], [["Desmond A. Hargrove", "Desmond Hargrove"]]),
        (["Ludmila Černá", "Mrs. Černá"], [["Ludmila Černá", "Mrs. Černá"]]),
        (["买买提·艾力", "买买提"], [["买买提·艾力", "买买提"]]),
        # Not certain: each is a person of its own.
        (
            ["Desmond Hargrove", "Julia Hargrove", "Hargrove"],
            [["Desmond Hargrove"], ["Julia Hargrove"], ["Hargrove"]],
        ),
        (["王建国", "王强", "王先生"], [["王建国"], ["王强"], ["王先生"]]),
        (["Mr Hargrove", "Mrs Hargrove"], [["Mr Hargrove"], ["Mrs Hargrove"]]),
        (["王先生", "王女士", "王建国"], [["王先生"], ["王女士"], ["王建国"]]),
        (
            ["Desmond Hargrove", "Desmond Pell", "Desmond"],
            [["Desmond Hargrove"], ["Desmond Pell"], ["Desmond"]],
        ),
        (["John A. Smith", "John B. Smith"], [["John A. Smith"], ["John B. Smith"]]),
        (["李明", "王明"], [["李明"], ["王明"]]),
        (["Grace", "Desmond"], [["Grace"], ["Desmond"]]),
    ],
)
def test_names_found_together(names: list[str], people: list[list[str]]) -> None:
    assert groups(names) == people


def test_a_name_keeps_its_person() -> None:
    people = People()
    people.learn(["王建国", "王先生"])
    before = people.key("王先生")
    people.learn(["王强", "王先生"])
    assert people.key("王先生") == before == people.key("王建国") != people.key("王强")
    people.learn(["小王"])
    assert people.key("小王") not in (before, people.key("王强"))
    assert people.key("赵六") is None


def test_a_part_that_came_first_joins_the_only_whole_name() -> None:
    assert groups(["Hargrove"], ["Desmond Hargrove"], ["Desmond"]) == [
        ["Hargrove", "Desmond Hargrove", "Desmond"]
    ]
    assert groups(["Hargrove"], ["Desmond Hargrove", "Julia Hargrove"]) == [
        ["Hargrove"],
        ["Desmond Hargrove"],
        ["Julia Hargrove"],
    ]


def test_odd_names_are_people_too() -> None:
    assert groups(["先生", "·", "Mr ", "", "王"]) == [["先生"], ["·"], ["Mr "], [""], ["王"]]


def indices(vault: Vault, text: str) -> list[str]:
    """The index of each placeholder of a text that the vault masks and restores."""
    masked = vault.mask(text)
    assert vault.restore(masked.text, in_links=True) == text
    return re.findall(r"\[NAME_([0-9]+)_", masked.text)


def test_the_placeholders_of_a_person_have_one_index() -> None:
    vault = Vault((PatternDetector(), NameDetector()))
    text = "Dear Mr Hargrove, my name is Desmond Hargrove. 我叫王建国，找王先生也可以。\nDear Mrs Pell,"
    first, second, third, fourth, other = indices(vault, text)
    assert first == second != third == fourth != other != first
    assert vault.counts == {"NAME": 3}
    # What a name is does not change later.
    assert indices(vault, "My name is Julia Hargrove. Dear Mr Hargrove,")[1] == first
    # The parts of an English name are masked from then on, as far as they are not words.
    later = indices(vault, "Later Desmond left, and Hargrove was late. May Julia come?")
    assert later[:2] == [first, first] and later[2] not in (first, third, other)
    vault.clear()
    assert len(set(indices(vault, "Dear Mr Hargrove, my name is Julia Pell."))) == 2
