"""Every dialect in which sidecars are found reads as the canonical form; what is written is stable and fits its schema."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strangers import names, values
from transformers import Gemma3Config, GPT2Config, GPTNeoXConfig, LlamaConfig

import nla_hub
from nla_hub import yaml_io
from nla_hub.errors import SidecarError
from nla_hub.sidecar import (
    Hints,
    Injection,
    MarkerTokens,
    ReferenceRecord,
    ReleaseRecord,
    Role,
    Score,
    Sidecar,
    Site,
    merge,
    named_role,
)
from nla_hub.sidecar_dialects import PLACES, find
from nla_hub.sidecar_schema import keys, schema

PACKAGED = Path(nla_hub.__file__).parent / "tiny" / "weights"
K, D = 20, 3584
AV_TEMPLATE = "Someone stored a thought in <v>{injection_char}</v>. Which?"
AR_TEMPLATE = "A thought: {explanation}\nIts vector:"
TOKENS = {
    "injection_char": "㈎",
    "injection_token_id": 149705,
    "injection_left_neighbor_id": 29,
    "injection_right_neighbor_id": 522,
    "critic_suffix_ids": [1318, 29],
}
CANONICAL: dict[str, Any] = {
    "kind": "nla_model",
    "schema_version": 2,
    "role": "av",
    "base_checkpoint": "owner/Base-7B",
    "d_model": D,
    "extraction_layer_index": K,
    "extraction": {"injection_scale": 150.0, "mse_scale": math.sqrt(D)},
    "injection": {"kind": "overwrite"},
    "tokens": TOKENS,
    "prompt_templates": {"av": AV_TEMPLATE, "ar": AR_TEMPLATE},
    "output_format": "explanation_tags",
}


def form(*without: str, **changes: Any) -> dict[str, Any]:
    """CANONICAL without some keys (dotted), with others added or replaced."""
    raw = copy.deepcopy(CANONICAL)
    for path in without:
        *parents, last = path.split(".")
        find(raw, tuple(parents)).pop(last)
    return {**raw, **changes}


def put(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`raw` with one more value, at a dotted path."""
    *parents, last = path.split(".")
    holder = raw
    for key in parents:
        holder = holder.setdefault(key, {})
    holder[last] = value
    return raw


def faults(raw: Mapping[str, Any], **options: Any) -> str:
    with pytest.raises(SidecarError) as caught:
        Sidecar.parse(raw, where="here/nla_meta.yaml", **options)
    assert caught.value.faults
    return "\n".join(caught.value.faults)


# -- dialects ------------------------------------------------------------------------------------------------

OLD_TEMPLATES = {"actor": AV_TEMPLATE, "critic": AR_TEMPLATE}
NO_LAYER = ("extraction_layer_index",)
PLAIN = ("injection", "output_format")  # keys of this project's own

