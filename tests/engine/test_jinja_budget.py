"""Hostile chat templates: each is stopped with an error, and neither takes much memory nor needs long.

Each runs in a process whose memory is measured from outside; whether it is stopped never depends on time.
"""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import threading
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest

from sllm.engine.chat_template import render
from sllm.engine.jinja_budget import Budget, LimitError
from sllm.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi, what is a fox?"},
    {"role": "assistant", "content": "An animal."},
]
MAX_BYTES = 80 << 20  # some tens of MB, whatever a template does

BIG = "{% set big = 'x' * 1000000 %}"
TABS = "{% set tabs = '\\t' * 100000 %}"
LINES = "{% set lines = '\\n' * 100000 %}"
DOUBLED = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"

HOSTILE = {
    # texts that grow in one step
    "replace": BIG + "{{ big.replace('x', 'y' * 10000) }}",
    "replace, filter": BIG + "{{ big | replace('x', 'y' * 10000) }}",
    "replace nothing": BIG + "{{ big.replace('', 'y' * 10000) }}",
    "join": BIG + "{{ big.join(['a'] * 10000) }}",
    "join, filter": BIG + "{{ ['a'] * 10000 | join(big) }}{{ (['a'] * 10000) | join(big) }}",
    "join of one text many times": BIG + "{{ ([big] * 10000) | join }}",
    "join of what comes one by one": BIG + "{{ range(10000) | map('replace', '', big) | join }}",
    "expandtabs": TABS + "{{ tabs.expandtabs(100000) }}",
    "expandtabs by name": TABS + "{{ tabs.expandtabs(tabsize=100000) }}",
    "center": "{% for i in range(9999) %}{{ 'x'.center(999999) }}{% endfor %}",
    "center, filter": "{% for i in range(9999) %}{{ 'x' | center(999999) }}{% endfor %}",
    "zfill": "{% for i in range(9999) %}{{ '1'.zfill(999999) }}{% endfor %}",
    "ljust, kept": "{% set ns = namespace(x=[]) %}{% for i in range(999) %}"
    "{% set ns.x = ns.x + ['x'.ljust(900000 + i)] %}{% endfor %}{{ ns.x | length }}",
    "wide characters": "{{ ('a' * 8000000) + '\U0001f98a' }}",
    "indent": LINES + "{{ lines | indent(1000000, true, true) }}",
    "indent by a text": LINES + BIG + "{{ lines | indent(big, true, true) }}",
    "wordwrap": BIG + "{{ (big | wordwrap(1, wrapstring=big)) | length }}",
    "wordwrap of a long word": BIG + "{{ big | wordwrap(1) | length }}",
    "urlencode": "{{ ('\U0001f98a' * 2000000) | urlencode | length }}",
    "escape": "{{ ('\"' * 8000000) | escape | length }}",
    "upper": "{{ ('\u0390' * 8000000) | upper | length }}",
    "split": "{{ ('ab' * 3000000).split('b') | length }}",
    "split at spaces": "{{ ('ab ' * 2000000).split() | length }}",
    "splitlines": "{{ ('ab\\n' * 2000000).splitlines() | length }}",
    "list of characters": "{{ ('\u4e00' * 8000000) | list | length }}",
    "wordcount": "{{ ('ab ' * 2000000) | wordcount }}",
    "title": "{{ ('ab ' * 2000000) | title | length }}",
    "translate": "{{ ('a' * 100000).translate({97: 'x' * 100000}) }}",
    "bytes": "{% set b = 'x'.encode() %}{{ b.center(10**9) }}",
    "bytes times": "{{ 'x'.encode() * 10**9 }}",
    "an encoding that takes long": "{{ ('\u4e00\u4e8c' * 500000).encode('punycode') }}",
    "named characters": "{{ ('\u4e00' * 2000000).encode('ascii', 'namereplace') | length }}",
    "to_bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    # formats
    "percent": "{{ ('%99999d' * 9999) % ((1,) * 9999) }}",
    "percent of a mapping": BIG + "{{ ('%(a)s' * 10000) % {'a': big} }}",
    "percent of a mapping, with brackets": BIG + "{{ ('%(a(b))s' * 10000) % {'a(b)': big} }}",
    "percent, filter": BIG + "{{ ('%(a)s' * 10000) | format(a=big) }}",
    "a width from an argument": "{{ '%*d' % (10**9, 1) }}",
    "a precision": "{{ '%.999999999f' % 1.5 }}",
    "format": BIG + "{{ ('{0}' * 10000).format(big) }}",
    "format, nested width": "{{ '{0:{1}}'.format('x', 10**9) }}",
    "format, nested width as a text": "{{ '{0:{1}}'.format('x', '999999999') }}",
    "format, nested width in a list": "{{ '{0:{1[0]}}'.format('x', [10**9]) }}",
    "format, many widths": "{{ ('{0:999999}' * 9999).format('x') }}",
    "format_map": BIG + "{{ ('{a}' * 10000).format_map({'a': big}) }}",
    "format of a list": BIG + "{{ '{}'.format([big] * 10000) }}",
    "format of a list as Python writes it": BIG + "{{ '{!r}'.format([big] * 10000) }}",
    "a date": "{{ strftime_now('%999999d' * 1000) }}",
    "a long date": "{{ strftime_now('%Y' * 4000000) | length }}",
    # containers of which little memory shows much
    "one text in a list many times": BIG + "{{ [big] * 10000 }}",
    "printed": DOUBLED + "{{ ns.x }}",
    "as JSON": DOUBLED + "{{ ns.x | tojson }}",
    "compared": DOUBLED + "{{ ns.x == [[1]] }}",
    "compared with its like": DOUBLED + DOUBLED.replace("ns", "ms") + "{{ ns.x == ms.x }}",
    "as a key": "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}"
    "{% endfor %}{{ {}[ns.x] }}",
    "JSON with an indent": "{{ ([0] * 100000) | tojson(indent=1000000) }}",
    "JSON, deep and indented": "{% set ns = namespace(x=[0]) %}{% for i in range(200) %}"
    "{% set ns.x = [ns.x] %}"
    "{% endfor %}{{ ([ns.x] * 10000) | tojson(indent=60) | length }}",
    "JSON with a separator": "{{ ([0] * 100000) | tojson(separators=('x' * 100000, ':')) }}",
    "a namespace in itself": "{% set ns = namespace() %}{% set ns.a = [ns] * 900000 %}{{ ns.a | tojson }}",
    "pprint": "{{ ([[[1]]] * 500000) | pprint | length }}",
    "sum of lists": "{{ ([[0] * 1000] * 1000) | sum(start=[]) | length }}",
    "batch": "{% for i in range(9999) %}{{ [1] | batch(900000, 0) | list | length }}{% endfor %}",
    "slice": "{{ [1] | slice(900000) | list | length }}",
    "lists that grow": "{% set ns = namespace(x=[0]) %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "many small lists": "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x, i] %}"
    "{% endfor %}{% for i in range(90000) %}{% set ns.x = [ns.x, i] %}{% endfor %}",
    "slices": "{% set l = [0] * 1000000 %}{% for i in range(99999) %}{% set m = l[1:] %}{% endfor %}",
    "dict": "{% set l = [(1, 2)] * 900000 %}{% for i in range(99999) %}{% set d = dict(l) %}{% endfor %}",
    "fromkeys": "{{ {}.fromkeys('x' * 1000000) }}",
    # text that a template writes again and again
    "written in a macro": "{% macro m() %}{% for i in range(99999) %}"
    + "x" * 50000
    + "{% endfor %}{% endmacro %}"
    "{{ m() | length }}",
    "written in a block": "{% set t %}{% for i in range(99999) %}" + "x" * 50000 + "{% endfor %}{% endset %}",
    "written behind a condition": "{% set t %}{% for i in range(99999) %}{% if i %}"
    + "x" * 50000
    + "{% endif %}{% endfor %}{% endset %}",
    "a macro that doubles": "{% macro m(n) %}{% if n %}{% set t = m(n - 1) %}{{ t }}{{ t }}{% else %}xxxxxxxx"
    "{% endif %}{% endmacro %}{{ m(60) }}",
    "a call block": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 30
    + "xxxx"
    + "{% endcall %}" * 30,
    "concatenated": "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}"
    "{% endfor %}",
    "lipsum": "{{ lipsum(10**9) }}",
    # what takes long and makes little
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that choose nothing": "{% for i in range(99999) %}"
    "{% for j in range(99999) if j > i * i + 9 %}{% endfor %}"
    "{% endfor %}",
    "recursive loops": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{{ loop([[1]]) }}{% endfor %}",
    "recursive loops over many": "{% set l = [0] * 900000 %}{% for x in [1] * 90000 if x recursive %}"
    "{{ loop(l) }}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(50) }}",
    "powers": "{{ 9 ** (9 ** 9) }}",
    "products": "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}"
    "{% endfor %}",
    "a long number": "{% set n = ('f' * 4000000) | int(base=16) %}{{ (n * n) // n }}",
    "a long number, divided": "{{ ('f' * 4000000) | int(0, 16) // ('e' * 2000000) | int(0, 16) }}",
    "rounded": "{{ 1.5 | round(10**9, 'ceil') }}",
    "rounded to tens": "{{ 15 | round(-(10**9)) }}",
    "looked for from the end": "{% set s = 'a' * 4000000 %}{{ s.rfind('b' + 'a' * 2000000) }}",
    "split from the end": "{% set s = 'a' * 4000000 %}{{ s.rsplit('b' + 'a' * 2000000) | length }}",
    "stripped": "{% set s = 'a' * 4000000 %}{{ s.strip('b' * 4000000 + 'a') | length }}",
    "trimmed": "{% set s = 'a' * 4000000 %}{{ s | trim('b' * 4000000 + 'a') | length }}",
    "counted again and again": "{% set s = 'a' * 4000000 %}{% for i in range(99999) %}"
    "{% set n = s.count('b') %}"
    "{% endfor %}",
    "compared again and again": "{% set s = 'a' * 4000000 %}{% set t = 'a' * 3999999 + 'b' %}"
    "{% for i in range(99999) %}{% if s == t %}{% endif %}{% endfor %}",
    "tested again and again": "{% set s = 'a' * 4000000 %}{% for i in range(99999) %}{% if s is lower %}"
    "{% endif %}"
    "{% endfor %}",
    "found in again and again": "{% set l = [0] * 1000000 %}{% for i in range(99999) %}{% if 1 in l %}"
    "{% endif %}"
    "{% endfor %}",
    "mapped again and again": "{% set l = [0] * 1000000 %}{% for i in range(99999) %}"
    "{% set m = l | map(attribute='x') | list | length %}{% endfor %}",
    "sorted again and again": "{% set l = range(99999) | list %}{% for i in range(99999) %}"
    "{% set m = l | sort %}"
    "{% endfor %}",
    "keys that collide": "{% set l = range(99999) | list %}{{ l | unique | list | length }}",
    "comments": "{{ ('<!---->' * 500000) | striptags | length }}",
    "links": "{{ ('www.a.b ' * 500000) | urlize | length }}",
    # errors
    "a refusal": BIG + "{{ raise_exception([big] * 5) }}{{ raise_exception('a ' * 4000000) }}",
    "a missing key": "{% set s = 'a ' * 4000000 %}{{ {}[s].x }}",
    "a long template": "x" * 200_000,
}
SAID = ("was stopped", "refuses", "failed", "characters, where")

