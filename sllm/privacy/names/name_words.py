"""What the words of names in Latin script look like: runs of capitalised words, given names, surnames and
their endings, and the ordinary words that are none.
"""

from __future__ import annotations

import re

from sllm.privacy.names import word_lists as words

__all__ = [
    "ALONE",
    "AMBIGUOUS",
    "CANDIDATE",
    "CAP",
    "COMMON",
    "FAMOUS",
    "GIVEN",
    "INNER_CAPITAL",
    "LETTER",
    "LOWER_GIVEN",
    "LOWER_SURNAMES",
    "NOT_NAMES",
    "PLAIN",
    "SURE_GIVEN",
    "SURNAMES",
    "TWO_WORDS",
    "no_word",
    "shaped",
    "trimmed",
]


def _letters(capitals: bool) -> str:
    """The inside of a character class: letters of Latin Extended-A and -B and Extended Additional."""
    chars = [chr(c) for c in (*range(0xC0, 0x250), *range(0x1E00, 0x1F00)) if chr(c).isalpha()]
    return "".join(char for char in chars if not capitals or char.isupper())


CAP = f"A-Z{_letters(True)}"
# U+0300 to U+036F: marks that stand behind their letter where the text is decomposed.
LETTER = f"A-Za-z{_letters(False)}\u0300-\u036f"
_W = rf"(?:[DdOL]['’])?[{CAP}][{LETTER}'’-]{{1,24}}"
_PARTICLE = (
    r"(?:van|von|de|der|den|da|di|del|della|la|le|bin|bint|ibn|al|el|dos|das|do|du|ten|ter|af|zu|y|e|ben|abu)"
)
_NAME = (
    rf"(?:[A-Z]\. ?){{0,3}}{_W}(?: (?:[A-Z]\.?(?!['’])|{_PARTICLE}(?: (?:der|den|la|las|los))?(?= [{CAP}])|"
    rf"{_W})){{0,4}}"
)
CANDIDATE = re.compile(rf"(?<![{LETTER}]){_NAME}(?![{LETTER}])")
GIVEN = frozenset(words.GIVEN_EN.split())
FAMOUS = frozenset(words.NOT_ALONE_EN.split())
SURNAMES = frozenset(words.SURNAMES_EN.split())
NOT_NAMES = frozenset(words.NOT_NAMES.split())
COMMON = frozenset(words.COMMON_EN.split())
# A given name, and a word or a place or somebody that everybody knows.
AMBIGUOUS = (frozenset(words.AMBIGUOUS_EN.split()) | (GIVEN & (COMMON | NOT_NAMES))) - frozenset(
    words.NOT_ALONE_EN.split()
)
SURE_GIVEN = GIVEN - AMBIGUOUS
ALONE = SURE_GIVEN - frozenset(words.NOT_ALONE_EN.split())
PLAIN = (COMMON | NOT_NAMES) - SURE_GIVEN
LOWER_GIVEN = frozenset(name.lower() for name in SURE_GIVEN if len(name) > 2)
LOWER_SURNAMES = frozenset(name.lower() for name in SURNAMES)
# How surnames of many countries end.
_SHAPE = re.compile(
    rf"(?:O['’]|D['’]|Mc|Mac(?=[A-Z])|Fitz)[A-Z][{LETTER}]{{2,}}\Z|"
    rf"[{LETTER}'’-]{{2,}}(?:wski|wska|cki|cka|[^h]ski|wicz|czyk|enko|chuk|[kmnlrdt]ova?|[ae]nov|[rkl]ev|"
    r"vić|vic|vich|[dlrntkm]son|sson|[dlrntkms]sen|dóttir|dottir|[dnltr]berg|stein|mann|meier|meyer|bauer|"
    r"ström|strom|gren|qvist|quist|poulos|[iao]kis|idis|[sk]hvili|adze|zadeh|oğlu|oglu|[^aeiou]ez|escu|eanu|"
    r"etti|elli|ucci|aldi|eira|[^aeiou]wala|swamy|murthy|krishnan|nathan|singh|[^o]moto|yama|kawa|gawa|mura|"
    r"zaki|uchi|[^aeiou]ström|borough|worth|bottom|thwaite|[^aeiou]ington|ingham|[dlrtnk]ford|[nlrtd]ley|"
    rf"[{LETTER}]-[{CAP}][{LETTER}]{{2,}})\Z"
)
_FOREIGN = re.compile(f"[{_letters(False)}]")
_PLACES_TEXT = (
    "São Zürich Malmö Köln Düsseldorf Bogotá Curaçao Québec Montréal México Perú Brasília Côte Nestlé "
    "Citroën Škoda Häagen Mötley Beyoncé Pokémon Café Münster Nürnberg Göteborg Córdoba Cádiz Málaga León "
    "Genève Besançon Español Française Français Português Österreich Łódź Kraków Gdańsk Wrocław Poznań "
    "Türkiye İstanbul Ångström"
)
_PLACES = frozenset(_PLACES_TEXT.split())
INNER_CAPITAL = re.compile(r"[a-z][A-Z]")
_CAMEL_NAME = re.compile(r"(?:Mc|Mac|De|Di|La|Le|Van|Von|Du|Fitz|O|D|Da|Del|Ja|Ra|Sha)[A-Z][a-z]+\Z")
TWO_WORDS = frozenset(
    ["Addis Ababa", "Sierra Leone", "Abu Dhabi", "Tel Aviv", "Kuala Lumpur", "Nova Scotia", "Phnom Penh",
     "Palo Alto", "Ann Arbor", "Coca Cola", "Louis Vuitton", "Visual Basic", "Novo Nordisk",
     "Bosnia Herzegovina", "Costa Rica", "Ho Chi", "Ulan Bator", "Aston Martin", "Lockheed Martin",
     "Harley Davidson", "Goldman Sachs", "Morgan Stanley", "Wells Fargo", "Merrill Lynch", "Rolls Royce",
     "Mercedes Benz", "Alfa Romeo", "Land Rover", "Calvin Klein", "Tommy Hilfiger", "Jack Daniels",
     "Johnnie Walker", "Ben Jerry", "Trader Joe", "Burning Man", "Mona Lisa", "Machu Picchu", "Taj Mahal",
     "Notre Dame", "Buckingham Palace", "Lorem Ipsum", "Pokemon Go"]
)  # fmt: skip


