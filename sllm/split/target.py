"""A model split by layers: the first and the last layers here, those between on other machines."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sllm.engine import gguf
from sllm.engine._ffi import checked_int
from sllm.engine.arrays import common_prefix, int32_array, positions
from sllm.engine.handle import Closing
from sllm.engine.layers import Embedding, LayerRange, can_branch, open_layers
from sllm.engine.model import Model
from sllm.engine.mtp import Heads
from sllm.engine.params import ContextParams, LoadParams, context_length, parse_both
from sllm.engine.sampling import SamplingParams
from sllm.engine.tree import MAX_NODES
from sllm.errors import BusyError, CancelledError, ContextFullError, RemoteError, UnsupportedModelError
from sllm.hosts import host_port
from sllm.remote.connection import Remote
from sllm.remote.route import Route
from sllm.remote.stream import checked_on_loss
from sllm.split.chain import Part, Relays, hop_addresses
from sllm.split.link import HopLostError, TreesLostError
from sllm.split.ranges import worker_ranges
from sllm.split.slot import SplitSlot
from sllm.targets.base import RemoteStats, Scores
from sllm.targets.lockstep import LockstepGeneration, Verified
from sllm.targets.tree import TokenTree
from sllm.wire import codec as codecs

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import numpy.typing as npt
    from typing_extensions import Unpack

    from sllm.engine.context import Context
    from sllm.engine.jobs import Draft
    from sllm.engine.layer_file import LayeredFile
    from sllm.engine.params import ContextOptions, LoadOptions
    from sllm.engine.vocab import Vocab
    from sllm.messages import ChatOptions
    from sllm.remote.link import WorkerLink
    from sllm.split.link import LayerAnswer, LayerLink

    class _SplitOptions(LoadOptions, ContextOptions):
        pass


__all__ = ["SplitGeneration", "SplitTarget"]

_T = TypeVar("_T")

_CHUNK = 128
"""Rows of a prompt that travel together: small enough that both machines and the link are at work at once."""

_IN_FLIGHT = 8
"""Chunks of a prompt on the way to a worker and back."""

_ROWS = 33
"""Rows of logits that the last layers keep for a text: a pass checks one drafted token less, on all branches
together. With a large vocabulary each takes a megabyte.
"""

_AGAIN = 32
"""So many rows of text that the layers do not have, those of an accepted branch, travel with the next pass;
more go by themselves, in chunks of which several are on the way at once.
"""


_MOST_WINDOWS = 8
"""Windows on their way at once."""

_MESSAGE_SECONDS = 0.005
"""A window takes its senders and receivers about so long on a busy machine, however short a pass is."""

_NEW = 0.2
"""How much of what is known of a pass's time is the newest one's."""


@dataclass(frozen=True)
class _Window:
    """Rows on their way through the workers: some of the text, or of what is expected to be text when they
    come back, and a tree behind it.

    Attributes:
        pos: of the first row.
        known: tokens, the last of which the tree follows.
        tree: what is drafted.
        hidden: float32 (n, n_embd), as the rows entered.
        at: when they were sent.

    """

    pos: int
    known: list[int]
    tree: TokenTree
    hidden: npt.NDArray[np.float32]
    at: float


_ROLLBACK = 4
"""Tokens that the layers of a hybrid model take back, unless told otherwise: as many as a worker's, which has
several sequences.
"""

_NOT_OURS = frozenset(
    [
        "n_batch",
        "n_ubatch",
        "n_outputs_max",
        "kv_unified",
        "tensor_split",
        "split_mode",
        "use_mmap",
        "use_mlock",
        "check_tensors",
        "progress",
        "vocab_only",
    ]
)
"""Parameters that follow from the others, or that make no sense for some layers of a model."""


@dataclass(frozen=True)
class _Chunk:
    """Positions of a text on their way through the layers."""

    pos: int
    tokens: list[int]
    hidden: npt.NDArray[np.float32]
    answer: LayerAnswer | None = None  # of the last worker, where it selects


class SplitTarget(Closing):
    """A target whose first and last layers run here and whose other layers run on workers (``sllm worker
    MODEL --layers``).

    A pass takes one round trip: the draft, a chain or a tree, goes through all layers as one batch of hidden
    states. If an accepted branch is not the tree's main path, its rows are sent again with the next pass.
    Only the main path is checked for models with a recurrent state, and if a worker does not support trees
    (see ``can_branch`` of a generation). Only hidden states cross the link, no tokens and no logits. **This
    does not keep the text secret**: anyone who holds the model's weights can usually reconstruct it (``sllm
    audit``). With ``tail=None`` the last worker selects the tokens, so that only token ids come back; that
    worker then knows the text.

    Args:
        path: the model, or a file of :func:`~sllm.export_layers` with its first layers; only the embedding
            and the layers that stay here are read.
        head: layers [0, head) run here; 0: only the embedding. None: those in ``path``, which must then be a
            file of the first layers.
        tail: the last ``tail`` layers, the final norm and the head run here; 0: only norm and head. None: the
            last worker has them.
        tail_path: the file with the last layers, if ``path`` does not have them.
        middle: a connection to the worker with the layers between; or several connections, to workers with
            consecutive layers, in order.
        codec: encoding of hidden states on the link: ``"f32"`` (exact), ``"f16"``, ``"q8"``, ``"q4"``
            (:mod:`sllm.wire.codec`). All but the first change the text slightly; ``sllm codec-report``
            measures how much.
        hops: whether each of several workers sends its rows directly to the next, if it is allowed to connect
            there (``sllm worker --hops``). False: all rows go through this process. A list gives, for each
            worker after the first, the address ``HOST:PORT`` at which the preceding worker reaches it, or
            None if that is the client's address for it. If two workers cannot reach each other, their rows go
            through this process, and ``stats`` says so.
        on_loss: ``"wait"`` (reconnect, resend what the worker has lost, and continue the text) or
            ``"raise"``; None: as given to :func:`~sllm.connect`.
        options: how to load and to compute the layers here: ``n_gpu_layers``, ``devices`` and ``load_mtp`` of
            :class:`~sllm.engine.params.LoadParams` (the last is False unless given, and loads the model's
            heads with the tail, a layer more, for ``generate(draft="mtp")``); ``n_ctx`` (positions of one
            text, no more than the workers have), ``n_seq_max`` (texts at once), ``n_threads``,
            ``n_threads_batch``, ``flash_attn``, ``type_k``, ``type_v`` and ``offload_kqv`` of
            :class:`~sllm.engine.params.ContextParams`; of a hybrid model ``n_rollback``, how many drafted
            tokens a pass may have, which the workers have to be able to take back as well. For exactly the
            text of the whole model, use the settings that :class:`~sllm.LocalTarget` names on all machines,
            and f32.

    Raises:
        ModelLoadError, UnsupportedModelError: the model's layers cannot be run separately.
        ValueError: more layers than the model or the files have, a number of layers that is neither given nor
            known from the file, or workers whose layers do not fit in between.
        RemoteError: a worker has another model.

    Attributes:
        head: number of first layers that run here.
        tail: as given.
        ranges: (start, stop) for each worker.
        n_layer: layers of the whole model.
        size_bytes: size of the weights loaded here, without the embedding, which stays on disk.

    Examples:
        >>> path = sllm.embedded.TARGET
        >>> with sllm.Worker(path, layers=(2, 7)) as worker, sllm.connect(worker.uri) as remote:
        ...     with sllm.SplitTarget(path, head=2, tail=1, middle=remote) as target:
        ...         len(sllm.generate(target, "Once upon a time", max_tokens=4).text()) > 0
        True

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        head: int | None = None,
        middle: Remote | Sequence[Remote],
        tail: int | None = 1,
        tail_path: str | os.PathLike[str] | None = None,
        codec: str = "f16",
        hops: bool | Sequence[str | None] = True,
        on_loss: str | None = None,
        **options: Unpack[_SplitOptions],
    ) -> None:
        loading, computing = parse_both(
            options, LoadParams(load_mtp=False), ContextParams(), without=_NOT_OURS
        )
        remotes = list(middle) if isinstance(middle, Sequence) else [middle]
        if not all(isinstance(remote, Remote) for remote in remotes):
            raise TypeError(f"middle is {middle!r}, expected what sllm.connect() returns, or several")
        hop_to = hop_addresses(hops, len(remotes))
        file = open_layers(path)
        last = file if tail_path is None else open_layers(tail_path)
        head = _checked_head(file, head, tail)
        self.head, self.tail, self.n_layer = head, tail, file.n_layer
        self.codec = codec
        codecs.row_bytes(codec, file.n_embd)
        losses = [remote.on_loss if on_loss is None else checked_on_loss(on_loss) for remote in remotes]
        links = [remote.link for remote in remotes]
        self.ranges = worker_ranges(links, file, head, self.n_layer - (tail or 0), output=tail is None)
        _check_same_model(file, last, links)
        n_worker = min(info.n_ctx for remote in remotes for info in remote.fleet.offers)
        n_ctx = min(
            context_length(file.n_ctx_train) if computing.n_ctx is None else computing.n_ctx, n_worker
        )
        if n_ctx < 1:
            raise ValueError(f"n_ctx is {n_ctx}, expected >= 1")
        self._remotes = remotes  # keeps the connections open
        self._lock = threading.Lock()  # over the slots
        self._computing = threading.Lock()  # over the layers here: texts take turns
        n_seq_max = computing.n_seq_max
        self._slots = [self._make_slot(i, losses, hop_to) for i in range(n_seq_max)]
        n_rollback = _ROLLBACK if computing.n_rollback is None else computing.n_rollback
        computing = replace(
            computing,
            n_ctx=n_ctx * n_seq_max,
            n_rollback=n_rollback,
            # What is computed at once comes in chunks: room for more would lie idle.
            n_batch=max(_CHUNK, _ROWS * n_seq_max),
            n_ubatch=_CHUNK,
            n_outputs_max=_ROWS * n_seq_max,
        )
        self._load(file, last, loading, computing)
        self._has_trees = can_branch(file)
        # Rejected rows have to be taken back without computing any again: layers do not keep what was sent.
        rows = {"free": _ROWS, "snapshots": 1 + n_rollback}
        self._max_rows = min(_ROWS, rows.get(self._vocabulary.can_rollback, 1))
        super().__init__()
        here = [layers for layers in (self._head, self._tail) if layers is not None]
        self.n_ctx = min([n_ctx, *(layers.context.n_ctx_seq for layers in here)])
        self.size_bytes = sum(layers.size_bytes for layers in here)

    def _make_slot(
        self,
        i: int,
        losses: list[str],
        hop_to: list[tuple[str, int] | None] | None,
    ) -> SplitSlot:
        addresses = hop_to or [None] * len(self._remotes)
        parts = [
            Part(
                Route(remote.fleet),
                *layers,
                self.tail is None and layers[1] == self.n_layer,
                loss,
                address,
            )
            for remote, layers, loss, address in zip(
                self._remotes, self.ranges, losses, addresses, strict=True
            )
        ]
        return SplitSlot(i, Relays(parts, allowed=hop_to is not None), self.codec)

    def _load(
        self, file: LayeredFile, last: LayeredFile, loading: LoadParams, computing: ContextParams
    ) -> None:
        """Load what is computed here."""
        self._head: LayerRange | None = None
        self._tail: LayerRange | None = None
        self._heads: Heads | None = None
        self._loads_heads = loading.load_mtp
        n = self.n_layer
        with ExitStack() as stack:
            self._vocabulary = stack.enter_context(Model(file.paths[0], vocab_only=True))
            self._embedding = stack.enter_context(Embedding(file))
            if self.head:
                self._head = stack.enter_context(
                    LayerRange(file, 0, self.head, loading=loading, computing=computing)
                )
            if self.tail is not None:
                self._tail = stack.enter_context(
                    LayerRange(
                        last,
                        n - self.tail,
                        n,
                        output=True,
                        vocabulary=self._vocabulary,
                        loading=loading,
                        computing=computing,
                    )
                )
            self._stack = stack.pop_all()

    def heads(self) -> Heads:
        """The model's own heads for multi-token prediction, which draft for this target from now on. The rows
        of the embedding that they need are read from the file of the first layers.

        The first call clears the memory of the local layers, so the next prompts are computed completely.

        Raises:
            UnsupportedModelError: the last layer is not here, the heads were not loaded with it, or they
                cannot draft.
            BusyError: a generation is open.

        """
        with self._lock:
            if self._heads is None:
                if self._tail is None or not self.tail or not self._loads_heads:
                    raise UnsupportedModelError(_no_heads(self.tail))
                if any(slot.generation is not None for slot in self._slots):
                    raise BusyError(
                        "this target has generations open; close them first, or ask for heads() before"
                    )
                with self._computing:
                    self._heads = _SharedHeads(self._tail.context, self._embedding, self._computing)
            return self._heads

    @property
    def _keeps_positions(self) -> bool:
        """Whether the layers can go back to any position of a text."""
        return self._vocabulary.can_rollback == "free"

    @property
    def vocab(self) -> Vocab:
        """The model's vocabulary."""
        return self._vocabulary.vocab

    @property
    def chat_template(self) -> str | None:
        """The file's chat template; see :attr:`sllm.Model.chat_template`."""
        return self._vocabulary.chat_template

    def chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
    ) -> npt.NDArray[np.int32]:
        """The prompt of a conversation by the file's chat template; see :meth:`sllm.Model.chat`."""
        return self._vocabulary.chat(messages, **options)

    def open(
        self, tokens: npt.NDArray[np.int32], sampling: SamplingParams, max_tokens: int | None
    ) -> SplitGeneration:
        """Compute the prompt, on all machines, and return the generation after it.

        A prefix shared with an earlier text is not computed again. The first token is selected with the
        prompt, so it costs no round trip of its own.

        Raises:
            ContextFullError: the prompt does not fit.
            BusyError: the limit of open texts is reached, here or on a worker.
            ValueError: no tokens, or one outside the vocabulary.
            RemoteError: a worker cannot be reached.

        """
        return self._opened(tokens, sampling, max_tokens, first=True)

    def _opened(
        self,
        tokens: npt.NDArray[np.int32],
        sampling: SamplingParams,
        max_tokens: int | None,
        *,
        first: bool,
    ) -> SplitGeneration:
        """See :meth:`open`; ``first``: select the first token, too."""
        prompt = int32_array(tokens, "tokens")
        if len(prompt) == 0:
            raise ValueError("the prompt has no tokens")
        if len(prompt) > self.n_ctx:
            raise ContextFullError(f"the prompt has {len(prompt)} tokens, and the split holds {self.n_ctx}")
        n_vocab = self.vocab.n_tokens
        if int(prompt.min()) < 0 or int(prompt.max()) >= n_vocab:
            raise ValueError(f"the prompt holds ids that are not in the vocabulary of {n_vocab} tokens")
        self._vocabulary.compiled(sampling)  # reject a bad grammar before anything is computed
        text = prompt.tolist()
        with self._lock:
            free = [slot for slot in self._slots if slot.generation is None]
            if not free:
                raise BusyError(
                    f"this target has {len(self._slots)} generations open; close one, or raise n_seq_max"
                )
            slot = max(free, key=lambda s: common_prefix(s.tokens, text))
            generation = slot.generation = SplitGeneration(self, slot, text, sampling, max_tokens)
        try:
            generation.begin(first=first)
        except BaseException:
            generation.close()
            raise
        return generation

    def cancel(self) -> None:
        """End the texts that other threads compute here, including one whose prompt is still being computed
        in :func:`~sllm.generate`; those threads get CancelledError. May be called from any thread.
        """
        with self._lock:
            generations = [slot.generation for slot in self._slots if slot.generation is not None]
        for generation in generations:
            generation.cancel()

    def score(self, tokens: npt.NDArray[np.int32], start: int) -> Scores:
        """How likely the model finds ``tokens[start:]``, in one pass; see :class:`~sllm.targets.base.Scorer`.

        Raises:
            UnsupportedModelError: with ``tail=None``, where the worker has the output.
            ContextFullError, BusyError, ValueError, RemoteError: as :meth:`open`.

        """
        if self._tail is None:
            raise UnsupportedModelError("a split with tail=None has no output here to score with")
        text = int32_array(tokens, "tokens")
        checked_int(start, "start", 1, max(len(text) - 1, 1))
        began = time.perf_counter()
        with closing(self._opened(text[:start], SamplingParams(), None, first=False)) as generation:
            n_reused = generation.n_shared
            logprobs, ranks = generation.score(text[start:].tolist())
        return Scores(logprobs, ranks, n_reused, time.perf_counter() - began)

    # ---- for its generations

    def _enter(self, pos: int, tokens: list[int], seq_id: int, parents: Sequence[int] = ()) -> _Chunk:
        """Tokens, the last of them a tree's with these ``parents``, through the embedding and the layers
        here.
        """
        with self._computing:
            hidden = self._embedding.rows(tokens)
            if self._head is not None:
                hidden = self._head.forward(hidden, seq_id=seq_id, pos=pos, parents=parents or None)
        return _Chunk(pos, tokens, hidden)

    def _branches(self) -> bool:
        """Whether all layers here hold trees: the model's heads, once they draft, leave their layers none."""
        with self._computing:
            here = [part.context for part in (self._head, self._tail) if part is not None]
            return self._has_trees and all(context.can_branch for context in here)

    def _let_go(self, slot: SplitSlot) -> None:
        with self._lock:
            slot.generation = None

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._vocabulary.closed

    def close(self) -> None:
        """Free the local layers and the texts' memory on the workers. Further calls do nothing."""
        if self._in_fork or self.closed:
            return
        for slot in self._slots:
            for link in slot.links:
                link.release()
            if slot.generation is not None:
                slot.generation.close()
        self._stack.close()

    def __repr__(self) -> str:
        here = f"{self.head} + {'no' if self.tail is None else self.tail} of {self.n_layer} layers here"
        return f"<sllm.SplitTarget {here}{', closed' if self.closed else ''}>"


