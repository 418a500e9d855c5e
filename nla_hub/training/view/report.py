"""`report.html` of a run: one self-contained page that says what was trained and how it went.

No script, nothing fetched; everything from the run's files is escaped, because explanations are text that a model wrote.
Figures that the files do not hold are "not measured".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nla_hub import yaml_io
from nla_hub.evaluation.render import NOT_MEASURED, interval, number
from nla_hub.geometry import FVE
from nla_hub.svg import STYLE as CHART_STYLE
from nla_hub.training.view.charts import rl_charts, supervised_charts
from nla_hub.training.view.records import (
    RunRecord,
    before_and_after,
    figure,
    held_out_fve,
    mapping_of,
    mappings_of,
    read_run,
    result_fve,
    shown,
    text_of,
)
from nla_hub.units import duration

NAME = "report.html"

ALARMS_ONE_BY_ONE = 40
"""More alarms than this are counted by name."""

SAMPLES = 8

STYLE = (
    ":root{color-scheme:light dark;--bg:#fff;--fg:#1b1b1b;--soft:#595959;--edge:#8886;--warn:#9a3412;--panel:#8881}"
    "@media(prefers-color-scheme:dark){:root{--bg:#161616;--fg:#ececec;--soft:#b0b0b0;--warn:#fdba74}}"
    "*{box-sizing:border-box}"
    "body{margin:0 auto;max-width:1360px;padding:0 16px 48px;background:var(--bg);color:var(--fg);"
    "font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}"
    "h1{font-size:1.6em;line-height:1.2;margin:.9em 0 .2em}h2{font-size:1.2em;margin:2em 0 .5em}"
    "h3{font-size:1em;margin:0 0 .3em}p,ul{margin:.4em 0}.quiet{color:var(--soft);font-size:.85em}"
    ".verdict{border-left:4px solid var(--c0);padding:.4em 0 .4em .8em;margin:1em 0}"
    ".verdict li{margin:.15em 0}.verdict ul{list-style:none;padding:0;margin:0}"
    ".alarm{border-left:4px solid var(--warn);padding-left:.6em;margin:.4em 0}"
    ".charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:24px 20px}"
    "figure{margin:0;min-width:0}.legend{font-size:.85em}.entry{margin-right:1em;white-space:nowrap}"
    ".chart .swatch{display:inline-block;width:28px;height:8px}"
    ".scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.92em;overflow-wrap:normal}"
    "th,td{padding:.25em .7em;text-align:left;border-bottom:1px solid var(--edge);vertical-align:top}"
    "td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}td.n{white-space:nowrap}"
    ".sample{border-top:1px solid var(--edge);padding:.8em 0}"
    ".sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,260px),1fr));gap:10px;margin-top:.5em}"
    ".side{background:var(--panel);padding:.5em .7em;border-radius:4px;min-width:0}.side h4{margin:0;font-size:.85em}"
    ".text{white-space:pre-wrap;margin:.2em 0 0}pre{background:var(--panel);padding:.8em;white-space:pre-wrap;font-size:.85em}"
)

Column = tuple[str, bool]
"""Heading, and whether it holds figures."""


def write_report(run: Path) -> Path:
    """Write `report.html` into a run directory and return its path.

    The run may be unfinished, without an RL stage, or have lines cut in half.

    Raises:
        RunError: there is no run, or its config.yaml cannot be read.
    """
    place = run / NAME
    yaml_io.write_text(place, page(read_run(run)))
    return place


def page(run: RunRecord) -> str:
    """The whole page."""
    title = f"Training run {shown(run.name, at_most=100)} {run.digest}"
    parts = [_header(run), _verdict(run), _stages(run), _alarms(run)]
    if run.has_rl:
        parts.append(_section("Reinforcement learning", f'<div class="charts">{"".join(rl_charts(run.rl))}</div>'))
        parts += [_facts(run), _samples(run)]
    charts = "".join(supervised_charts(run))
    parts.append(_section("Supervised stages", f'<div class="charts">{charts}</div>' if charts else "<p>not begun</p>"))
    recipe = escape(shown(yaml_io.dumps(run.config), at_most=60_000))
    parts.append(_section("Recipe", f'<pre tabindex="0" aria-label="recipe">{recipe}</pre>'))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CHART_STYLE}{STYLE}</style></head><body><main>"
        f"{''.join(parts)}</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    name = title.lower().replace(" ", "-")
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{body}</section>'


def _table(caption: str, columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> str:
    def cell(i: int, text: str) -> str:
        if i == 0:
            return f'<th scope="row">{escape(text)}</th>'
        return f'<td class="n">{escape(text)}</td>' if columns[i][1] else f"<td>{escape(text)}</td>"

    head = "".join(f'<th scope="col"{" class=n" if n else ""}>{escape(name)}</th>' for name, n in columns)
    body = "".join(f"<tr>{''.join(cell(i, text) for i, text in enumerate(row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _header(run: RunRecord) -> str:
    kind = "rehearsal of recipe" if run.rehearsal else "recipe"
    summary = text_of(run.config, "summary")
    lines = [
        f"<h1>Training run: {escape(shown(run.name, at_most=100))}</h1>",
        f'<p class="quiet">{kind} hash {run.digest}; code {escape(shown(run.commit or "not recorded", at_most=80))}</p>',
        f"<p>{escape(shown(summary))}</p>" if summary else "",
    ]
    return f"<header>{''.join(lines)}</header>"


def _stages(run: RunRecord) -> str:
    rows = []
    for name, stage in run.stages.items():
        if name == "rl" and not run.has_rl:
            continue
        seconds = NOT_MEASURED if stage.seconds is None else duration(stage.seconds)
        rows.append((name, stage.state, _progress(stage.metrics.last), "-" if stage.state == "not begun" else seconds))
    columns = (("stage", False), ("state", False), ("steps", True), ("wall time", True))
    notes = "".join(f'<p class="quiet">{escape(note)}</p>' for note in run.notes)
    return _section("Stages", _table("Stages", columns, rows) + notes)


def _progress(last: Mapping[str, Any]) -> str:
    step, steps = figure(last, "step"), figure(last, "steps")
    if step is None:
        return "-"
    return f"{step:.0f}" if steps is None else f"{step:.0f} of {steps:.0f}"


# -- the verdict -----------------------------------------------------------------------------------------------


def _verdict(run: RunRecord) -> str:
    lines = [escape(line) for line in verdict(run)]
    return f'<div class="verdict"><ul>{"".join(f"<li>{line}</li>" for line in lines)}</ul></div>'


def verdict(run: RunRecord) -> list[str]:
    """What the run did, in a few sentences of figures."""
    lines = []
    ends = before_and_after(run.rl)
    if not run.has_rl:
        lines.append("This run has no RL stage.")
    elif run.stages["rl"].state == "not begun":
        lines.append("RL: not begun.")
    else:
        lines += _moved(*ends) if ends is not None else ["RL: FVE not measured yet."]
        fatal = sum(mapping_of(row, "alarm").get("fatal") is True for row in run.rl.alarms)
        count = len(run.rl.alarms)
        said = "no alarm" if count == 0 else "1 alarm" if count == 1 else f"{count} alarms"
        lines.append(f"RL: {said}{f', {fatal} of them fatal' if fatal else ''}.")
    if run.result is not None:
        cosine = figure(mapping_of(run.result, "real"), "cosine")
        lines.append(f"Finished pair: {result_fve(run.result)}; cosine {number(cosine)}.")
    else:
        lines.append("Finished pair: not measured.")
    return lines


def _moved(first: Mapping[str, Any], last: Mapping[str, Any]) -> list[str]:
    a, b = mapping_of(first, "evaluation"), mapping_of(last, "evaluation")
    start, end = held_out_fve(a), held_out_fve(b)
    if first is last:
        return [f"RL at step {first['step']:g}: {start}; cosine {number(figure(a, 'cosine'))}; {_facts_of(a)}."]
    at, then = f"at step {first['step']:g}", f"at step {last['step']:g}"
    same = start.value is not None and end.value is not None and start.n == end.n
    later = interval(end.value, end.low, end.high) if same else end
    lines = [
        f"RL: {start} {at}, {later} {then}{_compared(start, end)}.",
        f"RL: cosine {number(figure(a, 'cosine'))} {at}, {number(figure(b, 'cosine'))} {then}.",
    ]
    if mapping_of(a, "facts") or mapping_of(b, "facts"):
        lines.append(f"RL: {_facts_of(a)} {at}; {_facts_of(b)} {then}.")
    return lines


def _compared(start: FVE, end: FVE) -> str:
    if start.low is None or start.high is None or end.low is None or end.high is None:
        return ""
    if end.low > start.high:
        return ": it rose"
    return ": it fell" if end.high < start.low else ": the intervals overlap"


def _facts_of(evaluation: Mapping[str, Any]) -> str:
    facts = mapping_of(evaluation, "facts")
    return f"facts recall {number(figure(facts, 'recall'))}, precision {number(figure(facts, 'precision'))}"


# -- alarms ----------------------------------------------------------------------------------------------------


def _alarms(run: RunRecord) -> str:
    if not run.has_rl:
        return ""
    alarms = [mapping_of(row, "alarm") | {"step": row["step"]} for row in run.rl.alarms]
    if not alarms:
        return _section("Alarms", "<p>none</p>")
    if len(alarms) <= ALARMS_ONE_BY_ONE:
        said = [_said(alarm, f"Step {alarm['step']:g}") for alarm in alarms]
    else:
        said = []
        for name in dict.fromkeys(alarm_name(alarm) for alarm in alarms):
            same = [alarm for alarm in alarms if alarm_name(alarm) == name]
            span = f"{len(same)} times from step {same[0]['step']:g} to step {same[-1]['step']:g}; the last time"
            said.append(_said(same[-1], span if len(same) > 1 else f"Step {same[0]['step']:g}"))
            if len(said) == ALARMS_ONE_BY_ONE:
                said.append("<p>Further kinds of alarms are in rl/metrics.jsonl.</p>")
                break
    return _section("Alarms", "".join(f'<div class="alarm">{text}</div>' for text in said))


def alarm_name(alarm: Mapping[str, Any]) -> str:
    """What kind of alarm it is."""
    return shown(text_of(alarm, "name") or "unnamed", at_most=60).replace("_", " ")


def _said(alarm: Mapping[str, Any], when: str) -> str:
    value, limit = figure(alarm, "value"), figure(alarm, "limit")
    figures = "" if value is None else f" Value {value:.4g}" + ("." if limit is None else f", limit {limit:.4g}.")
    end = " Fatal: nothing after it can be trusted." if alarm.get("fatal") is True else ""
    message = shown(text_of(alarm, "message") or "", at_most=800)
    return f"<p><strong>{escape(alarm_name(alarm))}</strong>. {when}: {escape(message)}{figures}{end}</p>"


# -- facts and samples -----------------------------------------------------------------------------------------


def _facts(run: RunRecord) -> str:
    ends = before_and_after(run.rl)
    tables = [
        {
            text_of(row, "fact") or "?": row
            for row in mappings_of(mapping_of(mapping_of(e, "evaluation"), "facts"), "rows")
        }
        for e in ends or ()
    ]
    if ends is None or not any(tables):
        return _section("Facts in the explanations", "<p>not measured</p>")
    before, after = tables
    rows = []
    for name in list({**before, **after})[:100]:
        a, b = before.get(name, {}), after.get(name, {})
        cells = [number(figure(row, key)) for key in ("recall", "precision") for row in (a, b)]
        counts = [
            NOT_MEASURED if (n := figure(row, key)) is None else f"{n:.0f}" for key in ("n", "named") for row in (a, b)
        ]
        rows.append((shown(name.replace("_", " "), at_most=60), *cells, *counts))
    columns = [("fact", False)]
    columns += [
        (f"{name} {side}", True) for name in ("recall", "precision", "rows", "named") for side in ("before", "after")
    ]
    when = f"Before: step {ends[0]['step']:g}. After: step {ends[1]['step']:g}."
    if ends[0] is ends[1]:
        when = f"Measured once so far, at step {ends[0]['step']:g}: before and after are the same."
    steps = f"<p>{when} Greedy explanations of held-out rows.</p>"
    return _section("Facts in the explanations", steps + _table("Facts before and after", columns, rows))


def _samples(run: RunRecord) -> str:
    every = run.rl.evaluations
    chosen = [every[i] for i in sorted({0, len(every) // 2, len(every) - 1})] if every else []
    sides = [(row["step"], _by_place(mapping_of(row, "evaluation"))) for row in chosen]
    places = list(dict.fromkeys(place for _, found in sides for place in found))[:SAMPLES]
    if not places:
        return _section("Samples", "<p>none recorded</p>")
    return _section("Samples", "".join(_sample(i, place, sides) for i, place in enumerate(places, 1)))


Place = tuple[str, str]


def _by_place(evaluation: Mapping[str, Any]) -> dict[Place, dict[str, Any]]:
    return {(str(s.get("doc_id")), str(s.get("position"))): s for s in mappings_of(evaluation, "samples")}


def _sample(i: int, place: Place, sides: Sequence[tuple[float, Mapping[Place, dict[str, Any]]]]) -> str:
    known = next(found[place] for _, found in sides if place in found)
    doc, position = (shown(part, at_most=80) for part in place)
    context, gold = text_of(known, "context"), text_of(known, "gold")
    parts = [f"<h3>{i}. {escape(doc)}, position {escape(position)}</h3>"]
    if context:
        parts.append(f'<p>Reads: <bdi class="text">{escape(shown(context))}</bdi></p>')
    if gold:
        parts.append(f'<p class="quiet">Label: <bdi class="text">{escape(shown(gold))}</bdi></p>')
    columns = "".join(_side(step, found.get(place)) for step, found in sides)
    return f'<article class="sample">{"".join(parts)}<div class="sides">{columns}</div></article>'


def _side(step: float, sample: Mapping[str, Any] | None) -> str:
    if sample is None:
        return f'<div class="side"><h4>Step {step:g}</h4><p class="quiet">not recorded</p></div>'
    text, status = explanation_of(sample)
    cosine = interval(figure(sample, "cosine"), None, None)
    said = "" if status == "ok" else f", {escape(shown(status, at_most=40))}"
    return (
        f'<div class="side"><h4>Step {step:g}: cosine {cosine}{said}</h4>'
        f'<p class="text" dir="auto"><bdi>{escape(shown(text))}</bdi></p></div>'
    )


def explanation_of(sample: Mapping[str, Any]) -> tuple[str, str]:
    """The text of a sample, raw where it is unusable, and its status."""
    status = text_of(sample, "status") or "status not recorded"
    return text_of(sample, "text") or text_of(sample, "raw") or "", status
