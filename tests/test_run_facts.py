"""What a run says about itself to others: enough for a card, and nothing of the machine it ran on."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nla_hub import resources, yaml_io
from nla_hub.errors import RunError
from nla_hub.evaluation import EvalResult
from nla_hub.publish.staging.run_facts import RunFacts, labels_in_words, public_config, run_facts
from nla_hub.training.machine import device_name, machine_record
from nla_hub.training.processes import Processes
from nla_hub.training.recipe import Recipe, load_recipe, parse_recipe, recipe_names
from nla_hub.training.rl.steps import StepPairs
from nla_hub.training.run import DONE, StageDirectory
from nla_hub.training.stages import stages_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESULT = resources.data_directory("model_cards") / "tiny" / "eval.json"
MACHINE = {
    "processes": 8,
    "devices": ["NVIDIA H100 80GB HBM3"],
    "versions": {"torch": "2.11.0", "transformers": "5.1.0", "tokenizers": None},
}

HOME, ADDRESS, MINE = "/home/somebody", "http://node17.cluster.internal:8000/v1", "sk-abcdefghijklmnop"

PRIVATE = (HOME, "node17", "cluster.internal", "8000", MINE, "somebody")
"""Texts that must not stand in anything that is published."""


def described(recipe: Recipe, identities: Mapping[str, Any]) -> dict[str, Any]:
    """The sidecar of a split of rows, as the data stage writes it."""
    mix = [{"data": part.data, "weight": part.weight, "identity": identities[part.data]} for part in recipe.data.mix]
    return {"kind": "nla_dataset", "schema_version": 1, "stage": "rl", "row_count": 1, "mix": mix}


def write_run(
    place: Path,
    recipe: Recipe,
    *,
    until: str | None = None,
    machine: Mapping[str, Any] | None = MACHINE,
    steps: tuple[int, ...] = (),
    identities: Mapping[str, Any] | None = None,
    rehearsal: bool = False,
) -> Path:
    """A run directory with everything that the facts are read from; `until` is the last stage that is done."""
    place.mkdir(parents=True)
    saved = {**recipe.to_mapping(), **({"rehearsal": True} if rehearsal else {})}
    yaml_io.write_text(place / "config.yaml", yaml_io.dumps(saved))
    names = stages_of(recipe)
    for name in names[: len(names) if until is None else names.index(until) + 1]:
        stage = StageDirectory(place / name)
        stage.begin(recipe)
        summary: dict[str, Any] = {"seconds": 60.0 + names.index(name)}
        if name == "source":
            summary |= {"base": recipe.base.name, "trained": recipe.base.train is not None, "revision": COMMIT}
        if name == "export":
            for half in ("av", "ar"):
                (stage.checkpoint / half).mkdir(parents=True)
        if name == "eval":
            (stage.path / "result.json").write_bytes(RESULT.read_bytes())
        if name == "data" and recipe.data.mix:
            stage.checkpoint.mkdir()
            sidecar = stage.checkpoint / "rl.parquet.nla_meta.yaml"
            yaml_io.write_text(sidecar, yaml_io.dumps(described(recipe, identities or {})))
        if name == "rl":
            for step in steps:
                write_pair(stage, step)
        stage.finish({**summary, **({} if machine is None else {"machine": dict(machine)})})
    return place


def write_pair(stage: StageDirectory, step: int) -> None:
    def keep(place: Path) -> None:
        place.mkdir(parents=True)

    def export(kept: Path, place: Path, step: int) -> None:
        for half in ("av", "ar"):
            (place / half).mkdir()

    StepPairs(stage, step, keep, export).after(step)


def mixed(**labels: Any) -> Recipe:
    """A recipe that names much that is nobody's business."""
    raw = load_recipe("qwen2.5-7b").to_mapping()
    raw["data"]["mix"] = [
        {"data": "hf://datasets/HuggingFaceFW/fineweb-edu", "split": "train", "column": "text"},
        {"data": f"{HOME}/texts/secret-project.jsonl"},
        {"data": "shelf/own.jsonl"},
        {"data": "allenai/WildChat-1M@abc", "messages": "conversation"},
    ]
    raw["labels"] = labels or {
        "labeler": "openai",
        "settings": {
            "model": f"{HOME}/models/labeler-70b",
            "base_url": ADDRESS,
            "api_key_env": "SOMEBODY_KEY",
            "cache": "~somebody/cache",
            "template": "/no path: {snippet}",
            "options": {"headers": {"x-api-key": MINE}, "top_p": 0.9, "proxy": "node17:8000"},
        },
    }  # fmt: skip
    return parse_recipe(raw)


