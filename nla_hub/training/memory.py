"""What the stages of a recipe need of memory: for `train --plan`, before anything is loaded.

Reckoned from the base model's config alone, whose weights are counted on PyTorch's meta device. Under data parallelism
every process needs all of it: weights, gradients and moments are replicated, a batch is shared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nla_hub.adapters import Adapter, adapter_for
from nla_hub.architecture import Architecture
from nla_hub.hub import HubOptions
from nla_hub.locate import zoo_ref
from nla_hub.memory import Header, PartSize, Workload, part_size, working_bytes
from nla_hub.pretrained import LoadOptions, load_config
from nla_hub.training.checks import source_settings
from nla_hub.training.recipe import LoRASpec, Recipe
from nla_hub.training.stages import stages_of

FLOAT32 = 4
"""Bytes: what is trained as a whole is trained in float32, see `loop.TRAINED`."""

ADAM = 4
"""Times the weights: themselves, their gradients, and two moments (Kingma and Ba 2015)."""

TEXT_TOKENS = 150
"""Tokens of a label where no rl stage says how long explanations are; the length the released pairs were trained with."""

CAPTURE_TOKENS = 512
"""Tokens of a document that is captured, where the base model reads more."""


@dataclass(frozen=True)
class StageBytes:
    """What one stage needs at once in every process.

    Attributes:
        name: the stage.
        weights: models in memory, those that are only read included.
        optimizer: gradients and moments of what is trained.
        activations: kept for the backward pass, or the working memory of a stage that trains nothing.
    """

    name: str
    weights: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.optimizer + self.activations


def base_config(recipe: Recipe, *, vocabulary: int = 1024) -> Any:
    """The config of a recipe's base model; downloads config.json where it must.

    Args:
        vocabulary: of a source that is trained from nothing, whose tokenizer does not exist yet.

    Raises:
        RecipeError, CheckpointError, HubError and their children.
    """
    if recipe.base.train is not None:
        settings = source_settings(recipe)
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.mlp_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=settings.max_length,
            tie_word_embeddings=True,
        )
    ref = zoo_ref(recipe.base.name, revision=recipe.base.revision)
    return load_config(ref.fetch(HubOptions(), weights=False)).get_text_config()


def header_of(config: Any) -> Header:
    """The tensors of a causal LM as if it were stored in float32, from its config alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: (tuple(value.shape), "F32") for name, value in model.named_parameters()}


def plan(recipe: Recipe, config: Any | None = None, *, world: int = 1) -> list[StageBytes]:
    """The stages of a recipe with what each needs in one of `world` processes.

    Raises:
        RecipeError, CheckpointError, HubError and their children: a base model whose config cannot be had.
    """
    config = base_config(recipe) if config is None else config
    adapter = adapter_for(config)
    sizes = _Sizes.of(config, adapter, recipe)
    found = {
        "source": StageBytes("source", 0, 0, 0),
        "data": StageBytes("data", sizes.source.loaded, 0, working_bytes(sizes.source, sizes.capture)),
        "ar": _supervised("ar", sizes, recipe.ar.batch_size, world),
        "av": _supervised("av", sizes, recipe.av.batch_size, world),
        # Weights are written part by part; each is widened or narrowed once more on the way.
        "export": StageBytes("export", sizes.source.loaded + 2 * sizes.av.loaded, 0, 0),
        "eval": StageBytes(
            "eval",
            sum(size.loaded for size in (sizes.source, sizes.av, sizes.ar)),
            0,
            max(working_bytes(size, sizes.work) for size in (sizes.source, sizes.av, sizes.ar)),
        ),
    }
    if recipe.base.train is not None:
        settings = source_settings(recipe)
        tokens = settings.batch_documents * settings.max_length
        logits = 3 * FLOAT32 * tokens * sizes.whole.vocabulary
        kept = tokens * training_bytes_per_token(sizes.whole) + logits
        found["source"] = StageBytes("source", sizes.av.loaded, (ADAM - 1) * sizes.av.loaded, kept)
    if recipe.rl is not None:
        found["rl"] = _rl(sizes, recipe, world)
    return [found[name] for name in stages_of(recipe)]


