"""How a half under training is loaded, and how it is written: whole or as factors on the frozen base, sharded or not.

The stages `av`, `ar`, `rl` and `export` come here and nowhere else, so none of them asks a recipe whether it trains factors.

- Full weights are trained in float32 (`loop.TRAINED`); a stage writes complete halves.
- With `Recipe.lora` the base is frozen, in bfloat16 on an accelerator, in float32 on a CPU, or packed by bitsandbytes. A
  stage writes the factors, and an AR's value head; the stage `rl` goes on with the same ones, because a base that is packed
  cannot take them in without becoming another model. They are merged once, into the unpacked base, when a pair is exported.
- With `rl.lora` a complete AV is frozen in the stage `rl` alone; the trainer makes the factors, and they are merged at its end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nla_hub.adapters import Adapter
from nla_hub.checkpoints import load_ar, load_head
from nla_hub.export import save_ar, save_av
from nla_hub.layouts import AR_META_NAME, HalfFiles
from nla_hub.pretrained import LoadedModel, LoadOptions, load_causal_lm, load_trunk
from nla_hub.reconstructor import ARModel
from nla_hub.sidecar import Sidecar
from nla_hub.training.ar_regression import init_ar
from nla_hub.training.loop import TRAINED
from nla_hub.training.lora_training import (
    add_factors,
    base_of,
    carries_factors,
    keep_reference,
    read_factors,
    stored_factors,
    train_only_what_trains,
    write_factors,
)
from nla_hub.training.processes import Processes
from nla_hub.training.recipe import Recipe
from nla_hub.training.sharding import (
    Execution,
    gathered,
    is_sharded,
    mapped_options,
    shard,
    whole_model,
)
from nla_hub.weights import HEAD_NAME, require_finite_weights


@dataclass(frozen=True)
class Halves:
    """The halves of one recipe on its base model.

    Every process calls the same methods in the same order: what is sharded is loaded and gathered by all of them together.

    Attributes:
        recipe: says whether they are trained whole or as factors, in copies or sharded.
        base: directory of the base model.
        processes: those of the run; the main one writes.
    """

    recipe: Recipe
    base: Path
    processes: Processes = field(default_factory=Processes)

    @cached_property
    def av_execution(self) -> Execution:
        """How the AV is run."""
        return Execution.of(self.recipe, "av", world=self.processes.world)

    @cached_property
    def ar_execution(self) -> Execution:
        """How an AR is run."""
        return Execution.of(self.recipe, "ar", world=self.processes.world)

    # -- loading ---------------------------------------------------------------------------------------------

    def load_av(self, start: Path | None = None) -> LoadedModel:
        """An AV to be trained: a causal LM, or a peft model around one, with `requires_grad` set on what trains.

        Args:
            start: what the stage `av` wrote, where `rl` goes on; None: the base model, where `av` begins.

        Raises:
            CheckpointError, WeightsError and their children: see `load_causal_lm` and `read_factors`.
        """
        lora, rl = self.recipe.lora, self.recipe.rl
        if lora is None:
            under_factors = start is not None and rl is not None and rl.lora is not None  # the trainer makes them
            place = start or self.base
            loaded = load_causal_lm(
                place, self._options(place, self.av_execution, LoadOptions() if under_factors else TRAINED)
            )
            if under_factors and rl is not None and rl.lora is not None and self.av_execution.sharded:
                loaded.model = add_factors(loaded.model, rl.lora, seed=self.recipe.seed)  # before it is divided
        else:
            loaded = load_causal_lm(self.base, self._options(self.base, self.av_execution, self._frozen()))
            loaded.model = add_factors(loaded.model, lora, seed=self.recipe.seed)
            if start is not None:
                read_factors(start, loaded.model)
                if rl is not None and rl.beta > 0:
                    keep_reference(loaded.model)
        train_only_what_trains(loaded.model)
        if start is None and self.recipe.av.gradient_checkpointing:
            recompute_blocks(loaded.model)
        self._divide(loaded.model, loaded.adapter, self.av_execution)
        return loaded

    def load_reference(self, start: Path) -> nn.Module | None:
        """What KL is measured to in the stage `rl`: the AV that it starts from once more, frozen.

        None where there is no KL term, and where the trainer has only to switch factors: fresh ones off (`rl.lora`), trained
        ones to the copy that `load_av` kept of them (`Recipe.lora`).
        """
        rl = self.recipe.rl
        if rl is None or rl.beta == 0 or rl.lora is not None or self.recipe.lora is not None:
            return None
        loaded = load_causal_lm(start, self._options(start, self.av_execution, TRAINED))
        self._divide(loaded.model, loaded.adapter, self.av_execution)
        model: nn.Module = loaded.model
        return model

    def load_ar(self, sidecar: Sidecar, start: Path | None = None, *, seed: int | None = None) -> ARModel:
        """An AR to be trained, with `requires_grad` set on what trains; its value head is float32.

        Args:
            sidecar: of an AR; its layer is where the trunk ends.
            start: what the stage `ar` wrote, where `rl` goes on; None: the base's blocks 0..K and the identity.
            seed: of fresh factors (None: the recipe's).

        Raises:
            CheckpointError, WeightsError and their children: see `load_trunk`, `checkpoints.load_ar` and `read_factors`.
        """
        lora, execution = self.recipe.lora, self.ar_execution
        if lora is None and start is not None:
            loaded, head = load_ar(start, sidecar, self._options(start, execution, TRAINED))
            model = ARModel(loaded.adapter, loaded.model, head)
        else:
            usual = TRAINED if lora is None else self._frozen()
            loaded = load_trunk(self.base, sidecar.site, self._options(self.base, execution, usual))
            model = init_ar(loaded.adapter, loaded.model)
        if lora is not None:
            model.trunk = add_factors(model.trunk, lora, seed=self.recipe.seed if seed is None else seed, task=None)
            if start is not None:
                read_factors(start, model.trunk)
                model.head = load_head(start, sidecar.d_model).to(model.head.weight.device)
        train_only_what_trains(model)
        stage = self.recipe.ar if start is None or self.recipe.rl is None else self.recipe.rl
        if stage.gradient_checkpointing:
            recompute_blocks(model.trunk)
        self._divide(model, loaded.adapter, execution)
        return model

    def files(self, directory: Path) -> HalfFiles:
        """What a stage wrote, for `checkpoints.load_av` and `load_ar`, which merge factors into the base."""
        if self.recipe.lora is None:
            return HalfFiles(directory)
        return HalfFiles(directory, "lora", base=self.base, stack=(directory,))

    def _options(self, directory: Path, execution: Execution, usual: LoadOptions) -> LoadOptions:
        """`usual`, or what is sharded after it was loaded: frozen in the same dtype, else cast to float32 by `shard`."""
        if not execution.sharded:
            return usual
        mapped = mapped_options(directory)
        return replace(mapped, dtype=usual.torch_dtype()) if usual.dtype == "auto" else mapped

    def _frozen(self) -> LoadOptions:
        """How a base under factors is loaded where each process has a copy."""
        kind, options = self.recipe.base.quantization, LoadOptions()
        if kind is None:
            return options
        # accelerate compares this device with its own, and takes one without a number for another one.
        place = {"": "cpu" if options.on_cpu() else torch.accelerator.current_device_index()}
        return replace(options, device_map=place, quantization_config=packing(kind, options.torch_dtype()))

    def _divide(self, model: nn.Module, adapter: Adapter, execution: Execution) -> None:
        if execution.sharded:
            from accelerate import PartialState

            shard(model, adapter, execution, PartialState().device)

    # -- writing ---------------------------------------------------------------------------------------------

    def write_av(self, directory: Path, model: Any, tokenizer: Any, sidecar: Sidecar) -> None:
        """Write an AV as this recipe's stages keep it: factors, or a complete float32 causal LM (`rl.lora` merged into it)."""
        if self.recipe.lora is not None:
            self._write_factors(directory, model, tokenizer, sidecar)
            return
        whole = self._whole_av(model)
        self.processes.on_main(lambda: save_av(directory, whole, tokenizer, sidecar, dtype=torch.float32))

    def _whole_av(self, model: Any) -> Any:
        """A complete causal LM, in the main process; `model` itself can go on being trained."""
        if is_sharded(model) or carries_factors(model):
            return whole_model(model, keep=self.processes.is_main)
        return model

    def write_ar(self, directory: Path, model: ARModel, tokenizer: Any, sidecar: Sidecar) -> None:
        """Write an AR as this recipe's stages keep it: factors and value head, or trunk and value head, float32."""
        tensors = {name: gathered(value).float().cpu().contiguous() for name, value in model.head.named_parameters()}
        head = _linear(tensors)
        if self.recipe.lora is not None:
            self._write_factors(
                directory, model.trunk, tokenizer, sidecar, lambda: self._write_head(directory, head, sidecar)
            )
            return
        trunk = whole_model(model.trunk, keep=self.processes.is_main) if is_sharded(model) else model.trunk
        self.processes.on_main(lambda: save_ar(directory, trunk, head, tokenizer, sidecar, dtype=torch.float32))

    def _write_factors(
        self,
        directory: Path,
        model: Any,
        tokenizer: Any,
        sidecar: Sidecar,
        more: Callable[[], None] = lambda: None,
    ) -> None:
        found = stored_factors(model)

        def write() -> None:
            write_factors(directory, found, model, base=sidecar.base_model or self.recipe.base.name)
            more()
            tokenizer.save_pretrained(directory)
            sidecar.write(directory)

        self.processes.on_main(write)

    def _write_head(self, directory: Path, head: nn.Linear, sidecar: Sidecar) -> None:
        require_finite_weights(head, "value head")
        save_file(dict(head.state_dict()), directory / HEAD_NAME, metadata={"format": "pt"})
        meta = {
            "ar_num_layers": sidecar.site.n_blocks,
            "final_norm_stripped": True,
            "quant": self.recipe.base.quantization,
        }
        (directory / AR_META_NAME).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def _linear(tensors: dict[str, Tensor]) -> nn.Linear:
    """A linear module of a whole weight, and bias where there is one."""
    d_out, d_in = tensors["weight"].shape
    module = nn.Linear(d_in, d_out, bias="bias" in tensors)
    module.load_state_dict(tensors)
    return module


def packing(kind: str, computed_in: torch.dtype) -> Any:
    """bitsandbytes' settings of `base.quantization`; 4 bits as QLoRA has them (Dettmers et al. 2023, arXiv:2305.14314)."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed_in,
    )


def recompute_blocks(model: nn.Module) -> None:
    """Let the blocks of a half keep their inputs alone, and compute the rest again in the backward pass.

    Non-reentrant: the other form gives no gradient to factors above a frozen embedding.
    """
    inner: Any = base_of(model)
    settings = {"use_reentrant": False}
    if hasattr(inner, "activation_checkpointing_enable"):
        inner.activation_checkpointing_enable(settings)
    else:
        inner.gradient_checkpointing_enable(settings)  # its name before transformers 5.23
