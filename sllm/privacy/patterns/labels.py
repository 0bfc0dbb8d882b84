"""Values that the words before them give away: "passport no. ...", "生日：...", "password = ...".

A value behind a clear label needs no checksum. Labels are looked up word by word (English, and the keys of
JSON, of environments and of code) or found by one pattern (Chinese); only behind a label is anything tried.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sllm.privacy.borders import END
from sllm.privacy.bounds import Budget
from sllm.privacy.findings import Finding
from sllm.privacy.patterns.passwords import SECRET_WORDS, secret_at

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["COMMON", "DATE", "DEGREES", "scan"]

_DIGIT = re.compile("[0-9]")
_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|"
    r"Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)"
)
DATE = (
    r"(?:[0-9]{4} ?[-/.年] ?[0-9]{1,2} ?[-/.月] ?[0-9]{1,2}(?: ?[日号])?(?![0-9])"
    r"|[0-9]{1,2} ?[-/.] ?[0-9]{1,2} ?[-/.] ?(?:[0-9]{4}|[0-9]{2})(?![0-9])"
    r"|(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])(?![0-9])"
    rf"|[0-9]{{1,2}}(?:st|nd|rd|th)?(?: of)?[ -]{_MONTH}\.?,?[ -](?:[0-9]{{4}}|[0-9]{{2}})(?![0-9])"
    rf"|{_MONTH}\.?[ /-][0-9]{{1,2}}(?:st|nd|rd|th)?(?:,? ?|[/-])(?:[0-9]{{4}})(?![0-9])"
    r"|[〇零一二三四五六七八九]{4}年[一二三四五六七八九十]{1,2}月[一二三四五六七八九十]{1,3}[日号]"
    r"|[0-9]{1,2}月[0-9]{1,2}[日号]"
    r"|(?:民[国國])?[0-9]{2,3}年[0-9]{1,2}月[0-9]{1,2}日"
    r")"
)
# What may stand between a label and its value: more of the label, a verb, a sign, quotes.
_LINK = (
    r"\.?(?:号码?|码|號碼?)?[\"'”’*`]{0,3}(?:[ _.-]{0,2}(?:numbers?|nos?\.?|num|nr\.?|id|code|card|details?|"
    r"value|address|#)(?![a-z])){0,2}[\"'”’*`)\]]{0,3}[ \t]{0,3}(?:(?:is|was|are|of|on|it['’]s|it is|"
    r"ending in|[:：=#>]|->|-|=>|为|是)[ \t]{0,3}){0,3}[\"'“‘(*`\[]{0,3}[ \t]?"
)
_CN_LINK = (
    r"(?:号码|号|编号|信息|码|號碼|號|編號|ID|id|UID|帐号|账号|名|昵称)?[\"'”’*]{0,3}[ \t]{0,2}"
    r"(?:[(（][^()（）\n]{1,8}[)）])?[ \t]{0,2}(?:(?:应该是|改成|改为|换成|设为|设成|设置为|就是|分别是|"
    r"分别为|[:：=]|为|是|叫|填|写|:)[ \t]{0,2}){0,2}[\"'“‘「(（*]{0,3}[ \t]?"
)
# 48°51'24.5"N 2°21'03"E
DEGREES = (
    r"[0-9]{1,2}° ?[0-9]{1,2}[′'’] ?[0-9]{1,2}(?:\.[0-9]{1,4})?[″\"”]? ?[NS][ ,]{1,2}"
    r"[0-9]{1,3}° ?[0-9]{1,2}[′'’] ?[0-9]{1,2}(?:\.[0-9]{1,4})?[″\"”]? ?[EW]"
)
_VALUES = {
    # Letters and digits, with the separators of forms.
    "code": rf"[A-Za-z0-9](?:[ ./-]?[A-Za-z0-9]){{3,30}}{END}",
    "digits": r"[0-9](?:[ .-]{0,2}[0-9]){2,24}(?![0-9])",
    "token": r"(?:live:)?[A-Za-z0-9@_][A-Za-z0-9._@+-]{1,40}[A-Za-z0-9_](?:#[0-9]{4}(?![0-9]))?",
    "date": (
        rf"(?:{DATE}|(?:19|20)[0-9]{{2}} ?[-/.年] ?(?:1[0-2]|0?[1-9])(?:月|(?![0-9]))"
        rf"|{_MONTH}\.?,? (?:19|20)[0-9]{{2}}(?![0-9]))"
    ),
    "plate": r"[A-Za-z0-9](?:[ ·•-]?[A-Za-z0-9]){3,9}(?![A-Za-z0-9])",
    "pin": r"(?:[A-Z]-)?[0-9]{3,8}(?![0-9])|[0-9]{2,4}(?:[ -][0-9]{2,4}){1,2}(?![0-9])",
    "zip": (
        r"(?:[0-9]{4,6}(?:-[0-9]{3,4})?|[A-Za-z]{1,2}[0-9][A-Za-z0-9]? ?[0-9][A-Za-z]{2}|"
        r"[A-Za-z][0-9][A-Za-z] ?[0-9][A-Za-z][0-9])"
        r"(?![A-Za-z0-9])"
    ),
    "geo": (
        r"[-+]?[0-9]{1,3}\.[0-9]{2,10}°?[ ]?[NSns]?(?:[ ]?[,;/，][ ]?|"
        r"[ ])[-+]?[0-9]{1,3}\.[0-9]{2,10}°?[ ]?[EWew]?"
        r"|[-+]?[0-9]{1,3}\.[0-9]{3,10}"
        rf"|{DEGREES}"
    ),
    "hash": r"[A-Za-z0-9:]{20,110}",
}
_COMPILED = {name: re.compile(pattern) for name, pattern in _VALUES.items()}
# Phrases: words separated by "_", "-", a space or nothing, so that passport_number and passportNumber count.
_ENGLISH: tuple[tuple[str, str, str], ...] = (
    ("PASSPORT", "code", "passport;travel document"),
    (
        "LICENCE",
        "code",
        (
            "driver license;driver licence;drivers license;drivers licence;driver's license;"
            "driver's licence;driving license;"
            "driving licence;driver’s license;license number;licence number;license no;licence no;"
            "dl number;dl no;dl;driverlicense;dea;npi;medical license;medical licence"
        ),
    ),
    (
        "SSN",
        "digits",
        "ssn;social security;social;socialsecurity;social number;social num;socialnum;social insurance",
    ),
    (
        "NATIONALID",
        "code",
        (
            "tax id;tax number;tax file;tax code;tax reference;utr;taxpayer id;taxpayer identification;"
            "taxnum;tax identification;tin;"
            "itin;ein;vat;vat number;nino;"
            "national insurance;nhs;medicare;medicaid;aadhaar;aadhar;national id;national identity;"
            "national identification;"
            "identity card;identity number;identity document;id card;idcard;id number;id no;id num;"
            "personal id;personal number;"
            "identification number;citizen id;resident id;pan;cpf;cnpj;sin;bsn;pesel;curp;rfc;dni;"
            "nie;nif;codice fiscale;"
            "personnummer;government id;tfn;abn;cpr;rrn;nir;ahv;svnr;steuer;residence permit;"
            "visa number;social id;individual number;voter id;green card"
        ),
    ),
    (
        "ACCOUNT",
        "code",
        (
            "account number;account no;account num;account id;account;acct;bank account;acc no;"
            "routing number;routing;aba;"
            "sort code;swift;bic;policy number;policy no;policy id;member id;member number;"
            "membership number;membership id;membership no;membership;card id;"
            "customer id;customer number;customer no;client id;client number;employee id;"
            "employee number;employee no;staff id;"
            "student id;student number;student no;patient id;patient number;medical record;"
            "medical record number;mrn;"
            "insurance number;insurance id;insurance policy;health plan;health insurance;beneficiary;"
            "case number;claim number;"
            "loyalty number;frequent flyer;badge number;registration number;certificate number;"
            "emp id;user number;subscriber id;hicn;mbi;health record;chart number;encounter;"
            "booking reference;pnr;loan number;loan no;loan id;mortgage number"
        ),
    ),
    (
        "CARD",
        "digits",
        "credit card;debit card;card number;card no;creditcard;cardnumber;bank card;card ending;visa card",
    ),
    (
        "USER",
        "token",
        (
            "username;user name;login name;login id;login;user id;userid;screen name;handle;skype;"
            "skype id;telegram;wechat;"
            "wechat id;weixin;qq;qq number;line id;discord;twitter;instagram;snapchat;weibo;"
            "github username;account name;ig;insta;line;kakao;signal;tiktok;steam id;gamertag;snap;"
            "github;git hub;instagram handle;xbox;psn;twitch;reddit;slack;whatsapp id;imessage"
        ),
    ),
    (
        "BIRTHDATE",
        "date",
        "dob;d.o.b;date of birth;birth date;birthdate;birthday;born;birth;date birth;dateofbirth",
    ),
    (
        "DEVICE",
        "code",
        "imei;imsi;s/n;serial number;device id;udid;device identifier;imei number;serial no;meid;iccid",
    ),
    ("VIN", "code", "vin;vehicle identification;chassis;chassis number;vehicle id;vehicle vin"),
    (
        "PLATE",
        "plate",
        (
            "license plate;licence plate;plate number;plate no;number plate;plate;"
            "vehicle registration;vrm;reg number;car plate;"
            "registration plate;vehicle plate;registration;reg"
        ),
    ),
    ("ADDRESS", "zip", "zip;zip code;zipcode;postal code;postcode;post code;postalcode;plz"),
    (
        "SECRET",
        "pin",
        (
            "pin;pin code;cvv;cvv2;cvc;cvc2;security code;otp;verification code;auth code;"
            "one time code;passcode;access code;"
            "unlock code;card cvv;confirmation code;2fa code;login code;one time password"
        ),
    ),
    (
        "GEO",
        "geo",
        "gps;coordinates;coordinate;latitude;longitude;lat;lng;lon;geolocation;lat long;located at;location",
    ),
    ("MAC", "code", "mac address"),
    (
        "WALLET",
        "hash",
        "wallet;wallet address;bitcoin address;btc address;eth address;ethereum address;crypto address",
    ),
)
_CHINESE: tuple[tuple[str, str, str], ...] = (
    (
        "IDCARD",
        "code",
        "身份证|身分证|身分證|身份證|證件號|居留證|公民身份|证件号|居民证|身份号|港澳居民证|居住证|证件",
    ),
    ("PASSPORT", "code", "护照|護照|港澳通行证|通行证|台胞证|回乡证|签证|旅行证"),
    ("LICENCE", "code", "驾驶证|驾照|行驶证|档案编号|军官证|士官证|文职干部证|士兵证|警官证|执业证|资格证"),
    (
        "ACCOUNT",
        "code",
        (
            "银行账|银行帐|账号|帐号|账户|帐户|开户账|收款账|工号|学号|员工号|员工编号|会员号|会员卡|客户号|"
            "病历号|住院号|门诊号|就诊卡|就诊号|工牌号|体检号|床号|借据号|卡券号|病案号|病案|病例号|诊疗号|"
            "登记号|影像号|检查号|员工编码|客户编号|会员编号|病歷號|學號|員工編號|帳號|保单号|保单|社保号|"
            "社保卡|医保号|医保卡|社会保障|公积金|学籍号|准考证|报名号|合同号|税号|纳税人识别|档案号|编制号"
        ),
    ),
    ("CARD", "digits", "银行卡|信用卡|借记卡|储蓄卡|卡号|工资卡"),
    ("COMPANYID", "code", "統一編號|统一编号|统一社会信用|信用代码|组织机构代码|营业执照|注册号"),
    (
        "USER",
        "token",
        (
            "用户名|登录名|用戶名|微信|微信號|vx|VX|Vx|wx|WX|V信|v信|加微|加V|加v|威信|薇信|扣扣|企鹅号|➕v|"
            "➕V|加我v|加我V|LINE|Line|IG|ins|B站|脸书|QQ|qq|Qq|抖音|微博|昵称|网名|支付宝|推特|小红书|快手|"
            "登录账|用户ID"
        ),
    ),
    (
        "BIRTHDATE",
        "date",
        (
            "出生日期|出生年月日|西元生日|生辰|出生年月|出生时间|出生于|出生在|出生|生日|生于|诞辰|阳历|农历|"
            "阴历"
        ),
    ),
    ("DEVICE", "code", "设备号|序列号|串号|设备编号|机器码"),
    ("VIN", "code", "车架号|车辆识别|发动机号|车辆识别代号"),
    ("PLATE", "plate", "车牌|車牌|牌照|车号"),
    ("ADDRESS", "zip", "邮编|邮政编码"),
    (
        "SECRET",
        "pin",
        (
            "验证码|驗證碼|校验码|安全码|动态码|取件码|支付密码|取款密码|交易密码|锁屏密码|门禁密码|短信码|"
            "提取码|解锁码"
        ),
    ),
    (
        "PHONE",
        "digits",
        "电话|手机|電話|手機|聯絡|傳真|市話|座机|固话|传真|联系方式|热线|号码是|致电|拨打|联系号码|紧急联系",
    ),
    ("GEO", "geo", "经纬度|坐标|纬度|经度|定位"),
)
_CAMEL = re.compile(r"[A-Z]?[a-z]+[0-9]?|[A-Z]+(?![a-z])[0-9]?")


def _phrase(text: str) -> str:
    return r"[ _.-]?".join(re.escape(word) for word in text.split(" "))


def _english() -> dict[str, list[tuple[re.Pattern[str], str, str]]]:
    """First word -> what the label may be, the longest phrases first."""
    table: dict[str, list[tuple[str, str, str]]] = {}
    for kind, value, phrases in _ENGLISH:
        for phrase in phrases.split(";"):
            first = re.match(r"[a-z]+[0-9]?", phrase)
            table.setdefault(first[0] if first else phrase, []).append((phrase, kind, value))
    done: dict[str, list[tuple[re.Pattern[str], str, str]]] = {}
    for first_word, entries in table.items():
        entries.sort(key=lambda entry: -len(entry[0]))
        done[first_word] = [
            (re.compile(f"{_phrase(phrase)}(?![a-z])s?{_LINK}", re.I), kind, value)
            for phrase, kind, value in entries
        ]
    return done


_ENGLISH_TABLE = _english()
_FIRST_WORDS = frozenset(SECRET_WORDS) | frozenset(_ENGLISH_TABLE)
_CHINESE_LABELS = {
    word: (kind, value) for kind, value, words in reversed(_CHINESE) for word in words.split("|")
}
# Plain words only, the longest first: so the engine can skip to their first characters.
_CHINESE_ANY = re.compile("|".join(sorted(_CHINESE_LABELS, key=len, reverse=True)))
_CHINESE_LINK = re.compile(_CN_LINK)


def _trim(kind: str, value_kind: str, text: str, start: int, end: int, *, bare: bool) -> Finding | None:
    """The value behind a label, if its form is one that such a label has."""
    value = text[start:end]
    n_digits = sum("0" <= c <= "9" for c in value)
    if value_kind == "code":
        # Words without a digit are the sentence going on, but for short capitals: AB 12 34 56 C.
        words = value.split(" ")
        keep = 1
        while keep < len(words) and (
            _DIGIT.search(words[keep]) or (len(words[keep]) <= 2 and words[keep].isupper())
        ):
            keep += 1
        while keep > 1 and not _DIGIT.search(words[keep - 1]) and len(words[keep - 1]) > 1:
            keep -= 1
        value = " ".join(words[:keep])
        cut = value.rfind("/")
        if cut > 0 and not _DIGIT.search(value[cut:]):
            value = value[:cut]
        head = value.split(" ")[0]
        if len(head) > 3 and head.isalpha() and head != head.upper():
            return None
        if len(head) <= 3 and head.isalpha() and head.islower():
            return None
        n_digits = sum("0" <= c <= "9" for c in value)
        if kind in ("ACCOUNT",) and value.isalpha() and value.isupper() and len(value) in (8, 11):
            return Finding(start, start + len(value), kind, 0.6)  # SWIFT and BIC
        enough = 2 if kind == "DEVICE" and len(value) >= 8 else 3 if kind in ("ACCOUNT", "LICENCE") else 4
        if n_digits < enough:
            return None
        if len(value) < {"PASSPORT": 5, "LICENCE": 5, "VIN": 5, "NATIONALID": 7}.get(kind, 0):
            return None
    elif value_kind == "digits":
        if n_digits < (9 if kind == "SSN" else 7 if kind == "PHONE" else 4):
            return None
        if kind == "CARD" and n_digits != 4 and n_digits < 12:
            return None
        if re.fullmatch(DATE, value):
            return None
    elif value_kind == "token":
        if not n_digits and bare:
            return None
        if value.lower() in COMMON or not (
            n_digits or "_" in value or "." in value or "@" in value or len(value) >= 5
        ):
            return None
        value = value.rstrip(".-")
    elif value_kind == "plate":
        if n_digits < 2 or not any(c.isalpha() for c in value) or value != value.upper():
            value = value.split(" ")[0]
            if sum("0" <= c <= "9" for c in value) < 2 or not any(c.isalpha() for c in value):
                return None
    elif value_kind == "hash" and (n_digits < 3 or not any(c.isalpha() for c in value)):
        return None
    return Finding(start, start + len(value), kind, 0.85)


_COMMON_TEXT = (
    "is not and the for with your you are was name password from this that page form field must should "
    "will can be required string username admin root user system error failed success here there page "
    "button screen required invalid missing unique already taken between after before using via through "
    "handle login account"
)
COMMON = frozenset(_COMMON_TEXT.split())
# 1991年7月出生: the rare word is looked for, and a date in front of it.
_BORN = re.compile(r" ?(?:出生|生人|生，|生,|生于|诞生|生。)")
_DATE_BEFORE = re.compile(rf"(?:{DATE}|(?:19|20)[0-9]{{2}}年[0-9]{{1,2}}月)\Z")
_HANDLE_ALONE = re.compile(
    r"(?!(?:[vV][0-9.]+|[A-Za-z]+_?[0-9])\Z)"
    r"(?=[A-Za-z0-9._-]{0,40}[0-9])[A-Za-z][A-Za-z_-]{2,30}[._-]?[A-Za-z0-9_-]{1,30}\Z"
)
_MARKED = re.compile("[0-9_@]")
_COUNTED = re.compile("[位个分秒小天次条年月日%]")
_SIGN_NEEDED = frozenset(["USER", "SECRET"])
# Labels of a user that are ordinary words too.
_LOOSE_USER = frozenset(
    ["line", "signal", "handle", "login", "slack", "reddit", "twitch", "snap", "ig", "ins", "github", "git",
     "xbox", "discord", "twitter", "telegram", "kakao", "imessage"]
)  # fmt: skip


def _labelled(
    text: str, link_end: int, link: str, kind: str, value_kind: str, label: str = ""
) -> Finding | None:
    found = _COMPILED[value_kind].match(text, link_end)
    if kind == "SSN" and (not found or text[found.end() : found.end() + 1].isalnum()):
        # Where others have letters in such a number: ZZ 12 34 56 A, 131052-308T.
        found = _COMPILED["code"].match(text, link_end)
        value_kind = "code"
    if not found:
        return None
    named = kind == "USER" and label in ("user", "username", "login", "handle", "account")
    signed = any(c in link for c in ":：=#为是“\"'") or " is " in link or "叫" in link
    if kind in _SIGN_NEEDED and not signed and not (kind == "SECRET" and text[link_end - 1] == " "):
        # login jdoe42 is a name, and so is octo-fan22; login id1 and login table_2 are not.
        if kind == "USER" and named and _HANDLE_ALONE.match(found[0]):
            return _trim(kind, value_kind, text, found.start(), found.end(), bare=False)
        if (
            kind == "SECRET"
            and not link.isascii()
            and len(found[0]) >= 4
            and not _COUNTED.match(text, found.end())
        ):
            return _trim(kind, value_kind, text, found.start(), found.end(), bare=False)
        # 微信 wxid_abc, QQ12345: a handle right behind its label, told by its digits.
        chinese = kind == "USER" and (not link.isascii() or link.upper().startswith("QQ"))
        handle = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*[0-9_][A-Za-z0-9_-]*|[0-9]{5,11}", found[0])
        marked = found[0][0] == "@" or found[0][-5:-4] == "#"
        if not marked and not (chinese and handle and len(found[0]) >= 5):
            return None
    if label in _LOOSE_USER and not any(c in link for c in ":=#") and not _MARKED.search(found[0]):
        return None
    # login = lexer.token is code: what is assigned without quotes needs a digit to be a name.
    bare = "=" in link and not any(c in link for c in "\"'“")
    return _trim(kind, value_kind, text, found.start(), found.end(), bare=bare)


# Numbers of a bank, and as often the name of a login.
_LOGINS = frozenset(["账号", "帐号", "账户", "帐户", "帳號"])


def _behind_english(text: str, budget: Budget) -> Iterator[Finding]:
    done = 0  # up to here a secret reaches: what it is made of labels nothing
    for word in _CAMEL.finditer(text):
        lower = word[0].lower()
        if lower not in _FIRST_WORDS:
            continue
        start = word.start()
        if lower in SECRET_WORDS and start >= done:
            if not budget.spend(start):
                return
            one = secret_at(text, start, word.end(), lower)
            if one:
                done = one.end
                yield one
        entries = _ENGLISH_TABLE.get(lower)
        if entries is None or (
            start and text[start - 1].isascii() and text[start - 1].isalpha() and word[0][0].islower()
        ):
            continue
        if not budget.spend(start):
            return
        for pattern, kind, value_kind in entries:
            link = pattern.match(text, start)
            if link:
                one = _labelled(text, link.end(), link[0][len(lower) :], kind, value_kind, lower)
                if one:
                    yield one
                    break


def _behind_chinese(text: str, budget: Budget) -> Iterator[Finding]:
    for label in budget.each(_CHINESE_ANY.finditer(text)):
        if label[0][0].isascii():
            # vx, QQ, LINE: not inside another word.
            around = text[max(0, label.start() - 1) : label.start()], text[label.end() : label.end() + 1]
            if (around[0].isascii() and around[0].isalpha()) or "a" <= around[1] <= "z":
                continue
        link = _CHINESE_LINK.match(text, label.end())
        kind, value_kind = _CHINESE_LABELS[label[0]]
        one = _labelled(text, link.end(), label[0] + link[0], kind, value_kind) if link else None
        if one is None and link and label[0] in _LOGINS:
            one = _labelled(text, link.end(), label[0] + link[0], "USER", "token")
            if one and not any(c.isdigit() or c in "_@" for c in text[one.start : one.end]):
                one = None
        if one:
            yield one


def _born(text: str) -> Iterator[Finding]:
    low = 0
    for word in _BORN.finditer(text):
        # No character is looked at twice, however many of these words there are.
        low = max(low, word.start() - 32)
        date = _DATE_BEFORE.search(text[low : word.start()])
        if date:
            yield Finding(low + date.start(), word.start(), "BIRTHDATE", 0.9)
        low = word.end()


def scan(text: str) -> Iterator[Finding]:
    """Findings in a plain view (:func:`sllm.privacy.text.plain`)."""
    budget = Budget(text)
    yield from _behind_english(text, budget)
    if not text.isascii():
        yield from _behind_chinese(text, budget)
        yield from _born(text)
    yield from budget.rest("ACCOUNT")
