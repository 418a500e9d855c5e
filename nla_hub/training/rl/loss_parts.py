"""The GRPO loss of a micro-batch by its definition: what the trainer's own is compared with at every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, minimum, zeros_like

from nla_hub.training.recipe import RLSpec

LOSS_SCALE = 1e-3
"""Share of the summands of a loss below which a difference is not looked at more closely."""


@dataclass(frozen=True)
class LossParts:
    """A loss, what a difference to it is measured in, and the KL estimate of each token [tokens] (None without reference).

    The scale is beta * KL, so that a KL term that was left out is a difference of 1, but no less than `LOSS_SCALE` of all
    summands' sizes, which float32 cannot tell apart much better.
    """

    loss: float
    scale: float
    kl: Tensor | None


def loss_from_parts(
    logps: Tensor,
    batch: Mapping[str, Tensor],
    spec: RLSpec,
    *,
    clip: tuple[float, float],
    accumulated: int,
    per_generation: int,
    processes: int,
) -> LossParts:
    """Clipped ratio times advantage, plus beta times the KL term, over the count that each loss type divides by.

    The KL estimator is exp(r - p) - (r - p) - 1 (Schulman 2020), weighted by the ratio.

    Args:
        logps: log-probabilities of the completion tokens under the trained policy, without gradient [rows, tokens].
        batch: TRL's micro-batch: completion_mask, advantages, num_items_in_batch, and where it has them
            old_per_token_logps and ref_per_token_logps.
        clip: bounds of the ratio.
        accumulated: micro-batches of an optimizer step in a process. per_generation: micro-batches of a generation.
    """
    mask = batch["completion_mask"].to(logps.dtype)
    advantages = batch["advantages"][:, None]
    ratio = (logps - batch.get("old_per_token_logps", logps)).exp()
    each = -minimum(ratio * advantages, ratio.clamp(*clip) * advantages)
    kl, weighted = None, zeros_like(each)
    if "ref_per_token_logps" in batch:
        apart = batch["ref_per_token_logps"] - logps
        estimate = apart.exp() - apart - 1
        kl, weighted = estimate[mask.bool()], estimate * ratio

    def total(x: Tensor) -> float:
        summed = (x * mask).sum()
        if spec.loss == "grpo":
            found = ((x * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean() / accumulated
        elif spec.loss == "dr_grpo":
            found = summed / (len(x) * spec.max_new_tokens) / accumulated
        else:
            found = summed * processes / (batch["num_items_in_batch"] * accumulated / per_generation)
        return float(found)

    pull = spec.beta * total(weighted)
    scale = max(pull, LOSS_SCALE * (total(each.abs()) + pull), 1e-12)
    return LossParts(total(each + spec.beta * weighted), scale, kl)
