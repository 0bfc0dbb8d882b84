"""Grammars and JSON Schemas: what they allow, compared with a parser that is as plain as can be."""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hostile_grammars import HOSTILE
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import EXACT, examples, make_prompt, one_by_one

from sllm import SamplingParams
from sllm.engine import grammar as grammar_module
from sllm.engine.grammar import have_grammars
from sllm.engine.sampling import check_grammar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sllm import Model
    from sllm.engine.grammar import Grammar

# ---- masks -------------------------------------------------------------------------------------------------
# A grammar as a tree: ("char", "a"), ("rule", 1), ("seq", [...]), ("or", [...]), ("repeat", tree, low, high).

Tree = tuple[Any, ...]


def trees(n_rules: int) -> st.SearchStrategy[Tree]:
    leaves = st.one_of(
        st.sampled_from([("char", "a"), ("char", "b"), ("char", "ab"), ("seq", [])]),
        st.integers(0, n_rules - 1).map(lambda n: ("rule", n)),
    )

    def larger(inner: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
        bounds = st.sampled_from([(0, None), (1, None), (0, 1), (2, 2), (0, 2), (1, 3), (2, None)])
        return st.one_of(
            st.lists(inner, min_size=1, max_size=3).map(lambda parts: ("seq", parts)),
            st.lists(inner, min_size=1, max_size=3).map(lambda parts: ("or", parts)),
            st.tuples(inner, bounds).map(lambda t: ("repeat", t[0], *t[1])),
        )

    return st.recursive(leaves, larger, max_leaves=6)


grammars = st.integers(1, 3).flatmap(lambda n: st.lists(trees(n), min_size=n, max_size=n))


def gbnf(rules: list[Tree]) -> str:
    def written(tree: Tree) -> str:
        kind, *rest = tree
        if kind == "char":
            return f"[{rest[0]}]"
        if kind == "rule":
            return "root" if rest[0] == 0 else f"r{rest[0]}"
        if kind == "repeat":
            inner, low, high = rest
            return f"({written(inner)}){{{low},{'' if high is None else high}}}"
        return "(" + (" " if kind == "seq" else " | ").join(map(written, rest[0])) + ")"

    return "\n".join(f"{written(('rule', n))} ::= {written(tree)}" for n, tree in enumerate(rules))


def productions(rules: list[Tree]) -> dict[str, list[list[str]]]:
    """The tree as productions of characters ("a"), classes ("ab") and names ("<...>")."""
    found: dict[str, list[list[str]]] = {}
    names = itertools.count()

    def symbol(tree: Tree) -> str:
        kind, *rest = tree
        if kind == "char":
            return str(rest[0])
        if kind == "rule":
            return f"<{rest[0]}>"
        name = f"<new {next(names)}>"
        if kind == "seq":
            found[name] = [[symbol(part) for part in rest[0]]]
        elif kind == "or":
            found[name] = [[symbol(part)] for part in rest[0]]
        else:
            inner, low, high = symbol(rest[0]), rest[1], rest[2]
            found[name] = [[inner] * n for n in range(low, (low if high is None else high) + 1)]
            if high is None:
                found[name].append([name, inner])
        return name

    for n, tree in enumerate(rules):
        found[f"<{n}>"] = [[symbol(tree)]]
    return found


def parse(rules: dict[str, list[list[str]]], text: str) -> tuple[bool, bool]:
    """Whether a text begins one of the grammar's, and whether it is one: Earley's algorithm, each set closed
    by doing everything again until nothing is new. Items are a name, an alternative, a dot and an origin.
    """
    sets: list[set[tuple[str, int, int, int]]] = [{("<0>", n, 0, 0) for n in range(len(rules["<0>"]))}]
    for at in range(len(text) + 1):
        items = sets[at]
        while True:
            new: set[tuple[str, int, int, int]] = set()
            for name, n, dot, origin in items:
                sequence = rules[name][n]
                if dot < len(sequence):
                    if sequence[dot] in rules:
                        new |= {(sequence[dot], k, 0, at) for k in range(len(rules[sequence[dot]]))}
                else:
                    new |= {
                        (other, k, d + 1, o)
                        for other, k, d, o in sets[origin]
                        if d < len(rules[other][k]) and rules[other][k][d] == name
                    }
            if new <= items:
                break
            items |= new
        if at < len(text):
            sets.append(
                {
                    (name, n, dot + 1, origin)
                    for name, n, dot, origin in items
                    if dot < len(rules[name][n])
                    and rules[name][n][dot] not in rules
                    and text[at] in rules[name][n][dot]
                }
            )
    whole = any(
        name == "<0>" and dot == len(rules[name][n]) and origin == 0 for name, n, dot, origin in sets[-1]
    )
    return bool(sets[-1]), whole


def allowed(grammar: Grammar, ids: Sequence[int], asked: list[int] | None = None) -> set[int]:
    """The tokens that may follow ``ids``, of those asked for."""
    into = np.zeros(grammar._grammars.n_words, np.uint32)
    grammar.allowed(np.array(ids, np.int32).tobytes(), np.array(asked or [], np.int32), into)
    return set(np.flatnonzero(np.unpackbits(into.view(np.uint8), bitorder="little")).tolist())


def compiled(model: Model, params: SamplingParams) -> Grammar:
    schema = None if params.json_schema is None else str(params.json_schema)
    return model.grammars.compiled(params.grammar, schema)


def ends_of(model: Model) -> set[int]:
    return {t for t in range(model.vocab.n_tokens) if model.vocab.is_eog(t)}


@examples(40)
@given(rules=grammars, shortlists=st.booleans())
def test_masks_are_those_of_a_plain_parser(draft_model: Model, rules: list[Tree], shortlists: bool) -> None:
    vocab = draft_model.vocab
    try:
        grammar = compiled(draft_model, SamplingParams(grammar=gbnf(rules)))
    except ValueError as error:
        assume("nothing but itself" not in str(error))
        raise
    grammar._shortlists = shortlists
    pieces = {t: vocab.piece(t).decode("latin-1") for t in range(vocab.n_tokens)}
    tokens = {t: piece for t, piece in pieces.items() if piece and set(piece) <= set("ab")}
    singles = {piece: t for t, piece in tokens.items() if len(piece) == 1}
    plain = productions(rules)
    for length in range(4):
        for text in map("".join, itertools.product("ab", repeat=length)):
            begins, whole = parse(plain, text)
            if not begins:
                continue
            found = allowed(grammar, [singles[c] for c in text], sorted(tokens) if shortlists else None)
            wanted = {t for t, piece in tokens.items() if parse(plain, text + piece)[0]}
            assert found == wanted | (ends_of(draft_model) if whole else set()), text


def test_a_text_is_followed_back_and_forth(draft_model: Model) -> None:
    """Whatever was asked before, the answer is that of the text alone: also behind a draft that did not
    hold.
    """
    grammar = compiled(draft_model, SamplingParams(grammar='root ::= ("ab" | "b" [0-9]+ ",")*'))
    fresh = compiled(draft_model, SamplingParams(grammar='# again\nroot ::= ("ab" | "b" [0-9]+ ",")*'))
    rng = np.random.default_rng(0)
    texts: list[list[int]] = [[]]
    for _ in range(150):
        text = texts[rng.integers(len(texts))]
        found = allowed(grammar, text)
        fresh._grammars._states = [s for s in fresh._grammars._states if s.grammar() is not fresh]
        assert found == allowed(fresh, text)
        going_on = sorted(found - ends_of(draft_model))
        if going_on:
            texts.append([*text, int(rng.choice(going_on))])


def test_lists_that_end_in_themselves_may_be_long(draft_model: Model) -> None:
    vocab = draft_model.vocab
    for grammar in (
        'root ::= item root | item\nitem ::= [a-z] | " "',
        'root ::= [a-z ] root | ""',
        'root ::= root [a-z ] | ""',
    ):
        ids = vocab.encode("so it goes on and on " * 100).tolist()
        assert vocab.encode("x")[0] in allowed(compiled(draft_model, SamplingParams(grammar=grammar)), ids)


def test_a_choice_of_many_words(draft_model: Model) -> None:
    words = [f"name {i:04} of many" for i in range(900)]
    grammar = compiled(draft_model, SamplingParams(grammar="root ::= " + " | ".join(f'"{w}"' for w in words)))
    ids = draft_model.vocab.encode("name 0899 of many").tolist()
    assert allowed(grammar, ids) == ends_of(draft_model)
    with pytest.raises(ValueError, match="does not match the grammar"):
        allowed(grammar, draft_model.vocab.encode("name 0900").tolist())


def test_tokens_by_name_and_number(draft_model: Model) -> None:
    vocab = draft_model.vocab
    token = int(vocab.encode("the", add_special=False)[0])
    found = allowed(compiled(draft_model, SamplingParams(grammar=f'root ::= <[{token}]> "a"')), [])
    assert found == {token}
    found = allowed(compiled(draft_model, SamplingParams(grammar=f'root ::= !<[{token}]> "a"')), [])
    assert token not in found
    assert len(found) > vocab.n_tokens // 2
    check_grammar(SamplingParams(grammar="root ::= <[123456]> <think> !<[7]>"))  # a vocabulary's business
    for name in ("<|no such token|>", f"<[{vocab.n_tokens}]>"):
        with pytest.raises(ValueError, match="grammar"):
            draft_model.compiled(SamplingParams(grammar=f"root ::= {name}"))


# ---- hostile ones ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_ones_end(draft_model: Model, name: str) -> None:
    """By a typed error, or by a text like any other; in a few seconds of the processor and a bounded
    memory.
    """
    began, memory = time.thread_time(), resident_bytes()
    with contextlib.suppress(ValueError):
        grammar = compiled(draft_model, SamplingParams(**HOSTILE[name]))
        ids: list[int] = []
        rng = np.random.default_rng(1)
        for _ in range(200):
            going_on = sorted(allowed(grammar, ids) - ends_of(draft_model))
            if not going_on:
                break
            ids.append(int(rng.choice(going_on)))
    # Ten times what it takes; time of the processor, which nobody else's work makes longer.
    assert time.thread_time() - began < 10
    assert resident_bytes() - memory < 200 << 20


def resident_bytes() -> int:
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0  # not on Linux
    return int(pages) * mmap.PAGESIZE


@examples(150)
@given(
    text=st.text('ab01 \n\t"[]()|*+?{},.:=-^\\<>!#é你', max_size=60).map(lambda t: "root ::= " + t)
    | st.text(max_size=40)
    | st.tuples(st.sampled_from(sorted(HOSTILE)), st.integers(0, 2000), st.text(max_size=5)).map(
        lambda t: str(HOSTILE[t[0]].get("grammar", ""))[: t[1]] + t[2]
    )
)
def test_any_text_is_a_grammar_or_a_value_error(draft_model: Model, text: str) -> None:
    ids: list[int] = []
    with contextlib.suppress(ValueError):
        grammar = compiled(draft_model, SamplingParams(grammar=text))
        for _ in range(3):
            going_on = sorted(allowed(grammar, ids) - ends_of(draft_model))
            ids += going_on[:1]


def test_a_text_has_a_budget(draft_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "_SECONDS", 0.0)
    monkeypatch.setattr(grammar_module, "_SECONDS_PER_TOKEN", 0.0)
    params = SamplingParams(grammar='root ::= "budget" [a-z]*')
    with draft_model.context(n_ctx=256, n_threads=1) as context:
        with pytest.raises(ValueError, match="too much time"):
            context.verify([0], [5], sampling=params)
        assert context.memory.length(0) == 0
        monkeypatch.undo()
        assert context.verify([0], [5], sampling=params).tokens.shape == (1, 1)


@pytest.mark.parametrize("n_before", [0, 1])
def test_an_interruption_is_heard(draft_model: Model, monkeypatch: pytest.MonkeyPatch, n_before: int) -> None:
    """Ctrl-C while a grammar is asked: at the first token of a pass, and behind an accepted draft."""
    params = SamplingParams(temperature=0, grammar="root ::= [a-z ]*")
    real = grammar_module.Grammar.allowed
    calls: list[int] = []

    def interrupted(self: Grammar, *args: Any) -> bool:
        calls.append(1)
        if len(calls) > n_before:
            raise KeyboardInterrupt
        return real(self, *args)

    with draft_model.context(n_ctx=256, n_threads=1) as context:
        first = context.verify([0], [5], sampling=params).tokens[0].tolist()
        context.memory.clear()
        monkeypatch.setattr(grammar_module.Grammar, "allowed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            context.verify([0], [5], [first], sampling=params)
        assert context.memory.length(0) == 0
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            context.draft([0], [5], n_max=3, sampling=params)
        monkeypatch.undo()
        assert context.verify([0], [5], sampling=params, pos=0, start=1).tokens[0].tolist() == first


# ---- JSON Schema -------------------------------------------------------------------------------------------

schemas: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.sampled_from(
        [
            {"type": "integer", "minimum": -20, "maximum": 500},
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["red", "green", 7, None]},
            {"type": "string", "maxLength": 6},
            {"type": "string", "pattern": "^[a-c]{1,3}-[0-9]$"},
        ]
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.integers(0, 2)).map(
            lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[1] + 1}
        ),
        st.dictionaries(st.sampled_from(["a", "b c", "é"]), inner, min_size=1, max_size=3).map(
            lambda d: {
                "type": "object",
                "properties": d,
                "required": list(d)[:2],
                "additionalProperties": False,
            }
        ),
    ),
    max_leaves=4,
)


