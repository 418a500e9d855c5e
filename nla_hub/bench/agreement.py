"""Whether a route did the same work right: its rows of tokens, or its vectors, against the plain route's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nla_hub.bench.plain import PlainAV
from nla_hub.testing.harness import CLOSE, NEAR_TIE


@dataclass(frozen=True)
class Rows:
    """How rows of greedy tokens agree with the plain route's.

    Attributes:
        equal: rows that are the same to the end. total: rows.
        distinct: different rows among the plain route's: with few of them the agreement says little.
        same_tokens: share of tokens before each row's first difference.
        gap: where rows part, how much less likely than the plain route's token the other one is, at most, in log-probability
            under an uncached plain pass; 0 where no row parts.
    """

    equal: int
    total: int
    distinct: int
    same_tokens: float
    gap: float

    def fault(self, dtype: torch.dtype) -> str | None:
        """What is wrong, in a sentence; None where the rows are the same up to near ties. Judged in float32 alone."""
        if dtype != torch.float32 or self.gap < NEAR_TIE:
            return None
        return (
            f"{self.equal} of {self.total} rows are the plain route's; one parts from it at a token that is {self.gap:.1e} "
            f"less likely in log-probability, where only near ties (below {NEAR_TIE:.0e}) may fall either way"
        )


def compare_rows(
    found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]], plain: PlainAV, vectors: Tensor
) -> Rows:
    """Compare rows of equal length; `expected` are the plain route's."""
    same, gap = 0, 0.0
    for mine, theirs, vector in zip(found, expected, vectors, strict=True):
        step = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
        same += len(theirs) if step is None else step
        if step is not None:
            logprobs = plain.logprobs_after(vector, theirs[:step])
            gap = max(gap, abs(float(logprobs[theirs[step]] - logprobs[mine[step]])))
    return Rows(
        equal=sum(list(a) == list(b) for a, b in zip(found, expected, strict=True)),
        total=len(expected),
        distinct=len({tuple(row) for row in expected}),
        same_tokens=same / max(1, sum(map(len, expected))),
        gap=gap,
    )


@dataclass(frozen=True)
class Vectors:
    """How vectors agree with the plain route's: `difference` is max|a - b| / max|b| over all of them."""

    difference: float

    def fault(self, dtype: torch.dtype) -> str | None:
        """What is wrong, in a sentence; None where the vectors are equal in float32. Judged in float32 alone."""
        if dtype != torch.float32 or self.difference <= CLOSE:
            return None
        return (
            f"vectors differ from the plain route's by {self.difference:.1e} of the largest value, expected {CLOSE:.0e}"
        )


def compare_vectors(found: Tensor, expected: Tensor) -> Vectors:
    """Compare tensors of one shape; what is not finite differs infinitely."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return Vectors(float("inf"))
    wide = expected.double()
    return Vectors(float((found.double() - wide).abs().max() / wide.abs().max()))
