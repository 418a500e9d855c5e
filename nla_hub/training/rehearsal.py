"""A rehearsal: the recipe with sizes cut, to see every stage run before anybody pays for it."""

from __future__ import annotations

import dataclasses
from typing import Any

from nla_hub.training.recipe import Recipe, RLSpec

STEPS = 2
"""Optimizer steps of each training stage."""

DOCUMENTS = 24
"""Documents of each stage, and of the evaluation."""

SOURCE = {"documents": 400, "tokenizer_documents": 2000}
"""A source that is trained here keeps its architecture; only its data shrink."""

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


def rehearsed(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with its sizes cut, and a sentence for each change. Nothing else is changed."""
    changes: list[str] = []

    def cut(spec: Any, path: str, **values: Any) -> Any:
        for name, value in values.items():
            old = getattr(spec, name)
            if old != value:
                changes.append(f"{path}.{name}: {old} -> {value}")
        return dataclasses.replace(spec, **values)

    parts: dict[str, Any] = {
        name: cut(getattr(recipe, name), name, documents=min(DOCUMENTS, getattr(recipe, name).documents))
        for name in ("ar", "av")
    }
    if recipe.rl is not None:
        parts["rl"] = cut(recipe.rl, "rl", **_rl_sizes(recipe.rl))
    parts["eval"] = cut(recipe.eval, "eval", documents=DOCUMENTS)
    if recipe.base.train is not None:
        parts["base"] = cut(recipe.base, "base", train={**recipe.base.train, **SOURCE})
    changes.append(f"steps of each training stage: at most {STEPS}")
    return dataclasses.replace(recipe, **parts), changes


def _rl_sizes(rl: RLSpec) -> dict[str, int]:
    """Small sizes that divide each other, as `RLSpec.faults` wants them."""
    sizes = {name: min(most, getattr(rl, name)) for name, most in RL.items()}
    samples = sizes["prompts"] * sizes["group"]
    sizes["updates"] = rl.updates if samples % rl.updates == 0 else 1
    part = samples // sizes["updates"]
    sizes["micro_batch"] = max(n for n in range(1, min(RL_MICRO_BATCH, rl.micro_batch) + 1) if part % n == 0)
    return sizes
