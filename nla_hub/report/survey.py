"""Figures over all rows of a job in one pass, in memory that does not grow with them.

What grows are the parts' spans (two numbers a block) and the sketch of the documents, which is cut at `SKETCH`.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nla_hub.explain.result import JobResult, read_part
from nla_hub.geometry import MSE_UNUSABLE
from nla_hub.report.scale import LABELS, step_of
from nla_hub.report.tokens import CLASSES, Row, token_class

COLUMNS = (
    "row",
    "document",
    "doc_id",
    "position",
    "token",
    "status",
    "cosine",
    "mse",
    "norm",
    "flags",
    "sample",
    "context",
    "char_end",
    "copy_of",
    "error",
)

SKETCH = 50_000
"""Documents kept of an input, those with the smallest hashes: the same ones in every job that read them."""

REASONS = 100
"""Different reasons of errors that are counted one by one."""

POSITIONS = (0, 1, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Where the bins of positions begin. Below 10 a row is flagged `early`."""

PER_OCTAVE = 32
"""Bins of norms between a norm and its double, merged into tenths of the rows at the end."""

QUANTILES = 10


@dataclass
class Bin:
    """Rows that are counted together.

    Attributes:
        scored, unusable: rows with an mse, and rows with a status but without one.
        mse: sum over the scored rows.
    """

    scored: int = 0
    unusable: int = 0
    mse: float = 0.0

    def add(self, mse: float | None) -> None:
        """Count one row that was verbalized."""
        if mse is None:
            self.unusable += 1
        else:
            self.scored += 1
            self.mse += mse

    def merge(self, other: Bin) -> None:
        """Add the rows of another bin."""
        self.scored += other.scored
        self.unusable += other.unusable
        self.mse += other.mse

    @property
    def n(self) -> int:
        """Rows."""
        return self.scored + self.unusable

    @property
    def mean_mse(self) -> float | None:
        """Mean mse with the unusable rows at 2; None without rows."""
        return (self.mse + MSE_UNUSABLE * self.unusable) / self.n if self.n else None


@dataclass(frozen=True)
class Place:
    """Where a row stands."""

    row: int
    document: int
    doc_id: str | None
    position: int | None
    char_end: int | None


@dataclass
class Survey:
    """What one pass over a job's rows found.

    Attributes:
        rows, documents: how many.
        waiting: copies of earlier rows that the unfinished job has not filled in yet; they count in nothing but `rows`.
        samples: of a vector, at most.
        statuses, flags, errors: rows of each; of errors at most `REASONS`, the rest under "other reasons". A row that was
            verbalized and could not be scored has a status and an error.
        total: every row with a status.
        cosine: sum over the scored rows.
        positions, classes, norms: the rows of `total` by bin.
        steps: how many scored rows there are in each step of the colour scale.
        ranked: rows that `worst` and `best` are chosen from: scored, no special token, no copy of an earlier row.
        worst, best, unusable, failed: places of rows, in the order in which they are shown.
        sketch: hash -> (index, id) of documents; of several with one id the first.
        complete: the sketch holds all documents.
        has_vectors: there are rows of bare vectors.
        spans: of each part its first and last document.
    """

    rows: int = 0
    documents: int = 0
    waiting: int = 0
    samples: int = 1
    statuses: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    total: Bin = field(default_factory=Bin)
    cosine: float = 0.0
    positions: list[Bin] = field(default_factory=lambda: [Bin() for _ in POSITIONS])
    classes: dict[str, Bin] = field(default_factory=lambda: {name: Bin() for name in CLASSES})
    norms: dict[int, tuple[float, Bin]] = field(default_factory=dict)
    steps: list[int] = field(default_factory=lambda: [0] * len(LABELS))
    ranked: int = 0
    worst: list[Place] = field(default_factory=list)
    best: list[Place] = field(default_factory=list)
    unusable: list[Place] = field(default_factory=list)
    failed: list[Place] = field(default_factory=list)
    sketch: dict[int, tuple[int, str | None]] = field(default_factory=dict)
    complete: bool = True
    has_vectors: bool = False
    spans: list[tuple[Path, int, int]] = field(default_factory=list)

    def norm_quantiles(self) -> list[tuple[float, Bin]]:
        """The rows in `QUANTILES` groups of about the same size by their norm, each with its largest norm."""
        wanted = sum(rows.n for _, rows in self.norms.values()) / QUANTILES
        found: list[tuple[float, Bin]] = []
        seen = 0
        for key in sorted(self.norms):
            top, rows = self.norms[key]
            if not found or seen >= wanted * len(found):
                found.append((top, Bin()))
            seen += rows.n
            found[-1][1].merge(rows)
            found[-1] = (top, found[-1][1])
        return found


