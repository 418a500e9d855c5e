"""What parquet files hold, looked at before they are published: vectors that are finite, texts without tokens.

The documents and explanations are the caller's, so paths, names and addresses in them are left alone; access tokens are
not, wherever they stand. Columns that this project writes itself (`error`, ids) are held against all rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from nla_hub.errors import PublishError
from nla_hub.publish.guards.scrub import own_rules
from nla_hub.publish.guards.secret_forms import TOKENS, Rule
from nla_hub.publish.guards.secrets import kinds_in
from nla_hub.publish.guards.this_machine import own_tokens

BATCH_ROWS = 1024
"""Rows that are held at a time."""

LISTED = 20
"""Faults of one kind that a message lists one by one."""

KNOWN_TOKENS = tuple(rule for rule in TOKENS if not rule.folded)
"""Tokens with a form of their own. The other rules take a word such as `password` with something behind it for one, which
ordinary documents hold too: nobody could publish explanations of web pages."""

BETWEEN = "\n\0\n"
"""Between texts that are looked through together: no token goes over it."""


@dataclass(frozen=True)
class Against:
    """What the texts of a data set are held against.

    Attributes:
        documents: for texts of the caller and of the AV. own: for columns that this project writes, such as `error`.
    """

    documents: tuple[Rule, ...]
    own: tuple[Rule, ...]

    @classmethod
    def here(cls, path: Path, repo: str) -> Against:
        """On this machine, for data that lie at `path` and are published as `repo`."""
        own = own_rules(source=path, public=[repo]).without("e-mail")  # a reason may repeat what stood in a document
        return cls((*own_tokens(), *KNOWN_TOKENS), own.all)


class Faults:
    """Faults of many rows: the first `LISTED` in words, the others counted."""

    def __init__(self) -> None:
        self.listed: list[str] = []
        self.more = 0

    def add(self, fault: str) -> None:
        """Note one."""
        if len(self.listed) < LISTED:
            self.listed.append(fault)
        else:
            self.more += 1

    def __bool__(self) -> bool:
        return bool(self.listed)

    def lines(self) -> list[str]:
        """One a line."""
        return [*self.listed, *([f"and {self.more:,} more"] if self.more else [])]


def schema_of(path: Path) -> pa.Schema:
    """The columns of a parquet file; a PublishError where it is none."""
    try:
        found: pa.Schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as cause:
        raise _unreadable(path, cause) from cause
    return found


def batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of a parquet file in order, `BATCH_ROWS` at a time, checksums held where there are any.

    Raises:
        PublishError: it cannot be read to its end.
    """
    try:
        with pq.ParquetFile(path, memory_map=False, page_checksum_verification=True) as file:
            yield from file.iter_batches(BATCH_ROWS, columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as cause:
        raise _unreadable(path, cause) from cause


def _unreadable(path: Path, cause: BaseException) -> PublishError:
    return PublishError(
        f"This file cannot be read: {' '.join(str(cause).split())[:300]}",
        where=path.name,
        next_step="write it again; a damaged file is never published",
    )


def vector_width(type_: pa.DataType) -> int | None:
    """d of a column of vectors in the one form that is published, fixed_size_list<float32, d>; None for others."""
    if not pt.is_fixed_size_list(type_) or not pt.is_float32(type_.value_type):
        return None
    width = int(type_.list_size)
    return width if width > 0 else None


def vectors_in(column: pa.Array) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A column of vectors as float32 [n, d]; null rows as NaN."""
    values = column.values.slice(column.offset * column.type.list_size, len(column) * column.type.list_size)
    found: np.ndarray[Any, np.dtype[np.float32]] = values.to_numpy(zero_copy_only=False).reshape(len(column), -1)
    if not column.null_count:
        return found
    found = found.copy()
    found[np.asarray(column.is_null())] = np.nan
    return found


def vector_faults(column: pa.Array, *, where: str, first: int, faults: Faults) -> None:
    """Note the rows whose vector is missing, not finite or zero; `first` is the number of the column's first row."""
    values = vectors_in(column)
    finite = np.isfinite(values).all(axis=1)
    zero = finite & ~values.any(axis=1)
    for i in np.flatnonzero(~finite | zero):
        faults.add(f"{where}, row {first + int(i)}: the vector {'is zero' if zero[i] else 'is missing or not finite'}")


def text_faults(
    batch: pa.RecordBatch, *, where: str, first: int, rules: Callable[[str], Sequence[Rule]], faults: Faults
) -> None:
    """Note what must not be published in the texts of a batch.

    Args:
        first: number of the batch's first row in its file.
        rules: name of a column -> what its texts are held against.
    """
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if not holds_text(column.type):
            continue
        against = rules(name)
        rows = [BETWEEN.join(texts_in(value)) for value in column.to_pylist()]
        if not kinds_in(BETWEEN.join(rows), against):
            continue
        for i, text in enumerate(rows):
            for what in kinds_in(text, against):
                faults.add(f"{where}, row {first + i}, column {name}: {what}")


def holds_text(type_: pa.DataType) -> bool:
    """Whether values of this type have text somewhere inside."""
    if pt.is_dictionary(type_):
        return holds_text(type_.value_type)
    if pt.is_nested(type_):
        return any(holds_text(type_.field(i).type) for i in range(type_.num_fields))
    return bool(pt.is_string(type_) or pt.is_large_string(type_) or pt.is_string_view(type_))


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)
