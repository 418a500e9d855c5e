"""Blocks to workers and results back, until there are none: who gets what, and what happens to a block that fails."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from nla_hub.errors import InputError, RunError
from nla_hub.explain.ahead import Ahead
from nla_hub.explain.compute import BlockResult, failed
from nla_hub.explain.output import Output
from nla_hub.explain.pools import Broken, Done, Event, Failed, Pool, Ready
from nla_hub.explain.rows import Block
from nla_hub.explain.stop import Stop
from nla_hub.log import logger

TRIES = 3
"""Times that a block is tried before its rows are recorded as errors: workers also die for reasons of their own."""

HOPELESS = 2 * TRIES
"""Failures in a row, for each worker, after which a job ends: the fault is then not in the rows."""

WAIT = 0.5
"""Seconds after which progress is told even where nothing happened."""


class Scheduler:
    """Hands out the blocks of one run of a job, and writes what comes back.

    Args:
        settled: what the job settled when it first started; `batch_size` is added where it is not there.
        written: called with each result that was written.
        earlier: an earlier run of this job computed something, so the pair is known to work with these data.
        width: of the vectors, where they are kept.
    """

    def __init__(
        self,
        pool: Pool,
        ahead: Ahead,
        output: Output,
        settled: dict[str, Any],
        stop: Stop,
        written: Callable[[BlockResult], None],
        *,
        earlier: bool = False,
        width: int | None = None,
    ) -> None:
        self._pool = pool
        self._ahead = ahead
        self._output = output
        self._settled = settled
        self._stop = stop
        self._written = written
        self._earlier = earlier
        self._width = width
        self._retry: deque[Block] = deque()
        self._tries: Counter[int] = Counter()
        self._succeeded = False
        self._failures = 0
        self._window = 1
        self._in_hand = 0

    def step(self) -> bool:
        """Hand out work, and take what comes back; False once there is nothing more to do.

        Raises:
            RunError: nothing can be computed, or not be written.
        """
        pool, stop = self._pool, self._stop
        while pool.idle and not stop.wanted and (blocks := self._next()):
            pool.submit(blocks, self._settled["batch_size"])
            self._in_hand += len(blocks)
        if not self._in_hand and (stop.wanted or (self._ahead.exhausted and not self._retry)):
            return False
        if not pool.alive:
            raise RunError("No worker is left.", next_step="see the messages above; then run the same command again")
        for event in pool.wait(WAIT if self._in_hand or not pool.idle else 0.0):
            self._handle(event)
        return True

    def _next(self) -> list[Block]:
        """What an idle worker gets: new blocks first; then those that failed, one by one, so that each is judged alone."""
        if self._retry and self._earlier and not self._succeeded:  # all that is left may be what always fails
            return [self._retry.popleft()]
        if blocks := self._ahead.take(self._window, wait=not self._in_hand and not self._retry):
            return blocks
        return [self._retry.popleft()] if self._retry and self._ahead.exhausted else []

    def _handle(self, event: Event) -> None:
        if isinstance(event, Ready):
            self._window = event.window
            if "batch_size" not in self._settled:
                self._settled |= self._output.settle(batch_size=event.batch_size)
        elif isinstance(event, Broken):
            logger.error("A worker could not start: %s", event.reason)
            if not self._pool.alive and not self._succeeded:
                raise RunError(
                    f"No worker could start: {event.reason}",
                    where=self._output.path,
                    next_step="try the pair alone: nla-hub doctor --nla NAME",
                )
        elif isinstance(event, Done):
            self._in_hand -= len(event.results)
            for result in event.results:
                self._write(result)
                if result.computed:
                    self._succeeded, self._failures = True, 0
        else:
            self._failed(event)

    def _write(self, result: BlockResult) -> None:
        self._output.commit(result.index, result.rows, result.vectors, backed_off=result.backed_off)
        self._written(result)

    def _failed(self, event: Failed) -> None:
        if event.refused:
            raise InputError(event.reason, next_step="change what was asked for, and name another place with -o")
        self._in_hand -= len(event.blocks)
        self._failures += bool(event.blocks)
        works = self._succeeded or self._earlier
        for block in event.blocks:
            self._tries[block.index] += 1
            often = self._tries[block.index] >= TRIES
            if (often and not works) or self._failures >= HOPELESS * max(1, self._pool.alive):
                raise RunError(
                    f"{'Nothing more' if works else 'Nothing'} could be computed: {event.reason}",
                    where=self._output.path,
                    got=f"{self._failures} failures in a row",
                    next_step="try the pair alone (nla-hub doctor --nla NAME), then run the same command again",
                )
            if often:
                logger.error("Block %d is given up: %s", block.index, event.reason)
                self._write(failed(block, f"{event.reason} ({TRIES} times)", width=self._width))
                self._failures = 0
            else:
                self._retry.appendleft(block)
                logger.warning("Block %d is tried again: %s", block.index, event.reason)
