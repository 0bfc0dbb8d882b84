"""A model's file to take layers from: which of them can be run apart, and a file of some."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from sllm.engine import gguf
from sllm.engine.layer_view import assembled, entry_of, range_view
from sllm.engine.model_file import ModelFile
from sllm.errors import ModelLoadError
from sllm.folders import replacing
from sllm.progress import step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sllm.engine.layer_view import LayerView

__all__ = ["LayeredFile"]

_COPY_BYTES = 1 << 23


class LayeredFile(ModelFile):
    """A model's file, or a file of some of its layers, to take layers from: see
    :class:`~sllm.engine.model_file.ModelFile`.
    """

    @property
    def n_first(self) -> int | None:
        """How many layers a file of a model's first layers alone holds; None: it is another one."""
        start, stop = (self.header.value(f"sllm.layers.{end}") for end in ("start", "stop"))
        return stop if start == 0 and isinstance(stop, int) and stop < self.n_layer else None

    def check_range(self, start: int, stop: int, *, output: bool) -> None:
        """Raise ValueError if these layers are none of the model, not in this file, or cannot be run without
        others.
        """
        n = self.n_layer
        if not 0 <= start <= stop <= n or (start == stop and not (output and stop == n)):
            raise ValueError(
                f"layers [{start}, {stop}) are not a range of the {n} layers of {self.path.name}:"
                f" expected 0 <= start < stop <= {n}"
            )
        if output and stop != n:
            raise ValueError(f"the output follows layer {n - 1}, and the range ends at {stop}")
        if start < stop and (start not in self.layers or stop - 1 not in self.layers):
            here = f"layers [{self.layers.start}, {self.layers.stop})" if self.layers else "no layers"
            raise ValueError(f"{self.path.name} holds {here}, and [{start}, {stop}) were asked for")
        if output and self.output is None:
            raise ValueError(f"{self.path.name} holds no output, which is with the model's last layers")
        if start < stop:
            self.check_kinds(start, stop)

    def check_kinds(self, start: int, stop: int) -> None:
        """Raise ValueError for layers that llama.cpp would take for others, or has no memory for."""
        reason = self.obstacle(start, stop)
        if reason is not None:
            raise ValueError(
                f"layers [{start}, {stop}) of {self.path.name} do not run apart: {reason}"
                f"{self._instead(start, stop)}"
            )

    def _instead(self, start: int, stop: int) -> str:
        """For the first or the last layers of a model: how many more would run apart."""
        n = self.n_layer
        if start == 0 and (found := next((k for k in range(stop + 1, n) if not self.obstacle(0, k)), 0)):
            return f"; the first {found} layers do"
        if stop == n and (
            found := next((k for k in range(n - start + 1, n) if not self.obstacle(n - k, n)), 0)
        ):
            return f"; the last {found} layers do"
        return ""

    def obstacle(self, start: int, stop: int) -> str | None:
        """Why the layers [start, stop) do not run apart; None: they do."""
        facts, n = self.facts, stop - start
        model = f"a range of a {self.architecture} model"
        period = math.lcm(facts.period, self.number(facts.period_key, 1) if facts.period_key else 1)
        if n in facts.sizes and self.n_layer not in facts.sizes:
            return f"llama.cpp takes {n} layers for another model"
        if n < facts.least:
            return f"{model} holds at least {facts.least} layers"
        if start % period:
            return (
                f"what a layer of a {self.architecture} model is comes back after {period} layers, so a range"
                f" begins at a multiple of {period}"
            )
        if facts.begins_windowed and not self.windows()[start]:
            return f"{model} begins with a layer that has a sliding window, which layer {start} has not"
        kinds: dict[str, list[bool]] = {}
        if facts.recurrent:
            layers = self.kinds()
            kinds["has attention"] = [kind == "attention" for kind in layers]
            kinds["is recurrent"] = [kind == "recurrent" for kind in layers]
        if self.has_windows and not facts.window_optional:
            kinds["has a sliding window"] = self.windows()
        for what, flags in kinds.items():
            if not any(flags[start:stop]):
                where = ", ".join(str(i) for i, flag in enumerate(flags) if flag)
                return f"{model} holds at least one layer that {what}, which are {where or 'none'}"
        return None

    def view(self, start: int, stop: int, *, output: bool, heads: bool = False) -> LayerView:
        """The layers as a file that llama.cpp can run. With ``output``, the final norm and the head too; then
        there need not be layers. With ``heads``, the heads behind the last layer for multi-token prediction,
        where they and that layer are here.

        Raises:
            ValueError: no such layers here, or none that run without others.

        """
        self.check_range(start, stop, output=output)
        n_heads = self.n_heads_here if heads and output and start < stop else 0
        return range_view(self, start, stop, output=output, n_heads=n_heads)

    # ---- writing a range

    def export(
        self, out: Path, start: int, stop: int, progress: Callable[[float], object] | None = None
    ) -> int:
        """Write the layers [start, stop) into a file that :class:`LayeredFile` reads; returns its size.

        With the first layer goes the embedding, with the last one the final norm and the output, and with
        either the vocabulary. A file without them cannot make text.

        Raises:
            ValueError: no such layers here.
            OSError: ``out`` cannot be written, or is the model itself; nothing is left of it then.

        """
        self.check_range(start, stop, output=start == stop)
        n = self.n_layer
        if start < stop and stop == n and self.output is None:
            raise ValueError(f"{self.path.name} holds no output, which is with the model's last layers")
        if any(isinstance(path, Path) and out.exists() and out.samefile(path) for path in self.paths):
            raise FileExistsError(f"{out} is the model itself; write the layers elsewhere")
        norm = self.facts.norm
        # Heads behind the layers look at what the last one gives.
        names = [name for name, _ in self.names_of(start, stop + self.n_heads if stop == n else stop)]
        names += [
            name for name in (f"{norm}.weight", f"{norm}.bias", "rope_freqs.weight") if name in self.tensors
        ]
        ends = {self.embedding} if start == 0 else set()
        names += [name for name in self.facts.begins if start == 0 and name in self.tensors]
        if stop == n:
            ends |= {self.output, "output.bias"}
        names += [name for name in sorted(filter(None, ends)) if name in self.tensors]
        pairs = [
            self.header.pairs[key]
            for key in self.header.pairs
            if not key.startswith(("split.", "sllm.layers."))
            and key != "general.alignment"
            and (ends or not key.startswith("tokenizer."))
        ]
        pairs.append(gguf.pair("sllm.layers.start", start))
        pairs.append(gguf.pair("sllm.layers.stop", stop))
        pairs.append(gguf.pair(gguf.SOURCE_KEY, gguf.model_id(self.path)))
        view = assembled(pairs, [entry_of(self, name, name) for name in names])
        total = len(view.header) + sum(piece.size for piece in view.pieces)
        with (
            step(f"writing {out.name}", progress) as told,
            replacing(out) as draft,
            ExitStack() as stack,
        ):
            target = stack.enter_context(draft.open("xb"))
            target.write(view.header)
            done = len(view.header)
            for data in self._contents(view, stack):
                target.write(data)
                done += len(data)
                if told is not None:
                    told(done / total)
        return total

    def _contents(self, view: LayerView, stack: ExitStack) -> Iterator[bytes]:
        """The bytes of a view's pieces, one after the other, of files that ``stack`` closes."""
        files = [stack.enter_context(path.open("rb")) for path in self.paths]
        for piece in view.pieces:
            left = piece.size
            if piece.file >= 0:
                files[piece.file].seek(piece.offset)
            while left > 0:
                n_bytes = min(left, _COPY_BYTES)
                data = bytes(n_bytes) if piece.file < 0 else files[piece.file].read(n_bytes)
                if not data:
                    raise ModelLoadError(f"{self.paths[piece.file]} ends before its tensors do")
                left -= len(data)
                yield data
