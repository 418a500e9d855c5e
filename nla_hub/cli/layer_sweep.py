"""`nla-hub train RECIPE --layer-sweep`: which layer a recipe's labels explain best, on little data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from nla_hub.cli import output
from nla_hub.cli.train_view import TrainView

if TYPE_CHECKING:
    from nla_hub.training.sweep.result import SweepResult

COLUMNS = (
    "layer",
    "FVE of labels",
    "95 % interval",
    "cosine",
    "mean alone",
    "ridge from words",
    "facts (probe)",
    "seconds",
)


def require_alone(wanted: bool, others: Mapping[str, object]) -> None:
    """Raise a usage error for --layers and --documents without --layer-sweep, and for options that go with a run alone."""
    if not wanted:
        raise typer.BadParameter("it goes with --layer-sweep alone", param_hint="--layers, --documents")
    for name, given in others.items():
        if given:
            raise typer.BadParameter(f"--layer-sweep does not go with {name}", param_hint="--layer-sweep")


def parse_layers(text: str | None) -> list[int] | None:
    """Layers as they are written on the command line, "8,12,16"; None where none are named."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}: expected numbers with commas between them, such as 8,12,16", param_hint="--layers"
        ) from None


def sweep(
    name: str,
    overrides: Sequence[str],
    out: Path | None,
    *,
    layers: str | None,
    documents: int | None,
    as_json: bool,
) -> None:
    """Run a sweep and print it: a table, or one JSON object a layer."""
    from nla_hub.cli.train import EXIT_INTERRUPTED, default_directory
    from nla_hub.errors import InputError
    from nla_hub.training.pipeline import Pipeline
    from nla_hub.training.processes import Processes
    from nla_hub.training.recipe import load_recipe
    from nla_hub.training.resolve import resolved
    from nla_hub.training.run import RunDirectory
    from nla_hub.training.sweep.run import DOCUMENTS, FOLDER, PAGE, LayerSweep, check_sweep

    asked = parse_layers(layers)
    if (processes := Processes.here()).world > 1:
        raise InputError(
            "A layer sweep runs in one process.",
            got=f"{processes.world} processes",
            next_step=f"nla-hub train {name} --layer-sweep, without a launcher",
        )
    recipe = resolved(load_recipe(name, overrides))
    size = DOCUMENTS if documents is None else documents
    chosen = check_sweep(recipe, asked, size)
    run = RunDirectory(out or default_directory(recipe, False), recipe)
    output.message(f"run directory: {run.path}")
    pipeline = Pipeline(recipe, run, TrainView(False, ("source",)))
    try:
        pipeline.execute(("source",))
        result = LayerSweep(
            recipe, run, pipeline.base.directory, layers=chosen, documents=size, say=output.message
        ).execute()
    except KeyboardInterrupt:
        output.message("\nInterrupted. Layers that are done are kept: the same command goes on.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    _show(result, as_json)
    output.message(f"plot: {run.path / FOLDER / PAGE}")


def _show(result: SweepResult, as_json: bool) -> None:
    if as_json:
        output.print_json_lines(result.to_dict()["layers"])
        return
    rows = [
        (
            f"{each.layer}{' *' if each.layer == result.recipe_layer else ''}",
            f"{each.fve:.3f}",
            f"{each.fve_low:.3f} to {each.fve_high:.3f}",
            f"{each.cosine:.3f}",
            f"{each.mean_fve:.3f}",
            f"{each.ridge_fve:.3f}",
            None if each.facts is None else f"{each.facts:.3f}",
            f"{each.seconds:.0f}",
        )
        for each in result.layers
    ]
    output.print_table(COLUMNS, rows)
    output.message("* the recipe's layer")
    output.print_text(result.sentence())
    for caveat in result.caveats():
        output.message(caveat)
