"""GRPO on TRL's trainer, with the vector injected wherever the AV is run.

TRL does what TRL is for: group-normalised advantages, the clipped loss, the KL term, accumulation, distribution. Four things
are ours: the rollouts (our engine, row-keyed draws), the injection around every log-probability pass (policy, old policy
and reference alike), the reward of the live AR with its own update, and the checks that all of this is really so.

The checks, at every generation:

- the policy that sampled must give each sampled token the log-probability that the sampler gave it. Where TRL keeps no old
  log-probabilities the first pass before any update stands in; its ratio is 1 by construction and proves nothing;
- the loss that TRL returns must equal the one computed here from its parts with the recipe's own `beta`.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback
from trl import GRPOConfig
from trl.trainer.utils import add_fused_lm_head

from nla_hub.engines.base import Engine, LoadedAV
from nla_hub.engines.transformers import TransformersEngine
from nla_hub.errors import TrainingError
from nla_hub.geometry import Reference
from nla_hub.injection import Injector, find_markers
from nla_hub.pretrained import LoadedModel
from nla_hub.prompts import AVPrompt
from nla_hub.training.data import TrainingRows
from nla_hub.training.loop import WHOLE
from nla_hub.training.lora_training import REFERENCE, carries_factors, train_only_what_trains, unrounded
from nla_hub.training.recipe import RLSpec
from nla_hub.training.rl.kept import PolicyKept
from nla_hub.training.rl.live_ar import LiveAR, fingerprint
from nla_hub.training.rl.loss_parts import loss_from_parts
from nla_hub.training.rl.rollouts import Rollout, prompt_order, sample
from nla_hub.training.rl.scoring import Scoring
from nla_hub.training.rl.settings import lora_config, policy_rate
from nla_hub.training.rl.step import Step
from nla_hub.training.sharding import Execution, clip_grad_norm, full_weights, is_sharded

DISAGREEMENT = 1e-3
"""Largest |trainer - sampler| log-probability of a token in float32 at which a run goes on: ten times what the monitor
warns of, a tenth of the least that a lost vector was seen to do."""

DISAGREEMENT_16_BIT = 0.1
"""Mean |trainer - sampler| log-probability in 16 bit above which a run stops, twice what the monitor warns of: rounding stays
far below, and a lost vector costs a warm-started AV of a large model 0.2 nats a token. Not measured on a GPU yet."""


@contextmanager
def quiet_about_trl() -> Iterator[None]:
    """TRL 1.16 uses names that transformers 5.23 is about to drop; its users can do nothing about the warnings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*gradient_checkpointing.*", category=FutureWarning)
        yield


