"""Models and their vocabularies."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.engine import backends, chat_template, hub
from sllm.engine._ffi import Handle, check, checked_int, ffi, int32_array, lib, read_text, take_log
from sllm.engine.sampling import SamplingParams, compile_sampling
from sllm.errors import ModelLoadError, UnsupportedModelError, VocabMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from sllm.engine.context import Context

__all__ = ["Device", "Model", "Vocab", "devices", "server_of"]

_DEVICE_TYPES = ("cpu", "gpu", "igpu", "accelerator", "other")
_SPLIT_MODES = {"none": 0, "layer": 1, "row": 2}


@dataclass(frozen=True)
class Device:
    """A device that ggml can compute on; ``memory_free`` and ``memory_total`` are bytes, 0 where unknown.

    ``endpoint`` is that of the RPC server whose device it is (:func:`sllm.rpc.add_server`), ``index`` then
    its number there; None: a device of this machine.
    """

    index: int
    name: str
    description: str
    type: str
    memory_free: int
    memory_total: int
    endpoint: str | None = None


def devices() -> list[Device]:
    """The devices of this build on this machine, in ggml's order (``ggml_backend_dev_get``).

    A backend of the build that has none here is told of as a warning of the logger ``sllm``.
    """
    backends.load()
    found = []
    for index in range(lib.sllm_device_count()):
        info = ffi.new("struct sllm_device_info *")
        check(lib.sllm_device_get(index, info))
        found.append(
            Device(
                index,
                ffi.string(info.name).decode("utf-8", "replace"),
                ffi.string(info.description).decode("utf-8", "replace"),
                _DEVICE_TYPES[info.type],
                info.memory_free,
                info.memory_total,
            )
        )
    take_log()
    return found


def _check_file(path: Path) -> None:
    """Tell apart what llama.cpp would report alike."""
    try:
        if path.is_dir():
            raise ModelLoadError(f"{path} is a directory, expected a GGUF file")
        if path.exists() and not path.is_file():
            # opening a pipe would wait for somebody to write
            raise ModelLoadError(f"{path} is not a regular file, expected a GGUF file")
        with path.open("rb") as file:
            magic = file.read(4)
    except ModelLoadError:
        raise
    except FileNotFoundError:
        raise ModelLoadError(f"{path} does not exist, expected a GGUF file") from None
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name
        raise ModelLoadError(f"{path!r} is no path: {error}") from None
    if not magic:
        raise ModelLoadError(f"{path} is empty, expected a GGUF file")
    if magic != b"GGUF":
        raise ModelLoadError(f"{path} is not a GGUF file: it begins with {magic!r}, expected b'GGUF'")


class Vocab:
    """The vocabulary of a model. Any number of threads may use it.

    Attributes:
        n_tokens: how many tokens there are; ids are 0 <= id < n_tokens.
        bos, eos, eot, pad: ids of special tokens, or None.
        add_bos, add_eos: whether ``encode(add_special=True)`` adds them.

    """

    def __init__(self, model: Model, info: Any) -> None:
        def special(token: int) -> int | None:
            return token if token >= 0 else None

        self._model = model
        self.n_tokens: int = info.n_vocab
        self.bos = special(info.bos)
        self.eos = special(info.eos)
        self.eot = special(info.eot)
        self.pad = special(info.pad)
        self.add_bos = bool(info.add_bos)
        self.add_eos = bool(info.add_eos)
        self._has_text = info.vocab_type != 0
        self._pieces: dict[int, bytes] = {}
        self._fingerprint: str | None = None

    def encode(
        self, text: str, add_special: bool = True, parse_special: bool = False
    ) -> npt.NDArray[np.int32]:
        """Tokenise (``llama_tokenize``); returns int32 (n,).

        ``add_special`` adds BOS or EOS where the model wants them; ``parse_special`` reads the text of
        control tokens as these tokens (not for text from others, who could then end a turn).

        Raises:
            TypeError: ``text`` is no str.
            UnsupportedModelError: the file holds no vocabulary.

        """
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}, expected str")
        data = text.encode("utf-8", "surrogatepass" if text.isascii() else "replace")
        capacity = len(data) + 8  # a token takes at least a byte, besides the special ones
        pointer = self._model._live
        count = ffi.new("int32_t *")
        while True:
            tokens = np.empty(capacity, dtype=np.int32)
            check(
                lib.sllm_tokenize(
                    pointer,
                    data,
                    len(data),
                    add_special,
                    parse_special,
                    ffi.from_buffer("int32_t[]", tokens),
                    capacity,
                    count,
                )
            )
            if count[0] <= capacity:
                return tokens[: count[0]].copy()
            capacity = count[0]

    def decode(self, tokens: npt.ArrayLike, *, special: bool = False) -> str:
        """The text of tokens (``llama_detokenize``), bytes that are no UTF-8 replaced by U+FFFD.

        Control tokens have text only with ``special``.

        Raises:
            ValueError: an id that is no token.

        """
        array = int32_array(tokens, "tokens")
        capacity = 16 * len(array) + 64
        count = ffi.new("int32_t *")
        while True:
            buffer = ffi.new("char[]", capacity)
            check(
                lib.sllm_detokenize(
                    self._model._live,
                    ffi.from_buffer("int32_t[]", array),
                    len(array),
                    special,
                    buffer,
                    capacity,
                    count,
                )
            )
            if count[0] <= capacity:
                text: bytes = ffi.buffer(buffer, count[0])[:]
                return text.decode("utf-8", "replace")
            capacity = count[0]

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for in running text; none for control tokens
        (``llama_token_to_piece``).

        Raises:
            ValueError: no such token.

        """
        found = self._pieces.get(token)
        if found is None:
            checked_int(token, "token")
            found = self._pieces[token] = self._piece(token, special=False)
        return found

    def _piece(self, token: int, *, special: bool) -> bytes:
        count = ffi.new("int32_t *")
        capacity = 64
        while True:
            buffer = ffi.new("char[]", capacity)
            check(lib.sllm_token_piece(self._model._live, token, special, buffer, capacity, count))
            if count[0] <= capacity:
                piece: bytes = ffi.buffer(buffer, count[0])[:]
                return piece
            capacity = count[0]

    def is_eog(self, token: int) -> bool:
        """Whether the token ends a generation (EOS, end of turn, ...).

        Raises:
            ValueError: no such token.

        """
        return bool(self._attr(token) & 2)

    def is_control(self, token: int) -> bool:
        """Whether the token is a control token, which has no text of its own.

        Raises:
            ValueError: no such token.

        """
        return bool(self._attr(token) & 1)

    def _attr(self, token: int) -> int:
        bits: int = lib.sllm_token_attr(self._model._live, checked_int(token, "token"))
        if bits < 0:
            raise ValueError(f"token {token} is not in the vocabulary of {self.n_tokens} tokens")
        return bits

    @property
    def special_pieces(self) -> list[str]:
        """The texts of all tokens that are parsed only with ``parse_special``, as chat templates write
        them.
        """
        found = (
            self._piece(t, special=True) for t in range(self.n_tokens) if self._attr(t) & (1 | 2 | 16 | 32)
        )
        return [piece.decode("utf-8", "replace") for piece in found if piece]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over every token's text and kind, in order: equal for models that share a
        vocabulary.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for token in range(self.n_tokens):
                piece, attr = self._entry(token)
                digest.update(len(piece).to_bytes(4, "little") + attr.to_bytes(1, "little") + piece)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _entry(self, token: int) -> tuple[bytes, int]:
        """What makes a token the same token in two vocabularies."""
        return self._piece(token, special=True), self._attr(token) & 3

    def check_same(self, other: Vocab) -> None:
        """Compare token by token; a shared prefix is enough, since some files pad their vocabulary.

        Raises:
            VocabMismatchError: names the first token that differs.

        """
        if self is other:
            return
        if self.n_tokens == other.n_tokens and self.fingerprint == other.fingerprint:
            return
        for token in range(min(self.n_tokens, other.n_tokens)):
            mine, theirs = self._entry(token), other._entry(token)
            if mine != theirs:
                raise VocabMismatchError(
                    f"token {token} is {mine[0]!r} in {self._model.path.name}"
                    f" and {theirs[0]!r} in {other._model.path.name}"
                    + (" (of different kinds)" if mine[0] == theirs[0] else "")
                    + "; target and draft must share a vocabulary"
                )

    def __repr__(self) -> str:
        return f"<sllm.Vocab of {self.n_tokens} tokens>"


