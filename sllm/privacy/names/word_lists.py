"""The words of names: lists of two languages, and what words in Latin script look like."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from sllm.privacy import data
from sllm.privacy.regex import lazy

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "CANDIDATE",
    "ENGLISH",
    "looks_like_surname",
    "not_a_common_word",
    "trimmed",
]


class _English:
    """Words of names in Latin script, and capitalised words that are not part of one; each set is made when
    it is first used.

    Attributes:
        given: given names.
        surnames: some surnames.
        famous: given names that alone are seldom a private person.
        common: words that are not part of a name where nothing announces one.
        not_names: words that are never part of a name.
        places: places and makes with letters that English does not write.
        ambiguous: given names that are also a word or a place.
        sure_given: given names that are nothing else.
        plain: capitalised words that are not a given name.

    """

    def __getattr__(self, name: str) -> frozenset[str]:
        if name.startswith("_"):
            raise AttributeError(name)
        derived = _DERIVED.get(name)
        made = derived(self) if derived else frozenset(data.words(f"names_en_{name}"))
        setattr(self, name, made)
        return made


_DERIVED: dict[str, Callable[[_English], frozenset[str]]] = {
    "ambiguous": lambda en: (
        (frozenset(data.words("names_en_ambiguous")) | (en.given & (en.common | en.not_names))) - en.famous
    ),
    "sure_given": lambda en: en.given - en.ambiguous,
    "plain": lambda en: (en.common | en.not_names) - en.sure_given,
}
ENGLISH = _English()


@functools.cache
def _letters(capitals: bool) -> str:
    """The inside of a character class: letters of Latin Extended-A and -B and Extended Additional."""
    chars = [chr(c) for c in (*range(0xC0, 0x250), *range(0x1E00, 0x1F00)) if chr(c).isalpha()]
    return "".join(char for char in chars if not capitals or char.isupper())


_CAP = f"A-Z{_letters(True)}"
# U+0300 to U+036F: marks that follow their letter where the text is decomposed.
_LETTER = f"A-Za-z{_letters(False)}\u0300-\u036f"
_W = rf"(?:[DdOL]['’])?[{_CAP}][{_LETTER}'’-]{{1,24}}"
_PARTICLE = (
    r"(?:van|von|de|der|den|da|di|del|della|la|le|bin|bint|ibn|al|el|dos|das|do|du|ten|ter|af|zu|y|e|ben|abu)"
)
_NAME = (
    rf"(?:[A-Z]\. ?){{0,3}}{_W}(?: (?:[A-Z]\.?(?!['’])|{_PARTICLE}(?: (?:der|den|la|las|los))?(?= [{_CAP}])|"
    rf"{_W})){{0,4}}"
)
# A run of capitalised words.
CANDIDATE = lazy(rf"(?<![{_LETTER}]){_NAME}(?![{_LETTER}])")


def _surname_shape() -> str:
    endings = "|".join(data.words("names_en_endings"))
    return (
        rf"(?:O['’]|D['’]|Mc|Mac(?=[A-Z])|Fitz)[A-Z][{_LETTER}]{{2,}}\Z"
        rf"|[{_LETTER}'’-]{{2,}}(?:{endings}|[{_LETTER}]-[{_CAP}][{_LETTER}]{{2,}})\Z"
    )


# How surnames of many countries begin or end.
_SHAPE = lazy(_surname_shape)
_FOREIGN = lazy(f"[{_letters(False)}]")
_INNER_CAPITAL = lazy(r"[a-z][A-Z]")
_CAMEL_NAME = lazy(r"(?:Mc|Mac|De|Di|La|Le|Van|Von|Du|Fitz|O|D|Da|Del|Ja|Ra|Sha)[A-Z][a-z]+\Z")


def not_a_common_word(word: str) -> bool:
    """Whether a capitalised word can be part of a name as far as its letters tell."""
    return (
        word not in ENGLISH.plain
        and word not in ENGLISH.places
        and (word[1:].islower() or not _INNER_CAPITAL.search(word) or _CAMEL_NAME.match(word) is not None)
    )


def looks_like_surname(word: str) -> bool:
    """Whether a word has the form of a surname, or letters that English does not write."""
    if word in ENGLISH.places or word in ENGLISH.common:
        return False
    return (len(word) >= 5 and _SHAPE.match(word) is not None) or (
        len(word) >= 3 and _FOREIGN.search(word) is not None
    )


def trimmed(name: str, start: int, *, sure: bool = False) -> tuple[int, int] | None:
    """The range of the part of a run of capitalised words that can be a name, or None.

    Args:
        name: the run.
        start: its offset in the text.
        sure: a name is announced here, so that ordinary words such as May and Will can begin it.

    """
    parts = name.split(" ")
    while parts and parts[0].rstrip(".,") in ENGLISH.not_names:
        if sure and len(parts) > 1 and parts[0] in ENGLISH.given and len(parts[1]) > 1:
            break
        start += len(parts[0]) + 1
        parts.pop(0)
    for i, word in enumerate(parts):
        own = word.removesuffix("'s").removesuffix("’s")
        if word in ENGLISH.not_names and not (sure and not i):
            parts = parts[:i]
        elif own != word:
            parts = [*parts[:i], *([own] if own not in ENGLISH.not_names else [])]
        else:
            continue
        break
    text = " ".join(parts).rstrip("'’-")
    return (start, start + len(text)) if len(text) >= 2 else None
