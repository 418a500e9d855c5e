"""Rollouts by vLLM in the processes that train, for AVs whose whole weights have no room beside the training state.

vLLM starts without weights and is sent the AV's before each step. Each sync is checked: every weight comes once and in its
shape, vLLM's own parameters then have these values, the prefix cache, which holds the old weights' work, is emptied; after the
first one the vector must reach the logits. That what samples is the policy, the trainer proves in every step by its own
log-probabilities.

With `tensor_parallel` N, N processes that follow each other by rank hold one copy together. They pool their rows, generate all
of them together and keep their own, so each of them must call `sync`, `generate` and `sleep` equally often.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nla_hub.architecture import causal_class
from nla_hub.engines.base import Completion, LoadedAV, StoredAV
from nla_hub.engines.vllm.colocated import Colocated, apart
from nla_hub.engines.vllm.engine import PrefixCaching, VLLMEngine
from nla_hub.engines.vllm.room import Room
from nla_hub.errors import Interrupted, NLAError, RecipeError, TrainingError
from nla_hub.training.processes import Processes
from nla_hub.training.recipe import RLSpec

SleepLevel = Literal[0, 1, 2]


class ColocatedVLLM(VLLMEngine):
    """A `SyncedEngine`: an AV under training, sampled by vLLM in the same process or in a group of them."""

    def __init__(
        self,
        av: LoadedAV,
        spec: RLSpec,
        *,
        processes: Processes,
        dtype: torch.dtype | None = None,
        sleep_level: SleepLevel = 2,
        prefix_caching: PrefixCaching = "auto",
    ) -> None:
        """Start vLLM for an AV, without its weights; all processes must do so together.

        Args:
            av: its config, tokenizer, prompt and injector are used, its weights are not.
            spec: `rollouts` says how many devices share a copy and what share of each it may take (on a CPU that is counted
                instead, see `engines.vllm.room`); no row gets longer than its `max_new_tokens`.
            dtype: to sample in. None: the AV's, of its embedding.
            sleep_level: what `sleep` does on accelerators: 2 frees everything, 1 keeps the weights in main memory so that
                `generate` may follow without a `sync`, 0 nothing.

        Raises:
            InjectionError: the AV injects in a way that vLLM cannot. RecipeError: the processes are no multiple of
            `tensor_parallel`. NLAError: vLLM is missing, or does not start with this AV here.
        """
        rollouts = spec.rollouts
        if processes.world % rollouts.tensor_parallel:
            raise RecipeError(
                "The processes cannot form groups of rl.rollouts.tensor_parallel.",
                got=f"{processes.world} processes",
                expected=f"a multiple of {rollouts.tensor_parallel}",
            )
        self._processes, self._share, self._asked = processes, rollouts.memory, sleep_level
        self._sleep_level: SleepLevel = 0
        self._asleep = self._filled = self._proven = False
        stored = without_weights(
            av, dtype or next(av.loaded.adapter.embedding_module(av.loaded.model).parameters()).dtype
        )
        self.incoming = Incoming(stored.config, stored.dtype)
        super().__init__(
            stored,
            tensor_parallel_size=rollouts.tensor_parallel,
            max_model_len=len(av.prompt) + spec.max_new_tokens,
            prefix_caching=prefix_caching,
        )
        self.tensor_parallel = rollouts.tensor_parallel

    def _start(self) -> Colocated:
        return Colocated(self.av.directory, self._settings)

    def _settings(self, device: str) -> dict[str, Any]:
        if device != "cpu":
            self._sleep_level = self._asked
            self._options = {**self._options, "gpu_memory_utilization": self._share}
        settings = super()._settings(device) | {"load_format": "dummy"}
        if self._sleep_level:
            settings["enable_sleep_mode"] = True
        if self._processes.world > 1:
            settings["distributed_executor_backend"] = "external_launcher"
        return settings

    def _room(self, device: str, weights: int | None = None) -> Room:
        return super()._room(device, self.incoming.bytes if weights is None else weights)

    @property
    def _vllm(self) -> Colocated:
        if self._running is None:
            raise NLAError("This engine is closed.", where="engine 'vllm'", next_step="start the stage again")
        assert isinstance(self._running, Colocated)
        return self._running

    # -- weights -------------------------------------------------------------------------------------------------

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `SyncedEngine.sync`. A tensor must stay as it was handed over until this returns.

        Raises:
            TrainingError: weights are missing, unknown or misshapen, or did not arrive; the engine is closed then.
            InjectionError: after the first one: the vector does not reach the logits.
        """
        running = self._vllm
        try:
            if self._asleep:
                running.wake("weights")
            with torch.no_grad():
                running.load(self.incoming.checked(weights))
            self.incoming.complete()
            self.incoming.compare(running.parameters(self.incoming.kept))
            if self._asleep:
                running.wake("kv_cache")
                self._asleep = False
            if not running.forget():
                raise TrainingError("vLLM's prefix cache cannot be emptied, and holds what the old weights computed.")
            self._filled = True
            if not self._proven:
                with apart():
                    self.probe()
                self._proven = True
        except BaseException:
            self.close()
            raise

    def sleep(self) -> None:
        """Free the device until the next `sync`, where it is an accelerator; to be called when a step's samples are there."""
        if self._sleep_level and not self._asleep:
            self._vllm.sleep(self._sleep_level)
            self._asleep = True
            self._filled = self._sleep_level == 1

    # -- samples -------------------------------------------------------------------------------------------------

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
        """See `VLLMEngine.generate`; with `tensor_parallel` all processes of a group must call it, each with its own rows.

        Raises:
            TrainingError: it has no weights.
        """
        if not self._filled:
            raise TrainingError(
                "The sampler has no weights.", where="engine 'vllm'", next_step="call sync before generate"
            )
        running = self._vllm
        if self._asleep:
            running.wake("weights")
            running.wake("kv_cache")
            self._asleep = False
        run: dict[str, Any] = {
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
        }
        if self.tensor_parallel == 1:
            with apart():
                return super().generate(vectors, draws, **run, progress=progress)
        parts, rank = running.exchange((vectors.cpu(), draws))
        together, mine = pooled(parts, rank)
        try:
            with apart():
                found = super().generate(*together, **run)[mine]
        except Interrupted as cause:
            done = {row - mine.start: c for row, c in cause.done.items() if mine.start <= row < mine.stop}
            raise Interrupted(done) from cause
        if progress is not None:
            progress(len(found))
        return found


