"""vLLM, stock and in this process's name: prompts whose marker is an embedding, batched as vLLM likes.

A request is the AV's prompt as token ids, with a mask that says that the marker's row comes from `prompt_embeds` instead; so
vLLM looks the other rows up in its own table, scaled as the family scales them, and no table is needed here. The
row that enters is `Injector.entering`'s, cast to the AV's dtype. `probe` proves that it arrives.

Greedy texts are those of the transformers engine up to near ties. Drawn ones are not: vLLM draws by itself, from the same
distribution, with a seed that follows from the row's own uniforms, so that (seed, key) still decide a row's text.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from threading import Lock
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nla_hub.architecture import causal_class
from nla_hub.engines.base import (
    Completion,
    Reads,
    StoredAV,
    probe_vectors,
    require_kind,
    require_room,
    require_sensitive,
)
from nla_hub.engines.endings import Endings
from nla_hub.engines.vllm.room import Room, room
from nla_hub.engines.vllm.start import Running, sampling_params
from nla_hub.errors import InjectionError, InputError, Interrupted, NLAError
from nla_hub.log import logger
from nla_hub.prompts import CLOSING_TAG
from nla_hub.sampling import request_seed
from nla_hub.source_text import context_length

PrefixCaching = Literal["auto"] | bool

LONGEST = 1024
"""Tokens of an answer that there is room for unless `max_model_len` says more."""
ROWS, ROWS_ON_CPU = 256, 32
"""Rows that run at once: vLLM's own default, and what a few cores can use."""
BLOCK_ON_CPU = 32
"""Tokens of a cache block on a CPU: the least that its kernels like. vLLM's 128 is longer than most prompts, and only whole
blocks are shared."""
COLDEST, HOTTEST = 0.01, 2.0
"""vLLM raises lower temperatures to the one (`_MAX_TEMP` of its sampling_params.py) and refuses those above the other."""
SCORED = 64
"""Token ids, spread over the vocabulary, whose log-probabilities the probe looks at."""
NOISE = 0.25
"""Of the difference that another vector makes: what the same vector may differ by from one pass to another (in bfloat16 passes
of other shapes are not equal; in float32 it is 1e-6 of it)."""


