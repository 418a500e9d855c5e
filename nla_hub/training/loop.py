"""The supervised loop that both halves share: AdamW on accelerate, one pass over length-sorted batches.

The order of rows comes from the seed alone and a batch is the same rows for any number of processes: each takes every
`world`-th of them, in micro-batches where a recipe has them, and losses are sums over a count that all processes and
micro-batches share. A model that is sharded (`sharding.shard`) is trained as it is, any other one in copies (DDP). Given a
`TrainingState`, a loop that was killed continues from its last checkpoint and ends with the very weights of one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nla_hub.errors import TrainingError
from nla_hub.pretrained import LoadOptions
from nla_hub.training.lora_training import load_trained, trained_state
from nla_hub.training.recipe import StageSpec
from nla_hub.training.sharding import Execution, clip_grad_norm, is_sharded
from nla_hub.training.state import TrainingState

LossOf = Callable[[Any, Sequence[int]], tuple[Tensor, int]]
"""(model, row indices) -> (sum of losses, number of terms)."""

Report = Callable[[dict[str, Any]], None]
"""Receives metrics as they come; each has at least `step` and `steps`."""

TRAINED = LoadOptions(dtype="float32")
"""How weights that are trained as a whole are loaded: in bfloat16 most updates of usual learning rates are rounded away."""

WHOLE = Execution()
"""In float32, every process with a copy."""

POOL_BATCHES = 40
"""Rows of this many batches are sorted by length together: little padding, order still random."""

NON_FINITE_LIMIT = 10
"""Consecutive steps with a non-finite loss or gradient after which a run stops; half of a run of fewer than twice as many."""

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
    execution: Execution = WHOLE,
    held: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> LoopResult:
    """Train `model` in place.

    Args:
        model: on its device, or sharded over all processes; `requires_grad` says what is trained.
        loss_of: sums, not means; see `LossOf`.
        lengths: length of each row, for batching.
        max_steps: stop early (a rehearsal).
        state: where checkpoints are kept; one that is there is continued from. None: nothing is kept.
        checkpoint_every: steps between checkpoints (None: see `checkpoint_interval`).
        closing: figures about the trained model, reported once at the end; every process computes them.
        execution: the precision of the passes.
        held: is open around the forward and the backward pass of a micro-batch, for what gradient checkpointing runs again.

    Raises:
        TrainingError: losses or gradients stay non-finite.
    """
    accelerator = Accelerator()
    batches = batch_order(lengths, spec.batch_size, epochs=spec.epochs, seed=seed)
    optimizer = make_optimizer(model, spec)
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = [batch for batch in batches if len(batch) >= world]
    steps = len(batches) if max_steps is None else min(len(batches), max_steps)
    every = checkpoint_every or checkpoint_interval(steps)
    most_in_a_row = max(1, min(NON_FINITE_LIMIT, steps // 2))
    now = _Progress()
    if state is not None and (found := _restore(state, model, optimizer)) is not None:
        now, ended = found
        if ended:
            model.eval()
            return now.result()
    wrapped = model
    if not is_sharded(model):
        # The model alone: an optimizer of accelerate's skips its steps where a trainer that was stopped has left its mark.
        wrapped = accelerator.prepare(model)
    gradients = _Gradients(wrapped, loss_of, execution, accelerator, held)
    begun = time.perf_counter() - now.seconds
    wrapped.train()
    for step in range(now.step, steps):
        # Whatever a model draws (dropout) depends on the step alone, not on how often the loop was continued.
        torch.manual_seed((seed * STEP_STRIDE + step) * world + rank)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, spec)
        parts = shares(batches[step], rank, world, spec.micro_batch)
        loss, norm = gradients.gather(parts, rows=len(batches[step]), clip=spec.clip)
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
            now.in_a_row = 0
            now.recent.append(loss)
        else:
            now.skipped, now.in_a_row = now.skipped + 1, now.in_a_row + 1
            if now.in_a_row >= most_in_a_row:
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
            _keep(state, now, model, optimizer)
    model.eval()
    if closing is not None:
        report({"step": steps, "steps": steps, **closing()})
    if state is not None:
        _keep(state, now, model)
    return now.result()


def shares(batch: Sequence[int], rank: int, world: int, micro_batch: int | None) -> list[Sequence[int]]:
    """The micro-batches of one process: equally many in all of them, so some of them may be empty."""
    own = batch[rank::world]
    largest = math.ceil(len(batch) / world)
    count = 1 if micro_batch is None else math.ceil(largest / micro_batch)
    size = math.ceil(largest / count)
    return [own[i * size : (i + 1) * size] for i in range(count)]


@dataclass(frozen=True)
class _Gradients:
    """The gradient of a batch's mean loss, gathered over micro-batches and processes."""

    model: Any
    loss_of: LossOf
    execution: Execution
    accelerator: Accelerator
    held: Callable[[], AbstractContextManager[Any]]

    def gather(self, parts: Sequence[Sequence[int]], *, rows: int, clip: float) -> tuple[float, float]:
        """Mean loss over all terms of a batch of `rows`, and the gradient's norm before it was clipped."""
        accelerator = self.accelerator
        world = accelerator.num_processes
        sums = torch.zeros(2, dtype=torch.float64)
        for i, part in enumerate(parts):
            waiting = i + 1 < len(parts)
            with accelerator.no_sync(self.model) if waiting else nullcontext(), self.held():
                with self.execution.running(accelerator.device):
                    # Every process runs the model equally often: with nothing to do, over any row, for nothing.
                    total, count = self.loss_of(self.model, part or [0])
                if not part:
                    total, count = total * 0.0, 0
                sums += torch.tensor([float(total.detach()), float(count)], dtype=torch.float64)
                # Gradients are averaged over processes. How many terms there are is known after the last micro-batch.
                accelerator.backward(total * (world / rows))
        sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = clip_grad_norm(trained, clip, accelerator.device, scale=rows / float(sums[1]))
        return float(sums[0] / sums[1]), norm


def _keep(state: TrainingState, now: _Progress, model: nn.Module, optimizer: Any = None) -> None:
    """Write a checkpoint; the last one needs no `optimizer`."""
    content: dict[str, Any] = {"progress": asdict(now), "ended": optimizer is None}
    if is_sharded(model):
        state.save(now.step, content, sharded=(model, getattr(optimizer, "optimizer", optimizer)))
        return
    content["model"] = trained_state(model)
    if optimizer is not None:
        content["optimizer"] = optimizer.state_dict()
    state.save(now.step, content)


def _restore(state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[_Progress, bool] | None:
    """What the last checkpoint knows, and whether the loop had come to its end; model and optimizer are as they were."""
    found = state.load()
    if found is None:
        return None
    step, content = found
    ended = bool(content.get("ended", "optimizer" not in content))
    if is_sharded(model):
        state.load_sharded(step, model, None if ended else optimizer)
    else:
        load_trained(model, content["model"])
        if not ended:
            optimizer.load_state_dict(content["optimizer"])
    return _Progress(**content["progress"]), ended


def chunks(n: int, size: int) -> Iterator[range]:
    """Consecutive index ranges that cover 0..n."""
    for begin in range(0, n, size):
        yield range(begin, min(begin + size, n))