@dataclass(frozen=True)
class _Sizes:
    """The parts of a recipe's pair: the source as it is read, AV and AR in float32 as they are trained."""

    source: PartSize
    av: PartSize
    ar: PartSize
    base: PartSize
    whole: Architecture
    text: int
    capture: Workload
    work: Workload
    linear: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, config: Any, adapter: Adapter, recipe: Recipe) -> _Sizes:
        site, header = recipe.site, header_of(config)
        options = LoadOptions()
        read: dict[str, Any] = {"site": site, "dtype": options.torch_dtype(), "on_cpu": options.on_cpu()}
        trained: dict[str, Any] = {**read, "dtype": torch.float32}
        source = part_size("source", header, config, adapter, **read)
        d = source.architecture.d_model
        trunk = part_size("source", header, config, adapter, **trained)
        ar = PartSize("ar", 0, trunk.loaded + 4 * d * d, 0, trunk.architecture, FLOAT32)
        text = recipe.rl.max_new_tokens if recipe.rl is not None else TEXT_TOKENS
        limit = int(getattr(config, "max_position_embeddings", 0) or CAPTURE_TOKENS)
        blocks = f"{adapter.blocks}."
        linear = {n: s for n, (s, _) in header.items() if len(s) == 2 and f".{blocks}" in f".{n}"}
        return cls(
            source=source,
            av=part_size("av", header, config, adapter, **trained),
            ar=ar,
            base=part_size("av", header, config, adapter, **read),
            whole=Architecture.of(config),
            text=text,
            capture=Workload(text=min(CAPTURE_TOKENS, limit)),
            work=Workload(max_new_tokens=text, text=min(CAPTURE_TOKENS, limit)),
            linear={n: (s[0], s[1]) for n, s in linear.items()},
        )


def training_bytes_per_token(architecture: Architecture, *, checkpointing: bool = False) -> int:
    """Bytes of activations that a backward pass in float32 needs for one token, over all blocks.

    Of a block: its input and the sum in its middle, each widened, normed and scaled (6 d), queries, keys and values before
    and after their rotation and repetition, and attention's output (4 heads + 3 kv_heads, times head_dim), the output's
    projection (d); gate, its activation, up and their product (4 mlp). With checkpointing only each block's input is kept,
    and one block at a time is computed again, whose gradients are as large as what it keeps.
    """
    a = architecture
    block = FLOAT32 * (7 * a.d_model + (4 * a.heads + 3 * a.kv_heads) * a.head_dim + 4 * a.mlp)
    return a.n_blocks * FLOAT32 * a.d_model + 2 * block if checkpointing else a.n_blocks * block


def _supervised(name: str, sizes: _Sizes, batch_size: int, world: int) -> StageBytes:
    rows = math.ceil(batch_size / world)
    part = sizes.ar if name == "ar" else sizes.av
    tokens = sizes.work.template + sizes.text if name == "ar" else sizes.work.prompt + sizes.text
    kept = rows * tokens * training_bytes_per_token(part.architecture)
    if name == "av":  # only positions that predict a label go through the head: logits, log-softmax and their gradient
        kept += 3 * FLOAT32 * rows * sizes.text * part.architecture.vocabulary
    return StageBytes(name, sizes.source.loaded + part.loaded, (ADAM - 1) * part.loaded, kept)


def _rl(sizes: _Sizes, recipe: Recipe, world: int) -> StageBytes:
    rl = recipe.rl
    assert rl is not None
    ars = 2 if rl.watch_ar else 1
    weights = sizes.source.loaded + ars * sizes.ar.loaded
    optimizer = (ADAM - 1) * ars * sizes.ar.loaded
    if rl.lora is None:
        copies = 2 if rl.beta > 0 else 1  # the AV that the stage started from
        weights += copies * sizes.av.loaded
        optimizer += (ADAM - 1) * sizes.av.loaded
    else:
        factors = FLOAT32 * lora_values(rl.lora, sizes.linear)
        weights += sizes.base.loaded + factors
        optimizer += (ADAM - 1) * factors
    tokens = sizes.work.prompt + sizes.text
    backward = rl.micro_batch * (
        tokens * training_bytes_per_token(sizes.whole, checkpointing=rl.gradient_checkpointing)
        + 3 * FLOAT32 * sizes.text * sizes.whole.vocabulary
    )
    rows = min(rl.rollout_block, math.ceil(rl.samples / world))
    rollout = working_bytes(sizes.av, Workload(rows, sizes.work.prompt, sizes.text))
    return StageBytes("rl", weights, optimizer, max(backward, rollout))


def lora_values(spec: LoRASpec, linear: Mapping[str, tuple[int, int]]) -> int:
    """Values in the factors of LoRAs on the blocks' linear layers: r (in + out) each."""

    def meant(name: str) -> bool:
        if spec.targets == "all-linear":
            return True
        names = (spec.targets,) if isinstance(spec.targets, str) else spec.targets
        module = name.removesuffix(".weight")
        return any(module == n or module.endswith(f".{n}") for n in names)

    return sum(spec.r * (a + b) for name, (a, b) in linear.items() if meant(name))
