"""One run in several processes: who writes, and how all of them take the same decision.

`accelerate launch -m nla_hub train RECIPE` (or torchrun) starts the same command several times. All of them see the same
run directory. The main process alone takes the lock, writes and speaks; what it finds out or decides is shared. A launcher says
how many processes there are, and nothing else: sharding and precision are the recipe's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from nla_hub.errors import NLAError, RunError

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long processes wait for the main one, which may evaluate or label for hours while they have nothing to do."""


NOT_THE_LAUNCHERS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""What `accelerate launch` sets in the environment for each way to divide a model that its configuration asks for."""

MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"
"""What it sets to its `mixed_precision`, "no" by default."""


@dataclass(frozen=True)
class Processes:
    """The processes of this run: `rank` is this one's number, `world` how many there are."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Processes:
        """The processes that a launcher started with this one; costs nothing where there is no launcher.

        Raises:
            RunError: a launcher is there that decides what the recipe does, or the processes cannot reach each other.
        """
        _require_plain_launcher()
        if int(os.environ.get("WORLD_SIZE") or 1) < 2:
            return cls()
        import torch
        from accelerate.state import PartialState
        from accelerate.utils import parse_flag_from_env

        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        try:
            state = PartialState(cpu=on_cpu, timeout=PATIENCE)
        except (OSError, RuntimeError, ValueError) as cause:
            raise RunError(
                f"The processes of this run cannot reach each other: {' '.join(str(cause).split())[:200]}",
                got=f"RANK {os.environ.get('RANK')} of WORLD_SIZE {os.environ['WORLD_SIZE']}",
                next_step="start them with: accelerate launch -m nla_hub train RECIPE",
            ) from cause
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """The main process's `value`, in every process; the others' own is dropped. All must call it."""
        if self.world == 1:
            return value
        import torch.distributed

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """What every process says (pickled), in order of their ranks, in all of them. All must call it."""
        if self.world == 1:
            return [value]
        import torch.distributed

        everywhere: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(everywhere, value)
        return everywhere

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` in the main process while the others wait; every process gets what it returned (pickled).

        Raises:
            What `action` raises, in the main process; a RunError in the others.
        """
        if self.world == 1:
            return action()
        result: Any = None
        if self.is_main:
            try:
                result = action()
            except Exception as error:
                self.share((None, error.what if isinstance(error, NLAError) else repr(error)))
                raise
        result, failure = self.share((result, None))
        if failure is not None:
            raise RunError(f"The main process stopped: {failure}")
        return result  # type: ignore[no-any-return]

    def close(self) -> None:
        """Wait until all have come to their end, and part; nothing can be shared afterwards."""
        if self.world > 1:
            import torch.distributed

            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def _require_plain_launcher() -> None:
    """Raise a RunError where a launcher's configuration does what a recipe decides."""
    faults = [
        f"{what}: how weights are divided is hardware.placement in the recipe"
        for name, what in NOT_THE_LAUNCHERS.items()
        if (os.environ.get(name) or "false").lower() in ("1", "true", "yes", "on")
    ]
    precision = (os.environ.get(MIXED_PRECISION) or "no").lower()
    if precision != "no":
        faults.append(f"mixed_precision {precision}: what models compute in is `precision` in the recipe")
    if faults:
        raise RunError(
            "The launcher's configuration decides what the recipe does.",
            faults=faults,
            next_step="launch with the configuration in recipes/launch, or with: torchrun --nproc-per-node N -m nla_hub train",
        )
