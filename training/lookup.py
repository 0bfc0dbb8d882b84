"""A start that can look up what followed the present token the last time.

Random weights find the two heads for it only after a long plateau, so a new model gets them by construction
and learns from there. One head of layer 0 looks at the token before: a constant in the residual stream,
turned by one position in the fast rotary pairs. Heads of layer 1 look for the position whose token before is
the present token (in the slow rotary pairs, which hardly mind the distance) and copy what stands there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model import Block, Llama

CONSTANT = 0.4  # coordinate 0 of every embedding; it moves all logits alike
EMBEDDING_STD = 0.05
PREVIOUS = 0.15  # how strongly the token before is written into the residual stream
SHARPNESS = (0.9, 3.0)  # of the heads in layers 0 and 1
COPY = 0.5


@torch.no_grad()
def build_lookup(model: Llama) -> None:
    c = model.c
    size, groups = c.head_size, c.n_head // c.n_head_kv
    basis = torch.linalg.qr(torch.randn(c.n_embd, c.n_embd))[0]
    basis[:, 0] = 0
    present, before, copied = basis[:size], basis[size : 2 * size], basis[2 * size :]
    model.token_embd.weight.normal_(std=EMBEDDING_STD)
    model.token_embd.weight[:, 0] = CONSTANT
    for block in model.blk:
        block.attn_output.weight.zero_()
        block.ffn_down.weight.zero_()
    look_back(model.blk[0], size, present, before)
    for group in range(c.n_head_kv):
        half = slice(group * size // 2, (group + 1) * size // 2)
        value = copied[group * size : (group + 1) * size]
        look_up(model.blk[1], group, group * groups, present[half], before[half], value)


def look_back(block: Block, size: int, present: Tensor, before: Tensor) -> None:
    """Head 0: attend to the position before, and write its token where ``look_up`` reads it."""
    q, k = block.attn_q.weight, block.attn_k.weight
    q[:size], k[:size] = 0, 0
    for pair in range(size // 8):
        turn = torch.tensor(10000.0 ** (-2 * pair / size))
        q[2 * pair, 0] = SHARPNESS[0]
        k[2 * pair, 0], k[2 * pair + 1, 0] = SHARPNESS[0] * turn.cos(), SHARPNESS[0] * turn.sin()
    block.attn_v.weight[:size] = present
    block.attn_output.weight[:, :size] = PREVIOUS * before.T


def look_up(block: Block, group: int, head: int, present: Tensor, before: Tensor, value: Tensor) -> None:
    """Attend to where the token before is the present one, and write what stands there."""
    size = len(value)
    q = block.attn_q.weight[head * size : (head + 1) * size]
    k = block.attn_k.weight[group * size : (group + 1) * size]
    q[:], k[:] = 0, 0
    slow = slice(size // 2, size)
    q[slow], k[slow] = SHARPNESS[1] * present, before
    block.attn_v.weight[group * size : (group + 1) * size] = value
    block.attn_output.weight[:, head * size : (head + 1) * size] = COPY * value.T
