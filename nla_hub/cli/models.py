"""`nla-hub models`: the pairs that have a name, and those that others have published on the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any

import typer

from nla_hub.cli import output
from nla_hub.errors import HubError, did_you_mean
from nla_hub.hub import HubOptions
from nla_hub.hub_pairs import LIBRARY, HubPair, hub_pairs, is_base
from nla_hub.locate import PACKAGE_PREFIX
from nla_hub.log import logger
from nla_hub.registry import OWN_DISTRIBUTION
from nla_hub.zoo import NOT_MEASURED, NOT_YET, PART_WORDS, UNPINNED, Update, ZooEntry, entry, updates, zoo

group = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List and describe the pairs that have a name; search them and the Hub.",
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


class Half(StrEnum):
    """The halves of a pair."""

    av = "av"
    ar = "ar"


def register(app: typer.Typer) -> None:
    """Add `models` to the command."""
    app.add_typer(group, name="models")


@group.command("ls")
def ls(
    newest: Annotated[
        bool, typer.Option("--updates", help="Ask the Hub which pinned revisions are behind its main branches.")
    ] = False,
    json: Json = False,
) -> None:
    """List the named pairs with their scores."""
    entries = list(zoo().values())
    found = updates(entries, HubOptions()) if newest else None
    if json:
        output.print_json_lines(
            as_json(e) | ({} if found is None else _updates_as_json(found.get(e.name))) for e in entries
        )
        return
    columns = ["name", "base model", "layer", "d", "licence", "adapter", "recipe", "card", "from", "score"]
    rows: list[list[object]] = [
        [
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
        ]
        for e in entries
    ]
    if found is not None:
        columns.insert(-1, "updates")
        for e, row in zip(entries, rows, strict=True):
            row.insert(-1, _state(found.get(e.name, ())))
    output.print_table(columns, rows)


def _state(found: Iterable[Update]) -> str | None:
    """The updates of an entry in a few words; None where nothing is known."""
    known = list(found)
    if behind := [PART_WORDS[one.part] for one in known if one.behind]:
        return f"behind: {', '.join(behind)}"
    return None if not known else UNPINNED if any(one.pinned is None for one in known) else "current"


def _updates_as_json(found: Iterable[Update] | None) -> dict[str, Any]:
    """null is "not known"."""
    if found is None:
        return {"updates": None}
    rows = [asdict(one) | {"updated": one.updated and one.updated.isoformat(), "behind": one.behind} for one in found]
    return {"updates": rows}


@group.command("search")
def search(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[WORD...]", help="Words that must all be found.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Only pairs for this model: owner/name, or a part of its name.")
    ] = None,
    role: Annotated[Half | None, typer.Option("--role", help="Only pairs whose AV, or whose AR, was found.")] = None,
    author: Annotated[str | None, typer.Option("--author", help="Only pairs of this account of the Hub.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many pairs that have no name here.")] = 20,
    json: Json = False,
) -> None:
    """Search the named pairs (name, base model, summary, adapter, licence, distribution) and then the Hub's.

    On the Hub pairs are found by the tags nla, activation-verbalizer, activation-reconstructor and the library nla-hub;
    looked through are names, base models, library and licence. Those are made by others, and nothing of them is checked
    before they are loaded. Offline only the named pairs are searched.
    """
    wanted = words or []
    named = [e for e in zoo().values() if _is_searched(e, wanted, base_model, author)]
    published = _published(wanted, base_model, role, author)
    beside = {e.name: _of_entry(e, published) for e in named}
    others = [pair for pair in published if pair not in beside.values()]
    shown = [*(_named(e, beside[e.name]) for e in named), *map(_unnamed, others[:limit])]
    if json:
        output.print_json_lines(shown)
    elif shown:
        columns = ("name", "base_model", "layer", "licence", "zoo", "downloads", "updated", "ar")
        headings = ("name", "base model", "layer", "licence", "zoo", "downloads", "updated", "AR")
        output.print_table(headings, [[_cell(row, column) for column in columns] for row in shown])
    if len(others) > limit:
        output.message(f"{len(others) - limit} more pairs on the Hub; --limit {len(others)} shows them.")
    if not shown and not json:
        near = did_you_mean(" ".join(wanted), zoo())
        hint = f"did you mean {' or '.join(near)}?" if near else "nla-hub models ls lists those that have a name."
        output.message(f"No pair matches {' '.join(wanted)!r}; {hint}" if wanted else f"No pair was found; {hint}")
    elif others and not json:
        output.message(
            f'Use one: nla-hub explain "..." --nla NAME. Library {LIBRARY} means: published with this program.'
        )


def _is_searched(found: ZooEntry, words: list[str], base_model: str | None, author: str | None) -> bool:
    """Whether an entry is what a search asks for; a directory of somebody's machine says nothing about it."""
    base = "packaged" if found.packaged else found.base
    parts = (found.name, base, found.summary, found.adapter, found.licence, found.distribution)
    text = "\n".join(parts).lower()
    if author is not None and (found.packaged or found.av.partition("/")[0].lower() != author.lower()):
        return False
    if base_model is not None and (found.packaged or not is_base(base_model, found.base)):
        return False
    return all(word.lower() in text for word in words)


