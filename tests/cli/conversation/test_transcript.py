"""What has been said: what of it is sent, what leaves where the context is full, and the files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from sllm.cli.console import CommandError
from sllm.cli.conversation.transcript import Transcript, Turn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def talk(n: int, *, system: str | None = None) -> Transcript:
    return Transcript(system, [Turn(f"message {i}", f"answer {i}") for i in range(n)])


def n_tokens(messages: Sequence[dict[str, Any]]) -> int:
    """Ten for each message."""
    return 10 * len(messages)


def test_messages() -> None:
    made = talk(1, system="Be brief.")
    made.turns[0].reasoning = "hm"
    made.turns.append(Turn("and now"))
    assert made.messages() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "message 0"},
        {"role": "assistant", "content": "answer 0", "reasoning_content": "hm"},
        {"role": "user", "content": "and now"},
    ]


def test_the_oldest_turns_leave() -> None:
    made = talk(9, system="Be brief.")
    made.turns.append(Turn("and now"))  # 20 messages, 200 tokens
    assert made.fit(n_tokens, 250, 50) == 0
    # Half of the context: 11 messages with the first one, so that not every turn is to leave some out.
    assert made.fit(n_tokens, 220, 30) == 5
    assert made.sent()[0]["role"] == "system" and made.sent()[1]["content"] == "message 5"
    assert len(made.messages()) == 20
    assert made.fit(n_tokens, 220, 30) == 0
    # One at least, where the prompt is short and the answer long; and never the last message.
    assert made.fit(n_tokens, 220, 150) == 1
    assert made.fit(n_tokens, 10, 1) == 3
    assert [m["content"] for m in made.sent()] == ["Be brief.", "and now"]
    assert made.fit(n_tokens, 10, 1) == 0


def test_undo_and_clear() -> None:
    made = talk(3)
    made.n_left_out = 2
    turn = made.undo()
    assert turn is not None and turn.message == "message 2"
    assert made.n_left_out == 1 and made.sent()[0]["content"] == "message 1"
    made.system = "Be brief."
    made.clear()
    assert made.undo() is None
    assert made.messages() == [{"role": "system", "content": "Be brief."}]
    assert made.n_left_out == 0


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    made = talk(2, system="从前")
    made.turns[1].reasoning = "嗯"
    made.n_left_out = 1
    made.save(path)
    assert "从前" in path.read_text(encoding="utf-8")
    again = Transcript.load(path)
    assert (again.system, again.turns, again.n_left_out) == ("从前", made.turns, 0)
    talk(1).save(path)  # over one of its own kind
    assert Transcript.load(path).turns == talk(1).turns
    path.write_text(json.dumps(made.messages()), encoding="utf-8")  # a list alone
    assert Transcript.load(path).turns == made.turns
    other = tmp_path / "notes.txt"
    other.write_text("mine", encoding="utf-8")
    with pytest.raises(CommandError, match="holds no conversation: name another file"):
        made.save(other)
    assert other.read_text(encoding="utf-8") == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "talk.json"]


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("mine", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        (b"\xff\xfe", "it is not JSON"),
        ({"turns": []}, "expected a list of messages"),
        ([USER, USER], "message 2 is of role 'user', expected 'assistant'"),
        ([ANSWER], "message 1 is of role 'assistant', expected 'user'"),
        ([USER, ANSWER, {"role": "system", "content": "x"}], "message 3 is of role 'system'"),
        ([USER, {"role": "tool", "content": "x"}], "message 2 is of role 'tool'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1 is of role None"),
        (["Hi"], "message 1 is of role None"),
        ([{"role": ["user"], "content": "x"}], r"message 1 is of role \['user'\]"),
        ([USER, ANSWER, USER], "ends with a message that has no answer"),
    ],
)  # fmt: skip
def test_files_that_hold_something_else(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "talk.json"
    data = content if isinstance(content, bytes) else content.encode() if isinstance(content, str) else None
    path.write_bytes(json.dumps(content).encode() if data is None else data)
    with pytest.raises(CommandError, match=words):
        Transcript.load(path)
