"""The names and the order of the stages of a run, and who is told about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from nla_hub.errors import InputError
from nla_hub.training.recipe import Recipe

STAGES = ("source", "data", "ar", "av", "rl", "export", "eval")
"""All stages there are; `stages_of` says which a recipe has."""

IN_ALL_PROCESSES = frozenset({"data", "ar", "av", "rl"})
"""Stages that every process works on; the others are the main process's own while the rest wait."""


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """The stages of a recipe, in order: `rl` only where it has an rl section."""
    return tuple(name for name in STAGES if name != "rl" or recipe.rl is not None)


def require_stages(recipe: Recipe, names: Sequence[str]) -> None:
    """Raise an InputError for a stage that a recipe does not have."""
    known = stages_of(recipe)
    for name in names:
        if name == "rl" and name not in known:
            raise InputError(
                f"The recipe {recipe.name!r} has no stage 'rl'.",
                expected=", ".join(known),
                next_step="add an rl section to the recipe, or leave --stage rl out",
            )
        if name not in known:
            raise InputError("There is no such stage.", got=repr(name), expected=", ".join(known))


class Listener(Protocol):
    """Is told what a run does, as it does it (in the main process)."""

    def stage(self, name: str, *, resumed: bool) -> None:
        """A stage begins, or was found done."""
        ...

    def metrics(self, name: str, metrics: dict[str, Any]) -> None:
        """Figures of a running stage."""
        ...

    def done(self, name: str, summary: dict[str, Any]) -> None:
        """A stage is done."""
        ...
