"""A linear probe: what a vector holds, read by the best balanced linear classifier.

Multinomial logistic regression on standardised features with an L2 penalty on the weights (not the intercepts), each
class weighing the same in the loss; fitted by L-BFGS with a Wolfe line search from zero. Deterministic: nothing is drawn.
The objective is mean_i w_i CE_i + l2/2 ||W||^2, which is scikit-learn's `LogisticRegression(C=1/(N l2),
class_weight="balanced")`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nla_hub.errors import InputError

L2 = 1e-3
ITERATIONS = 100


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe: class scores are ((x - mean) / scale) @ weight.T + bias.

    Attributes:
        classes: the values, in the order of the rows of `weight` [classes, d] and `bias` [classes].
        mean, scale: of the training features, [d].
    """

    classes: tuple[Hashable, ...]
    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def predict(self, vectors: Tensor) -> list[Hashable]:
        """The likeliest class of each row of `vectors` [N, d]."""
        scores = ((vectors.float() - self.mean) / self.scale) @ self.weight.T + self.bias
        return [self.classes[i] for i in scores.argmax(dim=-1).tolist()]


def fit_probe(
    vectors: Tensor,
    values: Sequence[Hashable],
    *,
    l2: float = L2,
    balanced: bool = True,
    iterations: int = ITERATIONS,
) -> LinearProbe:
    """Fit a probe to `vectors` [N, d] and their values.

    Raises:
        InputError: no rows, or not one value a row.
    """
    if len(values) == 0 or len(values) != len(vectors):
        raise InputError(
            "A probe needs rows, each with its value.", got=f"{len(vectors)} vectors, {len(values)} values"
        )
    classes = tuple(sorted(set(values), key=lambda v: (str(type(v)), str(v))))
    number = {value: i for i, value in enumerate(classes)}
    y = torch.tensor([number[value] for value in values])
    x = vectors.float()
    mean = x.mean(dim=0)
    scale = x.std(dim=0, correction=0).clamp_min(1e-6)
    x = (x - mean) / scale
    n, d = x.shape
    counts = torch.bincount(y, minlength=len(classes)).float()
    per_class = n / (len(classes) * counts) if balanced else torch.ones(len(classes))
    row_weights = per_class[y] / n
    weight = torch.zeros(len(classes), d, requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)
    if len(classes) > 1:
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=iterations,
            history_size=10,
            tolerance_grad=1e-5,
            tolerance_change=1e-7,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses = torch.nn.functional.cross_entropy(x @ weight.T + bias, y, reduction="none")
            loss = (row_weights * losses).sum() + 0.5 * l2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return LinearProbe(classes, mean, scale, weight.detach(), bias.detach())


def accuracy(predicted: Sequence[Hashable], actual: Sequence[Hashable]) -> float:
    """Share of rows predicted correctly."""
    return float(np.mean([p == a for p, a in zip(predicted, actual, strict=True)]))


def balanced_accuracy(predicted: Sequence[Hashable | None], actual: Sequence[Hashable]) -> float:
    """Mean over the values that occur of the share of their rows predicted correctly."""
    hits: dict[Hashable, list[bool]] = {}
    for p, a in zip(predicted, actual, strict=True):
        hits.setdefault(a, []).append(p == a)
    return float(np.mean([np.mean(rows) for rows in hits.values()]))


def majority_share(values: Sequence[Hashable]) -> float:
    """Share of the most frequent value."""
    counts: dict[Hashable, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return max(counts.values()) / len(values)