AV_DIALECTS: dict[str, dict[str, Any]] = {
    "canonical": CANONICAL,
    "released": form(
        *PLAIN,
        stage=None,
        extraction={"injection_scale": 150, "mse_scale": 59.86651818838306},
        trained_on=["corpus"],
        parent_checkpoints=["owner/Base-7B"],
        created_at="2026-01-01T00:00:00+00:00",
        created_by="trainer",
        training={"lr": 1e-5, "loss_type": "policy_loss"},
    ),
    "as a trainer leaves it": form(
        *PLAIN,
        role="actor",
        prompt_templates=OLD_TEMPLATES,
        training={"rollout_id": 5, "num_layers": 28},
    ),
    "verbalizer": form(
        *PLAIN, role="verbalizer", prompt_templates={"verbalizer": AV_TEMPLATE, "reconstructor": AR_TEMPLATE}
    ),
    "version 1": form(*PLAIN, *NO_LAYER, schema_version=1, critic={"num_hidden_layers": K}),
    "older, layer": form(*PLAIN, *NO_LAYER, layer=K, role_aliases={"actor": "av"}),
    "older, ar": form(*PLAIN, *NO_LAYER, ar={"num_hidden_layers": K}),
    "layer in extraction": form(
        *PLAIN, *NO_LAYER, extraction={"layer_index": K, "injection_scale": "150", "mse_scale": "sqrt_d_model"}
    ),
    "width in extraction": form(
        *PLAIN,
        "d_model",
        "base_checkpoint",
        base_model="owner/Base-7B",
        extraction={"d_model": D, "injection_scale": 150.0},
    ),
    "no header": form(*PLAIN, "kind", "schema_version"),
    "everything twice": form(
        layer=K,
        critic={"extraction_layer_index": K, "num_hidden_layers": K},
        base_model="owner/Base-7B",
        prompt_templates={"av": AV_TEMPLATE, "ar": AR_TEMPLATE, **OLD_TEMPLATES},
        extraction={"d_model": D, "layer_index": K, "injection_scale": "1.5e2", "mse_scale": math.sqrt(D)},
    ),
    "data set": {
        "kind": "nla_dataset",
        "schema_version": 1,
        "dataset_id": "d1",
        "row_count": 1000,
        "extraction": {
            "base_model": "owner/Base-7B",
            "d_model": D,
            "layer_index": K,
            "norm": "none",
            "corpus": "c",
            "corpus_slice": {"start": 0, "length": 10},
            "positions_per_doc": 10,
            "injection_scale": 150.0,
        },
        "tokens": TOKENS,
        "prompt_templates": OLD_TEMPLATES,
        "api_summaries": {"model": "m", "temperature": 1.0},
        "parent_datasets": ["d0"],
        "keep_debug_metadata": True,
    },
}


@pytest.mark.parametrize("name", AV_DIALECTS)
def test_every_dialect_reads_as_the_canonical_form(name: str) -> None:
    canonical = Sidecar.parse(CANONICAL)
    assert canonical.extra == {}
    read = Sidecar.parse(AV_DIALECTS[name], role="av")
    assert read.with_(extra={}) == canonical
    text = yaml_io.dumps(read.to_mapping())
    again = Sidecar.parse(yaml_io.loads(text, where="x", error=SidecarError))
    assert again == read
    assert yaml_io.dumps(again.to_mapping()) == text


@pytest.mark.parametrize("name", AV_DIALECTS)
def test_what_moved_is_written_once_and_the_rest_is_kept(name: str) -> None:
    raw, written = AV_DIALECTS[name], Sidecar.parse(AV_DIALECTS[name], role="av").to_mapping()
    for places in PLACES.values():
        assert [p.path for p in places if find(written, p.keys) is not None] == [places[0].path]
    moved = {place.keys for places in PLACES.values() for place in places}
    own = {"kind", "schema_version", "role"}

    def check(value: Any, path: tuple[str, ...]) -> None:
        if path in moved or path[:1][0] in own or path == ("stage",) or path[-1].endswith("_scale"):
            return
        if isinstance(value, dict):
            for key, item in value.items():
                check(item, (*path, key))
        else:
            assert find(written, path) == value, path

    for key, item in raw.items():
        check(item, (key,))


AR_DIALECTS: dict[str, dict[str, Any]] = {
    "released": form(*PLAIN, role="ar", extraction={"injection_scale": None, "mse_scale": 59.86651818838306}),
    "as a trainer leaves it": form(
        *PLAIN,
        role="critic",
        extraction={"injection_scale": None},
        prompt_templates=OLD_TEMPLATES,
        critic={"extraction_layer_index": K},
    ),
    "version 1": form(
        *PLAIN, *NO_LAYER, role="critic", schema_version=1, extraction={}, critic={"num_hidden_layers": K}
    ),
    "reconstructor": form(*PLAIN, "extraction", role="reconstructor"),
    "number of blocks only": form(*PLAIN, *NO_LAYER, "extraction", role="ar", training={"num_layers": K + 1}),
    "block count beside K": form(*PLAIN, "extraction", role="ar", training={"num_layers": K}),
}