CHILD = """
import json, resource, sys
from sllm.engine.chat_template import render
from sllm.errors import UnsupportedModelError
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) << 10
talk = json.loads(sys.argv[1])
render("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", talk)
for line in sys.stdin:
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    try:
        said = "rendered " + str(len(render(json.loads(line), talk)))
    except UnsupportedModelError as error:
        said = str(error)
    print(json.dumps([said, peak() - before]), flush=True)
"""


@pytest.fixture(scope="module")
def child() -> Iterator[subprocess.Popen[str]]:
    """A process that renders templates and says what each has taken."""
    command = [sys.executable, "-c", CHILD, json.dumps(TALK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.skipif(sys.platform != "linux", reason="how much memory a process has had is read from /proc")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_stopped(child: subprocess.Popen[str], name: str) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps(HOSTILE[name]) + "\n")
    child.stdin.flush()
    said, n_bytes = json.loads(child.stdout.readline())
    assert any(word in said for word in SAID), said
    assert "\n" not in said
    assert len(said) < 500
    assert n_bytes < MAX_BYTES


def test_a_template_is_stopped_once_and_not_for_each_probe() -> None:
    """What forms of messages it prints is found by rendering it, which would take as long each time."""
    template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    talk: list[dict[str, Any]] = [TALK[0], {"role": "assistant", "tool_calls": [call]}]
    rounds = 0
    original = Budget.step

    def step(budget: Budget) -> None:
        nonlocal rounds
        rounds += 1
        original(budget)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budget, "step", step)
        with pytest.raises(UnsupportedModelError, match="was stopped"):
            render(template, talk)
    assert rounds < 120_000