def is_instance(value: Any, schema: Any) -> bool:
    """Of the keywords that are used here, by their meaning."""
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    kind = schema["type"]
    if kind == "object":
        known = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(known)
            and all(is_instance(item, known[key]) for key, item in value.items())
        )
    if kind == "array":
        n = len(value) if isinstance(value, list) else -1
        return schema["minItems"] <= n <= schema["maxItems"] and all(
            is_instance(item, schema["items"]) for item in value
        )
    if kind == "string":
        return (
            isinstance(value, str)
            and len(value) <= schema.get("maxLength", 99)
            and re.search(schema.get("pattern", ""), value) is not None
        )
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    return value is None if kind == "null" else isinstance(value, bool)


@examples(20)
@given(schema=schemas, seed=st.integers(0, 2**32), temperature=st.sampled_from([0.0, 1.0, 2.0]))
def test_a_text_by_a_schema_is_an_instance_of_it(
    draft_model: Model, schema: dict[str, Any], seed: int, temperature: float
) -> None:
    vocab = draft_model.vocab
    spaces = {t: -10.0 for t in range(vocab.n_tokens) if vocab.piece(t).isspace()}  # or there is little else
    params = SamplingParams(temperature=temperature, seed=seed, json_schema=schema, logit_bias=spaces)
    prompt = make_prompt(draft_model, 4, seed=seed)
    wanted = one_by_one(draft_model, prompt, params, 100)
    assume(vocab.is_eog(wanted[-1]))
    assert is_instance(json.loads(vocab.decode(wanted)), schema)


