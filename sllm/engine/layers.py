"""Some layers of a model: hidden states in, hidden states or logits out, and a KV cache of their own.

The public API of llama.cpp does the rest: ``llama_batch.embd`` is the way in, an evaluation callback on the
last layer's output the way out (csrc/layers.cpp, csrc/context.cpp).
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.engine import file_check, hub, model_name
from sllm.engine._ffi import check, checked_int, ffi, lib
from sllm.engine.arrays import hidden_array, int32_array, positions
from sllm.engine.context import Context
from sllm.engine.handle import Closing
from sllm.engine.layer_file import LayeredFile
from sllm.engine.model import Model
from sllm.engine.params import ContextParams, LoadParams, parse_both
from sllm.engine.recurrent import state_bytes
from sllm.engine.weights import Weights, c_params
from sllm.errors import ClosedError, ModelLoadError
from sllm.progress import step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt
    from typing_extensions import Self, Unpack

    from sllm.engine.jobs import Verdict
    from sllm.engine.memory import Memory
    from sllm.engine.params import ContextOptions, LoadOptions
    from sllm.engine.sampling import SamplingParams

    class _RangeOptions(LoadOptions, ContextOptions):
        pass


__all__ = ["Embedding", "LayerRange", "can_branch", "export_layers", "open_layers", "open_source"]

_MAX_BATCH = 32768  # what sllm_context_new() allows for n_outputs_max


def open_layers(path: str | os.PathLike[str]) -> LayeredFile:
    """Open a model's file, or a file of some of its layers, to load layers from it.

    Raises:
        ModelLoadError: missing, unreadable or not a GGUF file.
        UnsupportedModelError: the model's layers cannot be run separately; the message says why.

    """
    found = hub.resolve(path)
    file_check.check_file(found)
    return LayeredFile(found)


def open_source(path: str | os.PathLike[str]) -> LayeredFile:
    """A model's file to export layers from: as :func:`open_layers`, but one on the hub stays there, and what
    is exported is all that is downloaded of it.

    Raises:
        ModelLoadError, UnsupportedModelError: as :func:`open_layers`.

    """
    found = model_name.parse(path)
    return LayeredFile(hub.HubFile(path)) if isinstance(found, model_name.HubName) else open_layers(path)


def export_layers(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    start: int,
    stop: int,
    *,
    progress: Callable[[float], object] | None = None,
) -> int:
    """Write the layers [start, stop) of a model into a file for :class:`LayerRange`; return its size in
    bytes.

    The embedding goes with layer 0, the final norm and the output with the last layer (``start == stop ==
    n_layer`` gives these two alone), and the vocabulary with either. A file of middle layers has no
    vocabulary.

    Args:
        path: the model, or a file of more of its layers. Of a model on the hub (``owner/repo:Q4_K_M`` and the
            other forms of :func:`sllm.hub.resolve`) only these layers are downloaded.
        out: the file to write. It appears when it is complete.
        start, stop: 0 <= start < stop <= n_layer.
        progress: called with 0.0 .. 1.0.

    Raises:
        ValueError: no such layers, or layers that cannot run without others.
        ModelLoadError, UnsupportedModelError: as :func:`open_layers`.
        OSError: ``out`` cannot be written.

    Examples:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     n_bytes = sllm.export_layers(sllm.embedded.TARGET, f"{folder}/middle.gguf", 2, 7)
        ...     with sllm.LayerRange(f"{folder}/middle.gguf", 2, 7) as middle:
        ...         n_bytes < sllm.embedded.TARGET.stat().st_size, middle.n_layer
        (True, 8)

    """
    start, stop = checked_int(start, "start"), checked_int(stop, "stop")
    return open_source(path).export(Path(out), start, stop, progress)


def can_branch(file: LayeredFile) -> bool:
    """Whether the memory of a model's layers holds trees (:meth:`LayerRange.forward`, ``parents``)."""
    return bool(lib.sllm_has_trees()) and not state_bytes(file.paths[0])


