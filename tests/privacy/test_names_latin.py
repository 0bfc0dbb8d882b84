"""Names in Latin letters that nothing announces: romanised Chinese ones, without capitals, first in a
sentence.
"""

from __future__ import annotations

import pytest

from sllm.privacy import CensusDetector, NameDetector
from sllm.privacy.names import census
from sllm.privacy.names.census import is_pinyin

with_lists = pytest.mark.skipif(census.installed() is None, reason="the extra names is not installed")


@with_lists
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Zhao Min joined from Xiamen.", ["Zhao Min"]),
        ("the draft was sent to Qian Zhongshu and Yuhan Lü", ["Qian Zhongshu"]),
        ("Xiaoyun Guo, Ouyang Jie", ["Ouyang Jie", "Xiaoyun Guo"]),
        ("Minutes: Deng Xiao'ou absent", ["Deng Xiao'ou"]),
        ("A trip to Hong Kong and Shan Dong for a year", []),
        ("He Can. She Made. Long Song. Pan Pipe. Song Title. Man Page. Sun Valley.", []),
        ("Main Menu, Data Line, Fan Base, Tang Soup", []),
    ],
)
def test_chinese_names_in_pinyin(text: str, expected: list[str]) -> None:
    assert sorted(text[one.start : one.end] for one in CensusDetector().detect(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("could you ask priya whether it is done", ["priya"]),
        ("tell gavin novak that it starts at nine", ["gavin novak"]),
        ("ask whether it is done, tell everyone, email me, meet there, thank you", []),
        ("Satomi is from Portland. Kwabena lives in Leeds.", ["Kwabena", "Satomi"]),
        ("It was late. Oyelaran works at the harbour.", ["Oyelaran"]),
        ("She lives at 4 Mill Road. He was born in May. Who works at night? They grew up here.", []),
        ("Everyone works at the harbour. Nobody lives in it. The sound comes from Berlin.", []),
    ],
)
def test_names_without_capitals_and_first_in_a_sentence(text: str, expected: list[str]) -> None:
    found = NameDetector().detect(text)
    assert sorted(text[one.start : one.end] for one in found if one.kind == "NAME") == expected


@pytest.mark.parametrize("surname", ["Zhang", "Xu", "Ouyang"])
@pytest.mark.parametrize("given", ["Wei", "Xiaoming", "Ning", "Chunhua", "Zi'ang"])
def test_a_chinese_name_in_either_order(surname: str, given: str) -> None:
    assert is_pinyin(surname, given) and is_pinyin(given, surname)
