"""Reading a sidecar in any dialect, all faults at once. Where values may stand is data: see `sidecar_dialects`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, cast

from nla_hub.errors import SidecarError
from nla_hub.sidecar import (
    EXPLANATION_PLACEHOLDER,
    INJECTION_PLACEHOLDER,
    HeadInput,
    Hints,
    Injection,
    InjectionKind,
    MarkerTokens,
    ReferenceRecord,
    ReleaseRecord,
    Score,
    Sidecar,
    Site,
    base_family,
)
from nla_hub.sidecar_dialects import (
    BLOCK_COUNT,
    PLACES,
    ROLES,
    Role,
    find,
    has,
    named_role,
    obstacles,
    present,
    show,
)

LARGEST = 2**31 - 1
"""Of the whole numbers of a sidecar (widths, layers, token ids): those of any model fit, and square roots stay finite."""

SQRT_D_MODEL = "sqrt_d_model"
RAW_WORDS = ("raw", "none")
"""Scales in words: sqrt(d_model), and no rescaling, for which null stands too."""

MARKER_IDS = ("injection_token_id", "injection_left_neighbor_id", "injection_right_neighbor_id")
FOLDER = r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*(/[A-Za-z0-9_][A-Za-z0-9_.+=-]*)*"
"""Of an adapter inside its repository: plain names, none of which leads out of it."""

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d{1,4})?", re.ASCII)
_FIELD_TYPES: dict[str, type] = {"str": str, "int": int, "float": float}
_TYPE_WORDS: dict[type, str] = {str: "text", int: "a whole number", float: "a finite number"}


def is_number(value: object) -> bool:
    """Whether a YAML value is a finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1e300


