"""A job from its settings to its manifest: plan, compute, write, block by block; `run_job` is the one way in.

One process plans and writes, workers compute (`pools.py`). Whatever ends a job, what was written stays, and the same call goes
on.
"""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import nla_hub
from nla_hub.errors import InputError, Interrupted, RunError
from nla_hub.explain.ahead import Ahead
from nla_hub.explain.compute import failed
from nla_hub.explain.copies import fill_copies
from nla_hub.explain.opened import OpenedJob, open_job
from nla_hub.explain.output import BACKED_OFF, COUNTED, LOCK, Output
from nla_hub.explain.plan import Plan, Total
from nla_hub.explain.pools import Broken, Done, Event, Failed, Inline, Pool, Processes, Ready, Terms, require_workers
from nla_hub.explain.rows import Block
from nla_hub.explain.schema import MANIFEST, VERSION
from nla_hub.explain.settings import JobSettings, Shard
from nla_hub.explain.stop import Stop
from nla_hub.explain.tally import Tally
from nla_hub.geometry import FVE, Reference
from nla_hub.locks import Lock
from nla_hub.log import logger

Runner = Literal["local", "ray"]

TRIES = 3
"""Times that a block is tried before its rows are recorded as errors: workers also die for reasons of their own."""

HOPELESS = 2 * TRIES
"""Failures without a single success after which a job ends: the fault is then not in the rows."""

AHEAD = 4
"""Blocks that are planned ahead for each worker."""


@dataclass(frozen=True)
class JobProgress:
    """Where a job stands.

    Attributes:
        rows: done, those of earlier runs included.
        total: rows of the whole job (of this shard: about its part of them); None while nobody knows.
        exact: whether `total` was counted, not reckoned from the part of the input that was read.
        rate: rows a second since this run began to compute; None before.
    """

    rows: int
    total: int | None
    exact: bool
    rate: float | None
    tally: Tally

    @property
    def seconds_left(self) -> float | None:
        """What remains at this rate."""
        if self.total is None or not self.rate:
            return None
        return max(0, self.total - self.rows) / self.rate


@dataclass(frozen=True)
class JobSummary:
    """What a job came to.

    Attributes:
        path: the output directory.
        complete: every row is there and the manifest is written; False of an interrupted job and of a shard that had to leave
            blocks to others.
        rows: rows that are done. total: rows of the whole job, None where the input was not read to its end.
        computed: rows that this run computed, in `seconds`.
        counts: rows of each status, and of "error". errors: their kinds.
        fve: with both baselines, over the rows that are done.
        backed_off: blocks for which memory did not suffice at the job's batch size.
    """

    path: Path
    complete: bool
    rows: int
    total: int | None
    computed: int
    seconds: float
    counts: Mapping[str, int]
    errors: Mapping[str, int]
    mean_cosine: float | None
    fve: tuple[FVE, ...]
    backed_off: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.rows


def run_job(
    settings: JobSettings,
    out: Path,
    *,
    workers: int = 1,
    runner: Runner = "local",
    shard: Shard | None = None,
    progress: Callable[[JobProgress], None] | None = None,
    confirm: Callable[[OpenedJob], None] | None = None,
    pool: Pool | None = None,
) -> JobSummary:
    """Explain a data set into a directory; the same call continues what was interrupted, and returns at once where all is done.

    Args:
        out: the directory; see `schema` for what is in it.
        workers: processes that compute, one a GPU; 1 computes in this process.
        runner: "ray" computes on a Ray cluster.
        shard: this run's part of the blocks. Shards may share `out`, or have their own, whose `parts` are then put together.
        progress: called often.
        confirm: called once, before anything is written for the first time; raises to stop.
        pool: workers of another kind.

    Raises:
        InputError, UnknownNameError: settings or data that cannot be used.
        RunError: `out` is in the way, in use, of another configuration, or cannot be written; nothing could be computed.
        CheckpointError, HubError and their children: see `NLA.from_pretrained`.
        Interrupted: Ctrl-C or SIGTERM, after the blocks in hand were finished; `done` is the JobSummary.
    """
    require_workers(workers)
    if runner not in ("local", "ray"):
        raise InputError("Unknown runner.", got=repr(runner), expected="'local' or 'ray'")
    opened = open_job(settings)
    output = Output(out, shard)
    if confirm is not None and not output.begun:
        confirm(opened)
    with output, Stop() as stop, closing(Plan(output.plan, opened.dataset, opened.make_rows, settings.block)) as plan:
        run = _Run(opened, output, plan, stop, progress, output.claim(opened.config, batch_size=settings.batch_size))
        if not (output.path / MANIFEST).is_file() or run.lacking():
            (output.path / MANIFEST).unlink(missing_ok=True)
            run.compute(pool or _pool(runner, workers), 1 if pool is None and workers == 1 else workers)
            run.finish()
        summary = run.summary()
    if stop.wanted and not summary.complete:
        raise Interrupted(summary)
    return summary


