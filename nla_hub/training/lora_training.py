"""Low-rank factors on a frozen base: how they begin, what trains of a half, how they are kept and read back.

A module of the base that computes W x computes W x + s B A x, with s = alpha / r (Hu et al. 2021, arXiv:2106.09685). A begins
random and B at zero, so a half with fresh factors is its base exactly. Factors are float32 whatever the base is stored in:
in bfloat16 most updates of usual learning rates are rounded away. On disk they are a PEFT directory, which `lora.py` reads.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nla_hub.errors import TrainingError, WeightsError
from nla_hub.layouts import ADAPTER_WEIGHTS_NAME
from nla_hub.reconstructor import ARModel
from nla_hub.training.recipe import LoRASpec
from nla_hub.training.sharding import gathered
from nla_hub.weights import inside, is_finite, read_header, read_tensor, shorten

ACTIVE, REFERENCE = "default", "ref"
"""peft's name for the factors that act and train, and TRL's for a frozen copy of them that KL is measured to."""

SIDES = (f".lora_A.{ACTIVE}.", f".lora_B.{ACTIVE}.")
"""What stands in the names of their parameters."""


def peft_config(spec: LoRASpec, *, task: str | None = "CAUSAL_LM") -> Any:
    """peft's configuration of a recipe's factors; `task` names its wrapper (None: of a trunk without a head)."""
    from peft import LoraConfig

    targets = spec.targets
    return LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type=task,
    )


def add_factors(model: Any, spec: LoRASpec, *, seed: int, task: str | None = "CAUSAL_LM") -> Any:
    """A peft model around `model`, which is frozen in place; its factors begin as `seed` says, on any device alike.

    Raises:
        TrainingError: no module of this model has one of the names in `spec.targets`.
    """
    from peft import get_peft_model

    with torch.random.fork_rng(), _quiet_peft():
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, peft_config(spec, task=task))
        except ValueError as cause:
            raise TrainingError(
                f"This model cannot carry these factors: {' '.join(str(cause).split())[:200]}",
                got=f"lora.targets: {spec.targets}",
                next_step="name linear modules of its blocks (q_proj, up_proj, ...), or all-linear",
            ) from cause
    adapted.peft_config[ACTIVE].base_model_name_or_path = ""  # of a name peft would ask the Hub
    return adapted.eval()


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """peft 0.21 asks transformers 5.23 for names that it calls deprecated, and corrects itself on GPT-2's Conv1D."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"fan_in_fan_out is set to False", category=UserWarning)
        yield


# -- what trains ---------------------------------------------------------------------------------------------


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The factors that act in a model, by the names of its parameters; {} where all of its weights are its own."""
    return {name: value for name, value in model.named_parameters() if any(side in name for side in SIDES)}


def carries_factors(model: nn.Module) -> bool:
    """Whether a model is a frozen base with factors."""
    return bool(factors(model))


def base_of(model: Any) -> Any:
    """The transformers model inside a peft model, with the factors' layers in it; any other model itself."""
    return model.get_base_model() if carries_factors(model) else model


@torch.no_grad()
def keep_reference(model: Any) -> None:
    """Keep a frozen copy of a peft model's factors beside them, under the name by which TRL's trainers look for one.

    TRL would make it itself, but not where it is told of the KL term after it was built, and not of sharded factors.
    """
    with _quiet_peft():
        model.add_adapter(REFERENCE, copy.deepcopy(model.peft_config[ACTIVE]))
    for name, value in factors(model).items():
        twin = model.get_parameter(name.replace(f".{ACTIVE}.", f".{REFERENCE}."))
        twin.copy_(value).requires_grad_(False)


def train_only_what_trains(model: nn.Module) -> None:
    """Set `requires_grad` of a half: of its factors and an AR's value head, or of everything where it has no factors."""
    found = factors(model)
    model.requires_grad_(not found)
    for value in found.values():
        value.requires_grad_(True)
    if isinstance(model, ARModel):
        model.head.requires_grad_(True)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: its state without parameters that are frozen."""
    if all(value.requires_grad for value in model.parameters()):
        return model.state_dict()
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def load_trained(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restore what `trained_state` gave.

    Raises:
        TrainingError: it is that of another model.
    """
    expected = trained_state(model)
    if different := sorted(state.keys() ^ expected.keys()):
        raise TrainingError(
            "A checkpoint holds other weights than those that train.",
            faults=shorten([f"{'unexpected' if name in state else 'missing'}: {name}" for name in different]),
            next_step="remove the state folder of this stage to start it again",
        )
    model.load_state_dict(dict(state), strict=False)


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Keep factors as they are while a trainer is set up: TRL 1.16 casts those over a packed base to bfloat16."""
    kept = [(value, value.detach().clone()) for value in factors(model).values()]
    yield
    for value, before in kept:
        value.data = before.to(value.device)


# -- on disk -------------------------------------------------------------------------------------------------


def stored_factors(model: Any) -> dict[str, Tensor]:
    """The factors of a peft model as they are stored: whole float32 tensors on the CPU; all processes must call it."""
    return {_stored_name(name): gathered(value).float().cpu().contiguous() for name, value in factors(model).items()}


def write_factors(directory: Path, found: Mapping[str, Tensor], model: Any, *, base: str) -> None:
    """Write the `stored_factors` of a peft model as a PEFT directory; `base` is what its base is called there.

    Raises:
        WeightsError: NaN or infinite values.
    """
    if broken := [name for name, value in found.items() if not is_finite(value)]:
        raise WeightsError("LoRA factors hold NaN or infinite values.", where=directory, faults=shorten(broken))
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(found), directory / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[ACTIVE])
    config.base_model_name_or_path = base
    config.target_modules = sorted(config.target_modules)  # a set, in an order of its own in every process
    config.save_pretrained(directory)


@torch.no_grad()
def read_factors(directory: Path, model: Any) -> None:
    """Give a peft model the factors that `write_factors` wrote.

    Raises:
        WeightsError: a damaged file, or factors of other modules or ranks than the model's.
    """
    file = inside(directory, ADAPTER_WEIGHTS_NAME)
    stored = read_header(file)
    wanted = {_stored_name(name): value for name, value in factors(model).items()}
    faults = [
        f"{'unexpected' if name in stored else 'missing'}: {name}" for name in sorted(stored.keys() ^ wanted.keys())
    ]
    faults += [
        f"{name}: got shape {stored[name].shape}, expected {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in stored and stored[name].shape != tuple(value.shape)
    ]
    if faults:
        raise WeightsError(
            "These factors are not those of this recipe.",
            where=file,
            faults=shorten(faults),
            next_step="train the earlier stage again with this recipe's lora section",
        )
    for name, value in wanted.items():
        value.copy_(read_tensor(file, name))


def _stored_name(name: str) -> str:
    """peft's name of a factor on disk: without that of the adapter."""
    return name.replace(f".{ACTIVE}.", ".")
