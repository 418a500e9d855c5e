"""Pairs of earlier steps, kept while the stage `rl` goes on: `steps/step-000400/{av,ar}`, each there whole or not at all.

A pair is written under another name, its DONE last, and then renamed. A continued stage removes the pairs of steps that it is
about to do again, so that all of them belong to the one training that ends in the finished pair.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nla_hub import yaml_io
from nla_hub.training.processes import Processes
from nla_hub.training.run import DONE, StageDirectory, step_name, step_number, step_pairs

KEPT = "kept"
"""In an unfinished pair's folder: both halves as the stage keeps them, until they are written as others load them."""


@dataclass(frozen=True)
class StepPairs:
    """The pairs of a stage.

    Attributes:
        every: steps between two of them; None: there are none.
        keep: (folder, step) -> writes both halves to folder/av and /ar as the stage keeps them; called in all processes.
        export: (folder with both halves, folder, step) -> writes folder/av and /ar as others load them; in the main process.
    """

    stage: StageDirectory
    every: int | None
    keep: Callable[[Path], None]
    export: Callable[[Path, Path, int], None]
    processes: Processes = field(default_factory=Processes)

    def after(self, step: int) -> None:
        """Write the pair of a finished step where it is due; all processes must call it.

        Raises:
            What `keep` and `export` raise; nothing of the pair stays then.
        """
        if self.every is None or step % self.every:
            return
        unfinished = self.stage.steps / f".{step_name(step)}"
        self.processes.on_main(lambda: shutil.rmtree(unfinished, ignore_errors=True))
        try:
            with torch.random.fork_rng(
                devices=()
            ):  # loading a model draws numbers; TRL shuffles samples by the next ones
                self.keep(unfinished / KEPT)
                self.processes.on_main(lambda: self._finish(unfinished, step))
        except Exception:
            if self.processes.is_main:  # on a full disk it would be in the way of everything else
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _finish(self, unfinished: Path, step: int) -> None:
        self.export(unfinished / KEPT, unfinished, step)
        shutil.rmtree(unfinished / KEPT)
        sizes = {half: _bytes(unfinished / half) for half in ("av", "ar")}
        yaml_io.write_text(unfinished / DONE, json.dumps({"step": step, "bytes": sizes}, indent=1) + "\n")
        unfinished.rename(self.stage.steps / step_name(step))

    def cut(self, step: int) -> None:
        """Remove pairs of later steps, which will be written again, and what a kill left; in the main process."""
        for name, place in step_pairs(self.stage).items():
            if step_number(name) > step:
                shutil.rmtree(place)
        for leftover in self.stage.steps.glob(".step-*"):
            shutil.rmtree(leftover)


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
