"""A run directory: one folder a stage, each with its configuration, metrics, results and a DONE that is written last.

`runs/RECIPE-HASH/` unless another place is named. The same command continues where it stopped; a changed configuration in
the same place is refused with the differences. Of several processes the main one alone writes here.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_hub import yaml_io
from nla_hub.errors import NLAError, RunError
from nla_hub.locks import Lock
from nla_hub.schema import differences
from nla_hub.training.processes import Processes
from nla_hub.training.recipe import Recipe

CONFIG, METRICS, DONE, LOCK, STATE, STEPS = "config.yaml", "metrics.jsonl", "DONE", ".lock", "state", "steps"

LABELS = "labels"
"""Folder of a run in which a labeler keeps what it was answered."""

MACHINE = "machine"
"""In a stage's DONE: where it ran (`machine.machine_record`)."""

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
"""What a disk says that takes nothing more."""

_STEP = re.compile(r"step-(\d{6,})")

GO_ON = "make room, then run the same command again: it goes on where it stopped"


@dataclass(frozen=True)
class StageDirectory:
    """The folder of one stage."""

    path: Path

    @property
    def is_done(self) -> bool:
        """Whether the stage finished."""
        return (self.path / DONE).is_file()

    @property
    def checkpoint(self) -> Path:
        """Where the stage's result lies."""
        return self.path / "checkpoint"

    @property
    def state(self) -> Path:
        """Where a stage keeps what it continues from when it was killed; gone once the stage is done."""
        return self.path / STATE

    @property
    def steps(self) -> Path:
        """Where the stage `rl` keeps pairs of earlier steps, for as long as the run is there."""
        return self.path / STEPS

    def begin(self, recipe: Recipe) -> None:
        """Start the stage: what an interrupted attempt left is removed.

        Where it left a `state/` of the same configuration, that, its .jsonl files and `steps/` stay; whoever continues from
        the state cuts them back to it (`cut_metrics`, `rl.steps.StepPairs.cut`).
        """
        config = self.path / CONFIG
        if self.state.is_dir() and config.is_file() and yaml_io.read(config, error=RunError) == recipe.to_mapping():
            for path in self.path.iterdir():
                if path.name not in (CONFIG, STATE, STEPS) and path.suffix != ".jsonl":
                    _remove(path)
            return
        _remove(self.path)
        self.path.mkdir(parents=True)
        yaml_io.write_text(config, yaml_io.dumps(recipe.to_mapping()))

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(metrics)) + "\n")

    def cut_metrics(self, step: int, *, model: str | None = None, name: str = METRICS) -> None:
        """Drop the lines about what comes after `step` steps: a continued stage writes them again.

        Args:
            model: only lines with this "model" (None: those without one) are dropped; the others stay.
            name: another file of the stage with a JSON object with a `step` a line.
        """
        path = self.path / name
        if not path.is_file():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _stays(line, step, model)]
        if kept != lines:
            yaml_io.write_text(path, "".join(kept))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mark the stage done; its summary is the content of DONE. Nothing is kept to continue from."""
        yaml_io.write_text(self.path / DONE, json.dumps(dict(summary), indent=1) + "\n")
        self.drop_state()

    def drop_state(self) -> None:
        """Remove what only an unfinished stage needs."""
        _remove(self.state)

    def summary(self) -> dict[str, Any]:
        """What `finish` wrote."""
        found: dict[str, Any] = json.loads((self.path / DONE).read_text(encoding="utf-8"))
        return found


def step_name(step: int) -> str:
    """What a step's folder and its tag are called: "step-000400"."""
    return f"step-{step:06d}"


def step_number(name: str) -> int:
    """The step of `step_name`."""
    return int(name.removeprefix("step-"))


def step_pairs(stage: StageDirectory) -> Mapping[str, Path]:
    """The complete pairs of a stage, by the names of their steps and in their order."""
    places = stage.steps.glob("step-*")
    found = {place.name: place for place in places if _STEP.fullmatch(place.name) and (place / DONE).is_file()}
    return {name: found[name] for name in sorted(found, key=step_number)}


def _paid(path: Path) -> str:
    """Where labels are that need not be paid for again."""
    labels = path / LABELS
    return f"; labels.settings.cache={labels} takes over labels that were written for it" if labels.is_dir() else ""


class RunDirectory:
    """The directory of a run, opened for one recipe and locked while it is open.

    Raises:
        RunError: the place holds something else, a run of another configuration, or is in use.
    """

    def __init__(
        self, path: Path, recipe: Recipe, *, rehearsal: bool = False, processes: Processes | None = None
    ) -> None:
        self.path = path
        self.recipe = recipe
        self.processes = processes or Processes()
        wanted = {**recipe.to_mapping(), **({"rehearsal": True} if rehearsal else {})}
        self.processes.on_main(lambda: self._claim(wanted))
        self._lock: Lock | None = None

    def _claim(self, wanted: dict[str, Any]) -> None:
        path, config = self.path, self.path / CONFIG
        if path.exists() and not path.is_dir():
            raise RunError("A file is in the way of this run.", where=path, next_step="name another place with -o")
        if config.is_file():
            changed = list(differences(yaml_io.read(config, error=RunError), wanted))
            if changed:
                raise RunError(
                    "This run was started with another configuration.",
                    where=path,
                    faults=changed,
                    next_step="name another place with -o, or repeat the settings it was started with" + _paid(path),
                )
        elif path.is_dir() and any(not p.name.startswith(f".{CONFIG}.") for p in path.iterdir()):
            raise RunError(
                "This directory holds something else than a run.", where=path, next_step="name an empty or new one"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not config.is_file():
                yaml_io.write_text(config, yaml_io.dumps(wanted))
        except OSError as cause:
            raise RunError(
                f"The run directory cannot be written: {cause.strerror}.",
                where=path,
                next_step="make room, or name another place with -o",
            ) from cause

    def stage(self, name: str) -> StageDirectory:
        """The folder of a stage."""
        return StageDirectory(self.path / name)

    def __enter__(self) -> RunDirectory:
        self.processes.on_main(self._take_lock)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _take_lock(self) -> None:
        self._lock = Lock(self.path / LOCK)


@contextmanager
def writing_run(place: Path) -> Iterator[None]:
    """Raise a RunError in place of whatever the libraries of a stage make of a full disk; all else passes."""
    try:
        yield
    except NLAError:
        raise
    except Exception as cause:
        if (reason := no_room(cause)) is None:
            raise
        raise RunError(f"The run cannot be written: {reason}.", where=place, next_step=GO_ON) from cause


def no_room(error: BaseException | None) -> str | None:
    """What the disk said where an error comes of a full one, else None.

    torch.save ends in a RuntimeError in whose context the OSError stands; libraries written in Rust quote its number.
    """
    while error is not None:
        quoted = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(quoted.group(1)) if quoted else None
        if number in NO_ROOM:
            return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def _stays(line: str, step: int, model: str | None) -> bool:
    """Whether a line of metrics.jsonl stays when the lines of `model` after `step` are dropped."""
    try:
        found = json.loads(line)
    except ValueError:
        return False  # half a line: its writer was killed
    return bool(found.get("model") != model or found.get("step", 0) <= step)


def _remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def timed(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a stage's action and add its wall seconds to what it returns."""
    started = time.perf_counter()
    summary = action()
    return {**summary, "seconds": round(time.perf_counter() - started, 1)}
