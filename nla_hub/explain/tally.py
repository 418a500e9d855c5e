"""Counts and scores over the rows of a job, block by block, in memory that does not grow with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from nla_hub.explain.compute import IN_SAMPLE
from nla_hub.geometry import (
    COSINE_UNUSABLE,
    FVE,
    IN_SAMPLE_MINIMUM,
    MSE_UNUSABLE,
    Baseline,
    Reference,
    fve_value,
    reference_of_sum,
)

REASONS = 50
"""Kinds of errors that are counted one by one."""

BASELINES: tuple[Baseline, Baseline] = ("raw_variance", "mean_norm")


class Tally:
    """What a job has come to so far.

    Rows whose explanation cannot be used count with mse 2 and cosine 0. Rows in error were never verbalized and count in no
    score; copies count when they are filled in.
    """

    def __init__(self, reference: Reference | None) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self._reference = reference
        self._scored = 0
        self._mse = 0.0
        self._cosine = 0.0
        self._sum: np.ndarray | None = None

    @property
    def rows(self) -> int:
        """Rows that are done, those in error included."""
        return self.counts.total()

    def add(self, part: pa.Table) -> None:
        """Count the rows of a part."""
        columns = {name: part.column(name).to_pylist() for name in ("status", "cosine", "mse", "copy_of", "error")}
        for status, cosine, mse, copy_of, error in zip(*columns.values(), strict=True):
            if status is None and error is None:
                assert copy_of is not None, "a row without a result, a reason or an original"
                continue
            self.counts[status or "error"] += 1
            if error is not None:
                self._blame(kind_of(error))
            if status is not None:
                self._scored += 1
                self._mse += MSE_UNUSABLE if mse is None else mse
                self._cosine += COSINE_UNUSABLE if cosine is None else cosine
        if (data := (part.schema.metadata or {}).get(IN_SAMPLE)) is not None:
            vector = np.frombuffer(data, dtype="<f8")
            self._sum = vector.copy() if self._sum is None else self._sum + vector

    def _blame(self, kind: str) -> None:
        self.errors[kind if kind in self.errors or len(self.errors) < REASONS else "other reasons"] += 1

    @property
    def mean_cosine(self) -> float | None:
        """Over all rows that were verbalized; None without any."""
        return self._cosine / self._scored if self._scored else None

    def fve(self, baseline: Baseline = "raw_variance") -> FVE:
        """FVE over all rows that were verbalized; without a reference in-sample, from `IN_SAMPLE_MINIMUM` rows up."""
        reference = self._reference or self._in_sample()
        if reference is None or not self._scored:
            return FVE(None, baseline, "no reference", self._scored)
        denominator = reference.denominator(baseline)
        if not denominator > 0:
            return FVE(None, baseline, reference.dataset, self._scored)
        mean = torch.tensor([self._mse / self._scored], dtype=torch.float64)
        return FVE(fve_value(mean, denominator), baseline, reference.dataset, self._scored)

    def _in_sample(self) -> Reference | None:
        if self._sum is None or self._sum[0] < IN_SAMPLE_MINIMUM:
            return None
        return reference_of_sum(torch.from_numpy(self._sum[1:].copy()), int(self._sum[0]), "in-sample")

    def to_mapping(self) -> dict[str, Any]:
        """For the manifest: counts, reasons of errors, scores."""
        found: Sequence[FVE] = [self.fve(baseline) for baseline in BASELINES]
        return {
            "counts": dict(sorted(self.counts.items())),
            "errors": dict(self.errors.most_common()),
            "mean_cosine": self.mean_cosine,
            "fve": [{"baseline": f.baseline, "dataset": f.dataset, "n": f.n, "value": f.value} for f in found],
        }


def kind_of(error: str) -> str:
    """A reason without what is special about the row: the place in front, and what was got and expected."""
    return error.split(": ", 1)[-1].split(" (got ", 1)[0].rstrip(".") + "."
