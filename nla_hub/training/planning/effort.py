"""How much work the stages of a recipe are: rows, tokens, steps, and the seconds that hardware at its peak would take for them.

Nothing reaches these seconds; `anchors.py` says by how much others missed them. Work is matrix products alone: 2 operations a
value and token forwards, 2 for the gradient of what a layer read, 2 for that of its weights (none where they are frozen), 2 for
computing again under gradient checkpointing. Sampling reads every weight once a token and cannot be faster than that.
Attention, communication, tokenizing and waiting are not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nla_hub.training.labeling.cost import EXPECTED_OUTPUT_TOKENS
from nla_hub.training.planning.base_sizes import Sizes
from nla_hub.training.planning.gpus import GPU
from nla_hub.training.planning.memory import BFLOAT16, CAPTURE_TOKENS, LABELS_AT_ONCE, SOURCE_LABELER, TEXT_TOKENS
from nla_hub.training.recipe import Recipe, StageSpec
from nla_hub.training.splits import UNLABELLED, data_splits

PROMPT, TEMPLATE = 100, 40
"""Tokens of the AV's prompt and around the AR's text: the defaults of `memory.Workload`."""


@dataclass(frozen=True)
class Seconds:
    """At the hardware's peak: of passes that train or read, and of sampling. They are missed by different factors."""

    passes: float = 0.0
    sampling: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.passes + other.passes, self.sampling + other.sampling)

    def times(self, factor: float) -> Seconds:
        """So many of them."""
        return Seconds(factor * self.passes, factor * self.sampling)


@dataclass(frozen=True)
class Effort:
    """What a stage has to do.

    Attributes:
        rows: vectors, label rows or samples; at most, where documents are short or labels unusable.
        tokens: that are read or written for them, at most.
        steps: optimizer steps of the half that it trains, steps of the rl stage; 0 where nothing is trained.
        seconds: at the peak of the declared hardware; None where nothing is known of it.
    """

    rows: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: Seconds | None = None


@dataclass(frozen=True)
class Machine:
    """Accelerators of one kind that work together."""

    gpu: GPU
    count: int

    def passes(self, operations: float) -> float:
        """Seconds of so many operations, shared by all."""
        return operations / (self.gpu.flops * self.count)

    def sampling(self, values: float, samples: int, tokens: int, *, block: int, split: int = 1) -> float:
        """Seconds of sampling `tokens` for each of `samples`, with a model of `values` in 16 bits.

        Args:
            block: sequences that run together.
            split: accelerators that one copy of the model is divided over.
        """
        own = math.ceil(samples * split / self.count)
        turns, together = math.ceil(own / block), min(own, block)
        reading = BFLOAT16 * values / (split * self.gpu.bandwidth)
        computing = 2 * values * together / (split * self.gpu.flops)
        return tokens * turns * max(reading, computing)


@dataclass(frozen=True)
class Products:
    """Values that a token is multiplied with: of the AV and of the AR, in both directions."""

    av: float
    ar: float
    frozen: bool = False

    @classmethod
    def of(cls, sizes: Sizes, *, frozen: bool) -> Products:
        """All but norms and the embedding, whose rows are only looked up."""
        d, vocabulary = sizes.whole.d_model, sizes.whole.vocabulary
        below = sum(n for number, n in sizes.blocks.items() if number <= sizes.layer)
        return cls(sum(sizes.blocks.values()) + d * vocabulary, below + d * d, frozen)

    def trained(self, values: float, *, checkpointing: bool = False) -> float:
        """Operations of a forward and backward pass for a token."""
        return values * ((4 if self.frozen else 6) + (2 if checkpointing else 0))

    def step(
        self,
        machine: Machine,
        samples: int,
        text: int,
        *,
        block: int,
        split: int = 1,
        ars: int = 1,
        reference: bool = True,
        updates: int = 1,
        checkpointing: bool = False,
        labels: float = 0.0,
    ) -> Seconds:
        """Of a step of the rl stage; `labels` is the share of label rows that the ARs see beside the samples."""
        av = (updates * self.trained(self.av, checkpointing=checkpointing) + (2 * self.av if reference else 0)) * (
            PROMPT + text
        )
        ar = ars * (1 + labels) * self.trained(self.ar, checkpointing=checkpointing) * (TEMPLATE + text)
        return Seconds(
            machine.passes(samples * (av + ar)), machine.sampling(self.av, samples, text, block=block, split=split)
        )


