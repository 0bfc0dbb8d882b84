"""Chinese identifiers that are recognised by their characters: company codes, plates, permits, addresses."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sllm.privacy import data
from sllm.privacy.findings import Budget, Finding
from sllm.privacy.patterns import checksums
from sllm.privacy.regex import ALONE, END, lazy

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["scan"]


_USCC = lazy(rf"[1-9AGNYagny]{ALONE}[1-9A-GNYa-gny][0-9]{{6}}[0-9A-HJ-NP-RTUWXYa-hj-np-rtuwxy]{{10}}{END}")

_PLATE_REGION = "京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼使领"
_P = "A-HJ-NP-Za-hj-np-z"
_PLATE = lazy(
    rf"[{_PLATE_REGION}][ ]?[A-Za-z][ ·•・.\-]{{0,2}}"
    rf"(?:[DFdf][{_P}0-9][0-9]{{4}}|[0-9]{{5}}[DFdf]|[A-Ha-hJ-Kj-k][{_P}0-9][0-9]{{4}}|"
    rf"[{_P}0-9]{{4}}[{_P}0-9挂学警港澳试超])"
    r"(?![A-Za-z0-9])"
    r"|WJ[ ·]?[0-9A-Z]?[ ·]?[0-9]{4}[0-9TDSHBXJ](?![A-Za-z0-9])"
    r"|[使领][0-9]{6}(?![0-9A-Za-z])|[0-9]{6}[使领](?![0-9A-Za-z])"
)

_PASSPORT = lazy(
    rf"[EeGgDdSsPpHhMmCcKk1]{ALONE}(?:(?<=[A-Za-z])[0-9]{{8}}|(?<=[Ee])[A-HJ-NP-Z][0-9]{{7}}|"
    rf"(?<=[HMhm])[0-9]{{10}}|(?<=1)[45][0-9]{{7}}){END}"
)
_PASSPORT_WORD = lazy(
    (
        r"(?:护照|通行证|签证|证件|passport|permit|document|旅行)[^A-Za-z0-9]{0,14}(?:no|"
        r"number)?[^A-Za-z0-9]{0,4}\Z"
    ),
    re.I,
)

_HKID = lazy(
    rf"(?P<letters>[A-Za-z]{ALONE}[A-Za-z]?) ?(?P<digits>[0-9]{{6}})(?: ?[(](?P<check>[0-9Aa])[)]|"
    rf"(?<=[A-Z][0-9]{{6}})(?P<bare>[0-9A]){END})"
)
_MILITARY = lazy(
    "[军武海空政后装士南北沈兰济成广参总文战火联支][\u4e00-\u9fff]{0,2}字第?[ ]?[0-9]{5,10}(?:[ ]?号)?"
)
_HK_LABEL = lazy(r"(?:身份证|香港|HKID|hkid|HK ID|ID card|identity card)[^A-Za-z0-9]{0,8}\Z")
_MACAU = lazy(rf"[157]{ALONE}(?:[0-9]{{6}}[(][0-9][)]|/[0-9]{{6}}/[0-9]{END})")
_TWID = lazy(rf"[A-Z]{ALONE}[1289][0-9]{{8}}{END}")

_START = lazy(lambda: "|".join(data.words("addresses_zh_places")))

# One part of an address ends in one of these; what stands before it, back to the part before, is its name.
_AREA = "特别行政区|自治区|自治州|自治县|新区|开发区|高新区|省|市|区|县|旗|盟|州|镇|乡|街道|區|縣|鎮|鄉"
_ROAD = "大道|大街|马路|公路|胡同|路|街|巷|弄|道|里|村|屯|社区|环路|社區|馬路"
_PLACE = (
    "小区|花园|公寓|大厦|广场|家园|新村|花苑|别墅|中心|科技园|工业园|产业园|产业区|园区|宿舍|大楼|"
    "写字楼|苑|园|城|府|庭|湾|轩|阁|邸|庄|坊|号院|居|大廈|廣場|花園|中心|邨|閣|臺|灣|軒|園|大樓|商場"
)
_NUMBER = (
    r"(?:[A-Za-z]?[0-9]{1,5}(?:[-–][0-9]{1,5}){0,2}[A-Za-z]?|"
    r"[一二三四五六七八九十百零〇甲乙丙丁]{1,5}|[A-Za-z])"
)
_UNIT = (
    "号楼|号院|号门|号铺|号店|号|弄|栋|幢|座|单元|楼|层|室|舍|户|房|组|队|门|铺|排|期|区|號|樓|棟|"
    "層|戶|段|鄰|巷|單元|舖|組|门牌"
)
_PART = lazy(
    rf"(?P<number>{_NUMBER}[ ]?(?:{_UNIT})(?!线|码|称|召|角|令|外|机|文件|通知|元|年))|(?P<area>{_AREA})|"
    rf"(?P<road>{_ROAD})|(?P<place>{_PLACE})"
)
_ROOM = lazy(r"[ -]?[A-Za-z]?[0-9]{1,5}(?:[-–][0-9]{1,5}){0,3}(?:室|号|房|户)?(?![0-9A-Za-z.%年月日元个点])")
# An address lies within one stretch of these: Han, letters, digits and a few separators.
_STRETCH = lazy(r"[\u4e00-\u9fffA-Za-z0-9〇#()（） \-–·]+")
_STOP = lazy(
    r".*(?:地址(?:是|为|在)?|住址|住在|家住|位于|坐落于|送到|送至|寄到|寄往|寄至|发到|发往|发货到|"
    r"搬到|搬至|回到|来到|到达|前往|抵达|就在|"
    r"现居|居住在?|户籍(?:地|所在地)?|籍贯|我在|他在|她在|人在|是在|现在在|公司在|设在|设于|开在|"
    r"约在|定在|[在至到从往是为于住寄送去和与及或的了跑找过沿给])",
    re.S,
)
_FLAT = lazy(r"之[0-9]{1,3}(?![0-9])")
_CODE_AFTER = lazy(r"[ ,，]{0,2}[0-9]{6}(?![0-9])")
_CODE_BEFORE = lazy(r"(?<![0-9])(?:[0-9]{3}|[0-9]{5,6}) ?\Z")
_MAX_NAME = 12
_MAX_PARTS = 500
_INNER = frozenset("室舍栋幢座层楼元户")


def _company_codes(text: str) -> Iterator[Finding]:
    for found in _USCC.finditer(text):
        value = found[0]
        if value.isdigit():
            continue  # sllm.privacy.patterns.numbers finds it
        if checksums.uscc(value):
            yield Finding(found.start(), found.end(), "COMPANYID", 1.0, checked=True)
        elif value[:2] in ("91", "92", "93", "12", "11", "51", "52") and "MA" in value[8:10].upper():
            yield Finding(found.start(), found.end(), "COMPANYID", 0.7)


def _plates(text: str) -> Iterator[Finding]:
    if not _DIGIT.search(text):
        return
    for found in _PLATE.finditer(text):
        tail = found[0][2:]
        n_digits = sum(map(str.isdigit, found[0]))
        if n_digits >= 2 or (n_digits >= 1 and found[0][1:2].isupper() and "·" in tail):
            yield Finding(found.start(), found.end(), "PLATE", 0.9, checked=True)


_DIGIT = lazy("[0-9]")
_SIX = lazy("[0-9]{5}")


def _permits(text: str) -> Iterator[Finding]:
    if not _SIX.search(text):
        return
    for found in _PASSPORT.finditer(text):
        labelled = _PASSPORT_WORD.search(text[max(0, found.start() - 20) : found.start()])
        if labelled or (found[0][0] in "EG" and len(found[0]) == 9):
            yield Finding(found.start(), found.end(), "PASSPORT", 0.9 if labelled else 0.7)
    for found in _MILITARY.finditer(text):
        yield Finding(found.start(), found.end(), "LICENCE", 0.8)
    for found in _HKID.finditer(text):
        letters, check = found["letters"], found["check"]
        if not check and not letters.isupper():
            continue
        good = checksums.hk_id(letters, found["digits"], check or found["bare"])
        # Without the brackets it is any letter and digits: one in eleven agrees by chance.
        before = text[max(0, found.start() - 16) : found.start()]
        if check or (good and _HK_LABEL.search(before)):
            yield Finding(found.start(), found.end(), "IDCARD", 0.9 if good else 0.6, checked=good)
    for found in _MACAU.finditer(text):
        yield Finding(found.start(), found.end(), "IDCARD", 0.7)
    for found in _TWID.finditer(text):
        if checksums.tw_id(found[0]):
            yield Finding(found.start(), found.end(), "IDCARD", 0.9, checked=True)


def _name_start(text: str, low: int, marker: int) -> int:
    """Where the name before a suffix begins: after the last word that cannot be part of it."""
    low = max(low, marker - _MAX_NAME)
    name = text[low:marker]
    stop = _STOP.match(name)
    cut = stop.end() if stop else 0
    known = _START.search(name, cut) or _START.search(name)
    if known:
        return low + known.start()
    for i in range(len(name) - 1, cut - 1, -1):
        if name[i] in " ()（）-–·":
            cut = i + 1
            break
    return low + cut


# Without one of these there is neither a house nor a third level.
_NEEDED = lazy(
    "[區縣鎮鄉號樓棟廈邨園灣閣路街道巷弄村镇乡县区号室栋幢楼座苑园寓厦场社里屯墅城府庭湾轩阁邸庄坊居同心舍]"
)


def _addresses(text: str) -> Iterator[Finding]:
    budget = Budget(text)
    for stretch in _STRETCH.finditer(text):
        if stretch.end() - stretch.start() >= 4 and _NEEDED.search(text, *stretch.span()):
            yield from _in_stretch(text, stretch.start(), stretch.end(), budget)
            if budget.spent:
                break
    yield from budget.rest("ADDRESS")


def _in_stretch(text: str, start: int, end: int, budget: Budget) -> Iterator[Finding]:
    first = last = -1  # the address being built
    score: list[str] = []
    for n, part in enumerate(_PART.finditer(text, start, end)):
        if not budget.spend(start):
            return
        if n >= _MAX_PARTS:
            # Nobody writes that many without a full stop: all of it counts, at no further cost.
            yield Finding(start, end, "ADDRESS", 0.5)
            return
        kind = part.lastgroup or ""
        gap = part.start() - last if last >= 0 else 0
        # A name of up to twelve characters stands between two suffixes; a number follows at once.
        joins = last >= 0 and (gap <= 2 if kind == "number" else gap <= _MAX_NAME)
        if kind == "number" and not joins and last >= 0 and gap <= 10 and part["number"][-1:] in _INNER:
            # 22号南京大学3舍: a building with a name of its own.
            joins = "number" in score and not _STOP.match(text[last : part.start()])
        if joins and kind != "number":
            between = text[last : part.start()]
            stop = _STOP.match(between)
            joins = not (
                stop
                and stop.end() > 0
                and not between.startswith(("和", "过"))
                and len(between) > 1
                and stop.end() <= len(between) - 1
            )
        if not joins:
            done = _finish(text, first, last, score, end)
            if done:
                yield done
            if kind == "number":
                # A number begins no address, except one whose name stands before it: 幸福3栋.
                first, last, score = -1, -1, []
                continue
            first = _name_start(text, start if last < 0 else last, part.start())
            score = []
            if part.start() - first < 1:
                first, last = -1, -1
                continue
        last = part.end()
        score.append(kind)
    done = _finish(text, first, last, score, end)
    if done:
        yield done


def _finish(text: str, first: int, last: int, parts: list[str], end: int) -> Finding | None:
    if first < 0 or not parts:
        return None
    numbers, areas = parts.count("number"), parts.count("area")
    roads, places = parts.count("road"), parts.count("place")
    # A place that many people share is not private: it needs a house, or three levels.
    good = (
        (numbers and (roads or places))
        or (numbers and areas >= 2)
        or (areas >= 2 and (roads or places))
        or (areas and roads and places)
        or areas >= 3
    )
    room = _ROOM.match(text, last, end)
    if room and (roads or places or numbers) and room[0].strip(" -"):
        if not good and (roads or places) and room[0][-1:] in "室号房户":
            good = True
        if good:
            last = room.end()
    if not good:
        return None
    # 5樓之2: a part of a floor; a postal code on either side.
    for more in (_FLAT, _CODE_AFTER):
        found = more.match(text, last, end)
        last = found.end() if found else last
    code = _CODE_BEFORE.search(text[max(0, first - 7) : first])
    if code:
        first -= len(code[0])
    return Finding(first, last, "ADDRESS", 0.8)


def scan(text: str) -> Iterator[Finding]:
    """Findings in a plain view (:func:`sllm.privacy.text.plain`)."""
    yield from _company_codes(text)
    yield from _permits(text)
    if not text.isascii():
        yield from _plates(text)
        yield from _addresses(text)
