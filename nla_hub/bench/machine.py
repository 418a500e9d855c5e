"""The machine that figures come from: its names and versions, and what it can do at most, measured."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from nla_hub.bench.timing import clocked
from nla_hub.evaluation.provenance import commit, versions

COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""Bytes of the tensor that is copied: larger than a cache, small beside the memory."""

MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
"""Side of the square matrices: large enough that what surrounds the multiplication does not count."""

REPEATS = 7
"""Runs of which the median is taken, behind one that warms up."""


@dataclass(frozen=True)
class Limits:
    """What a device does at most.

    Attributes:
        bandwidth: bytes a second of a large copy inside its memory, bytes read and bytes written both counted.
        rate: operations a second of a square matrix product in the dtype, 2 n^3 a product.
    """

    bandwidth: float
    rate: float


def measure(
    device: torch.device, dtype: torch.dtype, *, copy_bytes: int | None = None, matmul_side: int | None = None
) -> Limits:
    """Measure a device, in about a second (a few on a slow CPU)."""
    size = copy_bytes or COPY_BYTES.get(device.type, COPY_BYTES["cpu"])
    side = matmul_side or MATMUL_SIDE.get(device.type, MATMUL_SIDE["cpu"])
    return Limits(2 * size / _copying(device, size), 2 * side**3 / _multiplying(device, dtype, side))


def _copying(device: torch.device, size: int) -> float:
    one = torch.ones(size, dtype=torch.uint8, device=device)
    other = torch.empty_like(one)
    return _median(lambda: other.copy_(one), device)


def _multiplying(device: torch.device, dtype: torch.dtype, side: int) -> float:
    a = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    return _median(lambda: torch.mm(a, a, out=out), device)


def _median(work: Callable[[], object], device: torch.device) -> float:
    work()
    return statistics.median(clocked(work, device) for _ in range(REPEATS))


def describe(device: torch.device) -> dict[str, Any]:
    """Names, versions and sizes of the machine and of what runs on it."""
    found = versions()
    try:
        found["vllm"] = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        found["vllm"] = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "versions": found,
        "commit": commit(),
    }


def _processor(path: Path = Path("/proc/cpuinfo")) -> str | None:
    """The processor's name, as Linux tells it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
