"""The words of names: lists of two languages, and what words in Latin script look like.

Runs of capitalised words, given names, surnames and their endings, and the ordinary words that are not part
of a name.
"""

from __future__ import annotations

import functools

from sllm.privacy import data
from sllm.privacy.regex import lazy

__all__ = [
    "CANDIDATE",
    "CAP",
    "CHINESE",
    "ENGLISH",
    "INNER_CAPITAL",
    "LETTER",
    "looks_like_surname",
    "not_a_common_word",
    "trimmed",
]


class _English:
    """Words of names in Latin script, and capitalised words that are not part of one; each list is read when
    it is first used.
    """

    @functools.cached_property
    def given(self) -> frozenset[str]:
        """Given names."""
        return frozenset(data.words("names_en_given"))

    @functools.cached_property
    def surnames(self) -> frozenset[str]:
        return frozenset(data.words("names_en_surnames"))

    @functools.cached_property
    def famous(self) -> frozenset[str]:
        """Given names that alone are seldom a private person."""
        return frozenset(data.words("names_en_famous"))

    @functools.cached_property
    def common(self) -> frozenset[str]:
        """Words that are not part of a name where nothing announces one."""
        return frozenset(data.words("names_en_common"))

    @functools.cached_property
    def not_names(self) -> frozenset[str]:
        """Words that are never part of a name."""
        return frozenset(data.words("names_en_not_names"))

    @functools.cached_property
    def places(self) -> frozenset[str]:
        """Places and makes with letters that English does not write."""
        return frozenset(data.words("names_en_places"))

    @functools.cached_property
    def pairs(self) -> frozenset[str]:
        """Two capitalised words that together are a place or a make."""
        return frozenset(name.replace("_", " ") for name in data.words("names_en_pairs"))

    @functools.cached_property
    def ambiguous(self) -> frozenset[str]:
        """Given names that are also a word or a place."""
        both = self.given & (self.common | self.not_names)
        return (frozenset(data.words("names_en_ambiguous")) | both) - self.famous

    @functools.cached_property
    def sure_given(self) -> frozenset[str]:
        """Given names that are nothing else."""
        return self.given - self.ambiguous

    @functools.cached_property
    def alone(self) -> frozenset[str]:
        """Given names that are a private person without another word."""
        return self.sure_given - self.famous

    @functools.cached_property
    def plain(self) -> frozenset[str]:
        """Capitalised words that are not a given name."""
        return (self.common | self.not_names) - self.sure_given

    @functools.cached_property
    def lower_given(self) -> frozenset[str]:
        """Given names as they are written without capitals."""
        return frozenset(name.lower() for name in self.sure_given if len(name) > 2)

    @functools.cached_property
    def lower_surnames(self) -> frozenset[str]:
        return frozenset(name.lower() for name in self.surnames)


class _Chinese:
    """Characters and words of Chinese names, and of what is not one; each list is read when it is first
    used.
    """

    @functools.cached_property
    def surnames(self) -> str:
        """Surnames of one character."""
        return "".join(data.words("names_zh_surnames"))

    @functools.cached_property
    def double_surnames(self) -> list[str]:
        """Surnames of two or more characters."""
        return data.words("names_zh_double_surnames")

    @functools.cached_property
    def rare_surnames(self) -> str:
        """Surnames of one character that are more often ordinary words."""
        return "".join(data.words("names_zh_rare_surnames"))

    @functools.cached_property
    def given(self) -> str:
        """Characters of given names."""
        return "".join(data.words("names_zh_given"))

    @functools.cached_property
    def given_sure(self) -> str:
        """Characters of given names that are hardly used for anything else."""
        return "".join(data.words("names_zh_given_sure"))

    @functools.cached_property
    def not_given(self) -> str:
        """Characters that are hardly ever part of a given name."""
        return "".join(data.words("names_zh_not_given"))

    @functools.cached_property
    def words_of_two(self) -> frozenset[str]:
        """Ordinary words that look like a surname and a given name."""
        return frozenset(data.words("names_zh_words_of_two"))

    @functools.cached_property
    def not_names(self) -> str:
        """A pattern of words that begin with a character that is also a surname."""
        return "|".join(data.words("names_zh_not_names"))

    @functools.cached_property
    def weak_roles(self) -> frozenset[str]:
        """Words that a name may follow, and many other things."""
        return frozenset(data.words("names_zh_weak_roles"))

    @functools.cached_property
    def roles(self) -> list[str]:
        """What a name comes right after, in the order of trying."""
        return data.words("names_zh_roles")

    @functools.cached_property
    def field_labels(self) -> list[str]:
        """Labels of fields that hold a person's name."""
        return [label.replace("_", " ") for label in data.words("names_zh_field_labels")]

    @functools.cached_property
    def belongings(self) -> list[str]:
        """What people are said to own or to have: 张伟的电话."""
        return data.words("names_zh_belongings")

    @functools.cached_property
    def addressed(self) -> str:
        """Surnames that are a person with a form of address, without a given name."""
        return "".join(data.words("names_zh_addressed"))


