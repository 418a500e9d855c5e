"""The rl stage: AV by GRPO, AR by regression on the same samples, measured and watched, continued where it was killed."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import Tensor

from nla_hub import registry
from nla_hub.engines.base import LoadedAV
from nla_hub.errors import TrainingError
from nla_hub.injection import Injector
from nla_hub.prompts import ARPrompt, AVPrompt
from nla_hub.sidecar import Sidecar
from nla_hub.training.base import Base
from nla_hub.training.data import TrainingRows
from nla_hub.training.halves import Halves
from nla_hub.training.loop import Report
from nla_hub.training.pair_export import export_pair
from nla_hub.training.processes import Processes
from nla_hub.training.recipe import Recipe, RLSpec
from nla_hub.training.rl.dev_eval import DevEvaluation
from nla_hub.training.rl.live_ar import LiveAR
from nla_hub.training.rl.monitor import Alarm, Monitor
from nla_hub.training.rl.samplers import TogetherEngine, sampler
from nla_hub.training.rl.steps import StepPairs
from nla_hub.training.run import StageDirectory
from nla_hub.training.sharding import is_sharded
from nla_hub.training.splits import data_splits, split_documents

if TYPE_CHECKING:
    from nla_hub.training.grpo import RLTrainer

OURS, COMPLETE = "rl.pt", "COMPLETE"
"""Beside the Trainer's own files in a checkpoint: both ARs, their optimizers, the monitor; and the mark written last."""

CURVES = "tensorboard"
"""Folder of the run directory that TensorBoard reads, where the run reports to it."""

STOPPING_ALARM = "precision_falls"
"""The alarm on which a recipe with `precision_drop` ends its training."""


def train_rl(
    *,
    halves: Halves,
    run_stage: StageDirectory,
    base: Base,
    sidecars: tuple[Sidecar, Sidecar],
    av_directory: Path,
    ar_directory: Path,
    watch_directory: Path | None,
    rows: TrainingRows,
    label_rows: TrainingRows,
    dev_rows: TrainingRows,
    report: Report,
    report_to: tuple[str, ...] = (),
    max_steps: int | None = None,
) -> dict[str, Any]:
    """Train both halves and write them to `run_stage.checkpoint`/av and /ar, as `halves` has them.

    Args:
        sidecars: of AV and AR, as they are written.
        watch_directory: a second AR that never pays.
        rows: the vectors to explain. label_rows: for `label_share`. dev_rows: held out, for the evaluations.
        report: gets a step's figures, `{"evaluation": ...}` and `{"alarm": ...}`, each with `step` and `steps`.

    Raises:
        TrainingError: log-probabilities disagree, losses stay non-finite; the last checkpoint is kept.
    """
    from nla_hub.training.grpo import RLTrainer
    from nla_hub.training.rl.settings import grpo_config

    recipe = halves.recipe
    assert recipe.rl is not None
    spec = recipe.rl if max_steps is None else dataclasses.replace(recipe.rl, steps=min(recipe.rl.steps, max_steps))
    processes = Processes.here()
    av_sidecar, ar_sidecar = sidecars
    tokenizer = base.tokenizer
    assert av_sidecar.marker is not None
    loaded = halves.load_av(av_directory)
    use_cache = loaded.model.config.use_cache
    injector = Injector(loaded.adapter, av_sidecar.injection, av_sidecar.marker)
    av = LoadedAV(loaded, tokenizer, AVPrompt.build(tokenizer, av_sidecar), injector)
    reference = halves.load_reference(av_directory)
    prompt = ARPrompt.build(tokenizer, ar_sidecar, max_length=base.context)

    def make_ar(accelerator: Any) -> tuple[LiveAR, LiveAR | None]:
        def live(directory: Path) -> LiveAR:
            model = halves.load_ar(ar_sidecar, directory)
            return LiveAR(model, prompt, spec, accelerator, execution=halves.ar_execution)

        return live(ar_directory), None if watch_directory is None else live(watch_directory)

    named, truth = known_facts(recipe, dev_rows)
    evaluation = DevEvaluation(
        dev_rows,
        prompt,
        n=spec.evaluate_rows,
        max_new_tokens=spec.max_new_tokens,
        batch_size=spec.rollout_block,
        named=named,
        truth=truth,
    )
    device = PartialState().device if is_sharded(loaded.model) else next(loaded.model.parameters()).device
    execution = halves.av_execution
    if loaded.model.dtype == torch.bfloat16 and device.type != "cpu" and not execution.sharded:
        execution = dataclasses.replace(execution, bf16=True)  # float32 factors on a frozen AV of 16 bit
    args = grpo_config(
        spec,
        run_stage.state,
        seed=recipe.seed,
        world=processes.world,
        on_cpu=device.type == "cpu",
        report_to=report_to if processes.is_main else (),
        run_name=f"{recipe.name}-{recipe.digest()}",
    )
    trainer = RLTrainer(
        av,
        reference,
        args,
        spec,
        rows,
        make_ar=make_ar,
        labels=label_rows if spec.label_share else None,
        baseline=evaluation.reference,
        seed=recipe.seed,
        make_engine=sampler(spec, execution, device, processes),
        execution=execution,
    )
    keep_curves(trainer, run_stage.path.parent / CURVES)

    def keep(place: Path) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        switched, model.config.use_cache = model.config.use_cache, use_cache  # the Trainer switches it off
        halves.write_av(place / "av", model, tokenizer, av_sidecar)
        model.config.use_cache = switched
        halves.write_ar(place / "ar", trainer.scoring.ar.model, tokenizer, ar_sidecar)

    def export(kept: Path, place: Path, step: int) -> None:
        export_pair(halves, tokenizer, sidecars, (kept / "av", kept / "ar"), place, rl_steps=step)

    pairs = StepPairs(run_stage, spec.export_every, keep, export, processes)
    stage = Conductor(trainer, spec, evaluation, run_stage, report, processes, pairs=pairs)
    try:
        summary = stage.run()
    finally:
        trainer.engine.close()  # vLLM would keep its share of the device
    keep(run_stage.checkpoint)
    return summary


