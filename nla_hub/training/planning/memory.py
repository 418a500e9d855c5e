"""What the stages of a recipe need of memory on the hardware that it declares: for `train --plan`, before anything is loaded.

Reckoned from the base model's config alone, whose weights are counted on PyTorch's meta device. The source is in memory in the
stages that read it (data, eval), not while the halves are trained. `memory_roles.py` holds the arithmetic of one half.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from nla_hub.memory import MARGIN, Part, PartSize, Workload, cache_bytes, working_bytes
from nla_hub.sidecar import INJECTION_PLACEHOLDER
from nla_hub.training.checks import source_settings
from nla_hub.training.planning.base_sizes import Sizes, base_config, header_of, is_adapted, lora_values
from nla_hub.training.planning.gpus import gpu_named
from nla_hub.training.planning.memory_roles import (
    FLOAT32,
    MOMENTS,
    ROLES,
    Half,
    Moment,
    StageBytes,
    label_logits,
    tiled_logits,
    training_bytes_per_token,
)
from nla_hub.training.recipe import LoRASpec, Recipe, StageSpec
from nla_hub.training.stages import stages_of

__all__ = [
    "Sizes",
    "StageBytes",
    "StageMemory",
    "base_config",
    "header_of",
    "lora_values",
    "plan",
    "training_bytes_per_token",
]

BFLOAT16 = 2
"""Bytes: what is only read is read in bfloat16 on an accelerator."""

TEXT_TOKENS = 150
"""Tokens of a label where no rl stage says how long explanations are; the length the released pairs were trained with."""

CAPTURE_TOKENS = 512
"""Tokens of a document that is captured, where the base model reads more and the recipe does not say."""

SOURCE_LABELER = "source"
"""The labeler that is the complete base model itself, in the data stage."""

LABELS_AT_ONCE, LABEL_TOKENS = 64, 600
"""Of that labeler, where its settings do not say: prompts together, and tokens of an answer at most."""

VLLM_EXTRA = 3 * 2**30
"""Bytes of its share that vLLM needs besides weights and cache: activations of its first pass, CUDA graphs. Untuned."""

VLLM_ROWS = 8
"""Sequences whose cache vLLM's share must hold at least; with fewer it would hardly batch."""


def plan(recipe: Recipe, sizes: Sizes | None = None) -> list[StageBytes]:
    """The stages of a recipe with what each needs on each device of the hardware that the recipe declares.

    Raises:
        RecipeError, CheckpointError, HubError and their children: a base model whose config cannot be had.
        UnknownNameError: a GPU that is not known.
    """
    return StageMemory(recipe, Sizes.of(recipe) if sizes is None else sizes).stages()


