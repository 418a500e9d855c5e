"""`nla-hub models`: the pairs that have a name."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from nla_hub.cli import output
from nla_hub.zoo import NOT_MEASURED, NOT_YET, ZooEntry, entry, zoo

group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List and describe the pairs that have a name.")

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


def register(app: typer.Typer) -> None:
    """Add `models` to the command."""
    app.add_typer(group, name="models")


@group.command("ls")
def ls(json: Json = False) -> None:
    """List the named pairs with their scores."""
    entries = list(zoo().values())
    if json:
        output.print_json_lines(map(as_json, entries))
        return
    output.print_table(
        ("name", "base model", "layer", "d", "licence", "adapter", "recipe", "card", "score"),
        [
            (
                e.name,
                "packaged" if e.packaged else e.base,
                _layer(e),
                e.d_model,
                e.licence,
                e.adapter,
                e.recipe or NOT_YET,
                e.card or NOT_YET,
                e.score_text(),
            )
            for e in entries
        ],
    )


@group.command("show")
def show(name: Annotated[str, typer.Argument(help="A name that `models ls` lists.")], json: Json = False) -> None:
    """Describe one pair: repositories, revisions, licence, scores, and how to use it."""
    found = entry(name)
    if json:
        output.print_json_lines([as_json(found)])
        return
    published = found.published()
    measured = found.measured()
    output.print_fields(
        {
            "name": found.name,
            "summary": found.summary,
            "AV": found.where("av"),
            "AR": found.where("ar"),
            "base model": found.where("base") + (" (gated: accept its terms first)" if found.base_gated else ""),
            "layer": _layer(found),
            "d_model": found.d_model,
            "licence": found.licence,
            "adapter": found.adapter,
            "recipe": found.recipe or NOT_YET,
            "card": found.card or NOT_YET,
            "measured": found.score_text() if measured else NOT_MEASURED,
            "published": str(published).removeprefix("published: ") if published else None,
            "use": f'nla-hub explain "..." --nla {found.name}',
        }
    )


def as_json(found: ZooEntry) -> dict[str, Any]:
    """An entry as a JSON-ready mapping; unknown values are null."""
    measured, published = found.measured(), found.published()
    return {
        "name": found.name,
        "summary": found.summary,
        "av": found.av,
        "av_revision": found.av_revision,
        "ar": found.ar,
        "ar_revision": found.ar_revision,
        "base_model": found.base,
        "base_revision": found.base_revision,
        "base_gated": found.base_gated,
        "layer": found.layer,
        "n_layers": found.n_layers,
        "d_model": found.d_model,
        "licence": found.licence,
        "adapter": found.adapter,
        "recipe": found.recipe,
        "card": found.card,
        "measured": None if measured is None else asdict(measured),
        "published": None if published is None else asdict(published),
    }


def _layer(found: ZooEntry) -> str | None:
    return None if found.layer is None else f"{found.layer}/{found.n_layers}" if found.n_layers else str(found.layer)
