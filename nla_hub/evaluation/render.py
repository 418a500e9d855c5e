"""An evaluation result as text: a plain page for terminals and logs, Markdown for cards and docs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from nla_hub.evaluation.facts import GATE_ROWS

if TYPE_CHECKING:
    from nla_hub.evaluation.controls import Measure
    from nla_hub.evaluation.protocols import Protocol
    from nla_hub.evaluation.result import EvalResult, Example
    from nla_hub.evaluation.steering import SteeringTable
    from nla_hub.geometry import Reference

NOT_MEASURED = "not measured"

MEASURE_COLUMNS = ("texts", "FVE (raw variance)", "FVE (mean-norm)", "cosine")
FACT_COLUMNS = ("fact", "n", "recall", "precision", "named", "chance", "probe", "captured share")
SOURCE_COLUMNS = ("fact", "n", "probe accuracy", "balanced", "majority class", "held")
STEERING_COLUMNS = ("fact", "cases", "vector", "strength", "flips", "flip rate", "95 %")

Table = tuple[Sequence[str], list[Sequence[str]]]


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or "not measured"."""
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """A figure with its interval."""
    return number(value) + ("" if value is None or low is None or high is None else f" [{low:.3f}, {high:.3f}]")


def measures(result: EvalResult) -> list[Measure]:
    """What was scored, in the order of the table."""
    every = (result.real, result.sampled, result.permuted, result.floor, result.floor_linear, result.ceiling)
    return [m for m in every if m is not None]


def measure_table(result: EvalResult) -> Table:
    """Real texts and their controls."""
    return MEASURE_COLUMNS, [
        (
            m.what,
            interval(m.fve.value, m.fve.low, m.fve.high),
            interval(m.fve_mean_norm.value, m.fve_mean_norm.low, m.fve_mean_norm.high),
            interval(m.cosine, m.cosine_low, m.cosine_high),
        )
        for m in measures(result)
    ]


def fact_table(result: EvalResult) -> Table:
    """The facts table; a captured share is given only where the vector holds the fact."""
    return FACT_COLUMNS, [
        (
            row.fact.replace("_", " "),
            f"{row.n}" + ("" if row.n >= GATE_ROWS else f" (< {GATE_ROWS})"),
            interval(row.recall, row.recall_low, row.recall_high),
            number(row.precision),
            str(row.named),
            number(row.chance),
            number(row.probe),
            interval(row.share, row.share_low, row.share_high) if row.gated else "-",
        )
        for row in result.facts
    ]


def source_table(result: EvalResult) -> Table:
    """What the source itself holds."""
    return SOURCE_COLUMNS, [
        (
            row.fact.replace("_", " "),
            str(row.n),
            number(row.accuracy),
            number(row.balanced),
            number(row.majority),
            "yes" if row.held else "no",
        )
        for row in result.source_check
    ]


def steering_rows(table: SteeringTable) -> Table:
    """Flip rates of a steering table."""
    return STEERING_COLUMNS, [
        (
            row.fact,
            str(row.cases),
            row.vector,
            f"{row.strength:g}",
            str(row.flips),
            number(row.rate, 2),
            f"[{row.low:.2f}, {row.high:.2f}]",
        )
        for row in table.rows
    ]


def headline(result: EvalResult) -> str:
    """FVE with its baseline, data set and n; cosine beside it."""
    return f"{result.real.fve}; cosine {interval(result.real.cosine, result.real.cosine_low, result.real.cosine_high)}"


def status_counts(statuses: Mapping[str, int]) -> str:
    """Rows of each status and the share that is ok."""
    counts = ", ".join(f"{n} {status}" for status, n in sorted(statuses.items()))
    return f"{counts} ({statuses.get('ok', 0) / sum(statuses.values()):.1%} ok)"


def drawn(protocol: Protocol, n: int, documents: int, corpus: str) -> str:
    """A protocol with what it was run on and how texts were drawn."""
    how = "greedy" if protocol.temperature == 0 else f"temperature {protocol.temperature:g}, seed {protocol.seed}"
    return (
        f"{protocol.name}: {n} activations of {documents} documents ({corpus}), position >= {protocol.min_position}, "
        f"seed {protocol.seed}, {how}"
    )


