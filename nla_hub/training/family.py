"""A family of models that nla-hub does not read yet: an adapter guessed from its modules, and a small model of it for tests.

What is guessed is where transformers puts things, on a model without weights; whether that is enough for nla-hub is for
`nla_hub.testing.check_adapter` to say, on the small model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nla_hub.adapters import Adapter
from nla_hub.errors import CheckpointError
from nla_hub.pretrained import first_line

BLOCKS = 4
"""Decoder blocks of the small model."""

MOST_PARAMETERS = 30_000_000
"""Of the small model: larger ones have a size that is not known here, and a test of theirs would take minutes."""

SMALL_SIZES: dict[str, int] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "sliding_window": 32,
    "query_pre_attn_scalar": 32,
    "n_inner": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "word_embed_proj_dim": 64,
    "rotary_dim": 16,
    "n_positions": 512,
    "max_window_layers": 1,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "global_head_dim": 32,
}
"""Sizes of the small model where a family has them; of others whose names end like `intermediate_size` too."""

NOT_KEPT = re.compile(
    r"^_|^(architectures|auto_map|dtype|torch_dtype|transformers_version|model_type|name_or_path|quantization_config|use_cache"
    r"|vocab_size|num_hidden_layers|tie_word_embeddings|initializer_range|bos_token_id|eos_token_id|pad_token_id"
    r"|rope_(scaling|parameters|theta)|attn_implementation|id2label|label2id|use_bidirectional_attention)$"
)
"""Of a config: what the small model gets anew, or what has nothing to do with its architecture."""


@dataclass(frozen=True)
class SmallModel:
    """How to make a small random model of a family.

    Attributes:
        model_type: of its config.
        settings: plain values of the config, sizes cut.
        per_layer: lists with an entry a block: the kinds that occur, which are repeated.
        eager: whether its attention must be asked for (a cap on scores that other implementations leave out).
    """

    model_type: str
    settings: dict[str, Any]
    per_layer: dict[str, list[Any]]
    eager: bool

    def config(self, layers: int) -> dict[str, Any]:
        """The settings of a config with so many blocks, as plain data; it lacks only the size of the vocabulary."""
        each = {name: [kinds[i % len(kinds)] for i in range(layers)] for name, kinds in self.per_layer.items()}
        return {"model_type": self.model_type, "num_hidden_layers": layers, **self.settings, **each}

    def make(self, vocab_size: int, *, layers: int) -> Any:
        """A causal LM on the meta device: modules without weights."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**self.config(layers), vocab_size=vocab_size)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)


def small_model(config: Any) -> SmallModel:
    """The small model of the family of a text config; what makes the architecture what it is stays."""
    told = config.to_dict()
    depth = int(config.num_hidden_layers)
    lists = {
        name: value
        for name, value in told.items()
        if isinstance(value, list) and len(value) == depth and not NOT_KEPT.search(name)
    }
    own = {spelled: common for common, spelled in getattr(config, "attribute_map", {}).items()}
    per_layer = {name: _kinds(_small(own.get(name, name), told), value) for name, value in lists.items()}
    per_layer = {name: kinds for name, kinds in per_layer.items() if kinds}
    changed = config.to_diff_dict()
    settings: dict[str, Any] = {}
    for name in told:
        common = own.get(name, name)
        if NOT_KEPT.search(common) or NOT_KEPT.search(name) or told[name] is None or name in per_layer:
            continue
        small = _small(common, told)
        if small is not None:
            settings[name] = small
        elif name in changed and isinstance(changed[name], (bool, int, float, str)):
            settings[name] = changed[name]
    settings |= {"tie_word_embeddings": False, "initializer_range": 0.15}
    settings |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    return SmallModel(
        str(config.model_type), settings, per_layer, getattr(config, "attn_logit_softcapping", None) is not None
    )


def _kinds(small: int | None, value: list[Any]) -> list[Any]:
    """What occurs in a list with an entry a block: its values, or the small one where they are sizes; none if not plain."""
    if small is not None:
        return [small]
    return list(dict.fromkeys(value)) if all(isinstance(item, (str, int, float)) for item in value) else []


def _small(name: str, told: dict[str, Any]) -> int | None:
    """The small model's value of a size, None for what is no size."""
    if name == "num_key_value_heads" and told.get("num_key_value_heads") == told.get("num_attention_heads"):
        return SMALL_SIZES["num_attention_heads"]
    if name.endswith("intermediate_size") or name.endswith("ffn_size"):
        return SMALL_SIZES["intermediate_size"]
    return SMALL_SIZES.get(name)


# -- the adapter ---------------------------------------------------------------------------------------------


