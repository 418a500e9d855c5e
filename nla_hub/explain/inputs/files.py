"""Files that a data set is read from, here or on the Hub, how compressed ones are opened, and what errors say of them.

Damage of a format is the same whenever the file is read, so it may take the place of rows. A disk or network that fails
is not: rows that come or go with it would shift the numbers of all others, so it ends the reading.
"""

from __future__ import annotations

import errno
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

from nla_hub.errors import RunError

MIB = 2**20

PIECE = 2**16
"""Bytes that are decompressed at a time: where the file breaks off, so much before it may be lost too."""

COMPRESSIONS = (".gz", ".zst")


SAMPLES, SAMPLE_BYTES = 16, 2**16
"""Blocks between the first and the last MiB that a digest covers, and how long they are."""

REFUSALS = (
    *(errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENXIO),  # the last one of a socket
)
"""What the system says of a file that is not there or may not be opened; all else is a failure that may pass."""

GOES_ON = "run the same command again: it goes on where it stopped"


class Unreadable(Exception):
    """Why a file, or the rest of it, cannot be read: one sentence without its name.

    Attributes:
        next_step: what to do about it, where that is not plain from the sentence.
    """

    def __init__(self, why: str, *, next_step: str | None = None) -> None:
        super().__init__(why)
        self.next_step = next_step


class NotOpened(Unreadable):
    """Why nothing of a file can be read: it is not there, or may not be opened."""


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
        """The file, seekable; raises NotOpened, an OSError where the system fails, from the Hub a HubError."""
        ...

    def sibling(self, suffix: str) -> DataFile | None:
        """The file beside this one whose name has `suffix` behind it; None where there is none."""
        ...

    def identity(self) -> dict[str, Any]:
        """Name, size and, where it is cheap, a digest: what stays the same as long as the contents do; raises as `open`."""
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
        try:
            handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except OSError as cause:
            if cause.errno not in REFUSALS:
                raise
            gone = "This file is no longer there."
            raise NotOpened(
                gone if cause.errno == errno.ENOENT else f"This file cannot be read: {_said(cause)}."
            ) from cause
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise NotOpened("This is not a regular file.")
        return os.fdopen(handle, "rb")

    def sibling(self, suffix: str) -> LocalFile | None:
        beside = self.path.with_name(self.path.name + suffix)
        return LocalFile(beside, self.name + suffix) if beside.is_file() else None

    def identity(self) -> dict[str, Any]:
        with self.open() as file:
            size = size_of(file)
            digest = hashlib.sha256(file.read(MIB))
            between = max(size - 2 * MIB, 0)
            for i in range(SAMPLES if between else 0):
                file.seek(MIB + i * between // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(size - MIB, 0))
            digest.update(file.read(MIB))
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


def size_of(file: BinaryIO) -> int:
    """Bytes of an open file, which is then at its beginning."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def damage(cause: BaseException, name: str) -> str:
    """Why contents cannot be read, as a sentence.

    Args:
        cause: one of `readers.BROKEN`.
        name: of the file.

    Raises:
        RunError: the cause says nothing about the contents: a disk or network that fails, or too little memory. What
            libraries raise as an OSError for damaged contents has no number of the system's.
    """
    if isinstance(cause, MemoryError):
        raise RunError(
            "Reading stopped: not enough memory.", where=name, next_step=f"make room in memory, then {GOES_ON}"
        ) from cause
    if isinstance(cause, TimeoutError | ConnectionError) or (isinstance(cause, OSError) and cause.errno is not None):
        raise RunError(
            f"Reading stopped: {_said(cause)}.", where=name, next_step=f"see to the disk or network, then {GOES_ON}"
        ) from cause
    return str(cause) if isinstance(cause, Unreadable) else f"This file cannot be read: {_said(cause)}."


def _said(cause: BaseException) -> str:
    text = (cause.strerror if isinstance(cause, OSError) else None) or str(cause) or type(cause).__name__
    return text.rstrip(".")
