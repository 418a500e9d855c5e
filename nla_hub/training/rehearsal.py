"""A rehearsal: the recipe with sizes cut, to see every stage run before anybody pays for it."""

from __future__ import annotations

import dataclasses
from typing import Any

from nla_hub.training.recipe import Recipe

STEPS = 2
"""Optimizer steps of each supervised stage."""

DOCUMENTS = 24
"""Documents of each stage, and of the evaluation."""

SOURCE = {"documents": 400, "tokenizer_documents": 2000}
"""A source that is trained here keeps its architecture; only its data shrink."""


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
    parts["eval"] = cut(recipe.eval, "eval", documents=DOCUMENTS)
    if recipe.base.train is not None:
        parts["base"] = cut(recipe.base, "base", train={**recipe.base.train, **SOURCE})
    changes.append(f"steps of each supervised stage: at most {STEPS}")
    return dataclasses.replace(recipe, **parts), changes
