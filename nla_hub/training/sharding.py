"""Models under training that are divided over all processes (FSDP2), and the precision that they are run in.

The recipe alone decides: `Execution.of`. Sharding is done here with torch's `fully_shard`, one unit for each decoder block
and one for the rest, whatever trains the model afterwards (the supervised loop, TRL's trainer, the live AR); accelerate and
transformers are handed a model that is sharded already and only count processes.

- A process never holds a whole float32 model: what it is given lies mapped in main memory as it is stored
  (`mapped_options`); block by block it is cast, moved to the device, and all but this process's part dropped.
- Gradients are averaged over processes by FSDP, as DDP does. Parameters are `DTensor`s; what is gathered (`full_weights`)
  is gathered one tensor at a time, by all processes together.
- All processes must run a sharded model equally often, forwards and backwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from nla_hub.errors import TrainingError, WeightsError
from nla_hub.log import logger
from nla_hub.pretrained import TORCH_DTYPES, LoadOptions
from nla_hub.reconstructor import ARModel
from nla_hub.weights import WeightIndex, shorten

if TYPE_CHECKING:
    from nla_hub.adapters import Adapter
    from nla_hub.training.recipe import Recipe

Half = Literal["av", "ar"]


@dataclass(frozen=True)
class Execution:
    """How a model is run while it is trained.

    Attributes:
        sharded: divided over all processes.
        offload: what is sharded, its gradients and moments rest in main memory between uses.
        bf16: products in bfloat16 under weights of whatever dtype; sums of gradients stay float32.
    """

    sharded: bool = False
    offload: bool = False
    bf16: bool = False

    @classmethod
    def of(cls, recipe: Recipe, half: Half, *, world: int) -> Execution:
        """What a recipe wants for its AV or its AR in `world` processes.

        One process has nobody to share with: it trains the model whole, and says so.

        Raises:
            TrainingError: packed (4-bit, 8-bit) weights that are to be sharded.
        """
        placement = recipe.hardware.placement
        wanted = getattr(placement, half) == "sharded"
        if wanted and recipe.base.quantization is not None:
            raise TrainingError(
                "Packed weights cannot be sharded.",
                got=f"hardware.placement.{half}: sharded with base.quantization: {recipe.base.quantization}",
                next_step=f"leave out one of the two: hardware.placement.{half}=each, or base.quantization=null",
            )
        if wanted and world == 1:
            logger.warning("hardware.placement.%s is sharded, but there is one process: it holds the model whole", half)
        sharded = wanted and world > 1
        return cls(sharded, sharded and placement.optimizers == "cpu", recipe.precision == "bf16")

    def running(self, device: torch.device) -> AbstractContextManager[Any]:
        """While open, passes of a whole model run in this precision (a sharded one casts by itself)."""
        if self.bf16 and not self.sharded:
            return torch.autocast(device.type, torch.bfloat16)
        return nullcontext()

    @property
    def _policies(self) -> tuple[MixedPrecisionPolicy, MixedPrecisionPolicy]:
        """Of the model, and of parts that stay as they are."""
        kept = MixedPrecisionPolicy(cast_forward_inputs=False)
        if not self.bf16:
            return kept, kept
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32), kept


def mapped_options(directory: Path) -> LoadOptions:
    """How to load what `shard` is given: on the CPU in the dtype of the files, whose pages a node's processes share."""
    stored = {TORCH_DTYPES.get(tensor.dtype) for tensor in WeightIndex.read(directory).tensors.values()}
    only = stored.pop() if len(stored) == 1 else None
    return LoadOptions(dtype=only or torch.float32, device_map={"": "cpu"})


def shard(model: nn.Module, adapter: Adapter, execution: Execution, device: torch.device) -> None:
    """Divide `model` over all processes, in place; every process has the same one and must call this.

    Args:
        model: a causal LM, also inside PEFT, or an `ARModel`; `requires_grad` says what will be trained: these weights
            become float32, the others keep their dtype. An AR's value head stays float32 whatever the precision.
        device: where it will run.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    offload = CPUOffloadPolicy() if execution.offload and device.type != "cpu" else OffloadPolicy()
    policy, kept = execution._policies
    blocks = adapter.block_list(model.trunk if isinstance(model, ARModel) else model)
    units: list[tuple[nn.Module, MixedPrecisionPolicy]] = [(block, policy) for block in blocks]
    if isinstance(model, ARModel):
        units.append((model.head, kept))
    for unit, precision in [*units, (model, policy)]:
        for p in unit.parameters():
            if not isinstance(p, DTensor):
                p.data = p.data.to(device, torch.float32 if p.requires_grad else p.dtype)
        # The root is resharded too: what stays whole after a pass without gradients would outlive an optimizer step.
        fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=True)
    # FSDP keeps the tensors that it gathers into; first made under inference_mode, they could not be trained with.
    for unit in [model, *(unit for unit, _ in units)]:
        assert isinstance(unit, FSDPModule)
        unit.unshard()
        unit.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was here."""
    return isinstance(model, FSDPModule)


def plain_class(model: nn.Module) -> Any:
    """The class of a model before it was sharded."""
    return next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))


# -- gathering -----------------------------------------------------------------------------------------------


