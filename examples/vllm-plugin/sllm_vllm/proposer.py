"""What vLLM wants as a drafter, where clients' drafts are all there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["NoDrafts"]


class NoDrafts:
    """A drafter that never has one: ``{"method": "custom_class", "model": "sllm_vllm.proposer.NoDrafts"}``.

    V1's drafters are handed rows of tokens and learn nothing of the requests that these belong to. So the
    clients' drafts are put in by the scheduler (``sllm_vllm.scheduler``), and a drafter is there because vLLM
    verifies nothing without one.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        """vLLM's way of making it; there is nothing to configure."""

    def load_model(self, *args: Any) -> None:
        """There is none."""

    def propose(self, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:  # noqa: ARG002
        """An empty draft for every row."""
        return [[] for _ in sampled_token_ids]
