"""The activation reconstructor: text -> vector.

All texts stand in one template. Where its beginning is a sizeable part of what a batch reads, it runs once and the rows
continue from its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nla_hub.adapters import Adapter
from nla_hub.batching import by_length, check_batch_size, is_right_padded, last_real, pad_id_of, pad_right, run_batches
from nla_hub.prompts import ARPrompt
from nla_hub.sidecar import Sidecar

WORTH_SHARING = 1 / 8
"""Part of a batch's tokens that a common beginning must save, for the pass of its own and the attention with a mask instead of
a causal one. Measured at d 256 on a CPU: 5 % saved lose time, 10 % give 1.1 times the speed, 15 % 1.2, a half 2.0."""


class ARModel(nn.Module):
    """Trunk of K+1 blocks without final norm, then Linear(d, d) in float32 on the last attended token.

    With `head_input_scale` s the head reads s h / ||h|| instead of h (a sidecar's head_input "normalized"); without a bias
    that changes the output's length only.
    """

    def __init__(self, adapter: Adapter, trunk: Any, head: nn.Linear, head_input_scale: float | None = None) -> None:
        super().__init__()
        self.adapter = adapter
        self.trunk = trunk
        self.head = head
        self.head_input_scale = head_input_scale

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask int64 [rows, length] -> vectors float32 [rows, d]; right for any padding side."""
        last = last_real(mask)
        if is_right_padded(mask):
            hidden = self._read(ids, self._common(ids, last))
            last = last - (ids.shape[1] - hidden.shape[1])
        else:
            # Learned positions (GPT-2) count from the row's first real token, which no model works out from a mask.
            places = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
            trunk = self.adapter.trunk(self.trunk)
            hidden = trunk(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).last_hidden_state
        read = hidden[torch.arange(len(ids), device=ids.device), last].float()
        if self.head_input_scale is not None:
            read = read * (self.head_input_scale / read.norm(dim=-1, keepdim=True))
        with torch.autocast(read.device.type, enabled=False):  # float32, whatever the trunk computes in
            out: Tensor = self.head(read)
        return out

    def _common(self, ids: Tensor, last: Tensor) -> int:
        """How many tokens at the beginning of all rows [rows, length] run once; 0 under gradients and where it does not pay."""
        if torch.is_grad_enabled() or self.trunk.training:  # gradient checkpointing leaves out the cache
            return 0
        shared = int((ids == ids[:1]).all(dim=0).long().cumprod(dim=0).sum())
        shared = min(shared, int(last.min()))  # each row keeps a token to be read
        saved = shared * (len(ids) - 1)
        return shared if saved >= WORTH_SHARING * ids.numel() else 0

    def _read(self, ids: Tensor, common: int) -> Tensor:
        """The residual stream behind the trunk, from column `common` on: [rows, length - common, d].

        Columns before that are the same in every row. They are computed now, so from the present weights.
        """
        trunk: Any = self.adapter.trunk(self.trunk)
        every = torch.ones_like(ids)  # with which transformers takes its causal kernels
        if not common:
            plain: Tensor = trunk(input_ids=ids, attention_mask=every, use_cache=False).last_hidden_state
            return plain
        cache = DynamicCache(config=trunk.config)
        settings = {"past_key_values": cache, "use_cache": True}
        trunk(input_ids=ids[:1, :common], attention_mask=every[:1, :common], **settings)
        cache.batch_repeat_interleave(len(ids))
        rest: Tensor = trunk(input_ids=ids[:, common:], attention_mask=every, **settings).last_hidden_state
        return rest


@dataclass(frozen=True)
class Reconstructor:
    """A loaded AR. Its output is returned as it is: only its direction means anything."""

    model: ARModel
    prompt: ARPrompt
    sidecar: Sidecar
    name: str

    def reconstruct(
        self, texts: Sequence[str], *, batch_size: int = 32, progress: Callable[[int], None] | None = None
    ) -> Tensor:
        """Vectors of `texts`: float32 [N, d] on the CPU, in order; equal texts are computed once.

        Raises:
            TextError, ContextLengthError: with the index of the text, before anything is computed.
        """
        check_batch_size(batch_size)
        first: dict[str, int] = {}
        encoded: list[list[int]] = []
        rows: list[int] = []
        for i, text in enumerate(texts):
            if text not in first:
                encoded.append(self.prompt.encode(text, where=f"text {i}"))
                first[text] = len(encoded) - 1
            rows.append(first[text])
        if not rows:
            return torch.empty(0, self.sidecar.d_model)
        found: dict[int, Tensor] = {}
        with torch.inference_mode():
            batches = by_length([len(ids) for ids in encoded], batch_size)
            for batch, out in run_batches(batches, lambda batch: self._vectors([encoded[i] for i in batch])):
                found.update(zip(batch, out, strict=True))
                if progress is not None:
                    progress(len(batch))
        return torch.stack([found[i] for i in rows])

    def _vectors(self, encoded: Sequence[Sequence[int]]) -> Tensor:
        """One batch: float32 [rows, d] on the CPU."""
        device = self.model.head.weight.device
        ids, mask = pad_right(encoded, pad_id_of(self.prompt.tokenizer))
        out: Tensor = self.model(ids.to(device), mask.to(device))
        return out.float().cpu()