IDENTITIES = {
    "hf://datasets/HuggingFaceFW/fineweb-edu": {"repository": "HuggingFaceFW/fineweb-edu", "commit": COMMIT},
    f"{HOME}/texts/secret-project.jsonl": {"files": [{"name": "secret-project.jsonl", "sha256": "ab"}]},
    "shelf/own.jsonl": {"files": [{"name": "own.jsonl", "sha256": "cd"}]},
    "allenai/WildChat-1M@abc": {"repository": "allenai/WildChat-1M", "commit": COMMIT[::-1]},
}


# -- a finished run ------------------------------------------------------------------------------------------


def test_a_finished_run_says_all_of_it(tmp_path: Path) -> None:
    recipe = load_recipe("qwen2.5-7b", ["data.corpus=tiny-world", "data.mix=[]", "labels.labeler=tiny"])
    run = write_run(tmp_path / "run", recipe, steps=(1000, 400))
    facts = run_facts(run)
    assert facts.run == run
    assert facts.pair == run / "export" / "checkpoint"
    assert (facts.recipe.name, facts.recipe.hash) == ("qwen2.5-7b", recipe.digest())
    assert facts.recipe.resolved == {**recipe.to_mapping()}, "nothing in it is private"
    assert facts.recipe.corpora == ()
    assert (facts.base_model, facts.base_revision, facts.base_made_here) == ("Qwen/Qwen2.5-7B-Instruct", COMMIT, False)
    expected = EvalResult.from_dict(json.loads(RESULT.read_text(encoding="utf-8")))
    assert facts.evaluation == expected
    assert facts.score == expected.score()
    assert facts.score_mean_norm == expected.score("mean_norm")
    assert facts.score is not None
    assert facts.score.value == expected.fve.value
    assert list(facts.steps) == ["step-000400", "step-001000"]
    assert facts.steps["step-000400"] == run / "rl" / "steps" / "step-000400"
    assert facts.effort.stage_seconds == {name: 60.0 + i for i, name in enumerate(stages_of(recipe))}
    assert (facts.effort.processes, facts.effort.device) == (8, "NVIDIA H100 80GB HBM3")
    assert facts.effort.gpu_hours == pytest.approx(8 * (7 * 60 + 21) / 3600)
    assert facts.versions == {"torch": "2.11.0", "transformers": "5.1.0"}
    assert facts.unfinished == ()
    assert not facts.rehearsal


def test_reading_needs_no_torch_and_no_right_to_write(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", load_recipe("tiny"), until="export")
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))}
    for path in before:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    code = (
        "import sys; from pathlib import Path; import nla_hub.publish.staging.run_facts as module; "
        "assert 'torch' not in sys.modules; module.read_run(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, timeout=120)
    facts = run_facts(run)
    for path in before:
        path.chmod(path.stat().st_mode | stat.S_IWUSR)
    assert facts.evaluation is None
    assert facts.score is None
    assert {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))} == before


def test_a_stage_that_was_continued_counts_its_earlier_attempts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", load_recipe("tiny"))
    StageDirectory(run / "rl").log({"step": 40, "steps": 40, "reward": 1.0, "seconds": 5000.0})
    StageDirectory(run / "av").log({"step": 1, "steps": 40, "loss": 1.0, "seconds": 3.0})
    seconds = run_facts(run).effort.stage_seconds
    assert seconds["rl"] == 5000.0, "DONE has the seconds of the last attempt alone"
    assert seconds["av"] == 63.0


# -- what is not known ---------------------------------------------------------------------------------------


def test_a_run_of_before_records_has_no_machine(tmp_path: Path) -> None:
    facts = run_facts(write_run(tmp_path / "run", load_recipe("tiny"), machine=None))
    assert (facts.effort.processes, facts.effort.device, facts.effort.gpu_hours) == (None, None, None)
    assert facts.effort.stage_seconds["rl"] == 64.0
    assert facts.versions == {}


