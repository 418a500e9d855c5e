"""The contract between two halves of an NLA: `nla_meta.yaml`, read once and verified at once.

`Site` is the only place that turns "layer K" into an index of `hidden_states` or a number of blocks.
`Sidecar` is everything in which two NLAs differ, as data. It is written as schema version 2 with av/ar keys, which
the reference client reads too (it needs numeric scales and fills templates with `str.format`: no stray braces).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from nla_hub import yaml_io
from nla_hub.errors import SidecarError
from nla_hub.log import logger

Role = Literal["av", "ar"]
InjectionKind = Literal["overwrite", "add"]

SIDECAR_NAME = "nla_meta.yaml"
SCHEMA_VERSION = 2
INJECTION_PLACEHOLDER = "{injection_char}"
EXPLANATION_PLACEHOLDER = "{explanation}"
OUTPUT_FORMAT = "explanation_tags"


@dataclass(frozen=True)
class Site:
    """Where vectors live: the output of decoder block `layer` (0-based), the residual stream that enters the next."""

    layer: int

    @property
    def hidden_states_index(self) -> int:
        """Index into `output_hidden_states`, which starts with the embeddings (not valid for the last block)."""
        return self.layer + 1

    @property
    def n_blocks(self) -> int:
        """Blocks that must run to reach the site; also `num_hidden_layers` of an AR."""
        return self.layer + 1

    def __str__(self) -> str:
        return f"L{self.layer}"


@dataclass(frozen=True)
class MarkerTokens:
    """The injection marker: one character that is one token, and the tokens that must stand beside it."""

    char: str
    id: int
    left_id: int
    right_id: int


@dataclass(frozen=True)
class Injection:
    """How a vector enters the AV: `overwrite` the marker's embedding row, or `add` at the output of block 1.

    `scale` is the L2 norm that an overwritten row gets; None puts the raw vector in.
    """

    kind: InjectionKind = "overwrite"
    scale: float | None = None


@dataclass(frozen=True)
class Score:
    """A measured FVE as it stands in a sidecar."""

    value: float
    baseline: str
    dataset: str
    n: int
    cosine: float | None = None
    protocol: str | None = None
    commit: str | None = None


@dataclass(frozen=True)
class ReferenceRecord:
    """`fve_reference`: denominators of FVE and norm quantiles, measured on a named data set by `geometry.Reference.measure`.

    Attributes:
        dataset, n: name of the data set, number of its vectors.
        raw_variance: E||u - mean(u)||^2 over unit vectors u.
        mean_norm: E||u - mean(u)/||mean(u)|| ||^2.
        norm_p0_5, norm_p99_5: 0.5 % and 99.5 % quantiles of the raw norms (None where not measured).
    """

    dataset: str
    n: int
    raw_variance: float
    mean_norm: float
    norm_p0_5: float | None = None
    norm_p99_5: float | None = None


@dataclass(frozen=True)
class Sidecar:
    """The parsed sidecar of one half of a pair.

    `mse_scale` None means sqrt(d_model) (which is what released pairs hold as a number); `extra` keeps every key that
    this version does not know, and is written back.
    """

    role: Role
    d_model: int
    site: Site
    marker: MarkerTokens | None = None
    av_template: str | None = None
    ar_template: str | None = None
    ar_suffix_ids: tuple[int, ...] | None = None
    injection: Injection = field(default_factory=Injection)
    mse_scale: float | None = None
    base_model: str | None = None
    source_revision: str | None = None
    pair_repo: str | None = None
    stage: str | None = None
    fve: Score | None = None
    fve_reference: ReferenceRecord | None = None
    final_norm_stripped: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    # -- reading ---------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, directory: Path) -> Sidecar:
        """The sidecar of a model directory.

        Raises:
            SidecarError: absent, unreadable, or faulty (all faults listed).
        """
        path = directory / SIDECAR_NAME
        if not path.is_file():
            raise SidecarError(
                f"This directory has no {SIDECAR_NAME}, so nothing says which layer, marker and prompts it was made for.",
                where=directory,
                next_step="name a directory or repository of an NLA half (an AV or an AR)",
            )
        raw = yaml_io.read(path, error=SidecarError)
        sidecar = cls.parse(raw, where=path)
        stored = raw.get("integrity")
        if isinstance(stored, dict) and stored.get("sha256") not in (None, sidecar.integrity()):
            logger.warning("%s was edited after it was written: its contents differ from the hash stored in it", path)
        return sidecar

    @classmethod
    def parse(cls, raw: Mapping[str, Any], *, where: object = SIDECAR_NAME) -> Sidecar:
        """A sidecar from its YAML mapping; raises a SidecarError that lists all faults."""
        return _Parser(raw, where).sidecar()

    # -- writing ---------------------------------------------------------------------------------------------

    def to_mapping(self) -> dict[str, Any]:
        """The canonical form: version 2, av/ar keys, numeric scales."""
        tokens: dict[str, Any] = {}
        if self.marker is not None:
            tokens = {
                "injection_char": self.marker.char,
                "injection_token_id": self.marker.id,
                "injection_left_neighbor_id": self.marker.left_id,
                "injection_right_neighbor_id": self.marker.right_id,
            }
        if self.ar_suffix_ids is not None:
            tokens["critic_suffix_ids"] = list(self.ar_suffix_ids)
        extraction: dict[str, Any] = {}
        if self.injection.kind == "overwrite":
            extraction["injection_scale"] = self.injection.scale
        extraction["mse_scale"] = math.sqrt(self.d_model) if self.mse_scale is None else self.mse_scale
        templates = {"av": self.av_template, "ar": self.ar_template}
        known: dict[str, Any] = {
            "kind": "nla_model",
            "schema_version": SCHEMA_VERSION,
            "role": self.role,
            "stage": self.stage,
            "base_checkpoint": self.base_model,
            "source_revision": self.source_revision,
            "pair_repo": self.pair_repo,
            "d_model": self.d_model,
            "extraction_layer_index": self.site.layer,
            "extraction": extraction,
            "injection": {"kind": self.injection.kind},
            "tokens": tokens or None,
            "prompt_templates": {k: v for k, v in templates.items() if v is not None} or None,
            "output_format": OUTPUT_FORMAT,
            "final_norm_stripped": self.final_norm_stripped,
            "fve": None if self.fve is None else _without_none(vars(self.fve)),
            "fve_reference": None if self.fve_reference is None else _without_none(vars(self.fve_reference)),
        }
        merged = {key: value for key, value in known.items() if value is not None}
        for key, value in self.extra.items():
            if key in merged and isinstance(merged[key], dict) and isinstance(value, Mapping):
                merged[key] = {**value, **merged[key]}
            else:
                merged.setdefault(key, value)
        return merged

    def integrity(self) -> str:
        """sha256 over the canonical form: tells a hand-edited sidecar from the one that was written."""
        canonical = json.dumps(_named(self.to_mapping()), sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def write(self, directory: Path) -> Path:
        """Write `nla_meta.yaml` atomically and return its path."""
        path = directory / SIDECAR_NAME
        yaml_io.write_text(path, yaml_io.dumps({**self.to_mapping(), "integrity": {"sha256": self.integrity()}}))
        return path

    def with_(self, **changes: Any) -> Sidecar:
        """A copy with some fields changed."""
        return replace(self, **changes)

    # -- verifying -------------------------------------------------------------------------------------------

    def config_faults(self, config: Any) -> list[str]:
        """What disagrees between this sidecar and a transformers config (of the AV or AR itself)."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        faults = []
        if text.hidden_size != self.d_model:
            faults.append(f"d_model: the sidecar says {self.d_model}, config.json says hidden_size {text.hidden_size}")
        layers = int(text.num_hidden_layers)
        if self.role == "ar" and layers != self.site.n_blocks:
            faults.append(
                f"layer: the sidecar says K = {self.site.layer}, so an AR has {self.site.n_blocks} blocks; "
                f"config.json says num_hidden_layers {layers}"
            )
        if self.role == "av" and self.site.layer >= layers:
            faults.append(f"layer: the sidecar says K = {self.site.layer}, the model has blocks 0 to {layers - 1}")
        return faults

    def pair_faults(self, other: Sidecar) -> list[str]:
        """What disagrees between the two halves of a pair."""
        faults = []
        pairs = {
            "d_model": (self.d_model, other.d_model),
            "layer K": (self.site.layer, other.site.layer),
            "base model": (_base_family(self.base_model), _base_family(other.base_model)),
        }
        for name, (mine, theirs) in pairs.items():
            if mine != theirs and None not in (mine, theirs):
                faults.append(f"{name}: the {self.role.upper()} says {mine}, the {other.role.upper()} says {theirs}")
        if self.role == other.role:
            faults.append(f"role: both halves are called {self.role!r}")
        return faults


