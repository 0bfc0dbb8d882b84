"""Templates and conversations for the sweep: what the field writes, in templates of our own.

Each template is written around some of the features that published templates use (whitespace control, loops,
namespaces, macros, filters, tests, methods of texts and mappings), so that together they use all of them.
"""

from __future__ import annotations

from typing import Any

TEMPLATES: dict[str, str] = {
    # blocks on lines of their own, which leave nothing behind
    "trimmed blocks": """
{% for message in messages %}
    {% if message.role == 'user' %}
    <user>
      {{ message.content }}
    {% elif message.role == 'assistant' %}
  <answer>{{ message.content if message.content is defined else '' }}

    {% else %}
{{ message['role'] | upper }}: {{ message['content'] }}
    {%- endif %}
{% endfor %}
{#- a comment #}
  {% if add_generation_prompt %}
<answer>
  {%- endif %}""",
    "signs of every kind": (
        "{{- bos_token -}}\n\n{%- for m in messages -%}\n  [{{- m.role -}}]  \n{%+ if true %} x "
        "{% endif +%}\n"
        "{%- if not loop.last %}\n\n|\n{% endif -%}\n  {% endfor %}\n {{ eos_token }} \n"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + (m['content'] or '') +"
        " '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "turns that must alternate": (
        "{% if messages[0].role == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system = messages[0].content | trim + '\\n\\n' %}"
        "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
        "{% for m in loop_messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('turns must alternate, and turn ' ~ loop.index ~ ' is by the ' ~ m.role) }}"
        "{% endif %}{% if loop.index0 == 0 %}{{ bos_token ~ system }}{% endif %}"
        "{{ '[INST] ' + m.content | trim + ' [/INST]' if m.role == 'user' else ' ' ~ m.content | trim ~"
        " eos_token }}"
        "{% endfor %}"
    ),
    "a namespace that counts": (
        "{%- set ns = namespace(calls=0, names=[], last=none, text='') -%}"
        "{%- for m in messages -%}"
        "{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}"
        "{%- for c in m.tool_calls or [] -%}"
        "{%- set ns.calls = ns.calls + 1 -%}{%- set ns.names = ns.names + [c.function.name] -%}"
        "{%- endfor -%}{%- set ns.text = ns.text ~ loop.index0 ~ ',' -%}"
        "{%- endfor -%}"
        "{{- ns.calls ~ ' ' ~ ns.last ~ ' ' ~ ns.text ~ ' ' ~ ns.names | join('+') ~ ' ' ~ ns.names |"
        " unique | list -}}"
        "{%- for m in messages -%}{{- '\\n' + m.role + ('*' if loop.index0 > ns.last else '') -}}"
        "{%- endfor -%}"
    ),
    "messages backwards": (
        "{% for m in messages[::-1] %}{% set index = (messages | length - 1) - loop.index0 %}"
        "{% if loop.index <= 3 %}{{ index }}:{{ m.role }}{% if not loop.last %} {% endif %}{% endif %}"
        "{% endfor %}\n{{ messages[-1].role }} {{ messages[:-1] | length }} {{ messages[:2] | length }}"
        " {{ (messages | first).role }} {{ (messages | last).role }}"
    ),
    "tools as JSON": (
        "{% if tools %}<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>\n"
        "{{ tools | tojson(indent=4) }}\n"
        "{{ tools | map(attribute='function') | list | tojson(ensure_ascii=True) }}"
        "\n{{ tools[0].function | tojson(separators=(',', ':'), sort_keys=true) }}{% endif %}"
        "{% for m in messages %}\n{{ m.role }}: {{ m.content or '' }}{% for call in m.tool_calls or [] %}"
        '\n<call>{"name": "{{ call.function.name }}", "arguments": '
        "{{ call.function.arguments | tojson }}}</call>"
        "{% endfor %}{% endfor %}"
    ),
    "tools as a signature": """
{%- macro shown(spec, depth=0) -%}
    {%- if spec.enum is defined -%}
        {{- spec.enum | map('tojson') | join(' | ') -}}
    {%- elif spec.type == 'array' -%}
        {{- shown(spec['items'], depth + 1) ~ '[]' -}}
    {%- elif spec.type == 'object' -%}
        {{- '{' -}}
        {%- for name, inner in (spec.properties or {}).items() -%}
            {{- ('' if loop.first else ', ') ~ name -}}
            {{- ('' if name in (spec.required or []) else '?') ~ ': ' -}}
            {{- shown(inner, depth=depth + 1) -}}
        {%- endfor -%}
        {{- '}' -}}
    {%- elif spec.type is iterable and spec.type is not string -%}
        {{- spec.type | join(' | ') -}}
    {%- else -%}
        {{- spec.type | default('any') -}}
    {%- endif -%}
{%- endmacro -%}
{%- for tool in tools or [] -%}
    {%- set f = tool.function if tool.function is defined else tool -%}
    {{- 'type ' ~ f.name ~ ' = (_: ' ~ shown(f.parameters) ~ ') => any;' -}}
    {{- '  // '.lstrip() ~ ' x'.rstrip() ~ f.get('description', '-') ~ '\\n' -}}
{%- endfor -%}
{%- for m in messages -%}
    {{- m.role -}}
    {%- for call in m.tool_calls or [] -%}
        {%- for key, value in call.function.arguments | items -%}
            {{- '<' ~ key ~ '>' -}}
            {{- value if value is string else value | tojson -}}
            {{- '</' ~ key ~ '>' -}}
        {%- endfor -%}
        {%- for key, value in call.function.arguments | dictsort -%}{{- key ~ ';' -}}{%- endfor -%}
    {%- endfor -%}
{%- endfor -%}""",
    "values of every type": (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}"
        "{% for k, v in call.function.arguments.items() %}"
        "{{ k }}="
        "{% if v is none %}none{% elif v is boolean %}{{ v }} {{ v | string | lower }}"
        "{% elif v is integer %}{{ v }} {{ v * 2 }} {{ v // 2 }} {{ v % 3 }} {{ -v }} {{ v ** 2 }}"
        "{% elif v is float %}{{ v }} {{ v + 1 }} {{ v | int }} {{ v | round(1) }} {{ '%.3f' | format(v) }}"
        "{% elif v is number %}?{% elif v is string %}{{ v | length }}"
        "{% elif v is mapping %}{{ v }}|{{ v | tojson }}|{{ v.keys() | list }}"
        "{% elif v is sequence %}{{ v }}|{{ v | length }}|{{ v | first }}{% endif %};"
        "{% endfor %}{% endfor %}{% endfor %}{{ 7 / 2 }} {{ 2 | float }} {{ '12' | int + 1 }} "
        "{{ 1e3 }} {{ 10 | abs }}"
    ),
    "reasoning of the last turn alone": (
        "{%- set ns = namespace(last=-1) -%}"
        "{%- for m in messages -%}{%- if m.role == 'user' and not (m.content is string and"
        " m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) -%}"
        "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
        "{%- for m in messages -%}"
        "{%- set content = m.content if m.content is string else '' -%}{%- set thought = '' -%}"
        "{%- if m.role == 'assistant' -%}"
        "{%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}"
        "{%- elif '</think>' in content -%}"
        "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n')"
        " -%}"
        "{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}"
        "{%- endif -%}{%- endif -%}"
        "{{- '<|im_start|>' + m.role + '\\n' -}}"
        "{%- if thought and loop.index0 > ns.last -%}"
        "{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}{%- endif -%}"
        "{{- content + '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
        "{%- if enable_thinking is defined and enable_thinking is false -%}"
        "{{- '<think>\\n\\n</think>\\n\\n' -}}"
        "{%- elif enable_thinking is undefined or enable_thinking is true -%}{{- '<think>\\n' -}}"
        "{%- endif -%}"
        "{%- endif -%}"
    ),
    "channels": (
        "{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort | default('medium', true)) +"
        " '\\n' -}}"
        "{{- '# Valid channels: ' + ['analysis', 'commentary', 'final'] | join(', ') + '.<|end|>' -}}"
        "{%- for m in messages -%}"
        "{%- if m.role == 'assistant' -%}"
        "{%- if 'thinking' in m -%}"
        "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' -}}{%- endif -%}"
        "{%- if 'tool_calls' in m -%}{%- set call = m.tool_calls[0].function -%}"
        "{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' -}}"
        "{{- call.arguments | tojson + '<|call|>' -}}"
        "{%- elif m.content -%}"
        "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last and"
        " not add_generation_prompt else '<|end|>') -}}{%- endif -%}"
        "{%- elif m.role not in ['tool'] -%}"
        "{{- '<|start|>' ~ m.role ~ '<|message|>' ~ m.content ~ '<|end|>' -}}"
        "{%- endif -%}{%- endfor -%}"
    ),
    "parts of a content": (
        "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}"
        "{% elif m.content is iterable and m.content is not mapping %}"
        "{% for part in m.content %}{% if part.type == 'text' or 'text' in part %}{{ part['text'] }}"
        "{% elif part['type'] in ('image', 'image_url') %}<image>{% else %}"
        "{{ raise_exception('Unknown part ' + part.type) }}{% endif %}{% endfor %}"
        "[{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('/') }}]"
        "{% endif %}{% endfor %}"
    ),
    "select and reject": (
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        " {{ messages | selectattr('tool_calls', 'defined') | list | length }}"
        " {{ messages | rejectattr('role', 'in', ['user', 'system']) | map(attribute='role') | join(',') }}"
        " {{ messages | map(attribute='role') | unique | sort | join('-') }}"
        " {{ messages | map(attribute='role') | map('upper') | list }}"
        " {{ messages | map(attribute='role') | reject('equalto', 'user') | list }}"
        " {{ messages | selectattr('content', 'string') | map(attribute='content') | map('length') |"
        " list | min }}"
        " {{ messages | groupby('role') | map('first') | list }}"
        " {{ [3, 1, 2] | sort | list }} {{ [1, 2, 3] | sum }} {{ [1, 2] | max }}"
        " {% for m in messages if m.role == 'assistant' %}{{ loop.index }}/{{ loop.length }} "
        "{% else %}none{% endfor %}"
        "{% for m in messages | sort(attribute='role') %}{{ m.role[0] }}{% endfor %}"
    ),
    "the messages around": (
        "{% for m in messages %}"
        "{% if m.role == 'tool' and (loop.first or loop.previtem.role != 'tool') %}<results>{% endif %}"
        "{% if m.role == 'tool' %}{{ m.tool_call_id }}={{ m.content }};{% endif %}"
        "{% if m.role == 'tool' and (loop.last or loop.nextitem.role != 'tool') %}</results>{% endif %}"
        "{% if loop.previtem is defined and loop.previtem.role == m.role %}again{% endif %}"
        "{{ loop.cycle('a', 'b') }}{{ loop.revindex }}{{ loop.depth }}"
        "{% endfor %}"
    ),
    "leaving a loop": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% if loop.index0 >= 4 %}...{% break %}{% endif %}{{ m.role }};{% endfor %}"
        "{% for i in range(1, 10, 3) %}{{ i }}{% endfor %}{% for i in range(3) %}{{ i }}{% else %}x"
        "{% endfor %}"
    ),
    "methods of texts": (
        "{% for m in messages if m.content is string %}{% set t = m.content %}"
        "{{ t.upper() }}|{{ t.title() }}|{{ t.capitalize() }}|{{ t.replace('a', 'A') }}|{{ t.split() }}"
        "|{{ t.split(' ', 1) }}|{{ t.find('i') }}|{{ t.count('a') }}|{{ t.startswith(('h', 'H')) }}"
        "|{{ t.strip().rstrip('?') }}|{{ t.splitlines() }}|{{ t.removeprefix('Hi') }}|"
        "{{ t.partition(' ') }}"
        "|{{ t.isdigit() }}|{{ t[:3] }}|{{ t[-3:] }}|{{ t[::-1] }}|{{ '{}-{}'.format(t | length, 1) }}\n"
        "{% endfor %}{{ '%s and %d' % ('x', 3) }}{{ 'ab' * 3 }}{{ 'a' in 'abc' }}{{ 'x' not in 'abc' }}"
    ),
    "filters of texts": (
        "{% for m in messages if m.content is string %}{% set t = m.content %}"
        "{{ t | trim }}|{{ t | capitalize }}|{{ t | title }}|{{ t | replace(' ', '_') }}|"
        "{{ t | indent(2) }}"
        "|{{ t | indent(4, first=true) }}|{{ t | wordcount }}|{{ t | truncate(9) }}|{{ t | list | length }}"
        "|{{ t | reverse }}|{{ t | safe }}|{{ t | string }}|{{ t | e }}|{{ t | urlencode }}|"
        "{{ t | center(9) }}\n"
        "{% endfor %}{% filter upper %}shouted{% endfilter %}{% filter replace('a', 'b') | trim %} aa "
        "{% endfilter %}"
    ),
    "set blocks and scopes": (
        "{% set head %}<{{ messages[0].role }}>{% endset %}{% set x = 1 %}"
        "{% for m in messages %}{% set x = x + 1 %}{{ x }}{% endfor %}{{ x }}{{ head }}"
        "{% set loud | upper %}{{ head }} text{% endset %}{{ loud }}"
        "{% with y = 5, z = x %}{{ y + z }}{% endwith %}{{ y is defined }}"
        "{% set a, b = 1, [2, 3] %}{{ a }}{{ b[1] }}{% if true %}{% set inner = 'seen' %}{% endif %}"
        "{{ inner }}"
        "{% block body %}block{% endblock %}{% raw %}{{ raw }}{% endraw %}"
    ),
    "macros": (
        "{% macro turn(role, content='', end=eos_token) %}[{{ role }}]{{ content }}{{ end }}{% endmacro %}"
        "{% macro wrapped(tag) %}<{{ tag }}>{{ caller() }}</{{ tag }}>{% endmacro %}"
        "{% macro many() %}{{ varargs | join(',') }}{{ kwargs | dictsort }}{% endmacro %}"
        "{% for m in messages %}{{ turn(m.role, content=m.content | default('', true)) }}"
        "{% call wrapped('b') %}{{ m.role }}{{ loop.index }}{% endcall %}{% endfor %}"
        "{{ turn('x') }}{{ turn(role='y', end='!') }}{{ many(1, 'b', c=3) }}{{ turn.name }}"
        "{{ turn.arguments }}"
    ),
    "what a trainer marks": (
        "{% for m in messages %}{% set shown = 'outer' %}{% if m.role == 'assistant' %}{% generation %}"
        "{% set shown = 'inner' %}{{ m.content or '' }}{{ loop.index }}{{ shown }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{{ shown }}{% endfor %}"
        "{%- generation -%}  x  {%- endgeneration -%} y"
    ),
    "things that are not there": (
        "{{ nothing }}|{{ nothing is defined }}|{{ nothing is not defined }}|{{ messages[0].nothing }}"
        "|{{ messages[0]['nothing'] is defined }}|{{ messages[0].get('nothing') }}|"
        "{{ messages[0].get('nothing', 1) }}"
        "|{{ nothing or 'else' }}|{{ nothing | default('d') }}|{{ '' | default('d') }}|"
        "{{ '' | default('d', true) }}"
        "|{{ none }}|{{ none is none }}|{{ tools is none }}|{{ documents is none }}|{{ not nothing }}"
        "|{% if nothing %}x{% endif %}{% for x in nothing %}x{% endfor %}{{ nothing | length }}"
        "|{{ messages[99] is defined }}|{{ true and nothing is undefined }}|{{ 1 if nothing }}|"
        "{{ [nothing] }}"
        "|{{ pad_token is defined }}|{{ tools | length if tools is not none else 0 }}"
    ),
    "the day": (
        "{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
        "{% set date_string = '26 Jul 2024' %}{% endif %}"
        "{% endif %}Today Date: {{ date_string }}, {{ strftime_now('%Y') | int > 2000 }}"
    ),
    "documents": (
        "{% if documents %}{% for document in documents %}"
        "Document: {{ loop.index0 }}\nTitle: {{ document['title'] }}\n"
        "{% for key, value in document.items() if key != 'title' %}{{ key }}: {{ value }}\n{% endfor %}"
        "{% endfor %}"
        "{% endif %}{% for m in messages %}{{ m | tojson }}\n{% endfor %}"
        "{{ (messages | list)[0].keys() | join('/') }}"
    ),
    "mappings": (
        "{% set d = {'a': 1, 'b': [1, 2], 3: none} %}{{ d }}{{ d.a }}{{ d['b'] }}{{ d.get(3, 'x') }}"
        "{{ d | length }}"
        "{% for k in d %}{{ k }}{% endfor %}{{ d.items() | list }}{{ d.values() | list }}{{ 'a' in d }}"
        "{{ dict(x=1, y=2) }}{{ (1, 'x', true, none, 2.0) }}{{ [1, [2]] + [3] }}{{ {'a': 'é'} | tojson }}"
        "{{ {'n': none, 't': true, 'f': 1.0} | tojson }}{{ 'a\\tb\"c' | tojson }}{{ d | string }}"
        "{{ messages[0].items() | list }}{{ {} is mapping }}{{ [] is sequence }}{{ 'x' is sequence }}"
        "{{ 1 is number }}"
    ),
    "comparisons": (
        "{{ 1 < 2 <= 2 }}{{ 'a' == 'a' }}{{ not 1 == 2 }}{{ 1 is eq(1) }}{{ 3 is odd }}"
        "{{ 4 is divisibleby(2) }}"
        "{{ 'x' is in(['x']) }}{{ 1 is sameas(1) }}{{ messages is iterable }}{{ messages[0] is mapping }}"
        "{{ true is boolean }}{{ 1.5 is float }}{{ 'ab' is lower }}{{ 5 >= 5 and 4 > 3 or false }}"
        "{{ (1 > 2) | string }}"
        "{{ ('a' if false else 'b') ~ ('c' if false) }}{{ messages | length > 1 }}"
        "{{ raise_exception is callable }}"
        "{{ [] == [] }}{{ none == false }}{{ 0 == false }}{{ '' is false }}{{ joiner is defined }}"
        "{{ namespace is defined }}"
    ),
    "joiners and cyclers": (
        "{% set comma = joiner(', ') %}{% set row = cycler('odd', 'even') %}"
        "{% for m in messages %}{{ comma() }}{{ m.role }} {{ row.next() }}{% endfor %}"
        "{% for batch in messages | map(attribute='role') | batch(2, '-') %}{{ batch | join('+') }};"
        "{% endfor %}"
        "{% for tree in [{'n': 1, 'c': [{'n': 2, 'c': []}]}] recursive %}{{ tree.n }}{{ loop(tree.c) }}"
        "{% endfor %}"
    ),
}

