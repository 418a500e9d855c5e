"""A recipe's rl section as settings of TRL, peft and the schedulers; TRL's defaults that matter are set on purpose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from nla_hub.errors import TrainingError
from nla_hub.training.lora_training import peft_config
from nla_hub.training.recipe import RLSpec


def rate(step: int, spec: RLSpec) -> float:
    """The share of the peak learning rate in a step: linear warm-up, then a cosine down to `final_lr`."""
    if step < spec.warmup:
        return (step + 1) / spec.warmup
    done = (step - spec.warmup) / max(1, spec.steps - spec.warmup)
    return spec.final_lr + (1 - spec.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def policy_rate(step: int, spec: RLSpec) -> float:
    """`rate` for the AV, which rests while only the AR learns and warms up after that."""
    resting = spec.ar_warmup
    return 0.0 if step < resting else rate(step - resting, replace(spec, steps=max(1, spec.steps - resting)))


def grpo_config(
    spec: RLSpec,
    directory: Path,
    *,
    seed: int,
    world: int,
    on_cpu: bool,
    report_to: Sequence[str] = (),
    run_name: str | None = None,
) -> GRPOConfig:
    """TRL's configuration of a recipe; every default of TRL that matters is set on purpose.

    Raises:
        TrainingError: the samples of a step cannot be shared by this many processes.
    """
    if fault := spec.sharing_fault(world):
        raise TrainingError(
            "The samples of a step cannot be shared by these processes.",
            faults=[fault],
            next_step="lower rl.micro_batch or start fewer processes",
        )
    accumulated = spec.samples // (spec.micro_batch * world * spec.updates)
    return GRPOConfig(
        output_dir=str(directory),
        seed=seed,
        max_steps=spec.steps * spec.per_step,
        per_device_train_batch_size=spec.micro_batch,
        gradient_accumulation_steps=accumulated,
        steps_per_generation=accumulated * spec.updates,
        num_iterations=spec.iterations,
        num_generations=spec.group,
        max_completion_length=spec.max_new_tokens,
        temperature=spec.temperature,
        loss_type=spec.loss,
        scale_rewards="group",
        use_bias_correction_kl=True,  # a stale sample counts in the KL term by its ratio, as in the policy's
        disable_dropout=True,  # the sampler has none (GPT-2's default is 0.1: its first step was stopped)
        beta=0.0,  # set after the reference is in place: TRL would load one by name, from wherever that leads
        learning_rate=spec.lr,
        weight_decay=spec.weight_decay,
        adam_beta2=spec.beta2,
        max_grad_norm=spec.clip,
        bf16=False,  # the trainer casts by itself (`sharding.Execution`), as the sampler must too
        use_cpu=on_cpu,
        **_checkpointing(spec.gradient_checkpointing),
        ddp_find_unused_parameters=False,
        shuffle_dataset=False,  # the order is made by prompt_order, so that a continued run finds its place
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="no",  # checkpoints are written at the end of a step, by whoever sets control.should_save
        report_to=list(report_to) or "none",
        run_name=run_name,
        **_where_known(project="nla-hub"),
        disable_tqdm=True,
    )


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """The setting by its present name; older releases of transformers know only the one that TRL sets."""
    new = _where_known(activation_checkpointing=wanted)
    return {**new, "gradient_checkpointing": None if new else wanted}


def _where_known(**settings: Any) -> dict[str, Any]:
    """The settings that the installed transformers has."""
    known = {f.name for f in fields(GRPOConfig)}
    return {name: value for name, value in settings.items() if name in known}


def lora_config(spec: RLSpec) -> Any:
    """peft's configuration of the factors that the trainer makes (`rl.lora`), None where it makes none."""
    return None if spec.lora is None else peft_config(spec.lora)
