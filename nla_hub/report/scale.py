"""How large a row's error is, and its colour: one scale for the page and for notebooks.

The error of a row is mse / D with D the reference's raw variance, so its mean over rows is 1 - FVE: 0 is a vector that came
back whole, 1 is as far off as predicting the mean. Without a reference it is mse / 2, where 1 is an orthogonal vector.

The colours grow steadily darker (on a dark page lighter), so the order survives every kind of colour blindness and print.
Text on each has a contrast of at least 4.5 (WCAG 2.2, 1.4.3).
"""

from __future__ import annotations

from nla_hub.geometry import MSE_UNUSABLE, Reference

EDGES = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5)
"""Between the steps of the scale; an error on an edge belongs to the step above it."""

LABELS = ("< 0.1", "0.1", "0.25", "0.5", "0.75", "1", "1.5 +")
"""Of each step: the error at which it begins."""

LIGHT = (
    ("#fff8dd", "#1d1a16"),
    ("#fde9a9", "#1d1a16"),
    ("#fccd70", "#1d1a16"),
    ("#f5a945", "#1d1a16"),
    ("#de7f26", "#1d1a16"),
    ("#a8481a", "#ffffff"),
    ("#6b2413", "#ffffff"),
)
DARK = (
    ("#25241f", "#f0ede6"),
    ("#3c331d", "#f0ede6"),
    ("#584317", "#f0ede6"),
    ("#7a5510", "#ffffff"),
    ("#bf7a22", "#14120f"),
    ("#eda145", "#14120f"),
    ("#ffd08a", "#14120f"),
)
"""Background and text of each step."""


def denominator(reference: Reference | None) -> float:
    """What an mse is divided by: the raw variance, or that of an orthogonal vector where there is no usable reference."""
    found = None if reference is None else reference.raw_variance
    return found if found is not None and found > 0 else MSE_UNUSABLE


def step_of(error: float) -> int:
    """The step of an error, from 0."""
    return sum(error >= edge for edge in EDGES)


def css() -> str:
    """The colours as variables `--e0`, `--t0` and on, and the classes `e0` and on that use them."""

    def variables(colours: tuple[tuple[str, str], ...]) -> str:
        return "".join(f"--e{i}:{back};--t{i}:{text};" for i, (back, text) in enumerate(colours))

    classes = "".join(
        f".e{i}{{background:var(--e{i});color:var(--t{i})}}circle.e{i}{{fill:var(--e{i})}}" for i in range(len(LIGHT))
    )
    return f":root{{{variables(LIGHT)}}}@media(prefers-color-scheme:dark){{:root{{{variables(DARK)}}}}}{classes}"