def _no_heads(tail: int | None) -> str:
    """Why a split has no heads to draft with."""
    if tail:
        return "the MTP heads of this split were not loaded: make it with SplitTarget(load_mtp=True)"
    return (
        f"MTP heads draft where the model's last layer is, and with tail={tail} that is on a worker: keep a"
        " layer of the tail here, or use another draft"
    )


class _SharedHeads(Heads):
    """The heads of a context that several texts take turns with."""

    def __init__(self, context: Context, embedding: Embedding, turns: threading.Lock) -> None:
        super().__init__(context, embedding)
        self._turns = turns
        self._guard = threading.Lock()  # over the next one
        self._drafting = False

    def draft(
        self,
        seq_ids: Sequence[int] | npt.NDArray[np.int32],
        tokens: npt.ArrayLike | Sequence[npt.ArrayLike],
        *,
        pos: int | Sequence[int] | None = None,
        **options: Any,
    ) -> Draft:
        """See :meth:`Heads.draft`; nothing where layers have lost their part of a text, as they do when a
        pass of a recurrent state is interrupted: the split's next pass computes it again.
        """
        with self._turns:
            begins = positions(pos, len(seq_ids), "pos")
            length = self.context.memory.length
            if any(begin > length(int(seq)) for seq, begin in zip(seq_ids, begins, strict=True)):
                pos, options["n_max"] = None, 0
            self._mark(drafting=True)
            try:
                return super().draft(seq_ids, tokens, pos=pos, **options)
            finally:
                self._mark(drafting=False)

    def _mark(self, *, drafting: bool) -> None:
        with self._guard:
            self._drafting = drafting

    def cancel(self) -> None:
        """See :meth:`Heads.cancel`; a pass of another text goes on."""
        with self._guard:
            if self._drafting:
                super().cancel()


class SplitGeneration(LockstepGeneration):
    """One text of a :class:`SplitTarget`; see :class:`~sllm.targets.base.Generation`.

    Attributes:
        remote: what it has cost on the links.

    """

    def __init__(
        self,
        target: SplitTarget,
        slot: SplitSlot,
        prompt: list[int],
        sampling: SamplingParams,
        max_tokens: int | None,
    ) -> None:
        self._target = target
        self._slot = slot
        n_shared = self._resume(prompt)
        max_chain = min(target._max_rows, *(link.max_rows for link in slot.links)) - 1
        can_branch = all(link.can_branch for link in slot.links) and target._branches()
        super().__init__(target.vocab, prompt, max_tokens, target.n_ctx, max_chain, can_branch=can_branch)
        self.n_shared = n_shared
        self.seq_id = slot.seq_id
        self._sampling = sampling
        self._first: tuple[tuple[int, ...], int] | None = None  # selected along with the prompt
        self._flight: deque[_Window] = deque()
        self._pass_seconds = 0.0  # of the last worker
        self._free_at = 0.0  # when the first worker can begin with one more window
        if can_branch and self._may_send_ahead():
            self.max_hint = min(_MOST_WINDOWS * max_chain, MAX_NODES)
        self.remote = RemoteStats(round_trip=0.0)
        self._begin_links(n_shared)

    def _resume(self, prompt: list[int]) -> int:
        """Keep of the text before what ``prompt`` has in common with it; how many tokens that is."""
        target, slot = self._target, self._slot
        n_shared = min(common_prefix(slot.tokens, prompt), len(prompt) - 1)
        if n_shared < len(slot.tokens) and not target._keeps_positions:
            n_shared = 0  # a recurrent state goes back over a draft, and not over a text
        n_shared = min(n_shared, self._held())
        del slot.tokens[n_shared:]
        if slot.may_merge():
            slot.merge()
        elif n_shared == 0 and slot.relays.reasons().keys() != slot.relayed.keys():
            slot.regroup()
        return n_shared

    def _begin_links(self, n_held: int, lost: Mapping[Part, float] | None = None) -> None:
        """Let the links begin with this text, of which they hold so many positions; see
        :meth:`LayerLink.begin`.
        """
        slot = self._slot
        for link in slot.links:
            sampling = self._sampling if link.parts[-1].output else None
            link.begin(n_held, self.remote, sampling, self._start, lost)
        parts = slot.relays.parts
        self.remote.n_hops = sum(len(link.parts) - 1 for link in slot.links)
        self.remote.relayed = tuple(
            f"{parts[i].link.endpoint} to {host_port(*parts[i + 1].seen_at)}: {reason}"
            for i, reason in slot.relayed.items()
        )

    def begin(self, *, first: bool) -> None:
        """Compute the prompt, and with ``first`` select the first token."""
        self._over_hops(lambda: self.read_prompt(first=first and self.finish_reason is None))

    def _over_hops(self, work: Callable[[], _T]) -> _T:
        """What ``work`` returns; where rows do not get from one worker to the next, they go through here, and
        all layers compute what they have lost of the text anew.
        """
        while True:
            try:
                return work()
            except HopLostError as error:  # noqa: PERF203
                self._change_links(partial(self._slot.lose_hop, error.part, str(error)))

    def _change_links(self, change: Callable[[], object]) -> None:
        """Let ``change`` replace the links, and go on with this text over those that there are then."""
        slot = self._slot
        self._flight.clear()
        lost: dict[Part, float] = {}
        for link in slot.links:
            lost |= link.lost
            link.suspend()
        change()
        self._begin_links(len(slot.tokens), lost)
        if self._cancelled:  # which those before were told
            raise CancelledError("the generation was cancelled")

    @property
    def ready(self) -> bool:
        """See :attr:`LockstepGeneration.ready`."""
        return self._first is not None

    def _held(self) -> int:
        """Positions of the text that all layers here hold."""
        target, slot = self._target, self._slot
        with target._computing:
            here = [
                part.memory.length(slot.seq_id) for part in (target._head, target._tail) if part is not None
            ]
        return min(here, default=len(slot.tokens))

    def _catch_up(self) -> None:
        """Compute again what the layers here lost when a pass of theirs was interrupted, or what the workers
        have lost along with the way between them; what a pass can have along with it is left to that.
        """
        held = min(self._held(), len(self._slot.tokens))
        del self._slot.tokens[held:]
        n_along = min(_AGAIN, self.max_chain) if self.can_branch else 0
        if len(self._text) - 1 - held > n_along:
            self.read_prompt()

    def _verify(self, tree: TokenTree) -> Verified:
        if self._first is not None:
            (tokens, n_accepted), self._first = self._first, None
            return Verified(tokens, n_accepted, 0)

        def verified() -> Verified:
            self._send(tree)
            return self._received()

        return self._mended(verified)

    @property
    def under_way(self) -> bool:
        """See :attr:`LockstepGeneration.under_way`."""
        return bool(self._flight)

    def push(self) -> float:
        """See :meth:`LockstepGeneration.push`. A window is sent if there is none on its way; and behind it,
        where a link is much slower than a pass, such as go on from the end of its main path.
        """
        if self._first is not None or self.closed or self._cancelled or self.finish_reason is not None:
            return 0.0
        if len(self._slot.links) > 1:  # the rows of each have to be carried to the next
            return 0.0
        tree = self._valid_hint()
        self._mended(lambda: self._send(tree))
        if not self._flight:
            return 0.0
        expected = self.remote.round_trip + self._pass_seconds
        return max(self._flight[0].at + expected - time.perf_counter(), 0.0)

    def _mended(self, work: Callable[[], _T]) -> _T:
        """What ``work`` returns, once more where what was under way is lost in a way that can be mended."""

        def over_hops() -> _T:
            return self._over_hops(work)

        try:
            try:
                return over_hops()
            except TreesLostError:  # the worker that is there now is another one
                self._let_fall()
                self.can_branch = False
                self.max_hint = self.max_chain
                return over_hops()
        except BaseException:
            # Answers to this pass may still arrive, and the next one would take them for its own.
            self._let_fall()
            raise

    def _let_fall(self) -> None:
        """Let the links forget what is on its way."""
        self._flight.clear()
        for link in self._slot.links:
            link.suspend()

    # ---- windows

    def _may_send_ahead(self) -> bool:
        """Whether rows can be sent before those before them have come back: what follows these is selected
        here, and all layers can go back to any position.
        """
        target = self._target
        return target._tail is not None and target._keeps_positions and len(self._slot.links) == 1

    def _n_windows(self) -> int:
        """How many may be on their way at once: as many as the first of them takes, if they are void, no time
        from those that come after them.
        """
        if not self.can_branch or not self._may_send_ahead() or not self._pass_seconds:
            return 1
        return windows_worth(self.remote.round_trip, self._pass_seconds)

    def _send(self, tree: TokenTree) -> None:
        """Send a window behind the text, if there is none on its way, and what of ``tree``, which follows the
        text, goes on from the end of those that are.
        """
        if not self.can_branch:
            tree = TokenTree.chain(tree.main_path())
        if not self._flight:
            if self._slot.may_merge():
                self._change_links(self._slot.merge)
            self._catch_up()
            pos = len(self._slot.tokens)
            known = self._text[pos:]
            n = self.max_chain + 1 - len(known)
            # Likeliest nodes come first: what is cut off to make room for known tokens is the least of it.
            first = tree.head(n if self._n_first is None else min(n, self._n_first))
            self.remote.n_again += len(known) - 1
            self._send_window(pos, known, first)
        while len(self._flight) < self._n_windows():
            text = self._text[self._flight[0].pos :]
            sent = [*self._flight[0].known]
            for window in self._flight:
                sent += window.tree.main_path()
            rest = tree.after(sent[len(text) :]) if sent[: len(text)] == text else None
            full = rest is not None and len(rest) >= self.max_chain
            if not rest or not (full or time.perf_counter() >= self._free_at):
                break
            # The last row goes once more: every tree follows a row of its message.
            self.remote.n_again += 1
            self.remote.n_ahead += 1
            self._send_window(self._flight[0].pos + len(sent) - 1, sent[-1:], rest.head(self.max_chain))

    def _send_window(self, pos: int, known: list[int], tree: TokenTree) -> None:
        """Send rows through the layers here and into the first worker."""
        target, slot = self._target, self._slot
        tree = tree.head(self._n_ctx - pos - len(known))
        tokens = [*known, *tree.tokens]
        parents = () if tree.is_chain else tree.parents
        hidden = target._enter(pos, tokens, slot.seq_id, parents).hidden
        now = time.perf_counter()
        window = _Window(pos, known, tree, hidden, now)
        if len(slot.links) == 1:
            self._into_last(window, hidden)
        self._flight.append(window)
        self._free_at = max(now, self._free_at) + self._pass_seconds

    def _goes_on(self, committed: list[int]) -> bool:
        """Whether the next window on its way is of use when these tokens are text: its first row is, and what
        was selected after it is in its tree.
        """
        window = self._flight[0]
        at = window.pos - len(self._text)  # among what is committed
        row = committed[at : at + 1] if at >= 0 else self._text[at:][:1]
        if len(self._slot.tokens) <= window.pos or row != window.known or len(committed) != at + 2:
            return False
        return window.tree.child(-1, committed[-1]) >= 0

    def _into_last(self, window: _Window, hidden: npt.NDArray[np.float32]) -> None:
        """Send a window's rows into the last link; without a tail here, what follows is selected there."""
        link, tree = self._slot.links[-1], window.tree
        parents = () if tree.is_chain else tree.parents
        if self._target._tail is None:
            tokens = [*window.known, *tree.tokens]
            link.send(window.pos, hidden, tokens=tokens, n_select=1 + len(tree), parents=parents)
        else:
            link.send(window.pos, hidden, parents=parents)

    def _received(self) -> Verified:
        """What comes of the first window on its way."""
        target, slot = self._target, self._slot
        window = self._flight[0]
        pos, known, tree, hidden = window.pos, window.known, window.tree, window.hidden
        *before, link = slot.links
        for carried in before:
            hidden = _through(carried, pos, hidden, () if tree.is_chain else tree.parents)
        if before:
            self._into_last(window, hidden)
        answer = link.receive()
        if target._tail is not None:
            if answer.hidden is None:
                raise RemoteError("the worker sent no hidden states")
            hidden = answer.hidden
        seconds = max(answer.seconds, 1e-4)
        self._pass_seconds += (_NEW if self._pass_seconds else 1.0) * (seconds - self._pass_seconds)
        self._flight.popleft()
        slot.got_through()
        selected, n_accepted = self._selection(pos, known, tree, hidden, answer)
        # All layers hold the main path, as far as it was right.
        held = known + selected[: common_prefix(tree.main_path(), selected[:n_accepted])]
        slot.tokens[pos:] = held
        # Of a window that was sent ahead, what follows its first row was selected with the one before.
        n_known = len(self._text) - pos - len(known)
        committed = selected[n_known:]
        if self._flight and not self._goes_on(committed):
            link.void()
            self.remote.n_void += len(self._flight)
            self._flight.clear()
            self._free_at = 0.0
        return Verified(tuple(committed), n_accepted - n_known, len(tree) - n_known, window.at)

    def _selection(
        self,
        pos: int,
        known: list[int],
        tree: TokenTree,
        hidden: npt.NDArray[np.float32],
        answer: LayerAnswer | None,
    ) -> tuple[list[int], int]:
        """What follows the text, of which ``known`` are the last tokens, from ``pos`` on, and how much of it
        is in ``tree``: as the last worker has answered, or selected here from the hidden states of all these.
        """
        target = self._target
        if target._tail is None:
            selected = () if answer is None else answer.tokens
            n_accepted = len(selected) - 1
            n_vocab = self._vocab.n_tokens
            if max(selected, default=n_vocab) >= n_vocab or tree.after(selected[:-1]) is None:
                raise RemoteError(
                    "the worker accepted tokens that it was not sent, or selected none that exist"
                )
            return list(selected), n_accepted
        with target._computing:
            verdict = target._tail.verify(
                [self._slot.seq_id],
                [known],
                [tree.tokens],
                parents=None if tree.is_chain else [tree.parents],
                hidden=hidden,
                sampling=self._sampling,
                pos=pos,
                start=self._start,
            )
        n_accepted = int(verdict.n_accepted[0])
        return verdict.tokens[0, : n_accepted + 1].tolist(), n_accepted

    def read_prompt(self, *, first: bool = False) -> None:
        """Compute the text but for its last token, in chunks of which several are on the way at once; with
        ``first``, the last token along with them, and select what follows.
        """
        target, slot = self._target, self._slot
        for link in slot.links:
            link.connect()
        n_known = len(self._text) - 1
        for chunk in self._chunks(self._text if first else self._text[:-1], select=first):
            known = chunk.tokens[: n_known - chunk.pos]
            if target._tail is not None and known:
                with target._computing:
                    target._tail.context.decode(
                        known, seq_id=slot.seq_id, pos=chunk.pos, hidden=chunk.hidden[: len(known)]
                    )
            if len(known) < len(chunk.tokens):
                selected, n_accepted = self._selection(
                    n_known, chunk.tokens[-1:], TokenTree(), chunk.hidden[len(known) :], chunk.answer
                )
                self._first = tuple(selected), n_accepted
            slot.tokens += chunk.tokens
            slot.got_through()

    def score(self, tokens: list[int]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """The log-probability, float32 (n,), and the rank, int32 (n,), of each of ``tokens`` after the text.

        From whole rows of logits: ``sllm_score`` takes no hidden states.
        """
        return self._over_hops(lambda: self._score(tokens))

    def _score(self, tokens: list[int]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        target, slot = self._target, self._slot
        assert target._tail is not None
        whole = [*self._text, *tokens]
        found: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]] = []
        for chunk in self._chunks(whole[:-1], select=False):
            with target._computing:
                rows = target._tail.context.decode(
                    chunk.tokens, seq_id=slot.seq_id, pos=chunk.pos, hidden=chunk.hidden, logits="all"
                )
                assert rows is not None
                shifted = rows - rows.max(axis=1, keepdims=True)
            following = np.array(whole[chunk.pos + 1 : chunk.pos + 1 + len(rows)])
            chosen = shifted[np.arange(len(rows)), following]
            spread = np.log(np.exp(shifted).sum(axis=1, dtype=np.float64))
            ranks = (shifted > chosen[:, None]).sum(axis=1).astype(np.int32)
            found.append(((chosen - spread).astype(np.float32), ranks))
            slot.tokens += chunk.tokens
        n = len(tokens)  # the first row may have been the prompt's
        return np.concatenate([f for f, _ in found])[-n:], np.concatenate([r for _, r in found])[-n:]

    def _chunks(self, tokens: list[int], *, select: bool) -> Iterable[_Chunk]:
        """The part of ``tokens`` that is not computed yet, as it leaves the last worker; ``select``: where
        that has the output, it selects what follows.
        """
        target, slot = self._target, self._slot
        size = min(_CHUNK, *(link.max_rows for link in slot.links))
        chunks: Iterable[_Chunk] = (
            target._enter(pos, tokens[pos : pos + size], slot.seq_id)
            for pos in range(len(slot.tokens), len(tokens), size)
        )
        for i, link in enumerate(slot.links):
            ends = target._tail is None and i == len(slot.links) - 1
            chunks = _stream(link, chunks, ends=ends, select_at=len(tokens) if ends and select else None)
        return chunks

    def cancel(self) -> None:
        """See :meth:`~sllm.targets.base.Generation.cancel`."""
        if self.closed:
            return  # another text may be using the slot
        self._cancelled = True
        for link in self._slot.links:
            link.cancel()

    def close(self) -> None:
        """Let the target open another generation. More calls do nothing."""
        if self.closed:
            return
        self.closed = True
        if self._target._in_fork:
            return
        self.remote.n_void += len(self._flight)
        self._let_fall()
        self._target._let_go(self._slot)