class Embedding:
    """The first piece of a split model: the token embedding.

    Rows are read from the file when needed, so the matrix takes no memory.

    Args:
        file: the model, or a file of its first layers.

    Raises:
        ValueError: the file has no embedding.

    """

    def __init__(self, file: LayeredFile) -> None:
        if file.embedding is None:
            raise ValueError(
                f"{file.paths[0].name} holds no embedding, which is with the model's first layer"
            )
        path, tensor = file.tensor(file.embedding)
        self.n_embd = file.n_embd
        self.n_tokens = file.n_vocab
        self.path = path
        self._kind = tensor.kind
        self._offset = tensor.offset
        self._row: int = lib.sllm_row_size(tensor.kind, self.n_embd)
        if self._row == 0 or self._row * self.n_tokens > tensor.size:
            raise ModelLoadError(
                f"{path} is damaged: its embedding has no {self.n_tokens} rows of {self.n_embd}"
            )
        self._scale = np.float32(file.embedding_scale)
        self._file = path.open("rb", buffering=0)

    def rows(self, tokens: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """The input of the first layer for ``tokens``, int32 (n,): float32 (n, n_embd).

        Raises:
            ValueError: an id outside the vocabulary.
            ClosedError: after :meth:`close`.

        """
        ids = int32_array(tokens, "tokens")
        if self._file.closed:
            raise ClosedError("Embedding is closed")
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.n_tokens):
            bad = next(int(t) for t in ids if not 0 <= t < self.n_tokens)
            raise ValueError(f"token {bad} is not in the vocabulary of {self.n_tokens} tokens")
        descriptor = self._file.fileno()
        data = b"".join(
            os.pread(descriptor, self._row, self._offset + int(token) * self._row) for token in ids
        )
        if len(data) != self._row * len(ids):
            raise ModelLoadError(f"{self._file.name!s} ends before its embedding does")
        out = np.empty((len(ids), self.n_embd), dtype=np.float32)
        check(
            lib.sllm_dequantize(
                self._kind,
                ffi.from_buffer("uint8_t[]", data),
                len(data),
                len(ids),
                self.n_embd,
                ffi.from_buffer("float[]", out),
            )
        )
        return out if self._scale == 1 else out * self._scale

    def as_c(self) -> Any:
        """``struct sllm_embedding *``: where the rows are, for as long as this is open.

        Raises:
            ClosedError: after :meth:`close`.

        """
        if self._file.closed:
            raise ClosedError("Embedding is closed")
        return ffi.new("struct sllm_embedding *", (self._file.fileno(), self._kind, self._offset))

    def close(self) -> None:
        """Close the file. More calls do nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


class _LayerWeights(Weights):
    """The weights of a range, whose tokens, if it has any, are those of ``vocabulary``."""

    def __init__(
        self,
        file: LayeredFile,
        start: int,
        stop: int,
        loading: LoadParams,
        *,
        output: bool,
        vocabulary: Model | None,
    ) -> None:
        self.path = file.paths[0]
        view = file.view(start, stop, output=output, heads=loading.load_mtp and bool(lib.sllm_has_mtp()))
        about = f"layers [{start}, {stop}) of {self.path}"
        with ExitStack() as stack:
            told = stack.enter_context(step(f"loading {self.path.name}", loading.progress))
            params, keep = c_params(loading, told)
            params.load_mtp = view.n_heads
            keep.append(ffi.from_buffer("uint8_t[]", view.header))
            params.header, params.header_size = keep[-1], len(view.header)
            keep.append(ffi.new("struct sllm_piece[]", [(p.file, p.offset, p.size) for p in view.pieces]))
            params.pieces, params.n_pieces = keep[-1], len(view.pieces)
            params.has_output = output
            keep.append(ffi.new("char[]", view.input.encode()))
            params.input = keep[-1] if view.input else ffi.NULL
            keep.append(ffi.new("char[]", file.facts.output.encode()))
            params.layer_output = keep[-1]
            if vocabulary is not None:
                params.vocabulary = vocabulary._live
            opened = [stack.enter_context(path.open("rb", buffering=0)) for path in file.paths]
            keep.append(ffi.new("int32_t[]", [f.fileno() for f in opened]))
            params.files, params.n_files = keep[-1], len(opened)
            # "dummy tokens": llama.cpp of a file without a vocabulary
            super().__init__(params, loading, about, expected="dummy tokens")
        self._vocabulary = vocabulary
        if vocabulary is not None:
            self.vocab = vocabulary.vocab

    def compiled(self, params: SamplingParams) -> Any:
        """See :meth:`Model.compiled`."""
        return super().compiled(params) if self._vocabulary is None else self._vocabulary.compiled(params)


class LayerRange(Closing):
    """Layers [start, stop) of a model, with their own KV cache for every sequence.

    Used by one thread at a time, like a :class:`~sllm.Context`. Only these layers are loaded from the file.
    The output equals, to the last bit, the output of these layers in the whole model, if that does not depend
    on how tokens are grouped into batches (see :class:`~sllm.ContextParams`, ``type_k``).

    Args:
        path: the model, a file of :func:`export_layers`, or either of them opened with :func:`open_layers`.
        start, stop: 0 <= start < stop <= n_layer. With ``output``, ``start == stop == n_layer`` is the final
            norm and the head alone.
        output: add the model's final norm and head, and return logits. ``stop`` must be n_layer.
        vocabulary: with ``output``: a model with the vocabulary (``Model(path, vocab_only=True)`` will do),
            which :meth:`verify` needs. It must outlive this object.
        loading, computing: how to load, and how to compute.
        options: fields that override these: of :class:`~sllm.engine.params.LoadParams`, without ``use_mmap``
            and ``vocab_only``, and of :class:`~sllm.engine.params.ContextParams`, without ``kv_unified``.
            Unless given, ``n_batch`` is 512, and ``load_mtp`` False; with it and ``output``, the heads of the
            file are loaded after the last layer (:class:`sllm.engine.mtp.Heads`).

    Raises:
        ModelLoadError, UnsupportedModelError: as :func:`open_layers`.
        ValueError: no such layers, layers that llama.cpp cannot run without others (a range of a hybrid model
            must contain an attention layer and a recurrent one, for example; the error says which ranges
            work), or an argument out of range.
        MemoryError: the KV cache does not fit into the machine.

    Attributes:
        start, stop, output: as given.
        n_layer: layers of the whole model.
        n_embd: the width of a hidden state.
        n_vocab: length of a row of logits; 0 without ``output``.
        size_bytes: the size of the weights.
        context: with ``output``, for ``decode(..., hidden=...)`` and the like.
        memory: the KV cache or recurrent state of the sequences.

    Examples:
        >>> with sllm.LayerRange(sllm.embedded.TARGET, 2, 7) as middle:
        ...     hidden = np.ones((3, middle.n_embd), dtype=np.float32)
        ...     middle.forward(hidden).shape == hidden.shape
        True

    """

    def __init__(
        self,
        path: str | os.PathLike[str] | LayeredFile,
        start: int,
        stop: int,
        *,
        output: bool = False,
        vocabulary: Model | None = None,
        loading: LoadParams | None = None,
        computing: ContextParams | None = None,
        **options: Unpack[_RangeOptions],
    ) -> None:
        loading, computing = parse_both(
            options,
            loading or LoadParams(load_mtp=False),
            computing or ContextParams(n_batch=512),
            without=("use_mmap", "vocab_only", "kv_unified"),
        )
        file = path if isinstance(path, LayeredFile) else open_layers(path)
        start, stop = checked_int(start, "start"), checked_int(stop, "stop")
        if vocabulary is not None and not isinstance(vocabulary, Model):
            raise TypeError(f"vocabulary is {vocabulary!r}, expected a Model")
        if vocabulary is not None and not output:
            raise ValueError("vocabulary is for a range with output=True: no other one knows of tokens")
        if not output:  # each row of a batch is one that comes out
            n_batch = checked_int(computing.n_batch, "n_batch", 1, _MAX_BATCH)
            computing = replace(computing, n_outputs_max=n_batch)
        self.start, self.stop, self.output = start, stop, output
        self.n_layer = file.n_layer
        self.n_embd = file.n_embd
        self.n_vocab = file.n_vocab if output else 0
        with ExitStack() as stack:
            self._model = stack.enter_context(
                _LayerWeights(file, start, stop, loading, output=output, vocabulary=vocabulary)
            )
            self.context = stack.enter_context(Context(self._model, computing))
            self._stack = stack.pop_all()
        self.size_bytes = self._model.size_bytes
        self.memory: Memory = self.context.memory
        super().__init__()

    def forward(
        self,
        hidden: npt.NDArray[np.float32] | Sequence[npt.NDArray[np.float32]],
        *,
        seq_id: int | Sequence[int] = 0,
        pos: int | Sequence[int] | None = None,
        parents: npt.ArrayLike | Sequence[npt.ArrayLike] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Send hidden states through the layers.

        Args:
            hidden: the input of the first layer: float32 (n, n_embd) for one sequence; for several, one such
                array per sequence.
            seq_id: the sequence, or a list of them.
            pos: position of the first row, at most the sequence's length; None: at its end. Whatever was
                stored at or after it is discarded. A recurrent state can only be rolled back over the last
                rows of the last call, at most ``n_rollback`` and fewer than that call had, or to 0.
            parents: for a tree, whose nodes are the last rows of the sequence, at most 256 and not all of
                them: int (m,), for each of the last m rows the index of the node that it follows, a smaller
                one, or -1 if it follows the rows before the tree; for several sequences, one such array each
                (empty: no tree). The memory keeps the tree's main path, each node's first child: the next
                write may continue at the end of that path or before it. For layers without ``output``.

        Returns:
            The output of the last layer, float32, in the order of the rows: (rows, n_embd), or with
            ``output`` the logits, (rows, n_vocab).

        Raises:
            ValueError: a number that is not finite, another shape, a position or sequence out of range, or
                one to which a recurrent state cannot be rolled back: the sequence then has the length
                ``memory.length()``, and the rows from there on must be sent again.
            TypeError: a wrong dtype.
            ContextFullError: no room; nothing was computed.
            UnsupportedModelError: a tree, but :attr:`Context.can_branch` is false.
            CancelledError, BusyError, InferenceError, ClosedError.

        """
        trees: Any = parents
        if isinstance(seq_id, (int, np.integer)):
            trees = None if parents is None else [parents]
            arrays, seqs = [hidden_array(hidden, None, self.n_embd)], [checked_int(seq_id, "seq_id")]
        else:
            seqs = int32_array(seq_id, "seq_id").tolist()
            arrays = [hidden_array(one, None, self.n_embd) for one in hidden]
            if len(arrays) != len(seqs):
                raise ValueError(
                    f"hidden has {len(arrays)} arrays, expected one for each of {len(seqs)} sequences"
                )
        begins = int32_array(positions(pos, len(seqs), "pos"), "pos").tolist()
        if not arrays:
            raise ValueError("no sequences given")
        for seq, array in zip(seqs, arrays, strict=True):
            if len(array) == 0:
                raise ValueError(f"sequence {seq} is given no rows")
        flat = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        lengths = [len(array) for array in arrays]
        links = [] if trees is None else [int32_array(row, "parents").tolist() for row in trees]
        if links and (len(links) != len(arrays) or (self.output and any(links))):
            raise ValueError(
                f"parents has {len(links)} arrays, expected one for each of {len(arrays)} sequences, and"
                " none for layers that end in logits: verify() takes their trees"
            )
        if self.output:
            out = self._logits(flat, lengths, seqs, begins)
        else:
            out = np.empty_like(flat)
            check(
                lib.sllm_forward(
                    self.context._live,
                    len(seqs),
                    seqs,
                    lengths,
                    begins,
                    [len(row) for row in links] if links else ffi.NULL,
                    [parent for row in links for parent in row] if links else ffi.NULL,
                    ffi.from_buffer("float[]", flat),
                    ffi.from_buffer("float[]", out),
                )
            )
        return out

    def _logits(
        self, flat: npt.NDArray[np.float32], lengths: list[int], seqs: list[int], begins: list[int]
    ) -> npt.NDArray[np.float32]:
        """Logits after every row; the tokens of the rows are not known here."""
        out = np.empty((len(flat), self.n_vocab), dtype=np.float32)
        check(
            lib.sllm_decode(
                self.context._live,
                len(seqs),
                seqs,
                [0] * len(flat),
                lengths,
                begins,
                ffi.from_buffer("float[]", flat),
                lib.SLLM_LOGITS_ALL,
                ffi.from_buffer("float[]", out),
                ffi.new("const float **"),
            )
        )
        return out

    def verify(
        self,
        seq_ids: Sequence[int] | npt.NDArray[np.int32],
        tokens: npt.ArrayLike | Sequence[npt.ArrayLike],
        draft: Sequence[npt.ArrayLike] | None = None,
        *,
        hidden: npt.NDArray[np.float32],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        pos: int | Sequence[int] | None = None,
        start: int | Sequence[int] | None = None,
        logprobs: bool = False,
        parents: Sequence[npt.ArrayLike] | None = None,
    ) -> Verdict:
        """:meth:`sllm.Context.verify` for a range with ``output`` and ``vocabulary``.

        ``hidden`` is the input of the first layer for the tokens and the draft of each sequence, one after
        the other: float32 (tokens, n_embd). If a side branch of a tree is accepted, the memory ends where
        that branch leaves the main path; the rows of the rest are not stored here and must be sent again.
        """
        if self._model._vocabulary is None:
            raise ValueError("verify() selects tokens: make the range with output=True and vocabulary=...")
        return self.context.verify(
            seq_ids,
            tokens,
            draft,
            sampling=sampling,
            pos=pos,
            start=start,
            logprobs=logprobs,
            hidden=hidden,
            parents=parents,
        )

    def cancel(self) -> None:
        """End the call that another thread is making."""
        self.context.cancel()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._model.closed

    def close(self) -> None:
        """Free weights and cache. More calls do nothing."""
        self._stack.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.size_bytes / 1e6:.1f} MB"
        end = " and the output" if self.output else ""
        return f"<sllm.LayerRange [{self.start}, {self.stop}){end} of {self._model.path.name!r}, {state}>"
