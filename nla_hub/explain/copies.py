"""Rows that stand in the data more than once: computed where they stand first, and filled in at the end everywhere else."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import pyarrow as pa

from nla_hub.explain.output import Output
from nla_hub.explain.schema import schema

TAKEN_OVER = ("text", "raw", "status", "cosine", "mse", "norm", "flags", "model", "revision", "error")
"""Columns of the original that a copy gets; where it stands, and what its document is called, stay its own."""

PARTS_AT_HAND = 8


def fill_copies(output: Output, blocks: Iterable[int], size: int) -> None:
    """Fill in the rows whose original is in an earlier block, and those whose original was computed again since.

    A part is replaced whole, so this may be repeated.

    Args:
        size: rows of a block.
    """

    @lru_cache(maxsize=PARTS_AT_HAND)
    def originals(block: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = output.read(block, TAKEN_OVER).to_pylist()
        return found

    for block in blocks:
        if all(copy_of is None for copy_of in output.read(block, ["copy_of"]).column(0).to_pylist()):
            continue
        table = output.read(block)
        rows, before = table.to_pylist(), table.to_pylist()
        for row in rows:
            if row["copy_of"] is not None:
                row |= originals(row["copy_of"] // size)[row["copy_of"] % size]
        if rows == before:
            continue
        filled = pa.Table.from_pylist(rows, schema=schema()).replace_schema_metadata(table.schema.metadata)
        output.commit(block, filled)
