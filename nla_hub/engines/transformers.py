"""The plain engine: transformers' own model code, one batch at a time, a KV cache, our own draws.

All rows share one prompt of one length, so nothing is padded. The vector enters through the injection hook during the
prompt pass; afterwards only new tokens are run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache

from nla_hub.engines.base import Completion, Finish, LoadedAV, probe_vectors, require_kind, require_sensitive
from nla_hub.errors import ContextLengthError
from nla_hub.prompts import CLOSING_TAG
from nla_hub.sampling import choose
from nla_hub.source_text import context_length


class TransformersEngine:
    """Runs an AV with transformers; both injection kinds, any device, float32 to quantised."""

    name: ClassVar[str] = "transformers"
    kinds: ClassVar[frozenset[str]] = frozenset({"overwrite", "add"})

    def __init__(self, av: LoadedAV) -> None:
        require_kind(type(self), av.injector.spec)
        self.av = av
        self.model = av.loaded.model
        self.device: torch.device = next(av.loaded.adapter.embedding_module(self.model).parameters()).device

    def close(self) -> None:
        """Nothing is held besides the AV."""

    def probe(self) -> None:
        """Raise an InjectionError unless the vector reaches the logits."""
        with torch.inference_mode():
            logits, _ = self._prompt_pass(probe_vectors(self.av.loaded.d_model))
        require_sensitive(list(logits.float().log_softmax(-1).cpu()), self.name)

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
        """See `Engine.generate`.

        Raises:
            ContextLengthError: prompt and answer do not fit into what the AV reads.
        """
        limit = context_length(self.model.config)
        if limit is not None and len(self.av.prompt) + max_new_tokens > limit:
            raise ContextLengthError(
                "The AV cannot write answers as long as this.",
                got=f"max_new_tokens={max_new_tokens} after a prompt of {len(self.av.prompt)}",
                expected=f"at most {limit - len(self.av.prompt)}",
            )
        done: list[Completion] = []
        with torch.inference_mode():
            for begin in range(0, len(vectors), batch_size):
                rows = slice(begin, begin + batch_size)
                part = None if draws is None else draws[rows]
                batch = self._batch(vectors[rows], part, temperature, max_new_tokens)
                done.extend(batch)
                if progress is not None:
                    progress(len(batch))
        return done

    def _prompt_pass(self, vectors: Tensor) -> tuple[Tensor, DynamicCache]:
        """Logits after the prompt [rows, vocabulary] and the filled cache."""
        prompt = self.av.prompt
        ids = torch.tensor(prompt.ids, device=self.device).expand(len(vectors), -1)
        columns = torch.full((len(vectors),), prompt.marker_position, device=self.device)
        cache = DynamicCache(config=self.model.config)
        with self.av.injector.inject(self.model, vectors, columns):
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], cache

    def _batch(
        self, vectors: Tensor, draws: Tensor | None, temperature: float, max_new_tokens: int
    ) -> list[Completion]:
        logits, cache = self._prompt_pass(vectors)
        rows = list(range(len(vectors)))  # which caller's row each row of the running batch is
        ids: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[Tensor]] = [[] for _ in rows]
        finish: list[Finish] = ["length" for _ in rows]
        for step in range(max_new_tokens):
            column = None if draws is None else draws[rows, step].to(logits.device)
            tokens, logp = choose(logits, column, temperature)
            running = []
            for i, (row, token, value) in enumerate(zip(rows, tokens.tolist(), logp.cpu(), strict=True)):
                ids[row].append(token)
                logprobs[row].append(value)
                if token in self._eos:
                    finish[row] = "eos"
                elif self._closes(ids[row]):
                    finish[row] = "tag"
                else:
                    running.append(i)
            if not running or step + 1 == max_new_tokens:
                break
            if len(running) < len(rows):
                keep = torch.tensor(running, device=tokens.device)
                cache.batch_select_indices(keep)
                tokens = tokens[keep]
                rows = [rows[i] for i in running]
            logits = self.model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
        return [
            Completion(tuple(i), self._decode(i), f, torch.stack(p))
            for i, f, p in zip(ids, finish, logprobs, strict=True)
        ]

    def _decode(self, ids: list[int]) -> str:
        return str(self.av.tokenizer.decode(ids, skip_special_tokens=True))

    def _closes(self, ids: list[int]) -> bool:
        # Only a token that holds ">" can complete the tag; the tag itself is at most as many tokens as characters.
        return ids[-1] in self._bracket_ids and CLOSING_TAG in self._decode(ids[-len(CLOSING_TAG) :])

    @cached_property
    def _bracket_ids(self) -> frozenset[int]:
        tokenizer = self.av.tokenizer
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        return frozenset(i for i, text in enumerate(texts) if ">" in text)

    @cached_property
    def _eos(self) -> frozenset[int]:
        generation = getattr(self.model, "generation_config", None)
        found = {self.av.tokenizer.eos_token_id}
        for config in (generation, self.model.config):
            value = getattr(config, "eos_token_id", None)
            found |= set(value) if isinstance(value, (list, tuple)) else {value}
        return frozenset(int(i) for i in found if i is not None)
