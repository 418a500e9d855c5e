"""LoRA halves: adapters read tensor by tensor, checked against their base, merged into it or laid over it.

A low-rank update of a linear module is W + s B A, with s = alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023,
arXiv:2312.03732). Adapters are found by the names of decoder blocks, so that one saved over a trunk, a causal LM or a
multimodal wrapper is read alike. Nothing here needs peft; its own route is what the tests compare with.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla_hub.adapters import Adapter
from nla_hub.errors import CheckpointError, WeightsError
from nla_hub.layouts import ADAPTER_WEIGHTS_NAME, AR_LORA_NAME, AR_META_NAME
from nla_hub.weights import ADAPTER_CONFIG_NAME, PICKLED, inside, read_header, read_tensor, shorten

_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
_NOT_READ = {
    "use_dora": "DoRA scales the base's own weights",
    "modules_to_save": "it replaces whole modules of the base",
    "trainable_token_indices": "it changes rows of the embedding",
    "layer_replication": "it changes the base's blocks",
    "lora_bias": "its factors have biases",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "its factors see pooled inputs",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "arrow_config": "it chooses among several adapters",
    "kasa_config": "it scales the base's own weights",
    "monteclora_config": "its factors are drawn anew",
    "velora_config": "it compresses what it reads",
}
_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base's weights alone; PiSSA, OLoRA, LoftQ and others change them."""


@dataclass(frozen=True)
class Factors:
    """The update of one linear module, named from the list of blocks on ("layers.3.self_attn.q_proj").

    `a` float32 [r, in], `b` float32 [out, r]; `scale` is s.
    """

    module: str
    a: Tensor
    b: Tensor
    scale: float

    def delta(self) -> Tensor:
        """s B A, float32 [out, in]."""
        return self.scale * (self.b @ self.a)


@dataclass(frozen=True)
class Lora:
    """One adapter: its factors, and what its configuration says besides."""

    directory: Path
    factors: tuple[Factors, ...]
    base: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_blocks(self) -> int | None:
        """`ar_num_layers` of `ar_meta.json`: blocks of an AR's trunk."""
        value = self.meta.get("ar_num_layers")
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_lora(directory: Path, adapter: Adapter, *, told: Mapping[str, Any] | None = None, scaled: bool = True) -> Lora:
    """An adapter of either form.

    Args:
        adapter: of the base's family; its name for the list of blocks anchors the module names.
        told: what the sidecar or the user says instead of a missing or wrong `ar_meta.json`.
        scaled: whether the strength is wanted; factors alone can be compared without it.

    Raises:
        CheckpointError: a configuration that cannot be read, or a kind of adapter that is no plain LoRA.
        WeightsError: pickled, damaged, non-finite or incomplete factors.
    """
    if (directory / ADAPTER_CONFIG_NAME).exists():
        config = _read_json(directory, ADAPTER_CONFIG_NAME)
        _require_plain(directory, config)
        return Lora(
            directory,
            _factors(_weights_file(directory, ADAPTER_WEIGHTS_NAME), adapter, _peft_scale(directory, config)),
            base=config.get("base_model_name_or_path")
            if isinstance(config.get("base_model_name_or_path"), str)
            else None,
            meta=read_ar_meta(directory, told),
        )
    meta = read_ar_meta(directory, told)
    return Lora(
        directory,
        _factors(
            _weights_file(directory, AR_LORA_NAME), adapter, _ar_scale(directory, meta) if scaled else (lambda *_: 1.0)
        ),
        meta=meta,
    )


