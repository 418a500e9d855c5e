"""`nla-hub models`: the pairs that have a name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated, Any

import typer

from nla_hub.cli import output
from nla_hub.errors import did_you_mean
from nla_hub.registry import OWN_DISTRIBUTION
from nla_hub.zoo import NOT_MEASURED, NOT_YET, ZooEntry, entry, zoo

group = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List, search and describe the pairs that have a name."
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


def register(app: typer.Typer) -> None:
    """Add `models` to the command."""
    app.add_typer(group, name="models")


@group.command("ls")
def ls(json: Json = False) -> None:
    """List the named pairs with their scores."""
    _print(zoo().values(), json=json)


@group.command("search")
def search(
    words: Annotated[list[str], typer.Argument(metavar="WORD...", help="Words that must all be found.")],
    json: Json = False,
) -> None:
    """List the pairs whose name, base model, summary, adapter, licence or distribution hold every word."""
    entries = zoo()
    wanted = [word.lower() for word in words]
    found = [e for e in entries.values() if all(word in _searched(e) for word in wanted)]
    if found or json:
        _print(found, json=json)
        return
    near = did_you_mean(" ".join(words), entries)
    hint = f"did you mean {' or '.join(near)}?" if near else "nla-hub models ls lists all of them."
    output.message(f"No pair matches {' '.join(words)!r}; {hint}")


def _searched(found: ZooEntry) -> str:
    """The text of an entry that words are looked for in; a directory of somebody's machine says nothing about it."""
    base = "packaged" if found.packaged else found.base
    parts = (found.name, base, found.summary, found.adapter, found.licence, found.distribution)
    return "\n".join(parts).lower()


def _print(found: Iterable[ZooEntry], *, json: bool) -> None:
    if json:
        output.print_json_lines(map(as_json, found))
        return
    output.print_table(
        ("name", "base model", "layer", "d", "licence", "adapter", "recipe", "card", "from", "score"),
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
                e.distribution,
                e.score_text(),
            )
            for e in found
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
            "summary": found.summary + (" Made by others; not checked here." if found.community else ""),
            "AV": found.where("av"),
            "AR": found.where("ar"),
            "base model": found.where("base") + (" (gated: accept its terms first)" if found.base_gated else ""),
            "layer": _layer(found),
            "d_model": found.d_model,
            "licence": found.licence,
            "adapter": found.adapter,
            "recipe": found.recipe or NOT_YET,
            "card": found.card or NOT_YET,
            "from": found.distribution + ("" if found.distribution == OWN_DISTRIBUTION else " (a plug-in)"),
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
        "community": found.community,
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
        "distribution": found.distribution,
        "measured": None if measured is None else asdict(measured),
        "published": None if published is None else asdict(published),
    }


def _layer(found: ZooEntry) -> str | None:
    return None if found.layer is None else f"{found.layer}/{found.n_layers}" if found.n_layers else str(found.layer)
