"""Pairs of earlier steps (`rl.export_every`): whole, loadable, part of one training, and without any effect on it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import Silent, small_recipe
from test_training_lora import LORA, Killed
from test_training_lora import run_recipe as lora_recipe
from test_training_processes import environments

from nla_hub.errors import RecipeError, RunError
from nla_hub.nla import NLA
from nla_hub.pretrained import LoadOptions, load_causal_lm
from nla_hub.publish.staging.run_facts import run_facts
from nla_hub.sidecar import Sidecar
from nla_hub.training import pair_export
from nla_hub.training.lora_training import add_factors, carries_factors, factors
from nla_hub.training.machine import device_name
from nla_hub.training.pipeline import Pipeline
from nla_hub.training.planning.plan import Plan
from nla_hub.training.recipe import PlacementSpec, Recipe, load_recipe, recipe_names
from nla_hub.training.rehearsal import rehearsed
from nla_hub.training.rl.stage import Conductor
from nla_hub.training.rl.steps import StepPairs
from nla_hub.training.run import DONE, RunDirectory, StageDirectory, step_name, step_number, step_pairs
from nla_hub.training.sharding import whole_model

LONG = pytest.mark.long

BEFORE = ("source", "data", "ar", "av")

DIGESTS = {
    "any-model": "ec172b35",
    "gemma-3-12b": "71b27d0a",
    "gemma-3-12b-lora": "b3346a3f",
    "gemma-3-27b": "25722c5c",
    "gemma-3-27b-lora": "dcd2b644",
    "llama-3.3-70b": "81e361a8",
    "llama-3.3-70b-lora": "9da45ad0",
    "qwen2.5-7b": "dbbe19f5",
    "qwen2.5-7b-lora": "d3fc9ecd",
    "tiny": "e14ded75",
    "tiny-weak": "12a51684",
}
"""Of the packaged recipes, as they were before there was `rl.export_every`: directories of runs are named by them."""


def recipe_of(kind: str, **rl: Any) -> Recipe:
    """A recipe of six steps at a constant rate; a checkpoint after the third."""
    wanted = {"steps": 6, "checkpoint_every": 3, "evaluate_every": 6, "export_every": 2, **rl}
    recipe = lora_recipe()
    assert recipe.rl is not None
    spec = dataclasses.replace(recipe.rl, **wanted)
    if kind == "lora":
        return dataclasses.replace(recipe, rl=spec)
    spec = dataclasses.replace(spec, lora=LORA if kind == "rl.lora" else None)
    parts = {name: getattr(recipe, name) for name in ("data", "ar", "av", "eval", "export")}
    return small_recipe(**parts, rl=spec)


class Runs:
    """Runs of one kind that share what comes before their rl stage."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[str, Path] = {}

    def before(self, kind: str) -> Path:
        """A run whose rl stage comes next; `rl.lora` begins as full weights do."""
        base = "lora" if kind == "lora" else "full"
        name = f"{base}-before"
        if name not in self.made:
            recipe = recipe_of(base)
            Pipeline(recipe, RunDirectory(self.root / name, recipe), Silent()).execute(BEFORE)
            self.made[name] = self.root / name
        return self.made[name]

    def begin(self, kind: str, name: str, **rl: Any) -> Pipeline:
        """A run of its own, about to enter its rl stage."""
        recipe = recipe_of(kind, **rl)
        run = RunDirectory(self.root / name, recipe)
        for stage in BEFORE:
            shutil.copytree(self.before(kind) / stage, run.path / stage)
        return Pipeline(recipe, run, Silent())

    def whole(self, kind: str, **rl: Any) -> Path:
        """The directory of a run that was not disturbed, with its exported pair."""
        name = "-".join([kind, *(f"{key}={value}" for key, value in rl.items())])
        if name not in self.made:
            pipeline = self.begin(kind, name, **rl)
            pipeline.execute(("rl", "export"))
            self.made[name] = pipeline.run.path
        return self.made[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("steps"))