def reference_line(r: Reference) -> str:
    """The denominators of an FVE."""
    return f"{r.dataset}, n={r.n}: raw variance {r.raw_variance:.4f}, mean-norm {r.mean_norm:.4f}"


def versions_line(versions: Mapping[str, str | None]) -> str:
    """Known versions in one line."""
    return ", ".join(f"{name} {value}" for name, value in versions.items() if value) or "unknown"


def provenance(result: EvalResult) -> list[tuple[str, str]]:
    """Names and values of what the figures come from."""
    rows = [
        ("pair", result.nla + (f" @ {result.revision}" if result.revision else "")),
        ("base model", f"{result.base_model or 'unknown'}, output of block {result.layer}"),
        ("protocol", drawn(result.protocol, result.n, result.documents, result.corpus)),
        ("status", status_counts(result.statuses)),
    ]
    if result.sampled is not None:
        rows.append(("status at temperature 1", status_counts(result.sampled_statuses)))
    if result.words is not None:
        rows.append(("words", f"{result.words:.1f} a usable explanation"))
    if result.reference is not None:
        rows.append(("reference", reference_line(result.reference)))
    if result.shared_documents is not None:
        rows.append(
            (
                "overlap",
                f"{result.shared_documents} of {result.documents} documents stand among the {result.train_documents} "
                "train-split documents of the probes",
            )
        )
    rows += [("commit", result.commit or "unknown"), ("versions", versions_line(result.versions))]
    if result.wall_seconds is not None:
        rows.append(("wall time", f"{result.wall_seconds:.0f} s"))
    return rows


def tables(result: EvalResult) -> list[tuple[str, Table]]:
    """Title and table of each part of the result."""
    parts = [("Scores", measure_table(result))]
    if result.facts:
        parts.append(("Facts in the explanations", fact_table(result)))
    if result.source_check:
        parts.append(("What the source holds between telling and asking", source_table(result)))
    return parts


def plain(result: EvalResult) -> str:
    """The result as aligned text."""
    lines = [headline(result), ""]
    width = max(len(name) for name, _ in provenance(result))
    lines += [f"{name:<{width}}  {value}" for name, value in provenance(result)]
    for title, (columns, rows) in tables(result):
        lines += ["", title, *aligned(columns, rows)]
    if result.examples:
        lines += ["", "Examples (best, median and worst cosine)"]
        for example in result.examples:
            lines += [f"  {line}" for line in _example(example)]
    return "\n".join(lines)


def aligned(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are padded."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(escape(cell) for cell in line) + " |" for line in lines)


def escape(text: str) -> str:
    """Text for a Markdown table cell."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


def markdown(result: EvalResult, *, examples: bool = True) -> str:
    """The result for a card or a page of docs, without a heading of its own."""
    parts = [f"**{headline(result)}**"]
    parts.append("\n".join(f"- {name}: {escape(value)}" for name, value in provenance(result)))
    parts += [f"**{title}**\n\n{markdown_table(*table)}" for title, table in tables(result)]
    if result.facts:
        parts.append(
            "Recall: named correctly, of the rows that have the fact. Precision: of all rows that name it. Chance: "
            "recall with explanations at other rows. Probe: a linear classifier on the vector. Captured share: "
            "(recall - chance) / (probe - chance), only where the probe beats chance by 0.2; above 1 the explanation finds "
            "more than the probe does. Precision counts the protocol's own rows, recall also further ones up to n."
        )
    if examples and result.examples:
        rows = [
            (e.choice, f"...{e.context}", e.text if e.text is not None else f"({e.status}) {e.raw}", number(e.cosine))
            for e in result.examples
        ]
        parts.append(
            "**Examples**\n\n" + markdown_table(("by cosine", "text up to the token", "explanation", "cosine"), rows)
        )
    return "\n\n".join(parts) + "\n"


def _example(example: Example) -> list[str]:
    shown = example.text if example.text is not None else f"({example.status}) {example.raw}"
    lines = [
        f"{example.choice}: cosine {number(example.cosine)}",
        f"  reads  ...{example.context}",
        f"  says   {shown}",
    ]
    if example.gold is not None:
        lines.append(f"  label  {example.gold}")
    return lines
