"""A run that is killed at any moment and started again ends with the very weights and figures of one that was not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from test_training import small_recipe
from torch import nn

from nla_hub.errors import RunError
from nla_hub.training.loop import LoopResult, checkpoint_interval, run_loop
from nla_hub.training.recipe import StageSpec
from nla_hub.training.run import RunDirectory, StageDirectory
from nla_hub.training.state import TrainingState

STEPS = 40
SPEC = StageSpec(documents=1, lr=0.05, batch_size=4)


class Killed(BaseException):
    """Stands for a signal that cannot be caught."""


class Loop:
    """A small regression with dropout that logs into a stage and can be stopped before a step."""

    def __init__(self, stage: StageDirectory, *, every: int | None = 7) -> None:
        self.stage = stage
        self.every = every
        self.calls: list[int] = []
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(4 * STEPS, 6, generator=generator), torch.randn(4 * STEPS, 1, generator=generator)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def run(self, stop_before: int | None = None, *, model: str | None = None, closing: Any = None) -> LoopResult:
        def loss_of(wrapped: Any, indices: Sequence[int]) -> tuple[torch.Tensor, int]:
            if stop_before is not None and len(self.calls) == stop_before:
                raise Killed
            self.calls.append(len(indices))
            rows = list(indices)
            return ((wrapped(self.x[rows]) - self.y[rows]) ** 2).sum(), len(rows)

        return run_loop(
            self.model,
            loss_of,
            [1] * len(self.x),
            SPEC,
            seed=5,
            report=lambda line: self.stage.log({**({"model": model} if model else {}), **line}),
            report_every=3,
            state=TrainingState(self.stage, model or "loop", model),
            checkpoint_every=self.every,
            closing=closing,
        )


def begun(path: Path) -> StageDirectory:
    stage = StageDirectory(path)
    stage.begin(small_recipe())
    return stage


def figures(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their times."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in lines]


@pytest.mark.parametrize("stop", [0, 6, 7, 20, 21, 39])
def test_a_loop_that_was_stopped_ends_as_one_that_was_not(stop: int, tmp_path: Path) -> None:
    def closing() -> dict[str, Any]:
        return {"held_out": 1.0}

    whole = Loop(begun(tmp_path / "whole"))
    expected = whole.run(closing=closing)
    first = Loop(begun(tmp_path / "cut"))
    with pytest.raises(Killed):
        first.run(stop, closing=closing)
    again = Loop(begun(tmp_path / "cut"))
    result = again.run(closing=closing)
    assert dataclasses.replace(result, seconds=0) == dataclasses.replace(expected, seconds=0)
    assert len(again.calls) == STEPS - stop // 7 * 7, "only the steps since the last checkpoint are done again"
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert figures(again.stage.path / "metrics.jsonl") == figures(whole.stage.path / "metrics.jsonl")


def test_a_finished_loop_does_nothing_again(tmp_path: Path) -> None:
    whole = Loop(begun(tmp_path / "stage"))
    expected = whole.run(closing=lambda: {"held_out": 1.0})
    lines = (whole.stage.path / "metrics.jsonl").read_text(encoding="utf-8")
    again = Loop(begun(tmp_path / "stage"))
    assert again.run(closing=lambda: pytest.fail("measured twice")) == expected
    assert again.calls == []
    assert torch.equal(again.model[2].weight, whole.model[2].weight)
    assert (whole.stage.path / "metrics.jsonl").read_text(encoding="utf-8") == lines


def test_two_loops_of_a_stage_do_not_disturb_each_other(tmp_path: Path) -> None:
    Loop(begun(tmp_path / "whole")).run()
    Loop(StageDirectory(tmp_path / "whole")).run(model="watch")
    Loop(begun(tmp_path / "cut")).run()
    with pytest.raises(Killed):
        Loop(StageDirectory(tmp_path / "cut")).run(17, model="watch")
    stage = begun(tmp_path / "cut")
    first, second = Loop(stage), Loop(stage)
    first.run()
    second.run(model="watch")
    assert first.calls == []
    assert len(second.calls) == STEPS - 14
    assert figures(stage.path / "metrics.jsonl") == figures(tmp_path / "whole" / "metrics.jsonl")


def test_a_half_written_checkpoint_is_ignored_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = TrainingState(begun(tmp_path / "stage"), "loop")
    state.save(3, {"a": torch.ones(2)})

    def half(content: Any, file: Any) -> None:
        file.write(b"half a file")
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", half)
        with pytest.raises(Killed):
            state.save(6, {"a": torch.zeros(2)})
    assert len(list(state.stage.state.iterdir())) == 2
    found = state.load()
    assert found is not None
    assert found[0] == 3
    assert torch.equal(found[1]["a"], torch.ones(2))
    state.save(9, {"a": torch.zeros(2)})
    assert [p.name for p in state.stage.state.iterdir()] == ["loop-00000009.pt"], "one checkpoint is enough"


def test_metrics_are_cut_to_a_step_and_to_a_model(tmp_path: Path) -> None:
    stage = begun(tmp_path / "stage")
    for step in (1, 2, 3):
        stage.log({"step": step})
        stage.log({"step": step, "model": "watch"})
    with (stage.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    stage.cut_metrics(2)
    assert figures(stage.path / "metrics.jsonl") == [
        {"step": 1}, {"step": 1, "model": "watch"}, {"step": 2}, {"step": 2, "model": "watch"},
        {"step": 3, "model": "watch"},
    ]  # fmt: skip
    stage.cut_metrics(0, model="watch")
    assert figures(stage.path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_stage_keeps_its_state_only_under_its_own_configuration(tmp_path: Path) -> None:
    stage, recipe = begun(tmp_path / "stage"), small_recipe()
    TrainingState(stage, "loop").save(1, {"step": 1})
    stage.log({"step": 1})
    (stage.checkpoint / "av").mkdir(parents=True)
    stage.begin(recipe)
    assert sorted(p.name for p in stage.path.iterdir()) == ["config.yaml", "metrics.jsonl", "state"]
    stage.begin(dataclasses.replace(recipe, seed=7))
    assert [p.name for p in stage.path.iterdir()] == ["config.yaml"]
    TrainingState(stage, "loop").save(1, {"step": 1})
    stage.finish({"loss": 1.0})
    assert stage.is_done
    assert not stage.state.exists()


def test_checkpoints_are_neither_rare_nor_constant() -> None:
    assert [checkpoint_interval(steps) for steps in (2, 99, 400, 1_000_000)] == [5, 5, 20, 100]


HOLD = """
import sys, time
from pathlib import Path
from nla_hub.training.recipe import load_recipe
from nla_hub.training.run import RunDirectory
with RunDirectory(Path(sys.argv[1]), load_recipe("tiny")):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_owner_keeps_nobody_out(tmp_path: Path) -> None:
    from nla_hub.training.recipe import load_recipe

    place = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(place)], stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == "held\n"
            with (
                pytest.raises(RunError, match=f"process {owner.pid} on "),
                RunDirectory(place, load_recipe("tiny")),
            ):
                pass
        finally:
            owner.kill()
    with RunDirectory(place, load_recipe("tiny")):
        pass


