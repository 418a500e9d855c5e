"""The packaged recipes: what they declare and where it comes from, how they start, and that each of them rehearses."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from nla_hub import resources, schema, yaml_io, zoo
from nla_hub.adapters import adapter_for
from nla_hub.cli.app import app
from nla_hub.errors import RecipeError
from nla_hub.training import resolve
from nla_hub.training.launch import launch_command, launch_text
from nla_hub.training.recipe import Recipe, load_recipe, recipe_names
from nla_hub.training.rehearsal import STEPS, rehearsed
from nla_hub.training.stages import stages_of
from nla_hub.training.stand_in import stand_in_config, write_stand_in

RECIPES = resources.data_directory("recipes")
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
FAMILIES = ("qwen2.5-7b", "gemma-3-12b", "gemma-3-27b", "llama-3.3-70b")
LARGE = [name for family in FAMILIES for name in (family, f"{family}-lora")]

PROVENANCE = re.compile(r"#.*(\[paper\]|\[code\]|\[fork\]|untuned|reckoned)")

ALLOWED = re.compile(
    # sizes
    r"(ar|av)\.(documents|batch_size|micro_batch)|data\.(positions|max_tokens)|lora\.r|eval\.documents|layer"
    r"|rl\.(documents|steps|prompts|group|max_new_tokens|ar_warmup|evaluate_every|evaluate_rows|checkpoint_every|micro_batch"
    r"|updates)|base\.train(\.(documents|tokenizer_documents))?"
    # ids that depend on the tokenizer; base model and tokenizer; corpus; labeler
    r"|marker|base\.(config|stand_in)(\..*)?|data\.(corpus|mix)|labels\.(labeler|settings.*)"
    # ranks, dtype, quantisation, rollout engine
    r"|hardware\.(gpus|nodes)|hardware\.placement\..*|precision|base\.quantization|rl\.rollouts\..*"
)
"""What definitions allow a rehearsal to change."""


def test_all_recipes_are_here() -> None:
    assert recipe_names() == NAMES
    assert {"tiny", "tiny-weak", "any-model", *LARGE} <= set(NAMES)
    assert [zoo.entry(name).recipe for name in FAMILIES] == list(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_begins_with_the_command_that_starts_it(name: str) -> None:
    recipe = load_recipe(name)
    first = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# {launch_command(recipe)}"


@pytest.mark.parametrize("name", NAMES)
def test_the_launch_configuration_is_the_recipes_and_accelerate_reads_it(name: str) -> None:
    recipe = load_recipe(name)
    place = RECIPES / "launch" / f"{name}.yaml"
    if recipe.hardware.world == 1:
        assert not place.exists(), "one process needs no launcher"
        return
    assert place.read_text(encoding="utf-8") == launch_text(recipe), f"nla-hub recipes launch {name} > {place}"
    config = load_config_from_file(str(place))
    assert (config.num_processes, config.num_machines) == (recipe.hardware.world, recipe.hardware.nodes)
    assert str(config.distributed_type).endswith("MULTI_GPU")


@pytest.mark.parametrize("name", LARGE)
def test_every_value_says_where_it_comes_from(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    section = ""
    silent = []
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        if not line.startswith(" "):
            section = line.split(":")[0]
        value = re.match(r"\s*[\w]+: *[^ #{]", line)
        free = section in ("name", "summary", "seed", "base", "prompts", "eval", "hardware", "export")
        if value and not free and not PROVENANCE.search(line):
            silent.append(line)
    assert silent == []


@pytest.mark.parametrize("name", LARGE)
def test_a_family_is_the_zoos(name: str) -> None:
    recipe, entry = load_recipe(name), zoo.entry(name.removesuffix("-lora"))
    config = AutoConfig.for_model(**recipe.base.config)
    assert recipe.base.model == str(entry.base)
    assert (recipe.layer, config.num_hidden_layers, config.hidden_size) == (
        entry.layer,
        entry.n_layers,
        entry.d_model,
    )
    assert adapter_for(config).name == entry.adapter
    assert (recipe.lora is not None) == name.endswith("-lora")


# Parameters of the text models as their makers count them; the Gemma reports leave the vision tower out.
PARAMETERS = {"qwen2.5-7b": 7.62e9, "gemma-3-12b": 11.77e9, "gemma-3-27b": 27.01e9, "llama-3.3-70b": 70.55e9}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_of_a_base_has_its_number_of_parameters(family: str) -> None:
    import torch

    config = AutoConfig.for_model(**load_recipe(family).base.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[family], rel=2e-3)


# -- rehearsals ----------------------------------------------------------------------------------------------


def leaves(mapping: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            found |= leaves(value, f"{path}{key}.")
        else:
            found[f"{path}{key}"] = value
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_rehearsal_changes_only_what_it_may_and_says_each(name: str) -> None:
    recipe = load_recipe(name)
    cut, said = rehearsed(recipe)
    assert list(cut.faults()) == []
    before, after = leaves(recipe.to_mapping()), leaves(cut.to_mapping())
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    assert changed
    assert [key for key in changed if not ALLOWED.fullmatch(key)] == []
    for key in changed:
        top = [sentence.split(":")[0] for sentence in said]
        assert any(key == told or key.startswith(f"{told}.") for told in top), key


@pytest.mark.long
@pytest.mark.train
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_rehearses_to_the_end(name: str, tmp_path: Path) -> None:
    place = tmp_path / "run"
    result = CliRunner().invoke(app, ["train", name, "--rehearse", "-o", str(place)])
    assert result.exit_code == 0, result.output[-2000:]
    recipe = rehearsed(load_recipe(name))[0]
    for stage in stages_of(recipe):
        assert (place / stage / "DONE").is_file(), stage
    for stage in ("ar", "av", *(["rl"] if recipe.rl else [])):
        summary = json.loads((place / stage / "DONE").read_text(encoding="utf-8"))
        assert summary["steps"] == STEPS, stage
    assert (place / "export" / "checkpoint" / "ar" / "value_head.safetensors").is_file()


def test_a_recipe_for_any_model_asks_which() -> None:
    with pytest.raises(RecipeError, match=r"base\.model=OWNER/NAME"):
        resolve.resolved(load_recipe("any-model"))


@pytest.mark.parametrize(("blocks", "layer"), [(1, 0), (4, 2), (28, 18), (48, 32), (62, 41), (80, 53)])
def test_two_thirds_of_the_depth(blocks: int, layer: int) -> None:
    assert resolve.two_thirds(blocks) == layer


def test_a_layer_and_a_marker_are_read_off_the_base(tmp_path: Path) -> None:
    write_stand_in(tmp_path, stand_in_config(load_recipe("qwen2.5-7b")), seed=0)
    recipe = resolve.resolved(load_recipe("any-model", [f"base.model={tmp_path}"]))
    assert recipe.layer == 2
    assert recipe.marker == "㊥"


def test_a_base_that_is_another_model_is_refused(tmp_path: Path) -> None:
    write_stand_in(tmp_path, stand_in_config(load_recipe("gemma-3-12b")), seed=0)
    recipe = load_recipe("gemma-3-12b", [f"base.model={tmp_path}"])
    with pytest.raises(RecipeError) as caught:
        resolve.require_config(recipe, tmp_path)
    message = str(caught.value)
    assert "base.config.hidden_size: the recipe says 3840, the model 64" in message
    assert "num_hidden_layers" in message
    own = dataclasses.replace(recipe.base, config=json.loads((tmp_path / "config.json").read_text("utf-8")))
    told = {k: v for k, v in own.config.items() if k in ("hidden_size", "model_type", "num_hidden_layers")}
    resolve.require_config(dataclasses.replace(recipe, base=dataclasses.replace(own, config=told)), tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stand_in_is_of_the_same_architecture(name: str, tmp_path: Path) -> None:
    recipe: Recipe = load_recipe(name)
    write_stand_in(tmp_path, stand_in_config(recipe), seed=0)
    config = AutoConfig.from_pretrained(tmp_path)
    real = AutoConfig.for_model(**recipe.base.config)
    assert config.model_type == real.model_type
    assert config.tie_word_embeddings == real.tie_word_embeddings
    grouped = real.num_key_value_heads < real.num_attention_heads
    assert (config.num_key_value_heads < config.num_attention_heads) == grouped
    kinds = set(getattr(real, "layer_types", None) or [])
    assert set(getattr(config, "layer_types", None) or []) <= kinds


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (["lora=null", "base.quantization=nf4"], "it needs a lora section"),
        (["base.quantization=nf4", "rl.rollouts.engine=vllm"], "vllm cannot take over packed weights"),
        (["base.quantization=nf4", "hardware.placement.av=sharded"], "packed weights cannot be sharded"),
        (["hardware.placement.optimizers=cpu"], "needs a sharded av or ar"),
        (["rl.lora={r: 4}"], "trained in the rl stage already"),
        (["data.corpus=tiny-world"], "not both"),
        (["data.mix=[]"], "not both"),
        (["data.max_tokens=50"], "more than min_position"),
        (["data.mix=[{data: a.txt, column: text, messages: chat}]"], "a text or a conversation"),
        (["rl.rollouts.tensor_parallel=2"], "only engine: vllm can do"),
        (["hardware.gpus=0"], "expected 1 or more"),
    ],
)
def test_sections_that_contradict_each_other_are_refused(settings: list[str], fault: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("qwen2.5-7b-lora", settings)
    assert fault in str(caught.value)


def test_the_mapping_of_a_recipe_makes_the_recipe_again() -> None:
    for name in NAMES:
        recipe = load_recipe(name)
        again = yaml_io.loads(yaml_io.dumps(recipe.to_mapping()), where=None, error=RecipeError)
        assert schema.from_mapping(Recipe, again) == recipe
