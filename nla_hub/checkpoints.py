"""The halves of a pair on disk -> verified weights, in every form: complete models, LoRAs on a base, value heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoModel

from nla_hub.adapters import Adapter, adapter_for
from nla_hub.errors import SidecarError, WeightsError
from nla_hub.layouts import AR_LORA_NAME, HalfFiles
from nla_hub.log import logger
from nla_hub.lora import Lora, read_lora
from nla_hub.lora_roles import Roles, merge
from nla_hub.pretrained import TORCH_DTYPES, LoadedModel, LoadOptions, load_causal_lm, load_config, load_model
from nla_hub.sidecar import Sidecar, Site
from nla_hub.weights import HEAD_NAME, StoredTensor, WeightIndex, inside, matches, read_header, read_tensor

HEAD_PREFIX = "value_head."
"""Before the head's names in EasyNLA's AR form, which keeps it in one file with the factors."""


def load_av(files: HalfFiles, options: LoadOptions) -> LoadedModel:
    """The AV's complete causal LM; LoRAs are merged into their base (laid over it where it is quantised).

    Raises:
        CheckpointError, WeightsError: see `load_causal_lm` and `lora.read_lora`.
    """
    loaded = load_causal_lm(files.model_directory, options)
    if files.form != "model":
        _put_on(loaded, read_loras(files, loaded.adapter), options)
    return loaded


def load_ar(directory: Path | HalfFiles, sidecar: Sidecar, options: LoadOptions) -> tuple[LoadedModel, nn.Linear]:
    """The trunk of an AR (final norm gone, unless its head was trained behind it) and its value head (float32).

    Raises:
        WeightsError: damaged, missing or non-finite weights, a head of the wrong shape, or a final norm that nobody
            accounts for.
        SidecarError: config.json and sidecar disagree.
    """
    files = directory if isinstance(directory, HalfFiles) else HalfFiles(directory)
    config = load_config(files.model_directory, trust_remote_code=options.trust_remote_code)
    adapter = adapter_for(config)
    text = config.get_text_config()
    if files.form != "model":
        loras = read_loras(files, adapter, site=sidecar.site)
        require_blocks(files, loras, sidecar)
        text = adapter.truncate_config(text, sidecar.site)
    elif faults := sidecar.config_faults(config):
        raise SidecarError("Sidecar and config.json disagree.", where=files.directory, faults=faults)
    index = WeightIndex.read(files.model_directory)
    norm_names = [name for name in index.tensors if matches(name, adapter.final_norm_weights)]
    keep_norm = _keeps_norm(files, index, norm_names, sidecar, adapter)
    droppable = [*adapter.lm_head_weights, *([] if keep_norm else adapter.final_norm_weights)]
    mapping: dict[str, str] = {}
    if files.form != "model":
        droppable.append(f"blocks>{adapter.blocks}>{sidecar.site.layer}")
    if config.model_type in adapter.wrapper_types:
        mapping = dict(adapter.wrapper_key_mapping)
    loaded = load_model(
        files.model_directory,
        AutoModel,
        text,
        adapter,
        options,
        mapping=mapping,
        droppable=droppable,
        may_miss=[] if keep_norm else adapter.final_norm_weights,
    )
    if not keep_norm:
        adapter.drop_final_norm(loaded.model)
    if files.form != "model":
        _put_on(loaded, loras, options)
    device = next(loaded.model.parameters()).device
    return loaded, load_head(files.directory, sidecar.d_model).to(device)


def head_input_scale(sidecar: Sidecar) -> float | None:
    """The L2 norm that an AR's head wants its input in; None where it reads the hidden state as it is."""
    if sidecar.head_input != "normalized" or sidecar.mse_scale == "raw":
        return None
    return math.sqrt(sidecar.d_model) if sidecar.mse_scale is None else sidecar.mse_scale


def read_loras(files: HalfFiles, adapter: Adapter, *, site: Site | None = None) -> list[Lora]:
    """The adapters of a LoRA half, in order; of an AR (with its `site`) without what lies above its last block."""
    loras = [read_lora(folder, adapter, told=files.told) for folder in files.stack]
    if site is None:
        return loras
    above = [f"blocks>{adapter.blocks}>{site.layer}"]
    kept = [replace(one, factors=tuple(f for f in one.factors if not matches(f.module, above))) for one in loras]
    dropped = sum(len(one.factors) for one in loras) - sum(len(one.factors) for one in kept)
    if dropped:
        logger.info("%s: %d LoRA factors above block %d are not needed here", files.directory, dropped, site.layer)
    return kept