@pytest.mark.parametrize("name", AR_DIALECTS)
def test_ar_dialects(name: str) -> None:
    read = Sidecar.parse(AR_DIALECTS[name])
    assert read.with_(extra={}) == Sidecar.parse(CANONICAL).with_(role="ar", injection=Injection("overwrite", None))
    if "training" in AR_DIALECTS[name]:
        assert read.to_mapping()["training"] == AR_DIALECTS[name]["training"]


def test_the_number_of_blocks_does_not_tell_the_layer_of_an_av() -> None:
    raw = form(*NO_LAYER, training={"num_layers": 28})
    assert "extraction_layer_index: missing (training.num_layers counts the blocks of the whole AV" in faults(raw)
    assert Sidecar.parse(raw, hints=Hints(layer=K)).site == Site(K)
    ar = form(*NO_LAYER, role="ar", training={"num_layers": K})
    assert Sidecar.parse(ar, hints=Hints(layer=K)).site == Site(K), "config.json tells more than that number"
    for odd in (0, -1, True, "21", None, 10**50):
        assert "extraction_layer_index: missing" in faults(form(*NO_LAYER, role="ar", training={"num_layers": odd}))


def test_the_role_is_the_sidecars_own_or_the_callers() -> None:
    silent = form("role")
    assert named_role(silent) is None
    assert "role: got None" in faults(silent)
    roles: tuple[Role, ...] = ("av", "ar")
    for role in roles:
        assert Sidecar.parse(silent, role=role).role == role
        assert Sidecar.parse(CANONICAL, role=role).role == "av", "it names its role"
    assert "role: got 'policy'" in faults(form(role="policy"), role="av")
    for word, role in {"actor": "av", "critic": "ar", "verbalizer": "av", "reconstructor": "ar"}.items():
        assert named_role({"role": word}) == role
    assert [named_role({"role": odd}) for odd in ("policy", None, 1, ["av"])] == [None] * 4


# -- places that disagree ------------------------------------------------------------------------------------

OTHER: dict[str, Any] = {
    "base_checkpoint": "owner/Other-7B",
    "d_model": D + 1,
    "extraction_layer_index": K + 1,
    "prompt_templates.av": "Other <v>{injection_char}</v>",
    "prompt_templates.ar": "Other {explanation}",
}
PAIRS = [
    (name, one.path, other.path)
    for name, places in PLACES.items()
    for i, one in enumerate(places)
    for other in places[i + 1 :]
]


@pytest.mark.parametrize(("name", "one", "other"), PAIRS)
def test_two_places_that_disagree_are_both_named(name: str, one: str, other: str) -> None:
    assert set(OTHER) == set(PLACES)
    agreed = find(CANONICAL, tuple(name.split(".")))
    raw = put(put(form(name), one, agreed), other, OTHER[name])
    message = faults(raw)
    assert f"{one} says {agreed!r}" in message
    assert f"{other} says {OTHER[name]!r}" in message
    assert len(message.splitlines()) == 1
    assert Sidecar.parse(put(put(form(name), one, agreed), other, agreed)) == Sidecar.parse(CANONICAL)


def test_mirrors_of_a_base_model_agree_and_keep_their_names() -> None:
    raw = form(base_model="mirror/base-7b@v1")
    sidecar = Sidecar.parse(raw)
    assert sidecar.base_model == "owner/Base-7B"
    assert sidecar.extra == {"base_model": "mirror/base-7b@v1"}
    assert Sidecar.parse(sidecar.to_mapping()) == sidecar


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("extraction.norm", "whitened", "extraction.norm: got 'whitened', expected 'none'; vectors would have to be"),
        ("extraction.whitening", {"stats": "s.npz"}, "extraction.whitening: got {'stats'"),
        ("extraction.checkpoints", [{"depth": 0}, {"depth": 5}], "vectors of 2 places in the model"),
        ("extraction.checkpoints", 7, "vectors of several places in the model"),
        ("variant", "universal", "variant: 'universal' serves many layers"),
        ("d_shared", 2048, "d_shared: got 2048; this NLA reads a space that several models share"),
    ],
)
def test_what_is_no_ordinary_pair_is_refused_with_the_reason(path: str, value: Any, words: str) -> None:
    assert words in faults(put(form(), path, value))
    assert Sidecar.parse(merge(put(form(), path, value), put({}, path, None))).role == "av"


