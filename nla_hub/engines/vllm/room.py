"""How much memory vLLM is given.

Left alone, vLLM takes 92 % of a card for itself; a pair's AR and source are to live on the same one. So the cache is counted
here: room for as many rows as shall run at once, but never more than half of what the AV's weights leave free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from nla_hub.architecture import Architecture
from nla_hub.engines.base import StoredAV
from nla_hub.errors import NLAError
from nla_hub.hardware import free_memory
from nla_hub.memory import cache_bytes
from nla_hub.weights import WeightIndex

ANSWER = 256
"""Tokens of an answer that the cache has room for in every row; longer ones make vLLM run fewer rows at once."""
SHARE_OF_REST = 0.5
"""Of the memory that the weights leave free: the other half stays for AR, source and what passes need."""
BLOCKS = 1.25
"""What vLLM takes for one row over its tokens: whole blocks, groups of layers of one size."""
NEXT = (
    'engine_options={"max_model_len": ...} for shorter answers, {"tensor_parallel_size": ...} for more cards, '
    'memory="staged" for one part at a time, or engine="transformers"'
)


@dataclass(frozen=True)
class Room:
    """What vLLM is told about memory.

    Attributes:
        cache: bytes of keys and values on each device.
        share: of a device's memory, what weights and cache are: vLLM starts only where that much is free.
    """

    cache: int
    share: float


def room(
    av: StoredAV, device: str, *, rows: int, max_model_len: int, devices: int = 1, weights: int | None = None
) -> Room:
    """The memory of an AV on `devices` devices of a type ("cuda", "cpu", ...), each of which holds an equal part.

    Args:
        rows: that shall run at once.
        max_model_len: tokens of the longest row.
        weights: bytes of all weights. None: of those in its directory.

    Raises:
        NLAError: not even one row has room.
    """
    free, total = free_memory(device), _total(device)
    weights = (_weights(av) if weights is None else weights) // devices
    wanted = _cache(av, rows, min(max_model_len, len(av.prompt) + ANSWER), devices)
    least = math.ceil(BLOCKS * _cache(av, 1, max_model_len, devices))
    cache = max(wanted, least)
    if free is not None:
        if weights + least > free:
            raise NLAError(
                "The AV has no room here beside what is loaded already.",
                got=f"{_gib(free)} free",
                expected=f"{_gib(weights)} for its weights and {_gib(least)} for one row of {max_model_len} tokens",
                next_step=NEXT,
            )
        cache = max(least, min(cache, int(SHARE_OF_REST * (free - weights))))
    share = (weights + cache) / total if total else 1.0
    return Room(cache, min(0.95, max(0.01, share)))


def _cache(av: StoredAV, rows: int, tokens: int, devices: int) -> int:
    """Bytes on each device; heads are divided among devices, and blocks with a window count as if they kept all."""
    whole = Architecture.of(av.config)
    part = replace(whole, kv_heads=math.ceil(whole.kv_heads / devices), windows=(None,) * whole.n_blocks)
    return cache_bytes(part, rows, tokens, av.dtype.itemsize)


def _weights(av: StoredAV) -> int:
    tensors = WeightIndex.read(av.directory).tensors.values()
    return sum(math.prod(tensor.shape) for tensor in tensors) * av.dtype.itemsize


def _total(device: str) -> int | None:
    return int(torch.cuda.mem_get_info()[1]) if device == "cuda" else None


def _gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB"
