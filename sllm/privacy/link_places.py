"""Where a text would send what stands in it: URLs, targets of links, HTML tags, scripts and style sheets.

A chat window loads images and previews of links by itself, so a value that is put into one of these is sent
to whoever wrote it. Windows read Markdown and HTML each a little differently: what follows is wider than
CommonMark 0.31, GitHub's autolinks (``cmark-gfm``), linkify-it's and the tokenizer of the HTML standard, and
each kind of place is followed by itself. Where one of them begins never ends another, for a window may know
the other alone. Everything is decided by what stands before: it is the same however the text is cut.
"""

from __future__ import annotations

from sllm.privacy.regex import lazy

__all__ = ["LinkPlaces"]

_SPACE = frozenset(" \t\n\r\f\v")
_RECENT = 8  # characters, at least as many as the longest of _BEGINNINGS has
_MAX_LABEL = 64  # characters between the dots of a host name

# What begins a URL in running text, besides a host name with something after it.
_BEGINNINGS = ("//", "www.", "mailto:", "sms:", "xmpp:", "http:/", "https:/", "http:\\", "https:\\")
_LAST_OF_BEGINNINGS = frozenset(one[-1] for one in _BEGINNINGS)
_AFTER_HOST = frozenset("/?#&%=:\\")
_IN_HOST = frozenset("-_:@")
_IN_SCHEME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+.-:/\\")
_IN_URL = _IN_SCHEME | frozenset("_~?#@!$&*,;=%")
_CLOSED_BY = {"(": ")", "[": "]", "{": "}", '"': '"', "'": "'"}

# What may stand before a reference definition on its line: quotes and lists.
_LINE_PREFIX = frozenset(" \t>*+-.)0123456789")
# What may make of "[text](target)" something else than a link.
_NOT_SIMPLE = frozenset("\\`<^\n")

_RAW_ELEMENTS = ("script", "style")
_TAG_NAME = lazy(r"/?[a-z][a-z0-9:-]*")
_MAX_TAG_NAME = 64

# Characters that change nothing while no place is open and no word may become one.
_PLAIN = lazy(r"[^\n<>()\[\]:/@.\\`^]+")


class LinkPlaces:
    """Follows a text as it is shown, and tells whether what comes next would stand in a link place.

    Link places are: a URL in running text, to the next ASCII space or the next tag; what stands in
    parentheses after ``](`` or ``url(``; the destination of a reference definition; an HTML tag with its
    attributes, and an autolink; the contents of ``<script>`` and ``<style>``.
    """

    def __init__(self) -> None:
        self._url = _Url()
        self._target = _Target()
        self._definition = _Definition()
        self._tags = _Tags()
        self._last = ""
        self._escaped = False  # whether a backslash stands before the next character
        self._blank = True  # whether this line has only spaces so far

    @property
    def inside(self) -> bool:
        """Whether the next character would stand in a link place."""
        return self._url.inside or self._target.depth > 0 or self._definition.inside or self._tags.inside

    def begins_with(self, value: str) -> bool:
        """Whether ``value``, put here, would itself become a link's target."""
        return self._last == "]" and value.startswith(("(", ":"))

    def feed(self, text: str, *, restored: bool = False) -> None:
        """Takes the next piece of the text as it is shown.

        Args:
            text: the piece.
            restored: it is a value. A URL in it leads where its owner meant it to, and ends with the first
                character that no URL has, as in Chinese, where no space follows.

        """
        at = 0
        while at < len(text):
            plain = _PLAIN.match(text, at) if self._idle else None
            if plain is None:
                self._take(text[at], restored)
                at += 1
            else:
                self._skip(plain[0])
                at = plain.end()

    @property
    def _idle(self) -> bool:
        """Whether plain characters change nothing but what stood last."""
        return not (
            self._url.begun
            or self._target.depth
            or self._definition.begun
            or self._tags.inside
            or self._tags.begins
        )

    def _skip(self, text: str) -> None:
        self._url.skip(text)
        self._target.skip()
        self._definition.skip(text)
        self._last, self._escaped = text[-1], False
        self._blank = self._blank and not text.strip(" \t\r")

    def _take(self, char: str, restored: bool) -> None:
        last, escaped = self._last, self._escaped
        self._last = char
        self._escaped = char == "\\" and not escaped
        if char == "\n":
            if self._blank:
                self._target.end()
                self._definition.end()
                self._tags.end_paragraph()
            self._blank = True
        elif char not in " \t\r":
            self._blank = False
        was_url = self._url.inside
        self._url.take(char, last, escaped, restored, self._tags.inside)
        if self._target.take(char, escaped, self._url, was_url):
            self._url.end()
        self._definition.take(char, last, escaped)
        self._tags.take(char, last, escaped)


