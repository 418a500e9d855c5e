"""What this machine has left: free bytes of a device."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch


def free_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that are free on a device for new work, None where nothing says so.

    On a CPU the least of what the system can give without swapping (MemAvailable) and what the process's control group
    has left. On CUDA what the driver reports; it counts other processes, and not what this one's allocator holds in stock.
    """
    kind = torch.device(device)
    if kind.type == "cuda":
        free, _ = torch.cuda.mem_get_info(kind)
        return int(free)
    if kind.type != "cpu":
        return None
    found = [n for n in (_mem_available(), _cgroup_left(Path("/sys/fs/cgroup"), _own_cgroups())) if n is not None]
    return min(found) if found else None


def _mem_available(path: Path = Path("/proc/meminfo")) -> int | None:
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _own_cgroups(path: Path = Path("/proc/self/cgroup")) -> list[str]:
    """Lines "ID:CONTROLLERS:PATH" of this process."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _cgroup_left(root: Path, lines: Iterable[str]) -> int | None:
    """Bytes left in the tightest control group above this process, version 2 or 1; None where none has a limit."""
    left: list[int] = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            base, limit, used, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, used, cache = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        here = base / path.strip("/")
        # Inside a container the path is often the host's; its limits are then at the root.
        for place in {here, *here.parents, base}:
            if place != base and not place.is_relative_to(base):
                continue
            most, now = _number(place / limit), _number(place / used)
            if most is not None and now is not None and most < 2**60:  # version 1 writes "no limit" as a huge number
                left.append(max(0, most - now + _statistic(place / "memory.stat", cache)))
    return min(left) if left else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max" among them
        return None


def _statistic(path: Path, key: str) -> int:
    """A figure of memory.stat; file pages that nobody uses are given back under pressure, so they count as free."""
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{key} "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0
