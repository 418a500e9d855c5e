"""`nla-hub push` as processes of their own, which a test can kill: forks of one process that has imported everything.

with start(world, home, tmp_path, PAIR, "--repo", "owner/x", "--yes") as job: ...
python push_jobs.py     the process that forks, one a line of stdin
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_world import HubWorld, connected

PATIENCE = 120.0


@dataclass
class Job:
    """A push under way, or one that has ended."""

    pid: int
    output: Path
    nursery: Nursery
    code: int | None = None

    def wait(self) -> int:
        """Its exit code; minus the signal for one that was killed."""
        end = time.monotonic() + PATIENCE
        while self.code is None:
            self.code = self.nursery.ask({"poll": self.pid})
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)
        return self.code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def interrupt(self) -> int:
        os.kill(self.pid, signal.SIGINT)
        return self.wait()

    def printed(self) -> str:
        """What stands on its stdout."""
        return self.output.read_text()

    def said(self) -> str:
        """What stands on its stderr."""
        return self.output.with_suffix(".err").read_text()


class Nursery:
    """Starts pushes."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def ask(self, request: Mapping[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@cache
def nursery() -> Nursery:
    """One for all tests of a session."""
    found = Nursery()
    atexit.register(found.close)
    return found


def start(world: HubWorld, folder: Path, *arguments: object, locked: Path | None = None) -> Job:
    """Start `nla-hub push ARGUMENTS` against a Hub; its home and what it prints lie in `folder`.

    Args:
        locked: a read-only directory that is home, working directory and place for temporary files. Permissions bind the push
            then even where it is root's, and whatever Python would write anywhere is an error.
    """
    output = folder / f"push-{time.monotonic_ns()}.out"
    request = {
        "arguments": [*map(str, arguments)],
        "url": world.url,
        "home": str(folder / "home"),
        "output": str(output),
        "locked": None if locked is None else str(locked),
    }
    return Job(nursery().ask(request), output, nursery())


def run(world: HubWorld, folder: Path, *arguments: object, locked: Path | None = None) -> Job:
    """A push that has ended."""
    job = start(world, folder, *arguments, locked=locked)
    job.wait()
    return job


# -- the process that forks --------------------------------------------------------------------------------------


def become(request: Mapping[str, Any]) -> None:
    """Run the command of a request in this process, which is a fork."""
    os.setsid()
    output = Path(request["output"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for path, target in ((output, 1), (output.with_suffix(".err"), 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), target)
    hub: Any = SimpleNamespace(url=request["url"])
    hub.settings = partial(HubWorld.settings, hub)
    connected(hub, pytest.MonkeyPatch(), Path(request["home"]))
    sys.argv = ["nla-hub", "push", *request["arguments"]]
    from nla_hub.cli.app import main

    if request["locked"] is not None:
        lock(Path(request["locked"]))
    main()


def lock(place: Path) -> None:
    """From now on this process writes nothing but its standard streams."""
    os.chdir(place)
    os.environ |= {"HOME": str(place), "HF_HOME": str(place), "TMPDIR": str(place)}
    tempfile.tempdir = str(place)
    give_up_capabilities()
    for attempt in (lambda: (place / "x").touch(), lambda: (place / "pair").rename(place / "y")):
        try:
            attempt()
        except PermissionError:
            continue
        raise AssertionError(f"{place} is not read-only at all")
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & writes and not str(arguments[0]).startswith("/dev/"):
            raise AssertionError(f"opened for writing: {arguments}")
        if event in CHANGES or event.startswith(("shutil.", "tempfile.")):
            raise AssertionError(f"{event}: {arguments}")

    sys.addaudithook(watch)


CHANGES = {
    f"os.{what}" for what in ("mkdir", "rename", "remove", "rmdir", "link", "symlink", "truncate", "chmod", "utime")
}


def give_up_capabilities() -> None:
    """What lets root write where it may not: CAP_DAC_OVERRIDE (1) and CAP_DAC_READ_SEARCH (2); see capset(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    for field in range(3):
        data[field] &= ~0b110
    assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())


def poll(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def end(code: object) -> None:
    """End this process with all that a Python process does then, save for the seconds that it spends on its modules."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def serve() -> None:
    """Load what every push loads, then fork one for each line of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    import nla_hub.cli.app
    import nla_hub.publish.prepare
    from nla_hub import NLA

    assert nla_hub.cli.app and nla_hub.publish.prepare
    torch.set_num_threads(1)
    with NLA.from_pretrained("tiny") as pair:
        pair.explain("today otto came", max_new_tokens=2)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            answer = poll(request["poll"])
        elif not (answer := os.fork()):
            answers.close()
            try:
                become(request)
            except SystemExit as ended:
                end(ended.code)
            except BaseException:
                traceback.print_exc()
                end(99)
            end(0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
