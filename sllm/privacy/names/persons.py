"""Which names are one person's: "Desmond Hargrove", "Mr Hargrove" and "Desmond"; 王建国, 王先生 and 建国."""

from __future__ import annotations

import functools
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sllm.privacy import data
from sllm.privacy.names.word_lists import ENGLISH, not_a_common_word
from sllm.privacy.regex import lazy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence, Set

__all__ = ["People", "parts"]

_SHORTEST = 4  # of a part that is searched for alone
_HAN_NAME = lazy("[\u3400-\u9fff]{2,8}")
_HAN_TITLE = lazy(
    "(?:(?P<man>先生)|(?P<woman>女士|小姐|太太|夫人|阿姨)|老师|医生|教授|经理|主任|律师|同学|师傅|护士|局长|"
    "院长|警官|博士|同志|总监|校长|大夫|法官|会计|教练|部长|处长|科长|董事长|总经理|老師|醫生|經理|同學|总|總)$"
)
_TITLE = lazy(
    r"(?:(?P<man>mr|sir|herr)|(?P<woman>mrs|ms|miss|mme|mlle|madam|lady)|dr|prof|professor|doctor|coach|rev|"
    r"capt|captain|sgt|judge|nurse)\.?\s+",
)


@dataclass(frozen=True, slots=True)
class _Mention:
    """What a name says of the person: parts in lower case, "" for what it does not say.

    Attributes:
        either: a word that is the given name or the surname.
        woman: by the title; None: there is none, or it is for both.

    """

    given: str = ""
    middle: str = ""
    surname: str = ""
    either: str = ""
    woman: bool | None = None

    @property
    def is_full(self) -> bool:
        return bool(self.given and self.surname)


def _mention(name: str) -> _Mention:
    text = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    if _HAN_NAME.fullmatch(text):
        return _of_han(text)
    title = _TITLE.match(text)
    woman = None if title is None or title.lastgroup is None else title.lastgroup == "woman"
    rest = text[title.end() :] if title else text
    last, comma, first = rest.partition(", ")
    words = f"{first} {last}".split() if comma else rest.replace("·", " ").replace("•", " ").split()
    if len(words) >= 2:
        return _Mention(words[0], " ".join(words[1:-1]), words[-1], woman=woman)
    return _Mention(surname=rest, woman=woman) if title else _Mention(either=rest)


@functools.cache
def _surnames() -> tuple[str, list[str]]:
    """Chinese ones of one character, and those of two and more."""
    singles = data.words("names_zh_surnames") + data.words("names_zh_rare_surnames")
    return "".join(singles), data.words("names_zh_double_surnames")


def _of_han(text: str) -> _Mention:
    title = _HAN_TITLE.search(text)
    woman = None if title is None or title.lastgroup is None else title.lastgroup == "woman"
    base = text[: title.start()] if title and title.start() else text
    singles, doubles = _surnames()
    size = next((len(one) for one in doubles if base.startswith(one)), 1)
    has_surname = size > 1 or base[0] in singles
    if base != text and len(base) == size:
        return _Mention(surname=base, woman=woman)
    if base[0] in "小老" and len(base) == 2 and base[1] in singles:
        return _Mention(surname=base[1], woman=woman)
    if has_surname and len(base) > size:
        return _Mention(base[size:], surname=base[:size], woman=woman)
    return _Mention(base, woman=woman)


def _agree(a: str, b: str) -> bool:
    return not a or not b or a == b


def _other_title(one: _Mention, other: _Mention) -> bool:
    return one.woman is not None and other.woman is not None and one.woman != other.woman


def _contradicts(one: _Mention, other: _Mention) -> bool:
    return _other_title(one, other) or not all(
        _agree(*pair) for pair in zip(_parts(one), _parts(other), strict=True)
    )


def _fits(one: _Mention, other: _Mention) -> bool:
    """Whether two mentions are of one person as far as they say."""
    for word, rest in ((one.either, other), (other.either, one)):
        if word:
            return word in (rest.given, rest.surname, rest.either)
    return not _contradicts(one, other) and bool(
        (one.given and other.given) or (one.surname and other.surname)
    )


