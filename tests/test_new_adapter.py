"""`nla-hub new-adapter`: what it writes works, what it cannot write it refuses."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import sysconfig
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plugin_site import install, plugged
from transformers import AutoConfig
from typer.testing import CliRunner

from nla_hub import registry, yaml_io
from nla_hub.adapters import Adapter, adapter_for
from nla_hub.cli.app import app
from nla_hub.errors import CheckpointError, SidecarError
from nla_hub.pretrained import load_tokenizer
from nla_hub.prompts import ARPrompt, AVPrompt
from nla_hub.sidecar import Sidecar
from nla_hub.testing import ARCHITECTURES, MARKER, random_model, random_tokenizer
from nla_hub.training.family import guess_adapter, small_model
from nla_hub.training.recipe import load_recipe
from nla_hub.training.scaffold.write import PATTERN

ROOT = Path(__file__).resolve().parents[1]
runner = CliRunner()

SIZES = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4}


def write_base(place: Path, model_type: str, *, tokenizer: Any = None, **settings: Any) -> Path:
    """A base model without weights: config and tokenizer."""
    tokenizer = tokenizer or random_tokenizer()
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": len(tokenizer)}
    AutoConfig.for_model(model_type, **{**ids, **settings}).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def said(*words: object) -> tuple[int, str, str]:
    result = runner.invoke(app, ["new-adapter", *map(str, words)])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of a family that nla-hub does not read."""
    return write_base(tmp_path_factory.mktemp("bases") / "OLMo_2-Tiny", "olmo2", **SIZES)


@pytest.fixture(scope="module")
def written(base: Path) -> Path:
    place = base.parent / "plugin"
    code, stdout, stderr = said(base, "--layer", 4, "-o", place)
    assert code == 0, stderr
    assert stdout.splitlines() == [str(path) for path in sorted(place.rglob("*")) if path.is_file()]
    assert "its adapter was guessed and passes check_adapter" in stderr
    return place


# -- a new family --------------------------------------------------------------------------------------------


def test_the_files_of_a_new_family(written: Path) -> None:
    assert sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()) == [
        "README.md",
        "nla_meta.yaml",
        "nla_olmo2/__init__.py",
        "nla_olmo2/family.py",
        "olmo-2-tiny.yaml",
        "pyproject.toml",
        "tests/test_family.py",
    ]
    assert not [path for path in written.parent.iterdir() if path.name.startswith(".")]
    for path in written.rglob("*.*"):
        text = path.read_text(encoding="utf-8")
        assert "$" not in text, path
        assert text.endswith("\n"), path


def test_the_plugin_installed_reads_its_family_and_passes_its_own_tests(
    written: Path, base: Path, tmp_path: Path
) -> None:
    project = tomllib.loads((written / "pyproject.toml").read_text())["project"]
    (tmp_path / "nla_olmo2").symlink_to(written / "nla_olmo2")
    install(tmp_path, project["name"], project["version"], project["entry-points"])
    with plugged(tmp_path):
        assert [(p.name, p.state) for p in registry.plugins()] == [("olmo2", "ok")]
        assert adapter_for(AutoConfig.from_pretrained(base)) == Adapter(name="olmo2", model_types=("olmo2",))
        tests = runpy.run_path(str(written / "tests" / "test_family.py"))
        assert [tests[name]() for name in ("test_the_adapter", "test_the_recipe")] == [None, None]
        plan = runner.invoke(app, ["train", str(written / "olmo-2-tiny.yaml"), "--plan"])
        assert plan.exit_code == 0, plan.output
        code, _, stderr = said(base, "--layer", 4, "-o", tmp_path / "again")
        assert code == 0
        assert "The adapter 'olmo2' reads this family already" in stderr


def test_the_generated_test_fails_where_the_adapter_is_wrong(written: Path) -> None:
    from nla_hub.errors import NLAError
    from nla_hub.testing import check_adapter

    made = runpy.run_path(str(written / "nla_olmo2" / "family.py"))
    model = made["random_olmo2"](64, seed=0, layers=3)
    assert (model.config.num_key_value_heads, model.config.num_attention_heads, len(model.model.layers)) == (1, 2, 3)
    with pytest.raises(NLAError, match="final_norm"):
        check_adapter(replace(made["OLMO2"], final_norm="ln_f"), made["random_olmo2"])


