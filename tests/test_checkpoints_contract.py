"""Checkpoints that contradict their contract: value heads, norms, sidecars, configs, tokenizers, dtypes."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case, Spec
from damage import HALVES, HEAD, WEIGHTS, edit, edit_config, load, refused, residecar
from parity import close

from nla_hub import NLA
from nla_hub.errors import CheckpointError, SidecarError, UnknownNameError
from nla_hub.pretrained import LoadOptions, load_causal_lm
from nla_hub.sidecar import Sidecar, Site
from nla_hub.testing import RandomPair, random_model
from nla_hub.weights import WeightIndex

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


def test_a_value_head_in_bfloat16_is_used_in_float32(copied: RandomPair, llama: Case) -> None:
    edit(copied.ar / HEAD, lambda state: state.update(weight=state["weight"].bfloat16()))
    nla = load(copied, "ar")
    assert torch.equal(nla.ar.model.head.weight, llama.ar.head.bfloat16().float())


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

    small = random_model("llama", 384, layers=2)
    small.save_pretrained(copied.source)
    with pytest.raises(SidecarError, match="not the base model of this pair") as caught:
        load(copied, "source")
    assert caught.value.faults == ("layer: the pair says K = 2, the model has 2 blocks",)


def test_a_base_model_of_another_family_is_refused(copied: RandomPair, make_case: Callable[..., Case]) -> None:

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
    [
        ("{", "cannot be used"),
        ("[]", "cannot be used"),
        ("{}", "cannot be used"),
        ('{"model_type": "nope"}', "cannot be used"),
    ],
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
def test_a_config_that_builds_no_model_is_a_typed_error(copied: RandomPair, half: str, changes: dict[str, Any]) -> None:
    edit_config(copied.root / half, **changes)
    with pytest.raises(CheckpointError):
        load(copied, half)


def test_an_unknown_family_is_named_with_the_known_ones(copied: RandomPair) -> None:
    edit_config(copied.av, model_type="opt", architectures=["OPTForCausalLM"], num_hidden_layers=4)
    with pytest.raises(UnknownNameError, match="adapter for model_type is called 'opt'"):
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


# -- multimodal wrappers -----------------------------------------------------------------------------------------------

SPELLINGS = {
    "as released": {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower."},
    "as transformers 5 has it": {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_wrapper_is_read_however_its_weights_are_spelled(
    make_case: Callable[..., Case], tmp_path: Path, spelling: str
) -> None:
    case = make_case(Spec("gemma3", wrapper=True))
    shutil.copytree(case.pair.source, tmp_path / "source")

    def rename(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            for old, new in SPELLINGS[spelling].items():
                if name.startswith(old):
                    state[new + name.removeprefix(old)] = state.pop(name)

    edit(tmp_path / "source" / WEIGHTS, rename)
    nla = NLA.from_pretrained(case.pair.root, base_model=tmp_path / "source", components=("ar",))
    close(nla.capture("the cat").vectors, case.nla.capture("the cat").vectors)
    ids = torch.tensor([case.source.ids("the cat")])
    with torch.no_grad():
        close(nla.source.loaded.model(ids).logits, case.source.model(ids).logits)


@pytest.mark.parametrize(("architecture_", "fits"), [("gemma3", True), ("llama", False)])
def test_only_an_adapter_that_lists_a_vision_tower_leaves_it_over(
    make_case: Callable[..., Case], tmp_path: Path, architecture_: str, fits: bool
) -> None:
    pair = make_case(Spec(architecture_)).pair
    for half in ("av", "ar", "source"):
        shutil.copytree(pair.root / half, tmp_path / half)
    copy = RandomPair(tmp_path, tmp_path / "source", tmp_path / "av", tmp_path / "ar", pair.site)
    edit(copy.av / WEIGHTS, lambda state: state.update({"vision_tower.layers.0.weight": torch.ones(3)}))
    if fits:
        assert load(copy, "av").av
    else:
        refused(copy, "av", "unexpected: vision_tower.layers.0.weight")