ENGLISH = _English()
CHINESE = _Chinese()


def _letters(capitals: bool) -> str:
    """The inside of a character class: letters of Latin Extended-A and -B and Extended Additional."""
    chars = [chr(c) for c in (*range(0xC0, 0x250), *range(0x1E00, 0x1F00)) if chr(c).isalpha()]
    return "".join(char for char in chars if not capitals or char.isupper())


CAP = f"A-Z{_letters(True)}"
# U+0300 to U+036F: marks that follow their letter where the text is decomposed.
LETTER = f"A-Za-z{_letters(False)}\u0300-\u036f"
_W = rf"(?:[DdOL]['’])?[{CAP}][{LETTER}'’-]{{1,24}}"
_PARTICLE = (
    r"(?:van|von|de|der|den|da|di|del|della|la|le|bin|bint|ibn|al|el|dos|das|do|du|ten|ter|af|zu|y|e|ben|abu)"
)
_NAME = (
    rf"(?:[A-Z]\. ?){{0,3}}{_W}(?: (?:[A-Z]\.?(?!['’])|{_PARTICLE}(?: (?:der|den|la|las|los))?(?= [{CAP}])|"
    rf"{_W})){{0,4}}"
)
CANDIDATE = lazy(rf"(?<![{LETTER}]){_NAME}(?![{LETTER}])")
# How surnames of many countries end.
_SHAPE = lazy(
    rf"(?:O['’]|D['’]|Mc|Mac(?=[A-Z])|Fitz)[A-Z][{LETTER}]{{2,}}\Z|"
    rf"[{LETTER}'’-]{{2,}}(?:wski|wska|cki|cka|[^h]ski|wicz|czyk|enko|chuk|[kmnlrdt]ova?|[ae]nov|[rkl]ev|"
    r"vić|vic|vich|[dlrntkm]son|sson|[dlrntkms]sen|dóttir|dottir|[dnltr]berg|stein|mann|meier|meyer|bauer|"
    r"ström|strom|gren|qvist|quist|poulos|[iao]kis|idis|[sk]hvili|adze|zadeh|oğlu|oglu|[^aeiou]ez|escu|eanu|"
    r"etti|elli|ucci|aldi|eira|[^aeiou]wala|swamy|murthy|krishnan|nathan|singh|[^o]moto|yama|kawa|gawa|mura|"
    r"zaki|uchi|[^aeiou]ström|borough|worth|bottom|thwaite|[^aeiou]ington|ingham|[dlrtnk]ford|[nlrtd]ley|"
    rf"[{LETTER}]-[{CAP}][{LETTER}]{{2,}})\Z"
)
_FOREIGN = lazy(f"[{_letters(False)}]")
INNER_CAPITAL = lazy(r"[a-z][A-Z]")
_CAMEL_NAME = lazy(r"(?:Mc|Mac|De|Di|La|Le|Van|Von|Du|Fitz|O|D|Da|Del|Ja|Ra|Sha)[A-Z][a-z]+\Z")


def not_a_common_word(word: str) -> bool:
    """Whether a capitalised word can be part of a name as far as its letters tell."""
    return (
        word not in ENGLISH.plain
        and word not in ENGLISH.places
        and (word[1:].islower() or not INNER_CAPITAL.search(word) or _CAMEL_NAME.match(word) is not None)
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
        if (word in ENGLISH.not_names and not (sure and not i)) or word.endswith(("'s", "’s")):
            if word.endswith(("'s", "’s")) and word not in ENGLISH.not_names:
                parts = [*parts[:i], word[:-2]]
            else:
                parts = parts[:i]
            break
    text = " ".join(parts).rstrip("'’-")
    return (start, start + len(text)) if len(text) >= 2 else None
