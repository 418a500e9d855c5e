"""Timing routes against each other: interleaved runs of the same work, medians, and the peak of memory while each ran."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from nla_hub.accelerator import free_memory

T = TypeVar("T")

_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Timed(Generic[T]):
    """Runs of one route.

    Attributes:
        result: what its warm-up returned.
        seconds: of each timed run, in order.
        peak: bytes, see `peak_while`; None where it was not measured.
    """

    result: T
    seconds: tuple[float, ...]
    peak: int | None

    @property
    def median(self) -> float:
        """Median seconds of a run."""
        return statistics.median(self.seconds)


def interleaved(
    routes: Mapping[str, Callable[[], T]],
    pairs: int,
    device: torch.device,
    *,
    watch: bool = True,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Timed[T]]:
    """Run every route once to warm up, then `pairs` rounds in which each runs once, so that all meet the same machine.

    With `watch` the peak of memory is taken during the warm-up: later it would disturb the clock.
    """
    warm: dict[str, tuple[T, int | None]] = {}
    if watch:
        free_memory()
    for name, route in routes.items():
        if progress is not None:
            progress(f"{name}: warming up")
        warm[name] = peak_while(route, device) if watch else (route(), None)
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for turn in range(pairs):
        for name, route in routes.items():
            if progress is not None:
                progress(f"{name}: run {turn + 1} of {pairs}")
            seconds[name].append(clocked(route, device))
    return {name: Timed(result, tuple(seconds[name]), peak) for name, (result, peak) in warm.items()}


def clocked(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, the accelerator's queue emptied before and after."""
    _wait(device)
    begun = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_while(work: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """What `work` returns, and the peak of memory while it ran, weights included.

    CUDA: bytes of this process's tensors (`torch.cuda.max_memory_allocated`). CPU, on Linux: the resident set of the whole
    process, Python and libraries included (VmHWM after a reset; freed memory is given back first, as far as the allocator
    can). None where the system does not let itself be asked.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        _wait(device)
        return result, int(torch.cuda.max_memory_allocated(device))
    reset = device.type == "cpu" and _reset_peak()
    result = work()
    return result, _resident_peak() if reset else None


def _reset_peak() -> bool:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _PROCESS.is_dir() else None
    if trim is not None:
        trim(0)
    try:
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")  # proc(5): sets VmHWM to what is resident now
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    try:
        lines = (_PROCESS / "status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
