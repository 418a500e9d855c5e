"""One prompt, many vectors: the text before the marker is computed once and attended by all rows together.

All prompts of one AV are the same tokens except one row. What stands before the marker has the same keys and values in every
row, so they are kept once, and the queries of all rows meet them in one matrix product; each row keeps only what comes
from the marker on, in memory that is allocated once. It goes through transformers' own model code, by a registered attention
function and a small cache object, so it serves every architecture whose attention transformers makes replaceable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

ATTENTION = "nla_shared_prefix"
"""Name of the attention function in transformers' registry."""

SHORTEST = 4
"""Tokens before the marker from which keeping them apart is worth it."""

ROOM = 32
"""Tokens by which the memory of the rows' own keys and values grows. Reading memory that is half empty costs a tenth of the
time (48 rows, d 256, two cores); copying what is there costs less."""


class SharedPrefix:
    """Keys and values of a prompt's beginning, [1, kv heads, length, head dim] a block, kept once for all rows."""

    def __init__(self, blocks: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.blocks = list(blocks)

    @classmethod
    def of(cls, model: Any, ids: Sequence[int], device: torch.device) -> SharedPrefix:
        """Run `model` over the beginning of a prompt, once, with its own attention."""
        cache = DynamicCache()  # without a config: no block forgets what lies before its window
        tokens = torch.tensor([list(ids)], device=device)
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        layers: list[Any] = list(cache.layers)
        return cls([(layer.keys, layer.values) for layer in layers])

    def __len__(self) -> int:
        return int(self.blocks[0][0].shape[2])


class TailCache:
    """What each row has seen from the marker on: keys and values [kv heads, rows, room, head dim] of each block.

    The room grows by `ROOM` tokens at a time up to the capacity, so that what a step reads lies close together. Heads stand
    before rows, so that both parts of the attention are matrix products over the same memory. It answers what transformers'
    models ask of a cache: `update`, `get_seq_length`, `get_query_offset`, `get_mask_sizes`.
    """

    def __init__(self, prefix: SharedPrefix, capacity: int) -> None:
        self.prefix = prefix
        self.capacity = capacity
        self._keys: list[Tensor | None] = [None] * len(prefix.blocks)
        self._values: list[Tensor | None] = [None] * len(prefix.blocks)
        self._filled = [0] * len(prefix.blocks)
        self.is_sliding = [False] * len(prefix.blocks)
        self.is_compileable = False

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the newest keys and values [rows, kv heads, new, head dim] of a block.

        Returns:
            All of that block's tail so far, [kv heads, rows, tail, head dim]: a view, which only `attend` reads.
        """
        begin = self._filled[layer_idx]
        end = begin + keys.shape[2]
        self._filled[layer_idx] = end
        return self._append(self._keys, keys, layer_idx, begin, end), self._append(
            self._values, values, layer_idx, begin, end
        )

    def _append(self, stores: list[Tensor | None], new: Tensor, block: int, begin: int, end: int) -> Tensor:
        store = stores[block]
        if store is None or store.shape[2] < end:
            rows, heads, _, width = new.shape
            room = min(self.capacity, -(-end // ROOM) * ROOM)
            larger = new.new_empty(heads, rows, room, width)
            if store is not None:
                larger[:, :, :begin] = store[:, :, :begin]
            stores[block] = store = larger
        store[:, :, begin:end] = new.transpose(0, 1)
        return store[:, :, :end]

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Tokens of a row so far, the shared ones included."""
        return len(self.prefix) + self._filled[layer_idx or 0]

    def get_query_offset(self, layer_idx: int | None = 0) -> int:
        """Position of the next token."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int | None = 0) -> tuple[int, int]:
        """Length of what is attended, and where it begins."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_max_cache_shape(self, *_: Any) -> int:
        """Tokens that a row may come to."""
        return len(self.prefix) + self.capacity

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keep only these rows; a row may be named several times."""
        for stored in (self._keys, self._values):
            for i, tensor in enumerate(stored):
                if tensor is not None:
                    heads, _, room, width = tensor.shape
                    kept = tensor.new_empty(heads, len(rows), room, width)
                    kept[:, :, : self._filled[i]] = tensor[:, rows, : self._filled[i]]
                    stored[i] = kept


_RUNNING: ContextVar[TailCache | None] = ContextVar("nla_hub_tail_cache", default=None)


@contextmanager
def shared_attention(model: Any, cache: TailCache) -> Iterator[None]:
    """While open, `model` attends the shared beginning of `cache` beside each row's own tail."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    token = _RUNNING.set(cache)
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
        _RUNNING.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of all rows over the shared beginning and each row's own tail.

    Args:
        query: [rows, heads, new, head dim]. key, value: what `TailCache.update` returns, the newest last.

    Returns:
        [rows, new, heads, head dim].

    The two parts of the scores meet in one softmax in float32. Causality matters inside the newest tokens alone: everything
    before them is seen by all of them.
    """
    cache = _RUNNING.get()
    assert cache is not None, "the attention of a shared prefix runs inside shared_attention() only"
    index: Any = module.layer_idx
    prefix_key, prefix_value = cache.prefix.blocks[index]
    rows, heads, new, width = query.shape
    kv_heads, tail = key.shape[0], key.shape[2]
    before, each = prefix_key.shape[2], heads // kv_heads * new  # `each`: queries that a row puts to each of its keys
    scaled = query * (width**-0.5 if scaling is None else scaling)
    asked = scaled.reshape(rows, kv_heads, each, width).transpose(0, 1).contiguous()
    beginning = torch.bmm(asked.view(kv_heads, rows * each, width), prefix_key[0].transpose(1, 2))
    own = asked.view(kv_heads * rows, each, width) @ key.reshape(kv_heads * rows, tail, width).transpose(1, 2)
    scores = torch.cat([beginning.view(kv_heads, rows, each, before), own.view(kv_heads, rows, each, tail)], dim=-1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if new > 1:
        seen = torch.arange(tail, device=key.device) <= torch.arange(tail - new, tail, device=key.device)[:, None]
        scores.view(kv_heads, rows, -1, new, before + tail)[..., before:].masked_fill_(~seen, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    mixed = torch.bmm(weights.view(kv_heads, rows * each, -1)[..., :before], prefix_value[0])
    mixed += torch.bmm(
        weights.view(kv_heads * rows, each, -1)[..., before:], value.reshape(kv_heads * rows, tail, -1)
    ).view_as(mixed)
    return mixed.view(kv_heads, rows, -1, new, mixed.shape[-1]).permute(1, 3, 0, 2, 4).flatten(2, 3), None


AttentionInterface.register(ATTENTION, attend)


def can_share(model: Any, prefix: int, total: int) -> bool:
    """Whether a model's attention may be replaced for sequences of `total` tokens of which `prefix` are shared.

    A sliding window shorter than the sequence would have to forget shared tokens row by row: the plain path does that.
    """
    if prefix < SHORTEST or not getattr(model, "_supports_attention_backend", False):
        return False
    config = model.config.get_text_config()
    kinds = list(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return not (window is not None and slides and window < total)
