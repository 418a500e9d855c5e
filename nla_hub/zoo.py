"""Pairs that have a name: `zoo.yaml`, and what plug-ins add through the entry-point group `nla_hub.zoo`.

An entry point is a path to a YAML file of entries, or a callable that returns such a path or the mapping itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from nla_hub import yaml_io
from nla_hub.errors import NLAError
from nla_hub.hub import HubOptions
from nla_hub.locate import zoo_ref
from nla_hub.log import logger
from nla_hub.registry import unknown
from nla_hub.schema import from_mapping
from nla_hub.sidecar import SIDECAR_NAME, Score, Sidecar, Site

GROUP = "nla_hub.zoo"
NOT_MEASURED = "not measured"
NOT_YET = "not yet"
UNPINNED = "unpinned"


@dataclass(frozen=True)
class PublishedScore:
    """An FVE that others published; not reproduced here.

    Attributes:
        published: the value.
        baseline: its denominator.
        source: where it stands.
    """

    published: float
    baseline: Literal["raw_variance", "mean_norm"]
    source: str

    def __str__(self) -> str:
        return f"published: {self.published:.3f}, {_BASELINES[self.baseline]}, {self.source}"


_BASELINES = {"raw_variance": "raw variance", "mean_norm": "mean-norm"}


@dataclass(frozen=True)
class ZooEntry:
    """One named pair.

    Attributes:
        av, ar, base: where the halves and the source model are: `owner/name`, or `package:DIR` for packaged ones.
        av_revision, ar_revision, base_revision: pinned commits; None is "unpinned".
        licence: of the weights.
        adapter: registry name of the architecture's adapter.
        summary: one sentence.
        layer: K, the block whose output is read; None where a packaged pair is not there.
        n_layers: blocks of the source model.
        d_model: width of its residual stream.
        base_gated: whether the source model's repository asks for its terms to be accepted.
        recipe, card: name of the recipe and of the model card; None is "not yet".
        scores: measured with a named protocol, or published by others.
        name: the key in zoo.yaml.
    """

    av: str
    ar: str
    base: str
    licence: str
    adapter: str
    summary: str
    av_revision: str | None = None
    ar_revision: str | None = None
    base_revision: str | None = None
    layer: int | None = None
    n_layers: int | None = None
    d_model: int | None = None
    base_gated: bool = False
    recipe: str | None = None
    card: str | None = None
    scores: tuple[Score | PublishedScore, ...] = ()
    name: str = ""

    def faults(self) -> list[str]:
        """What the types cannot say (see schema.py)."""
        found = []
        for field in ("av", "ar", "base"):
            try:
                ref = zoo_ref(getattr(self, field))
            except NLAError as error:
                found.append(f"{field}: {error.what}")
                continue
            if ref.kind not in ("hub", "package"):
                found.append(f"{field}: got {getattr(self, field)!r}, expected owner/name or package:DIR")
            elif field == "av" and ref.kind == "hub" and None in (self.layer, self.n_layers, self.d_model):
                found.append("av: an entry on the Hub needs layer, n_layers and d_model")
        if self.layer is not None and self.n_layers is not None and not 0 <= self.layer < self.n_layers:
            found.append(f"layer: got {self.layer}, expected 0 to {self.n_layers - 1}")
        return found

    @property
    def packaged(self) -> bool:
        """Whether the weights come with nla-hub itself."""
        return zoo_ref(self.av).kind == "package"

    @property
    def site(self) -> Site | None:
        """Where its vectors live; None where a packaged pair is not there."""
        return None if self.layer is None else Site(self.layer)

    def measured(self) -> Score | None:
        """What this project's code measured (packaged sidecar, or zoo.yaml); None is "not measured"."""
        for score in self.scores:
            if isinstance(score, Score):
                return score
        if self.packaged and (directory := _packaged(self.av)) is not None:
            return Sidecar.read(directory).fve
        return None

    def published(self) -> PublishedScore | None:
        """What others published; None where nothing is known."""
        return next((score for score in self.scores if isinstance(score, PublishedScore)), None)

    def score_text(self) -> str:
        """The score in one line, with everything that a figure must never be printed without."""
        if score := self.measured():
            cosine = "" if score.cosine is None else f", cosine {score.cosine:.3f}"
            made = ", ".join(str(part) for part in (score.protocol, score.commit and score.commit[:10]) if part)
            baseline = _BASELINES.get(score.baseline, score.baseline)
            figure = f"FVE ({baseline}, {score.dataset}, n={score.n}): {score.value:.3f}"
            return f"{figure}{cosine}{f' [{made}]' if made else ''}"
        published = self.published()
        return str(published) if published else NOT_MEASURED

    def where(self, half: Literal["av", "ar", "base"]) -> str:
        """Repository and revision of a half in words."""
        name, revision = getattr(self, half), getattr(self, f"{half}_revision")
        return name if zoo_ref(name).kind == "package" else f"{name}@{revision or UNPINNED}"


