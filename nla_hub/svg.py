"""Charts as inline SVG: lines of any number of points with gaps where nothing was measured, and bars with their counts.

A chart is drawn for a width of 300 to 600 pixels and needs the colours `--c0` to `--c5` and the classes of `STYLE`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 350, 200
TOP, RIGHT, BOTTOM = 10, 18, 34
AT_MOST = 300
"""Points of a series that are drawn; of longer ones the lowest and highest of each stretch."""

FEW = 40
"""Up to so many points each one gets a dot."""

LARGEST, SMALLEST = 1e100, 1e-100
COLOURS = 6
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2", "10 4")

STYLE = (
    ":root{--c0:#0b62c4;--c1:#c2410c;--c2:#15803d;--c3:#7e22ce;--c4:#be123c;--c5:#57534e}"
    "@media(prefers-color-scheme:dark){:root{--c0:#6cb2ff;--c1:#ff9d5c;--c2:#5fd38a;--c3:#cf9bff;--c4:#ff8aa0;--c5:#c4beb8}}"
    ".chart svg{display:block;width:100%;height:auto}.chart text{font:11px system-ui,sans-serif;fill:currentColor}"
    ".chart .grid{stroke:currentColor;stroke-opacity:.18}.chart .axis{stroke:currentColor;stroke-opacity:.6;fill:none}"
    ".chart .line{fill:none;stroke-width:1.6;stroke-linejoin:round}.chart .bars{fill:none;stroke-opacity:.55}"
    + "".join(f".chart .s{i}{{stroke:var(--c{i})}}.chart .d{i}{{fill:var(--c{i});stroke:none}}" for i in range(COLOURS))
)


@dataclass(frozen=True)
class Series:
    """One line: `y` at `x`, None where nothing was measured; `low` and `high` are the ends of intervals.

    Numbers that are not finite are left out and counted in the caption. `x` must be finite and ascending.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


@dataclass(frozen=True)
class Bars:
    """One bar for each bin: its `values`, None where nothing was measured, and over how many rows, `n`."""

    name: str
    values: Sequence[float | None]
    n: Sequence[int]


