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
    """Who writes the warm-start labels.

    The tiny world's labels can be made to tell only part of what is known: `clauses` keeps some kinds of clauses, `share`
    keeps each clause of each label with this probability.
    """

    labeler: str
    clauses: tuple[str, ...] | None = None
    share: float | None = None

    def faults(self) -> Iterator[str]:
        """A share that is none."""
        if self.share is not None and not 0 < self.share <= 1:
            yield f"share: got {self.share}, expected more than 0 and at most 1"


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
class RewardSpec:
    """What an explanation is paid, before the group's mean is taken off.

    `kind` is minus the direction mse of the live AR (the released code's default) or minus its logarithm (the paper's);
    anything but a usable explanation gets the value of an orthogonal vector. `length_penalty` is taken off for every new
    token, `repetition_penalty` times the share of word pairs that stand there a second time. `contrastive` pays the
    log-probability, at `contrastive_temperature`, of this explanation against those of other vectors for this vector.
    """

    kind: Literal["neg_mse", "neg_log_mse"] = "neg_mse"
    length_penalty: float = 0.0
    repetition_penalty: float = 0.0
    contrastive: float = 0.0
    contrastive_temperature: float = 0.1

    def faults(self) -> Iterator[str]:
        """Weights below zero."""
        for name in ("length_penalty", "repetition_penalty", "contrastive"):
            if not getattr(self, name) >= 0:
                yield f"{name}: got {getattr(self, name)}, expected 0 or more"
        if not self.contrastive_temperature > 0:
            yield f"contrastive_temperature: got {self.contrastive_temperature}, expected a value above 0"


@dataclass(frozen=True)
class LoRASpec:
    """Low-rank adapters instead of full weights for the AV; `targets` as peft's `target_modules`."""

    r: int = 64
    alpha: int = 128
    targets: str | tuple[str, ...] = "all-linear"

    def faults(self) -> Iterator[str]:
        """Ranks that are none, and the one module that the log-probabilities go around."""
        for name in ("r", "alpha"):
            if getattr(self, name) < 1:
                yield f"{name}: got {getattr(self, name)}, expected 1 or more"
        if not self.targets:
            yield "targets: got none, expected all-linear or names of modules"
        if "lm_head" in self.targets:
            yield "targets: lm_head cannot carry an adapter, its log-probabilities are computed from the weight itself"


@dataclass(frozen=True)
class RLSpec:
    """The joint stage: the AV by GRPO with the live AR's error as reward, the AR by regression on the same samples.

    A step is one generation of `prompts` x `group` samples followed by `updates` x `iterations` optimizer steps of the AV
    (1 x 1: strictly on-policy) and one of the AR. Both learning rates rise linearly over `warmup` steps and fall on a
    cosine to `final_lr` times the peak (1: constant).

    Attributes:
        documents: drawn for this stage alone; each gives `data.positions` vectors, each used once before any is again.
        beta: coefficient of the KL divergence to the AV that the stage started from.
        micro_batch: sequences a forward pass of one process.
        rollout_block: rows that the sampler runs together; part of the result, because sums depend on the batch.
        ar_warmup: first steps in which only the AR learns, from samples of the AV as it is.
        label_share: label rows that the AR sees beside its samples, as a share of them.
        watch_ar: train a second AR on the same samples that never pays anything, to see whether the first is being gamed.
        evaluate_every, evaluate_rows: the greedy measurement on held-out rows of the training stream.
        precision_drop: stop once the facts' mean precision on these rows has fallen this far below its best (tiny world).
        checkpoint_every: steps between checkpoints that a killed run continues from.
    """

    documents: int
    steps: int
    lr: float
    ar_lr: float
    prompts: int = 64
    group: int = 8
    beta: float = 0.01
    temperature: float = 1.0
    max_new_tokens: int = 150
    updates: int = 1
    iterations: int = 1
    micro_batch: int = 64
    rollout_block: int = 256
    loss: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    warmup: int = 0
    final_lr: float = 1.0
    weight_decay: float = 0.0
    beta2: float = 0.95
    clip: float = 1.0
    ar_warmup: int = 0
    label_share: float = 0.0
    watch_ar: bool = True
    evaluate_every: int = 10
    evaluate_rows: int = 400
    precision_drop: float | None = None
    checkpoint_every: int = 10
    gradient_checkpointing: bool = False
    reward: RewardSpec = field(default_factory=RewardSpec)
    lora: LoRASpec | None = None

    @property
    def samples(self) -> int:
        """Samples of a step, over all processes."""
        return self.prompts * self.group

    @property
    def per_step(self) -> int:
        """Optimizer steps of the AV in a step."""
        return self.updates * self.iterations

    def sharing_fault(self, world: int = 1) -> str | None:
        """Why `world` processes cannot share a step's samples, None where they can."""
        share = self.micro_batch * self.updates * world
        if self.samples % share == 0:
            return None
        return (
            f"micro_batch: prompts x group = {self.samples} samples are no multiple of micro_batch x updates x processes = "
            f"{self.micro_batch} x {self.updates} x {world}"
        )

    def faults(self) -> Iterator[str]:
        """Numbers that no training can use, and sizes that do not divide each other."""
        positive = ("documents", "steps", "prompts", "temperature", "max_new_tokens", "updates", "iterations",
                    "micro_batch", "rollout_block", "clip", "evaluate_every", "evaluate_rows", "checkpoint_every")  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:
                yield f"{name}: got {getattr(self, name)}, expected a value above 0"
        for name in ("lr", "ar_lr", "beta", "warmup", "weight_decay", "ar_warmup", "label_share"):
            if not getattr(self, name) >= 0:
                yield f"{name}: got {getattr(self, name)}, expected 0 or more"
        if self.group < 2:
            yield f"group: got {self.group}, expected 2 or more: advantages are differences within a group"
        if self.evaluate_rows == 1:
            yield "evaluate_rows: got 1, expected 2 or more: a variance is measured on them"
        if self.precision_drop is not None and not self.precision_drop >= 0:
            yield f"precision_drop: got {self.precision_drop}, expected 0 or more"
        if not 0 <= self.beta2 < 1:
            yield f"beta2: got {self.beta2}, expected 0 or more and less than 1"
        if not 0 <= self.final_lr <= 1:
            yield f"final_lr: got {self.final_lr}, expected 0 to 1"
        if self.updates > 0 and self.micro_batch > 0 and (fault := self.sharing_fault()):
            yield fault


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
    rl: RLSpec | None = None
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
