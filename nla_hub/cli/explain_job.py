"""What a person sees of a batch job: `nla-hub explain --data` from the command line's words to the final table."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from nla_hub.cli import output
from nla_hub.cli.status_line import StatusLine
from nla_hub.errors import Interrupted
from nla_hub.log import logger
from nla_hub.units import duration

if TYPE_CHECKING:
    from nla_hub.explain.job import Runner
    from nla_hub.explain.opened import OpenedJob
    from nla_hub.explain.progress import JobProgress, JobSummary
    from nla_hub.explain.settings import JobSettings

PLAIN_SECONDS = 30.0
"""Without a terminal: seconds between two lines of progress."""

MANY = 100_000
"""Vectors from which a terminal is asked before they are begun."""

REASONS = 10
"""Kinds of errors that the final table names; the manifest has all."""


def run(
    settings: JobSettings,
    out: Path,
    *,
    workers: int,
    runner: Runner,
    shard: str | None,
    yes: bool,
    as_json: bool,
) -> JobSummary:
    """Run a job and show it.

    Raises:
        Interrupted: after the message that says how to go on. See also `explain.job.run_job`.
    """
    from nla_hub.explain.job import run_job
    from nla_hub.explain.settings import Shard

    line = StatusLine()
    view = _Progress(line, settings.threads if workers == 1 and runner == "local" else None)

    def confirm(opened: OpenedJob) -> None:
        total = opened.dataset.total
        if yes or total is None or total * settings.n < MANY or not (sys.stdin.isatty() and sys.stderr.isatty()):
            return
        if not typer.confirm(f"{total:,} items, {settings.n} sample(s) a vector. Go on?", default=True, err=True):
            raise typer.Abort

    try:
        summary = run_job(
            settings,
            out,
            workers=workers,
            runner=runner,
            shard=None if shard is None else Shard.parse(shard),
            progress=view.show,
            confirm=confirm,
        )
    except Interrupted as stop:
        line.end()
        if as_json:
            output.print_json_lines([to_mapping(stop.done)])
        kept = f"{_rows(stop.done.rows)} {'is' if stop.done.rows == 1 else 'are'} done and kept."
        output.message(f"{kept} The same command goes on:\n  {command()}")
        raise
    finally:
        line.end()
    show(summary, as_json=as_json)
    return summary


def command() -> str:
    """The command that this process was started with, as a shell takes it."""
    return shlex.join(["nla-hub", *sys.argv[1:]])


def _hint(threads: int) -> None:
    import torch

    cores = os.cpu_count() or 1
    if not torch.cuda.is_available() and threads < cores:
        output.message(f"{threads} of {cores} processor cores computes; --workers {cores} uses all of them.")


class _Progress:
    """Where a job stands: a line that is written over, or one every half minute.

    Args:
        threads: of the one worker that computes in this process; None where there are several.
    """

    def __init__(self, line: StatusLine, threads: int | None) -> None:
        self._line = line
        self._threads = threads
        self._told = time.monotonic()

    def show(self, progress: JobProgress) -> None:
        """Tell it, where it is time."""
        if self._threads is not None:
            _hint(self._threads)
            self._threads = None
        if output.progress_wanted():
            self._line.show(progress_line(progress))
        elif time.monotonic() - self._told >= PLAIN_SECONDS:
            self._told = time.monotonic()
            output.message(progress_line(progress))


def progress_line(progress: JobProgress) -> str:
    """Rows, rate, time left, FVE and counts on one line."""
    parts = [f"{progress.rows:,} rows"]
    if progress.total:
        about = "" if progress.exact else "about "
        share = min(progress.rows / progress.total, 1.0)
        parts = [f"{progress.rows:,} of {about}{progress.total:,} rows ({share:.0%})"]
    if progress.rate:
        parts.append(f"{progress.rate:.1f} rows/s")
    if (left := progress.seconds_left) is not None:
        parts.append(f"{duration(left)} left")
    fve = progress.tally.fve()
    parts.append("FVE not measured" if fve.value is None else f"FVE {fve.value:.3f}")
    parts += [f"{name} {count:,}" for name, count in sorted(progress.tally.counts.items())]
    return "  ".join(parts)


def show(summary: JobSummary, *, as_json: bool) -> None:
    """The final table, or its figures as one JSON object."""
    if as_json:
        output.print_json_lines([to_mapping(summary)])
        return
    for name, count in sorted(summary.counts.items()):
        output.print_text(
            f"{name:<10} {count:>12,} {'row ' if count == 1 else 'rows'}  {count / max(summary.rows, 1):7.2%}"
        )
    for fve in summary.fve:
        output.print_text(str(fve))
    cosine = "not measured" if summary.mean_cosine is None else f"{summary.mean_cosine:.3f}"
    output.print_text(f"mean cosine: {cosine}")
    if summary.computed:
        rate = summary.computed / summary.seconds
        output.message(f"{_rows(summary.computed)} in {duration(summary.seconds)}, {rate:.1f} a second.")
    if summary.backed_off:
        output.message(
            f"In {len(summary.backed_off)} blocks memory did not suffice for the batch: their rows are as good, but need "
            "not be the same in every byte as those of another run."
        )
    for reason, count in list(summary.errors.items())[:REASONS]:
        logger.error("%s: %s", "1 row" if count == 1 else f"{count:,} rows", reason)
    if len(summary.errors) > REASONS:
        logger.error("... and %d more reasons (manifest.json)", len(summary.errors) - REASONS)
    if summary.errors:
        output.message("Which rows, and where they come from, stands in the column `error` of the parts.")
    if any("longer than the model reads" in reason for reason in summary.errors):
        output.message("Texts that are too long: --overflow truncate (their beginning) or stride, with another -o.")
    if not summary.rows:
        logger.warning("No row came of this data set: see --positions, and whether it holds anything.")
    if summary.complete:
        output.message(f"All rows are in {summary.path / 'parts'}. To look at them: {report_command(summary.path)}")
    else:
        output.message(f"This shard is done; others have still to do theirs. The rows are in {summary.path / 'parts'}.")


def _rows(n: int) -> str:
    return "1 row" if n == 1 else f"{n:,} rows"


def report_command(path: Path) -> str:
    """The command that makes the report of a job."""
    text = str(path)
    return shlex.join(["nla-hub", "report", f"./{text}" if text.startswith("-") else text])


def to_mapping(summary: JobSummary) -> dict[str, Any]:
    """The summary as JSON has it."""
    fve = [{"baseline": f.baseline, "dataset": f.dataset, "n": f.n, "value": f.value} for f in summary.fve]
    found: dict[str, Any] = {**vars(summary), "path": str(summary.path), "fve": fve}
    parsed: dict[str, Any] = json.loads(json.dumps(found))
    return parsed
