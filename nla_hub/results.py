"""What the SDK returns: explanations and scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from nla_hub.errors import InputError
from nla_hub.geometry import (
    COSINE_UNUSABLE,
    FVE,
    IN_SAMPLE_MINIMUM,
    MSE_UNUSABLE,
    Baseline,
    Reference,
    bootstrap_interval,
    fve_value,
)
from nla_hub.prompts import Status

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

COLUMNS = (
    "doc_id",
    "position",
    "token",
    "text",
    "raw",
    "status",
    "cosine",
    "mse",
    "norm",
    "flags",
    "sample",
    "model",
    "revision",
)
"""Columns of explanations wherever they become a table or JSON, in this order."""


def arrow_schema() -> pa.Schema:
    """`COLUMNS` with their types in Arrow and parquet."""
    import pyarrow as pa

    types = {
        "position": pa.int64(),
        "cosine": pa.float64(),
        "mse": pa.float64(),
        "norm": pa.float64(),
        "flags": pa.list_(pa.string()),
        "sample": pa.int64(),
    }
    return pa.schema([(name, types.get(name, pa.string())) for name in COLUMNS])


@dataclass(frozen=True)
class Sampling:
    """How a text was drawn; temperature 0 is greedy."""

    temperature: float
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Explanation:
    """One explanation of one vector.

    Attributes:
        text: the words between the tags; None unless `status` is "ok".
        raw: the AV's output, always.
        status: "ok", "truncated" (no closing tag), "no_tags" or "empty".
        cosine, mse: of AR(text) with the vector; None where not scored or `status` is not "ok".
        norm: raw L2 norm of the vector.
        flags: warnings about the row (`early`, `special_token`, `norm_outlier`, `off_distribution`, `marker_echo`,
            `repetitive`).
        doc_id, position, token: where the vector comes from, as far as known.
        sample: index among several samples of one vector.
        model, revision: the AV.
        sampling: temperature, length bound and seed.
    """

    text: str | None
    raw: str
    status: Status
    norm: float
    cosine: float | None = None
    mse: float | None = None
    flags: tuple[str, ...] = ()
    doc_id: str | None = None
    position: int | None = None
    token: str | None = None
    sample: int = 0
    model: str | None = None
    revision: str | None = None
    sampling: Sampling | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping with the keys of `COLUMNS`."""
        data: dict[str, Any] = {name: getattr(self, name) for name in COLUMNS}
        return data | {"flags": list(self.flags)}

    def with_(self, **changes: Any) -> Explanation:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def __str__(self) -> str:
        score = "" if self.cosine is None else f" [cosine {self.cosine:.3f}]"
        return f"{self.text}{score}" if self.text is not None else f"({self.status}){score}"


@dataclass(frozen=True)
class Scores:
    """cosine and mse of each row; None where a row has no usable explanation (it counts with mse 2 and cosine 0)."""

    cosine: tuple[float | None, ...]
    mse: tuple[float | None, ...]
    reference: Reference | None = None
    in_sample: Reference | None = None

    def __len__(self) -> int:
        return len(self.mse)

    def mse_counted(self) -> torch.Tensor:
        """mse of every row, unusable ones at 2: float64 [N]."""
        return torch.tensor([MSE_UNUSABLE if m is None else m for m in self.mse], dtype=torch.float64)

    def mean_cosine(self) -> float | None:
        """Mean cosine over all rows, unusable ones at 0; None without rows."""
        if not self.cosine:
            return None
        return sum(COSINE_UNUSABLE if c is None else c for c in self.cosine) / len(self.cosine)

    def fve(self, baseline: Baseline = "raw_variance", *, interval: bool = False) -> FVE:
        """1 - mean(mse) / denominator of the reference.

        Without a reference the denominator is measured on the scored vectors themselves from 100 rows up and labelled
        "in-sample"; with fewer the value is None ("not measured").
        """
        reference = self.reference or (self.in_sample if len(self) >= IN_SAMPLE_MINIMUM else None)
        if reference is None or not len(self):
            return FVE(None, baseline, "no reference", len(self))
        denominator = reference.denominator(baseline)
        if not denominator > 0:  # identical vectors, or a mean of zero: there is nothing to explain
            return FVE(None, baseline, reference.dataset, len(self))
        rows = self.mse_counted()
        low = high = None
        if interval:
            low, high = bootstrap_interval((1.0 - rows / denominator).numpy())
        return FVE(fve_value(rows, denominator), baseline, reference.dataset, len(self), low, high)

    def __str__(self) -> str:
        mean = self.mean_cosine()
        shown = "not measured" if mean is None else f"{mean:.3f}"
        return f"{self.fve()}; mean cosine {shown}"


@dataclass(frozen=True)
class Explanations(Sequence[Explanation]):
    """A sequence of explanations with their scores.

    Where several samples were drawn per vector they stand one after the other, numbered by `sample`.
    """

    rows: tuple[Explanation, ...]
    reference: Reference | None = None
    in_sample: Reference | None = field(default=None, repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Explanation: ...
    @overload
    def __getitem__(self, index: slice) -> Explanations: ...
    def __getitem__(self, index: int | slice) -> Explanation | Explanations:
        if isinstance(index, slice):
            return replace(self, rows=self.rows[index], in_sample=None)
        return self.rows[index]

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self.rows)

    @property
    def scores(self) -> Scores:
        """The scores of all rows."""
        return Scores(
            tuple(r.cosine for r in self.rows), tuple(r.mse for r in self.rows), self.reference, self.in_sample
        )

    def fve(self, baseline: Baseline = "raw_variance") -> FVE:
        """FVE over all rows; see `Scores.fve`. Not measured where the rows were never scored."""
        if not any(r.mse is not None for r in self.rows):
            return FVE(None, baseline, "not scored", len(self))
        return self.scores.fve(baseline)

    def counts(self) -> dict[str, int]:
        """Number of rows of each status that occurs."""
        found: dict[str, int] = {}
        for row in self.rows:
            found[row.status] = found.get(row.status, 0) + 1
        return found

    def to_pandas(self) -> pd.DataFrame:
        """A data frame with the columns of `COLUMNS`."""
        try:
            import pandas as pd
        except ImportError as cause:
            from nla_hub.errors import MissingExtraError

            raise MissingExtraError("pandas", "viz", needed_for="to_pandas()") from cause
        return pd.DataFrame([row.to_dict() for row in self.rows], columns=list(COLUMNS))

    def to_parquet(self, path: str | Path) -> Path:
        """Write a parquet file with the columns of `COLUMNS`, atomically; returns its path."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = arrow_schema()
        target = Path(path)
        if not target.parent.is_dir():
            raise InputError("There is no such directory.", where=target.parent)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            pq.write_table(pa.Table.from_pylist([row.to_dict() for row in self.rows], schema=schema), temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return target

    def to_html(self, path: str | Path | None = None) -> str:
        """A self-contained HTML page (no network, everything escaped); written to `path` where one is given."""
        from nla_hub.report import page

        text = page(self)
        if path is not None:
            from nla_hub.yaml_io import write_text

            write_text(Path(path), text)
        return text

    def _repr_html_(self) -> str:
        from nla_hub.report import table

        return table(self)