class Model(Handle):
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
        _check_file(self.path)
        params, keep = _load_params(n_gpu_layers, devices, tensor_split, split_mode, progress)
        keep.append(ffi.new("char[]", os.fsencode(self.path)))
        params.path = keep[-1]
        params.use_mmap = use_mmap
        params.use_mlock = use_mlock
        params.check_tensors = check_tensors
        params.vocab_only = vocab_only
        self._endpoints = _endpoints_of(devices or ())

        out = ffi.new("sllm_model **")
        take_log()
        try:
            check(lib.sllm_model_load(params, out), str(self.path))
        finally:
            take_log()
        self.offloaded = n_gpu_layers != 0 and _may_offload(devices)
        self._own(out[0])

    def _own(self, pointer: Any) -> None:
        """Take over a model that llama.cpp has loaded."""
        super().__init__(pointer, lib.sllm_model_free)
        info = ffi.new("struct sllm_model_info *")
        lib.sllm_model_get_info(pointer, info)
        self.n_layer: int = info.n_layer
        self.n_embd: int = info.n_embd
        self.n_head: int = info.n_head
        self.n_head_kv: int = info.n_head_kv
        self.n_ctx_train: int = max(info.n_ctx_train, 0)
        self.n_params: int = info.n_params
        self.size_bytes: int = info.size_bytes
        self.can_rollback = bool(info.can_rollback)
        self.vocab = Vocab(self, info)
        self._metadata: Mapping[str, str] | None = None
        self._special_pieces: list[str] | None = None
        self._samplings: OrderedDict[SamplingParams, Any] = OrderedDict()
        self._samplings_lock = threading.Lock()
        self._last_sampling: tuple[SamplingParams | None, Any] = (None, None)
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        if self._endpoints:
            _with_servers.add(self)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The scalar GGUF metadata, read-only, all values as text."""
        if self._metadata is None:
            pointer = self._live
            pairs = {}
            for index in range(lib.sllm_model_meta_count(pointer)):
                key = read_text(partial(lib.sllm_model_meta_key, pointer, index))
                value = read_text(partial(lib.sllm_model_meta_value, pointer, index))
                pairs[key or ""] = value or ""
            self._metadata = MappingProxyType(pairs)
        return self._metadata

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as ``"llama"`` or ``"qwen3"``."""
        return self.metadata.get("general.architecture", "")

    @property
    def description(self) -> str:
        """Architecture, size class and quantisation in llama.cpp's words (``llama_model_desc``)."""
        return read_text(lambda text, size: lib.sllm_model_desc(self._live, text, size)) or ""

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
        from sllm.engine.context import Context

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

    def compiled(self, params: SamplingParams) -> Any:
        """``params`` for this vocabulary, as an owning ``sllm_sampling *``; the newest 64 are kept for the
        next call.
        """
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling is {params!r}, expected SamplingParams")
        if params is self._last_sampling[0]:  # hashing takes longer than all the rest of a call
            return self._last_sampling[1]
        with self._samplings_lock:
            found = self._samplings.pop(params, None)
            if found is None:
                found = compile_sampling(self._live, params)
            self._samplings[params] = found
            while len(self._samplings) > 64:
                self._samplings.popitem(last=False)
        self._last_sampling = (params, found)
        return found

    def close(self) -> None:
        """Free the weights, after closing every context made from them. More calls do nothing."""
        if self._pointer is not None:
            for context in list(self._contexts):
                context.close()
            self._samplings.clear()
            self._last_sampling = (None, None)
        super().close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.n_layer} layers, {self.size_bytes / 1e6:.1f} MB"
        return f"<sllm.Model {self.path.name!r}, {state}>"


