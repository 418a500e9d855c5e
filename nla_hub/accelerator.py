"""Giving memory back."""

from __future__ import annotations

import gc

import torch


def free_memory() -> None:
    """Give what is no longer referred to back to the system and the accelerator."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
