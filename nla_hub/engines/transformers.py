"""transformers' own model code, one batch at a time, our own draws.

All rows share one prompt of one length, so nothing is padded. What stands before the marker is computed once and attended by
all rows together (`shared_prefix.py`), where the architecture allows it; else each row has the whole prompt in an ordinary
cache. The vector enters through the injection hook during the prompt pass; afterwards only new tokens are run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from threading import RLock
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache

from nla_hub.architecture import Architecture
from nla_hub.batching import run_batches
from nla_hub.engines.base import (
    Completion,
    LoadedAV,
    Reads,
    probe_vectors,
    require_kind,
    require_room,
    require_sensitive,
)
from nla_hub.engines.endings import Endings, eos_ids
from nla_hub.engines.shared_prefix import SharedPrefix, TailCache, can_share, shared_attention
from nla_hub.errors import Interrupted
from nla_hub.hardware import free_memory
from nla_hub.log import logger
from nla_hub.memory import Workload, rows_that_fit
from nla_hub.sampling import choose
from nla_hub.source_text import context_length

Cache = DynamicCache | TailCache


class TransformersEngine:
    """Runs an AV with transformers; both injection kinds, any device, float32 to quantised. Threads take turns.

    Attributes:
        stops: False lets rows run on to `max_new_tokens` whatever they write, so that a benchmark's routes do equal work.
    """

    name: ClassVar[str] = "transformers"
    kinds: ClassVar[frozenset[str]] = frozenset({"overwrite", "add"})
    reads: ClassVar[Reads] = "model"

    def __init__(self, av: LoadedAV) -> None:
        require_kind(type(self), av.injector.spec)
        self.av = av
        self.model = av.loaded.model
        self.device: torch.device = next(av.loaded.adapter.embedding_module(self.model).parameters()).device
        self.stops = True
        self._sharing = True
        self._turn = RLock()  # hooks and the choice of attention hold for the whole model, not for one thread

    def close(self) -> None:
        """Nothing is held besides the AV."""

    def probe(self) -> None:
        """Raise an InjectionError unless the vector reaches the logits.

        The shared beginning is held against the plain path here: an architecture whose attention does something that ours does
        not know is served by the plain path from then on.
        """
        vectors = probe_vectors(self.av.loaded.d_model)
        with self._turn, torch.inference_mode():
            shared = self._shared(1)
            logits, _ = self._prompt_pass(vectors, 1, shared)
            if shared is not None and not _agree(logits, self._prompt_pass(vectors, 1, None)[0]):
                logger.warning(
                    "%s: the shared beginning of the prompt does not give what the model gives; going on without it",
                    self.av.directory,
                )
                self._sharing = False
        require_sensitive(list(logits.float().log_softmax(-1).cpu()), self.name)

    def fitting_rows(self, max_new_tokens: int) -> int:
        """Rows that can run together in the memory that is free now; a power of two."""
        prompt = self.av.prompt
        shares = can_share(self.model, prompt.marker_position, len(prompt) + max_new_tokens)
        before = prompt.marker_position if shares else 0
        work = Workload(1, len(prompt), max_new_tokens, shared=before)
        width = self.model.get_input_embeddings().weight.element_size()
        architecture = Architecture.of(self.model.config)
        return rows_that_fit(
            architecture, work, free_memory(self.device), width=width, on_cpu=self.device.type == "cpu"
        )

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
        """See `Engine.generate`. Out of memory halves the batch and goes on.

        Raises:
            ContextLengthError: prompt and answer do not fit into what the AV reads.
            Interrupted: Ctrl-C; carries the completions that are done.
        """
        require_room(self.av, max_new_tokens, context_length(self.model.config))
        found: dict[int, Completion] = {}

        def run(rows: Sequence[int]) -> None:
            part = None if draws is None else draws[rows[0] : rows[-1] + 1]
            batch = self._batch(vectors[rows[0] : rows[-1] + 1], part, temperature, max_new_tokens, shared)
            found.update((rows[i], completion) for i, completion in batch)

        try:
            with self._turn, torch.inference_mode():
                shared = self._shared(max_new_tokens)
                batches = [range(len(vectors))[i : i + batch_size] for i in range(0, len(vectors), batch_size)]
                for rows, _ in run_batches(batches, run):
                    if progress is not None:
                        progress(len(rows))
        except KeyboardInterrupt as cause:
            raise Interrupted(found) from cause
        return [found[i] for i in range(len(vectors))]

    def _shared(self, max_new_tokens: int) -> SharedPrefix | None:
        """What all rows have in common, computed now from the present weights; None where the plain path must be taken.

        Computed for each call, so that weights that changed since (reinforcement learning) are never answered from before.
        """
        prompt = self.av.prompt
        if not self._sharing or not can_share(self.model, prompt.marker_position, len(prompt) + max_new_tokens):
            return None
        return SharedPrefix.of(self.model, prompt.ids[: prompt.marker_position], self.device)

    def _prompt_pass(self, vectors: Tensor, room: int, shared: SharedPrefix | None) -> tuple[Tensor, Cache]:
        """Logits after the prompt [rows, vocabulary], and the cache with room for answers of `room` tokens."""
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
    ) -> Iterator[tuple[int, Completion]]:
        """Rows and what the AV wrote for them, each as soon as it has ended; those that go on are kept together."""
        logits, cache = self._first(vectors, shared, max_new_tokens)
        rows = torch.arange(len(vectors), device=logits.device)  # which row each row of the running batch is
        ids: list[list[int]] = [[] for _ in rows]
        logprobs = torch.empty(len(vectors), max_new_tokens, device=logits.device)
        draws = None if draws is None else draws.to(logits.device)
        running = list(range(len(vectors)))
        for step in range(max_new_tokens):
            tokens, logp = choose(logits, None if draws is None else draws[rows, step], temperature)
            logprobs[rows, step] = logp
            kept = []
            for i, (row, token) in enumerate(zip(running, tokens.tolist(), strict=True)):
                ids[row].append(token)
                finish = self._endings.at(ids[row]) if self.stops else None
                if finish is None and step + 1 < max_new_tokens:
                    kept.append(i)
                else:
                    text = self._endings.text(ids[row])
                    own = logprobs[row, : step + 1].cpu()
                    yield row, Completion(tuple(ids[row]), text, finish or "length", own)
            if not kept:
                return
            if len(kept) < len(running):
                keep = torch.tensor(kept, device=tokens.device)
                cache.batch_select_indices(keep)
                tokens, rows = tokens[keep], rows[keep]
                running = [running[i] for i in kept]
            logits = self._forward(tokens[:, None], cache)

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

    @cached_property
    def _endings(self) -> Endings:
        configs = (getattr(self.model, "generation_config", None), self.model.config)
        return Endings(self.av.tokenizer, eos_ids(self.av.tokenizer, *configs))


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether two routes computed the same logits, but for rounding in their dtype."""
    tolerance: float = TOLERANCE * torch.finfo(one.dtype).eps ** 0.5
    worst = float((one.float() - other.float()).abs().max())
    return worst <= tolerance * float(other.float().abs().max())


TOLERANCE = 2.0
"""Times the root of the dtype's rounding unit (float32 7e-4, bfloat16 0.18), relative to the largest logit: far above rounding,
which is about 1e-6 in float32."""