def _published(words: list[str], base_model: str | None, role: Half | None, author: str | None) -> list[HubPair]:
    """The Hub's pairs; none, and the reason told, where the Hub does not answer."""
    try:
        return hub_pairs(
            words, base_model=base_model, role=role.value if role else None, author=author, options=HubOptions()
        )
    except HubError as refusal:
        logger.warning("Only the named pairs were searched. %s", refusal.one_line())
        return []


def _of_entry(found: ZooEntry, published: Iterable[HubPair]) -> HubPair | None:
    return next((p for p in published if p.av is not None and p.av.repo.lower() == found.av.lower()), None)


def _named(found: ZooEntry, listed: HubPair | None) -> dict[str, Any]:
    """An entry as a row, with what the Hub says about its repositories."""
    return as_json(found) | _said(listed) | {"zoo": found.name}


def _unnamed(pair: HubPair) -> dict[str, Any]:
    """A pair of the Hub as a row with the keys of a named one; what is not known is null."""
    keys = dict.fromkeys(as_json(next(iter(zoo().values()))))
    known = {
        "name": pair.model.repo,
        "community": True,
        "av": pair.av and pair.av.repo,
        "ar": pair.ar and pair.ar.repo,
        "base_model": pair.base_model,
        "layer": pair.layer,
        "licence": pair.model.licence,
        "distribution": pair.model.library,
    }
    same = next((e.name for e in zoo().values() if pair.av is not None and e.av.lower() == pair.av.repo.lower()), None)
    return {**keys, **known, **_said(pair), "zoo": same}


def _said(pair: HubPair | None) -> dict[str, Any]:
    if pair is None:
        return {"downloads": None, "updated": None, "gated": None}
    updated = pair.updated.isoformat() if pair.updated else None
    gated = any(half.gated for half in (pair.av, pair.ar) if half)
    return {"downloads": pair.model.downloads, "updated": updated, "gated": gated}


def _cell(row: Mapping[str, Any], column: str) -> object:
    """A value of a row as the table shows it."""
    if column in ("base_model", "ar") and str(row["av"]).startswith(PACKAGE_PREFIX):
        return "packaged"
    if column == "zoo" and row["zoo"] == row["name"]:
        return "yes"
    if column == "layer" and row["layer"] is not None and row["n_layers"]:
        return f"{row['layer']}/{row['n_layers']}"
    return row[column]


@group.command("show")
def show(name: Annotated[str, typer.Argument(help="A name that `models ls` lists.")], json: Json = False) -> None:
    """Describe one pair: repositories, revisions, licence, scores, how to use it; online also what its repositories are now."""
    found = entry(name)
    known = updates([found], HubOptions()).get(found.name)
    if json:
        output.print_json_lines([as_json(found) | _updates_as_json(known)])
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
            **({"updates": [str(one) for one in known]} if known else {}),
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
