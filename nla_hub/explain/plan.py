"""Which rows a job has: the input read once from front to back, block by block, as fast as blocks are asked for.

What is kept is small: where each block begins in the input, so that a job that was killed reads again only what it lacks, and
which documents were seen, so that what stands twice in the data is computed once. It is a cache: without it the input is read
again, with the same result.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from nla_hub.errors import RunError
from nla_hub.explain.inputs import Dataset
from nla_hub.explain.rows import Block, ItemRows, RowMaker, blocks_of
from nla_hub.log import logger

SCHEMA = """
create table if not exists place (block integer primary key, document integer not null, skip integer not null);
create table if not exists seen (hash blob primary key, first integer not null) without rowid;
create table if not exists job (identity text not null);
create table if not exists total (rows integer not null, documents integer not null, blocks integer not null);
"""


@dataclass(frozen=True)
class Total:
    """What the whole input comes to."""

    rows: int
    documents: int
    blocks: int


class Plan:
    """The plan of one job (or of one shard of it), on disk.

    Args:
        path: of the database; one that cannot be read is made anew.
        dataset, make: the input, and how its items become rows.
        size: rows of a block.
        identity: of the job; a plan that was made for another one is dropped.
    """

    def __init__(self, path: Path, dataset: Dataset, make: RowMaker, size: int, *, identity: str = "") -> None:
        self._dataset = dataset
        self._make = make
        self._size = size
        with _explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._db = _opened(path, identity)
            except _Foreign:
                path.unlink()
                self._db = _opened(path, identity)
            except sqlite3.DatabaseError as cause:
                if isinstance(cause, sqlite3.OperationalError):  # no room, no rights: not the file's fault
                    raise
                logger.warning("%s is damaged (%s): the input is read again from its beginning", path, cause)
                path.unlink()
                self._db = _opened(path, identity)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    @property
    def total(self) -> Total | None:
        """What the input comes to; None while it has not been read to its end."""
        found = self._db.execute("select rows, documents, blocks from total").fetchone()
        return None if found is None else Total(*found)

    @property
    def fraction(self) -> float | None:
        """Part of the input that has been read, None where nothing says."""
        return 1.0 if self.total is not None else self._dataset.fraction()

    @property
    def rows(self) -> int:
        """Rows that are planned."""
        total = self.total
        return self._frontier * self._size if total is None else total.rows

    @property
    def _frontier(self) -> int:
        """The first block of which nothing is known but where it begins."""
        return int(self._db.execute("select coalesce(max(block), 0) from place").fetchone()[0])

    def blocks(
        self, wanted: Callable[[int], bool], stopped: Callable[[], bool] = lambda: False
    ) -> Generator[Block, None, None]:
        """The blocks that are wanted, in order. Reads on in the input as they are taken.

        Args:
            stopped: asked at every item; once it says so, no block comes any more.

        Raises:
            HubError and its children: the input's place cannot be reached; what was planned until then stays.
            RunError: the plan cannot be written.
        """
        total, frontier = self.total, self._frontier
        missing = [i for i in range(frontier if total is None else total.blocks) if wanted(i)]
        begin = 0
        while begin < len(missing):  # runs of blocks that a job before this one did not come to
            end = begin + 1
            while end < len(missing) and missing[end] == missing[end - 1] + 1:
                end += 1
            yield from self._read(missing[begin], missing[end - 1], stopped)
            begin = end
        if total is None:
            for block in self._read(frontier, None, stopped):
                if wanted(block.index):
                    yield block

    def _read(self, first: int, last: int | None, stopped: Callable[[], bool]) -> Iterator[Block]:
        """Blocks `first` to `last`, or to the end of the input."""
        document, skip = self._place(first)
        begun = document

        def items() -> Iterator[tuple[int, ItemRows, int | None]]:
            nonlocal begun
            number, row = document, first * self._size - skip
            with closing(self._dataset.items(start=document)) as found:
                for item in found:
                    if stopped():
                        return
                    made = self._make(item, number)
                    yield number, made, self._earlier(made, row)
                    number, row = number + 1, row + len(made.rows)
                    begun = number
            rows.append(row)

        rows: list[int] = []  # how many there are, once the input has come to its end
        index = first - 1
        for block, next_document, next_skip in blocks_of(items(), self._size, index=first, skip=skip):
            index = block.index
            if not rows and len(block.rows) < self._size:  # stopped in the middle of it
                return
            if len(block.rows) == self._size:
                self._keep("insert or replace into place values (?, ?, ?)", index + 1, next_document, next_skip)
            yield block
            if index == last:
                return
        if last is None and rows:
            self._keep("insert into total values (?, ?, ?)", rows[0], begun, index + 1)

    def _place(self, block: int) -> tuple[int, int]:
        found = self._db.execute("select document, skip from place where block = ?", (block,)).fetchone()
        return (0, 0) if found is None else (int(found[0]), int(found[1]))

    def _earlier(self, made: ItemRows, row: int) -> int | None:
        """The first row of the first item that equals this one; None for that item itself."""
        if made.hash is None or not made.rows:
            return None
        with _explained():
            self._db.execute("insert or ignore into seen values (?, ?)", (made.hash, row))
        first = int(self._db.execute("select first from seen where hash = ?", (made.hash,)).fetchone()[0])
        return first if first < row else None

    def _keep(self, statement: str, *values: int) -> None:
        """One statement, and with it everything since the last one, safely on disk."""
        with _explained():
            self._db.execute(statement, values)
            self._db.commit()


GO_ON = "make room, then run the same command again: it goes on where it stopped"


@contextmanager
def _explained() -> Iterator[None]:
    """Say what to do where the plan cannot be written."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as cause:
        raise RunError(f"The plan of the job cannot be written: {cause}.", next_step=GO_ON) from cause


class _Foreign(Exception):
    """A plan of another job."""


def _opened(path: Path, identity: str) -> sqlite3.Connection:
    # The job holds a lock of its own, and sqlite's do not work on every network file system.
    db = sqlite3.connect(f"{path.absolute().as_uri()}?nolock=1", uri=True, check_same_thread=False)
    try:
        db.execute("pragma journal_mode=truncate")
        db.executescript(SCHEMA)
        if (state := db.execute("pragma quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(state)
        known = db.execute("select identity from job").fetchone()
        if known is None:
            db.execute("insert into job values (?)", (identity,))
            db.commit()
        elif known[0] != identity:
            raise _Foreign
    except (sqlite3.DatabaseError, _Foreign):
        db.close()
        raise
    return db
