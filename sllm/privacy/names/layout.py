"""People by how a text is laid out: below the head of a column, after a key of a record, in a list under a
word for people, before what they said in a chat.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sllm.privacy.findings import Finding
from sllm.privacy.names import chinese
from sllm.privacy.names.word_lists import ENGLISH, not_a_common_word
from sllm.privacy.regex import first_of, lazy, rest_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["scan"]

_PEOPLE_TEXT = (
    "full name;first name;last name;given name;family name;surname;forename;patient;patient name;customer;"
    "customer name;client;client name;employee;employee name;student;student name;contact;contact name;"
    "contact person;emergency contact;manager;supervisor;assignee;assigned to;member;member name;participant;"
    "attendee;guest;guest name;tenant;applicant;candidate;candidate name;doctor;physician;teacher;instructor;"
    "sender;recipient;cardholder;account holder;next of kin;parent;guardian;spouse;reviewer;approver;"
    "passenger;passenger name;user full name;buyer;seller;driver;resident;staff;reported by;prepared by;"
    "colleague;representative;beneficiary;payee;witness;caller;visitor;subscriber;owner name"
)
_PEOPLE = frozenset(_PEOPLE_TEXT.split(";"))
_MANY = frozenset(["children", "people"])
# A name may be that of a product: if one of these is another column, it is a person's.
_BESIDE = lazy(
    r"(?:phone|tel|mobile|cell|e ?mail|address|dob|birth(?:day| ?date)?|date of birth|age|gender|sex|team|"
    r"department|dept|title|role|position|salary|grade|class|employee id|student id|ssn|passport|company|"
    r"extension|shift|diagnosis|nationality|hire date|job)(?: ?(?:no|number|address|id))?\Z|"
    r".*(?:部门|电话|手机|性别|年龄|地址|住址|职务|岗位|职位|班级|学号|工号|号码|邮箱|备注|单位|籍贯|生日|日期|成绩|"
    r"工资|科室|学院|专业|微信|签名|签字)"
)
_NAMES = frozenset(["name", "names", "person", "who"])
_WORD = r"[^\W\d_](?:[^\W\d_]|[.'’-])*"
_WORDS = lazy(rf"{_WORD}(?:,? {_WORD}){{0,4}}\Z")
_NOBODY_TEXT = (
    "none unknown total average sum tbd na n/a nil vacant anonymous various all everyone null empty string "
    "text"
)
_NOBODY = frozenset(_NOBODY_TEXT.split())
_RULE = lazy(r"[\s|:+-]+\Z")
_AROUND = " \t\"'“”*`_"
# Tabs and bars separate the cells of tables; commas and semicolons also occur in sentences.
_OF_TABLES = "\t|"
_OF_SENTENCES = ";,"
_LINE = lazy("^.*$", re.M)
_LONGEST_HEAD = 24
_MOST_COLUMNS = 64
_LONGEST_ROW = 4096  # longer ones are not read by people, and are skipped


def _of_people(label: str) -> bool:
    """Whether a label, in lower case, is one of people."""
    return label in _PEOPLE or (not label.isascii() and chinese.is_label(label))


def _columns(heads: list[str], delimiter: str) -> dict[int, str]:
    """The columns that hold people, with what their heads say."""
    if len(heads) > _MOST_COLUMNS:
        return {}
    labels = [head.strip(_AROUND).lower().replace("_", " ") for head in heads]
    if any(len(label) > _LONGEST_HEAD for label in labels):
        return {}
    found = {n: label for n, label in enumerate(labels) if _of_people(label)}
    n_known = len(found) + sum(_BESIDE.match(label) is not None for label in labels)
    if not found and n_known:
        found = {n: label for n, label in enumerate(labels) if label in _NAMES}
        n_known += len(found)
    if delimiter in _OF_SENTENCES and n_known < 2:
        return {}
    return found


def _is_name(value: str, label: str) -> bool:
    """Whether a value can be a person's name. Under a role, such as driver, a single word may be a thing."""
    if not value.isascii() and chinese.fills(value):
        return True
    if not 2 <= len(value) <= 48 or value.lower() in _NOBODY or not _WORDS.match(value):
        return False
    parts = value.replace(",", "").split(" ")
    if not all(part[0].isupper() for part in parts):
        return parts[0] in ENGLISH.lower_given
    if len(parts) == 1 and not label.endswith("name"):
        return value in ENGLISH.given or value in ENGLISH.surnames
    return parts[0] not in ENGLISH.not_names and any(
        not_a_common_word(part) or part in ENGLISH.given for part in parts
    )


