"""People in Latin script, told without a model: by what announces them, and by what their words look like.

Runs of capitalised words are read one after another. A run is a person where a title, a label, a verb, a
greeting or the end of a letter says so; or where its own words do: a given name and a second word, a surname
behind a word that is no ordinary one, letters that English does not write. A given name alone counts where
the sentence is between people ("Rachel, can you call me?").
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sllm.privacy import words
from sllm.privacy.bounds import Budget
from sllm.privacy.findings import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CANDIDATE", "scan", "trimmed"]


def _letters(capitals: bool) -> str:
    """The inside of a character class: letters of Latin Extended-A and -B and Extended Additional."""
    chars = [chr(c) for c in (*range(0xC0, 0x250), *range(0x1E00, 0x1F00)) if chr(c).isalpha()]
    return "".join(char for char in chars if not capitals or char.isupper())


_CAP = f"A-Z{_letters(True)}"
# U+0300 to U+036F: marks that stand behind their letter where the text is decomposed.
_LETTER = f"A-Za-z{_letters(False)}\u0300-\u036f"
_W = rf"(?:[DdOL]['’])?[{_CAP}][{_LETTER}'’-]{{1,24}}"
_PARTICLE = (
    r"(?:van|von|de|der|den|da|di|del|della|la|le|bin|bint|ibn|al|el|dos|das|do|du|ten|ter|af|zu|y|e|ben|abu)"
)
_NAME = (
    rf"(?:[A-Z]\. ?){{0,3}}{_W}(?: (?:[A-Z]\.?(?!['’])|{_PARTICLE}(?: (?:der|den|la|las|los))?(?= [{_CAP}])|"
    rf"{_W})){{0,4}}"
)
CANDIDATE = re.compile(rf"(?<![{_LETTER}]){_NAME}(?![{_LETTER}])")

_TITLES_TEXT = (
    "Mr Mrs Ms Mx Miss Mister Dr Prof Professor Doctor Sir Madam Madame Mme Rev Reverend Capt Sgt Lt Col Cpl "
    "Hon Herr Frau Monsieur Señor Señora Senor Senora Sr Sra Signor Signora Dear Dame"
)
_TITLES = frozenset(_TITLES_TEXT.split())
# Titles that are ordinary words too: what follows has to be no such word.
_RANKS_TEXT = (
    "Judge Justice Officer Detective Sergeant Captain Lieutenant Colonel Inspector Senator Congressman "
    "Congresswoman Councillor Principal Nurse Coach Sheriff Deputy Chancellor Ambassador Agent Father Sister "
    "Brother Uncle Aunt Auntie Aunty Grandma Grandpa Lady Lord Pastor Rabbi Imam Sheikh Dean Trooper "
    "Constable Patient Customer Client Tenant Employee Colleague Passenger Witness Defendant Plaintiff "
    "Attorney Landlord Buyer Seller Driver Student Resident Guest Contractor Caller User Member Candidate "
    "Applicant Claimant Therapist Teacher Manager Supervisor Director Engineer Agent Counsel Mayor Governor "
    "Minister"
)
_RANKS = frozenset(_RANKS_TEXT.split())
_GREETINGS_TEXT = (
    "Hi Hello Hey Hiya Greetings Thanks Welcome Congratulations Congrats Sorry Bye Goodbye Morning Afternoon "
    "Evening Hola Bonjour Hallo Ciao"
)
_GREETINGS = frozenset(_GREETINGS_TEXT.split())
_NO_ONE_TEXT = "Google Siri Alexa Cortana Kitty World ChatGPT Claude Gemini Copilot Kimi Qwen"
_NO_ONE = frozenset(_NO_ONE_TEXT.split())
_TITLE_BEFORE = tuple(
    f"{title}. "
    for title in (
        "Mr", "Mrs", "Ms", "Mx", "Dr", "Prof", "Rev", "Capt", "Sgt", "Lt", "Col", "Hon", "Sr", "Sra",
        "Messrs",
    )
)  # fmt: skip
_AM_BEFORE = ("I am ", "I'm ", "I’m ", "i am ", "i'm ")
# In front of a colon or equals sign, of a comma, and of nothing.
_LABELS_EN = (
    "name", "surname", "patient", "contact person", "contact", "attn", "attention", "recipient",
    "cardholder", "signed by", "signed", "applicant", "employee", "customer", "guardian", "spouse",
    "beneficiary", "sender", "account holder", "tenant", "landlord", "buyer", "seller", "attending",
    "physician", "passenger", "witness", "plaintiff", "defendant", "insured", "payee", "payer", "borrower",
    "lender", "subscriber", "emergency contact", "firstname", "lastname", "fullname", "next of kin",
    "referring physician", "doctor", "nurse", "caller", "attendees", "participants", "present", "author",
    "authors", "cc", "prepared by", "reviewed by", "approved by", "submitted by", "reported by", "client",
    "claimant", "policyholder", "policy holder", "owner", "holder", "manager", "supervisor", "instructor",
    "teacher", "student", "parent", "parents", "mother", "father", "wife", "husband", "son", "daughter",
    "partner", "agent", "broker", "guest", "resident", "driver", "candidate", "interviewer", "therapist",
    "provider", "requester", "requested by", "assigned to", "assignee", "reporter", "organizer", "host",
    "speaker", "respondent", "petitioner", "victim", "suspect", "officer", "representative",
    "primary contact", "bill to", "ship to", "deliver to", "sold to", "from", "to", "user", "counsel",
    "surgeon", "cardholder name", "given names", "name of patient", "team", "members", "passengers",
    "children", "kin", "nominee", "trustee", "executor", "licensee", "principal", "director", "auditor",
    "accountant", "analyst",
)  # fmt: skip
# Labels behind which many other things stand, too.
_LOOSE = frozenset(
    ["from", "to", "present", "user", "host", "agent", "team", "members", "owner", "provider", "principal",
     "director", "parent", "partner", "children", "contact", "signed"]
)  # fmt: skip
_CLOSINGS_EN = (
    "sincerely", "regards", "yours truly", "best wishes", "cheers", "thanks", "love", "faithfully", "best",
    "yours", "cordially", "respectfully", "warmly", "thank you", "signed", "gratefully", "kindly",
    "take care", "talk soon", "many thanks", "thanks again", "xoxo", "hugs",
)  # fmt: skip
_VERBS_EN = (
    "name is", "name's", "nam is", "i am called", "is called", "named", "names are", "last name",
    "first name", "full name", "given name", "family name", "ask for", "asked for", "speak to",
    "speak with", "spoke to", "spoke with", "speaking with", "talked to", "dictated by", "seen by",
    "referred by", "signed by", "my wife", "my husband", "my son", "my daughter", "my mother", "my father",
    "my brother", "my sister", "my boss", "my colleague", "my friend", "his wife", "her husband",
    "my boyfriend", "my girlfriend", "my partner", "my neighbor", "my neighbour", "my roommate",
    "my landlord", "my doctor", "my manager", "my mom", "my dad", "my mum", "my uncle", "my aunt",
    "my cousin", "my kid", "my child", "my fiancé", "my fiancee", "my lawyer", "my client", "my nephew",
    "my niece", "my supervisor", "my coworker", "my assistant", "our colleague", "our client",
    "our customer", "the patient", "care of", "c/o", "attn", "the suspect", "reservation under", "calls me",
    "call me", "called me", "known as", "goes by", "maiden name is", "surname is", "account holder",
    "handed in by", "behalf of", "belongs to", "assigned to", "reported by", "submitted by", "approved by",
    "prepared by", "patient", "customer", "client", "tenant", "employee", "claimant", "passenger",
    "defendant", "plaintiff", "beneficiary", "nominee", "cardholder", "colleague", "witness", "landlord",
    "certify that", "his daughter", "his son", "her daughter", "her son", "his brother", "his sister",
    "her brother", "her sister", "his mother", "her mother", "his father", "her father", "their daughter",
    "their son", "addressed to", "made out to", "payable to", "in the name of", "under the name",
    "guardian of", "supervised by", "diagnosed by", "interviewed by", "husband", "wife", "officer",
    "detective", "nurse", "attorney", "sincerely", "regards",
)  # fmt: skip
# Verbs behind which a company or a place stands as often: two words are needed, or a name that is known.
_LOOSE_VERBS = frozenset(
    ["patient", "customer", "client", "tenant", "employee", "claimant", "passenger", "defendant",
     "plaintiff", "beneficiary", "nominee", "cardholder", "colleague", "witness", "landlord", "behalf of",
     "belongs to", "assigned to", "reported by", "submitted by", "approved by", "prepared by",
     "addressed to", "payable to", "known as", "is called", "named", "husband", "wife", "officer",
     "detective", "nurse", "attorney", "my client", "our client", "our customer", "seen by",
     "in the name of", "under the name", "called me", "made out to", "supervised by", "full name",
     "handed in by", "account holder", "first name", "sincerely", "regards"]
)  # fmt: skip
_ENDINGS: dict[str, tuple[str, ...]] = {
    ":": _LABELS_EN, "=": _LABELS_EN, "?": ("name", "account", "who is this", "who are you", "speaking"),
    ",": _CLOSINGS_EN,
}  # fmt: skip
# The last words that announce anything: most text is done with after one look-up.
_LAST = frozenset(
    re.split("[ /]", phrase)[-1] for phrases in (*_ENDINGS.values(), _VERBS_EN) for phrase in phrases
)
_LAST_WORD = re.compile(r"[a-zé']+\Z")
_TAG = re.compile(r"<(?:[a-z]{0,20}_?[Nn]ame|patient|contact|author|customer|sender|recipient|owner)>\Z")
_LINE_CLOSED = re.compile(
    r"(?:sincerely|regards|wishes|truly|faithfully|cheers|thanks|love|best|yours|cordially|respectfully|"
    r"warmly|thank you|signed)[,.!]?[ \t]*\n\s*\Z",
    re.I,
)


def _announced(before: str, word: str, follow: str) -> float:
    """How surely the text right before a capitalised word says that a name comes: 0, 0.6 or 0.8."""
    head = before.rstrip(" \"'*`\n\t({[")
    sign = head[-1:]
    if sign == ">":
        return 0.8 if _TAG.search(head) else 0.0
    endings = _ENDINGS.get(sign, _VERBS_EN)
    if sign == "=" and (before[-1] in "= " or _INNER_CAPITAL.search(word)) and follow == "(":
        return 0.0  # client = Client(
    if endings is not _VERBS_EN:
        head = head[:-1].rstrip(" \"'*`")
        if sign == "?" and head.endswith("User"):
            head = head[:-4].rstrip(" ?")
    elif "\n" in before[len(head) :]:
        return 0.8 if _LINE_CLOSED.search(before) else 0.0
    written = head
    head = head.lower()
    last = _LAST_WORD.search(head)
    key = last[0] if last else ""
    if key not in _LAST and not key.endswith(("name", "by", "to")) and head[-1:] != "o":
        return 0.0
    if not head.endswith(endings):
        return 0.0
    said = max((phrase for phrase in endings if head.endswith(phrase)), key=len)
    if len(head) > len(said):
        ahead = head[-len(said) - 1]
        # firstName: a capital begins a word as a space does.
        if (
            ahead.isascii()
            and ahead.isalpha()
            and not (endings is not _VERBS_EN and written[-len(said)].isupper())
        ):
            return 0.0
    if endings is _VERBS_EN:
        return 0.6 if said in _LOOSE_VERBS else 0.8
    if sign == ",":
        # "Thanks, Monday is fine": a closing has a line, or a beginning, of its own.
        line = head[-len(said) - 2 : -len(said)]
        return 0.8 if said not in ("best", "love", "signed", "kindly") or "\n" in line or not line else 0.0
    return 0.6 if said in _LOOSE else 0.8


# <ann@example.org> behind a name, and the columns of a table.
_MAILBOX = re.compile(
    r"[\"']?(?: ?<[^\s<>@]{1,64}@|[,|;\t] ?\"?(?:[A-Za-z0-9._+-]{1,64}@[A-Za-z0-9]|\+[0-9]|"
    r"\(?[0-9]{3}\)?[ .-][0-9]{3}[ .-][0-9]{4}))"
    r"| \([A-Za-z0-9._+-]{1,64}@[A-Za-z0-9]"
)
_BORN = re.compile(r",? \(?(?:born|b\.|DOB|aged|age|d\.o\.b|née|nee)(?![a-z])")
_SECOND = re.compile(rf", (?P<word>[{_CAP}][{_LETTER}'’-]{{1,24}}(?: [A-Z]\.?(?![A-Za-z]))?)(?![{_LETTER}])")
# HOLLIS, MARGARET on a line of its own, or in front of the next field.
_CAPITAL = re.compile(f"[{_CAP}]")
_CAPITALS_EN = re.compile(
    r"^[ \t]*(?P<name>[A-Z][A-Z'-]{1,24}, ?[A-Z][A-Z'-]{1,24}(?: [A-Z]\.?)?)(?=[ \t|"
    r";(]*\n?[ \t]*(?:DOB|MRN|SSN|ID|Sex|Gender|Age|Date of [Bb]irth)(?![A-Za-z]))",
    re.M,
)
_LOWER = re.compile(
    r"(?<![A-Za-z])(?P<said>[Mm]y name is|[Mm]y name'?s|[Tt]his is|[Ii] am|[Ii]'m|[Cc]all me|[Nn]ame:) "
    r"(?P<first>[a-z]{3,14})(?: (?P<second>[a-z]{2,16}))?(?![A-Za-z])"
)

_GIVEN = frozenset(words.GIVEN_EN.split())
_FAMOUS = frozenset(words.NOT_ALONE_EN.split())
_SURNAMES = frozenset(words.SURNAMES_EN.split())
_NOT_NAMES = frozenset(words.NOT_NAMES.split())
_COMMON = frozenset(words.COMMON_EN.split())
# A given name, and a word or a place or somebody that everybody knows.
_AMBIGUOUS = (frozenset(words.AMBIGUOUS_EN.split()) | (_GIVEN & (_COMMON | _NOT_NAMES))) - frozenset(
    words.NOT_ALONE_EN.split()
)
_SURE_GIVEN = _GIVEN - _AMBIGUOUS
_ALONE = _SURE_GIVEN - frozenset(words.NOT_ALONE_EN.split())
_PLAIN = (_COMMON | _NOT_NAMES) - _SURE_GIVEN
_LOWER_GIVEN = frozenset(name.lower() for name in _SURE_GIVEN if len(name) > 2)
_LOWER_SURNAMES = frozenset(name.lower() for name in _SURNAMES)
# How surnames of many countries end.
_SHAPE = re.compile(
    rf"(?:O['’]|D['’]|Mc|Mac(?=[A-Z])|Fitz)[A-Z][{_LETTER}]{{2,}}\Z|"
    rf"[{_LETTER}'’-]{{2,}}(?:wski|wska|cki|cka|[^h]ski|wicz|czyk|enko|chuk|[kmnlrdt]ova?|[ae]nov|[rkl]ev|"
    r"vić|vic|vich|[dlrntkm]son|sson|[dlrntkms]sen|dóttir|dottir|[dnltr]berg|stein|mann|meier|meyer|bauer|"
    r"ström|strom|gren|qvist|quist|poulos|[iao]kis|idis|[sk]hvili|adze|zadeh|oğlu|oglu|[^aeiou]ez|escu|eanu|"
    r"etti|elli|ucci|aldi|eira|[^aeiou]wala|swamy|murthy|krishnan|nathan|singh|[^o]moto|yama|kawa|gawa|mura|"
    r"zaki|uchi|[^aeiou]ström|borough|worth|bottom|thwaite|[^aeiou]ington|ingham|[dlrtnk]ford|[nlrtd]ley|"
    rf"[{_LETTER}]-[{_CAP}][{_LETTER}]{{2,}})\Z"
)
_FOREIGN = re.compile(f"[{_letters(False)}]")
_PLACES_TEXT = (
    "São Zürich Malmö Köln Düsseldorf Bogotá Curaçao Québec Montréal México Perú Brasília Côte Nestlé "
    "Citroën Škoda Häagen Mötley Beyoncé Pokémon Café Münster Nürnberg Göteborg Córdoba Cádiz Málaga León "
    "Genève Besançon Español Française Français Português Österreich Łódź Kraków Gdańsk Wrocław Poznań "
    "Türkiye İstanbul Ångström"
)
_PLACES = frozenset(_PLACES_TEXT.split())
_INNER_CAPITAL = re.compile(r"[a-z][A-Z]")
_CAMEL_NAME = re.compile(r"(?:Mc|Mac|De|Di|La|Le|Van|Von|Du|Fitz|O|D|Da|Del|Ja|Ra|Sha)[A-Z][a-z]+\Z")
# The sentence is between people.
_PERSONAL = re.compile(
    r"(?<![A-Za-z])(?:[Ii]|I'm|I've|I'll|[Mm]e|[Mm]y|[Ww]e|[Uu]s|[Oo]ur|[Yy]ou|[Yy]our|[Pp]lease|[Tt]hanks|"
    r"[Rr]egards|[Hh]i|[Hh]ello|[Dd]ear)(?![A-Za-z])"
)
# What may follow a name at once: a mailbox, a column, a date of birth.
_OPENING = frozenset("<|;,(\t\"'’")
# The last words of all that announces, of titles without a full stop, and of what is said in front of people
# only.
_HUMAN_LAST = (
    "with ask asked tell told email emailed called texted thank invite invited hire hired remind reminded "
    "notify notified contacted assist marry married fired know knew refund owes does has did is why will add "
    "include remove let name and between contact call reach met meet am where when"
)
_LEADING = (
    _LAST
    | frozenset(_HUMAN_LAST.split())
    | frozenset(title.lower() for title in (*_TITLES, *_RANKS, *_GREETINGS))
)
_SEPARATORS = frozenset(
    [", ", " and ", ", and ", "; ", " & ", " / ", "/", "\n", "\n- ", ",\n", " or ", " with "]
)
_CALLING = (" calling", " speaking", " from ", " here", " writing", ", calling")


# Said of people only, in front of a name and behind one.
_HUMAN_BEFORE = re.compile(
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
_HUMAN_BEHIND = re.compile(
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
_TOLD = re.compile(r"(?:[Aa]sk|[Aa]sked|[Tt]ell|[Tt]old|[Rr]emind|[Rr]eminded|[Ll]et|[Tt]hank|[Ii]nvite) \Z")
_TOLD_BEHIND = (" to ", " that ", " know", " if ", " about ", " whether ", " for ", " not ")
_SPOKEN_TO = re.compile(
    r",? (?:can|could|would|will|please|I|we|may|do|did|are|have|thank|your|here|this|"
    r"what|when) "
)
_TWO_WORDS = frozenset(
    ["Addis Ababa", "Sierra Leone", "Abu Dhabi", "Tel Aviv", "Kuala Lumpur", "Nova Scotia", "Phnom Penh",
     "Palo Alto", "Ann Arbor", "Coca Cola", "Louis Vuitton", "Visual Basic", "Novo Nordisk",
     "Bosnia Herzegovina", "Costa Rica", "Ho Chi", "Ulan Bator", "Aston Martin", "Lockheed Martin",
     "Harley Davidson", "Goldman Sachs", "Morgan Stanley", "Wells Fargo", "Merrill Lynch", "Rolls Royce",
     "Mercedes Benz", "Alfa Romeo", "Land Rover", "Calvin Klein", "Tommy Hilfiger", "Jack Daniels",
     "Johnnie Walker", "Ben Jerry", "Trader Joe", "Burning Man", "Mona Lisa", "Machu Picchu", "Taj Mahal",
     "Notre Dame", "Buckingham Palace", "Lorem Ipsum", "Pokemon Go"]
)  # fmt: skip


def _no_word(word: str) -> bool:
    """Whether a capitalised word can be part of a name for all that its letters say."""
    return (
        word not in _PLAIN
        and word not in _PLACES
        and (not _INNER_CAPITAL.search(word) or _CAMEL_NAME.match(word) is not None)
    )


def _shaped(word: str) -> bool:
    """Whether a word has the form of a surname, or letters that English does not write."""
    if word in _PLACES or word in _COMMON:
        return False
    return (len(word) >= 5 and _SHAPE.match(word) is not None) or (
        len(word) >= 3 and _FOREIGN.search(word) is not None
    )


def trimmed(name: str, start: int, *, sure: bool = False) -> tuple[int, int] | None:
    """The part of a run of capitalised words that can be a name; ``sure``: May and Will begin one, too."""
    parts = name.split(" ")
    while parts and parts[0].rstrip(".,") in _NOT_NAMES:
        if sure and len(parts) > 1 and parts[0] in _GIVEN and len(parts[1]) > 1:
            break
        start += len(parts[0]) + 1
        parts.pop(0)
    for i, word in enumerate(parts):
        if (word in _NOT_NAMES and not (sure and not i)) or word.endswith(("'s", "’s")):
            if word.endswith(("'s", "’s")) and word not in _NOT_NAMES:
                parts = [*parts[:i], word[:-2]]
            else:
                parts = parts[:i]
            break
    text = " ".join(parts).rstrip("'’-")
    return (start, start + len(text)) if len(text) >= 2 else None


class _Reader:
    """Reads the runs of one text in order."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.last = -1  # the end of the last name found
        self.listed = False  # whether more may follow it in a list
        self.budget = Budget(text)
        self._personal: tuple[int, int, bool] = (0, 0, False)

    def personal(self, start: int) -> bool:
        """Whether the text around an offset, in blocks of 256 characters, is between people."""
        block = start // 256 * 256
        low, high, known = self._personal
        if (low, high) != (block, block + 256):
            known = _PERSONAL.search(self.text, max(0, block - 64), block + 320) is not None
            self._personal = block, block + 256, known
        return known

    def run(self, run: str, start: int) -> Iterator[Finding]:
        if " " not in run and self._idle(run, start):
            return
        if not self.budget.spend():
            yield Finding(start, len(self.text), "NAME", 0.5)
            return
        for one in self._run(run, start):
            self.last = one.end
            self.listed = one.score >= 0.7
            yield one

    def _idle(self, word: str, start: int) -> bool:
        """Whether a capitalised word is done with at once: neither known for a name, nor announced by the
        word in front of it.
        """
        if word in _NOT_NAMES:
            return True
        if word[-2:-1] in "'’" and word[-1] == "s":
            word = word[:-2]
        if word in _GIVEN or self.listed:
            return False
        text = self.text
        if start < 2 or text[start - 1] != " ":
            return False
        low = max(0, start - 16)
        ahead = text[low : start - 1].rpartition(" ")[2].lower().removesuffix(",")
        return (
            start > 16
            and ahead.isalnum()
            and ahead not in _LEADING
            and not ahead.endswith(("name", "by", "to"))
            and text[start + len(word) : start + len(word) + 1] not in _OPENING
        )

    def _run(self, run: str, start: int) -> Iterator[Finding]:
        text = self.text
        parts = run.split(" ")
        score = 0.0
        greeted = False
        while parts and parts[0] in _TITLES:
            start += len(parts[0]) + 1
            parts.pop(0)
            score = 0.9
        if not parts:
            return
        if len(parts) >= 2 and parts[0] in _GREETINGS and not score:
            start += len(parts[0]) + 1
            parts.pop(0)
            greeted = True
        elif len(parts) >= 3 and parts[0] in ("I'm", "I’m", "It's", "It’s"):
            start += len(parts[0]) + 1
            parts.pop(0)
            score = 0.7 if parts[-1] not in _NOT_NAMES else 0.0
        if len(parts) >= 2 and parts[0] in _RANKS and not score:
            rest = parts[1:]
            if _no_word(rest[-1]) and _no_word(rest[0]) and (len(rest) >= 2 or self._known(rest[0])):
                start += len(parts[0]) + 1
                parts = rest
                score = 0.8
        rest_text = " ".join(parts)
        end = start + len(rest_text)
        if greeted and not score:
            follow = text[end : end + 1]
            first = parts[0]
            if (follow in ",!.\n—:" or not follow) and first not in _NO_ONE and _no_word(first):
                known = first in _GIVEN or self._known(first)
                score = 0.8 if known else 0.6 if follow == "," or (follow == "!" and len(parts) == 1) else 0.0
        if not score:
            score = self._by_what_is_before(parts, start, end) or self._as_a_person(parts, start, end)
        if score:
            span = trimmed(rest_text, start, sure=score == 0.8)
            if span and not (text[span[0] : span[1]].isupper() and " " not in text[span[0] : span[1]]):
                one = self._with_second(span, score)
                yield Finding(*one, "NAME", score)
                return
        yield from self._by_its_words(parts, start)

    def _as_a_person(self, parts: list[str], start: int, end: int) -> float:
        """By what is said of people only."""
        text = self.text
        before = text[max(0, start - 64) : start]
        if 2 <= len(parts) <= 5:
            if not all(map(_no_word, parts)) or " ".join(parts[:2]) in _TWO_WORDS:
                return 0.0
            if parts[0].isupper() or parts[-1].isupper():
                return 0.0
            if _HUMAN_BEHIND.match(text, end) or (before[-1:] == " " and _HUMAN_BEFORE.search(before)):
                return 0.5
            return 0.0
        word = parts[0]
        if len(parts) != 1 or word in _PLAIN or not _no_word(word) or word.isupper():
            return 0.0
        if before[-1:] == " ":
            if _TOLD.search(before) and text.startswith(_TOLD_BEHIND, end):
                return 0.5
            if word in _SURE_GIVEN and _HUMAN_BEFORE.search(before):
                return 0.5
        elif word in _SURE_GIVEN and before[-1:] in ("", "\n", '"', "“") and _SPOKEN_TO.match(text, end):
            return 0.5
        if word in _SURE_GIVEN and word not in _FAMOUS and _HUMAN_BEHIND.match(text, end):
            return 0.5
        return 0.0

    def _known(self, word: str) -> bool:
        return word in _GIVEN or word in _SURNAMES or _shaped(word)

    def _by_what_is_before(self, parts: list[str], start: int, end: int) -> float:
        text = self.text
        before = text[max(0, start - 40) : start]
        tail = before[-1:]
        if self.listed and start - self.last <= 6 and text[self.last : start] in _SEPARATORS:
            # Another one in a list of people.
            if len(parts) >= 2 and all(map(_no_word, parts)):
                return 0.7
            if len(parts) == 1 and parts[0] in _GIVEN and parts[0] not in _PLAIN:
                return 0.7
        if tail == " " or (tail and tail in ":=,\"'*\n\t>`({["):
            if before.endswith(_TITLE_BEFORE):
                return 0.9
            said = _announced(before, parts[0], text[end : end + 1])
            if said == 0.8:
                return said
            if said and all(map(_no_word, parts)) and (len(parts) >= 2 or self._known(parts[0])):
                return said
            if before.endswith(_AM_BEFORE) and (
                len(parts) >= 2 or (parts[0] in _SURE_GIVEN and parts[0] not in _PLAIN)
            ):
                return 0.7
            if before.endswith(("this is ", "This is ")) and (
                text.startswith(_CALLING, end) or (len(parts) >= 2 and self._known(parts[-1]))
            ):
                return 0.7
            if (
                2 <= len(parts) <= 4
                and parts[-1] not in _NOT_NAMES
                and before.endswith(" ")
                and _mentioned(text, before, end)
            ):
                return 0.6
        if 2 <= len(parts) <= 5 and parts[-1] not in _NOT_NAMES:
            if _MAILBOX.match(text, end):
                return 0.6
            if all(map(_no_word, parts)) and _BORN.match(text, end):
                return 0.6
        return 0.0

    def _with_second(self, span: tuple[int, int], score: float) -> tuple[int, int]:
        """With the given name behind a comma: O'Donnell, Fergus."""
        if score != 0.8:
            return span
        value = self.text[span[0] : span[1]]
        if " " in value and not value.split(" ")[0].lower().startswith(
            ("van", "von", "de", "di", "la", "le", "al")
        ):
            return span
        second = _SECOND.match(self.text, span[1])
        if second and second["word"].split(" ")[0] not in _NOT_NAMES:
            return span[0], second.end()
        return span

    def _by_its_words(self, parts: list[str], start: int) -> Iterator[Finding]:
        """A given name and what follows it; a surname and what comes before; letters of other languages."""
        text = self.text
        n = len(parts)
        at = start
        for i, word in enumerate(parts):
            capitals = len(word) > 2 and word.isupper()
            name = word.title() if capitals else word
            more = i + 1 < n
            if more and name in _GIVEN:
                nxt = parts[i + 1]
                if capitals:
                    good = name in _SURE_GIVEN and nxt.isupper() and nxt.title() in _SURNAMES
                elif name in _AMBIGUOUS or name in _PLAIN:
                    last = next(part for part in reversed(parts) if len(part) > 2 or part == word)
                    last = last.removesuffix("'s").removesuffix("’s")
                    good = last not in _COMMON and last != word and (last in _SURNAMES or _shaped(last))
                else:
                    good = nxt.rstrip(".") not in _PLAIN or nxt in _SURNAMES
                if good:
                    span = trimmed(" ".join(parts[i:]), at)
                    if span and " " in text[span[0] : span[1]]:
                        yield Finding(*span, "NAME", 0.7)
                        return
            elif more and not capitals and n - i <= 4:
                last = parts[-1].removesuffix("'s").removesuffix("’s")
                if (
                    _no_word(word)
                    and all(map(_no_word, parts[i:-1]))
                    and ((last in _SURNAMES and last not in _COMMON and i == 0) or _shaped(last))
                    and (_shaped(word) or _shaped(last) or len(word) > 2)
                ):
                    span = trimmed(" ".join(parts[i:]), at)
                    if span and " " in text[span[0] : span[1]]:
                        yield Finding(*span, "NAME", 0.6)
                        return
            at += len(word) + 1
        # J. R. Pemberton
        if n >= 2 and len(parts[0]) == 2 and parts[0].endswith(".") and _no_word(parts[-1]):
            two = len(parts[1]) == 2 and parts[1].endswith(".")
            if (two and n == 3) or (n == 2 and (parts[1] in _SURNAMES or _shaped(parts[1]))):
                span = trimmed(" ".join(parts), start)
                if span and not parts[-1].isupper():
                    yield Finding(*span, "NAME", 0.6)
                    return
        if n == 1:
            word = parts[0].removesuffix("'s").removesuffix("’s")
            if (
                word in _ALONE
                and self.personal(start)
                and not text.startswith((" of ", " (disamb"), start + len(word))
            ):
                yield Finding(start, start + len(word), "NAME", 0.5)


