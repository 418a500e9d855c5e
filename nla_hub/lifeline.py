"""A process that ends with the one that started it, however that ended, also while it still imports.

It stands in a module of its own, which imports nothing: a new process is tied before it loads torch.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any


def tied(life: Connection, module: str, function: str, *args: Any) -> None:
    """Call a function of a module; end this process as soon as the other end of `life` is closed."""
    threading.Thread(target=_watch, args=(life,), daemon=True).start()
    getattr(import_module(module), function)(*args)


def _watch(life: Connection) -> None:
    with suppress(EOFError, OSError):
        life.recv_bytes()
    os._exit(1)
