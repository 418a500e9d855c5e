"""The base model of a run: where it is, what it is called, and how much of it is in memory.

Only the data stage reads it: the trunk up to block K for vectors, and the complete model for a labeler that asks it. One takes
the place of the other, and neither stays; the other stages need its tokenizer and its config.
"""

from __future__ import annotations

import dataclasses
import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nla_hub.accelerator import free_memory
from nla_hub.hub import HubOptions
from nla_hub.loading import Source
from nla_hub.pretrained import LoadOptions, load_causal_lm, load_config, load_tokenizer, load_trunk
from nla_hub.source_text import context_length
from nla_hub.training.checks import source_settings
from nla_hub.training.recipe import Recipe
from nla_hub.training.resolve import base_ref, require_config
from nla_hub.training.stand_in import write_stand_in
from nla_hub.training.state import TrainingState
from nla_hub.weights import WEIGHTS_NAME

if TYPE_CHECKING:
    from nla_hub.tiny.source import SourceSettings
    from nla_hub.training.loop import Report
    from nla_hub.training.run import StageDirectory


SNAPSHOTS = "snapshots"
"""In the cache of the Hub the folder of a repository's commits."""


class Base:
    """The base model of a recipe.

    Args:
        recipe: says which model, and where it lives while it is read.
        made: where it lies if the run makes it itself.
    """

    def __init__(self, recipe: Recipe, made: Path) -> None:
        self.recipe, self.made = recipe, made
        self._trunk: Source | None = None

    @property
    def is_made_here(self) -> bool:
        """Whether the run trains its source, or makes one that stands in for it."""
        return self.recipe.base.train is not None or self.recipe.base.stand_in is not None

    @property
    def name(self) -> str:
        """What sidecars call it."""
        if self.recipe.base.stand_in is not None:
            return f"{self.recipe.name}-stand-in"
        return f"{self.recipe.name}-source" if self.recipe.base.train is not None else self.recipe.base.name

    @cached_property
    def directory(self) -> Path:
        """Where it lies; downloaded where it must."""
        if self.is_made_here:
            return self.made
        return base_ref(self.recipe).fetch(HubOptions())

    @cached_property
    def digest(self) -> str | None:
        """Its commit on the Hub, or the digest of its weights where these are one file; None: not known."""
        if self.directory.parent.name == SNAPSHOTS:
            return self.directory.name
        weights = self.directory / WEIGHTS_NAME
        if self.recipe.base.revision is not None or not weights.is_file():
            return self.recipe.base.revision
        with weights.open("rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return load_tokenizer(self.directory)

    @cached_property
    def config(self) -> Any:
        """The config of its text model."""
        return load_config(self.directory).get_text_config()

    @property
    def d_model(self) -> int:
        """Width of its residual stream."""
        return int(self.config.hidden_size)

    @property
    def context(self) -> int | None:
        """Tokens that it reads, None where its config does not say."""
        return context_length(self.config)

    # -- making it -------------------------------------------------------------------------------------------

    def make(self, stage: StageDirectory, report: Report, *, max_steps: int | None) -> dict[str, Any]:
        """The stage `source`: train it, make its stand-in, or fetch it; the summary of the stage.

        Raises:
            RecipeError: it is another model than the recipe says. What training and downloading raise.
        """
        trained = self.recipe.base.train is not None
        if trained:
            from nla_hub.tiny.source import train_source

            settings = self.settings(max_steps)
            train_source(
                stage.checkpoint,
                seed=self.recipe.seed,
                settings=settings,
                progress=lambda metrics: report({**metrics, "steps": settings.steps}),
                state=TrainingState(stage, "source"),
            )
        elif self.recipe.base.stand_in is not None:
            write_stand_in(stage.checkpoint, self.recipe.base.stand_in, seed=self.recipe.seed)
        else:
            require_config(self.recipe, self.directory)
        return {"base": self.name, "trained": trained, "revision": self.digest}

    def settings(self, max_steps: int | None) -> SourceSettings:
        """The settings of a source that is trained here."""
        settings = source_settings(self.recipe)
        return settings if max_steps is None else dataclasses.replace(settings, steps=max_steps)

    # -- in memory -------------------------------------------------------------------------------------------

    @property
    def options(self) -> LoadOptions:
        """How it is loaded to be read: on this process's device, or spread over those of its node."""
        spread = self.recipe.hardware.placement.source == "spread" and torch.accelerator.is_available()
        return LoadOptions(device_map="auto") if spread else LoadOptions()

    def trunk(self) -> Source:
        """Blocks 0..K, for capture; loaded once, until `drop`."""
        if self._trunk is None:
            self._trunk = Source(load_trunk(self.directory, self.recipe.site, self.options), self.tokenizer, self.name)
        return self._trunk

    def complete(self) -> Source:
        """The model with its last layer, for a labeler that asks it; the trunk makes room for it."""
        self.drop()
        return Source(load_causal_lm(self.directory, self.options), self.tokenizer, self.name)

    def drop(self) -> None:
        """Free the trunk."""
        self._trunk = None
        free_memory()
