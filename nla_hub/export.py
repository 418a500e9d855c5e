"""Verified weights -> directories, in the layout of the released pairs."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn

from nla_hub.adapters import Adapter, adapter_for
from nla_hub.errors import RunError, WeightsError
from nla_hub.sidecar import SIDECAR_NAME, Sidecar
from nla_hub.weights import HEAD_NAME, WEIGHTS_NAME, matches, require_finite_weights


def save_av(directory: Path, model: Any, tokenizer: Any, sidecar: Sidecar, *, dtype: torch.dtype) -> None:
    """Write an AV in the layout of the released ones: a complete causal LM, tokenizer, sidecar."""
    _save_model(directory, model, tokenizer, dtype)
    _write_sidecar(directory, sidecar)


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
    _write_sidecar(directory, sidecar)


def save_source(directory: Path, model: Any, tokenizer: Any, *, dtype: torch.dtype) -> None:
    """Write a base model: a complete causal LM with its tokenizer, no sidecar."""
    _save_model(directory, model, tokenizer, dtype)


def _save_model(directory: Path, model: Any, tokenizer: Any, dtype: torch.dtype) -> None:
    require_finite_weights(model, type(model).__name__)
    adapter = adapter_for(model.config)
    state = model.state_dict()
    config = model.config
    if getattr(config, "tie_word_embeddings", False):
        tied, apart = _tied_heads(model, adapter, state)
        state = {name: value for name, value in state.items() if name not in tied}
        if apart:
            # Where a file holds another head than the embedding, transformers keeps both, whatever the config says. Others
            # (vLLM) believe the config, so it must not go on calling them one.
            config = copy.deepcopy(config)
            config.tie_word_embeddings = False
    _save_state(directory, {adapter.stored_name(name): value for name, value in state.items()}, dtype)
    # transformers finds the class by itself; others (vLLM) take the first that goes by the config's type without this.
    _save_config(directory, config, dtype, architecture=type(model).__name__)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _tied_heads(model: Any, adapter: Adapter, state: dict[str, Tensor]) -> tuple[set[str], set[str]]:
    """Names of the lm_head's weights that are the input embedding once more, and of those that are something else."""
    embedding = adapter.embedding_module(model).weight
    assert isinstance(embedding, Tensor)
    heads = {name for name in state if matches(name, adapter.lm_head_weights)}
    tied = {name for name in heads if _same(state[name], embedding)}
    return tied, heads - tied


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(one.to(other.device), other)


def _save_config(directory: Path, config: Any, dtype: torch.dtype, *, architecture: str | None = None) -> None:
    config = copy.deepcopy(config)
    config.dtype = dtype
    if architecture is not None:
        config.architectures = [architecture]
    config.save_pretrained(directory)


def _save_state(directory: Path, state: dict[str, Tensor], dtype: torch.dtype, name: str = WEIGHTS_NAME) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    stored = {key: value.detach().to("cpu", dtype).contiguous() for key, value in state.items()}
    for key, value in stored.items():
        if not bool(torch.isfinite(value).all()):
            raise WeightsError(f"{key} does not fit into {str(dtype).removeprefix('torch.')}.", where=directory)
    try:
        save_torch_state_dict(stored, directory, filename_pattern=name.replace(".safetensors", "{suffix}.safetensors"))
    except SafetensorError as cause:  # its own form of an OSError
        raise RunError(
            f"The weights cannot be written: {cause}",
            where=directory / name,
            next_step="make room, then run the same command again",
        ) from cause
    _as_ordinary(*directory.glob(f"{name.removesuffix('.safetensors')}*.safetensors"))


def _write_sidecar(directory: Path, sidecar: Sidecar) -> None:
    sidecar.write(directory)
    _as_ordinary(directory / SIDECAR_NAME)


def _as_ordinary(*files: Path) -> None:
    """Give files the permissions that any new file gets there; safetensors makes its own readable for their owner alone.

    A new file is asked, because the umask cannot be read without being changed for all threads.
    """
    probe = files[0].parent / f".mode-{os.getpid()}"
    descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        mode = os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        probe.unlink()
    for file in files:
        file.chmod(mode)
