"""The logits processor for vLLM's V2 model runner (``vllm.v1.worker.gpu.sample.logits_processor``).

Under speculation V2 gives a row to every drafted token and says where in the text it is, so that the noise
of each is known: whatever vLLM drafts with, the text stays the one that sllm's selection gives. (V1 refuses
logits processors beside speculation.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from sllm_vllm.arguments import Selection, check_no_penalties

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

    from sllm_vllm.selection import Settings

__all__ = ["SeededSelection"]

_UNUSED = Selection(seed=0, temperature=0)
"""What a slot of no request of ours is computed with, where others of the batch are ours."""


class SeededSelection(LogitsProcessor):
    """Leaves the token that sllm selects, in the rows of requests that have ``sllm_seed``.

    Start the server with ``--logits-processors sllm_vllm.runner_v2:SeededSelection``.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:  # noqa: ARG002
        self._device = req_states.device
        self._slots: list[Selection | None] = [None] * req_states.max_num_reqs
        self._settings: Settings | None = None  # of all slots; None: it has to be made anew
        self._ours: torch.Tensor | None = None

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Called by the front end: a ValueError becomes an answer 400.

        Raises:
            ValueError: arguments that are wrong, or that exclude each other.

        """
        if Selection.parse(sampling_params.extra_args) is not None:
            check_no_penalties(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take over a slot, whatever it held."""
        selection = Selection.parse(sampling_params.extra_args)
        if selection != self._slots[req_idx]:
            self._slots[req_idx] = selection
            self._settings = None
        return selection is not None

    def apply_staged_writes(self) -> None:
        """Bring the settings of all slots to the device, if they have changed."""
        import torch

        from sllm_vllm.selection import Settings

        if self._settings is None:
            self._settings = Settings.of([slot or _UNUSED for slot in self._slots], self._device)
            ours = [slot is not None for slot in self._slots]
            self._ours = torch.tensor(ours).to(self._device, non_blocking=True)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Change the rows of our requests in place."""
        import torch

        from sllm_vllm.selection import Needs, select

        batch = [self._slots[slot] for slot in ctx.idx_mapping_np]
        ours = [selection for selection in batch if selection is not None]
        if not ours or self._settings is None or self._ours is None:
            return logits
        slots = ctx.expanded_idx_mapping.to(torch.int64)
        needs = Needs.of(ours)
        if len(ours) < len(batch):
            needs = replace(needs, has_whole=True)
        # The row at a position computes the token behind it.
        tokens = select(logits, ctx.pos.to(torch.int64) + 1, self._settings.rows(slots, needs))
        ruled_out = self._ours[slots][:, None] & (
            torch.arange(logits.shape[1], device=logits.device) != tokens[:, None]
        )
        return logits.masked_fill_(ruled_out, -torch.inf)
