"""Train the target on the corpus, or the draft on the target's own distributions (distillation).

Warm-up, constant rate, linear decay: the decay may start whenever the time runs out. Stop the run (Ctrl-C
or SIGTERM writes a checkpoint) and start it again with ``--decay-from STEP --decay-steps N``.
``--layers`` starts a target with fewer layers, which learns faster per second; starting it again with more
layers inserts copies whose output projections are zero: the same function at first, and it grows from there.
"""

from __future__ import annotations

import argparse
import logging
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gguf_model import load_gguf
from lookup import build_lookup
from model import CONFIGS, Llama, load

log = logging.getLogger("train")


def orthogonalised(gradients: Tensor, dtype: torch.dtype, steps: int = 4) -> Tensor:
    """The nearest matrices with orthonormal rows (Newton-Schulz), for a stack of equal shapes."""
    flip = gradients.shape[-2] > gradients.shape[-1]
    x = gradients.mT if flip else gradients
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return (x.mT if flip else x).to(gradients.dtype)


class Muon:
    """Momentum, orthogonalised, for the matrices in the blocks: more progress per token than Adam's rule."""

    def __init__(
        self, params: list[torch.nn.Parameter], dtype: torch.dtype = torch.float32, momentum: float = 0.95
    ) -> None:
        self.dtype, self.momentum = dtype, momentum
        self.groups: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for p in params:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.buffers = {s: torch.zeros(len(g), *s) for s, g in self.groups.items()}

    @torch.no_grad()
    def step(self, lr: float, decay: float) -> None:
        for shape, params in self.groups.items():
            gradients = torch.stack([p.grad for p in params if p.grad is not None])
            buffer = self.buffers[shape] = self.buffers[shape].to(gradients.device)
            buffer.lerp_(gradients, 1 - self.momentum)
            update = orthogonalised(gradients.lerp(buffer, self.momentum), self.dtype)
            scale = lr * max(1.0, shape[0] / shape[1]) ** 0.5
            for p, u in zip(params, update, strict=True):
                p.mul_(1 - lr * decay).add_(u, alpha=-scale)
                p.grad = None


def weighted(loss: Tensor, weights: Tensor) -> Tensor:
    return (loss * weights).sum() / weights.sum()


def corpus_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return weighted(
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none"), weights.flatten()
    )


