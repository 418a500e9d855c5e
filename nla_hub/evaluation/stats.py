"""Intervals and controls: bootstrap over documents, Wilson, derangements.

Rows of one document are not independent, so everything is resampled by document ("cluster bootstrap", Davison and
Hinkley 1997, section 3.8).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from nla_hub.errors import InputError

RESAMPLES = 1000


def cluster_totals(
    columns: np.ndarray, documents: Sequence[object], *, seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """Sums of resampled documents: float64 [resamples, k + 1], the last column the number of rows.

    Args:
        columns: float [rows, k]: what is summed, one column each. Paired quantities stand in one row.
        documents: document of each row. Which documents a resample takes depends on the seed and their number alone.

    Raises:
        InputError: no rows, or not one document a row.
    """
    data = np.asarray(columns, dtype=np.float64)
    if len(data) == 0 or len(data) != len(documents):
        raise InputError(
            "An interval needs rows, each with its document.", got=f"{len(data)} rows, {len(documents)} ids"
        )
    index: dict[object, int] = {}
    cluster = np.array([index.setdefault(d, len(index)) for d in documents])
    sums = np.zeros((len(index), data.shape[1] + 1))
    np.add.at(sums, cluster, np.column_stack([data, np.ones(len(data))]))
    rng = np.random.default_rng(seed)
    totals = np.empty((resamples, sums.shape[1]))
    for i in range(resamples):
        totals[i] = sums[rng.integers(0, len(sums), len(sums))].sum(axis=0)
    return totals


def percentiles(values: np.ndarray, *, level: float = 0.95) -> tuple[float, float]:
    """The central interval of `values` [resamples]; those that are not finite are left out, NaN where none is left."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return math.nan, math.nan
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(finite, [tail, 1.0 - tail])
    return float(low), float(high)


def cluster_interval(
    columns: np.ndarray,
    documents: Sequence[object],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a statistic of sums, resampling documents.

    Args:
        columns, documents: see `cluster_totals`.
        statistic: sums [resamples, k + 1] -> values [resamples]; the last column is the number of rows. Values that are
            not finite (an empty denominator in a resample) are left out.

    Raises:
        InputError: no rows, or not one document a row.
    """
    totals = cluster_totals(columns, documents, seed=seed, resamples=resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(totals)
    return percentiles(values, level=level)


def mean_interval(
    values: Sequence[float] | np.ndarray, documents: Sequence[object], *, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean of `values` [rows], resampling documents."""
    column = np.asarray(values, dtype=np.float64)[:, None]
    return cluster_interval(column, documents, lambda sums: sums[:, 0] / sums[:, 1], seed=seed)


def wilson(successes: int, n: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927), 95 % by default; (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def derangement(n: int, *, seed: int = 0) -> list[int]:
    """A random permutation of range(n) without fixed points: one cycle (Sattolo 1986).

    Raises:
        InputError: fewer than two rows.
    """
    if n < 2:
        raise InputError("Permuting needs at least two rows.", got=n)
    order = list(range(n))
    rng = np.random.default_rng(seed)
    for i in range(n - 1, 0, -1):
        j = int(rng.integers(0, i))
        order[i], order[j] = order[j], order[i]
    return order
