"""Reading what a run directory holds, as it is: finished or not, with lines cut in half, figures missing or not finite.

Nothing here raises for the content of metrics.jsonl: what cannot be used is left out and said in the notes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla_hub import yaml_io
from nla_hub.errors import RunError
from nla_hub.training.recipe import digest_of
from nla_hub.training.run import CONFIG, DONE, METRICS
from nla_hub.training.stages import STAGES

if TYPE_CHECKING:
    from nla_hub.geometry import FVE

HELD_OUT = "held-out rows"
"""What the greedy measurements of the RL stage are made on; part of how their FVE is printed."""

LARGEST = 1e100
"""Figures beyond it are no measurements: they count as not finite."""


def figure(mapping: Mapping[str, Any], key: str) -> float | None:
    """The finite number under `key`, None for anything else."""
    value = mapping.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        return None
    return float(value)


def mapping_of(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The mapping under `key`, an empty one for anything else."""
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def mappings_of(mapping: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The mappings in the list under `key`."""
    value = mapping.get(key)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, (list, tuple)) else []


def text_of(mapping: Mapping[str, Any], key: str) -> str | None:
    """The text under `key`."""
    value = mapping.get(key)
    return value if isinstance(value, str) else None


def shares(mapping: Mapping[str, Any], key: str = "statuses") -> dict[str, float]:
    """Counts under `key` as shares of their sum; empty where nothing was counted."""
    counts = {name: figure(mapping_of(mapping, key), name) for name in mapping_of(mapping, key)}
    known = {name: count for name, count in counts.items() if count is not None and count >= 0}
    total = sum(known.values())
    return {name: count / total for name, count in known.items()} if total > 0 else {}


@dataclass(frozen=True)
class Metrics:
    """The lines of one metrics.jsonl, in the order of their steps; evaluations and alarms keep their outer line.

    A stage may train further models: the step lines that name one are in `models`, under that name.
    """

    steps: tuple[dict[str, Any], ...] = ()
    evaluations: tuple[dict[str, Any], ...] = ()
    alarms: tuple[dict[str, Any], ...] = ()
    models: Mapping[str, tuple[dict[str, Any], ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def last(self) -> dict[str, Any]:
        """The line of the last step, empty where there is none."""
        return self.steps[-1] if self.steps else {}

    def latest(self, key: str) -> float | None:
        """The last figure of this name."""
        return next((value for row in reversed(self.steps) if (value := figure(row, key)) is not None), None)


def read_metrics(path: Path) -> Metrics:
    """The lines of a metrics.jsonl; an absent file has none.

    A run that was killed and continued writes some steps again: the later lines count.
    """
    try:
        lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    except OSError as error:
        absent = isinstance(error, FileNotFoundError)
        return Metrics() if absent else Metrics(notes=(f"{path.name} cannot be read: {error.strerror}.",))
    kept: list[tuple[str, dict[str, Any]]] = []
    torn = 0
    for line in lines:
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            torn += 1
        else:
            kept.append((_kind(row), row))
    current, again = _without_repeated([(kind, row) for kind, row in kept if not _model(row)])
    rows = {kind: tuple(row for k, row in current if k == kind) for kind in ("step", "evaluation", "alarm")}
    models = {}
    for name in dict.fromkeys(filter(None, (_model(row) for _, row in kept))):
        own, more = _without_repeated([(kind, row) for kind, row in kept if _model(row) == name and kind == "step"])
        models[name] = tuple(row for _, row in own)
        again += more
    notes = []
    if torn:
        notes.append(f"Left out of {path.parent.name}/{path.name}: {_lines(torn)} that could not be read.")
    if again:
        notes.append(
            f"Left out of {path.parent.name}/{path.name}: {_lines(again)} of an attempt that was continued from an earlier "
            "step; what was written afterwards counts."
        )
    return Metrics(rows["step"], rows["evaluation"], rows["alarm"], models, tuple(notes))


def _lines(n: int) -> str:
    return "1 line" if n == 1 else f"{n} lines"


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or figure(row, "step") is None:
        return None
    wrong = [key for key in ("evaluation", "alarm") if key in row and not isinstance(row[key], dict)]
    return None if wrong else row


def _model(row: Mapping[str, Any]) -> str | None:
    return text_of(row, "model")


def _kind(row: Mapping[str, Any]) -> str:
    return "evaluation" if "evaluation" in row else "alarm" if "alarm" in row else "step"


def _without_repeated(rows: list[tuple[str, dict[str, Any]]]) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """The rows without those that a continued run wrote again, sorted by step; and how many were left out.

    Where a step comes back, nothing after it had happened yet, and what was said at it before its line came back is old.
    Supervised stages end with a second line at their last step: both belong together.
    """
    kept: list[tuple[str, dict[str, Any]]] = []
    boundary = 0  # so many of `kept` were there when the last step line had been written
    latest = -math.inf
    for kind, row in rows:
        step = row["step"]
        if kind == "step" and (step < latest or (step == latest and _repeats(kept, row))):
            kept = [
                (k, old)
                for i, (k, old) in enumerate(kept)
                if old["step"] < step or (old["step"] == step and i >= boundary)
            ]
        kept.append((kind, row))
        if kind == "step":
            latest, boundary = step, len(kept)
    unique = {
        (k, r["step"], str(r["alarm"].get("name")) if k == "alarm" else i if k == "step" else ""): r
        for i, (k, r) in enumerate(kept)
    }
    ordered = sorted(unique.items(), key=lambda item: item[0][1])
    return [(key[0], row) for key, row in ordered], len(rows) - len(ordered)


def _repeats(kept: list[tuple[str, dict[str, Any]]], row: Mapping[str, Any]) -> bool:
    """Whether the last step line tells the same figures, so that `row` tells them again."""
    last: Mapping[str, Any] = next((old for kind, old in reversed(kept) if kind == "step"), {})
    return bool((set(last) & set(row)) - {"step", "steps", "model"})


@dataclass(frozen=True)
class StageRecord:
    """What one stage left: `state` is "done", "begun" or "not begun"; `summary` is its DONE."""

    name: str
    state: str
    summary: dict[str, Any]
    metrics: Metrics

    @property
    def seconds(self) -> float | None:
        """Wall seconds of a finished stage; of an unfinished one, up to its last line."""
        return figure(self.summary, "seconds") if self.state == "done" else self.metrics.latest("seconds")


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds.

    Attributes:
        config: the recipe as it is saved, `rehearsal` left out.
        digest: eight hexadecimal digits of that recipe, as `Recipe.digest` had them when the run began.
        result: the finished pair's evaluation as `EvalResult.to_dict` wrote it.
        commit: of the code, where a stage recorded it.
    """

    path: Path
    config: dict[str, Any]
    digest: str
    rehearsal: bool
    stages: dict[str, StageRecord]
    result: dict[str, Any] | None
    commit: str | None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The recipe's name."""
        return text_of(self.config, "name") or self.path.name

    @property
    def rl(self) -> Metrics:
        """The RL stage's lines."""
        return self.stages["rl"].metrics

    @property
    def has_rl(self) -> bool:
        """Whether the recipe has an RL stage, or one has begun."""
        return bool(self.config.get("rl")) or self.stages["rl"].state != "not begun"


def read_run(path: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        RunError: there is no run, or its config.yaml cannot be read.
    """
    if not (path / CONFIG).is_file():
        raise RunError(
            "This is not the directory of a run.",
            where=path,
            expected=f"a directory with {CONFIG}",
            next_step="name the directory that nla-hub train printed as its run directory",
        )
    config = yaml_io.read(path / CONFIG, error=RunError)
    rehearsal = bool(config.pop("rehearsal", False))
    stages: dict[str, StageRecord] = {}
    notes: list[str] = []
    for name in STAGES:
        metrics = read_metrics(path / name / METRICS)
        finished = (path / name / DONE).is_file()
        summary = _json_file(path / name / DONE, notes) if finished else {}
        state = "done" if finished else "begun" if (path / name).is_dir() else "not begun"
        stages[name] = StageRecord(name, state, summary or {}, metrics)
        notes += metrics.notes
    result = _json_file(path / "eval" / "result.json", notes) if stages["eval"].state == "done" else None
    commits = [text_of(found, "commit") for found in (result or {}, *(s.summary for s in stages.values()))]
    return RunRecord(
        path, config, digest_of(config), rehearsal, stages, result, next(filter(None, commits), None), tuple(notes)
    )


def _json_file(path: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        notes.append(f"{path.parent.name}/{path.name} could not be read and is left out.")
        return None
    return found


def held_out_fve(evaluation: Mapping[str, Any]) -> FVE:
    """The FVE (raw variance) of an evaluation line's figures, with its n and interval."""
    from nla_hub.geometry import FVE

    n = figure(evaluation, "n")
    value = figure(evaluation, "fve") if n is not None else None
    low, high = figure(evaluation, "fve_low"), figure(evaluation, "fve_high")
    return FVE(value, "raw_variance", HELD_OUT, int(n or 0), low, high)


def result_fve(result: Mapping[str, Any]) -> FVE:
    """The FVE (raw variance) of a finished pair's evaluation."""
    from nla_hub.geometry import FVE

    found = mapping_of(mapping_of(result, "real"), "fve")
    n, dataset = figure(found, "n"), text_of(found, "dataset")
    value = None if n is None or dataset is None else figure(found, "value")
    low, high = figure(found, "low"), figure(found, "high")
    return FVE(value, "raw_variance", dataset or "unknown", int(n or 0), low, high)


def before_and_after(metrics: Metrics) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The first and the last evaluation line; None without any, the same twice with one."""
    return (metrics.evaluations[0], metrics.evaluations[-1]) if metrics.evaluations else None


def status_names(rows: Iterable[Mapping[str, float]], *, at_most: int = 5) -> list[str]:
    """The names in shares of statuses, the most frequent first."""
    totals: dict[str, float] = {}
    for row in rows:
        for name, share in row.items():
            totals[name] = totals.get(name, 0.0) + share
    return sorted(totals, key=lambda name: (-totals[name], name))[:at_most]


def shown(text: str, *, at_most: int = 1500) -> str:
    """A stranger's text as it may be printed on a page: control characters written out, cut where it is too long."""
    cut = text[:at_most]
    kept = "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
    return kept if len(text) <= at_most else f"{kept} ... ({len(text)} characters)"
