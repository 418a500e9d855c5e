"""The forms of a release: factors alone, merged, packed in 8 or 4 bits; and what may not become which."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from parity import close, engine_logits
from safetensors.torch import load_file, save_file
from test_bundle import OPTIONS, WANTED, edit, half, text, tree, written
from wild import TEXTS, Built, World, easynla_sft, one_directory, peft_pair, vectors

import nla_hub
from nla_hub import NLA
from nla_hub.errors import GateFailedError, MissingExtraError, PublishError
from nla_hub.opening import Half
from nla_hub.publish.release import Release
from nla_hub.publish.staging import packed
from nla_hub.publish.staging.bundle import Wanted, stage, stage_steps
from nla_hub.publish.staging.forms import opened, prepare
from nla_hub.publish.staging.found import find
from nla_hub.testing import random_pair

pytest.importorskip("peft", reason="peft writes the factors")

# peft 0.21 asks transformers 5.23 for names that it calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TINY = Path(nla_hub.__file__).parent / "tiny" / "weights"
SCORE = {"value": 0.5, "baseline": "raw_variance", "dataset": "x", "n": 1000}


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def built(world: World, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A pair of PEFT directories with their base beside them, that no test changes."""
    found = peft_pair(world, tmp_path_factory.mktemp("built") / "pair")
    for role in ("av", "ar"):
        edit(found.name / role / "nla_meta.yaml", fve=SCORE)
    return found


@pytest.fixture
def factors(built: Built, tmp_path: Path) -> Built:
    """A copy of it."""
    shutil.copytree(built.name, tmp_path / "pair")
    return replace(built, name=tmp_path / "pair")


def staged(place: Path, work: Path | None = None, **wanted: Any) -> Release:
    return stage(find(place), replace(WANTED, **wanted), options=OPTIONS, work=work)


# -- factors ---------------------------------------------------------------------------------------------------


def test_factors_are_published_alone_and_load_on_their_base(factors: Built, world: World, tmp_path: Path) -> None:
    release = staged(factors.name)
    assert release.facts is not None
    assert (release.facts.form, release.facts.names.av) == ("lora", "me/nla-base-L2-lora-av")
    assert release.facts.score is not None  # measured on these factors
    for role in ("av", "ar"):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {e.name for e in half(release, role).entries}
        config = json.loads(text(half(release, role), "adapter_config.json"))
        assert config["base_model_name_or_path"] == "owner/base"
    assert half(release, "av").size < 1_000_000
    _, av = written(release, tmp_path / "hub")
    loaded = NLA.from_pretrained(av, base_model=factors.name / "source")
    assert factors.vectors is not None
    assert factors.logits is not None
    close(loaded.reconstruct(TEXTS), factors.vectors)
    close(engine_logits(loaded.av.engine, vectors()), factors.logits)


def test_factors_in_one_repository_find_their_folders(factors: Built, tmp_path: Path) -> None:
    (place,) = written(staged(factors.name, single=True), tmp_path / "hub")
    loaded = NLA.from_pretrained(place, base_model=factors.name / "source")
    assert factors.vectors is not None
    close(loaded.reconstruct(TEXTS), factors.vectors)


def test_factors_with_a_head_in_one_file_keep_their_meta(world: World, tmp_path: Path) -> None:
    built = easynla_sft(world, tmp_path / "x")
    for name in ("x_av", "x_ar"):
        edit(tmp_path / "x" / name / "iter_0001000" / "nla_meta.yaml", injection={"kind": "add"})
    found = find(built.name, ar=built.options["ar"])
    found = replace(found, base=built.options["base_model"])
    release = stage(found, WANTED, options=OPTIONS, work=None)
    assert {"ar_meta.json", "ar_lora_value_head.safetensors"} <= {e.name for e in half(release, "ar").entries}
    _, av = written(release, tmp_path / "hub")
    loaded = NLA.from_pretrained(av, base_model=built.options["base_model"])
    assert built.vectors is not None
    assert built.logits is not None
    close(loaded.reconstruct(TEXTS), built.vectors)
    close(engine_logits(loaded.av.engine, vectors()), built.logits)


