"""Where a text would send what stands in it: URLs, targets of links, HTML tags, scripts and style sheets.

A chat window loads images and previews of links by itself, so a value that is put into one of these is sent
to whoever wrote it. Windows read Markdown and HTML each a little differently: what follows is wider than
CommonMark 0.31, GitHub's autolinks (``cmark-gfm``), linkify-it's and the tokenizer of the HTML standard, and
each kind of place is followed by itself. Where one of them begins never ends another, for a window may know
the other alone. Where it is in doubt whether one has ended it has not.
"""

from __future__ import annotations

import re

from sllm.privacy.regex import lazy

__all__ = ["LinkPlaces"]

_BLANK_LINE = r"\n[ \t\r]*\n"

# What begins a URL in running text: a scheme, or a host name or an address with something after it. "1.QQ/"
# and "12.PC/" are items of a list.
_LABEL = r"(?:[^\W\d_][\d_-]{0,63}|[0-9]{3}[_-]{0,63})"
_HOST = rf"(?:{_LABEL}\.[^\W\d_]{{2}}|(?:[0-9]{{1,3}}\.){{3}}[0-9])[\w.@-]{{0,200}}[/?#&%=:\\]"
# Before it may stand what says where it ends: an autolink, the attribute of a tag, the target of a link that
# is a link for every program.
_URL = lazy(
    r"(?:(?:(?<!\\)(?P<angle><)|(?P<tag><[a-z][^<>]{0,200}=\s*[\"']?)"
    r"|(?<!\\)(?P<link>\[[^\[\]\\`<^\n]{0,200}\]\())[\w+.:/\\-]{0,80})?"
    rf"(?://|www\.|mailto:|sms:|xmpp:|https?:[/\\]|{_HOST})",
    re.I,
)
_TAG_OR_COMMENT = lazy(r"<[A-Za-z/!?]")
_URL_SIGN = lazy(r"[ \t\n\r\f\v<>()\[\]{}\"'\\]")
_CLOSED_BY = {"(": ")", "[": "]", "{": "}", '"': '"', "'": "'"}
_NOT_IN_URL = lazy(r"[^\w+.:/\\~?#@!$&*,;=%-]|[^\x00-\x7f]")
_WORD = 300  # characters, of what stands before the end of what _URL finds

_INDENT = r"[ \t\r\f\v]*(?:\n(?![ \t\r]*\n)[ \t\r\f\v]*)?"  # not over a blank line
_TARGET = lazy(rf"(?:\]|url)\({_INDENT}<?", re.I)
_IN_TARGET = lazy(rf"\\.|\({_INDENT}<?|\)|{_BLANK_LINE}", re.S)
_END_OF_ANGLE = lazy(r"(?<!\\)[>\n]")

# A reference definition begins a line, behind quotes and lists; a footnote is none.
_DEFINITION = lazy(rf"\n[ \t>*+\-.)0-9]{{0,200}}\[(?!\^)(?:\\.|[^\]\\]){{0,1000}}\]:{_INDENT}(<)?", re.S)
_SPACE = lazy(r"[ \t\n\r\f\v]")
_CONTEXT = 1300  # characters, of what stands before the end of a definition's label

# The states of the HTML standard's tokenizer within a tag, and where a character leads: " " stands for any
# space, "" for any other character; where neither is named, the state stays. ">" ends a tag, but in quotes.
_NAME, _BEFORE, _ATTRIBUTE, _AFTER, _VALUE, _UNQUOTED = "name", "before", "attribute", "after", "value", "un"
_DOUBLE, _SINGLE = '"', "'"
_NEXT: dict[str, dict[str, str]] = {
    _NAME: {" ": _BEFORE, "/": _BEFORE},
    _BEFORE: {" ": _BEFORE, "/": _BEFORE, "": _ATTRIBUTE},
    _ATTRIBUTE: {" ": _AFTER, "/": _BEFORE, "=": _VALUE},
    _AFTER: {" ": _AFTER, "/": _BEFORE, "=": _VALUE, "": _ATTRIBUTE},
    _VALUE: {" ": _VALUE, '"': _DOUBLE, "'": _SINGLE, "": _UNQUOTED},
    _UNQUOTED: {" ": _BEFORE},
    _DOUBLE: {'"': _BEFORE},
    _SINGLE: {"'": _BEFORE},
}
_QUOTED = frozenset([_DOUBLE, _SINGLE])
_TAG = lazy(r"<(?=[A-Za-z/])")
_TAG_TOKEN = lazy(r"</|<(?=[A-Za-z])|[ \t\n\r\f\v]+|[^ \t\n\r\f\v/=>\"'<]+|.", re.S)
_TAG_NAME = lazy(r"[^ \t\n\r\f/>]{0,64}")
_ORDINARY_NAME = lazy(r"[a-z][a-z0-9:-]*")
_OPEN_AT_END = lazy(r"\\?<\Z")
_TWO_LINES = 2