def again(pipeline: Pipeline) -> Pipeline:
    """The same command once more."""
    return Pipeline(pipeline.recipe, RunDirectory(pipeline.run.path, pipeline.recipe), Silent())


def steps_of(run: Path) -> dict[str, Path]:
    return dict(step_pairs(StageDirectory(run / "rl")))


def content(place: Path) -> dict[str, str]:
    """Every file below a directory with the hash of its bytes."""
    files = sorted(path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# -- the setting ---------------------------------------------------------------------------------------------


def test_recipes_without_it_keep_their_hash_and_their_saved_form() -> None:
    assert {name: load_recipe(name).digest() for name in recipe_names()} == DIGESTS
    plain = load_recipe("tiny")
    assert "export_every" not in plain.to_mapping()["rl"]
    assert load_recipe("tiny", ["rl.export_every=null"]).to_mapping() == plain.to_mapping()
    some = load_recipe("tiny", ["rl.export_every=10"])
    assert some.to_mapping()["rl"]["export_every"] == 10
    assert some.digest() != plain.digest()


@pytest.mark.parametrize("value", ["0", "-5", "2.5", "often"])
def test_values_that_are_no_number_of_steps_are_refused(value: str) -> None:
    with pytest.raises(RecipeError, match=r"rl\.export_every"):
        load_recipe("tiny", [f"rl.export_every={value}"])


def test_a_rehearsal_writes_one_after_every_step() -> None:
    cut, said = rehearsed(load_recipe("tiny", ["rl.export_every=10"]))
    assert cut.rl is not None
    assert cut.rl.export_every == 1
    assert "rl.export_every: 10 -> 1" in said
    assert not any("export_every" in line for line in rehearsed(load_recipe("tiny"))[1])


def test_the_plan_tells_what_they_take_of_the_disk() -> None:
    plain = Plan.of(load_recipe("qwen2.5-7b")).disk
    found = Plan.of(load_recipe("qwen2.5-7b", ["rl.export_every=1000"])).disk
    assert "rl_steps" not in plain
    assert found["rl_steps"] == 4 * plain["export"] + plain["rl"]
    assert {name: n for name, n in found.items() if name != "rl_steps"} == plain
    assert Plan.of(load_recipe("qwen2.5-7b", ["rl.export_every=9000"])).disk["rl_steps"] == 0


# -- what is written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=LONG), pytest.param("rl.lora", marks=LONG)])
def test_pairs_are_written_as_the_finished_one_is_and_change_nothing(runs: Runs, kind: str) -> None:
    run, plain = runs.whole(kind), runs.whole(kind, export_every=None)
    found = steps_of(run)
    assert list(found) == ["step-000002", "step-000004", "step-000006"]
    assert sorted(path.name for path in (run / "rl" / "steps").iterdir()) == list(found), "nothing else is left there"
    assert not (plain / "rl" / "steps").exists()
    assert content(run / "rl" / "checkpoint") == content(plain / "rl" / "checkpoint"), "the training was disturbed"
    pair = content(run / "export" / "checkpoint")
    last = content(found["step-000006"])
    assert last.pop(DONE)
    assert last == pair
    assert {name.split("/")[0] for name in pair} == {"av", "ar"}
    first = content(found["step-000002"])
    assert first.keys() - {DONE} == pair.keys()
    assert first["av/model.safetensors"] != last["av/model.safetensors"]
    assert first["ar/value_head.safetensors"] != last["ar/value_head.safetensors"]


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=LONG)])
def test_the_pair_of_a_step_is_that_of_a_run_with_so_many_steps(runs: Runs, kind: str) -> None:
    shorter = runs.whole(kind, steps=2, evaluate_every=2, export_every=None) / "export" / "checkpoint"
    early = steps_of(runs.whole(kind))["step-000002"]
    for half in ("av", "ar"):
        weights = {n: h for n, h in content(early / half).items() if n.endswith(".safetensors")}
        assert weights == {n: h for n, h in content(shorter / half).items() if n.endswith(".safetensors")}
        assert weights


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=LONG)])
def test_a_pair_says_what_it_is_and_loads(runs: Runs, kind: str) -> None:
    place = steps_of(runs.whole(kind))["step-000004"]
    done = json.loads((place / DONE).read_text(encoding="utf-8"))
    assert done["step"] == 4
    assert done["bytes"]["av"] == sum(path.stat().st_size for path in (place / "av").iterdir())
    config = json.loads((place / "av" / "config.json").read_text(encoding="utf-8"))
    assert config.get("use_cache", True), "a setting of the training, not of the model"
    base = Path(recipe_of(kind).base.name)
    for half in ("av", "ar"):
        sidecar = Sidecar.read(place / half)
        assert (sidecar.role, sidecar.stage) == (half, "rl")
        assert sidecar.extra["training"]["rl_steps"] == 4
        assert sidecar.fve is None, "nothing was measured on these weights"
        assert not list((place / half).glob("adapter_*")), "factors are merged, as in the finished pair"
    with NLA.from_pretrained(place, base_model=base) as nla:
        (row,) = nla.explain("otto sails a red kite", positions=[3], temperature=0, max_new_tokens=4)
        assert nla.reconstruct(["a kite"]).isfinite().all()
    assert row.norm is not None


