"""What a job says of itself: while it runs, and at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nla_hub.explain.tally import Tally
from nla_hub.geometry import FVE


@dataclass(frozen=True)
class JobProgress:
    """Where a job stands.

    Attributes:
        rows: of this shard's blocks that are written, those of earlier runs and copies that are filled in later included.
        total: rows of the whole job (of a shard: about its part of them); None while nobody knows.
        exact: whether `total` was counted, not reckoned from the part of the input that was read.
        rate: rows a second since this run began to compute; None before.
    """

    rows: int
    total: int | None
    exact: bool
    rate: float | None
    tally: Tally

    @property
    def seconds_left(self) -> float | None:
        """What remains at this rate."""
        if self.total is None or not self.rate:
            return None
        return max(0, self.total - self.rows) / self.rate


@dataclass(frozen=True)
class JobSummary:
    """What a job came to.

    Attributes:
        path: the output directory.
        complete: every row is there and the manifest is written; False of an interrupted job and of a shard that had to leave
            blocks to others.
        rows: rows that are done. total: rows of the whole job, None where the input was not read to its end.
        computed: rows that this run computed, in `seconds`.
        counts: rows of each status, and of "error". errors: their kinds.
        fve: with both baselines, over the rows that are done.
        backed_off: blocks for which memory did not suffice at the job's batch size.
    """

    path: Path
    complete: bool
    rows: int
    total: int | None
    computed: int
    seconds: float
    counts: Mapping[str, int]
    errors: Mapping[str, int]
    mean_cosine: float | None
    fve: tuple[FVE, ...]
    backed_off: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.rows
