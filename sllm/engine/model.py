"""Models and their vocabularies."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sllm.engine import chat_template, file_check, gguf, hub, recurrent
from sllm.engine._ffi import check, ffi, lib, read_text
from sllm.engine.chat_tokens import MAX_ENDS, ChatTokens
from sllm.engine.context import Context
from sllm.engine.params import ContextParams, LoadParams, parse
from sllm.engine.weights import Weights, c_params
from sllm.errors import ModelLoadError, SllmError, UnsupportedModelError
from sllm.progress import step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt
    from typing_extensions import Unpack

    from sllm.engine.params import ContextOptions, LoadOptions

__all__ = ["Model"]

_log = logging.getLogger("sllm")
_TEMPLATE_KEY = "tokenizer.chat_template"


class Model(Weights):
    """A model, loaded from a GGUF file (``llama_model_load_from_file``).

    Args:
        path: a local path; or a model on the Hugging Face hub, such as ``owner/repo:Q4_K_M`` or
            ``hf://owner/repo/file.gguf``, or on ModelScope (``ms://``), which is downloaded first
            (:func:`sllm.hub.resolve` has all forms). For a model in several files, give the first.
        params, options: how to load it (:class:`~sllm.engine.params.LoadParams`); ``options`` are its fields
            and override ``params``.

    Raises:
        ModelLoadError: the file is missing, unreadable or not a model that llama.cpp can run; the message
            gives the reason, from the file or from llama.cpp's log.
        UnsupportedModelError: an encoder or diffusion model, or a draft that reads another model's hidden
            states (EAGLE-3, DFlash).
        RPCError: an RPC server cannot be reached.
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
        grammars: compiled grammars for its vocabulary (:class:`sllm.engine.grammar.Grammars`).
        can_rollback: the cost of rolling back tokens, such as rejected drafts: ``"free"`` (attention),
            ``"snapshots"`` (hybrid models for which llama.cpp keeps the states after the newest tokens, see
            ``n_rollback`` of :class:`~sllm.ContextParams`) or ``"recompute"`` (other hybrid and recurrent
            models: an earlier state is restored and the tokens since then are computed again).

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
        file_check.check_file(self.path)
        self._chats: dict[str, ChatTokens] = {}
        self._turn_ends: tuple[int, ...] | None = None
        self._id: str | None = None
        self._state_bytes: int | None = None
        with step(f"loading {self.path.name}", given.progress) as told:
            to_load, keep = c_params(given, told)
            keep.append(ffi.new("char[]", os.fsencode(self.path)))
            to_load.path = keep[-1]
            to_load.use_mmap = given.use_mmap
            to_load.vocab_only = given.vocab_only
            try:
                super().__init__(to_load, given, str(self.path))
            except ModelLoadError as error:
                raise file_check.explained(self.path, error) from error

    @property
    def id(self) -> str:
        """Equal for equal weights, such as two copies of a file (:func:`sllm.engine.gguf.model_id`)."""
        if self._id is None:
            self._id = gguf.model_id(self.path)
        return self._id

    @property
    def state_bytes(self) -> int:
        """Bytes of the recurrent state of one sequence; 0 with attention only. Every token that snapshots can
        roll back, and every checkpoint, takes the same amount again
        (:func:`sllm.engine.recurrent.state_bytes`).
        """
        if self.can_rollback == "free":
            return 0
        if self._state_bytes is None:
            self._state_bytes = recurrent.state_bytes(self.path)
        return self._state_bytes

    @property
    def chat_templates(self) -> dict[str, str]:
        """The file's chat templates, Jinja2 texts, by name: that of ``tokenizer.chat_template`` is
        ``"default"``, and ``tokenizer.chat_template.NAME`` has a name of its own, such as ``"tool_use"``.
        """
        found: dict[str, str] = {}
        for key in sorted(self.metadata):
            name = key.removeprefix(_TEMPLATE_KEY)
            if name == key or name[:1] not in ("", "."):
                continue
            name = name.removeprefix(".")
            text = read_text(
                partial(lib.sllm_model_chat_template, self._live, name.encode() if name else ffi.NULL)
            )
            if text:
                found.setdefault(name or "default", text)
        return found

    @property
    def chat_template(self) -> str | None:
        """The template that :meth:`chat` uses without tools: the default one, else the first by name; None if
        the file has none.
        """
        return self._chat_template(None)

    def _chat_template(self, tools: Sequence[Mapping[str, Any]] | None) -> str | None:
        found = self.chat_templates
        if tools and "tool_use" in found:
            return found["tool_use"]
        return found.get("default") or next(iter(found.values()), None)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool | str = False,
        add_generation_prompt: bool = True,
    ) -> npt.NDArray[np.int32]:
        r"""The prompt of a conversation, made with the file's own chat template, as int32 (n,) token ids.

        The text is that of transformers' ``apply_chat_template``. The template (Jinja2) runs in a sandbox.
        The content of messages is never parsed as control tokens, so a user cannot end a turn by writing
        ``<|im_end|>``.

        Args:
            messages: mappings with ``role`` and ``content`` (a text, or a list of text parts), and other keys
                that templates know: ``tool_calls``, ``tool_call_id``, ``name``, ``reasoning_content``. A key
                that is None counts as absent; a tool call's arguments may be a mapping or a JSON text.
            tools: the functions that the model may call, as JSON schemas in OpenAI's format (``{"type":
                "function", "function": {"name": ..., "description": ..., "parameters": ...}}``). If the file
                has a template named ``tool_use``, it is used.
            variables: further variables of the template, such as ``{"enable_thinking": False}``: names to
                values that JSON can represent.
            continue_final_message: the last message, an assistant's, is the beginning of the answer: the
                prompt ends with its text, without an end of turn. A str: the field to continue instead of
                ``"content"``, such as ``"reasoning_content"``.
            add_generation_prompt: end the prompt where the assistant's answer begins. Ignored with
                ``continue_final_message``.

        Raises:
            UnsupportedModelError: the file has no chat template, or it does not render, or it drops or
                changes the message to be continued.
            ValueError: malformed messages or tools, a variable that is reserved by the renderer, or a last
                message that cannot be continued.

        Examples:
            >>> with sllm.Model(sllm.embedded.TARGET, vocab_only=True) as model:
            ...     talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once"}]
            ...     prompt = model.chat(talk, continue_final_message=True)
            ...     model.vocab.decode(prompt, special=True)
            '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nOnce'

        """
        template = self._chat_template(tools)
        if template is None:
            raise UnsupportedModelError(f"{self.path.name} has no chat template; make the prompt yourself")
        bos, eos = (
            "" if token is None else self.vocab.decode([token], special=True, goes_on=True)
            for token in (self.vocab.bos, self.vocab.eos)
        )
        chats = self._chat_tokens(template)
        segments = chat_template.segments(
            template,
            messages,
            chats.pieces,
            bos_token=bos,
            eos_token=eos,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            variables=variables,
            continue_final_message=continue_final_message,
        )
        if not segments:
            raise UnsupportedModelError(
                f"the chat template of {self.path.name} makes nothing of these messages"
            )
        tokens = chats.encode(segments)
        if self.vocab.add_bos and self.vocab.bos is not None and tokens[:1].tolist() != [self.vocab.bos]:
            return np.concatenate(
                [np.array([self.vocab.bos], dtype=np.int32), tokens]
            )  # the template left it out
        return tokens

    def _chat_tokens(self, template: str) -> ChatTokens:
        found = self._chats.get(template)
        if found is None:
            found = self._chats[template] = ChatTokens(self.vocab, template)
        return found

    def _find_turn_ends(self) -> tuple[int, ...]:
        """See :attr:`sllm.engine.vocab.Vocab.turn_ends`; contexts end their texts with these, too."""
        if self._turn_ends is None:
            ends: dict[int, None] = {}
            for template in self.chat_templates.values():
                ends |= dict.fromkeys(self._ends_of(template))
            found = tuple(ends)[:MAX_ENDS]
            check(lib.sllm_model_end_turns(self._live, list(found), len(found)))
            self._turn_ends = found
        return self._turn_ends

    def _ends_of(self, template: str) -> tuple[int, ...]:
        try:
            return self._chat_tokens(template).ends
        except SllmError as error:  # a template that does not compile: chat() will say so
            _log.debug("%s: no end of a turn is known: %s", self.path.name, error)
            return ()

    def context(self, params: ContextParams | None = None, **options: Unpack[ContextOptions]) -> Context:
        """Make a :class:`~sllm.Context` with these parameters; ``options`` are fields of
        :class:`~sllm.engine.params.ContextParams`, and override ``params``.

        Raises:
            TypeError, ValueError: a parameter of another type or out of range, or one that does not fit the
                model.
            MemoryError: the KV cache does not fit into the machine.

        """
        return Context(self, parse(options, params or ContextParams()))

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.n_layer} layers, {self.size_bytes / 1e6:.1f} MB"
        return f"<sllm.Model {self.path.name!r}, {state}>"