def pooled(parts: Sequence[tuple[Tensor, Tensor | None]], rank: int) -> tuple[tuple[Tensor, Tensor | None], slice]:
    """The rows of all members of a group one after the other, and where those of member `rank` stand among them.

    Args:
        parts: of each member, vectors [n, d] and draws [n, length], or None for greedy rows; n may be 0 and may differ.

    Raises:
        TrainingError: members ask for different things, so that some of them would wait for ever.
    """
    kinds = {None if draws is None else draws.shape[1] for _, draws in parts}
    if len(kinds) > 1:
        raise TrainingError(
            "Processes that share a sampler ask it for different things at the same time.",
            got=" and ".join("greedy rows" if kind is None else f"drawn rows of {kind} tokens" for kind in kinds),
        )
    start = sum(len(vectors) for vectors, _ in parts[:rank])
    drawn = [draws for _, draws in parts if draws is not None]
    rows = torch.cat([vectors for vectors, _ in parts])
    return (rows, torch.cat(drawn) if drawn else None), slice(start, start + len(parts[rank][0]))


def without_weights(av: LoadedAV, dtype: torch.dtype) -> StoredAV:
    """An AV's config and tokenizer in a directory of its own, for vLLM to start from."""
    folder = TemporaryDirectory(prefix="nla-hub-sampler-")
    directory = Path(folder.name)
    config = copy.deepcopy(av.config)
    config.dtype = dtype
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # of the frozen weights under a LoRA; what is sent is neither packed nor divided
    if (name := causal_class(config)) is not None:
        config.architectures = [name]
    config.save_pretrained(directory)
    generation = getattr(av.loaded.model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)
    av.tokenizer.save_pretrained(directory)
    return StoredAV(directory, config, av.tokenizer, av.prompt, av.injector, dtype, scratch=folder)


class Incoming:
    """What has to arrive with each sync, and what did.

    Attributes:
        kept: names of the vectors (norms and biases) of the model, which vLLM keeps as they are.
        bytes: of all weights in `dtype`.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self.dtype = dtype
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        self.shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        self.bytes = sum(math.prod(shape) for shape in self.shapes.values()) * dtype.itemsize
        self.kept = {name for name, shape in self.shapes.items() if len(shape) == 1}
        self._missing: set[str] = set()
        self._seen: dict[str, Tensor] = {}

    def checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same pairs, in the sampler's dtype, one after the other.

        Raises:
            TrainingError: one that the model does not have, has in another shape, or has had.
        """
        self._missing, self._seen = set(self.shapes), {}
        for name, tensor in weights:
            shape = tuple(tensor.shape)
            if name not in self.shapes:
                raise TrainingError("The sampler was sent a weight that the AV does not have.", got=name)
            if shape != self.shapes[name]:
                raise TrainingError(
                    "The sampler was sent a weight in another shape.", where=name, got=shape, expected=self.shapes[name]
                )
            if name not in self._missing:
                raise TrainingError("The sampler was sent a weight twice.", got=name)
            self._missing.remove(name)
            ready = tensor.detach().to(self.dtype)
            if name in self.kept:
                self._seen[name] = ready.clone()
            yield name, ready

    def complete(self) -> None:
        """Raise a TrainingError unless every weight was sent."""
        if self._missing:
            raise TrainingError(
                "The sampler was not sent all weights.",
                got=f"{len(self.shapes) - len(self._missing)} of {len(self.shapes)}",
                expected=f"{min(self._missing)} and the others of the model",
            )

    def compare(self, arrived: dict[str, Tensor]) -> None:
        """Raise a TrainingError where vLLM's own values are not those that were sent, or where it shows none of them."""
        same_place = {name for name in arrived if arrived[name].shape == self._seen[name].shape}
        wrong = sorted(n for n in same_place if not torch.equal(arrived[n], self._seen[n].to(arrived[n].device)))
        if wrong or not same_place:
            raise TrainingError(
                "Weights did not arrive in the sampler.",
                where=wrong[0] if wrong else None,
                got=f"{len(wrong)} of {len(same_place)} that were looked at have other values",
                next_step="the installed vLLM loads this model in another way: use rollouts.engine: transformers",
            )
