"""The vocabulary of a worker's model, fetched once and kept by its fingerprint."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import threading
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sllm import folders
from sllm.engine.model import Model
from sllm.errors import RemoteError, SllmError
from sllm.wire.protocol import method, padded, pb

if TYPE_CHECKING:
    from sllm.remote.fleet import Fleet

__all__ = ["RemoteVocabulary"]

log = logging.getLogger("sllm.remote")

_MAX_BYTES = 1 << 28
"""Of a vocabulary, far above the largest; a worker must not make its clients run out of memory."""

_FETCH_SECONDS = 120.0
"""What fetching a vocabulary may take on a slow link."""


class RemoteVocabulary:
    """The worker's model without its weights: vocabulary, metadata and chat template. Any number of threads
    may use it.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._lock = threading.Lock()
        self._model: Model | None = None

    def model(self) -> Model:
        """The model, loaded on the first call: from the user's cache folder, or from the worker.

        Raises:
            RemoteError: it could not be fetched, or does not have the fingerprint that the worker gave.
            UnsupportedModelError: the worker serves layers of a model, and no texts.
            ClosedError: the connection is closed.

        """
        with self._lock:
            self._fleet.link.live_for_texts()
            if self._model is None:
                self._model = self._load()
                self._model.vocab.name = f"the model of {self._fleet.link.endpoint}"  # and not the file
            return self._model

    def adopt(self, model: Model) -> None:
        """Take a model that is loaded already, with the worker's vocabulary; :meth:`close` closes it."""
        with self._lock:
            self._model = model

    def close(self) -> None:
        """Close the model. More calls do nothing."""
        with self._lock:
            if self._model is not None:
                self._model.close()
                self._model = None

    def _load(self) -> Model:
        link = self._fleet.link
        # Models with the same tokens may have other chat templates.
        template = hashlib.sha256((link.info.chat_template or "").encode()).hexdigest()
        path = folders.cache_folder("vocabularies") / f"{link.info.vocab_fingerprint}-{template[:16]}.gguf"
        with suppress(OSError, SllmError, ValueError):
            return self._checked(path)
        data = self._fetch()
        # Looked at before it is kept: what lies in the cache folder has been a vocabulary once.
        try:
            with tempfile.TemporaryDirectory(prefix="sllm-vocabulary-") as folder:
                fetched = Path(folder) / path.name
                fetched.write_bytes(data)
                try:
                    model = self._checked(fetched)
                except (OSError, SllmError, ValueError) as error:
                    raise RemoteError(
                        f"{link.endpoint} sent a vocabulary that does not load or is not its own: {error}"
                    ) from error
        except RemoteError:
            raise
        except OSError as error:  # a full disk
            raise RemoteError(
                f"the vocabulary of {link.endpoint} cannot be written to the folder for temporary files"
                f" ({len(data)} bytes): {error.strerror or error}"
            ) from error
        model.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with folders.replacing(path) as draft:
                draft.write_bytes(data)
        except OSError as error:
            log.info("%s cannot be written, so the vocabulary is not kept: %s", path.parent, error)
        return model

    def _checked(self, path: Path) -> Model:
        info = self._fleet.link.info
        model = Model(path, vocab_only=True)
        try:
            found, n_vocab = model.vocab.fingerprint, model.vocab.n_tokens
            if info.chat_template is not None and model.chat_template != info.chat_template:
                raise RemoteError("a vocabulary with another chat template")
            if (found, n_vocab) != (info.vocab_fingerprint, info.n_vocab):
                raise RemoteError(
                    f"a vocabulary of {n_vocab} tokens with the fingerprint {found},"
                    f" expected {info.n_vocab} and {info.vocab_fingerprint}"
                )
        except BaseException:
            model.close()
            raise
        return model

    def _fetch(self) -> bytes:
        """The vocabulary as a GGUF file."""
        link = self._fleet.link
        stub = link.live().unary_stream(
            method("Vocabulary"), pb.VocabularyRequest.SerializeToString, pb.Piece.FromString
        )
        inflate = zlib.decompressobj()
        data = bytearray()
        try:
            with link.errors_of(link.endpoint):
                pieces = stub(
                    padded(pb.VocabularyRequest()),
                    metadata=link.metadata,
                    timeout=link.timeout + _FETCH_SECONDS,
                )
                try:
                    with link.cancellable(pieces):
                        for piece in pieces:
                            # With nothing left zlib would take 0 for "no limit".
                            data += inflate.decompress(piece.data, max(_MAX_BYTES - len(data), 1))
                            if inflate.unconsumed_tail or len(data) > _MAX_BYTES:
                                raise RemoteError(f"{link.endpoint} sends a vocabulary without an end")
                finally:
                    pieces.cancel()  # type: ignore[no-untyped-call]
        except zlib.error as error:
            raise RemoteError(f"{link.endpoint} sent a damaged vocabulary: {error}") from error
        return bytes(data)
