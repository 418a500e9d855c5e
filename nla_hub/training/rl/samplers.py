"""What samples in the rl stage besides the weights under training: an engine that is sent them before each step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from nla_hub.engines.base import Engine


class SyncedEngine(Engine, Protocol):
    """An engine with weights of its own."""

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the AV's present weights.

        Args:
            weights: every parameter of the complete causal LM by its name in `state_dict()` of a plain transformers model
                (no wrapper's prefix, LoRA factors merged in), whole, on the device that trains. Tied weights come once.
                Consumed one after the other, so that only one gathered weight is in memory beside the shards.
        """
        ...