# -- scales and the kind of injection ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "scale"),
    [
        (150, 150.0),
        ("150", 150.0),
        ("1.5e2", 150.0),
        ("sqrt_d_model", math.sqrt(D)),
        *((raw, None) for raw in (None, "raw", "none")),
    ],
)
def test_injection_scales(value: Any, scale: float | None) -> None:
    raw = form("injection", extraction={"injection_scale": value})
    sidecar = Sidecar.parse(raw)
    assert sidecar.injection == Injection("overwrite", scale)
    assert sidecar.to_mapping()["extraction"]["injection_scale"] == scale
    assert Sidecar.parse(sidecar.to_mapping()) == sidecar


@pytest.mark.parametrize(
    ("extraction", "scale", "written"),
    [
        ({}, None, math.sqrt(D)),
        ({"mse_scale": "sqrt_d_model"}, None, math.sqrt(D)),
        ({"mse_scale": 59.87}, 59.87, 59.87),
        ({"mse_scale": "3"}, 3.0, 3.0),
        ({"mse_scale": None}, "raw", None),
        ({"mse_scale": "raw"}, "raw", None),
    ],
)
def test_mse_scales(extraction: dict[str, Any], scale: Any, written: float | None) -> None:
    sidecar = Sidecar.parse(form(role="ar", extraction=extraction))
    assert sidecar.mse_scale == scale
    assert sidecar.to_mapping()["extraction"]["mse_scale"] == written
    assert Sidecar.parse(sidecar.to_mapping()) == sidecar


def test_an_absent_kind_is_overwrite_with_a_scale_a_known_override_or_a_question() -> None:
    silent = form("injection", "extraction.injection_scale")
    message = faults(silent)
    for words in ("EasyNLA and nanoNLA", '{"injection": {"kind": "add"}}', "extraction.injection_scale: missing"):
        assert words in message
    adding = Sidecar.parse(silent, hints=Hints(injection="add"))
    assert adding.injection == Injection("add", None)
    assert "injection_scale" not in adding.to_mapping()["extraction"]
    assert "injection_scale: missing" in faults(silent, hints=Hints(injection="overwrite"))
    assert Sidecar.parse(form("injection"), hints=Hints(injection="add")).injection.kind == "overwrite"
    assert Sidecar.parse(merge(silent, {"injection": {"kind": "add"}})).injection == Injection("add", None)
    both = Sidecar.parse(form(injection={"kind": "add"}))
    assert Sidecar.parse(both.to_mapping()) == both, "a scale that is not used is not lost"


def test_head_input_and_adapter_stack() -> None:
    assert Sidecar.parse(CANONICAL).head_input == "raw"
    assert "head_input" not in Sidecar.parse(form(head_input="raw")).to_mapping()
    ar = Sidecar.parse(form(role="ar", head_input="normalized", adapter_stack=["ar_sft/", "iter_000400/ar"]))
    assert (ar.head_input, ar.adapter_stack) == ("normalized", ("ar_sft", "iter_000400/ar"))
    assert ar.to_mapping()["head_input"] == "normalized"
    assert Sidecar.parse(ar.to_mapping()) == ar
    assert "'normalized' needs an extraction.mse_scale" in faults(
        form(role="ar", head_input="normalized", extraction={"mse_scale": None})
    )


# -- hints ---------------------------------------------------------------------------------------------------