def _load_params(
    n_gpu_layers: int | None,
    devices: Sequence[Device | str] | None,
    tensor_split: Sequence[float] | None,
    split_mode: str,
    progress: Callable[[float], Any] | None,
) -> tuple[Any, list[Any]]:
    """What every load has in common, as sllm.h's parameters, and what must live as long as these."""
    if split_mode not in _SPLIT_MODES:
        raise ValueError(f"split_mode is {split_mode!r}, expected one of {', '.join(_SPLIT_MODES)}")
    backends.load()
    keep: list[Any] = [ffi.new_handle(progress)]
    params = ffi.new("struct sllm_model_params *")
    params.n_gpu_layers = -1 if n_gpu_layers is None else checked_int(n_gpu_layers, "n_gpu_layers")
    params.split_mode = _SPLIT_MODES[split_mode]
    if devices is not None:
        chosen = _device_indices(devices)
        keep.append(ffi.new("int32_t[]", chosen))
        params.devices, params.n_devices = keep[-1], len(chosen)
    if tensor_split is not None:
        keep.append(ffi.new("float[]", [float(part) for part in tensor_split]))
        params.tensor_split, params.n_tensor_split = keep[-1], len(keep[-1])
    params.progress = lib.sllm_py_progress
    params.progress_user_data = keep[0]
    return params, keep