def _named(value: Any) -> Any:
    """`value` with every key as text: unknown keys of strangers may be numbers, which do not sort among words."""
    if isinstance(value, Mapping):
        return {str(key): _named(item) for key, item in value.items()}
    return [_named(item) for item in value] if isinstance(value, (list, tuple)) else value


def _without_none(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value is not None}


def _base_family(name: str | None) -> str | None:
    """A base model's name without owner and revision: forks and mirrors of one base are the same family."""
    return None if name is None else re.split("@", name.rstrip("/").split("/")[-1])[0].lower()


_FIELD_TYPES: dict[str, type] = {"str": str, "int": int, "float": float}
_TYPE_WORDS: dict[type, str] = {str: "text", int: "a whole number", float: "a finite number"}


def _is_number(value: object) -> bool:
    """Whether a YAML value is a finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1e300


class _Parser:
    """Reads one mapping, collecting faults instead of stopping at the first."""

    def __init__(self, raw: Mapping[str, Any], where: object) -> None:
        self.raw = raw
        self.where = where
        self.faults: list[str] = []
        self.known: set[tuple[str, ...]] = set()

    def sidecar(self) -> Sidecar:
        self.known |= {("kind",), ("schema_version",), ("integrity",), ("output_format",)}
        kind, version = self.raw.get("kind"), self.raw.get("schema_version")
        if kind not in (None, "nla_model"):
            self.faults.append(f"kind: got {kind!r}, expected 'nla_model'")
        if version not in (None, SCHEMA_VERSION):
            self.faults.append(f"schema_version: got {version!r}; this version of nla-hub reads {SCHEMA_VERSION}")
        role = self._role()
        d_model = self._integer("d_model", required=True, minimum=1) or 0
        layer = self._layer()
        injection = self._injection(role, d_model)
        sidecar = Sidecar(
            role=role,
            d_model=d_model,
            site=Site(layer),
            marker=self._marker(role),
            av_template=self._template("av", role, INJECTION_PLACEHOLDER),
            ar_template=self._template("ar", role, EXPLANATION_PLACEHOLDER),
            ar_suffix_ids=self._suffix(),
            injection=injection,
            mse_scale=self._scale("mse_scale", d_model),
            base_model=self._text("base_checkpoint"),
            source_revision=self._text("source_revision"),
            pair_repo=self._text("pair_repo"),
            stage=self._text("stage"),
            fve=self._record("fve", Score),
            fve_reference=self._record("fve_reference", ReferenceRecord),
            final_norm_stripped=self._boolean("final_norm_stripped"),
            extra=self._unknown(),
        )
        if self.faults:
            plural = "fault" if len(self.faults) == 1 else "faults"
            raise SidecarError(
                f"This sidecar has {len(self.faults)} {plural}:",
                where=self.where,
                faults=self.faults,
                next_step="correct the sidecar, or ask its author; a pair is only as good as its contract",
            )
        return sidecar

    # Each getter notes its key as known and adds a fault instead of raising.

    def _get(self, *path: str) -> Any:
        self.known.add(path)
        value: Any = self.raw
        for key in path:
            if not isinstance(value, Mapping) or key not in value:
                return None
            value = value[key]
        return value

    def _role(self) -> Role:
        value = self._get("role")
        if value not in ("av", "ar"):
            self.faults.append(f"role: got {value!r}, expected 'av' or 'ar'")
            return "av"
        return cast(Role, value)

    def _integer(self, *path: str, required: bool = False, minimum: int = 0) -> int | None:
        value = self._get(*path)
        name = ".".join(path)
        if value is None:
            if required:
                self.faults.append(f"{name}: missing")
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            self.faults.append(f"{name}: got {value!r}, expected a whole number >= {minimum}")
            return None
        return value

    def _text(self, *path: str) -> str | None:
        value = self._get(*path)
        if value is not None and not isinstance(value, str):
            self.faults.append(f"{'.'.join(path)}: got {value!r}, expected text")
            return None
        return value

    def _boolean(self, *path: str) -> bool | None:
        value = self._get(*path)
        if value is not None and not isinstance(value, bool):
            self.faults.append(f"{'.'.join(path)}: got {value!r}, expected true or false")
            return None
        return value

    def _layer(self) -> int:
        places = [("extraction_layer_index",), ("critic", "extraction_layer_index")]
        found = {".".join(p): v for p in places if (v := self._integer(*p)) is not None}
        if len(set(found.values())) > 1:
            self.faults.append("layer: " + ", ".join(f"{k} says {v}" for k, v in found.items()))
        if not found:
            if not any("extraction_layer_index" in fault for fault in self.faults):
                self.faults.append("extraction_layer_index: missing")
            return 0
        return next(iter(found.values()))

    def _number(self, *path: str) -> float | None:
        value = self._get(*path)
        if value is None:
            return None
        if not _is_number(value) or value <= 0:
            self.faults.append(f"{'.'.join(path)}: got {value!r}, expected a positive number")
            return None
        return float(value)

    def _scale(self, name: str, d_model: int) -> float | None:
        value = self._get("extraction", name)
        if value == "sqrt_d_model":
            return math.sqrt(d_model) if d_model else None
        return self._number("extraction", name)

    def _injection(self, role: Role, d_model: int) -> Injection:
        kind = self._get("injection", "kind")
        raw_scale = self._get("extraction", "injection_scale")
        scale = self._scale("injection_scale", d_model)
        if kind is None and (raw_scale is not None or role == "ar"):
            kind = "overwrite"
        if kind not in ("overwrite", "add"):
            self.faults.append(f"injection.kind: got {kind!r}, expected 'overwrite' or 'add'")
            kind = "overwrite"
        if role == "av" and kind == "overwrite" and raw_scale is None:
            self.faults.append(
                "extraction.injection_scale: missing; an AV that overwrites needs the norm it was trained with"
            )
        return Injection(kind=cast(InjectionKind, kind), scale=scale)

    def _marker(self, role: Role) -> MarkerTokens | None:
        char = self._text("tokens", "injection_char")
        names = ("injection_token_id", "injection_left_neighbor_id", "injection_right_neighbor_id")
        ids = [self._integer("tokens", name, required=role == "av") for name in names]
        if char is None:
            if role == "av":
                self.faults.append("tokens.injection_char: missing")
            return None
        if len(char) != 1:
            self.faults.append(f"tokens.injection_char: got {char!r}, expected one character")
        if any(i is None for i in ids):
            return None
        return MarkerTokens(char, *cast("list[int]", ids))

    def _template(self, name: str, role: Role, placeholder: str) -> str | None:
        value = self._text("prompt_templates", name)
        if value is None:
            if name == role:
                self.faults.append(f"prompt_templates.{name}: missing")
            return None
        found = re.findall(r"\{[^{}\s]*\}", value)
        count = found.count(placeholder)
        if count != 1:
            self.faults.append(f"prompt_templates.{name}: {placeholder} stands {count} times, expected once")
        for unknown in sorted(set(found) - {placeholder}):
            self.faults.append(f"prompt_templates.{name}: unknown placeholder {unknown}")
        return value

    def _suffix(self) -> tuple[int, ...] | None:
        value = self._get("tokens", "critic_suffix_ids")
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
            self.faults.append(f"tokens.critic_suffix_ids: got {value!r}, expected a list of token ids")
            return None
        return tuple(value)

    def _record(self, name: str, kind: type[Any]) -> Any:
        value = self._get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.faults.append(f"{name}: got {value!r}, expected a mapping")
            return None
        names = list(kind.__dataclass_fields__)
        try:
            record = kind(**{key: value[key] for key in names if key in value})
        except TypeError as error:
            self.faults.append(f"{name}: {str(error).split(') ', 1)[-1]}")
            return None
        for key, field_ in kind.__dataclass_fields__.items():
            item = getattr(record, key)
            expected = _FIELD_TYPES[str(field_.type).removesuffix(" | None")]
            fits = _is_number(item) if expected is float else isinstance(item, expected) and not isinstance(item, bool)
            if not fits and not (item is None and str(field_.type).endswith("None")):
                self.faults.append(f"{name}.{key}: got {item!r}, expected {_TYPE_WORDS[expected]}")
            elif key in ("raw_variance", "mean_norm") and item <= 0:
                self.faults.append(f"{name}.{key}: got {item!r}, expected a positive number")
        self.known |= {(name, key) for key in names}
        return record

    def _unknown(self) -> dict[str, Any]:
        def rest(value: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
            kept: dict[str, Any] = {}
            for key, item in value.items():
                here = (*path, key)
                inside = any(k[: len(here)] == here and len(k) > len(here) for k in self.known)
                if inside and isinstance(item, Mapping):
                    if remaining := rest(item, here):
                        kept[key] = remaining
                elif here not in self.known:
                    kept[key] = item
            return kept

        return rest(self.raw, ())
