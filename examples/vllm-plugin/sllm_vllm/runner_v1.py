"""The logits processor for vLLM's V1 model runner (``vllm.v1.sample.logits_processor``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from sllm_vllm.arguments import Selection, check_no_penalties
from sllm_vllm.selection import Settings, keep_only, select

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate

__all__ = ["SeededSelection"]

logger = init_logger(__name__)

_Row = tuple[Selection, int, list[int]]
"""What a row selects with, how long its prompt is, and its output, which vLLM lengthens."""


class SeededSelection(LogitsProcessor):
    """Leaves the token that sllm selects, in the rows of requests that have ``sllm_seed``.

    Start the server with ``--logits-processors sllm_vllm.runner_v1:SeededSelection``.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:  # noqa: ARG002
        self._device = device
        self._rows: dict[int, _Row] = {}
        self._index = torch.zeros(0, dtype=torch.int64)
        self._settings: Settings | None = None

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Called by the front end: a ValueError becomes an answer 400.

        Raises:
            ValueError: arguments that are wrong, or that exclude each other.

        """
        if Selection.parse(sampling_params.extra_args) is not None:
            check_no_penalties(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """It decides what the greedy way takes."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests that come, go and move."""
        if process_dict_updates(self._rows, batch_update, self._new_row):
            self._index = torch.tensor(list(self._rows), dtype=torch.int64).to(self._device)
            self._settings = Settings.of([row[0] for row in self._rows.values()], self._device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Change the rows of our requests in place."""
        if not self._rows or self._settings is None:
            return logits
        lengths = [n_prompt + len(output) for _, n_prompt, output in self._rows.values()]
        positions = torch.tensor(lengths, dtype=torch.int64).to(self._device, non_blocking=True)
        keep_only(logits, self._index, select(logits[self._index].float(), positions, self._settings))
        return logits

    def _new_row(self, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> _Row | None:
        selection = Selection.parse(params.extra_args)
        if selection is None:
            return None
        if prompt is None:
            logger.error("sllm_seed needs a prompt of tokens, and this one is embeddings: it has no effect")
            return None
        return selection, len(prompt), output