def guess_adapter(config: Any, small: SmallModel) -> Adapter:
    """The adapter of the family of a transformers config (a wrapper's too), read off the modules of its small model.

    Raises:
        CheckpointError: transformers cannot build it, or it is no stack of blocks between an embedding and a norm.
    """
    text = config.get_text_config()
    try:
        model = small.make(256, layers=BLOCKS)
    except Exception as cause:  # families fail in every way there is
        raise CheckpointError(
            f"transformers cannot build a small model of this family: {type(cause).__name__}: {first_line(cause)}",
            where=f"model_type {text.model_type!r}",
            next_step="write the adapter by hand: docs/add-a-model.md",
        ) from cause
    if (size := sum(p.numel() for p in model.parameters())) > MOST_PARAMETERS:
        large = [f"{k}: {v}" for k, v in small.settings.items() if isinstance(v, int) and v > 256]
        raise CheckpointError(
            "No small model of this family can be made: some of its sizes have names that are not known here.",
            where=f"model_type {text.model_type!r}",
            got=f"{size:,} parameters",
            faults=large,
            next_step="write the adapter by hand: docs/add-a-model.md",
        )
    found = _find(model, text)
    path, prefix = found["path"], str(model.base_model_prefix)
    wrapped = config.model_type != text.model_type
    paths = (*(_wrapper_paths(path) if wrapped else ()), path, path.removeprefix(prefix).removeprefix("."), "")
    return Adapter(
        name=str(text.model_type),
        model_types=(str(text.model_type),),
        trunk_paths=tuple(dict.fromkeys(paths)),
        embedding=found["embedding"],
        blocks=found["blocks"],
        final_norm=found["final_norm"],
        lm_head=found["lm_head"],
        causal_prefix=f"{prefix}.",
        untrained_norm=_norm_start(model.get_submodule(path).get_submodule(found["final_norm"])),
        per_layer_config=tuple(dict.fromkeys(("layer_types", *small.per_layer))),
        wrapper_types=(str(config.model_type),) if wrapped else (),
        wrapper_key_mapping=_wrapper_names(path) if wrapped else {},
        ignored_weights=(r"(?:^|\.)(?:vision|visual|audio|embed_vision|multi_modal)[^.]*\.",) if wrapped else (),
    )


def _find(model: Any, config: Any) -> dict[str, str]:
    """Where a causal LM has its trunk, embedding, blocks, final norm and lm_head."""
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    faults = [
        f"{what}: not found"
        for what, module in (("embedding", embedding), ("lm_head", head))
        if module is None or module not in names
    ]
    found: dict[str, str] = {}
    if not faults:
        found["lm_head"] = names[head]
        found["path"], _, found["embedding"] = names[embedding].rpartition(".")
        trunk = model.get_submodule(found["path"])
        lists = [n for n, m in trunk.named_children() if isinstance(m, nn.ModuleList) and len(m) == BLOCKS]
        norms = list(_norms(trunk))
        if len(lists) != 1:
            faults.append(f"blocks: {len(lists)} lists of {BLOCKS} modules beside the embedding, expected one")
        if not norms:
            faults.append("final_norm: no norm beside the blocks")
        if "." in found["lm_head"]:
            faults.append(f"lm_head: {found['lm_head']!r} is no part of the causal LM itself")
        if not faults:
            found["blocks"], found["final_norm"] = lists[0], norms[-1]
    if faults:
        raise CheckpointError(
            "Its modules are not a stack of blocks between an embedding and a norm, so an adapter cannot describe them.",
            where=f"model_type {config.model_type!r}",
            faults=faults,
            next_step="nla-hub reads decoders alone; docs/add-a-model.md says what an adapter can tell",
        )
    return found


def _norms(trunk: nn.Module) -> Iterator[str]:
    """Names of the norms directly on a trunk; the one behind the blocks is the last."""
    for name, module in trunk.named_children():
        if "norm" in type(module).__name__.lower():
            yield name


def _norm_start(norm: nn.Module) -> tuple[float, ...]:
    """What a final norm's weight starts from: ones, or zeros where the family multiplies by 1 + weight."""
    try:
        fresh = type(norm)(4)
    except TypeError:  # a norm without a width, or with more that it wants to know
        return (1.0,)
    weight = getattr(fresh, "weight", None)
    return (0.0, 1.0) if weight is not None and bool((weight == 0).all()) else (1.0,)


def _wrapper_paths(path: str) -> tuple[str, ...]:
    return (f"{path}.language_model", "language_model")


def _wrapper_names(path: str) -> dict[str, str]:
    """What multimodal wrappers put before the names of their text stack's weights."""
    inner = re.escape(path)
    return {rf"^language_model\.{inner}\.": "", rf"^{inner}\.language_model\.": "", r"^language_model\.": ""}