_KEY = lazy(r"\"(?P<key>[A-Za-z_\u4e00-\u9fff][A-Za-z_ \u4e00-\u9fff]{1,23})\" ?: ?(?=[\"\[])")
_VALUE = lazy(r"\s{0,40}\"(?P<value>[^\"\n]{1,48})\"\s{0,40}")
_CAMEL = lazy(r"(?<=[a-z])(?=[A-Z])")
# Without capitals, as forms send them.
_WHICH_NAME = ("[Ff](?:irst|ull|amily)", "[Ll]ast", "[Gg]iven", "[Ss]ur", "[Mm](?:iddle|aiden)")
_LOWER = lazy(
    rf"{first_of(_WHICH_NAME)}{rest_of(_WHICH_NAME)}"
    r"[_ -]?[Nn]ame[\"']? ?[:=] ?[\"']?"
    r"(?P<name>(?P<first>[a-zà-ɏ'’-]{2,24})(?:[ +][a-zà-ɏ'’-]{2,24}){0,2})(?=[\"'&,;\s.}]|\Z)"
)


def _records(text: str) -> Iterator[Finding]:
    done = 0  # the values of one key are read once
    for key in _KEY.finditer(text) if '"' in text else ():
        label = _CAMEL.sub(" ", key["key"]).lower().replace("_", " ")
        one = label.removesuffix("s").removesuffix("列表").removesuffix("名单")
        if key.start() < done or not (_of_people(label) or _of_people(one) or label in _MANY):
            continue
        listed = text[key.end()] == "["
        at = key.end() + listed
        while found := _VALUE.match(text, at):
            done = at = found.end()
            if _is_name(found["value"].strip(), label):
                yield Finding(found.start("value"), found.end("value"), "NAME", 0.7)
            if not listed or text[at : at + 1] != ",":
                break
            at += 1
    if "ame" in text:
        for found in _LOWER.finditer(text):
            if found["first"] in ENGLISH.lower_given or found["first"] in ENGLISH.lower_surnames:
                yield Finding(found.start("name"), found.end("name"), "NAME", 0.6)


def _tables(text: str, lines: list[tuple[int, str]]) -> Iterator[Finding]:
    delimiters = [d for d in _OF_TABLES + _OF_SENTENCES if d in text]
    if not delimiters:
        return
    delimiter, n_columns = "", 0
    columns: dict[int, str] = {}
    for at, line in lines:
        if len(line) > _LONGEST_ROW:
            columns = {}
            continue
        if columns:
            cells = line.split(delimiter)
            # One may be missing at the end of a line; otherwise the table has ended.
            if len(cells) >= 2 and abs(len(cells) - n_columns) <= 1:
                if not _RULE.match(line):
                    yield from _row(cells, columns, at)
                continue
            columns = {}
        for delimiter in delimiters:
            if delimiter in line:
                cells = line.split(delimiter)
                columns, n_columns = _columns(cells, delimiter), len(cells)
                if columns:
                    break


def _row(cells: list[str], columns: dict[int, str], at: int) -> Iterator[Finding]:
    for n, cell in enumerate(cells):
        if n in columns:
            value = cell.strip(_AROUND)
            if value and _is_name(value, columns[n]):
                begin = at + len(cell) - len(cell.lstrip(_AROUND))
                yield Finding(begin, begin + len(value), "NAME", 0.7)
        at += len(cell) + 1


