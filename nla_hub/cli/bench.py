"""`nla-hub bench`: how fast the engines are here, against plain transformers in the same run."""

from __future__ import annotations

import shlex
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nla_hub.cli import output, pair

if TYPE_CHECKING:
    from nla_hub.bench.operations import Settings
    from nla_hub.bench.route import Operation
    from nla_hub.bench.subject import Subject


class OperationName(StrEnum):
    """What can be measured."""

    verbalize = "verbalize"
    reconstruct = "reconstruct"
    capture = "capture"


def register(app: typer.Typer) -> None:
    """Add `bench` to the command."""
    app.command("bench")(bench)


def bench(
    context: typer.Context,
    operations: Annotated[
        list[OperationName] | None,
        typer.Argument(metavar="OPERATION...", help="verbalize, reconstruct, capture.", show_default="all three"),
    ] = None,
    nla: pair.Name = "tiny",
    ar: pair.Ar = None,
    base_model: pair.Base = None,
    subfolder: pair.Subfolder = "",
    ar_subfolder: pair.ArSubfolder = "",
    sidecar: pair.SidecarFile = None,
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            help="Instead of a pair: random weights in this shape, as in qwen2.5-7b or llama-d256 (no download).",
        ),
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="With --arch: says that its weights are random.")] = False,
    engine: Annotated[
        str | None, typer.Option("--engine", help="Only this engine.", show_default="every one that works here")
    ] = None,
    engine_option: pair.EngineOptions = None,
    dtype: Annotated[
        str, typer.Option(help="auto (float32 on a CPU, bfloat16 elsewhere), float32, bfloat16 or float16.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(help="Rows that run together.", min=1)] = 48,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of every explanation; no row stops early.", min=1)] = 150,
    rows: Annotated[
        int | None, typer.Option(help="Rows of a run.", min=1, show_default="one batch, 512 texts, 128 texts")
    ] = None,
    pairs: Annotated[int, typer.Option(help="Timed runs of each route, interleaved; medians are printed.", min=1)] = 5,
    prompt_tokens: Annotated[int, typer.Option(help="With --arch: length of the AV's prompt.", min=1)] = 105,
    one_by_one: Annotated[
        bool, typer.Option("--one-by-one/--no-one-by-one", help="The slow plain route, one row at a time.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of vectors, texts and random weights.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines: the machine, then one object a route.")] = False,
) -> None:
    """Time every engine against plain transformers, interleaved, and compare what they compute.

    Exit 3 where a route in float32 does not compute what the plain one does. Figures and routes: docs/performance.md.
    """
    if random and arch is None:
        raise typer.BadParameter("--random needs --arch: which shape?", param_hint="--random")
    if engine_option and engine is None:
        raise typer.BadParameter("--engine-option needs --engine: whose option?", param_hint="--engine-option")
    from nla_hub.bench.operations import Settings, required
    from nla_hub.bench.subject import of_architecture, of_pair

    chosen: list[Operation] = [name.value for name in dict.fromkeys(operations or OperationName)]
    settings = Settings(
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        rows=rows,
        pairs=pairs,
        seed=seed,
        one_by_one=one_by_one,
        engine=_engine(engine, engine_option),
        progress=output.message,
    )
    if arch is not None:
        from nla_hub.pretrained import LoadOptions

        subject = of_architecture(arch, LoadOptions(dtype), prompt_tokens=prompt_tokens, seed=seed)
    else:
        subject = of_pair(
            pair.load(
                nla,
                ar=ar,
                base_model=base_model,
                subfolder=subfolder,
                ar_subfolder=ar_subfolder,
                sidecar=sidecar,
                engine="transformers",
                memory=pair.MemoryMode.staged,
                components=required(chosen),
                dtype=dtype,
            )
        )
    _report(subject, chosen, settings, _command(context), as_json)


def _engine(name: str | None, options: list[str] | None) -> Any:
    """The one engine that is asked for, its name and options checked; None for all."""
    if name is None:
        return None
    from nla_hub.engines.choice import EngineChoice
    from nla_hub.errors import InputError
    from nla_hub.schema import apply_overrides

    choice = EngineChoice(name, apply_overrides({}, options or [], where="--engine-option", error=InputError))
    choice.check()
    return choice


def _command(context: typer.Context) -> str:
    """The command with what was said on its line, in the order of its help."""
    words = ["nla-hub", "bench"]
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        values = value if isinstance(value, (list, tuple)) else [value]
        if parameter.param_type_name == "argument":
            words += [str(getattr(item, "value", item)) for item in values]
        elif isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            words += [part for item in values for part in (parameter.opts[0], str(item))]
    return shlex.join(words)


def _report(subject: Subject, operations: list[Operation], settings: Settings, command: str, as_json: bool) -> None:
    """Print the records as they come: JSON lines each, a table when its operation is complete."""
    from nla_hub.bench.render import COLUMNS, cells, heading, machine_fields
    from nla_hub.bench.route import Route
    from nla_hub.bench.run import run

    table: list[dict[str, Any]] = []

    def flush() -> None:
        if table:
            print()
            output.print_heading(heading(table[0]))
            output.print_table(COLUMNS, [cells(route) for route in table])
            table.clear()

    try:
        for record in run(subject, operations, settings, command=command):
            found = record.to_dict() if isinstance(record, Route) else record
            if as_json:
                output.print_json_lines([found])
            elif found["record"] == "machine":
                output.print_fields(machine_fields(found))
            else:
                if table and table[0]["operation"] != found["operation"]:
                    flush()
                table.append(found)
    finally:
        flush()
