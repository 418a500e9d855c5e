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
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nla_hub.adapters import adapter_for
from nla_hub.export import save_ar, save_av
from nla_hub.prompts import ARPrompt
from nla_hub.sidecar import EXPLANATION_PLACEHOLDER, INJECTION_PLACEHOLDER, Injection, MarkerTokens, Sidecar, Site

ARCHITECTURES = ("qwen2", "llama", "gemma3")
MARKER = "㊥"
AV_TEMPLATE = f"What stands in <v>{INJECTION_PLACEHOLDER}</v>?"
AR_TEMPLATE = f"Words: {EXPLANATION_PLACEHOLDER}\nVector:"
D_MODEL, LAYERS, LAYER = 64, 4, 2

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

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


def random_tokenizer(*, bos: bool = True) -> Any:
    """A small byte-level BPE tokenizer with a chat template and a one-token marker, with or without BOS."""
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
    fast.chat_template = CHAT_TEMPLATE if bos else CHAT_TEMPLATE.replace("{{ bos_token }}", "")
    return fast


def random_model(architecture: str, vocab_size: int, *, seed: int = 0, layers: int = LAYERS) -> Any:
    """A random causal LM of a family: d 64, 2 heads of 32, float32, weights large enough to have opinions."""
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": D_MODEL,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "initializer_range": 0.15,
    }
    torch.manual_seed(seed)
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**common)).eval()
    if architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in common.items() if k != "head_dim"})).eval()
    if architecture == "gemma3":
        gemma = Gemma3ForCausalLM(Gemma3TextConfig(**common, **_gemma_layers(layers))).eval()
        with torch.no_grad():
            # Its embeddings are tied: at this width every token would predict itself, whatever the vector says.
            gemma.model.embed_tokens.weight.mul_(0.1)
            gemma.model.norm.weight.fill_(10.0)
        return gemma
    raise ValueError(f"no random model of {architecture!r}; known: {', '.join(ARCHITECTURES)}")


def random_gemma3_wrapper(vocab_size: int, *, seed: int = 0) -> Any:
    """A random multimodal Gemma 3 wrapper, whose text stack is the `gemma3` family."""
    text = random_model("gemma3", vocab_size, seed=seed).config
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(seed)
    config = Gemma3Config(text_config=text.to_dict(), vision_config={**vision, "image_size": 28, "patch_size": 14})
    return Gemma3ForConditionalGeneration(config).eval()


def _gemma_layers(layers: int) -> dict[str, Any]:
    kinds = ["sliding_attention" if (i + 1) % 3 else "full_attention" for i in range(layers)]
    return {"sliding_window": 32, "layer_types": kinds, "query_pre_attn_scalar": 32}


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
    tokenizer = random_tokenizer(bos=bos)
    vocab = len(tokenizer)
    source = random_gemma3_wrapper(vocab, seed=seed) if wrapper else random_model(architecture, vocab, seed=seed)
    source.save_pretrained(root / "source")
    tokenizer.save_pretrained(root / "source")
    av_sidecar, ar_sidecar = sidecars(tokenizer, "random/source", kind=kind)
    save_av(root / "av", random_model(architecture, vocab, seed=seed + 1), tokenizer, av_sidecar, dtype=torch.float32)
    causal = random_model(architecture, vocab, seed=seed + 2, layers=LAYER + 1)
    trunk = causal.model
    adapter_for(trunk.config).drop_final_norm(trunk)
    torch.manual_seed(seed + 3)
    head = nn.Linear(D_MODEL, D_MODEL, bias=False)
    save_ar(root / "ar", trunk, head, tokenizer, ar_sidecar, dtype=torch.float32)
    return RandomPair(root, root / "source", root / "av", root / "ar", Site(LAYER))