@dataclass(frozen=True)
class _Axis:
    """Values to coordinates: `low` is drawn at `begin`, `high` at `end`."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        value = max(min(self.unit(value), self.high), self.low)
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    def unit(self, value: float) -> float:
        if not self.log:
            return value
        return math.log10(value) if value > 0 else self.low


def line_chart(title: str, series: Sequence[Series], *, key: str, x_name: str = "step", log: bool = False) -> str:
    """A `figure` with the chart, its legend and, for whom it cannot be seen, what it shows in words.

    Args:
        title: shown above the chart.
        series: at most six are drawn.
        key: letters and digits, unique on the page: names the parts that belong together.
        x_name: what the horizontal axis counts.
        log: a logarithmic vertical axis; zeros are drawn on its lowest line, negative values left out.
    """
    drawn = [_usable(one, log) for one in series[:COLOURS]]
    words = [_in_words(one, x_name) for one in drawn]
    head = f'<figure class="chart"><h3 id="{key}-t">{escape(title)}</h3>'
    if not any(value is not None for one in drawn for value in one.y):
        return f'{head}<p class="quiet">not measured</p></figure>'
    legend = "".join(_legend(i, one.name) for i, one in enumerate(drawn)) if len(drawn) > 1 else ""
    notes = [words[i] for i in range(len(drawn))]
    left_out = sum(_left_out(one, log) for one in series[:COLOURS])
    if left_out:
        notes.append(f"Values that cannot be drawn (not finite{' or negative' if log else ''}): {left_out}.")
    if log and any(value == 0 for one in drawn for value in one.y):
        notes.append("Zeros are drawn on the lowest line.")
    caption = " ".join(notes)
    return (
        f"{head}{_svg(drawn, key, x_name, log)}"
        f'<figcaption><p class="legend">{legend}</p><p class="quiet" id="{key}-d">{escape(caption)}</p></figcaption></figure>'
    )


BAR, BAR_GAP, BAR_LABEL, BAR_FIGURES = 13, 7, 104, 96
"""Height of a bar, space between bins, room for the names of the bins and for the figures."""


def bar_chart(title: str, bins: Sequence[str], series: Sequence[Bars], *, key: str, mark: float | None = None) -> str:
    """A `figure` with lying bars from zero, the value and the count of each beside it.

    Args:
        title: shown above the chart.
        bins: names of the bins, from the top.
        series: at most six, each with a value and a count for every bin; their bars stand below each other.
        key: letters and digits, unique on the page.
        mark: a value at which a line is drawn across all bars.
    """
    drawn = series[:COLOURS]
    head = f'<figure class="chart"><h3 id="{key}-t">{escape(title)}</h3>'
    known = [v for one in drawn for v in one.values if v is not None and _drawable(v, True)]
    if not known:
        return f'{head}<p class="quiet">not measured</p></figure>'
    axis = _Axis(0.0, max(*known, mark or 0.0, SMALLEST), BAR_LABEL, WIDTH - BAR_FIGURES)
    step = BAR * len(drawn) + BAR_GAP
    height = step * len(bins) + BAR_GAP
    parts, words = [], []
    for j, name in enumerate(bins):
        top = BAR_GAP + j * step
        middle = top + BAR * len(drawn) / 2 + 4
        parts.append(f'<text x="{BAR_LABEL - 6}" y="{middle:.1f}" text-anchor="end">{escape(name)}</text>')
        for i, one in enumerate(drawn):
            parts += _bar(i, one.values[j], one.n[j], top + i * BAR, axis)
            words.append(f"{name}{f', {one.name}' if len(drawn) > 1 else ''}: {_figures(one.values[j], one.n[j])}.")
    if mark is not None:
        parts.append(f'<path class="axis" stroke-dasharray="3 3" d="M{axis.at(mark):.1f} 0V{height}"/>')
    legend = "".join(
        f'<span class="entry"><svg class="swatch" viewBox="0 0 28 8" width="28" height="8" aria-hidden="true">'
        f'<rect class="d{i}" width="28" height="8"/></svg> {escape(one.name)}</span> '
        for i, one in enumerate(drawn)
        if len(drawn) > 1
    )
    return (
        f'{head}<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{key}-t" aria-describedby="{key}-d">'
        f'<desc id="{key}-d">{escape(" ".join(words))}</desc>{"".join(parts)}</svg>'
        f'<figcaption><p class="legend">{legend}</p></figcaption></figure>'
    )


def _bar(i: int, value: float | None, n: int, top: float, axis: _Axis) -> list[str]:
    text = f'<text class="figures" x="{WIDTH - BAR_FIGURES + 6}" y="{top + BAR - 2.5:.1f}">{_figures(value, n)}</text>'
    if value is None or not _drawable(value, True):
        return [text]
    width = axis.at(value) - axis.begin
    return [f'<rect class="d{i}" x="{axis.begin}" y="{top:.1f}" width="{width:.1f}" height="{BAR - 2}" rx="2"/>', text]


def _figures(value: float | None, n: int) -> str:
    return "no rows" if not n else f"{'not measured' if value is None else f'{value:.3g}'} (n={n:,})"


def _legend(i: int, name: str) -> str:
    dash = f' stroke-dasharray="{DASHES[i]}"' if DASHES[i] else ""
    return (
        '<span class="entry"><svg class="swatch" viewBox="0 0 28 8" width="28" height="8" aria-hidden="true">'
        f'<path class="line s{i}" d="M0 4H28"{dash}/></svg> {escape(name)}</span> '
    )


def _usable(one: Series, log: bool) -> Series:
    def kept(values: Sequence[float | None]) -> list[float | None]:
        return [v if v is not None and _drawable(v, log) else None for v in values]

    y = kept(one.y)
    if one.low is None or one.high is None:
        return Series(one.name, one.x, y)
    pairs = [
        (lo, hi) if v is not None and lo is not None and hi is not None and lo <= hi else (None, None)
        for v, lo, hi in zip(y, kept(one.low), kept(one.high), strict=True)
    ]
    return Series(one.name, one.x, y, [lo for lo, _ in pairs], [hi for _, hi in pairs])


def _drawable(value: float, log: bool) -> bool:
    return abs(value) <= LARGEST and not (log and value < 0)  # false for NaN


def _left_out(one: Series, log: bool) -> int:
    return sum(v is not None and not _drawable(v, log) for v in one.y)


def _in_words(one: Series, x_name: str) -> str:
    points = [(x, v) for x, v in zip(one.x, one.y, strict=True) if v is not None]
    if not points:
        return f"{one.name}: not measured."
    (first_x, first), (last_x, last) = points[0], points[-1]
    if len(points) == 1:
        return f"{one.name}: {first:.4g} at {x_name} {first_x:g}."
    values = [v for _, v in points]
    return (
        f"{one.name}: {first:.4g} at {x_name} {first_x:g}, {last:.4g} at {x_name} {last_x:g}; "
        f"between {min(values):.4g} and {max(values):.4g}."
    )


def _svg(drawn: Sequence[Series], key: str, x_name: str, log: bool) -> str:
    ends: list[float | None] = [v for one in drawn for part in (one.y, one.low or (), one.high or ()) for v in part]
    known = [v for v in ends if v is not None]
    low, high, ticks = _decades(known) if log else _rounded(min(known), max(known))
    left = 14 + 6.2 * max(len(label) for _, label in ticks)
    y_axis = _Axis(low, high, HEIGHT - BOTTOM, TOP, log)
    xs = [x for one in drawn for x, v in zip(one.x, one.y, strict=True) if v is not None]
    x_low, x_high, x_ticks = _whole(min(xs), max(xs))
    x_axis = _Axis(x_low, x_high, left, WIDTH - RIGHT)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{key}-t" aria-describedby="{key}-d">',
        *(_y_tick(y_axis.begin + (at - low) / (high - low) * (y_axis.end - y_axis.begin), t, left) for at, t in ticks),
        *(_x_tick(x_axis.at(at), label) for at, label in x_ticks),
        f'<path class="axis" d="M{left:.1f} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>',
        f'<text x="{(left + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_name)}</text>',
    ]
    for i, one in enumerate(drawn):
        parts += _bars(i, one, x_axis, y_axis) + _line(i, one, x_axis, y_axis)
    return "".join([*parts, "</svg>"])


def _y_tick(y: float, label: str, left: float) -> str:
    return (
        f'<path class="grid" d="M{left:.1f} {y:.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{left - 5:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )


def _x_tick(x: float, label: str) -> str:
    return (
        f'<path class="axis" d="M{x:.1f} {HEIGHT - BOTTOM}v4"/>'
        f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{label}</text>'
    )


def _bars(i: int, one: Series, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    if one.low is None or one.high is None:
        return []
    bars = [
        f"M{x_axis.at(x):.1f} {y_axis.at(lo):.1f}V{y_axis.at(hi):.1f}"
        for x, lo, hi in zip(one.x, one.low, one.high, strict=True)
        if lo is not None and hi is not None
    ]
    every = max(1, math.ceil(len(bars) / FEW))
    return [f'<path class="bars s{i}" d="{"".join(bars[::every])}"/>'] if bars else []


def _line(i: int, one: Series, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    runs = _runs(thinned(list(zip(one.x, one.y, strict=True))))
    known = sum(map(len, runs))
    path, dots = "", []
    for run in runs:
        points = [(f"{x_axis.at(x):.1f}", f"{y_axis.at(y):.1f}") for x, y in run]
        if len(points) > 1:
            path += "M" + "L".join(f"{x} {y}" for x, y in points)
        if len(points) == 1 or known <= FEW:
            dots += points
    dash = f' stroke-dasharray="{DASHES[i]}"' if DASHES[i] else ""
    line = [f'<path class="line s{i}" d="{path}"{dash}/>'] if path else []
    return line + [f'<circle class="d{i}" cx="{x}" cy="{y}" r="2.2"/>' for x, y in dots]


def _runs(points: Iterable[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is not None:
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def thinned(points: list[tuple[float, float | None]], at_most: int = AT_MOST) -> list[tuple[float, float | None]]:
    """At most so many points: of each stretch its lowest and highest, so that no spike is lost; gaps stay gaps."""
    if len(points) <= at_most:
        return points
    size = math.ceil(len(points) / (at_most // 2 - 1))
    kept: list[tuple[float, float | None]] = []
    for begin in range(0, len(points), size):
        part = points[begin : begin + size]
        known = [(y, j) for j, (_, y) in enumerate(part) if y is not None]
        if not known:
            kept.append((part[0][0], None))
            continue
        kept += [part[j] for j in sorted({min(known)[1], max(known)[1]})]
    return kept


def _rounded(low: float, high: float) -> tuple[float, float, list[tuple[float, str]]]:
    """An axis around the values with some four round ticks."""
    size = max(abs(low), abs(high))
    if high - low <= max(1e-6 * size, SMALLEST):
        pad = size / 10 if size > SMALLEST else 1.0
        low, high = low - pad, high + pad
    step = _step((high - low) / 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    return first * step, last * step, [(i * step, _label(i * step, step)) for i in range(first, last + 1)]


def _whole(low: float, high: float) -> tuple[float, float, list[tuple[float, str]]]:
    """An axis from `low` to `high` with ticks at whole numbers."""
    smallest = max(1.0, 1e-6 * max(abs(low), abs(high)))
    if high - low < smallest:
        low, high = low - smallest, high + smallest
    step = max(1.0, _step((high - low) / 5))
    ticks = range(math.ceil(low / step), math.floor(high / step) + 1)
    return low, high, [(i * step, _label(i * step, step)) for i in ticks]


def _decades(values: Sequence[float]) -> tuple[float, float, list[tuple[float, str]]]:
    """A logarithmic axis in whole powers of ten; zeros go on its lowest line."""
    exponents = [math.log10(max(v, SMALLEST)) for v in values if v > 0] or [0.0]
    low, high = math.floor(min(exponents)), math.ceil(max(exponents))
    if 0.0 in values or low == high:
        low -= 1
    every = max(1, math.ceil((high - low) / 5))
    return low, high, [(i, f"1e{i}" if abs(i) > 2 else f"{10.0**i:g}") for i in range(low, high + 1, every)]


def _step(rough: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def _label(value: float, step: float) -> str:
    """A tick's value with as many digits as its step needs."""
    if value == 0:
        return "0"
    if abs(value) < 1e5 and step >= 1e-4:
        text = f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
        return text.replace("-", "\N{MINUS SIGN}")
    digits = max(0, math.floor(math.log10(abs(value)) + 1e-9) - math.floor(math.log10(step) + 1e-9))
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "\N{MINUS SIGN}")
