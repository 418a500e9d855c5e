"""A rehearsal: the recipe with sizes cut, to see every stage run before anybody pays for it.

Besides sizes only what a machine may lack is replaced: the base model and its tokenizer (by a tiny random model of the same
architecture), corpus and labeler (by the tiny world's), ranks, quantisation, precision and the rollout engine. Each change is
said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from nla_hub.locate import zoo_ref
from nla_hub.training.checks import TINY_WORLD
from nla_hub.training.recipe import DataSpec, HardwareSpec, LabelSpec, Recipe, RLSpec, RolloutSpec

STEPS = 2
"""Optimizer steps of each training stage."""

DOCUMENTS = 24
"""Documents of each stage, and of the evaluation."""

SOURCE = {"documents": 400, "tokenizer_documents": 2000}
"""A source that is trained here keeps its architecture; only its data shrink."""

POSITIONS = 8
"""Most positions a document."""

BATCH = 64
"""Most rows a batch of the supervised stages: `DOCUMENTS` give two batches and more."""

MICRO_BATCH = 32
"""Most of them a forward pass."""

RANK = 8
"""Most rank of LoRA factors."""

RL = {
    "documents": DOCUMENTS,
    "steps": STEPS,
    "prompts": 4,
    "group": 4,
    "max_new_tokens": 32,
    "ar_warmup": 1,
    "evaluate_every": 1,
    "evaluate_rows": 16,
    "checkpoint_every": 1,
}
"""Most of everything in the rl stage."""

RL_MICRO_BATCH = 2
"""Most sequences a forward pass of the rl stage: the samples of a step are a multiple of it for up to eight processes."""


class _Changes:
    """Replaces fields of a recipe's sections and keeps a sentence for each."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def make(self, spec: Any, path: str, **values: Any) -> Any:
        for name, value in values.items():
            old = getattr(spec, name)
            if old != value:
                self.said.append(f"{path}{name}: {_short(old)} -> {_short(value)}")
        return dataclasses.replace(spec, **values)


def rehearsed(recipe: Recipe, *, world: int = 1) -> tuple[Recipe, list[str]]:
    """The recipe with its sizes cut for `world` processes, and a sentence for each change. Nothing else is changed.

    Raises:
        CheckpointError, HubError and their children: a base without `base.config` that cannot be read.
    """
    changes = _Changes()
    parts: dict[str, Any] = {
        name: changes.make(getattr(recipe, name), f"{name}.", **_stage_sizes(getattr(recipe, name)))
        for name in ("ar", "av")
    }
    parts["data"] = changes.make(recipe.data, "data.", positions=min(POSITIONS, recipe.data.positions))
    if recipe.rl is not None:
        parts["rl"] = changes.make(recipe.rl, "rl.", **_rl_sizes(recipe.rl))
    if recipe.lora is not None:
        parts["lora"] = changes.make(recipe.lora, "lora.", r=min(RANK, recipe.lora.r))
    parts["eval"] = changes.make(recipe.eval, "eval.", documents=DOCUMENTS)
    if recipe.base.train is not None:
        parts["base"] = changes.make(recipe.base, "base.", train={**recipe.base.train, **SOURCE})
    cut = dataclasses.replace(recipe, **parts)
    cut = _with_stand_ins(cut, changes)
    cut = _for_this_machine(cut, changes, world)
    changes.said.append(f"steps of each training stage: at most {STEPS}")
    return cut, changes.said


def _stage_sizes(spec: Any) -> dict[str, Any]:
    return {
        "documents": min(DOCUMENTS, spec.documents),
        "batch_size": min(BATCH, spec.batch_size),
        "micro_batch": None if spec.micro_batch is None else min(MICRO_BATCH, spec.micro_batch),
    }