def test_the_run_says_where_it_ran_and_which_steps_it_has(runs: Runs) -> None:
    facts = run_facts(runs.whole("full"))
    assert (facts.effort.processes, facts.effort.device) == (1, device_name())
    assert facts.effort.stage_seconds.keys() == {*BEFORE, "rl", "export"}
    assert facts.versions["torch"].startswith(torch.__version__.partition("+")[0])
    assert list(facts.steps) == ["step-000002", "step-000004", "step-000006"]
    assert facts.unfinished == ("The stage 'eval' has not begun.",)


# -- killed and continued ------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from test_rl_steps import interrupting, recipe_of
from test_training import Silent
from nla_hub.training import pair_export
from nla_hub.training.lora_training import add_factors, carries_factors, factors
from nla_hub.training.pipeline import Pipeline
from nla_hub.training.run import RunDirectory

recipe = recipe_of(sys.argv[2])
pair_export.save_ar = interrupting(lambda: os.kill(os.getpid(), signal.SIGKILL))
Pipeline(recipe, RunDirectory(Path(sys.argv[1]), recipe), Silent()).execute(("rl",))
"""

ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent)}


def interrupting(stop: Callable[[], Any]) -> Callable[..., None]:
    """`save_ar` that calls `stop` when both halves of the third pair are there and its DONE is not."""
    written: list[int] = []
    write = pair_export.save_ar

    def save_ar(*args: Any, **options: Any) -> None:
        write(*args, **options)
        written.append(1)
        if len(written) == 3:
            stop()

    return save_ar


def raise_killed() -> None:
    raise Killed


def check_continued(runs: Runs, kind: str, pipeline: Pipeline) -> None:
    """After `interrupting`: what is unfinished is no pair, and the run ends as one that was not disturbed."""
    place = pipeline.run.path
    steps = place / "rl" / "steps"
    assert {path.name for path in steps.iterdir()} == {"step-000002", "step-000004", ".step-000006"}
    assert list(steps_of(place)) == ["step-000002", "step-000004"]
    kept = {path: path.stat().st_ino for path in steps.glob("step-000002/*/model.safetensors")}
    spoil(steps / "step-000004")
    again(pipeline).execute(("rl", "export"))
    assert content(steps) == content(runs.whole(kind) / "rl" / "steps"), "a step after the checkpoint is written again"
    assert content(place / "export" / "checkpoint") == content(runs.whole(kind) / "export" / "checkpoint")
    assert len(kept) == 2
    assert all(path.stat().st_ino == number for path, number in kept.items()), "one before it is not"


def spoil(pair: Path) -> None:
    """Make a pair one that was written in a training that was given up."""
    (pair / "av" / "model.safetensors").write_bytes(b"of other weights")


@pytest.mark.parametrize("kind", ["full", pytest.param("rl.lora", marks=LONG)])
def test_a_run_that_was_stopped_while_it_wrote_one_ends_with_the_same_pairs(
    runs: Runs, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = runs.begin(kind, f"{kind}-stopped")
    with monkeypatch.context() as patched:
        patched.setattr(pair_export, "save_ar", interrupting(raise_killed))
        with pytest.raises(Killed):
            pipeline.execute(("rl",))
    check_continued(runs, kind, pipeline)


@LONG
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_that_was_killed_while_it_wrote_one_ends_with_the_same_pairs(runs: Runs, kind: str) -> None:
    pipeline = runs.begin(kind, f"{kind}-killed")
    command = [sys.executable, "-c", KILLED, str(pipeline.run.path), kind]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL
    check_continued(runs, kind, pipeline)


def stopping(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Stop the rl stage when its `at`-th step is finished, its pair written and its checkpoint not."""
    after_step = Conductor.after_step

    def stopped(self: Conductor, logs: Any) -> Any:
        found = after_step(self, logs)
        if self.done == at:
            raise Killed
        return found

    monkeypatch.setattr(Conductor, "after_step", stopped)


