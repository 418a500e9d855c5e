"""The sizes of a model that its memory depends on, from its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """The sizes that memory depends on.

    Attributes:
        windows: tokens that each block's cache keeps at most; None where it keeps all.
    """

    d_model: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    windows: tuple[int | None, ...]

    @property
    def n_blocks(self) -> int:
        """Decoder blocks."""
        return len(self.windows)

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """From a transformers config (a multimodal one: of its text stack), with that family's own defaults."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        d, heads = int(text.hidden_size), int(text.num_attention_heads)
        n = int(text.num_hidden_layers)
        mlp = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * d  # GPT-2: 4 d
        kinds = list(getattr(text, "layer_types", None) or [])
        window = getattr(text, "sliding_window", None)
        # Without layer_types a window holds for every block (Mistral), unless use_sliding_window says no (Qwen2).
        everywhere = window if getattr(text, "use_sliding_window", True) else None
        windows = tuple(
            (window if kinds[i] == "sliding_attention" else None) if kinds else everywhere for i in range(n)
        )
        return cls(
            d_model=d,
            mlp=int(mlp),
            heads=heads,
            kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(text, "head_dim", None) or d // heads),
            vocabulary=int(text.vocab_size),
            windows=windows,
        )


def tied(config: Any) -> bool:
    """Whether the lm_head is the embedding."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "tie_word_embeddings", False))


def causal_class(config: Any) -> str | None:
    """transformers' class of a complete text model with this config; None where it knows none.

    For programs that go by `architectures`: a config that says nothing there, or a wrapper's name, misleads them.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    return None if name is None else str(name)