def _with_stand_ins(recipe: Recipe, changes: _Changes) -> Recipe:
    """Base model, corpus and labeler that are somewhere else, replaced by ones that are here."""
    from nla_hub.testing.random_models import MARKER
    from nla_hub.training.family import BLOCKS
    from nla_hub.training.stand_in import stand_in_config

    parts: dict[str, Any] = {}
    if recipe.base.train is None and not _is_here(recipe):
        config = stand_in_config(recipe)
        parts["base"] = changes.make(recipe.base, "base.", config=None, stand_in=config)
        parts |= _as_top(recipe, changes, layer=_same_depth(recipe, BLOCKS), marker=MARKER)
    if recipe.data.mix:
        data: DataSpec = changes.make(recipe.data, "data.", corpus=TINY_WORLD, mix=(), max_tokens=None)
        parts["data"] = data
        parts |= _as_top(recipe, changes, labels=LabelSpec("tiny"))
    return dataclasses.replace(recipe, **parts)


def _as_top(recipe: Recipe, changes: _Changes, **values: Any) -> dict[str, Any]:
    changed = changes.make(recipe, "", **values)
    return {name: getattr(changed, name) for name in values}


def _is_here(recipe: Recipe) -> bool:
    """Whether the base model is part of this package or a directory: small, or wanted as it is."""
    return recipe.base.model is not None and zoo_ref(recipe.base.model).kind != "hub"


def _same_depth(recipe: Recipe, blocks: int) -> int:
    """K of the stand-in: the same share of its depth, with a block above it."""
    whole = (recipe.base.config or {}).get("num_hidden_layers")
    share = 2 / 3 if isinstance(recipe.layer, str) or not whole else recipe.layer / int(whole)
    return max(0, min(blocks - 2, int(share * blocks)))


def _for_this_machine(recipe: Recipe, changes: _Changes, world: int) -> Recipe:
    """Ranks, precision, quantisation and rollout engine that are not here."""
    accelerated = torch.accelerator.is_available()
    parts: dict[str, Any] = {}
    if recipe.hardware.world != world:
        parts["hardware"] = changes.make(recipe.hardware, "hardware.", gpus=world, nodes=1)
    if not accelerated and recipe.precision != "float32":
        parts |= _as_top(recipe, changes, precision="float32")
    whole: dict[str, Any] = {"av": "each", "ar": "each", "optimizers": "device"} if world == 1 else {}
    here: dict[str, Any] = {} if accelerated else {"source": "each", "optimizers": "device"}
    hardware: HardwareSpec = parts.get("hardware", recipe.hardware)
    placement = changes.make(hardware.placement, "hardware.placement.", **whole | here)
    parts["hardware"] = dataclasses.replace(hardware, placement=placement)
    if recipe.base.quantization is not None and not (accelerated and find_spec("bitsandbytes")):
        parts["base"] = changes.make(recipe.base, "base.", quantization=None)
    if recipe.rl is not None and recipe.rl.rollouts.engine == "vllm" and not (accelerated and find_spec("vllm")):
        parts["rl"] = changes.make(recipe.rl, "rl.", rollouts=RolloutSpec())
    return dataclasses.replace(recipe, **parts)


def _rl_sizes(rl: RLSpec) -> dict[str, int]:
    """Small sizes that divide each other, as `RLSpec.faults` wants them."""
    sizes = {name: min(most, getattr(rl, name)) for name, most in RL.items()}
    samples = sizes["prompts"] * sizes["group"]
    if rl.export_every is not None:
        sizes["export_every"] = 1
    sizes["updates"] = rl.updates if samples % rl.updates == 0 else 1
    part = samples // sizes["updates"]
    sizes["micro_batch"] = max(n for n in range(1, min(RL_MICRO_BATCH, rl.micro_batch) + 1) if part % n == 0)
    return sizes


def _short(value: Any) -> str:
    """A section as its fields, a list by its length."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ", ".join(f"{f.name} {_short(getattr(value, f.name))}" for f in dataclasses.fields(value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{len(value)} parts"
    return str(value)
