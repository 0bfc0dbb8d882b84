"""The network, exactly as llama.cpp computes its architecture ``llama``.

Pre-norm RMSNorm, rotary positions on interleaved pairs (llama.cpp's ``ROPE_TYPE_NORM``, hence no permutation
at export), grouped-query attention, SwiGLU, no biases, and the token embedding as the output matrix.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Config:
    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_ctx: int = 1024
    rope_freq_base: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the weight matrices per token, the output matrix included."""
        kv = self.n_head_kv * self.head_size
        layer = 2 * self.n_embd * self.n_embd + 2 * self.n_embd * kv + 3 * self.n_embd * self.n_ff
        return self.n_layer * layer + self.n_vocab * self.n_embd

    def attention_multiply_adds(self, n_past: int) -> int:
        """Multiply-adds of scores and weighted sums for one token that sees ``n_past`` positions."""
        return 2 * self.n_layer * self.n_embd * n_past


N_VOCAB = 2560
CONFIGS = {
    "target": Config(n_vocab=N_VOCAB, n_embd=256, n_layer=8, n_head=4, n_head_kv=2, n_ff=512),
    "draft": Config(n_vocab=N_VOCAB, n_embd=128, n_layer=2, n_head=4, n_head_kv=2, n_ff=320),
}


def rope(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of the last dimension: one complex product (x: batch, pos, head, size)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2)


class Block(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        kv = c.n_head_kv * c.head_size
        self.attn_norm = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.attn_q = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.attn_k = nn.Linear(c.n_embd, kv, bias=False)
        self.attn_v = nn.Linear(c.n_embd, kv, bias=False)
        self.attn_output = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.ffn_norm = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.ffn_gate = nn.Linear(c.n_embd, c.n_ff, bias=False)
        self.ffn_up = nn.Linear(c.n_embd, c.n_ff, bias=False)
        self.ffn_down = nn.Linear(c.n_ff, c.n_embd, bias=False)

    def forward(self, x: Tensor, turns: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        c, (batch, n, _) = self.c, x.shape
        h = self.attn_norm(x)
        q = rope(self.attn_q(h).view(batch, n, c.n_head, c.head_size), turns).transpose(1, 2)
        k = rope(self.attn_k(h).view(batch, n, c.n_head_kv, c.head_size), turns).transpose(1, 2)
        v = self.attn_v(h).view(batch, n, c.n_head_kv, c.head_size).transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        cache = (k, v)
        groups = c.n_head // c.n_head_kv
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.attn_output(a.transpose(1, 2).reshape(batch, n, c.n_embd))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h)), cache


class Llama(nn.Module):
    turns: Tensor

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.token_embd = nn.Embedding(c.n_vocab, c.n_embd)
        self.blk = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.output_norm = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        pairs = torch.arange(0, c.head_size, 2, dtype=torch.float64) / c.head_size
        angles = torch.outer(torch.arange(c.n_ctx, dtype=torch.float64), c.rope_freq_base**-pairs)
        turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        self.register_buffer("turns", turns[:, None, :], persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 if "token_embd" in name else p.shape[1] ** -0.5
                if name.endswith(("attn_output.weight", "ffn_down.weight")):
                    std /= (2 * c.n_layer) ** 0.5
                nn.init.normal_(p, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        x = self.token_embd(tokens)
        for block in self.blk:
            x, _ = block(x, self.turns[:n])
        return F.linear(self.output_norm(x), self.token_embd.weight)

    def step(self, tokens: Tensor, past: list[Cache] | None) -> tuple[Tensor, list[Cache]]:
        """Logits of new tokens after cached ones: a whole prompt first, then one token at a time."""
        n_past = 0 if past is None else past[0][0].shape[2]
        turns = self.turns[n_past : n_past + tokens.shape[1]]
        x = self.token_embd(tokens)
        caches: list[Cache] = []
        for i, block in enumerate(self.blk):
            x, cache = block(x, turns, None if past is None else past[i])
            caches.append(cache)
        return F.linear(self.output_norm(x[:, -1:]), self.token_embd.weight), caches

    def save(self, path: Path, **extra: Any) -> None:
        """Write weights and configuration, through a temporary name: a reader never sees half a file."""
        part = path.with_suffix(".part")
        torch.save({"config": asdict(self.c), "weights": self.state_dict(), **extra}, part)
        part.replace(path)


def load(path: Path) -> tuple[Llama, dict[str, Any]]:
    """The model of a checkpoint, and everything else that the checkpoint holds."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = Llama(Config(**state.pop("config")))
    model.load_state_dict(state.pop("weights"))
    return model, state
