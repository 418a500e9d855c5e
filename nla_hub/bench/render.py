"""Records of a run -> the cells of tables, for the command line and for docs/performance.md: one wording for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nla_hub.bench.route import BATCHED, ONE_BY_ONE
from nla_hub.doctor import NOT_MEASURED
from nla_hub.units import size

Record = Mapping[str, Any]

TITLES = {
    "verbalize": "verbalize: vectors to texts",
    "reconstruct": "reconstruct: texts to vectors",
    "capture": "capture: texts to activations",
}

COLUMNS = (
    "route",
    "rows/s",
    "tokens/s",
    "x one by one",
    "x batched",
    "first token",
    "peak memory",
    "of roofline",
    "agrees",
)


def machine_fields(machine: Record) -> dict[str, object]:
    """Names and values of a machine's record, in words."""
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items() if found)
    return {
        "subject": f"{machine['subject']} ({'random weights' if machine['random'] else 'pair'}), {machine['site']}",
        "shape": shape_of(machine["shape"]),
        "dtype": machine["dtype"],
        "device": f"{machine['device']}: {machine['device_name'] or 'unknown'}",
        "cores, threads": f"{machine['cores']}, {machine['threads']}",
        "versions": versions,
        "commit": machine["commit"] or "unknown",
        "copy": f"{machine['copy_bytes_per_s'] / 1e9:.1f} GB/s (read + written)",
        "matrix product": f"{machine['matmul_flops'] / 1e12:.3g} TFLOP/s",
    }


def shape_of(shape: Record) -> str:
    """An architecture in a line."""
    windows = {window for window in shape["windows"] if window is not None}
    parts = [
        f"d {shape['d_model']}",
        f"{len(shape['windows'])} blocks",
        f"{shape['heads']} heads ({shape['kv_heads']} kv) of {shape['head_dim']}",
        f"mlp {shape['mlp']}",
        f"vocabulary {shape['vocabulary']}",
        *(f"window {window}" for window in sorted(windows)),
    ]
    return ", ".join(parts)


def heading(route: Record) -> str:
    """What all routes of an operation did."""
    tokens = f"{route['tokens'] / route['rows']:.0f} tokens each"
    return f"{TITLES[route['operation']]}, {route['rows']} rows, {tokens}"


def cells(route: Record) -> Sequence[str | None]:
    """A line of the table under `COLUMNS`; None where a figure does not apply."""
    if route["status"] != "measured":
        return (route["route"], NOT_MEASURED, *[None] * (len(COLUMNS) - 3), route["reason"])
    ratios = route["faster_than"]
    return (
        route["route"],
        f"{route['rows_per_s']:.3g}" if route["rows_per_s"] < 1000 else f"{route['rows_per_s']:.0f}",
        f"{route['tokens_per_s']:.0f}",
        *(f"{ratios[name]:.2f}" if name in ratios else None for name in (ONE_BY_ONE, BATCHED)),
        None if route["first_token_s"] is None else _seconds(route["first_token_s"]),
        NOT_MEASURED if route["peak_bytes"] is None else size(route["peak_bytes"]),
        None if route["roofline"] is None else f"{route['roofline']:.1%}",
        agreement(route),
    )


def agreement(route: Record) -> str | None:
    """How a route's results agree with the plain one's; None for the plain one itself."""
    rows = route["rows_compared"]
    if rows is not None:
        text = f"{rows['equal']}/{rows['total']} rows equal ({rows['distinct']} distinct)"
        if rows["equal"] == rows["total"]:
            return text
        return f"{text}, {rows['same_tokens']:.1%} of tokens before they part, at gaps up to {rows['gap']:.1e}"
    return None if route["difference"] is None else f"largest difference {route['difference']:.1e}"


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"
