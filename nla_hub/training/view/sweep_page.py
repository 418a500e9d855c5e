"""The page of a layer sweep: its chart, its table, and what it cannot show. Self-contained, no script."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from nla_hub.svg import STYLE as CHART_STYLE
from nla_hub.svg import Series, line_chart
from nla_hub.training.view.report import STYLE

COLUMNS = (
    "layer",
    "FVE of labels",
    "95 % interval",
    "cosine",
    "mean alone",
    "ridge from words",
    "facts (probe)",
    "norm, 75 %",
)


LEGEND = (
    "FVE: raw variance of the held-out rows of that layer. Mean alone: always the mean direction. Ridge from words: a "
    "linear map from the words of a label to its vector, on the same denominator. Facts: mean balanced accuracy of linear "
    "probes on the vectors, for a corpus whose facts are known. * the recipe's layer."
)


def sweep_page(result: Mapping[str, Any]) -> str:
    """The page of a `SweepResult` as its mapping."""
    title = f"Layer sweep: {result['recipe']}"
    caveats = "".join(f"<li>{escape(text)}</li>" for text in result["caveats"])
    head = "".join(f'<th class="n">{escape(name)}</th>' for name in COLUMNS)
    body = "".join(_row(each, result["recipe_layer"]) for each in result["layers"])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{CHART_STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f'<p class="quiet">{escape(str(result["base"]))}, {result["depth"]} blocks; {result["documents"]:,} documents, '
        f"{result['train_rows']:,} rows to learn from, {result['held_out_rows']:,} held out.</p>"
        f'<div class="verdict"><p>{escape(result["sentence"])}</p><ul>{caveats}</ul></div>'
        f'<div class="charts">{"".join(_charts(result))}</div>'
        f'<h2>Figures</h2><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="quiet">{escape(LEGEND)}</p></body></html>\n'
    )


def _charts(result: Mapping[str, Any]) -> list[str]:
    layers = result["layers"]
    x = [float(each["layer"]) for each in layers]

    def one(name: str, key: str, *, interval: bool = False) -> Series:
        ends = ([each[f"{key}_{end}"] for each in layers] if interval else None for end in ("low", "high"))
        return Series(name, x, [each[key] for each in layers], *ends)

    fve = [
        one("AR on labels (95 % interval)", "fve", interval=True),
        one("ridge from the words of labels", "ridge_fve"),
    ]
    charts = [line_chart("FVE of labels, held-out rows (raw variance)", fve, key="fve", x_name="layer")]
    if any(each["facts"] is not None for each in layers):
        facts = [one("facts", "facts")]
        charts.append(line_chart("Facts in the vectors, linear probe (balanced)", facts, key="facts", x_name="layer"))
    return charts


def _row(each: Mapping[str, Any], recipe_layer: int) -> str:
    cells = (
        f"{each['layer']}{' *' if each['layer'] == recipe_layer else ''}",
        f"{each['fve']:.3f}",
        f"{each['fve_low']:.3f} to {each['fve_high']:.3f}",
        f"{each['cosine']:.3f}",
        f"{each['mean_fve']:.3f}",
        f"{each['ridge_fve']:.3f}",
        "-" if each["facts"] is None else f"{each['facts']:.3f}",
        f"{each['norm_p75']:.3g}",
    )
    return "<tr>" + "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells) + "</tr>"