class LinkPlaces:
    """Follows a text as it is shown, and tells whether what comes next would stand in a link place.

    Link places are: a URL in running text, to the next ASCII space or the next tag; what stands in
    parentheses after ``](`` or ``url(``; the destination of a reference definition; an HTML tag with its
    attributes, and an autolink; the contents of ``<script>`` and ``<style>``.
    """

    def __init__(self) -> None:
        self._context = "\n"  # the last of the text
        self._url = _Url()
        self._depth = 0  # parentheses of a target that are open
        self._in_angle = False  # in a target, between < and >
        self._in_definition = False
        self._definition_end: re.Pattern[str] | None = None  # once its destination has begun
        self._tags = _Tags()

    @property
    def inside(self) -> bool:
        """Whether the next character would stand in a link place."""
        return self._url.inside or self._depth > 0 or self._in_definition or self._tags.inside

    def begins_with(self, value: str) -> bool:
        """Whether ``value``, put here, would itself become a link's target."""
        return self._context[-1] == "]" and value.startswith(("(", ":"))

    def feed(self, text: str, *, restored: bool = False) -> None:
        """Takes the next piece of the text as it is shown.

        Args:
            text: the piece.
            restored: it is a value. A URL in it leads where its owner meant it to, and ends with the first
                character that no URL has, as in Chinese, where no space follows.

        """
        self._url.feed(text, restored)
        self._follow_target(text)
        self._follow_definition(text)
        self._tags.feed(text)
        self._context = (self._context + text)[-_CONTEXT:]

    def _follow_target(self, text: str) -> None:
        before = self._context[-4:]
        body = before + text
        at = len(before) if self._depth else 0
        while True:
            if self._in_angle:
                end = _END_OF_ANGLE.search(body, at)
                if end is None:
                    return
                self._in_angle, at = False, end.start() if end[0] == "\n" else end.end()
            found = (_IN_TARGET if self._depth else _TARGET).search(body, at)
            if found is None:
                return
            at = found.end()
            if at <= len(before) or found[0][0] == "\\":
                continue
            if found[0][0] == "\n":
                self._depth = 0
            elif found[0] == ")":
                self._depth -= 1
            else:
                self._depth += 1
                self._in_angle = found[0][-1] == "<"

    def _follow_definition(self, text: str) -> None:
        body = self._context + text
        at = 0
        if self._definition_end is not None:
            end = self._definition_end.search(text)
            if end is None:
                return
            at = len(self._context) + end.start()
        self._in_definition, self._definition_end = False, None
        while (found := _DEFINITION.search(body, at)) is not None:
            at = found.end()
            if at < len(self._context):
                continue
            self._in_definition = True
            if at == len(body) and not found[1]:
                return  # its destination is still to come
            pattern = _END_OF_ANGLE if found[1] else _SPACE
            end = pattern.search(body, at)
            if end is None:
                self._definition_end = pattern
                return
            self._in_definition, at = False, end.start()


