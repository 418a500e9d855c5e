"""What every reader of one file offers, and what may go wrong inside of it without ending the data set."""

from __future__ import annotations

import csv
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import pyarrow as pa

from nla_hub.explain.inputs.files import DataFile, Unreadable
from nla_hub.explain.inputs.items import Item
from nla_hub.explain.inputs.records import Columns

BROKEN = (
    Unreadable,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    MemoryError,
    csv.Error,
    zlib.error,
    pa.ArrowException,
)
"""What reading a damaged file may raise; `files.damage` tells it from a disk that fails, which says nothing about the file.

A HubError is none of them: it says nothing about the file either.
"""


class Reader(ABC):
    """Reads one file once.

    Attributes:
        file: the file.
        row: rows passed so far, skipped ones included; once `items` has ended, the number of rows of the file.
    """

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self.row = 0
        self.raw: BinaryIO | None = None

    @abstractmethod
    def items(self, skip: int) -> Iterator[Item]:
        """The items behind the first `skip` ones; raises one of `BROKEN` where the rest cannot be read."""

    def columns(self) -> list[str] | None:
        """The columns there are, None where there is no row to see them from; raises one of `BROKEN`."""
        return None

    def count(self) -> int | None:
        """The number of rows, where it is known without reading them; raises one of `BROKEN`."""
        return None

    def fraction(self) -> float:
        """The part of the file that was read, 0 to 1."""
        if self.raw is None or self.raw.closed or not self.file.size:
            return 0.0
        return min(self.raw.tell() / self.file.size, 1.0)

    def require(self, names: Sequence[str], columns: Columns) -> None:
        """Raise Unreadable where this file has none of the columns that hold texts, or one of those twice."""
        texts = [name for name in (columns.text, columns.messages) if name is not None]
        if not set(texts) & set(names):
            raise Unreadable(f"This file has no column {texts[0]!r}, but {', '.join(names[:10])}.")
        if twice := [name for name in columns.names() if names.count(name) > 1]:
            raise Unreadable(f"The column {twice[0]!r} is there twice.")

    def place(self, number: int | None = None) -> str:
        """How messages name a line or row (counted from 1), or the file."""
        return self.file.name if number is None else f"{self.file.name}:{number}"
