"""The page of a run's history, from the data that `history.history` returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nla_hub.training.view.records import held_out_fve
from nla_hub.units import duration

COMMAND = "python -m nla_hub.training.view.history --markdown"

FIGURES = {"held_out_fve_of_labels": "FVE of the labels (raw variance, held-out rows)"}

HEADINGS = {
    "fve": "FVE",
    "watch_cosine": "watch AR",
    "kl": "KL",
    "ok": "ok",
    "logprob_difference": "log-prob. difference",
    "ar_loss": "AR loss",
    "seconds": "seconds in all",
}


def render(history: dict[str, Any]) -> str:
    """A Markdown page of what `history` returned."""
    name = str(history["recipe"])
    parts = [_first_line(name) + f"\n# Training of {_md(name)}"]
    kind = "A rehearsal of recipe" if history["rehearsal"] else "Recipe"
    parts.append(f"{kind} {_md(name)}, hash {history['hash']}, code {_md(str(history['commit'] or 'not recorded'))}.")
    result = history["result"]
    if result is not None:
        parts.append(
            f"The finished pair, {_md(result['protocol'] or '?')}: {_md(result['fve'])}; cosine {_number(result['cosine'])}."
        )
    parts.append("## Stages")
    parts.append(_stages(history["stages"]))
    rl = history["rl"]
    if rl is None:
        parts.append("This run has no finished step of reinforcement learning.")
    else:
        parts += _rl_parts(rl)
    if history["notes"]:
        parts.append("## Notes")
        parts.append("\n".join(f"- {_md(note)}" for note in history["notes"]))
    return "\n\n".join(parts) + "\n"


def _first_line(name: str) -> str:
    safe = "".join(c for c in name if c.isalnum() or c in "._-")
    return f"<!-- Generated: {COMMAND} model_cards/{safe}/history.json > docs/{safe}-training.md -->"


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for stage in stages:
        names = {key: FIGURES.get(key, key.replace("_", " ")) for key in stage["figures"]}
        figures = ", ".join(f"{names[key]} {_short(value)}" for key, value in stage["figures"].items())
        steps = "-" if stage["steps"] is None else str(stage["steps"])
        seconds = "-" if stage["seconds"] is None else duration(stage["seconds"])
        rows.append((stage["stage"], stage["state"], steps, seconds, figures or "-"))
    return _table(("stage", "state", "steps", "wall time", "last figures"), rows)


def _rl_parts(rl: Mapping[str, Any]) -> list[str]:
    parts = ["## Reinforcement learning, step by step"]
    done = 0 if rl["steps_done"] is None else rl["steps_done"]
    parts.append(
        f"{done} of {_short(rl['steps'])} steps; {len(rl['rows'])} of them stand here. Means over the samples drawn at the "
        "step, FVE on raw variance with the held-out rows' reference. Gap: cosine by the live AR minus cosine by the watch AR, "
        "a second one that never pays anything."
    )
    headings = [HEADINGS.get(column, column.replace("_", " ")) for column in rl["columns"]]
    if rl["rows"]:
        parts.append(_table(headings, [[_short(value) for value in row] for row in rl["rows"]]))
    parts.append("## Greedy evaluations on held-out rows")
    if not rl["evaluations"]:
        parts.append("not measured")
    else:
        parts += _evaluations(rl["evaluations"])
    parts.append("## Alarms")
    if not rl["alarms"]:
        parts.append("None.")
    else:
        rows = [
            (
                str(a["step"]),
                a["name"],
                a["message"],
                _short(a["value"]),
                _short(a["limit"]),
                "yes" if a["fatal"] else "no",
            )
            for a in rl["alarms"]
        ]
        if len(rows) < rl["alarms_in_all"]:
            parts.append(f"The first {len(rows)} of {rl['alarms_in_all']}.")
        parts.append(_table(("step", "alarm", "what it says", "value", "limit", "fatal"), rows))
    return parts


def _evaluations(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for e in evaluations:
        facts = e["facts"] or {}
        cells = [
            e["cosine"],
            e["watch_cosine"],
            facts.get("recall"),
            facts.get("precision"),
            e["ok"],
            e["words"],
            e["tokens"],
        ]
        rows.append((str(e["step"]), str(held_out_fve(e)), *map(_short, cells)))
    columns = ("step", "FVE", "cosine", "watch AR", "facts recall", "facts precision", "ok", "words", "tokens")
    parts = [_table(columns, rows)]
    first, last = evaluations[0], evaluations[-1]
    before, after = (_fact_rows(e) for e in (first, last))
    if before or after:
        parts.append(f"Facts before (step {first['step']}) and after (step {last['step']}):")
        table = []
        for fact in {**before, **after}:
            a, b = before.get(fact, {}), after.get(fact, {})
            figures = [_number(row.get(key)) for key in ("recall", "precision") for row in (a, b)]
            table.append((fact.replace("_", " "), _short(b.get("n", a.get("n"))), *figures))
        names = ("fact", "n", "recall before", "recall after", "precision before", "precision after")
        parts.append(_table(names, table))
    samples = _samples(first, last)
    if samples:
        parts.append("## Samples")
        parts.append(samples)
    return parts


def _fact_rows(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {row["fact"]: row for row in (evaluation["facts"] or {}).get("rows", [])}


def _samples(first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    def by_place(evaluation: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
        return {(s["doc_id"], s["position"]): s for s in evaluation.get("samples", [])}

    before, after = by_place(first), by_place(last)
    rows = []
    for place in {**before, **after}:
        known = before.get(place) or after[place]
        rows.append(
            (f"...{known['context'] or ''}", _said(before.get(place)), _said(after.get(place)), known["gold"] or "-")
        )
    if not rows:
        return ""
    return _table(("text up to the token", f"step {first['step']}", f"step {last['step']}", "label"), rows)


def _said(sample: Mapping[str, Any] | None) -> str:
    if sample is None:
        return "not recorded"
    status = "" if sample["status"] == "ok" else f"({sample['status'] or 'status not recorded'}) "
    return f"{status}{sample['said'] or ''} (cosine {_number(sample['cosine'])})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, *rows]
    cells = ["| " + " | ".join(_md(cell) for cell in line) + " |" for line in lines]
    return "\n".join([cells[0], "| " + " | ".join("---" for _ in columns) + " |", *cells[1:]])


def _md(text: str) -> str:
    """Text on one line of a page in which nothing is markup, a link or the end of a table's cell."""
    marks = {c: f"\\{c}" for c in "\\|`*_[]<>~#$"} | {"&": "&amp;"}
    return " ".join("".join(marks.get(c, c) for c in text).split())


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _short(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