@pytest.mark.parametrize(
    ("text", "given", "accepted"),
    [
        ('{"a":1}', {}, True),
        ('{"a": 1}', {}, True),
        ('{\n  "a": 1\n}', {}, True),
        ('{  "a": 1}', {}, False),
        ('{\n\n"a": 1}', {}, False),
        ('{\n\n"a":1}', {"x-guidance": {"whitespace_pattern": "\\n+"}}, True),
    ],
)
def test_the_space_between_the_parts_of_json_is_bounded(
    draft_model: Model, text: str, given: dict[str, Any], accepted: bool
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], **given}
    grammar = compiled(draft_model, SamplingParams(json_schema=schema))
    ids = draft_model.vocab.encode(text).tolist()
    taken = all(token in allowed(grammar, ids[:n], [token]) for n, token in enumerate(ids))
    assert taken is accepted


@examples(10)
@given(schema=schemas, seed=st.integers(0, 2**32), data=st.data())
def test_drafts_change_nothing_of_a_text_by_a_schema(
    draft_model: Model, schema: dict[str, Any], seed: int, data: st.DataObject
) -> None:
    params = SamplingParams(seed=seed, json_schema=schema)
    prompt = make_prompt(draft_model, 4, seed=seed)
    wanted = one_by_one(draft_model, prompt, params, 24)
    text = prompt.tolist()
    with draft_model.context(n_ctx=256, **EXACT) as context:
        context.decode(prompt[:-1])
        while len(text) < len(prompt) + len(wanted):
            ahead = wanted[len(text) - len(prompt) :]
            right = data.draw(st.integers(0, min(5, len(ahead))))
            wrong = data.draw(st.lists(st.integers(-1, draft_model.vocab.n_tokens), max_size=2))
            pieces: list[Any] = [ahead[:right] + wrong]
            verdict = context.verify([0], text[-1:], pieces, sampling=params)
            text += verdict.tokens[0, : int(verdict.n_accepted[0]) + 1].tolist()
    assert text[len(prompt) :][: len(wanted)] == wanted


