"""What of a text is reasoning, what is said, what are marks: by vocabularies that have the marks or not."""

from __future__ import annotations

import itertools
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import PIECES, gguf, llama

import sllm
from sllm.generation.reasoning import SpelledMarks
from sllm.targets.base import Commit

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sllm.engine.vocab import Vocab

CONTROL, USER_DEFINED = 3, 4
THINKERS = {"<|user|>": CONTROL, "<|end|>": CONTROL, "<think>": USER_DEFINED, "</think>": USER_DEFINED}
MISTRAL = {"[INST]": CONTROL, "[THINK]": CONTROL, "[/THINK]": CONTROL}
# llama.cpp makes most of these user-defined, so their texts are shown.
HARMONY = dict.fromkeys(
    ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|constrain|>"), CONTROL
)
SOLAR = dict.fromkeys(("<|begin|>", "<|end|>", "<|think|>", "<|content|>"), CONTROL)
PLAIN = {"<|user|>": CONTROL, "<|end|>": CONTROL}
SPELLED = "{{ '<think>' }}{{ '</think>' }}"


class Script:
    """A target whose text is written down: what a model would say, in commits of given sizes."""

    def __init__(
        self, vocab: Vocab, tokens: Sequence[int], cuts: Sequence[tuple[int, int]], template: str | None
    ) -> None:
        self.vocab = vocab
        self.chat_template = template
        self._tokens = tuple(tokens)
        self._cuts = cuts

    def open(self, tokens: Any, sampling: Any, max_tokens: Any) -> ScriptedText:
        return ScriptedText(self._tokens, len(tokens), self._cuts)

    def close(self) -> None:
        pass


class ScriptedText:
    can_verify = True
    can_branch = False

    def __init__(self, tokens: tuple[int, ...], pos: int, cuts: Sequence[tuple[int, int]]) -> None:
        self.finish_reason: str | None = None
        self._tokens, self._pos = tokens, pos
        self._cuts = itertools.cycle(cuts)

    def __next__(self) -> Commit:
        size, accepted = next(self._cuts)
        part, self._tokens = self._tokens[:size], self._tokens[size:]
        commit = Commit(self._pos, part, min(accepted, len(part) - 1), accepted, 0.0)
        self._pos += len(part)
        if not self._tokens:
            self.finish_reason = "eog"
        return commit

    def hint(self, pos: int, tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        pass

    def cancel(self) -> None:
        pass

    def close(self) -> None:
        pass


@contextmanager
def vocabulary(folder: Path, special: dict[str, int], template: str | None = None) -> Iterator[Vocab]:
    """A vocabulary of bytes, a space, and these tokens."""
    meta = dict(llama()[0])
    meta["tokenizer.ggml.tokens"] = [*PIECES, "▁", *special]
    meta["tokenizer.ggml.scores"] = [0.0] * (len(PIECES) + 1 + len(special))
    meta["tokenizer.ggml.token_type"] = [2, 3, 3] + [6] * 256 + [1, *special.values()]
    meta["tokenizer.ggml.add_space_prefix"] = False
    if template is not None:
        meta["tokenizer.chat_template"] = template
    path = folder / "vocabulary.gguf"
    path.write_bytes(gguf(meta, {}))
    with sllm.Model(path, vocab_only=True) as model:
        yield model.vocab


@pytest.fixture(scope="module")
def vocabs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Vocab]]:
    made: dict[str, Vocab] = {}
    kinds = {"thinkers": THINKERS, "mistral": MISTRAL, "harmony": HARMONY, "solar": SOLAR, "plain": PLAIN}
    with ExitStack() as stack:
        for name, special in kinds.items():
            made[name] = stack.enter_context(vocabulary(tmp_path_factory.mktemp(name), special))
        yield made


def tokens_of(vocab: Vocab, text: str) -> list[int]:
    tokens: list[int] = vocab.encode(text, add_special=False, parse_special=True).tolist()
    return tokens


