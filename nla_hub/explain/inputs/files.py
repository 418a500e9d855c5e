"""Files that a data set is read from, here or on the Hub, and how compressed ones are opened."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

MIB = 2**20

PIECE = 2**16
"""Bytes that are decompressed at a time: where the file breaks off, so much before it may be lost too."""

COMPRESSIONS = (".gz", ".zst")


class Unreadable(Exception):
    """Why a file, or the rest of it, cannot be read: one sentence without its name."""


class DataFile(Protocol):
    """A file of a data set."""

    @property
    def name(self) -> str:
        """What messages call it: its path below the folder that all files share."""
        ...

    @property
    def size(self) -> int:
        """Bytes; 0 where that is not known."""
        ...

    def open(self) -> BinaryIO:
        """The file, seekable; raises Unreadable or an OSError, from the Hub a HubError."""
        ...

    def sibling(self, suffix: str) -> DataFile | None:
        """The file beside this one whose name has `suffix` behind it; None where there is none."""
        ...

    def identity(self) -> dict[str, Any]:
        """Name, size and, where it is cheap, a digest: what stays the same as long as the contents do."""
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine."""

    path: Path
    name: str

    @property
    def size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def open(self) -> BinaryIO:
        # Opening a pipe would wait for somebody to write into it.
        handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise Unreadable("This is not a regular file.")
        return os.fdopen(handle, "rb")

    def sibling(self, suffix: str) -> LocalFile | None:
        beside = self.path.with_name(self.path.name + suffix)
        return LocalFile(beside, self.name + suffix) if beside.is_file() else None

    def identity(self) -> dict[str, Any]:
        try:
            with self.open() as file:
                size = os.fstat(file.fileno()).st_size
                digest = hashlib.sha256(file.read(MIB))
                file.seek(max(size - MIB, 0))
                digest.update(file.read(MIB))
        except (OSError, Unreadable):
            return {"name": self.name, "size": None, "sha256": None}
        digest.update(str(size).encode())
        return {"name": self.name, "size": size, "sha256": digest.hexdigest()}


@contextmanager
def opened(file: DataFile, compression: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The decompressed contents, and the file below them, whose position tells how much was read."""
    with file.open() as raw:
        if compression == ".gz":
            with gzip.GzipFile(fileobj=raw, mode="rb") as plain:
                yield cast(BinaryIO, plain), raw
        elif compression == ".zst":
            import pyarrow as pa

            with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd") as plain:
                yield cast(BinaryIO, io.BufferedReader(plain, PIECE)), raw
        else:
            yield raw, raw


def reason(cause: BaseException) -> str:
    """Why something could not be read, as a sentence."""
    if isinstance(cause, Unreadable):
        return str(cause)
    if isinstance(cause, FileNotFoundError):
        return "This file is no longer there."
    text = (cause.strerror if isinstance(cause, OSError) else None) or str(cause) or type(cause).__name__
    return f"This file cannot be read: {text.rstrip('.')}."