EVERYTHING = Hints(
    d_model=64,
    layer=2,
    base_model="hinted/base",
    injection="add",
    final_norm_stripped=True,
    head_input="normalized",
    measure=lambda char, template: MarkerTokens(char, 1, 2, 3),
)


def test_hints_speak_only_where_the_sidecar_is_silent() -> None:
    full = form(role="av", final_norm_stripped=False, head_input="raw")
    assert Sidecar.parse(full, hints=EVERYTHING) == Sidecar.parse(full)
    silent = {"role": "av", "prompt_templates": {"av": AV_TEMPLATE}, "tokens": {"injection_char": "㈎"}}
    read = Sidecar.parse(silent, hints=EVERYTHING)
    assert (read.d_model, read.site, read.base_model) == (64, Site(2), "hinted/base")
    assert read.injection == Injection("add", None)
    assert (read.final_norm_stripped, read.head_input) == (True, "normalized")
    assert read.marker == MarkerTokens("㈎", 1, 2, 3)


def test_missing_marker_ids_are_measured_and_given_ones_stay() -> None:
    partial = form("tokens.injection_left_neighbor_id")
    assert Sidecar.parse(partial, hints=EVERYTHING).marker == MarkerTokens("㈎", 149705, 2, 522)
    assert faults(partial) == "tokens.injection_left_neighbor_id: missing"

    def refuse(char: str, template: str) -> MarkerTokens:
        raise SidecarError("The marker is 3 tokens.")

    message = faults(partial, hints=Hints(measure=refuse))
    assert "tokens: The marker is 3 tokens." in message
    assert "tokens.injection_left_neighbor_id: missing" in message

    def never(char: str, template: str) -> MarkerTokens:
        raise AssertionError("measured without need or without a template")

    Sidecar.parse(CANONICAL, hints=Hints(measure=never))
    Sidecar.parse({**partial, "role": "ar"}, hints=Hints(measure=never))
    for broken in (form("tokens.injection_char"), put(partial, "prompt_templates.av", "no marker")):
        faults(broken, hints=Hints(measure=never))


def test_an_ar_keeps_a_marker_that_it_cannot_use() -> None:
    raw = form("tokens.injection_left_neighbor_id", role="ar")
    sidecar = Sidecar.parse(raw)
    assert sidecar.marker is None
    assert sidecar.to_mapping()["tokens"] == raw["tokens"]
    assert Sidecar.parse(sidecar.to_mapping()) == sidecar


def test_a_null_where_keys_could_be_says_nothing() -> None:
    raw = form(*PLAIN, "extraction", "tokens", role="ar", critic=None, ar=None, tokens=None, extraction=None)
    assert Sidecar.parse(raw) == Sidecar.parse({k: v for k, v in raw.items() if v is not None})
    assert Sidecar.parse({**raw, "training": None}).to_mapping()["training"] is None


def test_the_hash_does_not_depend_on_the_order_of_a_set() -> None:
    one, other = set([0, 8]), set([8, 0])  # noqa: C405, their hashes collide, so the order of insertion shows
    assert str(one) != str(other)
    assert Sidecar.parse(form(members=one)).integrity() == Sidecar.parse(form(members=other)).integrity()


# -- what a user lays over it --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "one", "other"), PAIRS)
def test_the_user_wins_whatever_the_dialect(name: str, one: str, other: str) -> None:
    raw = put(form(name), one, find(CANONICAL, tuple(name.split("."))))
    before = copy.deepcopy(raw)
    merged = merge(raw, put({}, other, OTHER[name]))
    assert raw == before
    sidecar = Sidecar.parse(merged)
    assert find(sidecar.to_mapping(), tuple(name.split("."))) == OTHER[name]
    assert sidecar.with_(extra={}) != Sidecar.parse(CANONICAL)


