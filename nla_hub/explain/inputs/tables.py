"""Parquet and Arrow files of texts or of vectors, read a batch at a time.

Files of vectors have the columns of this project's activations: `activation_vector` (lists of floats), and where they
are there `doc_id`, `n_raw_tokens` (position + 1), `activation_layer` and `detokenized_text_truncated`.
"""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from nla_hub.explain.inputs.files import MIB, DataFile, damage, size_of
from nla_hub.explain.inputs.items import BadItem, Item, VectorItem, bad
from nla_hub.explain.inputs.readers import BROKEN, Reader
from nla_hub.explain.inputs.records import Columns, as_id

VECTOR, LAYER, LENGTH, CONTEXT = (
    "activation_vector",
    "activation_layer",
    "n_raw_tokens",
    "detokenized_text_truncated",
)

BATCH_BYTES = 8 * MIB
MOST_ROWS = 1024
"""Rows of a batch at most; fewer where the file's own figures say that they would be larger than `BATCH_BYTES`."""

PAGE_BUFFER = MIB
"""Bytes that the reader of a column reads ahead, instead of all of the column in a row group."""

ARROW_FILE = b"ARROW1"
"""First bytes of an Arrow file (Feather version 2); one written as a stream has none of its own."""

Pick = Callable[[dict[str, Any], str], Item]
"""(column -> value or the reason why it has none, place) -> item."""


def is_vectors(type_: pa.DataType) -> bool:
    """Whether a column holds lists of floating-point numbers."""
    lists = pt.is_list(type_) or pt.is_large_list(type_) or pt.is_fixed_size_list(type_)
    return bool(lists and pt.is_floating(type_.value_type))


def is_text(type_: pa.DataType) -> bool:
    """Whether a column holds texts, or bytes that may be texts."""
    if pt.is_dictionary(type_):
        return is_text(type_.value_type)
    strings = (pt.is_string, pt.is_large_string, pt.is_string_view, pt.is_binary, pt.is_large_binary)
    return any(test(type_) for test in strings)


def is_conversation(type_: pa.DataType) -> bool:
    """Whether a column holds lists of messages, or texts that may be JSON."""
    lists = pt.is_list(type_) or pt.is_large_list(type_)
    return bool(lists and pt.is_struct(type_.value_type)) or is_text(type_)


class ColumnsReader(Reader):
    """The rows of a file whose columns have types."""

    def __init__(self, file: DataFile, pick: Pick, columns: Columns, beside: tuple[str, ...] = ()) -> None:
        super().__init__(file)
        self.pick = pick
        self.chosen = columns
        self.beside = beside

    @abstractmethod
    def schema(self) -> pa.Schema:
        """The columns with their types; raises one of `BROKEN`."""

    def columns(self) -> list[str]:
        return list(self.schema().names)

    def wanted(self, names: list[str]) -> list[str]:
        """The columns that are read, of those there are; raises Unreadable where those needed are not among them."""
        self.require(names, self.chosen)
        return [name for name in dict.fromkeys((*self.chosen.names(), *self.beside)) if name in names]

    def batch(self, batch: pa.RecordBatch, columns: list[str], skip: int) -> Iterator[Item]:
        """The items of the next rows, those below `skip` left out."""
        taken = max(min(skip - self.row, batch.num_rows), 0)
        self.row += taken
        for i in range(taken, batch.num_rows):
            record = {name: value_of(batch.column(name)[i]) for name in columns}
            self.row += 1
            yield self.pick(record, self.place(self.row))


