"""`nla-hub convert`: a pair in any layout that is read, written in the canonical one."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from nla_hub.cli import output, pair
from nla_hub.errors import InputError
from nla_hub.locate import expand


class Dtype(StrEnum):
    """What weights may be written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Half(StrEnum):
    """The halves of a pair."""

    av = "av"
    ar = "ar"


def register(app: typer.Typer) -> None:
    """Add `convert` to the command."""
    app.command("convert")(convert)


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A zoo name, owner/name, or ./directory.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="A new directory; it gets av/ and ar/.")],
    ar: pair.Ar = None,
    base_model: pair.Base = None,
    subfolder: pair.Subfolder = "",
    ar_subfolder: pair.ArSubfolder = "",
    sidecar: pair.SidecarFile = None,
    half: Annotated[list[Half] | None, typer.Option("--half", help="Only this half; both by default.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="What to write the weights in; the widest that they are stored in by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a half.")] = False,
) -> None:
    """Write a pair in the canonical layout: av/ and ar/, complete weights, nla_meta.yaml in its current version.

    Unknown keys of the sidecar are kept, licences and README are copied, LoRAs are merged into their base model. The source
    is not changed.
    """
    from nla_hub.convert import convert as write
    from nla_hub.convert import describe
    from nla_hub.loading import open_pair
    from nla_hub.locate import resolve_pair
    from nla_hub.opening import read_contract

    place = expand(destination)
    if "@" in destination:
        raise InputError("The destination is a directory.", got=repr(destination), expected="./path")
    refs = resolve_pair(source, ar=ar, base_model=base_model, subfolder=subfolder, ar_subfolder=ar_subfolder)
    components = [one.value for one in half] if half else ["av", "ar"]
    opened = open_pair(refs, components=components, sidecar=read_contract(sidecar))
    done = write(opened, place, dtype=dtype.value if dtype else None)
    if as_json:
        output.print_json_lines(
            {"half": c.role, "directory": str(c.directory), "from": c.came_from, "dtype": c.dtype, "merged": c.merged}
            for c in done
        )
        return
    for one in done:
        print(describe(one))
    output.message(f'Use it: nla-hub explain "..." --nla {pair.spelled(place)}')
