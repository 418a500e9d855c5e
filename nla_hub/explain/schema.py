"""What a job writes: the columns of its parts and the names of its files.

    OUT/job.yaml                    what was asked for; written first
    OUT/parts/part-000000.parquet   the rows of one block each, `schema()`; there whole or not at all
    OUT/vectors/part-000000.parquet the vectors of those rows, where they were asked for
    OUT/manifest.json               counts and scores over everything; written last, so where it is, the job is done
    OUT/work/                       what an unfinished job needs to go on

Parts are numbered like their blocks, and their rows are in the order of `row`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from nla_hub.results import arrow_schema

VERSION = 1
JOB, MANIFEST, PARTS, VECTORS, WORK = "job.yaml", "manifest.json", "parts", "vectors", "work"

COLUMNS: dict[str, str] = {
    "row": "global index of the row, from 0",
    "document": "index of its document (or vector) in the input, from 0",
    "doc_id": "the caller's id of the document, or its sha256",
    "position": "index of the token in the encoded document, BOS included; -1 for a bare vector",
    "token": "the token's text",
    "text": "the explanation; only where status is ok",
    "raw": "what the AV wrote",
    "status": "ok, truncated, no_tags or empty; null for a row in error",
    "cosine": "of AR(text) with the vector",
    "mse": "2 (1 - cosine)",
    "norm": "raw L2 norm of the vector",
    "flags": "reasons not to take the row at face value",
    "sample": "index among several samples of one vector",
    "model": "the AV",
    "revision": "its revision, where it comes from the Hub",
    "context": "end of the rendered text up to the token, at most 200 characters",
    "char_end": "character offset in the rendered text at which the token ends",
    "copy_of": "the row that this one equals in document and position, where that was computed in an earlier block",
    "error": "why the row could not be captured or generated",
}
"""Every column, in order, with its meaning; those of `nla_hub.results.COLUMNS` mean what they mean there."""


def schema() -> pa.Schema:
    """The columns of a part with their types."""
    shared: Any = arrow_schema()
    own = {"row": pa.int64(), "document": pa.int64(), "char_end": pa.int64(), "copy_of": pa.int64()}
    own |= {"context": pa.string(), "error": pa.string()}
    return pa.schema([(name, own.get(name) or shared.field(name).type) for name in COLUMNS])


def vector_schema(d: int) -> pa.Schema:
    """The columns of a file of vectors: `row` and `activation_vector`, float32 of fixed size."""
    return pa.schema([("row", pa.int64()), ("activation_vector", pa.list_(pa.float32(), d))])


def part_name(block: int) -> str:
    """The file of a block's rows."""
    return f"part-{block:06d}.parquet"


def block_of(path: Path) -> int | None:
    """The block that a file of `part_name` holds; None for another file."""
    stem = path.name.removeprefix("part-").removesuffix(".parquet")
    return int(stem) if path.name == f"part-{stem}.parquet" and stem.isascii() and stem.isdecimal() else None