class _Url:
    """A URL in running text.

    Attributes:
        inside: whether one is open.

    """

    def __init__(self) -> None:
        self.inside = False
        self._recent = ""  # the last characters, in lower case
        self._own = False  # it began in a value
        self._open = ""  # what has to be closed first: in brackets and quotes a "<" may be the URL's
        self._quotes = True  # whether quotes count: not where the URL stands in a tag
        self._in_angle = False  # a "<" stands before, and since then what a scheme may have
        self._angle = False  # it began like that: an autolink, which ">" ends
        self._letters = -1  # right after the last dot of this word; -1: there is none, or a digit came first
        self._dots = 0
        self._label = 0  # of its last label: how many digits, and 3 from three digits or the first letter on
        self._host = False  # the word so far may be the name of a host
        self._mail = False  # it holds an address that is a value

    @property
    def begun(self) -> bool:
        """Whether a URL is open, or a word that may become one."""
        return self.inside or self._label > 0 or self._dots > 0 or self._mail or self._in_angle

    def follows(self, text: str) -> bool:
        """Whether ``text``, in lower case, is what stood last."""
        return self._recent.endswith(text)

    def end(self) -> None:
        """The URL, and the word, has ended."""
        self.inside = self._own = self._angle = False
        self._open = ""
        self._end_word()

    def _end_word(self) -> None:
        self._letters, self._dots, self._label, self._host, self._mail = -1, 0, 0, False, False

    def skip(self, text: str) -> None:
        self._recent = (self._recent + text[-_RECENT:].lower())[-_RECENT:]
        for char in reversed(text[-_MAX_LABEL:]):
            if char.isalnum():
                self._label = 3 if char.isalpha() else min(self._label + 1, 3)
            elif char not in "-_":
                break

    def take(self, char: str, last: str, escaped: bool, restored: bool, in_tag: bool) -> None:
        self._recent = (self._recent + char.lower())[-_RECENT:]
        if char in _SPACE:
            self._in_angle = False
            self.end()
            return
        if self.inside and (
            (last == "<" and not self._open and _begins_tag(char))
            or (self._angle and char == ">")
            or (self._own and char not in _IN_URL)
        ):
            self.end()
        if self.inside:
            self._nest(char)
        else:
            self._begin(char, last, restored)
            self._quotes = not in_tag
        self._in_angle = (char == "<" and not escaped) or (self._in_angle and char in _IN_SCHEME)

    def _nest(self, char: str) -> None:
        """Brackets, each kind by itself as in linkify-it, and quotes."""
        if char in self._open:
            self._open = self._open.replace(char, "")
        elif char in _CLOSED_BY and (self._quotes or char not in "'\""):
            self._open += _CLOSED_BY[char]

    def _begin(self, char: str, last: str, restored: bool) -> None:
        if (char in _LAST_OF_BEGINNINGS and self._recent.endswith(_BEGINNINGS)) or (
            self._host and char in _AFTER_HOST
        ):
            self.inside, self._own, self._angle = True, restored, self._in_angle
        elif char == ".":
            # "1.QQ/" and "12.PC/" are items of a list.
            self._letters = 0 if self._label >= 3 else -1
            self._dots += 1
            self._label = 0
        elif char.isalpha():
            self._label = 3
            if self._letters >= 0:
                self._letters += 1
                self._host = self._host or (self._letters >= 2 and not self._mail)
        elif char.isalnum():
            self._label = min(self._label + 1, 3)
            self._letters = -1
            self._host = self._host or self._dots >= 3  # 192.0.2.1
        elif char == "@" and restored:
            self._mail = True
        elif char not in _IN_HOST or last in _SPACE:
            self._end_word()


class _Target:
    """The parentheses of a link or an image, ``](...)``, or of ``url(...)`` in a style.

    Attributes:
        depth: how many are open.

    """

    def __init__(self) -> None:
        self.depth = 0
        self._start = False  # nothing but spaces stands in them so far
        self._angle = False  # between < and >
        self._label = False  # within [ and ], and nothing is there that could end a link
        self._labelled = False  # that has just ended
        self._simple = False  # a link for certain, which the parenthesis ends for everybody

    def end(self) -> None:
        self.depth, self._angle = 0, False

    def skip(self) -> None:
        self._labelled = False

    def take(self, char: str, escaped: bool, url: _Url, was_url: bool) -> bool:
        """Takes a character; whether it ends a link that begins with a URL, and the URL with it."""
        labelled, self._labelled = self._labelled, False
        if self.depth:
            return self._take_inside(char, escaped)
        if char == "(" and url.follows("]("):
            # A URL that stands before the parenthesis may go on behind it.
            self.depth, self._start, self._simple = 1, True, labelled and not was_url
        elif char == "(" and url.follows("url("):
            self.depth, self._start, self._simple = 1, True, False
        elif char == "]":
            self._labelled, self._label = self._label and not escaped, False
        elif char == "[":
            self._label = not escaped
        elif char in _NOT_SIMPLE:
            self._label = False
        return False

    def _take_inside(self, char: str, escaped: bool) -> bool:
        start, self._start = self._start, self._start and char in _SPACE
        if escaped or char == "\\":
            self._simple = False
        elif self._angle:
            self._angle = char not in ">\n"
        elif char == "<" and start:
            self._angle, self._simple = True, False
        elif char == "(":
            self.depth += 1
            self._start, self._simple = True, False
        elif char == ")":
            self.depth -= 1
            return self._simple and self.depth == 0
        elif char in _SPACE and not start:
            self._simple = False
        return False


