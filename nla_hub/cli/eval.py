"""`nla-hub eval`: a named protocol on a pair, with its controls, or on two pairs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nla_hub.cli import output, pair

if TYPE_CHECKING:
    from nla_hub.evaluation import Comparison, EvalResult

PROTOCOL_NAMES = "tiny-eval-v1, nla-eval-v1"


def register(app: typer.Typer) -> None:
    """Add `eval` to the command."""
    app.command("eval")(evaluate)


def evaluate(
    nla: Annotated[str, typer.Argument(help="The pair: a zoo name, owner/name, or ./directory.")] = "tiny",
    protocol: Annotated[
        str | None,
        typer.Option(help=f"{PROTOCOL_NAMES}.", show_default="nla-eval-v1 where --corpus is given, else tiny-eval-v1"),
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Documents for nla-eval-v1: .txt, .jsonl or .parquet.", show_default=False)
    ] = None,
    documents: Annotated[
        int | None, typer.Option(help="Another number of documents; the protocol's name then says so.", min=1)
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Instead: compare with this other pair (B) of the same base model on the same rows, paired by document.",
            show_default=False,
        ),
    ] = None,
    facts: Annotated[bool, typer.Option("--facts/--no-facts", help="The facts table (tiny world).")] = True,
    sampled: Annotated[
        bool, typer.Option("--sampled", help="Also explanations drawn at temperature 1, one a row.")
    ] = False,
    source_check: Annotated[
        bool, typer.Option("--source-check", help="Also what the source itself holds (tiny world).")
    ] = False,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            help='A bar, as in "fve>=0.65", "fve>floor", "share.person>=0.5", with --against "difference.fve_low>0"; '
            "exit 3 where one fails (repeatable).",
            show_default=False,
        ),
    ] = None,
    ar: pair.Ar = None,
    base_model: pair.Base = None,
    subfolder: pair.Subfolder = "",
    ar_subfolder: pair.ArSubfolder = "",
    sidecar: pair.SidecarFile = None,
    engine: pair.Engine = "auto",
    engine_option: pair.EngineOptions = None,
    memory: pair.Memory = pair.MemoryMode.auto,
    batch_size: Annotated[int, typer.Option(help="Rows that run together.", min=1)] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON object.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The result as Markdown tables.")] = False,
) -> None:
    """Measure a pair: FVE with both denominators, cosine, controls, and for the tiny world the facts it tells.

    With --against: FVE, cosine and facts of two pairs and the difference A - B, with paired 95 % intervals.
    """
    from nla_hub.evaluation.gates import check_gates, parse_gates

    gates = parse_gates(gate or [])
    if against is not None and (sampled or source_check):
        raise typer.BadParameter("--against takes neither --sampled nor --source-check", param_hint="--against")
    from nla_hub.evaluation import compare, get_protocol, run_protocol

    chosen = get_protocol(protocol or ("nla-eval-v1" if corpus is not None else "tiny-eval-v1"))
    from nla_hub.nla import NLA

    loaded = pair.load(
        nla,
        ar=ar,
        base_model=base_model,
        subfolder=subfolder,
        ar_subfolder=ar_subfolder,
        sidecar=sidecar,
        engine=engine,
        engine_options=engine_option,
        memory=memory,
    )
    common: dict[str, Any] = {
        "corpus": corpus,
        "documents": documents,
        "facts": facts,
        "batch_size": batch_size,
        "progress": report_progress,
    }
    result: EvalResult | Comparison
    with loaded:
        if against is not None:
            result = compare(loaded, NLA.from_pretrained(against), chosen, **common)
            where = f"{result.a} against {result.b}"
        else:
            result = run_protocol(loaded, chosen, sampled=sampled, with_source_check=source_check, **common)
            where = result.nla
    if as_json:
        output.print_json_lines([result.to_dict()])
    else:
        output.print_text(result.to_markdown() if markdown else str(result))
    check_gates(gates, result.figures(), where=f"{where}, {result.protocol.name}")


def report_progress(what: str, done: int, total: int) -> None:
    """A counter on a terminal's stderr, a line at a time elsewhere."""
    if output.progress_wanted():
        end = "\n" if done >= total else ""
        print(f"\r{what}: {done}/{total}", end=end, file=sys.stderr, flush=True)
    else:
        output.message(f"{what}: {done} of {total}")