def test_merging_goes_deep_and_needs_a_mapping() -> None:
    raw = form(integrity={"sha256": "0" * 64})
    assert merge(raw, {}) == raw
    merged = merge(raw, {"tokens": {"injection_token_id": 7}, "extraction": {"mse_scale": 2.0}, "new": {"a": [1]}})
    assert "integrity" not in merged
    assert merged["tokens"] == {**TOKENS, "injection_token_id": 7}
    assert merged["extraction"] == {"injection_scale": 150.0, "mse_scale": 2.0}
    assert merged["new"] == {"a": [1]}
    told = {"new": {"a": [1]}}
    merge(raw, told)["new"]["a"].append(2)
    assert told == {"new": {"a": [1]}}
    odd: Any
    for odd in ([("a", 1)], "x: 1", {1: 2}):
        with pytest.raises(SidecarError, match="sidecar="):
            merge(raw, odd)


def test_files_of_models_and_of_data_are_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "nla_meta.yaml").write_text(yaml_io.dumps(CANONICAL), encoding="utf-8")
    (tmp_path / "x.parquet.nla_meta.yaml").write_text(yaml_io.dumps(AV_DIALECTS["data set"]), encoding="utf-8")
    assert Sidecar.read(tmp_path) == Sidecar.read(tmp_path / "nla_meta.yaml") == Sidecar.parse(CANONICAL)
    data = Sidecar.read(tmp_path / "x.parquet", role="av")
    assert data == Sidecar.parse(AV_DIALECTS["data set"], role="av")
    with pytest.raises(SidecarError, match="role: got None"):
        Sidecar.read(tmp_path / "x.parquet")
    with pytest.raises(SidecarError, match=r"has no y\.parquet\.nla_meta\.yaml"):
        Sidecar.read(tmp_path / "y.parquet")
    data.write(tmp_path)
    assert Sidecar.read(tmp_path, override={"layer": 3}).site == Site(3)
    assert not caplog.records, "what the user says is no edit of the file"


# -- configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=2),
        GPT2Config(n_embd=64, n_layer=3, n_head=2),
        GPTNeoXConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=2),
        Gemma3Config(text_config={"hidden_size": 64, "num_hidden_layers": 3}, vision_config={"hidden_size": 32}),
    ],
    ids=lambda config: config.model_type,
)
def test_configs_of_every_family_are_held_against_it(config: Any) -> None:
    av = Sidecar.parse({**CANONICAL, "d_model": 64, "extraction_layer_index": 2})
    ar = av.with_(role="ar")
    assert av.config_faults(config) == ar.config_faults(config) == []
    assert "hidden_size 64" in av.with_(d_model=32).config_faults(config)[0]
    assert "has blocks 0 to 2" in av.with_(site=Site(3)).config_faults(config)[0]
    assert "num_hidden_layers 3" in ar.with_(site=Site(1)).config_faults(config)[0]


def test_a_config_without_sizes_is_a_fault() -> None:
    assert "describes no decoder" in Sidecar.parse(CANONICAL).config_faults(object())[0]


# -- the schema of what is written ---------------------------------------------------------------------------

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
ANNOTATIONS = {"$schema", "$comment", "title", "description"}


def fits(value: Any, kind: str) -> bool:
    if kind in ("integer", "number"):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and (kind == "number" or float(value).is_integer())
    return isinstance(value, TYPES[kind])


