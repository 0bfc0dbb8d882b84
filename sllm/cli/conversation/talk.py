"""The conversation itself: messages and commands in, answers out, whatever happens to one of them."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sllm.cli.console import DIM, CommandError, WriteError, count, reason, table
from sllm.cli.conversation.answering import read_answer
from sllm.cli.conversation.lines import message_of
from sllm.cli.conversation.transcript import Transcript, Turn
from sllm.cli.run_report import ShownText
from sllm.errors import ContextFullError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sllm.cli.console import Output
    from sllm.cli.conversation.answering import Answers
    from sllm.cli.conversation.lines import Lines

__all__ = ["COMMANDS", "Talk"]

COMMANDS = {
    "/help": ("", "list the commands"),
    "/retry": ("", "another answer to the last message"),
    "/undo": ("", "take the last message and its answer back"),
    "/clear": ("", "begin a conversation anew; the system message stays"),
    "/system": ("[TEXT|none]", "show, set or remove the system message"),
    "/save": ("FILE", "write the conversation to a file"),
    "/load": ("FILE", "go on with a conversation from a file"),
    "/stats": ("", "what the last answer took"),
    "/exit": ("", "end, as Ctrl-D and two Ctrl-C do"),
}

# What other programs call them.
_MEANT = {
    "/quit": "/exit",
    "/bye": "/exit",
    "/q": "/exit",
    "/?": "/help",
    "/reset": "/clear",
    "/new": "/clear",
}
_COMMAND = re.compile(r"(?P<name>/\S*)(?:[ \t]+(?P<argument>.*))?", re.DOTALL)

_ANSWER_ROOM = 512
"""Tokens of the context that are kept for an answer whose length nobody has limited."""


class Talk:
    """One conversation.

    Args:
        lines: gives what is typed.
        answers: answers it.
        out: where the answers go.
        transcript: what has been said before.
        interactive: a person types: Ctrl-C ends an answer and not the conversation.
        max_tokens: of an answer, where that is limited.

    Attributes:
        failed: whether an answer, or a command, has failed.

    """

    def __init__(
        self,
        lines: Lines,
        answers: Answers,
        out: Output,
        transcript: Transcript,
        *,
        interactive: bool,
        max_tokens: int | None,
    ) -> None:
        self._lines = lines
        self._answers = answers
        self._out = out
        self._transcript = transcript
        self._interactive = interactive
        self._room = max_tokens or _ANSWER_ROOM
        self._attempt = 0
        self._unanswered: str | None = None
        self._ended = False
        self.failed = False

    def run(self) -> bool:
        """Talk until the end; returns whether that was another than Ctrl-C."""
        pressed = False
        while not self._ended:
            try:
                text = self._lines.read()
            except KeyboardInterrupt:
                if not self._interactive or pressed:
                    return False
                self._note("Ctrl-C once more, Ctrl-D or /exit ends the conversation")
                pressed = True
                continue
            if text is None:
                break
            pressed = False
            self.take(text)
        return True

    def take(self, text: str) -> None:
        """Answer what was typed: a command, or a message."""
        command = _COMMAND.fullmatch(text.rstrip())
        if command:
            try:
                self._obey(command["name"], (command["argument"] or "").strip())
            except (CommandError, OSError) as error:
                self._fail(reason(error))
        elif text.strip():
            self._attempt = 0
            self._answer(message_of(text))

    # ---- answers

    def _answer(self, message: str) -> None:
        """Have a message answered. What goes wrong costs this answer, and a line says what it was."""
        transcript, turn = self._transcript, Turn(message)
        transcript.turns.append(turn)
        shown = ShownText(self._out)
        begun = complete = False
        try:
            self._make_room()
            begun = True
            complete = read_answer(
                self._answers,
                transcript.sent(),
                self._attempt,
                shown.add,
                interruptible=self._interactive,
            )
            self._out.end_line()
            if not complete:
                self._status(["interrupted"])
            self._status(self._answers.status() if complete else [])
        except WriteError:
            raise
        except ContextFullError as error:
            self._out.end_line()
            self._fail(f"{reason(error)}; a shorter message, /clear or a larger --n-ctx helps")
        except Exception as error:  # noqa: BLE001 - one answer is lost, and not the conversation
            self._out.end_line()
            self._fail(reason(error))
        said = (self._answers.message() if begun else None) or {"content": ""}
        turn.answer, turn.reasoning = said["content"], said.get("reasoning_content", "")
        self._unanswered = None
        if not complete and not turn.answer.strip():
            transcript.undo()
            self._unanswered = message  # /retry asks again

    def _make_room(self) -> None:
        """Leave the oldest turns out where the context is full."""
        n_ctx = self._answers.n_ctx
        if n_ctx is None:
            return
        room = min(self._room, n_ctx // 4)
        n = self._transcript.fit(self._answers.n_tokens, n_ctx, room)
        if n:
            oldest = f"the oldest {count(n, 'turn')}"
            self._note(f"the context of {n_ctx} positions is full; left out from here on: {oldest}")

    def _status(self, told: list[str]) -> None:
        if told and self._out.terminal:
            self._out.text(f"[{', '.join(told)}]\n", style=DIM)

    def _note(self, text: str) -> None:
        self._out.note(f"sllm: {text}")

    def _fail(self, text: str) -> None:
        self.failed = True
        self._note(text)

    # ---- commands

    def _obey(self, name: str, argument: str) -> None:
        does: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/retry": self._retry,
            "/undo": self._undo,
            "/clear": self._clear,
            "/system": self._system,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/exit": self._exit,
        }
        obey = does.get(name)
        if obey is None:
            known = [*COMMANDS, *_MEANT]
            close = difflib.get_close_matches(name, known, n=1) if len(name) > 1 else []
            meant = _MEANT.get(close[0], close[0]) if close else None
            what = f"was {meant} meant?" if meant else "/help lists those there are."
            raise CommandError(
                f"{name} is no command; {what} (A message that begins with / needs a space before it.)"
            )
        usage = COMMANDS[name][0]
        if argument and not usage:
            raise CommandError(f"{name} takes nothing after it")
        if not argument and usage == "FILE":
            raise CommandError(f"{name} needs the name of a file")
        obey(argument)

    def _help(self, _argument: str) -> None:
        rows = [(f"{name} {usage}".rstrip(), what) for name, (usage, what) in COMMANDS.items()]
        keys = [
            ("\\ at a line's end", "the message goes on in the next line"),
            ('""" ... """', "a message of several lines"),
            ("Alt-Enter", "a new line"),
            ("Ctrl-C", "end the answer; what there is of it stays"),
        ]
        for line in table([*rows, *keys]):
            self._out.line(line)

    def _retry(self, _argument: str) -> None:
        message = self._unanswered
        if message is None:
            turn = self._transcript.undo()
            if turn is None:
                raise CommandError("there is no message yet")
            message = turn.message
            self._attempt += 1
        self._answer(message)

    def _undo(self, _argument: str) -> None:
        turn = self._transcript.undo()
        if turn is None:
            raise CommandError("there is nothing to take back")
        self._unanswered = None
        self._note(f"taken back: {turn.message.splitlines()[0][:60]}")

    def _clear(self, _argument: str) -> None:
        self._transcript.clear()
        self._answers.begin_anew()
        self._unanswered = None
        self._note("a new conversation")

    def _system(self, argument: str) -> None:
        if argument:
            self._transcript.system = None if argument == "none" else message_of(argument)
        self._note(f"system: {self._transcript.system or 'none'}")

    def _save(self, argument: str) -> None:
        path = Path(argument).expanduser()
        self._transcript.save(path)
        self._note(f"{count(len(self._transcript.turns), 'turn')} in {path}")

    def _load(self, argument: str) -> None:
        path = Path(argument).expanduser()
        self._transcript = Transcript.load(path)
        self._answers.begin_anew()
        self._unanswered = None
        self._note(f"{count(len(self._transcript.turns), 'turn')} from {path}")

    def _stats(self, _argument: str) -> None:
        told = self._answers.details()
        if not told:
            raise CommandError("there is no answer yet")
        for line in told:
            self._out.line(line)

    def _exit(self, _argument: str) -> None:
        self._ended = True
