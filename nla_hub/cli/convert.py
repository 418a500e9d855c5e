"""`nla-hub convert`: a pair in any layout that is read, written in the canonical one."""

from __future__ import annotations

import json
import re
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nla_hub.cli import output, pair
from nla_hub.errors import InputError
from nla_hub.locate import expand, resolve_pair, zoo_ref

if TYPE_CHECKING:
    from nla_hub.loading import Pair


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
    is not changed. Until it is complete the pair is in a hidden directory .NAME.* beside DST (in DST where that exists); a
    run that is ended by kill -9 leaves it there, and it may be deleted.
    """
    place = named_directory(destination)
    from nla_hub.convert import check_destination, describe
    from nla_hub.convert import convert as write
    from nla_hub.loading import open_pair
    from nla_hub.opening import read_contract

    with ended_by_sigterm():
        check_destination(place)
        refs = resolve_pair(source, ar=ar, base_model=base_model, subfolder=subfolder, ar_subfolder=ar_subfolder)
        components = list(dict.fromkeys(one.value for one in half)) if half else ["av", "ar"]
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
    output.message(f"Use it: {how_to_use(opened, place)}")


def named_directory(destination: str) -> Path:
    """The directory that a user means by DST; raises an InputError where SRC would mean a repository by that name."""
    if not destination.strip():
        raise InputError("The destination is a directory.", got=repr(destination), expected="./path")
    if not destination.startswith(("/", "./", "../", "~")) and re.fullmatch(r"[\w.-]+/[\w.-]+(@.*)?", destination):
        raise InputError(
            "The destination is spelled like a repository of the Hub.",
            got=repr(destination),
            expected="a directory",
            next_step=f"write ./{destination}",
        )
    return expand(destination)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """While open, SIGTERM ends the command as an error does: what was begun is cleaned up, the exit code is 143."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # only the main thread hears signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def how_to_use(opened: Pair, place: Path) -> str:
    """What to type to use a converted pair: a command, or a line of Python where no command can do with what there is."""
    if opened.wanted == {"av", "ar"} and (base := _base_option(opened)) is not None:
        return f'nla-hub explain "..." --nla {shlex.quote(pair.spelled(place))}{base}'
    if opened.wanted == {"av", "ar"}:
        return f"NLA.from_pretrained({json.dumps(pair.spelled(place), ensure_ascii=False)})"
    (role,) = opened.wanted
    name = json.dumps(pair.spelled(place / role), ensure_ascii=False)
    return f'NLA.from_pretrained({name}, components=("{role}",))'


def _base_option(opened: Pair) -> str | None:
    """The option that names the base model, "" where the sidecars do, None where no option can."""
    from nla_hub.opening import hub_name
    from nla_hub.zoo import zoo

    base = opened.base
    said = [hub_name(half.sidecar.base_model) for half in (opened.av, opened.ar) if half is not None]
    if base is None or base.subfolder:
        return None
    if base == next((ref for ref in said if ref is not None), None):
        return ""
    if base.kind == "package":  # it has no name of its own: that of a pair stands for the pair's base
        name = next((e.name for e in zoo().values() if zoo_ref(e.base, e.base_revision) == base), None)
        return None if name is None else f" --base-model {name}"
    name = pair.spelled(Path(base.name)) if base.kind == "directory" else str(base)
    return f" --base-model {shlex.quote(name)}"