def distillation_loss(logits: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy against the teacher's whole distribution."""
    loss = -(teacher.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    return weighted(loss, weights)


@torch.no_grad()
def held_out_loss(model: Llama, tokens: Tensor, weights: Tensor) -> float:
    """Mean loss per token over what the model itself has to say (weight 1 or more) on the held-out rows."""
    total = count = 0.0
    for t, w in zip(tokens.split(8), weights.split(8), strict=True):
        own = (w[:, 1:] >= 1).float()
        total += float(corpus_loss(model(t[:, :-1]), t[:, 1:], own) * own.sum())
        count += float(own.sum())
    return total / count


def grown(model: Llama, n_layer: int) -> Llama:
    """The same function with more layers: copies with zero output projections, spread evenly."""
    old = model.c.n_layer
    new = Llama(replace(model.c, n_layer=n_layer))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("blk.")}
    seen: set[int] = set()
    for i in range(n_layer):
        source = i * old // n_layer
        for key, value in model.blk[source].state_dict().items():
            zero = source in seen and key in ("attn_output.weight", "ffn_down.weight")
            state[f"blk.{i}.{key}"] = torch.zeros_like(value) if zero else value.clone()
        seen.add(source)
    new.load_state_dict(state)
    return new


def rows(path: Path, device: str) -> tuple[Tensor, Tensor]:
    data = np.load(path)
    tokens = torch.from_numpy(data["tokens"].astype(np.int64))
    return tokens.to(device), torch.from_numpy(data["weights"].astype(np.float32)).to(device)


def rate(step: int, warmup: int, decay_from: int | None, decay_steps: int) -> float:
    if decay_from is not None and step >= decay_from:
        return max(0.0, 1 - (step - decay_from + 1) / decay_steps)
    return min(1.0, (step + 1) / warmup)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(CONFIGS), required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="read if it is there, written while training"
    )
    parser.add_argument("--teacher", type=Path, help="checkpoint of the target: distil from it")
    parser.add_argument("--start", type=Path, help="GGUF to begin with where there is no checkpoint yet")
    parser.add_argument("--layers", type=int, help="fewer layers than the configuration, to begin with")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--first-row", type=int, help="where to go on in the rows (default: where the run stopped)"
    )
    parser.add_argument("--lr", type=float, default=0.02, help="for the matrices in the blocks")
    parser.add_argument("--lr-adam", type=float, default=3e-3, help="for the embedding and the norms")
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--decay-from", type=int)
    parser.add_argument("--decay-steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="products in bfloat16, weights and sums in float32: twice as fast where the CPU has AVX512_BF16",
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, weights = rows(args.train, device)
    heldout_tokens, heldout_weights = rows(args.heldout, device)

    n_layer = args.layers or CONFIGS[args.model].n_layer
    step = row = n_tokens = 0
    optimizers: dict[str, object] = {}
    if args.checkpoint.exists():
        model, state = load(args.checkpoint)
        step, row, n_tokens = state["step"], state["row"], state["n_tokens"]
        optimizers = state["optimizers"]
        if model.c.n_layer < n_layer:
            log.info("growing from %d to %d layers", model.c.n_layer, n_layer)
            model, optimizers = grown(model, n_layer), {}
    elif args.start:
        model = load_gguf(args.start).train()
    else:
        model = Llama(replace(CONFIGS[args.model], n_layer=n_layer))
        build_lookup(model)
    row = row if args.first_row is None else args.first_row
    model.to(device)
    teacher = load(args.teacher)[0].to(device).requires_grad_(False) if args.teacher else None
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blk.")]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or not name.startswith("blk.")]
    muon = Muon(matrices, torch.bfloat16 if args.bf16 else torch.float32)
    adam = torch.optim.AdamW(others, lr=args.lr_adam, betas=(0.9, 0.95), weight_decay=0.0)
    if optimizers:
        muon.buffers = optimizers["muon"]  # type: ignore[assignment]
        adam.load_state_dict(optimizers["adam"])  # type: ignore[arg-type]

    stop = False

    def ask_to_stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)
    last = args.steps if args.decay_from is None else args.decay_from + args.decay_steps
    began, done = time.monotonic(), 0
    while step < last and not stop:
        index = torch.arange(row, row + args.batch) % len(tokens)
        batch, weight = tokens[index], weights[index][:, 1:]
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            logits = model(batch[:, :-1]).float()
        if teacher is None:
            loss = corpus_loss(logits, batch[:, 1:], weight)
        else:
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=args.bf16):
                teacher_logits = teacher(batch[:, :-1]).float()
            loss = distillation_loss(logits, teacher_logits, weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        factor = rate(step, args.warmup, args.decay_from, args.decay_steps)
        muon.step(args.lr * factor, decay=0.02)
        for group in adam.param_groups:
            group["lr"] = args.lr_adam * factor
        adam.step()
        adam.zero_grad(set_to_none=True)
        step, row = step + 1, row + args.batch
        n_tokens += batch.shape[0] * (batch.shape[1] - 1)
        done += batch.shape[0] * (batch.shape[1] - 1)
        if step % 10 == 0:
            speed = done / (time.monotonic() - began)
            log.info(
                "step %d loss %.4f rate %.3f tokens %d (%.0f/s)", step, loss.item(), factor, n_tokens, speed
            )
        if step % args.save_every == 0 or step == last or stop:
            if step % (2 * args.save_every) == 0 or step == last:
                log.info(
                    "step %d held-out loss %.4f", step, held_out_loss(model, heldout_tokens, heldout_weights)
                )
            model.save(
                args.checkpoint,
                step=step,
                row=row,
                n_tokens=n_tokens,
                optimizers={"muon": muon.buffers, "adam": adam.state_dict()},
            )


if __name__ == "__main__":
    main()