class StageMemory:
    """The bytes of one recipe's stages."""

    def __init__(self, recipe: Recipe, sizes: Sizes) -> None:
        self.recipe, self.sizes = recipe, sizes
        self.hardware = recipe.hardware
        self.gpu = gpu_named(self.hardware.gpu)
        self.world = self.hardware.world
        self.read = torch.float32 if self.gpu is None else torch.bfloat16
        self.width = BFLOAT16 if recipe.precision == "bf16" else FLOAT32
        self.text = recipe.rl.max_new_tokens if recipe.rl is not None else TEXT_TOKENS
        asked = recipe.data.max_tokens or CAPTURE_TOKENS
        length = min(asked, sizes.limit or asked)
        self.work = Workload(max_new_tokens=self.text, text=length)
        self.source = sizes.size("source", self.read)

    def stages(self) -> list[StageBytes]:
        """All of them, in order."""
        return [getattr(self, f"_{name}")() for name in stages_of(self.recipe)]

    # -- the halves ------------------------------------------------------------------------------------------

    def half(self, name: str, lora: LoRASpec | None) -> Half:
        """The AV or an AR as it is trained: as a whole, or factors (and a value head) over a frozen base."""
        sizes, place = self.sizes, self.hardware.placement
        sharded = self.world > 1 and getattr(place, name) == "sharded"
        kept = [n for n in sizes.blocks if name == "av" or n <= sizes.layer]
        values = sizes.av_values if name == "av" else sizes.ar_values
        head = 0 if name == "av" else sizes.whole.d_model**2
        linear = {n: s for n, s in sizes.linear.items() if sizes.block_of(n) in kept}
        frozen, trained, adapted = 0, values, 0
        if lora is not None:
            part: Part = "av" if name == "av" else "source"
            frozen = sizes.size(part, self.read, self.recipe.base.quantization).loaded
            trained = lora_values(lora, linear) + head
            adapted = sum(s[1] for n, s in linear.items() if sizes.block_of(n) == 0 and is_adapted(lora, n))
        return Half(
            frozen=frozen,
            trained=trained,
            values=values,
            block=max(sizes.blocks[n] for n in kept),
            root=values - sum(sizes.blocks[n] for n in kept),
            architecture=sizes.whole if name == "av" else sizes.trunk.architecture,
            norms=sizes.norms,
            adapted=adapted,
            sharded=sharded,
            offloaded=sharded and place.optimizers == "cpu",
        )

    def _ar(self) -> StageBytes:
        return self._supervised("ar", self.recipe.ar, self.work.template + self.text)

    def _av(self) -> StageBytes:
        return self._supervised("av", self.recipe.av, self.work.prompt + self.text)

    def _supervised(self, name: str, spec: StageSpec, tokens: int) -> StageBytes:
        half, share = self.half(name, self.recipe.lora), math.ceil(spec.batch_size / self.world)
        rows = min(share, spec.micro_batch or share)
        kept = rows * tokens * half.per_token(self.width, checkpointing=spec.gradient_checkpointing)
        if name == "av":
            kept += label_logits(rows, self.text, half.architecture.vocabulary)
        return self._trained(name, {name: half}, {}, [*self._moments("", half, 1, kept)], half.buckets(self.world))

    def _rl(self) -> StageBytes:
        rl = self.recipe.rl
        assert rl is not None
        av, ar = self.half("av", self.recipe.lora or rl.lora), self.half("ar", self.recipe.lora)
        halves = {"av": av, "ar": ar, **({"watching_ar": ar} if rl.watch_ar else {})}
        fixed = {}
        if rl.beta > 0 and rl.lora is None:  # the AV that the stage started from; of factors a copy over the same base
            fixed["reference"] = av.part(FLOAT32 * av.trained, self.world)
        fixed["rollouts"], sampling = self._rollouts(av)
        rows, checkpointing = rl.micro_batch, rl.gradient_checkpointing
        av_kept = (self.work.prompt + self.text) * av.per_token(self.width, checkpointing=checkpointing)
        ar_kept = (self.work.template + self.text) * ar.per_token(self.width, checkpointing=checkpointing)
        moments = [
            # Both ARs have learnt from a step's samples before the AV's backward pass begins (`rl/scoring.py`).
            Moment("sampling", 0, 0, sampling),
            *self._moments("AR: ", ar, len(halves) - 1, rows * ar_kept),
            *self._moments("AV: ", av, 1, rows * av_kept + tiled_logits(rows, self.text, self.sizes.whole.vocabulary)),
        ]
        return self._trained("rl", halves, fixed, moments, av.buckets(self.world))

    def _moments(self, who: str, half: Half, n: int, kept: int) -> Iterator[Moment]:
        """What `n` such halves need beside weights and moments, one after the other: in their passes, in an update."""
        gradients = 0 if half.offloaded else n * half.gradients(self.world)
        yield Moment(f"{who}forward and backward", gradients, half.gathered(self.width), kept)
        if self.gpu is not None and not half.offloaded:  # there AdamW makes one more copy of all weights at once
            yield Moment(f"{who}optimizer step", gradients, 0, half.part(FLOAT32 * half.trained, self.world))

    def _trained(
        self, name: str, halves: Mapping[str, Half], fixed: Mapping[str, int], moments: Sequence[Moment], buckets: int
    ) -> StageBytes:
        """A stage at its worst moment. `fixed` roles are there all the time; a reference goes where its AV is."""
        roles, moved, gradients = dict(fixed), 0, 0
        roles["moments"] = 0
        for role, half in halves.items():
            weights, kept = half.weights(self.world), half.moments(self.world)
            if half.offloaded:
                moved += weights + kept
                gradients = max(gradients, half.gradients(self.world) * (len(halves) - 1 if role != "av" else 1))
            else:
                roles[role] = weights
                roles["moments"] += kept
        if (av := halves.get("av")) is not None and av.offloaded:
            moved += roles.pop("reference", 0)
        worst = max(moments, key=lambda moment: moment.total)
        roles |= {"gradients": worst.gradients + buckets, "gathered": worst.gathered, "activations": worst.activations}
        return self._finished(name, roles, moved + gradients, worst.name)

    def _finished(self, name: str, roles: Mapping[str, int], moved: int = 0, moment: str = "") -> StageBytes:
        on_device = {role: roles[role] for role in ROLES if roles.get(role)}
        return StageBytes(name, on_device, moved * self.hardware.gpus, moment)

    # -- rollouts --------------------------------------------------------------------------------------------

    def _rollouts(self, av: Half) -> tuple[int, int]:
        """Bytes that the sampler holds, and bytes that it works with beside them."""
        rl = self.recipe.rl
        assert rl is not None
        if rl.rollouts.engine == "vllm":
            # Weights are sent one by one: the widest is whole for a moment, in float32 and in 16 bits.
            widest = max(math.prod(shape) for shape, _ in self.sizes.header.values())
            return self.vllm_share(), (FLOAT32 + BFLOAT16) * widest
        rows = min(rl.rollout_block, math.ceil(rl.samples / self.world))
        whole = not av.frozen and not av.sharded
        width = self.read.itemsize if not whole else FLOAT32
        part = PartSize("av", 0, 0, 0, self.sizes.whole, width)
        copied = self.read.itemsize * self.sizes.av_values if av.sharded else 0
        # What stands before the marker is kept once for all rows: the same share of tokens as of the template's characters.
        before, _, after = self.recipe.prompts.av.partition(INJECTION_PLACEHOLDER)
        shared = self.work.prompt * len(before) // max(1, len(before) + len(after))
        return copied, working_bytes(part, Workload(rows, self.work.prompt, self.text, shared=shared))

    def vllm_share(self) -> int:
        """Bytes that vLLM takes of a device: what the recipe gives it; without a GPU what it needs."""
        rl = self.recipe.rl
        assert rl is not None
        return self.vllm_needs() if self.gpu is None else int(rl.rollouts.memory * self.gpu.memory)

    def vllm_needs(self) -> int:
        """Bytes of a device without which vLLM cannot start: its part of the AV, a little cache, its own working memory."""
        rl = self.recipe.rl
        assert rl is not None
        cache = cache_bytes(self.sizes.whole, VLLM_ROWS, self.work.prompt + self.text, BFLOAT16)
        return math.ceil((BFLOAT16 * self.sizes.av_values + cache) / rl.rollouts.tensor_parallel) + VLLM_EXTRA

    # -- stages that train nothing ---------------------------------------------------------------------------

    def _source(self) -> StageBytes:
        if self.recipe.base.train is None:
            return StageBytes("source")
        settings = source_settings(self.recipe)
        tokens = settings.batch_documents * settings.max_length
        whole = replace(self.half("av", None), sharded=False, offloaded=False)
        kept = tokens * whole.per_token(FLOAT32, checkpointing=False) + label_logits(
            1, tokens, whole.architecture.vocabulary
        )
        value = FLOAT32 * whole.values
        return self._finished(
            "source", {"source": value, "gradients": value, "moments": MOMENTS * value, "activations": kept}
        )

    def _data(self) -> StageBytes:
        spread = self.hardware.placement.source == "spread"
        divided = self.hardware.gpus if spread else 1
        weights, working, moment = self.source.loaded, working_bytes(self.source, self.work), "capture"
        if self.recipe.labels.labeler == SOURCE_LABELER:
            told = self.recipe.labels.settings
            rows, most = told.get("batch_size", LABELS_AT_ONCE), told.get("max_output_tokens", LABEL_TOKENS)
            whole = self.sizes.size("av", self.read).loaded
            part = PartSize("av", 0, 0, 0, self.sizes.whole, self.read.itemsize)
            writing = working_bytes(part, Workload(rows, self.work.text, most))
            if whole / divided + writing > weights / divided + working:
                weights, working, moment = whole, writing, "labels of the base model"
        return self._finished("data", {"source": math.ceil(weights / divided), "activations": working}, moment=moment)

    def _export(self) -> StageBytes:
        """One half after the other in main memory: as it is read, and once more as it is written."""
        return StageBytes("export", {}, 2 * FLOAT32 * self.sizes.av_values)

    def _eval(self) -> StageBytes:
        """The finished pair in one process: resident, else one part after the other, else spread over a node's devices."""
        head = FLOAT32 * self.sizes.whole.d_model**2
        weights = {"source": self.source.loaded, "av": self.sizes.size("av", self.read).loaded}
        weights["ar"] = self.source.loaded + head
        parts = {
            "source": self.source,
            "av": PartSize("av", 0, 0, 0, self.sizes.whole, self.read.itemsize),
            "ar": PartSize("ar", 0, 0, 0, self.source.architecture, self.read.itemsize),
        }
        working = {name: working_bytes(part, self.work) for name, part in parts.items()}
        resident = self._finished("eval", {**weights, "activations": max(working.values())})
        if self.gpu is None or resident.total <= MARGIN * self.gpu.memory:
            return resident
        worst = max(weights, key=lambda name: weights[name] + working[name])
        staged = self._finished("eval", {worst: weights[worst], "activations": working[worst]})
        if staged.total <= MARGIN * self.gpu.memory or self.hardware.gpus == 1:
            return replace(staged, moment="one part at a time")
        divided = math.ceil(weights[worst] / self.hardware.gpus)
        return replace(
            self._finished("eval", {worst: divided, "activations": working[worst]}), moment="spread over the node"
        )
