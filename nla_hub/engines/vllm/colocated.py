"""vLLM inside this process, so that it can take over weights which are being trained here, tensor by tensor, unpickled.

A process that trains is a delicate host: vLLM seeds its random generators, on a CPU takes `torch.set_num_threads` away, and
opens torch.distributed where nobody has. All of that is put back. Where several processes train, each has its own vLLM
("external_launcher"): neighbours by rank form groups of `tensor_parallel_size`, each group holds one model together and every
member of it must make the same calls with the same rows.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from nla_hub.engines.vllm.start import Running, surroundings

T = TypeVar("T")


class Colocated(Running):
    """vLLM in this process on the model of a directory, which may lack the weights (`load_format="dummy"`)."""

    def __init__(self, directory: Path, settings: Callable[[str], Mapping[str, Any]]) -> None:
        self._opened = not torch.distributed.is_initialized()
        self._ended = False
        super().__init__(directory, settings)

    def _files(self, directory: Path) -> Path:
        return directory

    @contextmanager
    def _around(self, log: Path) -> Iterator[None]:
        with undisturbed(), surroundings(log, VLLM_ENABLE_V1_MULTIPROCESSING="0"):
            yield

    def _dead(self, core: Any) -> bool:
        return False

    def _end(self, core: Any) -> None:
        core.shutdown()

    # -- weights -------------------------------------------------------------------------------------------------

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights by (name, tensor) pairs with the names of a checkpoint.

        A tensor must stay as it was handed over until this returns: vLLM copies a layer when the last part of it is there.
        """
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.apply_model(_process_heads)

    def forget(self) -> bool:
        """Empty the prefix cache, whose entries are the old weights' work; False where something is still in use."""
        return bool(self.llm.reset_prefix_cache())

    def parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        """vLLM's own parameters (this process's part of them), as far as it has some of these names."""
        wanted = set(names)

        def found(model: nn.Module) -> dict[str, Tensor]:
            return {name: value.detach() for name, value in model.named_parameters() if name in wanted}

        (parameters,) = self.llm.apply_model(found)
        return dict(parameters)

    # -- memory --------------------------------------------------------------------------------------------------

    def sleep(self, level: int) -> None:
        """Free the device: of the cache, and of the weights, which level 1 keeps in main memory and level 2 drops."""
        self.llm.sleep(level=level)

    def wake(self, part: str) -> None:
        """Take memory again for "weights" or "kv_cache"; requests run when it has both."""
        torch.accelerator.empty_cache()  # what the trainer keeps in stock is room that vLLM may need
        self.llm.wake_up(tags=[part])

    # -- processes -----------------------------------------------------------------------------------------------

    def exchange(self, value: T) -> tuple[list[T], int]:
        """Every group member's `value`, by rank, and this one's place among them. All members must call it."""
        from vllm.distributed.parallel_state import get_tp_group

        if torch.accelerator.is_available():
            # Collectives of the trainer that are still under way on the device have been seen to hang those of vLLM.
            torch.accelerator.synchronize()
        group = get_tp_group()
        values: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(values, value, group=group.cpu_group)
        return values, int(group.rank_in_group)

    def close(self) -> None:
        """Free what it holds, and leave torch.distributed as it was found; twice is fine."""
        if self._ended:
            return
        self._ended = True
        with nullcontext() if self._opened else default_group_kept():
            super().close()
            _leave_groups()
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def _leave_groups() -> None:
    """End vLLM's process groups, those of a start that failed too."""
    if "vllm.distributed.parallel_state" in sys.modules:
        from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

        destroy_model_parallel()
        destroy_distributed_environment()


@contextmanager
def default_group_kept() -> Iterator[None]:
    """While open, torch.distributed's default group outlives vLLM, which ends with itself the group that it was lent."""
    destroy = torch.distributed.destroy_process_group

    def spare(group: Any = None) -> None:
        if group is not None:
            destroy(group)

    torch.distributed.destroy_process_group = spare
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


def _process_heads(model: nn.Module) -> None:
    """Let heads pack their weights again: on a CPU a head has a packed copy, which a reload passes over where it is tied."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put back what vLLM changes in a process when it starts there: seeds, threads, default dtype, frozen garbage."""
    set_threads, dtype = torch.set_num_threads, torch.get_default_dtype()
    python, numbers = random.getstate(), np.random.get_state()
    with torch_seeds():
        try:
            yield
        finally:
            torch.set_num_threads = set_threads
            torch.set_default_dtype(dtype)
            random.setstate(python)
            np.random.set_state(numbers)
            gc.unfreeze()


@contextmanager
def apart() -> Iterator[None]:
    """While open, vLLM runs as if it were alone: no autocast of the trainer's, and torch's generators stay where they are."""
    with torch_seeds(), torch.autocast(_kind(), enabled=False):
        yield


def torch_seeds() -> AbstractContextManager[None]:
    """Keeps the states of torch's generators while open, the CPU's and that of this process's own accelerator.

    vLLM draws from them even where each request has a seed.
    """
    kind = _kind()
    if kind == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[torch.accelerator.current_device_index()], device_type=kind)


def _kind() -> str:
    """The type of device that this process runs on."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type