@cache
def zoo() -> Mapping[str, ZooEntry]:
    """All named pairs, ours first. A plug-in that cannot be read is logged and left out."""
    entries = read_entries(Path(__file__).with_name("zoo.yaml"))
    for point in entry_points(group=GROUP):
        try:
            added = _plugin_entries(point)
        except Exception as cause:  # a plug-in may fail in every way there is, and costs only its own names
            origin = point.dist.name if point.dist else "an unknown distribution"
            logger.warning(
                "the zoo plug-in %s of %s is left out: %s: %s", point.name, origin, type(cause).__name__, cause
            )
            continue
        for name, entry in added.items():
            if name in entries:
                logger.warning("the zoo plug-in %s may not replace the entry %s", point.name, name)
            else:
                entries[name] = entry
    return MappingProxyType(entries)


def entry(name: str) -> ZooEntry:
    """The entry called `name`; raises an UnknownNameError with the near names."""
    entries = zoo()
    if name not in entries:
        raise unknown("pair in the zoo", name, entries)
    return entries[name]


def read_entries(source: Path | Mapping[str, Any]) -> dict[str, ZooEntry]:
    """Entries from a YAML file or its mapping.

    Raises:
        NLAError: a file that cannot be read, or faulty entries, all faults listed.
    """
    mapping = source if isinstance(source, Mapping) else yaml_io.read(source, error=NLAError)
    where = "zoo entries" if isinstance(source, Mapping) else source
    table = from_mapping(_Table, {"entries": dict(mapping)}, where=where, what="list of pairs", error=NLAError)
    return {name: _with_packaged_facts(replace(found, name=name)) for name, found in table.entries.items()}


@dataclass(frozen=True)
class _Table:
    entries: dict[str, ZooEntry]


def _plugin_entries(point: EntryPoint) -> dict[str, ZooEntry]:
    value: Any = point.load()
    if callable(value):
        value = value()
    if isinstance(value, (str, os.PathLike)):
        return read_entries(Path(value))
    if isinstance(value, Mapping):
        return read_entries(value)
    raise NLAError("A zoo plug-in must be a path, a mapping, or a callable that returns one.", got=type(value).__name__)


def _packaged(name: str) -> Path | None:
    """The directory of a `package:` name, or None where it holds no sidecar."""
    directory = zoo_ref(name).fetch(HubOptions())
    return directory if (directory / SIDECAR_NAME).is_file() else None


def _with_packaged_facts(found: ZooEntry) -> ZooEntry:
    if not found.packaged or (directory := _packaged(found.av)) is None:
        return found
    sidecar = Sidecar.read(directory)
    return replace(
        found,
        layer=sidecar.site.layer if found.layer is None else found.layer,
        d_model=sidecar.d_model if found.d_model is None else found.d_model,
        n_layers=_blocks(directory) if found.n_layers is None else found.n_layers,
    )


def _blocks(directory: Path) -> int | None:
    """`num_hidden_layers` of a model directory (an AV has as many blocks as its source)."""
    path = directory / "config.json"
    if not path.is_file():
        return None
    value = yaml_io.read(path, error=NLAError).get("num_hidden_layers")  # JSON is YAML
    return value if isinstance(value, int) else None
