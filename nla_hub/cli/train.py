"""`nla-hub train`: a recipe in, a pair out; the same line continues where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nla_hub.cli import output
from nla_hub.cli.train_view import TrainView
from nla_hub.errors import NLAError
from nla_hub.log import logger

if TYPE_CHECKING:
    from nla_hub.training.processes import Processes
    from nla_hub.training.recipe import Recipe


EXIT_INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add `train` to the command."""
    app.command("train")(train)


def train(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe's name, or a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE...", help="Settings to change.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run directory.", show_default="runs/NAME-HASH")
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option("--stage", help="Only this stage (repeatable); the ones before it must be done.")
    ] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="A few steps of every stage, to see that it runs.")
    ] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Print what each stage takes on the recipe's hardware, and train nothing."),
    ] = False,
    gpu_price: Annotated[
        float | None,
        typer.Option("--gpu-price", min=0, help="Of --plan: what a GPU costs for an hour.", show_default="not known"),
    ] = None,
    layer_sweep: Annotated[
        bool, typer.Option("--layer-sweep", help="Compare layers on little data, with a plot, and train no pair.")
    ] = False,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Of --layer-sweep: 8,12,16.", show_default="about eight")
    ] = None,
    documents: Annotated[
        int | None, typer.Option("--documents", help="Of --layer-sweep: to learn from.", show_default="400")
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            "--report-to", help="Also send the rl stage's figures to trackio, tensorboard or wandb (repeatable)."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a finished stage.")] = False,
) -> None:
    """Train a pair from a recipe. The same command continues a run; a changed configuration is refused.

    With several processes: accelerate launch -m nla_hub train RECIPE.
    """
    from nla_hub.training.processes import Processes

    if layer_sweep or layers is not None or documents is not None:
        from nla_hub.cli.layer_sweep import require_alone, sweep

        require_alone(layer_sweep, {"--plan": plan, "--rehearse": rehearse, "--stage": stage, "--report-to": report_to})
        sweep(recipe, overrides or [], out, layers=layers, documents=documents, as_json=as_json)
        return
    if gpu_price is not None and not plan:
        raise typer.BadParameter("it is for --plan", param_hint="--gpu-price")
    if plan and (rehearse or stage):
        raise typer.BadParameter("it runs nothing, so --rehearse and --stage say nothing to it", param_hint="--plan")
    if plan:
        _plan(recipe, overrides or [], gpu_price, as_json)
        return
    processes = Processes.here()
    if not processes.is_main:
        output.configure(quiet=True)
    try:
        _run(processes, recipe, overrides or [], out, stage, rehearse, report_to or [], as_json)
    except NLAError as error:
        if processes.is_main:
            raise
        logger.warning("process %d: %s", processes.rank, error.one_line())
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        output.message("\nInterrupted. What is done is kept: the same command continues at the last checkpoint.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    processes.close()


def _run(
    processes: Processes,
    recipe: str,
    overrides: list[str],
    out: Path | None,
    stage: list[str] | None,
    rehearse: bool,
    report_to: list[str],
    as_json: bool,
) -> None:
    from nla_hub.schema import differences
    from nla_hub.training.recipe import load_recipe

    resolved = load_recipe(recipe, overrides)
    max_steps = None
    if rehearse:
        from nla_hub.training.rehearsal import STEPS, rehearsed

        resolved, changes = processes.on_main(lambda: rehearsed(resolved, world=processes.world))
        max_steps = STEPS
        for change in changes:
            output.message(f"rehearsal: {change}")
        output.message(
            "rehearsal: what it makes is worth nothing, and warnings about its explanations are to be expected"
        )
    from nla_hub.training import resolve
    from nla_hub.training.checks import check_labeler, check_recipe, check_reporters
    from nla_hub.training.pipeline import Pipeline
    from nla_hub.training.run import RunDirectory, StageDirectory
    from nla_hub.training.stages import STAGES, require_stages, stages_of

    given, resolved = resolved, processes.on_main(lambda: resolve.resolved(resolved))
    for change in differences(given.to_mapping(), resolved.to_mapping()):
        output.message(f"of the base model: {change}")
    check_recipe(resolved, world=processes.world)
    check_reporters(report_to)
    if unknown := set(stage or ()) - set(STAGES):
        raise typer.BadParameter(f"{sorted(unknown)[0]!r} is none of {', '.join(STAGES)}", param_hint="--stage")
    stages = tuple(stage or stages_of(resolved))
    require_stages(resolved, stages)
    place = out or default_directory(resolved, rehearse)
    if "data" in stages and not StageDirectory(place / "data").is_done:
        processes.on_main(lambda: resolve.check_marker(resolved))
        processes.on_main(lambda: check_labeler(resolved))
    run = RunDirectory(place, resolved, rehearsal=rehearse, processes=processes)
    output.message(f"run directory: {run.path}")
    if processes.world != resolved.hardware.world:
        output.message(f"processes: {processes.world} (the recipe is written for {resolved.hardware.world})")
    listener = TrainView(as_json, stages)
    pair = Pipeline(resolved, run, listener, max_steps=max_steps, report_to=report_to).execute(stages)
    if not processes.is_main or not pair.is_dir():
        return  # or only earlier stages were asked for
    if not as_json:
        output.print_text(str(pair))
    output.message(f"what happened: {run.path / 'report.html'}")
    output.message(
        f'use it: nla-hub explain --nla ./{pair} "..."' if not pair.is_absolute() else f"use it: --nla {pair}"
    )


def _plan(name: str, overrides: list[str], price: float | None, as_json: bool) -> None:
    """Reckon a recipe on the hardware that it declares; this machine is a note, whatever it is."""
    from nla_hub.cli.train_plan import show
    from nla_hub.training.checks import check_recipe
    from nla_hub.training.planning.plan import Plan
    from nla_hub.training.recipe import load_recipe

    resolved = load_recipe(name, overrides)
    plan = Plan.of(resolved, price=price)
    check_recipe(resolved, runs_here=False)
    show(plan, as_json=as_json)


def default_directory(recipe: Recipe, rehearsal: bool) -> Path:
    """`runs/NAME-HASH`."""
    return Path("runs") / f"{recipe.name}{'-rehearsal' if rehearsal else ''}-{recipe.digest()}"
