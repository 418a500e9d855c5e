"""An RL trainer on a random pair: small enough for seconds, complete in every part."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from nla_hub.checkpoints import load_ar
from nla_hub.engines.base import Completion, LoadedAV
from nla_hub.engines.transformers import TransformersEngine
from nla_hub.geometry import Reference
from nla_hub.injection import Injector
from nla_hub.pretrained import LoadedModel, LoadOptions, load_causal_lm, load_tokenizer
from nla_hub.prompts import ARPrompt, AVPrompt
from nla_hub.reconstructor import ARModel
from nla_hub.sidecar import Sidecar, Site
from nla_hub.testing import D_MODEL, LAYER, RandomPair
from nla_hub.training.data import TrainingRows
from nla_hub.training.grpo import RLTrainer
from nla_hub.training.loop import WHOLE
from nla_hub.training.lora_training import add_factors, train_only_what_trains
from nla_hub.training.recipe import RLSpec
from nla_hub.training.rl.live_ar import LiveAR
from nla_hub.training.rl.samplers import GatheredEngine
from nla_hub.training.rl.settings import grpo_config
from nla_hub.training.sharding import Execution, mapped_options, shard

SPEC = RLSpec(
    documents=12, steps=2, prompts=4, group=4, micro_batch=4, lr=1e-3, ar_lr=1e-3, beta=0.04, max_new_tokens=12,
    rollout_block=8, watch_ar=False,
)  # fmt: skip


def random_rows(n: int, d: int = D_MODEL, *, seed: int = 0) -> TrainingRows:
    """`n` random vectors of as many documents, labelled with two words."""
    generator = torch.Generator().manual_seed(seed)
    words = ("the cat", "red house", "a river", "night song", "old dog")
    return TrainingRows(
        vectors=torch.randn(n, d, generator=generator) * 7,
        texts=tuple(words[i % len(words)] for i in range(n)),
        doc_ids=tuple(f"doc-{i}" for i in range(n)),
        positions=tuple(10 + i for i in range(n)),
        prefixes=tuple("the cat sees" for _ in range(n)),
        site=Site(LAYER),
    )


class TaggingEngine(TransformersEngine):
    """Puts the tags around whatever a random AV writes, so that there is something to pay; ids and log-probabilities stay."""

    def generate(self, *args: Any, **options: Any) -> list[Completion]:
        return [
            dataclasses.replace(c, text=f"<explanation>{c.text}</explanation>")
            for c in super().generate(*args, **options)
        ]


class TaggingGathered(TaggingEngine, GatheredEngine):
    """The same of an AV that is sharded."""


class Watcher(TrainerCallback):
    """Remembers the figures of every finished step, and what the log-probability passes saw."""

    def __init__(self) -> None:
        self.figures: list[dict[str, Any]] = []
        self.logs: list[dict[str, Any]] = []
        self.trainer: RLTrainer | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> Any:
        assert self.trainer is not None
        assert logs is not None
        if "loss" in logs:
            self.logs.append(dict(logs))
            if state.global_step % self.trainer.spec.per_step == 0:
                self.figures.append(self.trainer.finished)
        return control


def make_trainer(
    pair: RandomPair,
    directory: Path,
    *,
    rows: TrainingRows | None = None,
    labels: TrainingRows | None = None,
    watch: bool = False,
    world: int = 1,
    seed: int = 0,
    callbacks: Sequence[Any] = (),
    make_engine: Any = TaggingEngine,
    report_to: Sequence[str] = (),
    execution: Execution = WHOLE,
    **changes: Any,
) -> tuple[RLTrainer, Watcher]:
    """A trainer of `SPEC` with `changes` on a pair on disk, and what will know its figures.

    Where `execution` is sharded, the AV, its reference and the ARs all are.
    """
    spec = dataclasses.replace(SPEC, **changes)
    faults = list(spec.faults())
    assert not faults, faults
    options = LoadOptions(device_map={"": "cpu"})
    tokenizer = load_tokenizer(pair.av)
    sidecar, ar_sidecar = Sidecar.read(pair.av), Sidecar.read(pair.ar)
    device = torch.device("cpu")

    def load_av() -> LoadedModel:
        loaded = load_causal_lm(pair.av, mapped_options(pair.av) if execution.sharded else options)
        return loaded

    def divided(model: Any, adapter: Any) -> Any:
        if execution.sharded:
            shard(model, adapter, execution, device)
        return model

    loaded = load_av()
    if spec.lora is not None and execution.sharded:
        loaded.model = add_factors(loaded.model, spec.lora, seed=seed)
    train_only_what_trains(loaded.model)
    divided(loaded.model, loaded.adapter)
    if execution.sharded:
        make_engine = partial(TaggingGathered, device=device, dtype=torch.bfloat16 if execution.bf16 else None)
    assert sidecar.marker is not None
    injector = Injector(loaded.adapter, sidecar.injection, sidecar.marker)
    av = LoadedAV(loaded, tokenizer, AVPrompt.build(tokenizer, sidecar), injector)
    prompt = ARPrompt.build(tokenizer, ar_sidecar)

    def make_ar(accelerator: Any) -> tuple[LiveAR, LiveAR | None]:
        def live() -> LiveAR:
            trunk, head = load_ar(pair.ar, ar_sidecar, options)
            model = ARModel(trunk.adapter, trunk.model, head).requires_grad_(True)
            return LiveAR(divided(model, trunk.adapter), prompt, spec, accelerator, execution=execution)

        return live(), live() if watch else None

    data = random_rows(12, loaded.d_model) if rows is None else rows
    watcher = Watcher()
    trainer = RLTrainer(
        av,
        divided(load_av().model, loaded.adapter) if spec.beta and spec.lora is None else None,
        grpo_config(spec, directory, seed=seed, world=world, on_cpu=True, report_to=report_to),
        spec,
        data,
        make_ar=make_ar,
        labels=labels,
        baseline=Reference.measure(data.vectors, "rows of the test"),
        seed=seed,
        callbacks=[watcher, *callbacks],
        make_engine=make_engine,
        execution=execution,
    )
    watcher.trainer = trainer
    return trainer, watcher


def weights(model: torch.nn.Module) -> Tensor:
    """All weights in one vector, float64."""
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])
