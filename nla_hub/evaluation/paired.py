"""Paired figures: what two pairs reach on the same rows, and the difference, with intervals over documents.

Each figure is a statistic of sums over rows (recall: hits / rows), so one resample of documents gives A, B and A - B at once:
what makes a document hard for both leaves the difference. A figure over several facts is the mean over those that are
measured for both pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nla_hub.evaluation.stats import cluster_totals, percentiles

Statistic = Callable[[np.ndarray], np.ndarray]
"""Sums [..., facts, k] -> values [..., facts]."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval. None: not measured."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Paired:
    """One figure of A, of B, and A - B, from the same resamples of documents."""

    a: Estimate = Estimate()
    b: Estimate = Estimate()
    difference: Estimate = Estimate()


UNMEASURED = Paired()

Sides = tuple[np.ndarray, np.ndarray]
"""What A's and B's figure are summed from: float [rows, k] for one figure or [rows, facts, k] for the mean over facts; row i
is the same row for both."""


def ratio(sums: np.ndarray) -> np.ndarray:
    """The first of the sums [..., 2] over the second."""
    result: np.ndarray = sums[..., 0] / sums[..., 1]
    return result


def paired(sides: Sides, documents: Sequence[object], statistic: Statistic = ratio, *, seed: int = 0) -> Paired:
    """A statistic of both pairs and its difference; without rows nothing is measured.

    Args:
        sides: of A and of B, see `Sides`.
        documents: document of each row.

    Raises:
        InputError: not one document a row.
    """
    if len(sides[0]) == 0:
        return UNMEASURED
    stacked = np.stack([_with_facts(side) for side in sides], axis=1)  # [rows, 2, facts, k]
    columns = stacked.reshape(len(stacked), -1)
    totals = cluster_totals(columns, documents, seed=seed)[:, :-1]
    resampled = _sides(totals.reshape(-1, *stacked.shape[1:]), statistic)
    found = _sides(stacked.sum(axis=0)[None], statistic)
    return Paired(*(_estimate(float(f[0]), r) for f, r in zip(found, resampled, strict=True)))


def _with_facts(columns: np.ndarray) -> np.ndarray:
    return columns[:, None, :] if columns.ndim == 2 else columns


def _sides(sums: np.ndarray, statistic: Statistic) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, B and A - B, each [resamples], from sums [resamples, 2, facts, k]; NaN where not measured."""
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(sums)  # [resamples, 2, facts]
    finite: np.ndarray = np.isfinite(values)
    counted = finite.all(axis=1, keepdims=True) & finite if values.shape[2] > 1 else finite
    a, b = (_mean(values[:, i], counted[:, i]) for i in (0, 1))
    return a, b, a - b


def _mean(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Mean over the counted ones of `values` [resamples, facts]; NaN where there is none."""
    with np.errstate(invalid="ignore"):
        result: np.ndarray = np.where(counted, values, 0.0).sum(axis=1) / counted.sum(axis=1)
    return result


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    if not np.isfinite(value):
        return Estimate()
    low, high = percentiles(resampled)
    return Estimate(value, low, high) if np.isfinite(low) else Estimate(value)
