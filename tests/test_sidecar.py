"""The sidecar: read once, all faults at once, written back without losing a key, and nothing in it executed."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strangers import names, values

from nla_hub import yaml_io
from nla_hub.errors import SidecarError
from nla_hub.sidecar import Injection, ReferenceRecord, ReleaseRecord, Score, Sidecar, Site

RELEASED: dict[str, Any] = {
    "kind": "nla_model",
    "schema_version": 2,
    "role": "av",
    "stage": "rl",
    "base_checkpoint": "Qwen/Qwen2.5-7B-Instruct",
    "d_model": 3584,
    "extraction_layer_index": 20,
    "extraction": {"injection_scale": 150, "mse_scale": 59.87},
    "tokens": {
        "injection_char": "㈎",
        "injection_token_id": 149705,
        "injection_left_neighbor_id": 29,
        "injection_right_neighbor_id": 522,
        "critic_suffix_ids": [1318, 29, 366, 1708, 29],
    },
    "prompt_templates": {"av": "What is <v>{injection_char}</v>?", "ar": "<text>{explanation}</text> <summary>"},
    "trained_on": {"dataset": "x", "rows": 5},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """RELEASED with one key replaced (or removed, for ...)."""
    raw = copy.deepcopy(RELEASED)
    *parents, last = path.split(".")
    place = raw
    for key in parents:
        place = place.setdefault(key, {})
    if value is ...:
        place.pop(last, None)
    else:
        place[last] = value
    return raw


def faults(raw: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(SidecarError) as caught:
        Sidecar.parse(raw, where="here/nla_meta.yaml")
    assert str(caught.value).startswith("here/nla_meta.yaml: ")
    assert "Next: " in str(caught.value)
    return caught.value.faults


# -- reading and writing -------------------------------------------------------------------------------------


def test_a_released_sidecar_is_read_completely() -> None:
    sidecar = Sidecar.parse(RELEASED)
    assert (sidecar.role, sidecar.d_model, sidecar.site) == ("av", 3584, Site(20))
    assert sidecar.injection == Injection("overwrite", 150.0)
    assert sidecar.marker is not None
    assert (sidecar.marker.char, sidecar.marker.id, sidecar.marker.left_id, sidecar.marker.right_id) == (
        "㈎",
        149705,
        29,
        522,
    )
    assert sidecar.ar_suffix_ids == (1318, 29, 366, 1708, 29)
    assert sidecar.extra == {"trained_on": {"dataset": "x", "rows": 5}}


def test_layer_k_is_the_output_of_block_k() -> None:
    assert Site(20).hidden_states_index == 21
    assert Site(20).n_blocks == 21


def test_what_is_written_is_what_the_reference_client_reads(case: Case) -> None:
    raw = yaml.safe_load((case.pair.av / "nla_meta.yaml").read_text(encoding="utf-8"))
    assert (raw["kind"], raw["schema_version"], raw["role"]) == ("nla_model", 2, "av")
    assert raw["extraction_layer_index"] == case.pair.site.layer
    assert raw["extraction"]["mse_scale"] == pytest.approx(math.sqrt(64))
    assert ("injection_scale" in raw["extraction"]) == (case.spec.kind == "overwrite")
    assert raw["prompt_templates"]["av"].format(injection_char="M") == "What stands in <v>M</v>?"
    assert raw["injection"] == {"kind": case.spec.kind}


def test_parsing_and_writing_are_inverse(case: Case, tmp_path: Path) -> None:
    for directory in (case.pair.av, case.pair.ar):
        first = Sidecar.read(directory)
        first.write(tmp_path)
        assert Sidecar.read(tmp_path) == first
        assert (tmp_path / "nla_meta.yaml").read_bytes() == (directory / "nla_meta.yaml").read_bytes()


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(names, values, max_size=4), st.dictionaries(names, values, max_size=3))
def test_unknown_keys_survive_at_every_depth(top: dict[str, Any], nested: dict[str, Any]) -> None:
    plain = Sidecar.parse(RELEASED)
    known = plain.to_mapping()
    raw = copy.deepcopy(RELEASED)
    raw |= {k: v for k, v in top.items() if k not in known and k not in ("critic", "fve", "fve_reference", "integrity")}
    for place in ("extraction", "tokens", "prompt_templates"):
        raw[place] |= {f"x {k}": v for k, v in nested.items()}
    first = Sidecar.parse(yaml_io.loads(yaml_io.dumps(raw), where="x", error=SidecarError))
    text = yaml_io.dumps({**first.to_mapping(), "integrity": {"sha256": first.integrity()}})
    again = Sidecar.parse(yaml_io.loads(text, where="x", error=SidecarError))
    assert again == first
    assert again.integrity() == first.integrity()
    for key, value in raw.items():
        if key not in known:
            assert again.extra[key] == value
    for place in ("extraction", "tokens", "prompt_templates"):
        for key, value in nested.items():
            assert again.to_mapping()[place][f"x {key}"] == value


def test_scores_and_references_come_back() -> None:
    sidecar = Sidecar.parse(RELEASED).with_(
        fve=Score(0.7, "raw_variance", "x", 100, cosine=0.9, protocol="tiny-eval-v1", commit="abc"),
        fve_reference=ReferenceRecord("x", 100, 0.7, 0.9, 1.0, 20.0),
        release=ReleaseRecord("0123456789ab", "v1"),
        mse_scale=3.0,
        source_revision="abc",
        pair_repo="owner/x-ar",
        final_norm_stripped=True,
    )
    assert Sidecar.parse(sidecar.to_mapping()) == sidecar


def test_a_sidecar_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sidecar = Sidecar.parse(RELEASED)
    path = sidecar.write(tmp_path)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(yaml_io.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        sidecar.with_(stage="other").write(tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["nla_meta.yaml"]


def test_editing_by_hand_warns_once_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = Sidecar.parse(RELEASED).write(tmp_path)
    with caplog.at_level(logging.WARNING, logger="nla_hub"):
        Sidecar.read(tmp_path)
        assert not caplog.records
        path.write_text(path.read_text(encoding="utf-8").replace("What is", "What was"), encoding="utf-8")
        sidecar = Sidecar.read(tmp_path)
    assert sidecar.av_template == "What was <v>{injection_char}</v>?"
    assert len(caplog.records) == 1
    assert "was edited after it was written" in caplog.text
    assert str(path) in caplog.text


# -- faults --------------------------------------------------------------------------------------------------


def test_all_faults_come_at_once() -> None:
    raw = {
        "kind": "nla_adapter",
        "schema_version": 3,
        "role": "policy",
        "d_model": "64",
        "extraction": {"injection_scale": -1, "mse_scale": math.nan},
        "tokens": {"injection_char": "ab", "injection_token_id": True, "critic_suffix_ids": "1 2"},
        "prompt_templates": {"av": "no marker {here}", "ar": 7},
        "injection": {"kind": "paste"},
        "fve_reference": {"dataset": "x"},
        "final_norm_stripped": "yes",
        "head_input": "unit",
        "adapter_stack": ["../av"],
        "output_format": "json",
    }
    found = faults(raw)
    for word in (
        "kind: got 'nla_adapter'",
        "schema_version: got 3",
        "role: got 'policy'",
        "d_model: got '64'",
        "extraction_layer_index: missing",
        "extraction.injection_scale: got -1",
        "extraction.mse_scale: got nan",
        "tokens.injection_char: got 'ab', expected one character",
        "tokens.injection_token_id: got True",
        "tokens.injection_left_neighbor_id: missing",
        "tokens.injection_right_neighbor_id: missing",
        "tokens.critic_suffix_ids: got '1 2'",
        "prompt_templates.av: {injection_char} stands 0 times",
        "prompt_templates.av: unknown placeholder {here}",
        "prompt_templates.ar: got 7",
        "injection.kind: got 'paste'",
        "fve_reference: ",
        "final_norm_stripped: got 'yes'",
        "head_input: got 'unit'",
        "adapter_stack: got ['../av']",
        "output_format: got 'json', expected 'explanation_tags'",
    ):
        assert any(word in fault for fault in found), f"{word} is not among {found}"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("extraction.injection_scale", ..., "injection_scale: missing"),
        ("extraction.injection_scale", 0, "injection_scale: got 0"),
        ("extraction.injection_scale", -3.0, "injection_scale: got -3.0"),
        ("extraction.injection_scale", math.nan, "injection_scale: got nan"),
        ("extraction.injection_scale", math.inf, "injection_scale: got inf"),
        ("extraction.injection_scale", True, "injection_scale: got True"),
        ("extraction.injection_scale", "loud", "injection_scale: got 'loud'"),
        ("extraction.injection_scale", "-150", "injection_scale: got '-150'"),
        ("extraction.injection_scale", "0", "injection_scale: got '0'"),
        ("extraction.injection_scale", "nan", "injection_scale: got 'nan'"),
        ("extraction.injection_scale", "1e9999", "injection_scale: got '1e9999'"),
        ("extraction.injection_scale", "1_50", "injection_scale: got '1_50'"),
        ("extraction.injection_scale", "١٥٠", "injection_scale: got '١٥٠'"),
        pytest.param("d_model", 10**5000, "d_model: got a number too large to print", id="5000 digits"),
        ("extraction.injection_scale", 10**400, "injection_scale: got 1000"),
        ("d_model", ..., "d_model: missing"),
        ("d_model", 0, "d_model: got 0"),
        ("d_model", -4, "d_model: got -4"),
        ("d_model", 3584.0, "d_model: got 3584.0"),
        ("d_model", 10**400, "d_model: got 1000"),
        ("extraction_layer_index", -1, "extraction_layer_index: got -1"),
        ("extraction_layer_index", ..., "extraction_layer_index: missing"),
        (
            "critic",
            {"extraction_layer_index": 21},
            "extraction_layer_index says 20, critic.extraction_layer_index says 21",
        ),
        ("role", ..., "role: got None"),
        ("role", ["av"], "role: got ['av']"),
        ("schema_version", True, "schema_version: got True"),
        ("schema_version", "2", "schema_version: got '2'"),
        ("schema_version", 2.0, "schema_version: got 2.0"),
        ("tokens", [1, 2], "tokens: got [1, 2], expected a mapping"),
        ("extraction", "none", "extraction: got 'none', expected a mapping"),
        ("injection", "add", "injection: got 'add', expected a mapping"),
        ("tokens.injection_char", ..., "injection_char: missing"),
        ("prompt_templates.av", ..., "prompt_templates.av: missing"),
        ("prompt_templates.av", "{injection_char}{injection_char}", "stands 2 times"),
        (
            "prompt_templates.av",
            "{injection_char} {explanation.__class__}",
            "unknown placeholder {explanation.__class__}",
        ),
        ("prompt_templates.av", "{injection_char} {0}", "unknown placeholder {0}"),
        ("prompt_templates.av", "{injection_char} {}", "unknown placeholder {}"),
        ("prompt_templates.ar", "{explanation.__init__.__globals__}", "unknown placeholder"),
        ("fve", {"value": "much", "baseline": "raw_variance", "dataset": "x", "n": 5}, "fve.value: got 'much'"),
        ("fve", {"value": math.nan, "baseline": "raw_variance", "dataset": "x", "n": 5}, "fve.value: got nan"),
        ("fve", [0.7], "fve: got [0.7], expected a mapping"),
        ("fve_reference", {"dataset": "x", "n": 5, "raw_variance": 0, "mean_norm": 1.0}, "raw_variance: got 0"),
        (
            "fve_reference",
            {"dataset": "x", "n": 5, "raw_variance": 0.7, "mean_norm": 1.0, "norm_p0_5": "low"},
            "norm_p0_5: got 'low'",
        ),
        ("fve", {"value": 0.7, "baseline": "raw_variance", "dataset": "x", "n": -1}, "fve.n: got -1"),
        ("base_checkpoint", 7, "base_checkpoint: got 7"),
        ("adapter_stack", [], "adapter_stack: got []"),
        ("adapter_stack", "av", "adapter_stack: got 'av'"),
        ("adapter_stack", ["av", "av/"], "adapter_stack: got ['av', 'av/']"),
        ("adapter_stack", ["av", 7], "adapter_stack: got ['av', 7]"),
        *(
            ("adapter_stack", [name], "adapter_stack: got ")
            for name in ("", ".", "..", "/av", "av/../x", "av//x", "~/av", ".git", "a\\b", "av\n", "C:av", "av/..")
        ),
    ],
)
def test_each_fault_is_named(path: str, value: Any, words: str) -> None:
    assert any(words in fault for fault in faults(changed(path, value)))


def test_sqrt_d_model_is_a_scale_also_where_d_model_is_wrong() -> None:
    assert Sidecar.parse(changed("extraction.injection_scale", "sqrt_d_model")).injection.scale == math.sqrt(3584)
    raw = changed("extraction.injection_scale", "sqrt_d_model")
    for bad in ("64", -64, None, [1]):
        assert any("d_model" in fault for fault in faults({**raw, "d_model": bad}))


def test_without_a_kind_a_scale_means_overwrite_and_no_scale_asks() -> None:
    assert Sidecar.parse(RELEASED).injection.kind == "overwrite"
    found = faults(changed("extraction.injection_scale", ...))
    assert any("injection.kind: got None, expected 'overwrite' or 'add'" in fault for fault in found)
    adding = changed("extraction.injection_scale", ...)
    adding["injection"] = {"kind": "add"}
    assert Sidecar.parse(adding).injection == Injection("add", None)


def test_an_ar_needs_no_marker_and_no_scale() -> None:
    raw = {k: v for k, v in RELEASED.items() if k not in ("tokens", "extraction")} | {"role": "ar"}
    raw["prompt_templates"] = {"ar": "{explanation}"}
    assert Sidecar.parse(raw).marker is None


def test_halves_that_disagree_are_no_pair() -> None:
    av = Sidecar.parse(RELEASED)
    ar = av.with_(role="ar")
    assert av.pair_faults(ar) == []
    assert av.pair_faults(ar.with_(base_model="mirror/qwen2.5-7b-instruct@v1")) == []
    other = ar.with_(d_model=64, site=Site(21), base_model="google/gemma-3-12b-it")
    assert len(av.pair_faults(other)) == 3
    assert any("role" in fault for fault in av.pair_faults(av))


def test_a_directory_without_a_sidecar_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SidecarError, match=r"has no nla_meta.yaml.*\n.*Next: "):
        Sidecar.read(tmp_path)
