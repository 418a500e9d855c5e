"""The pure maths of vectors and scores: rescaling, direction MSE, cosine, FVE and its two baselines, bootstrap.

A released pair compares vectors after scaling both to the same L2 norm, so only directions count. With
u = x/||x|| the mean over elements of (sqrt(d) u - sqrt(d) w)^2 is ||u - w||^2 = 2 (1 - cos); that is the
`mse` of this project, whatever a sidecar's `mse_scale` says. All sums run in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nla_hub.errors import InputError, VectorError
from nla_hub.sidecar import ReferenceRecord

Baseline = Literal["raw_variance", "mean_norm"]

MSE_UNUSABLE = 2.0
"""mse of a row without a usable explanation: the score of an orthogonal vector (Fraser-Taliente et al. 2026)."""

COSINE_UNUSABLE = 0.0
"""cosine of a row without a usable explanation; consistent with `MSE_UNUSABLE` = 2 (1 - 0)."""

IN_SAMPLE_MINIMUM = 100
"""Rows below which a denominator estimated from the scored rows themselves is not reported at all."""


def as_vectors(vectors: object, *, d: int | None = None, what: str = "vectors", allow_zero: bool = False) -> Tensor:
    """One float32 CPU tensor [N, d] from a tensor, an array or nested lists of shape [d] or [..., d].

    Raises:
        VectorError: not numeric, not floating point, no last dimension of size `d`, or rows that are NaN,
            infinite or zero; the faulty rows are listed.
    """
    if isinstance(vectors, Tensor):
        tensor = vectors.detach()
    else:
        try:
            if isinstance(vectors, (list, tuple)) and vectors and all(isinstance(row, Tensor) for row in vectors):
                tensor = torch.stack([row.detach() for row in vectors])
            else:
                tensor = torch.as_tensor(np.array(vectors))  # a copy: torch warns about read-only arrays
        except (TypeError, ValueError, RuntimeError) as error:
            raise VectorError(f"These {what} are not numbers: {error}", got=type(vectors).__name__) from error
    if not tensor.is_floating_point():
        raise VectorError(
            f"Activations are floating point; these {what} are not.",
            got=f"dtype {tensor.dtype}".replace("torch.", ""),
            expected="float32 (float16, bfloat16 and float64 are converted)",
            next_step="pass activations, not token ids; convert with vectors.float() if they really are numbers",
        )
    if tensor.ndim == 0 or tensor.shape[-1] == 0 or (d is not None and tensor.shape[-1] != d):
        raise VectorError(
            f"These {what} do not have the width of the model.",
            got=f"shape {tuple(tensor.shape)}",
            expected=f"[..., {d}]" if d is not None else "[..., d]",
            next_step="check which model and layer the vectors come from: every pair reads one site of one base model",
        )
    rows = tensor.reshape(-1, tensor.shape[-1]).to(device="cpu", dtype=torch.float32)
    require_finite(rows, what=what, allow_zero=allow_zero)
    return rows


def bad_rows(rows: Tensor, *, allow_zero: bool = False) -> dict[int, str]:
    """Row index -> reason, for every row of `rows` [N, d] that has no direction."""
    finite = torch.isfinite(rows).all(dim=-1)
    faults = {int(i): ("NaN" if bool(rows[i].isnan().any()) else "infinite") for i in (~finite).nonzero().flatten()}
    if not allow_zero:
        # Squares of float32 underflow below ~1e-23: take the norm in float64.
        zero = finite & (rows.double().norm(dim=-1) == 0)
        faults |= {int(i): "zero" for i in zero.nonzero().flatten()}
    return dict(sorted(faults.items()))


def require_finite(rows: Tensor, *, what: str = "vectors", allow_zero: bool = False) -> None:
    """Raise a VectorError that lists the rows of `rows` [N, d] which are NaN, infinite or zero."""
    faults = bad_rows(rows, allow_zero=allow_zero)
    if faults:
        shown = list(faults.items())[:10]
        raise VectorError(
            f"{len(faults)} of {len(rows)} {what} have no direction.",
            faults=[f"row {i}: {reason}" for i, reason in shown]
            + ([f"... and {len(faults) - 10} more"] if len(faults) > 10 else []),
            next_step="drop or repair these rows; a zero or NaN activation usually means a padding position was captured",
        )


def norms(rows: Tensor) -> Tensor:
    """Raw L2 norms [N] of `rows` [N, d], float32, summed in float64."""
    lengths: Tensor = rows.double().norm(dim=-1)
    return lengths.float()


def unit(rows: Tensor) -> Tensor:
    """Rows [N, d] divided by their norms, in float64."""
    wide = rows.double()
    lengths: Tensor = wide.norm(dim=-1, keepdim=True)
    return wide / lengths


def rescale(rows: Tensor, scale: float | None) -> Tensor:
    """Rows [N, d] scaled to L2 norm `scale`, returned in float32; `None` leaves them as they are.

    Kept in float32 until the caller's last cast: bfloat16 transport at the scales of Gemma (60000) loses
    directions visibly. The norm is taken in float64, because squares of float32 under- and overflow.
    """
    if scale is None:
        return rows.float()
    wide = rows.double()
    scaled: Tensor = wide * (scale / wide.norm(dim=-1, keepdim=True))
    return scaled.float()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """cos between rows of `a` [N, d] and `b` [N, d]: float64 [N], clamped to [-1, 1].

    A row of zeros (an AR that says nothing) has no direction and counts as orthogonal.
    """
    wide_a, wide_b = a.double(), b.double()
    lengths = wide_a.norm(dim=-1) * wide_b.norm(dim=-1)
    dots = (wide_a * wide_b).sum(dim=-1)
    return torch.where(lengths > 0, dots / lengths.clamp_min(1e-300), torch.zeros_like(dots)).clamp(-1.0, 1.0)


def direction_mse(a: Tensor, b: Tensor) -> Tensor:
    """2 (1 - cos) between rows of `a` [N, d] and `b` [N, d]: float64 [N], in [0, 4]."""
    return 2.0 * (1.0 - cosine(a, b))


@dataclass(frozen=True)
class Reference(ReferenceRecord):
    """The two "predict the mean" denominators of FVE, measured on one named data set (fields: see `ReferenceRecord`)."""

    @classmethod
    def measure(cls, rows: Tensor, dataset: str) -> Reference:
        """The reference of `rows` [N, d] (raw vectors, N >= 2)."""
        if len(rows) < 2:
            raise InputError("A reference needs at least two vectors.", got=len(rows))
        u = unit(rows)
        mean = u.mean(dim=0)
        raw_norms = rows.double().norm(dim=-1)
        low, high = torch.quantile(raw_norms, torch.tensor([0.005, 0.995], dtype=torch.float64)).tolist()
        return cls(
            dataset=dataset,
            n=len(rows),
            raw_variance=float((u - mean).square().sum(-1).mean()),
            mean_norm=float((u - mean / mean.norm()).square().sum(-1).mean()),
            norm_p0_5=low,
            norm_p99_5=high,
        )

    def denominator(self, baseline: Baseline) -> float:
        """The denominator called `baseline`."""
        if baseline not in ("raw_variance", "mean_norm"):
            raise InputError("Unknown FVE baseline.", got=repr(baseline), expected="'raw_variance' or 'mean_norm'")
        return float(getattr(self, baseline))


def reference_of_sum(total: Tensor, n: int, dataset: str) -> Reference:
    """The reference of `n` vectors of which only the sum of their unit vectors [d], float64, is at hand.

    With m the mean of unit vectors u, E||u - m||^2 = 1 - ||m||^2 and E||u - m/||m|| ||^2 = 2 - 2 ||m||. Norms are not measured.
    """
    length = float((total.double() / n).norm())
    return Reference(dataset=dataset, n=n, raw_variance=1.0 - length**2, mean_norm=2.0 - 2.0 * length)


@dataclass(frozen=True)
class FVE:
    """Fraction of variance explained, never without its baseline, data set and n.

    `value` is None where nothing was measured (no reference and too few rows).
    """

    value: float | None
    baseline: Baseline
    dataset: str
    n: int
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        name = "raw variance" if self.baseline == "raw_variance" else "mean-norm"
        if self.value is None:
            return f"FVE ({name}): not measured"
        interval = "" if self.low is None or self.high is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"FVE ({name}, {self.dataset}, n={self.n}): {self.value:.3f}{interval}"


def fve_value(mse: Tensor | Sequence[float], denominator: float) -> float:
    """1 - mean(mse) / denominator."""
    if not denominator > 0:
        raise InputError("An FVE denominator must be positive.", got=denominator)
    return 1.0 - float(torch.as_tensor(mse, dtype=torch.float64).mean()) / denominator


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [N].

    For a paired comparison pass the row-wise differences.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise InputError("An interval of no rows does not exist.")
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        means[i] = data[rng.integers(0, data.size, data.size)].mean()
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)