@LONG
@pytest.mark.parametrize(("at", "left"), [(2, ["step-000002"]), (6, ["step-000002", "step-000004", "step-000006"])])
def test_pairs_after_the_checkpoint_are_written_again(
    runs: Runs, at: int, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = runs.begin("full", f"stopped-{at}")
    place = pipeline.run.path
    with monkeypatch.context() as patched:
        stopping(patched, at)
        with pytest.raises(Killed):
            pipeline.execute(("rl",))
    assert list(steps_of(place)) == left
    for name in left if at == 2 else left[1:]:  # at 2 there is no checkpoint yet
        spoil(steps_of(place)[name])
    again(pipeline).execute(("rl",))
    assert content(place / "rl" / "steps") == content(runs.whole("full") / "rl" / "steps")


@LONG
def test_a_pair_that_cannot_be_written_leaves_nothing_and_is_written_when_it_can(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = runs.begin("full", "no-room")
    place = pipeline.run.path

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(pair_export, "save_ar", full)
        with pytest.raises(RunError, match="cannot be written"):
            pipeline.execute(("rl",))
    assert list((place / "rl" / "steps").iterdir()) == []
    again(pipeline).execute(("rl",))
    assert content(place / "rl" / "steps") == content(runs.whole("full") / "rl" / "steps")


# -- several processes ---------------------------------------------------------------------------------------

SHARDED = """
import sys
from pathlib import Path
from test_rl_steps import sharded_recipe
from test_training import Silent
from nla_hub.training.pipeline import Pipeline
from nla_hub.training.processes import Processes
from nla_hub.training.run import RunDirectory

processes = Processes.here()
recipe = sharded_recipe(sys.argv[2])
stages = ("source", "data", "ar", "av", "rl", "export")
Pipeline(recipe, RunDirectory(Path(sys.argv[1]), recipe, processes=processes), Silent()).execute(stages)
processes.close()
"""


def sharded_recipe(kind: str) -> Recipe:
    recipe = recipe_of(kind, steps=2, evaluate_every=2, checkpoint_every=1, export_every=1)
    placement = PlacementSpec(av="sharded", ar="sharded")
    return dataclasses.replace(recipe, hardware=dataclasses.replace(recipe.hardware, placement=placement))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["full", "lora", "rl.lora"])
def test_sharded_halves_are_written_as_the_finished_pair_is(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "run"), kind]
    tests = {"PYTHONPATH": str(Path(__file__).parent)}
    started = [subprocess.Popen(command, env={**e, **tests}) for e in environments(2)]
    assert [process.wait(600) for process in started] == [0, 0]
    found = steps_of(tmp_path / "run")
    assert list(found) == ["step-000001", "step-000002"]
    last = content(found["step-000002"])
    assert last.pop(DONE)
    assert last == content(tmp_path / "run" / "export" / "checkpoint")
    facts = run_facts(tmp_path / "run")
    assert (facts.effort.processes, facts.effort.device) == (2, device_name())


