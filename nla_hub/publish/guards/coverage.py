"""Whether a half's weights are exactly those that its config asks for: none missing, none besides, each in its shape.

A model is built of the config without any memory (torch's meta device), and its names are held against the headers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from nla_hub.adapters import Adapter
from nla_hub.checkpoints import HEAD_PREFIX
from nla_hub.layouts import ADAPTER_WEIGHTS_NAME, AR_LORA_NAME
from nla_hub.publish.guards.stored import DESTROYED, Part, StoredFile
from nla_hub.publish.release import Entry
from nla_hub.sidecar import Role, Sidecar
from nla_hub.weights import ADAPTER_CONFIG_NAME, HEAD_NAME, INDEX_NAME, WEIGHTS_NAME, matches

HEAD_DTYPES = ("F32", "BF16", "F16")
PACKED_DTYPES = ("F8_E4M3", "F8_E5M2", "U8", "I8")
"""Of weights with scales beside them; two values of four bits share a U8."""
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$")

Files = Mapping[str, StoredFile]
"""The safetensors files of a half by their names in its folder."""


def model_files(files: Files) -> dict[str, StoredFile]:
    """The files with the model's own weights: one, or shards."""
    return {
        name: file for name, file in files.items() if name == WEIGHTS_NAME or re.fullmatch(r"model-[\w-]+\.\w+", name)
    }


