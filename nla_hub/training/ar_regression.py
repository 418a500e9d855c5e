"""AR regression: label -> vector, by the direction loss 2 (1 - cos).

The AR starts as the source's own blocks 0..K without final norm, with the identity as value head (kaiming starts at 1.94
instead of 1.61 in the reference's runs); the head stays in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nla_hub.adapters import Adapter
from nla_hub.batching import pad_id_of, pad_right
from nla_hub.geometry import Reference, fve_value
from nla_hub.prompts import ARPrompt
from nla_hub.reconstructor import ARModel
from nla_hub.training.data import TrainingRows
from nla_hub.training.loop import WHOLE, LoopResult, Report, chunks, run_loop
from nla_hub.training.lora_training import train_only_what_trains
from nla_hub.training.recipe import StageSpec
from nla_hub.training.sharding import Execution
from nla_hub.training.state import TrainingState


def init_ar(adapter: Adapter, trunk: Any) -> ARModel:
    """A fresh AR on a trunk that ends at block K (see `load_trunk`), which becomes its own: identity head, float32."""
    d = int(trunk.config.get_text_config().hidden_size)
    head = nn.Linear(d, d, bias=False, dtype=torch.float32, device=adapter.embedding_module(trunk).weight.device)
    with torch.no_grad():
        head.weight.copy_(torch.eye(d))
    return ARModel(adapter, trunk, head)


def direction_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """2 (1 - cos) of each row, float32 [N]; differentiable (`geometry.direction_mse` is the float64 figure)."""
    return 2.0 * (1.0 - nn.functional.cosine_similarity(predicted.float(), target.float(), dim=-1, eps=1e-8))


def train_ar(
    model: ARModel,
    prompt: ARPrompt,
    rows: TrainingRows,
    spec: StageSpec,
    *,
    seed: int,
    report: Report,
    held_out: TrainingRows | None = None,
    max_steps: int | None = None,
    state: TrainingState | None = None,
    execution: Execution = WHOLE,
) -> LoopResult:
    """Train an AR in place on labelled rows; reports the held-out FVE (raw variance, of labels) at the end.

    Where `state` has a checkpoint of this training, it is continued. Raises a TrainingError, see `run_loop`.
    """
    pad = pad_id_of(prompt.tokenizer)
    encoded = [prompt.encode(text) for text in rows.texts]
    train_only_what_trains(model)

    def loss_of(wrapped: Any, indices: Sequence[int]) -> tuple[Tensor, int]:
        device = model.head.weight.device
        ids, mask = pad_right([encoded[i] for i in indices], pad)
        predicted = wrapped(ids.to(device), mask.to(device))
        return direction_loss(predicted, rows.vectors[list(indices)].to(predicted.device)).sum(), len(indices)

    def fve_of_labels() -> dict[str, Any]:
        assert held_out is not None
        denominator = Reference.measure(held_out.vectors, "held-out rows").raw_variance
        with execution.running(model.head.weight.device):
            return {"held_out_fve_of_labels": fve_value(evaluate_ar(model, prompt, held_out), denominator)}

    return run_loop(
        model,
        loss_of,
        [len(e) for e in encoded],
        spec,
        seed=seed,
        report=report,
        max_steps=max_steps,
        state=state,
        closing=fve_of_labels if held_out is not None and len(held_out) >= 2 else None,
        execution=execution,
    )


def evaluate_ar(model: ARModel, prompt: ARPrompt, rows: TrainingRows, *, batch_size: int = 128) -> Tensor:
    """mse of each labelled row, float32 [N]."""
    pad = pad_id_of(prompt.tokenizer)
    device = model.head.weight.device
    losses = []
    with torch.inference_mode():
        for part in chunks(len(rows), batch_size):
            ids, mask = pad_right([prompt.encode(rows.texts[i]) for i in part], pad)
            losses.append(
                direction_loss(model(ids.to(device), mask.to(device)).cpu(), rows.vectors[part.start : part.stop])
            )
    return torch.cat(losses)
