"""What a recipe leaves to its base model: the layer at two thirds of its depth, a marker that its tokenizer has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from nla_hub.errors import RecipeError
from nla_hub.hub import HubOptions
from nla_hub.locate import Ref, zoo_ref
from nla_hub.pretrained import load_config, load_tokenizer
from nla_hub.training.marker import choose_marker, require_marker
from nla_hub.training.recipe import AUTO, TWO_THIRDS, Recipe

DERIVED = frozenset({"architectures", "torch_dtype", "dtype", "transformers_version"})
"""Keys of a config that say nothing about sizes."""


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with a layer that is a number and a marker that is a character.

    Where it leaves one of them to its base model, that model's config and tokenizer are downloaded, no weights.

    Raises:
        RecipeError: no base was named, no marker can be had, or the base is trained by the run itself and nothing is known
            of it yet. CheckpointError, HubError and their children: the base cannot be read.
    """
    if recipe.base.stand_in is not None:
        return recipe
    recipe.base.name  # noqa: B018  # raises where the user has to say it
    if recipe.layer != TWO_THIRDS and recipe.marker != AUTO:
        return recipe
    if recipe.base.train is not None:
        raise RecipeError(
            "A source that the run trains itself has no depth and no tokenizer yet.",
            got=f"layer: {recipe.layer}, marker: {recipe.marker}",
            expected="a number and a character",
        )
    directory = base_files(recipe)
    changes: dict[str, Any] = {}
    if recipe.layer == TWO_THIRDS:
        changes["layer"] = two_thirds(int(load_config(directory).get_text_config().num_hidden_layers))
    if recipe.marker == AUTO:
        changes["marker"] = choose_marker(load_tokenizer(directory), recipe.prompts.av)
    return dataclasses.replace(recipe, **changes)


def check_marker(recipe: Recipe) -> None:
    """Raise a RecipeError for a marker that the tokenizer of the base cannot use; config and tokenizer are downloaded.

    Of a base that the run makes itself nothing is known yet: the data stage asks before it captures anything.
    """
    if recipe.base.train is None and recipe.base.stand_in is None:
        require_marker(load_tokenizer(base_files(recipe)), recipe.marker, recipe.prompts.av)


def base_files(recipe: Recipe) -> Path:
    """The directory with config and tokenizer of the base; downloads them, and no weights."""
    return base_ref(recipe).fetch(HubOptions(), weights=False)


def text_config(recipe: Recipe) -> Any:
    """The config of the base's text model: of `base.config`, else its config.json, which may be downloaded.

    Raises:
        RecipeError: `base.config` is none that transformers knows. CheckpointError, HubError and their children.
    """
    if recipe.base.config is None:
        return load_config(base_files(recipe)).get_text_config()
    try:
        return AutoConfig.for_model(**recipe.base.config).get_text_config()
    except (AttributeError, KeyError, TypeError, ValueError) as cause:
        raise RecipeError(
            "Its base.config is no config of a model that transformers knows.",
            where=recipe.name,
            got=str(cause).splitlines()[0] if str(cause) else type(cause).__name__,
            expected="model_type and the sizes, as in the base model's config.json",
        ) from cause


def base_ref(recipe: Recipe) -> Ref:
    """Where the base is to be had; a RecipeError for a name that is neither a repository nor a directory."""
    ref = zoo_ref(recipe.base.name, revision=recipe.base.revision)
    if ref.kind == "zoo":
        beside = f"; the directory here is ./{ref.name}" if Path(ref.name).is_dir() else ""
        raise RecipeError(
            "The base model is neither a repository of the Hub nor a directory.",
            where="base.model",
            got=repr(ref.name),
            expected=f"owner/name, or ./directory{beside}",
        )
    return ref


def two_thirds(blocks: int) -> int:
    """K at two thirds of the depth, rounded down."""
    return 2 * blocks // 3


def require_config(recipe: Recipe, directory: Path) -> None:
    """Raise a RecipeError where the base model is another than the one that `base.config` describes."""
    if recipe.base.config is None:
        return
    config = load_config(directory).get_text_config()
    if faults := list(_differences(recipe.base.config, config)):
        raise RecipeError(
            "The base model is not the one that the recipe was written for.",
            where=recipe.base.model,
            faults=faults,
            next_step="correct base.config, or take it out: sizes are then read from the base model itself",
        )


def _differences(told: dict[str, Any], config: Any) -> Iterator[str]:
    for key, expected in told.items():
        if key in DERIVED:
            continue
        got = getattr(config, key, None)
        if got != expected:
            yield f"base.config.{key}: the recipe says {expected!r}, the model {got!r}"
