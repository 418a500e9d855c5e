"""Which sequences run together, how they are padded, and what happens where memory does not suffice.

Rows of one batch are of similar length and padded on the right. Under causal attention no real token sees what is right of
it, so such a batch needs no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from nla_hub.accelerator import free_memory
from nla_hub.errors import InjectionError, InputError
from nla_hub.log import logger

T = TypeVar("T")
R = TypeVar("R")

PASS_TOKENS = 2048
"""Tokens of one pass, padding included. Measured on two cores at d 256: fewer lose time between the matrix products, more
leave the cache. At d 3584 the products of a pass of 2048 tokens are limited by arithmetic, not by reading weights."""


def check_batch_size(batch_size: object) -> None:
    """Raise an InputError for a batch size that is not a whole number from 1 up."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError("batch_size is a whole number from 1 up.", got=repr(batch_size))


def check_pass_tokens(tokens: object) -> None:
    """Raise an InputError for a number of tokens a pass that is not a whole number from 1 up."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise InputError("chunk_tokens is a whole number from 1 up.", got=repr(tokens))


def by_length(lengths: Sequence[int], rows: int, tokens: int = PASS_TOKENS) -> list[list[int]]:
    """Indices of sequences in batches of similar length, the shortest first.

    Args:
        lengths: tokens of each sequence.
        rows: sequences of a batch at most.
        tokens: tokens of a batch at most, padding included; a longer sequence is a batch of its own.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        last = batches[-1] if batches else None
        if last is not None and len(last) < rows and (len(last) + 1) * lengths[i] <= tokens:
            last.append(i)
        else:
            batches.append([i])
    return batches


_halvings: ContextVar[list[int] | None] = ContextVar("halvings", default=None)


@contextmanager
def halvings() -> Iterator[list[int]]:
    """While open, collects the number of rows that `run_batches` went on with, each time memory did not suffice."""
    seen: list[int] = []
    token = _halvings.set(seen)
    try:
        yield seen
    finally:
        _halvings.reset(token)


def run_batches(batches: Iterable[Sequence[T]], work: Callable[[Sequence[T]], R]) -> Iterator[tuple[Sequence[T], R]]:
    """Each batch with what `work` makes of it, in order. Out of memory halves a batch, and all later ones as well.

    Raises:
        torch.OutOfMemoryError: one item alone does not fit.
    """
    limit: int | None = None
    for batch in batches:
        rest = batch
        while len(rest):
            part = rest[:limit]
            try:
                result = work(part)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                limit = len(part) // 2
            else:
                yield part, result
                rest = rest[len(part) :]
                continue
            # Outside of the handler, where nothing holds on to the failed batch any more.
            free_memory()
            logger.warning("out of memory: going on with %d rows at a time", limit)
            if (seen := _halvings.get()) is not None:
                seen.append(limit)


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 [rows, longest], padded on the right."""
    longest = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(list(sequence), dtype=torch.long)
        mask[i, : len(sequence)] = 1
    return ids, mask


def pad_id_of(tokenizer: Any) -> int:
    """An id to pad with; padding is masked, so any will do."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        if (value := getattr(tokenizer, name, None)) is not None:
            return int(value)
    return 0


def is_right_padded(mask: Tensor) -> bool:
    """Whether each row of `mask` [rows, length] is attended tokens, then padding."""
    return bool((mask[:, 1:] <= mask[:, :-1]).all()) and bool((mask[:, 0] == 1).all())


def last_real(mask: Tensor) -> Tensor:
    """Index of the last attended token of each row of `mask` [rows, length]; right for any padding side."""
    length = mask.shape[1]
    index = torch.arange(length, device=mask.device)
    if bool((mask.sum(dim=1) == 0).any()):
        raise InjectionError("A row without any attended token has no reading position.")
    return (mask.long() * (index + 1)).argmax(dim=1)
