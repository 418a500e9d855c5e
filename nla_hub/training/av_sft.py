"""AV supervised fine-tuning: vector -> label, cross-entropy on the response tokens only.

The signal to watch is not the loss but what the vector is worth: the loss with shuffled vectors minus the loss with the
real ones (about 0.2 in the large models). An AV that ignores its vector has a fluent low loss and a gap of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nla_hub.batching import pad_id_of, pad_right
from nla_hub.injection import Injector
from nla_hub.prompts import AVPrompt, response_ids
from nla_hub.training.data import TrainingRows
from nla_hub.training.loop import WHOLE, LoopResult, Report, chunks, run_loop
from nla_hub.training.lora_training import train_only_what_trains
from nla_hub.training.recipe import StageSpec
from nla_hub.training.sharding import Execution
from nla_hub.training.state import TrainingState


class AVLoss:
    """Cross-entropy of labels under an AV, with the vectors injected at the marker.

    While `held` is open the vectors stay in after a call: gradient checkpointing runs blocks again in the backward pass, in
    older transformers their hooks included.
    """

    def __init__(self, tokenizer: Any, prompt: AVPrompt, injector: Injector, rows: TrainingRows) -> None:
        self._held: ExitStack | None = None
        self.prompt = prompt
        self.injector = injector
        self.vectors = rows.vectors
        self.responses = [response_ids(tokenizer, text) for text in rows.texts]
        self.pad = pad_id_of(tokenizer)

    def __call__(self, model: Any, indices: Sequence[int], *, vectors: Tensor | None = None) -> tuple[Tensor, int]:
        """Sum of the token losses of some rows and the number of response tokens.

        `vectors` float32 [len(indices), d] replace the rows' own (to measure what the vectors are worth).
        """
        device = next(model.parameters()).device
        ids, mask = pad_right([[*self.prompt.ids, *self.responses[i]] for i in indices], self.pad)
        given = self.vectors[list(indices)] if vectors is None else vectors
        columns = torch.full((len(indices),), self.prompt.marker_position)
        start = len(self.prompt)
        with ExitStack() as here:
            (self._held or here).enter_context(self.injector.inject(model, given, columns))
            # Right padding under a causal mask changes no real token; only the positions that predict a response token
            # go through the head.
            logits = model(
                input_ids=ids.to(device), attention_mask=mask.to(device), logits_to_keep=ids.shape[1] - start + 1
            ).logits[:, :-1]
        targets = ids[:, start:].masked_fill(mask[:, start:] == 0, -100).to(logits.device)
        total = nn.functional.cross_entropy(
            logits.float().reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100, reduction="sum"
        )
        return total, int(mask[:, start:].sum())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Is open around one call and its backward pass."""
        try:
            with ExitStack() as self._held:
                yield
        finally:
            self._held = None


def train_av(
    model: Any,
    tokenizer: Any,
    prompt: AVPrompt,
    injector: Injector,
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
    """Train an AV in place; reports the held-out loss with real and with shuffled vectors at the end.

    Where `state` has a checkpoint of this training, it is continued. Raises a TrainingError, see `run_loop`.
    """
    loss = AVLoss(tokenizer, prompt, injector, rows)
    train_only_what_trains(model)

    def worth() -> dict[str, Any]:
        assert held_out is not None
        with execution.running(next(model.parameters()).device):
            real, shuffled = evaluate_av(model, tokenizer, prompt, injector, held_out)
        return {"held_out_loss": real, "held_out_loss_shuffled": shuffled, "vector_worth": shuffled - real}

    return run_loop(
        model,
        loss,
        [len(r) for r in loss.responses],
        spec,
        seed=seed,
        report=report,
        max_steps=max_steps,
        state=state,
        closing=worth if held_out is not None and len(held_out) >= 2 else None,
        execution=execution,
        held=loss.held,
    )


def evaluate_av(
    model: Any, tokenizer: Any, prompt: AVPrompt, injector: Injector, rows: TrainingRows, *, batch_size: int = 128
) -> tuple[float, float]:
    """Mean token loss with the rows' own vectors, and with each row given the next row's vector."""
    loss = AVLoss(tokenizer, prompt, injector, rows)
    sums = torch.zeros(2, dtype=torch.float64)
    count = 0
    rolled = rows.vectors.roll(len(rows) // 2, dims=0)
    with torch.inference_mode():
        for part in chunks(len(rows), batch_size):
            real, n = loss(model, list(part))
            shuffled, _ = loss(model, list(part), vectors=rolled[part.start : part.stop])
            sums += torch.tensor([float(real), float(shuffled)], dtype=torch.float64)
            count += n
    return float(sums[0] / count), float(sums[1] / count)
