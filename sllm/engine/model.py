"""Models and their vocabularies."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.engine import chat_template, hub
from sllm.engine._ffi import ffi, lib, read_text
from sllm.engine.context import Context
from sllm.engine.devices import (
    Device,
    check_file,
    load_params,
    may_offload,
    use_servers,
)
from sllm.engine.weights import Weights
from sllm.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

__all__ = ["Model"]


class Model(Weights):
    """A GGUF model file, loaded (``llama_model_load_from_file``).

    Args:
        path: a local path, or ``hf://owner/repo/file.gguf``, which is downloaded first.
        n_gpu_layers: how many layers go to GPUs; None: all, if there is one.
        devices: the devices to use, from :func:`devices` or :func:`sllm.rpc.add_server`, or their names;
            None: all of this machine. With RPC servers, whose loss ends the process, better leave the model
            to :class:`~sllm.LocalTarget`.
        tensor_split: proportions of the model for each device.
        split_mode: ``"none"``, ``"layer"`` or ``"row"``.
        use_mmap: map the file instead of reading it.
        use_mlock: keep the weights from being swapped out.
        check_tensors: look for NaN and infinities in the weights; slow.
        progress: called with 0.0 .. 1.0 while loading. What it raises stops the load and is raised here.
        vocab_only: load the vocabulary and the metadata and no weights; there are no contexts then.

    Raises:
        ModelLoadError: the file is missing, unreadable or not a model llama.cpp can run; has llama.cpp's own
            words.
        UnsupportedModelError: an encoder or diffusion model.
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
        can_rollback: False for recurrent and hybrid models, which cannot take back single tokens.

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_gpu_layers: int | None = None,
        devices: Sequence[Device | str] | None = None,
        tensor_split: Sequence[float] | None = None,
        split_mode: str = "layer",
        use_mmap: bool = True,
        use_mlock: bool = False,
        check_tensors: bool = False,
        progress: Callable[[float], Any] | None = None,
        vocab_only: bool = False,
    ) -> None:
        self.path = hub.resolve(path)
        check_file(self.path)
        params, keep = load_params(n_gpu_layers, devices, tensor_split, split_mode, progress)
        keep.append(ffi.new("char[]", os.fsencode(self.path)))
        params.path = keep[-1]
        params.use_mmap = use_mmap
        params.use_mlock = use_mlock
        params.check_tensors = check_tensors
        params.vocab_only = vocab_only
        self._special_pieces: list[str] | None = None
        super().__init__(params, str(self.path))
        self.offloaded = n_gpu_layers != 0 and may_offload(devices)
        use_servers(self, devices)

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

    def context(
        self,
        *,
        n_ctx: int | None = None,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        n_seq_max: int = 1,
        n_outputs_max: int | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        flash_attn: bool | None = None,
        type_k: str = "f16",
        type_v: str = "f16",
        offload_kqv: bool = True,
        kv_unified: bool = False,
    ) -> Context:
        """Make a :class:`~sllm.Context`, whose docstring tells what the arguments mean."""
        return Context(
            self,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_seq_max=n_seq_max,
            n_outputs_max=n_outputs_max,
            n_threads=n_threads,
            n_threads_batch=n_threads_batch,
            flash_attn=flash_attn,
            type_k=type_k,
            type_v=type_v,
            offload_kqv=offload_kqv,
            kv_unified=kv_unified,
        )

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.n_layer} layers, {self.size_bytes / 1e6:.1f} MB"
        return f"<sllm.Model {self.path.name!r}, {state}>"