class VLLMEngine:
    """Runs an AV with vLLM; `overwrite` alone, float32, bfloat16 or float16, one or several cards.

    Attributes:
        stops: False lets rows run on to `max_new_tokens` whatever they write, so that a benchmark's routes do equal work.
    """

    name: ClassVar[str] = "vllm"
    kinds: ClassVar[frozenset[str]] = frozenset({"overwrite"})
    reads: ClassVar[Reads] = "files"
    exact_draws: ClassVar[bool] = False

    def __init__(
        self,
        av: StoredAV,
        *,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        enforce_eager: bool | None = None,
        block_size: int | None = None,
        prefix_caching: PrefixCaching = "auto",
    ) -> None:
        """Start vLLM on an AV.

        Args:
            tensor_parallel_size: cards that share it.
            gpu_memory_utilization: share of each card that vLLM takes. None: its weights and what `room.room` counts.
            max_model_len: tokens of prompt and answer together. None: the prompt and `LONGEST`, as far as the AV reads.
            max_num_seqs: rows that run at once. None: `ROWS`, on a CPU `ROWS_ON_CPU`.
            enforce_eager: no compiled graphs. None: on a CPU, where compiling takes minutes.
            block_size: tokens of a cache block. None: vLLM's own, on a CPU `BLOCK_ON_CPU`.
            prefix_caching: whether the prompt's beginning is computed once. "auto": where `probe` proves it harmless.

        Raises:
            InjectionError: the AV injects in a way that vLLM cannot. InputError: an option out of range.
            NLAError: vLLM is missing, or does not start with this AV on this machine.
        """
        self.av = av
        self.stops = True
        self._running: Running | None = None
        self._turn = Lock()
        """Held while requests run: threads take turns."""
        try:
            require_kind(type(self), av.injector.spec)
            if prefix_caching not in ("auto", True, False):
                raise InputError("prefix_caching is True, False or 'auto'.", got=repr(prefix_caching))
            self.prefix_caching: PrefixCaching = prefix_caching
            self.reads_cache = bool(prefix_caching)
            """Whether requests read what others left in the cache; the probe may turn it off."""
            self.max_model_len = self._longest(max_model_len)
            self._endings = Endings.stored(av.tokenizer, av.config, av.directory)
            self._options: Mapping[str, Any] = {
                "tensor_parallel_size": tensor_parallel_size,
                "gpu_memory_utilization": gpu_memory_utilization,
                "max_num_seqs": max_num_seqs,
                "enforce_eager": enforce_eager,
                "block_size": block_size,
            }
            self._rows = ROWS
            self._running = self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> Running:
        """vLLM on this AV."""
        return Running(self.av.directory, self._settings)

    def _longest(self, asked: int | None) -> int:
        limit, prompt = context_length(self.av.config), len(self.av.prompt)
        if asked is None:
            return prompt + LONGEST if limit is None else min(limit, prompt + LONGEST)
        if not isinstance(asked, int) or asked <= prompt or (limit is not None and asked > limit):
            raise InputError(
                "max_model_len does not fit this AV.",
                got=repr(asked),
                expected=f"more than its prompt of {prompt} tokens" + (f", at most {limit}" if limit else ""),
            )
        return asked

    def _settings(self, device: str) -> dict[str, Any]:
        """What `vllm.LLM` gets besides the model, on a type of device."""
        on_cpu, options = device == "cpu", dict(self._options)
        self._rows = options["max_num_seqs"] = options["max_num_seqs"] or (ROWS_ON_CPU if on_cpu else ROWS)
        if options["enforce_eager"] is None:
            options["enforce_eager"] = on_cpu
        if options["block_size"] is None and on_cpu:
            options["block_size"] = BLOCK_ON_CPU
        if options["gpu_memory_utilization"] is None:
            found = self._room(device)
            options |= {"kv_cache_memory_bytes": found.cache, "gpu_memory_utilization": found.share}
        if (name := causal_class(self.av.config)) is not None:
            # A text model out of a wrapper says nothing or the wrapper's name, and vLLM would leave its lm_head out.
            options["hf_overrides"] = {"architectures": [name]}
        return {
            "dtype": str(self.av.dtype).removeprefix("torch."),
            "max_model_len": self.max_model_len,
            "runner": "generate",
            "enable_prompt_embeds": True,
            "enable_prefix_caching": self.reads_cache,
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": SCORED,
            "generation_config": "vllm",  # its generation_config.json shall not change how tokens are drawn
            "use_tqdm_on_load": False,
            **{name: value for name, value in options.items() if value is not None},
        }

    def _room(self, device: str, weights: int | None = None) -> Room:
        """See `room`."""
        devices = int(self._options["tensor_parallel_size"])
        return room(
            self.av, device, rows=self._rows, max_model_len=self.max_model_len, devices=devices, weights=weights
        )

    # -- the contract --------------------------------------------------------------------------------------------

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
        """See `Engine.generate`. `batch_size` is not used: vLLM takes new rows in as others end, at most `max_num_seqs`.

        Raises:
            ContextLengthError: prompt and answer are longer than `max_model_len`. InputError: a temperature that vLLM
            would change. NLAError: the engine is closed, or vLLM stopped. Interrupted: Ctrl-C; carries the completions
            that are done.
        """
        prompt = len(self.av.prompt)
        require_room(
            self.av,
            max_new_tokens,
            self.max_model_len,
            expected=f"at most {self.max_model_len - prompt}, as the engine was started",
            next_step=f'engine_options={{"max_model_len": {prompt + max_new_tokens}}}',
        )
        if draws is not None and not COLDEST <= temperature <= HOTTEST:
            raise InputError(
                "vLLM does not draw at this temperature.",
                got=temperature,
                expected=f"from {COLDEST} to {HOTTEST}",
                next_step='temperature=0 is greedy; engine="transformers" takes any',
            )
        common = self._common(max_new_tokens)
        if draws is None:
            each = [sampling_params(temperature=0.0, **common) for _ in vectors]
        else:
            each = [sampling_params(temperature=temperature, seed=request_seed(row), **common) for row in draws]
        found: dict[int, Completion] = {}
        try:
            with self._turn, closing(self._run(vectors, each)) as outputs:
                for row, output in outputs:
                    found[row] = self._completion(output)
                    if progress is not None:
                        progress(1)
        except KeyboardInterrupt as cause:
            raise Interrupted(found) from cause
        return [found[row] for row in range(len(vectors))]

    def fitting_rows(self, max_new_tokens: int) -> int:
        """Rows that run at once at most, whatever their length."""
        return self._rows

    def probe(self) -> None:
        """Raise an InjectionError unless the vector reaches the logits, and unless the cache keeps vectors apart.

        With `prefix_caching="auto"` a cache that does not is left unread, with a warning.
        """
        ids = torch.linspace(0, int(self.av.config.vocab_size) - 1, SCORED).long().unique().tolist()
        pair = probe_vectors(int(self.av.config.hidden_size))
        first, other, again = self._scores(pair[[0, 1, 0]], ids, cached=False)
        require_sensitive([first, other], self.name)
        moved, noise = (first - other).abs().max(), (first - again).abs().max()
        if not noise < NOISE * moved:
            raise InjectionError(
                "The same vector gives other next words each time, as different as another vector's.",
                where=f"engine {self.name!r}",
                got=f"{noise:.1e} from one pass to another, {moved:.1e} from vector to vector",
                next_step='use engine="transformers"',
            )
        if self.reads_cache and not self._cache_keeps_apart(pair, ids):
            if self.prefix_caching is True:
                raise InjectionError(
                    "vLLM's prefix cache takes one vector for another.",
                    where=f"engine {self.name!r}",
                    next_step='engine_options={"prefix_caching": False}',
                )
            logger.warning("vLLM's prefix cache takes one vector for another here: it is not used")
            self.reads_cache = False

    def close(self) -> None:
        """End vLLM and remove what was written for it; twice is fine."""
        running, self._running = self._running, None
        if running is not None:
            running.close()
        if self.av.scratch is not None:
            self.av.scratch.cleanup()

    # -- requests ------------------------------------------------------------------------------------------------

    def _common(self, max_new_tokens: int) -> dict[str, Any]:
        """What the sampling parameters of all rows have in common."""
        ends = {
            "stop": [CLOSING_TAG],
            "include_stop_str_in_output": True,
            "stop_token_ids": sorted(self._endings.eos),
        }
        return {
            "max_tokens": max_new_tokens,
            "logprobs": 0,  # of the token that was taken, and of no other
            "flat_logprobs": True,
            "skip_reading_prefix_cache": not self.reads_cache,
            **(ends if self.stops else {"ignore_eos": True}),
        }

    def _run(self, vectors: Tensor, each: Sequence[Any]) -> Generator[tuple[int, Any], None, None]:
        """Rows and vLLM's outputs, each as soon as it has ended, for raw vectors [N, d] with their sampling parameters.

        Twice the rows that run at once are handed over at a time: a request carries a prompt's length of embeddings. A loop
        that is left early takes the others back.

        Raises:
            NLAError: the engine is closed, or vLLM stopped.
        """
        if self._running is None:
            raise NLAError("This engine is closed.", where="engine 'vllm'", next_step="load the pair again")
        llm = self._running.llm
        entering = self.av.injector.entering(vectors).to(self.av.dtype)
        first, ended = llm.request_counter.counter, 0  # vLLM numbers requests in the order in which it gets them
        sent: list[str] = []
        try:
            while ended < len(entering):
                waiting = len(sent) - ended
                if waiting < self._rows and len(sent) < len(entering):
                    part = slice(len(sent), len(sent) + 2 * self._rows - waiting)
                    requests = [request(self.av, row) for row in entering[part]]
                    sent += llm.enqueue(requests, list(each[part]), use_tqdm=False)
                for output in llm.llm_engine.step():
                    if output.finished:
                        ended += 1
                        yield int(output.request_id) - first, output
        except Exception as cause:
            self.close()
            raise NLAError(
                "vLLM stopped while it was writing.",
                got=f"{type(cause).__name__}: {cause}",
                next_step="load the pair again; VLLM_LOGGING_LEVEL=INFO shows vLLM's log",
            ) from cause
        finally:
            if ended < len(entering):
                self._abort(sent)

    def _abort(self, sent: Sequence[str]) -> None:
        """Take requests back; the engine is closed where that fails."""
        if self._running is None:
            return
        try:
            self._running.llm.llm_engine.abort_request(list(sent), internal=True)
            usable = self._running.usable
        except Exception as cause:
            logger.debug("vLLM took no abort: %s", cause)
            usable = False
        if not usable:
            self.close()

    def _completion(self, output: Any) -> Completion:
        (found,) = output.outputs
        given = list(found.token_ids)
        ids, finish = self._endings.cut(given) if self.stops else (given, None)
        flat = found.logprobs
        logprobs = [flat.logprobs[i] for i in flat.start_indices[: len(ids)]]
        return Completion(tuple(ids), self._endings.text(ids), finish or "length", torch.tensor(logprobs))

    # -- proof ---------------------------------------------------------------------------------------------------

    def _scores(self, vectors: Tensor, ids: list[int], *, cached: bool) -> Tensor:
        """Log-probabilities of `ids` as the first word, float32 [N, len(ids)], read with or without the prefix cache."""
        params = sampling_params(
            temperature=0.0,
            max_tokens=1,
            logprob_token_ids=ids,
            logprobs=len(ids),
            skip_reading_prefix_cache=not cached,
            detokenize=False,
        )
        with self._turn, closing(self._run(vectors, [params] * len(vectors))) as outputs:
            found = dict(outputs)
        words = [found[row].outputs[0].logprobs[0] for row in range(len(vectors))]
        return torch.tensor([[word[i].logprob for i in ids] for word in words])

    def _cache_keeps_apart(self, pair: Tensor, ids: list[int]) -> bool:
        """Whether each of eight vectors scores with the cache as without it, when it is new and when it was seen before."""
        vectors = torch.cat([pair.roll(shift, -1) for shift in range(4)])
        cold = self._scores(vectors, ids, cached=False)
        own = torch.arange(len(vectors))
        for order in (own, own.flip(0)):
            warm = self._scores(vectors[order], ids, cached=True)
            apart = (warm[:, None] - cold[None]).abs().amax(-1)
            mine = apart[own, order]
            apart[own, order] = torch.inf
            if not bool((mine < NOISE * apart.amin(-1)).all()):
                return False
        return True


def request(av: StoredAV, row: Tensor) -> dict[str, Any]:
    """The AV's prompt for vLLM, with `row` [d], in the AV's dtype, at the marker."""
    embeds = torch.zeros(len(av.prompt), row.shape[-1], dtype=row.dtype)
    embeds[av.prompt.marker_position] = row
    mask = [i != av.prompt.marker_position for i in range(len(av.prompt))]
    return {"prompt_token_ids": list(av.prompt.ids), "prompt_embeds": embeds, "prompt_is_token_ids": mask}
