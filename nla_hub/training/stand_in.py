"""A tiny random model that stands in for a recipe's base model in a rehearsal: its architecture at a hundredth of its size.

What makes an architecture what it is stays (its type, sliding and full layers, tied embeddings, biases); widths, depths and the
vocabulary shrink, and the tokenizer is a small byte-level one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nla_hub.architecture import tied
from nla_hub.training.family import BLOCKS, small_model
from nla_hub.training.recipe import Recipe
from nla_hub.training.resolve import text_config

ANY = "llama"
"""The architecture where a recipe is for any model and none was named."""


def stand_in_config(recipe: Recipe) -> dict[str, Any]:
    """The config of the stand-in, as `base.stand_in` holds it: of `base.config`, else of the base model's own config.

    Raises:
        RecipeError: transformers knows no such config.
        CheckpointError, HubError and their children: the recipe has no `base.config` and the base cannot be read.
    """
    unnamed = recipe.base.config is None and recipe.base.model is None
    config = AutoConfig.for_model(ANY) if unnamed else text_config(recipe)
    return {**small_model(config).config(BLOCKS), "tie_word_embeddings": tied(config)}


def write_stand_in(directory: Path, config: dict[str, Any], *, seed: int) -> None:
    """Write a random float32 model of `config` and its tokenizer to `directory`."""
    from nla_hub.testing.random_models import give_opinions, random_tokenizer

    tokenizer = random_tokenizer(bos="qwen" not in str(config["model_type"]))
    torch.manual_seed(seed)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, **ids, "vocab_size": len(tokenizer)}))
    give_opinions(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