def _pool(runner: Runner, workers: int) -> Pool:
    if runner == "ray":
        from nla_hub.explain.distributed import RayPool

        return RayPool(workers)
    return Inline() if workers == 1 else Processes(workers)


@dataclass
class _Run:
    """One run of a job, in a directory that is locked."""

    opened: OpenedJob
    output: Output
    plan: Plan
    stop: Stop
    progress: Callable[[JobProgress], None] | None
    settled: dict[str, Any]
    retry: deque[Block] = field(default_factory=deque)
    tries: Counter[int] = field(default_factory=Counter)
    succeeded: bool = False
    window: int = 1
    computed: int = 0
    backed_off: set[int] = field(default_factory=set)
    in_hand: int = 0

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.tally = Tally(self.reference)
        found = self.output.done(vectors=self.opened.settings.keep_vectors)
        self.done = set(found)
        for block in sorted(found):
            self.tally.add(found[block])
        self.backed_off = {block for block, table in found.items() if BACKED_OFF in (table.schema.metadata or {})}
        if self.done:
            logger.info("%d rows are there already; going on", self.tally.rows)

    @property
    def reference(self) -> Reference | None:
        """The pair's FVE denominators."""
        return self.opened.reference

    def lacking(self) -> bool:
        """Whether a block of a job that has a manifest is not there any more."""
        total = self._manifest_total()
        return total is None or not self.done.issuperset(range(total.blocks))

    def _manifest_total(self) -> Total | None:
        try:
            found = json.loads((self.output.path / MANIFEST).read_text(encoding="utf-8"))
            return Total(int(found["rows"]), int(found["documents"]), int(found["blocks"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    # -- computing -------------------------------------------------------------------------------------------

    def compute(self, pool: Pool, workers: int) -> None:
        """Compute the blocks that are missing and this shard's, until there are none or somebody wants to stop."""
        shard = self.output.shard
        blocks = self.plan.blocks(lambda i: shard.owns(i) and i not in self.done)
        with _ahead(blocks, 0 if isinstance(pool, Inline) else AHEAD * workers) as ahead:
            first = ahead.take(1, wait=True)
            if not first:
                ahead.raise_failure()
                return
            self.retry.extend(first)  # it waits there until somebody can take it
            with closing(pool):
                settings, from_source = self.opened.settings, self.opened.from_source
                pool.start(Terms(settings, self.settled.get("batch_size"), from_source))
                self.started = time.monotonic()
                while self._step(pool, ahead):
                    self._tell()
            self._tell()
            ahead.raise_failure()

    def _step(self, pool: Pool, ahead: Ahead) -> bool:
        """Hand out work, and take what comes back; False once there is nothing more to do."""
        while pool.idle and not self.stop.wanted and (blocks := self._next(ahead)):
            pool.submit(blocks, self.settled["batch_size"])
            self.in_hand += len(blocks)
        if not self.in_hand and (self.stop.wanted or (ahead.exhausted and not self.retry)):
            return False
        if not pool.alive:
            raise RunError("No worker is left.", next_step="see the messages above; then run the same command again")
        for event in pool.wait(WAIT if self.in_hand or not pool.idle else 0.0):
            self._handle(event, pool)
        return True

    def _next(self, ahead: Ahead) -> list[Block]:
        """What an idle worker gets: new blocks first; then those that failed, one by one, so that each is judged alone."""
        if self.computed == 0 and self.retry and not self.tries:
            return [self.retry.popleft(), *ahead.take(self.window - 1)]
        if blocks := ahead.take(self.window, wait=not self.in_hand and not self.retry):
            return blocks
        return [self.retry.popleft()] if self.retry and ahead.exhausted else []

    def _handle(self, event: Event, pool: Pool) -> None:
        if isinstance(event, Ready):
            self.window = event.window
            if "batch_size" not in self.settled:
                self.settled = self.output.settle(batch_size=event.batch_size)
        elif isinstance(event, Broken):
            logger.error("A worker could not start: %s", event.reason)
            if not pool.alive and not self.succeeded:
                raise RunError(f"No worker could start: {event.reason}", where=self.output.path)
        elif isinstance(event, Done):
            self.in_hand -= len(event.results)
            for result in event.results:
                self.succeeded |= result.computed > 0
                self.output.commit(result.index, result.rows, result.vectors, backed_off=result.backed_off)
                self._count(result.index, result.rows)
                if result.backed_off:
                    self.backed_off.add(result.index)
        else:
            self._failed(event)

    def _count(self, index: int, rows: Any) -> None:
        self.done.add(index)
        self.tally.add(rows)
        self.computed += len(rows)

    def _failed(self, event: Failed) -> None:
        self.in_hand -= len(event.blocks)
        for block in event.blocks:
            self.tries[block.index] += 1
            often = self.tries[block.index] >= TRIES
            if not self.succeeded and (often or self.tries.total() >= HOPELESS):
                raise RunError(
                    f"Nothing could be computed: {event.reason}",
                    where=self.output.path,
                    got=f"{self.tries.total()} failures and no success",
                    next_step="try the pair alone first: nla-hub doctor --nla NAME",
                )
            if not often:
                self.retry.append(block)
                logger.warning("Block %d is tried again: %s", block.index, event.reason)
                continue
            logger.error("Block %d is given up: %s", block.index, event.reason)
            result = failed(block, f"{event.reason} ({TRIES} times)")
            self.output.commit(block.index, result.rows)
            self._count(block.index, result.rows)

    def _tell(self) -> None:
        if self.progress is None:
            return
        seconds = time.monotonic() - self.started
        rate = self.computed / seconds if self.computed else None
        total = self.plan.total
        if total is not None:
            expected: int | None = total.rows
        else:
            fraction, planned = self.plan.fraction, self.plan.rows
            expected = round(planned / fraction) if fraction and planned else None
        shard = self.output.shard
        if expected is not None and shard.of > 1:
            expected = round(expected / shard.of)
        self.progress(JobProgress(self.tally.rows, expected, total is not None, rate, self.tally))

    # -- the end ---------------------------------------------------------------------------------------------

    @property
    def all_there(self) -> bool:
        """Whether every block of the job is written, by this run, earlier ones or other shards."""
        total = self.plan.total
        if total is None:
            return False
        if self.output.shard.of > 1:
            self.done = set(self.output.done(vectors=self.opened.settings.keep_vectors))
        return self.done.issuperset(range(total.blocks))

    def finish(self) -> None:
        """Fill in copies and write the manifest, where every block is there."""
        if not self.all_there:
            return
        total = self.plan.total
        assert total is not None
        try:
            lock = Lock(self.output.path / f"{LOCK}-manifest")
        except RunError:  # another shard has come to the end in the same moment
            return
        with lock:
            fill_copies(self.output, range(total.blocks), self.opened.settings.block)
            self.tally, self.backed_off = Tally(self.reference), set()
            for block in range(total.blocks):
                table = self.output.read(block, COUNTED)
                self.tally.add(table)
                if BACKED_OFF in (table.schema.metadata or {}):
                    self.backed_off.add(block)
            self.output.write_manifest(json.dumps(self._manifest(total), indent=1, ensure_ascii=False) + "\n")
        (self.output.path / f"{LOCK}-manifest").unlink(missing_ok=True)
        if self.output.shard.of == 1:
            self.output.clear_work()

    def _manifest(self, total: Total) -> dict[str, Any]:
        return {
            "version": VERSION,
            **vars(total),
            **self.tally.to_mapping(),
            "backed_off": sorted(self.backed_off),
            "batch_size": self.settled.get("batch_size"),
            "software": {"nla-hub": nla_hub.__version__, **_versions()},
        }

    def summary(self) -> JobSummary:
        """What there is now."""
        complete = (self.output.path / MANIFEST).is_file()
        total = self.plan.total or (self._manifest_total() if complete else None)
        mapping = self.tally.to_mapping()
        return JobSummary(
            path=self.output.path,
            complete=complete,
            rows=self.tally.rows,
            total=None if total is None else total.rows,
            computed=self.computed,
            seconds=time.monotonic() - self.started,
            counts=mapping["counts"],
            errors=mapping["errors"],
            mean_cosine=self.tally.mean_cosine,
            fve=tuple(self.tally.fve(baseline) for baseline in ("raw_variance", "mean_norm")),
            backed_off=tuple(sorted(self.backed_off)),
        )


WAIT = 0.5
"""Seconds after which progress is told even where nothing happened."""


@contextmanager
def _ahead(blocks: Iterator[Block], depth: int) -> Iterator[Ahead]:
    ahead = Ahead(blocks, depth)
    try:
        yield ahead
    finally:
        ahead.close()


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers")}
