"""How the processes of a recipe are started: the configuration that `accelerate launch` reads, from the recipe's hardware.

It says only how many processes run where. How weights are divided among them and in which precision they compute is the
recipe's business, so a launcher's configuration cannot contradict it.
"""

from __future__ import annotations

from typing import Any

from nla_hub import yaml_io
from nla_hub.training.recipe import Recipe

PORT = 29500
"""Where the processes find the first one, torchrun's default."""


def launch_config(recipe: Recipe) -> dict[str, Any]:
    """accelerate's configuration for the hardware of a recipe."""
    hardware = recipe.hardware
    on_cpu = hardware.gpu == "cpu"
    kind = "NO" if hardware.world == 1 else "MULTI_CPU" if on_cpu else "MULTI_GPU"
    several: dict[str, Any] = {
        "main_process_ip": "ADDRESS-OF-THE-FIRST-NODE",
        "main_process_port": PORT,
        "rdzv_backend": "static",
        "same_network": True,
    }
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kind,
        "machine_rank": 0,
        "num_machines": hardware.nodes,
        "num_processes": hardware.world,
        "mixed_precision": "no",
        "use_cpu": on_cpu,
        **(several if hardware.nodes > 1 else {}),
    }


def launch_text(recipe: Recipe) -> str:
    """The configuration as a file, with what to do with it."""
    hardware = recipe.hardware
    first = f"# {launch_command(recipe)}\n"
    more = "# On every node, with its own --machine_rank and the first node's address as --main_process_ip.\n"
    return first + (more if hardware.nodes > 1 else "") + yaml_io.dumps(launch_config(recipe))


def launch_command(recipe: Recipe) -> str:
    """The command that starts a packaged recipe on the hardware it is written for."""
    hardware = recipe.hardware
    train = f"train {recipe.name}{'' if recipe.base.model is not None else ' base.model=OWNER/NAME'}"
    if hardware.world == 1:
        return f"nla-hub {train}"
    which = " --machine_rank N --main_process_ip ADDRESS" if hardware.nodes > 1 else ""
    return f"accelerate launch --config_file recipes/launch/{recipe.name}.yaml{which} -m nla_hub {train}"
