"""The words around names in English: titles, labels, verbs, greetings and closings, and what is said of
people only.
"""

from __future__ import annotations

import functools
import re

from sllm.privacy import data
from sllm.privacy.names.word_lists import INNER_CAPITAL
from sllm.privacy.regex import lazy

__all__ = [
    "AM_BEFORE",
    "CALLING",
    "CONTEXT",
    "HUMAN_AFTER",
    "SEPARATORS",
    "SPOKEN_TO",
    "TOLD",
    "TOLD_AFTER",
    "announced",
    "mentioned",
    "of_people",
]


def _by_end(phrases: list[str]) -> dict[str, tuple[str, ...]]:
    """Their last two characters -> the phrases, the longest first."""
    longest_first = sorted(phrases, key=len, reverse=True)
    return {end: tuple(p for p in longest_first if p.endswith(end)) for end in {p[-2:] for p in phrases}}


class _Context:
    """The words of ``names_en_context.json``, as they are looked up; read when they are first used."""

    @functools.cached_property
    def _table(self) -> dict[str, list[str]]:
        return data.table("names_en_context")

    @functools.cached_property
    def titles(self) -> frozenset[str]:
        """Titles that are nothing else: Mr, Dr."""
        return frozenset(self._table["titles"])

    @functools.cached_property
    def titles_before(self) -> tuple[str, ...]:
        """Titles with a full stop, as they end the text before a name."""
        return tuple(f"{title}. " for title in self._table["titles with a full stop"])

    @functools.cached_property
    def ranks(self) -> frozenset[str]:
        """Titles that are ordinary words too: what follows has to be no ordinary word."""
        return frozenset(self._table["ranks"])

    @functools.cached_property
    def greetings(self) -> frozenset[str]:
        return frozenset(self._table["greetings"])

    @functools.cached_property
    def not_people(self) -> frozenset[str]:
        """Names that are greeted and are not people: assistants and models."""
        return frozenset(self._table["not people"])

    @functools.cached_property
    def verbs(self) -> dict[str, tuple[str, ...]]:
        """Phrases right before a name, without a sign between, by end."""
        return _by_end(self._table["verbs"])

    @functools.cached_property
    def loose_verbs(self) -> frozenset[str]:
        """Verbs that a company or a place follows as often: two words are needed, or a name that is known."""
        return frozenset(self._table["loose verbs"])

    @functools.cached_property
    def loose_labels(self) -> frozenset[str]:
        """Labels that many other things than a name follow."""
        return frozenset(self._table["loose labels"])

    @functools.cached_property
    def _endings(self) -> dict[str, list[str]]:
        labels = self._table["labels"]
        return {":": labels, "=": labels, "?": self._table["questions"], ",": self._table["closings"]}

    @functools.cached_property
    def before_sign(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """A sign -> the phrases that a name follows after that sign, by end."""
        return {sign: _by_end(phrases) for sign, phrases in self._endings.items()}

    @functools.cached_property
    def last(self) -> frozenset[str]:
        """The last words of all phrases that announce a name: one look-up decides for most text."""
        phrases = [*self._table["verbs"], *(phrase for each in self._endings.values() for phrase in each)]
        return frozenset(re.split("[ /]", phrase)[-1] for phrase in phrases)

    @functools.cached_property
    def leading(self) -> frozenset[str]:
        """``last``, with titles without a full stop and the last words of what is said before people only."""
        titles = (*self.titles, *self.ranks, *self.greetings)
        return self.last | frozenset(self._table["last words"]) | frozenset(title.lower() for title in titles)


CONTEXT = _Context()
AM_BEFORE = ("I am ", "I'm ", "I’m ", "i am ", "i'm ")
_LAST_WORD = lazy(r"[a-zé']+\Z")
_TAG = lazy(r"<(?:[a-z]{0,20}_?[Nn]ame|patient|contact|author|customer|sender|recipient|owner)>\Z")
_LINE_CLOSED = lazy(
    r"(?:sincerely|regards|wishes|truly|faithfully|cheers|thanks|love|best|yours|cordially|respectfully|"
    r"warmly|thank you|signed)[,.!]?[ \t]*\n\s*\Z",
    re.I,
)


def announced(before: str, word: str, follow: str) -> float:
    """How surely a name is announced right before a capitalised word: 0, 0.6 or 0.8.

    Args:
        before: the text before the word.
        word: the first word of the run.
        follow: the character after the run.

    """
    head = before.rstrip(" \"'*`\n\t({[")
    sign = head[-1:]
    if sign == ">":
        return 0.8 if _TAG.search(head) else 0.0
    endings = CONTEXT.before_sign.get(sign, CONTEXT.verbs)
    if sign == "=" and (before[-1] in "= " or INNER_CAPITAL.search(word)) and follow == "(":
        return 0.0  # client = Client(
    if endings is not CONTEXT.verbs:
        head = head[:-1].rstrip(" \"'*`")
        if sign == "?" and head.endswith("User"):
            head = head[:-4].rstrip(" ?")
    elif "\n" in before[len(head) :]:
        return 0.8 if _LINE_CLOSED.search(before) else 0.0
    written = head
    head = head.lower()
    last = _LAST_WORD.search(head)
    key = last[0] if last else ""
    if key not in CONTEXT.last and not key.endswith(("name", "by", "to")) and head[-1:] != "o":
        return 0.0
    said = next((phrase for phrase in endings.get(head[-2:], ()) if head.endswith(phrase)), "")
    if not said:
        return 0.0
    if len(head) > len(said):
        ahead = head[-len(said) - 1]
        # firstName: a capital begins a word as a space does.
        if (
            ahead.isascii()
            and ahead.isalpha()
            and not (endings is not CONTEXT.verbs and written[-len(said)].isupper())
        ):
            return 0.0
    if endings is CONTEXT.verbs:
        return 0.6 if said in CONTEXT.loose_verbs else 0.8
    if sign == ",":
        # "Thanks, Monday is fine": these close a letter only at the beginning of a line.
        line = head[-len(said) - 2 : -len(said)]
        return 0.8 if said not in ("best", "love", "signed", "kindly") or "\n" in line or not line else 0.0
    return 0.6 if said in CONTEXT.loose_labels else 0.8


SEPARATORS = frozenset(
    [", ", " and ", ", and ", "; ", " & ", " / ", "/", "\n", "\n- ", ",\n", " or ", " with "]
)
CALLING = (" calling", " speaking", " from ", " here", " writing", ", calling")
# Said of people only, before a name and after one.
_HUMAN_BEFORE = lazy(
    r"(?:(?<![A-Za-z])(?:(?:spoke|speak|speaking|talk|talked|talking|meet|met|meeting|interview|appointment|"
    r"lunch|dinner|call|chat|work|working|live|living|married|session|conversation|discussed|agreement|lease|"
    r"engaged) (?:to|with)|ask|asked|tell|told|email|emailed|called|texted|thank|invite|invited|hire|hired|"
    r"remind|reminded|notify|notified|contacted|assist|marry|married|fired|know|knew|refund|owes|[Dd]oes|"
    r"[Hh]as|[Dd]id|Why is|Why does|Why did|Where is|When does|When will|add|include|remove|[Ll]et|with|"
    r"[Ll]isten to|accompanied by|cared for by|treated by|written to|(?:send|sent|forward|forwarded|give|"
    r"gave|given|report|reports|assign|assigned|transferred|wrote|reply|replied|deliver|delivered|issued|"
    r"return|returned|refer|referred|sold|lent|introduced|apologize|apologise|write)"
    r"(?: [a-z]{1,12}){0,4} to)|(?:'s|s'|’s) name|hear that,|[Ww]ho is|and I and|between)[ ]\Z"
)
HUMAN_AFTER = lazy(
    r"(?:'s|’s)? (?:said|says|told|asked|asks|called|calls|emailed|texted|wrote|replied|will be (?:talking|"
    r"speaking|joining|there|here|absent|late|out)|will (?:call|speak|join|attend|pick|contact|arrive|talk|"
    r"send|bring|meet|present)|wants|wanted|needs (?:to|a|his|her)|lives|lived|resides|is (?:a very|very|my|"
    r"our|his|her|not available|on (?:leave|vacation|holiday|sick)|out of office|sick|pregnant|married|"
    r"divorced|retired|late|absent|away|moving|traveling|travelling|looking|unable|allergic|scheduled|due)|"
    r"was (?:born|hired|fired|diagnosed|admitted|discharged|seen|late|absent|married|promoted|injured|"
    r"arrested|my|our|his|her)|has (?:been (?:diagnosed|admitted|our|my|promoted|working)|asked|called|"
    r"requested|agreed|signed|paid)|from (?:accounting|accounts|HR|IT|sales|support|marketing|finance|legal|"
    r"the|our|my|reception|billing|payroll)|who (?:is|was|lives|works|has)|whose|attended|signed|reported|"
    r"complained|paid|owes|requested|confirmed|visited|joined|resigned|died|can be reached|works|worked|"
    r"still|as (?:a|an|the|my|our) (?:beneficiary|guardian|authori[sz]ed|contact|reference|co|emergency|next|"
    r"executor|tenant|witness|member|user)|to (?:call|email|contact|send|meet|the (?:account|list|group|"
    r"meeting|team))|by (?:Monday|Tuesday|Wednesday|Thursday|Friday|tomorrow|noon|tonight)|(?:reached|phoned|"
    r"messaged))(?![A-Za-z])"
)
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def of_people(before: str) -> bool:
    """Whether the text before a name, with the space between, is said of people only."""
    head = before[:-1].removesuffix(",")
    last = head[len(head.rstrip(_LETTERS)) :]
    return last.lower() in CONTEXT.leading and _HUMAN_BEFORE.search(before) is not None


TOLD = lazy(r"(?:[Aa]sk|[Aa]sked|[Tt]ell|[Tt]old|[Rr]emind|[Rr]eminded|[Ll]et|[Tt]hank|[Ii]nvite) \Z")
TOLD_AFTER = (" to ", " that ", " know", " if ", " about ", " whether ", " for ", " not ")
SPOKEN_TO = lazy(
    r",? (?:can|could|would|will|please|I|we|may|do|did|are|have|thank|your|here|this|"
    r"what|when) "
)


def mentioned(text: str, before: str, end: int) -> bool:
    """Whether two capitalised words or more are mentioned as people are: contact ... at, call ... on."""
    head = before[:-1].lower()
    if not head.endswith(("contact", "call", "email", "reach", "met", "meet", "notify", "ask")):
        return False
    return text.startswith((" at ", " on ", " via ", " by ", " (", " for ", " directly"), end)
