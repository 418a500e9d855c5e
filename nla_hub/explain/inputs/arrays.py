"""Vectors in .npy and .safetensors files: headers checked, then rows read by their place in the file.

Nothing is unpickled, and no more than a few megabytes of values are held at a time.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from nla_hub.errors import NLAError
from nla_hub.explain.inputs.files import MIB, DataFile, Unreadable, size_of
from nla_hub.explain.inputs.items import Item, VectorItem
from nla_hub.explain.inputs.readers import Reader
from nla_hub.explain.inputs.tables import as_float32

CHUNK = 8 * MIB
"""Bytes of values that are read at a time."""

LONGEST_HEADER = 10 * MIB
"""Bytes of a safetensors header: half a million tensors."""

FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"}
"""Names of safetensors -> how numpy reads them; BF16 are the upper halves of float32."""

STEERING = "nla_hub"
"""Key of a safetensors file's metadata under which `SteeringVector.save` says where its vector belongs."""


@dataclass(frozen=True)
class StoredRows:
    """Where the rows of an array lie in a file.

    Attributes:
        name: of the tensor; "" in a file that holds one array.
        shape: as stored; [d], or [..., d].
        dtype: how numpy reads a value.
        offset: of the first byte.
        bf16: whether the values are the upper halves of float32.
        columns_first: [N, d] stored column by column, as numpy keeps a transposed array.
        metadata: text that the file holds besides.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    bf16: bool = False
    columns_first: bool = False
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """d."""
        return self.shape[-1]

    @property
    def count(self) -> int:
        """Number of vectors."""
        return math.prod(self.shape[:-1])

    def read(self, file: BinaryIO, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Rows `start` to `stop`, float32 [n, d]."""
        d, size = self.width, self.dtype.itemsize
        if self.columns_first:
            parts = [self._values(file, (j * self.count + start) * size, stop - start) for j in range(d)]
            values = np.stack(parts, axis=1)
        else:
            values = self._values(file, start * d * size, (stop - start) * d).reshape(-1, d)
        if self.bf16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return as_float32(values)

    def _values(self, file: BinaryIO, offset: int, n: int) -> np.ndarray[Any, Any]:
        file.seek(self.offset + offset)
        data = file.read(n * self.dtype.itemsize)
        if len(data) < n * self.dtype.itemsize:
            raise Unreadable("This file ends before its last value.")
        return np.frombuffer(data, self.dtype)


def npy_rows(file: BinaryIO, size: int) -> StoredRows:
    """The array of a .npy file; raises Unreadable or a ValueError for one that holds no vectors."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise Unreadable(f"This file is of version {version[0]}.{version[1]} of its format, not 1.0 or 2.0.")
    try:
        shape, columns_first, dtype = readers[version](file)
    except (NLAError, OSError):
        raise
    except Exception as cause:  # the header is Python's own notation, and its parsers raise what they like
        raise Unreadable(f"The header of this file cannot be read: {cause}.") from cause
    if dtype.hasobject:
        raise Unreadable(
            "This file holds pickled Python objects; reading them could run a stranger's code.",
            next_step="save it as numbers: np.save(FILE, np.stack(list(x)).astype(np.float32))",
        )
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise Unreadable(
            f"Activations are floating point; these values are {dtype}.",
            next_step="check that these are vectors and not, say, token ids; if so, np.save(FILE, x.astype(np.float32))",
        )
    if columns_first and len(shape) > 2:
        raise Unreadable("This array is stored column by column; save np.ascontiguousarray(x) in its place.")
    found = StoredRows("", shape, dtype, file.tell(), columns_first=columns_first and len(shape) == 2)
    return _checked(found, size)


def safetensors_rows(file: BinaryIO, size: int) -> list[StoredRows]:
    """The tensors of a safetensors file in order of their names; raises Unreadable where its header is none."""
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= length <= min(size - 8, LONGEST_HEADER):
        raise Unreadable(f"This is no safetensors file, or not all of it: a header of {length} bytes.")
    try:
        header = json.loads(file.read(length).decode("utf-8"))
        metadata = header.pop("__metadata__", None) or {}
        found = []
        for name, tensor in sorted(header.items()):
            start, end = tensor["data_offsets"]
            shape, kind = tuple(tensor["shape"]), tensor["dtype"]
            if not all(type(n) is int and n >= 0 for n in (start, end, *shape)):
                raise ValueError(f"the place of {name!r} is no place")
            if kind not in FLOATS:
                continue
            dtype = np.dtype(FLOATS[kind])
            if end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name!r} has {end - start} bytes and the shape {list(shape)}")
            found.append(StoredRows(name, shape, dtype, 8 + length + start, bf16=kind == "BF16", metadata=metadata))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as cause:
        raise Unreadable(f"This is no safetensors file: {cause}.") from cause
    return found


def one_tensor(found: list[StoredRows], name: str | None, size: int) -> StoredRows:
    """The tensor called `name`, or the only one; raises Unreadable where that is none."""
    listed = ", ".join(f"{rows.name} {list(rows.shape)}" for rows in found[:20]) or "none"
    if name is None and len(found) != 1:
        raise Unreadable(
            f"Which tensor holds the vectors? Name it with --column; the floating-point ones are: {listed}."
        )
    chosen = [rows for rows in found if name in (None, rows.name)]
    if not chosen:
        raise Unreadable(f"There is no tensor {name!r} of floating-point numbers; there are: {listed}.")
    return _checked(chosen[0], size)


def _checked(rows: StoredRows, size: int) -> StoredRows:
    if not rows.shape or not rows.width or min(rows.shape) < 0:
        raise Unreadable(f"This array holds no vectors: its shape is {list(rows.shape)}, expected [N, d] or [d].")
    if rows.offset + math.prod(rows.shape) * rows.dtype.itemsize > size:
        raise Unreadable(f"This file is too short for an array of shape {list(rows.shape)}.")
    return rows


def steering_site(rows: StoredRows) -> tuple[str | None, int | None]:
    """Base model and layer that `SteeringVector.save` noted; None for what is not said."""
    try:
        told = json.loads(rows.metadata[STEERING])
        base, layer = told.get("base"), told.get("layer")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None, None
    return base if isinstance(base, str) and base else None, layer if type(layer) is int else None


class ArrayReader(Reader):
    """The rows of an array, in order of their leading indices."""

    def __init__(self, file: DataFile, find: Callable[[BinaryIO, int], StoredRows], width: int | None) -> None:
        super().__init__(file)
        self.find = find
        self.width = width
        self.rows: StoredRows | None = None

    def stored(self) -> StoredRows:
        """Where the rows lie."""
        with self.file.open() as file:
            return self.find(file, size_of(file))

    def count(self) -> int:
        return self.stored().count

    def fraction(self) -> float:
        return self.row / self.rows.count if self.rows is not None and self.rows.count else 0.0

    def items(self, skip: int) -> Iterator[Item]:
        with self.file.open() as file:
            rows = self.rows = self.find(file, size_of(file))
            if rows.width != self.width:
                raise Unreadable(
                    f"The vectors of this file have {rows.width} numbers, the data set's have {self.width}."
                )
            self.row = min(skip, rows.count)
            step = max(CHUNK // (rows.width * rows.dtype.itemsize), 1)
            while self.row < rows.count:
                start = self.row
                for vector in rows.read(file, start, min(start + step, rows.count)):
                    self.row += 1
                    yield VectorItem(vector.copy(), None, None, None, self.place(self.row))
