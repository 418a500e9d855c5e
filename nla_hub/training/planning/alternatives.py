"""What would fit where a recipe does not: settings that the estimator itself finds to fit, as they are typed.

Each proposal is tried alone, and where that is not enough together with what costs nothing but time (smaller batches,
checkpointing, bfloat16 products). Settings that leave what is trained as it is come first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nla_hub import schema
from nla_hub.errors import NLAError
from nla_hub.training.planning.base_sizes import Sizes
from nla_hub.training.planning.gpus import CPU, GPUS
from nla_hub.training.planning.memory import LABELS_AT_ONCE, SOURCE_LABELER, StageMemory
from nla_hub.training.recipe import Recipe, parse_recipe

Fits = Callable[[Recipe], bool]

NODE = 8
"""Accelerators of a usual node (NVIDIA's HGX boards)."""

NODES = (1, 2, 4, 8, 16, 32)
"""Numbers of nodes that are tried."""

LORA = "lora={r: 64, alpha: 128}"
"""As the packaged recipes."""


NAMING = ("base.quantization=",)
"""Settings without which a proposal would be another one."""


@dataclass(frozen=True)
class Alternative:
    """Settings with which a recipe fits; `settings` are added to its command as they are, `why` says what they do."""

    why: str
    settings: tuple[str, ...]
    recipe: Recipe


def changed(recipe: Recipe, settings: tuple[str, ...]) -> Recipe | None:
    """The recipe with `key.sub=value` settings; None where they make no recipe."""
    try:
        return parse_recipe(schema.apply_overrides(recipe.to_mapping(), settings))
    except NLAError:
        return None


def alternatives(recipe: Recipe, sizes: Sizes, fits: Fits) -> list[Alternative]:
    """What fits instead, at most one of each kind; `fits` judges a recipe."""
    found: list[Alternative] = []
    for why, candidates in _kinds(recipe, sizes):
        tried = [_joined(one, more) for more in ([], *_frugal(recipe)) for one in candidates]
        for settings in tried:
            other = changed(recipe, tuple(settings))
            if settings and other is not None and other != recipe and fits(other):
                found.append(Alternative(why, tuple(_needed(recipe, list(settings), fits)), other))
                break
    return found


def _needed(recipe: Recipe, settings: list[str], fits: Fits) -> list[str]:
    """The settings without those that are not needed; what names the proposal stays."""
    for setting in [s for s in reversed(settings) if not s.startswith(NAMING)]:
        fewer = [s for s in settings if s != setting]
        other = changed(recipe, tuple(fewer)) if fewer else None
        if other is not None and other != recipe and fits(other):
            settings = fewer
    return settings


def _joined(one: list[str], more: list[str]) -> list[str]:
    """Settings of both, those of the first where both say something."""
    said = {setting.partition("=")[0] for setting in one}
    return [*one, *(setting for setting in more if setting.partition("=")[0] not in said)]


def _kinds(recipe: Recipe, sizes: Sizes) -> Iterator[tuple[str, list[list[str]]]]:
    """Proposals by kind, each from the mildest to the strongest."""
    rl, hardware = recipe.rl, recipe.hardware
    place = "hardware.placement"
    both = [f"{place}.av=sharded", f"{place}.ar=sharded"]
    packed = recipe.base.quantization is not None
    yield "smaller batches", _batches(recipe)
    yield "activations computed again", [_checkpointing(recipe)]
    yield "products in bfloat16", [["precision=bf16"]]
    if hardware.gpus > 1:
        yield "the source divided over a node", [[f"{place}.source=spread"]]
    if hardware.world > 1 and not packed:
        yield "weights, gradients and moments divided over all GPUs", [both]
        if rl is not None and hardware.gpu != CPU:
            yield "vLLM instead of a whole copy on each GPU", [[*both, *_vllm(recipe, sizes)]]
        yield "optimizers in main memory", [[*both, f"{place}.optimizers=cpu"]]
    if rl is not None and rl.watch_ar:
        yield "no second AR to watch the first", [["rl.watch_ar=false"]]
    if hardware.gpu != CPU and not packed:
        yield "more GPUs", [[*both, *more] for more in _more(recipe)]
    if recipe.lora is None:
        yield "LoRA factors instead of full weights", [[LORA, "rl.lora=null"] if rl is not None else [LORA]]
    if not packed and hardware.gpu != CPU:
        whole = [f"{place}.av=each", f"{place}.ar=each", f"{place}.optimizers=device"]
        engine = ["rl.rollouts.engine=transformers", "rl.rollouts.tensor_parallel=1"] if rl is not None else []
        lora = [] if recipe.lora is not None else [LORA, *(["rl.lora=null"] if rl is not None else [])]
        yield "LoRA factors over a base of 4 bits", [[*lora, "base.quantization=nf4", *whole, *engine]]
    if hardware.gpu != CPU:
        larger = sorted((gpu.memory, name) for name, gpu in GPUS.items() if gpu.memory > GPUS[hardware.gpu].memory)
        yield "GPUs with more memory", [[f"hardware.gpu={name}"] for _, name in larger]


def _batches(recipe: Recipe) -> list[list[str]]:
    """Smaller micro-batches and rollout blocks, by halves."""
    found: list[list[str]] = []
    for power in range(1, 8):
        one = []
        for name in ("ar", "av"):
            spec = getattr(recipe, name)
            now = spec.micro_batch or -(-spec.batch_size // recipe.hardware.world)
            one.append(f"{name}.micro_batch={max(1, now >> power)}")
        if (rl := recipe.rl) is not None:
            one.append(f"rl.micro_batch={max(1, rl.micro_batch >> power)}")
            one.append(f"rl.rollout_block={max(8, rl.rollout_block >> power)}")
        if recipe.labels.labeler == SOURCE_LABELER:
            rows = int(recipe.labels.settings.get("batch_size", LABELS_AT_ONCE))
            one.append(f"labels.settings.batch_size={max(1, rows >> power)}")
        if not found or found[-1] != one:
            found.append(one)
    return found


def _checkpointing(recipe: Recipe) -> list[str]:
    names = ["ar", "av", *(["rl"] if recipe.rl is not None else [])]
    return [f"{name}.gradient_checkpointing=true" for name in names]


def _frugal(recipe: Recipe) -> list[list[str]]:
    """What costs nothing but time: first in moderation, then all of it."""
    batches = _batches(recipe)
    return [[*_checkpointing(recipe), "precision=bf16", *batches[min(i, len(batches) - 1)]] for i in (1, -1)]


def _vllm(recipe: Recipe, sizes: Sizes) -> list[str]:
    """vLLM over a whole node, with a share of memory that it can begin in."""
    engine = ["rl.rollouts.engine=vllm", f"rl.rollouts.tensor_parallel={recipe.hardware.gpus}"]
    other = changed(recipe, tuple(engine))
    if other is None:
        return []
    share = StageMemory(other, sizes).vllm_needs() / GPUS[recipe.hardware.gpu].memory
    return [*engine, f"rl.rollouts.memory={math.ceil(100 * share) / 100}"]


def _more(recipe: Recipe) -> Iterator[list[str]]:
    """More GPUs, from one node to many, with micro-batches that a step's samples can be divided into."""
    hardware, rl = recipe.hardware, recipe.rl
    for nodes in NODES:
        if nodes * NODE <= hardware.world or nodes < hardware.nodes:
            continue
        more = [f"hardware.gpus={NODE}", f"hardware.nodes={nodes}"]
        if rl is not None:
            share = rl.samples // (nodes * NODE * rl.updates)
            if share < 1:
                return
            if rl.sharing_fault(nodes * NODE):
                more.append(
                    f"rl.micro_batch={max(n for n in range(1, min(share, rl.micro_batch) + 1) if share % n == 0)}"
                )
        yield more
