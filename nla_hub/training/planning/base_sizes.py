"""A base model's sizes from its config alone: every weight by name and shape, counted on PyTorch's meta device.

What a plan knows without the network: recipes for known bases tell their config (`base.config`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nla_hub.adapters import Adapter, adapter_for
from nla_hub.architecture import Architecture
from nla_hub.errors import RecipeError
from nla_hub.memory import Header, Part, PartSize, Quantization, part_size
from nla_hub.sidecar import Site
from nla_hub.training.checks import source_settings
from nla_hub.training.planning.memory_roles import FLOAT32
from nla_hub.training.recipe import TWO_THIRDS, LoRASpec, Recipe
from nla_hub.training.resolve import text_config, two_thirds


def base_config(recipe: Recipe, *, vocabulary: int = 1024) -> Any:
    """The config of a recipe's base model: the one that the recipe tells, else its config.json, which may be downloaded.

    Args:
        vocabulary: of a source that is trained from nothing, whose tokenizer does not exist yet.

    Raises:
        RecipeError, CheckpointError, HubError and their children.
    """
    if recipe.base.train is not None:
        settings = source_settings(recipe)
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.mlp_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=settings.max_length,
            tie_word_embeddings=True,
        )
    return text_config(recipe)


def header_of(config: Any) -> Header:
    """The tensors of a causal LM as if it were stored in float32, from its config alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: (tuple(value.shape), "F32") for name, value in model.named_parameters()}


@dataclass(frozen=True)
class Sizes:
    """What a base model's config says about sizes, whatever recipe it is trained by.

    Attributes:
        header: every weight of the complete model.
        layer: K.
    """

    config: Any
    adapter: Adapter
    header: Header
    layer: int

    @classmethod
    def of(cls, recipe: Recipe, config: Any | None = None) -> Sizes:
        """Of a recipe's base model; raises what `base_config` raises, and a RecipeError for a layer that it lacks."""
        config = base_config(recipe) if config is None else config
        blocks = int(config.num_hidden_layers)
        layer = two_thirds(blocks) if recipe.layer == TWO_THIRDS else int(recipe.layer)
        if layer >= blocks:
            raise RecipeError("The base model has no such layer.", got=f"layer {layer}", expected=f"below {blocks}")
        return cls(config, adapter_for(config), header_of(config), layer)

    @cached_property
    def whole(self) -> Architecture:
        """The complete model's sizes."""
        return Architecture.of(self.config)

    @property
    def limit(self) -> int | None:
        """Tokens that the base model reads."""
        return int(getattr(self.config, "max_position_embeddings", 0) or 0) or None

    @cached_property
    def _found(self) -> dict[Any, PartSize]:
        return {}

    def size(self, name: Part, dtype: torch.dtype, quantization: Quantization | None = None) -> PartSize:
        """The complete model ("av") or its trunk up to block K ("source")."""
        key = name, dtype, quantization
        if key not in self._found:
            read: dict[str, Any] = {"site": Site(self.layer), "on_cpu": False, "quantization": quantization}
            self._found[key] = part_size(name, self.header, self.config, self.adapter, dtype=dtype, **read)
        return self._found[key]

    @cached_property
    def av_values(self) -> int:
        """Values of the AV."""
        return self.size("av", torch.float32).loaded // FLOAT32

    @cached_property
    def trunk(self) -> PartSize:
        """Blocks 0 to K in float32."""
        return self.size("source", torch.float32)

    @property
    def trunk_values(self) -> int:
        """Values of blocks 0 to K and the embedding."""
        return self.trunk.loaded // FLOAT32

    @property
    def ar_values(self) -> int:
        """Values of the AR, its value head included."""
        return self.trunk_values + self.whole.d_model**2

    @cached_property
    def linear(self) -> Mapping[str, tuple[int, int]]:
        """Linear layers of all blocks: name -> (outputs, inputs)."""
        inside = f".{self.adapter.blocks}."
        return {n: (s[0], s[1]) for n, (s, _) in self.header.items() if len(s) == 2 and inside in f".{n}"}

    @cached_property
    def blocks(self) -> dict[int, int]:
        """Values of each block."""
        found: dict[int, int] = {}
        for name, (shape, _) in self.header.items():
            if (number := self.block_of(name)) is not None:
                found[number] = found.get(number, 0) + math.prod(shape)
        return found

    @cached_property
    def norms(self) -> int:
        """Norms of block 0 that are as wide as the residual stream."""
        d = self.whole.d_model
        own = [s for n, (s, _) in self.header.items() if self.block_of(n) == 0 and "norm" in n]
        return sum(shape == (d,) for shape in own) or 2

    def block_of(self, name: str) -> int | None:
        """The number of the block that a weight is in, None outside blocks."""
        _, inside, rest = f".{name}".partition(f".{self.adapter.blocks}.")
        number = rest.split(".")[0]
        return int(number) if inside and number.isdigit() else None


def lora_values(spec: LoRASpec, linear: Mapping[str, tuple[int, int]]) -> int:
    """Values in the factors of LoRAs on the blocks' linear layers: r (in + out) each."""
    return sum(spec.r * (a + b) for name, (a, b) in linear.items() if is_adapted(spec, name))


def is_adapted(spec: LoRASpec, name: str) -> bool:
    """Whether a linear layer of a block carries factors, as peft decides it."""
    if spec.targets == "all-linear":
        return True
    names = (spec.targets,) if isinstance(spec.targets, str) else spec.targets
    module = name.removesuffix(".weight")
    return any(module == n or module.endswith(f".{n}") for n in names)