def survey(result: JobResult, *, rows: int, denominator: float) -> Survey:
    """Read all rows of a job once.

    Args:
        denominator: what turns an mse into an error (`nla_hub.report.scale`).
        rows: how many of the worst, the best, the unusable and the failed rows are kept.

    Raises:
        RunError: a part that cannot be read.
    """
    found = Survey()
    lists = _Extremes(rows)
    last: int | None = None
    for part in result.parts:
        table = read_part(part, COLUMNS).to_pylist()
        for row in table:
            if row["document"] != last:
                last = row["document"]
                _count_document(found, last, row["doc_id"])
            _count_row(found, row, denominator)
            lists.see(row, found)
        if table:
            indices = [row["document"] for row in table]
            found.spans.append((part, min(indices), max(indices)))
    found.worst, found.best = lists.worst(), lists.best()
    if len(found.sketch) > SKETCH:
        _cut(found)
    return found


def usable_mse(row: Row) -> float | None:
    """The mse of a row where it has one."""
    mse = row["mse"]
    return mse if row["status"] == "ok" and mse is not None and math.isfinite(mse) else None


def is_waiting(row: Row) -> bool:
    """Whether a row is a copy of an earlier one that the job has not filled in yet, as it does at its end."""
    return row["status"] is None and row["error"] is None and row["copy_of"] is not None


def is_special(row: Row) -> bool:
    """Whether a row's token is a special one."""
    return "special_token" in (row["flags"] or ())


def _count_document(found: Survey, index: int, doc_id: str | None) -> None:
    found.documents += 1
    found.sketch.setdefault(document_key(index, doc_id), (index, doc_id))
    if len(found.sketch) > 2 * SKETCH:
        _cut(found)


def _cut(found: Survey) -> None:
    found.sketch = {key: found.sketch[key] for key in heapq.nsmallest(SKETCH, found.sketch)}
    found.complete = False


def document_key(index: int, doc_id: str | None) -> int:
    """What two jobs know a document by: 64 bits of the hash of its id, or of its index where it has none."""
    name = doc_id if doc_id is not None else f"\x1f{index}"
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:8], "big")


def _count_row(found: Survey, row: Row, denominator: float) -> None:
    found.rows += 1
    found.samples = max(found.samples, (row["sample"] or 0) + 1)
    found.flags.update(row["flags"] or ())
    if is_waiting(row):
        found.waiting += 1
        return
    status, mse = row["status"], usable_mse(row)
    if (reason := fault_of(row)) is not None:
        found.errors[reason if reason in found.errors or len(found.errors) < REASONS else "other reasons"] += 1
    if status is None:
        return
    found.statuses[status] += 1
    found.has_vectors |= row["position"] == -1
    bins = [found.total, *_bins(found, row)]
    for one in bins:
        one.add(mse)
    if mse is not None:
        found.cosine += row["cosine"] or 0.0
        found.steps[step_of(mse / denominator)] += 1


def fault_of(row: Row) -> str | None:
    """Why a row is in error, or why it has no score; None for a row without a fault."""
    missing = "no reason recorded" if row["status"] is None and not is_waiting(row) else None
    return row["error"] or missing


def _bins(found: Survey, row: Row) -> Iterable[Bin]:
    norm = row["norm"]
    if norm is not None and math.isfinite(norm) and norm > 0:
        key = math.floor(math.log2(norm) * PER_OCTAVE)
        top, one = found.norms.get(key, (norm, Bin()))
        found.norms[key] = (max(top, norm), one)
        yield one
    if row["position"] is not None and row["position"] >= 0:
        yield found.positions[bisect_right(POSITIONS, row["position"]) - 1]
        yield found.classes[token_class(row["token"] or "", row["context"] or "", special=is_special(row))]


class _Extremes:
    """The worst and best rows so far; of equal ones the first comes first.

    Copies of earlier rows are left out, and special tokens: what an AV says of a BOS would fill the list of the worst.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._worst: list[tuple[float, int, Any]] = []
        self._best: list[tuple[float, int, Any]] = []

    def see(self, row: Row, found: Survey) -> None:
        """Offer a row; those without a score go to the survey's own lists."""
        mse = usable_mse(row)
        if mse is not None and row["copy_of"] is None and not is_special(row):
            found.ranked += 1
            self._offer(self._worst, mse, row)
            self._offer(self._best, -mse, row)
        if fault_of(row) is not None and len(found.failed) < self.size:
            found.failed.append(_place(row))
        if row["status"] not in (None, "ok") and len(found.unusable) < self.size:
            found.unusable.append(_place(row))

    def _offer(self, heap: list[tuple[float, int, Any]], value: float, row: Row) -> None:
        if len(heap) < self.size:
            heapq.heappush(heap, (value, -row["row"], _place(row)))
        elif heap and (value, -row["row"]) > heap[0][:2]:
            heapq.heapreplace(heap, (value, -row["row"], _place(row)))

    def worst(self) -> list[Place]:
        """The worst, the very worst first."""
        return [place for _, _, place in sorted(self._worst, reverse=True)]

    def best(self) -> list[Place]:
        """The best, the very best first."""
        return [place for _, _, place in sorted(self._best, reverse=True)]


def _place(row: Row) -> Place:
    return Place(row["row"], row["document"], row["doc_id"], row["position"], row["char_end"])