def windows_worth(round_trip: float, pass_seconds: float) -> int:
    """How many windows may be on their way to a worker at once. Where the first of them is wrong, the one
    that replaces them arrives a round trip later: if the worker is through with them by then, they have cost
    nothing.
    """
    return max(1, min(_MOST_WINDOWS, int(round_trip / max(pass_seconds, _MESSAGE_SECONDS))))


def _through(
    link: LayerLink, pos: int, hidden: npt.NDArray[np.float32], parents: Sequence[int]
) -> npt.NDArray[np.float32]:
    link.send(pos, hidden, parents=parents)
    out = link.receive().hidden
    if out is None:
        raise RemoteError("the worker sent no hidden states")
    return out


def _stream(
    link: LayerLink, chunks: Iterable[_Chunk], *, ends: bool, select_at: int | None
) -> Iterator[_Chunk]:
    """Send chunks through the layers of a worker, several on the way at once.

    Args:
        link: to it.
        chunks: what enters its layers.
        ends: it has the output, and gets the tokens.
        select_at: it selects the token at this position.

    """
    waiting: deque[_Chunk] = deque()

    def receive() -> _Chunk:
        chunk = waiting.popleft()
        answer: LayerAnswer = link.receive()
        if answer.hidden is None:
            return replace(chunk, answer=answer if answer.tokens else None)
        return replace(chunk, hidden=answer.hidden)

    for chunk in chunks:
        n_select = int(chunk.pos + len(chunk.tokens) == select_at)
        link.send(
            chunk.pos,
            chunk.hidden,
            tokens=chunk.tokens if ends else None,
            n_select=n_select,
            silent=ends and not n_select,
        )
        waiting.append(chunk)
        if len(waiting) >= _IN_FLIGHT:
            yield receive()
    while waiting:
        yield receive()


