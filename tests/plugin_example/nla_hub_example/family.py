"""A base-model family: OLMo 2 keeps transformers' usual names, so its adapter says nothing but which models it reads."""

from __future__ import annotations

from typing import Any

import torch

from nla_hub.adapters import Adapter

OLMO2 = Adapter(name="olmo2", model_types=("olmo2",))


def random_olmo2(vocab_size: int, *, seed: int, layers: int) -> Any:
    """A random model of the family, for nla_hub.testing."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.15,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return Olmo2ForCausalLM(config).eval()