_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "天气 <now> & 'then'",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where"},
                    "unit": {"type": "string", "enum": ["c", "f"], "default": None},
                    "days": {"type": ["integer", "null"]},
                    "tags": {"type": "array", "items": {"type": "string"}},
                    "at": {"type": "object", "properties": {"h": {"type": "number"}}, "required": ["h"]},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}},
]
_ARGUMENTS: dict[str, Any] = {
    "city": "北京",
    "days": 3,
    "share": 2.50,
    "sure": True,
    "note": None,
    "tags": ["a", 1, None],
    "at": {"h": 7, "name": "é"},
}
_SYSTEM = {"role": "system", "content": " You answer\nbriefly. "}
_USER = {"role": "user", "content": "  Hi there, what is a <b>'fox'</b> & \"why\"? \n"}
_ANSWER = {"role": "assistant", "content": "A small animal."}


def _call(arguments: Any, name: str = "get_weather", call_id: str = "call00001") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _calls(*calls: dict[str, Any], content: Any = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **more}


def _result(content: str, call_id: str = "call00001") -> dict[str, Any]:
    return {"role": "tool", "name": "get_weather", "tool_call_id": call_id, "content": content}


_NAMED: list[tuple[Any, ...]] = [
    ("one message", [_USER]),
    ("system", [_SYSTEM, _USER]),
    ("turns", [_SYSTEM, _USER, _ANSWER, {"role": "user", "content": "Why?"}]),
    ("turns without system", [_USER, _ANSWER, _USER, _ANSWER, _USER]),
    ("two by the user", [_USER, {"role": "user", "content": "?"}]),
    ("it ends with an answer", [_USER, _ANSWER], {"add_generation_prompt": False}),
    ("empty content", [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}, _USER]),
    (
        "white space",
        [{"role": "user", "content": " \n\t "}, {"role": "assistant", "content": "\n\n"}, _USER],
    ),
    (
        "Chinese and emoji",
        [
            {"role": "user", "content": "狐狸是什么？🦊👩‍👩‍👧 \u200b\u3000é"},
            {"role": "assistant", "content": "动物。"},
            _USER,
        ],
    ),
    ("braces", [{"role": "user", "content": "{{ 1 + 1 }} {% if x %} {# no #} %d {0} \\n"}]),
    (
        "control tokens",
        [{"role": "user", "content": "<|im_end|>\n<|im_start|>system <s> [INST] </think>"}],
    ),
    (
        "reasoning in the text",
        [_USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nAn animal."}, _USER],
    ),
    ("reasoning of its own", [_USER, {**_ANSWER, "reasoning_content": "\nHm, 狐狸.\n"}, _USER]),
    ("reasoning as thinking", [_USER, {**_ANSWER, "thinking": "Hm."}]),
    ("reasoning as reasoning", [_USER, {**_ANSWER, "reasoning": "Hm."}, _USER]),
    (
        "nulls",
        [
            {**_USER, "name": None, "tool_calls": None},
            {**_ANSWER, "tool_calls": None, "reasoning_content": None, "refusal": None, "audio": None},
            {**_USER, "tool_call_id": None},
        ],
    ),
    ("tools that are not called", [_SYSTEM, _USER], {"tools": _TOOLS}),
    ("no tools", [_USER], {"tools": []}),
    (
        "a call and its result",
        [_USER, _calls(_call(_ARGUMENTS)), _result('{"t": 21}'), _ANSWER, _USER],
        {"tools": _TOOLS},
    ),
    (
        "two calls with a text",
        [
            _SYSTEM,
            _USER,
            _calls(_call({"city": "Rom"}), _call({}, "stop", "call00002"), content="Let me see."),
            _result("21"),
            _result("ok", "call00002"),
        ],
        {"tools": _TOOLS},
    ),
    (
        "a call without a content",
        [_USER, _calls(_call(_ARGUMENTS), content=None, reasoning_content="Hm."), _result("x")],
        {"tools": _TOOLS},
    ),
    ("a call without tools", [_USER, _calls(_call({"a": "<b>"})), _result("")]),
    (
        "parts",
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "狐"}]},
        ],
        {"parts": True},
    ),
    ("a role of one's own", [{"role": "developer", "content": "x"}, {"role": "critic", "content": "y"}]),
    ("more fields", [{**_USER, "name": "Ann", "weight": 1.5, "meta": {"k": [True, None]}}]),
    (
        "variables",
        [_USER],
        {
            "variables": {
                "enable_thinking": False,
                "reasoning_effort": "low",
                "date_string": "1 Jan 2030",
                "documents": [{"title": "T", "text": "狐", "n": 1}],
            }
        },
    ),
    ("thinking on", [_USER], {"variables": {"enable_thinking": True, "reasoning_effort": ""}}),
    (
        "prefill",
        [_SYSTEM, _USER, {"role": "assistant", "content": "It is"}],
        {"continue_final_message": True},
    ),
    (
        "prefill with a space",
        [_USER, {"role": "assistant", "content": " It  "}],
        {"continue_final_message": True},
    ),
    (
        "prefill of nothing",
        [_USER, {"role": "assistant", "content": ""}],
        {"continue_final_message": True},
    ),
    (
        "prefill of reasoning",
        [_USER, {"role": "assistant", "content": "", "reasoning_content": "Let me"}],
        {"continue_final_message": "reasoning_content"},
    ),
]

CONVERSATIONS: dict[str, dict[str, Any]] = {
    name: {"messages": messages, **(more[0] if more else {})} for name, messages, *more in _NAMED
}
"""By name: the messages, and the options of rendering; "parts" where a content is a list."""
