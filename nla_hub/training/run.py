"""A run directory: one folder a stage, each with its configuration, metrics, results and a DONE that is written last.

`runs/RECIPE-HASH/` unless another place is named. The same command continues where it stopped; a changed configuration in
the same place is refused with the differences.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_hub import yaml_io
from nla_hub.errors import RunError
from nla_hub.training.recipe import Recipe

CONFIG, METRICS, DONE, LOCK = "config.yaml", "metrics.jsonl", "DONE", ".lock"


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

    def begin(self, recipe: Recipe) -> None:
        """Start the stage from nothing: what an interrupted attempt left is removed."""
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        yaml_io.write_text(self.path / CONFIG, yaml_io.dumps(recipe.to_mapping()))

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(metrics)) + "\n")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mark the stage done; its summary is the content of DONE."""
        yaml_io.write_text(self.path / DONE, json.dumps(dict(summary), indent=1) + "\n")

    def summary(self) -> dict[str, Any]:
        """What `finish` wrote."""
        found: dict[str, Any] = json.loads((self.path / DONE).read_text(encoding="utf-8"))
        return found


class RunDirectory:
    """The directory of a run, opened for one recipe and locked while it is open.

    Raises:
        RunError: the place holds something else, a run of another configuration, or is in use.
    """

    def __init__(self, path: Path, recipe: Recipe, *, rehearsal: bool = False) -> None:
        wanted = {**recipe.to_mapping(), **({"rehearsal": True} if rehearsal else {})}
        self.path = path
        self.recipe = recipe
        config = path / CONFIG
        if path.exists() and not path.is_dir():
            raise RunError("A file is in the way of this run.", where=path, next_step="name another place with -o")
        if config.is_file():
            differences = list(_differences(yaml_io.read(config, error=RunError), wanted))
            if differences:
                raise RunError(
                    "This run was started with another configuration.",
                    where=path,
                    faults=differences,
                    next_step="name another place with -o, or repeat the settings it was started with",
                )
        elif path.is_dir() and any(path.iterdir()):
            raise RunError(
                "This directory holds something else than a run.", where=path, next_step="name an empty or new one"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not config.is_file():
                yaml_io.write_text(config, yaml_io.dumps(wanted))
        except OSError as cause:
            raise RunError(f"The run directory cannot be written: {cause.strerror}", where=path) from cause

    def stage(self, name: str) -> StageDirectory:
        """The folder of a stage."""
        return StageDirectory(self.path / name)

    def __enter__(self) -> RunDirectory:
        lock = self.path / LOCK
        owner = _lock_owner(lock)
        if owner is not None:
            raise RunError(
                f"Another process ({owner}) is working in this run.",
                where=self.path,
                next_step=f"wait for it; if it is gone for sure, remove {lock}",
            )
        lock.unlink(missing_ok=True)  # its owner is gone
        try:
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError as cause:
            raise RunError(
                "Another process has just begun to work in this run.", where=self.path, next_step="wait for it"
            ) from cause
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        return self

    def __exit__(self, *_: object) -> None:
        (self.path / LOCK).unlink(missing_ok=True)


def _lock_owner(lock: Path) -> int | None:
    """The living process of this machine that holds a lock, None where there is none (a dead owner's lock is stale)."""
    try:
        pid = int(lock.read_text(encoding="utf-8"))
        os.kill(pid, 0)
    except (OSError, ValueError) as error:
        return pid if isinstance(error, PermissionError) else None
    return pid if pid != os.getpid() else None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    found = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b, name = old.get(key), new.get(key), f"{path}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name}: {a!r} before, {b!r} now")
    return found


def timed(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a stage's action and add its wall seconds to what it returns."""
    started = time.perf_counter()
    summary = action()
    return {**summary, "seconds": round(time.perf_counter() - started, 1)}
