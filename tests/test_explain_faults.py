"""Full disks, vanished and poisoned inputs, two jobs in one place, Ctrl-C: what can be done is done, and nothing is damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
from plugin_site import install_module

from nla_hub.explain.output import Output
from nla_hub.explain.settings import Shard

OPTIONS = ("-p", "sample:2", "--max-new-tokens", 24, "--keep-vectors")
BLOCK = 8
WIDTH = 128
"""Of the tiny pair."""


@pytest.fixture(scope="module")
def nursery() -> Nursery:
    return shared_nursery()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, copies among them."""
    return write_documents(tmp_path_factory.mktemp("data") / "documents.jsonl", 24, broken=False)


@pytest.fixture(scope="module")
def whole(nursery: Nursery, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    job = nursery.run(data, out, *OPTIONS, block=BLOCK)
    assert job.poll() == 0, job.said
    assert job.parts == 6
    return out


def finished(nursery: Nursery, data: Path, out: Path, whole: Path, *options: object, site: Path | None = None) -> Job:
    """Run the same command again: then everything is as if nothing had happened."""
    log = Path(mkdtemp(dir=whole.parent)) / "log"  # not beside `out`, where there may be no room
    job = nursery.run(data, out, *OPTIONS, *options, block=BLOCK, log=log, site=site)
    assert job.poll() == 0, job.said
    assert files(out) == files(whole)
    assert leftovers(out) == []
    return job


# -- no room ---------------------------------------------------------------------------------------------------


class Disk:
    """A file system of its own, of this size."""

    def __init__(self, path: Path, size: str) -> None:
        self.path = path
        path.mkdir()
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")

    def remount(self, options: str) -> None:
        """Change its options."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", self.path], check=True)


def starved(job: Job) -> None:
    """A job that ended for want of room: no part of a part."""
    assert job.wait() == 1, job.said
    assert "Traceback" not in job.said
    assert "make room, then run the same command again" in job.said
    readable(job.out)
    assert not list(job.out.rglob("*.tmp"))


SIZES = ["24k", "90k", *(pytest.param(f"{size}k", marks=pytest.mark.slow) for size in range(4, 92, 8))]


@pytest.mark.parametrize("size", SIZES)
def test_the_disk_is_full(nursery: Nursery, data: Path, whole: Path, tmp_path: Path, size: str) -> None:
    with Disk(tmp_path / "disk", size) as disk:
        job = nursery.run(data, disk.path / "out", *OPTIONS, block=BLOCK, log=tmp_path / "log")
        starved(job)
        assert "disk is full" in job.said
        assert job.parts > 0 or size != "90k"
        disk.remount("size=20m")
        finished(nursery, data, disk.path / "out", whole)


def test_a_quota(nursery: Nursery, data: Path, whole: Path, tmp_path: Path) -> None:
    job = nursery.run(data, tmp_path / "out", *OPTIONS, block=BLOCK, limit=9000, log=Path("/dev/null"))
    assert job.poll() == 1
    readable(job.out)
    assert not list(job.out.rglob("*.tmp"))
    finished(nursery, data, tmp_path / "out", whole)


def test_a_place_that_is_read_only(nursery: Nursery, data: Path, tmp_path: Path) -> None:
    with Disk(tmp_path / "disk", "10m") as disk:
        (disk.path / "out").mkdir()
        disk.remount("ro")
        for out in (disk.path / "out", disk.path / "new"):
            job = nursery.run(data, out, *OPTIONS, block=BLOCK, log=tmp_path / "log")
            assert job.poll() == 1, job.said
            assert "cannot be written: Read-only file system" in job.said
            assert "name a place with -o that you may write to" in job.said


# -- inputs ----------------------------------------------------------------------------------------------------


def test_an_input_that_vanishes(nursery: Nursery, tmp_path: Path) -> None:
    place = tmp_path / "data"
    place.mkdir()
    first, second = (write_documents(place / f"{name}.jsonl", 12, seed=i, broken=False) for i, name in enumerate("ab"))
    gone = Fault("replace", "/job.yaml", after=True, remove=str(second))
    job = nursery.run(place, tmp_path / "out", *OPTIONS, block=BLOCK, faults=[gone])
    assert job.poll() == 4, job.said
    assert "error: 1 row: " in job.said
    found = rows(job.out)
    assert [row["error"] is None for row in found] == [True] * (len(found) - 1) + [False]
    assert "b.jsonl" in found[-1]["error"]
    assert nursery.run(first, tmp_path / "alone", *OPTIONS, block=BLOCK).poll() == 0
    alone = rows(tmp_path / "alone")
    assert [row["raw"] for row in found[:-1]] == [row["raw"] for row in alone]


def test_an_input_that_changes(nursery: Nursery, data: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copy(data, tmp_path / "mine.jsonl"))
    job = nursery.start(mine, tmp_path / "out", *OPTIONS, block=BLOCK, faults=[Fault("replace", "parts/part-000003")])
    job.wait()
    with mine.open("a") as stream:
        stream.write('{"text": "one more"}\n')
    job = nursery.run(mine, tmp_path / "out", *OPTIONS[:-1], "--seed", 3, block=BLOCK)
    assert job.poll() == 1
    assert "started with another configuration" in job.said
    for difference in ("mine.jsonl", "seed", "keep_vectors"):
        assert difference in job.said


POISON: dict[str, tuple[bytes, str]] = {
    "too long": (json.dumps({"text": "otto saw a bear. " * 25_000}).encode(), "longer than"),
    "empty": (b'{"text": ""}', "The text is empty"),
    "no UTF-8": (b'{"text": "caf\xe9"}', "UTF-8"),
    "no JSON": (b"{text: otto}", "not JSON"),
    "a number": (b'{"text": 12}', ""),
    "no text": (b'{"words": "otto"}', ""),
    "half a character": (b'{"text": "otto \\ud800"}', "surrogate"),
    "special tokens": (b'{"messages": [{"role": "user", "content": "otto <|end|> clara"}]}', "<|end|>"),
    "no such role": (b'{"messages": [{"role": "emperor", "content": "otto"}]}', ""),
    "no messages": (b'{"messages": []}', ""),
    "null": (b"null", ""),
}
"""A line of each kind, and what its reason says."""


def test_poisoned_texts(nursery: Nursery, tmp_path: Path) -> None:
    good = b'{"text": "today otto came to the island"}'
    lines = [good]
    for i, (line, _) in enumerate(POISON.values()):
        lines += [line, good.replace(b"otto", f"clara {i}".encode())]
    (tmp_path / "poison.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    job = nursery.run(tmp_path / "poison.jsonl", tmp_path / "out", "--max-new-tokens", 8, block=BLOCK)
    assert job.poll() == 4, job.said
    found = rows(job.out)
    assert len(found) == len(lines)
    for i, (kind, (_, says)) in enumerate(POISON.items()):
        poisoned, healthy = found[2 * i + 1], found[2 * i]
        assert poisoned["status"] is None, kind
        assert says in (poisoned["error"] or "no reason"), kind
        assert f":{2 * i + 2}" in poisoned["error"] or f"line {2 * i + 2}" in poisoned["error"], poisoned["error"]
        assert healthy["status"] is not None, kind
        assert healthy["error"] is None, kind
    manifest = json.loads((job.out / "manifest.json").read_text())
    assert manifest["counts"]["error"] == len(POISON)
    for reason in manifest["errors"]:
        assert reason in job.said.replace("\n", " "), reason


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_poisoned_vectors(nursery: Nursery, tmp_path: Path, kind: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(6, WIDTH)).astype(np.float32)
    vectors[1, 5], vectors[2], vectors[4, 0] = np.nan, 0.0, np.inf
    path = tmp_path / f"vectors.{kind}"
    if kind == "npy":
        np.save(path, vectors)
    else:
        flat = pa.array(vectors.reshape(-1))
        pq.write_table(pa.table({"activation_vector": pa.FixedSizeListArray.from_arrays(flat, WIDTH)}), path)
    job = nursery.run(path, tmp_path / "out", "--max-new-tokens", 8, "--keep-vectors", block=BLOCK)
    assert job.poll() == 4, job.said
    errors = [row["error"] for row in rows(job.out)]
    assert [error is not None for error in errors] == [False, True, True, False, True, False]
    for i, word in ((1, "NaN"), (2, "zero"), (4, "infinite")):
        assert word in errors[i]
        assert word in job.said
    kept = pq.read_table(job.out / "vectors" / "part-000000.parquet")
    assert kept.column("row").to_pylist() == [0, 3, 5]
    np.testing.assert_array_equal(np.stack(kept.column("activation_vector").to_pylist()), vectors[[0, 3, 5]])


# -- an engine that fails --------------------------------------------------------------------------------------

ENGINE = """
import os, signal, time
from nla_hub.engines.transformers import TransformersEngine

class thing(TransformersEngine):
    name = "failing"

    def __init__(self, av, *, act="raise", after=0):
        super().__init__(av)
        self.act, self.after, self.calls = act, after, 0

    def generate(self, vectors, draws, **others):
        self.calls += 1
        marked = bool((vectors[:, 0] == 12345.0).any())
        if self.act == "raise" and marked:
            raise RuntimeError("no such luck")
        if self.act == "always":
            raise RuntimeError("never any luck")
        if self.act == "die" and marked:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.calls == self.after and self.act in ("INT", "TERM", "INT twice"):
            os.kill(os.getpid(), signal.SIGTERM if self.act == "TERM" else signal.SIGINT)
            if self.act == "INT twice":
                time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
        return super().generate(vectors, draws, **others)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the engine `failing` is installed."""
    place = tmp_path_factory.mktemp("site")
    install_module(place, "failing-engine", "1.0", "nla_hub.engines", "failing", ENGINE)
    return place


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty vectors; one in the third block is marked."""
    vectors = np.random.default_rng(1).normal(size=(40, WIDTH)).astype(np.float32)
    vectors[19, 0] = 12345.0
    path = tmp_path_factory.mktemp("marked") / "vectors.npy"
    np.save(path, vectors)
    return path


FAILING = ("--max-new-tokens", 8, "--keep-vectors", "--engine", "failing")


def given_up(out: Path, reason: str) -> None:
    """The third block of the marked vectors is in error, the others are there."""
    found = rows(out)
    assert [row["error"] is not None for row in found] == [row["row"] // BLOCK == 2 for row in found]
    assert len(found) == 40
    assert all(reason in row["error"] for row in found[16:24])
    assert len(files(out)) == 10


def test_a_block_that_always_fails(nursery: Nursery, site: Path, marked: Path, tmp_path: Path) -> None:
    job = nursery.run(marked, tmp_path / "out", *FAILING, block=BLOCK, site=site)
    assert job.poll() == 4, job.said
    given_up(job.out, "RuntimeError: no such luck (3 times)")
    assert "8 rows: no such luck (3 times)" in job.said
    before = files(job.out)
    again = nursery.run(marked, tmp_path / "out", *FAILING, block=BLOCK, site=site)
    assert again.poll() == 4, again.said
    assert "computed again" not in again.said
    assert files(job.out) == before


def test_only_the_block_that_fails_is_left(nursery: Nursery, site: Path, marked: Path, tmp_path: Path) -> None:
    """A job that was killed after everything else was done comes to the same end."""
    fault = Fault("fsync", "parts/.part-000002")
    job = nursery.start(marked, tmp_path / "out", *FAILING, block=BLOCK, site=site, faults=[fault])
    assert job.wait() == -signal.SIGKILL
    assert job.parts == 4
    job = nursery.run(marked, tmp_path / "out", *FAILING, block=BLOCK, site=site)
    assert job.poll() == 4, job.said
    given_up(job.out, "no such luck")


def test_an_engine_that_always_fails(nursery: Nursery, site: Path, marked: Path, tmp_path: Path) -> None:
    options = (*FAILING, "--engine-option", "act=always")
    job = nursery.run(marked, tmp_path / "out", *options, block=BLOCK, site=site)
    assert job.poll() == 1
    assert "Nothing could be computed: RuntimeError: never any luck" in job.said
    assert job.parts == 0


@pytest.mark.slow
def test_a_block_that_kills_every_worker(nursery: Nursery, site: Path, marked: Path, tmp_path: Path) -> None:
    options = (*FAILING, "--engine-option", "act=die", "--workers", 2)
    job = nursery.run(marked, tmp_path / "out", *options, block=BLOCK, site=site)
    assert job.poll() == 4, job.said
    given_up(job.out, "The worker process was killed by SIGKILL. (3 times)")
    assert job.alone()


@pytest.fixture(scope="module")
def whole_of_plugin(nursery: Nursery, site: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed job with that engine: a part says which job wrote it, so its bytes are not those of another engine's."""
    out = tmp_path_factory.mktemp("plugin") / "out"
    job = nursery.run(data, out, *OPTIONS, "--engine", "failing", block=BLOCK, site=site)
    assert job.poll() == 0, job.said
    return out


# -- stopping --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["INT", "TERM", "INT twice"])
def test_stopped(nursery: Nursery, site: Path, data: Path, whole_of_plugin: Path, tmp_path: Path, act: str) -> None:
    options = ("--engine", "failing", "--engine-option", f"act={act}", "--engine-option", "after=4")
    job = nursery.run(data, tmp_path / "out", *OPTIONS, *options, block=BLOCK, site=site)
    assert job.poll() == 130, job.said
    assert "Traceback" not in job.said
    assert "rows are done and kept. The same command goes on:\n  nla-hub explain --data" in job.said
    assert job.parts == (3 if act == "INT twice" else 4)
    assert len(files(job.out)) == 2 * job.parts
    assert not list(job.out.rglob("*.tmp"))
    assert job.alone()
    again = finished(nursery, data, job.out, whole_of_plugin, "--engine", "failing", site=site)
    assert "left behind" not in again.said  # it let go of its lock


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_stopped_while_it_starts(data: Path, tmp_path: Path, seconds: float) -> None:
    job = start_fresh(data, tmp_path / "out", *OPTIONS)
    maps = Path(f"/proc/{job.pid}/maps")  # torch is imported by the command itself, so it has begun then
    job.wait_for(lambda: "libtorch" in maps.read_text(), "torch")
    time.sleep(seconds)
    job.interrupt()
    assert job.wait() == 130, job.said
    assert "Traceback" not in job.said
    assert job.alone()


def test_stopped_while_the_workers_start(nursery: Nursery, data: Path, tmp_path: Path) -> None:
    job = nursery.start(data, tmp_path / "out", *OPTIONS, "--workers", 2, block=BLOCK)
    job.wait_for(lambda: len(job.workers()) == 2, "the workers")
    time.sleep(0.3)
    job.interrupt()
    assert job.wait() == 130, job.said
    assert "Traceback" not in job.said
    assert "The same command goes on" in job.said
    assert job.alone()


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["local", "ray"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_with_workers(
    nursery: Nursery, data: Path, whole: Path, tmp_path: Path, runner: str, number: signal.Signals
) -> None:
    if runner == "ray":
        pytest.importorskip("ray")
    job = nursery.start(data, tmp_path / "out", *OPTIONS, "--workers", 2, "--runner", runner, block=BLOCK)
    job.wait_for(lambda: job.parts, "the first part")
    job.interrupt(number)
    assert job.wait() == 130, job.said
    assert "Traceback" not in job.said
    assert "tried again" not in job.said  # its workers finish what they have
    assert job.alone()
    assert job.parts < 6
    finished(nursery, data, job.out, whole)


# -- two jobs in one place -------------------------------------------------------------------------------------


@pytest.fixture
def held(nursery: Nursery, data: Path, tmp_path: Path) -> Iterator[Job]:
    """A job that stands still in the middle."""
    pause = Fault("replace", "parts/part-000001", send=signal.SIGSTOP)
    job = nursery.start(data, tmp_path / "out", *OPTIONS, block=BLOCK, faults=[pause])
    job.wait_for(lambda: list(job.out.glob("parts/.part-000001*")), "the second part")
    yield job
    job.end()


def test_a_second_job_is_refused(nursery: Nursery, data: Path, whole: Path, held: Job) -> None:
    for options in ((), ("--shard", "1/2")):
        other = nursery.run(data, held.out, *OPTIONS, *options, block=BLOCK)
        assert other.poll() == 1, other.said
        assert f"Another process is working here (process {held.pid} on {os.uname().nodename}, for " in other.said
    held.kill()  # a process that stands still dies too
    held.wait()
    job = finished(nursery, data, held.out, whole)
    assert f"was left behind by process {held.pid} on {os.uname().nodename}" in job.said


def test_shards_in_one_place(nursery: Nursery, data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pause = Fault("replace", "parts/part-000004", send=signal.SIGSTOP)
    first = nursery.start(data, out, *OPTIONS, "--shard", "1/3", block=BLOCK, faults=[pause])
    first.wait_for(lambda: list(out.glob("parts/.part-*")) or first.parts, "a part")
    for options, says in (((), "shard 1-of-3: process"), (("--shard", "1/3"), f"process {first.pid}")):
        refused = nursery.run(data, out, *OPTIONS, *options, block=BLOCK)
        assert refused.poll() == 1, refused.said
        assert "Another process is working here" in refused.said
        assert says in refused.said
    others = [nursery.start(data, out, *OPTIONS, "--shard", f"{i}/3", block=BLOCK) for i in (0, 2)]
    assert [job.wait() for job in others] == [0, 0], [job.said for job in others]
    assert not (out / "manifest.json").exists()
    first.kill(signal.SIGCONT)
    assert first.wait() == 0, first.said
    assert (out / "manifest.json").exists()
    assert files(out) == files(whole)


def test_shards_settle_the_same_at_the_same_time(tmp_path: Path) -> None:
    """What fits into memory may differ from shard to shard; the rows must not depend on whose value is written last."""
    shared = Output(tmp_path / "out")
    with shared:
        shared.claim({"seed": 0})
    for round_ in range(20):
        start, found = Barrier(4), dict[int, Any]()

        def settle(number: int, name: str, start: Barrier = start, found: dict[int, Any] = found) -> None:
            start.wait()
            found[number] = Output(shared.path, Shard(number, 4)).settle(**{name: number})[name]

        threads = [Thread(target=settle, args=(i, f"value_{round_}")) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found.values())) == 1, found


# -- Ray -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_ray_gives_the_same_rows_though_an_actor_dies(
    nursery: Nursery, data: Path, whole: Path, tmp_path: Path
) -> None:
    job = nursery.start(data, tmp_path / "out", *OPTIONS, "--runner", "ray", "--workers", 2, block=BLOCK)
    job.wait_for(lambda: job.parts, "the first part")
    actors = job.workers()
    assert len(actors) == 2
    os.kill(actors[0], signal.SIGKILL)
    assert job.wait() == 0, job.said
    assert "The actor was lost" in job.said
    assert job.alone()
    assert files(job.out) == files(whole)


def test_without_ray(nursery: Nursery, data: Path, tmp_path: Path) -> None:
    place = tmp_path / "site" / "ray"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("raise ImportError('No module named ray')")
    job = nursery.run(data, tmp_path / "out", *OPTIONS, "--runner", "ray", site=place.parent)
    assert job.poll() == 1, job.said
    assert "pip install" in job.said
    assert "ray" in job.said
