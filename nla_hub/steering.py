"""Steering vectors: directions at a site, added to a running model's residual stream.

At the chosen positions the output h of block K becomes h + strength * ||h|| * v/||v||. Vectors that come from an AR have
a direction only, so strength is a multiple of the local norm (Fraser-Taliente et al. 2026). Several vectors applied at
once all use the unsteered h, so they add.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nla_hub.adapters import Adapter, adapter_for
from nla_hub.errors import CheckpointError, InputError, PositionError
from nla_hub.geometry import as_vectors
from nla_hub.sidecar import Site

SteerPositions = str | int | Sequence[int]
"""Where to steer: "generated" (the last prompt position and every generated token), "all", or indices into the prompt
(negative ones count from its end)."""

_ATTRIBUTE = "_nla_hub_steering"


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class SteeringVector:
    """A direction [d] at a site of a base model. A zero vector steers nothing."""

    vector: Tensor
    site: Site
    base_model: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        rows = as_vectors(self.vector, allow_zero=True, what="steering vectors")
        if len(rows) != 1 or np.ndim(self.vector) != 1:
            raise InputError("A steering vector is one direction.", got=f"shape {tuple(rows.shape)}", expected="[d]")
        object.__setattr__(self, "vector", rows[0].clone())

    # -- arithmetic ------------------------------------------------------------------------------------------

    def _combine(self, other: SteeringVector, sign: float) -> SteeringVector:
        if self.site != other.site or self.vector.shape != other.vector.shape:
            raise InputError(
                "Only vectors of one site of one model can be added.",
                got=f"{self.site} [{len(self.vector)}] and {other.site} [{len(other.vector)}]",
            )
        if self.base_model and other.base_model and self.base_model != other.base_model:
            raise InputError(
                "Vectors of different models cannot be added.", got=f"{self.base_model!r} and {other.base_model!r}"
            )
        return replace(self, vector=self.vector + sign * other.vector, note="")

    def __add__(self, other: SteeringVector) -> SteeringVector:
        return self._combine(other, 1.0)

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self._combine(other, -1.0)

    def __mul__(self, factor: float) -> SteeringVector:
        return replace(self, vector=self.vector * factor)

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    @property
    def is_zero(self) -> bool:
        """Whether there is no direction."""
        return not bool(self.vector.any())

    # -- disk ------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with site and base model in its metadata; returns its path."""
        target = Path(path)
        if not target.parent.is_dir():
            raise InputError("There is no such directory.", where=target.parent)
        metadata = {
            "format": "pt",
            "nla_hub": json.dumps({**vars(self.site), "base": self.base_model, "note": self.note}),
        }
        temporary = target.with_name(f".{target.name}.tmp")
        save_file({"vector": self.vector.contiguous()}, temporary, metadata=metadata)
        temporary.replace(target)
        return target

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read what `save` wrote; raises a CheckpointError for anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                meta = json.loads((file.metadata() or {})["nla_hub"])
                return cls(file.get_tensor("vector"), Site(int(meta["layer"])), str(meta["base"]), str(meta["note"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as cause:
            raise CheckpointError(
                "This is no steering vector.", where=path, expected="a file of SteeringVector.save"
            ) from cause

    # -- use -------------------------------------------------------------------------------------------------

    @contextmanager
    def apply(
        self,
        model: nn.Module,
        strength: float = 1.0,
        *,
        positions: SteerPositions = "generated",
        adapter: Adapter | None = None,
    ) -> Iterator[nn.Module]:
        """While open, `model` runs steered; afterwards it is exactly as before, also after an exception.

        Args:
            model: the base model with all of its blocks, as transformers loads it.
            strength: multiple of the local residual norm; 0 is the identity.
            positions: see `SteerPositions`.
            adapter: of the model's family; found from its config by default.

        Raises:
            InputError: another width, strength not finite, unknown word for positions.
            PositionError: an index that the prompt does not have.
        """
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not abs(strength) < float("inf"):
            raise InputError("strength is a finite number.", got=repr(strength))
        spec = _Steering(self, float(strength), _check_positions(positions))
        found = adapter or adapter_for(model.config)
        width = int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]
        if len(self.vector) != width:
            raise InputError("The vector and the model differ in width.", got=len(self.vector), expected=width)
        block = found.block(model, self.site)
        trunk = found.trunk(model)
        steered = getattr(block, _ATTRIBUTE, None)
        if steered is None:
            steered = _SteeredBlock(model, trunk, block)
            object.__setattr__(block, _ATTRIBUTE, steered)
        steered.active.append(spec)
        try:
            yield model
        finally:
            steered.active.remove(spec)
            if not steered.active:
                steered.remove()
                object.__delattr__(block, _ATTRIBUTE)


def is_steered(adapter: Adapter, model: nn.Module) -> bool:
    """Whether a SteeringVector acts on `model` now: it counts positions from the prompt's end and must see it whole."""
    found = (getattr(block, _ATTRIBUTE, None) for block in adapter.block_list(model))
    return any(steered is not None and steered.active for steered in found)


@contextmanager
def unsteered(adapter: Adapter, model: nn.Module) -> Iterator[None]:
    """While open, no SteeringVector acts on `model`: for a base that plays another part meanwhile."""
    steered = [found for block in adapter.block_list(model) if (found := getattr(block, _ATTRIBUTE, None)) is not None]
    saved = [one.active for one in steered]
    for one in steered:
        one.active = []
    try:
        yield
    finally:
        for one, active in zip(steered, saved, strict=True):
            one.active = active


def _check_positions(positions: SteerPositions) -> SteerPositions:
    if isinstance(positions, str):
        if positions not in ("generated", "all"):
            raise InputError(
                "Unknown word for positions.", got=repr(positions), expected="'generated', 'all' or indices"
            )
        return positions
    wanted = list(positions) if isinstance(positions, Iterable) else [positions]
    if not all(isinstance(p, int) and not isinstance(p, bool) for p in wanted):
        raise InputError("Positions are whole numbers.", got=repr(positions))
    return tuple(wanted)


@dataclass(eq=False)
class _Steering:
    vector: SteeringVector
    strength: float
    positions: SteerPositions

    def direction(self) -> Tensor | None:
        """strength * v/||v||, float32 [d]; None where it is nothing."""
        if self.strength == 0 or self.vector.is_zero:
            return None
        wide = self.vector.vector.double()
        length: Tensor = wide.norm()
        return (self.strength * wide / length).float()


@dataclass
class _SteeredBlock:
    """The hooks on one block; all steerings on it are computed from the unsteered output."""

    model: nn.Module
    trunk: nn.Module
    block: nn.Module
    active: list[_Steering] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.real = torch.empty(0)  # bool [rows, columns of the running pass]: attended tokens
        self.index = torch.empty(0)  # int64, same shape: index of each token in its row's whole sequence
        self.prompt = torch.empty(0)  # int64 [rows]: prompt length
        self.previous: Tensor | None = None  # input of the last uncached pass
        self.padding: Tensor | None = None  # the two-dimensional attention mask that `model` was called with
        self.handles = [
            # A multimodal wrapper turns the mask into four-dimensional ones before its trunk sees it.
            self.model.register_forward_pre_hook(self._listen, with_kwargs=True),
            self.trunk.register_forward_pre_hook(self._look, with_kwargs=True),
            # First of all hooks: transformers records `output_hidden_states` in one of its own, which must see the result.
            self.block.register_forward_hook(self._steer, prepend=True),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _listen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self.padding = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn which tokens this pass runs over: padding, what the cache holds, where the prompt ends."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        given: Tensor = ids if ids is not None else kwargs["inputs_embeds"]
        rows, columns = given.shape[:2]
        cache = kwargs.get("past_key_values")
        cached = int(cache.get_seq_length()) if cache is not None else 0
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            mask, self.padding = self.padding, None
        if mask is not None and mask.shape[0] == rows and mask.shape[1] >= cached + columns:
            attended = mask[:, : cached + columns].bool()
        else:
            attended = torch.ones(rows, cached + columns, dtype=torch.bool, device=given.device)
        index = attended.long().cumsum(dim=1) - 1
        self.real, self.index = attended[:, cached:], index[:, cached:]
        continues = cached > 0 or (
            self.previous is not None
            and self.previous.shape[:2] == (rows, columns - 1)
            and self.previous.dtype == given.dtype
            and torch.equal(self.previous, given[:, :-1])
        )
        if not continues or len(self.prompt) != rows:
            self.prompt = attended.sum(dim=1)
        self.previous = given.detach() if cached == 0 else None

    def _chosen(self, positions: SteerPositions) -> Tensor:
        """bool [rows, columns]: where this pass is steered."""
        if positions == "all":
            return self.real
        last = (self.prompt - 1)[:, None]
        if positions == "generated":
            return self.real & (self.index >= last)
        chosen = torch.zeros_like(self.real)
        shortest = int(self.prompt.min())
        assert not isinstance(positions, (str, int))
        for p in positions:
            if not -shortest <= p < shortest:
                raise PositionError(
                    "The prompt has no such token.", got=f"position {p}", expected=f"0 to {shortest - 1}, or negative"
                )
            chosen |= self.index == (torch.full_like(self.prompt, p) if p >= 0 else self.prompt + p)[:, None]
        return chosen & self.real

    def _steer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        total: Tensor | None = None
        for steering in self.active:
            direction = steering.direction()
            if direction is None:
                continue
            here = self._chosen(steering.positions).to(hidden.device)[..., None]
            part = torch.where(here, direction.to(hidden.device), torch.zeros((), device=hidden.device))
            total = part if total is None else total + part
        if total is None:
            return None
        wide = hidden.float()
        moved = (wide + wide.norm(dim=-1, keepdim=True) * total).to(hidden.dtype)
        steered = torch.where((total != 0).any(dim=-1, keepdim=True), moved, hidden)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered
