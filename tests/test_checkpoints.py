"""Damaged, odd and hostile checkpoints: the right refusal for each, and nothing read outside the directory."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case
from huggingface_hub import save_torch_state_dict
from parity import check_capture, check_logits, check_reconstruct, close
from safetensors.torch import load_file, save_file

from nla_hub import NLA
from nla_hub.checkpoints import LoadOptions, WeightIndex, load_causal_lm
from nla_hub.errors import CheckpointError, NLAError, SidecarError, UnknownNameError, WeightsError
from nla_hub.sidecar import Sidecar, Site
from nla_hub.testing import RandomPair

WEIGHTS = "model.safetensors"
HEAD = "value_head.safetensors"
HALVES = ("av", "ar", "source")


def load(pair: RandomPair, half: str) -> Any:
    """Load one part of a pair as a user would."""
    if half == "source":
        return NLA.from_pretrained(pair.root, components=("ar",)).capture("the cat")
    return NLA.from_pretrained(pair.root, components=(half,))  # type: ignore[arg-type]


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def shard(directory: Path) -> list[Path]:
    """Split the weights of a directory into several files with an index."""
    state = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    save_torch_state_dict(state, directory, max_shard_size="60KB")
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 2
    return shards


def edit_index(directory: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    change(index["weight_map"])
    path.write_text(json.dumps(index), encoding="utf-8")


def refused(pair: RandomPair, half: str, *words: str, error: type[NLAError] = WeightsError) -> str:
    """Loading a half raises `error`; its message holds the directory's name, `words`, and a next step or what is expected."""
    with pytest.raises(error) as caught:
        load(pair, half)
    text = str(caught.value)
    assert type(caught.value) is error, text
    for word in (*words, f"/{half}"):
        assert word in text, f"{word!r} is not in: {text}"
    assert "Next: " in text or caught.value.expected or caught.value.faults, text
    assert len(text) < 2500
    return text


# -- damaged weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("keep", [0, 4, 100, 5_000, 50_000])
def test_a_truncated_file_is_refused(copied: RandomPair, half: str, keep: int) -> None:
    path = copied.root / half / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    refused(copied, half, WEIGHTS, "damaged or incomplete", "download it again")


@pytest.mark.parametrize("half", HALVES)
def test_a_header_larger_than_its_file_is_refused(copied: RandomPair, half: str) -> None:
    path = copied.root / half / WEIGHTS
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    refused(copied, half, WEIGHTS, "damaged or incomplete")


@pytest.mark.parametrize("half", HALVES)
def test_offsets_beyond_the_file_are_refused(copied: RandomPair, half: str) -> None:
    path = copied.root / half / WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(n for n in header if n != "__metadata__")
    header[name]["data_offsets"][1] += 10**9
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])
    refused(copied, half, WEIGHTS, "damaged or incomplete")


@pytest.mark.parametrize("half", HALVES)
def test_a_truncated_shard_is_refused_and_named(copied: RandomPair, half: str) -> None:
    last = shard(copied.root / half)[-1]
    last.write_bytes(last.read_bytes()[:-64])
    refused(copied, half, last.name, "damaged or incomplete")


@pytest.mark.parametrize("half", HALVES)
def test_a_missing_shard_is_refused_and_named(copied: RandomPair, half: str) -> None:
    last = shard(copied.root / half)[-1]
    last.unlink()
    refused(copied, half, last.name, "missing")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_missing_weight_is_refused_and_never_random(copied: RandomPair, half: str, name: str) -> None:
    edit(copied.root / half / WEIGHTS, lambda state: state.pop(name))
    refused(copied, half, f"missing: {'model.' if half == 'av' else ''}{name.removeprefix('model.')}", "would be random")


@pytest.mark.parametrize("half", HALVES)
def test_an_unexpected_weight_is_refused(copied: RandomPair, half: str) -> None:
    edit(copied.root / half / WEIGHTS, lambda state: state.update({"model.layers.0.extra.weight": torch.ones(3)}))
    refused(copied, half, "unexpected: ", "layers.0.extra.weight")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_value_in_a_used_weight_is_refused_and_named(copied: RandomPair, half: str, value: float) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.1.mlp.down_proj.weight"][5, 7] = value

    edit(copied.root / half / WEIGHTS, spoil)
    refused(copied, half, "NaN or infinite", "layers.1.mlp.down_proj.weight")


