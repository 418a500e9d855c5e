"""The halves of a pair on disk -> verified weights: the AR's trunk, its final norm and its value head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoModel

from nla_hub.adapters import adapter_for
from nla_hub.errors import SidecarError, WeightsError
from nla_hub.log import logger
from nla_hub.pretrained import LoadedModel, LoadOptions, load_config, load_model
from nla_hub.sidecar import Sidecar
from nla_hub.weights import HEAD_NAME, WeightIndex, inside, read_header, read_tensor


def load_ar(directory: Path, sidecar: Sidecar, options: LoadOptions) -> tuple[LoadedModel, nn.Linear]:
    """The trunk of an AR (final norm gone) and its value head (float32).

    Raises:
        WeightsError: damaged, missing or non-finite weights, a head of the wrong shape, or a final norm that nobody
            accounts for.
    """
    config = load_config(directory, trust_remote_code=options.trust_remote_code)
    adapter = adapter_for(config)
    if faults := sidecar.config_faults(config):
        raise SidecarError("Sidecar and config.json disagree.", where=directory, faults=faults)
    index = WeightIndex.read(directory)
    norm_pattern = re.compile(rf"(^|\.){adapter.final_norm}\.weight$")
    norm_names = [n for n in index.tensors if norm_pattern.search(n) and ".layers." not in n]
    keep_norm = _keeps_norm(index, norm_names, sidecar)
    droppable = [r"(^|\.)lm_head\.", *([] if keep_norm else [norm_pattern.pattern])]
    may_miss = [] if norm_names else [norm_pattern.pattern]
    loaded = load_model(
        directory, AutoModel, config.get_text_config(), adapter, options, droppable=droppable, may_miss=may_miss
    )
    if not keep_norm:
        adapter.drop_final_norm(loaded.model)
    device = next(loaded.model.parameters()).device
    return loaded, load_head(directory, sidecar.d_model).to(device)


def _keeps_norm(index: WeightIndex, names: Sequence[str], sidecar: Sidecar) -> bool:
    if not names:
        if sidecar.final_norm_stripped is False:
            raise WeightsError(
                "This AR's head was trained behind its final norm (final_norm_stripped: false), but there is no norm.",
                where=index.directory,
                next_step="ask its author for the norm's weight, or for the right sidecar",
            )
        return False
    weight = read_tensor(index.tensors[names[0]].file, names[0]).float()
    if bool((weight == 1).all()):
        logger.info("%s: dropped a final norm of ones", index.directory)
        return False
    if sidecar.final_norm_stripped is None:
        raise WeightsError(
            "This AR holds a trained final norm, and nothing says whether its head was trained behind it.",
            where=index.directory,
            next_step="ask its author, then write `final_norm_stripped: true` (ignore the norm) or `false` into the sidecar",
        )
    return not sidecar.final_norm_stripped


def load_head(directory: Path, d_model: int) -> nn.Linear:
    """The value head of an AR: Linear(d, d) in float32, with a bias where the file has one."""
    path = directory / HEAD_NAME
    if not (path.is_symlink() or path.is_file()):
        raise WeightsError("This AR has no value head.", where=directory, expected=HEAD_NAME)
    tensors = read_header(inside(directory, HEAD_NAME))
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
            value = read_tensor(path, name)
            if not bool(torch.isfinite(value).all()):
                raise WeightsError(
                    f"This value head is broken: {int((~torch.isfinite(value)).sum())} of {value.numel()} values are NaN or "
                    "infinite.",
                    where=path,
                    next_step="ask its author to export it again; no reconstruction from it would mean anything",
                )
            cast(nn.Parameter, getattr(head, name)).copy_(value)
    return head.requires_grad_(False)
