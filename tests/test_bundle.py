"""Bundles: what a release of a pair is made of, that it loads and computes as the pair does, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from parity import close, engine_logits
from safetensors.torch import load_file, save_file
from wild import TEXTS, World, one_directory, shard, two_directories, vectors

from nla_hub import NLA, hub
from nla_hub.errors import HubNotFoundError, PublishError
from nla_hub.hub import HubOptions, Listing
from nla_hub.publish.release import Entry, Release, StagedRepo
from nla_hub.publish.staging import bundle, forms
from nla_hub.publish.staging.bundle import Wanted, stage, stage_steps
from nla_hub.publish.staging.found import find
from nla_hub.sidecar import Sidecar

WANTED = Wanted(owner="me", licence="apache-2.0")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPTIONS = HubOptions()


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def original(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete pair that no test changes."""
    root = tmp_path_factory.mktemp("original") / "pair"
    one_directory(world, root)
    return root


@pytest.fixture(scope="module")
def released(original: Path) -> Release:
    """Its release in two repositories."""
    return stage(find(original), WANTED, options=OPTIONS, work=None)


@pytest.fixture
def pair(original: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    shutil.copytree(original, tmp_path / "pair")
    return tmp_path / "pair"


def staged(place: Path, work: Path | None = None, **wanted: Any) -> Release:
    return stage(find(place), replace(WANTED, **wanted), options=OPTIONS, work=work)


def written(release: Release, root: Path) -> list[Path]:
    """The repositories as directories, as a download would leave them."""
    places = []
    for repo in release.repos:
        assert repo.to_be_written == {}
        assert [e.name for e in repo.entries] == sorted({e.name for e in repo.entries})
        place = root / repo.name.rpartition("/")[2]
        for entry in repo.entries:
            (place / entry.name).parent.mkdir(parents=True, exist_ok=True)
            (place / entry.name).write_bytes(b"".join(entry.chunks()))
        places.append(place)
    return places


def half(release: Release, role: str) -> StagedRepo:
    return next(repo for repo in release.repos if repo.role == role)


def text(repo: StagedRepo, name: str) -> str:
    entry = repo.entry(name)
    assert entry is not None
    return b"".join(entry.chunks()).decode()


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a sidecar (None removes one)."""
    mapping = {**yaml.safe_load(file.read_text(encoding="utf-8")), **changes}
    file.write_text(
        yaml.safe_dump({k: v for k, v in mapping.items() if v is not None}, allow_unicode=True), encoding="utf-8"
    )


def tree(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in [root, *root.rglob("*")]}


# -- what it is made of ----------------------------------------------------------------------------------------


def test_two_repositories_load_and_compute_as_the_pair_does(
    released: Release, original: Path, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ar, av = written(released, tmp_path)
    assert (av.name, ar.name) == ("nla-base-L2-av", "nla-base-L2-ar")
    with caplog.at_level(logging.WARNING):
        mine, theirs = NLA.from_pretrained(av), NLA.from_pretrained(original)
    assert not caplog.records  # a sidecar that is not what its hash says would be told
    assert torch.equal(mine.reconstruct(TEXTS), theirs.reconstruct(TEXTS))
    close(mine.reconstruct(TEXTS), world.ar_vectors(world.full_ar))
    close(engine_logits(mine.av.engine, vectors()), world.av_logits(world.full_av))


def test_one_repository_loads_and_computes_as_the_pair_does(
    original: Path, released: Release, world: World, tmp_path: Path
) -> None:
    release = staged(original, single=True)
    (place,) = written(release, tmp_path)
    assert {p.name for p in place.iterdir()} == {"av", "ar", "README.md", "LICENSE"}
    assert release.id == released.id  # the same halves
    loaded = NLA.from_pretrained(place)
    close(loaded.reconstruct(TEXTS), world.ar_vectors(world.full_ar))
    close(engine_logits(loaded.av.engine, vectors()), world.av_logits(world.full_av))
    for role in ("av", "ar"):
        assert Sidecar.read(place / role).pair_repo == release.repos[0].name == "me/nla-base-L2"


def test_files_stay_where_they_are_and_the_rest_is_bytes(released: Release, original: Path) -> None:
    for repo in released.repos:
        for entry in repo.entries:
            if isinstance(entry.content, Path):
                assert entry.content == original / repo.role / entry.name
                assert entry.sha256 == Entry(entry.name, entry.content.read_bytes()).sha256
        made = {entry.name for entry in repo.entries if isinstance(entry.content, bytes)}
        assert made >= {"nla_meta.yaml", "README.md", "LICENSE"}
    assert [repo.role for repo in released.repos] == ["ar", "av"]


def test_sidecars_name_each_other_and_the_release(released: Release) -> None:
    for role, other in (("av", "ar"), ("ar", "av")):
        raw = yaml.safe_load(text(half(released, role), "nla_meta.yaml"))
        sidecar = Sidecar.parse(raw)
        assert sidecar.pair_repo == half(released, other).name
        assert raw["release"] == {"id": released.id, "tag": f"nla-{released.id}"}
        assert raw["integrity"]["sha256"] == sidecar.integrity()
        assert isinstance(raw["extraction"]["mse_scale"], float)
        assert (raw["schema_version"], raw["role"]) == (2, role)
        assert getattr(released.facts, role) == sidecar


def test_staging_again_gives_the_same_bytes(original: Path, released: Release) -> None:
    again = staged(original)
    for one, other in zip(released.repos, again.repos, strict=True):
        assert [(e.name, e.sha256) for e in one.entries] == [(e.name, e.sha256) for e in other.entries]


def test_weights_are_hashed_once(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    chunks = Entry.chunks

    def counted(entry: Entry) -> Iterator[bytes]:
        if isinstance(entry.content, Path):
            read.append(entry.content)
        return chunks(entry)

    monkeypatch.setattr(Entry, "chunks", counted)
    for entry in (entry for repo in staged(original).repos for entry in repo.entries):
        assert entry.sha256
    assert len(read) == len(set(read)) > 5


def test_the_id_is_that_of_what_is_loaded(pair: Path, released: Release) -> None:
    (pair / "av" / "README.md").write_text("mine", encoding="utf-8")
    assert staged(pair, repo="you/other", tag="v1", licence="apache-2.0").id == released.id
    head = load_file(pair / "ar" / "value_head.safetensors")
    head["weight"][0, 0] += 1
    save_file(head, pair / "ar" / "value_head.safetensors")
    assert staged(pair).id != released.id


def test_the_reference_is_published_with_the_ar_alone(pair: Path) -> None:
    for role in ("av", "ar"):
        save_file({"mean": torch.zeros(64)}, pair / role / "fve_reference.safetensors")
    release = staged(pair)
    assert half(release, "ar").entry("fve_reference.safetensors") is not None
    assert half(release, "av").entry("fve_reference.safetensors") is None


def test_facts_are_read_from_headers_and_sidecars(released: Release, world: World) -> None:
    facts = released.facts
    assert facts is not None
    assert (facts.base_model, facts.family, facts.n_layers) == ("owner/base", "llama", 4)
    assert (facts.form, facts.quantised, facts.score, facts.recipe) == ("full", None, None, None)
    weights = sum(p.numel() for p in world.full_av.state_dict().values())
    assert facts.parameters["av"] == weights
    assert facts.parameters["ar"] == sum(v.numel() for v in world.ar_state().values()) + 64 * 64
    assert facts.dtypes == {"av": "float32", "ar": "float32"}
    assert not facts.rehearsal


def test_shards_are_published_with_their_index(pair: Path, world: World, tmp_path: Path) -> None:
    shard(pair / "av" / "model.safetensors")
    release = staged(pair)
    names = [e.name for e in half(release, "av").entries]
    assert "model.safetensors.index.json" in names
    assert "model.safetensors" not in names
    _, av = written(release, tmp_path)
    close(
        engine_logits(NLA.from_pretrained(av, components=["av"]).av.engine, vectors()), world.av_logits(world.full_av)
    )


def test_configurations_lose_where_they_lay(pair: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        path = pair / "av" / name
        path.write_text(
            json.dumps({**json.loads(path.read_text(encoding="utf-8")), "_name_or_path": "/home/somebody/base"}),
            encoding="utf-8",
        )
    repo = half(staged(pair), "av")
    for name in ("config.json", "tokenizer_config.json"):
        assert "/home/" not in text(repo, name)
        assert json.loads(text(repo, name)).keys() == json.loads((pair / "ar" / name).read_text()).keys() | (
            json.loads((pair / "av" / name).read_text()).keys() - {"_name_or_path"}
        )


def test_an_av_without_a_generation_config_gets_its_configs(pair: Path, tmp_path: Path) -> None:
    (pair / "av" / "generation_config.json").unlink()
    repo = half(staged(pair), "av")
    assert json.loads(text(repo, "generation_config.json"))["eos_token_id"] == 2


def test_a_tokenizer_above_the_halves_is_published_with_each(pair: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (pair / "ar" / name).unlink(missing_ok=True)
    release = staged(pair)  # the AR reads with the AV's then
    ar, _ = written(release, tmp_path)
    assert (ar / "tokenizer.json").is_file()
    assert NLA.from_pretrained(ar, components=["ar"]).reconstruct("a song").shape == (64,)


# -- nothing is written ----------------------------------------------------------------------------------------


def test_nothing_is_written_where_nothing_needs_to_be(pair: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    for folder in [pair, *[p for p in pair.rglob("*") if p.is_dir()]]:
        folder.chmod(0o555)
    try:
        staged(pair)
        staged(pair, work=tmp_path / "work")
    finally:
        for folder in [pair, *[p for p in pair.rglob("*") if p.is_dir()]]:
            folder.chmod(0o755)
    assert tree(tmp_path) == before


def test_weights_that_are_not_canonical_are_written_anew(
    pair: Path, world: World, tmp_path: Path, released: Release
) -> None:
    path = pair / "ar" / "model.safetensors"
    state = load_file(path)
    save_file({**state, "lm_head.weight": torch.zeros(64, 64)}, path, metadata={"format": "pt"})
    before = tree(tmp_path)
    dry = staged(pair)
    assert dry.id is None
    assert tree(tmp_path) == before
    assert half(dry, "ar").to_be_written == {"model.safetensors": pytest.approx(path.stat().st_size, rel=0.1)}
    assert half(dry, "ar").entry("model.safetensors") is None
    assert half(dry, "ar").size > path.stat().st_size
    assert "release" not in yaml.safe_load(text(half(dry, "ar"), "nla_meta.yaml"))
    release = staged(pair, work=tmp_path / "work")
    ar, _ = written(release, tmp_path)
    assert load_file(ar / "model.safetensors").keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in load_file(ar / "model.safetensors").items())
    close(NLA.from_pretrained(ar, components=["ar"]).reconstruct(TEXTS), world.ar_vectors(world.full_ar))


def test_a_file_that_is_too_large_is_divided(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "LARGEST_FILE", 1000)
    assert "larger" in forms.rewriting(forms.opened(pair / "av", pair / "ar", None, OPTIONS).av)[0]  # type: ignore[arg-type]
    assert half(staged(pair), "av").to_be_written


# -- refused ---------------------------------------------------------------------------------------------------

STRAYS = (
    "av/pytorch_model.bin",
    "av/optimizer.pt",
    "ar/notes.ipynb",
    "ar/model-megatron-compat.safetensors",
    "av/modeling_own.py",
    "av/checkpoint/state.json",
    "todo.txt",
)


def test_what_is_no_part_of_a_release_is_refused_by_name_and_all_at_once(pair: Path) -> None:
    for name in STRAYS:
        (pair / name).parent.mkdir(exist_ok=True)
        (pair / name).write_bytes(b"x")
    with pytest.raises(PublishError) as refused:
        staged(pair)
    for name in STRAYS:
        assert str(pair / name) in str(refused.value)
    assert len(refused.value.faults) == len(STRAYS)


def test_what_is_known_to_be_left_out_is(pair: Path, released: Release) -> None:
    ours = ("DONE", "README.md", ".nla-hub/download.json")
    for name in (*ours, "av/README.md", "ar/.gitattributes", "av/.cache/huggingface/x.metadata", "source/x.bin"):
        (pair / name).parent.mkdir(parents=True, exist_ok=True)
        (pair / name).write_bytes(b"x")
    for mine, before in zip(staged(pair).repos, released.repos, strict=True):
        assert [e.name for e in mine.entries] == [e.name for e in before.entries]


def test_contracts_that_others_cannot_use_are_refused_at_once(pair: Path) -> None:
    template = {"av": "What { stands in <v>{injection_char}</v>?", "ar": "Words: {explanation}\nVector:"}
    edit(pair / "av" / "nla_meta.yaml", prompt_templates=template, base_checkpoint="/home/me/base")
    edit(pair / "ar" / "nla_meta.yaml", base_checkpoint="/home/me/base")
    with pytest.raises(PublishError) as refused:
        staged(pair)
    assert any("braces" in fault for fault in refused.value.faults)
    assert any("place on this machine" in fault for fault in refused.value.faults)
    edit(
        pair / "av" / "nla_meta.yaml", prompt_templates={**template, "av": template["av"].replace("{ stands", "stands")}
    )
    release = staged(pair, base_model="Owner/Base-Instruct")
    assert release.facts is not None
    assert release.facts.names.av == "me/nla-base-L2-av"
    assert release.facts.av.base_model == "Owner/Base-Instruct"


def test_halves_with_different_scores_are_refused(pair: Path) -> None:
    score = {"value": 0.5, "baseline": "raw_variance", "dataset": "x", "n": 1000}
    edit(pair / "av" / "nla_meta.yaml", fve=score)
    release = staged(pair)
    assert release.facts is not None
    assert release.facts.score is not None
    assert release.facts.ar.fve == release.facts.av.fve == release.facts.score
    edit(pair / "ar" / "nla_meta.yaml", fve={**score, "value": 0.75})
    with pytest.raises(PublishError, match="different scores"):
        staged(pair)


def test_half_a_pair_is_no_release(pair: Path) -> None:
    shutil.rmtree(pair / "ar")
    with pytest.raises(PublishError, match="Only the AV lies here"):
        staged(pair)


@pytest.mark.parametrize("tag", ["", "a b", "-x", "x/", "a//b", "é"])
def test_tags_that_are_none(pair: Path, tag: str) -> None:
    with pytest.raises(PublishError, match="tag"):
        staged(pair, tag=tag)


def test_somebody_must_publish_it(original: Path) -> None:
    with pytest.raises(PublishError, match="--repo OWNER/NAME"):
        staged(original, owner=None)


# -- the base's commit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "wanted", "expected", "kept"),
    [
        (COMMIT, {}, COMMIT, COMMIT),
        (None, {"base_revision": COMMIT}, COMMIT, COMMIT),
        (None, {"base_model": f"owner/base@{COMMIT}"}, COMMIT, COMMIT),
        ("sha256:" + "0" * 64, {}, None, "sha256:" + "0" * 64),
        (None, {}, None, None),
        ("v1.0", {}, "f" * 40, "f" * 40),
        ("gone", {}, None, "gone"),
        (None, {"base_revision": "v1.0"}, "f" * 40, "f" * 40),
    ],
)
def test_the_base_is_pinned_only_where_its_commit_is_known(
    pair: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: str | None,
    wanted: dict[str, Any],
    expected: str | None,
    kept: str | None,
) -> None:
    def listing(repo: str, *, revision: str | None, options: HubOptions) -> Listing:
        assert repo == "owner/base"
        assert revision is not None  # main of today says nothing about the day of the training
        if revision == "gone":
            raise HubNotFoundError("no such revision")
        return Listing(repo, "f" * 40, {})

    for role in ("av", "ar"):
        edit(pair / role / "nla_meta.yaml", source_revision=told)
    monkeypatch.setattr(hub, "listing", listing)
    monkeypatch.setattr(bundle.licences.Source, "readmes", lambda self: iter(()))
    facts = staged(pair, **wanted).facts
    assert facts is not None
    assert facts.base_revision == expected
    assert facts.av.source_revision == facts.ar.source_revision == kept


def test_a_revision_that_the_caller_names_must_be_there(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listing(*_: Any, **__: Any) -> Listing:
        raise HubNotFoundError("no such revision")

    monkeypatch.setattr(hub, "listing", listing)
    monkeypatch.setattr(bundle.licences.Source, "readmes", lambda self: iter(()))
    with pytest.raises(HubNotFoundError):
        staged(pair, base_revision="gone")


# -- steps -----------------------------------------------------------------------------------------------------


def test_steps_become_releases_of_the_same_repositories(original: Path, world: World, tmp_path: Path) -> None:
    found = replace(find(original), steps={f"step-{n:06d}": original for n in (200, 400)})
    steps = stage_steps(found, WANTED, options=OPTIONS, work=None)
    last = stage(found, WANTED, options=OPTIONS, work=None)
    assert [release.tag for release in steps] == ["step-000200", "step-000400"]
    for release in steps:
        assert [repo.name for repo in release.repos] == [repo.name for repo in last.repos]
        assert release.facts is not None
        assert release.facts.av.release is not None
        assert release.facts.av.release.tag == release.tag
    assert last.facts is not None
    assert last.facts.steps == ("step-000200", "step-000400")
    without = stage(found, replace(WANTED, steps=False), options=OPTIONS, work=None)
    assert without.facts is not None
    assert without.facts.steps == ()
    assert stage_steps(found, replace(WANTED, steps=False), options=OPTIONS, work=None) == []


def test_a_pair_in_two_directories(world: World, tmp_path: Path) -> None:
    two_directories(world, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "x-ar", tmp_path / "elsewhere" / "other")
    found = find(tmp_path / "x-av", ar=tmp_path / "elsewhere" / "other")
    release = stage(found, WANTED, options=OPTIONS, work=None)
    assert [repo.role for repo in release.repos] == ["ar", "av"]
    (tmp_path / "elsewhere" / "other" / "x.pt").write_bytes(b"x")
    with pytest.raises(PublishError, match=r"other/x\.pt"):
        stage(found, WANTED, options=OPTIONS, work=None)


def test_the_packaged_pair_is_one(tmp_path: Path) -> None:
    import nla_hub

    place = Path(nla_hub.__file__).parent / "tiny" / "weights"
    release = stage(find(place), Wanted(owner="me"), options=OPTIONS, work=None)
    facts = release.facts
    assert facts is not None
    assert facts.licence.id == "apache-2.0"
    assert facts.names.av == "me/nla-tiny-L2-av"
    assert facts.score is not None
    assert facts.score.protocol == "tiny-eval-v1"
    assert facts.base_revision is None
    _, av = written(release, tmp_path)
    mine, theirs = NLA.from_pretrained(av), NLA.from_pretrained("tiny")
    assert torch.equal(mine.reconstruct(list(TEXTS)), theirs.reconstruct(list(TEXTS)))