class _Definition:
    """A reference definition, which begins a line: ``[label]: destination``."""

    def __init__(self) -> None:
        self._prefix = True  # only what may stand before a definition is on this line
        self._label = False
        self._labelled = False  # it has just ended
        self._before = False  # spaces before the destination
        self._in = False
        self._angle = False

    @property
    def inside(self) -> bool:
        """Whether the next character may be the destination's."""
        return self._before or self._in

    @property
    def begun(self) -> bool:
        return self._label or self._before or self._in

    def end(self) -> None:
        self._label = self._labelled = self._before = self._in = False

    def skip(self, text: str) -> None:
        self._labelled = False
        self._prefix = self._prefix and _LINE_PREFIX.issuperset(text)

    def take(self, char: str, last: str, escaped: bool) -> None:
        labelled, self._labelled = self._labelled, False
        if self._before:
            if char not in _SPACE:
                self._before, self._in, self._angle = False, True, char == "<"
        elif self._in:
            self._in = escaped or ((char not in ">\n") if self._angle else (char not in _SPACE))
        elif labelled and char == ":":
            self._before = True
        elif self._label:
            if char == "]" and not escaped:
                self._label, self._labelled = False, True
            elif char == "^" and last == "[":
                self._label = False  # a footnote: what follows is text
        elif char == "[" and self._prefix:
            self._label = True
        self._prefix = char == "\n" or (self._prefix and char in _LINE_PREFIX)


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


class _Tags:
    """HTML tags, each from its ``<``, and elements whose contents are programs or styles.

    What is a tag to a browser depends on what was one before: a ``<`` within quotes is none. So each ``<`` is
    followed as if it began one, beside those that are open, and one of them is what the browser sees.
    """

    def __init__(self) -> None:
        self._states: set[str] = set()
        self._name: str | None = None  # of the newest, as long as it is not complete
        self._odd = True  # no name among those that are open is one that HTML may have: "<n;"
        self._closing = ""
        self._raw = dict.fromkeys(_RAW_ELEMENTS, 0)
        self.begins = False  # a "<" was the last
        self._escaped = False  # and a backslash stands before it

    @property
    def inside(self) -> bool:
        """Whether a tag is open, or one of those elements."""
        return bool(self._states) or any(self._raw.values())

    def end_paragraph(self) -> None:
        """A blank line: what only looked like a tag, as in ``i <n;``, ends there."""
        if self._odd:
            self._states &= _QUOTED

    def take(self, char: str, last: str, escaped: bool) -> None:
        if self._states:
            kind = " " if char in _SPACE else char
            self._states = {
                _NEXT[state].get(kind, _NEXT[state].get("", state))
                for state in self._states
                if kind != ">" or state in _QUOTED
            }
            self._take_name(char)
        if last == "<" and _begins_tag(char) and char not in "!?":
            self._odd = self._odd or not self._states
            self._states.add(_NAME)
            # Where Markdown comes first, "\</style>" ends no element.
            self._name = "\\" if char == "/" and self._escaped else char.lower()
        self.begins, self._escaped = char == "<", escaped

    def _take_name(self, char: str) -> None:
        if self._name is not None:
            if char not in _SPACE and char != ">" and (char != "/" or self._name == "/"):
                if len(self._name) < _MAX_TAG_NAME:
                    self._name += char.lower()
                return
            self._odd = self._odd and _TAG_NAME.fullmatch(self._name) is None
            if self._name in self._raw:
                # Counted, for within a comment in it a script holds scripts.
                self._raw[self._name] += 1
            self._closing = self._name[1:] if self._name[:1] == "/" else ""
            self._name = None
        if char == ">":
            if not self._states and self._raw.get(self._closing):
                self._raw[self._closing] -= 1
            self._closing = ""


def _begins_tag(char: str) -> bool:
    """Whether ``<`` and this character begin a tag, a comment or an autolink."""
    return (char.isascii() and char.isalpha()) or char in "/!?"