_SERVER_DEVICE = re.compile(r"RPC(\d{1,3})\[([^\[\]]+)\]")
"""The name of an RPC server's device."""

_with_servers: weakref.WeakSet[Model] = weakref.WeakSet()
"""Models of this process that use RPC servers."""


def _name(device: Device | str) -> str:
    name = device.name if isinstance(device, Device) else device
    if not isinstance(name, str):
        raise ValueError(f"there is no device {device!r}; expected a Device or a name")
    return name


def server_of(device: Device | str) -> tuple[int, str] | None:
    """The number of an RPC server's device and the server's endpoint; None for this machine's devices."""
    found = _SERVER_DEVICE.fullmatch(_name(device))
    return None if found is None else (int(found[1]), found[2])


def _endpoints_of(wanted: Sequence[Device | str]) -> set[str]:
    """The RPC servers among the devices."""
    return {server[1] for server in map(server_of, wanted) if server is not None}


def _may_offload(wanted: Sequence[Device | str] | None) -> bool:
    """Whether layers can go somewhere else than to this machine's CPU."""
    if wanted is not None and _endpoints_of(wanted):
        return True
    names = None if wanted is None else {_name(device) for device in wanted}
    return any(d.type in ("gpu", "igpu") for d in devices() if names is None or d.name in names)


def _device_indices(wanted: Sequence[Device | str]) -> list[int]:
    known = {device.name: device.index for device in devices()}
    servers: dict[str, list[int]] = {}
    indices = []
    for device in wanted:
        name, server = _name(device), server_of(device)
        if server is not None:
            index, endpoint = server
            if endpoint not in servers:
                servers[endpoint] = _server_indices(endpoint)
            if index >= len(servers[endpoint]):
                raise ValueError(f"there is no device {name!r}; the server has {len(servers[endpoint])}")
            indices.append(servers[endpoint][index])
            continue
        if name not in known:
            raise ValueError(f"there is no device {name!r}; there are {', '.join(known)}")
        indices.append(known[name])
    return indices


def _server_indices(endpoint: str) -> list[int]:
    """Hand an RPC server to llama.cpp, which would end the process were it not there."""
    from sllm.engine import ggml_rpc

    # A server that one of our models is using has no time to answer questions.
    if not any(endpoint in model._endpoints and not model.closed for model in list(_with_servers)):
        ggml_rpc.probe(endpoint)
    return ggml_rpc.register(endpoint)
