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
        bool, typer.Option("--plan", help="Print what each stage needs of memory, and train nothing.")
    ] = False,
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

    if plan:
        _plan(recipe, overrides or [], as_json)
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
    from nla_hub.training.checks import check_recipe, check_reporters
    from nla_hub.training.pipeline import Pipeline
    from nla_hub.training.run import RunDirectory
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
    run = RunDirectory(place, resolved, rehearsal=rehearse, processes=processes)
    output.message(f"run directory: {run.path}")
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


def _plan(name: str, overrides: list[str], as_json: bool) -> None:
    """Bytes of each stage. They are judged against nothing here: this machine is a note, whatever it is."""
    from dataclasses import asdict

    from nla_hub.doctor import size
    from nla_hub.hardware import free_memory
    from nla_hub.pretrained import LoadOptions
    from nla_hub.sizing import device_of
    from nla_hub.training.checks import check_recipe
    from nla_hub.training.memory import plan
    from nla_hub.training.recipe import load_recipe

    resolved = load_recipe(name, overrides)
    check_recipe(resolved)
    stages = plan(resolved)
    if as_json:
        output.print_json_lines([{**asdict(stage), "total": stage.total} for stage in stages])
    else:
        rows = [(s.name, size(s.weights), size(s.optimizer), size(s.activations), size(s.total)) for s in stages]
        output.print_table(("stage", "weights", "gradients and moments", "activations", "in each process"), rows)
    device = device_of(LoadOptions())
    free = free_memory(device)
    here = f"{size(free)} are free on {device}" if free is not None else f"{device} does not say what is free"
    worst = max(stages, key=lambda stage: stage.total)
    output.message(f"the stage {worst.name} needs most: {size(worst.total)}. Here, as a note: {here}.")


def default_directory(recipe: Recipe, rehearsal: bool) -> Path:
    """`runs/NAME-HASH`."""
    return Path("runs") / f"{recipe.name}{'-rehearsal' if rehearsal else ''}-{recipe.digest()}"
