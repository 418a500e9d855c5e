"""Putting token sequences of different lengths into one batch: right padding, and the last real token of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nla_hub.errors import InjectionError, InputError


def check_batch_size(batch_size: object) -> None:
    """Raise an InputError for a batch size that is not a whole number from 1 up."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError("batch_size is a whole number from 1 up.", got=repr(batch_size))


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


def last_real(mask: Tensor) -> Tensor:
    """Index of the last attended token of each row of `mask` [rows, length]; right for any padding side."""
    length = mask.shape[1]
    index = torch.arange(length, device=mask.device)
    if bool((mask.sum(dim=1) == 0).any()):
        raise InjectionError("A row without any attended token has no reading position.")
    return (mask.long() * (index + 1)).argmax(dim=1)