def test_factors_need_a_base_that_others_can_get(factors: Built) -> None:
    for role in ("av", "ar"):
        edit(factors.name / role / "nla_meta.yaml", base_checkpoint="mine-source")
    with pytest.raises(PublishError, match="factors need one that others can get"):
        staged(factors.name)
    assert staged(factors.name, base_model="owner/base").id is not None


# -- merged ----------------------------------------------------------------------------------------------------


def test_merged_factors_are_complete_weights_without_the_old_score(factors: Built, tmp_path: Path) -> None:
    before = tree(tmp_path)
    dry = staged(factors.name, form="merged")
    assert tree(tmp_path) == before
    assert dry.id is None
    assert half(dry, "av").to_be_written["model.safetensors"] > half(dry, "ar").to_be_written["model.safetensors"] > 0
    release = staged(factors.name, tmp_path / "work", form="merged")
    assert release.facts is not None
    assert (release.facts.form, release.facts.names.av) == ("merged", "me/nla-base-L2-av")
    assert release.facts.score is None
    assert "fve" not in yaml.safe_load(text(half(release, "av"), "nla_meta.yaml"))
    estimate = half(dry, "av").to_be_written["model.safetensors"]
    weights = half(release, "av").entry("model.safetensors")
    assert weights is not None
    assert weights.size == pytest.approx(estimate, rel=0.05)
    _, av = written(release, tmp_path / "hub")
    loaded = NLA.from_pretrained(av)
    assert factors.vectors is not None
    assert factors.logits is not None
    close(loaded.reconstruct(TEXTS), factors.vectors)
    close(engine_logits(loaded.av.engine, vectors()), factors.logits)


def test_what_is_refused_is_refused_before_weights_are_written(factors: Built, tmp_path: Path) -> None:
    (factors.name / "av" / "notes.ipynb").write_text("x")
    for wanted in ({}, {"licence": "mit"}, {"repo": "me/a--b"}):
        with pytest.raises(PublishError):
            staged(factors.name, tmp_path / "work", form="merged", **wanted)
        (factors.name / "av" / "notes.ipynb").unlink(missing_ok=True)
        assert not (tmp_path / "work").exists()


def test_a_run_of_factors_has_both_forms(factors: Built, world: World, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    one_directory(world, merged)
    found = replace(find(merged), factors={"av": factors.name / "av", "ar": factors.name / "ar"})
    found = replace(found, base=factors.name / "source")
    for form, name, expected in ((None, "base-L2-av", "merged"), ("lora", "base-L2-lora-av", "lora")):
        release = stage(found, replace(WANTED, form=form), options=OPTIONS, work=None)  # type: ignore[arg-type]
        assert release.facts is not None
        assert (release.facts.form, release.facts.names.av) == (expected, f"me/nla-{name}")
    (factors.name / "av" / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(PublishError, match=r"optimizer\.pt"):
        stage(found, replace(WANTED, form="lora"), options=OPTIONS, work=None)


def test_steps_of_a_run_of_factors_are_merged_ones(factors: Built, world: World, tmp_path: Path) -> None:
    merged, place = tmp_path / "merged", factors.name
    one_directory(world, merged)
    found = replace(
        find(merged),
        base=place / "source",
        factors={"av": place / "av", "ar": place / "ar"},
        steps={"step-000200": merged},
    )
    last = stage(found, WANTED, options=OPTIONS, work=None)
    (step,) = stage_steps(found, WANTED, options=OPTIONS, work=None)
    assert [repo.name for repo in step.repos] == [repo.name for repo in last.repos]
    assert step.facts is not None
    assert (step.facts.form, step.tag) == ("merged", "step-000200")
    wanted = replace(WANTED, form="lora")
    alone = stage(found, wanted, options=OPTIONS, work=None)
    assert alone.facts is not None
    assert alone.facts.steps == ()
    assert stage_steps(found, wanted, options=OPTIONS, work=None) == []


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"form": "full"}, "These are LoRA factors"),
        ({"form": "lora", "quantise": "fp8"}, "Factors are not packed"),
    ],
)
def test_what_factors_cannot_become(factors: Built, wanted: dict[str, Any], words: str) -> None:
    with pytest.raises(PublishError, match=words):
        staged(factors.name, **wanted)


