"""transformers' own model code, one batch at a time, our own draws.

All rows share one prompt of one length, so nothing is padded. What stands before the marker is computed once and attended by
all rows together (`shared_prefix.py`), where the architecture allows it; else each row has the whole prompt in an ordinary
cache. The vector enters through the injection hook during the prompt pass; afterwards only new tokens are run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache

from nla_hub.accelerator import free_memory
from nla_hub.engines.base import Completion, Finish, LoadedAV, Reads, probe_vectors, require_kind, require_sensitive
from nla_hub.errors import ContextLengthError
from nla_hub.log import logger
from nla_hub.prompts import CLOSING_TAG
from nla_hub.sampling import choose
from nla_hub.shared_prefix import SharedPrefix, TailCache, can_share, shared_attention
from nla_hub.source_text import context_length

Cache = DynamicCache | TailCache


class TransformersEngine:
    """Runs an AV with transformers; both injection kinds, any device, float32 to quantised."""

    name: ClassVar[str] = "transformers"
    kinds: ClassVar[frozenset[str]] = frozenset({"overwrite", "add"})
    reads: ClassVar[Reads] = "model"

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
            shared = self._shared(max_new_tokens)
            while len(done) < len(vectors):
                rows = slice(len(done), len(done) + batch_size)
                part = None if draws is None else draws[rows]
                try:
                    batch = self._batch(vectors[rows], part, temperature, max_new_tokens, shared)
                except torch.OutOfMemoryError:
                    if batch_size == 1:
                        raise
                    batch_size //= 2
                else:
                    done.extend(batch)
                    if progress is not None:
                        progress(len(batch))
                    continue
                # Outside of the handler, where nothing holds on to the failed batch any more.
                free_memory()
                logger.warning("out of memory: going on with %d rows at a time", batch_size)
        return done

    def _shared(self, max_new_tokens: int) -> SharedPrefix | None:
        """What all rows have in common, computed now from the present weights; None where the plain path must be taken.

        Computed for each call, so that weights that changed since (reinforcement learning) are never answered from before.
        """
        prompt = self.av.prompt
        if not can_share(self.model, prompt.marker_position, len(prompt) + max_new_tokens):
            return None
        return SharedPrefix.of(self.model, prompt.ids[: prompt.marker_position], self.device)

    def _prompt_pass(self, vectors: Tensor, room: int = 1, shared: SharedPrefix | None = None) -> tuple[Tensor, Cache]:
        """Logits after the prompt [rows, vocabulary], and the cache with room for answers of `room` tokens."""
        shared = shared or self._shared(room)
        prompt = self.av.prompt
        begin = 0 if shared is None else len(shared)
        ids = torch.tensor(prompt.ids[begin:], device=self.device).expand(len(vectors), -1)
        columns = torch.full((len(vectors),), prompt.marker_position - begin, device=self.device)
        cache: Cache = (
            DynamicCache(config=self.model.config)
            if shared is None
            else TailCache(shared, capacity=len(prompt) - begin + room)
        )
        with self.av.injector.inject(self.model, vectors, columns):
            return self._forward(ids, cache), cache

    def _forward(self, ids: Tensor, cache: Cache) -> Tensor:
        """Logits after the last of `ids` [rows, new]: [rows, vocabulary]."""
        settings: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        if isinstance(cache, TailCache):
            begin = cache.get_seq_length()
            settings["position_ids"] = torch.arange(begin, begin + ids.shape[1], device=ids.device)[None]
            with shared_attention(self.model, cache):
                out = self.model(input_ids=ids, **settings)
        else:
            out = self.model(input_ids=ids, **settings)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _batch(
        self,
        vectors: Tensor,
        draws: Tensor | None,
        temperature: float,
        max_new_tokens: int,
        shared: SharedPrefix | None,
    ) -> list[Completion]:
        logits, cache = self._first(vectors, shared, max_new_tokens)
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
            logits = self._forward(tokens[:, None], cache)
        return [
            Completion(tuple(i), self._decode(i), f, torch.stack(p))
            for i, f, p in zip(ids, finish, logprobs, strict=True)
        ]

    def _first(self, vectors: Tensor, shared: SharedPrefix | None, max_new_tokens: int) -> tuple[Tensor, Cache]:
        """The prompt pass of a batch; samples of one vector share theirs."""
        first: dict[bytes, int] = {}
        places = [first.setdefault(row.numpy().tobytes(), len(first)) for row in vectors.cpu()]
        if len(first) == len(vectors):
            return self._prompt_pass(vectors, max_new_tokens, shared)
        once = [places.index(i) for i in range(len(first))]
        logits, cache = self._prompt_pass(vectors[once], max_new_tokens, shared)
        spread = torch.tensor(places, device=logits.device)
        cache.batch_select_indices(spread)
        return logits[spread], cache

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
