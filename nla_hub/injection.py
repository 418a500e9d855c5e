"""The only code that puts vectors into a model.

`overwrite`: the embedding row of the marker, after whatever scaling the model's own embedding applies, becomes
v * scale / ||v||. `add`: at the output of block 1 the residual h at the marker becomes h + ||h|| v / ||v||.
Both are placed by forward hooks on the model's own modules, so every route through the model (generation,
log-probabilities, a fused head) sees them, and both leave no trace once the context ends.

The marker counts only where both of its neighbours stand beside it, only within the first `prompt_length` tokens, and
exactly once a row: a sampled marker is just a token, and anything else is an error, never a silent fall-through.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nla_hub.adapters import Adapter
from nla_hub.errors import InjectionError, VectorError
from nla_hub.geometry import rescale
from nla_hub.sidecar import Injection, MarkerTokens, Site

ADD_SITE = Site(layer=1)
"""Where the `add` kind enters: the output of block 1 (EasyNLA, nanoNLA, activation oracles)."""


def find_markers(ids: Tensor, marker: MarkerTokens, *, prompt_length: int | None = None) -> Tensor:
    """The marker's position in each row of `ids` [rows, length]: int64 [rows].

    Raises:
        InjectionError: a row with no valid marker in its prompt, or with several.
    """
    scanned = ids if prompt_length is None else ids[:, :prompt_length]
    middle = (scanned[:, 1:-1] == marker.id) & (scanned[:, :-2] == marker.left_id) & (scanned[:, 2:] == marker.right_id)
    counts = middle.sum(dim=1)
    if bool((counts != 1).any()):
        row = int((counts != 1).nonzero()[0])
        raise InjectionError(
            f"The prompt of row {row} holds {int(counts[row])} valid injection markers.",
            expected=f"exactly one {marker.char!r} (id {marker.id}) between ids {marker.left_id} and {marker.right_id}",
            next_step="build the prompt from the sidecar's own template",
        )
    return middle.to(torch.int64).argmax(dim=1) + 1


@dataclass(frozen=True)
class Injector:
    """Puts vectors into one model. `kind` and `scale` come from the sidecar."""

    adapter: Adapter
    spec: Injection
    marker: MarkerTokens

    def entering(self, vectors: Tensor) -> Tensor:
        """What enters the model for raw `vectors` [N, d]: float32 [N, d], rescaled (`overwrite`) or unit (`add`)."""
        if not bool(torch.isfinite(vectors).all()) or bool((vectors.double().norm(dim=-1) == 0).any()):
            raise VectorError("A zero, NaN or infinite vector cannot be injected.")
        return rescale(vectors, self.spec.scale if self.spec.kind == "overwrite" else 1.0)

    @contextmanager
    def inject(self, model: nn.Module, vectors: Tensor, positions: Tensor) -> Iterator[None]:
        """While open, the next forward passes of `model` read `vectors` at `positions`.

        Args:
            model: CausalLM, wrapper or trunk.
            vectors: raw float32 [rows, d], one for each row of the batch.
            positions: int64 [rows], the marker's column in each row (see `find_markers`).

        Forward passes over one token at a time (decoding with a cache) are left alone. Leaving the context without
        any injection having happened is an InjectionError.
        """
        entering = self.entering(vectors)
        hits = 0

        def place(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            nonlocal hits
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.shape[1] == 1:
                return None
            if hidden.shape[0] != len(entering):
                raise InjectionError(
                    "The batch and its vectors differ in length.", got=f"{hidden.shape[0]} rows", expected=len(entering)
                )
            rows = torch.arange(len(entering), device=hidden.device)
            columns = positions.to(hidden.device)
            values = entering.to(hidden.device)
            if self.spec.kind == "add":
                here = hidden[rows, columns].float()
                values = here + here.norm(dim=-1, keepdim=True) * values
            changed = hidden.clone()
            changed[rows, columns] = values.to(hidden.dtype)
            hits += 1
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        if self.spec.kind == "overwrite":
            target = self.adapter.embedding_module(model)
        else:
            target = self.adapter.block(model, ADD_SITE)
        handle = target.register_forward_hook(place)
        try:
            yield
            if hits == 0:
                raise InjectionError(
                    "The vectors never entered the model: no forward pass went through its embedding.",
                    next_step="run the model on input_ids inside this context, not on inputs_embeds",
                )
        finally:
            handle.remove()
