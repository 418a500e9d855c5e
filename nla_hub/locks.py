"""One process at a time in a directory, by a lock of the operating system that ends with its owner, however it ends."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from nla_hub.errors import RunError
from nla_hub.log import logger
from nla_hub.units import duration


@dataclass(frozen=True)
class Owner:
    """Who wrote into a lock file."""

    pid: int
    host: str
    since: float

    @classmethod
    def here(cls) -> Owner:
        """This process, from now on."""
        return cls(os.getpid(), platform.node(), time.time())

    @classmethod
    def read(cls, path: Path) -> Owner | None:
        """The last one to have the lock; None where it let go of it by itself, or nothing can be read."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(int(found["pid"]), str(found["host"]), float(found["since"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, for {duration(time.time() - self.since)}"


class Lock:
    """A lock file that is held until `release`, or until this process ends.

    Args:
        shared: several may hold it at once, as long as all of them ask for it so; the file then names nobody.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self.path = path
        self._handle = os.open(
            path, os.O_CREAT | os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0), 0o644
        )
        if not _locked(self._handle, shared):
            os.close(self._handle)
            owner = Owner.read(path)
            raise RunError(
                f"Another process is working here ({owner or 'just started'}).",
                where=path.parent,
                next_step="wait for it, or end it; a lock whose owner is dead is taken over by itself",
            )
        if not shared:
            if (before := Owner.read(path)) is not None:
                logger.info("%s was left behind by %s, which is gone: taken over", path, before)
            self._write(json.dumps(vars(Owner.here())) + "\n")

    def release(self) -> None:
        """Let go of it; what the file says about its owner is removed first."""
        self._write("")
        os.close(self._handle)

    def _write(self, text: str) -> None:
        # A full disk, or a lock on a file system that cannot be written any more, must not hide what happened before.
        try:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, text.encode(), 0)
        except OSError as cause:
            logger.warning("%s: cannot be written: %s", self.path, cause.strerror)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _locked(handle: int, shared: bool) -> bool:
    """Lock an open file; False where another process holds it. Where the system cannot lock files, all is well."""
    try:
        fcntl: Any = import_module("fcntl")
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as cause:  # some network file systems
        logger.warning("this file system has no locks (%s): nothing keeps a second process out", cause.strerror)
    return True