def test_a_schema_is_kept_as_text_in_its_order() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"type": "null"}}}
    params = SamplingParams(json_schema=schema)
    assert params.json_schema == json.dumps(schema, separators=(",", ":"))
    assert params == SamplingParams(json_schema=json.dumps(schema, indent=2))
    assert hash(params) == hash(replace(params))
    assert params.has_grammar
    assert not SamplingParams().has_grammar


@pytest.mark.parametrize(
    ("schema", "kind", "complaint"),
    [
        ("{", ValueError, "not JSON"),
        ("[]", ValueError, "expected an object"),
        (5, TypeError, "expected a mapping or JSON text"),
        ({"a": {1, 2}}, ValueError, "holds a set"),
        ({"a": float("nan")}, ValueError, "not JSON"),
        ("[" * 100_000, ValueError, "not JSON"),
    ],
)
def test_what_is_no_schema_is_refused(schema: Any, kind: type[Exception], complaint: str) -> None:
    with pytest.raises(kind, match=complaint):
        SamplingParams(json_schema=schema)
    with pytest.raises(ValueError, match="exclude each other"):
        SamplingParams(json_schema={}, grammar='root ::= "a"')


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "fish"}, "fish"),
        ({"type": "string", "format": "fish"}, "fish"),
        ({"type": "string", "pattern": "(?=a)b"}, "regex"),
        ({"$ref": "http://example.com/x.json"}, "example.com"),
        ({"type": "string", "minLength": "x" * 140_000}, "140"),
    ],
)
def test_a_schema_that_cannot_be_used_says_why(
    draft_model: Model, schema: dict[str, Any], complaint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    params = SamplingParams(json_schema=schema)
    with pytest.raises(ValueError, match=complaint) as caught:
        draft_model.compiled(params)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=complaint):
        check_grammar(params)  # without the vocabulary, too
    assert capfd.readouterr() == ("", "")


def test_without_the_package_the_advice_is_how_to_get_it(
    draft_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr(draft_model.grammars, "_tokenizer", None)
    assert not have_grammars()
    with pytest.raises(ImportError, match=r"sllm\[grammar\]"):
        draft_model.compiled(SamplingParams(grammar='root ::= "a package"'))