def test_a_non_finite_value_above_the_site_does_not_concern_capture(copied: RandomPair, llama: Case) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.3.mlp.down_proj.weight"][0, 0] = float("nan")
        state["lm_head.weight"][0, 0] = float("nan")

    edit(copied.source / WEIGHTS, spoil)
    close(load(copied, "source").vectors, llama.nla.capture("the cat").vectors)
    with pytest.raises(WeightsError, match="2 weights hold NaN"):
        assert NLA.from_pretrained(copied.root, components=("ar",)).source


@pytest.mark.parametrize("half", HALVES)
def test_a_weight_of_another_shape_is_refused(copied: RandomPair, half: str) -> None:
    edit(
        copied.root / half / WEIGHTS,
        lambda state: state.update({"model.layers.0.mlp.up_proj.weight": torch.ones(96, 65)}),
    )
    refused(copied, half, "1 misshapen", "up_proj.weight: got shape (96, 65), expected (96, 64)")


@pytest.mark.parametrize("half", HALVES)
def test_pickled_weights_are_refused_and_never_opened(copied: RandomPair, half: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {copied.root / 'executed'}",))

    torch.save({"w": Bomb()}, copied.root / half / "pytorch_model.bin")
    (copied.root / half / WEIGHTS).unlink()
    refused(copied, half, "pickled weights only", "pytorch_model.bin", "safetensors")
    assert not (copied.root / "executed").exists()


@pytest.mark.parametrize("half", HALVES)
def test_a_directory_without_weights_says_so(copied: RandomPair, half: str) -> None:
    (copied.root / half / WEIGHTS).unlink()
    refused(copied, half, "no weights", WEIGHTS)


# -- indices and links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", HALVES)
def test_a_sharded_checkpoint_equals_the_single_file(copied: RandomPair, llama: Case, half: str, vectors: Any) -> None:
    shard(copied.root / half)
    case = Case(llama.spec, copied, NLA.from_pretrained(copied.root))
    for name in ("av", "ar", "source"):
        case.__dict__[name] = getattr(llama, name)
    check_logits(case, vectors)
    check_reconstruct(case)
    check_capture(case)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", ["relative", "absolute", "subdirectory", "dots"])
def test_an_index_that_points_elsewhere_is_refused(copied: RandomPair, half: str, kind: str) -> None:
    shards = shard(copied.root / half)
    outside = copied.root / "outside.safetensors"
    shutil.move(shards[0], outside)
    (copied.root / half / "sub").mkdir()
    shutil.copy(outside, copied.root / half / "sub" / "x.safetensors")
    target = {
        "relative": "../outside.safetensors",
        "absolute": str(outside),
        "subdirectory": "sub/../../outside.safetensors",
        "dots": "..",
    }[kind]

    def point(weight_map: dict[str, str]) -> None:
        for name, file in weight_map.items():
            if file == shards[0].name:
                weight_map[name] = target

    edit_index(copied.root / half, point)
    refused(copied, half, "points outside", target)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("what", [WEIGHTS, "shard", "model.safetensors.index.json"])
def test_a_link_that_leads_outside_is_refused(copied: RandomPair, half: str, what: str) -> None:
    directory = copied.root / half
    path = directory / WEIGHTS if what == WEIGHTS else shard(directory)[0]
    if what.endswith(".json"):
        path = directory / what
    outside = copied.root / path.name
    shutil.move(path, outside)
    path.symlink_to(outside)
    refused(copied, half, "leads outside", path.name)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("sharded", [True, False])
def test_a_link_that_runs_in_a_circle_is_refused(copied: RandomPair, half: str, sharded: bool) -> None:
    directory = copied.root / half
    path = shard(directory)[0] if sharded else directory / WEIGHTS
    path.unlink()
    path.symlink_to(directory / "b")
    (directory / "b").symlink_to(path)
    refused(copied, half, "runs in a circle", path.name)


def test_a_value_head_that_is_a_link_to_elsewhere_is_refused(copied: RandomPair) -> None:
    shutil.move(copied.ar / HEAD, copied.root / HEAD)
    (copied.ar / HEAD).symlink_to(copied.root / HEAD)
    refused(copied, "ar", "leads outside", HEAD)


def test_links_of_a_downloaded_snapshot_into_its_blobs_are_followed(copied: RandomPair, llama: Case) -> None:
    repo = copied.root / "models--owner--x-ar"
    snapshot = repo / "snapshots" / "0123"
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(copied.ar.iterdir())):
        shutil.move(path, repo / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    nla = NLA.from_pretrained(copied.av, ar=snapshot, components=("ar",))
    close(nla.reconstruct("the cat"), llama.nla.reconstruct("the cat"))


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot be read"), ("[]", "cannot be read"), ('{"weight_map": 7}', "cannot be read"), ("{}", "cannot be read")],
)
def test_an_index_that_is_no_index_is_refused(copied: RandomPair, half: str, text: str, words: str) -> None:
    shard(copied.root / half)
    (copied.root / half / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    refused(copied, half, words)


@pytest.mark.parametrize("half", HALVES)
def test_an_index_that_disagrees_with_its_shards_is_refused(copied: RandomPair, half: str) -> None:
    directory = copied.root / half
    shard(directory)

    def disagree(weight_map: dict[str, str]) -> None:
        weight_map["model.imaginary.weight"] = next(iter(weight_map.values()))
        weight_map.pop("model.layers.0.mlp.up_proj.weight")

    edit_index(directory, disagree)
    refused(copied, half, "missing from its shard", "model.imaginary.weight", "not in the index: model.layers.0.mlp.up_proj")


def test_of_a_single_file_and_an_index_the_one_that_is_checked_is_the_one_that_is_loaded(
    copied: RandomPair, llama: Case
) -> None:
    state = load_file(copied.ar / WEIGHTS)
    shard(copied.ar)
    outside = copied.root / "outside.safetensors"
    save_file({k: v + 1 for k, v in state.items()}, outside, metadata={"format": "pt"})
    (copied.ar / WEIGHTS).symlink_to(outside)
    refused(copied, "ar", "leads outside")


@pytest.mark.parametrize("half", HALVES)
def test_a_config_that_names_another_weights_file_is_refused(copied: RandomPair, half: str) -> None:
    directory = copied.root / half
    shutil.copy(directory / WEIGHTS, directory / "other.safetensors")
    edit_config(directory, transformers_weights="other.safetensors")
    refused(copied, half, "transformers_weights", error=CheckpointError)


@pytest.mark.parametrize("half", HALVES)
def test_an_adapter_that_would_load_another_model_is_refused(copied: RandomPair, half: str) -> None:
    (copied.root / half / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/else"}', encoding="utf-8")
    refused(copied, half, "adapter_config.json", error=CheckpointError)


# -- the value head and the norm -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(weight=torch.ones(64, 63)), "weight: got shape (64, 63), expected (64, 64)"),
        (lambda s: s.update(weight=torch.ones(4096)), "expected (64, 64)"),
        (lambda s: s.update(bias=torch.ones(63)), "bias: got shape (63,), expected (64,)"),
        (lambda s: s.update(scale=torch.ones(1)), "unexpected: scale"),
        (lambda s: s.update(w=s.pop("weight")), "missing: weight"),
        (lambda s: s["weight"].view(-1)[7:19].fill_(float("nan")), "12 of 4096 values are NaN or infinite"),
        (lambda s: s["weight"][0].fill_(float("inf")), "64 of 4096 values"),
    ],
)
def test_a_value_head_that_does_not_fit_is_refused(copied: RandomPair, change: Any, words: str) -> None:
    edit(copied.ar / HEAD, change)
    refused(copied, "ar", words, HEAD)


