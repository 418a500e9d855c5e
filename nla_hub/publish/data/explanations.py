"""A finished job of `nla-hub explain --data` as what is published of it: held against its own manifest, row by row.

What the rows say is counted again here, so a manifest that belongs to other parts is noticed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nla_hub.errors import PublishError, RunError
from nla_hub.explain.result import JobResult, read_part
from nla_hub.explain.schema import JOB, MANIFEST, PARTS, VECTORS, block_of, part_name, vector_schema
from nla_hub.explain.tally import BASELINES, Tally
from nla_hub.geometry import COSINE_UNUSABLE, FVE
from nla_hub.publish.data.columns import Against, Faults, batches, schema_of, text_faults, vector_faults, vector_width
from nla_hub.publish.release import Entry

SAMPLE_RANKS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the samples of a card stand among all rows that were explained, ordered by cosine: worst, quarters, best."""

OWN_COLUMNS = ("error", "doc_id", "model", "revision")
"""Columns that may name places of this machine; the others are texts of the caller and of the AV."""

MOST_FILES = 10_000
"""Files that the Hub takes in one folder; it refuses commits with more."""

SAME = 1e-9
"""How far a figure that is counted again may lie from the manifest's: the order of a sum."""


@dataclass(frozen=True)
class Sample:
    """A row that the card shows; `rank` is its place among the explained rows, 0 the worst and 1 the best."""

    rank: float
    row: Mapping[str, Any]


@dataclass(frozen=True)
class JobFacts:
    """A finished job.

    Attributes:
        path: its directory.
        config, manifest: job.yaml and manifest.json.
        blocks: number of parts.
        rows, documents: what there is, rows in error included.
        counts: rows of each status, and of "error".
        mean_cosine, fve: over the rows that were explained; with both baselines.
        width: d of the vectors, where they were kept.
        samples: see `SAMPLE_RANKS`; fewer where there are fewer rows.
    """

    path: Path
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    blocks: int
    rows: int
    documents: int
    counts: Mapping[str, int]
    mean_cosine: float | None
    fve: tuple[FVE, ...]
    width: int | None
    samples: tuple[Sample, ...]

    def entries(self) -> list[Entry]:
        """The files as `nla_hub.explain.JobResult` reads them; locks, plans and reports stay behind."""
        names = [part_name(block) for block in range(self.blocks)]
        folders = (PARTS, VECTORS) if self.width is not None else (PARTS,)
        return [
            *(Entry(name, self.path / name) for name in (JOB, MANIFEST)),
            *(Entry(f"{folder}/{name}", self.path / folder / name) for folder in folders for name in names),
        ]


def require_finished(path: Path) -> JobResult:
    """The job in a directory; a PublishError with the way on where it is not done, or has no rows."""
    result = JobResult.open(path)
    if result.manifest is None:
        begun = "no row is done" if not result.parts else f"{len(result.parts)} blocks of rows are done"
        raise PublishError(
            "This job is not finished.",
            where=path,
            got=f"{begun}, no {MANIFEST}",
            next_step=f"the command that began it goes on: nla-hub explain --data DATASET -o {path} with the same options; "
            "of a job with --shard, each of its shards",
        )
    if not result.manifest.get("rows"):
        raise PublishError(
            "This job has no rows.", where=path, next_step="see --positions, and whether the data hold any"
        )
    return result


def survey(path: Path, rules: Against) -> JobFacts:
    """Look at every row of a finished job, a part at a time.

    Raises:
        PublishError: it is not finished, parts are missing or are not those of the manifest, a vector is not finite, a text
            holds a token; all faults at once. RunError: job.yaml, the manifest or a part cannot be read.
    """
    result = require_finished(path)
    assert result.manifest is not None
    blocks = _blocks(result)
    faults, tally, cosines = Faults(), Tally(result.reference), []
    width = result.config.get("d_model") if result.config.get("keep_vectors") else None
    for block, table in _parts(result, blocks):
        where = f"{PARTS}/{part_name(block)}"
        numbers = table.column("row").to_numpy()
        if not np.array_equal(numbers, np.arange(len(numbers)) + tally.rows):
            faults.add(f"{where}: its rows do not follow on those of the part before it")
        undone = np.asarray(table.column("status").is_null()) & np.asarray(table.column("error").is_null())
        if undone.any():
            faults.add(f"{where}, row {int(numbers[undone.argmax()])}: neither an explanation nor an error")
            break
        tally.add(table)
        cosines.append(_cosines(table))
        for batch in table.to_batches():
            text_faults(
                batch,
                where=where,
                first=int(numbers[0]),
                rules=lambda name: rules.own if name in OWN_COLUMNS else rules.documents,
                faults=faults,
            )
        if width is not None:
            _check_vectors(path / VECTORS / part_name(block), int(width), table, faults)
    for fault in _differences(tally, result.manifest):
        faults.add(fault)
    if faults:
        raise PublishError(
            "This job must not be published as it is.",
            where=path,
            faults=faults.lines(),
            next_step="take the rows out of the data and explain it again into another place, or put damaged files back; "
            "a token that was in a text is no longer a secret: revoke it",
        )
    return JobFacts(
        path=path,
        config=result.config,
        manifest=result.manifest,
        blocks=blocks,
        rows=tally.rows,
        documents=int(result.manifest["documents"]),
        counts=dict(sorted(tally.counts.items())),
        mean_cosine=tally.mean_cosine,
        fve=tuple(tally.fve(baseline) for baseline in BASELINES),
        width=None if width is None else int(width),
        samples=_samples(path, np.concatenate(cosines), int(result.config.get("block") or 1)),
    )


