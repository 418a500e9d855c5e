"""Between TRL's loop and the rl stage: one call for each finished step."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from transformers import TrainerCallback

from nla_hub.training.rl.stage import Conductor


class StepCallback(TrainerCallback):
    """Collects what the optimizer steps of a step log, and hands their means on after the last."""

    def __init__(self, conductor: Conductor) -> None:
        self.conductor = conductor
        self.logs: dict[str, list[float]] = defaultdict(list)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """A continued run has loaded its weights."""
        self.conductor.check_restored()
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> Any:
        """A step is finished with its last optimizer step; then decide on checkpoint and stop."""
        if not logs or "loss" not in logs:
            return control  # a summary, or our own evaluation
        for name, value in logs.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self.logs[name].append(float(value))
        if state.global_step % self.conductor.trainer.spec.per_step == 0:
            means = {name: sum(values) / len(values) for name, values in self.logs.items()}
            self.logs.clear()
            control.should_save, control.should_training_stop = self.conductor.after_step(means)
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """The Trainer has written its part of a checkpoint."""
        self.conductor.keep()
        return control
