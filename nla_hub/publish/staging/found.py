"""What lies at the place that somebody wants to publish: told from file names, configurations and sidecars, no weights read.

Nothing is written, and everything that is wrong is listed at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nla_hub import yaml_io
from nla_hub.errors import PublishError
from nla_hub.explain.schema import JOB, MANIFEST, PARTS
from nla_hub.hub import HubOptions
from nla_hub.layouts import Place, files_below, places
from nla_hub.locate import PACKAGE_PREFIX, resolve_pair, zoo_ref
from nla_hub.sidecar import SIDECAR_NAME, Role, named_role
from nla_hub.training.run import CONFIG, StageDirectory, step_pairs
from nla_hub.training.stages import STAGES

Kind = Literal["run", "pair", "half", "explanations", "activations"]
"""A run of `nla-hub train`, both halves of a pair, one of them, an explanation job's output, a data set of vectors."""

EXPORT = Path("export", "checkpoint")


@dataclass(frozen=True)
class Found:
    """What lies at a place.

    Attributes:
        kind: see `Kind`. path: the place itself.
        av, ar: directories of the halves as they lie; None where there is none.
        base: directory of the base model, where it lies beside them.
        factors: of a run that trained LoRA factors, the directories that hold them by role: `av` and `ar` are merged.
        steps: earlier reinforcement-learning steps by their tags, each a directory with av/ and ar/.
    """

    kind: Kind
    path: Path
    av: Path | None = None
    ar: Path | None = None
    base: Path | None = None
    factors: Mapping[Role, Path] = field(default_factory=dict)
    steps: Mapping[str, Path] = field(default_factory=dict)

    @property
    def run(self) -> Path | None:
        """The run directory, where this is one."""
        return self.path if self.kind == "run" else None

    @property
    def base_model(self) -> str | None:
        """What loads the base model that lies beside the halves; None where their sidecar has to say it."""
        return None if self.base is None else str(self.base.absolute())

    def require_pair(self) -> tuple[Path, Path]:
        """Both halves, or a PublishError."""
        if self.av is not None and self.ar is not None:
            return self.av, self.ar
        if self.kind in ("explanations", "activations"):
            raise PublishError("This is a data set, not a pair.", where=self.path)
        lies, lacks = ("AV", "AR") if self.av is not None else ("AR", "AV")
        raise PublishError(
            f"Only the {lies} lies here. A release is a pair: an {lies} alone cannot be scored or checked.",
            where=self.path,
            expected=f"the {lacks} as well",
            next_step="name the directory that holds av/ and ar/, or the run directory",
        )


def find(source: Path, *, ar: Path | None = None) -> Found:
    """What lies at `source`.

    Args:
        source: a run directory, a directory with `av/` and `ar/` (and perhaps `source/`), one half, an explanation job's
            output, a directory or file of activations.
        ar: the AR's directory, where it does not lie beside the AV.

    Raises:
        PublishError: nothing that can be published, or a run that is not finished, with the stages that are missing.
    """
    source = Path(source)
    if not source.exists():
        raise PublishError(
            "There is no such directory.", where=source, next_step="name a run directory, or one with av/ and ar/"
        )
    if ar is not None:
        return _pair(source, ar)
    if _is_activations(source):
        return Found("activations", source)
    if not source.is_dir():
        raise PublishError(
            "This file is nothing that can be published.",
            where=source,
            expected="a directory, or a parquet file with the column activation_vector",
        )
    if (source / JOB).is_file():
        return _job(source)
    if (config := _run_config(source)) is not None:
        return _run(source, config)
    return _pair(source, None)


# -- runs ----------------------------------------------------------------------------------------------------


def _run_config(source: Path) -> Mapping[str, Any] | None:
    """The configuration of a run directory; None where this is none."""
    if not (source / CONFIG).is_file():
        return None
    config = yaml_io.read(source / CONFIG, error=PublishError)
    return config if {"name", "base", "layer"} <= config.keys() else None


def _run(source: Path, config: Mapping[str, Any]) -> Found:
    stages = [name for name in STAGES if name != "rl" or config.get("rl") is not None]
    missing = [name for name in stages if not StageDirectory(source / name).is_done]
    if missing:
        raise PublishError(
            "This run is not finished.",
            where=source,
            faults=[f"the stage {name!r} is not done" for name in missing],
            next_step=f"nla-hub train {config['name']} -o {source} goes on where it stopped, with the settings that it was "
            "started with" + (f"; {source / EXPORT} can be published without a score" if missing == ["eval"] else ""),
        )
    exported = source.absolute() / EXPORT
    if lost := [role for role in ("av", "ar") if not (exported / role).is_dir()]:
        raise PublishError(
            "The exported pair is no longer there.", where=exported, got=f"without {' and '.join(lost)}/"
        )
    beside = exported / "source"
    return Found(
        "run",
        source,
        exported / "av",
        exported / "ar",
        beside if beside.is_dir() else _packaged(config["base"]),
        dict(_factors(source, config)),
        step_pairs(StageDirectory(source / "rl")),
    )


