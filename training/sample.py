"""Text from a model, token by token: greedily, or with noise that depends on the position alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

import corpus
from model import Cache, Llama

ENDS = (0, 2)  # <|endoftext|>, <|im_end|>


@torch.no_grad()
def continue_text(
    model: Llama, prompt: list[int], select: Callable[[Tensor, int], int], n_max: int
) -> list[int]:
    """Extend a prompt token by token; ``select(logits, position)`` chooses."""
    ids = list(prompt)
    cache: list[Cache] | None = None
    new = ids
    while len(ids) - len(prompt) < n_max and len(ids) < model.c.n_ctx:
        logits, cache = model.step(torch.tensor([new]), cache)
        token = select(logits[0, -1], len(ids))
        ids.append(token)
        if token in ENDS:
            break
        new = [token]
    return ids


def greedy(logits: Tensor, _position: int) -> int:
    return int(logits.argmax())


def coupled(temperature: float, seed: int) -> Callable[[Tensor, int], int]:
    """Selection with noise that depends on (seed, position) alone."""

    def select(logits: Tensor, position: int) -> int:
        u = np.random.default_rng((seed, position)).random(len(logits))
        return int((logits.double() / temperature - torch.from_numpy(np.log(-np.log(u)))).argmax())

    return select


def answer(model: Llama, tokenizer: Tokenizer, request: str, n_max: int) -> str:
    """The greedy answer to one request, without the space around it."""
    ids = tokenizer.encode(corpus.chatml([("user", request)], add_generation_prompt=True)).ids
    text: str = tokenizer.decode(continue_text(model, ids, greedy, n_max)[len(ids) :])
    return text.strip()
