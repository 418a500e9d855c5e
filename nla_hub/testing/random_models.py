"""Tiny random models of the real families, for tests of this package and of plug-ins. Offline, seconds to build.

>>> from nla_hub.testing import random_pair
>>> pair = random_pair(tmp_path, "llama")          # tmp_path/source, tmp_path/av, tmp_path/ar
>>> nla = NLA.from_pretrained(tmp_path)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from nla_hub import registry
from nla_hub.adapters import adapter_for
from nla_hub.export import save_ar, save_av
from nla_hub.prompts import ARPrompt
from nla_hub.sidecar import EXPLANATION_PLACEHOLDER, INJECTION_PLACEHOLDER, Injection, MarkerTokens, Sidecar, Site

MARKER = "㊥"
AV_TEMPLATE = f"What stands in <v>{INJECTION_PLACEHOLDER}</v>?"
AR_TEMPLATE = f"Words: {EXPLANATION_PLACEHOLDER}\nVector:"
D_MODEL, LAYERS, LAYER = 64, 4, 2

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NO_THINKING = "<think>\n\n</think>\n\n"
"""What the chat template of a thinking family writes before an answer that shall come without (Qwen3's own words)."""
THINKING_SWITCH = f"{{% if enable_thinking is defined and enable_thinking is false %}}{NO_THINKING}{{% endif %}}"

_WORDS = (
    "the a cat dog sees walks red blue house river song night day old small quick and then of in on it was is what where "
    "who next word likely last words a story Words: Vector: What stands in ? . , explanation"
).split()


@dataclass(frozen=True)
class RandomPair:
    """Directories of a random pair and its site."""

    root: Path
    source: Path
    av: Path
    ar: Path
    site: Site


def random_tokenizer(*, bos: bool = True, thinking: bool = False) -> Any:
    """A small byte-level BPE tokenizer with a chat template and a one-token marker, with or without BOS.

    `thinking`: its chat template knows `enable_thinking`, as Qwen3's does.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>"]
    special = ["<bos>", *special] if bos else special
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(_WORDS)] * 20, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>" if bos else None,
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=[t for t in special if t.startswith("<|")],
    )
    fast.add_tokens([MARKER, "<v>", "</v>", "<explanation>", "</explanation>"])
    template = CHAT_TEMPLATE if bos else CHAT_TEMPLATE.replace("{{ bos_token }}", "")
    fast.chat_template = (
        template.replace("<|assistant|>\n", f"<|assistant|>\n{THINKING_SWITCH}") if thinking else template
    )
    return fast


def random_model(architecture: str, vocab_size: int, *, seed: int = 0, layers: int = LAYERS) -> Any:
    """A random causal LM of a family: d 64, 2 heads, float32, weights large enough to have opinions.

    What makes a family special is small enough to matter within a prompt: sliding windows of 32 tokens, soft caps that
    bend, heads wider than d / 2, biases that are not zero.

    Raises:
        ValueError: no random model of this family (see `ARCHITECTURES`).
    """
    if architecture not in _FAMILIES:
        raise ValueError(f"no random model of {architecture!r}; known: {', '.join(ARCHITECTURES)}")
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": D_MODEL,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "initializer_range": 0.15,
    }
    model_type, special = _FAMILIES[architecture]
    settings = common | special
    if "layer_types" in settings:
        settings["layer_types"] = [settings["layer_types"][i % len(settings["layer_types"])] for i in range(layers)]
    torch.manual_seed(seed)
    capped = "attn_logit_softcapping" in settings  # which transformers 5.17 leaves out of sdpa, its default
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **settings), **({"attn_implementation": "eager"} if capped else {})
    ).eval()
    give_opinions(model)
    return model


_GROUPED: dict[str, Any] = {"num_key_value_heads": 1, "intermediate_size": 96}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_GEMMA: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32, **_GROUPED}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", _GROUPED),
    "llama": ("llama", {"head_dim": 32, **_GROUPED}),
    "gemma3": ("gemma3_text", {"layer_types": [_SLIDING, _SLIDING, _FULL], **_GEMMA}),
    "qwen3": (
        "qwen3",
        {"head_dim": 48, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1, **_GROUPED},
    ),
    "mistral": ("mistral", {"head_dim": 48, "sliding_window": 32, **_GROUPED}),
    "gemma2": (
        "gemma2",
        {"layer_types": [_SLIDING, _FULL], "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, **_GEMMA},
    ),
    "gpt2": ("gpt2", {"n_inner": 96}),
    "gpt_neox": ("gpt_neox", {"intermediate_size": 96}),
}
"""Adapter -> model_type and what its config has besides the common settings; `layer_types` is repeated."""

ARCHITECTURES = tuple(name for name in registry.adapters.names() if name in _FAMILIES)
"""Every adapter of ours, in the registry's order."""


def give_opinions(model: Any) -> None:
    """Change what a fresh model has too plain to tell right from wrong: tied embeddings, unit norms, zero biases."""
    adapter = adapter_for(model.config)
    norm = adapter.final_norm_module(model)
    with torch.no_grad():
        if model.config.tie_word_embeddings:
            # At this width every token would predict itself, whatever the vector says.
            adapter.embedding_module(model).weight.mul_(0.1)  # type: ignore[operator]
            norm.weight.fill_(10.0)  # type: ignore[operator]
        for name, value in model.named_parameters():
            if name.endswith(".bias"):
                value.normal_(0.0, 0.1)


def random_gemma3_wrapper(vocab_size: int, *, seed: int = 0) -> Any:
    """A random multimodal Gemma 3 wrapper, whose text stack is the `gemma3` family."""
    text = random_model("gemma3", vocab_size, seed=seed).config
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(seed)
    config = Gemma3Config(text_config=text.to_dict(), vision_config={**vision, "image_size": 28, "patch_size": 14})
    return Gemma3ForConditionalGeneration(config).eval()


def sidecars(
    tokenizer: Any, base: str, *, layer: int = LAYER, scale: float = 8.0, kind: str = "overwrite"
) -> tuple[Sidecar, Sidecar]:
    """AV and AR sidecars whose ids are measured on `tokenizer`."""
    marker_id = tokenizer(MARKER, add_special_tokens=False)["input_ids"][0]
    around = tokenizer(AV_TEMPLATE.replace(INJECTION_PLACEHOLDER, MARKER), add_special_tokens=False)["input_ids"]
    at = around.index(marker_id)
    suffix = ARPrompt(tokenizer, AR_TEMPLATE, None)._ids("x")[-2:]
    av = Sidecar(
        role="av",
        d_model=D_MODEL,
        site=Site(layer),
        marker=MarkerTokens(MARKER, marker_id, around[at - 1], around[at + 1]),
        av_template=AV_TEMPLATE,
        ar_template=AR_TEMPLATE,
        ar_suffix_ids=tuple(suffix),
        injection=Injection(kind="add" if kind == "add" else "overwrite", scale=scale if kind == "overwrite" else None),
        base_model=base,
    )
    return av, av.with_(role="ar")


def random_pair(
    root: Path,
    architecture: str = "llama",
    *,
    bos: bool = True,
    wrapper: bool = False,
    kind: str = "overwrite",
    seed: int = 0,
) -> RandomPair:
    """Write `root`/source, `root`/av and `root`/ar: random weights in the layout of the released pairs.

    `wrapper` makes the source a multimodal Gemma 3.
    """
    tokenizer = random_tokenizer(bos=bos, thinking=architecture == "qwen3")
    vocab = len(tokenizer)
    source = random_gemma3_wrapper(vocab, seed=seed) if wrapper else random_model(architecture, vocab, seed=seed)
    source.save_pretrained(root / "source")
    tokenizer.save_pretrained(root / "source")
    av_sidecar, ar_sidecar = sidecars(tokenizer, "random/source", kind=kind)
    save_av(root / "av", random_model(architecture, vocab, seed=seed + 1), tokenizer, av_sidecar, dtype=torch.float32)
    causal = random_model(architecture, vocab, seed=seed + 2, layers=LAYER + 1)
    adapter = adapter_for(causal.config)
    trunk = adapter.trunk(causal)
    adapter.drop_final_norm(trunk)
    torch.manual_seed(seed + 3)
    head = nn.Linear(D_MODEL, D_MODEL, bias=False)
    save_ar(root / "ar", trunk, head, tokenizer, ar_sidecar, dtype=torch.float32)
    return RandomPair(root, root / "source", root / "av", root / "ar", Site(LAYER))
