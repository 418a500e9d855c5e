"""What is refused before anything is written: settings that only a later stage would stumble over."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from nla_hub import registry
from nla_hub.errors import InputError, MissingExtraError, RecipeError
from nla_hub.evaluation import get_protocol
from nla_hub.training.data import make_labeler, open_corpus
from nla_hub.training.planning.gpus import gpu_named
from nla_hub.training.recipe import Recipe, RLSpec

if TYPE_CHECKING:
    from nla_hub.tiny.source import SourceSettings

TINY_WORLD = "tiny-world"

RL_PACKAGES = ("trl", "peft", "datasets")
"""Of the extra `train`: what the rl stage imports."""

REPORTERS = {"trackio": "'nla-hub[log]'", "tensorboard": "'nla-hub[log]'", "wandb": "wandb"}
"""Where the rl stage can send its figures, and what to install for it."""

SIZES = (
    "hidden_size",
    "layers",
    "heads",
    "mlp_size",
    "documents",
    "steps",
    "batch_documents",
    "lr",
    "tokenizer_documents",
)
"""Settings of a source that must be above 0."""


def check_recipe(recipe: Recipe, *, world: int = 1, runs_here: bool = True) -> None:
    """Raise for anything in a recipe that only a later stage would stumble over; `world` processes are to run it.

    A plan is made on any machine (`runs_here` False): what the recipe needs installed is not asked for then.

    Raises:
        UnknownNameError: GPU, corpus, labeler or protocol. MissingExtraError: a package that the rl stage needs.
        RecipeError: a source that cannot be trained, a layer it lacks, sizes that do not fit together.
    """
    gpu_named(recipe.hardware.gpu)
    open_corpus(recipe.data)
    make_labeler(recipe.labels)
    get_protocol(recipe.eval.protocol)
    if recipe.base.train is not None:
        if recipe.base.model != TINY_WORLD:
            raise RecipeError("Only the tiny world's source can be trained.", got=f"base.model {recipe.base.model!r}")
        layers = source_settings(recipe).layers
        if recipe.site.layer >= layers:
            raise RecipeError("The source has no such layer.", got=f"layer {recipe.layer}", expected=f"below {layers}")
    blocks = (recipe.base.config or {}).get("num_hidden_layers")
    if blocks is not None and not isinstance(recipe.layer, str) and recipe.layer >= blocks:
        raise RecipeError(
            "The base has no such layer.",
            got=f"layer {recipe.layer}",
            expected=f"below {blocks}",
            next_step="choose another, or layer: two-thirds",
        )
    if runs_here:
        require_packages(recipe)
    if faults := [*_shares(recipe, world), *([] if recipe.rl is None else _rl_faults(recipe, recipe.rl, world))]:
        raise RecipeError("The training stages cannot run like this.", faults=faults)


def check_labeler(recipe: Recipe) -> None:
    """Ask the labeler of a recipe whether it could begin here: vectors take hours, and come before the first label.

    Raises:
        InputError: the key of an API is missing. MissingExtraError: its package is. What a third party's `check` raises.
    """
    if (check := getattr(make_labeler(recipe.labels), "check", None)) is not None:
        check()


def require_packages(recipe: Recipe) -> None:
    """Raise a MissingExtraError for an optional package that a recipe needs and that is not installed."""
    needed: list[tuple[str, str, str]] = []
    if recipe.rl is not None:
        needed += [(package, "train", "The rl stage of this recipe") for package in RL_PACKAGES]
        if recipe.rl.rollouts.engine == "vllm":
            needed.append(("vllm", "vllm", "rl.rollouts.engine: vllm"))
    if recipe.lora is not None:
        needed.append(("peft", "train", "A recipe with a lora section"))
    if recipe.base.quantization is not None:
        needed.append(("bitsandbytes", "quant", "base.quantization"))
    for package, extra, purpose in needed:
        if find_spec(package) is None:
            raise MissingExtraError(package, extra, needed_for=purpose)


def _shares(recipe: Recipe, world: int) -> Iterator[str]:
    """Supervised batches that have no row for some process: such a batch is no step at all."""
    for name, spec in (("ar", recipe.ar), ("av", recipe.av)):
        if spec.batch_size < world:
            yield f"{name}.batch_size: {spec.batch_size} rows cannot be shared by {world} processes"


def _rl_faults(recipe: Recipe, rl: RLSpec, world: int) -> Iterator[str]:
    if fault := rl.sharing_fault(world):
        yield f"rl.{fault}"
    vectors = rl.documents * recipe.data.positions
    if vectors < rl.prompts:
        yield f"rl.documents: {rl.documents} documents give {vectors} vectors, fewer than rl.prompts = {rl.prompts}"
    if rl.precision_drop is not None and recipe.data.corpus != TINY_WORLD:
        yield f"rl.precision_drop: the facts of the corpus {recipe.data.corpus!r} are not known, only {TINY_WORLD}'s are"
    elif rl.precision_drop is not None and not hasattr(registry.labelers.get(recipe.labels.labeler), "named"):
        yield f"rl.precision_drop: the labeler {recipe.labels.labeler!r} cannot read facts from a text"


def check_reporters(names: Sequence[str]) -> None:
    """Raise an InputError for what the rl stage cannot report to: an unknown name, or a package that is absent."""
    for name in names:
        if name not in REPORTERS:
            raise InputError(
                "There is nothing of that name to report to.", got=repr(name), expected=", ".join(REPORTERS)
            )
        if find_spec(name) is None:
            raise InputError(
                f"Reporting to {name} needs the package {name!r}, which is not installed.",
                next_step=f"pip install {REPORTERS[name]}",
            )


def source_settings(recipe: Recipe) -> SourceSettings:
    """The settings of a source that a recipe trains; a RecipeError for those that it does not have or cannot use."""
    from nla_hub.tiny.source import SourceSettings

    try:
        settings = dataclasses.replace(SourceSettings(), **(recipe.base.train or {}))  # type: ignore[arg-type]
    except TypeError as cause:
        known = ", ".join(f.name for f in dataclasses.fields(SourceSettings))
        raise RecipeError(f"base.train: {cause}", expected=known) from cause
    faults = [
        f"base.train.{name}: got {value!r}, expected a value above 0"
        for name in SIZES
        if not (value := getattr(settings, name)) > 0
    ]
    if not faults and settings.hidden_size % settings.heads:
        faults.append(f"base.train: hidden_size {settings.hidden_size} is no multiple of heads {settings.heads}")
    if faults:
        raise RecipeError("This source cannot be trained.", faults=faults)
    return settings
