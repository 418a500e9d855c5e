"""Random models in the shapes of published ones, built where they run: no weights are downloaded.

A random model costs what a trained one of its shape costs, whatever it writes. Speed depends on the sizes below; rotary bases,
epsilons and activations are transformers' defaults of the family.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nla_hub import registry
from nla_hub.adapters import adapter_for
from nla_hub.engines.base import LoadedAV
from nla_hub.errors import InputError, WeightsError
from nla_hub.injection import Injector
from nla_hub.loading import Source
from nla_hub.pretrained import LoadedModel, LoadOptions
from nla_hub.prompts import ARPrompt, AVPrompt, measure_marker
from nla_hub.reconstructor import ARModel, Reconstructor
from nla_hub.sidecar import Injection, Sidecar, Site
from nla_hub.testing.harness import sidecars_for, width
from nla_hub.testing.random_models import AV_TEMPLATE, MARKER, give_opinions, random_tokenizer

_GEMMA3: dict[str, Any] = {
    "vocab_size": 262_208,
    "sliding_window": 1024,
    "_sliding_window_pattern": 6,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-7b": (
        "qwen2",
        {
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18_944,
            "vocab_size": 152_064,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": False,
        },
    ),
    "gemma-3-12b": (
        "gemma3_text",
        {
            "hidden_size": 3840,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "intermediate_size": 15_360,
            **_GEMMA3,
        },
    ),
    "gemma-3-27b": (
        "gemma3_text",
        {
            "hidden_size": 5376,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 168,
            "intermediate_size": 21_504,
            **_GEMMA3,
        },
    ),
    "llama-3.3-70b": (
        "llama",
        {
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 28_672,
            "vocab_size": 128_256,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": False,
        },
    ),
    "llama-d256": (
        "llama",
        {
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "intermediate_size": 704,
            "vocab_size": 1000,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        },
    ),
    "qwen2-d512": (
        "qwen2",
        {
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "intermediate_size": 1408,
            "vocab_size": 4000,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3-d256": (
        "gemma3_text",
        {
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
            "intermediate_size": 704,
            "vocab_size": 1000,
            "sliding_window": 1024,
            "_sliding_window_pattern": 6,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
    ),
}
"""Name -> model_type and sizes. The first four: config.json of Qwen/Qwen2.5-7B-Instruct, google/gemma-3-12b-it and
google/gemma-3-27b-it (the text stack), meta-llama/Llama-3.3-70B-Instruct. The last three are made up for two CPU cores: grouped
keys and values or not, a wider vocabulary, a tied head; none is a published model."""

BASE = "random/source"
"""What random sidecars name as their source."""

_FILLER = " the"
"""One token of the random tokenizer, of which a prompt of any length is made."""


def config_of(name: str) -> Any:
    """The transformers config of a named architecture.

    Raises:
        UnknownNameError: no such name.
    """
    if name not in ARCHITECTURES:
        raise registry.unknown("architecture", name, ARCHITECTURES)
    model_type, sizes = ARCHITECTURES[name]
    # At this spread a matrix keeps the size of what it multiplies, at any width: what a token says reaches the logits.
    spread = 1.2 / math.sqrt(sizes["hidden_size"])
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(model_type, **sizes, **ids, initializer_range=spread)


def site_of(name: str) -> Site:
    """K at two thirds of an architecture's depth, where the released pairs read."""
    return Site(2 * int(config_of(name).num_hidden_layers) // 3)


def random_model(config: Any, options: LoadOptions, *, seed: int) -> LoadedModel:
    """A random causal LM, its values drawn on the device that it runs on, in the dtype that it computes in.

    Raises:
        InputError: a placement over several devices. WeightsError: its logits are not finite.
    """
    places = set(map(str, options.placement().values())) if isinstance(options.placement(), dict) else set()
    if len(places) != 1:
        raise InputError("A random model is built on one device.", got=repr(options.placement()))
    with torch.random.fork_rng(), torch.device(places.pop()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=options.torch_dtype()).eval()
        give_opinions(model)
    model.requires_grad_(False)
    with torch.inference_mode():
        ids = torch.arange(8, device=next(model.parameters()).device)[None]
        if not bool(torch.isfinite(model(input_ids=ids, use_cache=False).logits).all()):
            raise WeightsError("This random model's logits are not finite.", got=str(options.torch_dtype()))
    return LoadedModel(model, adapter_for(config), Path(BASE))


def random_av(name: str, options: LoadOptions, *, prompt_tokens: int, seed: int) -> tuple[LoadedAV, Sidecar]:
    """A random AV of a named architecture whose prompt is `prompt_tokens` long, its marker near the end, kind `overwrite`."""
    loaded = random_model(config_of(name), options, seed=seed)
    tokenizer = random_tokenizer()
    sidecar, _ = sidecars_for(loaded.model, tokenizer, layer=site_of(name).layer)
    sidecar = _with_prompt(tokenizer, sidecar, prompt_tokens).with_(
        injection=Injection("overwrite", math.sqrt(loaded.d_model)), base_model=BASE
    )
    assert sidecar.marker is not None
    injector = Injector(loaded.adapter, sidecar.injection, sidecar.marker)
    return LoadedAV(loaded, tokenizer, AVPrompt.build(tokenizer, sidecar), injector), sidecar


def _with_prompt(tokenizer: Any, sidecar: Sidecar, length: int) -> Sidecar:
    """The sidecar with a template that renders to `length` tokens."""
    short = len(AVPrompt.build(tokenizer, sidecar))
    if length < short:
        raise InputError("No AV prompt is this short.", got=f"{length} tokens", expected=f"at least {short}")
    template = f"Now{_FILLER * (length - short - 1)} {AV_TEMPLATE}" if length > short else AV_TEMPLATE
    longer = sidecar.with_(av_template=template, marker=measure_marker(tokenizer, MARKER, template))
    off = length - len(AVPrompt.build(tokenizer, longer))
    return longer if off == 0 else _adjusted(tokenizer, longer, template, off, length)


def _adjusted(tokenizer: Any, sidecar: Sidecar, template: str, off: int, length: int) -> Sidecar:
    """The sidecar with `off` more fillers (fewer where negative): words at the seams may be several tokens."""
    changed = template.replace("Now", "Now" + _FILLER * off, 1) if off > 0 else template.replace(_FILLER, "", -off)
    longer = sidecar.with_(av_template=changed, marker=measure_marker(tokenizer, MARKER, changed))
    if len(AVPrompt.build(tokenizer, longer)) != length:
        raise InputError("No AV prompt of this length can be made.", got=f"{length} tokens", expected="a few more")
    return longer


def random_ar(name: str, options: LoadOptions, *, seed: int) -> Reconstructor:
    """A random AR of a named architecture: blocks 0..K without final norm, and a value head."""
    site = site_of(name)
    config = config_of(name)
    adapter = adapter_for(config)
    loaded = random_model(adapter.truncate_config(config, site), options, seed=seed)
    trunk: Any = adapter.trunk(loaded.model)
    adapter.drop_final_norm(trunk)
    tokenizer = random_tokenizer()
    _, sidecar = sidecars_for(loaded.model, tokenizer, layer=site.layer)
    device = next(trunk.parameters()).device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(width(loaded.model), width(loaded.model), bias=False, device=device)
    head.requires_grad_(False)
    return Reconstructor(ARModel(adapter, trunk, head), ARPrompt.build(tokenizer, sidecar), sidecar, BASE)


def random_source(name: str, options: LoadOptions, *, seed: int) -> Source:
    """A complete random source of a named architecture."""
    return Source(random_model(config_of(name), options, seed=seed), random_tokenizer(), BASE)
