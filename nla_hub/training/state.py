"""What a killed run continues from: checkpoints of a training loop that are there whole or not at all.

A checkpoint is one file, written under another name, flushed to the disk and then renamed; the older ones are removed
after that. So at any moment at least the last complete one is there, and a half-written one is never taken for it. Of a
sharded model every process has written its part into a folder beside it before that file appears.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nla_hub.training.processes import Processes
from nla_hub.training.run import StageDirectory

UNFINISHED, PARTS = ".tmp", ".parts"


@dataclass(frozen=True)
class TrainingState:
    """The checkpoints of one loop of a stage, in the stage's `state/`.

    Attributes:
        stage: the stage; its metrics.jsonl is cut back to the step that a loop continues from.
        name: tells the loops of a stage apart.
        model: what the loop's lines in metrics.jsonl have as "model", where a stage has several loops.
        processes: only the main one writes; all of them continue from the step that it found.
    """

    stage: StageDirectory
    name: str
    model: str | None = None
    processes: Processes = field(default_factory=Processes)

    def save(
        self,
        step: int,
        content: dict[str, Any],
        *,
        sharded: tuple[nn.Module, torch.optim.Optimizer | None] | None = None,
    ) -> None:
        """Keep `content` (tensors, numbers, texts and containers of them) as what is known after `step` steps.

        A `sharded` model and its optimizer are kept with it; all processes must call it then.
        """
        path = self._path(step)
        if sharded is not None:
            self._save_sharded(self._parts(step), *sharded)
        if not self.processes.is_main:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + UNFINISHED)
        try:
            with unfinished.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except Exception:
            unfinished.unlink(missing_ok=True)  # on a full disk it would be in the way of everything else
            raise
        for older in self._steps():
            if older != step:
                self._path(older).unlink()
                shutil.rmtree(self._parts(older), ignore_errors=True)

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """The last step that was kept and its content (on the CPU), None where a loop starts from nothing.

        Lines of metrics.jsonl about later steps are removed: they will be written again. Every process must call it.
        """
        step = self.processes.on_main(self._last_step)
        if step is None:
            return None
        return step, torch.load(self._path(step), map_location="cpu", weights_only=True)

    def load_sharded(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Restore a sharded model and its optimizer in place as they were kept at `step`; all processes must call it."""
        from nla_hub.training.sharding import load_shards

        load_shards(self._parts(step), model, optimizer)

    def _save_sharded(self, place: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        from nla_hub.training.sharding import save_shards

        def ready() -> None:
            shutil.rmtree(place, ignore_errors=True)  # of an attempt that was killed
            place.mkdir(parents=True)

        self.processes.on_main(ready)
        save_shards(place, model, optimizer)

    def _last_step(self) -> int | None:
        for half in self.stage.state.glob(f"{self.name}-*{UNFINISHED}"):
            half.unlink()
        for parts in self.stage.state.glob(f"{self.name}-*{PARTS}"):
            if not parts.with_suffix(".pt").exists():
                shutil.rmtree(parts)
        step = max(self._steps(), default=None)
        self.stage.cut_metrics(step or 0, model=self.model)
        return step

    def _steps(self) -> list[int]:
        names = (re.fullmatch(rf"{re.escape(self.name)}-(\d+)\.pt", p.name) for p in self.stage.state.glob("*.pt"))
        return [int(found.group(1)) for found in names if found]

    def _parts(self, step: int) -> Path:
        return self._path(step).with_suffix(PARTS)

    def _path(self, step: int) -> Path:
        return self.stage.state / f"{self.name}-{step:08d}.pt"