class RLTrainer(PolicyKept):
    """Trains an AV in place, and with it the live AR and the AR that watches.

    Args:
        av: the AV that the stage starts from; its model is trained.
        reference: a frozen copy of its model for the KL term; None with beta 0, with `rl.lora` (the factors are switched off)
            and for an AV that comes with factors (and a copy of them, see `lora_training.keep_reference`).
        args: see `grpo_config`.
        data: the vectors to explain.
        make_ar: given the accelerator, the AR that pays, and the one that never does (or None).
        labels: rows that the ARs learn from beside the samples, where the recipe has a `label_share`.
        baseline: reference of the FVE that is reported.
        seed: of order and samples.
        make_engine: what samples from the AV. One with weights of its own (`SyncedEngine`) is sent the AV's when it needs them.
        execution: how the AV is run; a sharded one is handed over sharded.

    Attributes:
        finished: figures of the last finished step.
    """

    def __init__(
        self,
        av: LoadedAV,
        reference: nn.Module | None,
        args: GRPOConfig,
        spec: RLSpec,
        data: TrainingRows,
        *,
        make_ar: Callable[[Any], tuple[LiveAR, LiveAR | None]],
        labels: TrainingRows | None = None,
        baseline: Reference,
        seed: int,
        callbacks: Sequence[Any] = (),
        make_engine: Callable[[LoadedAV], Engine] = TransformersEngine,
        execution: Execution = WHOLE,
    ) -> None:
        from datasets import Dataset

        order = prompt_order(len(data), spec, seed=seed)
        self.spec, self.data, self.seed, self.execution = spec, data, seed, execution
        self.prompt: AVPrompt = av.prompt
        self.injector: Injector = av.injector
        self.step: Step | None = None
        self._stale = True  # whether an engine with weights of its own has older ones than the AV
        self.finished: dict[str, Any] = {}
        self.skipped, self.in_a_row = 0, 0
        self._vectors: Tensor | None = None
        self._logps: Tensor | None = None
        self._until_backward: ExitStack | None = None
        train_only_what_trains(av.loaded.model)
        with quiet_about_trl(), unrounded(av.loaded.model):
            super().__init__(
                model=av.loaded.model,
                reward_funcs=self._reward,
                args=args,
                train_dataset=Dataset.from_dict({"prompt": [self.prompt.text] * len(order), "row": order}),
                processing_class=copy.deepcopy(av.tokenizer),  # TRL sets its padding
                peft_config=None if carries_factors(av.loaded.model) else lora_config(spec),
                callbacks=list(callbacks),
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise TrainingError(
                "The launcher asks for DeepSpeed or for its own FSDP; how weights are divided is the recipe's business.",
                next_step="launch it without either, with hardware.placement.av=sharded",
            )
        if is_sharded(self.model):
            self.model._is_accelerate_prepared = True  # so that accelerate does not wrap it once more
        self.remove_callback(PrinterCallback)  # the run reports its steps itself
        self._reference(reference)
        ar, watch = make_ar(self.accelerator)
        self.scoring = Scoring(ar, watch, spec, self.accelerator, labels=labels, baseline=baseline, seed=seed)
        model = self.accelerator.unwrap_model(self.model)
        inner = model.get_base_model() if carries_factors(model) else model
        loaded = LoadedModel(inner, av.loaded.adapter, av.loaded.directory)
        self.engine = make_engine(LoadedAV(loaded, av.tokenizer, av.prompt, av.injector))

    def _reference(self, reference: nn.Module | None) -> None:
        """The model that KL is measured to: the AV as it was, run through the same injection."""
        self.beta = self.args.beta = self.spec.beta
        if self.beta == 0.0 or self.spec.lora is not None:
            return
        if carries_factors(self.model):
            if REFERENCE not in self.model.peft_config:
                raise TrainingError(
                    "A KL term needs a frozen copy of the AV's factors.", got=", ".join(self.model.peft_config)
                )
            return
        if reference is None:
            raise TrainingError("A KL term with full weights needs a frozen copy of the AV.", got="reference=None")
        reference.requires_grad_(False).eval()
        add_fused_lm_head(reference, temperature=self.temperature)
        if is_sharded(reference):
            self.ref_model = reference
        else:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    def train(self, *args: Any, **options: Any) -> Any:
        """As the Trainer's."""
        with quiet_about_trl():
            return super().train(*args, **options)

    # -- rollouts --------------------------------------------------------------------------------------------

    @property
    def number(self) -> int:
        """The current step, from 0."""
        return int(self.state.global_step) // self.spec.per_step

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [list(self.prompt.ids) for _ in prompts], None, {}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], *_: Any, **__: Any
    ) -> tuple[list[list[int]], list[list[float]]]:
        assert self.step is not None
        completions = self.step.rollout.completions
        assert len(completions) == len(prompt_ids)
        return [list(c.ids) for c in completions], [c.logprobs.tolist() for c in completions]

    def _roll_out(self, rows: Sequence[int]) -> Rollout:
        """Sample in evaluation mode: gradient checkpointing would switch the cache off."""
        with self.sampling() as engine:
            return sample(
                engine,
                self.data,
                rows,
                self.spec,
                seed=self.seed,
                step=self.number,
                first=self.accelerator.process_index * len(rows),
            )

    @contextmanager
    def sampling(self) -> Iterator[Engine]:
        """The engine with the AV's present weights, in the trainer's precision; every process must open it."""
        was_training = self.model.training
        self.model.eval()
        try:
            if self._stale and hasattr(self.engine, "sync"):
                self.engine.sync(full_weights(self.model))
            self._stale = False
            with self.execution.running(self.accelerator.device):
                yield self.engine
            if hasattr(self.engine, "sleep"):
                self.engine.sleep()
                self._stale = True
        finally:
            self.model.train(was_training)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        started = time.perf_counter()
        rows = [int(x["row"]) for x in inputs]
        self.step = Step(self.number, self._roll_out(rows), self.fingerprint())
        self.step.seconds["rollout"] = time.perf_counter() - started
        self._vectors = self.step.rollout.vectors
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        output["vectors"] = self.step.rollout.vectors  # TRL shuffles and splits it with the rest
        if "old_per_token_logps" in output:
            self._compare(output["old_per_token_logps"], output)
        self._vectors = None
        return output

    # -- log-probabilities -----------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As TRL's, with the vectors in: [rows, length] of ids need `self._vectors` [rows, d]."""
        vectors = self._vectors
        if vectors is None or len(vectors) != len(input_ids):
            raise TrainingError(
                "A log-probability pass without its vectors.",
                got="none" if vectors is None else f"{len(vectors)} vectors",
                expected=f"{len(input_ids)} rows",
            )
        size = batch_size or len(input_ids)
        parts = []
        for begin in range(0, len(input_ids), size):
            rows = slice(begin, begin + size)
            prompts = input_ids[rows, : input_ids.shape[1] - logits_to_keep]
            places = find_markers(prompts, self.injector.marker)
            with ExitStack() as here:
                # Gradient checkpointing runs parts of the forward pass again during the backward one, hooks included.
                stack = self._until_backward if self._until_backward and torch.is_grad_enabled() else here
                stack.enter_context(self.injector.inject(model, vectors[rows], places))
                here.enter_context(self.execution.running(self.accelerator.device))
                parts.append(
                    super()._get_per_token_logps_and_entropies(
                        model, input_ids[rows], attention_mask[rows], logits_to_keep, **options
                    )
                )
        logps = torch.cat([p[0] for p in parts])
        entropies = None if parts[0][1] is None else torch.cat([p[1] for p in parts])
        aux = None if parts[0][2] is None else torch.stack([p[2] for p in parts]).mean()
        self._logps = logps
        return logps, entropies, aux

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """A micro-batch: forward and backward under one injection (before the first of a step, the rollout too)."""
        started = time.perf_counter()
        with ExitStack() as self._until_backward:
            loss: Tensor = super().training_step(*args, **options)
        self._until_backward = None
        if self.step is not None:
            self.step.seconds["policy"] += time.perf_counter() - started
        return loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        assert self.step is not None
        self._vectors = inputs["vectors"]
        loss: Tensor = super()._compute_loss(model, inputs)
        self._vectors = None
        assert self._logps is not None
        if "old_per_token_logps" not in inputs:
            # No optimizer step lies between sampling and this pass, or TRL would have kept the old ones.
            self._compare(self._logps.detach(), inputs)
        parts = loss_from_parts(
            self._logps.detach(),
            inputs,
            self.spec,
            clip=(1 - self.epsilon_low, 1 + self.epsilon_high),
            accumulated=self.current_gradient_accumulation_steps,
            per_generation=self.args.steps_per_generation,
            processes=self.accelerator.num_processes,
        )
        difference = abs(float(loss.detach()) - parts.loss) / parts.scale
        self.step.loss_difference = max(self.step.loss_difference, difference)
        if parts.kl is not None:
            self.step.kl.append(parts.kl.cpu())
        return loss

    def _compare(self, logps: Tensor, batch: dict[str, Any]) -> None:
        """Keep and judge the difference between the trainer's log-probabilities and the sampler's.

        Raises:
            TrainingError: they are not those of one policy.
        """
        assert self.step is not None
        mask = batch["completion_mask"].bool()
        gap = (logps - batch["sampling_per_token_logps"])[mask].float().cpu()
        self.step.differences.append(gap.abs())
        self.step.ratios.append(gap.exp())
        wide = self._dtype == torch.float32
        value = self._worst(float(gap.abs().max() if wide else gap.abs().mean()))
        limit = DISAGREEMENT if wide else DISAGREEMENT_16_BIT
        if not value <= limit:
            cause = "one of the two lost its vectors or has other weights"
            if not math.isfinite(value):
                cause = "the weights are beyond what numbers hold: lower rl.lr in another run, -o PLACE"
            raise TrainingError(
                "The trainer and the sampler do not see the same policy: their log-probabilities of the sampled tokens "
                "differ.",
                where=f"step {self.step.number}",
                got=f"{'largest' if wide else 'mean'} difference {value:.2e}",
                expected=f"at most {limit:.0e} in {str(self._dtype).removeprefix('torch.')}",
                next_step=f"{cause}; nothing was learned from these samples",
            )

    def _worst(self, value: float) -> float:
        """The largest of all processes' values, NaN as infinity: all of them stop, or none."""
        worst = torch.tensor([value if math.isfinite(value) else math.inf], device=self.accelerator.device)
        return float(self.accelerator.gather(worst).max())

    @property
    def _dtype(self) -> torch.dtype:
        if self.execution.bf16:
            return torch.bfloat16
        return next(self.injector.adapter.embedding_module(self.model).parameters()).dtype

    # -- reward ----------------------------------------------------------------------------------------------

    def _reward(self, **_: Any) -> list[float]:
        """The live AR's verdict on the current samples; both ARs learn from the same samples right after it."""
        assert self.step is not None
        started = time.perf_counter()
        rewards, self.step.figures = self.scoring.score(self.step.rollout, self.step.number)
        self.step.seconds["reward"] = time.perf_counter() - started
        return [float(r) for r in rewards]

    # -- optimizer and checkpoints ---------------------------------------------------------------------------

    def fingerprint(self) -> Tensor:
        """Some values of every weight that is trained, float64."""
        return fingerprint([p for p in self.model.parameters() if p.requires_grad])

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The recipe's schedule, in steps rather than optimizer steps."""
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda done: policy_rate(done // self.spec.per_step, self.spec)
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_from_checkpoint(self, *args: Any, **options: Any) -> None:
        super()._load_from_checkpoint(*args, **options)
        self._stale = True

    def _clip_grad_norm(self, model: Any) -> float:
        """Clip; a gradient that is not finite is dropped and counted: AdamW leaves weights without gradient alone."""
        self._stale = True  # an optimizer step follows
        norm = clip_grad_norm(model.parameters(), self.spec.clip, self.accelerator.device)
        if math.isfinite(norm):
            self.in_a_row = 0
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            model.zero_grad(set_to_none=True)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """As TRL's; with the last optimizer step of a step our figures join, for whatever the run reports to."""
        if "loss" in logs and self.state.global_step % self.spec.per_step == 0:
            self.finished = self._finish_step()
            for name in [n for n in logs if "clipped_ratio" in n or "terminated" in n]:
                del logs[name]  # TRL takes a text that ends with the closing tag for cut off
            logs |= {f"nla/{k}": v for k, v in self.finished.items() if isinstance(v, (int, float))}
        super().log(logs, *args, **options)

    def _finish_step(self) -> dict[str, Any]:
        """The figures of the step whose last optimizer step was just made, over all processes."""
        assert self.step is not None
        return {
            **self.step.finish(self.accelerator, self.fingerprint()),
            "beta": self.spec.beta,
            "dtype": str(self._dtype).removeprefix("torch."),
            "skipped": self.skipped + self.scoring.skipped,
            "in_a_row": max(self.in_a_row, self.scoring.in_a_row),
        }
