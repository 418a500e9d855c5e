"""The output directory of a job: claimed by one configuration, locked, and each file there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nla_hub import yaml_io
from nla_hub.errors import RunError
from nla_hub.explain.plan import GO_ON
from nla_hub.explain.result import part_names, read_part
from nla_hub.explain.schema import JOB, MANIFEST, PARTS, VECTORS, WORK, block_of, part_name
from nla_hub.explain.settings import Shard
from nla_hub.locks import Lock, Owner
from nla_hub.log import logger
from nla_hub.schema import differences

LOCK = ".lock"

PATIENCE = 60.0
"""Seconds that another shard may take to read and write `job.yaml`."""

SETTLED = "settled"
"""Key of job.yaml for what the job settled by itself when it first started: no difference to what is asked for now."""


class Output:
    """The directory of a job.

    Use it as a context: it is locked inside.

    Raises:
        RunError: on entering: the place holds something else, a job of another configuration, or is in use.
    """

    def __init__(self, path: Path, shard: Shard | None = None) -> None:
        self.path = path
        self.shard = shard or Shard()
        self.identity = ""
        self._settled: dict[str, Any] = {}
        self._locks: list[Lock] = []

    @property
    def begun(self) -> bool:
        """Whether a job was started here before."""
        return (self.path / JOB).is_file()

    def __enter__(self) -> Output:
        if self.path.exists() and not self.path.is_dir():
            raise RunError("A file is in the way of this job.", where=self.path, next_step="name another place with -o")
        if self.path.is_dir() and not (self.path / JOB).is_file():
            strange = [p.name for p in self.path.iterdir() if p.name != WORK and not p.name.startswith(".")]
            if strange:
                raise RunError(
                    "This directory holds something else than a job.",
                    where=self.path,
                    got=", ".join(sorted(strange)[:5]),
                    next_step="name an empty or new one",
                )
        with _explained(self.path):
            (self.path / WORK).mkdir(parents=True, exist_ok=True)  # nothing that the check above would take for strange
            try:
                if self.shard.of == 1:
                    self._locks = [Lock(self.path / LOCK)]
                else:
                    self._locks = [Lock(self.path / LOCK, shared=True)]
                    self._locks.append(Lock(self.path / f"{LOCK}-{self.shard.name}"))
                    self._refuse_other_shards()
            except RunError as error:
                self._release()
                owners = {p.name: owner for p in self.path.glob(f"{LOCK}-*") if (owner := Owner.read(p))}
                error.faults = tuple(f"shard {name.removeprefix(f'{LOCK}-')}: {o}" for name, o in owners.items())
                raise
        self._sweep()
        return self

    def _refuse_other_shards(self) -> None:
        """Raise a RunError where shards of another division are at work: a block would be theirs and this one's."""
        for path in self.path.glob(f"{LOCK}-*-of-*"):
            if not path.name.endswith(f"-of-{self.shard.of}"):
                Lock(path).release()

    def __exit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        while self._locks:
            self._locks.pop().release()

    def _sweep(self) -> None:
        """Remove what writers left that were killed; nobody else writes a block that this job owns."""
        with _explained(self.path):
            for folder in (PARTS, VECTORS):
                for path in (self.path / folder).glob(".part-*.tmp"):
                    block = block_of(Path(path.name.removeprefix(".").rpartition(".parquet")[0] + ".parquet"))
                    if block is None or self.shard.owns(block):
                        path.unlink(missing_ok=True)
            if self.shard.of == 1:
                for path in (*self.path.glob(f".{JOB}.*"), *self.path.glob(f".{MANIFEST}.*")):
                    path.unlink(missing_ok=True)

    # -- configuration ---------------------------------------------------------------------------------------

    def claim(self, wanted: Mapping[str, Any], **named: Any) -> dict[str, Any]:
        """Write `job.yaml`, or hold the one that is there against what is wanted; returns what it says was settled.

        Args:
            named: what could have been left to the job to settle, and was named; None where it was left.

        Raises:
            RunError: the job was started with another configuration; every difference is named.
        """
        path = self.path / JOB
        canonical = json.dumps(wanted, sort_keys=True, ensure_ascii=False)
        self.identity = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        with self._alone():
            if not path.is_file():
                with _explained(self.path):
                    yaml_io.write_text(path, yaml_io.dumps(wanted))
                return {}
            found = yaml_io.read(path, error=RunError)
            settled = self._checked(found.pop(SETTLED, {}))
            known = {key: value for key, value in settled.items() if named.get(key) is not None}
            if changed := differences({**found, **known}, {**wanted, **{key: named[key] for key in known}}):
                raise RunError(
                    "This job was started with another configuration.",
                    where=self.path,
                    faults=changed,
                    next_step="name another place with -o, or repeat the settings it was started with",
                )
            self._settled = dict(settled)
            return dict(settled)

    def _checked(self, settled: Any) -> dict[str, Any]:
        """What a file says was settled; a RunError where somebody changed it into something else."""
        rows = settled.get("batch_size", 1) if isinstance(settled, dict) else None
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise RunError(
                f"`{SETTLED}` is not what a job writes.",
                where=self.path / JOB,
                got=repr(settled)[:80],
                expected="batch_size: a whole number from 1 up",
                next_step=f"put it right, or take `{SETTLED}` out where nothing was computed yet",
            )
        return dict(settled)

    def settle(self, **values: Any) -> dict[str, Any]:
        """Add to what was settled, and return all of it; what another shard settled first stands."""
        with self._alone():
            found = yaml_io.read(self.path / JOB, error=RunError)
            settled = {**values, **self._checked(found.get(SETTLED, {}))}
            if settled != found.get(SETTLED):
                with _explained(self.path):
                    yaml_io.write_text(self.path / JOB, yaml_io.dumps({**found, SETTLED: settled}))
            self._settled = dict(settled)
            return settled

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other shards from `job.yaml` for a moment."""
        if self.shard.of == 1:
            yield
            return
        end = time.monotonic() + PATIENCE
        while True:
            try:
                with _explained(self.path):
                    lock = Lock(self.path / f"{LOCK}-settings")
                break
            except RunError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
        with lock:
            yield

    # -- parts -----------------------------------------------------------------------------------------------

    def done(self, columns: Sequence[str], *, vectors: bool) -> Iterator[tuple[int, pa.Table]]:
        """The blocks that are there and can be read, in order, with these columns.

        One that is damaged is removed, and so computed again.

        Raises:
            RunError: a part that is not this job's, of this block; a disk that cannot be read.
        """
        for name in part_names(self.path):
            path = self.path / PARTS / name
            block = block_of(path)
            assert block is not None
            try:
                if vectors:
                    pq.read_metadata(self.path / VECTORS / name)
                table = read_part(path)
            except (RunError, OSError, pa.ArrowException) as error:
                cause = error.__cause__ if isinstance(error, RunError) else error
                lost = isinstance(cause, FileNotFoundError)  # its vectors
                if not lost and (cause is None or getattr(cause, "errno", None) is not None):
                    raise RunError(
                        f"This part cannot be used: {_said(error)}",
                        where=path,
                        next_step="see to the disk, or move this part away; then run the same command again",
                    ) from error
                logger.warning("%s is computed again: %s", path, _said(error)[:200])
                path.unlink(missing_ok=True)
                continue
            self._require_own(path, table, block)
            yield block, table.select(list(columns))

    def _require_own(self, path: Path, table: pa.Table, block: int) -> None:
        said = (table.schema.metadata or {}).get(OWNER, b"nobody").decode("ascii", "replace")
        if said != self._owner(block):  # another shard may have settled something since
            self._settled = self._checked(yaml_io.read(self.path / JOB, error=RunError).get(SETTLED, {}))
        if said != (own := self._owner(block)):
            raise RunError(
                "This part was not written by this job for this block.",
                where=path,
                got=said,
                expected=own,
                next_step="take it away; parts of shards can be put together only where every setting is the same, also the "
                "batch size (--batch-size) and the data",
            )

    def _owner(self, block: int) -> str:
        """Whose a part is: the job by its settings, the batch size, the block."""
        return f"{self.identity} batch {self._settled.get('batch_size')} block {block}"

    def has_all(self, blocks: int) -> bool:
        """Whether the blocks 0 to `blocks` - 1 are all there, by whichever shard."""
        return {block_of(Path(name)) for name in part_names(self.path)}.issuperset(range(blocks))

    def read(self, block: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A part: these columns, or all."""
        return read_part(self.path / PARTS / part_name(block), columns)

    def commit(self, block: int, rows: pa.Table, vectors: pa.Table | None = None, *, backed_off: bool = False) -> None:
        """Write the part of a block, its vectors first: where the part is, all of it is.

        Args:
            backed_off: noted in the part; see `BlockResult`.

        Raises:
            RunError: it cannot be written; nothing of it is left.
        """
        noted = {OWNER: self._owner(block).encode(), **({BACKED_OFF: b"1"} if backed_off else {})}
        rows = rows.replace_schema_metadata({**(rows.schema.metadata or {}), **noted})
        if vectors is not None:
            self._write(self.path / VECTORS / part_name(block), vectors)
        self._write(self.path / PARTS / part_name(block), rows)

    def _write(self, path: Path, table: pa.Table) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with _explained(self.path):
            path.parent.mkdir(exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    pq.write_table(table, file, compression="zstd", write_page_checksum=True)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
                sync_directory(path.parent)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def make_parts(self) -> None:
        """Have a folder of parts, also where no row came of the input."""
        with _explained(self.path):
            (self.path / PARTS).mkdir(exist_ok=True)

    def drop_manifest(self) -> None:
        """Remove a manifest that is no longer true."""
        with _explained(self.path):
            (self.path / MANIFEST).unlink(missing_ok=True)

    def write_manifest(self, text: str) -> None:
        """Write `manifest.json`, the last file of a job."""
        with _explained(self.path):
            yaml_io.write_text(self.path / MANIFEST, text)
            sync_directory(self.path)

    def clear_work(self) -> None:
        """Remove what only an unfinished job needs."""
        shutil.rmtree(self.path / WORK, ignore_errors=True)

    @property
    def plan(self) -> Path:
        """Where this job's plan is kept."""
        return self.path / WORK / f"plan-{self.shard.name}.sqlite"


OWNER = b"nla_hub.job"
"""Metadata of a part: whose it is, so that none of another job is ever taken for this one's."""

BACKED_OFF = b"nla_hub.backed_off"
"""Metadata of a part for which memory did not suffice at the job's batch size."""

COUNTED = ("status", "cosine", "mse", "copy_of", "error")
"""Columns that counts and scores are made of."""


def _said(error: BaseException) -> str:
    return " ".join((error.one_line() if isinstance(error, RunError) else str(error)).split())


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power failure, where the system can do that."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(handle)
    except OSError:  # file systems that know no such thing
        pass
    finally:
        os.close(handle)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say what to do where nothing can be written."""
    try:
        yield
    except (OSError, pa.ArrowException) as cause:
        number = getattr(cause, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            what, advice = "The disk is full", GO_ON
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
            what, advice = "The output directory cannot be written", "name a place with -o that you may write to"
        else:
            what, advice = "The output cannot be written", "see to it, then run the same command again"
        raise RunError(f"{what}: {getattr(cause, 'strerror', None) or cause}.", where=path, next_step=advice) from cause
