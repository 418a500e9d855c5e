"""kill -9 at any moment: every row exactly once, bytes as of an undisturbed run, nothing unreadable, nobody left over."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import pytest
from explain_jobs import (
    Fault,
    Job,
    Nursery,
    files,
    leftovers,
    readable,
    rows,
    shared_nursery,
    start_fresh,
    write_documents,
)

OPTIONS = ("-p", "sample:2", "--max-new-tokens", 24, "--keep-vectors")
BLOCK = 8

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture(scope="module")
def nursery() -> Nursery:
    return shared_nursery()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred documents: copies of others and broken lines among them."""
    return write_documents(tmp_path_factory.mktemp("data") / "documents.jsonl", 100)


@pytest.fixture(scope="module")
def whole(nursery: Nursery, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert nursery.run(data, out, *OPTIONS, block=BLOCK).poll() == 4
    found = rows(out)
    assert [row["row"] for row in found] == list(range(len(found)))
    assert len({row["status"] for row in found}) >= 3  # ok, truncated, and null where it is in error
    assert sum(row["copy_of"] is not None for row in found) > 10
    return out


def check(job: Job, *, cluster: bool = False) -> None:
    """What holds of a job that was killed, right after it. The agents of a `cluster` need longer to see that it is gone."""
    assert job.wait() == -signal.SIGKILL, job.said
    assert job.alone(cluster=cluster), f"left over: {job.said}"
    readable(job.out)


def same(out: Path, whole: Path) -> None:
    """Two outputs that are equal in every byte of their rows, and finished."""
    assert files(out) == files(whole)
    assert leftovers(out) == []
    manifests = [json.loads((place / "manifest.json").read_text()) for place in (out, whole)]
    assert manifests[0] == manifests[1]


def moments(whole: Path) -> list[Fault]:
    """Where the job is killed, one after the other."""
    copied = sorted({row["row"] // BLOCK for row in rows(whole) if row["copy_of"] is not None})
    assert copied[0] < 15 < copied[-1]
    return [
        Fault("fsync", "/.job.yaml"),
        Fault("replace", "/job.yaml", after=True),
        Fault("replace", "/job.yaml"),  # with what it settled by itself
        Fault("replace", "vectors/part-000000"),
        Fault("replace", "vectors/part-000002", after=True),  # its vectors are there, its rows not
        Fault("fsync", "parts/.part-000012"),
        Fault("replace", "parts/part-000015", after=True),
        Fault("replace", f"parts/part-{copied[0]:06d}"),  # which was computed before: its copies are filled in
        Fault("fsync", f"parts/.part-{copied[-1]:06d}"),
        Fault("fsync", "/.manifest.json"),
        Fault("replace", "/manifest.json", after=True),  # it is done, and has not tidied up
    ]


def test_killed_in_every_write(nursery: Nursery, data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fresh = start_fresh(data, out, *OPTIONS)
    time.sleep(Random(0).uniform(0.2, 1.2))  # while it imports
    fresh.kill()
    check(fresh)
    before = 0
    for moment in moments(whole):
        job = nursery.start(data, out, *OPTIONS, block=BLOCK, faults=[moment])
        check(job)
        assert job.parts >= before, moment
        before = job.parts
    last = nursery.run(data, out, *OPTIONS, block=BLOCK)
    assert last.poll() == 4, last.said
    same(out, whole)


def test_killed_while_it_plans(nursery: Nursery, tmp_path: Path) -> None:
    data = write_documents(tmp_path / "documents.jsonl", 150, broken=False)
    options = ("-p", "every:9", "--max-new-tokens", 1, "--temperature", 0)
    out, random = tmp_path / "out", Random(1)
    plan = out / "work" / "plan-all.sqlite"
    for _ in range(2):
        job = nursery.start(data, out, *options, "--workers", 2, block=32)
        job.wait_for(lambda workers=job.workers: workers() and plan.is_file(), "the workers and the plan")
        time.sleep(random.uniform(0, 0.3))
        job.kill()
        check(job)
    job = nursery.run(data, out, *options, block=32)
    assert job.poll() == 0, job.said
    assert "damaged" not in job.said
    assert nursery.run(data, tmp_path / "whole", *options, block=32).poll() == 0
    same(out, tmp_path / "whole")


def test_killed_with_its_workers(nursery: Nursery, data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = nursery.start(data, out, *OPTIONS, "--workers", 2, block=BLOCK)
    job.wait_for(lambda: job.parts, "the first part")
    first = job.workers()
    started = set(first)
    assert len(first) == 2
    while first and "is tried again" not in job.said:  # one of them may still be loading: that one is not replaced
        pid = first.pop()
        os.kill(pid, signal.SIGKILL)
        job.wait_for(lambda: job.said.count("was killed by SIGKILL") == 2 - len(first), "the news of it")
    assert "is tried again: The worker process was killed by SIGKILL" in job.said
    job.wait_for(lambda: set(job.workers()) - started, "a new worker")
    job.kill()  # the new worker is importing, the other one computes
    check(job)
    assert 0 < job.parts < len(files(whole)) // 2
    assert nursery.run(data, out, *OPTIONS, block=BLOCK).poll() == 4
    same(out, whole)


# -- the whole of it -------------------------------------------------------------------------------------------


@cache
def _big(root: Path) -> Path:
    return write_documents(root / "documents.jsonl", 1000)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _big(tmp_path_factory.mktemp("big"))


@pytest.fixture(scope="module")
def big_whole(nursery: Nursery, big: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 rows that nobody disturbed."""
    out = tmp_path_factory.mktemp("big-whole") / "out"
    assert nursery.run(big, out, *OPTIONS, block=BLOCK).wait(600) == 4
    assert len(rows(out)) >= 1950
    return out


def _killed_often(
    start: Callable[[list[Fault]], Job], kills: int, seed: int, whole: Path, *, cluster: bool = False
) -> dict[str, int]:
    """Kill a job over and over at random; at the end it is whole. How often in which phase."""
    random, phases = Random(seed), dict.fromkeys(("start", "parts", "copies", "manifest"), 0)
    copied = sorted({row["row"] // BLOCK for row in rows(whole) if row["copy_of"] is not None})
    most = len(list((whole / "parts").iterdir()))
    for left in range(kills, 0, -1):
        if left <= 5:  # at the end: in copies that are filled in, and in the manifest
            phase = "copies" if left > 2 else "manifest"
            job = start([Fault("fsync", "/.manifest.json" if left <= 2 else f"parts/.part-{copied[-left]:06d}")])
        else:
            job = start([])
            goal = job.parts + random.randint(1, 2 * most // kills)
            phase = "parts" if random.random() < 0.6 and goal < most - 12 else "start"
            if phase == "parts":
                job.wait_for(lambda job=job, goal=goal: job.parts >= goal, "parts")
            time.sleep(random.uniform(0, 0.05 if phase == "parts" else 8))
            job.kill()
        phases[phase] += 1
        check(job, cluster=cluster)
        assert not (job.out / "manifest.json").exists()
    job = start([])
    assert job.wait(600) == 4, job.said
    same(job.out, whole)
    return phases


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills(nursery: Nursery, big: Path, big_whole: Path, tmp_path: Path) -> None:
    def start(faults: list[Fault]) -> Job:
        return nursery.start(big, tmp_path / "out", *OPTIONS, "--workers", 3, block=BLOCK, faults=faults)

    phases = _killed_often(start, 50, 2, big_whole)
    print(phases)
    assert sum(phases.values()) == 50
    assert all(phases.values())


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_kills_on_ray(nursery: Nursery, big: Path, big_whole: Path, tmp_path: Path) -> None:
    def start(faults: list[Fault]) -> Job:
        options = ("--workers", 2, "--runner", "ray")
        return nursery.start(big, tmp_path / "out", *OPTIONS, *options, block=BLOCK, faults=faults)

    phases = _killed_often(start, 10, 3, big_whole, cluster=True)
    print(phases)
    assert sum(phases.values()) == 10


@pytest.mark.slow
def test_every_worker_is_killed_once(nursery: Nursery, data: Path, whole: Path, tmp_path: Path) -> None:
    job = nursery.start(data, tmp_path / "out", *OPTIONS, "--workers", 3, block=BLOCK)
    job.wait_for(lambda: job.parts, "the first part")
    for pid in job.workers():
        os.kill(pid, signal.SIGKILL)
    assert job.wait() == 4, job.said
    assert job.said.count("was killed by SIGKILL") >= 2
    assert job.alone()
    same(tmp_path / "out", whole)