# A line that says whose list follows, its items, and what an item begins with.
_LIST_HEAD = lazy(r"(?P<label>[^\n:：]{1,24}?)[ *]{0,3}[:：][ *]{0,3}\Z")
_ITEM = lazy(r"[ \t]{0,12}(?:[-*•·+]|[0-9]{1,3}[.)、]|[（(][0-9]{1,3}[)）])[ \t*]{0,4}")
_ITEM_END = lazy(r" ?[,，（(:：;；|–—/*]| - |[。.]?\s*\Z")
_LISTED_TEXT = (
    "attendees;participants;members;team;team members;present;absent;guests;students;employees;patients;"
    "contacts;reviewers;approvers;assignees;passengers;witnesses;speakers;interviewers;candidates;applicants;"
    "staff;crew;children;names;tenants;residents;signatories;winners;volunteers;invitees;people;cc"
)
_LISTED = frozenset(_LISTED_TEXT.split(";"))


def _lists(lines: list[tuple[int, str]]) -> Iterator[Finding]:
    label = ""
    for at, line in lines:
        item = _ITEM.match(line) if label else None
        if item:
            end = _ITEM_END.search(line, item.end())
            value = line[item.end() : end.start() if end else len(line)]
            if _is_name(value, label):
                yield Finding(at + item.end(), at + item.end() + len(value), "NAME", 0.7)
        elif line and not line.isspace():
            label = ""
            if len(line) <= 2 * _LONGEST_HEAD and line.rstrip(" *").endswith((":", "：")):
                head = _LIST_HEAD.search(line)
                said = head["label"].strip(_AROUND + "#").lower() if head else ""
                if said in _LISTED or _of_people(said):
                    label = said


# [10:32] 张伟: ..., Ada Obi (10:32): ...
_SAYS = lazy(
    r"[ \t]{0,4}(?P<at>[\[(（【]?[0-9][0-9:.,/ -]{3,24}(?:[AaPp][Mm])?[\])）】]?[ \t]{0,4})?[*<]{0,2}"
    r"(?P<name>[^\W\d_][^\n:：\[\](){}<>*]{1,30}?)[*>]{0,2}"
    r"(?P<then> ?[(（\[][0-9:.,/ APMapm-]{3,24}[\])）])?[ *]{0,3}[:：](?=.)"
)


def _chats(lines: list[tuple[int, str]]) -> Iterator[Finding]:
    """Speakers, if there are two or more: a single such line is a label with its value."""
    spoken: list[Finding] = []
    names: set[str] = set()
    for at, line in lines:
        says = _SAYS.match(line) if ":" in line or "：" in line else None
        if says and _speaks(says["name"], timed=bool(says["at"] or says["then"])):
            names.add(says["name"])
            spoken.append(Finding(at + says.start("name"), at + says.end("name"), "NAME", 0.6))
    if len(names) >= 2:
        yield from spoken


def _speaks(name: str, *, timed: bool) -> bool:
    """Whether a line begins with a speaker; words that are not known names need a time next to them."""
    if not name.isascii() and chinese.is_typical(name):
        return True
    if not _WORDS.match(name):
        return False
    parts = name.split(" ")
    if len(parts) == 1:
        return name in ENGLISH.sure_given and name not in ENGLISH.plain
    return (
        len(parts) == 2
        and all(part[0].isupper() and part[1:].islower() and not_a_common_word(part) for part in parts)
        and (timed or parts[0] in ENGLISH.given or parts[1] in ENGLISH.surnames)
    )


def scan(text: str) -> Iterator[Finding]:
    """Findings in a plain view (:func:`sllm.privacy.text.plain`)."""
    yield from _records(text)
    if "\n" in text:
        lines = [(line.start(), line[0]) for line in _LINE.finditer(text)]
        yield from _tables(text, lines)
        yield from _lists(lines)
        yield from _chats(lines)
