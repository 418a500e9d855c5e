"""The least time that a step of decoding can take on a machine whose bandwidth and matmul rate are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from nla_hub.adapters import Adapter
from nla_hub.architecture import Architecture


@dataclass(frozen=True)
class Decoding:
    """What a step of decoding must do, for a model and a batch.

    Attributes:
        architecture: the model's sizes.
        weight_bytes, weight_values: of everything that a step reads of the weights, see `read_weights`.
        width: bytes of a key's or value's number.
        rows: of the batch.
        shared: tokens before the marker, the same in all rows.
        own: tokens of each row's prompt from the marker on.
    """

    architecture: Architecture
    weight_bytes: int
    weight_values: int
    width: int
    rows: int
    shared: int
    own: int

    def step(self, answered: int) -> tuple[float, float]:
        """Bytes that must be read and operations that must be done for one step, `answered` tokens being there already.

        With B rows, w bytes a number, S shared and T = own + answered tokens of each row's own (a window W counts at most W
        tokens, the newest):

        - bytes: weight_bytes + sum over blocks of 2 kv_heads head_dim w (S + B T). Weights once a step; keys and values of
          the shared tokens once for all rows. What is written, activations and logits are left out: it is a lower bound.
        - operations: 2 B weight_values + sum over blocks of 4 heads head_dim B (S + T). A multiplication and an addition
          count as two.
        """
        a = self.architecture
        read, done = float(self.weight_bytes), 2.0 * self.rows * self.weight_values
        for window in a.windows:
            own, shared = self.own + answered, self.shared
            if window is not None:
                own = min(own, window)
                shared = min(shared, window - own)
            read += 2 * a.kv_heads * a.head_dim * self.width * (shared + self.rows * own)
            done += 4 * a.heads * a.head_dim * self.rows * (shared + own)
        return read, done

    def least_seconds(self, new_tokens: int, *, bandwidth: float, rate: float) -> float | None:
        """Mean over the steps behind the first token of max(bytes / bandwidth, operations / rate); None without a step.

        Args:
            bandwidth: bytes a second. rate: operations a second.
        """
        steps = range(1, new_tokens)
        if not steps:
            return None
        costs = [self.step(answered) for answered in steps]
        return sum(max(read / bandwidth, done / rate) for read, done in costs) / len(costs)


def read_weights(model: nn.Module, adapter: Adapter) -> tuple[int, int]:
    """Bytes and values of the weights that a step reads: all of them but an input embedding of its own.

    Of an embedding only the rows of the newest tokens are read; one that is the lm_head too is read as that.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    table = adapter.embedding_module(model)
    skipped = {id(value) for value in table.parameters()} - {id(value) for value in head.parameters()}
    kept = [value for value in model.parameters() if id(value) not in skipped]
    return sum(v.numel() * v.element_size() for v in kept), sum(v.numel() for v in kept)
