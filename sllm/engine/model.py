"""Models and their vocabularies."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.engine import chat_template, gguf, hub, recurrent
from sllm.engine._ffi import ffi, lib, read_text
from sllm.engine.context import Context
from sllm.engine.params import ContextParams, LoadParams, parse
from sllm.engine.weights import Weights, c_params
from sllm.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt
    from typing_extensions import Unpack

    from sllm.engine.params import ContextOptions, LoadOptions

__all__ = ["Model"]


class Model(Weights):
    """A GGUF model file, loaded (``llama_model_load_from_file``).

    Args:
        path: a local path, or ``hf://owner/repo/file.gguf``, which is downloaded first.
        params, options: how to load it (:class:`~sllm.engine.params.LoadParams`); ``options`` are its fields,
            and count more than ``params``.

    Raises:
        ModelLoadError: the file is missing, unreadable or not a model llama.cpp can run; has llama.cpp's own
            words.
        UnsupportedModelError: an encoder or diffusion model, or a draft that reads another model's hidden
            states (EAGLE-3, DFlash).
        RPCError: an RPC server is not there.
        ValueError: an argument out of range.

    Attributes:
        path: the file.
        vocab: its vocabulary.
        metadata: its scalar GGUF metadata, read-only, all values as str.
        n_layer, n_embd, n_head, n_head_kv, n_ctx_train: its hyperparameters; 0 where the file does not say.
        n_params: the number of its weights.
        size_bytes: the size of its tensors.
        offloaded: whether layers were sent to a GPU.
        n_mtp: how many heads for multi-token prediction were loaded (:class:`sllm.engine.mtp.Heads`).
        can_rollback: what it costs to take back single tokens, such as drafted ones that are wrong:
            ``"free"`` (attention), ``"snapshots"`` (hybrid models of which llama.cpp keeps the states after
            the newest tokens, see ``n_rollback`` of :class:`~sllm.ContextParams`) or ``"recompute"`` (other
            hybrid and recurrent models: an earlier state is put back, and the tokens since then computed
            again).

    Examples:
        >>> with sllm.Model(sllm.embedded.TARGET) as model:
        ...     model.n_layer, model.can_rollback
        (8, 'free')

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        params: LoadParams | None = None,
        **options: Unpack[LoadOptions],
    ) -> None:
        given = parse(options, params or LoadParams())
        self.path = hub.resolve(path)
        gguf.check_file(self.path)
        to_load, keep = c_params(given)
        keep.append(ffi.new("char[]", os.fsencode(self.path)))
        to_load.path = keep[-1]
        to_load.use_mmap = given.use_mmap
        to_load.vocab_only = given.vocab_only
        self._special_pieces: list[str] | None = None
        self._id: str | None = None
        self._state_bytes: int | None = None
        super().__init__(to_load, given, str(self.path))

    @property
    def id(self) -> str:
        """Equal for equal weights, such as two copies of a file (:func:`sllm.engine.gguf.model_id`)."""
        if self._id is None:
            self._id = gguf.model_id(self.path)
        return self._id

    @property
    def state_bytes(self) -> int:
        """Bytes of the recurrent state of one sequence; 0 for attention alone. Every token that snapshots can
        take back, and every checkpoint, takes as much again (:func:`sllm.engine.recurrent.state_bytes`).
        """
        if self.can_rollback == "free":
            return 0
        if self._state_bytes is None:
            self._state_bytes = recurrent.state_bytes(self.path)
        return self._state_bytes

    @property
    def chat_template(self) -> str | None:
        """The file's own chat template, a Jinja2 text, or None."""
        return read_text(lambda text, size: lib.sllm_model_chat_template(self._live, ffi.NULL, text, size))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> npt.NDArray[np.int32]:
        """The prompt of a conversation by the file's own chat template, as int32 (n,) token ids.

        ``messages`` are mappings with ``role`` and ``content``. The template (Jinja2) runs in a sandbox. What
        the messages say is never read as a control token, so a user cannot end a turn by writing
        ``<|im_end|>``.

        Raises:
            UnsupportedModelError: the file has no chat template, or it does not render.
            ValueError: malformed messages.

        """
        template = self.chat_template
        if template is None:
            raise UnsupportedModelError(f"{self.path.name} has no chat template; make the prompt yourself")
        if self._special_pieces is None:
            self._special_pieces = self.vocab.special_pieces

        def text_of(token: int | None) -> str:
            return "" if token is None else self.vocab._piece(token, special=True).decode("utf-8", "replace")

        bos = text_of(self.vocab.bos)
        segments = chat_template.segments(
            template,
            messages,
            self._special_pieces,
            bos_token=bos,
            eos_token=text_of(self.vocab.eos),
            add_generation_prompt=add_generation_prompt,
        )
        parts = [
            self.vocab.encode(text, add_special=False, parse_special=special) for text, special in segments
        ]
        if not parts:
            raise UnsupportedModelError(
                f"the chat template of {self.path.name} makes nothing of these messages"
            )
        tokens = np.concatenate(parts)
        if self.vocab.add_bos and self.vocab.bos is not None and tokens[:1].tolist() != [self.vocab.bos]:
            return np.concatenate(
                [np.array([self.vocab.bos], dtype=np.int32), tokens]
            )  # the template left it out
        return tokens

    def context(self, params: ContextParams | None = None, **options: Unpack[ContextOptions]) -> Context:
        """Make a :class:`~sllm.Context` with these parameters; ``options`` are fields of
        :class:`~sllm.engine.params.ContextParams`, and count more than ``params``.

        Raises:
            TypeError, ValueError: a parameter of another type or out of range, or one that the model does not
                go with.
            MemoryError: the KV cache does not fit into the machine.

        """
        return Context(self, parse(options, params or ContextParams()))

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.n_layer} layers, {self.size_bytes / 1e6:.1f} MB"
        return f"<sllm.Model {self.path.name!r}, {state}>"