def kinds_in(runs: Sequence[sllm.Run]) -> list[tuple[str, str]]:
    """The texts of the runs, those of one kind that follow each other joined, without empty ones."""
    shown = [run for run in runs if run.text]
    return [
        (kind, "".join(run.text for run in group))
        for kind, group in itertools.groupby(shown, key=lambda run: run.kind)
    ]


def said(
    vocab: Vocab,
    prompt: str,
    answer: str,
    *,
    template: str | None = None,
    cuts: Sequence[tuple[int, int]] = ((1, 0),),
    **options: Any,
) -> list[sllm.Run]:
    target = Script(vocab, tokens_of(vocab, answer), cuts, template)
    return list(sllm.generate(target, np.array(tokens_of(vocab, prompt), np.int32), **options))


TOLD: list[tuple[str, str | None, str, str, list[tuple[str, str]]]] = [
    (  # the model opens it
        "thinkers",
        None,
        "<|user|>hi<|end|>",
        "<think>\n好\n</think>\n\nyes 🙂<|end|>",
        [("control", "<think>"), ("reasoning", "\n好\n"), ("control", "</think>"), ("text", "\n\nyes 🙂")],
    ),
    (  # the prompt has opened it
        "thinkers",
        None,
        "<|user|>hi<|end|><think>\n",
        "hm</think>yes<|end|>",
        [("reasoning", "hm"), ("control", "</think>"), ("text", "yes")],
    ),
    (  # and closed it
        "thinkers",
        None,
        "<|user|>hi<|end|><think>\n\n</think>\n\n",
        "yes<|end|>",
        [("text", "yes")],
    ),
    (  # the reasoning goes on from a prefill
        "thinkers",
        None,
        "<|user|>hi<|end|><think>\nLet me",
        " see</think>yes",
        [("reasoning", " see"), ("control", "</think>"), ("text", "yes")],
    ),
    (  # what an earlier turn has left open is over
        "thinkers",
        None,
        "<think>hm<|end|><|user|>hi<|end|>",
        "yes",
        [("text", "yes")],
    ),
    (  # between tool calls, too
        "thinkers",
        None,
        "<|end|>",
        "<think>a</think>b<think>c</think>d",
        [
            ("control", "<think>"),
            ("reasoning", "a"),
            ("control", "</think>"),
            ("text", "b"),
            ("control", "<think>"),
            ("reasoning", "c"),
            ("control", "</think>"),
            ("text", "d"),
        ],
    ),
    ("mistral", None, "[INST]", "[THINK]hm[/THINK]yes", [("reasoning", "hm"), ("text", "yes")]),
    ("mistral", None, "[INST][THINK]", "hm[/THINK]yes", [("reasoning", "hm"), ("text", "yes")]),
    (
        "harmony",
        None,
        "<|start|>user<|message|>hi<|end|><|start|>assistant",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes<|return|>",
        [
            ("control", "<|channel|>analysis<|message|>"),
            ("reasoning", "hm"),
            ("control", "<|end|><|start|>assistant<|channel|>final<|message|>"),
            ("text", "yes"),
        ],
    ),
    (
        "harmony",
        None,
        "<|start|>assistant<|channel|>analysis<|message|>hm<|end|>",
        "<|start|>assistant<|channel|>commentary to=f <|constrain|>json<|message|>{}<|call|>",
        [
            ("control", "<|start|>assistant<|channel|>commentary to=f <|constrain|>json<|message|>"),
            ("text", "{}"),
        ],
    ),
    (
        "harmony",
        None,
        "<|start|>assistant<|channel|>final<|message|>The",
        " end<|return|>",
        [("text", " end")],
    ),
    (
        "solar",
        None,
        "<|begin|>assistant",
        "<|think|>hm<|end|><|begin|>assistant<|content|>yes<|end|>",
        [("reasoning", "hm"), ("control", "assistant"), ("text", "yes")],
    ),
    (  # no such tokens, but the template writes it
        "plain",
        SPELLED,
        "<|user|>hi<|end|>",
        " \n<think>好 < </ </thin </think>\n\nyes",
        [
            ("text", " \n"),
            ("control", "<think>"),
            ("reasoning", "好 < </ </thin "),
            ("control", "</think>"),
            ("text", "\n\nyes"),
        ],
    ),
    (
        "plain",
        SPELLED,
        "<|end|><think>\n",
        "hm</think>yes",
        [("reasoning", "hm"), ("control", "</think>"), ("text", "yes")],
    ),
    ("plain", SPELLED, "<|end|><think>\n", "hm</thi", [("reasoning", "hm</thi")]),
    ("plain", SPELLED, "<|end|>", "<thin", [("text", "<thin")]),
    ("plain", SPELLED, "<|end|>", "  ", [("text", "  ")]),
    (  # further on it is a word
        "plain",
        SPELLED,
        "<|end|>",
        "Write <think>a</think>.",
        [("text", "Write <think>a</think>.")],
    ),
    ("plain", SPELLED, "<|user|>what is <think>?<|end|>", "It is a", [("text", "It is a")]),
    ("plain", None, "<|end|><think>\n", "hm</think>yes", [("text", "hm</think>yes")]),
    ("plain", "no marks", "<|end|>", "<think>hm</think>", [("text", "<think>hm</think>")]),
]