# -- kill -9 -------------------------------------------------------------------------------------------------

RL_SECTION = """
rl:
  {documents: 20, steps: 12, lr: 1.0e-3, ar_lr: 1.0e-3, prompts: 4, group: 4, micro_batch: 16, max_new_tokens: 40,
   evaluate_every: 4, evaluate_rows: 8, checkpoint_every: 2}
"""

RECIPE = f"""
name: small
summary: A pair of nothing much, through every stage
seed: 3
base:
  model: tiny-world
  train:
    {{hidden_size: 32, layers: 2, heads: 2, mlp_size: 32, documents: 300, steps: 80, batch_documents: 16,
     tokenizer_documents: 400}}
layer: 1
marker: "㊥"
prompts:
  av: "<v>{{injection_char}}</v>"
  ar: "<text>{{explanation}}</text>"
data: {{corpus: tiny-world, positions: 4, min_position: 4}}
labels: {{labeler: tiny}}
ar: {{documents: 200, batch_size: 8, lr: 3.0e-3}}
av: {{documents: 200, batch_size: 8, lr: 3.0e-3}}
{RL_SECTION}
eval: {{protocol: tiny-eval-v1, documents: 60}}
export: {{dtype: float32}}
"""

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


class Harness:
    """Runs the command on a small recipe, with and without being killed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = root / "small.yaml"
        self.recipe.write_text(RECIPE, encoding="utf-8")
        started = time.monotonic()
        assert self.train("undisturbed") == 0
        self.seconds = time.monotonic() - started
        self.expected = self.outcome("undisturbed")

    def train(self, name: str, *, kill_after: float | None = None) -> int:
        """Exit code of the command in the run directory `name`; minus nine where it was killed."""
        command = [sys.executable, "-m", "nla_hub", "-q", "train", str(self.recipe), "-o", str(self.root / name)]
        with subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.DEVNULL) as process:
            try:
                return process.wait(kill_after)
            except subprocess.TimeoutExpired:
                process.kill()
                return process.wait()

    def outcome(self, name: str) -> dict[str, Any]:
        """Hashes of the exported weights, and the lines of every stage's metrics.jsonl."""
        place = self.root / name
        weights = sorted((place / "export" / "checkpoint").rglob("*.safetensors"))
        logs = sorted(place.glob("*/metrics.jsonl"))
        return {
            **{str(p.relative_to(place)): hashlib.sha256(p.read_bytes()).hexdigest() for p in weights},
            **{str(p.relative_to(place)): figures(p) for p in logs},
        }

    def check(self, moments: int, *, seed: int) -> None:
        """Kill a run at each of `moments` moments of its time, start it again until it is done, and compare."""
        rng, killed = Random(seed), 0
        for moment in range(moments):
            name, after = f"killed-{seed}-{moment}", rng.uniform(0, self.seconds)
            code = self.train(name, kill_after=after)
            killed += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL), f"exit code {code} before the kill at {after:.1f} s"
            assert self.train(name) == 0, f"killed after {after:.1f} s, not continued"
            assert self.outcome(name) == self.expected, f"killed after {after:.1f} of {self.seconds:.1f} s"
            assert not list((self.root / name).glob("*/state"))
        assert killed > 0, "every run was done before its moment came"


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(tmp_path_factory.mktemp("kill"))


@pytest.mark.train
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_killed_run_ends_as_an_undisturbed_one(harness: Harness) -> None:
    names = " ".join(harness.expected)
    for part in ("av/model", "ar/value_head", "source/model", "fve_reference", "source/metrics", "ar/metrics"):
        assert part in names, f"nothing is compared of {part}"
    moved = [line["policy_update"] for line in harness.expected["rl/metrics.jsonl"] if "policy_update" in line]
    assert len(moved) == 12
    assert sum(update > 0 for update in moved) >= 3, "the rl stage must have something to lose"
    harness.check(3, seed=0)


@pytest.mark.slow
@pytest.mark.train
@pytest.mark.timeout(3600)
def test_a_run_killed_at_many_moments_ends_as_an_undisturbed_one(harness: Harness) -> None:
    harness.check(20, seed=1)
