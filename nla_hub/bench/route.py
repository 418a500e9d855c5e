"""What is known of one route of one operation once it was timed: a line of the table, an object of `--json`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch

from nla_hub.bench.agreement import Rows, Vectors

Operation = Literal["verbalize", "reconstruct", "capture"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)

ONE_BY_ONE = "plain, one by one"
BATCHED = "plain, batched"
"""Names of the plain routes; every other route is compared with those that ran."""


@dataclass(frozen=True)
class Route:
    """One route.

    Attributes:
        operation, name: what was done, and by whom.
        rows, batch_size: rows of a run, and how many the route may take at once.
        tokens: of a run: new ones (verbalize), or those that the model read, padding left out.
        seconds: of each timed run; empty where it could not run.
        first_token: median seconds until all rows of one batch have their first token; None where that means nothing.
        peak: bytes, see `timing.peak_while`; None: not measured.
        agreement: with the plain route; None for the route that others are compared with.
        roofline: decoding speed over the highest possible one (see `roofline.Decoding`); None where that was not reckoned.
        reason: why it could not run.
        faster_than: plain route -> its median seconds over this one's.
    """

    operation: Operation
    name: str
    rows: int
    batch_size: int
    tokens: int
    seconds: tuple[float, ...] = ()
    first_token: float | None = None
    peak: int | None = None
    agreement: Rows | Vectors | None = None
    roofline: float | None = None
    reason: str | None = None
    faster_than: Mapping[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        """Median seconds of a run."""
        return statistics.median(self.seconds) if self.seconds else None

    def per_second(self, amount: float) -> float | None:
        """`amount` of a run, a second."""
        return None if self.median is None else amount / self.median

    def fault(self, dtype: torch.dtype) -> str | None:
        """What is wrong with what it computed, in a sentence."""
        wrong = None if self.agreement is None else self.agreement.fault(dtype)
        return None if wrong is None else f"{self.operation}, {self.name}: {wrong}"

    def to_dict(self) -> dict[str, Any]:
        """One JSON object; docs/performance.md says what each key means."""
        agreement = self.agreement
        return {
            "record": "route",
            "operation": self.operation,
            "route": self.name,
            "status": "measured" if self.seconds else "not measured",
            "reason": self.reason,
            "rows": self.rows,
            "batch_size": self.batch_size,
            "tokens": self.tokens,
            "seconds": list(self.seconds),
            "median_s": self.median,
            "rows_per_s": self.per_second(self.rows),
            "tokens_per_s": self.per_second(self.tokens),
            "first_token_s": self.first_token,
            "faster_than": dict(self.faster_than),
            "peak_bytes": self.peak,
            "rows_compared": asdict(agreement) if isinstance(agreement, Rows) else None,
            "difference": agreement.difference if isinstance(agreement, Vectors) else None,
            "roofline": self.roofline,
        }