@pytest.mark.parametrize(("name", "template", "prompt", "answer", "wanted"), TOLD)
def test_kinds(
    vocabs: dict[str, Vocab],
    name: str,
    template: str | None,
    prompt: str,
    answer: str,
    wanted: list[tuple[str, str]],
) -> None:
    vocab = vocabs[name]
    n_prompt, tokens = len(tokens_of(vocab, prompt)), tokens_of(vocab, answer)
    plain = b"".join(map(vocab.piece, tokens)).decode()
    for cuts in ([(1, 0)], [(2, 1)], [(3, 2), (1, 0)], [(1000, 999)], [(1000, 5)]):
        runs = said(vocab, prompt, answer, template=template, cuts=cuts)
        assert kinds_in(runs) == wanted
        assert "".join(run.text for run in runs) == plain
        assert [token for run in runs for token in run.tokens] == tokens
        pos = n_prompt
        for run in runs:
            assert run.pos == pos and (run.tokens or run.text)
            assert run.n_accepted == (len(run.tokens) if run.source == "draft" else 0)
            pos += len(run.tokens)
        # a control token is in a run of its kind, with text or without
        control = {token for token in tokens if vocab.is_control(token)}
        for run in runs:
            if control & set(run.tokens):
                assert run.kind == "control"


def test_control_tokens_are_shown_on_request(vocabs: dict[str, Vocab]) -> None:
    answer = "[THINK]hm[/THINK]yes</s>"
    runs = said(vocabs["mistral"], "[INST]", answer, special=True)
    assert kinds_in(runs) == [
        ("control", "[THINK]"),
        ("reasoning", "hm"),
        ("control", "[/THINK]"),
        ("text", "yes"),
        ("control", "</s>"),
    ]
    runs = said(vocabs["mistral"], "[INST]", answer, special=True, stop=["[/THINK]"])
    assert kinds_in(runs) == [("control", "[THINK]"), ("reasoning", "hm")]
    assert "".join(run.text for run in said(vocabs["mistral"], "[INST]", answer, stop="[/")) == "hmyes"


