"""What is written around people in English: titles, labels, verbs, greetings and closings, and what is said
of people only.
"""

from __future__ import annotations

import re

from sllm.privacy.names.name_words import INNER_CAPITAL

__all__ = [
    "AM_BEFORE",
    "CALLING",
    "GREETINGS",
    "HUMAN_BEHIND",
    "LEADING",
    "NO_ONE",
    "RANKS",
    "SEPARATORS",
    "SPOKEN_TO",
    "TITLES",
    "TITLE_BEFORE",
    "TOLD",
    "TOLD_BEHIND",
    "announced",
    "mentioned",
    "of_people",
]

_TITLES_TEXT = (
    "Mr Mrs Ms Mx Miss Mister Dr Prof Professor Doctor Sir Madam Madame Mme Rev Reverend Capt Sgt Lt Col Cpl "
    "Hon Herr Frau Monsieur Señor Señora Senor Senora Sr Sra Signor Signora Dear Dame"
)
TITLES = frozenset(_TITLES_TEXT.split())
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
RANKS = frozenset(_RANKS_TEXT.split())
_GREETINGS_TEXT = (
    "Hi Hello Hey Hiya Greetings Thanks Welcome Congratulations Congrats Sorry Bye Goodbye Morning Afternoon "
    "Evening Hola Bonjour Hallo Ciao"
)
GREETINGS = frozenset(_GREETINGS_TEXT.split())
_NO_ONE_TEXT = "Google Siri Alexa Cortana Kitty World ChatGPT Claude Gemini Copilot Kimi Qwen"
NO_ONE = frozenset(_NO_ONE_TEXT.split())
TITLE_BEFORE = tuple(
    f"{title}. "
    for title in (
        "Mr", "Mrs", "Ms", "Mx", "Dr", "Prof", "Rev", "Capt", "Sgt", "Lt", "Col", "Hon", "Sr", "Sra",
        "Messrs",
    )
)  # fmt: skip
AM_BEFORE = ("I am ", "I'm ", "I’m ", "i am ", "i'm ")
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


def _by_end(phrases: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Their last two characters -> the phrases, the longest first."""
    longest_first = sorted(phrases, key=len, reverse=True)
    return {end: tuple(p for p in longest_first if p.endswith(end)) for end in {p[-2:] for p in phrases}}


_VERBS = _by_end(_VERBS_EN)
_BEHIND_LABELS = {sign: _by_end(phrases) for sign, phrases in _ENDINGS.items()}
_LAST_WORD = re.compile(r"[a-zé']+\Z")
_TAG = re.compile(r"<(?:[a-z]{0,20}_?[Nn]ame|patient|contact|author|customer|sender|recipient|owner)>\Z")
_LINE_CLOSED = re.compile(
    r"(?:sincerely|regards|wishes|truly|faithfully|cheers|thanks|love|best|yours|cordially|respectfully|"
    r"warmly|thank you|signed)[,.!]?[ \t]*\n\s*\Z",
    re.I,
)


def announced(before: str, word: str, follow: str) -> float:
    """How surely the text right before a capitalised word says that a name comes: 0, 0.6 or 0.8."""
    head = before.rstrip(" \"'*`\n\t({[")
    sign = head[-1:]
    if sign == ">":
        return 0.8 if _TAG.search(head) else 0.0
    endings = _BEHIND_LABELS.get(sign, _VERBS)
    if sign == "=" and (before[-1] in "= " or INNER_CAPITAL.search(word)) and follow == "(":
        return 0.0  # client = Client(
    if endings is not _VERBS:
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
    said = next((phrase for phrase in endings.get(head[-2:], ()) if head.endswith(phrase)), "")
    if not said:
        return 0.0
    if len(head) > len(said):
        ahead = head[-len(said) - 1]
        # firstName: a capital begins a word as a space does.
        if (
            ahead.isascii()
            and ahead.isalpha()
            and not (endings is not _VERBS and written[-len(said)].isupper())
        ):
            return 0.0
    if endings is _VERBS:
        return 0.6 if said in _LOOSE_VERBS else 0.8
    if sign == ",":
        # "Thanks, Monday is fine": a closing has a line, or a beginning, of its own.
        line = head[-len(said) - 2 : -len(said)]
        return 0.8 if said not in ("best", "love", "signed", "kindly") or "\n" in line or not line else 0.0
    return 0.6 if said in _LOOSE else 0.8


# The last words of all that announces, of titles without a full stop, and of what is said in front of people
# only.
_HUMAN_LAST = (
    "with ask asked tell told email emailed called texted thank invite invited hire hired remind reminded "
    "notify notified contacted assist marry married fired know knew refund owes does has did is why will add "
    "include remove let name and between contact call reach met meet am where when"
)
LEADING = (
    _LAST
    | frozenset(_HUMAN_LAST.split())
    | frozenset(title.lower() for title in (*TITLES, *RANKS, *GREETINGS))
)
SEPARATORS = frozenset(
    [", ", " and ", ", and ", "; ", " & ", " / ", "/", "\n", "\n- ", ",\n", " or ", " with "]
)
CALLING = (" calling", " speaking", " from ", " here", " writing", ", calling")
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
HUMAN_BEHIND = re.compile(
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
    """Whether the text in front of a name, with the space behind it, says what is said of people only."""
    head = before[:-1].removesuffix(",")
    last = head[len(head.rstrip(_LETTERS)) :]
    return last.lower() in LEADING and _HUMAN_BEFORE.search(before) is not None


TOLD = re.compile(r"(?:[Aa]sk|[Aa]sked|[Tt]ell|[Tt]old|[Rr]emind|[Rr]eminded|[Ll]et|[Tt]hank|[Ii]nvite) \Z")
TOLD_BEHIND = (" to ", " that ", " know", " if ", " about ", " whether ", " for ", " not ")
SPOKEN_TO = re.compile(
    r",? (?:can|could|would|will|please|I|we|may|do|did|are|have|thank|your|here|this|"
    r"what|when) "
)


def mentioned(text: str, before: str, end: int) -> bool:
    """Whether two capitalised words or more are spoken of as somebody is: contact ... at, call ... on."""
    head = before[:-1].lower()
    if not head.endswith(("contact", "call", "email", "reach", "met", "meet", "notify", "ask")):
        return False
    return text.startswith((" at ", " on ", " via ", " by ", " (", " for ", " directly"), end)