def change(run: Path, stage: str, **values: Any) -> None:
    """Write other values into a stage's DONE."""
    path = run / stage / DONE
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_stages_on_different_machines_are_not_taken_for_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", load_recipe("tiny"))
    change(run, "data", machine={**MACHINE, "processes": 1, "devices": ["NVIDIA H200"]})
    effort = run_facts(run).effort
    assert (effort.processes, effort.gpu_hours) == (None, None)
    assert effort.device == "NVIDIA H100 80GB HBM3, NVIDIA H200"
    change(run, "data", machine=None)
    assert run_facts(run).effort.device is None, "one stage does not say where it ran"


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ({"model": "tiny-world", "train": {}}, (None, None, True)),
        ({"model": "./somewhere/base", "train": None}, (None, None, False)),
        ({"model": "owner/base", "train": None}, ("owner/base", COMMIT, False)),
        ({"model": "owner/base@main", "train": None}, ("owner/base", COMMIT, False)),
    ],
)
def test_only_what_the_hub_has_is_a_base_model(tmp_path: Path, base: dict[str, Any], expected: Any) -> None:
    raw = load_recipe("tiny").to_mapping()
    raw["base"] |= base
    facts = run_facts(write_run(tmp_path / "run", parse_recipe(raw)))
    assert (facts.base_model, facts.base_revision, facts.base_made_here) == expected


@pytest.mark.parametrize("revision", [None, "main", "sha256:" + COMMIT, COMMIT[:-1], COMMIT.upper()])
def test_only_a_commit_pins_a_base_model(tmp_path: Path, revision: str | None) -> None:
    run = write_run(tmp_path / "run", load_recipe("qwen2.5-7b", ["data.mix=[]", "data.corpus=tiny-world"]))
    change(run, "source", revision=revision)
    assert run_facts(run).base_revision is None


def test_what_is_unfinished_is_said(tmp_path: Path) -> None:
    recipe = load_recipe("tiny")
    run = write_run(tmp_path / "run", recipe, until="av", rehearsal=True)
    stage = StageDirectory(run / "rl")
    stage.begin(recipe)
    stage.log({"step": 7, "steps": 40, "reward": 1.0, "seconds": 12.5})
    write_pair(stage, 5)
    (stage.steps / ".step-000006").mkdir()
    facts = run_facts(run)
    assert facts.unfinished == (
        "The stage 'rl' is not done: it came to step 7 of 40.",
        "The stage 'export' has not begun.",
        "The stage 'eval' has not begun.",
    )
    assert facts.pair is None
    assert facts.evaluation is None
    assert list(facts.steps) == ["step-000005"]
    assert facts.effort.stage_seconds["rl"] == 12.5
    assert facts.rehearsal
    assert facts.recipe.hash == recipe.digest()
    plain = write_run(tmp_path / "plain", load_recipe("tiny", ["rl=null"]), until="data")
    assert not any("'rl'" in line for line in run_facts(plain).unfinished)


# -- faults --------------------------------------------------------------------------------------------------


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mixed(), identities=IDENTITIES)
    (run / "ar" / DONE).write_text("{", encoding="utf-8")
    (run / "eval" / "result.json").write_text('{"format": 1}', encoding="utf-8")
    (run / "export" / "checkpoint" / "ar").rmdir()
    (run / "data" / "checkpoint" / "rl.parquet.nla_meta.yaml").write_bytes(b"\xff\xfe")
    config = yaml_io.read(run / "config.yaml", error=RunError)
    del config["base"]["model"], config["name"]
    yaml_io.write_text(run / "config.yaml", yaml_io.dumps(config))
    with pytest.raises(RunError) as caught:
        run_facts(run)
    told = str(caught.value)
    for part in ("ar/DONE", "eval/result.json", "export/checkpoint/ar", "rl.parquet", "base.model", "name is missing"):
        assert part in told
    assert len(caught.value.faults) == 6


@pytest.mark.parametrize("damage", ["absent", "text"])
def test_an_evaluation_that_is_not_there_is_a_fault(tmp_path: Path, damage: str) -> None:
    run = write_run(tmp_path / "run", load_recipe("tiny"))
    path = run / "eval" / "result.json"
    path.unlink() if damage == "absent" else path.write_text("no json", encoding="utf-8")
    with pytest.raises(RunError, match=r"eval/result\.json"):
        run_facts(run)


def test_anything_else_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not the directory of a run"):
        run_facts(tmp_path)


# -- nothing of the machine ----------------------------------------------------------------------------------


def shown(facts: RunFacts) -> str:
    """Everything in the facts that a card could show."""
    return json.dumps([facts.recipe.resolved, facts.recipe.corpora, facts.recipe.labels, dict(facts.corpora_commits)])