class _Url:
    """A URL in running text.

    Attributes:
        inside: whether one is open.

    """

    def __init__(self) -> None:
        self.inside = False
        self._word = ""  # the last of what stands behind the last URL
        self._own = False  # it began in a value
        self._ends = ""  # of ">)" those that end it
        self._open = ""  # what has to be closed before a tag ends it
        self._in_tag = False  # it began in an attribute

    def feed(self, text: str, restored: bool) -> None:
        body = self._word + text
        at = len(self._word) if self.inside else 0
        while True:
            if not self.inside:
                found = _URL.search(body, at)
                if found is None:
                    # An address of mail that is a value is no host.
                    self._word = "" if restored and "@" in text else body[at:][-_WORD:]
                    return
                self.inside, self._own, at = True, restored, found.end()
                self._ends = ">" * bool(found["angle"]) + ")" * bool(found["link"])
                # In brackets and quotes a "<" may be the URL's; quotes around an attribute are not.
                self._open, self._in_tag = "", bool(found["tag"])
            at = self._end(body, at)
            if self.inside:
                self._word = ""
                return

    def _end(self, body: str, at: int) -> int:
        """The offset at which the URL ends."""
        for sign in (_NOT_IN_URL if self._own else _URL_SIGN).finditer(body, at):
            char = sign[0]
            self.inside = not (
                self._own
                or char.isspace()
                or (char in ">)" and char in self._ends)
                or (char == "<" and not self._open and _TAG_OR_COMMENT.match(body, sign.start()))
            )
            if not self.inside:
                return sign.start()
            if char in self._open:
                self._open = self._open.replace(char, "")
            elif not self._in_tag or char not in "\"'":
                self._open += _CLOSED_BY.get(char, "")
            if char in "(<\\":
                self._ends = self._ends.replace(")", "")
        return len(body)


class _Tags:
    """HTML tags, each from its ``<``, and elements whose contents are programs or styles.

    What is a tag to a browser depends on what was one before: a ``<`` within quotes is none. So each ``<`` is
    followed as if it began one, beside those that are open, and one of them is what the browser sees.
    """

    def __init__(self) -> None:
        self._states: set[str] = set()
        self._odd = True  # no name among those that are open is one that HTML may have: "<n;"
        self._closing = ""  # the name of the newest tag, if that ends an element
        # Counted, for within a comment in it a script holds scripts.
        self._raw = {"script": 0, "style": 0}
        self._rest = ""  # a "<" at the end of what was taken, and a backslash before it

    @property
    def inside(self) -> bool:
        """Whether a tag is open, or one of those elements."""
        return bool(self._states) or any(self._raw.values())

    def feed(self, text: str) -> None:
        text = self._rest + text
        rest = _OPEN_AT_END.search(text)
        self._rest = rest[0] if rest else ""
        end = len(text) - len(self._rest)
        at = 0
        while at < end:
            if not self._states:
                found = _TAG.search(text, at)
                if found is None:
                    return
                at = found.start()
            token = _TAG_TOKEN.match(text, at)
            assert token is not None
            at = token.end()
            self._take(token[0])
            if _TAG.match(text, token.start()):
                self._begin(text, token)

    def _take(self, token: str) -> None:
        kind = " " if token.isspace() else token
        for char in kind if kind == "</" else (kind,):
            self._states = {
                _NEXT[state].get(char, _NEXT[state].get("", state))
                for state in self._states
                if char != ">" or state in _QUOTED
            }
        if self._odd and token.count("\n") >= _TWO_LINES:
            # A blank line: what only looked like a tag, as in "i <n;", ends there.
            self._states &= _QUOTED
        if token == ">":
            if not self._states and self._raw.get(self._closing):
                self._raw[self._closing] -= 1
            self._closing = ""

    def _begin(self, text: str, token: re.Match[str]) -> None:
        found = _TAG_NAME.match(text, token.end())
        assert found is not None
        name = found[0].lower()
        self._odd = (self._odd or not self._states) and _ORDINARY_NAME.fullmatch(name) is None
        self._states.add(_NAME)
        # Where Markdown comes first, "\</style>" ends no element.
        escaped = token.start() > 0 and text[token.start() - 1] == "\\"
        closes = token[0] == "</" and not escaped and found.end() < len(text)
        self._closing = name if closes else ""
        if token[0] == "<" and name in self._raw:
            self._raw[name] += 1
