"""A tiny random model that stands in for a recipe's base model in a rehearsal: its architecture at a hundredth of its size.

What makes an architecture what it is stays (its type, sliding and full layers, tied embeddings, biases); widths, depths and the
vocabulary shrink, and the tokenizer is a small byte-level one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nla_hub.errors import RecipeError
from nla_hub.pretrained import load_config
from nla_hub.training.recipe import Recipe
from nla_hub.training.resolve import base_files

BLOCKS = 4
"""Decoder blocks of a stand-in, enough for a block above layer K."""

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "n_inner": 96,
    "max_position_embeddings": 512,
    "sliding_window": 32,
    "query_pre_attn_scalar": 32,
}
"""What shrinks, where an architecture has it; a window shorter than a prompt is one that matters."""

ANY = "llama"
"""The architecture where a recipe is for any model and none was named."""

NEVER = ("layer_types", "rope_parameters", "rope_scaling", "bos_token_id", "eos_token_id", "pad_token_id")
"""What follows from sizes or the tokenizer, and is set anew."""


def stand_in_config(recipe: Recipe) -> dict[str, Any]:
    """The config of the stand-in, as `base.stand_in` holds it: of `base.config`, else of the base model's own config.

    Raises:
        CheckpointError, HubError and their children: the recipe has no `base.config` and the base cannot be read.
    """
    told = recipe.base.config
    if told is None and recipe.base.model is not None:
        told = load_config(base_files(recipe)).get_text_config().to_diff_dict()
    told = told or {"model_type": ANY}
    try:
        known = AutoConfig.for_model(**{k: v for k, v in told.items() if k not in NEVER}).to_dict()
    except (KeyError, TypeError, ValueError) as cause:
        raise RecipeError(
            f"transformers cannot make such a config: {cause}", where="base.config", got=repr(told.get("model_type"))
        ) from cause
    small = {key: size for key, size in SIZES.items() if known.get(key) is not None}
    if known.get("num_key_value_heads") == known.get("num_attention_heads"):
        small["num_key_value_heads"] = SIZES["num_attention_heads"]  # as many as heads: no groups
        if "num_key_value_heads" not in known:
            del small["num_key_value_heads"]
    kept = {k: v for k, v in told.items() if k in ("model_type", "tie_word_embeddings", "use_sliding_window")}
    return {**kept, **small}


def write_stand_in(directory: Path, config: dict[str, Any], *, seed: int) -> None:
    """Write a random float32 model of `config` and its tokenizer to `directory`."""
    from nla_hub.testing.random_models import give_opinions, random_tokenizer

    tokenizer = random_tokenizer(bos="qwen" not in str(config["model_type"]))
    torch.manual_seed(seed)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    whole = AutoConfig.for_model(
        **config, **ids, pad_token_id=tokenizer.pad_token_id, vocab_size=len(tokenizer), initializer_range=0.15
    )
    model = AutoModelForCausalLM.from_config(whole)
    give_opinions(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