def _mentioned(text: str, before: str, end: int) -> bool:
    """Whether two capitalised words or more are spoken of as somebody is: contact ... at, call ... on."""
    head = before[:-1].lower()
    if not head.endswith(("contact", "call", "email", "reach", "met", "meet", "notify", "ask")):
        return False
    return text.startswith((" at ", " on ", " via ", " by ", " (", " for ", " directly"), end)


def scan(text: str) -> Iterator[Finding]:
    """People in a plain view (:func:`sllm.privacy.normal.plain`)."""
    if not _CAPITAL.search(text):
        yield from _lower(text)
        return
    reader = _Reader(text)
    for run in CANDIDATE.finditer(text):
        yield from reader.run(run[0], run.start())
        if reader.budget.left < 0:
            break
    for found in _CAPITALS_EN.finditer(text):
        yield Finding(found.start("name"), found.end("name"), "NAME", 0.6)
    yield from _lower(text)


def _lower(text: str) -> Iterator[Finding]:
    """Names that were written without capitals, behind what can only announce one."""
    if not any(said in text for said in ("name", "his is", "am ", "'m ", "all me")):
        return
    for found in _LOWER.finditer(text):
        said, first, second = found["said"].lower(), found["first"], found["second"]
        if first in _LOWER_GIVEN and (not said.startswith("this") or second in _LOWER_SURNAMES):
            end = found.end("second") if second in _LOWER_SURNAMES else found.end("first")
            yield Finding(found.start("first"), end, "NAME", 0.6)
