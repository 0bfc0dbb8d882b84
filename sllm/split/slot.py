"""What a split has for one text: a sequence of the layers here and of the workers, and the links to these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sllm.split.link import LayerLink

if TYPE_CHECKING:
    from sllm.split.chain import Part, Relays
    from sllm.targets.base import Generation

__all__ = ["SplitSlot"]


@dataclass(frozen=True)
class _Before:
    """What is gone back to where rows do not go directly after all: nothing of it has to be computed again.

    Attributes:
        links: as they were.
        relayed: likewise.
        n_held: positions that they and the workers hold.

    """

    links: list[LayerLink]
    relayed: dict[int, str]
    n_held: int


@dataclass
class SplitSlot:
    """A sequence of the layers here and of the workers, and the text that they hold.

    Attributes:
        seq_id: of the layers here.
        relays: says between which workers rows go directly.
        encoding: of hidden states.
        links: to the workers, those together among which rows go directly.
        relayed: workers whose rows go through here, and why.
        tokens: of the text that all of them hold.
        generation: that has it; None: it is free.

    """

    seq_id: int
    relays: Relays
    encoding: str
    links: list[LayerLink] = field(default_factory=list)
    relayed: dict[int, str] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    generation: Generation | None = None
    _before: _Before | None = None  # until rows have got through

    def __post_init__(self) -> None:
        self.regroup()

    def regroup(self) -> None:
        """Make the links anew, rows going directly where they can; nothing counts as held any more."""
        self.relayed = self.relays.reasons()
        groups = self.relays.groups(self.relayed)
        self.links = [LayerLink(group, encoding=self.encoding) for group in groups]
        self.tokens.clear()
        self._before = None

    def may_merge(self) -> bool:
        """Whether a failure between workers is so long ago that it is time to try again."""
        return self.relays.forgive() and self.relays.reasons().keys() < self.relayed.keys()

    def merge(self) -> None:
        """Let rows go directly again between workers where they did not for a while; no call is open. All
        stays that is held.
        """
        self._before = _Before(self.links, self.relayed, len(self.tokens))
        self.relayed = self.relays.reasons()
        self.links = [
            LayerLink(
                group,
                encoding=self.encoding,
                before=[link for link in self._before.links if link.parts[0] in group],
            )
            for group in self.relays.groups(self.relayed)
        ]

    def lose_hop(self, part: Part, reason: str) -> None:
        """Rows do not get from the worker of ``part`` to the next one: let them go through here; no call is
        open. Where none got through since :meth:`merge`, all stays that was held before.
        """
        self.relays.fail(part, reason)
        before, relayed = self._before, self.relays.reasons()
        if before is None or before.relayed.keys() != relayed.keys():
            self.regroup()
            return
        self.links, self.relayed, self._before = before.links, relayed, None
        del self.tokens[before.n_held :]

    def got_through(self) -> None:
        """Rows came back from all workers."""
        self._before = None
        self.relays.got_through()
