"""An engine that keeps no cache: every token costs a pass over the whole sequence. Slow, and hard to get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from nla_hub.engines.base import Completion, Finish, LoadedAV, probe_vectors, require_kind, require_sensitive
from nla_hub.prompts import CLOSING_TAG
from nla_hub.sampling import choose


class UncachedEngine:
    """Runs an AV by reading everything again for each token; both injection kinds."""

    name: ClassVar[str] = "uncached"
    kinds: ClassVar[frozenset[str]] = frozenset({"overwrite", "add"})

    def __init__(self, av: LoadedAV) -> None:
        require_kind(type(self), av.injector.spec)
        self.av = av

    def generate(
        self,
        vectors: Tensor,
        draws: Tensor | None,
        *,
        temperature: float,
        max_new_tokens: int,
        batch_size: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """One completion for each row of `vectors`; see nla_hub.engines.base.Engine."""
        done: list[Completion] = []
        for begin in range(0, len(vectors), batch_size):
            part = slice(begin, begin + batch_size)
            rows = self._batch(vectors[part], None if draws is None else draws[part], temperature, max_new_tokens)
            done.extend(rows)
            if progress is not None:
                progress(len(rows))
        return done

    def probe(self) -> None:
        """Raise an InjectionError unless the vector reaches the logits."""
        vectors = probe_vectors(self.av.loaded.d_model)
        logits = self._next(vectors, torch.empty(len(vectors), 0, dtype=torch.long))
        require_sensitive(list(logits.float().log_softmax(-1).cpu()), self.name)

    def close(self) -> None:
        """Nothing is held besides the AV."""

    @torch.inference_mode()
    def _next(self, vectors: Tensor, written: Tensor) -> Tensor:
        """Logits [rows, vocabulary] behind the prompt and what was written, int64 [rows, length]."""
        model, prompt = self.av.loaded.model, self.av.prompt
        device = self.av.loaded.adapter.embedding_module(model).weight.device
        ids = torch.cat([torch.tensor(prompt.ids).expand(len(vectors), -1), written], dim=1).to(device)
        columns = torch.full((len(vectors),), prompt.marker_position, device=device)
        with self.av.injector.inject(model, vectors, columns):
            logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1]

    def _batch(self, vectors: Tensor, draws: Tensor | None, temperature: float, steps: int) -> list[Completion]:
        ids: list[list[int]] = [[] for _ in vectors]
        logprobs: list[list[Tensor]] = [[] for _ in vectors]
        finish: list[Finish] = ["length" for _ in vectors]
        running = list(range(len(vectors)))
        for step in range(steps):
            logits = self._next(vectors[running], torch.tensor([ids[row] for row in running], dtype=torch.long))
            column = None if draws is None else draws[running, step].to(logits.device)
            tokens, logp = choose(logits, column, temperature)
            for row, token, value in zip(running, tokens.tolist(), logp.cpu(), strict=True):
                ids[row].append(token)
                logprobs[row].append(value)
                finish[row] = self._finish(ids[row])
            running = [row for row in running if finish[row] == "length"]
            if not running:
                break
        return [
            Completion(tuple(i), self._text(i), f, torch.stack(p))
            for i, f, p in zip(ids, finish, logprobs, strict=True)
        ]

    def _finish(self, ids: list[int]) -> Finish:
        if ids[-1] == self.av.tokenizer.eos_token_id:
            return "eos"
        return "tag" if CLOSING_TAG in self._text(ids) else "length"

    def _text(self, ids: list[int]) -> str:
        return str(self.av.tokenizer.decode(ids, skip_special_tokens=True))
