"""Answers by what was asked: one SQLite file in which everything that was paid is kept, whatever ends the process.

An answer is on disk before it is counted. Several processes may use one file: what is written shows in all of them, and only
one of them asks an API at a time (`alone`), so that none pays for what another is being answered. Batches that an API works on
by itself are written down before they are sent.

Processes on one machine, that is: what SQLite shares between them (its WAL) must not lie on a file system between machines.
Where several machines answer, each process has a file of its own, and one of them takes over the others' (`take_over`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_hub.errors import RunError
from nla_hub.locks import Lock
from nla_hub.training.labeling.cost import Usage

FILE = "labels.sqlite"

SCHEMA = """
create table if not exists answer (
    key text primary key, asker text not null, text text not null, finish text, input integer, output integer, at real not null
) without rowid;
create table if not exists batch (id integer primary key, asker text not null, remote text unique, at real not null,
    size integer not null, sure integer not null);
create table if not exists waiting (key text primary key, batch integer not null) without rowid;
create index if not exists waiting_batch on waiting (batch);
create index if not exists answer_asker on answer (asker);
"""

LONGEST = 100_000
"""Characters of an answer that are kept: far more than any label, and enough to judge it."""

PATIENCE = 60.0
"""Seconds that a write waits for another process's."""

ROOM = 4096
"""Bytes that an answer takes at most, as a rule: 200 words and the entry around them."""

LOOK = 0.5
"""Seconds between looks at whether another process is done."""

STEP = 500
"""Keys of one query; SQLite takes 999 variables in old versions."""

GO_ON = "make room, then run the same command again: it goes on where it stopped, and what is stored is not paid again"


@dataclass(frozen=True)
class Answer:
    """What came back for one request.

    Attributes:
        text: as the model wrote it.
        finish: why it ended, as the API says.
        input_tokens, output_tokens: as the API counted; None where it did not say.
    """

    text: str
    finish: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True)
class StoredBatch:
    """A batch that was sent, or was about to be.

    Attributes:
        id: in this file.
        remote: the API's name of it; None where the process ended between sending it and being told.
        at: seconds since 1970 when it was about to be sent.
        size: requests in it.
        sure: False where it was only found by its size and time among the account's batches.
    """

    id: int
    remote: str | None
    at: float
    size: int
    sure: bool


