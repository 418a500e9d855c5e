"""What a step's samples are worth, and what both ARs learn from them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nla_hub.geometry import Reference, cosine, fve_value
from nla_hub.training.data import TrainingRows
from nla_hub.training.recipe import RLSpec
from nla_hub.training.rl.live_ar import LiveAR
from nla_hub.training.rl.reward import contrast, repeated_pairs, reward, sample_mse
from nla_hub.training.rl.rollouts import Rollout, step_seed
from nla_hub.training.rl.settings import rate

STATUSES = ("ok", "truncated", "no_tags", "empty")


class Scoring:
    """The live AR that pays, the one that watches, and the recipe's reward.

    Args:
        labels: rows that both ARs also learn from, where the recipe has a `label_share`.
        baseline: denominators of the FVEs that are reported.
    """

    def __init__(
        self,
        ar: LiveAR,
        watch: LiveAR | None,
        spec: RLSpec,
        accelerator: Accelerator,
        *,
        labels: TrainingRows | None,
        baseline: Reference,
        seed: int,
    ) -> None:
        self.ar, self.watch, self.spec, self.accelerator = ar, watch, spec, accelerator
        self.labels, self.baseline, self.seed = labels, baseline, seed
        self.skipped, self.in_a_row = 0, 0

    def score(self, rollout: Rollout, step: int) -> tuple[Tensor, dict[str, Any]]:
        """Rewards of this process's samples, float32 [n], and figures over all processes; then both ARs learn.

        Every figure about a sample is from before the update on it, for both ARs alike.
        """
        usable = torch.zeros(len(rollout), dtype=torch.bool)
        readable = [i for i in rollout.usable if self.ar.prompt.fits(str(rollout.texts[i]))]
        usable[readable] = True
        predicted, watched = self._predict(rollout, readable, step)
        own = cosine(predicted, rollout.vectors)
        mse = sample_mse(own, usable)
        repetition = torch.tensor([repeated_pairs(c.text) for c in rollout.completions])
        tokens = torch.tensor([len(c.ids) for c in rollout.completions])
        beaten = self._contrast(rollout, predicted, own, usable) if self.spec.reward.contrastive else None
        rewards = reward(self.spec.reward, mse=mse, tokens=tokens, repetition=repetition, contrast=beaten)
        rows = torch.tensor(rollout.rows)
        foreign_vector = rows != rows.roll(self.spec.group)  # False where this process has samples of one vector only
        values = {
            "mse": mse,
            "cosine": own,
            "cosine_shuffled": cosine(predicted, rollout.vectors.roll(self.spec.group, dims=0)) * foreign_vector,
            "foreign_vector": foreign_vector,
            "repetition": repetition,
            "ok": usable,
        }
        if watched is not None:
            values["watch_cosine"] = cosine(watched, rollout.vectors)
        if beaten is not None:
            values["contrast"] = beaten
        return rewards, {**self._figures(rollout, values), **self._learn(step)}

    def _predict(self, rollout: Rollout, usable: list[int], step: int) -> tuple[Tensor, Tensor | None]:
        """What each AR makes of the `usable` samples, float32 [n, d], rows of zeros for the others."""
        extra = self._label_rows(step)
        total = max(1, int(self._sum([len(usable), len(extra)]).sum()))
        texts = [str(rollout.texts[i]) for i in usable]
        found: list[Tensor | None] = []
        for ar in (self.ar, self.watch):
            if ar is None:
                found.append(None)
                continue
            predicted = torch.zeros_like(rollout.vectors)
            if usable or ar.sharded:
                predicted[usable] = ar.score(texts, rollout.vectors[usable], total=total)
            if self.labels is not None and (extra or ar.sharded):
                ar.score([self.labels.texts[i] for i in extra], self.labels.vectors[extra], total=total)
            found.append(predicted)
        assert found[0] is not None
        return found[0], found[1]

    def _label_rows(self, step: int) -> list[int]:
        """This process's share of the label rows of a step, keyed like the samples."""
        wanted = round(self.spec.label_share * self.spec.samples)
        if self.labels is None or wanted == 0:
            return []
        generator = torch.Generator().manual_seed(step_seed(self.seed, step) % 2**63)
        chosen = torch.randint(len(self.labels), (wanted,), generator=generator).tolist()
        return list(chosen[self.accelerator.process_index :: self.accelerator.num_processes])

    def _contrast(self, rollout: Rollout, predicted: Tensor, own: Tensor, usable: Tensor) -> Tensor:
        """`reward.contrast` against the explanations of all processes."""
        device = self.accelerator.device
        rows = torch.tensor(rollout.rows)
        directions = nn.functional.normalize(rollout.vectors.double(), dim=-1)
        mine = nn.functional.normalize(predicted.double(), dim=-1).float()
        all_predicted, all_rows, all_usable = (
            self.accelerator.gather(part.to(device)).cpu() for part in (mine, rows, usable)
        )
        return contrast(
            own,
            directions @ all_predicted.double().T,
            group=rows,
            other_groups=all_rows,
            other_usable=all_usable,
            temperature=self.spec.reward.contrastive_temperature,
        )

    def _figures(self, rollout: Rollout, values: dict[str, Tensor]) -> dict[str, Any]:
        """Means over all samples of the step, the same in every process."""
        statuses = Counter(rollout.statuses)
        sums = self._sum(
            [*(float(v.double().sum()) for v in values.values()), *(statuses[s] for s in STATUSES), len(rollout)]  # type: ignore[index]
        ).tolist()
        means = dict(zip(values, (value / sums[-1] for value in sums), strict=False))
        foreign = means.pop("foreign_vector")
        shuffled = means["cosine_shuffled"] / foreign if foreign else None
        counted = zip(STATUSES, sums[len(values) : -1], strict=True)
        return {
            **means,
            "cosine_shuffled": shuffled,
            "statuses": {name: int(count) for name, count in counted if count},
            "fve": fve_value([means["mse"]], self.baseline.raw_variance),
            "fve_mean_norm": fve_value([means["mse"]], self.baseline.mean_norm),
            "gap": means["cosine"] - means["watch_cosine"] if "watch_cosine" in means else None,
        }

    def _learn(self, step: int) -> dict[str, Any]:
        """One update of each AR on what it has just scored."""
        lr = self.spec.ar_lr * rate(step, self.spec)
        figures: dict[str, Any] = {"ar_lr": lr}
        for name, ar in (("ar", self.ar), ("watch", self.watch)):
            if ar is None:
                continue
            update = ar.update(lr)
            self.skipped += update.skipped
            if ar is self.ar:
                self.in_a_row = self.in_a_row + 1 if update.skipped else 0
            figures |= {
                f"{name}_loss": update.loss,
                f"{name}_update": update.change,
                f"{name}_grad_norm": update.gradient,
            }
        return figures

    def _sum(self, numbers: list[float]) -> Tensor:
        """Sums over all processes, float64."""
        local = torch.tensor(numbers, dtype=torch.float64, device=self.accelerator.device)
        summed: Tensor = self.accelerator.reduce(local, reduction="sum")
        return summed