def _packaged(base: Mapping[str, Any]) -> Path | None:
    """A base model that travels inside this package."""
    name = base.get("model")
    return zoo_ref(name).fetch(HubOptions()) if isinstance(name, str) and name.startswith(PACKAGE_PREFIX) else None


def _factors(source: Path, config: Mapping[str, Any]) -> Iterator[tuple[Role, Path]]:
    if config.get("lora") is None:
        return
    roles: tuple[Role, Role] = ("av", "ar")
    for role in roles:
        yield role, source / "rl" / "checkpoint" / role if config.get("rl") else source / role / "checkpoint"


# -- pairs ---------------------------------------------------------------------------------------------------


def _pair(source: Path, ar: Path | None) -> Found:
    """A pair, or the half that is there; `ar` where the caller names it."""
    refs = resolve_pair(source.absolute(), ar=None if ar is None else ar.absolute())
    here = places(files_below(source))
    own = next((p for p in here if p.folder == ""), None)
    base = None if refs.base is None else Path(refs.base.name)
    found: dict[Role, Path] = {}
    if own is not None:
        # Beside what is called as its AR would be (or with one that the caller names), it is an AV.
        role = _role(source, own, default=None if refs.ar is None else "av")
        if role is not None:
            found[role] = source.absolute()
        if role == "av" and refs.ar is not None:
            found["ar"] = Path(refs.ar.name)
        elif role == "ar" and (other := _named_for_av(source)) is not None:
            found["av"] = other
    else:
        found |= _below(source, here)
        if ar is not None:
            found["ar"] = ar.absolute()
    if not found:
        raise PublishError(
            "Nothing here can be published.",
            where=source,
            got=", ".join(sorted(p.name for p in source.iterdir())[:6]) or "an empty directory",
            expected="a run directory, av/ and ar/, or the output of nla-hub explain --data",
            next_step="name the directory that holds the halves of a pair, each with config.json and nla_meta.yaml",
        )
    return Found("pair" if len(found) == 2 else "half", source, found.get("av"), found.get("ar"), base)


def _below(source: Path, here: list[Place]) -> dict[Role, Path]:
    """The halves in folders: `av` and `ar`, else the only ones that there are of their role."""
    roles: tuple[Role, Role] = ("av", "ar")
    found: dict[Role, Path] = {r: source.absolute() / r for r in roles if any(p.folder == r for p in here)}
    for role in roles:
        candidates = [p.folder for p in here if p.folder != "source" and _role(source, p) == role]
        if role in found:
            continue
        if len(candidates) > 1:
            raise PublishError(
                f"Several folders may be the {role.upper()}.",
                where=source,
                faults=candidates,
                next_step="name the directory whose av/ and ar/ are meant, or the AV's with the AR's beside it",
            )
        if candidates:
            found[role] = source.absolute() / candidates[0]
    return found


def _role(source: Path, place: Place, default: Role | None = None) -> Role | None:
    """What a folder is: what its files prove, what its own sidecar says, else `default`."""
    if place.role is not None:
        return place.role
    if place.own_sidecar:
        return named_role(yaml_io.read(source / place.folder / SIDECAR_NAME, error=PublishError)) or default
    return default


def _named_for_av(ar: Path) -> Path | None:
    """The directory beside an AR that is called as its AV would be: `x/av` for `x/ar`, `name-av` for `name-ar`."""
    name = re.sub(r"(^|-)ar$", r"\1av", ar.absolute().name)
    other = ar.absolute().parent / name
    return other if other != ar.absolute() and other.is_dir() else None


# -- data ----------------------------------------------------------------------------------------------------


def _job(source: Path) -> Found:
    if not (source / MANIFEST).is_file():
        raise PublishError(
            "This explanation job is not finished.",
            where=source,
            got=f"{len(list((source / PARTS).glob('*.parquet')))} parts, no {MANIFEST}",
            next_step="run the same command again: it goes on where it stopped",
        )
    return Found("explanations", source)


def _is_activations(source: Path) -> bool:
    """Whether this is a parquet file of vectors, or a directory whose own parquet files are."""
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source] if source.suffix == ".parquet" else []
    return bool(files) and all(_holds_vectors(file) for file in files)


def _holds_vectors(file: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return "activation_vector" in pq.read_schema(os.fspath(file)).names
    except (OSError, pa.ArrowInvalid) as cause:
        raise PublishError(f"This parquet file cannot be read: {cause}", where=file) from cause
