"""Postal addresses in Latin script: in English, and by the street names of other countries."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from sllm.privacy import data
from sllm.privacy.findings import Budget, Finding
from sllm.privacy.regex import ALONE, END, first_of, lazy, rest_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["scan"]

# Suffixes that name little else: after a number they are enough. The others need two words before them, so
# that "3 Key Points" is not an address.
_SURE = frozenset(
    ["Street", "St", "Avenue", "Ave", "Road", "Rd", "Boulevard", "Blvd", "Lane", "Ln", "Drive", "Dr", "Court",
     "Ct", "Square", "Terrace", "Parkway", "Pkwy", "Highway", "Hwy", "Crescent", "Close", "Mews", "Circle",
     "Cir", "Alley"]
)  # fmt: skip
_UNIT = (
    r"(?:,? {0,2}(?:(?:Apt|Apartment|Suite|Ste|Unit|Flat|Floor|Fl|Room|Rm|Building|Bldg|Block|"
    r"Lot)\.? ?#?[A-Za-z0-9-]{1,6}"
    r"|#[A-Za-z0-9-]{1,6}|[0-9]{1,3}(?:st|nd|rd|th) [Ff]loor))"
)
_CITY = r"(?:St\.? )?[A-Z][A-Za-z'’-]{1,24}(?: [A-Z][A-Za-z'’-]{1,24}){0,3}"
_ZIP = (
    r"(?:[0-9]{5}(?:-[0-9]{4})?|[A-Z]{1,2}[0-9][A-Z0-9]? ?[0-9][A-Z]{2}|"
    r"[A-Z][0-9][A-Z] ?[0-9][A-Z][0-9]|[0-9]{4})(?![0-9A-Za-z])"
)
_TAIL = (
    rf"(?:{_UNIT}{{0,2}}(?:,? ?\n? ?{_CITY})?(?:, {_CITY})?(?:,? (?:[A-Z]{{2}}|{_CITY}))?,? {_ZIP}|"
    rf"{_UNIT}{{1,2}}(?:, {_CITY}){{0,2}}|, {_CITY}, [A-Z]{{2}}(?![A-Za-z])|(?: (?:Central|East|West|North|"
    rf"South))?(?:, [A-Z][A-Za-z'’-]{{2,20}}(?: [A-Z][a-z]{{2,20}})?(?![A-Za-z]))?)?"
)
_WORD = r"[A-Z0-9][A-Za-z0-9.'’-]{0,24}"
_STREET = lazy(
    rf"(?<![A-Za-z0-9.$€£¥/-])(?:(?:Flat|Apt|Apartment|Unit|"
    rf"Suite|Room|Rm|Shop|Block|Floor|Tower|Building|Level)\.? (?:[0-9]{{1,4}}[A-Za-z]?|[A-Z]), ?"
    rf"(?:[0-9]{{1,3}}/F, ?)?){{0,3}}(?P<number>(?:No\.? ?)?[0-9]{{1,6}}(?:[A-Za-z]|[-/][0-9]{{1,5}}|½|"
    rf" 1/2)?),? (?:(?:[NSEW]\.?|North|South|East|West|NE|NW|SE|SW) )?"
    rf"(?P<name>{_WORD}(?: {_WORD}){{0,4}})",
)
_WITH_TOWN = lazy(
    rf",? {_CITY},?\n? ?(?:(?:Apt|Suite|Ste|Unit|Apartment|Flat)\.? #?[0-9]{{1,5}}[A-Za-z]?(?![0-9A-Za-z])"
    rf"(?:,? ?\n? ?{_CITY}(?:, {_CITY})?,? ?(?:[A-Z]{{2,3}},? )?{_ZIP})?"
    rf"|[,\n] ?{_CITY}(?:,? {_CITY})?,? ?(?:[A-Z]{{2,3}},? )?{_ZIP})"
)
# Where somebody lives, or something is sent: what follows is an address if it has a number and a name in it.
_AT_OR_IN = (
    "[Ll](?:iv(?:es?|ed|ing)|ocated)", "[Rr]esid(?:es?|ing|ed)", "[Ss]tay(?:s|ing)?",
    "[Mm]eet (?:me|us|him|her)", "[Pp]ick (?:me|us|it|him|her) up", "[Dd](?:elivered?|rop (?:it|me) off)",
    "[Aa]rrived?", "[Oo]ffice is", "[Hh](?:ouse|ome) is", "[Bb]ased",
)  # fmt: skip
_TO_OR_FROM = (
    "[Ss](?:en[dt]|hip(?:ped)?)", "[Dd](?:eliver(?:ed)?|rive)", "[Mm](?:ail(?:ed)?|oved?|oving)", "[Pp]ost",
    "[Ff]orward", "[Rr](?:eturn|elocated?)", "goes", "[Tt]axi", "[Uu]ber", "[Cc]ome", "address",
)  # fmt: skip
_NEXT_IS = (
    "[Hh]ouse is", "[Aa]ddress(?: is|:)", "[Rr]esidence(?: is|:)", "[Ss]hip to:", "[Bb]ill to:",
    "[Dd]eliver to:",
)  # fmt: skip
_AT = lazy(
    rf"{first_of(_AT_OR_IN + _TO_OR_FROM + _NEXT_IS)}(?<![A-Za-z].)(?:"
    rf"{rest_of(_AT_OR_IN)} (?:at|on|in)|{rest_of(_TO_OR_FROM)}(?: [a-z]{{1,10}}){{0,4}} (?:to|from|at)|"
    rf"{rest_of(_NEXT_IS)})[ \n]{{1,2}}"
    r"(?=[0-9A-ZÀ-Ý#Ś-Ž]|ul\.|al\.|pl\.|aleja |plac |ulica |rue |avenue |boulevard |via |calle )"
)
_PARTICLE = (
    "de la del di da do das dos du des van von der den 't ten ter op aan of the na pod nad i y e el los las "
    "le les und utca tér út útja ulica rue avenue boulevard place chemin allée via viale calle plaza aleja "
    "plac utcája sándor tere"
)
_PARTICLES = frozenset(_PARTICLE.split())
_ADDRESS_TOKEN = lazy(
    r"[ \n,/-]{0,3}((?:[A-Za-z]{0,2}[-.#]?)?[0-9][0-9A-Za-zº°/.-]{0,12}|"
    r"[A-ZÀ-ÖØ-ÞĀ-Ž][A-Za-zÀ-ɏḀ-ỿ0-9.'’-]{0,28}|[a-zà-ɏ'’-]{1,10}|#[0-9A-Za-z-]{1,6}|\([A-Z]{2}\))"
    r"(?=[ \n,/).;:!?]|\Z)"
)
_NO_ADDRESS = frozenset(
    ["Terminal", "Gate", "Platform", "Line", "Exit", "Table", "Booth", "Hall", "Lab", "Port", "Version",
     "Windows", "Chapter", "Page", "Level", "Step", "Section", "Python", "Stage", "January", "February",
     "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
     "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
)  # fmt: skip
_MAX_TOKENS = 24


def _announced(text: str, budget: Budget) -> Iterator[Finding]:
    """Addresses of any country, after words that announce one."""
    done = 0
    for lead in _AT.finditer(text):
        if lead.start() < done:
            continue
        if not budget.spend(lead.start()):
            return
        start = end = lead.end()
        numbers = names = 0
        kept = start
        for n in range(_MAX_TOKENS):
            token = _ADDRESS_TOKEN.match(text, end)
            if not token:
                break
            word = token[1]
            bare = word.strip(".,")
            if word[0].islower() and bare not in _PARTICLES:
                break
            if not n and bare in _NO_ADDRESS:
                break
            if any(c.isdigit() for c in word):
                numbers += 1
            elif len(bare) >= 3 and bare[1:].islower() and bare not in _NO_ADDRESS:
                names += 1
            end = token.end()
            if not word[0].islower():
                kept = end
            # A full stop after a long word ends the sentence.
            if word.endswith(".") and len(word) > 5 and text[end : end + 1] in (" ", ""):
                kept -= 1
                break
        if numbers and names and kept - start >= 7:
            done = kept
            yield Finding(start, kept, "ADDRESS", 0.6)


@functools.cache
def _suffixes() -> frozenset[str]:
    """What the name of a street ends in."""
    return frozenset(data.words("addresses_en_streets"))


_AFTER = lazy(rf"\.?(?: (?:[NSEW]|NE|NW|SE|SW)(?![A-Za-z]))?{_TAIL}")
_BOXES = (r"P(?:\.? ?O\.? ?Box|ost Office Box|ostfach|SC)", "GPO Box", "Unit")
_BOX = lazy(
    rf"{first_of(_BOXES)}(?<![A-Za-z].){rest_of(_BOXES)} [0-9]{{1,6}}"
    rf"(?:,? (?:Box|APO|FPO|DPO) ?[0-9]{{0,6}})?{_TAIL}"
)
_FLATS = ("Ap(?:t|artment)", "Suite")
_SECONDARY = lazy(rf"{first_of(_FLATS)}(?<![A-Za-z].){rest_of(_FLATS)}\.? #?[0-9]{{1,5}}[A-Za-z]?{END}")
_CITY_STATE = lazy(
    r"[A-Z](?<![A-Za-z].)[A-Za-z.'-]{1,24}(?: [A-Z][A-Za-z.'-]{1,24}){0,2}, (?:A[KLRZ]|C[AOT]|"
    r"D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|"
    r"PA|RI|S[CD]|T[NX]|UT|V[AT]|W[AIVY]) [0-9]{5}(?:-[0-9]{4})?(?![0-9])"
)
_POSTCODE = lazy(
    rf"[A-PR-Z]{ALONE}(?:(?<![VX])[A-HK-Y]?[0-9][0-9A-HJKMNPR-Y]? [0-9][ABD-HJLNP-UW-Z]{{2}}|"
    rf"(?<=[ABCEGHJ-NPRSTVXY])[0-9][ABCEGHJ-NPRSTV-Z] [0-9][ABCEGHJ-NPRSTV-Z][0-9]){END}"
)
_STREETS_FIRST = (
    "C(?:alle|/|orso|uesta|amino)", "A(?:venida|vda\\.|lameda)", "P(?:laza|aseo|iazza|raça)",
    "V(?:ia|iale|icolo)", "R(?:ua|onda)", "Travessa", "Largo", "[Uu]lica", "ul\\.", "al(?:\\.|eja)",
    "pl(?:\\.|ac)", "Strada", "Borgo", "Glorieta", "Estrada",
)  # fmt: skip
_OTHERS = (
    # As addresses of Taiwan and China are written in English: the parts from small to large.
    lazy(
        rf"[0-9N]{ALONE}(?:(?<=[0-9])[0-9]{{0,2}}F(?:-[0-9]{{1,3}})?\.?, ?No|(?<=N)o)\. ?[0-9]{{1,5}}"
        r"(?:-[0-9]{1,4})?,? "
        r"(?:Alley [0-9]{1,4}, ?)?(?:(?:Lane|Ln\.) [0-9]{1,5}, ?)?(?:(?:Sec\.|Section) ?[0-9],? ?)?"
        r"[A-Z][A-Za-z'-]{1,24}(?: [A-Z0-9][A-Za-z.'-]{0,24}){0,3}? (?:Road|Rd|Street|St|Avenue|Ave|"
        r"Boulevard|Blvd|"
        r"Lane|Alley|Highway)(?![A-Za-z])\.?(?: (?:East|West|North|South|"
        r"Central))?(?:, [A-Z][A-Za-z.'-]{2,24}(?: [A-Z][a-z]{2,20})?){0,4}"
        r"(?:,? [0-9]{3,6}(?![0-9]))?"
    ),
    # German and Dutch: the kind of street is the end of the word; the number follows.
    lazy(
        r"[A-ZÄÖÜ](?<![A-Za-zÀ-ÿ].)(?=[a-zäöüß-]{3,42} [0-9])[a-zäöüß-]{2,30}(?:straße|strasse|str\.|weg|"
        r"platz|allee|gasse|ring|ufer|damm|straat|laan|plein|gracht|steeg|singel|gatan|vägen|gränd|vej|gade|"
        r"stræde|veien|katu|kuja|polku|boulevard|markt|chaussee) [0-9]{1,4}(?:[-/][0-9]{1,4})? ?[a-zA-Z]?"
        r"(?![0-9A-Za-z])(?:,? [0-9]{4,5}(?: [A-Z]{2})? [A-ZÄÖÜ][a-zäöüß-]{2,24})?"
    ),
    # French, Spanish, Italian, Portuguese: the kind of street comes first.
    lazy(
        r"[0-9](?<![A-Za-zÀ-ÿ0-9].)[0-9]{0,3}(?: ?(?:bis|ter))?,? (?:[Rr]ue|[Aa]venue|[Bb]oulevard|"
        r"[Pp]lace|[Cc]hemin|[Ii]mpasse|[Aa]llée|[Qq]uai)"
        r"(?: (?:de la|de l'|du|des|de|"
        r"d')){0,1} ?[A-ZÀ-Ý][A-Za-zÀ-ÿ'-]{1,24}(?: [A-ZÀ-Ý][A-Za-zÀ-ÿ'-]{1,24}){0,3}(?:,? "
        r"[0-9]{5} [A-ZÀ-Ý][A-Za-zÀ-ÿ-]{1,24})?"
    ),
    lazy(
        rf"{first_of(_STREETS_FIRST)}(?<![A-Za-zÀ-ÿ].){rest_of(_STREETS_FIRST)}"
        r"(?: (?:de la|de los|de las|del|della|delle|dei|di|de|do|da|dos))?"
        r" ?[A-ZÀ-Ý][A-Za-zÀ-ÿ'-]{1,24}(?: [A-ZÀ-Ý][A-Za-zÀ-ÿ'-]{1,24}){0,3},? (?:n[º°]? ?)?[0-9]{1,4}"
        r"(?![0-9])(?:,? [0-9]{5}(?: [A-ZÀ-Ý][A-Za-zÀ-ÿ-]{1,24})?)?"
    ),
)
_LABEL = lazy(r"(?<![A-Za-z])[Aa]ddress(?:es)?[\"'*]{0,2} ?(?:is|:|=) {0,2}[\"'*]{0,2}(?=[A-Za-z0-9#])")
# A line that can be an address: a digit, # or a capital first, and a number in it that is a word of its own.
_LIKELY = lazy(r"(?=[0-9#A-Z])(?=[^()=]*\Z)(?:.*[^A-Za-z0-9])?#?[0-9]")
# Up to the end of the sentence: a full stop after a word of four letters or more.
_SENTENCE_END = lazy(r"(?<=[a-z]{4})\. |(?<=[0-9]{4})[.,]? (?=[a-z])|, (?=and |please |my |phone|tel|email)")
_LINE = lazy(r"[^\n\0\"'<>;|{}\[\]]{6,160}")


def _streets(text: str, budget: Budget) -> Iterator[Finding]:
    suffixes = _suffixes()
    for found in budget.each(_STREET.finditer(text)):
        words = found["name"].split(" ")
        at = found.start("name")
        # The last word of the name that is a kind of street ends it.
        ends = []
        for i, word in enumerate(words):
            at += len(word)
            bare = word.rstrip(".,")
            if i and (bare in suffixes or bare.removesuffix("s") in suffixes) and (bare in _SURE or i >= 1):
                ends.append((at - (len(word) - len(bare)), bare, i))
            at += 1
        if not ends:
            # Whatever the street is called, if a flat, or a town with its code, follows.
            whole = _WITH_TOWN.match(text, found.end("number"))
            if whole:
                yield Finding(found.start(), whole.end(), "ADDRESS", 0.7)
            continue
        end, suffix, n = ends[-1]
        tail = _AFTER.match(text, end)
        stop = tail.end() if tail else end
        if suffix not in _SURE and n < 2 and stop - end < 5 and not _more(text, stop):
            # "221 Baker Street" is one; "12 Golden Valley" only with a number of three digits or more.
            digits = sum(char.isdigit() for char in text[found.start() : found.start("name")])
            if digits < 3:
                continue
        yield Finding(found.start(), stop, "ADDRESS", 0.8)


# Every pattern here needs a capital letter and, but for labels, a digit.
_ANY = lazy("[A-ZÀ-Ý]|[Aa]ddress")


def _more(text: str, at: int) -> bool:
    return text[at : at + 2] == ", " and text[at + 2 : at + 3].isupper()


def scan(text: str) -> Iterator[Finding]:
    """Findings in a plain view (:func:`sllm.privacy.text.plain`)."""
    if not _ANY.search(text):
        return
    budget = Budget(text)
    yield from _streets(text, budget)
    yield from _announced(text, budget)
    for pattern in (_BOX, _SECONDARY, _CITY_STATE, _POSTCODE, *_OTHERS):
        for found in budget.each(pattern.finditer(text)):
            yield Finding(found.start(), found.end(), "ADDRESS", 0.75)
    done = 0
    for label in _LABEL.finditer(text):
        if label.start() < done:
            continue
        if not budget.spend(label.start()):
            break
        line = _LINE.match(text, label.end())
        if not line:
            continue
        done = line.end()
        value = _SENTENCE_END.split(line[0])[0].rstrip(" .,")
        if (
            _LIKELY.match(value)
            and "@" not in value
            and "://" not in value
            and any(c.isdigit() for c in value)
            and sum(c.isalpha() for c in value) >= 4
            and " " in value
        ):
            yield Finding(label.end(), label.end() + len(value), "ADDRESS", 0.6)
    yield from budget.rest("ADDRESS")