def key_of(asker: Mapping[str, Any], snippet: str, attempt: int) -> str:
    """What an answer is stored under: sha256 over who is asked and how, what is shown, and which attempt it is."""
    text = json.dumps([asker, snippet, attempt], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class LabelCache:
    """The answers in a directory; usable from many threads.

    Args:
        own: this process alone uses the file; no WAL is written, so it may lie on a file system between machines.

    Raises (everything in it):
        RunError: it cannot be read or written. What was stored stays.
    """

    def __init__(self, directory: Path, *, own: bool = False) -> None:
        self.path = directory / FILE
        self._lock = threading.Lock()
        with self._explained():
            directory.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=PATIENCE, check_same_thread=False, isolation_level=None)
            try:
                self._db.execute(f"pragma journal_mode={'truncate' if own else 'wal'}")
                self._db.execute("pragma synchronous=full")
                self._db.executescript(SCHEMA)
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> LabelCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def require_room(self, answers: int) -> None:
        """Raise a RunError where so many answers will hardly fit, before any of them is paid."""
        free = shutil.disk_usage(self.path.parent).free
        if free < answers * ROOM:
            raise RunError(
                "There is not enough room for the labels.",
                where=self.path,
                got=f"{free / 2**20:.0f} MiB",
                expected=f"{answers * ROOM / 2**20:.0f} MiB for {answers} answers",
                next_step=GO_ON,
            )

    @contextmanager
    def alone(self, waiting: Callable[[], None]) -> Iterator[None]:
        """While open, no other process asks an API for this cache; `waiting` is called once where one has to be waited for."""
        told = False
        while True:
            try:
                lock = Lock(self.path.with_name(f"{FILE}.lock"))
                break
            except RunError:
                if not told:
                    waiting()
                told = True
            time.sleep(LOOK)
        with lock:
            yield

    # -- answers ---------------------------------------------------------------------------------------------

    def get(self, key: str) -> Answer | None:
        """The answer under a key."""
        found = self._read("select text, finish, input, output from answer where key = ?", [key])
        return Answer(*found[0]) if found else None

    def known(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that have an answer."""
        return {row[0] for row in self._among("select key from answer where key in (%s)", keys)}

    def put(self, asker: str, answers: Mapping[str, Answer]) -> None:
        """Store answers, on disk when it returns; one that is there already stays."""
        rows = [
            (key, asker, a.text[:LONGEST], a.finish, a.input_tokens, a.output_tokens, time.time())
            for key, a in answers.items()
        ]
        with self._written() as db:
            db.executemany("insert or ignore into answer values (?, ?, ?, ?, ?, ?, ?)", rows)

    def take_over(self, directory: Path) -> None:
        """Store the answers of another directory that nobody writes to any more, and remove it."""
        with self._explained(directory / FILE):
            LabelCache(directory, own=True).close()  # its writer may have been killed before there was anything in it
            with self._lock:
                self._db.execute("attach database ? as other", [str(directory / FILE)])
                try:
                    self._db.execute("insert or ignore into main.answer select * from other.answer")
                finally:
                    self._db.execute("detach database other")
            shutil.rmtree(directory)

    def spent(self, asker: str) -> Usage:
        """What all answers of an asker came to."""
        [row] = self._read(
            "select count(*), count(*) - count(input + output), total(input), total(output) from answer where asker = ?",
            [asker],
        )
        return Usage(int(row[0]), int(row[1]), int(row[2]), int(row[3]))

    # -- batches ---------------------------------------------------------------------------------------------

    def begin_batch(self, asker: str, keys: Sequence[str]) -> StoredBatch:
        """Write down a batch that is about to be sent."""
        now = time.time()
        with self._written() as db:
            made = db.execute(
                "insert into batch (asker, remote, at, size, sure) values (?, null, ?, ?, 1)", (asker, now, len(keys))
            )
            number = int(made.lastrowid or 0)
            db.executemany("insert into waiting values (?, ?)", [(key, number) for key in keys])
        return StoredBatch(number, None, now, len(keys), True)

    def name_batch(self, batch: StoredBatch, remote: str, *, sure: bool = True) -> None:
        """Write down what the API calls a batch."""
        with self._written() as db:
            db.execute("update batch set remote = ?, sure = ? where id = ?", (remote, int(sure), batch.id))

    def end_batch(self, batch: StoredBatch) -> None:
        """Forget a batch: its answers are stored, or it does not exist. What has no answer then can be asked again."""
        with self._written() as db:
            db.execute("delete from waiting where batch = ?", (batch.id,))
            db.execute("delete from batch where id = ?", (batch.id,))

    def batches(self, keys: Iterable[str] | None = None) -> list[StoredBatch]:
        """The batches in which one of the keys waits (None: all), oldest first."""
        columns = "id, remote, at, size, sure"
        if keys is None:
            rows = self._read(f"select {columns} from batch", [])
        else:
            numbers = {row[0] for row in self._among("select distinct batch from waiting where key in (%s)", keys)}
            rows = self._among(f"select {columns} from batch where id in (%s)", numbers)
        return sorted(
            (StoredBatch(i, remote, at, size, bool(sure)) for i, remote, at, size, sure in rows),
            key=lambda batch: batch.id,
        )

    def waiting(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that wait in a batch."""
        return {row[0] for row in self._among("select key from waiting where key in (%s)", keys)}

    def keys_of(self, batch: StoredBatch) -> list[str]:
        """The keys of a batch."""
        return [row[0] for row in self._read("select key from waiting where batch = ?", [batch.id])]

    # -- SQL -------------------------------------------------------------------------------------------------

    def _read(self, query: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        with self._explained(), self._lock:
            return self._db.execute(query, values).fetchall()

    def _among(self, query: str, values: Iterable[Any]) -> list[tuple[Any, ...]]:
        listed = list(values)
        found = []
        for begin in range(0, len(listed), STEP):
            part = listed[begin : begin + STEP]
            found += self._read(query % ", ".join("?" * len(part)), part)
        return found

    @contextmanager
    def _written(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it on disk, or nothing."""
        with self._explained(), self._lock:
            self._db.execute("begin immediate")
            try:
                yield self._db
                self._db.execute("commit")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("rollback")
                raise

    @contextmanager
    def _explained(self, path: Path | None = None) -> Iterator[None]:
        """Say what to do where the file (None: this one) cannot be used."""
        try:
            yield
        except (OSError, sqlite3.Error) as cause:
            damaged = isinstance(cause, sqlite3.DatabaseError) and not isinstance(cause, sqlite3.OperationalError)
            raise RunError(
                f"The labels cannot be stored: {cause}." if not damaged else f"The stored labels are damaged: {cause}.",
                where=path or self.path,
                next_step="it holds answers that were paid: save what `sqlite3 FILE .recover` finds, then move it away"
                if damaged
                else GO_ON,
            ) from cause
