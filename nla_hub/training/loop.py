"""The supervised loop that both halves share: AdamW on accelerate, one pass over length-sorted batches.

The order of rows comes from the seed alone and a batch is the same rows for any number of processes: each takes every
`world`-th of them, and losses are sums over a count that all processes share.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nla_hub.errors import TrainingError
from nla_hub.training.recipe import StageSpec

LossOf = Callable[[Any, Sequence[int]], tuple[Tensor, int]]
"""(model, row indices) -> (sum of losses, number of terms)."""

Report = Callable[[dict[str, Any]], None]
"""Receives metrics as they come; each has at least `step` and `steps`."""

POOL_BATCHES = 40
"""Rows of this many batches are sorted by length together: little padding, order still random."""

NON_FINITE_LIMIT = 10
"""Consecutive steps with a non-finite loss or gradient after which a run stops."""


@dataclass(frozen=True)
class LoopResult:
    """Mean loss over the last tenth of the steps, steps taken, steps skipped for a non-finite loss, seconds."""

    loss: float
    steps: int
    skipped: int
    seconds: float


def batch_order(lengths: Sequence[int], batch_size: int, *, epochs: int, seed: int) -> list[list[int]]:
    """Row indices of every batch of a run: `epochs` passes, similar lengths together, the last short batch included."""
    rng = Random(seed)
    batches: list[list[int]] = []
    for _ in range(epochs):
        order = list(range(len(lengths)))
        rng.shuffle(order)
        epoch: list[list[int]] = []
        pool = batch_size * POOL_BATCHES
        for begin in range(0, len(order), pool):
            part = sorted(order[begin : begin + pool], key=lambda i: lengths[i])
            epoch += [part[a : a + batch_size] for a in range(0, len(part), batch_size)]
        rng.shuffle(epoch)
        batches += epoch
    return batches


def learning_rate(step: int, steps: int, spec: StageSpec) -> float:
    """Linear warm-up to `lr`, then a cosine down to `final_lr` times it."""
    warm = max(1, int(spec.warmup * steps))
    if step < warm:
        return spec.lr * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return spec.lr * (spec.final_lr + (1 - spec.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: nn.Module, spec: StageSpec) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=spec.lr, betas=(0.9, spec.beta2))


def run_loop(
    model: nn.Module,
    loss_of: LossOf,
    lengths: Sequence[int],
    spec: StageSpec,
    *,
    seed: int,
    report: Report,
    report_every: int = 50,
    max_steps: int | None = None,
) -> LoopResult:
    """Train `model` in place.

    Args:
        loss_of: sums, not means; see `LossOf`.
        lengths: length of each row, for batching.
        max_steps: stop early (a rehearsal).

    Raises:
        TrainingError: losses or gradients stay non-finite.
    """
    accelerator = Accelerator()
    batches = batch_order(lengths, spec.batch_size, epochs=spec.epochs, seed=seed)
    optimizer = make_optimizer(model, spec)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = [batch for batch in batches if len(batch) >= world]
    steps = len(batches) if max_steps is None else min(len(batches), max_steps)
    started, skipped, in_a_row = time.perf_counter(), 0, 0
    recent: list[float] = []
    wrapped.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, spec)
        total, count = loss_of(wrapped, batches[step][rank::world])
        sums = torch.tensor([float(total.detach()), float(count)], dtype=torch.float64, device=accelerator.device)
        sums = accelerator.reduce(sums, reduction="sum")
        # DDP averages gradients over processes: scale so that the result is the mean over all terms.
        accelerator.backward(total * (world / float(sums[1])))
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), spec.clip)
        loss = float(sums[0] / sums[1])
        if math.isfinite(loss) and (norm is None or math.isfinite(float(norm))):
            optimizer.step()
            in_a_row = 0
            recent.append(loss)
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            if in_a_row >= NON_FINITE_LIMIT:
                raise TrainingError(
                    f"{in_a_row} steps in a row had a non-finite loss or gradient.",
                    where=f"step {step}",
                    got=f"loss {loss}",
                    next_step="lower the learning rate of this stage; nothing of it was kept",
                )
        optimizer.zero_grad(set_to_none=True)
        if step % report_every == report_every - 1 or step + 1 == steps:
            window = recent[-report_every:]
            report(
                {
                    "step": step + 1,
                    "steps": steps,
                    "loss": sum(window) / max(1, len(window)),
                    "lr": learning_rate(step, steps, spec),
                    "skipped": skipped,
                    "seconds": time.perf_counter() - started,
                }
            )
    model.eval()
    tail = recent[-max(1, len(recent) // 10) :]
    seconds = time.perf_counter() - started
    return LoopResult(sum(tail) / max(1, len(tail)), steps, skipped, seconds)


def chunks(n: int, size: int) -> Iterator[range]:
    """Consecutive index ranges that cover 0..n."""
    for begin in range(0, n, size):
        yield range(begin, min(begin + size, n))
