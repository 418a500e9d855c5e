"""The charts of a run: which figures of its metrics stand together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nla_hub.svg import Series, line_chart
from nla_hub.training.view.records import Metrics, RunRecord, figure, mapping_of, shares, shown, status_names

Rows = Sequence[Mapping[str, Any]]

LINES: tuple[tuple[str, tuple[tuple[str, str], ...], bool], ...] = (
    ("Reward, mean of the samples", (("reward", "reward"),), False),
    ("Reward, standard deviation", (("deviation", "reward_std"),), False),
    ("FVE (raw variance)", (), False),
    ("Cosine", (("live AR", "cosine"), ("watch AR", "watch_cosine")), False),
    ("Cosine with the vectors of other rows (control)", (("live AR", "cosine_shuffled"),), False),
    ("Gap: cosine by the live AR minus the watch AR", (("gap", "gap"),), False),
    ("Facts in the greedy explanations", (), False),
    ("KL divergence to the starting AV", (("KL", "kl"),), False),
    ("Entropy of a token", (("entropy", "entropy"),), False),
    ("Length of an explanation in tokens", (("sampled", "length"),), False),
    ("Repetition", (("sampled", "repetition"),), False),
    ("Share of each status", (), False),
    (
        "Log-probability: trainer against sampler",
        (("largest difference", "logprob_difference"), ("mean difference", "logprob_difference_mean")),
        True,
    ),
    ("Importance ratio", (("largest", "ratio_max"), ("mean", "ratio"), ("smallest", "ratio_min")), False),
    ("AR loss", (("live AR", "ar_loss"),), False),
    ("Gradient norm", (("AV", "grad_norm"),), False),
    (
        "Seconds of a step",
        (("generation", "seconds_rollout"), ("reward", "seconds_reward"), ("policy", "seconds_policy")),
        False,
    ),
)
"""Title, (name, figure) of each series of the step lines, and whether the axis is logarithmic."""


def rl_charts(metrics: Metrics) -> list[str]:
    """The charts of the RL stage, as HTML figures."""
    measured = [{**mapping_of(row, "evaluation"), "step": row["step"]} for row in metrics.evaluations]
    for row in measured:
        row["recall"] = mapping_of(row, "facts").get("recall")
        row["precision"] = mapping_of(row, "facts").get("precision")
    special: dict[str, Callable[[], list[Series]]] = {
        "FVE (raw variance)": lambda: [
            series("sampled", metrics.steps, "fve"),
            series("greedy, held-out rows (95 % interval)", measured, "fve", ends=("fve_low", "fve_high")),
        ],
        "Facts in the greedy explanations": lambda: [
            series("recall", measured, "recall"),
            series("precision", measured, "precision"),
        ],
        "Share of each status": lambda: status_series(metrics.steps),
    }
    charts = []
    for i, (title, parts, log) in enumerate(LINES):
        lines = special[title]() if title in special else [series(name, metrics.steps, key) for name, key in parts]
        charts.append(line_chart(title, lines, key=f"rl{i}", log=log))
    return charts


def supervised_charts(run: RunRecord) -> list[str]:
    """The loss of each supervised stage that has begun, as HTML figures."""
    titles = {"source": "Source: loss", "ar": "AR regression: loss", "av": "AV fine-tuning: loss"}
    charts = []
    for name, title in titles.items():
        metrics = run.stages[name].metrics
        rows = {"loss": metrics.steps} | {shown(model, at_most=40): lines for model, lines in metrics.models.items()}
        if any(rows.values()):
            lines = [series(label, with_figure(own, "loss"), "loss") for label, own in rows.items()]
            charts.append(line_chart(title, lines, key=f"sup{name}"))
    return charts


def with_figure(rows: Rows, key: str) -> list[Mapping[str, Any]]:
    """The lines that speak of a figure at all; one in which it is null stays, as a gap."""
    return [row for row in rows if key in row]


def series(name: str, rows: Rows, key: str, *, ends: tuple[str, str] | None = None) -> Series:
    """One figure of some lines."""
    x = [float(row["step"]) for row in rows]
    low, high = ([_number(row, end) for row in rows] for end in ends) if ends else (None, None)
    return Series(name, x, [_number(row, key) for row in rows], low, high)


def status_series(rows: Rows) -> list[Series]:
    """The share of each status, the most frequent first."""
    found = [shares(row) for row in rows]
    x = [float(row["step"]) for row in rows]
    return [
        Series(shown(name, at_most=40), x, [share.get(name, 0.0) if share else None for share in found])
        for name in status_names(found)
    ] or [Series("ok", x, _shares_of_ok(rows))]


def _shares_of_ok(rows: Iterable[Mapping[str, Any]]) -> list[float | None]:
    return [figure(row, "ok") for row in rows]


def _number(row: Mapping[str, Any], key: str) -> float | None:
    """The number under `key`, finite or not: the chart says how many it could not draw."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    known = figure(row, key)
    return float("nan") if known is None else known