def test_nothing_of_what_was_made_stays_with_the_error() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UnsupportedModelError) as stopped:
            render(HOSTILE["ljust, kept"], TALK)
        peak = tracemalloc.get_traced_memory()[1]
        gc.collect()
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert "was stopped" in str(stopped.value)
    assert peak < MAX_BYTES
    assert held < 2 << 20


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="sends a signal to this thread")
def test_a_template_can_be_interrupted() -> None:
    """At once, where it would go on for a while: a signal's handler runs between its steps."""
    steps: list[int] = []

    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    original = Budget.step

    def step(budget: Budget) -> None:
        steps.append(1)
        if len(steps) == 1000:
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        original(budget)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Budget, "step", step)
            with pytest.raises(KeyboardInterrupt):
                render(HOSTILE["loops"], TALK)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(steps) < 2000
    assert render("{{ messages[0].content }}", TALK) == TALK[0]["content"]


ORDINARY = {
    "a text that grows": "{% set ns = namespace(t='') %}{% for m in messages %}"
    "{% set ns.t = ns.t + m.content %}"
    "{% endfor %}{{ ns.t }}",
    "JSON": "{% for m in messages %}{{ m | tojson(indent=2) }}{{ messages[loop.index0:] | length }}"
    "{% endfor %}",
    "looking back": "{% for m in messages %}{% if m == messages[-1] %}!{% endif %}"
    "{{ m.content.split('</think>')[-1].strip() }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{% endfor %}",
    "a macro": "{% macro show(m) %}{{ m.role ~ ': ' ~ m.content | trim | replace('a', 'b') }}{% endmacro %}"
    "{% for m in messages %}{{ show(m) }}{% endfor %}",
}


@pytest.mark.parametrize("template", ORDINARY.values(), ids=ORDINARY)
def test_a_long_conversation_is_within_the_budget(template: str) -> None:
    talk = [{"role": "user", "content": f"{i} words and more of them " * 20} for i in range(400)]
    assert len(render(template, talk)) > 1000


@pytest.mark.parametrize("n", [1, 2])
def test_a_budget_counts_what_is_shown_and_not_what_is_held(n: int) -> None:
    budget = Budget({"messages": []}, 0)
    text = "x" * 1000
    value: Any = [text] * 10
    for _ in range(n):
        value = [value] * 10
    assert budget.size(value) > 10 ** (n + 1) * 1000
    assert budget.depth(value) == n + 1
    with pytest.raises(LimitError, match="more than"):
        for _ in range(9):
            value = [value] * 10
            budget.made(value)
