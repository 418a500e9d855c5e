"""What was measured, with everything that a figure must not be printed without; "not measured" for the rest."""

from __future__ import annotations

from nla_hub.evaluation import EvalResult
from nla_hub.evaluation.controls import Measure
from nla_hub.evaluation.render import (
    MEASURE_COLUMNS,
    NOT_MEASURED,
    Table,
    fact_table,
    interval,
    number,
    provenance,
)
from nla_hub.evaluation.result import Example
from nla_hub.publish.card.text import beginning, code, ending, inline, prose, table
from nla_hub.publish.guards.scrub import mask
from nla_hub.sidecar import Score

BASELINES = {"raw_variance": "raw variance", "mean_norm": "mean-norm"}

CONTROLS: tuple[tuple[str, str], ...] = (
    ("real", "explanations"),
    ("sampled", "explanations drawn at temperature 1"),
    ("permuted", "explanations of other rows (permuted)"),
    ("floor", "last and next word only, by the AR (floor)"),
    ("floor_linear", "last and next word only, by ridge regression"),
    ("ceiling", "gold labels, by the AR (ceiling)"),
)
"""Fields of an EvalResult, and how the row is called where it was not measured."""


LEFT_OUT = frozenset({"pair", "base model", "wall time"})
"""Of an evaluation's provenance: what the page says elsewhere, and the name under which the pair lay on some machine."""


def figure(score: Score | None) -> str:
    """A score in one line: its denominator, data set and n, with cosine beside it."""
    if score is None:
        return NOT_MEASURED
    baseline = BASELINES.get(score.baseline) or inline(score.baseline)
    cosine = f"cosine {number(score.cosine)}"
    return f"FVE ({baseline}, {inline(score.dataset)}, n={score.n}): {score.value:.3f}; {cosine}"


def made(score: Score) -> str:
    """Protocol and commit of a score, in words."""
    protocol, commit = (code(value) if value else "unknown" for value in (score.protocol, score.commit))
    return f"measured by protocol {protocol}, with nla-hub at commit {commit}"


def measure_rows(result: EvalResult | None, score: Score | None, mean_norm: Score | None) -> str:
    """Real texts and their controls, one row each, whether measured or not; without a result the first row is the score."""
    rows: list[tuple[str, ...]] = []
    for name, words in CONTROLS:
        measure: Measure | None = None if result is None else getattr(result, name)
        if measure is None:
            known = (score, mean_norm) if result is None and name == "real" else (None, None)
            cosine = None if known[0] is None else known[0].cosine
            rows.append((words, *(number(None if one is None else one.value) for one in known), number(cosine)))
            continue
        fves = [interval(f.value, f.low, f.high) for f in (measure.fve, measure.fve_mean_norm)]
        rows.append((inline(measure.what), *fves, interval(measure.cosine, measure.cosine_low, measure.cosine_high)))
    return table(MEASURE_COLUMNS, rows)


def facts_table(result: EvalResult | None) -> str | None:
    """What is known to be true of the rows, and how much of it is told; None where nothing is known."""
    if result is None or not result.facts:
        return None
    columns, rows = _escaped(fact_table(result))
    return (
        f"{table(columns, rows)}\n\nRecall: named correctly, of the rows that have the fact. Precision: of all rows that name "
        "it. Chance: recall with explanations at other rows. Probe: a linear classifier on the vector. Captured share: "
        "(recall - chance) / (probe - chance), only where the probe beats chance by 0.2."
    )


def _escaped(found: Table) -> Table:
    columns, rows = found
    return columns, [(inline(name), *figures) for name, *figures in rows]


def where_from(result: EvalResult | None, score: Score | None) -> list[tuple[str, str]]:
    """Names and values of what the figures come from; places of the machine that measured are not among them."""
    if result is None and score is None:
        return [("protocol", NOT_MEASURED), ("seeds", NOT_MEASURED), ("nla-hub at commit", NOT_MEASURED)]
    if result is None:
        return [("seeds, intervals and controls", "not known")]
    rows = [(name, inline(mask(value))) for name, value in provenance(result) if name not in LEFT_OUT]
    seeds = ", ".join(f"{name} {seed}" for name, seed in result.seeds.items()) or f"protocol {result.protocol.seed}"
    return [*rows, ("seeds", inline(seeds))]


def samples(result: EvalResult | None) -> list[tuple[str, str, str]]:
    """Examples of the evaluation: (heading, what the model had read, what the AV wrote), both as fenced blocks."""
    if result is None:
        return []
    return [
        (_heading(example), prose(ending(mask(example.context))), prose(_written(example)))
        for example in result.examples
    ]


def _heading(example: Example) -> str:
    cosine = (
        f"cosine {number(example.cosine)}"
        if example.cosine is not None
        else f"no usable text ({example.status.replace('_', ' ')})"
    )
    where = "" if example.position is None else f", position {example.position}"
    return inline(f"{example.choice.capitalize()}: {cosine}{where}")


def _written(example: Example) -> str:
    return beginning(mask(example.raw if example.text is None else example.text))