@pytest.mark.parametrize(
    ("form", "words"), [("lora", "There are no factors here"), ("merged", "There is nothing to merge")]
)
def test_what_complete_weights_cannot_become(form: str, words: str) -> None:
    with pytest.raises(PublishError, match=words):
        staged(TINY, form=form)


def test_a_complete_half_beside_factors_is_refused(factors: Built, world: World) -> None:
    shutil.rmtree(factors.name / "ar")
    world.write_ar(factors.name / "ar", world.model_sidecar("ar"))
    with pytest.raises(PublishError, match="One half is a complete model, the other a LoRA"):
        staged(factors.name)


# -- packed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "package"), [("fp8", "compressed-tensors"), ("nf4", "bitsandbytes")])
def test_packing_says_what_to_install(kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=package) as refused:
        staged(TINY, quantise=kind)
    assert "nla-hub[quant]" in str(refused.value)


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_a_packed_pair_is_estimated_before_it_is_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "find_spec", lambda name: object())
    release = staged(TINY, quantise=kind)
    whole = staged(TINY)
    assert release.facts is not None
    assert (release.facts.quantised, release.facts.score, release.id) == (kind, None, None)
    assert release.facts.names.ar == f"me/nla-tiny-L2-{kind}-ar"
    assert release.facts.parameters == whole.facts.parameters  # type: ignore[union-attr]
    assert 0.2 < release.size / whole.size < 0.8


@pytest.mark.parametrize("broken", [None, "ar"])
def test_a_packed_pair_goes_through_the_gate(
    broken: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(half: Half, linear: frozenset[str], place: Path) -> None:
        weights = load_file(half.files.directory / "model.safetensors")
        for name in linear if half.role == broken else ():
            stored = name if name in weights else f"model.{name}"
            weights[stored] = weights[stored].roll(1, dims=0) * 3
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(packed, "find_spec", lambda name: object())
    monkeypatch.setattr(packed, "_write_fp8", write)
    if broken is not None:
        with pytest.raises(GateFailedError, match="packed as fp8 no longer reads its own vectors"):
            staged(TINY, tmp_path / "work", quantise="fp8", measure=False)
        return
    release = staged(TINY, tmp_path / "work", quantise="fp8", measure=False)
    assert release.facts is not None
    nearest, to_itself, to_others = release.facts.parity.values()
    assert nearest == pytest.approx(1)
    assert to_itself > to_others + 0.1
    assert release.facts.score is None  # the weights of the fake are the same, but nobody measured them
    assert half(release, "ar").entry("fve_reference.safetensors") is not None
    assert release.repos[0].name == "me/nla-tiny-L2-fp8-ar"


def test_a_family_without_linear_modules_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "find_spec", lambda name: object())
    random_pair(tmp_path, "gpt2")
    with pytest.raises(PublishError, match="no linear modules"):
        staged(tmp_path, quantise="fp8", base_model="owner/base")


