"""The parts of the page that are figures: what was asked for, FVE and cosine, counts, and the charts over all rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from nla_hub.evaluation.render import NOT_MEASURED, number
from nla_hub.explain.result import JobResult
from nla_hub.geometry import FVE, Baseline
from nla_hub.report.payload import NAME, REASON, Pair, shown
from nla_hub.report.scale import EDGES
from nla_hub.report.survey import POSITIONS, Bin, Survey
from nla_hub.report.tokens import CLASSES
from nla_hub.svg import Bars, bar_chart

DISCLAIMER = (
    "A high FVE says that the words bring the vector's direction back. It does not make an explanation true: the words may "
    "be a code between the two models, and they may say things that the text does not."
)

BASELINES: tuple[Baseline, ...] = ("raw_variance", "mean_norm")


@dataclass(frozen=True)
class Job(Pair):
    """A job on the page with what it says of itself."""

    result: JobResult

    @property
    def state(self) -> str:
        """Whether the job is done."""
        if self.result.manifest is not None:
            return "done"
        blocks = len(self.result.parts)
        return f"unfinished: {blocks} of ? blocks; every figure below is of what there is so far"

    def error(self, rows: Bin) -> float | None:
        """Mean error of some rows, 1 - FVE; None without rows."""
        mean = rows.mean_mse
        return None if mean is None else mean / self.denominator


Lines = Sequence[str]


def facts(jobs: Sequence[Job]) -> str:
    """What the jobs found and what they are: a list of one, a table of several with a column each."""
    rows: list[tuple[str, Callable[[Job], Lines]]] = [
        ("FVE", fve_lines),
        ("mean cosine", lambda job: [number(mean_cosine(job))]),
        ("rows, documents", lambda job: [f"{job.survey.rows:,}, {job.survey.documents:,}"]),
        ("state", lambda job: [job.state]),
        ("status", lambda job: _counts(job.survey.statuses)),
        ("errors", lambda job: _counts(_reasons(job)) if job.survey.errors else ["0"]),
        ("flags", lambda job: _counts(job.survey.flags)),
        ("pair", lambda job: [_text(job.result.config.get("nla"))]),
        (
            "base model, layer",
            lambda job: [f"{_text(job.result.config.get('base_model'))}, {_layer(job.result)}"],
        ),
        ("data", lambda job: _mapping(job.result.mapping("data"))),
        ("positions, samples", lambda job: [_positions(job.result.config)]),
    ]
    if any(job.survey.waiting for job in jobs):
        rows.append(("copies not filled in yet", lambda job: [f"{job.survey.waiting:,}, counted in no figure"]))
    if any(_backed_off(job) for job in jobs):
        rows.append(("computed in smaller batches", lambda job: [_backed_off(job) or "-"]))
    if len(jobs) == 1:
        items = "".join(f"<div><dt>{name}</dt><dd>{_lines(read(jobs[0]))}</dd></div>" for name, read in rows)
        return f'<dl class="facts">{items}</dl>'
    head = "".join(f'<th scope="col">{escape(job.name)}</th>' for job in jobs)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{_lines(read(job))}</td>" for job in jobs)}</tr>'
        for name, read in rows
    )
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="What was done and found">'
        f'<table class="facts"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def fve_lines(job: Job) -> list[str]:
    """FVE with each baseline, its data set and n: what the finished job measured, or what its rows give so far."""
    stored = (job.result.manifest or {}).get("fve")
    if isinstance(stored, list) and (lines := [line for line in stored if isinstance(line, Mapping)]):
        return [shown(_stored_fve(line), REASON) for line in lines]
    return [str(_own_fve(job, baseline)) for baseline in BASELINES]


def mean_cosine(job: Job) -> float | None:
    """Mean cosine over the rows with a status, those without a score at 0; None without any."""
    stored = _figure((job.result.manifest or {}).get("mean_cosine"))
    if stored is not None:
        return stored
    survey = job.survey
    return survey.cosine / survey.total.n if survey.total.n else None


def _figure(value: object) -> float | None:
    """A figure of a manifest; None for anything else."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond every float
        return None


def _stored_fve(line: Mapping[str, Any]) -> str:
    baseline: Baseline = "mean_norm" if line.get("baseline") == "mean_norm" else "raw_variance"
    dataset = str(line.get("dataset") or "data set not recorded")
    n = line.get("n")
    return str(FVE(_figure(line.get("value")), baseline, dataset, n if isinstance(n, int) else 0))