def test_paths_addresses_and_keys_become_words(tmp_path: Path) -> None:
    recipe = mixed()
    facts = run_facts(write_run(tmp_path / "run", recipe, identities=IDENTITIES))
    assert [part for part in PRIVATE if part.lower() in shown(facts).lower()] == []
    resolved = facts.recipe.resolved
    assert [part["data"] for part in resolved["data"]["mix"]] == [
        "hf://datasets/HuggingFaceFW/fineweb-edu",
        "a local file",
        "a local file",
        "allenai/WildChat-1M@abc",
    ]
    assert resolved["data"]["mix"][0]["column"] == "text"
    assert facts.recipe.corpora == ("HuggingFaceFW/fineweb-edu", "allenai/WildChat-1M")
    assert facts.corpora_commits == {"HuggingFaceFW/fineweb-edu": COMMIT, "allenai/WildChat-1M": COMMIT[::-1]}
    settings = resolved["labels"]["settings"]
    assert settings["template"] == "/no path: {snippet}", "a text is no path"
    assert settings["options"]["top_p"] == 0.9
    assert facts.recipe.labels == "the model a local directory, behind a chat endpoint"
    assert resolved["prompts"] == recipe.to_mapping()["prompts"]
    assert facts.recipe.hash == recipe.digest()


def test_documents_whose_origin_was_not_recorded_are_not_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", mixed(), identities=IDENTITIES)
    (run / "data" / "checkpoint" / "rl.parquet.nla_meta.yaml").unlink()
    facts = run_facts(run)
    assert facts.recipe.corpora == ()
    assert {part["data"] for part in facts.recipe.resolved["data"]["mix"]} == {"a local file"}


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_stay_as_they_are(name: str) -> None:
    saved = load_recipe(name).to_mapping()
    assert public_config(saved, frozenset(part["data"] for part in saved["data"]["mix"])) == saved


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/srv/models/x", "a local directory"),
        ("~/models", "a local directory"),
        ("./x", "a local directory"),
        ("..", "a local directory"),
        (r"C:\models", "a local directory"),
        (r"\\server\share", "a local directory"),
        ("file:///srv", "a local directory"),
        ("https://10.0.0.7/v1", "an address"),
        ("localhost:8000", "an address"),
        ("owner/name", "owner/name"),
        ("owner/name:train", "owner/name:train"),
        ("hf://datasets/owner/name", "hf://datasets/owner/name"),
        ("...", "..."),
        ("two-thirds", "two-thirds"),
    ],
)
def test_values_of_a_plug_in_are_judged_by_their_look(value: str, expected: str) -> None:
    found = public_config({"labels": {"settings": {"deep": [{"value": value}]}}})
    assert found["labels"]["settings"]["deep"] == [{"value": expected}]


@pytest.mark.parametrize(
    ("key", "kept"),
    [
        ("api_key", False),
        ("token", False),
        ("max_output_tokens", True),
        ("X-Api-Key", False),
        ("Authorization", False),
        ("monkey", True),
    ],
)
def test_keys_are_not_shown(key: str, kept: bool) -> None:
    found = public_config({"settings": {key: "value", "headers": {"any": "value"}}})
    assert found["settings"] == {key: "value" if kept else "not shown", "headers": "not shown"}


@pytest.mark.parametrize(
    ("section", "summary", "expected"),
    [
        ({}, {}, None),
        ({"labeler": "tiny", "settings": {}}, {}, "the tiny world's documents themselves, whose facts are known"),
        (
            {"labeler": "source"},
            {"labels": {"labels": 1200, "labels_wanted": 1250}},
            "the explained model itself, asked about its own reading; 1,200 of 1,250 were usable",
        ),
        ({"labeler": "nla", "settings": {"nla": "qwen2.5-7b"}}, {}, "an existing pair (qwen2.5-7b)"),
        ({"labeler": "nla", "settings": {"nla": f"{HOME}/pair"}}, {}, "an existing pair (a local directory)"),
        (
            {"labeler": "anthropic", "settings": {"model": "some-model"}},
            {},
            "the model some-model, through Anthropic's message batches",
        ),
        ({"labeler": "mine"}, {}, "the labeler 'mine' of a plug-in"),
    ],
)
def test_labels_are_said_in_words(section: Any, summary: Any, expected: str | None) -> None:
    assert labels_in_words(section, summary) == expected


# -- what training records -----------------------------------------------------------------------------------


def test_a_record_says_what_kind_of_machine_it_was_and_not_which() -> None:
    record = machine_record(Processes())
    assert record["processes"] == 1
    assert record["devices"] == [device_name()]
    assert {"torch", "transformers", "python"} <= record["versions"].keys()
    assert os.uname().nodename not in json.dumps(record)


def test_a_record_has_the_devices_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, "another", value])
    assert machine_record(Processes(0, 3)) | {"versions": {}} == {
        "processes": 3,
        "devices": sorted([device_name(), "another"]),
        "versions": {},
    }
