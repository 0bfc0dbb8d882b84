"""Where a text reasons and where it answers, by the marks that models are trained to write.

A mark is a token where the vocabulary has it as one (``<think>`` of Qwen3 and DeepSeek, ``[THINK]`` of
Mistral, the channels of gpt-oss), and counts wherever it stands. Where it has not, and the chat template
writes it as plain text, the text itself is looked at: an opening mark counts at the beginning of an answer
alone, for further on it is a word that the answer is about.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sllm.engine.vocab import Vocab

__all__ = ["Kind", "Part", "Reader", "SpelledMarks", "starts_with"]

Kind = Literal["text", "reasoning", "control"]
"""What some of a text is: said to the user, reasoning before that, or a mark."""

Part = tuple[Kind, str]
"""A piece of text of one kind."""

_PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>", "<channel|>"),
    ("◁think▷", "◁/think▷"),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
)
"""Marks that begin and end reasoning, as published templates write them."""


@dataclass(frozen=True)
class _Channels:
    """A format in which each part of an answer has a header, as gpt-oss has it:
    ``<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...``.

    Attributes:
        headers: tokens after which a header follows.
        bodies: tokens that end a header, and the kind of what follows; None: the header says it.
        ends: tokens after which a part is over.

    """

    headers: tuple[str, ...]
    bodies: tuple[tuple[str, Kind | None], ...]
    ends: tuple[str, ...]


_CHANNELS = (
    _Channels(("<|start|>", "<|channel|>"), (("<|message|>", None),), ("<|end|>", "<|return|>", "<|call|>")),
    _Channels(("<|begin|>",), (("<|think|>", "reasoning"), ("<|content|>", "text")), ("<|end|>",)),
)

_REASONING_HEADERS = (b"analysis", b"assistant to=self")

_MOST_READ = 4096
"""Tokens at the end of a prompt that are looked at for how the answer begins."""


@dataclass
class _Marks:
    """The marks of a vocabulary, by token id."""

    opens: set[int] = field(default_factory=set)
    closes: set[int] = field(default_factory=set)
    headers: set[int] = field(default_factory=set)
    bodies: dict[int, Kind | None] = field(default_factory=dict)
    spelled: tuple[tuple[str, str], ...] = ()  # what the template writes as plain text

    def __contains__(self, token: int) -> bool:
        return token in self.opens or token in self.closes or token in self.headers or token in self.bodies

    @classmethod
    def of(cls, vocab: Vocab, template: str | None) -> _Marks:
        """What this vocabulary has as tokens, and this template as text."""

        def token(mark: str) -> int | None:
            found = vocab.encode(mark, add_special=False, parse_special=True)
            return int(found[0]) if len(found) == 1 else None

        marks, spelled = cls(), []
        for pair in _PAIRS:
            begin, end = token(pair[0]), token(pair[1])
            if begin is not None and end is not None:
                marks.opens.add(begin)
                marks.closes.add(end)
            elif template is not None and all(mark in template for mark in pair):
                spelled.append(pair)
        marks.spelled = tuple(spelled)
        for form in _CHANNELS:
            headers, ends = [token(mark) for mark in form.headers], [token(mark) for mark in form.ends]
            bodies = [(token(mark), kind) for mark, kind in form.bodies]
            if headers[0] is None or bodies[0][0] is None:
                continue
            marks.headers.update(mark for mark in headers if mark is not None)
            marks.bodies.update((body, kind) for body, kind in bodies if body is not None)
            marks.closes.update(mark for mark in ends if mark is not None)
        return marks


class Reader:
    """Follows a text token by token, and says of each one what it is.

    Args:
        vocab: the vocabulary.
        template: the model's chat template, if it has one.

    Attributes:
        state: the kind of a token that is no mark.
        spelled: pairs of marks that are to be looked for in the text.

    """

    def __init__(self, vocab: Vocab, template: str | None = None) -> None:
        self._vocab = vocab
        self._marks = _Marks.of(vocab, template)
        self._is_control: dict[int, bool] = {}
        self._header = b""  # what it says so far
        self.state: Kind = "text"
        self.spelled = self._marks.spelled

    def copy(self) -> Reader:
        """The same state, to go on with on trial."""
        twin = Reader.__new__(Reader)
        twin.__dict__.update(self.__dict__)
        return twin

    def read(self, token: int) -> Kind:
        """What the next token is."""
        marks = self._marks
        if token in marks:
            if token in marks.headers:
                self.state, self._header = "control", b""
            elif token in marks.bodies:
                said = marks.bodies[token]
                reasons = self._header.strip().startswith(_REASONING_HEADERS)
                self.state = said or ("reasoning" if reasons else "text")
            else:
                self.state = "reasoning" if token in marks.opens else "text"
            return "control"
        if self._control(token):
            return "control"
        if self.state == "control":
            self._header += self._vocab.piece(token)
        return self.state

    def _control(self, token: int) -> bool:
        known = self._is_control.get(token)
        if known is None:
            known = self._is_control[token] = self._vocab.is_control(token)
        return known

    def open(self, prompt: Sequence[int]) -> str | None:
        """Take the state in which a prompt leaves off: a template may have opened the reasoning itself.

        Returns the closing mark where this is open as plain text, else None.
        """
        marks = self._marks
        if not (marks.opens or marks.headers or marks.spelled):
            return None
        tail = prompt[-_MOST_READ:]
        begin = next(
            (
                i
                for i in range(len(tail), 0, -1)
                if tail[i - 1] not in self._marks and self._control(tail[i - 1])
            ),
            0,
        )
        for token in tail[begin:]:
            self.read(token)
        text = b"".join(map(self._vocab.piece, tail[begin:])).decode("utf-8", "replace")
        for opening, closing in self.spelled:
            begun = text.lstrip().startswith(opening) and closing not in text
            if begun or text.rstrip().endswith(opening):
                return closing
        return None


class SpelledMarks:
    """Finds marks that are plain text, which may come spread over tokens.

    Args:
        pairs: opening and closing marks.
        closing: the mark that ends the reasoning in which the text begins, if it does.

    """

    def __init__(self, pairs: Sequence[tuple[str, str]], closing: str | None = None) -> None:
        self._pairs = pairs
        self._closing = closing
        self._begun = closing is not None  # whether anything but white space has been said
        self._held = ""  # may be a part of a mark

    def copy(self) -> SpelledMarks:
        """The same state, to go on with on trial."""
        twin = SpelledMarks(self._pairs, self._closing)
        twin._begun, twin._held = self._begun, self._held
        return twin

    @property
    def state(self) -> Kind:
        """What text is here, if no mark begins."""
        return "text" if self._closing is None else "reasoning"

    def feed(self, part: Part) -> list[Part]:
        """What of the text up to here is certain, with the next part of it."""
        kind, text = part
        if kind != "text" or not self._pairs:  # the tokens have said what it is
            return [*self.finish(), part]
        self._held += text
        found: list[Part] = []
        while True:
            if self._closing is not None:
                before, mark, after = self._held.partition(self._closing)
                if not mark:
                    break
                found += [("reasoning", before), ("control", mark)]
                self._closing, self._held = None, after
            elif self._begun:
                break
            else:
                said = self._held.lstrip()
                pair = next((pair for pair in self._pairs if said.startswith(pair[0])), None)
                if pair is None:
                    break
                found += [("text", self._held[: -len(said)]), ("control", pair[0])]
                self._closing, self._held, self._begun = pair[1], said[len(pair[0]) :], True
        found += self._certain()
        return [part for part in found if part[1]]

    def _certain(self) -> list[Part]:
        held = self._held
        if self._closing is not None:
            keep = starts_with(held, [self._closing])
            self._held = held[len(held) - keep :]
            return [("reasoning", held[: len(held) - keep])]
        if not self._begun:
            said = held.lstrip()
            if any(opening.startswith(said) for opening, _ in self._pairs):
                return []  # white space alone, too: the mark may come after it
            self._begun = True
        self._held = ""
        return [("text", held)]

    def finish(self) -> list[Part]:
        """What is left at the end."""
        held, self._held = self._held, ""
        return [(self.state, held)] if held else []


def starts_with(text: str, words: Sequence[str]) -> int:
    """How many characters at the end of ``text`` one of the words may begin with."""
    return max((n for word in words for n in range(1, len(word)) if text.endswith(word[:n])), default=0)