def _put_on(loaded: LoadedModel, loras: Sequence[Lora], options: LoadOptions) -> None:
    if options.quantization_config is None:
        merge(loaded.model, loaded.adapter, loras)
        return
    roles = Roles(loaded.model, loaded.adapter)
    roles.add("half", loras)
    roles.stay("half")


def require_blocks(files: HalfFiles, loras: Sequence[Lora], sidecar: Sidecar) -> None:
    """Raise a SidecarError where `ar_meta.json` was written for another layer than the sidecar's."""
    for lora in loras:
        if lora.n_blocks is not None and lora.n_blocks != sidecar.site.n_blocks:
            raise SidecarError(
                "Sidecar and ar_meta.json disagree.",
                where=files.directory,
                faults=[
                    f"layer: the sidecar says K = {sidecar.site.layer}, so an AR has {sidecar.site.n_blocks} blocks; "
                    f"ar_meta.json says ar_num_layers {lora.n_blocks}"
                ],
            )


def _keeps_norm(files: HalfFiles, index: WeightIndex, names: Sequence[str], sidecar: Sidecar, adapter: Adapter) -> bool:
    """Whether the head reads behind the final norm: what is on disk, and what the sidecar says about it."""
    if not names:
        if sidecar.final_norm_stripped is False:
            raise WeightsError(
                "This AR's head was trained behind its final norm (final_norm_stripped: false), but there is no norm.",
                where=index.directory,
                next_step="ask its author for the norm's weight, or for the right sidecar",
            )
        return False
    if sidecar.final_norm_stripped is not None:
        return not sidecar.final_norm_stripped
    values = {name: read_tensor(index.tensors[name].file, name) for name in names}
    if files.form == "model" and all(adapter.is_untrained_norm(name, value) for name, value in values.items()):
        ones = all(bool((value == 1).all()) for value in values.values())
        logger.info("%s: dropped a final norm %s", index.directory, "of ones" if ones else "that nobody trained")
        return False
    raise WeightsError(
        "This AR holds a trained final norm, and nothing says whether its head was trained behind it."
        if files.form == "model"
        else "Nothing says whether this AR's head was trained behind the base's final norm.",
        where=files.directory,
        next_step="ask its author, then write `final_norm_stripped: true` (the head reads the residual stream itself) or "
        '`false` into the sidecar, or pass sidecar={"final_norm_stripped": ...}',
    )


@dataclass(frozen=True)
class HeadFile:
    """The file of a value head: its tensors by the head's own names ("weight", "bias")."""

    path: Path
    prefix: str
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def find(cls, directory: Path) -> HeadFile:
        """The value head of an AR's folder; raises a WeightsError where there is none, or a damaged one."""
        lora = (directory / AR_LORA_NAME).exists() and not (directory / HEAD_NAME).exists()
        path = directory / (AR_LORA_NAME if lora else HEAD_NAME)
        if not (path.is_symlink() or path.is_file()):
            raise WeightsError("This AR has no value head.", where=directory, expected=HEAD_NAME)
        prefix = HEAD_PREFIX if lora else ""
        stored = read_header(inside(directory, path.name))
        return cls(path, prefix, {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)})

    @property
    def dtype(self) -> torch.dtype:
        """What holds all of it as it is loaded; float32 where its tensors differ, or where it is none of the 16-bit forms."""
        found = {TORCH_DTYPES.get(t.dtype) for t in self.tensors.values()}
        only = found.pop() if len(found) == 1 else None
        return only if only in (torch.bfloat16, torch.float16) else torch.float32


def load_head(directory: Path, d_model: int) -> nn.Linear:
    """The value head of an AR: Linear(d, d) in float32, with a bias where the file has one."""
    file = HeadFile.find(directory)
    path, tensors = file.path, file.tensors
    expected = {"weight": (d_model, d_model), "bias": (d_model,)}
    faults = [f"unexpected: {name}" for name in tensors if name not in expected]
    if "weight" not in tensors:
        faults.append("missing: weight")
    faults += [
        f"{name}: got shape {t.shape}, expected {expected[name]}"
        for name, t in tensors.items()
        if name in expected and t.shape != expected[name]
    ]
    if faults:
        raise WeightsError("This value head does not fit.", where=path, faults=faults)
    head = nn.Linear(d_model, d_model, bias="bias" in tensors)
    with torch.no_grad():
        for name in tensors:
            value = read_tensor(path, file.prefix + name)
            if not bool(torch.isfinite(value).all()):
                raise WeightsError(
                    f"This value head is broken: {int((~torch.isfinite(value)).sum())} of {value.numel()} values are NaN or "
                    "infinite.",
                    where=path,
                    next_step="ask its author to export it again; no reconstruction from it would mean anything",
                )
            cast(nn.Parameter, getattr(head, name)).copy_(value)
    return head.requires_grad_(False)
