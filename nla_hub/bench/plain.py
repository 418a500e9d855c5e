"""The plain routes: what somebody writes with transformers alone. Nothing of nla-hub's engines, hooks or batching is used here.

They are what the engines are timed against, and what their tokens and vectors are compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from nla_hub.engines.base import LoadedAV
from nla_hub.errors import NLAError
from nla_hub.reconstructor import Reconstructor
from nla_hub.sidecar import Site


class PlainAV:
    """An AV on `model.generate`, greedy, never stopping.

    `overwrite`: `inputs_embeds` whose row at the marker is the rescaled vector. `add`: `input_ids`, and one hook on block 1.
    """

    def __init__(self, av: LoadedAV) -> None:
        self.model: Any = av.loaded.model
        self.spec = av.injector.spec
        self.prompt = av.prompt
        self.block = av.loaded.adapter.block_list(self.model)[1] if self.spec.kind == "add" else None
        self.device: torch.device = self.model.get_input_embeddings().weight.device

    def generate(self, vectors: Tensor, new_tokens: int, *, batch_size: int) -> list[list[int]]:
        """Exactly `new_tokens` ids for each of `vectors` (raw float32 [N, d])."""
        found: list[list[int]] = []
        with torch.inference_mode(), self._never_stopping(new_tokens):
            for begin in range(0, len(vectors), batch_size):
                rows = vectors[begin : begin + batch_size]
                with self._adding(rows):
                    out = self.model.generate(**self._prompt(rows, []), do_sample=False)
                found += out[:, -new_tokens:].tolist()
        return found

    def logprobs_after(self, vector: Tensor, ids: Sequence[int]) -> Tensor:
        """Log-probabilities of the token after the prompt and `ids` under one vector [d]: float32 [vocabulary]."""
        rows = vector[None]
        with torch.inference_mode(), self._adding(rows):
            out = self.model(**self._prompt(rows, ids), use_cache=False, logits_to_keep=1)
        values: Tensor = out.logits[0, -1].float().log_softmax(-1)
        return values

    def _prompt(self, vectors: Tensor, ids: Sequence[int]) -> dict[str, Tensor]:
        tokens = torch.tensor([*self.prompt.ids, *ids], device=self.device).repeat(len(vectors), 1)
        mask = torch.ones_like(tokens)
        if self.spec.kind == "add":
            return {"input_ids": tokens, "attention_mask": mask}
        embeds = self.model.get_input_embeddings()(tokens).clone()
        entering = vectors if self.spec.scale is None else self._unit(vectors) * self.spec.scale
        embeds[:, self.prompt.marker_position] = entering.to(embeds)
        return {"inputs_embeds": embeds, "attention_mask": mask}

    @staticmethod
    def _unit(vectors: Tensor) -> Tensor:
        wide = vectors.double()
        unit: Tensor = wide / wide.norm(dim=-1, keepdim=True)
        return unit

    @contextmanager
    def _adding(self, vectors: Tensor) -> Iterator[None]:
        if self.block is None:
            yield
            return
        at, unit = self.prompt.marker_position, self._unit(vectors)

        def add(_module: Any, _args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.shape[1] <= at:  # a step of decoding
                return None
            changed = hidden.clone()
            here = hidden[:, at].double()
            changed[:, at] = (here + here.norm(dim=-1, keepdim=True) * unit.to(here.device)).to(hidden.dtype)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = self.block.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _never_stopping(self, new_tokens: int) -> Iterator[None]:
        # What generate() is not told it takes from here, so no other way disables the model's own EOS and sampling settings.
        before = self.model.generation_config
        self.model.generation_config = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0)
        try:
            yield
        finally:
            self.model.generation_config = before


def vectors_one_by_one(ar: Reconstructor, texts: Sequence[str]) -> Tensor:
    """The AR's vectors of `texts` by one forward pass a text: float32 [N, d] on the CPU."""
    found = []
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([ar.prompt.encode(text)], device=ar.model.head.weight.device)
            found.append(_head(ar, _trunk(ar)(input_ids=ids, use_cache=False).last_hidden_state[:, -1]))
    return torch.cat(found)


def vectors_batched(ar: Reconstructor, texts: Sequence[str], *, batch_size: int) -> Tensor:
    """The same in batches of neighbours, in the caller's order, padded on the right by the tokenizer's rule."""
    found = []
    with torch.inference_mode():
        for begin in range(0, len(texts), batch_size):
            encoded = [ar.prompt.encode(text) for text in texts[begin : begin + batch_size]]
            ids, mask = _padded(encoded, ar.model.head.weight.device)
            hidden = _trunk(ar)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            last = torch.tensor([len(row) - 1 for row in encoded], device=ids.device)
            found.append(_head(ar, hidden[torch.arange(len(encoded), device=ids.device), last]))
    return torch.cat(found)


def _trunk(ar: Reconstructor) -> Any:
    return ar.model.adapter.trunk(ar.model.trunk)


def _head(ar: Reconstructor, read: Tensor) -> Tensor:
    wide = read.float()
    if ar.model.head_input_scale is not None:
        wide = wide * (ar.model.head_input_scale / wide.norm(dim=-1, keepdim=True))
    return (wide @ ar.model.head.weight.float().T).cpu()


def last_hidden(model: Any, tokenizer: Any, site: Site, texts: Sequence[str], *, batch_size: int) -> Tensor:
    """`hidden_states[K+1]` at the last token of each text, from passes of the complete model: float32 [N, d] on the CPU.

    Texts of similar length share a batch.

    Raises:
        NLAError: K is the last block, whose entry of `hidden_states` is after the final norm.
    """
    if site.layer + 1 >= model.config.get_text_config().num_hidden_layers:
        raise NLAError("The plain route cannot read the last block: hidden_states ends behind the final norm.")
    sequences: list[list[int]] = [tokenizer(text)["input_ids"] for text in texts]
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    found: dict[int, Tensor] = {}
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            chunk = order[begin : begin + batch_size]
            ids, mask = _padded([sequences[i] for i in chunk], device)
            out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            hidden = out.hidden_states[site.hidden_states_index]
            for row, i in enumerate(chunk):
                found[i] = hidden[row, len(sequences[i]) - 1].float().cpu()
    return torch.stack([found[i] for i in range(len(sequences))])


def _padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, sequences))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in sequences], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in sequences], device=device)
    return ids, mask
