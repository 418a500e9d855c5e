"""What a batch job costs besides its computing: peak memory of the job and of a worker, and time over the bare calls.

Prints the tables of docs/explain.md (Linux; the tiny pair; minutes):

    python tests/explain_scale.py                 peak memory at 10,000 and 100,000 rows
    python tests/explain_scale.py --overhead      seconds of a job over those of the same calls on the same blocks

Peak is VmHWM minus the RSS after importing; a process is measured alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
MEMORY_TOKENS = 1
OVERHEAD_TOKENS = 40
POSITIONS = "every:2"
ROWS_A_DOCUMENT = 26.2
"""At `POSITIONS`, on average; what a job had is in the result."""


@dataclass(frozen=True)
class Peaks:
    """Of one job, in bytes: of the process that plans and writes, and of its largest worker (0: there is none)."""

    rows: int
    job: int
    worker: int


def write_data(path: Path, rows: int) -> Path:
    """Documents of about so many rows."""
    from nla_hub.tiny import documents

    with path.open("w", encoding="utf-8") as stream:
        for document in documents(round(rows / ROWS_A_DOCUMENT), 11, "train"):
            content = document.content
            stream.write(json.dumps({"text": content} if isinstance(content, str) else {"messages": content}) + "\n")
    return path


def settings(data: Path, max_new_tokens: int) -> Any:
    """A job over a file of documents, greedy."""
    from nla_hub.explain.settings import DataSettings, JobSettings, PairSettings

    return JobSettings(
        PairSettings(),
        DataSettings(str(data)),
        positions=POSITIONS,
        temperature=0.0,
        max_new_tokens=max_new_tokens,
        batch_size=64,
    )


# -- memory ----------------------------------------------------------------------------------------------------


def status(key: str, pid: int | str = "self") -> int:
    """VmHWM or VmRSS of a process in bytes; 0 where it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0


def peaks(rows: int, workers: int) -> Peaks:
    """Of a job in a fresh process."""
    with tempfile.TemporaryDirectory() as place:
        data = write_data(Path(place) / "documents.jsonl", rows)
        out = Path(place) / "out"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, str(HERE), "--job", str(data), str(out), str(workers)],
            capture_output=True,
            text=True,
            env=environment,
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return Peaks(**json.loads(done.stdout.splitlines()[-1]))


def _job(data: Path, out: Path, workers: int) -> Peaks:
    """What `peaks` starts."""
    import multiprocessing

    import torch
    import transformers.models.llama.modeling_llama as model_code

    import nla_hub.engines.transformers
    from nla_hub.explain.job import run_job

    torch.set_num_threads(1)
    assert model_code
    assert nla_hub.engines.transformers
    begun, worker = status("VmRSS"), 0

    def look(_: object) -> None:
        nonlocal worker
        worker = max([worker, *(status("VmHWM", child.pid or 0) for child in multiprocessing.active_children())])

    summary = run_job(settings(data, MEMORY_TOKENS), out, workers=workers, progress=look)
    assert summary.complete
    return Peaks(len(summary), status("VmHWM") - begun, max(0, worker - begun))