def efforts(recipe: Recipe, sizes: Sizes, gpu: GPU | None) -> dict[str, Effort]:
    """What the stages have to do that read or train; `gpu` is the declared one."""
    machine = None if gpu is None else Machine(gpu, recipe.hardware.world)
    found = {"data": _data(recipe, sizes, machine)}
    text = recipe.rl.max_new_tokens if recipe.rl is not None else TEXT_TOKENS
    products = Products.of(sizes, frozen=recipe.lora is not None)
    ars = 2 if recipe.rl is not None and recipe.rl.watch_ar else 1
    found["ar"] = _supervised(recipe, recipe.ar, ars * products.ar, TEMPLATE + text, machine, products)
    found["av"] = _supervised(recipe, recipe.av, products.av, PROMPT + text, machine, products)
    if (rl := recipe.rl) is not None:
        rows = rl.steps * rl.samples
        seconds = None
        if machine is not None:
            vllm = rl.rollouts.engine == "vllm"
            seconds = products.step(
                machine,
                rl.samples,
                text,
                block=rl.samples if vllm else rl.rollout_block,
                split=rl.rollouts.tensor_parallel,
                ars=ars,
                reference=rl.beta > 0,
                updates=rl.iterations,
                checkpointing=rl.gradient_checkpointing,
                labels=rl.label_share,
            ).times(rl.steps)
        found["rl"] = Effort(rows, rows * text, rl.steps, seconds)
    return found


def labelled_rows(recipe: Recipe) -> int:
    """Rows that a labeler is asked for, at most."""
    return sum(n for name, n in data_splits(recipe).items() if name not in UNLABELLED) * recipe.data.positions


def label_seconds(recipe: Recipe, sizes: Sizes, gpu: GPU | None) -> Seconds | None:
    """Peak seconds of labels that the base model writes, in every process that has it; None where another does."""
    if gpu is None or recipe.labels.labeler != SOURCE_LABELER:
        return None
    block = int(recipe.labels.settings.get("batch_size", LABELS_AT_ONCE))
    values = Products.of(sizes, frozen=False).av
    # Divided over a node's devices block by block, one of them works at a time.
    writers = 1 if recipe.hardware.placement.source == "spread" else recipe.hardware.world
    sampling = Machine(gpu, writers).sampling(values, labelled_rows(recipe), EXPECTED_OUTPUT_TOKENS, block=block)
    return Seconds(0.0, sampling)


def document_tokens(recipe: Recipe, sizes: Sizes) -> int:
    """Tokens of a document that are read, at most."""
    most = recipe.data.max_tokens or CAPTURE_TOKENS
    return most if sizes.limit is None else min(most, sizes.limit)


def _data(recipe: Recipe, sizes: Sizes, machine: Machine | None) -> Effort:
    documents = sum(data_splits(recipe).values())
    tokens = documents * document_tokens(recipe, sizes)
    seconds = None
    if machine is not None:
        # Divided over a node's devices block by block, one of them works at a time.
        spread = recipe.hardware.placement.source == "spread"
        readers = Machine(machine.gpu, recipe.hardware.nodes) if spread else machine
        seconds = Seconds(readers.passes(2.0 * sizes.trunk_values * tokens))
    return Effort(documents * recipe.data.positions, tokens, 0, seconds)


def _supervised(
    recipe: Recipe, spec: StageSpec, values: float, length: int, machine: Machine | None, products: Products
) -> Effort:
    rows = spec.documents * recipe.data.positions
    tokens = rows * spec.epochs * length
    operations = tokens * products.trained(values, checkpointing=spec.gradient_checkpointing)
    seconds = None if machine is None else Seconds(machine.passes(operations))
    return Effort(rows, tokens, math.ceil(rows / spec.batch_size) * spec.epochs, seconds)
