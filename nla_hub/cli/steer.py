"""`nla-hub steer`: what the base model goes on to say with a text's vector added, beside what it says without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nla_hub.cli import output, pair

if TYPE_CHECKING:
    from nla_hub.evaluation.steering import SteeringTable
    from nla_hub.nla import NLA

STRENGTHS = "0.5,1,2,4"


def register(app: typer.Typer) -> None:
    """Add `steer` to the command."""
    app.command("steer")(steer)


def steer(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.", show_default=False)] = None,
    nla: Annotated[str, typer.Option("--nla", help="The pair: a zoo name, owner/name, or ./directory.")] = "tiny",
    to: Annotated[
        str | None, typer.Option("--to", help="The explanation to steer towards.", show_default=False)
    ] = None,
    minus: Annotated[
        str | None, typer.Option("--minus", help="The explanation to steer away from.", show_default=False)
    ] = None,
    strength: Annotated[
        str, typer.Option("--strength", "-s", help="Multiples of the local residual norm, separated by commas.")
    ] = STRENGTHS,
    positions: Annotated[
        str, typer.Option("--positions", "-p", help="generated, all, or prompt positions such as -1 or 3,7.")
    ] = "generated",
    max_new_tokens: Annotated[int, typer.Option(help="Length bound of a continuation, in tokens.", min=1)] = 20,
    table: Annotated[
        bool, typer.Option("--table", help="Instead: flip rates of edited facts in the tiny world, with controls.")
    ] = False,
    ar: pair.Ar = None,
    base_model: pair.Base = None,
    subfolder: pair.Subfolder = "",
    ar_subfolder: pair.ArSubfolder = "",
    sidecar: pair.SidecarFile = None,
    memory: pair.Memory = pair.MemoryMode.auto,
    cases: Annotated[int, typer.Option(help="Cases a fact for --table.", min=1)] = 50,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a continuation (or a row of the table).")
    ] = False,
) -> None:
    """Continue a text steered by an explanation. Vectors from text have a direction only: strength sets the length."""
    strengths = parse_strengths(strength)
    parts: dict[str, Any] = {
        "ar": ar,
        "base_model": base_model,
        "subfolder": subfolder,
        "ar_subfolder": ar_subfolder,
        "sidecar": sidecar,
        "memory": memory,
    }
    if table:
        if prompt is not None or to is not None or minus is not None:
            raise typer.BadParameter("--table takes neither a prompt nor --to and --minus", param_hint="--table")
        _table(pair.load(nla, **parts), strengths, cases, as_json)
        return
    if prompt is None or to is None:
        raise typer.BadParameter(
            'a prompt and --to are needed, as in: nla-hub steer --to "person mara" --minus "person otto" '
            '"once otto had a drum. who?"',
            param_hint="PROMPT" if prompt is None else "--to",
        )
    where = parse_positions(positions)
    loaded = pair.load(nla, components=("ar",), **parts)
    rows = continuations(loaded, prompt, to, minus, strengths, where, max_new_tokens)
    if as_json:
        output.print_json_lines(rows)
        return
    output.print_table(
        ("strength", "continuation"),
        [("unsteered" if row["strength"] == 0 else f"{row['strength']:g}", row["continuation"]) for row in rows],
    )


def continuations(
    loaded: NLA,
    prompt: str,
    to: str,
    minus: str | None,
    strengths: list[float],
    positions: str | list[int],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """The greedy continuation without steering, then one for each strength."""
    from nla_hub.evaluation.steering import continue_greedily
    from nla_hub.source_text import context_length, encode_source

    vector = loaded.steering_vector(
        to=to, minus=minus
    )  # before the source: under "staged" one of them is here at a time
    source = loaded.source
    limit = context_length(source.loaded.model.config)
    ids = encode_source(source.tokenizer, prompt, max_length=limit, where="prompt")[0].ids
    rows = []
    for strength in (0.0, *strengths):
        with vector.apply(source.loaded.model, strength, positions=positions):
            text = continue_greedily(loaded, [ids], max_new_tokens)[0]
        rows.append({"strength": strength, "continuation": text, "to": to, "minus": minus, "prompt": prompt})
    return rows


def _table(loaded: NLA, strengths: list[float], cases: int, as_json: bool) -> None:
    from nla_hub.cli.eval import report_progress
    from nla_hub.evaluation.render import steering_rows
    from nla_hub.evaluation.steering import steering_table

    found: SteeringTable = steering_table(loaded, cases=cases, strengths=strengths, progress=report_progress)
    if as_json:
        output.print_json_lines([found.to_dict()])
        return
    output.print_table(*steering_rows(found))
    for fact, tried in found.looked_at.items():
        own = found.own_explanation[fact]
        output.message(
            f"{fact}: {tried} prompts tried; {own} cases use the pair's own explanation, the others the label"
        )


def parse_strengths(text: str) -> list[float]:
    """Numbers separated by commas; raises a usage error."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not numbers separated by commas", param_hint="--strength") from error


def parse_positions(text: str) -> str | list[int]:
    """The SDK's steering positions from their spelling on the command line; raises a usage error."""
    if text in ("generated", "all"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is neither generated, all nor positions separated by commas", param_hint="--positions"
        ) from error
