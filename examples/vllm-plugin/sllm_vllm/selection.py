"""sllm's selection of a token, for a batch of rows of logits on any device.

The order is that of sllm and llama.cpp: top-k, top-p, min-p on the logits as they are, then temperature and
noise. Nothing here waits for the device: how much has to be sorted follows from the requests' settings,
which the host knows. The result is sllm's own but for rounding, where two scores, or a probability and the
border of top-p, are within some 1e-6 of each other: a device adds up in an order of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sllm_vllm import noise

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sllm_vllm.arguments import Selection

__all__ = ["Needs", "Settings", "keep_only", "select"]


@dataclass(frozen=True)
class Settings:
    """The settings of n rows, on their device: each a tensor of shape (n,)."""

    seeds: torch.Tensor
    """int64; from 2**63 on as the negative number of the same bits"""
    temperature: torch.Tensor
    """float64; 0: no noise"""
    top_k: torch.Tensor
    """int64; 0: all"""
    top_p: torch.Tensor
    """float32"""
    min_p: torch.Tensor
    """float32; 0: all"""
    needs: Needs

    @classmethod
    def of(cls, selections: Sequence[Selection], device: torch.device) -> Settings:
        """Of the requests that rows belong to, in the rows' order."""

        def tensor(values: list[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        seeds = [s.seed - 2**64 if s.seed >= 2**63 else s.seed for s in selections]
        return cls(
            tensor(seeds, torch.int64),
            tensor([s.temperature for s in selections], torch.float64),
            tensor([s.top_k for s in selections], torch.int64),
            tensor([s.top_p for s in selections], torch.float32),
            tensor([s.min_p for s in selections], torch.float32),
            Needs.of(selections),
        )

    def rows(self, index: torch.Tensor, needs: Needs) -> Settings:
        """The settings of some of the rows, which may come several times."""
        columns = (self.seeds, self.temperature, self.top_k, self.top_p, self.min_p)
        return Settings(*(column[index] for column in columns), needs)


@dataclass(frozen=True)
class Needs:
    """How much of a batch's rows has to be sorted, which the host knows from the requests' settings."""

    n_sorted: int | None
    """So many of the largest logits in order, for the rows that need an order; None: all."""
    has_whole: bool
    """Whether there are rows that need no order: neither top-k nor top-p, or the likeliest token."""

    @classmethod
    def of(cls, selections: Iterable[Selection]) -> Needs:
        """Of the requests of a batch."""
        n_sorted: int | None = 0
        has_whole = False
        for s in selections:
            if s.temperature == 0 or (s.top_k == 0 and s.top_p == 1):
                has_whole = True
            elif s.top_k == 0:
                n_sorted = None
            elif n_sorted is not None:
                n_sorted = max(n_sorted, s.top_k)
        return cls(n_sorted, has_whole)


def _largest(logits: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The n largest of each row, largest first, equal ones in the order of ids: values and ids, (rows, n).

    ``torch.topk`` promises nothing about equal values, which are common where a model computes in 16 bits. So
    the logit and the id are made one integer: a float's bits order as integers do, but for the sign.
    """
    bits = logits.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    ids = torch.arange(logits.shape[1], device=logits.device)
    best = torch.topk((ordered << 32) | (0xFFFFFFFF - ids), n, dim=1).values
    found = 0xFFFFFFFF - (best & 0xFFFFFFFF)
    return logits.gather(1, found), found


def _surviving(values: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Which of the sorted candidates survive top-k, top-p and min-p: bool, of their shape."""
    rank = torch.arange(values.shape[1], device=values.device)
    top_k, top_p = settings.top_k[:, None], settings.top_p[:, None]
    top = values[:, :1]
    kept = (top_k == 0) | (rank < top_k)
    weights = torch.where(kept, torch.exp(values - top), 0.0)
    reached = torch.cumsum(weights / weights.sum(1, keepdim=True), 1)
    # llama.cpp's top-p keeps candidates up to the one with which their probabilities reach p.
    kept &= (torch.nn.functional.pad(reached[:, :-1], (1, 0)) < top_p) | (top_p >= 1)
    return kept & (values >= top + torch.log(settings.min_p)[:, None])


def _best(
    values: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor, key: torch.Tensor, temperature: torch.Tensor
) -> torch.Tensor:
    """The candidate with the best score, of equal ones the smallest id: int64, (rows,)."""
    noisy = temperature > 0
    scores = values.double() / torch.where(noisy, temperature, 1.0)
    scores += torch.where(noisy, noise.gumbel(key, ids, torch), 0.0)
    scores = torch.where(kept, scores, -torch.inf)
    return torch.where(scores == scores.max(1, keepdim=True).values, ids, 2**31).min(1).values


def select(logits: torch.Tensor, positions: torch.Tensor, settings: Settings) -> torch.Tensor:
    """The token that sllm selects from each row.

    Args:
        logits: float32 (n, n_vocab), before temperature; what is ruled out is -inf.
        positions: int64 (n,): where the tokens will be in their texts, prompts included.
        settings: of the n rows.

    Returns:
        int64 (n,).

    """
    n_vocab = logits.shape[1]
    logits = torch.where(torch.isnan(logits), -torch.inf, logits) + 0.0  # and no -0.0, whose bits differ
    temperature = settings.temperature[:, None]
    key = noise.keys(settings.seeds, positions)[:, None]
    n_sorted = settings.needs.n_sorted
    whole = sorted_part = None
    if settings.needs.has_whole:
        ids = torch.arange(n_vocab, device=logits.device)
        least = logits.max(1, keepdim=True).values + torch.log(settings.min_p)[:, None]
        whole = _best(logits, ids, logits >= least, key, temperature)
    if n_sorted != 0:
        values, ids = _largest(logits, n_vocab if n_sorted is None else min(n_sorted, n_vocab))
        sorted_part = _best(values, ids, _surviving(values, settings), key, temperature)
    if whole is None or sorted_part is None:
        return sorted_part if whole is None else whole  # type: ignore[return-value]
    no_order = (settings.temperature == 0) | ((settings.top_k == 0) & (settings.top_p >= 1))
    return torch.where(no_order, whole, sorted_part)


def keep_only(logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> None:
    """Leave one token of each of the rows, in place: 0 for it, -inf for the others."""
    logits[rows] = -torch.inf
    logits[rows, tokens] = 0.0