def test_the_recipe_is_strict_and_of_this_base(written: Path, base: Path) -> None:
    file = written / "olmo-2-tiny.yaml"
    assert runner.invoke(app, ["recipes", "validate", str(file)]).exit_code == 0
    recipe, pattern = load_recipe(str(file)), load_recipe(PATTERN)
    assert (recipe.base.model, recipe.base.revision, recipe.layer, recipe.marker) == (str(base), None, 4, MARKER)
    config = AutoConfig.from_pretrained(base)
    assert recipe.base.config is not None
    assert {"model_type", "hidden_size", "num_hidden_layers", "vocab_size"} <= set(recipe.base.config)
    assert {key: getattr(config, key) for key in recipe.base.config} == recipe.base.config
    for part in (
        "prompts",
        "injection",
        "data",
        "labels",
        "ar",
        "av",
        "rl",
        "lora",
        "precision",
        "eval",
        "export",
        "hardware",
    ):
        assert getattr(recipe, part) == getattr(pattern, part)


def test_the_sidecar_lacks_what_a_run_measures_and_nothing_else(written: Path, base: Path) -> None:
    raw = yaml_io.read(written / "nla_meta.yaml", error=SidecarError)
    with pytest.raises(SidecarError) as caught:
        Sidecar.read(written)
    assert len(caught.value.faults) == 1
    assert "injection_scale" in caught.value.faults[0]
    raw["extraction"]["injection_scale"] = 12.5
    av = Sidecar.parse(raw)
    assert (av.site.layer, av.d_model, av.base_model) == (4, 256, str(base))
    assert av.config_faults(AutoConfig.from_pretrained(base)) == []
    tokenizer = load_tokenizer(base)
    prompt = AVPrompt.build(tokenizer, av)
    assert prompt.text.count(MARKER) == 1
    ar = Sidecar.parse({**raw, "role": "ar", "final_norm_stripped": True})
    assert ARPrompt.build(tokenizer, ar).suffix_ids
    assert av.pair_faults(ar) == []


