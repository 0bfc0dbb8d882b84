"""What a worker offers: its answer to a client that connects."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sllm.errors import RemoteError
from sllm.wire.protocol import PROTOCOL

if TYPE_CHECKING:
    from sllm.wire.protocol import pb

__all__ = ["LayersInfo", "WorkerInfo"]


@dataclass(frozen=True)
class LayersInfo:
    """Which layers a worker serves.

    Attributes:
        n_layer: layers of the whole model.
        n_embd: width of a hidden state.
        start, stop: the worker has layers [start, stop).
        fixed: whether it serves exactly these layers, and no smaller range of them.
        output: whether it has the final norm and the head.
        max_rows: maximum number of hidden states in one message.

    """

    n_layer: int
    n_embd: int
    start: int
    stop: int
    fixed: bool
    output: bool
    max_rows: int


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker offers.

    Attributes:
        software: name and version, in the worker's own words.
        features: names from ``sllm.proto``.
        model_name: the file's name.
        model_id: equal for equal weights (:func:`sllm.engine.gguf.model_id`).
        vocab_fingerprint: equal for equal vocabularies (:attr:`sllm.Vocab.fingerprint`).
        n_vocab, n_params, size_bytes: of the model.
        chat_template: its chat template, or None; :meth:`Remote.chat` renders it.
        n_ctx: positions of one text.
        max_prompt, max_hint: maximum numbers of tokens.
        sessions: texts at once, or sequences.
        instance: a random number that identifies the worker's process; 0: unknown.
        layers: the layers that it serves to :class:`~sllm.SplitTarget`, or None: it serves texts.

    """

    software: str
    features: tuple[str, ...]
    model_name: str
    model_id: str
    vocab_fingerprint: str
    n_vocab: int
    n_ctx: int
    max_prompt: int
    max_hint: int
    sessions: int
    n_params: int
    size_bytes: int
    chat_template: str | None
    layers: LayersInfo | None = None
    instance: int = 0

    @classmethod
    def from_reply(cls, reply: pb.InfoReply, endpoint: str) -> WorkerInfo:
        """Read the answer to ``Info``.

        Raises:
            RemoteError: it is of another version of the protocol, or its vocabulary's fingerprint is not one.

        """
        if reply.protocol != PROTOCOL:
            raise RemoteError(
                f"{endpoint} speaks version {reply.protocol} of the protocol, expected {PROTOCOL}:"
                " install the same version of sllm on both sides"
            )
        layers = None
        if "layers" in reply.features:
            found = reply.layers
            layers = LayersInfo(
                found.n_layer,
                found.n_embd,
                found.start,
                found.stop,
                found.fixed,
                found.output,
                found.max_rows,
            )
        # The fingerprint becomes the name of a file in the cache folder.
        elif not re.fullmatch("[0-9a-f]{64}", reply.vocab_fingerprint):
            raise RemoteError(f"{endpoint} has no valid fingerprint of its vocabulary")
        return cls(
            software=reply.software,
            features=tuple(reply.features),
            model_name=reply.model_name,
            model_id=reply.model_id,
            vocab_fingerprint=reply.vocab_fingerprint,
            n_vocab=reply.n_vocab,
            n_ctx=reply.n_ctx,
            max_prompt=reply.max_prompt,
            max_hint=reply.max_hint,
            sessions=reply.sessions,
            n_params=reply.n_params,
            size_bytes=reply.size_bytes,
            chat_template=reply.chat_template or None,
            layers=layers,
            instance=reply.instance,
        )