def test_what_ends_a_turn_is_control_where_it_is_typed_as_text(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|role_end|>{% endfor %}"
    with vocabulary(tmp_path, {"<|role_end|>": USER_DEFINED}, template) as vocab:
        runs = said(vocab, "hi", "yes<|role_end|>")
        assert kinds_in(runs) == [("text", "yes"), ("control", "<|role_end|>")]


def test_marks_that_are_spelled_and_tokens_that_are_not(vocabs: dict[str, Vocab]) -> None:
    vocab = vocabs["plain"]
    runs = said(vocab, "<|user|>", "<thin<|end|>", template=SPELLED, special=True)
    assert kinds_in(runs) == [("text", "<thin"), ("control", "<|end|>")]
    # What shows nothing yet is of the kind that it stands in.
    runs = said(vocab, "<|end|><think>\n", "好</think>", template=SPELLED)
    assert [run.kind for run in runs[:3]] == ["reasoning"] * 3
    assert [run.text for run in runs[:3]] == ["", "", "好"]


def test_half_a_character_before_a_mark(vocabs: dict[str, Vocab]) -> None:
    vocab = vocabs["thinkers"]
    half, mark = "好".encode()[:2], tokens_of(vocab, "</think>")
    tokens = [*tokens_of(vocab, "<think>"), *(3 + byte for byte in half), *mark, *tokens_of(vocab, "yes")]
    target = Script(vocab, tokens, [(1, 0)], None)
    runs = list(sllm.generate(target, np.array(tokens_of(vocab, "<|end|>"), np.int32)))
    assert kinds_in(runs) == [
        ("control", "<think>"),
        ("reasoning", "\ufffd"),
        ("control", "</think>"),
        ("text", "yes"),
    ]


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "</th", "a", "好", "\n", " ", "ab", "<|end|>"])),
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=3),
    st.lists(st.sampled_from(["ab", "</think>a", "b\n", "好a", "think"]), max_size=2),
    st.sampled_from(["thinkers", "plain"]),
    st.sampled_from(["<|end|>", "<|end|><think>\n"]),
)
def test_the_text_is_what_it_was_without_kinds(
    vocabs: dict[str, Vocab],
    words: list[str],
    cuts: list[tuple[int, int]],
    stop: list[str],
    name: str,
    prompt: str,
) -> None:
    vocab = vocabs[name]
    tokens = tokens_of(vocab, "".join(words) + "<|end|>")
    template = SPELLED if name == "plain" else None
    stream = sllm.generate(
        Script(vocab, tokens, cuts, template), np.array(tokens_of(vocab, prompt), np.int32), stop=stop
    )
    runs = list(stream)
    text, used = "", 0
    for used in range(1, len(tokens) + 1):
        text = b"".join(map(vocab.piece, tokens[:used])).decode("utf-8", "ignore")
        found = [at for at in (text.find(s) for s in stop) if at >= 0]
        if found:
            text = text[: min(found)]
            break
    assert "".join(run.text for run in runs) == text
    assert [token for run in runs for token in run.tokens] == tokens[:used]
    assert stream.stats.n_tokens == used
    # No character is of another kind for how it came: one token at a time says the same.
    alone = said(vocab, prompt, "".join(words) + "<|end|>", template=template, stop=stop)
    assert kinds_in(alone) == kinds_in(runs)


@given(st.text(alphabet="<think>/ab \n", max_size=40), st.data())
def test_spelled_marks_lose_nothing(text: str, data: st.DataObject) -> None:
    marks = SpelledMarks([("<think>", "</think>")], data.draw(st.sampled_from([None, "</think>"])))
    whole = marks.copy()
    parts, at = [], 0
    while at < len(text):
        n = data.draw(st.integers(1, 4))
        parts += marks.feed(("text", text[at : at + n]))
        at += n
    parts += marks.finish()
    assert "".join(part for _, part in parts) == text

    def by_character(parts: list[Any]) -> list[tuple[str, str]]:
        return [(kind, char) for kind, part in parts for char in part]

    assert by_character(parts) == by_character([*whole.feed(("text", text)), *whole.finish()])


def test_the_template_of_every_target_is_there() -> None:
    with (
        sllm.Worker(sllm.embedded.TARGET) as worker,
        sllm.connect(worker.uri) as remote,
        sllm.LocalTarget(sllm.embedded.TARGET) as local,
    ):
        assert remote.target().chat_template == local.chat_template == local.model.chat_template is not None
