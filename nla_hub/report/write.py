"""`report.html` of a job: one file that needs no network and runs nothing but its own script.

Figures are computed over all rows; tokens and lists are a bounded choice of them (`choice.py`). What strangers wrote
goes in as JSON and reaches the page as text alone; the page's Content-Security-Policy allows only the script and the
style that it was written with, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from nla_hub import svg, yaml_io
from nla_hub.errors import InputError
from nla_hub.explain.result import JobResult
from nla_hub.log import logger
from nla_hub.report import scale
from nla_hub.report.choice import choose
from nla_hub.report.explanation_map import AT_LEAST, Method, explanation_map, installed
from nla_hub.report.figures import DISCLAIMER, Job, charts, facts
from nla_hub.report.payload import LISTS, NAME, Payload, shown
from nla_hub.report.survey import survey

FILE_NAME = "report.html"
DOCUMENTS, ROWS = 12, 30
"""Documents that are shown, and rows of each list, unless told otherwise."""

AT_MOST_JOBS = 6
"""Jobs side by side: as many as a chart has colours."""

LIST_TITLES = {
    "worst": "Worst rows, special tokens left out",
    "best": "Best rows, special tokens left out",
    "unusable": "Rows without a usable explanation",
    "failed": "Rows with an error",
}


def write_report(
    outputs: Sequence[Path],
    target: Path | None = None,
    *,
    documents: int = DOCUMENTS,
    rows: int = ROWS,
    map_by: Method | None = None,
) -> Path:
    """Write the page of one job, or of several over the same documents side by side, and return its path.

    Args:
        outputs: directories that `nla-hub explain --data` wrote, finished or not.
        target: the file; `report.html` in the first directory by default.
        documents: how many are shown from their beginning.
        rows: how many of the worst, best, unusable and failed rows of each job are listed.
        map_by: "umap", "tsne" or "off"; what is installed by default.

    Raises:
        InputError: no job, or more than `AT_MOST_JOBS`.
        RunError: a directory that no job wrote, a part that cannot be read, jobs without a common document.
        MissingExtraError: the method of the map is not installed.
    """
    if not 1 <= len(outputs) <= AT_MOST_JOBS:
        raise InputError("A report shows a few jobs.", got=f"{len(outputs)} jobs", expected=f"1 to {AT_MOST_JOBS}")
    opened = [JobResult.open(path) for path in outputs]
    method = map_by if map_by is not None else installed()
    if map_by is None and method == "off":
        logger.info("No map of explanations: it needs the viz extra (pip install 'nla-hub[viz]').")
    place = target if target is not None else outputs[0] / FILE_NAME
    yaml_io.write_text(place, page(opened, documents=documents, rows=rows, method=method))
    return place


def page(results: Sequence[JobResult], *, documents: int, rows: int, method: Method) -> str:
    """The whole page."""
    jobs = []
    for name, result in zip(_names(results), results, strict=True):
        by = scale.denominator(result.reference)
        jobs.append(Job(name, by, survey(result, rows=rows, denominator=by), result))
    payload = Payload(jobs, choose([job.survey for job in jobs], documents=documents))
    found = explanation_map(list(payload.texts()), method)
    data = payload.to_json(found)
    title = f"Explanations: {', '.join(job.name for job in jobs)}"
    body = "".join(
        [
            f'<header><h1>{escape(title)}</h1>{facts(jobs)}<p class="lead">{DISCLAIMER}</p></header>',
            _section("tokens", "Tokens", _tokens(jobs, len(payload.rows))),
            _section("lists", "Rows", _lists(jobs)),
            _section("figures", "Error over all rows", _about_charts(jobs) + charts(jobs)),
            _section("map", "Map of explanations", _map(method, found is not None)),
        ]
    )
    return _document(title, body, data)


def _document(title: str, body: str, data: str) -> str:
    style = svg.STYLE + scale.css() + _resource("page.css")
    script = _resource("page.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        '<a class="skip" href="#tokens">Go to the tokens</a>'
        f'<div class="page"><main>{body}</main>'
        '<aside id="panel" aria-label="Explanation of the token" tabindex="-1"></aside></div>'
        '<p id="live" class="unseen" role="status" aria-live="polite"></p>'
        f'<script type="application/json" id="data">{data}</script><script>{script}</script></body></html>\n'
    )
    return text.encode("utf-8", "replace").decode()  # YAML and JSON can hold half of a surrogate pair


def _resource(name: str) -> str:
    return files("nla_hub.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _names(results: Sequence[JobResult]) -> list[str]:
    """What the jobs are called: pair and layer, and the directory too where that is not enough."""
    names = []
    for result in results:
        layer = (result.mapping("site") or {}).get("layer")
        names.append(
            shown(str(result.config.get("nla") or "pair"), NAME) + (f", layer {layer}" if layer is not None else "")
        )
    if len(set(names)) == len(names):
        return names
    return [
        f"{name} ({result.path.name or result.path.resolve().name})"
        for name, result in zip(names, results, strict=True)
    ]


def _section(key: str, title: str, body: str) -> str:
    return f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>{body}</section>'


def _tokens(jobs: Sequence[Job], shown_rows: int) -> str:
    total = sum(job.survey.rows for job in jobs)
    has_waiting = any(job.survey.waiting for job in jobs)
    waiting = '<li><span class="tok waiting">copy, not filled in yet</span></li>' if has_waiting else ""
    steps = "".join(f'<li class="e{i}">{escape(label)}</li>' for i, label in enumerate(scale.LABELS))
    return (
        f'<p class="quiet">{_unit(jobs)}</p>'
        f'<div class="legend-bar"><ul class="scale" aria-label="Colours: error, from small to large">{steps}</ul>'
        '<ul class="marks" aria-label="Patterns"><li><span class="tok unusable">no usable text</span></li>'
        '<li><span class="tok failed">in error</span></li><li><span class="tok unscored">not measured</span></li>'
        f"{waiting}<li>text without a colour was not explained</li></ul></div>"
        '<form role="search" id="search"><label for="q">Search explanations and tokens</label>'
        '<input id="q" type="search" autocomplete="off" spellcheck="false" aria-describedby="q-help" aria-keyshortcuts="/">'
        '<button type="button" id="before">Previous</button><button type="button" id="after">Next</button>'
        '<output id="hits" for="q"></output></form>'
        f'<p class="quiet" id="q-help">Searches the {shown_rows:,} rows on this page, of {total:,}. Keys: / to search, arrows, '
        "Home and End to move between tokens, Enter to pin an explanation, Esc to let it go.</p>"
        '<ol id="found" hidden></ol><div id="documents"></div>'
        "<noscript><p>Tokens, lists and the map need scripts, which are off in this viewer. The figures do not.</p></noscript>"
    )


def _unit(jobs: Iterable[Job]) -> str:
    """What a colour means, for each kind of reference that there is."""
    lines = []
    for job in jobs:
        reference = job.result.reference
        if reference is not None and reference.raw_variance == job.denominator:
            unit = (
                f"mse divided by {job.denominator:.3f}, the raw variance of {shown(reference.dataset, NAME)} "
                f"(n={reference.n:,}): the row's part of 1 - FVE. 0 is a vector that came back whole, 1 as far off as "
                "predicting the mean."
            )
        else:
            unit = (
                "mse / 2, because the pair has no reference: 0 is a vector that came back whole, 1 is orthogonal to it."
            )
        lines.append((job.name, unit))
    if len({unit for _, unit in lines}) == 1:
        return f"Error: {escape(lines[0][1])}"
    return "Error: " + "<br>".join(f"{escape(name)}: {escape(unit)}" for name, unit in lines)


def _about_charts(jobs: Sequence[Job]) -> str:
    counted = ", ".join(f"{job.survey.total.n:,}" for job in jobs)
    return (
        f'<p class="quiet">Mean error over all {counted} rows with a status, those without a score at mse 2; '
        "rows in error are left out. n is the number of rows. The dashed line is an error of 1.</p>"
    )


def _lists(jobs: Sequence[Job]) -> str:
    parts = []
    for i, job in enumerate(jobs):
        for name in LISTS:
            places = getattr(job.survey, name)
            if places:
                title = LIST_TITLES[name] + (f": {job.name}" if len(jobs) > 1 else "")
                parts.append(_list(i, name, title, len(places), _of(job, name), is_open=name in ("worst", "best")))
    return "".join(parts) or "<p>There are no rows.</p>"


def _of(job: Job, name: str) -> int:
    found = job.survey
    unusable = sum(n for status, n in found.statuses.items() if status != "ok")
    return {"unusable": unusable, "failed": found.errors.total()}.get(name, found.ranked)


def _list(job: int, name: str, title: str, n: int, total: int, *, is_open: bool) -> str:
    last = "reason" if name == "failed" else "explanation"
    columns = (("error", " class=n"), ("token", ""), (last, ""), ("document", ""), ("position", " class=n"))
    head = "".join(f"<th scope=col{kind}>{column}</th>" for column, kind in columns)
    return (
        f'<details{" open" if is_open else ""}><summary>{escape(title)} <span class="quiet">{n:,} of {total:,}</span></summary>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(title)}"><table class="rows">'
        f'<thead><tr>{head}</tr></thead><tbody data-job="{job}" data-list="{name}"></tbody></table></div></details>'
    )


def _map(method: Method, drawn: bool) -> str:
    if method == "off":
        return '<p>not drawn: it needs the viz extra (<code>pip install "nla-hub[viz]"</code>), or was turned off.</p>'
    if not drawn:
        return f"<p>not drawn: it takes {AT_LEAST} different explanations or more.</p>"
    name = "UMAP" if method == "umap" else "t-SNE"
    return (
        '<p class="quiet">Every point is an explanation on this page, coloured by its error and larger where several rows '
        f"have it; near ones use the same words (TF-IDF, SVD, {name}). Axes and distances between groups mean nothing. A "
        "number stands at the middle of a group. A click leads to the token.</p>"
        '<div class="map"><div id="plot"></div><ol id="groups" aria-label="Groups, the largest first"></ol></div>'
    )
