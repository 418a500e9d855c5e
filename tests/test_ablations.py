"""The ablations of the rl stage: the page is made of its results, these belong to the present recipe, the runner runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the train extra")

from ablations import COMMON, RESULTS, SEEDS, VARIANTS, Scale, Variant, page, read_results, run_all

from nla_hub.resources import PACKAGE
from nla_hub.training.recipe import load_recipe
from nla_hub.training.run import RunDirectory

pytestmark = pytest.mark.train

SMALL = Scale(
    overrides=(
        "av.documents=2", "ar.documents=4", "rl.documents=2", "rl.steps=1", "rl.prompts=4", "rl.group=2",
        "rl.micro_batch=8", "rl.lr=1e-3", "rl.evaluate_rows=16", "rl.evaluate_every=1", "rl.max_new_tokens=40",
        "rl.reward.contrastive=0",
    ),
    judge_rows=16,
    judge_epochs=1,
    max_steps=1,
)  # fmt: skip


def holds(now: object, then: object) -> bool:
    """Whether every setting of `then` still has its value; new ones may have come."""
    if isinstance(now, dict) and isinstance(then, dict):
        return all(name in now and holds(now[name], value) for name, value in then.items())
    return now == then


def test_the_page_is_made_of_the_results() -> None:
    text = page(RESULTS)
    assert (RESULTS.parent / "ablations.md").read_text(encoding="utf-8") == text
    judged = [run["fve"]["judge"] for run in json.loads((RESULTS / "base.json").read_text(encoding="utf-8")).values()]
    assert re.search(
        rf"\| base \|.*\| {sum(judged) / len(judged):.3f} \({', '.join(f'{x:.3f}' for x in judged)}\)", text
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_the_results_are_those_of_the_present_settings(variant: Variant) -> None:
    runs = read_results(RESULTS)[variant.name]
    assert list(runs) == [str(seed) for seed in SEEDS]
    spec = load_recipe("tiny-weak", [*COMMON, *variant.changes]).to_mapping()["rl"]
    for run in runs.values():
        assert holds(spec, run["settings"])
        assert not run["commit"].endswith("-dirty")


def test_the_smallest_run_measures_what_it_trained(tmp_path: Path) -> None:
    """From the packaged pair, so that there are texts; both ARs are the same here, and so are their verdicts."""
    warm = tmp_path / "work" / "seed-0" / "warm"
    start = RunDirectory(warm, load_recipe("tiny-weak", ["seed=0", *SMALL.overrides]))
    for half, places in {"av": ("av/checkpoint",), "ar": ("ar/checkpoint", "ar/watch")}.items():
        for place in places:
            shutil.copytree(PACKAGE / "tiny" / "weights" / half, warm / place)
        start.stage(half).finish({})
    said: list[str] = []
    for _ in range(2):
        run_all(tmp_path, seeds=(0,), variants=VARIANTS[:1], scale=SMALL, say=said.append)
    assert len(said) == 1  # the second time there is nothing to do
    run = json.loads((tmp_path / "base.json").read_text(encoding="utf-8"))["0"]
    assert run["n"] == 16
    assert run["usable"] == 1.0
    assert run["fve"]["own"] > 0.5
    assert run["fve"]["watch"] == pytest.approx(run["fve"]["own"], abs=1e-4)
    assert run["fve"]["judge"] < run["fve"]["own"]  # one step of training
    assert 0 < run["kl"] < 1
    assert run["settings"]["steps"] == 1