def violations(node: Mapping[str, Any], value: Any, path: str = "$") -> Iterator[str]:
    """What JSON Schema says against `value`: the keywords that the schema uses, and an error for any other."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    for word, rule in node.items():
        wrong = False
        if word == "type":
            wrong = not any(fits(value, kind) for kind in ([rule] if isinstance(rule, str) else rule))
        elif word == "const":
            wrong = value != rule
        elif word == "enum":
            wrong = value not in rule
        elif word in ("minimum", "maximum", "exclusiveMinimum"):
            wrong = number and not {"minimum": value >= rule, "maximum": value <= rule}.get(word, value > rule)
        elif word in ("minLength", "maxLength", "pattern"):
            if isinstance(value, str):
                ok = {"minLength": len(value) >= (rule if word == "minLength" else 0)}
                ok["maxLength"] = word != "maxLength" or len(value) <= rule
                ok["pattern"] = word != "pattern" or re.search(rule, value) is not None
                wrong = not ok[word]
        elif word == "minItems":
            wrong = isinstance(value, list) and len(value) < rule
        elif word == "items":
            for i, item in enumerate(value if isinstance(value, list) else []):
                yield from violations(rule, item, f"{path}[{i}]")
        elif word == "properties":
            for key, inner in rule.items():
                if isinstance(value, dict) and key in value:
                    yield from violations(inner, value[key], f"{path}.{key}")
        elif word == "required":
            wrong = isinstance(value, dict) and not set(rule) <= set(value)
        elif word == "allOf":
            for inner in rule:
                yield from violations(inner, value, path)
        elif word == "if":
            if not list(violations(rule, value, path)):
                yield from violations(node["then"], value, path)
        elif word != "then" and word not in ANNOTATIONS:
            raise AssertionError(f"this validator does not know {word!r}")
        if wrong:
            yield f"{path}: {word} {rule}"


def written(sidecar: Sidecar) -> Any:
    """What lies in the file, as JSON has it."""
    mapping = {**sidecar.to_mapping(), "integrity": {"sha256": sidecar.integrity()}}
    return yaml.safe_load(yaml_io.dumps(mapping))


FULL = Sidecar.parse(CANONICAL).with_(
    source_revision="abc",
    pair_repo="owner/x-ar",
    stage="rl",
    fve=Score(0.7, "raw_variance", "x", 100, cosine=0.9, protocol="p", commit="c"),
    fve_reference=ReferenceRecord("x", 100, 0.7, 0.9, 1.0, 20.0),
    final_norm_stripped=True,
    head_input="normalized",
    ar_special_tokens=False,
    adapter_stack=("av_sft", "iter_000400/av"),
    release=ReleaseRecord("0123456789ab", "v1"),
)


@pytest.mark.parametrize("name", [*AV_DIALECTS, *(f"ar: {name}" for name in AR_DIALECTS)])
def test_what_is_written_fits_the_schema(name: str) -> None:
    raw = AR_DIALECTS[name.removeprefix("ar: ")] if name.startswith("ar: ") else AV_DIALECTS[name]
    assert list(violations(schema(), written(Sidecar.parse(raw, role="av")))) == []


def test_what_this_project_has_written_fits_the_schema(case: Case) -> None:
    for directory in (case.pair.av, case.pair.ar, PACKAGED / "av", PACKAGED / "ar"):
        raw = yaml.safe_load((directory / "nla_meta.yaml").read_text(encoding="utf-8"))
        assert list(violations(schema(), raw)) == []


def test_the_schema_names_every_key_that_is_written_and_no_other() -> None:
    def names(value: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
        for key, item in value.items():
            yield ".".join((*path, key))
            if isinstance(item, dict):
                yield from names(item, (*path, key))

    assert set(names(written(FULL))) == {name for name, _, _ in keys(schema())}
    assert list(violations(schema(), written(FULL))) == []
    assert json.loads(json.dumps(schema())) == schema()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("role", "actor"),
        ("kind", "nla_dataset"),
        ("schema_version", 1),
        ("d_model", 0),
        ("d_model", "64"),
        ("extraction_layer_index", -1),
        ("extraction", {"mse_scale": 1.0}),
        ("extraction.injection_scale", 0),
        ("extraction.injection_scale", "raw"),
        ("extraction.mse_scale", None),  # beside head_input: normalized
        ("injection.kind", "paste"),
        ("tokens", {"injection_char": "㈎"}),
        ("tokens.injection_char", "ab"),
        ("tokens.critic_suffix_ids", [1, "2"]),
        ("prompt_templates", {"ar": "{explanation}"}),
        ("prompt_templates.av", "no marker"),
        ("prompt_templates.av", "{injection_char} and {injection_char}"),
        ("output_format", "json"),
        ("head_input", "raw"),
        ("adapter_stack", []),
        ("adapter_stack", ["../x"]),
        ("fve", {"value": 0.5}),
        ("fve_reference.raw_variance", 0),
        ("integrity.sha256", "0"),
    ],
)
def test_the_schema_refuses(path: str, value: Any) -> None:
    assert list(violations(schema(), put(written(FULL), path, value))) != []


def test_the_schema_asks_an_ar_for_its_template() -> None:
    assert list(violations(schema(), written(FULL.with_(role="ar")))) == []
    assert list(violations(schema(), written(FULL.with_(role="ar", ar_template=None)))) != []


# -- whatever strangers write --------------------------------------------------------------------------------

KNOWN = sorted({name for name, _, _ in keys(schema())} | {place.path for places in PLACES.values() for place in places})
UNUSED = names.filter(lambda name: name not in {path.split(".")[0] for path in KNOWN} | {"variant", "d_shared"})
WORDS = ["av", "raw", "none", "sqrt_d_model", "add", "1e5", "{injection_char}"]
TEMPTING = st.sampled_from([*OTHER.values(), *WORDS, K, D, {}, [], None, True, -1, 0.5, 10**400])


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from([*KNOWN, "variant", "d_shared", "training.num_layers"]), TEMPTING | values, max_size=5
    ),
    st.dictionaries(names, values, max_size=3),
    st.booleans(),
    st.sampled_from(["av", "ar", None]),
)
def test_nothing_but_a_sidecar_error_or_a_sidecar_comes_of_it(
    given_values: dict[str, Any], other: dict[str, Any], on_canonical: bool, role: Role | None
) -> None:
    raw: dict[str, Any] = {**other, **(form() if on_canonical else {})}
    for path, value in given_values.items():
        *parents, last = path.split(".")
        if isinstance(find(raw, tuple(parents)) if parents else raw, (dict, type(None))):
            holder = raw
            for key in parents:
                if not isinstance(holder.get(key), dict):
                    holder[key] = {}
                holder = holder[key]
            holder[last] = copy.deepcopy(value)
    try:
        sidecar = Sidecar.parse(raw, role=role)
    except SidecarError:
        return
    assert list(violations(schema(), sidecar.to_mapping())) == []
    assert Sidecar.parse(sidecar.to_mapping()) == sidecar


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(AV_DIALECTS)),
    st.dictionaries(UNUSED, values, max_size=3),
    st.dictionaries(names, values, max_size=3),
    st.sampled_from(["extraction", "tokens", "prompt_templates", "injection", "critic", "training"]),
)
def test_writing_is_stable_and_loses_no_unknown_key(
    name: str, top: dict[str, Any], nested: dict[str, Any], place: str
) -> None:
    new = {key: value for key, value in top.items() if key not in AV_DIALECTS[name]}
    inner = {f"x {key}": value for key, value in nested.items()}
    raw = {**copy.deepcopy(AV_DIALECTS[name]), **new}
    raw[place] = {**(raw.get(place) or {}), **inner}
    first = Sidecar.parse(yaml_io.loads(yaml_io.dumps(raw), where="x", error=SidecarError), role="av")
    text = yaml_io.dumps(first.to_mapping())
    again = Sidecar.parse(yaml_io.loads(text, where="x", error=SidecarError))
    assert again == first
    assert yaml_io.dumps(again.to_mapping()) == text
    assert again.integrity() == first.integrity()
    for mapping, kept in ((again.to_mapping(), new), (again.to_mapping().get(place, {}), inner)):
        assert {key: mapping[key] for key in kept} == kept


@pytest.mark.parametrize("value", ["v1", {"id": 3, "tag": "v1"}, ["a"]])
def test_a_release_of_another_make_is_kept_and_means_nothing(value: Any) -> None:
    read = Sidecar.parse({**CANONICAL, "release": value})
    assert read.release is None
    assert read.to_mapping()["release"] == value