def test_a_missing_value_head_is_refused(copied: RandomPair) -> None:
    (copied.ar / HEAD).unlink()
    refused(copied, "ar", "no value head", HEAD)


def test_a_truncated_value_head_is_refused(copied: RandomPair) -> None:
    (copied.ar / HEAD).write_bytes((copied.ar / HEAD).read_bytes()[:-8])
    refused(copied, "ar", "damaged or incomplete", HEAD)


def test_a_value_head_with_a_bias_is_used(copied: RandomPair, llama: Case) -> None:
    bias = torch.arange(64) / 8
    edit(copied.ar / HEAD, lambda state: state.update(bias=bias))
    close(load(copied, "ar").reconstruct("the cat"), llama.ar.vector("the cat") + bias)


@pytest.mark.parametrize("shape", [(64, 64), (384, 64), (1, 1), (7,)])
def test_an_lm_head_of_any_shape_on_an_ar_is_dropped(
    copied: RandomPair, llama: Case, shape: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    edit(copied.ar / WEIGHTS, lambda state: state.update({"lm_head.weight": torch.full(shape, float("nan"))}))
    with caplog.at_level(logging.DEBUG, logger="nla_hub"):
        close(load(copied, "ar").reconstruct("the cat"), llama.ar.vector("the cat"))
    assert "1 weights on disk are not needed here" in caplog.text


def test_a_norm_of_ones_on_an_ar_is_dropped(copied: RandomPair, llama: Case, caplog: pytest.LogCaptureFixture) -> None:
    edit(copied.ar / WEIGHTS, lambda state: state.update({"model.norm.weight": torch.ones(64)}))
    with caplog.at_level(logging.INFO, logger="nla_hub"):
        close(load(copied, "ar").reconstruct("the cat"), llama.ar.vector("the cat"))
    assert "dropped a final norm of ones" in caplog.text


def with_norm(pair: RandomPair, stripped: bool | None) -> torch.Tensor:
    weight = torch.linspace(0.5, 2, 64)
    edit(pair.ar / WEIGHTS, lambda state: state.update({"model.norm.weight": weight}))
    Sidecar.read(pair.ar).with_(final_norm_stripped=stripped).write(pair.ar)
    return weight


def test_a_trained_norm_that_nobody_explains_is_refused(copied: RandomPair) -> None:
    with_norm(copied, None)
    refused(copied, "ar", "trained final norm", "final_norm_stripped: true")


def test_a_norm_that_was_stripped_in_training_is_ignored(copied: RandomPair, llama: Case) -> None:
    with_norm(copied, True)
    close(load(copied, "ar").reconstruct("the cat"), llama.ar.vector("the cat"))


def test_a_norm_that_was_kept_in_training_is_applied(copied: RandomPair, llama: Case) -> None:
    weight = with_norm(copied, False)
    hidden = torch.linalg.solve(llama.ar.head.double(), llama.ar.vector("the cat").double())
    normed = hidden / (hidden.square().mean() + 1e-6).sqrt() * weight
    got = load(copied, "ar").reconstruct("the cat")
    assert float((got.double() - llama.ar.head.double() @ normed).abs().max() / got.abs().max()) < 1e-3


def test_a_norm_that_was_kept_in_training_but_is_not_there_is_refused(copied: RandomPair) -> None:
    Sidecar.read(copied.ar).with_(final_norm_stripped=False).write(copied.ar)
    refused(copied, "ar", "final_norm_stripped", "norm")


# -- the contract against the checkpoint ---------------------------------------------------------------------


def residecar(directory: Path, **changes: Any) -> None:
    Sidecar.read(directory).with_(**changes).write(directory)


@pytest.mark.parametrize(("half", "layer"), [("av", 4), ("ar", 1)])
def test_width_and_layer_that_contradict_the_config_come_together(copied: RandomPair, half: str, layer: int) -> None:
    for each in ("av", "ar"):
        residecar(copied.root / each, d_model=65, site=Site(layer))
    text = refused(copied, half, "d_model: the sidecar says 65", "layer: the sidecar says K", error=SidecarError)
    assert text.count("\n  - ") == 2


def test_halves_of_two_different_pairs_are_refused(copied: RandomPair) -> None:
    edit_config(copied.ar, num_hidden_layers=2)
    residecar(copied.ar, site=Site(1), base_model="owner/another-base", d_model=32)
    with pytest.raises(SidecarError, match="are not a pair") as caught:
        NLA.from_pretrained(copied.root)
    assert len(caught.value.faults) == 3


def test_halves_in_the_wrong_place_are_refused(copied: RandomPair) -> None:
    with pytest.raises(SidecarError, match=r"This is the AR half where the AV is expected.*\n.*name the AV first"):
        NLA.from_pretrained(copied.ar)
    with pytest.raises(SidecarError, match="This is the AV half where the AR is expected"):
        NLA.from_pretrained(copied.av, ar=copied.av)


def test_a_base_model_of_another_size_is_refused_with_all_differences(copied: RandomPair) -> None:
    from nla_hub.testing import random_model

    small = random_model("llama", 384, layers=2)
    small.save_pretrained(copied.source)
    with pytest.raises(SidecarError, match="not the base model of this pair") as caught:
        load(copied, "source")
    assert caught.value.faults == ("layer: the pair says K = 2, the model has 2 blocks",)


def test_a_base_model_of_another_family_is_refused(copied: RandomPair, make_case: Callable[..., Case]) -> None:
    from conftest import Spec

    other = make_case(Spec("qwen2"))
    nla = NLA.from_pretrained(copied.av, ar=copied.ar, base_model=other.pair.source)
    with pytest.raises(SidecarError, match=r"not the base model of this pair") as caught:
        nla.capture("the cat")
    assert "qwen2" in caught.value.faults[0]
    assert "llama" in caught.value.faults[0]


def test_marker_faults_stop_a_load_all_at_once(copied: RandomPair) -> None:
    marker = Sidecar.read(copied.av).marker
    assert marker is not None
    residecar(copied.av, marker=type(marker)(marker.char, 9, 10, 11))
    text = refused_prompt(copied)
    assert text.count("\n  - ") == 3


def refused_prompt(pair: RandomPair) -> str:
    with pytest.raises(SidecarError, match="does not fit its tokenizer") as caught:
        load(pair, "av")
    return str(caught.value)


# -- configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot be used"), ("[]", "cannot be used"), ("{}", "cannot be used"), ('{"model_type": "nope"}', "cannot be used")],
)
def test_a_broken_config_is_a_typed_error(copied: RandomPair, half: str, text: str, words: str) -> None:
    (copied.root / half / "config.json").write_text(text, encoding="utf-8")
    refused(copied, half, words, error=CheckpointError)


