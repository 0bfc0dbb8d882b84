"""Grammars and JSON Schemas that are meant to take too much."""

from __future__ import annotations

from typing import Any


def chain(n: int) -> dict[str, Any]:
    """A schema that refers to a schema that refers to a schema ..."""
    links: dict[str, Any] = {f"a{i}": {"items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(n)}
    return {"$defs": links | {f"a{n}": {"type": "null"}}, "$ref": "#/$defs/a0"}


TAILS = 's\ns ::= . s | . s "x" | . s "y" | . s "z"'
DEEP = "(" * 200 + "[a-z]" + "{0,9})" * 200
HOSTILE: dict[str, dict[str, Any]] = {
    "tails": {"grammar": f"root ::= {TAILS}"},
    "tails behind something": {"grammar": f'root ::= ("a" | "t" | " ")+ {TAILS}'},
    "spaces on the left": {"grammar": 'root ::= e\ne ::= w e "+" n | w n\nw ::= [ \\t]*\nn ::= [0-9]+'},
    "deep": {"grammar": f"root ::= {DEEP}"},
    "deep behind something": {"grammar": f"root ::= [a-z]? {DEEP}"},
    "repetitions": {"grammar": "root ::= " + "(" * 4 + '"a" | "b"' + "){0,10000}" * 4},
    "itself": {"grammar": 'root ::= root root root | "a" | "t" | ""'},
    "nullable": {
        "grammar": "root ::= "
        + " ".join(f"r{i}" for i in range(300))
        + "".join(f'\nr{i} ::= r{(i + 1) % 300} r{(i + 7) % 300} | ""' for i in range(300))
    },
    "dense": {
        "grammar": "root ::= r0\n"
        + "\n".join(f"r{i} ::= " + " | ".join(f'r{j} "a"' for j in range(90)) for i in range(90))
    },
    "options": {"grammar": "root ::= " + " ".join(f'("a" | "ab{i}")?' for i in range(1000))},
    "classes": {"grammar": "root ::= (" + " | ".join(f"[a-\\u{i:04x}] root" for i in range(200, 1400)) + ")"},
    "a long literal": {"grammar": 'root ::= "' + "a" * 120_000 + '"'},
    "states": {"json_schema": {"type": "string", "pattern": "^(.*a.{60}){3}$"}},
    "an intersection": {"json_schema": {"allOf": [{"pattern": f"^.*{c}.{{20}}.*$"} for c in "abcdefghij"]}},
    "a large number": {"json_schema": {"type": "integer", "multipleOf": 99991}},
    "a long string": {"json_schema": {"type": "string", "minLength": 10**7}},
    "many items": {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 10**7}},
    "many properties": {"json_schema": {"properties": {f"p{i}": {"type": "string"} for i in range(4000)}}},
    "a loop": {"json_schema": {"$ref": "#"}},
    "loops": {"json_schema": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 2}}, "$ref": "#/$defs/a"}},
    "products": {
        "json_schema": {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}_{j}": {"type": "string"}}} for j in range(4)]}
                for i in range(12)
            ]
        }
    },
    "a chain of rules": {
        "grammar": "root ::= r0\n"
        + "".join(f'r{i} ::= ((("a" r{i + 1})))\n' for i in range(4000))
        + 'r4000 ::= "a"'
    },
    "a chain of references": {"json_schema": chain(3000)},
    "a shorter chain of references": {"json_schema": chain(1300)},
    "nested groups": {"json_schema": {"type": "string", "pattern": "(" * 5000 + "a" + ")" * 5000}},
    "a nested schema": {"json_schema": '{"items":' * 500 + "{}" + "}" * 500},
}
