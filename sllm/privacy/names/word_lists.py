"""The words of names: lists of two languages, and what words in Latin script look like."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm.privacy import data
from sllm.privacy.regex import Patterns

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "ENGLISH",
    "looks_like_surname",
    "not_a_common_word",
    "trimmed",
]


_P = Patterns("names_en")


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


def not_a_common_word(word: str) -> bool:
    """Whether a capitalised word can be part of a name as far as its letters tell."""
    return (
        word not in ENGLISH.plain
        and word not in ENGLISH.places
        and (word[1:].islower() or not _P.inner_capital.search(word) or _P.camel_name.match(word) is not None)
    )


def looks_like_surname(word: str) -> bool:
    """Whether a word has the form of a surname, or letters that English does not write."""
    return (
        word not in ENGLISH.places and word not in ENGLISH.common and _P.surname_shape.match(word) is not None
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
