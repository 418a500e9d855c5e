"""Pairs packed in 8 or 4 bits, written so that transformers (and vLLM) load them again by their config alone.

- `fp8`: the linear modules of the blocks as float8_e4m3fn with one float32 scale a row of outputs, in the form that
  compressed-tensors calls `float-quantized` (weights only). Written tensor by tensor, without a model in memory.
- `nf4`: the same modules by bitsandbytes, through transformers' own quantiser.

Embeddings, norms, lm_head and value head stay as they are. A packed pair has to read its own vectors still; what it lost is
measured, never assumed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from nla_hub.adapters import Adapter
from nla_hub.checkpoints import load_ar
from nla_hub.convert import check_destination
from nla_hub.errors import GateFailedError, InjectionError, MissingExtraError, PublishError, RunError
from nla_hub.geometry import cosine
from nla_hub.hub import HubOptions
from nla_hub.locate import Ref
from nla_hub.opening import Half
from nla_hub.pretrained import TORCH_DTYPES, LoadOptions, load_causal_lm
from nla_hub.publish.facts import Quantised
from nla_hub.publish.staging.forms import ROLES, Prepared, opened, stored_bytes
from nla_hub.publish.staging.half_files import CONFIG, GENERATION, TOKENIZER, as_json
from nla_hub.publish.staging.measured import count_values
from nla_hub.reconstructor import Reconstructor
from nla_hub.round_trip import TEXTS
from nla_hub.sidecar import Role
from nla_hub.training.halves import packing
from nla_hub.weights import HEAD_NAME, INDEX_NAME, REFERENCE_NAME, WEIGHTS_NAME, WeightIndex, read_tensor

LARGEST_FP8 = 448.0
"""The largest float8_e4m3fn."""

SHARD = 5 * 10**9
"""Bytes of a file of packed weights."""

PACKAGES: Mapping[Quantised, tuple[str, str]] = {
    "fp8": ("compressed_tensors", "compressed-tensors"),
    "nf4": ("bitsandbytes", "bitsandbytes"),
}
"""What loads each of them: the module and its distribution."""

BITS: Mapping[Quantised, float] = {"fp8": 8.0, "nf4": 4.5}
"""A packed value, scales included (of nf4: 4 bits and a scale of 32 bits a block of 64)."""

FP8_CONFIG: Mapping[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": None,
            "output_activations": None,
        }
    },
}
"""`quantization_config` of config.json, as compressed-tensors reads it."""


def packed(
    done: Prepared, quantised: Quantised, *, base: Ref | None, options: HubOptions, work: Path | None
) -> Prepared:
    """A complete pair, packed into the work directory and held against the one it was made of.

    Raises:
        MissingExtraError: the package that packs or loads it is not installed.
        RunError: no room, or something lies in the work directory already.
        PublishError: a family whose blocks have no linear modules.
        GateFailedError: it no longer reads its own vectors.
    """
    module, package = PACKAGES[quantised]
    if find_spec(module) is None:
        raise MissingExtraError(package, "quant", needed_for=f"A pair packed as {quantised}")
    linear = {role: linear_weights(done.half(role)) for role in ROLES}
    values = {role: count_values(done.half(role)) for role in ROLES}
    if work is None:
        estimates = {role: {WEIGHTS_NAME: _estimate(done.half(role), linear[role], quantised)} for role in ROLES}
        return replace(done, quantised=quantised, changed=True, to_be_written=estimates, values=values)
    top = check_destination(work / quantised)
    try:
        for role in ROLES:
            _small_files(done.half(role), top / role)
            if quantised == "fp8":
                _write_fp8(done.half(role), linear[role], top / role)
            else:
                _write_nf4(done.half(role), top / role)
    except (OSError, SafetensorError) as cause:
        raise RunError(
            f"The packed weights cannot be written: {cause}",
            where=top,
            next_step="make room there, or name another directory for temporary files (TMPDIR)",
        ) from cause
    pair = opened(top / "av", top / "ar", base or done.pair.base, options, weights=True)
    new = replace(done, pair=pair, quantised=quantised, changed=True, values=values)
    return replace(new, parity=_accepted(done, new))


def linear_weights(half: Half) -> frozenset[str]:
    """Names, as stored, of the weights of linear modules in a half's blocks.

    Raises:
        PublishError: none of them are linear modules (GPT-2's are another kind, stored transposed).
    """
    from transformers import AutoModel, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM if half.role == "av" else AutoModel
    with torch.device("meta"):
        model = auto.from_config(half.config)
    blocks = _blocks_prefix(model, half.adapter)
    found = frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(blocks)
    )
    if not found:
        raise PublishError(
            "This family's blocks have no linear modules to pack.",
            where=half.files.directory,
            got=half.adapter.name,
            next_step="leave --quantize out",
        )
    return found


def _blocks_prefix(model: nn.Module, adapter: Adapter) -> str:
    blocks = adapter.block_list(model)
    names = [name for name, module in model.named_modules() if module is blocks]
    return f"{names[0]}."


def _is_one(name: str, linear: frozenset[str], adapter: Adapter) -> bool:
    """Whether a stored name is one of `linear`, with the causal LM's prefix or without."""
    return name in linear or name.removeprefix(adapter.causal_prefix) in linear


def _estimate(half: Half, linear: frozenset[str], quantised: Quantised) -> int:
    share = 1.0
    if half.under is None:
        stored = WeightIndex.read(half.files.directory).tensors
        total = sum(torch.Size(t.shape).numel() for t in stored.values())
        share = sum(torch.Size(t.shape).numel() for n, t in stored.items() if _is_one(n, linear, half.adapter)) / total
    return int(stored_bytes(half) * (1 - share + share * BITS[quantised] / 16))


# -- writing ---------------------------------------------------------------------------------------------------


def _small_files(half: Half, place: Path) -> None:
    """What stands beside the weights, copied: configurations, tokenizer, value head, reference; and the sidecar, unmeasured."""
    place.mkdir(parents=True)
    source, tokenizer = half.files.directory, Path(half.tokenizer.name_or_path)
    for name in (CONFIG, GENERATION, HEAD_NAME, REFERENCE_NAME):
        if (source / name).is_file():
            shutil.copyfile(source / name, place / name)
    for path in sorted(tokenizer.rglob("*")):
        below = path.relative_to(tokenizer)
        if path.is_file() and TOKENIZER.fullmatch(below.as_posix()):
            (place / below).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place / below)
    half.sidecar.write(place)