def keep_curves(trainer: RLTrainer, directory: Path) -> None:
    """Let TensorBoard write into the run, not into the state that is removed at the end."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(directory)


def known_facts(
    recipe: Recipe, rows: TrainingRows
) -> tuple[Callable[[str], Mapping[str, Hashable]] | None, list[Mapping[str, Hashable]] | None]:
    """A reader of facts in explanations, and what is true at each of the held-out `rows`; None for a world without facts.

    A labeler that can read facts has `named(text)`, a document that knows its own has `facts_at(char)`.
    """
    named = getattr(registry.labelers.get(recipe.labels.labeler), "named", None)
    if named is None or recipe.data.corpus is None:
        return None, None
    documents = split_documents(recipe, "dev", data_splits(recipe)["dev"])
    if not all(hasattr(document, "facts_at") for document in documents):
        return None, None
    by_id: dict[str, Any] = {f"dev-{i}": document for i, document in enumerate(documents)}
    ends = zip(rows.doc_ids, rows.prefixes, strict=True)
    return named, [by_id[doc_id].facts_at(len(prefix)) for doc_id, prefix in ends]


class Conductor:
    """Runs the trainer: reports each finished step, evaluates, watches, keeps checkpoints, continues from the last."""

    def __init__(
        self,
        trainer: RLTrainer,
        spec: RLSpec,
        evaluation: DevEvaluation,
        stage: StageDirectory,
        report: Report,
        processes: Processes,
        *,
        pairs: StepPairs | None = None,
    ) -> None:
        self.trainer, self.spec, self.evaluation, self.stage, self.report = trainer, spec, evaluation, stage, report
        self.processes, self.pairs = processes, pairs
        self.monitor = Monitor(precision_drop=spec.precision_drop)
        self.before, self.started = 0.0, time.perf_counter()
        self.done = 0
        self._policy: Tensor | None = None
        self.last: dict[str, Any] = {}
        self.stopped_by: Alarm | None = None
        self.alarms: list[str] = []

    def run(self) -> dict[str, Any]:
        """Train to the end; the summary of the stage."""
        from nla_hub.training.rl.callback import StepCallback

        place = self.processes.on_main(self._last_checkpoint)
        if place is not None:
            self._restore(place)
        known = -1 if place is None else self.done  # the evaluation before the first step has number 0
        self.processes.on_main(lambda: self._cut(known))
        if place is None:
            self._evaluate(0)
        self.trainer.add_callback(StepCallback(self))
        if self.done < self.spec.steps and self.stopped_by is None:
            self.trainer.train(resume_from_checkpoint=None if place is None else str(place))
        elif place is not None:
            self.trainer._load_from_checkpoint(str(place))  # it was killed between its last step and its end
            self.check_restored()
        if self.stopped_by is not None and self.stopped_by.fatal:
            raise TrainingError(self.stopped_by.message, where=f"step {self.stopped_by.step}")
        return {
            "steps": self.done,
            "stopped_by": None if self.stopped_by is None else self.stopped_by.name,
            "skipped": self.trainer.skipped + self.trainer.scoring.skipped,
            "alarms": self.alarms,
            **{name: self.last.get(name) for name in ("fve", "cosine")},
        }

    def _cut(self, step: int) -> None:
        """Remove what an earlier attempt left of the steps after `step`."""
        self.stage.cut_metrics(step)
        if self.pairs is not None:
            self.pairs.cut(step)

    @property
    def seconds(self) -> float:
        """Wall time of the training, earlier attempts included."""
        return self.before + time.perf_counter() - self.started

    # -- what happens after a step ---------------------------------------------------------------------------

    def after_step(self, logs: Mapping[str, Any]) -> tuple[bool, bool]:
        """Report and judge a finished step; whether to keep a checkpoint, and whether to stop."""
        self.done += 1
        figures = {
            "step": self.done,
            "steps": self.spec.steps,
            **{ours: logs[theirs] for theirs, ours in FROM_TRL.items() if theirs in logs},
            **self.trainer.finished,
            "seconds": round(self.seconds, 3),
        }
        self.report(figures)
        self._warn(self.monitor.observe(self.done, figures))
        final = self.done == self.spec.steps
        if final or self.done % self.spec.evaluate_every == 0:
            self._evaluate(self.done)
        if self.pairs is not None:
            self.pairs.after(self.done)  # before the checkpoint: a run that goes on from there has all of them
        stop = self.stopped_by is not None
        save = stop or final or self.done % self.spec.checkpoint_every == 0
        return self.processes.share((save, stop))

    def _evaluate(self, step: int) -> None:
        """Measure on held-out rows, all processes together; all of them judge the main one's figures."""
        self.last = self.processes.share(self._measured())
        self.report({"step": step, "steps": self.spec.steps, "evaluation": self.last})
        if step:
            self.trainer.log({f"held_out/{k}": v for k, v in _numbers(self.last).items()})
        self._warn(self.monitor.evaluated(step, self.last))

    def _measured(self) -> dict[str, Any]:
        watch = self.trainer.scoring.watch
        with self.trainer.sampling() as engine:
            result = self.evaluation.measure(
                TogetherEngine(engine, self.processes),
                self.trainer.scoring.ar.model,
                None if watch is None else watch.model,
            )
        return result.to_dict()

    def _warn(self, alarms: list[Alarm]) -> None:
        for alarm in alarms:
            self.alarms.append(f"{alarm.name} (step {alarm.step})")
            self.report({"step": alarm.step, "steps": self.spec.steps, "alarm": alarm.to_dict()})
            if alarm.fatal or alarm.name == STOPPING_ALARM:
                self.stopped_by = self.stopped_by or alarm

    # -- checkpoints -----------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Complete the checkpoint that the Trainer has just written, then remove the older ones."""
        place = self.stage.state / f"checkpoint-{self.trainer.state.global_step}"
        self.trainer.accelerator.wait_for_everyone()  # each process has written its random state
        content = self._content(place)

        def complete() -> None:
            torch.save(content, place / OURS)
            (place / COMPLETE).write_text(f"{self.done}\n", encoding="utf-8")
            for other in self.stage.state.glob("checkpoint-*"):
                if other != place:
                    shutil.rmtree(other)

        self.processes.on_main(complete)

    def _content(self, place: Path) -> dict[str, Any]:
        watch = self.trainer.scoring.watch
        return {
            "done": self.done,
            "policy": self.trainer.fingerprint(),
            "ar": self.trainer.scoring.ar.state_dict(place / "ar"),
            "watch": None if watch is None else watch.state_dict(place / "watch"),
            "monitor": self.monitor.to_dict(),
            "alarms": self.alarms,
            "stopped_by": None if self.stopped_by is None else self.stopped_by.to_dict(),
            "skipped": [self.trainer.skipped, self.trainer.scoring.skipped],
            "in_a_row": [self.trainer.in_a_row, self.trainer.scoring.in_a_row],
            "last": self.last,
            "seconds": self.seconds,
        }

    def _restore(self, place: Path) -> None:
        content = torch.load(place / OURS, map_location="cpu", weights_only=True)
        self.trainer.scoring.ar.load_state_dict(content["ar"], place / "ar")
        if self.trainer.scoring.watch is not None:
            self.trainer.scoring.watch.load_state_dict(content["watch"], place / "watch")
        self.monitor = Monitor.from_dict(content["monitor"])
        self._policy = content["policy"]
        self.trainer.skipped, self.trainer.scoring.skipped = content["skipped"]
        self.trainer.in_a_row, self.trainer.scoring.in_a_row = content["in_a_row"]
        if content["stopped_by"] is not None and not content["stopped_by"]["fatal"]:
            self.stopped_by = Alarm(**content["stopped_by"])  # after a fatal one it is tried again
        self.done, self.alarms, self.last = content["done"], content["alarms"], content["last"]
        self.before, self.started = content["seconds"], time.perf_counter()

    def check_restored(self) -> None:
        """Raise a TrainingError where the AV's weights are not those that the checkpoint was made of.

        The Trainer loads them without asking whether every one of them was there.
        """
        if self._policy is not None and not torch.equal(self._policy, self.trainer.fingerprint()):
            raise TrainingError(
                "The AV did not come back from its checkpoint as it was.",
                where=self.stage.state,
                next_step="remove the state folder to start this stage again",
            )

    def _last_checkpoint(self) -> Path | None:
        """The last complete checkpoint; what a kill left of others is removed."""
        found: dict[int, Path] = {}
        for place in self.stage.state.glob("checkpoint-*"):
            if (place / COMPLETE).is_file():
                found[int(place.name.removeprefix("checkpoint-"))] = place
            else:
                shutil.rmtree(place)
        return found[max(found)] if found else None


FROM_TRL = {
    "reward": "reward",
    "reward_std": "reward_std",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "completions/max_length": "length_max",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
}
"""What TRL logs, and what this project calls it."""


def _numbers(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation that a curve can be drawn of."""
    facts = evaluation.get("facts") or {}
    found = {**evaluation, "recall": facts.get("recall"), "precision": facts.get("precision")}
    return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}
