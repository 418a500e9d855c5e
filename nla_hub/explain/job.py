"""A job from its settings to its manifest; `run_job` is the one way in.

One process plans (`plan.py`) and writes (`output.py`), workers compute (`pools.py`, `compute.py`), and `scheduler.py` stands
between them. Whatever ends a job, what was written stays, and the same call goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import nla_hub
from nla_hub.errors import InputError, Interrupted, RunError
from nla_hub.explain.ahead import Ahead
from nla_hub.explain.compute import BlockResult
from nla_hub.explain.copies import fill_copies
from nla_hub.explain.opened import OpenedJob, open_job
from nla_hub.explain.output import BACKED_OFF, COUNTED, LOCK, Output
from nla_hub.explain.plan import Plan, Total
from nla_hub.explain.pools import Inline, Pool, Processes, Terms, require_workers
from nla_hub.explain.progress import JobProgress, JobSummary
from nla_hub.explain.scheduler import Scheduler
from nla_hub.explain.schema import MANIFEST, VERSION
from nla_hub.explain.settings import JobSettings, Shard
from nla_hub.explain.stop import Stop
from nla_hub.explain.tally import BASELINES, Tally
from nla_hub.locks import Lock
from nla_hub.log import logger

Runner = Literal["local", "ray"]

AHEAD = 4
"""Blocks that are planned ahead for each worker process."""


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
    with output, Stop() as stop:
        run = _Run(opened, output, stop, progress)
        try:
            if not run.complete:
                run.work(pool or _pool(runner, workers), 0 if pool is None and workers == 1 else AHEAD * workers)
        except KeyboardInterrupt as cause:
            raise Interrupted(run.summary()) from cause
        summary = run.summary()
        if summary.complete and output.shard.of == 1:
            output.clear_work()
    if stop.wanted and not summary.complete:
        raise Interrupted(summary)
    return summary


def _pool(runner: Runner, workers: int) -> Pool:
    if runner == "ray":
        from nla_hub.explain.distributed import RayPool

        return RayPool(workers)
    return Inline() if workers == 1 else Processes(workers)


class _Run:
    """One run of a job, in a directory that is locked."""

    def __init__(
        self, opened: OpenedJob, output: Output, stop: Stop, progress: Callable[[JobProgress], None] | None
    ) -> None:
        self.opened = opened
        self.output = output
        self.stop = stop
        self.progress = progress
        self.settled = output.claim(opened.config, batch_size=opened.settings.batch_size)
        self.started = time.monotonic()
        self.computed = 0
        self.done: set[int] = set()
        self.total = self._told_total()
        self._recount()
        self.complete = self.total is not None and self.done.issuperset(range(self.total.blocks))
        if self.tally.rows:
            logger.info("%d rows are there already", self.tally.rows)

    def _recount(self) -> None:
        """Count anew what is written, in the order of the blocks."""
        self.tally = Tally(self.opened.reference)
        self.done.clear()
        self.mine = 0  # rows of this shard's blocks, copies included
        self.backed_off: set[int] = set()
        for block, table in self.output.done(COUNTED, vectors=self.opened.settings.keep_vectors):
            if self.total is not None and block >= self.total.blocks:
                continue
            self.done.add(block)
            self.tally.add(table)
            self.mine += len(table) if self.output.shard.owns(block) else 0
            if BACKED_OFF in (table.schema.metadata or {}):
                self.backed_off.add(block)

    def _told_total(self) -> Total | None:
        """What the manifest says; None where there is none, or one that is no longer true."""
        try:
            found = json.loads((self.output.path / MANIFEST).read_text(encoding="utf-8"))
            return Total(int(found["rows"]), int(found["documents"]), int(found["blocks"]))
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return None

    def work(self, pool: Pool, ahead: int) -> None:
        """Compute what is missing and this shard's, until it is there or somebody wants to stop; then finish."""
        opened, output = self.opened, self.output
        output.drop_manifest()
        size = opened.settings.block
        with closing(Plan(output.plan, opened.dataset, opened.make_rows, size, identity=output.identity)) as plan:
            blocks = plan.blocks(
                lambda i: output.shard.owns(i) and i not in self.done, stopped=lambda: self.stop.wanted
            )
            with closing(Ahead(blocks, ahead)) as coming:
                if coming.any():
                    with closing(pool):
                        self._compute(pool, coming, plan)
                coming.raise_failure()
            self.total = plan.total
        if self.total is not None and output.has_all(self.total.blocks):
            self._finish(self.total)

    def _compute(self, pool: Pool, coming: Ahead, plan: Plan) -> None:
        pool.start(Terms(self.opened.settings, self.settled.get("batch_size"), self.opened.from_source))
        self.started = time.monotonic()
        scheduler = Scheduler(
            pool,
            coming,
            self.output,
            self.settled,
            self.stop,
            self._written,
            earlier=not self.tally.counts.keys() <= {"error"},
            width=self.opened.config["d_model"] if self.opened.settings.keep_vectors else None,
        )
        while scheduler.step():
            self._tell(plan)
        self._tell(plan)

    def _written(self, result: BlockResult) -> None:
        self.done.add(result.index)
        self.tally.add(result.rows)
        self.mine += len(result.rows)
        self.computed += len(result.rows)
        if result.backed_off:
            self.backed_off.add(result.index)

    def _tell(self, plan: Plan) -> None:
        if self.progress is None:
            return
        seconds = time.monotonic() - self.started
        total, fraction = plan.total, plan.fraction
        expected = total.rows if total is not None else round(plan.rows / fraction) if fraction and plan.rows else None
        if expected is not None:
            expected = round(expected / self.output.shard.of)
        rate = self.computed / seconds if self.computed else None
        self.progress(JobProgress(self.mine, expected, total is not None, rate, self.tally))

    def _finish(self, total: Total) -> None:
        """Every block is there: fill in the copies and write the manifest."""
        output = self.output
        try:
            lock = Lock(output.path / f"{LOCK}-manifest")
        except RunError:  # another shard has come to the end in the same moment
            return
        with lock:
            output.make_parts()
            fill_copies(output, range(total.blocks), self.opened.settings.block)
            self._recount()
            output.write_manifest(json.dumps(self._manifest(total), indent=1, ensure_ascii=False) + "\n")
            self.complete = True

    def _manifest(self, total: Total) -> dict[str, Any]:
        return {
            "version": VERSION,
            **vars(total),
            **self.tally.to_mapping(),
            "backed_off": sorted(self.backed_off),
            "batch_size": self.settled.get("batch_size"),
            "software": {"nla-hub": nla_hub.__version__, **{name: version(name) for name in ("torch", "transformers")}},
        }

    def summary(self) -> JobSummary:
        """What there is now."""
        return JobSummary(
            path=self.output.path,
            complete=self.complete,
            rows=self.tally.rows,
            total=None if self.total is None else self.total.rows,
            computed=self.computed,
            seconds=time.monotonic() - self.started,
            counts=dict(sorted(self.tally.counts.items())),
            errors=dict(self.tally.errors.most_common()),
            mean_cosine=self.tally.mean_cosine,
            fve=tuple(self.tally.fve(baseline) for baseline in BASELINES),
            backed_off=tuple(sorted(self.backed_off)),
        )