def test_eight_bits_hold_every_weight_to_a_sixteenth(world: World, tmp_path: Path) -> None:
    one_directory(world, tmp_path / "pair")
    av, ar = find(tmp_path / "pair").require_pair()
    pair = opened(av, ar, None, OPTIONS)
    for one in (pair.av, pair.ar):
        assert one is not None
        place = tmp_path / "packed" / one.role
        place.mkdir(parents=True)
        shutil.copyfile(one.files.directory / "config.json", place / "config.json")
        linear = packed.linear_weights(one)
        assert len(linear) == 7 * (4 if one.role == "av" else 3)
        packed._write_fp8(one, linear, place)
        before, after = (load_file(folder / "model.safetensors") for folder in (one.files.directory, place))
        assert before.keys() == {name for name in after if not name.endswith("_scale")}
        assert len(after) - len(before) == len(linear)
        for name, value in before.items():
            if f"{name.removesuffix('.weight')}.weight_scale" not in after:
                assert torch.equal(after[name], value)
                continue
            scale = after[f"{name.removesuffix('.weight')}.weight_scale"]
            assert (scale.shape, scale.dtype) == ((len(value), 1), torch.float32)  # one a row of outputs
            assert after[name].dtype == torch.float8_e4m3fn
            back = after[name].float() * scale
            # Three bits of mantissa: half a step is 1/16 of a value; the smallest are held to a step of the row's scale.
            allowed = value.abs() / 16 + value.abs().amax(dim=1, keepdim=True) / 448 / 512
            assert bool(((back - value).abs() <= allowed + 1e-9).all())
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        assert config["quantization_config"]["format"] == "float-quantized"


def test_packed_weights_are_divided_into_files(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_directory(world, tmp_path / "pair")
    av, ar = find(tmp_path / "pair").require_pair()
    one = opened(av, ar, None, OPTIONS).av
    assert one is not None
    shards = []
    for i, room in enumerate((10**9, 100_000)):
        monkeypatch.setattr(packed, "SHARD", room)
        place = tmp_path / str(i)
        place.mkdir()
        shutil.copyfile(one.files.directory / "config.json", place / "config.json")
        packed._write_fp8(one, packed.linear_weights(one), place)
        shards.append({k: v for f in place.glob("*.safetensors") for k, v in load_file(f).items()})
    index = json.loads((tmp_path / "1" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"].keys() == shards[0].keys() == shards[1].keys()
    assert len(set(index["weight_map"].values())) > 2
    assert all(torch.equal(shards[0][k].float(), shards[1][k].float()) for k in shards[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "module", "lost"), [("fp8", "compressed_tensors", 0.01), ("nf4", "bitsandbytes", 0.2)]
)
def test_a_packed_pair_is_measured_and_loads_again(kind: str, module: str, lost: float, tmp_path: Path) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    release = stage(
        find(TINY),
        Wanted(owner="me", quantise=kind),
        options=OPTIONS,
        work=tmp_path / "work",  # type: ignore[arg-type]
    )
    whole = stage(find(TINY), Wanted(owner="me"), options=OPTIONS, work=None)
    assert release.facts is not None
    assert whole.facts is not None
    assert release.facts.score is not None
    assert whole.facts.score is not None
    assert release.facts.score.value != whole.facts.score.value
    assert release.facts.score.value > whole.facts.score.value - lost
    assert min(release.facts.parity.values()) > 0
    assert release.size < 0.7 * whole.size
    _, av = written(release, tmp_path / "hub")
    NLA.from_pretrained(av).round_trip().require()


@pytest.mark.slow
def test_a_pair_that_packing_broke_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressed_tensors")
    monkeypatch.setattr(packed, "LARGEST_FP8", 448e6)  # everything is cut off at the largest value
    with pytest.raises(GateFailedError):
        stage(find(TINY), Wanted(owner="me", quantise="fp8"), options=OPTIONS, work=tmp_path / "work")


def test_forms_are_prepared_without_a_work_directory_or_refused(world: World, tmp_path: Path) -> None:
    one_directory(world, tmp_path / "pair")
    done = prepare(find(tmp_path / "pair"), None, None, base=None, options=OPTIONS, work=None)
    assert (done.form, done.changed, done.to_be_written) == ("full", False, {})
