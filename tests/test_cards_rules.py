"""Our copy of the Hub's rules for the front matter of cards: each rule lets the right thing through and finds the wrong one."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from nla_hub.publish.card import dataset_card, metadata_faults, size_category
from nla_hub.publish.card.metadata import model_metadata, relation
from nla_hub.publish.card.rules import MAX_BYTES, MAX_FRONT_MATTER
from nla_hub.publish.card.vocabulary import LICENCES, SIZES
from nla_hub.publish.facts import Licence

MODEL: dict[str, Any] = {
    "library_name": "nla-hub",
    "license": "apache-2.0",
    "base_model": "Qwen/Qwen2.5-7B-Instruct",
    "base_model_relation": "finetune",
    "datasets": ["HuggingFaceFW/fineweb-edu", "allenai/WildChat-1M"],
    "language": ["en", "deu", "multilingual"],
    "tags": ["nla", "interpretability"],
}
DATA: dict[str, Any] = {
    "license": ["odc-by", "cc0-1.0"],
    "pretty_name": "Explanations",
    "size_categories": ["1K<n<10K"],
    "task_categories": ["text-generation"],
    "tags": ["nla"],
    "configs": [
        {"config_name": "default", "data_files": "parts/*.parquet"},
        {"config_name": "vectors", "data_files": [{"split": "train", "path": ["a.parquet", "b.parquet"]}]},
    ],
}


def page(metadata: dict[str, Any], body: str = "# Title\n") -> str:
    return f"---\n{yaml.safe_dump(metadata, allow_unicode=True)}---\n\n{body}"


def model(**changes: Any) -> list[str]:
    changed = {key: value for key, value in {**MODEL, **changes}.items() if value != "absent"}
    return metadata_faults(page(changed), "model")


def data(**changes: Any) -> list[str]:
    return metadata_faults(page({**DATA, **changes}), "dataset")


def test_right_cards_have_no_faults() -> None:
    assert model() == data() == []
    assert (
        model(base_model="absent", base_model_relation="absent", datasets="absent", language="absent", tags="absent")
        == []
    )


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"license": "absent"}, "license: missing"),
        ({"license": "Apache 2.0"}, "license: got 'Apache 2.0'"),
        ({"license": "gemma3"}, "license: got 'gemma3'"),
        ({"license": "other"}, "license: other needs license_name and license_link"),
        ({"license": "other", "license_name": "my-1.0"}, "license: other needs"),
        (
            {"license": "other", "license_name": "My Licence", "license_link": "LICENSE"},
            "license_name: got 'My Licence'",
        ),
        ({"license": "other", "license_name": "my-1.0", "license_link": "docs/terms.md"}, "license_link: got"),
        ({"base_model": "./local/model"}, "base_model: got './local/model'"),
        ({"base_model": "a/b/c"}, "base_model: got 'a/b/c'"),
        ({"base_model": "owner/na--me"}, "base_model: got 'owner/na--me'"),
        ({"base_model": ["owner/name", 7]}, "base_model: got 7"),
        ({"base_model": None, "base_model_relation": "absent"}, "base_model: got null"),
        ({"base_model_relation": "lora"}, "base_model_relation: got 'lora', expected one of adapter, merge, quantized"),
        ({"base_model_relation": "merge"}, "base_model_relation: a merge has two or more models"),
        ({"base_model": "absent"}, "base_model_relation: stands there without a base_model"),
        ({"datasets": [None]}, "datasets: got None"),
        ({"datasets": None}, "datasets: got null"),
        ({"datasets": "allenai/WildChat-1M"}, "datasets: got 'allenai/WildChat-1M', expected a list"),
        ({"datasets": ["hf://datasets/a/b"]}, "datasets: got 'hf://datasets/a/b'"),
        ({"language": False}, "language: got False"),
        ({"language": ["English"]}, "language: got 'English'"),
        ({"tags": "nla"}, "tags: got 'nla', expected a list of texts"),
        ({"tags": ["nla", 1]}, "tags: got"),
        ({"tags": ["nla", " "]}, "tags: got"),
        ({"tags": ["nla", "nla"]}, "tags: a value stands twice"),
        ({"tags": None}, "tags: got null"),
        ({"library_name": "transformers"}, "library_name: got 'transformers', expected 'nla-hub'"),
        ({"library_name": "absent"}, "library_name: got None"),
        ({"pipeline_tag": "text-generation"}, "pipeline_tag: got 'text-generation'"),
        ({"model-index": []}, "model-index: scores stand in .eval_results/"),
    ],
)
def test_each_fault_of_a_models_card_is_found(changes: dict[str, Any], fault: str) -> None:
    found = model(**changes)
    assert len(found) == 1
    assert found[0].startswith(fault)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"size_categories": ["small"]}, "size_categories: got 'small'"),
        ({"task_categories": None}, "task_categories: got null"),
        ({"task_ids": "extractive-qa"}, "task_ids: got 'extractive-qa'"),
        ({"pretty_name": ""}, "pretty_name: got ''"),
        ({"configs": {"config_name": "default"}}, "configs: got"),
        ({"configs": [{"data_files": "a.parquet"}]}, "configs: each needs a config_name"),
        ({"configs": [{"config_name": "a"}, {"config_name": "a"}]}, "configs: a config_name stands twice"),
        ({"configs": [{"config_name": "a", "data_files": [{"path": "x"}]}]}, "configs: data_files of 'a'"),
        (
            {"configs": [{"config_name": "a", "data_files": [{"split": "train", "path": []}]}]},
            "configs: data_files of 'a'",
        ),
        ({"license": "odc"}, "license: got 'odc'"),
    ],
)
def test_each_fault_of_a_data_sets_card_is_found(changes: dict[str, Any], fault: str) -> None:
    found = data(**changes)
    assert len(found) == 1
    assert found[0].startswith(fault)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("# Title\n", "does not begin with a block"),
        ("\n---\nlicense: mit\n---\n", "does not begin with a block"),
        ("---\nlicense: mit\n", "does not begin with a block"),
        ("---\nlicense: [\n---\n", "This YAML is refused"),
        ("---\nlicense: mit\nlicense: gemma\n---\n", "stands twice"),
        ("---\n- mit\n---\n", "A mapping with named keys"),
        ("---\nlicense: !!python/object:os.system x\n---\n", "This YAML is refused"),
        (f"---\nlicense: mit\nx: {'y' * MAX_FRONT_MATTER}\n---\n", "characters, more than"),
        (f"---\nlicense: mit\n---\n{'y' * MAX_BYTES}", "larger than"),
    ],
)
def test_front_matter_has_to_be_well_formed(text: str, fault: str) -> None:
    (found,) = metadata_faults(text, "model")
    assert fault in found


def test_the_licences_of_the_released_pairs_are_known() -> None:
    assert {"apache-2.0", "gemma", "llama3.3", "other", "odc-by"} <= LICENCES
    for licence in sorted(LICENCES - {"other"}):
        assert model(license=licence) == []


def test_other_licences_have_a_name_and_a_place() -> None:
    named = Licence("other", "my-1.0", "https://example.org/terms")
    here = Licence("other", "my-1.0", files={"LICENSE": b"terms"})
    for licence, link in ((named, named.link), (here, "LICENSE")):
        metadata = model_metadata("av", licence=licence, base_model="owner/base")
        assert (metadata["license"], metadata["license_name"], metadata["license_link"]) == ("other", "my-1.0", link)
        assert metadata_faults(page(metadata), "model") == []
    known = model_metadata(
        "av", licence=Licence("gemma", link="https://ai.google.dev/gemma/terms"), base_model="google/g"
    )
    assert "license_link" not in known


def test_the_relation_to_the_base_model_is_one_of_the_hubs() -> None:
    assert relation("full", None) == relation("merged", None) == "finetune"
    assert relation("lora", None) == "adapter"
    assert relation("full", "fp8") == relation("merged", "nf4") == "quantized"


def test_what_is_not_on_the_hub_is_left_out_of_the_front_matter() -> None:
    metadata = model_metadata(
        "pair",
        licence=Licence("mit"),
        base_model="package:tiny/weights/source",
        corpora=("tiny-world", "owner/data", "owner/data"),
        rehearsal=True,
    )
    assert metadata["datasets"] == ["owner/data"]
    assert "base_model" not in metadata
    assert "base_model_relation" not in metadata
    assert metadata["tags"][-3:] == ["activation-verbalizer", "activation-reconstructor", "rehearsal"]
    assert metadata_faults(page(metadata), "model") == []


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (123_456, "100K<n<1M"),
        (10**12 - 1, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_sizes_have_the_hubs_words(rows: int, word: str) -> None:
    assert size_category(rows) == word
    assert word in SIZES


def test_a_data_sets_card_is_front_matter_and_page() -> None:
    body = "# Title\n\n{{ not a template }} {% for %}\n---\npipeline_tag: x\n---\n"
    text = dataset_card({**DATA, "tags": ["explanations", "nla"], "language": None}, body)
    assert text.endswith(body)
    assert metadata_faults(text, "dataset") == []
    found = yaml.safe_load(text.split("---\n")[1])
    assert found["tags"] == ["nla", "interpretability", "explanations"]
    assert "language" not in found
    assert found["configs"] == DATA["configs"]
