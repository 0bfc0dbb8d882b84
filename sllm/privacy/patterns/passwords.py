"""Passwords, keys and codes that words announce, and what only looks like one: code, examples, masks."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from sllm.privacy import data
from sllm.privacy.findings import Budget, Finding
from sllm.privacy.patterns.codes import entropy, looks_random
from sllm.privacy.regex import lazy

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SECRET_WORDS", "scan", "secret_at"]

SECRET_WORDS = {
    "password", "passwd", "passwort", "pwd", "passphrase", "secret", "token", "apikey", "key", "credential",
    "credentials",
    "pass", "pw", "psw", "auth", "passcode", "mnemonic", "contrasena", "signature", "sig", "pat", "jwt",
    "cookie", "session",
}  # fmt: skip
# "key", "auth" and the like alone can mean too many things: they need one of these before them.
_KEY_BEFORE = lazy(
    r"(?:api|access|secret|private|encryption|license|account|auth|app|client|service|shared|master|signing|"
    r"ssh|aes|aws|product|activation|session|user|admin|root|db|basic|storage|subscription|wi-?fi|wlan|wpa2?|"
    r"network|router|decryption|host|deploy|bot|webhook)"
    # In the same word, or as the key of the block that this one begins: api:\n  key: ...
    r"(?:[ _.-]?|[\"']?[ ]?[:=][ ]?\{?[ ]?\r?\n?[ \t]{0,16}[\"']?)\Z",
    re.I,
)
_WEAK_SECRET_WORDS = {"key", "auth", "signature", "sig", "cookie", "session", "pass", "pw", "pat"}
_SECRET_LINK = lazy(
    r"(?:[ _-]?(?:key|id|value|code|token|secret|hash))?[\"'”’*`\])]{0,3}[ \t]{0,3}"
    r"(?P<sign>(?::=|=>|==|->|[:：=>])|(?:is|was|are|为|是)(?: now|"
    r" set to)?(?=[ :：\"'“]))?[ \t:：]{0,24}(?P<quote>[\"'“‘`*「]{0,3})",
    re.I,
)
_CN_SECRET = lazy(
    r"(?:密码|口令|密钥|秘钥|令牌|授权码|私钥|公钥|通行码|暗号|访问凭证|密匙|激活码|"
    r"注册码)(?:[(（][^()（）\n]{1,8}[)）])?"
    r"[\"'”’]{0,2}[ \t]{0,2}(?P<sign>(?:应该是|改成了?|改为|换成|设为|设成|设置为|设置成|就是|"
    r"还是|都是|[:：=]|为|是)[ \t]{0,2}){1,2}"
    r"(?P<quote>[\"'“‘「`]{0,2})[ \t]?"
)
_SECRET_VALUE = lazy(r"[!-~]{4,200}")
# A quote or a bracket belongs to the value, unless it closes what is around it.
_CLOSED = r"(?=[\s,;:.!?)\]}>/\\<|&\"'`*，。；：、）」”]|\Z)"
_VALUE_END = lazy(
    rf"[\"'`]{_CLOSED}|<(?=/|!|(?:br|p|li|td|tr|div|span|b|i|a|pre|code)[ />])|/?>(?=\Z)|[,;](?=\Z)"
    r"|\\n|[&;](?=[A-Za-z_]+=)"
)
_CLOSING = {quote: lazy(rf"(?<!\\){quote}{_CLOSED}") for quote in "\"'`*”’」"} | {"*": lazy(r"\*")}
# Words in Chinese with digits after them: 我爱北京2024Abc. What a sentence goes on with is none: 见第3页.
_HAN_SECRET = lazy(
    "(?![见请由在到取位是为和用按如即从与共]|默认|参考|保存|不变|改成)[\u4e00-\u9fff]{2,12}"
    "(?=[!-~]{0,8}[0-9])(?=[!-~]{0,8}[A-Za-z0-9@#$%!_]{3})[!-~]{3,40}(?![!-~\u4e00-\u9fff])"
)
_HAN_QUOTED = lazy("[\u4e00-\u9fff!-~]{4,40}?(?=[\"'”」])")
_GAP = lazy("[ -]")
_HAN_PIN = lazy(r"密码[ \t是为：:]{0,3}(?=[0-9]{4,8}#?(?![0-9A-Za-z位个年]))(?P<pin>[0-9]{4,8}#?)")
# Words that a lone run of mixed characters, some way further on, belongs to.
_SPOKEN_SECRET = lazy(
    r"(?<![A-Za-z0-9_.])(?:[Pp]assword|[Pp]asscode|[Pp]assphrase|[Cc]redentials?|[Ss]ecret|PIN|[Pp]wd|"
    r"[Ll]ogin|"
    r"[Tt]oken(?!s|[-_ ](?:ids?|grid|types?|counts?|embed|limit|index)))s?(?![A-Za-z_])|密码|口令|密钥"
)
_LONE = lazy(r"(?<![^\s\"'“‘(（：:，,为是])[!-~]{8,48}(?=[\s\"'”’)），。；]|\Z)")
# Words of sentences: none is in the list of BIP 39, from which recovery phrases are made.
_OF_SENTENCES_TEXT = (
    "the and of to in is are not it for be or on at has was by as an should from too so do does we my our"
)
_OF_SENTENCES = frozenset(_OF_SENTENCES_TEXT.split())
_PHRASE = lazy(
    r"(?:[Pp]assphrase|[Ss]eed phrase|[Rr]ecovery phrase|[Mm]nemonic(?: phrase)?|助记词|"
    r"恢复短语)[^A-Za-z\n]{0,4}(?:is|are|was)?[ :：]{0,3}(?P<quote>[\"'“]?)(?<![A-Za-z])"
    r"(?P<value>[a-z]{2,12}(?:[ -][a-z]{2,12}){3,24})"
)
_HAN_SECRET_SPACE = lazy(r"(?:密码|口令|密钥|令牌|授权码)[ \t]{0,2}(?=[A-Za-z0-9][!-~]{5})")
_NOT_SECRET = lazy(
    r"(?:none|null|nil|true|false|undefined|str|string|int|bool|bytes|optional\[?.*|required|text|"
    r"varchar.*|char|any|void|self.*"
    r"|your.*|my[_-]?(?:password|secret|token|key).*|x{3,}[-_x]*|\*{3,}.*|\.{3,}.*|<.*|\$.*|%.*|"
    r"\{.*|\[.*|\(.*|@.*|#.*|//.*|https?:.*|&.*"
    r"|password[0-9]{0,1}|passwd|secret|token|example.*|placeholder.*|changeme|redacted.*|"
    r"hidden.*|process\.env.*|os\.environ.*"
    r"|env\..*|config.*|settings.*|getenv.*|input.*|args\..*|request.*|params.*|data\..*|this\..*|"
    r"import.*|function.*|lambda.*)\Z",
    re.I | re.S,
)
_CODE_EXPRESSION = lazy(r"[A-Za-z_][A-Za-z0-9_]*(?:(?:\.|->|::)[A-Za-z_][A-Za-z0-9_]*)*(?:\(.*|\[.*)\Z", re.S)
_IDENTIFIER = lazy(r"[a-z]+[0-9]{0,2}(?:_[a-z]+[0-9]{0,2}|_[0-9]{1,2})+\Z")
_DOTTED = lazy(r"[A-Za-z_]+(?:\.[A-Za-z_]+)+[;,)]*\Z")
_CLASSES = tuple(lazy(chars) for chars in ("[a-z]", "[A-Z]", "[0-9]", "[^A-Za-z0-9_.-]"))


def _classes(value: str) -> int:
    return sum(pattern.search(value) is not None for pattern in _CLASSES)


def _secret(text: str, at: int, quote: str, strong: bool, sign: bool) -> Finding | None:
    """The secret that begins at an offset, if there is one."""
    opening = quote[-1:]
    closing = {"“": "”", "‘": "’", "「": "」"}.get(opening, opening)
    han = (_HAN_QUOTED if opening else _HAN_SECRET).match(text, at) if strong and sign else None
    if han and not han[0].isascii() and (not opening or text[han.end()] == closing):
        return Finding(at, at + len(han[0].rstrip(".,;:)]}")), "SECRET", 0.7)
    found = _SECRET_VALUE.match(text, at)
    if not found:
        return None
    value = found[0]
    quoted = False
    if opening:
        close = _CLOSING[closing].search(text, at, found.end() + 1)
        cut = close.start() - at if close else value.find(closing)
        if cut >= 0:
            value = value[:cut]
            quoted = True
    if not quoted:
        stop = _VALUE_END.search(value)
        if stop:
            value = value[: stop.start()]
        value = value.rstrip(".,;:)]}")
    mixed = len(value) >= 8 and _THREE.match(value) is not None and not _LOOKS_LIKE_CODE.search(value)
    if len(value) < 4 or (_NOT_SECRET.match(value) and not mixed):
        return None
    digit = _CLASSES[2].search(value) is not None
    kinds = _classes(value)
    if not strong and not quoted and _IDENTIFIER.match(value):
        return None
    if (_CODE_EXPRESSION.match(value) and not mixed) or (_DOTTED.match(value) and not quoted):
        return None
    if strong:
        if quoted:
            good = not (value.isalpha() and value.islower() and not sign)
        elif sign:
            good = kinds >= 2 and (
                digit or any(not c.isalnum() and c not in "_-./" for c in value) or len(value) >= 12
            )
            good = good or (value.isdigit() and len(value) >= 4)
        else:
            good = digit and kinds >= 2 and len(value) >= 6
    elif len(value) >= 20 and (looks_random(value) or (_ALNUM.match(value) and _is_coded(value))):
        good = True
    elif quoted:
        good = len(value) >= 8 and digit and kinds >= 2 and " " not in value
    else:
        good = len(value) >= 8 and digit and kinds >= 2 and sign and entropy(value) >= 2.8
    return Finding(at, at + len(value), "SECRET", 0.8) if good else None


def secret_at(text: str, start: int, end: int, word: str) -> Finding | None:
    """The secret after one of :data:`SECRET_WORDS`, which is ``text[start:end]``, if there is one."""
    strong = word in (
        "password",
        "passwd",
        "passwort",
        "pwd",
        "passphrase",
        "passcode",
        "psw",
        "contrasena",
        "pass",
        "pw",
    )
    if word in _WEAK_SECRET_WORDS and not strong and not _KEY_BEFORE.search(text[max(0, start - 40) : start]):
        return None
    link = _SECRET_LINK.match(text, end)
    if not link:
        return None
    if text.startswith("::", link.start("sign")) and link["sign"] == ":":
        return None  # pass::Fuse is a name of code
    sign = link["sign"] is not None
    if word in ("pass", "pw") and not (sign and link["sign"] in (":", "=", "：")):
        return None
    if not sign and not link["quote"] and text[link.end() - 1 : link.end()] not in (" ", "\t"):
        return None
    # "is" needs a value that cannot be the rest of a sentence.
    worded = sign and link["sign"][:1].isalpha()
    return _secret(text, link.end(), link["quote"], strong, sign and not worded)


_LOGIN_PAIR = lazy(
    r"(?:login|Login|credential|Credential|账号|帐号|user|User)s?[ :：=]{1,3}[^\s/:=]{3,40} ?/ ?(?=[!-~]{6})"
)
_LOOKS_LIKE_CODE = lazy(
    r"\A[A-Za-z_][A-Za-z0-9_.]*[(\[].*[)\];]\Z|\$\{|\{\{|\A<.*>\Z|\A--|\A\$[A-Z_]+\Z|://|\\|\.(?:com|org|net|"
    r"io|py|js|ts|md|json|txt|html|cn|log|yml)\b"
    # cur->nb[1], std::string, torch.zeros(1, os.environ["A", r"[0-9]", :meth:`peek`
    r"|[A-Za-z_]->[A-Za-z_]|[A-Za-z_]::[A-Za-z_]|[A-Za-z_]\[[^\]]{0,24}\]"
    r"|[A-Za-z_]\([^()]{0,40}\)|\A[A-Za-z_]\w*\.\w[\w.]*\(|\A[A-Za-z_][\w.]*[\[(][\"']|\A[rbf]{1,2}[\"']|\A[a-z]+:`"
    r"|==|!=|&&|\|\||\A[a-z_]{2,}\.[a-z_]{3,}\Z"
)
_SPOKEN_WORDS = ("ass", "redential", "ecret", "PIN", "wd", "ogin", "oken", "密码", "口令", "密钥")


def _spoken(text: str) -> Iterator[Finding]:
    """Passwords that a sentence mentions before it gives them: "the temporary one is ..."."""
    done = 0
    if not any(word in text for word in _SPOKEN_WORDS):
        return
    budget = Budget(text)
    for word in budget.each(_SPOKEN_SECRET.finditer(text)):
        if word.start() < done:
            continue
        stop = text.find("\n", word.end(), word.end() + 90)
        stop = word.end() + 90 if stop < 0 else stop
        done = stop - 48
        for lone in _LONE.finditer(text, word.end(), stop):
            value = lone[0].rstrip(".,;:!?\"'`")
            if _is_lone_secret(value):
                yield Finding(lone.start(), lone.start() + len(value), "SECRET", 0.6)
    yield from budget.rest("SECRET")
    for found in _AS_PASSWORD.finditer(text):
        low = max(0, found.start() - 44)
        ahead = _WORD_AHEAD.search(text[low : found.start()])
        if ahead and _is_lone_secret(ahead[1]):
            yield Finding(low + ahead.start(1), low + ahead.end(1), "SECRET", 0.6)


_ALNUM = lazy(r"[A-Za-z0-9]+\Z")
_OF_MODULE = lazy(r"[a-z_][a-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)+\Z")
_NAMED_SECRET = lazy(
    r"(?:secret|password|passwd|pwd|token|credential|api[_-]?key|access[_-]?key|private[_-]?key)", re.I
)


def _is_coded(value: str) -> bool:
    """Whether digits and letters are mixed as in hexadecimal."""
    return _classes(value) >= 2 and _CLASSES[2].search(value) is not None and entropy(value) >= 3


def _is_lone_secret(value: str) -> bool:
    """Whether a word that only the sentence around it calls a secret looks like one."""
    return (
        len(value) >= 8
        and _MIXED.match(value) is not None
        and not _LOOKS_LIKE_CODE.search(value)
        and (_THREE.match(value) is not None or not _NOT_SECRET.match(value))
        and entropy(value) >= 2.8
    )


_AS_PASSWORD = lazy(
    r" as (?:the |my |your |a |his |her |new )*(?:password|passcode|secret|PIN|"
    r"passphrase)(?![A-Za-z])"
)
_WORD_AHEAD = lazy(r"(?:\A|[\s\"'“])([!-~]{8,40})\Z")
# Lower case, capitals and digits.
_THREE = lazy(r"(?=.*[0-9])(?=.*[a-z])(?=.*[A-Z])")
_MIXED = lazy(r"(?=.*[0-9])(?=.*[a-z])(?=.*[A-Z])|(?=.*[0-9])(?=.*[A-Za-z])(?=.*[!#$%^&*?~+])")


# A sign of assignment with a value, and the name before it: in code, configuration, environments and JSON.
_ASSIGNED = lazy(
    r"[:=]>?[ \t]{0,4}[\"'`]?(?P<value>[A-Za-z0-9+/_.~-]{20,128}={0,2})(?![A-Za-z0-9+/_.~(\[:-])"
)
_NAME_BEFORE = lazy(r"[A-Za-z0-9]{1,40}(?=[\"'\])]{0,2}[ \t]{0,20}:?\Z)")


@functools.cache
def _not_secret_names() -> frozenset[str]:
    return frozenset(data.table("secrets")["not secret"])


def _assigned(text: str) -> Iterator[Finding]:
    """Values of 20 and more characters that look random, whatever they are assigned to, except for checksums,
    ids and the like.
    """
    for found in _ASSIGNED.finditer(text):
        before = text[max(0, found.start() - 160) : found.start()]
        name = _NAME_BEFORE.search(before)
        words = _NAME_WORD.findall(name[0]) if name else []
        if not looks_random(found["value"]) and not (
            # The default of a variable of that name, the value of such an entry.
            words[-1:] in (["default"], ["value"])
            and _NAMED_SECRET.search(before)
            and _ALNUM.match(found["value"])
            and _is_coded(found["value"])
        ):
            continue
        if (
            name
            and not _OF_MODULE.match(found["value"])
            and (not words or words[-1].lower() not in _not_secret_names())
        ):
            yield Finding(found.start("value"), found.end("value"), "SECRET", 0.7)


_NAME_WORD = lazy(r"[A-Z]?[a-z]+[0-9]{0,3}|[A-Z]+(?![a-z])[0-9]{0,3}")


def scan(text: str) -> Iterator[Finding]:
    """Secrets in a plain view: in a pair with a login, in a sentence, and after Chinese labels."""
    if "/" in text:
        for found in _LOGIN_PAIR.finditer(text):
            one = _secret(text, found.end(), "", True, False)
            if one:
                yield one
    phrased = any(word in text for word in ("hrase", "nemonic", "助记词", "恢复短语"))
    for found in _PHRASE.finditer(text) if phrased else ():
        # Words of a sentence are not a phrase: "the passphrase has to be long and hard to guess".
        if found["quote"] or _OF_SENTENCES.isdisjoint(_GAP.split(found["value"])):
            yield Finding(found.start("value"), found.end("value"), "SECRET", 0.8)
    yield from _assigned(text)
    yield from _spoken(text)
    if text.isascii():
        return
    for link in _CN_SECRET.finditer(text):
        one = _secret(text, link.end(), link["quote"], True, True)
        if one:
            yield one
    for link in _HAN_SECRET_SPACE.finditer(text):
        one = _secret(text, link.end(), "", True, False)
        if one:
            yield one
    for found in _HAN_PIN.finditer(text):
        yield Finding(found.start("pin"), found.end("pin"), "SECRET", 0.7)
