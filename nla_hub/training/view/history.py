"""The whole history of a run as compact data, and as a page.

    python -m nla_hub.training.view.history RUN > model_cards/tiny/history.json
    python -m nla_hub.training.view.history --markdown model_cards/tiny/history.json > docs/tiny-training.md

The data are what the run's files hold, fewer lines of them and rounded; nothing is measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nla_hub.errors import NLAError, RunError
from nla_hub.training.view.history_page import render
from nla_hub.training.view.records import (
    RunRecord,
    StageRecord,
    figure,
    mapping_of,
    mappings_of,
    read_run,
    result_fve,
    shares,
    shown,
    text_of,
)

__all__ = ["history", "main", "render"]

T = TypeVar("T")

ROWS = 60
"""Step lines and evaluations kept, the first and the last among them."""

ALARMS = 200

TIMING = ("seconds", "step", "steps", "lr")
"""Not among the figures of a stage."""

STEP_FIGURES = (
    "step",
    "reward",
    "fve",
    "cosine",
    "watch_cosine",
    "gap",
    "kl",
    "entropy",
    "length",
    "ok",
    "logprob_difference",
    "ar_loss",
    "seconds",
)
"""The columns of the step lines."""

EVALUATION_FIGURES = (
    "n",
    "fve",
    "fve_low",
    "fve_high",
    "fve_mean_norm",
    "cosine",
    "permuted",
    "watch_cosine",
    "words",
    "tokens",
    "repetition",
)


def history(run: Path) -> dict[str, Any]:
    """The history of a run, ready for JSON; figures that the files do not hold are None.

    Raises:
        RunError: there is no run, or its config.yaml cannot be read.
    """
    record = read_run(run)
    return {
        "recipe": shown(record.name, at_most=100),
        "hash": record.digest,
        "rehearsal": record.rehearsal,
        "commit": None if record.commit is None else shown(record.commit, at_most=80),
        "stages": [_stage(s) for s in record.stages.values() if s.name != "rl" or record.has_rl],
        "rl": _rl(record) if record.stages["rl"].state != "not begun" else None,
        "result": None if record.result is None else _result(record.result),
        "notes": list(record.notes),
    }


def _stage(stage: StageRecord) -> dict[str, Any]:
    figures = {}
    if stage.name != "eval":  # the result says more
        figures = {key: _round(value) for key in stage.summary if (value := figure(stage.summary, key)) is not None}
    if stage.name != "rl":  # its lines stand below
        for row in stage.metrics.steps:
            figures |= {key: _round(value) for key in row if (value := figure(row, key)) is not None}
        for model, rows in stage.metrics.models.items():
            for row in rows:
                found = {key: figure(row, key) for key in row if key not in TIMING}
                figures |= {f"{model}: {key}": _round(value) for key, value in found.items() if value is not None}
    seconds = stage.seconds
    return {
        "stage": stage.name,
        "state": stage.state,
        "seconds": None if seconds is None else _round(seconds),
        "steps": None if (step := figure(stage.metrics.last, "step")) is None else int(step),
        "figures": {shown(key, at_most=60): value for key, value in figures.items() if key not in TIMING},
    }


def _rl(record: RunRecord) -> dict[str, Any]:
    metrics = record.rl
    planned = figure(metrics.last, "steps")
    evaluations = thinned(metrics.evaluations, ROWS)
    kept = [_evaluation(row, samples=row in (evaluations[0], evaluations[-1])) for row in evaluations]
    return {
        "steps": None if planned is None else int(planned),
        "steps_done": None if not metrics.steps else int(metrics.last["step"]),
        "columns": list(STEP_FIGURES),
        "rows": [[_rounded(row, key) for key in STEP_FIGURES] for row in thinned(metrics.steps, ROWS)],
        "evaluations": kept,
        "alarms": [_alarm(row) for row in metrics.alarms[:ALARMS]],
        "alarms_in_all": len(metrics.alarms),
    }


def _evaluation(row: Mapping[str, Any], *, samples: bool) -> dict[str, Any]:
    found = mapping_of(row, "evaluation")
    facts = mapping_of(found, "facts")
    data: dict[str, Any] = {"step": int(row["step"])}
    data |= {key: _rounded(found, key) for key in EVALUATION_FIGURES}
    data["ok"] = _round(shares(found).get("ok", 0.0)) if shares(found) else None
    data["facts"] = None
    if facts:
        rows = [
            {"fact": shown(text_of(f, "fact") or "?", at_most=60)}
            | {key: _rounded(f, key) for key in ("n", "recall", "named", "precision")}
            for f in mappings_of(facts, "rows")
        ]
        data["facts"] = {"recall": _rounded(facts, "recall"), "precision": _rounded(facts, "precision"), "rows": rows}
    if samples:
        data["samples"] = [_sample(sample) for sample in mappings_of(found, "samples")[:8]]
    return data


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    def cut(key: str) -> str | None:
        text = text_of(sample, key)
        return None if text is None else shown(text, at_most=800)

    place = {key: shown(str(sample.get(key)), at_most=80) for key in ("doc_id", "position")}
    said = cut("text") if text_of(sample, "text") else cut("raw")
    return {
        **place,
        "context": cut("context"),
        "said": said,
        "status": cut("status"),
        "cosine": _rounded(sample, "cosine"),
        "gold": cut("gold"),
    }


def _alarm(row: Mapping[str, Any]) -> dict[str, Any]:
    alarm = mapping_of(row, "alarm")
    return {
        "step": int(row["step"]),
        "name": shown(text_of(alarm, "name") or "unnamed", at_most=60).replace("_", " "),
        "message": shown(text_of(alarm, "message") or "", at_most=800),
        "value": _rounded(alarm, "value"),
        "limit": _rounded(alarm, "limit"),
        "fatal": alarm.get("fatal") is True,
    }


def _result(result: Mapping[str, Any]) -> dict[str, Any]:
    protocol = text_of(mapping_of(result, "protocol"), "name")
    cosine = _rounded(mapping_of(result, "real"), "cosine")
    return {"protocol": protocol, "fve": str(result_fve(result)), "cosine": cosine}


def _rounded(mapping: Mapping[str, Any], key: str) -> float | None:
    value = figure(mapping, key)
    return None if value is None else _round(value)


def _round(value: float) -> float:
    """Five figures; whole numbers stay whole."""
    return int(value) if value.is_integer() and abs(value) < 1e9 else float(f"{value:.5g}")


def thinned(rows: Sequence[T], at_most: int) -> list[T]:
    """At most so many of the rows, evenly, the first and the last among them."""
    if len(rows) <= at_most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (at_most - 1))] for i in range(at_most)]


# -- the command ---------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the history of a run as JSON, or the page of one that was printed before; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nla_hub.training.view.history", description=main.__doc__)
    parser.add_argument("place", metavar="RUN", type=Path, help="a run directory; with --markdown a history.json")
    parser.add_argument("--markdown", action="store_true", help="print the page of a history.json")
    given = parser.parse_args(arguments)
    try:
        if given.markdown:
            print(render(_read(given.place)), end="")
        else:
            print(json.dumps(history(given.place), ensure_ascii=False, allow_nan=False))
    except NLAError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise RunError(
            "This history cannot be read.",
            where=path,
            next_step="print one: python -m nla_hub.training.view.history RUN",
        ) from cause
    return found


if __name__ == "__main__":
    sys.exit(main())
