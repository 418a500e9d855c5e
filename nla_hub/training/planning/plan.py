"""What a recipe would take on the hardware that it declares, before anything is loaded or downloaded: `nla-hub train --plan`.

Bytes are judged (`memory.py`); hours are a range between what others took (`anchors.py`); money is hours times a price that the
user gives. What cannot be known is None here and "not known" wherever it is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nla_hub.errors import NLAError, RecipeError
from nla_hub.memory import MARGIN
from nla_hub.training.data import MAPPED_BYTES, make_labeler
from nla_hub.training.planning.alternatives import Alternative, alternatives
from nla_hub.training.planning.anchors import Hours, Run, hours, runs_like
from nla_hub.training.planning.base_sizes import Sizes
from nla_hub.training.planning.effort import Effort, document_tokens, efforts, label_seconds, labelled_rows
from nla_hub.training.planning.gpus import GPU, gpu_named
from nla_hub.training.planning.memory import BFLOAT16, StageBytes, StageMemory
from nla_hub.training.planning.memory_roles import FLOAT32, MOMENTS
from nla_hub.training.recipe import Recipe
from nla_hub.training.splits import data_splits
from nla_hub.units import size

TEXT_BYTES = 2
"""Bytes on disk of the text before a position for each token of its document: half of it on average, 4 bytes a token."""


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        memory: what it needs on each device.
        fits: whether the declared GPU has room for it; None where the recipe declares none.
        effort: what it has to do.
        hours: how long that takes; None where nothing comparable was recorded, or for a stage that is short.
    """

    memory: StageBytes
    fits: bool | None
    effort: Effort
    hours: Hours | None

    @property
    def name(self) -> str:
        """Of the stage."""
        return self.memory.name


@dataclass(frozen=True)
class Plan:
    """A recipe's plan.

    Attributes:
        gpu: what the recipe declares, None for a CPU.
        price: of an hour of one GPU, in the user's currency; None: not given.
        label_hours: of labels that the base model itself writes, beside the stages' own; None where another does, or not known.
        labels: what the labels cost, as the labeler estimates it (an object with `cost` and a text form), None where it cannot.
        unknown: why there are no hours; "" where there are.
    """

    recipe: Recipe
    sizes: Sizes
    stages: tuple[StagePlan, ...]
    gpu: GPU | None
    price: float | None
    label_hours: Hours | None
    labels: Any
    unknown: str

    @classmethod
    def of(cls, recipe: Recipe, *, price: float | None = None) -> Plan:
        """Reckon a recipe.

        Raises:
            RecipeError, UnknownNameError: a config, layer or GPU that cannot be. CheckpointError, HubError and their
                children: a base without `base.config` that cannot be read.
        """
        sizes, gpu = Sizes.of(recipe), gpu_named(recipe.hardware.gpu)
        unknown = _unknown(recipe, gpu)
        work = efforts(recipe, sizes, gpu)
        stages = []
        for stage in StageMemory(recipe, sizes).stages():
            effort = work.get(stage.name, Effort())
            time = None if unknown else hours(effort.seconds, sizes.av_values)
            fits = None if gpu is None else stage.total <= MARGIN * gpu.memory
            stages.append(StagePlan(stage, fits, effort, time))
        writing = None if unknown else hours(label_seconds(recipe, sizes, gpu), sizes.av_values)
        return cls(recipe, sizes, tuple(stages), gpu, price, writing, _labels(recipe, sizes), unknown)

    # -- time and money --------------------------------------------------------------------------------------

    @property
    def hours(self) -> Hours | None:
        """Of all stages whose time is known, and of the labels."""
        parts = [*(stage.hours for stage in self.stages), self.label_hours]
        known = [one for one in parts if one is not None]
        return sum(known[1:], start=known[0]) if known else None

    @property
    def gpu_hours(self) -> tuple[float, float] | None:
        """The same times the GPUs, all of which are held throughout."""
        found, world = self.hours, self.recipe.hardware.world
        return None if found is None else (found.low * world, found.high * world)

    def money(self, gpu_hours: tuple[float, float] | None) -> tuple[float, float] | None:
        """What GPU hours cost; None where they or the price are not known."""
        if gpu_hours is None or self.price is None:
            return None
        return gpu_hours[0] * self.price, gpu_hours[1] * self.price

    @property
    def runs(self) -> list[Run]:
        """Recorded trainings of about this size."""
        return runs_like(self.sizes.av_values, lora=self.recipe.lora is not None)

    # -- disk ------------------------------------------------------------------------------------------------

    @property
    def disk(self) -> dict[str, int]:
        """Bytes of the run directory by what they are; "checkpoint" is what a stage continues from, at its largest."""
        recipe, sizes, d = self.recipe, self.sizes, self.sizes.whole.d_model
        memory = StageMemory(recipe, sizes)
        av, ar = memory.half("av", recipe.lora), memory.half("ar", recipe.lora)
        ars = 2 if recipe.rl is not None and recipe.rl.watch_ar else 1
        splits = [n * recipe.data.positions for n in data_splits(recipe).values()]
        rows, row = sum(splits), d * FLOAT32
        found = {
            "vectors": sum(
                n * row * (2 if n * row >= MAPPED_BYTES else 1) for n in splits
            ),  # large ones mapped besides
            "shards": rows * row,  # until the rows are merged
            "texts": rows * TEXT_BYTES * document_tokens(recipe, sizes),
            "ar": ars * FLOAT32 * ar.trained,
            "av": FLOAT32 * av.trained,
            "rl": 0 if recipe.rl is None else FLOAT32 * (av.trained + ar.trained),
            "export": BFLOAT16 * (sizes.av_values + sizes.ar_values),
        }
        if recipe.rl is not None and recipe.rl.export_every is not None:
            written = recipe.rl.steps // recipe.rl.export_every
            found["rl_steps"] = written * found["export"] + min(written, 1) * found["rl"]  # one as the stage keeps it
        state = (1 + MOMENTS) * FLOAT32
        largest = av.trained + ars * ar.trained if recipe.rl is not None else max(av.trained, ar.trained)
        found["checkpoint"] = 2 * state * largest  # the next one is complete before the last one goes
        return found

    # -- the verdict -----------------------------------------------------------------------------------------

    @property
    def fits(self) -> bool:
        """Whether nothing speaks against the declared hardware."""
        return not self.faults

    @cached_property
    def faults(self) -> tuple[str, ...]:
        """Everything that speaks against it."""
        return tuple(self._faults())

    def _faults(self) -> Iterator[str]:
        recipe, hardware = self.recipe, self.recipe.hardware
        yield from setting_faults(recipe, self.sizes)
        if self.gpu is None:
            return
        for stage in self.stages:
            if not stage.fits:
                roles = sorted(stage.memory.roles.items(), key=lambda item: -item[1])
                largest = ", ".join(f"{name.replace('_', ' ')} {size(n)}" for name, n in roles[:4])
                when = f" ({stage.memory.moment})" if stage.memory.moment else ""
                yield (
                    f"{stage.name}: {size(stage.memory.total)} on each {hardware.gpu}{when}, of which "
                    f"{size(MARGIN * self.gpu.memory)} can be given away; most of it: {largest}"
                )

    @cached_property
    def alternatives(self) -> tuple[Alternative, ...]:
        """What fits instead; empty where the recipe itself does, or nothing that is tried does."""
        if self.fits:
            return ()

        def fits(other: Recipe) -> bool:
            gpu = gpu_named(other.hardware.gpu)
            if any(setting_faults(other, self.sizes)):
                return False
            stages = StageMemory(other, self.sizes).stages()
            return gpu is None or all(stage.total <= MARGIN * gpu.memory for stage in stages)

        return tuple(alternatives(self.recipe, self.sizes, fits))

    def require(self) -> None:
        """Raise a RecipeError with everything that speaks against the declared hardware, and what would fit."""
        if self.fits:
            return
        would = [f"would fit ({one.why}): {' '.join(map(_quoted, one.settings))}" for one in self.alternatives]
        raise RecipeError(
            "The recipe does not fit the hardware that it declares.",
            where=self.recipe.name,
            got=said(self.recipe),
            faults=[*self.faults, *would],
            next_step="add one of these to the command"
            if would
            else "a smaller base model, or other hardware: nothing that was tried fits",
        )


