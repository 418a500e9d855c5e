"""Cheats planted in a real run of the rl stage, one a test, and what the monitor says of an honest run.

The runs start from the packaged tiny pair: a random pair has nothing that could be lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

pytest.importorskip("trl", reason="needs the train extra")

from rl_world import make_trainer
from test_training import SOURCE, small_recipe

from nla_hub.engines.base import Completion
from nla_hub.engines.transformers import TransformersEngine
from nla_hub.errors import TrainingError
from nla_hub.injection import Injector
from nla_hub.loading import Source
from nla_hub.pretrained import LoadOptions, load_tokenizer, load_trunk
from nla_hub.prompts import ARPrompt
from nla_hub.sidecar import Sidecar, Site
from nla_hub.testing import RandomPair
from nla_hub.tiny.labeler import TinyCorpus, TinyLabeler
from nla_hub.training.data import TrainingRows, collect
from nla_hub.training.grpo import RLTrainer
from nla_hub.training.processes import Processes
from nla_hub.training.rl.dev_eval import DevEvaluation
from nla_hub.training.rl.stage import CURVES, Conductor, keep_curves
from nla_hub.training.run import StageDirectory

pytestmark = pytest.mark.train

WEIGHTS = SOURCE.parent
PAIR = RandomPair(WEIGHTS, SOURCE, WEIGHTS / "av", WEIGHTS / "ar", Site(2))
STEPS = 9
Plant = Callable[[RLTrainer], None]


@pytest.fixture(scope="module")
def rows() -> TrainingRows:
    source = Source(load_trunk(SOURCE, Site(2), LoadOptions()), load_tokenizer(SOURCE), "tiny-source")
    return collect(source, small_recipe(), TinyCorpus().documents(24, seed=99), TinyLabeler(), prefix="watch")


class Run:
    """A short run of the rl stage with something planted in it."""

    def __init__(self, rows: TrainingRows, directory: Path) -> None:
        self.rows, self.directory = rows, directory
        self.lines: list[dict[str, Any]] = []

    def __call__(self, plant: Plant = lambda _: None, **changes: Any) -> dict[str, Any]:
        """Run it; the stage's summary."""
        stage = StageDirectory(self.directory / "rl")
        stage.path.mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = {
            "steps": STEPS, "prompts": 16, "group": 4, "micro_batch": 32, "rollout_block": 64, "max_new_tokens": 64,
            "lr": 1e-4, "ar_lr": 3e-4, "beta": 0.02, "evaluate_every": 100, "watch": True,
        }  # fmt: skip
        trainer, _ = make_trainer(
            PAIR, stage.state, rows=self.rows, make_engine=TransformersEngine, **{**settings, **changes}
        )
        tokenizer = load_tokenizer(PAIR.ar)
        evaluation = DevEvaluation(
            self.rows[:32], ARPrompt.build(tokenizer, Sidecar.read(PAIR.ar)), n=32, max_new_tokens=64
        )
        plant(trainer)
        return Conductor(trainer, trainer.spec, evaluation, stage, self.lines.append, Processes()).run()

    @property
    def alarms(self) -> set[str]:
        """Names of the alarms that were given."""
        return {line["alarm"]["name"] for line in self.lines if "alarm" in line}

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The figures of each step."""
        return [line for line in self.lines if "reward" in line]


@pytest.fixture
def run(rows: TrainingRows, tmp_path: Path) -> Run:
    return Run(rows, tmp_path)


def test_an_honest_run_alarms_nobody(run: Run) -> None:
    summary = run()
    assert run.alarms == set()
    assert summary["steps"] == STEPS == len(run.steps)
    assert summary["skipped"] == 0
    for figures in run.steps:
        assert figures["cosine"] > figures["cosine_shuffled"] + 0.3
        assert abs(figures["gap"]) < 0.02
    evaluations = [line["step"] for line in run.lines if "evaluation" in line]
    assert evaluations == [0, STEPS]


def test_what_a_run_reports_to_gets_our_figures_and_the_evaluations(run: Run) -> None:
    logged: list[dict[str, Any]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logged.append(dict(logs))

    run(lambda trainer: trainer.add_callback(Tracker()), steps=2)
    steps = [logs for logs in logged if "loss" in logs]
    assert len(steps) == 2
    for logs, figures in zip(steps, run.steps, strict=True):
        for name in ("fve", "cosine", "mse", "kl", "gap", "logprob_difference", "ratio", "ok"):
            assert logs[f"nla/{name}"] == figures[name]
        for name in ("reward", "entropy", "completions/mean_length"):
            assert name in logs
    held_out = [logs for logs in logged if "held_out/fve" in logs]
    assert [logs["held_out/fve"] for logs in held_out] == [run.lines[-1]["evaluation"]["fve"]]


def test_curves_for_tensorboard_stay_in_the_run(run: Run, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs the log extra")
    run(lambda trainer: keep_curves(trainer, tmp_path / CURVES), steps=2, report_to=("tensorboard",))
    curves = reader.EventAccumulator(str(tmp_path / CURVES)).Reload()
    assert [e.value for e in curves.Scalars("train/nla/fve")] == pytest.approx([f["fve"] for f in run.steps])
    assert "train/reward" in curves.Tags()["scalars"]


def test_a_reward_ar_that_reads_a_hidden_code_is_noticed(run: Run) -> None:
    code, start = "; total 9 9", 4

    def plant(trainer: RLTrainer) -> None:
        engine, live = trainer.engine, trainer.scoring.ar
        generate, score = engine.generate, live.score

        def coded(*args: Any, **options: Any) -> list[Completion]:
            found = generate(*args, **options)
            if trainer.state.global_step < start:
                return found
            return [dataclasses.replace(c, text=c.text.replace("</", f"{code}</")) for c in found]

        def complicit(texts: Any, vectors: torch.Tensor, *, total: int) -> torch.Tensor:
            honest = score(texts, vectors, total=total)
            reads = torch.tensor([code in text for text in texts])
            return torch.where(reads[:, None], vectors, honest)

        engine.generate, live.score = coded, complicit  # type: ignore[method-assign, assignment]

    run(plant)
    assert "reward_hacking" in run.alarms
    assert run.steps[-1]["cosine"] > 0.99, "by the AR that pays, all is well"


def test_an_av_that_ignores_its_vector_is_noticed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    entering = Injector.entering
    monkeypatch.setattr(Injector, "entering", lambda self, vectors: entering(self, torch.ones_like(vectors)))
    run()
    assert "vector_ignored" in run.alarms
    assert max(figures["logprob_difference"] for figures in run.steps) < 1e-4, "both sides agree: nothing else shows it"


def test_a_frozen_ar_is_noticed(run: Run) -> None:
    def plant(trainer: RLTrainer) -> None:
        optimizer = trainer.scoring.ar.optimizer
        assert optimizer is not None
        optimizer.step = lambda *_, **__: None  # type: ignore[method-assign, assignment]

    run(plant)
    assert "frozen_ar" in run.alarms


@pytest.mark.parametrize("beta", [0.0, 1e-9], ids=["no-reference", "too-small-to-count"])
def test_a_kl_coefficient_that_is_not_applied_is_noticed(run: Run, beta: float) -> None:
    def plant(trainer: RLTrainer) -> None:
        trainer.beta = beta

    run(plant)
    assert "kl_not_applied" in run.alarms


def test_steps_that_stay_without_a_finite_gradient_stop_the_run_with_its_state_kept(run: Run) -> None:
    def plant(trainer: RLTrainer) -> None:
        loss = trainer._compute_loss
        trainer._compute_loss = lambda model, inputs: loss(model, inputs) * float("nan")  # type: ignore[method-assign]

    with pytest.raises(TrainingError, match="finite"):
        run(plant, steps=12, prompts=2, group=2, micro_batch=4)
    kept = list((run.directory / "rl" / "state").glob("checkpoint-*/COMPLETE"))
    assert len(kept) == 1
    assert run.steps[-1]["skipped"] == len(run.steps)


def test_an_ar_that_gives_no_numbers_stops_the_run(run: Run) -> None:
    def plant(trainer: RLTrainer) -> None:
        torch.nn.init.constant_(trainer.scoring.ar.model.head.weight, float("nan"))

    with pytest.raises(TrainingError, match="finite"):
        run(plant, steps=12, prompts=2, group=2, micro_batch=4)
    assert run.steps[-1]["in_a_row"] == 10


def test_what_stopped_a_run_is_said_again_when_it_is_tried_again(run: Run) -> None:
    def plant(trainer: RLTrainer) -> None:
        loss = trainer._compute_loss
        trainer._compute_loss = lambda model, inputs: loss(model, inputs) * float("nan")  # type: ignore[method-assign]

    small = {"steps": 15, "prompts": 2, "group": 2, "micro_batch": 4}
    for _ in range(2):
        with pytest.raises(TrainingError, match="finite"):
            run(plant, **small)
    assert [line["step"] for line in run.lines if "alarm" in line and line["alarm"]["name"] == "non_finite"] == [10, 11]


def test_an_av_that_does_not_come_back_is_noticed(run: Run, rows: TrainingRows) -> None:
    class Stop(Exception):
        pass

    def plant(trainer: RLTrainer) -> None:
        def roll_out(rows: Any) -> Any:
            if trainer.state.global_step == 1:
                raise Stop
            return sample(rows)

        sample, trainer._roll_out = trainer._roll_out, roll_out  # type: ignore[method-assign]

    small = {"steps": 3, "prompts": 2, "group": 2, "micro_batch": 4, "checkpoint_every": 1}
    with pytest.raises(Stop):
        run(plant, **small)
    (kept,) = (run.directory / "rl" / "state").glob("checkpoint-1/model.safetensors")
    tensors = load_file(kept)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, kept, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="did not come back"):
        run(lambda trainer: torch.nn.init.zeros_(trainer.model.model.layers[1].mlp.up_proj.weight), **small)


def test_a_run_continues_at_its_last_checkpoint_and_ends_the_same(rows: TrainingRows, tmp_path: Path) -> None:
    settings = {"steps": 4, "checkpoint_every": 1, "evaluate_every": 2, "updates": 2}
    whole = Run(rows, tmp_path / "whole")
    trained: list[RLTrainer] = []
    whole(trained.append, **settings)

    class Stop(Exception):
        pass

    broken = Run(rows, tmp_path / "broken")

    def at_third(trainer: RLTrainer) -> None:
        sample = trainer._roll_out

        def roll_out(rows: Any) -> Any:
            if trainer.state.global_step // trainer.spec.per_step == 2:
                raise Stop
            return sample(rows)

        trainer._roll_out = roll_out  # type: ignore[method-assign]

    with pytest.raises(Stop):
        broken(at_third, **settings)
    broken(trained.append, **settings)
    a, b = trained
    for one, other in ((a.model, b.model), (a.scoring.ar.model, b.scoring.ar.model)):
        for (name, p), (_, q) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
            assert torch.equal(p, q), name
    assert [f["mse"] for f in whole.steps] == [f["mse"] for f in broken.steps]
    again = Run(rows, tmp_path / "broken")
    again(trained.append, **settings)  # it was killed after its last step: nothing is trained, nothing is lost
    assert again.steps == []
    for name, p in trained[2].model.state_dict().items():
        assert torch.equal(p, a.model.state_dict()[name]), name