class Reader:
    """Reads one mapping, collecting faults instead of stopping at the first."""

    def __init__(self, raw: Mapping[str, Any], where: object, role: Role | None, hints: Hints) -> None:
        if not isinstance(raw, Mapping):
            raise SidecarError("A mapping with named keys is expected here.", where=where, got=type(raw).__name__)
        self.raw = raw
        self.where = where
        self.wanted = role
        self.hints = hints
        self.faults: list[str] = []
        self.known: set[tuple[str, ...]] = set()
        """Paths whose values have become fields: they are not written back as unknown keys."""

    def sidecar(self) -> Sidecar:
        """The sidecar; raises a SidecarError with all faults."""
        self.known |= {("kind",), ("schema_version",), ("integrity",), ("output_format",)}
        self.faults += obstacles(self.raw)
        role = self._role()
        d_model = self._size("d_model", 1, self.hints.d_model)
        head_input, mse_scale = self._head_input(), self._mse_scale(d_model)
        if head_input == "normalized" and mse_scale == "raw":
            self.faults.append("head_input: 'normalized' needs an extraction.mse_scale, which is null here")
        av_template = self._template("av", role, INJECTION_PLACEHOLDER)
        stripped = self._boolean("final_norm_stripped")
        sidecar = Sidecar(
            role=role or "av",
            d_model=d_model,
            site=Site(self._layer(role)),
            marker=self._marker(role, av_template),
            av_template=av_template,
            ar_template=self._template("ar", role, EXPLANATION_PLACEHOLDER),
            ar_suffix_ids=self._suffix(),
            injection=self._injection(role, d_model),
            mse_scale=mse_scale,
            base_model=self._base_model(),
            source_revision=self._text("source_revision"),
            pair_repo=self._text("pair_repo"),
            stage=self._text("stage"),
            fve=self._record("fve", Score),
            fve_reference=self._record("fve_reference", ReferenceRecord),
            release=self._release(),
            final_norm_stripped=self.hints.final_norm_stripped if stripped is None else stripped,
            head_input=head_input,
            ar_special_tokens=self._boolean("ar_special_tokens") is not False,
            adapter_stack=self._adapter_stack(),
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
        return find(self.raw, path)

    def _fault(self, path: str, value: object, expected: str) -> None:
        self.faults.append(f"{path}: got {show(value)}, expected {expected}")

    def _role(self) -> Role | None:
        value = self._get("role")
        if (role := named_role(self.raw)) is not None:
            return role
        if value is not None:
            self._fault("role", value, f"'av' or 'ar' (also read: {', '.join(list(ROLES)[2:])})")
        elif self.wanted is None:
            self.faults.append("role: got None, expected 'av' or 'ar', here or from whoever asks for this half")
        return self.wanted

    # -- values that may stand in several places -------------------------------------------------------------

    def _agreed(self, name: str, found: list[tuple[str, Any]], label: str) -> None:
        """Note a fault where places disagree, and the places whose value has been taken over as known."""
        if len({value for _, value in found}) > 1:
            self.faults.append(f"{label}: " + ", ".join(f"{path} says {show(value)}" for path, value in found))
        for place in PLACES[name]:
            value = find(self.raw, place.keys)
            if value is None or (found and value == found[0][1]):
                self.known.add(place.keys)

    def _size(self, name: str, minimum: int, hint: int | None) -> int:
        """A required whole number; 0 where there is none, which is a fault."""
        before = len(self.faults)
        found = [
            (place.path, value)
            for place, value in present(self.raw, name)
            if self._is_whole(place.path, value, minimum)
        ]
        self._agreed(name, found, "layer" if name == "extraction_layer_index" else name)
        if found:
            return cast(int, found[0][1])
        if hint is None and len(self.faults) == before:
            self.faults.append(f"{name}: missing")
        return hint or 0

    def _is_whole(self, path: str, value: object, minimum: int = 0) -> bool:
        fits = isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= LARGEST
        if not fits:
            self._fault(path, value, f"a whole number >= {minimum}")
        return fits

    def _layer(self, role: Role | None) -> int:
        hint, blocks = self.hints.layer, find(self.raw, BLOCK_COUNT)
        if hint is None and role == "ar" and type(blocks) is int and 1 <= blocks <= LARGEST:
            hint = blocks - 1  # the blocks of an AR are 0 to K
        layer = self._size("extraction_layer_index", 0, hint)
        if role == "av" and blocks is not None and self.faults[-1:] == ["extraction_layer_index: missing"]:
            self.faults[-1] += f" ({'.'.join(BLOCK_COUNT)} counts the blocks of the whole AV and does not tell K)"
        return layer

    def _base_model(self) -> str | None:
        found = [
            (place.path, value)
            for place, value in present(self.raw, "base_checkpoint")
            if self._is_text(place.path, value)
        ]
        if len({base_family(value) for _, value in found}) == 1:
            found = found[:1]  # mirrors of one base: the names that differ stay where they are
        self._agreed("base_checkpoint", found, "base model")
        return cast(str, found[0][1]) if found else self.hints.base_model

    def _template(self, half: Role, role: Role | None, placeholder: str) -> str | None:
        name = f"prompt_templates.{half}"
        found = [(p.path, value) for p, value in present(self.raw, name) if self._is_text(p.path, value)]
        self._agreed(name, found, "prompt templates")
        if not found:
            if half == role and not any(fault.startswith(f"{p.path}:") for fault in self.faults for p in PLACES[name]):
                self.faults.append(f"{name}: missing")
            return None
        path, template = found[0]
        braces = re.findall(r"\{[^{}\s]*\}", template)
        if (count := braces.count(placeholder)) != 1:
            self.faults.append(f"{path}: {placeholder} stands {count} times, expected once")
        for unknown in sorted(set(braces) - {placeholder}):
            self.faults.append(f"{path}: unknown placeholder {unknown}")
        return cast(str, template)

    # -- values with one place -------------------------------------------------------------------------------

    def _is_text(self, path: str, value: object) -> bool:
        if not isinstance(value, str):
            self._fault(path, value, "text")
        return isinstance(value, str)

    def _text(self, *path: str) -> str | None:
        value = self._get(*path)
        return value if value is not None and self._is_text(".".join(path), value) else None

    def _boolean(self, name: str) -> bool | None:
        value = self._get(name)
        if value is None or isinstance(value, bool):
            return value
        self._fault(name, value, "true or false")
        return None

    def _scale(self, name: str, d_model: int) -> float | Literal["raw"] | None:
        """A scale; "raw" where it is null or said to be raw, None where the key is absent or its value is a fault."""
        path = ("extraction", name)
        value = self._get(*path)
        if value is None:
            return "raw" if has(self.raw, path) else None
        if isinstance(value, str):
            if value in RAW_WORDS:
                return "raw"
            if value == SQRT_D_MODEL:
                return math.sqrt(d_model) if d_model else None
        number = float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
        if not is_number(number) or number <= 0:
            self._fault(".".join(path), value, f"a positive number, {SQRT_D_MODEL}, or null for the vector as it is")
            return None
        return float(number)

    def _mse_scale(self, d_model: int) -> float | Literal["raw"] | None:
        scale = self._scale("mse_scale", d_model)
        return None if d_model and scale == math.sqrt(d_model) else scale

    def _injection(self, role: Role | None, d_model: int) -> Injection:
        kind = self._get("injection", "kind")
        scale = self._scale("injection_scale", d_model)
        given = has(self.raw, ("extraction", "injection_scale"))
        if kind is None:
            kind = "overwrite" if given or role == "ar" else self.hints.injection
        if kind not in ("overwrite", "add"):
            how = ""
            if kind is None:
                how = (
                    ': EasyNLA and nanoNLA train "add", the released pairs "overwrite". Say which with '
                    'sidecar={"injection": {"kind": "add"}} in Python, or as those keys in the file'
                )
            self._fault("injection.kind", kind, f"'overwrite' or 'add'{how}")
            kind = "overwrite"
        if role != "ar" and kind == "overwrite" and not given:
            self.faults.append(
                "extraction.injection_scale: missing; an AV that overwrites needs the norm it was trained with "
                "(null where it was trained with raw vectors)"
            )
        return Injection(cast(InjectionKind, kind), None if scale == "raw" else scale)

    def _marker(self, role: Role | None, av_template: str | None) -> MarkerTokens | None:
        """The marker; on an AR, which does not need it, None where it is incomplete, and then its keys stay as they are."""
        paths = [("tokens", name) for name in ("injection_char", *MARKER_IDS)]
        char, *ids = (find(self.raw, path) for path in paths)
        if char is not None and (not isinstance(char, str) or len(char) != 1):
            self._fault("tokens.injection_char", char, "one character")
            char = None
        elif char is None and role != "ar":
            self.faults.append("tokens.injection_char: missing")
        bad = [
            n for n, i in zip(MARKER_IDS, ids, strict=True) if i is not None and not self._is_whole(f"tokens.{n}", i)
        ]
        if role != "ar" and None in ids and not bad:
            ids = self._measured(char, av_template, ids)
        if role != "ar":
            self.faults += [f"tokens.{n}: missing" for n, i in zip(MARKER_IDS, ids, strict=True) if i is None]
        if char is None or bad or None in ids:
            return None
        self.known |= set(paths)
        return MarkerTokens(char, *ids)

    def _measured(self, char: str | None, av_template: str | None, ids: list[Any]) -> list[Any]:
        """The ids with those that are missing measured on the tokenizer, where there is one."""
        if self.hints.measure is None or char is None or av_template is None:
            return ids
        if av_template.count(INJECTION_PLACEHOLDER) != 1:
            return ids  # a fault already
        try:
            found = self.hints.measure(char, av_template)
        except SidecarError as error:
            self.faults += [f"tokens: {error.one_line()}"]
            return ids
        return [m if i is None else i for i, m in zip(ids, (found.id, found.left_id, found.right_id), strict=True)]

    def _suffix(self) -> tuple[int, ...] | None:
        value = self._get("tokens", "critic_suffix_ids")
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not all(type(i) is int and 0 <= i <= LARGEST for i in value):
            self._fault("tokens.critic_suffix_ids", value, "a list of token ids")
            return None
        return tuple(value)

    def _head_input(self) -> HeadInput:
        value = self._get("head_input")
        if value is None:
            return self.hints.head_input or "raw"
        if value not in ("raw", "normalized"):
            self._fault("head_input", value, "'raw' or 'normalized'")
            return "raw"
        return cast(HeadInput, value)

    def _adapter_stack(self) -> tuple[str, ...] | None:
        value = self._get("adapter_stack")
        if value is None:
            return None
        names = value if isinstance(value, (list, tuple)) else []
        folders = [name.removesuffix("/") for name in names if isinstance(name, str)]
        plain = {folder for folder in folders if re.fullmatch(FOLDER, folder)}
        if not names or len(plain) != len(names):
            self._fault(
                "adapter_stack", value, "a list of different folders of the repository, in order of application"
            )
            return None
        return tuple(folders)

    def _record(self, name: str, kind: type[Any]) -> Any:
        value = self._get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self._fault(name, value, "a mapping")
            return None
        names = list(kind.__dataclass_fields__)
        try:
            record = kind(**{key: value[key] for key in names if key in value})
        except TypeError as error:
            self.faults.append(f"{name}: {str(error).split(') ', 1)[-1]}")
            return None
        for key, field in kind.__dataclass_fields__.items():
            item = getattr(record, key)
            expected = _FIELD_TYPES[str(field.type).removesuffix(" | None")]
            fits = is_number(item) if expected is float else isinstance(item, expected) and not isinstance(item, bool)
            if not fits and not (item is None and str(field.type).endswith("None")):
                self._fault(f"{name}.{key}", item, _TYPE_WORDS[expected])
            elif key in ("raw_variance", "mean_norm") and item <= 0:
                self._fault(f"{name}.{key}", item, "a positive number")
            elif key == "n" and item < 0:
                self._fault(f"{name}.{key}", item, "a whole number >= 0")
        self.known |= {(name, key) for key in names}
        return record

    def _release(self) -> ReleaseRecord | None:
        """The push that a half came with; what others put under this name is an unknown key, and kept."""
        value = self.raw.get("release")
        ours = isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("id", "tag"))
        return self._record("release", ReleaseRecord) if ours else None

    def _unknown(self) -> dict[str, Any]:
        """Every key that has not become a field, at its depth; a null that holds the place of known keys is nothing."""

        def rest(value: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
            kept: dict[str, Any] = {}
            for key, item in value.items():
                here = (*path, key)
                inside = any(k[: len(here)] == here and len(k) > len(here) for k in self.known)
                if inside and (item is None or isinstance(item, Mapping)):
                    if remaining := rest(item or {}, here):
                        kept[key] = remaining
                elif here not in self.known:
                    kept[key] = item
            return kept

        return rest(self.raw, ())
