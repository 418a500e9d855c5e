"""The AR that learns beside the AV: one pass scores a step's samples and gathers the gradient of the same samples.

It lives outside the Trainer, so it brings its own optimizer, its own all-reduce and its own state for checkpoints. One that
is sharded (`sharding.shard`) has its gradients reduced by FSDP, and must be run equally often in every process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nla_hub.batching import pad_id_of, pad_right
from nla_hub.prompts import ARPrompt
from nla_hub.reconstructor import ARModel
from nla_hub.training.ar_regression import direction_loss
from nla_hub.training.loop import WHOLE
from nla_hub.training.lora_training import load_trained, train_only_what_trains, trained_state
from nla_hub.training.recipe import RLSpec
from nla_hub.training.sharding import Execution, clip_grad_norm, is_sharded, load_shards, local, save_shards

IDLE = "."
"""What a process reads for nothing while others have samples left."""

FINGERPRINT = 256
"""Values of each parameter that are compared to tell how far a model moved; all of them would cost a second copy."""


@dataclass(frozen=True)
class ARUpdate:
    """One update: mean loss on the samples, norm of the gradient, relative change of the weights, whether it was skipped."""

    loss: float | None
    gradient: float | None
    change: float | None
    skipped: bool


class LiveAR:
    """An AR under training. `score` may be called several times before `update`; gradients add up.

    The value head is float32 whatever the trunk's dtype (see `ARModel`).
    """

    def __init__(
        self,
        model: ARModel,
        prompt: ARPrompt,
        spec: RLSpec,
        accelerator: Accelerator,
        *,
        execution: Execution = WHOLE,
    ) -> None:
        self.sharded, self.execution = is_sharded(model), execution
        self.model = model if self.sharded else model.to(accelerator.device)
        self.prompt = prompt
        self.spec = spec
        self.accelerator = accelerator
        train_only_what_trains(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=spec.ar_lr, betas=(0.9, spec.beta2), weight_decay=spec.weight_decay
        )
        self._loss, self._count = 0.0, 0

    def score(self, texts: Sequence[str], vectors: Tensor, *, total: int) -> Tensor:
        """What the AR makes of `texts`, before it learns from them: float32 [n, d] on the CPU.

        Args:
            vectors: the vectors that the texts describe, float32 [n, d].
            total: rows that this update's mean is taken over, all processes and all calls together.
        """
        self._recompute()
        encoded = [self.prompt.encode(text) for text in texts]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # little padding
        pad = pad_id_of(self.prompt.tokenizer)
        device = self.model.head.weight.device
        found: dict[int, Tensor] = {}
        for begin in range(0, self._passes(len(order)) * self.spec.micro_batch, self.spec.micro_batch):
            chunk = order[begin : begin + self.spec.micro_batch]
            ids, mask = pad_right([encoded[i] for i in chunk] or [self.prompt.encode(IDLE)], pad)
            with torch.enable_grad():
                with self.execution.running(device):
                    predicted = self.model(ids.to(device), mask.to(device))
                if chunk:
                    loss = direction_loss(predicted, vectors[chunk].to(predicted.device)).sum()
                else:
                    loss = predicted.sum() * 0.0
            (loss * (self._averaged / total)).backward()
            self._loss += float(loss.detach())
            self._count += len(chunk)
            for i, row in zip(chunk, predicted.detach().float().cpu(), strict=False):
                found[i] = row
        return torch.stack([found[i] for i in range(len(encoded))]) if encoded else torch.empty(0, self.width)

    def _recompute(self) -> None:
        """Let blocks that keep their inputs alone do so: transformers asks whether they are in training mode.

        What is inside them stays in evaluation mode, without dropout: the pass that learns is the one that pays.
        """
        for module in self.model.trunk.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True

    def _passes(self, rows: int) -> int:
        """Micro-batches that `rows` are run in; with shards as many as in the process that has most rows."""
        own = math.ceil(rows / self.spec.micro_batch)
        if not self.sharded:
            return own
        counts = self.accelerator.gather(torch.tensor([own], device=self.accelerator.device))
        return int(counts.max())

    @property
    def _averaged(self) -> int:
        """Processes over which gradients are averaged behind our back, where a sum is wanted."""
        return self.accelerator.num_processes if self.sharded else 1

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return int(self.model.head.out_features)

    def update(self, lr: float) -> ARUpdate:
        """One step on what `score` gathered, the same on every process; a gradient that is not finite is dropped."""
        sums = torch.tensor([self._loss, float(self._count)], dtype=torch.float64, device=self.accelerator.device)
        sums = self.accelerator.reduce(sums, reduction="sum")
        self._loss, self._count = 0.0, 0
        loss = float(sums[0] / sums[1]) if float(sums[1]) else None
        if loss is None:
            return ARUpdate(loss, None, None, skipped=False)
        self._reduce(self.trained)
        norm = clip_grad_norm(self.trained, self.spec.clip, self.accelerator.device)
        finite = math.isfinite(norm) and math.isfinite(loss)
        before = fingerprint(self.trained)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return ARUpdate(loss, norm, moved(before, fingerprint(self.trained)), skipped=not finite)

    def _reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add the gradients of all processes (the losses are already divided by the common count)."""
        if self.accelerator.num_processes == 1 or self.sharded:
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            p.grad = self.accelerator.reduce(p.grad, reduction="sum")

    def state_dict(self, parts: Path | None = None) -> dict[str, Any]:
        """Weights that are trained and optimizer, for a checkpoint.

        Those of a sharded AR are written to the folder `parts` instead, by all processes.
        """
        if self.sharded:
            assert parts is not None
            save_shards(parts, self.model, self.optimizer)
            return {}
        return {"model": trained_state(self.model), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any], parts: Path | None = None) -> None:
        """Restore what `state_dict` gave, or wrote to `parts`."""
        if self.sharded:
            assert parts is not None
            load_shards(parts, self.model, self.optimizer)
            return
        load_trained(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def fingerprint(parameters: Sequence[nn.Parameter]) -> Tensor:
    """At most `FINGERPRINT` evenly spaced values of every parameter, float64 on the CPU.

    Where parameters are sharded as many of each process's part, the same tensor in all of them, which must all call it.
    """
    parts = []
    for p in parameters:
        flat = local(p.detach()).reshape(-1)
        parts.append(flat[:: max(1, flat.numel() // FINGERPRINT)].double().cpu())
    if any(isinstance(p, DTensor) for p in parameters):
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, torch.cat(parts))
        parts = everywhere
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def moved(before: Tensor, after: Tensor) -> float:
    """Relative change between two fingerprints."""
    return float((after - before).norm() / before.norm().clamp_min(1e-30)) if len(before) else 0.0