def _checked_head(file: LayeredFile, head: int | None, tail: int | None) -> int:
    """How many layers begin here.

    Raises:
        ValueError: head and tail are not numbers of layers, leave none for the middle, or contradict the
            file, or it does not say what is not given.

    """
    for name, value in (("head", head), ("tail", tail)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ValueError(f"{name} is {value!r}, expected a number of layers >= 0")
    name, first, n = file.paths[0].name, file.n_first, file.n_layer
    if head is None:
        if first is None:
            what = "the whole model" if len(file.layers) == n else "other layers than the first"
            raise ValueError(
                f"{name} holds {what}, and so does not say how many layers stay here: give head, or a file of"
                " the first layers alone (export_layers)"
            )
        head = first
    elif first is not None and head > first:
        raise ValueError(
            f"head is {head}, and {name} holds the first {first} layers alone: leave head out, or give a file"
            " with more"
        )
    if head + (tail or 0) >= n:
        raise ValueError(
            f"head and tail are {head} and {tail or 0} layers of the {n} of {name}: leave some for the middle"
        )
    return head


def _check_same_model(file: LayeredFile, last: LayeredFile, links: list[WorkerLink]) -> None:
    """Raise where the files or the workers have the weights of different models."""
    model_id = gguf.model_id(file.paths[0])
    for link in links:
        if link.info.model_id != model_id:
            raise RemoteError(
                f"{link.endpoint} has layers of another model, {link.info.model_name}, than"
                f" {file.paths[0].name}"
            )
    if gguf.model_id(last.paths[0]) != model_id:
        raise ValueError(f"{last.paths[0].name} and {file.paths[0].name} are of different models")
