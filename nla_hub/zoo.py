"""Pairs that have a name: what the entry points of the group `nla_hub.zoo` list, our own `zoo.yaml` first.

An entry point is a path to a YAML file of entries, or the mapping itself, or a callable that returns either.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from nla_hub import registry, yaml_io
from nla_hub.errors import NLAError
from nla_hub.hub import HubOptions, search
from nla_hub.locate import Ref, zoo_ref
from nla_hub.log import logger
from nla_hub.schema import from_mapping
from nla_hub.sidecar import SIDECAR_NAME, Score, Sidecar, Site

NOT_MEASURED = "not measured"
NOT_YET = "not yet"
UNPINNED = "unpinned"

Part = Literal["av", "ar", "base"]
PARTS: tuple[Part, ...] = ("av", "ar", "base")
PART_WORDS: dict[Part, str] = {"av": "AV", "ar": "AR", "base": "base model"}
"""The repositories of a pair."""


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
        av, ar, base: where the halves and the source model are: `owner/name`, `package:DIR` for a directory of nla-hub
            itself, or an absolute directory. In a YAML file `./DIR` and `../DIR` stand beside the file.
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
        av_folder, ar_folder: folders of the halves in repositories that hold several.
        sidecar: what is known of the contract and not written (or written wrongly) in the repositories' own sidecars; it
            holds for these repositories however they are named.
        community: whether others than the paper's authors (and nla-hub) made it.
        name: the key in zoo.yaml.
        distribution: what installed the entry: "nla-hub", or a plug-in.
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
    av_folder: str = ""
    ar_folder: str = ""
    sidecar: dict[str, Any] = field(default_factory=dict)
    community: bool = False
    name: str = ""
    distribution: str = ""

    def faults(self) -> list[str]:
        """What the types cannot say (see schema.py)."""
        found = []
        for half in ("av", "ar", "base"):
            try:
                ref = zoo_ref(getattr(self, half))
            except NLAError as error:
                found.append(f"{half}: {error.what}")
                continue
            if ref.kind not in ("hub", "package") and not (ref.kind == "directory" and Path(ref.name).is_absolute()):
                found.append(f"{half}: got {getattr(self, half)!r}, expected owner/name or package:DIR")
            elif half == "av" and ref.kind == "hub" and None in (self.layer, self.n_layers, self.d_model):
                found.append("av: an entry on the Hub needs layer, n_layers and d_model")
        if self.layer is not None and self.n_layers is not None and not 0 <= self.layer < self.n_layers:
            found.append(f"layer: got {self.layer}, expected 0 to {self.n_layers - 1}")
        return found

    @property
    def packaged(self) -> bool:
        """Whether the weights come with what installed the entry: nla-hub itself, or a plug-in."""
        return zoo_ref(self.av).is_local

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
        folder = getattr(self, f"{half}_folder", "")
        inside = f", folder {folder}" if folder else ""
        return name if zoo_ref(name).is_local else f"{name}@{revision or UNPINNED}{inside}"


@dataclass(frozen=True)
class _Catalogue:
    entries: Mapping[str, ZooEntry]
    contested: Mapping[str, tuple[str, ...]]
    """Names that several plug-ins give to a pair -> their distributions."""


@cache
def _catalogue() -> _Catalogue:
    entries: dict[str, ZooEntry] = {}
    contested: dict[str, tuple[str, ...]] = {}
    for source, found in registry.zoos.items():
        origin = registry.zoos.origin(source)
        for name, entry in found.items():
            rivals = contested.get(name) or ((entries[name].distribution,) if name in entries else ())
            if registry.OWN_DISTRIBUTION in rivals:
                logger.warning("%s may not replace our pair %r; its own is left out", origin, name)
            elif rivals:
                contested[name] = (*rivals, origin)
            else:
                entries[name] = replace(entry, distribution=origin)
    for name, rivals in contested.items():
        logger.warning("the pair %r comes from %s; it is left out", name, " and ".join(rivals))
        del entries[name]
    return _Catalogue(MappingProxyType(entries), contested)


def zoo() -> Mapping[str, ZooEntry]:
    """All named pairs, ours first. A plug-in that cannot be read is logged and left out."""
    return _catalogue().entries


def forget() -> None:
    """Read the zoo again when it is next asked for."""
    _catalogue.cache_clear()


def entry(name: str, *, hint: str | None = None) -> ZooEntry:
    """The entry called `name`.

    Args:
        hint: a further sentence for the next step where there is no such name.

    Raises:
        UnknownNameError: no such pair; with the near names, and the plug-ins whose pairs could not be read.
        NLAError: two plug-ins have a pair of this name.
    """
    entries = zoo()
    if name in entries:
        return entries[name]
    if rivals := _catalogue().contested.get(name):
        raise NLAError(
            f"The pair {name!r} comes from {len(rivals)} plug-ins.",
            got=" and ".join(rivals),
            next_step="uninstall all of them but one",
        )
    lost = [plugin for plugin in registry.zoos.plugins() if plugin.state == "broken"]
    hints = [f"The pairs of {p.distribution or 'a plug-in'} could not be read: {p.cause}" for p in lost]
    raise registry.unknown("pair in the zoo", name, entries, next_step="; ".join(filter(None, [hint, *hints])) or None)


def own_pairs() -> Path:
    """Our own pairs; the entry point of this distribution."""
    return Path(__file__).with_name("zoo.yaml")


def entries_of(value: Any) -> dict[str, ZooEntry]:
    """The entries behind an entry point of the group `nla_hub.zoo`.

    Raises:
        NLAError: neither a path nor a mapping nor a callable that returns one, or faulty entries.
    """
    found = value() if callable(value) else value
    if isinstance(found, (str, os.PathLike)):
        return read_entries(Path(found))
    if isinstance(found, Mapping):
        return read_entries(found)
    raise NLAError("Pairs are a path, a mapping, or a callable that returns one.", got=type(found).__name__)


def known_sidecar(ref: Ref, role: Literal["av", "ar"]) -> Mapping[str, Any]:
    """What the zoo knows of the contract of a half, by its repository and folder; empty for an unknown one.

    A folder that no entry names gets what all entries of its repository agree on.
    """
    if ref.kind != "hub":
        return {}
    entries = [one for one in zoo().values() if getattr(one, role).lower() == ref.name.lower()]
    exact = [one for one in entries if ref.subfolder and getattr(one, f"{role}_folder") == ref.subfolder]
    found = [one.sidecar for one in exact or entries]
    return found[0] if found and all(one == found[0] for one in found) else {}


@dataclass(frozen=True)
class Update:
    """What the main branch of a repository of an entry is now.

    Attributes:
        part: which repository of the pair.
        pinned: the commit that the entry names; None is "unpinned".
        commit: of the main branch.
        updated: day of its last commit.
    """

    part: Part
    pinned: str | None
    commit: str
    updated: date | None

    @property
    def behind(self) -> bool:
        """Whether the entry names another commit than the main branch is now."""
        return self.pinned not in (None, self.commit)

    def __str__(self) -> str:
        since = f" ({self.updated.isoformat()})" if self.updated else ""
        if self.pinned is None:
            return f"{PART_WORDS[self.part]}: {UNPINNED}, main is {self.commit[:10]} now{since}"
        if self.behind:
            return f"{PART_WORDS[self.part]}: pinned at {self.pinned[:10]}, main is {self.commit[:10]} now{since}"
        return f"{PART_WORDS[self.part]}: pinned at what main is"


def updates(entries: Iterable[ZooEntry], options: HubOptions) -> dict[str, tuple[Update, ...]]:
    """What the repositories of entries are now: the halves', and the source's where that is pinned; each is asked for once.

    Takes a few seconds at most. Whatever cannot be told is left out, an entry of which nothing can be told (packaged, offline,
    no such repository) has no updates.
    """
    asked = [(e, part, zoo_ref(getattr(e, part))) for e in entries for part in PARTS]
    asked = [(e, part, ref) for e, part, ref in asked if ref.kind == "hub" and (part != "base" or e.base_revision)]
    current = search.now(list(dict.fromkeys(ref.name for _, _, ref in asked)), options=options)
    found: dict[str, tuple[Update, ...]] = {}
    for e, part, ref in asked:
        if (model := current.get(ref.name)) is not None and model.commit is not None:
            update = Update(part, getattr(e, f"{part}_revision"), model.commit, model.updated)
            found[e.name] = (*found.get(e.name, ()), update)
    return found


def read_entries(source: Path | Mapping[str, Any]) -> dict[str, ZooEntry]:
    """Entries from a YAML file or its mapping.

    Raises:
        NLAError: a file that cannot be read, or faulty entries, all faults listed.
    """
    mapping = source if isinstance(source, Mapping) else yaml_io.read(source, error=NLAError)
    where = "zoo entries" if isinstance(source, Mapping) else source
    beside = None if isinstance(source, Mapping) else source.resolve().parent
    placed = {name: _placed(found, beside) for name, found in mapping.items()}
    table = from_mapping(_Table, {"entries": placed}, where=where, what="list of pairs", error=NLAError)
    return {name: _with_packaged_facts(replace(found, name=name)) for name, found in table.entries.items()}


def _placed(found: Any, beside: Path | None) -> Any:
    """An entry with its directories spelled as the types want them: absolute texts."""
    if not isinstance(found, Mapping):
        return found
    placed = dict(found)
    for half in ("av", "ar", "base"):
        value = placed.get(half)
        if isinstance(value, os.PathLike):
            placed[half] = os.fspath(value)
        elif isinstance(value, str) and value.startswith(("./", "../")) and beside is not None:
            placed[half] = str((beside / value).resolve())
    return placed


@dataclass(frozen=True)
class _Table:
    entries: dict[str, ZooEntry]


def _packaged(name: str) -> Path | None:
    """The directory of a name that needs no download, or None where it holds no sidecar."""
    ref = zoo_ref(name)
    directory = Path(ref.name) if ref.kind == "directory" else ref.fetch(HubOptions())
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
