"""The supervised loop that both halves share: AdamW on accelerate, one pass over length-sorted batches.

The order of rows comes from the seed alone and a batch is the same rows for any number of processes: each takes every
`world`-th of them, and losses are sums over a count that all processes share. Given a `TrainingState`, a loop that was
killed continues from its last checkpoint and ends with the very weights of one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nla_hub.errors import TrainingError
from nla_hub.pretrained import LoadOptions
from nla_hub.training.recipe import StageSpec
from nla_hub.training.state import TrainingState

LossOf = Callable[[Any, Sequence[int]], tuple[Tensor, int]]
"""(model, row indices) -> (sum of losses, number of terms)."""

Report = Callable[[dict[str, Any]], None]
"""Receives metrics as they come; each has at least `step` and `steps`."""

TRAINED = LoadOptions(dtype="float32")
"""How weights that are trained as a whole are loaded: in bfloat16 most updates of usual learning rates are rounded away."""

POOL_BATCHES = 40
"""Rows of this many batches are sorted by length together: little padding, order still random."""

NON_FINITE_LIMIT = 10
"""Consecutive steps with a non-finite loss or gradient after which a run stops."""

STEP_STRIDE = 1_000_003
"""Distance of the random streams of neighbouring seeds, in steps."""

CHECKPOINT_STEPS = 5, 100
"""Fewest and most steps between two checkpoints; in between it is a twentieth of the run."""


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


def checkpoint_interval(steps: int) -> int:
    """Steps between two checkpoints of a loop of `steps`."""
    least, most = CHECKPOINT_STEPS
    return max(least, min(most, steps // 20))


@dataclass
class _Progress:
    """What a loop knows besides weights and optimizer; all of it goes into a checkpoint."""

    step: int = 0
    skipped: int = 0
    in_a_row: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)

    def result(self) -> LoopResult:
        tail = self.recent[-max(1, len(self.recent) // 10) :]
        return LoopResult(sum(tail) / max(1, len(tail)), self.step, self.skipped, self.seconds)


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
    state: TrainingState | None = None,
    checkpoint_every: int | None = None,
    closing: Callable[[], dict[str, Any]] | None = None,
) -> LoopResult:
    """Train `model` in place.

    Args:
        loss_of: sums, not means; see `LossOf`.
        lengths: length of each row, for batching.
        max_steps: stop early (a rehearsal).
        state: where checkpoints are kept; one that is there is continued from. None: nothing is kept.
        checkpoint_every: steps between checkpoints (None: see `checkpoint_interval`).
        closing: figures about the trained model, reported once at the end.

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
    every = checkpoint_every or checkpoint_interval(steps)
    now = _Progress()
    if state is not None and (found := state.load()) is not None:
        content = found[1]
        model.load_state_dict(content["model"])
        now = _Progress(**content["progress"])
        if "optimizer" not in content:  # it had come to its end
            model.eval()
            return now.result()
        optimizer.load_state_dict(content["optimizer"])
    begun = time.perf_counter() - now.seconds
    wrapped.train()
    for step in range(now.step, steps):
        # Whatever a model draws (dropout) depends on the step alone, not on how often the loop was continued.
        torch.manual_seed((seed * STEP_STRIDE + step) * world + rank)
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
            now.in_a_row = 0
            now.recent.append(loss)
        else:
            now.skipped, now.in_a_row = now.skipped + 1, now.in_a_row + 1
            if now.in_a_row >= NON_FINITE_LIMIT:
                raise TrainingError(
                    f"{now.in_a_row} steps in a row had a non-finite loss or gradient.",
                    where=f"step {step}",
                    got=f"loss {loss}",
                    next_step="lower the learning rate of this stage in another run: -o PLACE",
                )
        optimizer.zero_grad(set_to_none=True)
        now.step, now.seconds = step + 1, time.perf_counter() - begun
        if now.step % report_every == 0 or now.step == steps:
            window = now.recent[-report_every:]
            report(
                {
                    "step": now.step,
                    "steps": steps,
                    "loss": sum(window) / max(1, len(window)),
                    "lr": learning_rate(step, steps, spec),
                    "skipped": now.skipped,
                    "seconds": now.seconds,
                }
            )
        if state is not None and now.step % every == 0 and now.step < steps:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(now)}
            state.save(now.step, content)
    model.eval()
    if closing is not None:
        report({"step": steps, "steps": steps, **closing()})
    if state is not None:
        state.save(steps, {"model": model.state_dict(), "progress": asdict(now)})
    return now.result()


def chunks(n: int, size: int) -> Iterator[range]:
    """Consecutive index ranges that cover 0..n."""
    for begin in range(0, n, size):
        yield range(begin, min(begin + size, n))