def _write_fp8(half: Half, linear: frozenset[str], place: Path) -> None:
    """Weights of a half, tensor by tensor, and its config."""
    stored = WeightIndex.read(half.files.directory).tensors
    shards: list[dict[str, Callable[[], Tensor]]] = [{}]
    room = SHARD
    for name, tensor in stored.items():
        size = torch.Size(tensor.shape).numel() * (1 if _is_one(name, linear, half.adapter) else 4)
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD
        room -= size
        shards[-1][name] = lambda name=name, file=tensor.file: read_tensor(file, name)  # type: ignore[misc]
    index: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = WEIGHTS_NAME if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            key: value for name, read in shard.items() for key, value in _fp8(name, read(), linear, half.adapter)
        }
        save_file(tensors, place / file, metadata={"format": "pt"})
        (place / file).chmod(0o644)
        index |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = sum((place / file).stat().st_size for file in set(index.values()))
        (place / INDEX_NAME).write_bytes(as_json({"metadata": {"total_size": total}, "weight_map": index}))
    config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    (place / CONFIG).write_bytes(as_json({**config, "quantization_config": FP8_CONFIG}))


def _fp8(name: str, value: Tensor, linear: frozenset[str], adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """A weight as it is stored: packed with its scale, float32 [out, 1], or as it is."""
    if not _is_one(name, linear, adapter):
        yield name, value.contiguous()
        return
    wide = value.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / LARGEST_FP8).clamp_min(torch.finfo(torch.float32).tiny)
    yield name, (wide / scale).to(torch.float8_e4m3fn).contiguous()
    yield f"{name.removesuffix('.weight')}.weight_scale", scale


def _write_nf4(half: Half, place: Path) -> None:
    """Weights and config of a half, by bitsandbytes."""
    stored = {TORCH_DTYPES.get(t.dtype) for t in WeightIndex.read(half.files.directory).tensors.values()}
    dtype = stored.pop() if len(stored) == 1 else None
    computed = dtype if dtype in (torch.float16, torch.float32) else torch.bfloat16
    options = LoadOptions(dtype=computed, quantization_config=packing("nf4", computed))
    if half.role == "av":
        model = load_causal_lm(half.files.directory, options).model
    else:
        model = load_ar(half.files.directory, half.sidecar, options)[0].model
    model.save_pretrained(place, max_shard_size=SHARD)


# -- accepting -------------------------------------------------------------------------------------------------


def _accepted(before: Prepared, after: Prepared) -> dict[str, float]:
    """Figures of a packed pair that still reads its own vectors; a GateFailedError for one that does not."""
    from nla_hub.nla import NLA

    whole = _vectors(_reconstructor(before))
    directories: dict[Role, Path] = {role: after.half(role).files.directory for role in ROLES}
    try:
        with NLA.from_pretrained(directories["av"].absolute(), ar=directories["ar"].absolute()) as nla:
            trip = nla.round_trip()
            trip.require()
            nearest = cosine(_vectors(nla.ar), whole)
    except (GateFailedError, InjectionError) as cause:
        raise GateFailedError(
            f"The pair packed as {after.quantised} no longer reads its own vectors.",
            where=before.pair.name,
            got=cause.one_line(),
            next_step="publish it as it is, or packed with more bits: leave --quantize out, or --quantize fp8",
        ) from cause
    return {
        f"cosine of the AR's vectors with those of the unpacked AR, lowest of {len(TEXTS)} texts": float(nearest.min()),
        "round trip: cosine to the vector itself": trip.matched,
        "round trip: cosine to others": trip.mismatched,
    }


def _reconstructor(prepared: Prepared) -> Reconstructor:
    from nla_hub.loading import load_reconstructor

    return load_reconstructor(prepared.half("ar"), LoadOptions())


def _vectors(ar: Reconstructor) -> Tensor:
    return ar.reconstruct(list(TEXTS)).cpu()