# -- time ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overhead:
    """Seconds of both ways, each measured several times in turn."""

    rows: int
    job: tuple[float, ...]
    plain: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median over median."""
        return statistics.median(self.job) / statistics.median(self.plain)


def overhead(rows: int, repetitions: int = 3) -> Overhead:
    """A job in one process, from its first row to the manifest, against the bare calls; opening and loading are in neither."""
    import torch

    from nla_hub.explain import job as job_module
    from nla_hub.explain.opened import open_job
    from nla_hub.explain.plan import Plan
    from nla_hub.explain.pools import Inline, Terms

    torch.set_num_threads(1)
    loading: list[float] = []

    class Timed(Inline):
        def start(self, terms: Terms) -> None:
            begun = time.perf_counter()
            super().start(terms)
            assert self._worker is not None
            assert self._worker.nla.capture_source  # else it is loaded with the first block
            loading.append(time.perf_counter() - begun)

    found: dict[str, list[float]] = {"job": [], "plain": []}
    with tempfile.TemporaryDirectory() as place:
        asked = settings(write_data(Path(place) / "documents.jsonl", rows), OVERHEAD_TOKENS)
        opened = open_job(asked)
        with closing(Plan(Path(place) / "plan", opened.dataset, opened.make_rows, asked.block)) as plan:
            blocks = list(plan.blocks(lambda _: True))
        total = sum(len(block.rows) for block in blocks)
        with asked.pair.load() as nla:
            plain(nla, asked, blocks[:1])
            for repetition in range(repetitions):
                begun = time.perf_counter()
                read(opened)
                texts = plain(nla, asked, blocks)
                found["plain"].append(time.perf_counter() - begun)
                loading.clear()
                opening: list[float] = []

                def timed_open(settings: Any, opening: list[float] = opening) -> Any:
                    begun = time.perf_counter()
                    opened_now = open_job(settings)
                    opening.append(time.perf_counter() - begun)
                    return opened_now

                out = Path(place) / f"out-{repetition}"
                real, job_module.Inline = job_module.Inline, Timed  # type: ignore[misc]
                job_module.open_job = timed_open
                try:
                    begun = time.perf_counter()
                    job_module.run_job(asked, out)
                    found["job"].append(time.perf_counter() - begun - sum(loading) - sum(opening))
                finally:
                    job_module.open_job = open_job
                    job_module.Inline = real  # type: ignore[misc]
                if texts != texts_of(out):
                    raise RuntimeError("the job and the bare calls did not compute the same")
    return Overhead(total, tuple(found["job"]), tuple(found["plain"]))


def read(opened: Any) -> int:
    """Read the data and encode it, as `NLA.capture` does before the model runs."""
    return sum(len(opened.make_rows(item, i).rows) for i, item in enumerate(opened.dataset.items()))


def plain(nla: Any, asked: Any, blocks: Sequence[Any]) -> list[str]:
    """Capture, verbalize and score blocks of texts; what the AV wrote for each row that is no copy."""
    from nla_hub.sampling import RowKey

    written: list[str] = []
    for block in blocks:
        rows = [row for row in block.rows if row.source >= 0]
        if not rows:
            continue
        reads: list[list[int]] = [[] for _ in block.sequences]
        for row in rows:
            reads[row.source].append(row.read)
        vectors = nla.capture_ids(
            [(ids.tolist(), places) for ids, places in zip(block.sequences, reads, strict=True)], check=False
        )
        found = nla.verbalize(
            vectors,
            keys=[RowKey(row.hash, row.position, row.sample) for row in rows],
            temperature=asked.temperature,
            max_new_tokens=asked.max_new_tokens,
            seed=asked.seed,
            batch_size=asked.batch_size,
            show_progress_bar=False,
        )
        nla.score(found, vectors)
        written += [row.raw for row in found]
    return written


def texts_of(out: Path) -> list[str]:
    """What the AV wrote in a job, in the order of its rows."""
    import pyarrow.parquet as pq

    found: list[str] = []
    for part in sorted((out / "parts").iterdir()):
        for row in pq.read_table(part, columns=["raw", "copy_of"]).to_pylist():
            if row["copy_of"] is None:
                found.append(row["raw"])
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--overhead", action="store_true", help="instead: time over the bare calls")
    parser.add_argument("--rows", type=int, help="about so many (100,000 for memory, 5,000 for time)")
    arguments = parser.parse_args()
    if arguments.job:
        data, out, workers = arguments.job
        print(json.dumps(vars(_job(Path(data), Path(out), int(workers)))))
        return
    import torch
    import transformers

    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.platform()}")
    if arguments.overhead:
        timed = overhead(arguments.rows or 5_000)
        print("| rows | job, s | bare calls, s | ratio |\n|---|---|---|---|")
        seconds = [", ".join(f"{s:.1f}" for s in times) for times in (timed.job, timed.plain)]
        print(f"| {timed.rows:,} | {seconds[0]} | {seconds[1]} | {timed.ratio:.3f} |")
        return
    print("| workers | rows | job, MB | worker, MB |\n|---|---|---|---|")
    most = arguments.rows or 100_000
    for workers in (1, 2):
        for rows in (most // 10, most):
            found = peaks(rows, workers)
            worker = f"{found.worker / 1e6:.0f}" if workers > 1 else "the job itself"
            print(f"| {workers} | {found.rows:,} | {found.job / 1e6:.0f} | {worker} |", flush=True)


if __name__ == "__main__":
    main()