# -- weights that go on being trained ------------------------------------------------------------------------


def test_merging_for_a_pair_leaves_the_factors_where_they_are() -> None:
    directory = Path(recipe_of("full").base.name)
    model = add_factors(load_causal_lm(directory, LoadOptions(device_map={"": "cpu"})).model, LORA, seed=1)
    for value in factors(model).values():
        torch.nn.init.normal_(value, std=0.1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    whole = whole_model(model, keep=True)
    assert carries_factors(model)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    merged = copy.deepcopy(model).merge_and_unload().state_dict()  # peft's own way
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, merged[name], atol=1e-6, rtol=1e-6)
    assert whole.state_dict().keys() == merged.keys()


# -- the folder ----------------------------------------------------------------------------------------------


def pairs_in(path: Path, every: int | None) -> StepPairs:
    def keep(place: Path) -> None:
        (place / "av").mkdir(parents=True)

    def export(kept: Path, place: Path, step: int) -> None:
        assert (kept / "av").is_dir()
        for half in ("av", "ar"):
            (place / half).mkdir()
            (place / half / "weights").write_text(f"{step} of {half}")

    return StepPairs(StageDirectory(path), every, keep, export)


def written(place: Path, every: int | None, steps: int) -> list[str]:
    pairs = pairs_in(place, every)
    for step in range(1, steps + 1):
        pairs.after(step)
    return list(step_pairs(StageDirectory(place)))


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [(None, 9, []), (4, 3, []), (4, 9, [4, 8]), (1, 3, [1, 2, 3]), (400_000, 1_200_000, [400_000, 800_000, 1_200_000])],
)
def test_every_so_many_steps(tmp_path: Path, every: int | None, steps: int, expected: list[int]) -> None:
    if steps > 100:
        for step in expected:
            pairs_in(tmp_path, every).after(step)
        found = list(step_pairs(StageDirectory(tmp_path)))
    else:
        found = written(tmp_path, every, steps)
    assert found == [step_name(step) for step in expected]
    assert [step_number(name) for name in found] == expected


@pytest.mark.parametrize("last", [-1, 0, 3, 4, 8])
def test_cutting_keeps_what_was_before(tmp_path: Path, last: int) -> None:
    assert written(tmp_path, 2, 8) == [step_name(n) for n in (2, 4, 6, 8)]
    (tmp_path / "steps" / ".step-000010" / "kept").mkdir(parents=True)
    pairs_in(tmp_path, 2).cut(last)
    assert list(step_pairs(StageDirectory(tmp_path))) == [step_name(n) for n in (2, 4, 6, 8) if n <= last]
    assert not list((tmp_path / "steps").glob(".*"))


def test_a_folder_without_its_mark_is_no_pair(tmp_path: Path) -> None:
    written(tmp_path, 2, 4)
    (tmp_path / "steps" / "step-000004" / DONE).unlink()
    (tmp_path / "steps" / "step-old").mkdir()
    (tmp_path / "steps" / "step-old" / DONE).touch()
    assert list(step_pairs(StageDirectory(tmp_path))) == ["step-000002"]


def test_only_the_main_process_exports(tmp_path: Path) -> None:
    calls: list[str] = []

    class Second:
        """What a second process sees of `Processes`: the main one does what is said, elsewhere."""

        is_main = False

        def on_main(self, action: Callable[[], Any]) -> None:
            calls.append("waited")

    pairs = dataclasses.replace(pairs_in(tmp_path, 1), processes=Second(), keep=lambda _: calls.append("kept"))  # type: ignore[arg-type]
    pairs.after(1)
    assert calls == ["waited", "kept", "waited"], "all processes gather the weights, one of them writes"
