"""LoRA adapters on a base: held against its modules, merged into them, or laid over them as roles that can be switched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nla_hub.adapters import Adapter
from nla_hub.errors import WeightsError
from nla_hub.lora import Factors, Lora
from nla_hub.weights import shorten


def targets(model: nn.Module, adapter: Adapter, lora: Lora) -> dict[str, nn.Module]:
    """The modules of `model` that an adapter updates, by the adapter's names.

    Raises:
        WeightsError: a module that the model does not have, or of another shape.
    """
    trunk = adapter.trunk(model)
    found: dict[str, nn.Module] = {}
    faults = []
    for one in lora.factors:
        try:
            module = trunk.get_submodule(one.module)
        except AttributeError:
            faults.append(f"the base has no {one.module}")
            continue
        shape = _shape(module)
        if shape != (one.b.shape[0], one.a.shape[1]):
            faults.append(
                f"{one.module}: the adapter is [{one.b.shape[0]}, {one.a.shape[1]}], the base {list(shape or ())}"
            )
        found[one.module] = module
    if faults:
        raise WeightsError(
            "This adapter was not made for this base.",
            where=lora.directory,
            faults=shorten(faults),
            next_step="name the base it was trained on: base_model=...",
        )
    return found


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """[out, in] of a linear module; GPT-2's Conv1D stores the transpose, quantised ones pack theirs."""
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return sizes[0], sizes[1]
    weight = getattr(module, "weight", None)
    if isinstance(module, Conv1D) and isinstance(weight, Tensor):
        return weight.shape[1], weight.shape[0]
    return None


@torch.no_grad()
def merge(model: nn.Module, adapter: Adapter, loras: Sequence[Lora]) -> None:
    """Add adapters, one after the other, to the weights of `model`: summed in float32, rounded once to its dtype.

    Raises:
        WeightsError: the base does not fit, or its weights are quantised (lay the adapter over it instead).
    """
    updates: dict[str, list[Factors]] = {}
    modules: dict[str, nn.Module] = {}
    for lora in loras:
        modules |= targets(model, adapter, lora)
        for one in lora.factors:
            updates.setdefault(one.module, []).append(one)
    for name, ones in updates.items():
        weight = modules[name].weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise WeightsError("A LoRA cannot be merged into quantised weights.", where=loras[0].directory, got=name)
        total = sum((one.delta() for one in ones[1:]), start=ones[0].delta()).to(weight.device)
        weight.copy_(weight.float() + (total.T if isinstance(modules[name], Conv1D) else total))


class Roles:
    """One frozen base that plays several parts: adapters laid over its modules, switched on while a context is open.

    With none switched on, the base is itself.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.model = model
        self.adapter = adapter
        self._state = threading.local()  # another thread that reads the base meanwhile reads the base
        self._always: str | None = None
        self.turn = threading.RLock()
        """Held by whoever plays; who reads the base itself beside other threads holds it too."""
        self._names: set[str] = set()

    @torch.no_grad()
    def add(self, name: str, loras: Sequence[Lora]) -> None:
        """Lay adapters over the base under one name; all of them act together, as a stack of LoRAs does."""
        for lora in loras:
            modules = targets(self.model, self.adapter, lora)
            for one in lora.factors:
                module = modules[one.module]
                device = next((p.device for p in module.parameters()), torch.device("cpu"))
                a, b = one.a.to(device), (one.scale * one.b).to(device)
                module.register_forward_hook(self._hook(name, a, b))
        self._names.add(name)

    def _hook(self, name: str, a: Tensor, b: Tensor) -> Callable[..., Tensor | None]:
        def update(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if getattr(self._state, "active", self._always) != name:
                return None
            changed: Tensor = (output.float() + (args[0].float() @ a.T) @ b.T).to(output.dtype)
            return changed

        return update

    def stay(self, name: str) -> None:
        """Make the base the part called `name` for good."""
        assert name in self._names, name
        self._always = name

    @contextmanager
    def playing(self, name: str) -> Iterator[None]:
        """While open, the base is the part called `name`, in this thread; one thread plays at a time, others wait."""
        assert name in self._names, name
        with self.turn:
            before = getattr(self._state, "active", self._always)
            self._state.active = name
            try:
                yield
            finally:
                self._state.active = before
