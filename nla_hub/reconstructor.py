"""The activation reconstructor: text -> vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nla_hub.adapters import Adapter
from nla_hub.batching import check_batch_size, last_real, pad_id_of, pad_right
from nla_hub.prompts import ARPrompt
from nla_hub.sidecar import Sidecar


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
        # Learned positions (GPT-2) count from the row's first real token, which no model works out from a mask.
        places = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        trunk = self.adapter.trunk(self.trunk)
        hidden = trunk(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).last_hidden_state
        rows = torch.arange(len(ids), device=ids.device)
        read = hidden[rows, last_real(mask)].float()
        if self.head_input_scale is not None:
            read = read * (self.head_input_scale / read.norm(dim=-1, keepdim=True))
        out: Tensor = self.head(read)
        return out


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
        device = self.model.head.weight.device
        found: dict[int, Tensor] = {}
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        with torch.inference_mode():
            for begin in range(0, len(order), batch_size):
                chunk = order[begin : begin + batch_size]
                ids, mask = pad_right([encoded[i] for i in chunk], pad_id_of(self.prompt.tokenizer))
                out = self.model(ids.to(device), mask.to(device)).float().cpu()
                for row, i in enumerate(chunk):
                    found[i] = out[row]
                if progress is not None:
                    progress(len(chunk))
        return torch.stack([found[i] for i in rows])
