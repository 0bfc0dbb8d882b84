"""What has been said in a conversation, what of it fits into the context, and the file it is kept in."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm.cli.console import CommandError
from sllm.folders import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Transcript", "Turn"]


@dataclass
class Turn:
    """A message of the user's, and the answer.

    Attributes:
        message: what the user said.
        answer: what the model said, or as much as there was of it; None: nothing yet.
        reasoning: what it thought before, where it said so.

    """

    message: str
    answer: str | None = None
    reasoning: str = ""


@dataclass
class Transcript:
    """A conversation.

    Attributes:
        system: the system message, or None.
        turns: from the first on.
        n_left_out: so many of them, the oldest, are no longer sent to the model.

    """

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    n_left_out: int = 0

    def messages(self, *, first: int = 0) -> list[dict[str, Any]]:
        """The conversation from turn ``first`` on, after the system message, as
        :meth:`sllm.Model.chat` takes it.
        """
        found: list[dict[str, Any]] = []
        if self.system is not None:
            found.append({"role": "system", "content": self.system})
        for turn in self.turns[first:]:
            found.append({"role": "user", "content": turn.message})
            if turn.answer is not None:
                said = {"role": "assistant", "content": turn.answer}
                found.append(said | ({"reasoning_content": turn.reasoning} if turn.reasoning else {}))
        return found

    def sent(self) -> list[dict[str, Any]]:
        """What of it is sent."""
        return self.messages(first=self.n_left_out)

    def fit(self, n_tokens: Callable[[Sequence[dict[str, Any]]], int], n_ctx: int, room: int) -> int:
        """Leave the oldest turns out where a prompt and an answer of ``room`` tokens have no place.

        As many are left out as make the prompt half of the context: the prompt's beginning changes, all of it
        is computed again, and that is not to happen with every turn.

        Args:
            n_tokens: the length of a prompt.
            n_ctx: positions of the context.
            room: tokens of the answer.

        Returns:
            How many turns were left out now; the last one always stays.

        """
        if n_tokens(self.sent()) + room <= n_ctx:
            return 0
        before = self.n_left_out
        while self.n_left_out < len(self.turns) - 1 and (
            self.n_left_out == before or n_tokens(self.sent()) > n_ctx // 2
        ):
            self.n_left_out += 1
        return self.n_left_out - before

    def undo(self) -> Turn | None:
        """Take the last turn back; None: there is none."""
        if not self.turns:
            return None
        turn = self.turns.pop()
        self.n_left_out = min(self.n_left_out, max(len(self.turns) - 1, 0))
        return turn

    def clear(self) -> None:
        """Begin anew; the system message stays."""
        self.turns.clear()
        self.n_left_out = 0

    # ---- files

    def save(self, path: Path) -> None:
        """Write the conversation, for this user alone, as JSON: ``{"messages": [...]}``.

        Raises:
            CommandError: a file is there that holds no conversation; it is left as it is.
            OSError: it cannot be written.

        """
        if path.exists():
            try:
                Transcript.load(path)
            except CommandError:
                raise CommandError(
                    f"{path} is there already and holds no conversation: name another file"
                ) from None
        text = json.dumps({"messages": self.messages()}, ensure_ascii=False, indent=1) + "\n"
        with replacing(path) as draft:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)

    @classmethod
    def load(cls, path: Path) -> Transcript:
        """Read what :meth:`save` has written, or a list of messages.

        Raises:
            CommandError: it is something else; says what.
            OSError: it cannot be read.

        """
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            raise CommandError(f"{path} holds no conversation: it is not JSON") from None
        messages = found.get("messages") if isinstance(found, dict) else found
        if not isinstance(messages, list):
            raise CommandError(f"{path} holds no conversation: expected a list of messages")
        loaded = cls()
        for i, message in enumerate(messages):
            role, content, reasoning = _parts(message)
            expected = "assistant" if loaded.turns and loaded.turns[-1].answer is None else "user"
            if role == "system" and i == 0:
                loaded.system = content
            elif role == "user" == expected:
                loaded.turns.append(Turn(content))
            elif role == "assistant" == expected:
                loaded.turns[-1].answer, loaded.turns[-1].reasoning = content, reasoning
            else:
                raise CommandError(
                    f"{path} holds no conversation that can go on here: message {i + 1} is of role {role!r},"
                    f" expected {expected!r}, with a text"
                )
        if loaded.turns and loaded.turns[-1].answer is None:
            raise CommandError(f"{path} ends with a message that has no answer")
        return loaded


def _parts(message: object) -> tuple[object, str, str]:
    """Role, text and reasoning of a message; no role where the text is none."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        return None, "", ""
    reasoning = message.get("reasoning_content")
    return message.get("role"), message["content"], reasoning if isinstance(reasoning, str) else ""
