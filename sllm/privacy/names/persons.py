"""Which names are one person's: "Desmond Hargrove", "Mr Hargrove" and "Desmond"; 王建国, 王先生 and 建国."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sllm.privacy.names.word_lists import ENGLISH, not_a_common_word
from sllm.privacy.regex import Patterns

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence, Set

__all__ = ["People", "parts"]

_SHORTEST = 4  # of a part that is searched for alone
_P = Patterns("persons")


@dataclass(frozen=True, slots=True)
class _Mention:
    """What a name says of the person: parts in lower case, "" for what it does not say.

    Attributes:
        title: "man" or "woman", where it says that.
        either: a word that is the given name or the surname.

    """

    given: str = ""
    middle: str = ""
    surname: str = ""
    title: str = ""
    either: str = ""

    @property
    def is_full(self) -> bool:
        return bool(self.given and self.surname)

    @property
    def words(self) -> list[str]:
        """By which the person can be known."""
        return [word for word in (self.given, self.surname, self.either) if word]

    def contradicts(self, other: _Mention) -> bool:
        mine, theirs = ((one.given, one.middle, one.surname, one.title) for one in (self, other))
        return any(a and b and a != b for a, b in zip(mine, theirs, strict=True))

    def fits(self, other: _Mention) -> bool:
        """Whether both are of one person as far as they say."""
        for word, rest in ((self.either, other), (other.either, self)):
            if word:
                return word in (rest.given, rest.surname, rest.either)
        said = (self.given and other.given) or (self.surname and other.surname)
        return bool(said) and not self.contradicts(other)


def _mention(name: str) -> _Mention:
    text = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    if _P.han_name.fullmatch(text):
        return _of_han(text)
    title = _P.title.match(text)
    sex = (title and title.lastgroup) or ""
    rest = text[title.end() :] if title else text
    last, comma, first = rest.partition(", ")
    words = f"{first} {last}".split() if comma else rest.replace("·", " ").replace("•", " ").split()
    if len(words) >= 2:
        return _Mention(words[0], " ".join(words[1:-1]), words[-1], sex)
    return _Mention(surname=rest, title=sex) if title else _Mention(either=rest)


def _of_han(text: str) -> _Mention:
    title = _P.han_title.search(text, 1)
    sex = (title and title.lastgroup) or ""
    base = text[: title.start()] if title else text
    if _P.familiar.fullmatch(base):
        return _Mention(surname=base[1], title=sex)
    surname = _P.surname.match(base)
    size = surname.end() if surname else 1
    if title and len(base) == size:
        return _Mention(surname=base, title=sex)
    cut = size if surname and len(base) > size else 0
    return _Mention(base[cut:], surname=base[:cut], title=sex)


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
            for word in one.words if one.is_full else ():
                whole[word].add(one)
        for name, one in new.items():
            if one.is_full:
                # Who was known by a part alone becomes the one whole name that fits, not one of several.
                self._put(name, one, [n for n in self._fitting(one) if self._alone(n, whole)])
        for name, one in new.items():
            if not one.is_full:
                # Beside Mrs Hargrove, Mr Hargrove need not be the Hargrove whose whole name is known.
                others = self._of_surname[one.surname] if one.surname and one.title else ()
                unsure = any(other.title not in ("", one.title) for other in others)
                self._put(name, one, [] if unsure else self._fitting(one))

    def key(self, name: str) -> str | None:
        """What all names of a person have in common; None for a name that was not learnt."""
        number = self._of_name.get(name)
        return None if number is None else f"\0person {number}"  # no value is written so

    def _fitting(self, one: _Mention) -> list[int]:
        # Who has a surname, and not this one, is somebody else, whatever the given name.
        with_word = (self._named[word] for word in one.words)
        known = self._named[one.surname] | self._open[one.given] if one.surname else set().union(*with_word)
        return [
            n
            for n in sorted(known)
            if any(one.fits(other) for other in self._people[n])
            and not any(one.contradicts(other) for other in self._people[n])
        ]

    def _alone(self, n: int, whole: Mapping[str, Set[_Mention]]) -> bool:
        """Whether a known person is whole, or only one of some new whole names, by word, fits."""
        if any(one.is_full for one in self._people[n]):
            return True
        words = {word for one in self._people[n] for word in one.words}
        near = set().union(*(whole.get(word, ()) for word in words))
        return len({replace(one, title="") for one in near if n in self._fitting(one)}) == 1

    def _put(self, name: str, one: _Mention, fitting: Sequence[int]) -> None:
        same = [n for n in fitting if one in self._people[n]]
        if len(fitting) == 1 or same:
            number = same[0] if same else fitting[0]
        else:
            number = len(self._people)
            self._people.append([])
        self._people[number].append(one)
        for word in one.words:
            self._named[word].add(number)
            if not one.surname:
                self._open[word].add(number)
        self._of_name[name] = number
