"""`nla-hub train --plan`: bytes against sums done by hand and a measured peak, hours only from what was recorded, verdicts,
and alternatives that are held to their word. No network and no GPU.
"""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from typer.testing import CliRunner

from nla_hub.cli.app import app
from nla_hub.errors import RecipeError, UnknownNameError
from nla_hub.memory import cache_bytes
from nla_hub.training.planning.alternatives import changed
from nla_hub.training.planning.anchors import ANCHORS, FARTHEST, hours, runs_like
from nla_hub.training.planning.effort import Machine, Products, Seconds, efforts
from nla_hub.training.planning.gpus import GPUS, gpu_named
from nla_hub.training.planning.memory import Sizes, StageBytes, StageMemory, header_of, plan
from nla_hub.training.planning.memory_roles import Half, training_bytes_per_token
from nla_hub.training.planning.plan import Plan
from nla_hub.training.recipe import Recipe, load_recipe, parse_recipe

runner = CliRunner()
FAMILIES = ("qwen2.5-7b", "gemma-3-12b", "gemma-3-27b", "llama-3.3-70b")
RECIPES = [f"{family}{kind}" for family in FAMILIES for kind in ("", "-lora")]

# A Llama of three blocks read at block 1, by hand.
D, MLP, VOCABULARY, BLOCKS, K = 64, 96, 300, 3, 1
HEADS, KV, HEAD_DIM = 2, 1, 32
LINEAR = [(D, D), (KV * HEAD_DIM, D), (KV * HEAD_DIM, D), (D, D), (MLP, D), (MLP, D), (D, MLP)]
BLOCK = sum(a * b for a, b in LINEAR) + 2 * D
AV = BLOCKS * BLOCK + 2 * VOCABULARY * D + D
TRUNK = (K + 1) * BLOCK + VOCABULARY * D
AR = TRUNK + D * D
ROOT_AV, ROOT_AR = AV - BLOCKS * BLOCK, AR - (K + 1) * BLOCK
CONFIG = {
    "model_type": "llama",
    "hidden_size": D,
    "intermediate_size": MLP,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def tiny(*overrides: str, gpus: int = 1, gpu: str = "H100-80GB") -> Recipe:
    """A recipe for that model, with the tiny world's other settings."""
    mapping = load_recipe("tiny", ["rl.beta=0.1", "rl.micro_batch=8"]).to_mapping()
    mapping["base"] = {"model": "random/base", "config": CONFIG}
    mapping["layer"] = K
    mapping["hardware"] = {"gpu": gpu, "gpus": gpus}
    found = changed(parse_recipe(mapping), overrides) if overrides else parse_recipe(mapping)
    assert found is not None
    return found


SHARDED = ("hardware.placement.av=sharded", "hardware.placement.ar=sharded")
LORA = "lora={r: 4, alpha: 8}"
SIZES = Sizes.of(tiny())


def stages(recipe: Recipe) -> dict[str, StageBytes]:
    return {stage.name: stage for stage in plan(recipe, SIZES)}


# -- bytes by hand -------------------------------------------------------------------------------------------


def test_the_base_is_counted_as_by_hand() -> None:
    assert (SIZES.av_values, SIZES.trunk_values, SIZES.ar_values) == (AV, TRUNK, AR)
    half = StageMemory(tiny(), SIZES).half("ar", None)
    assert (half.block, half.root, half.norms, half.values) == (BLOCK, ROOT_AR, 2, AR)


def test_full_weights_in_one_process() -> None:
    found = stages(tiny())
    rl = found["rl"].roles
    assert rl["av"] == rl["reference"] == 4 * AV
    assert rl["ar"] == rl["watching_ar"] == 4 * AR
    assert rl["moments"] == 8 * (AV + 2 * AR)
    assert found["rl"].moment == "sampling" and "gradients" not in rl  # many rows of a small model
    assert "source" not in rl and "source" not in found["ar"].roles and "gathered" not in rl
    for name, values in (("av", AV), ("ar", AR)):
        roles = found[name].roles
        assert (roles[name], roles["gradients"], roles["moments"]) == (4 * values, 4 * values, 8 * values)
    assert found["data"].roles["source"] == 2 * TRUNK  # read in bfloat16 on an accelerator
    assert stages(tiny(gpu="cpu"))["data"].roles["source"] == 4 * TRUNK
    assert found["eval"].roles["av"] == 2 * AV and found["eval"].roles["ar"] == 2 * TRUNK + 4 * D * D
    assert found["export"].main_memory == 8 * AV


def test_what_the_first_moment_of_a_pass_needs() -> None:
    """The AV's pass of the rl stage: its gradient, activations of one micro-batch, and logits tile by tile."""
    memory = StageMemory(tiny("rl.micro_batch=2", "rl.rollout_block=8", "rl.prompts=2"), SIZES)
    rl = next(stage for stage in memory.stages() if stage.name == "rl")
    tokens, text = 100 + 64, 64
    inner = (4 * HEADS + 3 * KV) * HEAD_DIM + 4 * MLP
    kept = 2 * tokens * BLOCKS * 4 * (7 * D + inner) + 3 * 4 * 2 * text * VOCABULARY
    assert rl.moment == "AV: forward and backward"
    assert rl.roles["activations"] == kept and rl.roles["gradients"] == 4 * AV


def test_weights_are_divided_where_they_are_sharded() -> None:
    one, four = stages(tiny()), stages(tiny(*SHARDED, gpus=4))
    for name in ("av", "ar"):
        for role in (name, "gradients", "moments"):
            assert four[name].roles[role] == math.ceil(one[name].roles[role] / 4)
    for role in ("av", "reference", "ar", "watching_ar"):
        assert four["rl"].roles[role] == math.ceil(one["rl"].roles[role] / 4)
    # Two blocks in float32 and the gradient of one; embedding and head whole with theirs.
    assert four["av"].roles["gathered"] == 3 * 4 * BLOCK + 8 * ROOT_AV
    half = stages(tiny(*SHARDED, "precision=bf16", gpus=4))
    assert half["av"].roles["gathered"] == (2 * 2 + 4) * BLOCK + 8 * ROOT_AV
    assert four["rl"].roles["rollouts"] == 2 * AV  # the sampler's whole copy in bfloat16


def test_copies_of_data_parallelism_and_autocast() -> None:
    one, four = stages(tiny()), stages(tiny(gpus=4))
    assert four["av"].roles["av"] == one["av"].roles["av"]
    assert four["av"].roles["gradients"] == 8 * AV  # with the buckets that they are added up in
    assert "rollouts" not in four["rl"].roles
    assert stages(tiny("precision=bf16"))["av"].roles["gathered"] == 2 * AV


def test_factors_on_a_frozen_base() -> None:
    values = {n: n * sum(4 * (a + b) for a, b in LINEAR) for n in (BLOCKS, K + 1)}
    found = stages(tiny(LORA))
    assert found["av"].roles["av"] == 2 * AV + 4 * values[BLOCKS]
    assert found["av"].roles["gradients"] == 4 * values[BLOCKS]
    trained = values[K + 1] + D * D  # the value head is trained as a whole
    assert found["ar"].roles["ar"] == 2 * TRUNK + 4 * trained
    assert found["ar"].roles["moments"] == 8 * trained
    rl = found["rl"].roles
    assert rl["reference"] == 4 * values[BLOCKS] and rl["watching_ar"] == found["ar"].roles["ar"]
    packed = stages(tiny(LORA, "base.quantization=nf4"))["av"].roles["av"]
    linear = sum(a * b // 2 + 4 * math.ceil(a * b / 64) for a, b in LINEAR)
    assert packed == BLOCKS * (linear + 2 * 2 * D) + 2 * ROOT_AV + 4 * values[BLOCKS]
    divided = stages(tiny(LORA, *SHARDED, gpus=2))["av"].roles
    assert divided["av"] == math.ceil((2 * AV + 4 * values[BLOCKS]) / 2)
    assert divided["gathered"] == 2 * (ROOT_AV + 2 * BLOCK)


def test_fresh_factors_in_the_rl_stage_alone() -> None:
    found = stages(tiny("rl.lora={r: 4, alpha: 8}"))
    assert found["av"].roles["av"] == 4 * AV
    assert found["rl"].roles["av"] == 2 * AV + 4 * BLOCKS * sum(4 * (a + b) for a, b in LINEAR)
    assert "reference" not in found["rl"].roles and found["rl"].roles["ar"] == 4 * AR


def test_what_rests_in_main_memory_is_on_no_device() -> None:
    place = (*SHARDED, "hardware.placement.optimizers=cpu")
    on, off = stages(tiny(*SHARDED, gpus=4)), stages(tiny(*place, gpus=4))
    assert not {"av", "reference", "ar", "watching_ar", "gradients", "moments"} & off["rl"].roles.keys()
    moved = sum(on["rl"].roles[role] for role in ("av", "reference", "ar", "watching_ar", "moments"))
    assert off["rl"].main_memory == 4 * (moved + math.ceil(4 * 2 * AR / 4))
    only = stages(tiny(place[0], place[2], gpus=4))["rl"].roles
    assert only["ar"] == 4 * AR and only["moments"] == 16 * AR and "av" not in only


def test_both_ars_hold_gradients_before_either_learns() -> None:
    recipe = load_recipe("qwen2.5-7b", ["hardware.gpus=2"])
    sizes = Sizes.of(recipe)
    rl = next(stage for stage in plan(recipe, sizes) if stage.name == "rl")
    assert rl.moment == "AR: optimizer step"
    assert rl.roles["gradients"] == 2 * math.ceil(4 * sizes.ar_values / 2)
    alone = changed(recipe, ("rl.watch_ar=false",))
    assert alone is not None
    rl = next(stage for stage in plan(alone, sizes) if stage.name == "rl")
    assert rl.roles["gradients"] == math.ceil(4 * sizes.av_values / 2) and rl.moment.startswith("AV")


def test_vllm_takes_its_share_and_needs_a_part_of_the_av() -> None:
    engine = ("rl.rollouts.engine=vllm", "rl.rollouts.tensor_parallel=2", "rl.rollouts.memory=0.25")
    recipe = tiny(*SHARDED, *engine, gpus=4)
    assert stages(recipe)["rl"].roles["rollouts"] == int(0.25 * GPUS["H100-80GB"].memory)
    cache = cache_bytes(SIZES.whole, 8, 100 + 64, 2)
    assert StageMemory(recipe, SIZES).vllm_needs() == math.ceil((2 * AV + cache) / 2) + 3 * 2**30


def test_a_source_is_divided_over_a_node_and_labels_need_all_of_it() -> None:
    spread = "hardware.placement.source=spread"
    assert stages(tiny(spread, gpus=4))["data"].roles["source"] == math.ceil(2 * TRUNK / 4)
    labelled = stages(tiny("labels.labeler=source", gpus=4))["data"]
    assert labelled.roles["source"] == 2 * AV and labelled.moment == "labels of the base model"


# -- what must hold for any recipe ---------------------------------------------------------------------------


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Placements, precision, rows and engines of any kind, for the tiny base."""
    given = [
        f"rl.micro_batch={draw(st.sampled_from([1, 2, 8]))}",
        f"rl.rollout_block={draw(st.sampled_from([8, 64, 256]))}",
        f"rl.watch_ar={str(draw(st.booleans())).lower()}",
        f"precision={draw(st.sampled_from(['float32', 'bf16']))}",
        f"hardware.placement.av={draw(st.sampled_from(['each', 'sharded']))}",
        f"hardware.placement.ar={draw(st.sampled_from(['each', 'sharded']))}",
        *draw(st.sampled_from([(), (LORA,), ("rl.lora={r: 4, alpha: 8}",)])),
        *(f"{name}.gradient_checkpointing={str(draw(st.booleans())).lower()}" for name in ("ar", "av", "rl")),
    ]
    found = changed(tiny(gpus=draw(st.sampled_from([2, 4]))), tuple(given))
    return found if found is not None else tiny(gpus=2)


def no_more(recipe: Recipe, *settings: str) -> None:
    """No stage needs more bytes on a device with these settings."""
    other = changed(recipe, settings)
    assert other is not None
    before, after = stages(recipe), stages(other)
    assert {
        name: (after[name].total, before[name].total) for name in after if after[name].total > before[name].total
    } == {}


@given(recipe=recipes())
@examples(max_examples=15)
def test_what_asks_for_less_never_needs_more(recipe: Recipe) -> None:
    no_more(recipe, f"hardware.gpus={2 * recipe.hardware.gpus}")
    no_more(recipe, f"hardware.nodes={2 * recipe.hardware.nodes}")
    no_more(recipe, "rl.watch_ar=false")
    no_more(recipe, "rl.beta=0")
    no_more(recipe, "rl.micro_batch=1", "ar.micro_batch=1", "av.micro_batch=1", "rl.rollout_block=8")
    no_more(recipe, "rl.max_new_tokens=8")
    no_more(recipe, "hardware.placement.source=spread")


@given(recipe=recipes())
@examples(max_examples=10)
def test_factors_never_need_more_weights_gradients_and_moments_than_all(recipe: Recipe) -> None:
    whole, factors = changed(recipe, ("lora=null", "rl.lora=null")), changed(recipe, (LORA, "rl.lora=null"))
    assert whole is not None and factors is not None
    kinds = ("av", "ar", "watching_ar", "reference", "moments")
    for name in ("ar", "av", "rl"):
        less, more = (
            sum(found[name].roles.get(kind, 0) for kind in kinds) for found in (stages(factors), stages(whole))
        )
        assert less < more


# -- work, hours, money --------------------------------------------------------------------------------------


def test_rows_tokens_and_steps_are_those_of_the_recipe() -> None:
    recipe = tiny("data.max_tokens=100", "ar.epochs=2", "ar.batch_size=64")
    found = efforts(recipe, SIZES, gpu_named("H100-80GB"))
    documents = 6000 + 9000 + 100 + 2000
    assert (found["data"].rows, found["data"].tokens, found["data"].steps) == (8 * documents, 100 * documents, 0)
    assert (found["ar"].rows, found["ar"].steps) == (48_000, 1500)
    assert found["ar"].tokens == 2 * 48_000 * (40 + 64)
    assert (found["rl"].rows, found["rl"].tokens, found["rl"].steps) == (40 * 512, 40 * 512 * 64, 40)


def test_seconds_at_the_peak_by_hand() -> None:
    machine = Machine(GPUS["H100-80GB"], 4)
    assert machine.passes(4 * 989e12) == 1.0
    # 128 rows on each, 2 turns of 64: limited by reading the weights once a token.
    assert machine.sampling(1e9, 512, 100, block=64) == pytest.approx(100 * 2 * 2e9 / 3.35e12)
    wide = machine.sampling(1e9, 40_000, 1, block=10_000)
    assert wide == pytest.approx(2 * 1e9 * 10_000 / 989e12)  # limited by computing
    assert machine.sampling(1e9, 4, 10, block=64, split=4) == pytest.approx(10 * 2e9 / (4 * 3.35e12))
    products = Products.of(SIZES, frozen=False)
    assert products.av == BLOCKS * BLOCK + VOCABULARY * D and products.ar == (K + 1) * BLOCK + D * D
    frozen = Products.of(SIZES, frozen=True)
    assert frozen.trained(10) == 40 and products.trained(10, checkpointing=True) == 80


def test_hours_are_a_range_of_named_anchors_or_nothing() -> None:
    for values in (7.6e9, 27e9, 70e9):
        for seconds in (Seconds(1000.0), Seconds(1000.0, 200.0)):
            found = hours(seconds, values)
            assert found is not None and seconds.passes / 3600 < found.low < found.high
            assert found.anchors and all(
                any(a.name in name and a.source in name for a in ANCHORS) for name in found.anchors
            )
    assert hours(Seconds(1.0), 7.6e9 / (2 * FARTHEST)) is None
    assert hours(None, 7.6e9) is None
    assert all(0 < low <= high < 1 for low, high in (a.shares for a in ANCHORS))
    far = hours(Seconds(1.0), 70e9)
    assert far is not None and all("smaller" in name for name in far.anchors)
    assert [run.lora for run in runs_like(8e9, lora=True)] == [True] and runs_like(70e9, lora=False) == []


def test_more_work_takes_longer_and_more_gpus_less_wall_time() -> None:
    recipe = load_recipe("qwen2.5-7b")
    sizes = Sizes.of(recipe)
    gpu = gpu_named(recipe.hardware.gpu)
    base = efforts(recipe, sizes, gpu)["rl"].seconds
    twice = changed(recipe, (f"rl.steps={2 * recipe.rl.steps}",)) if recipe.rl is not None else None
    more = changed(recipe, ("hardware.nodes=2", "rl.micro_batch=1"))
    assert base is not None and twice is not None and more is not None
    longer, faster = (efforts(other, sizes, gpu)["rl"].seconds for other in (twice, more))
    assert longer is not None and longer.passes == pytest.approx(2 * base.passes)
    assert faster is not None and faster.passes == pytest.approx(base.passes / 2)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("precision=float32",), "float32"),
        ((*SHARDED, "precision=bf16", "hardware.placement.optimizers=cpu"), "main memory"),
        (("precision=bf16", LORA, "base.quantization=nf4"), "packed"),
        (("hardware.gpu=cpu", "precision=bf16"), "CPU"),
    ],
)
def test_what_nobody_recorded_is_not_known(settings: tuple[str, ...], why: str) -> None:
    found = Plan.of(tiny(*settings, gpus=2), price=2.0)
    assert why in found.unknown
    assert found.hours is None and found.gpu_hours is None and found.money(found.gpu_hours) is None


def test_the_price_is_an_input() -> None:
    recipe = load_recipe("qwen2.5-7b")
    free, paid = Plan.of(recipe), Plan.of(recipe, price=2.5)
    assert free.money(free.gpu_hours) is None and free.gpu_hours is not None
    assert paid.hours is not None and paid.gpu_hours == (8 * paid.hours.low, 8 * paid.hours.high)
    assert paid.money(paid.gpu_hours) == tuple(2.5 * n for n in free.gpu_hours)


def test_labels_of_the_base_model_are_shared_by_all_processes() -> None:
    recipe = load_recipe("qwen2.5-7b-lora")
    own, other = Plan.of(recipe), Plan.of(load_recipe("qwen2.5-7b-lora", ["labels.labeler=tiny", "labels.settings={}"]))
    assert other.label_hours is None and own.label_hours is not None
    assert own.hours is not None and other.hours is not None
    assert own.hours.low == pytest.approx(other.hours.low + own.label_hours.low)
    many = Plan.of(load_recipe("qwen2.5-7b-lora", ["hardware.gpus=8"]))
    assert many.label_hours is not None
    assert many.label_hours.low == pytest.approx(own.label_hours.low / 8, rel=1e-2)


def test_disk_holds_vectors_in_float32_and_two_checkpoints() -> None:
    disk = Plan.of(tiny()).disk
    assert disk["vectors"] == disk["shards"] == 8 * (6000 + 9000 + 100 + 2000) * D * 4
    assert (disk["av"], disk["ar"], disk["rl"]) == (4 * AV, 8 * AR, 4 * (AV + AR))
    assert disk["checkpoint"] == 2 * 12 * (AV + 2 * AR)
    assert disk["export"] == 2 * (AV + AR)
    assert Plan.of(tiny(LORA)).disk["checkpoint"] < disk["checkpoint"] / 2


# -- verdicts ------------------------------------------------------------------------------------------------


def test_alternatives_fit_when_they_are_typed() -> None:
    """Each of them, given to the same command, is a plan that fits; and they are of different kinds."""
    settings = ["hardware.gpus=2", "hardware.nodes=1"]
    found = Plan.of(load_recipe("qwen2.5-7b", settings))
    assert not found.fits
    kinds = {one.why: one.settings for one in found.alternatives}
    assert len(kinds) == len(found.alternatives) >= 3
    assert {"more GPUs", "optimizers in main memory", "LoRA factors instead of full weights"} <= kinds.keys()
    assert "base.quantization=nf4" in kinds["LoRA factors over a base of 4 bits"]
    for words in kinds.values():
        assert Plan.of(load_recipe("qwen2.5-7b", [*settings, *words])).fits, words


def test_smaller_batches_are_proposed_where_they_are_enough() -> None:
    settings = ["rl.rollout_block=512", "rl.micro_batch=256", "rl.gradient_checkpointing=false"]
    found = Plan.of(load_recipe("qwen2.5-7b-lora", settings))
    kinds = {one.why: one.settings for one in found.alternatives}
    assert "smaller batches" in kinds
    assert Plan.of(load_recipe("qwen2.5-7b-lora", [*settings, *kinds["smaller batches"]])).fits


def test_a_recipe_that_fits_has_no_alternatives() -> None:
    found = Plan.of(tiny())
    assert found.fits and found.alternatives == ()
    found.require()


def test_everything_that_speaks_against_it_is_said_at_once() -> None:
    settings = (
        "rl.rollouts.engine=vllm",
        "rl.rollouts.tensor_parallel=2",
        "rl.rollouts.memory=0.01",
        "rl.micro_batch=128",
    )
    found = Plan.of(tiny(*SHARDED, LORA, *settings, gpus=3))
    with pytest.raises(RecipeError) as caught:
        found.require()
    said = "\n".join(caught.value.faults)
    for word in ("rollouts.memory", "does not divide", "micro_batch"):
        assert word in said


def test_a_layer_or_a_gpu_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match="no such layer"):
        Plan.of(tiny(f"layer={BLOCKS}"))
    with pytest.raises(UnknownNameError, match="H100-80GB"):
        Plan.of(tiny(gpu="H101-80GB"))
    with pytest.raises(RecipeError, match=r"base\.config"):
        Sizes.of(tiny("base.config={model_type: no-such-model}"))
    assert Sizes.of(tiny("layer=two-thirds")).layer == 2


def test_a_gpu_gives_away_less_than_its_sheet_says() -> None:
    for name, gpu in GPUS.items():
        if words := [w for w in name.replace("GB", "").split("-") if w.isdigit() and w != "4090"]:
            assert 0.9 * int(words[-1]) < gpu.memory / 2**30 < int(words[-1])
        assert gpu.source and gpu.flops > 1e14 > gpu.bandwidth > 5e11


# -- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a plan went online")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)


@pytest.mark.parametrize("name", RECIPES)
def test_every_family_is_planned_without_a_network(
    name: str, no_network: None, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["train", name, "--plan", "--json", "--gpu-price", "2.5"])
    assert result.exit_code == 0, result.output
    *rows, last = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["name"] for row in rows] == ["source", "data", "ar", "av", "rl", "export", "eval"]
    assert all(row["fits"] and row["total"] == sum(row["bytes"].values()) <= last["usable"] for row in rows)
    assert last["fits"] and last["alternatives"] == [] and (last["hours"] is None) == (last["unknown"] is not None)
    assert last["money"] is None or last["money"][0] < last["money"][1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen2.5-7b", 7.616), ("gemma-3-12b", 11.766), ("gemma-3-27b", 27.009), ("llama-3.3-70b", 70.554)],
)
def test_the_configs_in_the_recipes_are_of_models_as_large_as_published(name: str, billions: float) -> None:
    sizes = Sizes.of(load_recipe(name))
    assert sum(math.prod(shape) for shape, _ in header_of(sizes.config).values()) == sizes.av_values
    assert sizes.av_values / 1e9 == pytest.approx(billions, abs=1e-3)


def test_a_plan_that_does_not_fit_exits_1_and_says_what_would(no_network: None) -> None:
    result = runner.invoke(app, ["train", "qwen2.5-7b", "hardware.gpus=2", "--plan"])
    assert result.exit_code == 1
    assert "DOES NOT FIT" in result.stdout and "71.1 GiB" in result.stderr
    assert "would fit (more GPUs): hardware.gpus=8" in result.stderr
    as_json = runner.invoke(app, ["train", "qwen2.5-7b", "hardware.gpus=2", "--plan", "--json"])
    last = json.loads(as_json.stdout.splitlines()[-1])
    assert as_json.exit_code == 1 and not last["fits"] and last["faults"]
    assert ["hardware.gpus=8"] in [one["settings"] for one in last["alternatives"]]


def test_the_table_says_what_is_known_and_what_is_not(no_network: None) -> None:
    result = runner.invoke(app, ["train", "qwen2.5-7b", "--plan"])
    assert result.exit_code == 0
    assert "money" in result.stdout and "say --gpu-price" in result.stdout
    assert "7B GRPO: 32 to 41 s a step on 8 H100" in result.stdout and "as a note" in result.stderr
    priced = runner.invoke(app, ["train", "qwen2.5-7b", "--plan", "--gpu-price", "2.5"])
    assert "say --gpu-price" not in priced.stdout and "at this price" in priced.stdout
    assert runner.invoke(app, ["train", "qwen2.5-7b", "--gpu-price", "2.5"]).exit_code == 2
    unknown = runner.invoke(app, ["train", "tiny", "--plan", "--gpu-price", "2.5"])
    assert unknown.exit_code == 0 and "not known: nothing was recorded on CPUs" in unknown.stdout


# -- measured ------------------------------------------------------------------------------------------------

STEP = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
import torch.optim.adamw
torch.set_num_threads(1)
def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
rows, checkpointing = int(sys.argv[1]), sys.argv[2] == "yes"
config = LlamaConfig(hidden_size=768, intermediate_size=2560, num_hidden_layers=10, num_attention_heads=12,
                     num_key_value_heads=4, vocab_size=16000)
before = status("VmRSS")
model = LlamaForCausalLM(config)
model.model.norm = torch.nn.Identity()
if checkpointing:
    model.gradient_checkpointing_enable()
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
for _ in range(2):
    ids = torch.randint(16000, (rows, 190))
    loss = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1].pow(2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "checkpointing"), [(8, False), (16, False), (12, True)])
def test_the_estimate_of_a_step_is_within_15_percent_of_its_peak(rows: int, checkpointing: bool) -> None:
    """A Llama of 98M values in float32 on a CPU, run as an AR is: no final norm, no logits, the last token alone."""
    from transformers import LlamaConfig

    from nla_hub.architecture import Architecture

    done = subprocess.run(
        [sys.executable, "-c", STEP, str(rows), "yes" if checkpointing else "no"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split()[-1])
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2560,
        num_hidden_layers=10,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=16000,
    )
    values = sum(math.prod(shape) for shape, _ in header_of(config).values())
    architecture = Architecture.of(config)
    half = Half(0, values, values, 0, 0, architecture)
    kept = rows * 190 * training_bytes_per_token(architecture, checkpointing=checkpointing)
    head = 4 * 16000 * 768  # the lm_head gets no gradient here
    estimate = half.weights(1) + half.moments(1) - 2 * head + max(half.gradients(1) - head, 0) + kept
    assert peak > 500e6
    assert 0.85 <= estimate / peak <= 1.15, (estimate, peak)
