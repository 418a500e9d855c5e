"""The samples of one step: which rows, in which order, with which random numbers, and what the AV wrote for them.

A sample's random stream comes from (seed, step) and its key (document, position, sample) alone, and the sampler runs fixed
blocks of the step's rows, so the samples do not depend on how many processes share them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from torch import Tensor

from nla_hub.engines.base import Completion, Engine
from nla_hub.errors import RecipeError
from nla_hub.prompts import Status, parse_explanation
from nla_hub.sampling import RowKey, uniforms
from nla_hub.training.data import TrainingRows
from nla_hub.training.recipe import RLSpec


def prompt_order(rows: int, spec: RLSpec, *, seed: int) -> list[int]:
    """The rows of all steps one after the other, `spec.prompts` a step: passes over shuffled rows.

    What is left of a pass and fills no step is dropped, so that no row stands twice in one step.

    Raises:
        RecipeError: fewer rows than one step needs.
    """
    if rows < spec.prompts:
        raise RecipeError(
            "There are too few vectors for one step.",
            got=f"{rows} rows from rl.documents = {spec.documents}",
            expected=f"at least rl.prompts = {spec.prompts}",
            next_step="raise rl.documents or lower rl.prompts",
        )
    rng = Random(seed)
    order: list[int] = []
    while len(order) < spec.steps * spec.prompts:
        one = list(range(rows))
        rng.shuffle(one)
        order += one[: rows - rows % spec.prompts]
    return order[: spec.steps * spec.prompts]


def step_seed(seed: int, step: int) -> int:
    """The seed of one step's samples: in RL the step is part of the seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}\x1frl\x1f{step}".encode()).digest()[:8], "little")


@dataclass(frozen=True)
class Rollout:
    """What the AV wrote for some of a step's rows.

    Attributes:
        rows: index of each sample's vector among the stage's rows.
        first: place of the first one among all samples of the step, over all processes.
        vectors: raw float32 [n, d].
        completions: with the sampler's own log-probabilities.
    """

    rows: tuple[int, ...]
    first: int
    vectors: Tensor
    completions: tuple[Completion, ...]
    statuses: tuple[Status, ...]
    texts: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def usable(self) -> list[int]:
        """Samples with an explanation."""
        return [i for i, text in enumerate(self.texts) if text is not None]


def sample(
    engine: Engine, data: TrainingRows, rows: Sequence[int], spec: RLSpec, *, seed: int, step: int, first: int = 0
) -> Rollout:
    """One explanation for each of `rows` (a row stands `spec.group` times in succession among a step's samples)."""
    vectors = data.vectors[list(rows)]
    keys = [RowKey(data.doc_ids[r], data.positions[r], (first + i) % spec.group) for i, r in enumerate(rows)]
    draws = uniforms(step_seed(seed, step), keys, spec.max_new_tokens)
    completions: list[Completion] = []
    begin = 0
    if not getattr(engine, "exact_draws", True):
        # It makes batches of its own; processes that share one must ask it equally often.
        begin = len(rows)
        completions += engine.generate(
            vectors,
            draws,
            temperature=spec.temperature,
            max_new_tokens=spec.max_new_tokens,
            batch_size=spec.rollout_block,
        )
    while begin < len(rows):
        # Blocks are cut by the place in the whole step.
        end = min(len(rows), begin + spec.rollout_block - (first + begin) % spec.rollout_block)
        completions += engine.generate(
            vectors[begin:end],
            draws[begin:end],
            temperature=spec.temperature,
            max_new_tokens=spec.max_new_tokens,
            batch_size=end - begin,
        )
        begin = end
    parsed = [parse_explanation(c.text) for c in completions]
    return Rollout(
        rows=tuple(rows),
        first=first,
        vectors=vectors,
        completions=tuple(completions),
        statuses=tuple(status for status, _ in parsed),
        texts=tuple(text for _, text in parsed),
    )
