"""What lies at a place: runs, pairs, halves, data sets; what is missing is said at once, and nothing is changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from test_bundle import tree
from wild import World, one_directory, run_folders, two_directories

from nla_hub.errors import PublishError
from nla_hub.publish.staging import bundle
from nla_hub.publish.staging.found import Found, find

STAGES = ("source", "data", "ar", "av", "rl", "export", "eval")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair") / "pair"
    one_directory(World(), root)
    return root


@pytest.fixture
def run(pair: Path, tmp_path: Path) -> Path:
    """A run directory as far as its file names go."""
    place = tmp_path / "run"
    place.mkdir()
    config(place)
    for stage in STAGES:
        (place / stage).mkdir()
        (place / stage / "DONE").write_text("{}")
    shutil.copytree(pair, place / "export" / "checkpoint")
    return place


def config(place: Path, **changes: object) -> None:
    mapping = {"name": "mine", "base": {"model": "owner/base"}, "layer": 2, "rl": {"steps": 3}, **changes}
    (place / "config.yaml").write_text(yaml.safe_dump(mapping))


def test_a_run_is_its_exported_pair(run: Path) -> None:
    before = tree(run)
    found = find(run)
    exported = run / "export" / "checkpoint"
    assert (found.kind, found.run, found.av, found.ar) == ("run", run, exported / "av", exported / "ar")
    assert (found.base, found.base_model, found.factors, dict(found.steps)) == (None, None, {}, {})
    (exported / "source").mkdir()
    assert find(run).base_model == str(exported / "source")
    (exported / "source").rmdir()
    assert set(tree(run)) == set(before)


def test_a_run_that_is_not_finished_names_every_stage_that_is_missing(run: Path) -> None:
    for stage in ("av", "rl", "eval"):
        (run / stage / "DONE").unlink()
    with pytest.raises(PublishError, match="not finished") as refused:
        find(run)
    assert refused.value.faults == tuple(f"the stage {name!r} is not done" for name in ("av", "rl", "eval"))
    assert "nla-hub train mine -o" in str(refused.value)


def test_a_run_that_lacks_its_score_alone_is_told_of_the_other_way(run: Path) -> None:
    (run / "eval" / "DONE").unlink()
    with pytest.raises(PublishError, match="without a score"):
        find(run)
    assert find(run / "export" / "checkpoint").kind == "pair"


def test_a_run_without_rl_needs_no_such_stage(run: Path) -> None:
    shutil.rmtree(run / "rl")
    config(run, rl=None)
    assert find(run).kind == "run"


def test_an_exported_pair_that_was_moved_away(run: Path) -> None:
    shutil.rmtree(run / "export" / "checkpoint" / "ar")
    with pytest.raises(PublishError, match="without ar/"):
        find(run)


@pytest.mark.parametrize("rl", [{"steps": 3}, None])
def test_a_run_of_factors_knows_where_they_are(run: Path, rl: object) -> None:
    config(run, lora={"r": 4}, rl=rl)
    expected = {"av": run / "rl/checkpoint/av", "ar": run / "rl/checkpoint/ar"}
    if rl is None:
        expected = {"av": run / "av/checkpoint", "ar": run / "ar/checkpoint"}
    assert find(run).factors == expected


def test_steps_are_those_that_are_complete(run: Path) -> None:
    for name, done in (("step-000200", True), ("step-000400", True), ("step-000600", False), (".step-000800", True)):
        place = run / "rl" / "steps" / name
        place.mkdir(parents=True)
        if done:
            (place / "DONE").write_text("{}")
    assert list(find(run).steps) == ["step-000200", "step-000400"]


def test_pairs_in_every_layout_that_has_one(pair: Path, tmp_path: Path) -> None:
    world = World()
    both = find(pair)
    assert (both.kind, both.av, both.ar) == ("pair", pair / "av", pair / "ar")
    assert both.require_pair() == (pair / "av", pair / "ar")
    two_directories(world, tmp_path)
    for place in (tmp_path / "x-av", tmp_path / "x-ar", pair / "av", pair / "ar"):
        found = find(place)
        assert found.kind == "pair"
        assert found.av is not None
        assert found.ar is not None
        assert {found.av.name, found.ar.name} in ({"x-av", "x-ar"}, {"av", "ar"})
    run_folders(world, tmp_path / "strange")
    assert find(tmp_path / "strange" / "iter_0000200").kind == "pair"
    with pytest.raises(PublishError, match="Several folders may be the AV"):
        find(tmp_path / "strange")


def test_one_half_is_told_from_a_pair(pair: Path, tmp_path: Path) -> None:
    for role, other in (("av", "AR"), ("ar", "AV")):
        shutil.copytree(pair / role, tmp_path / "alone" / role)
        found = find(tmp_path / "alone")
        assert found.kind == "half"
        with pytest.raises(PublishError, match=f"the {other} as well"):
            found.require_pair()
        shutil.rmtree(tmp_path / "alone")


def test_two_candidates_are_listed(pair: Path, tmp_path: Path) -> None:
    for name in ("one-av", "two-av"):
        shutil.copytree(pair / "av", tmp_path / name)
    shutil.copytree(pair / "ar", tmp_path / "one-ar")
    for name in ("one-av", "two-av"):
        assert (tmp_path / name / "nla_meta.yaml").is_file()
    with pytest.raises(PublishError, match="Several folders may be the AV") as refused:
        find(tmp_path)
    assert refused.value.faults == ("one-av", "two-av")


def test_data_sets_are_known_by_their_files(tmp_path: Path) -> None:
    rows = pa.table({"activation_vector": pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2))})
    pq.write_table(rows, tmp_path / "a.parquet")
    assert find(tmp_path / "a.parquet") == Found("activations", tmp_path / "a.parquet")
    assert find(tmp_path).kind == "activations"
    with pytest.raises(PublishError, match="a data set, not a pair"):
        find(tmp_path).require_pair()
    job = tmp_path / "job"
    (job / "parts").mkdir(parents=True)
    (job / "job.yaml").write_text("data: x\n")
    pq.write_table(pa.table({"row": [0]}), job / "parts" / "part-000000.parquet")
    with pytest.raises(PublishError, match=r"1 parts, no manifest\.json"):
        find(job)
    (job / "manifest.json").write_text("{}")
    assert find(job).kind == "explanations"


def test_the_source_model_of_a_pair_is_no_half(pair: Path, tmp_path: Path) -> None:
    source = shutil.copytree(pair / "av", tmp_path / "pair" / "source")
    for name in ("nla_meta.yaml", "value_head.safetensors"):
        (source / name).unlink(missing_ok=True)
    for role in ("av", "ar"):
        shutil.copytree(pair / role, tmp_path / "pair" / role)
    with pytest.raises(PublishError, match="Nothing here can be published"):
        find(source)
    assert find(source, ar=pair / "ar").av == source, "whoever names its AR says that it is an AV"
    shutil.copytree(pair / "ar", tmp_path / "mine-ar")
    assert find(shutil.copytree(source, tmp_path / "mine-av")).kind == "pair", "so does its name beside an AR's"


@pytest.mark.parametrize("name", ["nothing", "empty", "file.txt", "broken.parquet", "other"])
def test_what_nobody_can_publish(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("a: 1\n")
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "broken.parquet").write_text("x")
    with pytest.raises(PublishError) as refused:
        find(tmp_path / name)
    assert name in str(refused.value)


def test_a_run_on_a_packaged_model_names_it_as_its_pair_does(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config(run, base={"model": "package:tiny/weights/source"})
    monkeypatch.chdir(run.parent)
    found = find(Path("run"))
    assert found.base is not None
    assert (found.base / "model.safetensors").is_file()
    assert found.av is not None
    assert found.av.is_absolute()  # a relative one would read as a name of the Hub
    assert bundle._known_as("package:tiny/weights/source") == "tiny-source"
    assert bundle._known_as("owner/base") == "owner/base"