def _parts(one: _Mention) -> tuple[str, str, str]:
    return one.given, one.middle, one.surname


def _words(one: _Mention) -> list[str]:
    """By which a person can be known."""
    return [word for word in (one.given, one.surname, one.either) if word]


def parts(name: str) -> list[str]:
    """The given name and the surname in a whole English name, as far as each of them alone can hardly be
    anything else. Parts of Chinese names are words too often: 建国.
    """
    words = name.split()
    if not 2 <= len(words) <= 4 or not name.isascii() or words[0] not in ENGLISH.sure_given:
        return []
    single = (words[0], words[-1])
    return [word for word in single if len(word) >= _SHORTEST and word.isalpha() and not_a_common_word(word)]


class People:
    """The people of a conversation, by the names that were found of them.

    A part of a name is the person of whom it is a part where there is only one such person, and is a person
    of its own where there are several, since nothing says which of them is meant: beside "Desmond Hargrove"
    and "Julia Hargrove", "Hargrove" is a third. Titles tell apart too. A name keeps the person that it was
    given first.
    """

    def __init__(self) -> None:
        self._people: list[list[_Mention]] = []
        self._of_name: dict[str, int] = {}
        # Word -> who has it in a name; and who has it in one that says no surname.
        self._named: defaultdict[str, set[int]] = defaultdict(set)
        self._open: defaultdict[str, set[int]] = defaultdict(set)
        self._of_surname: defaultdict[str, set[_Mention]] = defaultdict(set)

    def learn(self, names: Iterable[str]) -> None:
        """Takes in the names that were found together: the whole ones before parts of them."""
        new = {name: _mention(name) for name in names if name not in self._of_name}
        whole: defaultdict[str, set[_Mention]] = defaultdict(set)  # by word
        for one in new.values():
            self._of_surname[one.surname].add(one)
            for word in _words(one) if one.is_full else ():
                whole[word].add(one)
        for name, one in new.items():
            if one.is_full:
                # Who was known by a part alone becomes the one whole name that fits, not one of several.
                self._put(name, one, [n for n in self._fitting(one) if self._alone(n, whole)])
        for name, one in new.items():
            if not one.is_full:
                # Beside Mrs Hargrove, Mr Hargrove need not be the Hargrove whose whole name is known.
                unsure = one.surname and any(_other_title(one, x) for x in self._of_surname[one.surname])
                self._put(name, one, [] if unsure else self._fitting(one))

    def key(self, name: str) -> str | None:
        """What all names of a person have in common; None for a name that was not learnt."""
        number = self._of_name.get(name)
        return None if number is None else f"\0person {number}"  # no value is written so

    def _fitting(self, one: _Mention) -> list[int]:
        # Who has a surname, and not this one, is somebody else, whatever the given name.
        known = self._named[one.surname] | self._open[one.given] if one.surname else self._named_by(one)
        return [
            n
            for n in sorted(known)
            if any(_fits(one, other) for other in self._people[n])
            and not any(_contradicts(one, other) for other in self._people[n])
        ]

    def _named_by(self, one: _Mention) -> set[int]:
        return set().union(*(self._named[word] for word in _words(one)))

    def _alone(self, n: int, whole: Mapping[str, Set[_Mention]]) -> bool:
        """Whether a known person is whole, or only one of some new whole names, by word, fits."""
        if any(one.is_full for one in self._people[n]):
            return True
        words = {word for one in self._people[n] for word in _words(one)}
        near = set().union(*(whole.get(word, ()) for word in words))
        return len({replace(one, woman=None) for one in near if n in self._fitting(one)}) == 1

    def _put(self, name: str, one: _Mention, fitting: Sequence[int]) -> None:
        same = [n for n in fitting if one in self._people[n]]
        if len(fitting) == 1 or same:
            number = same[0] if same else fitting[0]
        else:
            number = len(self._people)
            self._people.append([])
        self._people[number].append(one)
        for word in _words(one):
            self._named[word].add(number)
            if not one.surname:
                self._open[word].add(number)
        self._of_name[name] = number