def read_ar_meta(directory: Path, told: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`ar_meta.json` of an AR's folder, {} where there is none; what `told` says comes first."""
    found = _read_json(directory, AR_META_NAME) if (directory / AR_META_NAME).exists() else {}
    return {**found, **(told or {})}


def adapter_base(directory: Path) -> str | None:
    """`base_model_name_or_path` of a PEFT folder: what its author's machine called the base (may be a path there)."""
    if not (directory / ADAPTER_CONFIG_NAME).exists():
        return None
    value = _read_json(directory, ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
    return value if isinstance(value, str) else None


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    path = inside(directory, name)
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"it is larger than {MAX_JSON} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError, RecursionError) as cause:
        raise CheckpointError(
            f"This file cannot be read: {cause}", where=path, next_step="download it again, or ask its author"
        ) from cause
    return found


MAX_JSON = 2**20
"""Bytes of a configuration; real ones have a few thousand."""


def _weights_file(directory: Path, name: str) -> Path:
    path = directory / name
    if not (path.is_symlink() or path.is_file()):
        pickled = sorted(p.name for p in directory.glob("*") if p.suffix in PICKLED)
        what = "This adapter has pickled weights only; loading them could run a stranger's code."
        raise WeightsError(
            what if pickled else "This adapter has no weights.",
            where=directory,
            got=", ".join(pickled[:3]) or None,
            expected=name,
            next_step="ask its author for safetensors (peft's save_pretrained writes them)",
        )
    return inside(directory, name)


def _require_plain(directory: Path, config: Mapping[str, Any]) -> None:
    faults = []
    if config.get("peft_type") != "LORA":
        faults.append(f"peft_type: got {config.get('peft_type')!r}, expected 'LORA'")
    faults += [f"{key}: {why}" for key, why in _NOT_READ.items() if config.get(key)]
    if (begun := config.get("init_lora_weights")) not in _KEEP_THE_BASE:
        faults.append(f"init_lora_weights: {begun!r} changes the base's own weights")
    for key in ("rank_pattern", "alpha_pattern"):
        faults += _pattern_faults(key, config.get(key))
    if config.get("bias", "none") != "none":
        faults.append(f"bias: got {config['bias']!r}, expected 'none'")
    if faults:
        raise CheckpointError(
            "This adapter is more than a plain LoRA.",
            where=directory / ADAPTER_CONFIG_NAME,
            faults=faults,
            next_step="merge it into its base with peft (merge_and_unload, then save_pretrained) and load the result",
        )


def _pattern_faults(key: str, value: object) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, Mapping):
        return [f"{key}: got {value!r}, expected a mapping"]
    found = []
    for pattern, number in value.items():
        try:
            re.compile(str(pattern))
        except re.error as cause:
            found.append(f"{key}: {pattern!r} is no regular expression ({cause})")
        if not _number(number):
            found.append(f"{key}.{pattern}: got {number!r}, expected a positive number")
    return found


Scale = Callable[[str, int], float]


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _peft_scale(directory: Path, config: Mapping[str, Any]) -> Scale:
    """s of a module (name, rank) as peft has it: alpha and rank may differ by pattern."""
    where = directory / ADAPTER_CONFIG_NAME
    alpha, rank = config.get("lora_alpha"), config.get("r")
    if not (_number(alpha) and _number(rank)):
        raise CheckpointError(
            "This adapter does not say how strong it is.", where=where, got=f"lora_alpha {alpha!r}, r {rank!r}"
        )
    alphas, ranks = config.get("alpha_pattern") or {}, config.get("rank_pattern") or {}

    def scale(module: str, r: int) -> float:
        expected = _by_pattern(ranks, module, rank)
        if r != expected:
            raise WeightsError(
                f"{module}: its factors have rank {r}, adapter_config.json says {expected}.", where=where
            )
        strength = float(_by_pattern(alphas, module, alpha))
        return strength / (math.sqrt(r) if config.get("use_rslora") else r)

    return scale


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """peft's rule: the first key that is the module's name or matches its end as a regular expression."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _ar_scale(directory: Path, meta: Mapping[str, Any]) -> Scale:
    """s of EasyNLA's AR form. Its trainer always uses rsLoRA and does not record it (nla/train_sft.py)."""
    alpha = meta.get("lora_alpha")
    if not _number(alpha):
        raise CheckpointError(
            "Nothing says how strong this adapter is.",
            where=directory,
            expected=f"lora_alpha in {AR_META_NAME}",
            next_step='pass what its author says: sidecar={"ar_meta": {"lora_alpha": ..., "ar_num_layers": ...}}',
        )
    told_rank = meta.get("lora_r")

    def scale(module: str, r: int) -> float:
        if told_rank is not None and r != told_rank:
            raise WeightsError(
                f"{module}: its factors have rank {r}, {AR_META_NAME} says {told_rank}.", where=directory
            )
        return float(alpha) / (math.sqrt(r) if meta.get("use_rslora", True) else r)  # type: ignore[arg-type]

    return scale


def _factors(file: Path, adapter: Adapter, scale: Scale) -> tuple[Factors, ...]:
    pairs: dict[str, dict[str, Tensor]] = {}
    spelled: dict[str, str] = {}  # as peft names the module, for its patterns
    faults = []
    for name in read_header(file):
        if name.startswith("value_head."):
            continue
        found = _FACTOR.match(name)
        module = None if found is None else _from_blocks(found["module"], adapter)
        if found is None or module is None:
            faults.append(f"unexpected: {name}")
            continue
        value = read_tensor(file, name).float()
        if value.ndim != 2 or not bool(torch.isfinite(value).all()):
            faults.append(f"{name}: {'NaN or infinite values' if value.ndim == 2 else f'shape {tuple(value.shape)}'}")
        if found["side"] in pairs.setdefault(module, {}):
            faults.append(f"twice: {name}")
        pairs[module][found["side"]] = value
        spelled[module] = found["module"].removeprefix("base_model.model.")
    faults += [f"missing: {m}.lora_{s}" for m, sides in pairs.items() for s in "AB" if s not in sides]
    faults += [
        f"{m}: A is {tuple(sides['A'].shape)}, B {tuple(sides['B'].shape)}: their ranks differ"
        for m, sides in pairs.items()
        if len(sides) == 2 and all(t.ndim == 2 for t in sides.values()) and sides["A"].shape[0] != sides["B"].shape[1]
    ]
    if not pairs:
        faults.append("it holds no LoRA factors")
    if faults:
        raise WeightsError(
            "This adapter's weights cannot be used.",
            where=file,
            faults=shorten(faults),
            next_step="download it again; if it stays, ask its author to merge and export it",
        )
    return tuple(
        Factors(module, sides["A"], sides["B"], scale(spelled[module], sides["A"].shape[0]))
        for module, sides in pairs.items()
    )


def _from_blocks(name: str, adapter: Adapter) -> str | None:
    """A module's name from the list of blocks on, None where it is in no block."""
    found = re.search(rf"(?:^|\.)({adapter.blocks}\.\d+\..+)$", name)
    return found.group(1) if found else None
