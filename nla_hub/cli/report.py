"""`nla-hub report`: what a job of `nla-hub explain --data` wrote, as one page for a browser."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nla_hub.cli import output

if TYPE_CHECKING:
    from nla_hub.report.explanation_map import Method


class MapName(StrEnum):
    """How the map of explanations is drawn."""

    umap = "umap"
    tsne = "tsne"
    off = "off"


def register(app: typer.Typer) -> None:
    """Add `report` to the command."""
    app.command("report")(report)


def report(
    outputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="OUT...", help="Directories that `nla-hub explain --data` wrote; several stand side by side."
        ),
    ],
    target: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The HTML file.", show_default="report.html in the first OUT"),
    ] = None,
    documents: Annotated[int, typer.Option(help="Documents shown from their beginning, drawn by id.", min=0)] = 12,
    rows: Annotated[int, typer.Option(help="Rows in each list: worst, best, unusable, in error.", min=0)] = 30,
    map_by: Annotated[
        MapName | None,
        typer.Option(
            "--map", help="Map of explanations (viz extra).", show_default="umap or tsne, whichever is installed"
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML page: tokens coloured by their error, search, worst and best rows, charts, a map.

    The figures are over all rows, the tokens of a choice of documents. An unfinished job is shown as far as it is.
    """
    from nla_hub.report.write import write_report

    chosen: Method | None = None if map_by is None else map_by.value
    place = write_report(outputs, target, documents=documents, rows=rows, map_by=chosen)
    output.print_text(str(place))
