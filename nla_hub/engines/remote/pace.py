"""How many requests are made at a time, and what ends them: back-pressure, and threads that no error leaves behind."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from typing import TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """The batch that a request belongs to has ended."""


class Gate:
    """How many requests are in flight: halved by a busy server, raised by one for every round that it answers."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(most)
        self._inside = 0
        self._changed = threading.Condition()

    @contextmanager
    def passed(self, batch: Batch) -> Iterator[None]:
        """While open, one of the requests in flight; raises `Stopped` where the batch ends before that."""
        with self._changed:
            while self._inside >= int(self.limit):
                batch.check()
                self._changed.wait(0.1)
            batch.check()
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def lower(self) -> None:
        """The server is busy."""
        with self._changed:
            self.limit = max(1.0, self.limit / 2)

    def raise_slowly(self) -> None:
        """The server answered."""
        with self._changed:
            self.limit = min(float(self.most), self.limit + 1 / self.limit)


class Batch:
    """Requests that are made together and end together."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._open: set[HTTPConnection] = set()
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise `Stopped` where the batch has ended."""
        if self._ended.is_set():
            raise Stopped

    def sleep(self, seconds: float) -> None:
        """Wait, unless the batch ends meanwhile (`Stopped`)."""
        if self._ended.wait(seconds):
            raise Stopped

    @contextmanager
    def using(self, connection: HTTPConnection) -> Iterator[None]:
        """While open, `end` interrupts this connection."""
        with self._lock:
            self._open.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(connection)

    def end(self) -> None:
        """Let no request go on: whoever waits for the server or for a retry stops waiting."""
        self._ended.set()
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            sock = connection.sock
            if sock is not None:
                with suppress(OSError, ValueError):
                    sock.shutdown(socket.SHUT_RDWR)

    def run(self, calls: Sequence[Callable[[Batch], T]], *, threads: int, done: Callable[[int, T], None]) -> None:
        """Make `calls`, each in one of so many threads.

        The first that fails ends the batch, and so does an interrupt; no thread is left then.

        Args:
            done: told the index of each call that succeeded, and its result, in the caller's thread.
        """
        pool = ThreadPoolExecutor(max(1, min(threads, len(calls))), thread_name_prefix="nla-hub-remote")
        try:
            places = {pool.submit(call, self): i for i, call in enumerate(calls)}
            for future in as_completed(places):
                done(places[future], future.result())
        finally:
            self.end()
            pool.shutdown(wait=True, cancel_futures=True)
