"""Recipes: everything a training run depends on, as strict data.

A recipe is a YAML file under `recipes/`. Unknown keys fail with a suggestion, all faults are listed at once, and the
resolved recipe is saved beside what it produced.
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
from nla_hub.sidecar import EXPLANATION_PLACEHOLDER, INJECTION_PLACEHOLDER


@dataclass(frozen=True)
class BaseSpec:
    """The model that is explained. `train` says how to make it from nothing (tiny world only); else it is loaded."""

    model: str
    revision: str | None = None
    train: dict[str, int | float] | None = None


@dataclass(frozen=True)
class PromptSpec:
    """The two templates: `av` holds {injection_char} once, `ar` holds {explanation} once."""

    av: str
    ar: str

    def faults(self) -> Iterator[str]:
        """Templates without their one placeholder."""
        for name, text, placeholder in (
            ("av", self.av, INJECTION_PLACEHOLDER),
            ("ar", self.ar, EXPLANATION_PLACEHOLDER),
        ):
            if text.count(placeholder) != 1:
                yield f"{name}: {placeholder} stands {text.count(placeholder)} times, expected once"


@dataclass(frozen=True)
class InjectionSpec:
    """How vectors enter the AV. `scale` "p75" is the 75th percentile of the raw norms of the training vectors."""

    kind: Literal["overwrite", "add"] = "overwrite"
    scale: float | Literal["p75"] = "p75"

    def faults(self) -> Iterator[str]:
        """A scale that is no length."""
        if not isinstance(self.scale, str) and not self.scale > 0:
            yield f"scale: got {self.scale}, expected a positive number or p75"


@dataclass(frozen=True)
class DataSpec:
    """Which tokens are captured: `positions` distinct ones a document, at or after `min_position`, none special."""

    corpus: str
    positions: int = 8
    min_position: int = 10

    def faults(self) -> Iterator[str]:
        """Counts out of range."""
        if self.positions < 1:
            yield f"positions: got {self.positions}, expected 1 or more"
        if self.min_position < 0:
            yield f"min_position: got {self.min_position}, expected 0 or more"


@dataclass(frozen=True)
class LabelSpec:
    """Who writes the warm-start labels; `clauses` restricts the tiny world's labels to some of their clauses."""

    labeler: str
    clauses: tuple[str, ...] | None = None


@dataclass(frozen=True)
class StageSpec:
    """One supervised stage: AdamW, linear warm-up, cosine decay to `final_lr` times the peak.

    `documents` are drawn for this stage alone; a batch has `batch_size` rows over all processes together.
    """

    documents: int
    lr: float
    batch_size: int = 64
    epochs: int = 1
    warmup: float = 0.05
    final_lr: float = 0.05
    weight_decay: float = 0.01
    beta2: float = 0.95
    clip: float = 1.0

    def faults(self) -> Iterator[str]:
        """Numbers that no training can use."""
        for name in ("documents", "lr", "batch_size", "epochs", "clip"):
            if not getattr(self, name) > 0:
                yield f"{name}: got {getattr(self, name)}, expected a value above 0"
        for name in ("warmup", "final_lr", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}: got {getattr(self, name)}, expected 0 or more and less than 1"


@dataclass(frozen=True)
class EvalSpec:
    """How the finished pair is measured; `documents` other than None departs from the protocol (a rehearsal)."""

    protocol: str
    documents: int | None = None


@dataclass(frozen=True)
class ExportSpec:
    """How the finished pair is stored. The value head of an AR is always float32 in training."""

    dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"
    head_dtype: Literal["float16", "bfloat16", "float32"] = "float32"


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe."""

    name: str
    summary: str
    base: BaseSpec
    layer: int
    marker: str
    prompts: PromptSpec
    data: DataSpec
    labels: LabelSpec
    ar: StageSpec
    av: StageSpec
    eval: EvalSpec
    injection: InjectionSpec = field(default_factory=InjectionSpec)
    export: ExportSpec = field(default_factory=ExportSpec)
    seed: int = 0

    def faults(self) -> Iterator[str]:
        """A layer or marker that cannot be."""
        if self.layer < 0:
            yield f"layer: got {self.layer}, expected 0 or more"
        if len(self.marker) != 1:
            yield f"marker: got {self.marker!r}, expected one character"

    def to_mapping(self) -> dict[str, Any]:
        """The recipe as plain data, as it is saved."""
        return schema.to_mapping(self)

    def digest(self) -> str:
        """Eight hexadecimal digits that change with any setting."""
        text = json.dumps(self.to_mapping(), sort_keys=True, ensure_ascii=False)
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
