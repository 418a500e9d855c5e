"""The options that name a pair and its parts, one meaning for every command."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nla_hub.explain.settings import PairSettings
    from nla_hub.nla import NLA


class MemoryMode(StrEnum):
    """The SDK's memory modes."""

    auto = "auto"
    resident = "resident"
    staged = "staged"
    shared = "shared"


Name = Annotated[str, typer.Option("--nla", help="The pair: a zoo name, owner/name, or ./directory.")]
Ar = Annotated[
    str | None, typer.Option("--ar", help="The AR, where it is not found by itself: owner/name or ./directory.")
]
Base = Annotated[
    str | None,
    typer.Option("--base-model", help="The source model, where it is not the sidecar's: owner/name or ./directory."),
]
Subfolder = Annotated[str, typer.Option("--subfolder", help="Folder of the AV, in a checkpoint that holds several.")]
ArSubfolder = Annotated[str, typer.Option("--ar-subfolder", help="Folder of the AR.")]
SidecarFile = Annotated[
    str | None,
    typer.Option(
        "--sidecar", help="A YAML file of what nla_meta.yaml does not say, or says wrongly; it wins over that file."
    ),
]
Engine = Annotated[
    str, typer.Option("--engine", help="What runs the AV: auto, transformers, vllm, remote, or a plug-in's engine.")
]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-option", metavar="KEY=VALUE", help="What that engine is told (docs/engines.md); repeatable."
    ),
]
Memory = Annotated[
    MemoryMode,
    typer.Option(
        "--memory", help="resident: all parts stay; staged: one at a time; shared: LoRAs on one base; auto: what fits."
    ),
]


def spelled(directory: Path) -> str:
    """A directory as `--nla` wants it: with a ./ where it is relative."""
    text = str(directory)
    return text if text.startswith(("/", "../")) or text in (".", "..") else f"./{text}"


def load(
    name: str,
    *,
    ar: str | None = None,
    base_model: str | None = None,
    subfolder: str = "",
    ar_subfolder: str = "",
    sidecar: str | None = None,
    engine: str = "auto",
    engine_options: list[str] | None = None,
    memory: MemoryMode = MemoryMode.auto,
    **others: Any,
) -> NLA:
    """The pair that the options name."""
    from nla_hub.nla import NLA

    return NLA.from_pretrained(
        name,
        ar=ar,
        base_model=base_model,
        subfolder=subfolder,
        ar_subfolder=ar_subfolder,
        sidecar=sidecar,
        engine=engine,
        engine_options=_engine_options(engine_options),
        memory=memory.value,
        **others,
    )


def settings(
    name: str,
    *,
    sidecar: str | None,
    engine_options: list[str] | None,
    memory: MemoryMode,
    **others: Any,
) -> PairSettings:
    """How the workers of a job load the pair that the options name; a sidecar's file is read now."""
    from nla_hub.explain.settings import PairSettings
    from nla_hub.opening import read_contract

    return PairSettings(
        name,
        sidecar=read_contract(sidecar),
        engine_options=_engine_options(engine_options),
        memory=memory.value,
        **others,
    )


def _engine_options(options: list[str] | None) -> dict[str, Any]:
    from nla_hub.errors import InputError
    from nla_hub.schema import apply_overrides

    return apply_overrides({}, options or [], where="--engine-option", error=InputError)
