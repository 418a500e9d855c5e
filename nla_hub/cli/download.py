"""`nla-hub download`: a pair fetched before it is needed, into the cache or as a directory."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nla_hub.cli import output, pair
from nla_hub.cli.convert import Half, how_to_use, named_directory
from nla_hub.errors import InputError
from nla_hub.locate import parse_name, resolve_pair
from nla_hub.units import size

if TYPE_CHECKING:
    from nla_hub.download import Part
    from nla_hub.loading import Pair


def register(app: typer.Typer) -> None:
    """Add `download` to the command."""
    app.command("download")(download)


def download(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A zoo name, owner/name or owner/name@revision.")],
    with_source: Annotated[
        bool, typer.Option("--with-source", help="Also the source model, without which nothing can be captured.")
    ] = False,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="DIR", help="A directory instead of the cache: DIR/av, DIR/ar, DIR/source."),
    ] = None,
    half: Annotated[list[Half] | None, typer.Option("--half", help="Only this half; both by default.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Commit, tag or branch of the AV.")] = None,
    ar: pair.Ar = None,
    base_model: pair.Base = None,
    subfolder: pair.Subfolder = "",
    ar_subfolder: pair.ArSubfolder = "",
    sidecar: pair.SidecarFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be fetched; weights stay where they are.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a part.")] = False,
) -> None:
    """Fetch a pair, so that it works without network later: with HF_HUB_OFFLINE=1, or from the directory.

    Its contract is checked first, sizes and room on the disk are said before anything large is fetched, and what arrives is
    held against its sha256. A download that was cut short is continued by the same command. A LoRA brings the model that it
    lies on. Nothing of a repository but weights, configurations, tokenizers, contract and licences is fetched.
    """
    _require_remote(name)
    refs = resolve_pair(
        name, ar=ar, base_model=base_model, revision=revision, subfolder=subfolder, ar_subfolder=ar_subfolder
    )
    place = None if to is None else named_directory(to)
    from nla_hub.download import WORDS, into_cache, parts_of
    from nla_hub.download_folder import folder_lacks, into_folder
    from nla_hub.hub import HubOptions
    from nla_hub.loading import open_pair
    from nla_hub.opening import read_contract

    told, options = read_contract(sidecar), HubOptions()
    components = list(dict.fromkeys(one.value for one in half)) if half else ["av", "ar"]
    opened = open_pair(refs, components=components, sidecar=told, hub_options=options, weights=False)
    parts = parts_of(opened, source=with_source)
    _tell_updates(name)
    planned = folder_lacks(parts, place) if place else {part.name: sum(part.missing.values()) for part in parts}
    for part in parts:
        fetched = f"{size(planned[part.name])} to fetch" if planned[part.name] else "nothing to fetch"
        output.message(f"{WORDS[part.name]}: {part.short}, {size(part.size)}, {fetched}")
    if place is None and not any(part.checkpoint.ref.kind == "hub" for part in parts):
        output.message("This pair is packaged: it needs no download, and no network. --to DIR copies it.")
    if dry_run:
        _print(parts, planned, {}, as_json=as_json)
        return
    if place is not None:
        directories = into_folder(opened, parts, place, options, told=told)
    else:
        directories = into_cache(opened, parts, options)
    _print(parts, planned, directories, as_json=as_json)
    if as_json:
        return
    if place is None:
        spelled = f"{name}@{revision}" if revision is not None and "@" not in name else name
        parts_named = {"ar": ar, "base-model": base_model, "subfolder": subfolder, "ar-subfolder": ar_subfolder}
        print(_from_cache(opened, spelled, {**parts_named, "sidecar": sidecar}))
    elif any(part.name == "source" for part in parts) and opened.wanted == {"av", "ar"}:
        print(f'nla-hub explain "..." --nla {shlex.quote(pair.spelled(place))}')
    else:
        print(how_to_use(opened, place))


def _require_remote(name: str) -> None:
    """Raise an InputError for a directory, which is here already."""
    if parse_name(name).kind == "directory":
        raise InputError(
            "This is a directory: there is nothing to download.",
            where=name,
            next_step=f"nla-hub convert {shlex.quote(name)} DIR writes a pair anew",
        )


def _tell_updates(name: str) -> None:
    """Say where a named pair's pinned revisions are behind what the Hub has now."""
    from nla_hub.hub import HubOptions
    from nla_hub.zoo import entry, updates

    ref = parse_name(name)
    if ref.kind != "zoo":
        return
    found = entry(ref.name)
    for update in updates([found], HubOptions()).get(found.name, ()):
        if update.behind:
            output.message(f"{found.name}, {update}")


def _print(parts: list[Part], planned: dict[Any, int], directories: dict[Any, Path], *, as_json: bool) -> None:
    if as_json:
        output.print_json_lines(_rows(parts, planned, directories))
        return
    columns = ("part", "size", "fetched" if directories else "to fetch", "from", "directory")
    rows = [
        (part.name, size(part.size), size(planned[part.name]), part.short, directories.get(part.name)) for part in parts
    ]
    output.print_table(columns if directories else columns[:-1], rows if directories else [row[:-1] for row in rows])


def _rows(parts: list[Part], planned: dict[Any, int], directories: dict[Any, Path]) -> Iterator[dict[str, Any]]:
    for part in parts:
        directory = directories.get(part.name)
        yield {
            "part": part.name,
            "from": part.origin,
            "files": len(part.files),
            "bytes": part.size,
            "fetched": planned[part.name],
            "directory": None if directory is None else str(directory),
        }


def _from_cache(opened: Pair, name: str, options: Mapping[str, str | None]) -> str:
    """What to type to use a pair that is in the cache."""
    if opened.wanted != {"av", "ar"}:
        (role,) = opened.wanted
        return f'NLA.from_pretrained({json.dumps(name)}, components=("{role}",))'
    said = [f" --{option} {shlex.quote(value)}" for option, value in options.items() if value]
    if opened.base is None:
        from nla_hub.publish.card.snippets import base_option

        said.append(base_option(opened.sidecar.base_model))
    return f'nla-hub explain "..." --nla {shlex.quote(name)}{"".join(said)}'