def no_word(word: str) -> bool:
    """Whether a capitalised word can be part of a name for all that its letters say."""
    return (
        word not in PLAIN
        and word not in _PLACES
        and (word[1:].islower() or not INNER_CAPITAL.search(word) or _CAMEL_NAME.match(word) is not None)
    )


def shaped(word: str) -> bool:
    """Whether a word has the form of a surname, or letters that English does not write."""
    if word in _PLACES or word in COMMON:
        return False
    return (len(word) >= 5 and _SHAPE.match(word) is not None) or (
        len(word) >= 3 and _FOREIGN.search(word) is not None
    )


def trimmed(name: str, start: int, *, sure: bool = False) -> tuple[int, int] | None:
    """The part of a run of capitalised words that can be a name; ``sure``: May and Will begin one, too."""
    parts = name.split(" ")
    while parts and parts[0].rstrip(".,") in NOT_NAMES:
        if sure and len(parts) > 1 and parts[0] in GIVEN and len(parts[1]) > 1:
            break
        start += len(parts[0]) + 1
        parts.pop(0)
    for i, word in enumerate(parts):
        if (word in NOT_NAMES and not (sure and not i)) or word.endswith(("'s", "’s")):
            if word.endswith(("'s", "’s")) and word not in NOT_NAMES:
                parts = [*parts[:i], word[:-2]]
            else:
                parts = parts[:i]
            break
    text = " ".join(parts).rstrip("'’-")
    return (start, start + len(text)) if len(text) >= 2 else None
