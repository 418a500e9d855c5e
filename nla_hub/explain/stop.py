"""Ctrl-C and SIGTERM: the first asks to finish what is in hand, the second means now."""

from __future__ import annotations

import signal
import threading
from typing import Any

from nla_hub.log import logger

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """While entered, the first signal sets `wanted`; the next one raises KeyboardInterrupt.

    Signals belong to the main thread: entered in another one, this does nothing.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._asked) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: object) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        logger.info("Stopping: the blocks in hand are finished first. Once more drops them.")
