"""What a run says about the machine that a stage ran on: how many processes, on what, with which versions."""

from __future__ import annotations

from typing import Any

import torch

from nla_hub.evaluation.provenance import versions
from nla_hub.training.processes import Processes


def machine_record(processes: Processes) -> dict[str, Any]:
    """`processes` (of which each holds one device for as long as the run lasts), `devices` (their names, each once) and
    `versions`, of all processes together; every process must call it. Nothing in it tells one machine from another of its kind.
    """
    devices = sorted(set(processes.gather(device_name())))
    return {"processes": processes.world, "devices": devices, "versions": versions()}


def device_name() -> str:
    """What this process computes on, as its maker calls it ("NVIDIA H100 80GB HBM3"); "cpu" without an accelerator."""
    if not torch.accelerator.is_available():
        return "cpu"
    device = torch.accelerator.current_accelerator()
    kind = "cpu" if device is None else device.type
    named = getattr(getattr(torch, kind, None), "get_device_name", None)
    return kind if named is None else str(named(torch.accelerator.current_device_index()))
