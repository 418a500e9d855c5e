"""What samples in the rl stage besides the weights under training: engines that are sent them before each step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from nla_hub.engines.base import Completion, Engine, LoadedAV
from nla_hub.engines.transformers import TransformersEngine
from nla_hub.errors import TrainingError
from nla_hub.pretrained import LoadedModel
from nla_hub.training.processes import Processes
from nla_hub.training.recipe import RLSpec
from nla_hub.training.sharding import Execution, plain_class
from nla_hub.weights import shorten


@runtime_checkable
class SyncedEngine(Engine, Protocol):
    """An engine with weights of its own."""

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the AV's present weights.

        Args:
            weights: every parameter of the complete causal LM by its name in `state_dict()` of a plain transformers model
                (no wrapper's prefix, LoRA factors merged in), whole, on the device that trains. Tied weights come once.
                Consumed one after the other, so that only one gathered weight is in memory beside the shards.
        """
        ...


class GatheredEngine(TransformersEngine):
    """A `SyncedEngine`: transformers on a whole copy of an AV whose own weights are divided over processes.

    Each process has such a copy and samples its own rows, so none waits for another while it writes.
    """

    def __init__(self, av: LoadedAV, *, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Make room for a copy in `dtype` (None: the AV's) on `device`; its weights come with the first `sync`."""
        theirs = av.loaded.model
        dtype = dtype or theirs.dtype
        with torch.random.fork_rng(), torch.device(device):
            model: Any = plain_class(theirs)(copy.deepcopy(theirs.config)).to(dtype)
        model.config.use_cache = True  # a trainer switches it off
        model.generation_config = theirs.generation_config
        model.eval().requires_grad_(False)
        loaded = LoadedModel(model, av.loaded.adapter, av.loaded.directory)
        super().__init__(LoadedAV(loaded, av.tokenizer, av.prompt, av.injector))
        self.filled = False

    @torch.no_grad()
    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `SyncedEngine.sync`.

        Raises:
            TrainingError: weights are missing, or not of this model.
        """
        own = dict(self.model.named_parameters())
        unknown = []
        for name, value in weights:
            if name in own and own[name].shape == value.shape:
                own.pop(name).copy_(value)
            else:
                unknown.append(name)
        if own or unknown:
            raise TrainingError(
                "The sampler was not sent the weights of its AV.",
                faults=shorten([f"missing: {name}" for name in own] + [f"unexpected: {name}" for name in unknown]),
            )
        self.filled = True

    def generate(self, *args: Any, **options: Any) -> list[Completion]:
        """See `Engine.generate`; a TrainingError before the first `sync`."""
        if not self.filled:
            raise TrainingError("The sampler has no weights yet.", next_step="call sync before generate")
        return super().generate(*args, **options)


def sampler(
    spec: RLSpec, execution: Execution, device: torch.device, processes: Processes
) -> Callable[[LoadedAV], Engine]:
    """What makes the engine of a recipe for an AV that is run like this."""
    dtype = torch.bfloat16 if execution.bf16 else None
    if spec.rollouts.engine == "vllm":
        from nla_hub.training.rl.vllm_sampler import ColocatedVLLM

        return partial(ColocatedVLLM, spec=spec, processes=processes, dtype=dtype)
    if execution.sharded:
        return partial(GatheredEngine, device=device, dtype=dtype)
    return TransformersEngine


class TogetherEngine(Engine):
    """An engine whose rows are shared by all processes, each with an engine of its own: for an evaluation.

    Every process asks for the same rows, generates whole batches of them, and gets all completions. Batches are the same for
    any number of processes.
    """

    name: ClassVar[str] = "together"
    kinds: ClassVar[frozenset[str]] = frozenset({"overwrite", "add"})

    def __init__(self, engine: Engine, processes: Processes) -> None:
        self.engine, self.processes = engine, processes

    def probe(self) -> None:
        """As the engine's own."""
        self.engine.probe()

    def close(self) -> None:
        """The engine belongs to somebody else."""

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
        """See `Engine.generate`; every process must call it."""
        rank, world = self.processes.rank, self.processes.world
        rows = [i for i in range(len(vectors)) if i // batch_size % world == rank]
        own = self.engine.generate(
            vectors[rows],
            None if draws is None else draws[rows],
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
        found: dict[int, Completion] = {}
        for theirs in self.processes.gather(list(zip(rows, own, strict=True))):
            found.update(theirs)
        return [found[i] for i in range(len(vectors))]