@pytest.mark.slow
def test_pip_installs_it_in_an_environment_of_its_own(base: Path, tmp_path: Path) -> None:
    """Built by pip as any project; nla-hub and what it needs are lent by this environment. The package index is asked."""
    place = tmp_path / "plugin"
    assert said(base, "--layer", 4, "-o", place)[0] == 0
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    query = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip())
    (site / "lent.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    for words in (["pip", "install", "-q", "--no-deps", str(place)], ["pytest", "-q", str(place / "tests")]):
        done = subprocess.run([python, "-m", *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (site / "nla_olmo2" / "family.py").is_file()


# -- a family that is read already ---------------------------------------------------------------------------


def test_a_known_family_gets_no_adapter(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "qwen2", **SIZES)
    code, _, stderr = said(base, "--layer", 3, "-o", tmp_path / "new")
    assert code == 0
    assert "The adapter 'qwen2' reads this family already, so no adapter was written." in stderr
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["README.md", "base.yaml", "nla_meta.yaml"]
    assert load_recipe(str(tmp_path / "new" / "base.yaml")).layer == 3


def test_the_default_place_is_named_after_base_and_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_base(tmp_path / "Base_A", "llama", **SIZES)
    monkeypatch.chdir(tmp_path)
    assert said("./Base_A", "--layer", 2)[0] == 0
    recipe = load_recipe(str(tmp_path / "nla-base-a-L2" / "base-a.yaml"))
    assert recipe.base.model == str(tmp_path / "Base_A")


# -- what is guessed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_guessed_of_our_own_families_is_what_their_adapters_say(name: str) -> None:
    ours = registry.adapters.get(name)
    config = random_model(name, 64).config
    guessed = guess_adapter(config, small_model(config))
    for part in ("embedding", "blocks", "final_norm", "lm_head", "causal_prefix", "untrained_norm"):
        assert getattr(guessed, part) == getattr(ours, part), part
    assert set(guessed.trunk_paths) <= set(ours.trunk_paths)
    assert "layer_types" in guessed.per_layer_config


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("phi3", {}),
        ("gemma", {"untrained_norm": (0.0, 1.0)}),
        ("smollm3", {"per_layer_config": ("layer_types", "no_rope_layers")}),
        (
            "opt",
            {
                "trunk_paths": ("model.decoder", "decoder", ""),
                "final_norm": "final_layer_norm",
                "causal_prefix": "model.",
            },
        ),
    ],
)
def test_what_is_guessed_of_other_families(model_type: str, expected: dict[str, Any]) -> None:
    config = AutoConfig.for_model(model_type)
    small = small_model(config)
    assert guess_adapter(config, small) == Adapter(name=model_type, model_types=(model_type,), **expected)
    assert sum(p.numel() for p in small.make(64, layers=3).parameters()) < 2_000_000


def test_an_encoder_is_no_stack_that_writes() -> None:
    config = AutoConfig.for_model("bert")
    with pytest.raises(CheckpointError, match="not a stack of blocks"):
        guess_adapter(config, small_model(config))


# -- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [6, -1])
def test_a_layer_that_is_not_there(base: Path, tmp_path: Path, layer: int) -> None:
    code, _, stderr = said(base, "--layer", layer, "-o", tmp_path / "new")
    assert (code, list(tmp_path.iterdir())) == (1, [])
    assert f"no such layer (got {layer}, expected 0 to 5)" in stderr


def test_nothing_is_written_over(base: Path, written: Path, tmp_path: Path) -> None:
    before = (written / "README.md").stat().st_mtime_ns
    code, _, stderr = said(base, "--layer", 1, "-o", written)
    assert code == 1
    assert "This exists already; nothing was written." in stderr
    assert (written / "README.md").stat().st_mtime_ns == before
    assert "There is no such directory" in said(base, "--layer", 1, "-o", tmp_path / "no" / "new")[2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "There is no such directory."),
        ("nowhere", "neither a repository of the Hub nor a directory"),
        ("qwen2.5-7b", "its base model is Qwen/Qwen2.5-7B-Instruct"),
        ("acme/absent", "The Hub cannot be reached"),  # tests are offline
        ("a/b/c", "neither a Hub name nor a directory"),
    ],
)
def test_names_that_are_no_base(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, stderr = said(name, "--layer", 1)
    assert (code, list(tmp_path.iterdir())) == (1, [])
    assert message in stderr


def test_a_directory_without_its_dot(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    assert f"write ./{base.name}" in said(base.name, "--layer", 1)[2]


def test_a_layer_must_be_named(base: Path) -> None:
    code, _, stderr = said(base)
    assert code == 2
    assert "Missing option '--layer'" in stderr


def test_code_of_its_own_is_not_run(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", **SIZES)
    config = json.loads((base / "config.json").read_text())
    for extra, words in (({}, "of this type (got"), ({"auto_map": {"AutoConfig": "own.Config"}}, "is not run")):
        (base / "config.json").write_text(json.dumps({**config, "model_type": "supermodel", **extra}))
        code, _, stderr = said(base, "--layer", 1, "-o", tmp_path / "new")
        assert code == 1
        assert words in stderr
        assert "model_type 'supermodel'" in stderr


def test_families_that_an_adapter_cannot_describe(tmp_path: Path) -> None:
    scaled = write_base(tmp_path / "scaled", "granite", embedding_multiplier=12.0, **SIZES)
    translator = write_base(tmp_path / "translator", "marian")
    wrapped = tmp_path / "wrapped"
    AutoConfig.for_model("mistral3").save_pretrained(wrapped)
    random_tokenizer().save_pretrained(wrapped)
    for base, message in (
        (scaled, "change of the row that enters block 0"),
        (translator, "no decoder that writes text"),
        (wrapped, "read by the adapter 'mistral', but not inside a model of this type"),
    ):
        code, _, stderr = said(base, "--layer", 1, "-o", tmp_path / "new")
        assert code == 1
        assert message in stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["scaled", "translator", "wrapped"]


def test_tokenizers_that_an_av_cannot_be_asked_with(tmp_path: Path) -> None:
    silent = random_tokenizer()
    silent.chat_template = None
    plain = random_tokenizer()
    plain.chat_template = plain.chat_template + MARKER  # so the marker stands twice
    for tokenizer, message in ((silent, "has no chat template"), (plain, "no usable marker")):
        base = write_base(tmp_path / message.replace(" ", "-"), "llama", tokenizer=tokenizer, **SIZES)
        code, _, stderr = said(base, "--layer", 1, "-o", tmp_path / "new")
        assert code == 1
        assert message in stderr
        assert not (tmp_path / "new").exists()
