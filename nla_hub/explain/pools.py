"""Who computes the blocks: this process, or several on this machine. A cluster's pool is in `distributed.py`.

A pool is asked for one thing at a time by the one process that plans and writes. Its workers see blocks and return results:
they know no file of the job, so one that is killed leaves nothing behind.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, resource_tracker
from typing import Any, Protocol

import torch

from nla_hub.errors import InputError, NLAError
from nla_hub.explain.compute import BlockResult, BlockWorker, batch_size_for, window
from nla_hub.explain.rows import Block
from nla_hub.explain.settings import JobSettings
from nla_hub.explain.stop import SIGNALS
from nla_hub.lifeline import tied
from nla_hub.log import logger
from nla_hub.nla import NLA


@dataclass(frozen=True)
class Terms:
    """What a worker has to know of a job.

    Attributes:
        batch_size: rows that the engine runs together; None lets the worker say what fits.
        from_source: see `BlockWorker`.
    """

    settings: JobSettings
    batch_size: int | None
    from_source: bool = False


@dataclass(frozen=True)
class Ready:
    """A worker has loaded the pair: what fits into its memory, and how many blocks it wants at once."""

    batch_size: int
    window: int


@dataclass(frozen=True)
class Done:
    """Blocks that were computed."""

    results: tuple[BlockResult, ...]


@dataclass(frozen=True)
class Failed:
    """Blocks that were not: the computation raised an error, or (`died`) took its process with it.

    `refused`: what was asked for cannot be done with this pair, whatever the rows.
    """

    blocks: tuple[Block, ...]
    reason: str
    died: bool = False
    refused: bool = False


@dataclass(frozen=True)
class Broken:
    """A worker that could not start at all."""

    reason: str


Event = Ready | Done | Failed | Broken


class Pool(Protocol):
    """Workers."""

    @property
    def idle(self) -> int:
        """Workers that are ready and have nothing to do."""

    @property
    def alive(self) -> int:
        """Workers that work, can work, or are coming up."""

    def start(self, terms: Terms) -> None:
        """Bring the workers up; each reports `Ready`."""

    def submit(self, blocks: Sequence[Block], batch_size: int) -> None:
        """Give work to an idle worker."""

    def wait(self, seconds: float) -> list[Event]:
        """What happened, after `seconds` at most."""

    def close(self) -> None:
        """End all workers; what they have in hand is lost."""


class Worker:
    """A loaded pair that computes blocks, in whatever process."""

    def __init__(self, terms: Terms) -> None:
        torch.set_num_threads(terms.settings.threads)
        self.terms = terms
        self.nla: NLA = terms.settings.pair.load()

    def ready(self) -> Ready:
        """What it can take."""
        settings = self.terms.settings
        rows = self.terms.batch_size or settings.batch_size or batch_size_for(self.nla, settings)
        return Ready(rows, window(self.nla, settings))

    def run(self, blocks: Sequence[Block], batch_size: int) -> Done | Failed:
        """Compute; an error that is not the caller's interruption becomes a `Failed`."""
        worker = BlockWorker(self.nla, self.terms.settings, batch_size, self.terms.from_source)
        try:
            return Done(tuple(worker.run(blocks)))
        except Exception as error:
            logger.debug("block %d failed", blocks[0].index, exc_info=True)
            return Failed(tuple(blocks), reason_of(error), refused=isinstance(error, InputError))

    def close(self) -> None:
        """Stop what the engine runs."""
        self.nla.close()


def reason_of(error: Exception) -> str:
    """An error on one line."""
    if isinstance(error, NLAError):
        return error.one_line()
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


class Inline:
    """One worker: this process."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._threads = torch.get_num_threads()
        self._events: list[Event] = []
        self._next: tuple[Sequence[Block], int] | None = None

    def start(self, terms: Terms) -> None:
        """See `Pool.start`; raises what loading the pair raises."""
        self._worker = Worker(terms)
        self._events.append(self._worker.ready())

    @property
    def idle(self) -> int:
        """See `Pool.idle`."""
        return int(self._worker is not None and self._next is None and not self._events)

    @property
    def alive(self) -> int:
        """See `Pool.alive`."""
        return int(self._worker is not None)

    def submit(self, blocks: Sequence[Block], batch_size: int) -> None:
        """See `Pool.submit`; the work is done in `wait`."""
        self._next = blocks, batch_size

    def wait(self, seconds: float) -> list[Event]:
        """See `Pool.wait`."""
        if self._next is not None and self._worker is not None:
            (blocks, batch_size), self._next = self._next, None
            self._events.append(self._worker.run(blocks, batch_size))
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """See `Pool.close`."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        torch.set_num_threads(self._threads)


# -- several processes -----------------------------------------------------------------------------------------


PARTING = 10.0
"""Seconds that an idle worker has to end by itself."""


@dataclass
class _Process:
    """A worker process, as its employer sees it."""

    process: Any
    pipe: connection.Connection
    life: connection.Connection
    gpu: str | None
    work: tuple[Block, ...] = ()
    ready: bool = False


