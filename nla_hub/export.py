"""Verified weights -> directories, in the layout of the released pairs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from nla_hub.adapters import adapter_for
from nla_hub.errors import WeightsError
from nla_hub.sidecar import Sidecar
from nla_hub.weights import HEAD_NAME, WEIGHTS_NAME, matches, require_finite_weights


def save_av(directory: Path, model: Any, tokenizer: Any, sidecar: Sidecar, *, dtype: torch.dtype) -> None:
    """Write an AV in the layout of the released ones: a complete causal LM, tokenizer, sidecar."""
    _save_model(directory, model, tokenizer, dtype)
    sidecar.write(directory)


def save_ar(
    directory: Path,
    model: Any,
    head: nn.Linear,
    tokenizer: Any,
    sidecar: Sidecar,
    *,
    dtype: torch.dtype,
    head_dtype: torch.dtype = torch.float32,
) -> None:
    """Write an AR in the layout of the released ones: trunk without final norm and lm_head, value head, sidecar.

    `model` is the trunk (see `load_ar`); weight names get the causal LM's prefix, as released ones have it.
    """
    require_finite_weights(model, type(model).__name__)
    require_finite_weights(head, "value head")
    prefix = adapter_for(model.config).causal_prefix
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    _save_state(directory, state, dtype)
    _save_config(directory, model.config, dtype)
    _save_state(directory, dict(head.state_dict()), head_dtype, HEAD_NAME)
    tokenizer.save_pretrained(directory)
    sidecar.write(directory)


def save_source(directory: Path, model: Any, tokenizer: Any, *, dtype: torch.dtype) -> None:
    """Write a base model: a complete causal LM with its tokenizer, no sidecar."""
    _save_model(directory, model, tokenizer, dtype)


def _save_model(directory: Path, model: Any, tokenizer: Any, dtype: torch.dtype) -> None:
    require_finite_weights(model, type(model).__name__)
    adapter = adapter_for(model.config)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    state = {
        adapter.stored_name(name): value
        for name, value in model.state_dict().items()
        if not (tied and matches(name, adapter.lm_head_weights))
    }
    _save_state(directory, state, dtype)
    _save_config(directory, model.config, dtype)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _save_config(directory: Path, config: Any, dtype: torch.dtype) -> None:
    config = copy.deepcopy(config)
    config.dtype = dtype
    config.save_pretrained(directory)


def _save_state(directory: Path, state: dict[str, Tensor], dtype: torch.dtype, name: str = WEIGHTS_NAME) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    stored = {key: value.detach().to("cpu", dtype).contiguous() for key, value in state.items()}
    for key, value in stored.items():
        if not bool(torch.isfinite(value).all()):
            raise WeightsError(f"{key} does not fit into {str(dtype).removeprefix('torch.')}.", where=directory)
    save_torch_state_dict(stored, directory, filename_pattern=name.replace(".safetensors", "{suffix}.safetensors"))
