"""Damaged and hostile weights: the right refusal for each, and nothing read outside the directory."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import pytest
import torch
from conftest import Case
from damage import HALVES, HEAD, WEIGHTS, edit, edit_config, edit_index, load, refused, shard
from parity import check_capture, check_logits, check_reconstruct, close
from safetensors.torch import load_file, save_file

from nla_hub import NLA
from nla_hub.errors import CheckpointError, WeightsError
from nla_hub.testing import RandomPair

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
def test_a_garbled_header_is_refused(copied: RandomPair, half: str) -> None:
    path = copied.root / half / WEIGHTS
    data = bytearray(path.read_bytes())
    data[200:220] = bytes(range(128, 148))
    path.write_bytes(data)
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
    refused(
        copied, half, f"missing: {'model.' if half == 'av' else ''}{name.removeprefix('model.')}", "would be random"
    )


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
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"weight_map": 7}', "cannot be read"),
        ("{}", "cannot be read"),
    ],
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
    refused(
        copied, half, "missing from its shard", "model.imaginary.weight", "not in the index: model.layers.0.mlp.up_proj"
    )


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
    (copied.root / half / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "owner/else"}', encoding="utf-8"
    )
    refused(copied, half, "adapter_config.json", error=CheckpointError)