class Processes:
    """`n` processes on this machine: one a GPU, where there are any, else shares of the processor.

    A process that dies is replaced, and what it had is reported as `Failed`.
    """

    def __init__(self, n: int) -> None:
        self._places = places(n)
        self._terms: Terms | None = None
        self._workers: list[_Process] = []

    def start(self, terms: Terms) -> None:
        """See `Pool.start`."""
        self._terms = terms
        for gpu in self._places:
            self._workers.append(self._hired(gpu))

    def _hired(self, gpu: str | None) -> _Process:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        watched, life = context.Pipe(duplex=False)
        process = context.Process(target=tied, args=(watched, __name__, "serve", theirs), daemon=True)
        with _environment(gpu, self._terms), _undisturbed():
            process.start()
        theirs.close()
        watched.close()
        with suppress(OSError):  # it is dead: `wait` will find that
            ours.send(self._terms)
        return _Process(process, ours, life, gpu)

    @property
    def idle(self) -> int:
        """See `Pool.idle`."""
        return sum(worker.ready and not worker.work for worker in self._workers)

    @property
    def alive(self) -> int:
        """See `Pool.alive`."""
        return len(self._workers)

    def submit(self, blocks: Sequence[Block], batch_size: int) -> None:
        """See `Pool.submit`."""
        worker = next(w for w in self._workers if w.ready and not w.work)
        worker.work = tuple(blocks)
        with suppress(OSError):  # it is dead: `wait` will find that
            worker.pipe.send((worker.work, batch_size))

    def wait(self, seconds: float) -> list[Event]:
        """See `Pool.wait`."""
        by_pipe: dict[Any, _Process] = {worker.pipe: worker for worker in self._workers}
        events: list[Event] = []
        for pipe in connection.wait(list(by_pipe), timeout=seconds):
            worker = by_pipe[pipe]
            try:
                event: Event = worker.pipe.recv()
            except (EOFError, OSError):
                events.append(self._replaced(worker))
                continue
            if isinstance(event, Broken):
                self._workers.remove(worker)
                worker.process.join()
                _dismiss(worker)
            worker.ready = True
            worker.work = ()
            events.append(event)
        return events

    def _replaced(self, worker: _Process) -> Event:
        worker.process.join()
        reason = _ending(worker.process.exitcode)
        _dismiss(worker)
        if not worker.ready:
            self._workers.remove(worker)
            return Broken(f"The process {reason} while it loaded the pair.")
        self._workers[self._workers.index(worker)] = self._hired(worker.gpu)
        return Failed(worker.work, f"The worker process {reason}.", died=True)

    def close(self) -> None:
        """See `Pool.close`."""
        for worker in self._workers:
            if worker.ready and not worker.work:
                worker.pipe.close()  # it ends by itself then, and gives back what it holds
            else:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(PARTING)
            worker.process.kill()
            worker.process.join()
            _dismiss(worker)
        self._workers = []


def _dismiss(worker: _Process) -> None:
    worker.pipe.close()
    worker.life.close()
    worker.process.close()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"


def places(n: int) -> list[str | None]:
    """Where `n` workers compute: CUDA_VISIBLE_DEVICES of each, None on the processor.

    Raises:
        InputError: fewer GPUs than workers.
    """
    named = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    there = named or [str(i) for i in range(torch.cuda.device_count())]
    if not torch.cuda.is_available() or not there:
        return [None] * n
    if n > len(there):
        raise InputError(
            "One worker takes one GPU.", got=f"{n} workers, {len(there)} GPUs", next_step=f"--workers {len(there)}"
        )
    return list(there[:n])


class _environment:
    """What a new process finds in its environment: its GPU, and how many threads its libraries may start."""

    def __init__(self, gpu: str | None, terms: Terms | None) -> None:
        self._new = {"OMP_NUM_THREADS": str(terms.settings.threads)} if terms is not None else {}
        if gpu is not None:
            self._new["CUDA_VISIBLE_DEVICES"] = gpu

    def __enter__(self) -> None:
        self._old = {key: os.environ.get(key) for key in self._new}
        os.environ.update(self._new)

    def __exit__(self, *_: object) -> None:
        for key, value in self._old.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A process that is started here gets no signal of `SIGNALS` before it has decided what becomes of them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # else starting a process starts it first, and that lets the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(pipe: connection.Connection) -> None:
    """The life of a worker process: take the terms, load the pair, then compute what comes, until the employer is gone."""
    for number in SIGNALS:  # they reach all processes of a terminal or a batch system; the employer decides
        signal.signal(number, signal.SIG_IGN)
    try:
        worker = Worker(pipe.recv())
        pipe.send(worker.ready())
    except Exception as error:
        pipe.send(Broken(reason_of(error)))
        return
    while True:
        try:
            blocks, batch_size = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(worker.run(blocks, batch_size))


def require_workers(n: int) -> None:
    """Raise an InputError for a number of workers that is none."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError("workers is a whole number from 1 up.", got=repr(n))