class ParquetReader(ColumnsReader):
    """The rows of a parquet file.

    A row group that is damaged costs its rows from there on, one bad item each: so the numbers of all others stay what
    they are, and whole row groups can be skipped.
    """

    rows: int | None = None

    def schema(self) -> pa.Schema:
        with self._table() as table:
            return table.schema_arrow

    def count(self) -> int:
        with self._table() as table:
            return int(table.metadata.num_rows)

    def fraction(self) -> float:
        return min(self.row / self.rows, 1.0) if self.rows else 0.0

    def items(self, skip: int) -> Iterator[Item]:
        with self._table() as table:
            self.rows = int(table.metadata.num_rows)
            columns = self.wanted(table.schema_arrow.names)
            for group in range(table.metadata.num_row_groups):
                rows = int(table.metadata.row_group(group).num_rows)
                if self.row + rows <= skip:
                    self.row += rows
                else:
                    yield from self._group(table, group, columns, skip)

    def _group(self, table: pq.ParquetFile, group: int, columns: list[str], skip: int) -> Iterator[Item]:
        meta = table.metadata.row_group(group)
        end = self.row + int(meta.num_rows)
        each = max(meta.total_byte_size // max(meta.num_rows, 1), 1)
        size = int(min(max(BATCH_BYTES // each, 1), MOST_ROWS))
        broken = "its row group holds fewer rows than the file says"
        try:
            for batch in table.iter_batches(size, row_groups=[group], columns=columns, use_threads=False):
                yield from self.batch(batch, columns, skip)
        except BROKEN as cause:
            broken = damage(cause, self.file.name)
        while self.row < end:
            self.row += 1
            if self.row > skip:
                yield bad(f"This row cannot be read: {broken}", self.place(self.row))

    @contextmanager
    def _table(self) -> Iterator[pq.ParquetFile]:
        with (
            self.file.open() as raw,
            pq.ParquetFile(raw, memory_map=False, pre_buffer=False, buffer_size=PAGE_BUFFER) as table,
        ):
            yield table


class _WithinFile(io.BufferedReader):
    """Asks for no more than a file holds: a damaged length would else look like too little memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = size_of(file)
        super().__init__(cast(io.RawIOBase, file))

    def read(self, n: int | None = -1, /) -> bytes:
        left = max(self.size - self.tell(), 0)
        return super().read(left if n is None or n < 0 else min(n, left))


class ArrowReader(ColumnsReader):
    """The rows of an Arrow file, also of one written as a stream; a record batch is held as a whole, as it was written."""

    def schema(self) -> pa.Schema:
        with self._table() as (schema, _):
            return schema

    def items(self, skip: int) -> Iterator[Item]:
        with self._table() as (schema, batches):
            columns = self.wanted(schema.names)
            for batch in batches:
                chosen = batch.select(columns)
                chosen.validate(full=True)  # the library trusts the offsets in a file otherwise
                yield from self.batch(chosen, columns, skip)

    @contextmanager
    def _table(self) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
        with self.file.open() as self.raw, _WithinFile(self.raw) as raw:
            magic = raw.read(len(ARROW_FILE))
            raw.seek(0)
            if magic != ARROW_FILE:
                with pa.ipc.open_stream(raw) as stream:
                    yield stream.schema, iter(stream)
                return
            with pa.ipc.open_file(raw) as file:
                yield file.schema, map(file.get_batch, range(file.num_record_batches))


def reader_of(file: DataFile, pick: Pick, columns: Columns, beside: tuple[str, ...] = ()) -> ColumnsReader:
    """The reader for a file of this ending."""
    kind = ParquetReader if file.name.lower().endswith(".parquet") else ArrowReader
    return kind(file, pick, columns, beside)


def text_reader(file: DataFile, columns: Columns) -> ColumnsReader:
    """A reader of texts and conversations."""
    return reader_of(file, columns.pick, columns)


class VectorColumns:
    """From a row of activations to an item; every row is held against the data set's width and layer."""

    BESIDE = (LENGTH, CONTEXT, LAYER)
    """Columns that are read where they are there."""

    def __init__(self, vector: str, ids: tuple[str, ...], width: int, layer: int | None) -> None:
        self.vector = vector
        self.ids = ids
        self.width = width
        self.layer = layer

    def pick(self, record: dict[str, Any], where: str) -> VectorItem | BadItem:
        """The item of one row."""
        doc_id = next((found for name in self.ids if (found := as_id(record.get(name))) is not None), None)
        vector, layer = record.get(self.vector), record.get(LAYER)
        if not isinstance(vector, np.ndarray):
            return bad(f"The column {self.vector!r} holds no vector.", where, doc_id)
        if len(vector) != self.width:
            return bad(f"This vector has {len(vector)} numbers, the data set's have {self.width}.", where, doc_id)
        if self.layer is not None and isinstance(layer, int) and layer != self.layer:
            return bad(f"This vector is of layer {layer}, the data set's are of layer {self.layer}.", where, doc_id)
        length, context = record.get(LENGTH), record.get(CONTEXT)
        position = length - 1 if isinstance(length, int) and length > 0 else None
        return VectorItem(vector, doc_id, position, context if isinstance(context, str) else None, where)


def vector_reader(file: DataFile, columns: VectorColumns) -> ColumnsReader:
    """A reader of vectors."""
    return reader_of(file, columns.pick, Columns(columns.vector, None, columns.ids), columns.BESIDE)


def first_vector(file: DataFile, column: str) -> tuple[int, int | None] | None:
    """Width of a file's first vector and the layer beside it; None where there is none; raises one of `BROKEN`."""
    found: list[tuple[int, int | None]] = []

    def look(record: dict[str, Any], where: str) -> BadItem:
        if isinstance(vector := record.get(column), np.ndarray) and len(vector):
            found.append((len(vector), layer if isinstance(layer := record.get(LAYER), int) else None))
        return bad("", where)

    for _ in reader_of(file, look, Columns(column, None, ()), (LAYER,)).items(0):
        if found:
            return found[0]
    return None


def value_of(cell: pa.Scalar) -> Any:
    """A cell as Python has it: a list of floats as float32 [d], text that is not UTF-8 as its bytes."""
    if not cell.is_valid:
        return None
    if is_vectors(cell.type):
        return as_float32(cell.values.to_numpy(zero_copy_only=False))
    try:
        return without_nulls(cell.as_py())
    except UnicodeDecodeError as error:
        return bytes(error.object)


def as_float32(values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32, of its own memory; what does not fit becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array(values, dtype=np.float32)


def without_nulls(value: Any) -> Any:
    """A list of structs without the fields that are null: parquet has every field in every struct."""
    if not isinstance(value, list):
        return value
    return [
        {key: held for key, held in entry.items() if held is not None} if isinstance(entry, dict) else entry
        for entry in value
    ]