def index_faults(files: Files, index: Entry | None) -> Iterator[str]:
    """What disagrees between an index and its shards, both ways."""
    shards = model_files(files)
    if WEIGHTS_NAME in shards:
        if index is not None or len(shards) > 1:
            yield f"there is {WEIGHTS_NAME}, and shards or an index beside it: which of them is meant?"
        return
    if index is None:
        yield f"no {WEIGHTS_NAME}" if not shards else f"{len(shards)} shards without {INDEX_NAME}"
        return
    try:
        told = json.loads(b"".join(index.chunks()))["weight_map"]
        wanted = {str(name): str(shard) for name, shard in told.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        yield f"{INDEX_NAME} has no weight_map"
        return
    yield from (
        f"{INDEX_NAME} names {shard}, which is not there" for shard in sorted({*wanted.values()} - shards.keys())
    )
    yield from (f"{shard} is not named by {INDEX_NAME}" for shard in sorted(shards.keys() - {*wanted.values()}))
    stored = {(name, shard) for shard, file in shards.items() for name in file.parts}
    yield from (f"{name}: in {INDEX_NAME}, not in {shard}" for name, shard in sorted(wanted.items() - stored))
    yield from (f"{name}: in {shard}, not there in {INDEX_NAME}" for name, shard in sorted(stored - wanted.items()))


def weight_faults(files: Files, config: Any, adapter: Adapter, sidecar: Sidecar, role: Role) -> Iterator[str]:
    """Weights of a complete half that are missing, unexpected or misshapen.

    Args:
        config: the transformers config of the half.
    """
    expected = _expected(config, adapter, sidecar, role)
    stored = {
        _plain(name, config, adapter): part for file in model_files(files).values() for name, part in file.parts.items()
    }
    is_packed = getattr(config, "quantization_config", None) is not None
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    for name, shape in expected.items():
        if (part := stored.get(name)) is None:
            if not (tied and matches(name, adapter.lm_head_weights)):
                yield f"missing: {name} {list(shape)}"
            continue
        with_scale = is_packed and any(_owner(other) == name and other != name for other in stored)
        halved = with_scale and part.dtype == "U8" and prod(part.shape) == -(-prod(shape) // 2)
        if part.dtype in PACKED_DTYPES and not with_scale:
            yield f"{name}: packed as {part.dtype}, with no scale beside it or no quantization_config"
        elif part.shape != shape and not halved:
            yield f"{name}: its shape is {list(part.shape)}, expected {list(shape)}"
    for name in stored:
        if name not in expected and not (is_packed and _owner(name) in expected):
            yield f"unexpected: {name}"


def _expected(config: Any, adapter: Adapter, sidecar: Sidecar, role: Role) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a half's weights, from the trunk on."""
    from transformers import AutoModel, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM if role == "av" else AutoModel
    with torch.device("meta"):
        model = auto.from_config(config.get_text_config())
    shapes = {_plain(name, config, adapter): tuple(value.shape) for name, value in model.state_dict().items()}
    if role == "ar" and sidecar.final_norm_stripped is not False:
        return {name: shape for name, shape in shapes.items() if not matches(name, adapter.final_norm_weights)}
    return shapes


def _plain(name: str, config: Any, adapter: Adapter) -> str:
    """A weight's name from the trunk on, however a causal LM, a trunk or a wrapper spells it."""
    if config.model_type in adapter.wrapper_types:
        for pattern, replacement in adapter.wrapper_key_mapping.items():
            name = re.sub(pattern, replacement, name)
    if adapter.stored_lm_head is not None and name.startswith(f"{adapter.stored_lm_head}."):
        name = adapter.lm_head + name.removeprefix(adapter.stored_lm_head)
    return name.removeprefix(adapter.causal_prefix)


def _owner(name: str) -> str:
    """The weight that a scale or a packing's state belongs to."""
    stem, found, _ = name.partition(".weight")
    return f"{stem}.weight" if found else name


def head_faults(files: Files, d_model: int) -> Iterator[str]:
    """What is wrong with the value head of an AR: a weight [d, d], perhaps a bias [d], in a float dtype, not destroyed."""
    lora = AR_LORA_NAME in files and HEAD_NAME not in files
    place, prefix = (AR_LORA_NAME, HEAD_PREFIX) if lora else (HEAD_NAME, "")
    if place not in files:
        yield f"no value head: {HEAD_NAME} is missing"
        return
    file = files[place]
    found = {name.removeprefix(prefix): part for name, part in file.parts.items() if name.startswith(prefix)}
    expected = {"weight": (d_model, d_model), "bias": (d_model,)}
    if "weight" not in found:
        yield f"{place}: it has no weight"
    for name, part in found.items():
        if name not in expected:
            yield f"{place}: unexpected: {name}"
        elif part.shape != expected[name]:
            yield f"{place}: {name} has the shape {list(part.shape)}, expected {list(expected[name])}"
        elif part.dtype not in HEAD_DTYPES:
            yield f"{place}: {name} is {part.dtype}, expected {', '.join(HEAD_DTYPES)}"
        elif name == "weight" and not file.faults:
            yield from (f"{place}: {name}: {fault}" for fault in _destroyed(file.tensor(prefix + name)))


def _destroyed(weight: Tensor) -> Iterator[str]:
    """What no training leaves in a head's weight [d, d]; its values are finite, or that is told elsewhere."""
    is_zero = weight == 0
    if bool(is_zero.all()):
        return  # told of every matrix
    width = len(weight)
    for lines, dim in (("rows", 1), ("columns", 0)):
        if empty := int(is_zero.all(dim=dim).sum()):
            yield f"{empty} of {width} {lines} of the weight are all zeros: {DESTROYED}"
    for lines, first in (("rows", weight[:1]), ("columns", weight[:, :1])):
        if width > 1 and bool((weight == first).all()):
            yield f"all {lines} of the weight are equal, so every text gives one direction: {DESTROYED}"
    smallest, largest = weight.aminmax()
    size = max(-float(smallest), float(largest))
    if isfinite(size) and width * size**2 > torch.finfo(torch.float32).max:
        yield f"its largest value is {size:.3g}, with which the length of a vector overflows float32: {DESTROYED}"


def factor_faults(files: Files, config: Entry | None, blocks: int | None, base_model: str) -> Iterator[str]:
    """What is wrong with a LoRA: its configuration, factors without their other half, ranks, blocks that are not there.

    Args:
        config: `adapter_config.json`; None for EasyNLA's AR form, which has none.
        blocks: number of blocks that the half runs; None where it is not known.
        base_model: what the release calls the model under it.
    """
    place = ADAPTER_WEIGHTS_NAME if config is not None else AR_LORA_NAME
    if place not in files:
        yield f"{place} is missing"
        return
    told = _config_of(config) if config is not None else {}
    if config is not None and told.get("peft_type") != "LORA":
        yield f"{ADAPTER_CONFIG_NAME}: peft_type is {told.get('peft_type')!r}, expected 'LORA'"
    if config is not None and (named := told.get("base_model_name_or_path")) != base_model:
        yield f"{ADAPTER_CONFIG_NAME}: base_model_name_or_path is {named!r}, expected {base_model!r}"
    sides: dict[str, dict[str, Part]] = {}
    for name, part in files[place].parts.items():
        if name.startswith(HEAD_PREFIX):
            continue
        found = _FACTOR.match(name)
        block = None if found is None else re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
        if found is None or len(part.shape) != 2:
            yield f"{place}: unexpected: {name}"
        elif blocks is not None and block is not None and int(block[1]) >= blocks:
            yield f"{place}: {name} is of block {block[1]}; this half runs the blocks 0 to {blocks - 1}"
        else:
            sides.setdefault(found["module"], {})[found["side"]] = part
    yield from _rank_faults(place, sides, told)


def _config_of(entry: Entry) -> Mapping[str, Any]:
    try:
        found = json.loads(b"".join(entry.chunks()))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _rank_faults(place: str, sides: Mapping[str, Mapping[str, Part]], told: Mapping[str, Any]) -> Iterator[str]:
    if not sides:
        yield f"{place}: it holds no LoRA factors"
    ranks: Sequence[Any] = [told.get("r"), *(told.get("rank_pattern") or {}).values()]
    for module, pair in sides.items():
        if len(pair) < 2:
            yield f"{place}: {module} has lora_{next(iter(pair))} only"
            continue
        down, up = pair["A"].shape, pair["B"].shape
        if down[0] != up[1]:
            yield f"{place}: {module}: A is {list(down)}, B is {list(up)}: their ranks differ"
        elif told and down[0] not in ranks:
            yield f"{place}: {module}: rank {down[0]}, {ADAPTER_CONFIG_NAME} says {told.get('r')}"
