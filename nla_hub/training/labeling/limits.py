"""How fast an API is asked: requests and tokens a minute, and the pauses that it asks for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from nla_hub.engines.remote.pace import Batch

LOOK = 0.25
"""Seconds after which a waiting request looks whether the pause has become longer."""


class Pace:
    """Spaces requests evenly, so that no minute holds more than it may.

    Args:
        requests: a minute, over all threads; None: no bound.
        tokens: a minute, of prompts and answers together; None: no bound.
        clock: seconds, monotonic.
    """

    def __init__(
        self, requests: float | None, tokens: float | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_request = 0.0 if requests is None else 60.0 / requests
        self._per_token = 0.0 if tokens is None else 60.0 / tokens
        self._clock = clock
        self._next_request = self._next_token = self._paused = clock()
        self._lock = threading.Lock()

    def wait(self, batch: Batch, tokens: float) -> None:
        """Wait for a turn of so many tokens; raises `Stopped` where the batch ends before."""
        with self._lock:
            start = max(self._clock(), self._next_request, self._next_token)
            self._next_request = start + self._per_request
            self._next_token = start + tokens * self._per_token
        while (rest := max(start, self._paused) - self._clock()) > 0:
            batch.sleep(min(rest, LOOK))
        batch.check()

    def settle(self, expected: float, counted: float | None) -> None:
        """Correct a turn by what the API counted."""
        if counted is not None:
            with self._lock:
                self._next_token += (counted - expected) * self._per_token

    def pause(self, seconds: float) -> None:
        """Let no request begin for so long."""
        with self._lock:
            self._paused = max(self._paused, self._clock() + seconds)
