"""What is known about one step of the trainer while it runs, and its figures over all processes once it is finished."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from nla_hub.training.rl.live_ar import moved
from nla_hub.training.rl.rollouts import Rollout


@dataclass
class Step:
    """The current step in this process.

    Attributes:
        before: fingerprint of the policy that sampled.
        figures: of the samples, over all processes.
        differences, ratios: of each token's log-probability between trainer and sampler.
        loss_difference: largest one between the trainer's loss and its parts.
        kl: the estimate of each token.
        seconds: wall time of the parts.
    """

    number: int
    rollout: Rollout
    before: Tensor
    figures: dict[str, Any] = field(default_factory=dict)
    differences: list[Tensor] = field(default_factory=list)
    ratios: list[Tensor] = field(default_factory=list)
    loss_difference: float = 0.0
    kl: list[Tensor] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"rollout": 0.0, "reward": 0.0, "policy": 0.0})

    def finish(self, accelerator: Accelerator, after: Tensor) -> dict[str, Any]:
        """The figures of the step over all processes; `after` is the fingerprint of the policy that it made."""
        self.seconds["policy"] -= self.seconds["rollout"] + self.seconds["reward"]
        gaps, ratios = torch.cat(self.differences), torch.cat(self.ratios)
        kl = torch.cat(self.kl) if self.kl else torch.empty(0)
        local = [float(x.double().sum()) for x in (gaps, ratios, kl)] + [float(len(gaps)), float(len(kl))]
        sums = torch.tensor(local, dtype=torch.float64, device=accelerator.device)
        extremes = torch.tensor(
            [float(gaps.max()), float(ratios.max()), -float(ratios.min()), self.loss_difference],
            device=accelerator.device,
        )
        gap_sum, ratio_sum, kl_sum, n, kl_n = accelerator.reduce(sums, reduction="sum").tolist()
        largest, ratio_max, ratio_min, loss_difference = (
            accelerator.gather(extremes).reshape(-1, len(extremes)).amax(dim=0).tolist()
        )
        return {
            **self.figures,
            "kl": kl_sum / kl_n if kl_n else None,
            "logprob_difference": largest,
            "logprob_difference_mean": gap_sum / n,
            "ratio": ratio_sum / n,
            "ratio_min": -ratio_min,
            "ratio_max": ratio_max,
            "loss_difference": loss_difference,
            "policy_update": moved(self.before, after),
            **{f"seconds_{name}": round(value, 3) for name, value in self.seconds.items()},
        }