def gathered(tensor: Tensor) -> Tensor:
    """A parameter as a whole, without gradient, on the device that trains; all processes must call it."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    here = tensor.to_local().to(mesh.device_type)  # what rests in main memory is gathered over the devices' network
    whole = DTensor.from_local(
        here, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    ).full_tensor()
    assert isinstance(whole, Tensor)
    return whole


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a causal LM by its name in a plain transformers model, whole, PEFT factors merged in.

    Sharded or not; one after the other, and only while the iterator is consumed, which all processes must do. Tied weights
    come once. Tensors are on the device that trains, in the dtype of the weights; those of a model that is not sharded are
    its own, not copies.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    layers = {name: module for name, module in inner.named_modules() if hasattr(module, "base_layer")}
    factors = tuple(f"{name}.{part}" for name in layers for part in ("lora_A.", "lora_B."))
    for name, parameter in inner.named_parameters():
        if name.startswith(factors):
            continue
        owner, _, leaf = name.rpartition(".")
        layer = layers.get(owner.removesuffix(".base_layer")) if owner.endswith(".base_layer") else None
        value = gathered(parameter)
        if layer is not None:
            owner = owner.removesuffix(".base_layer")
            if leaf == "weight":
                value = (value.float() + _delta(layer)).to(value.dtype)
        yield f"{owner}.{leaf}", value


def _delta(layer: Any) -> Tensor:
    """What the active factors add to a linear layer's weight, float32 in the weight's own layout."""
    total: Tensor | None = None
    for name in layer.active_adapters:
        if name in layer.lora_A:
            product = gathered(layer.lora_B[name].weight).float() @ gathered(layer.lora_A[name].weight).float()
            product = product * layer.scaling[name]
            total = product if total is None else total + product
    assert total is not None
    return total.T if layer.fan_in_fan_out else total


def whole_model(model: Any, *, keep: bool) -> Any:
    """A plain copy of a transformers model, sharded or not, on the CPU, factors merged in, where `keep`; None elsewhere.

    All processes must call it. The copy is what one process would have trained: same class, same names.
    """
    found = {name: _copied(value) for name, value in full_weights(model) if keep}
    if not keep:
        return None
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.device("meta"):
        plain: Any = plain_class(inner)(inner.config)
    there = {name for name, _ in plain.named_modules()}  # not peft's own, which are identities too
    for name, module in inner.named_modules():
        if isinstance(module, nn.Identity) and name in there:
            plain.set_submodule(name, nn.Identity())  # a trunk without its final norm
    plain.load_state_dict(found, assign=True, strict=False)
    plain.tie_weights()
    for name, buffer in inner.named_buffers():
        owner, _, leaf = name.rpartition(".")
        plain.get_submodule(owner)._buffers[leaf] = buffer.cpu()
    if missing := [name for name, value in plain.named_parameters() if value.is_meta]:
        raise WeightsError(
            "Weights of a sharded model are missing.", where=type(plain).__name__, faults=shorten(missing)
        )
    if hasattr(inner, "generation_config"):
        plain.generation_config = inner.generation_config
    return plain.eval().requires_grad_(False)


def _copied(tensor: Tensor) -> Tensor:
    """On the CPU, in memory of its own: what was gathered may be the first part of a padded buffer."""
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


# -- gradients -----------------------------------------------------------------------------------------------


def clip_grad_norm(
    parameters: Iterable[nn.Parameter], limit: float, device: torch.device, *, scale: float = 1.0
) -> float:
    """Multiply the gradients by `scale`, then clip them to a common norm of `limit`; the norm between the two.

    As `torch.nn.utils.clip_grad_norm_`, also for gradients of which each process has a part, wherever they rest. The norm is
    the same in every process; where it is not finite the gradients are left alone.
    """
    trained = [p for p in parameters if p.grad is not None]
    own, parts = torch.zeros(2, dtype=torch.float64, device=device)
    for p in trained:
        assert p.grad is not None
        square = local(p.grad).norm(dtype=torch.float32).double() ** 2
        if isinstance(p.grad, DTensor):
            parts = parts + square.to(device)
        else:
            own = own + square.to(device)
    if any(isinstance(p, DTensor) for p in trained):
        dist.all_reduce(parts)
    norm = scale * float((own + parts).sqrt())
    factor = scale * min(1.0, limit / (norm + 1e-6)) if math.isfinite(norm) else 1.0
    if factor != 1.0:
        torch._foreach_mul_([local(p.grad) for p in trained if p.grad is not None], factor)
    return norm


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has (all of what is not sharded), sharing its memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    part: Tensor = tensor.to_local()
    return part


# -- checkpoints ---------------------------------------------------------------------------------------------


def save_shards(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write what is trained of a sharded model, and its optimizer's moments; each process writes its part.

    The format is torch's distributed checkpoint, which any number of processes can read.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    save(_state(model, optimizer), checkpoint_id=str(directory))


def load_shards(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Restore what `save_shards` wrote, in place; without `optimizer` the weights alone."""
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    state = _state(model, optimizer)
    load(state, checkpoint_id=str(directory))
    set_model_state_dict(model, state["model"], options=_trained_alone())
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_trained_alone())


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    state: dict[str, Any] = {"model": get_model_state_dict(model, options=_trained_alone())}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_trained_alone())
    return state


def _trained_alone() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(ignore_frozen_params=True, strict=False)
