"""What ``sllm run`` shows: the text as it comes, and the figures of ``--stats``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sllm.cli.console import DIM, DIM_ITALIC, count, size

if TYPE_CHECKING:
    from sllm.cli.console import Output
    from sllm.generation.text_stream import GenerationStats, Run
    from sllm.targets.base import RemoteStats

__all__ = ["ShownText", "style_of", "summary"]


class ShownText:
    """A text as it is shown. What the draft writes alone without a link may have to be taken back: it is
    shown on terminals only, where it can be told apart. So can reasoning and its marks there; elsewhere they
    are text as any other.
    """

    def __init__(self, out: Output) -> None:
        self._out = out
        self._line: list[Run] = []  # the verified part of the last line
        self._unverified = 0  # tokens that are shown and may be taken back

    def add(self, run: Run) -> None:
        """Show the next run."""
        out = self._out
        if run.source == "local":
            if out.terminal:
                if not self._unverified and not out.colour:
                    out.text("[")
                out.text(run.text, style=DIM)
                self._unverified += len(run.tokens)
            return
        if self._unverified:
            if not out.colour:
                out.text("]")
            out.end_line()
            n = count(self._unverified, "token")
            out.note(f"sllm: the link is back; withdrawn: the last {n}, which the draft wrote alone")
            for part in self._line:
                self._show(part)
            self._unverified = 0
        self._show(run)
        _, line_end, last = run.text.rpartition("\n")
        self._line = [*([] if line_end else self._line), replace(run, text=last)]

    def _show(self, run: Run) -> None:
        self._out.text(run.text, style=style_of(run))


def style_of(run: Run) -> str:
    """How a terminal shows a run's text: reasoning and marks apart from what is said."""
    return "" if run.kind == "text" else DIM_ITALIC


def summary(stats: GenerationStats) -> list[str]:
    """The figures of a text, for people."""
    in_memory = f", {stats.n_reused} of them in memory" if stats.n_reused else ""
    lines = [
        f"prompt: {count(stats.n_prompt, 'token')}{in_memory}, {stats.prompt_seconds:.2f} s",
        f"text: {count(stats.n_tokens, 'token')}, {stats.seconds:.2f} s, {stats.tokens_per_s:.1f} tokens/s",
        f"passes of the target: {stats.n_passes}, {stats.passes_per_token:.2f} per token",
    ]
    if stats.n_drafted:
        accepted = f"{stats.n_accepted} of {stats.n_drafted} accepted ({stats.acceptance:.2f})"
        lines.append(f"draft: {accepted}, {stats.draft_seconds:.2f} s")
    if stats.remote is not None:
        lines += _link_summary(stats, stats.remote)
    full = "--n-ctx" if stats.remote is None else "the worker's"
    reasons = {
        "eog": "the model ended the text",
        "length": "--max-tokens",
        "context": f"the context is full ({full})",
        "stop": "--stop",
    }
    return [*lines, f"ended by: {reasons.get(stats.finish_reason or '', stats.finish_reason)}"]


def _link_summary(stats: GenerationStats, remote: RemoteStats) -> list[str]:
    """The figures of the worker and of the link to it."""
    up, down = size(remote.bytes_up), size(remote.bytes_down)
    per_token = (remote.bytes_up + remote.bytes_down) / max(stats.n_tokens, 1)
    round_trip = f"{remote.round_trip * 1e3:.1f} ms round trip, " if remote.round_trip else ""
    by = stats.tokens_by_source
    sources = [f"{by['draft']} drafted here", f"{by['target']} the target's own"]
    if by["worker draft"]:
        sources.insert(1, f"{by['worker draft']} drafted by the worker")
    carried = (
        f"{up} of messages up, {down} down, {per_token:.0f} bytes per token, {count(remote.n_hints, 'hint')}"
    )
    lines = [
        f"tokens: {', '.join(sources)}",
        f"link: {round_trip}{carried}",
        f"lost to rejections: {stats.wasted_seconds:.2f} s of the draft's time",
    ]
    if remote.n_reconnects or stats.n_local:
        lost = f"{count(remote.n_reconnects, 'time')}, {remote.lost_seconds:.2f} s"
        local = f"; {count(stats.n_local, 'token')} by the draft alone, withdrawn" if stats.n_local else ""
        lines.append(f"link lost: {lost}{local}")
    if remote.n_moves:
        lines.append(f"workers: {', then '.join(remote.workers)}")
    if remote.n_hedged:
        first = count(remote.n_hedges_won, "time")
        lines.append(
            f"a second worker was asked {count(remote.n_hedged, 'time')}, and answered first {first}; of the"
            f" other one {count(remote.hedge_tokens, 'token')} of the prompt at most were in vain"
        )
    if remote.n_hops:
        lines.append(f"rows from worker to worker: {count(remote.n_hops, 'hop')}")
    lines += [f"rows through here, from {way}" for way in remote.relayed]
    if remote.queued_seconds >= 0.1:
        lines.append(f"waited for a place: {remote.queued_seconds:.2f} s")
    return lines
