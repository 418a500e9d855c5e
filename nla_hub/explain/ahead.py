"""A generator that works ahead in a thread, so that nobody waits for the next block; never further than told."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator

from nla_hub.explain.rows import Block


class Ahead:
    """Blocks from a generator, at most `depth` of them at hand before they are asked for; 0 makes each when it is taken."""

    def __init__(self, blocks: Generator[Block, None, None], depth: int) -> None:
        self._blocks = blocks
        self._depth = depth
        self._ready: deque[Block] = deque()
        self._ended = False
        self._closed = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        if depth:
            self._thread = threading.Thread(target=self._work, name="plan", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
                if self._closed:
                    return
            self._append(self._make())
            if self._ended:
                return

    def _append(self, block: Block | None) -> None:
        with self._changed:
            if block is not None:
                self._ready.append(block)
            self._ended = block is None
            self._changed.notify_all()

    def _make(self) -> Block | None:
        try:
            return next(self._blocks, None)
        except Exception as error:
            self._failure = error
            return None

    @property
    def exhausted(self) -> bool:
        """Whether no block will come any more."""
        with self._changed:
            return self._ended and not self._ready

    def any(self) -> bool:
        """Whether there is a block; waits until that is known."""
        if self._thread is None and not self._ready and not self._ended:
            self._append(self._make())
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended)
            return bool(self._ready)

    def take(self, n: int, *, wait: bool = False) -> list[Block]:
        """Up to `n` blocks that are at hand; with `wait` at least one, unless there is none any more."""
        taken: list[Block] = []
        while len(taken) < n and (self._ready or ((self._thread is None or (wait and not taken)) and self.any())):
            with self._changed:
                taken.append(self._ready.popleft())
                self._changed.notify_all()
        return taken

    def raise_failure(self) -> None:
        """Raise what ended the generator, where that was an error."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Stop; the generator is closed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._blocks.close()
