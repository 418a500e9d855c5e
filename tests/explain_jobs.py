"""Batch jobs in processes of their own that a test may kill, stop and starve, and what must hold of what they leave.

    python tests/explain_jobs.py        the nursery: forks a job for each line of its stdin

A process of this machine needs seconds to import torch. The nursery does that once; each job is a fork of it in a session
of its own, runs the command `nla-hub` as a shell would, and may carry a fault: an act at its k-th call of a function of
`os`. Workers of a job are started by the job itself, as always.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "COLUMNS": "120",
}
PATIENCE = 120.0
"""Seconds after which something that a test waits for will not happen any more."""


# -- what a job leaves -----------------------------------------------------------------------------------------


def files(out: Path) -> dict[str, bytes]:
    """The parts and vectors of a job by name."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("*/part-*.parquet"))}


def readable(out: Path) -> int:
    """Read every part that is there; raises what pyarrow raises. The number of rows."""
    return sum(pq.read_table(path).num_rows for path in out.glob("*/part-*.parquet") if path.parent.name == "parts")


def rows(out: Path) -> list[dict[str, Any]]:
    """All rows, in the order of the parts."""
    return [row for path in sorted((out / "parts").glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def leftovers(out: Path) -> list[str]:
    """Files that a finished job has no use for."""
    return [
        str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and (p.suffix == ".tmp" or "work" in p.parts)
    ]


def session_members(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, its_session = stat.read_text(encoding="latin-1").rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def wait_until(condition: Callable[[], Any], what: Callable[[], str], seconds: float = PATIENCE) -> Any:
    """The first true value of a condition."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what()}"
        time.sleep(0.005)
    return value


# -- data ------------------------------------------------------------------------------------------------------


def write_documents(path: Path, n: int, *, seed: int = 7, broken: bool = True) -> Path:
    """`n` lines of JSON: documents of the tiny world, every fifth the copy of one before; `broken` puts errors between."""
    from nla_hub.tiny import documents

    contents = [document.content for document in documents(n, seed, "train")]
    lines = []
    for i, content in enumerate(contents):
        if i % 5 == 4:
            content = contents[i // 3]
        lines.append(json.dumps({"text": content} if isinstance(content, str) else {"messages": content}))
        if broken and i % 40 == 20:
            lines[-1] = ("not JSON", '{"text": ""}', '{"text": 7}')[i // 40 % 3]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# -- faults ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """An act at the `k`-th call of `os.call` that names a path with `match` in it.

    Attributes:
        call: "replace", "fsync", "open", ...
        after: whether the call is made first.
        send: signal to this process; `group`: to the whole session, as a terminal does.
        remove: path that is deleted instead.
    """

    call: str
    match: str
    k: int = 1
    after: bool = False
    send: int = signal.SIGKILL
    group: bool = False
    remove: str | None = None

    def install(self) -> None:
        """Make `os.call` of this process do it."""
        real = getattr(os, self.call)
        seen = 0

        def call(*args: Any, **keywords: Any) -> Any:
            nonlocal seen
            place = f"/proc/self/fd/{args[0]}" if isinstance(args[0], int) else None
            name = os.readlink(place) if place else " ".join(str(arg) for arg in args if isinstance(arg, (str, Path)))
            seen += self.match in name
            now = self.match in name and seen == self.k
            if now and not self.after:
                self._act()
            result = real(*args, **keywords)
            if now and self.after:
                self._act()
            return result

        setattr(os, self.call, call)

    def _act(self) -> None:
        if self.remove is not None:
            Path(self.remove).unlink()
        elif self.group:
            os.killpg(0, self.send)
        else:
            os.kill(os.getpid(), self.send)


# -- jobs ------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A job that was started: its process is the leader of a session.

    Attributes:
        poll: its exit code, negative for the signal that ended it; None while it runs.
    """

    pid: int
    out: Path
    log: Path
    poll: Callable[[], int | None]

    @property
    def said(self) -> str:
        """What it wrote to stdout and stderr."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""

    @property
    def parts(self) -> int:
        """Parts that are there."""
        return len(list((self.out / "parts").glob("part-*.parquet")))

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            assert time.monotonic() < end, f"the job did not end in {seconds} s:\n{self.said}"
            time.sleep(0.01)
        return code

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        """The first true value of a condition while the job runs."""
        wait_until(lambda: condition() or self.poll() is not None, lambda: f"{what}\n{self.said}")
        found = condition()
        assert found, f"the job ended before {what}:\n{self.said}"
        return found

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal the job's own process."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Signal the job and all that it started, as a terminal does."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def workers(self) -> list[int]:
        """Its processes besides itself that compute: of its own, and actors of Ray."""
        found = []
        for pid in session_members(self.pid):
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if pid != self.pid and (b"spawn_main" in command or b"::_Actor" in command):
                    found.append(pid)
        return found

    def alone(self, seconds: float = 90.0, *, cluster: bool = False) -> bool:
        """Whether nothing that it started is left; of a `cluster` that was killed, nothing that computes."""

        def left() -> list[int]:
            return self.workers() if cluster else session_members(self.pid)

        with suppress(AssertionError):
            return bool(wait_until(lambda: not left(), lambda: "leftover processes", seconds))
        return False

    def end(self) -> None:
        """End whatever is left of it."""
        for pid in session_members(self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Nursery:
    """Starts jobs."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )

    def close(self) -> None:
        """End it, and what is left of its jobs."""
        for job in self.jobs:
            job.end()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        data: Path | str,
        out: Path,
        *options: object,
        block: int = 16,
        faults: Iterable[Fault] = (),
        limit: int | None = None,
        log: Path | None = None,
        site: Path | None = None,
    ) -> Job:
        """Start `nla-hub explain --data data -o out`.

        Args:
            block: rows of a block.
            limit: bytes that a file of its may have.
            log: what it says; beside `out` by default.
            site: a directory with plug-ins.
        """
        log = log or out.with_name(f"{out.name}.log-{len(self.jobs)}")
        request = {
            "arguments": ["explain", "--data", str(data), "-o", str(out), *map(str, options)],
            "block": block,
            "faults": [vars(fault) for fault in faults],
            "log": str(log),
            "limit": limit,
            "site": None if site is None else str(site),
        }
        pid = self._ask(request)
        ended: list[int] = []

        def poll() -> int | None:
            if not ended and (code := self._ask({"poll": pid})) is not None:
                ended.append(code)
            return ended[0] if ended else None

        job = Job(pid, out, log, poll)
        self.jobs.append(job)
        return job

    def run(self, data: Path | str, out: Path, *options: object, **keywords: Any) -> Job:
        """Start a job and wait for its end."""
        job = self.start(data, out, *options, **keywords)
        job.wait()
        return job


@cache
def shared_nursery() -> Nursery:
    """One for all tests of a session."""
    found = Nursery()
    atexit.register(found.close)
    return found


def start_fresh(data: Path, out: Path, *options: object) -> Job:
    """Start a job in a process that has imported nothing yet."""
    log = out.with_name(f"{out.name}.log-fresh-{time.monotonic_ns()}")
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "nla_hub", "explain", "--data", str(data), "-o", str(out), *map(str, options)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
    return Job(process.pid, out, log, process.poll)


# -- the nursery -----------------------------------------------------------------------------------------------


def _become_a_job(request: Mapping[str, Any]) -> None:
    """Run the command of a request in this process, which is a fork."""
    os.setsid()
    handle = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for stream, target in ((nothing, 0), (handle, 1), (handle, 2)):
        os.dup2(stream, target)
    os.close(handle)
    os.close(nothing)
    if request["limit"] is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    _set_block(request["block"])
    for fault in request["faults"]:
        Fault(**fault).install()
    if request["site"] is not None:
        from nla_hub import registry

        sys.path.insert(0, request["site"])
        registry.refresh()
    sys.argv = ["nla-hub", *request["arguments"]]
    from nla_hub.cli.app import main

    main()


def _set_block(rows_of_a_block: int) -> None:
    """Make small blocks the default, which the command has no option for."""
    import inspect

    from nla_hub.explain.settings import JobSettings

    initial: Any = JobSettings.__init__
    optional = [p for p in inspect.signature(initial).parameters.values() if p.default is not p.empty]
    initial.__defaults__ = tuple(rows_of_a_block if p.name == "block" else p.default for p in optional)


def _poll(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _end(code: object) -> None:
    """End this process with all that a Python process does then, save for the seconds that it spends on its modules."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def nursery() -> None:
    """Load what every job loads, then fork one for each line of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    import nla_hub.cli.app
    import nla_hub.explain.job
    from nla_hub.explain.settings import PairSettings

    assert nla_hub.cli.app
    assert nla_hub.explain.job
    torch.set_num_threads(1)
    with PairSettings().load() as pair:
        pair.explain("today otto came", max_new_tokens=2)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            answer = _poll(request["poll"])
        elif not (answer := os.fork()):
            answers.close()
            try:
                _become_a_job(request)
            except SystemExit as ended:
                _end(ended.code)
            except BaseException:
                traceback.print_exc()
                _end(99)
            _end(0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    nursery()