def _blocks(result: JobResult) -> int:
    """The number of parts, which must be those that the manifest counts."""
    assert result.manifest is not None
    told, there = result.manifest.get("blocks"), {block_of(part) for part in result.parts}
    if not isinstance(told, int) or there != set(range(told)):
        missing = sorted(set(range(told)) - there)[:5] if isinstance(told, int) else []
        raise PublishError(
            "The parts are not those that the manifest counts.",
            where=result.path / PARTS,
            got=f"{len(there)} parts" + (f", without {', '.join(map(part_name, missing))}" if missing else ""),
            expected=f"{told} parts",
            next_step="put them back; or run the command that began the job again, which computes what is missing",
        )
    if told > MOST_FILES:
        raise PublishError(
            "The Hub takes no folder of so many files.",
            where=result.path / PARTS,
            got=f"{told:,} parts",
            expected=f"at most {MOST_FILES:,}",
            next_step="explain the data in several jobs and publish each, or with larger blocks (JobSettings.block)",
        )
    return told


def _parts(result: JobResult, blocks: int) -> Iterator[tuple[int, pa.Table]]:
    for block in range(blocks):
        table = read_part(result.path / PARTS / part_name(block))
        if not len(table):
            raise RunError("This part holds no row.", where=result.path / PARTS / part_name(block))
        yield block, table


def _cosines(table: pa.Table) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What each row counts in the order of the samples: unusable ones 0, rows in error NaN."""
    found = []
    for status, cosine in zip(table.column("status").to_pylist(), table.column("cosine").to_pylist(), strict=True):
        found.append(math.nan if status is None else COSINE_UNUSABLE if cosine is None else cosine)
    return np.asarray(found, dtype=np.float64)


def _check_vectors(path: Path, width: int, table: pa.Table, faults: Faults) -> None:
    """Note what is wrong with the vectors of a part: every explained row has one, in the order of the rows."""
    where = f"{VECTORS}/{path.name}"
    if not path.is_file():
        faults.add(f"{where} is missing: the job kept its vectors")
        return
    found = schema_of(path)
    if not found.equals(vector_schema(width)):
        d = vector_width(found.field("activation_vector").type) if "activation_vector" in found.names else None
        faults.add(f"{where}: its columns are not those of a job of width {width}" + (f" but of {d}" if d else ""))
        return
    rows: list[int] = []
    for batch in batches(path):
        vector_faults(batch.column(1), where=where, first=len(rows), faults=faults)
        rows += batch.column(0).to_pylist()
    numbers, statuses = table.column("row").to_pylist(), table.column("status").to_pylist()
    explained = {row for row, status in zip(numbers, statuses, strict=True) if status is not None}
    if rows != sorted(set(rows)) or not explained.issubset(rows) or not set(rows).issubset(numbers):
        faults.add(f"{where}: its rows are not those of {PARTS}/{path.name}")


def _differences(tally: Tally, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Where the manifest says something else than the rows."""
    counted = {"rows": tally.rows, **tally.to_mapping()}
    for name in ("rows", "counts", "mean_cosine", "fve"):
        if not _alike(counted[name], manifest.get(name)):
            yield f"{MANIFEST} says {name} {_short(manifest.get(name))}; the rows say {_short(counted[name])}"


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=SAME, abs_tol=SAME)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _samples(path: Path, cosines: np.ndarray[Any, np.dtype[np.float64]], size: int) -> tuple[Sample, ...]:
    """The rows at `SAMPLE_RANKS`, ties in the order of the rows, each row once."""
    explained = np.flatnonzero(~np.isnan(cosines))
    ordered = explained[np.argsort(cosines[explained], kind="stable")]
    if not len(ordered):
        return ()
    chosen = {int(ordered[round(rank * (len(ordered) - 1))]): rank for rank in reversed(SAMPLE_RANKS)}
    found = [Sample(rank, _row(path, row, size)) for row, rank in chosen.items()]
    return tuple(sorted(found, key=lambda sample: sample.rank))


def _row(path: Path, row: int, size: int) -> Mapping[str, Any]:
    part = read_part(path / PARTS / part_name(row // size))
    found: Sequence[Mapping[str, Any]] = part.slice(row % size, 1).to_pylist()
    return found[0]
