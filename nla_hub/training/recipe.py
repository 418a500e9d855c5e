"""Recipes: everything a training run depends on, as strict data.

A recipe is a YAML file under `recipes/`. Unknown keys fail with a suggestion, all faults are listed at once, and the
resolved recipe is saved beside what it produced. Its sections are documented in `specs.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nla_hub import resources, schema, yaml_io
from nla_hub.errors import RecipeError, UnknownNameError
from nla_hub.locate import expand
from nla_hub.sidecar import Site
from nla_hub.training.specs import (
    BaseSpec,
    CorpusPart,
    DataSpec,
    EvalSpec,
    ExportSpec,
    HardwareSpec,
    InjectionSpec,
    LabelSpec,
    LoRASpec,
    PlacementSpec,
    PromptSpec,
    RewardSpec,
    RLSpec,
    RolloutSpec,
    StageSpec,
)

__all__ = [
    "BaseSpec",
    "CorpusPart",
    "DataSpec",
    "EvalSpec",
    "ExportSpec",
    "HardwareSpec",
    "InjectionSpec",
    "LabelSpec",
    "LoRASpec",
    "PlacementSpec",
    "PromptSpec",
    "RLSpec",
    "Recipe",
    "RewardSpec",
    "RolloutSpec",
    "StageSpec",
    "digest_of",
    "load_recipe",
    "parse_recipe",
    "recipe_names",
    "recipe_path",
]

TWO_THIRDS = "two-thirds"
"""The depth at which the released pairs read their models (20 of 28, 32 of 48, 41 of 62, 53 of 80 blocks)."""

AUTO = "auto"
"""A marker that is chosen for the tokenizer: one character, one token, rare."""


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        layer: K, or "two-thirds" of the blocks, rounded down.
        marker: one character, or "auto"; see `marker.py`.
        lora: train low-rank factors on the frozen base in every stage: rl goes on with those of av and ar, and both halves
            are merged into the base when they are exported. None: full weights (or `rl.lora` in the rl stage alone).
        precision: of sums in the models under training: "float32", or "bf16" under float32 weights (autocast, or FSDP2's own
            casting).
        hardware: what it is written for.
    """

    name: str
    summary: str
    base: BaseSpec
    layer: int | Literal["two-thirds"]
    marker: str
    prompts: PromptSpec
    data: DataSpec
    labels: LabelSpec
    ar: StageSpec
    av: StageSpec
    eval: EvalSpec
    rl: RLSpec | None = None
    injection: InjectionSpec = field(default_factory=InjectionSpec)
    export: ExportSpec = field(default_factory=ExportSpec)
    hardware: HardwareSpec = field(default_factory=HardwareSpec)
    lora: LoRASpec | None = None
    precision: Literal["float32", "bf16"] = "float32"
    seed: int = 0

    def faults(self) -> Iterator[str]:
        """A layer or marker that cannot be, sections that contradict each other."""
        if not isinstance(self.layer, str) and self.layer < 0:
            yield f"layer: got {self.layer}, expected 0 or more, or {TWO_THIRDS}"
        if self.marker != AUTO and len(self.marker) != 1:
            yield f"marker: got {self.marker!r}, expected one character, or {AUTO}"
        if self.base.quantization is not None and self.lora is None:
            yield "base.quantization: only frozen weights can be packed; it needs a lora section"
        if self.base.quantization is not None and self.rl is not None and self.rl.rollouts.engine == "vllm":
            yield "rl.rollouts.engine: vllm cannot take over packed weights; use transformers, or no base.quantization"
        if self.base.quantization is not None and "sharded" in (self.hardware.placement.av, self.hardware.placement.ar):
            yield "hardware.placement: packed weights cannot be sharded; use each, or no base.quantization"
        if self.lora is not None and self.rl is not None and self.rl.lora is not None:
            yield "rl.lora: the factors of lora are trained in the rl stage already; leave one of the two out"

    @property
    def site(self) -> Site:
        """Where vectors are read; for a recipe whose layer is a number (`resolve.resolved` makes it one)."""
        assert not isinstance(self.layer, str)
        return Site(self.layer)

    def to_mapping(self) -> dict[str, Any]:
        """The recipe as plain data, as it is saved.

        `rl.export_every` is left out where it asks for nothing: runs of before that setting keep their hash and go on.
        """
        found = schema.to_mapping(self)
        if self.rl is not None and self.rl.export_every is None:
            del found["rl"]["export_every"]
        return found

    def digest(self) -> str:
        """Eight hexadecimal digits that change with any setting."""
        return digest_of(self.to_mapping())


def digest_of(mapping: dict[str, Any]) -> str:
    """The digest of a recipe's mapping as it was saved, also by a version that knew fewer settings."""
    text = json.dumps(mapping, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in resources.data_directory("recipes").glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe: itself where the name ends in .yaml, a packaged one otherwise.

    Raises:
        RecipeError: no such file. UnknownNameError: no such packaged recipe.
    """
    if name.endswith((".yaml", ".yml")):
        path = expand(name)
        if not path.is_file():
            raise RecipeError(
                "There is no such recipe file.", where=name, next_step="nla-hub recipes ls shows the packaged ones"
            )
        return path
    if name not in recipe_names():
        hint = f"For the file of that name write {name}.yaml" if Path(f"{name}.yaml").is_file() else None
        raise UnknownNameError("recipe", name, recipe_names(), next_step=hint)
    return resources.data_directory("recipes") / f"{name}.yaml"


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key.sub=value` overrides.

    Raises:
        RecipeError: all faults at once. UnknownNameError: no such recipe.
    """
    path = recipe_path(name)
    raw = schema.apply_overrides(yaml_io.read(path, error=RecipeError), overrides)
    return parse_recipe(raw, where=path)


def parse_recipe(raw: dict[str, Any], *, where: object = "recipe") -> Recipe:
    """A recipe from its mapping; raises a RecipeError with all faults."""
    return schema.from_mapping(
        Recipe, raw, where=where, next_step="nla-hub recipes show tiny prints a complete example"
    )
