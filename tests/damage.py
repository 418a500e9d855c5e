"""Ways to damage a copied pair, and what its refusal must say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from nla_hub import NLA
from nla_hub.errors import NLAError, WeightsError
from nla_hub.sidecar import Sidecar
from nla_hub.testing import RandomPair

WEIGHTS = "model.safetensors"
HEAD = "value_head.safetensors"
HALVES = ("av", "ar", "source")


def load(pair: RandomPair, half: str) -> Any:
    """Load one part of a pair as a user would."""
    if half == "source":
        return NLA.from_pretrained(pair.root, components=("ar",)).capture("the cat")
    return NLA.from_pretrained(pair.root, components=(half,))  # type: ignore[arg-type]


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def shard(directory: Path) -> list[Path]:
    """Split the weights of a directory into several files with an index."""
    state = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    save_torch_state_dict(state, directory, max_shard_size="60KB")
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 2
    return shards


def edit_index(directory: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    change(index["weight_map"])
    path.write_text(json.dumps(index), encoding="utf-8")


def refused(pair: RandomPair, half: str, *words: str, error: type[NLAError] = WeightsError) -> str:
    """Loading a half raises `error`; its message holds the directory's name, `words`, and a next step or what is expected."""
    with pytest.raises(error) as caught:
        load(pair, half)
    text = str(caught.value)
    assert type(caught.value) is error, text
    for word in (*words, f"/{half}"):
        assert word in text, f"{word!r} is not in: {text}"
    assert "Next: " in text or caught.value.expected or caught.value.faults, text
    assert len(text) < 2500
    return text


def residecar(directory: Path, **changes: Any) -> None:
    """Change some fields of a written sidecar."""
    Sidecar.read(directory).with_(**changes).write(directory)
