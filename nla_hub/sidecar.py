"""The contract between two halves of an NLA: `nla_meta.yaml`, read once and verified at once.

`Site` is the only place that turns "layer K" into an index of `hidden_states` or a number of blocks.
`Sidecar` is everything in which two NLAs differ, as data. It is written as schema version 2 with av/ar keys, which
the reference client reads too (it needs numeric scales and fills templates with `str.format`: no stray braces).
What strangers have written is read by `sidecar_reading`, whose tables are in `sidecar_dialects`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from nla_hub import yaml_io
from nla_hub.errors import SidecarError
from nla_hub.log import logger
from nla_hub.sidecar_dialects import OUTPUT_FORMAT as OUTPUT_FORMAT
from nla_hub.sidecar_dialects import Role as Role
from nla_hub.sidecar_dialects import merge as merge
from nla_hub.sidecar_dialects import named_role as named_role

InjectionKind = Literal["overwrite", "add"]
HeadInput = Literal["raw", "normalized"]

SIDECAR_NAME = "nla_meta.yaml"
SCHEMA_VERSION = 2
INJECTION_PLACEHOLDER = "{injection_char}"
EXPLANATION_PLACEHOLDER = "{explanation}"


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

    `scale` is the L2 norm that an overwritten row gets; None puts the raw vector in, which on an AV only a sidecar that
    says so (null, "raw", "none") can ask for.
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
class ReleaseRecord:
    """`release`: which push this half came with. Both halves of a pair carry the same one.

    Attributes:
        id: twelve hex digits over everything that is loaded of both halves (`publish.release.release_id`).
        tag: what the revision of both repositories is called; it is set last, so for a moment it may not be there yet.
    """

    id: str
    tag: str


@dataclass(frozen=True)
class Hints:
    """What is known of a half from elsewhere (config.json, ar_meta.json, tokenizer): used only where its sidecar is silent.

    Attributes:
        d_model, layer, base_model: width, layer K, name of the base model.
        injection: how an AV of this origin is known to be trained; counts only where the sidecar has neither
            `injection.kind` nor `extraction.injection_scale`.
        final_norm_stripped, head_input: of an AR, see `Sidecar`.
        measure: (marker character, AV template) -> the marker's tokens in the rendered prompt; fills the ids that the
            sidecar of an AV lacks. It may raise a SidecarError, which becomes a fault.
    """

    d_model: int | None = None
    layer: int | None = None
    base_model: str | None = None
    injection: InjectionKind | None = None
    final_norm_stripped: bool | None = None
    head_input: HeadInput | None = None
    measure: Callable[[str, str], MarkerTokens] | None = None


_NO_HINTS = Hints()


@dataclass(frozen=True)
class Sidecar:
    """The parsed sidecar of one half of a pair.

    Attributes:
        mse_scale: the L2 norm that an AR's loss gave both vectors; None means sqrt(d_model) (which is what released pairs
            hold as a number), "raw" that it compared the vectors as they are (null in the file).
        final_norm_stripped: whether an AR's head was trained without the final norm; None where nothing says.
        head_input: what an AR's head reads: the hidden state h ("raw"), or h * mse_scale / ||h|| ("normalized").
        ar_special_tokens: whether an AR's prompt begins with the tokenizer's BOS. Released pairs do; EasyNLA encodes without
            (its nla/train_sft.py), which matters for tokenizers that have one.
        adapter_stack: the LoRA folders of the repository that are applied to the base model, in this order; None where
            the sidecar names none.
        release: see `ReleaseRecord`; None where the half was not pushed by this project.
        extra: every key that this version does not know; it is written back.
    """

    role: Role
    d_model: int
    site: Site
    marker: MarkerTokens | None = None
    av_template: str | None = None
    ar_template: str | None = None
    ar_suffix_ids: tuple[int, ...] | None = None
    injection: Injection = field(default_factory=Injection)
    mse_scale: float | Literal["raw"] | None = None
    base_model: str | None = None
    source_revision: str | None = None
    pair_repo: str | None = None
    stage: str | None = None
    fve: Score | None = None
    fve_reference: ReferenceRecord | None = None
    final_norm_stripped: bool | None = None
    head_input: HeadInput = "raw"
    ar_special_tokens: bool = True
    adapter_stack: tuple[str, ...] | None = None
    release: ReleaseRecord | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    # -- reading ---------------------------------------------------------------------------------------------

    @classmethod
    def read(
        cls,
        path: Path,
        *,
        role: Role | None = None,
        hints: Hints = _NO_HINTS,
        override: Mapping[str, Any] | None = None,
    ) -> Sidecar:
        """The sidecar of a model directory, or of one file (a YAML file; for a parquet file the sidecar beside it).

        Args:
            role, hints: see `parse`.
            override: what the user knows better, laid over the file (`merge`).

        Raises:
            SidecarError: absent, unreadable, or faulty (all faults listed).
        """
        place = sidecar_path(path)
        if not place.is_file():
            raise SidecarError(
                f"This {'file' if path.is_file() else 'directory'} has no {place.name}, so nothing says which layer, "
                "marker and prompts it was made for.",
                where=path,
                next_step="name a directory or repository of an NLA half (an AV or an AR)",
            )
        raw = merge(yaml_io.read(place, error=SidecarError), override or {})
        sidecar = cls.parse(raw, where=place, role=role, hints=hints)
        sidecar.warn_if_edited(raw, place)
        return sidecar

    @classmethod
    def parse(
        cls,
        raw: Mapping[str, Any],
        *,
        where: object = SIDECAR_NAME,
        role: Role | None = None,
        hints: Hints = _NO_HINTS,
    ) -> Sidecar:
        """A sidecar from its YAML mapping, in any dialect (docs/sidecar.md).

        Args:
            raw: what the file holds.
            where: the file, for the message.
            role: the half that is wanted, for sidecars that do not say which they are. One that does keeps its own role:
                whether that will do is for the caller to say.
            hints: what is known from elsewhere, where the sidecar is silent.

        Raises:
            SidecarError: with all faults.
        """
        from nla_hub.sidecar_reading import Reader  # the reader builds this class

        return Reader(raw, where, role, hints).sidecar()

    # -- writing ---------------------------------------------------------------------------------------------

    def to_mapping(self) -> dict[str, Any]:
        """The canonical form: version 2, av/ar keys, scales as numbers (null: raw); see docs/sidecar.schema.json."""
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
        if self.injection.kind == "overwrite" or self.injection.scale is not None:
            extraction["injection_scale"] = self.injection.scale  # None, the raw vector, is written as null
        scale = math.sqrt(self.d_model) if self.mse_scale is None else self.mse_scale
        extraction["mse_scale"] = None if scale == "raw" else scale
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
            "head_input": None if self.head_input == "raw" else self.head_input,
            "ar_special_tokens": None if self.ar_special_tokens else False,
            "adapter_stack": None if self.adapter_stack is None else list(self.adapter_stack),
            "fve": None if self.fve is None else _without_none(vars(self.fve)),
            "fve_reference": None if self.fve_reference is None else _without_none(vars(self.fve_reference)),
            "release": None if self.release is None else dict(vars(self.release)),
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

    def warn_if_edited(self, raw: Mapping[str, Any], where: object) -> None:
        """Warn where the mapping that this sidecar was parsed from holds the hash of other contents."""
        stored = raw.get("integrity")
        if isinstance(stored, Mapping) and stored.get("sha256") not in (None, self.integrity()):
            logger.warning("%s was edited after it was written: its contents differ from the hash stored in it", where)

    def text(self) -> str:
        """What `write` writes: the canonical form with its hash, as YAML."""
        return yaml_io.dumps({**self.to_mapping(), "integrity": {"sha256": self.integrity()}})

    def write(self, directory: Path) -> Path:
        """Write `nla_meta.yaml` atomically and return its path."""
        path = directory / SIDECAR_NAME
        yaml_io.write_text(path, self.text())
        return path

    def with_(self, **changes: Any) -> Sidecar:
        """A copy with some fields changed."""
        return replace(self, **changes)

    # -- verifying -------------------------------------------------------------------------------------------

    def config_faults(self, config: Any) -> list[str]:
        """What disagrees between this sidecar and a transformers config (of the AV or AR itself).

        The config may be a wrapper around a text model, and may spell its sizes as its family does (GPT-2's `n_embd`):
        transformers maps both.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        width, layers = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
        faults = []
        if width is None or layers is None:
            return ["config.json has no hidden_size or no num_hidden_layers: it describes no decoder"]
        if width != self.d_model:
            faults.append(f"d_model: the sidecar says {self.d_model}, config.json says hidden_size {width}")
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
            "base model": (base_family(self.base_model), base_family(other.base_model)),
        }
        for name, (mine, theirs) in pairs.items():
            if mine != theirs and None not in (mine, theirs):
                faults.append(f"{name}: the {self.role.upper()} says {mine}, the {other.role.upper()} says {theirs}")
        if self.role == other.role:
            faults.append(f"role: both halves are called {self.role!r}")
        return faults


def _named(value: Any) -> Any:
    """`value` with keys as text and sets in order: strangers' keys may be numbers, which do not sort among words."""
    if isinstance(value, Mapping):
        return {str(key): _named(item) for key, item in value.items()}
    if isinstance(value, set):
        return sorted(map(str, value))
    return [_named(item) for item in value] if isinstance(value, (list, tuple)) else value


def _without_none(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value is not None}


def base_family(name: str | None) -> str | None:
    """A base model's name without owner and revision: forks and mirrors of one base are the same family."""
    return None if name is None else re.split("@", name.rstrip("/").split("/")[-1])[0].lower()


def sidecar_path(path: Path) -> Path:
    """Where the sidecar of a directory or file stands: inside the directory, beside a data file, or the file itself."""
    if path.is_dir():
        return path / SIDECAR_NAME
    if path.suffix in (".yaml", ".yml"):
        return path
    is_data = path.is_file() or path.suffix == ".parquet"
    return path.with_name(f"{path.name}.{SIDECAR_NAME}") if is_data else path / SIDECAR_NAME