@pytest.mark.parametrize("half", HALVES)
def test_a_missing_config_is_a_typed_error(copied: RandomPair, half: str) -> None:
    (copied.root / half / "config.json").unlink()
    refused(copied, half, "no config.json", error=CheckpointError)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": 5},
        {"vocab_size": 10},
        {"num_key_value_heads": 7},
        {"hidden_act": "no such function"},
        {"rope_parameters": {"rope_type": "no such type"}},
    ],
)
def test_a_config_that_builds_no_model_is_a_typed_error(
    copied: RandomPair, half: str, changes: dict[str, Any]
) -> None:
    edit_config(copied.root / half, **changes)
    with pytest.raises(CheckpointError):
        load(copied, half)


def test_an_unknown_family_is_named_with_the_known_ones(copied: RandomPair) -> None:
    edit_config(copied.av, model_type="gpt2", architectures=["GPT2LMHeadModel"], n_embd=64, n_layer=4)
    with pytest.raises(UnknownNameError, match="adapter for model_type is called 'gpt2'"):
        load_causal_lm(copied.av, LoadOptions())


def test_code_in_a_repository_never_runs_unasked(copied: RandomPair) -> None:
    there = copied.root / "executed"
    (copied.av / "evil.py").write_text(f"open({str(there)!r}, 'w')\nclass C: pass\n", encoding="utf-8")
    edit_config(copied.av, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"})
    refused(copied, "av", "cannot be used", "trust_remote_code", error=CheckpointError)
    assert not there.exists()


def test_a_broken_tokenizer_is_a_typed_error(copied: RandomPair) -> None:
    (copied.av / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load(copied, "av")


def test_an_ar_without_tokenizer_uses_that_of_the_av(copied: RandomPair, llama: Case) -> None:
    for path in copied.ar.glob("token*"):
        path.unlink()
    close(load(copied, "ar").reconstruct("the cat"), llama.ar.vector("the cat"))


# -- dtypes --------------------------------------------------------------------------------------------------


def test_float32_on_disk_in_another_dtype_is_said(copied: RandomPair, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="nla_hub"):
        nla = NLA.from_pretrained(copied.root, dtype="bfloat16")
    assert caplog.text.count("stored in float32, loaded in bfloat16") == 2
    assert nla.av.engine.av.loaded.model.dtype == torch.bfloat16
    assert nla.ar.model.head.weight.dtype == torch.float32
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="nla_hub"):
        assert NLA.from_pretrained(copied.root).av.engine.av.loaded.model.dtype == torch.float32
    assert "stored in" not in caplog.text


def test_an_unknown_dtype_is_a_typed_error(copied: RandomPair) -> None:
    for bad in ("float31", "int8", "Tensor"):
        with pytest.raises(CheckpointError, match="Unknown dtype"):
            NLA.from_pretrained(copied.root, dtype=bad)


def test_headers_tell_shapes_and_dtypes_without_loading(llama: Case) -> None:
    index = WeightIndex.read(llama.pair.ar)
    assert index.tensors["model.embed_tokens.weight"].shape[1] == 64
    assert {t.dtype for t in index.tensors.values()} == {"F32"}
