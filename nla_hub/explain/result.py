"""Reading what a job wrote, finished or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nla_hub import yaml_io
from nla_hub.errors import RunError
from nla_hub.explain.schema import JOB, MANIFEST, PARTS, block_of, schema
from nla_hub.geometry import Reference
from nla_hub.schema import from_mapping


@dataclass(frozen=True)
class JobResult:
    """The output directory of a job.

    Attributes:
        path: the directory.
        config: what was asked for (job.yaml).
        manifest: counts and scores; None while the job is not done.
        parts: files of rows, in order; of an unfinished job some are missing.
    """

    path: Path
    config: dict[str, Any]
    manifest: dict[str, Any] | None
    parts: tuple[Path, ...]

    @classmethod
    def open(cls, path: Path) -> JobResult:
        """Open a directory that `nla-hub explain --data` wrote.

        Raises:
            RunError: it is no such directory, or its job.yaml or manifest.json cannot be read.
        """
        if not (path / JOB).is_file():
            raise RunError(
                "This is no output of `nla-hub explain --data`.",
                where=path,
                got="no directory" if not path.is_dir() else f"a directory without {JOB}",
                next_step="name the directory that was given as -o",
            )
        config = yaml_io.read(path / JOB, error=RunError)
        return cls(path, config, _manifest(path / MANIFEST), tuple(path / PARTS / name for name in part_names(path)))

    @property
    def reference(self) -> Reference | None:
        """The pair's FVE denominators, None where it has none; a RunError where job.yaml holds something else."""
        if (found := self.mapping("reference")) is None:
            return None
        return from_mapping(Reference, found, where=self.path / JOB, what="`reference`", error=RunError)

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        """A mapping of `config`, None where there is none; a RunError where job.yaml holds something else."""
        found = self.config.get(name)
        if found is None or isinstance(found, Mapping):
            return found
        raise RunError(
            f"`{name}` is no mapping.", where=self.path / JOB, got=type(found).__name__, expected="names with values"
        )

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows of each part, in order; of these columns, or all of `schema`.

        Raises:
            RunError: a part that cannot be read.
        """
        for part in self.parts:
            yield read_part(part, columns)


def part_names(path: Path) -> list[str]:
    """The names of the parts in an output directory, in order; only files are parts."""
    folder = path / PARTS
    found = [p for p in folder.iterdir() if block_of(p) is not None and p.is_file()] if folder.is_dir() else []
    return [p.name for p in sorted(found, key=lambda p: block_of(p) or 0)]


def read_part(part: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a part; a RunError where it cannot be read or has other columns."""
    try:
        file = pq.ParquetFile(part, memory_map=False, page_checksum_verification=True)
        with file:
            if not file.schema_arrow.equals(schema()):
                raise RunError("The columns of this part are not those of a job.", where=part)
            return file.read(columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as cause:
        raise RunError(f"This part cannot be read: {cause}", where=part) from cause


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as cause:
        raise RunError(f"The manifest cannot be read: {cause}", where=path) from cause
    if not isinstance(found, dict):
        raise RunError("The manifest is no JSON object.", where=path)
    return found