def setting_faults(recipe: Recipe, sizes: Sizes) -> Iterator[str]:
    """Settings that contradict the declared hardware, whatever it has of memory."""
    hardware, rl = recipe.hardware, recipe.rl
    gpu = gpu_named(hardware.gpu)
    if rl is None:
        return
    if fault := rl.sharing_fault(hardware.world):
        yield f"rl.{fault}"
    if rl.rollouts.engine != "vllm":
        return
    split = rl.rollouts.tensor_parallel
    if hardware.gpus % split:
        yield f"rl.rollouts.tensor_parallel: {split} does not divide the {hardware.gpus} GPUs of a node"
    needed = StageMemory(recipe, sizes).vllm_needs()
    if gpu is not None and needed > rl.rollouts.memory * gpu.memory:
        yield (
            f"rl.rollouts.memory: {rl.rollouts.memory} of a {hardware.gpu} is {size(rl.rollouts.memory * gpu.memory)}, and "
            f"vLLM needs {size(needed)} for its part of the AV, a little cache and itself"
        )


def said(recipe: Recipe) -> str:
    """The declared hardware in words."""
    hardware = recipe.hardware
    nodes = f", {hardware.nodes} nodes" if hardware.nodes > 1 else ""
    return f"{hardware.gpus} x {hardware.gpu}{nodes}"


def _quoted(setting: str) -> str:
    return f"'{setting}'" if set(setting) & set(" {}") else setting


def _unknown(recipe: Recipe, gpu: GPU | None) -> str:
    """Why no recorded timing is comparable, "" where one may be."""
    if gpu is None:
        return "nothing was recorded on CPUs"
    if recipe.precision != "bf16":
        return "nothing was recorded in float32"
    if recipe.base.quantization is not None:
        return "nothing was recorded with packed weights"
    if recipe.hardware.placement.optimizers == "cpu":
        return "nothing was recorded with optimizers in main memory"
    return ""


def _labels(recipe: Recipe, sizes: Sizes) -> Any:
    """The labeler's own estimate; None where it has none, or cannot be asked."""
    try:
        estimate = getattr(make_labeler(recipe.labels), "estimate", None)
        # A label is asked for the text up to its token: half of a document on average.
        return None if estimate is None else estimate(labelled_rows(recipe), document_tokens(recipe, sizes) / 2)
    except NLAError:
        return None
