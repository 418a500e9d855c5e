"""A comparison of two pairs as text: a plain page, and Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nla_hub.evaluation.facts import GATE_ROWS
from nla_hub.evaluation.render import (
    NOT_MEASURED,
    Table,
    aligned,
    drawn,
    escape,
    interval,
    markdown_table,
    number,
    reference_line,
    status_counts,
    versions_line,
)

if TYPE_CHECKING:
    from nla_hub.evaluation.compare import Comparison
    from nla_hub.evaluation.paired import Estimate, Paired

NOTE = (
    "Both pairs explain the same captured vectors, each with its own AR; brackets are 95 % bootstrap intervals over "
    "documents, of the difference over the same documents for both."
)

FACTS_NOTE = (
    "Recall: named correctly, of the rows that have the fact. Precision: of the protocol's own rows that name it. Captured "
    "share: (recall - chance) / (probe - chance), only where the probe beats the chance of both pairs by 0.2. Means are over "
    "these facts."
)


def signed(estimate: Estimate) -> str:
    """A difference with its sign and interval."""
    if estimate.value is None:
        return NOT_MEASURED
    limits = "" if estimate.low is None or estimate.high is None else f" [{estimate.low:+.3f}, {estimate.high:+.3f}]"
    return f"{estimate.value:+.3f}{limits}"


def cells(figure: Paired) -> tuple[str, str, str]:
    """A, B and the difference."""
    a, b = (interval(side.value, side.low, side.high) for side in (figure.a, figure.b))
    return a, b, signed(figure.difference)


def headline(result: Comparison) -> str:
    """The difference in FVE with its data set and n, and that in cosine."""
    where = "" if result.reference is None else f" (raw variance, {result.reference.dataset}, n={result.n})"
    return f"A - B: FVE{where} {signed(result.fve.difference)}; cosine {signed(result.cosine.difference)}"


def provenance(result: Comparison) -> list[tuple[str, str]]:
    """Names and values of what the figures come from."""
    revisions = [f" @ {revision}" if revision else "" for revision in (result.revision_a, result.revision_b)]
    protocol = result.protocol
    rows = [
        ("A", result.a + revisions[0]),
        ("B", result.b + revisions[1]),
        ("base model", f"{result.base_model or 'unknown'}, output of block {result.layer}"),
        ("protocol", drawn(protocol, result.n, result.documents, result.corpus)),
        ("status of A", status_counts(result.statuses_a)),
        ("status of B", status_counts(result.statuses_b)),
    ]
    if result.reference is not None:
        rows.append(("reference", reference_line(result.reference)))
    rows += [("commit", result.commit or "unknown"), ("versions", versions_line(result.versions))]
    if result.wall_seconds is not None:
        rows.append(("wall time", f"{result.wall_seconds:.0f} s"))
    return rows


def tables(result: Comparison) -> list[tuple[str, Table]]:
    """Title and table of each part of the comparison."""
    scores = [
        ("FVE (raw variance)", *cells(result.fve)),
        ("cosine", *cells(result.cosine)),
        ("usable explanations", *cells(result.ok)),
        ("words", *cells(result.words)),
    ]
    if result.facts:
        over = f"mean over {len(result.gated)} facts"
        scores += [
            (f"recall, {over}", *cells(result.recall)),
            (f"precision, {over}", *cells(result.precision)),
            (f"captured share, {over}", *cells(result.share)),
        ]
    parts: list[tuple[str, Table]] = [("Scores", (("figure", "A", "B", "A - B"), list(scores)))]
    if not result.facts:
        return parts
    names = [row.fact.replace("_", " ") for row in result.facts]
    few = [f"{row.n}" + ("" if row.n >= GATE_ROWS else f" (< {GATE_ROWS})") for row in result.facts]
    recall: Table = (
        ("fact", "n", "A", "B", "A - B"),
        [(name, n, *cells(row.recall)) for name, n, row in zip(names, few, result.facts, strict=True)],
    )
    precision: Table = (
        ("fact", "named by A", "named by B", "A", "B", "A - B"),
        [
            (name, str(row.named_a), str(row.named_b), *cells(row.precision))
            for name, row in zip(names, result.facts, strict=True)
        ],
    )
    share: Table = (
        ("fact", "probe", "A", "B", "A - B"),
        [
            (name, number(row.probe), *(cells(row.share) if row.gated else ("-", "-", "-")))
            for name, row in zip(names, result.facts, strict=True)
        ],
    )
    return [*parts, ("Recall", recall), ("Precision", precision), ("Captured share", share)]


def plain(result: Comparison) -> str:
    """The comparison as aligned text."""
    lines = [headline(result), ""]
    width = max(len(name) for name, _ in provenance(result))
    lines += [f"{name:<{width}}  {value}" for name, value in provenance(result)]
    for title, (columns, rows) in tables(result):
        lines += ["", title, *aligned(columns, rows)]
    return "\n".join(lines)


def markdown(result: Comparison) -> str:
    """The comparison for a card or a page of docs, without a heading of its own."""
    parts = [f"**{headline(result)}**"]
    parts.append("\n".join(f"- {name}: {escape(value)}" for name, value in provenance(result)))
    parts += [f"**{title}**\n\n{markdown_table(*table)}" for title, table in tables(result)]
    parts.append(f"{NOTE} {FACTS_NOTE}" if result.facts else NOTE)
    return "\n\n".join(parts) + "\n"
