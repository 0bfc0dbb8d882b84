"""Names in Latin letters that nothing announces: romanised Chinese ones, without capitals, first in a
sentence.
"""

from __future__ import annotations

import pytest

from sllm.privacy import NameDetector
from sllm.privacy.names.pinyin import is_name


def names(text: str) -> list[str]:
    found = NameDetector().detect(text)
    return sorted({text[one.start : one.end] for one in found if one.kind == "NAME"})


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
        ("could you ask priya whether it is done", ["priya"]),
        ("tell gavin novak that it starts at nine", ["gavin novak"]),
        ("ask whether it is done, tell everyone, email me, meet there, thank you", []),
        ("Satomi is from Portland. Kwabena lives in Leeds.", ["Kwabena", "Satomi"]),
        ("It was late. Oyelaran works at the harbour.", ["Oyelaran"]),
        ("She lives at 4 Mill Road. He was born in May. Who works at night? They grew up here.", []),
        ("Everyone works at the harbour. Nobody lives in it. The sound comes from Berlin.", []),
    ],
)
def test_names_that_nothing_announces(text: str, expected: list[str]) -> None:
    assert names(text) == expected


@pytest.mark.parametrize("surname", ["Zhang", "Xu", "Ouyang"])
@pytest.mark.parametrize("given", ["Wei", "Xiaoming", "Ning", "Chunhua", "Zi'ang"])
def test_a_chinese_name_in_either_order(surname: str, given: str) -> None:
    assert is_name(surname, given) and is_name(given, surname)
