"""Where the values of a sidecar stand in the files that people have written: data, and what needs nothing but the data.

The first place of a value is the canonical one, which this project writes. A new dialect is a new line in `PLACES`.
`sidecar_reading` reads by these tables and `sidecar_schema` renders them in docs/sidecar.md.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nla_hub.errors import SidecarError

Role = Literal["av", "ar"]

OUTPUT_FORMAT = "explanation_tags"
KINDS = ("nla_model", "nla_dataset")
SCHEMA_VERSIONS = (1, 2)

ROLES: dict[str, Role] = {
    "av": "av",
    "ar": "ar",
    "actor": "av",
    "critic": "ar",
    "verbalizer": "av",
    "reconstructor": "ar",
}
"""What a half is called -> what it is called here."""


@dataclass(frozen=True)
class Place:
    """Where a value may stand: dotted path, and which files have it there."""

    path: str
    found_in: str

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.path.split("."))


PLACES: dict[str, tuple[Place, ...]] = {
    "base_checkpoint": (
        Place("base_checkpoint", "version 2 models"),
        Place("base_model", "adapters trained without a sidecar of their own"),
        Place("extraction.base_model", "data sets"),
    ),
    "d_model": (
        Place("d_model", "models"),
        Place("extraction.d_model", "data sets"),
    ),
    "extraction_layer_index": (
        Place("extraction_layer_index", "released pairs"),
        Place("extraction.layer_index", "data sets, older models"),
        Place("critic.extraction_layer_index", "version 2 ARs as a trainer leaves them"),
        Place("ar.extraction_layer_index", "the same, renamed"),
        Place("critic.num_hidden_layers", "version 1 ARs; it means K, while config.json has K + 1"),
        Place("ar.num_hidden_layers", "the same, renamed"),
        Place("layer", "older models"),
    ),
    "prompt_templates.av": (
        Place("prompt_templates.av", "released pairs"),
        Place("prompt_templates.actor", "data sets, models as a trainer leaves them"),
        Place("prompt_templates.verbalizer", "some community models"),
    ),
    "prompt_templates.ar": (
        Place("prompt_templates.ar", "released pairs"),
        Place("prompt_templates.critic", "data sets, models as a trainer leaves them"),
        Place("prompt_templates.reconstructor", "some community models"),
    ),
}
"""Canonical place -> all places, the canonical one first. Two places that disagree are a fault."""

BLOCK_COUNT = ("training", "num_layers")
"""The number of blocks of the model that was trained, as one trainer notes it among its settings.

For an AR that is K + 1, for an AV the depth of the whole base: the name counts layers, and the trainer that writes it
builds an AR of that many blocks while it gives `critic.extraction_layer_index` one less. So it tells K only for an AR,
and only where no other place and no config.json does; it stays in the file as an unknown key.
"""


def show(value: object) -> str:
    """A value as a message names it: on one line, not too long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python refuses to print whole numbers of more than 4,300 digits
        return f"a {'number' if isinstance(value, int) else 'value'} too large to print"
    return text if len(text) <= 100 else f"{text[:100]}..."


def find(raw: Any, keys: tuple[str, ...]) -> Any:
    """The value at a path, or None where there is none (null is none too)."""
    for key in keys:
        if not isinstance(raw, Mapping):
            return None
        raw = raw.get(key)
    return raw


def has(raw: Any, keys: tuple[str, ...]) -> bool:
    """Whether a path is there, be its value null."""
    *parents, last = keys
    holder = find(raw, tuple(parents))
    return isinstance(holder, Mapping) and last in holder


def present(raw: Mapping[str, Any], name: str) -> Iterator[tuple[Place, Any]]:
    """The places of `PLACES[name]` that hold a value, canonical one first."""
    for place in PLACES[name]:
        if (value := find(raw, place.keys)) is not None:
            yield place, value


def named_role(raw: Mapping[str, Any]) -> Role | None:
    """The half that a sidecar says it is, or None where it does not say (or not in words that are known)."""
    value = raw.get("role")
    return ROLES.get(value) if isinstance(value, str) else None


def merge(raw: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """A sidecar's mapping with a user's laid over it: mappings are merged key by key, everything else is replaced.

    The user wins whatever the dialect: a value given at one of its places silences all the others. A null given for a
    value that may stand in several places unsets it; for `extraction.injection_scale` null is a value ("raw"). The hash of
    what was written goes, as it no longer stands for what is there.

    Raises:
        SidecarError: `override` is no mapping with named keys.
    """
    if not isinstance(override, Mapping) or not all(isinstance(key, str) for key in override):
        raise SidecarError(
            "What is laid over a sidecar is a mapping with named keys.",
            where="sidecar=",
            got=type(override).__name__,
            expected='such as {"injection": {"kind": "add"}}',
        )
    result = copy.deepcopy(dict(raw))
    for places in PLACES.values():
        if any(has(override, place.keys) for place in places):
            for place in places:
                _remove(result, place.keys)
    _lay_over(result, override)
    if override:
        result.pop("integrity", None)
    return result


def _remove(mapping: dict[str, Any], keys: tuple[str, ...]) -> None:
    *parents, last = keys
    holder = find(mapping, tuple(parents))
    if isinstance(holder, dict):
        holder.pop(last, None)


def _lay_over(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for key, value in above.items():
        mine = below.get(key)
        if isinstance(value, Mapping) and isinstance(mine, dict):
            _lay_over(mine, value)
        else:
            below[key] = copy.deepcopy(value)


def obstacles(raw: Mapping[str, Any]) -> list[str]:
    """What a file says of itself that an ordinary pair (one site, one marker, raw vectors) would not say."""
    faults = []
    kind, version, output = raw.get("kind"), raw.get("schema_version"), raw.get("output_format")
    if kind is not None and kind not in KINDS:
        faults.append(f"kind: got {show(kind)}, expected {' or '.join(map(repr, KINDS))}")
    if version is not None and (type(version) is not int or version not in SCHEMA_VERSIONS):
        read = " and ".join(map(str, SCHEMA_VERSIONS))
        faults.append(f"schema_version: got {show(version)}; this version of nla-hub reads {read}")
    if output not in (None, OUTPUT_FORMAT):
        faults.append(f"output_format: got {show(output)}, expected {OUTPUT_FORMAT!r}, the only one there is")
    for name in ("extraction", "injection", "prompt_templates", "tokens"):
        value = raw.get(name)
        if value is not None and not isinstance(value, Mapping):
            faults.append(f"{name}: got {show(value)}, expected a mapping")
    for name in ("norm", "whitening"):
        value = find(raw, ("extraction", name))
        if value not in (None, False, "none"):
            faults.append(
                f"extraction.{name}: got {show(value)}, expected 'none'; vectors would have to be transformed before this "
                "NLA reads them, and nla-hub hands them over as the model computed them"
            )
    if (sites := find(raw, ("extraction", "checkpoints"))) is not None:
        count = f"{len(sites)} places" if isinstance(sites, (list, tuple, Mapping)) else "several places"
        faults.append(
            f"extraction.checkpoints: this NLA reads vectors of {count} in the model, each through a marker of its own; "
            "an ordinary pair reads one layer through one marker"
        )
    if raw.get("variant") == "universal":
        faults.append(
            "variant: 'universal' serves many layers or models at once; an ordinary pair reads one layer of one"
        )
    if (shared := raw.get("d_shared")) is not None:
        faults.append(
            f"d_shared: got {show(shared)}; this NLA reads a space that several models share, into which vectors would "
            "have to be mapped first"
        )
    return faults
