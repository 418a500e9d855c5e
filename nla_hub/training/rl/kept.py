"""Checkpoints of a sharded policy: each process writes its part of weights and moments where the Trainer writes the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from trl import GRPOTrainer

from nla_hub.training.sharding import is_sharded, load_shards, save_shards

POLICY, SCHEDULE = "policy", "scheduler.pt"
"""In a checkpoint's folder."""


class PolicyKept(GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer for a model that may be sharded (`sharding.shard`) when it is handed over; others go the usual way."""

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's own checkpoint, without the model card that TRL would write beside it."""
        Trainer._save_checkpoint(self, model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; of a sharded model the moments too."""
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        assert output_dir is not None
        save_shards(Path(output_dir) / POLICY, self.model, self.optimizer.optimizer)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not is_sharded(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_shards(Path(resume_from_checkpoint) / POLICY, self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            load_shards(Path(checkpoint) / POLICY, self.model, self.optimizer.optimizer)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULE, weights_only=True))