def _own_fve(job: Job, baseline: Baseline) -> FVE:
    reference, survey = job.result.reference, job.survey
    mean = survey.total.mean_mse
    if reference is None or mean is None or not reference.denominator(baseline) > 0:
        return FVE(None, baseline, "not measured", survey.total.n)
    return FVE(1.0 - mean / reference.denominator(baseline), baseline, reference.dataset, survey.total.n)


def _lines(lines: Iterable[str]) -> str:
    return "<br>".join(escape(line) for line in lines)


def _text(value: object) -> str:
    return NOT_MEASURED if value is None else shown(str(value), NAME)


def _layer(result: JobResult) -> str:
    return _text((result.mapping("site") or {}).get("layer"))


def _mapping(value: Mapping[str, Any] | None) -> list[str]:
    if value is None:
        return [NOT_MEASURED]
    known = [(key, item) for key, item in list(value.items())[:20] if item is not None]
    return [
        f"{key}: {shown(', '.join(map(str, item)) if isinstance(item, Mapping) else str(item), NAME)}"
        for key, item in known
    ]


def _positions(config: Mapping[str, Any]) -> str:
    return f"{_text(config.get('positions'))}, n={_text(config.get('n'))}"


def _counts(counts: Mapping[str, int]) -> list[str]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [f"{n:,} {shown(name, REASON)}" for name, n in ordered] or ["none"]


def _reasons(job: Job) -> Mapping[str, int]:
    """Reasons as the finished job counted them, which leaves out where in the input each was; else as the rows say."""
    stored = (job.result.manifest or {}).get("errors")
    if isinstance(stored, Mapping) and stored and all(isinstance(n, int) for n in stored.values()):
        return {str(name): n for name, n in stored.items()}
    return job.survey.errors


def _backed_off(job: Job) -> str:
    blocks = (job.result.manifest or {}).get("backed_off")
    if not isinstance(blocks, list) or not blocks:
        return ""
    more = ", ..." if len(blocks) > 20 else ""
    named = ", ".join(str(block) for block in blocks[:20])
    return f"{len(blocks)} blocks ({named}{more}): equal to an undisturbed run, not byte-identical"


def charts(jobs: Sequence[Job]) -> str:
    """Error by position, norm and token class, and how many rows have which error, over all rows of the jobs."""
    spans = [_span(a, b) for a, b in zip(POSITIONS, [*POSITIONS[1:], None], strict=True)]
    mark = 1.0
    parts = [
        _errors("Error by position", spans, jobs, lambda s: s.positions, "position", mark),
        _errors("Error by token class", CLASSES, jobs, lambda s: [s.classes[name] for name in CLASSES], "class", mark),
    ]
    for i, job in enumerate(jobs):
        own = job.survey.norm_quantiles()
        title = "Error by norm" if len(jobs) == 1 else f"Error by norm: {job.name}"
        series = [_series(job, [rows for _, rows in own])]
        parts.append(bar_chart(title, [f"up to {_norm(top)}" for top, _ in own], series, key=f"norm{i}", mark=mark))
    parts += [_shares(i, job, len(jobs)) for i, job in enumerate(jobs)]
    return f'<div class="charts">{"".join(parts)}</div>'


def _norm(value: float) -> str:
    return f"{value:,.0f}" if 100 <= value < 1e9 else f"{value:.3g}"


def _span(first: int, after: int | None) -> str:
    if after is None:
        return f"{first:,} on"
    return f"{first:,}" if first == after - 1 else f"{first:,} to {after - 1:,}"


def _errors(
    title: str,
    bins: Sequence[str],
    jobs: Sequence[Job],
    read: Callable[[Survey], Sequence[Bin]],
    key: str,
    mark: float,
) -> str:
    used = [i for i in range(len(bins)) if any(read(job.survey)[i].n for job in jobs)]
    series = [_series(job, [read(job.survey)[i] for i in used]) for job in jobs]
    return bar_chart(title, [bins[i] for i in used], series, key=key, mark=mark)


def _series(job: Job, bins: Sequence[Bin]) -> Bars:
    values = [job.error(one) for one in bins]
    return Bars(job.name, values, [one.n for one in bins])


def _shares(i: int, job: Job, jobs: int) -> str:
    """Share of the scored rows in each step of the colour scale."""
    counts = job.survey.steps
    total = sum(counts)
    names = [f"below {EDGES[0]:g}", *(f"from {edge:g}" for edge in EDGES)]
    title = "Share of rows by error" if jobs == 1 else f"Share of rows by error: {job.name}"
    return bar_chart(
        title, names, [Bars(job.name, [n / total if total else None for n in counts], counts)], key=f"share{i}"
    )
