"""Model cards: what they say of a release, what they leave open, and that no text inside them can change them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from jinja2 import UndefinedError
from markdown_it import MarkdownIt

from nla_hub import resources
from nla_hub.evaluation import EvalResult
from nla_hub.evaluation.result import Example
from nla_hub.hub import HubOptions
from nla_hub.locate import resolve_pair
from nla_hub.publish.card import TASKS, eval_results, metadata_faults, model_card, recipe_card
from nla_hub.publish.card.__main__ import main
from nla_hub.publish.card.templates import render
from nla_hub.publish.card.text import CONTEXT_CHARACTERS, SAMPLE_CHARACTERS, code, fenced, inline, prose
from nla_hub.publish.facts import Effort, Licence, RecipeFacts, ReleaseFacts, ReleaseNames
from nla_hub.publish.release import RepoRole
from nla_hub.sidecar import Injection, Sidecar, Site
from nla_hub.training.recipe import recipe_names
from nla_hub.zoo import zoo

ROOT = Path(__file__).resolve().parents[1]
RESULT = EvalResult.from_dict(json.loads((ROOT / "model_cards/tiny/eval.json").read_text("utf-8")))
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = ReleaseNames("me/nla-x-L2-av", "me/nla-x-L2-ar", "nla-abcdef012345")
ROLES: tuple[RepoRole, ...] = ("av", "ar", "pair")
LEFTOVERS = re.compile(r"\{\{|\{%|\{#|\bUndefined\b|\bNone\b|<nla_hub|object at 0x")

HOSTILE = """</details></table><script>alert(1)</script> <img src=x onerror=alert(1)>
---
pipeline_tag: text-generation
---
| a | b |
| --- | --- |
```
# Not a heading
~~~~
````python
[click](javascript:alert(1)) ![x](http://x) {{ 7 * 7 }} {% raw %} $$x$$
<!-- comment
\x1b[31mred\u202eright to left\x00 half \ud800 of a character\r\nand a line
"""


def half(role: str) -> Sidecar:
    return Sidecar.read(ROOT / "nla_hub/tiny/weights" / role)


def facts(**changes: Any) -> ReleaseFacts:
    """A release of which everything is known."""
    values: dict[str, Any] = {
        "names": NAMES,
        "release_id": "abcdef012345",
        "base_model": "owner/base",
        "base_revision": COMMIT,
        "n_layers": 4,
        "family": "llama",
        "av": half("av"),
        "ar": half("ar"),
        "licence": Licence(
            "llama3.3", files={"LICENSE": b"", "NOTICE": b"", "USE_POLICY.md": b""}, notice="Built with Llama"
        ),
        "dtypes": {"av": "bfloat16", "ar": "float16"},
        "parameters": {"av": 780800, "ar": 632960},
        "score": RESULT.score(),
        "score_mean_norm": RESULT.score("mean_norm"),
        "evaluation": RESULT,
        "evaluation_set": "me/eval-set",
        "recipe": RecipeFacts("tiny", "0a1b2c3d", {"seed": 0}, ("owner/documents", "here"), "a labeler"),
        "effort": Effort({"av": 3600.0, "rl": 7200.0}, 8, "NVIDIA H100 80GB HBM3"),
        "steps": ("step-000400",),
        "attribution": ("Contains information from X, made available under ODC-By 1.0.",),
        "price_per_gpu_hour": 2.5,
    }
    return ReleaseFacts(**{**values, **changes})


def unknown(**changes: Any) -> ReleaseFacts:
    """A release of which nothing is known that need not be known."""
    values: dict[str, Any] = {
        "names": NAMES,
        "release_id": "abcdef012345",
        "base_model": "tiny-source",
        "base_revision": None,
        "n_layers": None,
        "family": "llama",
        "av": half("av"),
        "ar": half("ar"),
        "licence": Licence("mit"),
    }
    return ReleaseFacts(**{**values, **changes})


def with_sample(text: str | None, *, context: str = "some text", raw: str = "") -> ReleaseFacts:
    example = Example(
        "worst", None, 3, None, context, text, raw, "ok" if text else "no_tags", 0.5 if text else None, None
    )
    return facts(evaluation=replace(RESULT, examples=(example,)))


def parsed(card: str) -> list[Any]:
    """Tokens of the page, by another implementation of CommonMark with tables."""
    return MarkdownIt("commonmark").enable("table").parse(ModelCard(card).text)


def headings(card: str) -> list[str]:
    tokens = parsed(card)
    return [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]


def fences(card: str) -> list[str]:
    return [token.content for token in parsed(card) if token.type == "fence"]


def cell(card: str, name: str) -> str:
    """The second cell of a table's row."""
    return next(line for line in card.splitlines() if line.startswith(f"| {name} |")).split("|")[2].strip()


# -- what they say -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("made", [facts, unknown])
def test_cards_are_valid_and_have_no_leftovers(role: RepoRole, made: Any) -> None:
    card = model_card(made(), role)
    assert metadata_faults(card, "model") == []
    assert LEFTOVERS.findall(card) == []
    assert "\n\n\n\n" not in card


def test_the_front_matter_says_what_a_half_is() -> None:
    tags = {role: ModelCard(model_card(facts(), role)).data.tags for role in ROLES}
    assert "activation-verbalizer" in tags["av"]
    assert "activation-reconstructor" not in tags["av"]
    assert "activation-reconstructor" in tags["ar"]
    assert {"nla", "interpretability", "activation-verbalizer", "activation-reconstructor"} <= set(tags["pair"])
    data = ModelCard(model_card(facts(), "av")).data
    assert (data.library_name, data.license, data.base_model) == ("nla-hub", "llama3.3", "owner/base")
    assert data.base_model_relation == "finetune"
    assert data.datasets == ["owner/documents"]
    assert data.pipeline_tag is None
    assert data.eval_results is None


def test_the_contract_is_complete() -> None:
    card = model_card(facts(), "av")
    assert cell(card, "base model") == f"`owner/base`, revision `{COMMIT}`"
    assert cell(card, "layer K") == "2 of 4, counted from 0: the output of decoder block 2"
    assert cell(card, "the same elsewhere").startswith("`hidden_states[3]` in transformers, `blocks.2.hook_resid_post`")
    assert cell(card, "AV: marker") == "`㊥` (U+32A5), token 964"
    assert cell(card, "AV: neighbours").startswith("token left / right of it: 965 / 966;")
    assert "v · 366/‖v‖" in cell(card, "AV: injection")
    assert cell(card, "AR: trunk and head").startswith(
        "3 blocks without final norm, then a linear d × d head in float32"
    )
    assert cell(card, "AR: suffix ids") == "968"
    assert "11.3137" in cell(card, "AR: mse_scale")
    assert cell(card, "AV: on disk") == "bfloat16, 780,800 stored values"
    assert "<v>{injection_char}</v>\n" in fences(card)
    assert "<text>{explanation}</text>\n" in fences(card)


def test_other_contracts_read_otherwise() -> None:
    av = half("av").with_(injection=Injection("add"), site=Site(3))
    ar = half("ar").with_(head_input="normalized", ar_special_tokens=False, final_norm_stripped=False, site=Site(3))
    card = model_card(facts(av=av, ar=ar), "av")
    assert "h + ‖h‖ v/‖v‖" in cell(card, "AV: injection")
    assert "a hook on block 3 (`hidden_states[4]` is after the final norm)" in cell(card, "the same elsewhere")
    assert "with the final norm" in cell(card, "AR: trunk and head")
    assert "h · 11.3137/‖h‖" in cell(card, "AR: trunk and head")
    assert "without BOS" in cell(card, "AR: prompt")
    raw = model_card(facts(av=half("av").with_(injection=Injection("overwrite", None))), "av")
    assert "v as it is" in cell(raw, "AV: injection")


def test_scores_stand_with_all_that_belongs_to_them() -> None:
    card = model_card(facts(), "ar")
    assert "**FVE (raw variance, tiny-eval-v1, n=1200): 0.853; cosine 0.931**" in card
    assert "FVE (mean-norm, tiny-eval-v1, n=1200): 0.908; cosine 0.931" in card
    assert cell(card, "explanations of other rows (permuted)") == "-0.998 [-1.019, -0.978]"
    assert "- commit: f1eb5782a4d9a33dfcdc98c90e3f32ad77d570c1" in card
    assert "- seeds: protocol 0" in card
    assert "[me/eval-set](https://huggingface.co/datasets/me/eval-set)" in card
    assert "nla-hub eval me/nla-x-L2-av@nla-abcdef012345 --protocol tiny-eval-v1" in card
    assert "(before they were" not in card


def test_what_was_measured_before_packing_says_so() -> None:
    score = replace(RESULT.score(), value=0.84)
    card = model_card(facts(score=score, quantised="fp8", parity={"av cosine": 0.9991}), "av")
    assert "**FVE (raw variance, tiny-eval-v1, n=1200): 0.840" in card
    assert "measured on the run's own weights, before they were packed" in card
    assert cell(card, "av cosine") == "0.999"
    assert ModelCard(card).data.base_model_relation == "quantized"
    assert "pyyaml compressed-tensors" in card


def test_unknown_figures_are_not_made_up() -> None:
    card = model_card(unknown(), "av")
    assert "**not measured**" in card
    assert all(cell(card, name) == "not measured" for name in ("explanations", "gold labels, by the AR (ceiling)"))
    assert cell(card, "base model") == "`tiny-source`, not pinned"
    assert "Not measured: there is no evaluation to take them from." in card
    assert "Recipe, stages, GPU hours and cost: not known" in card
    only_score = model_card(unknown(score=RESULT.score()), "av")
    assert cell(only_score, "explanations") == "0.853"
    assert "nla-hub at commit `f1eb5782a4d9a33dfcdc98c90e3f32ad77d570c1`" in only_score


def verification(base_model: str) -> str:
    card = model_card(unknown(base_model=base_model), "av")
    return card.partition("### How to measure it again")[2].partition("## Samples")[0]


def test_a_base_model_that_is_not_on_the_hub_has_to_be_named() -> None:
    assert "--base-model" not in verification("owner/base")
    assert "is not on the Hub" not in verification("owner/base")
    packaged = verification("tiny-source")
    assert " --base-model tiny\n```" in packaged
    assert "The base model, `tiny-source`, is not on the Hub. `tiny` names the one" in packaged
    own = verification("my-recipe-source")
    assert " --base-model ./BASE\n```" in own
    assert "`my-recipe-source`, is not on the Hub. Its directory is needed: `./BASE`" in own


def test_the_line_that_measures_again_can_be_run() -> None:
    """The packaged pair in place of the release, whose base model has the same name."""
    line = next(line for line in verification("tiny-source").splitlines() if line.startswith("nla-hub eval"))
    _, _, _, *options = line.split()
    given = dict(zip(options[::2], options[1::2], strict=True))
    refs = resolve_pair(ROOT / "nla_hub/tiny/weights", base_model=given["--base-model"])
    assert refs.base is not None
    assert (refs.base.fetch(HubOptions()) / "config.json").is_file()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"corpus": "tiny-world", "mix": []}, "Documents: the corpus `tiny-world` of the recipe above, no data set of"),
        ({"corpus": None, "mix": [{"data": "a local file"}]}, "Documents: files of whoever ran the recipe above, no"),
        ({}, "What documents it learned from: not known."),
        (None, "What documents it learned from: not known."),
    ],
)
def test_documents_that_are_no_data_set_of_the_hub(data: Any, said: str) -> None:
    recipe = RecipeFacts("x", "0a1b2c3d", {} if data is None else {"data": data})
    card = model_card(facts(recipe=recipe), "av")
    assert said in card.partition("## Data")[2].partition("## Form")[0]
    assert "What documents it learned from: not known." in model_card(facts(recipe=None), "av")


def test_effort_and_cost() -> None:
    card = model_card(facts(), "av")
    assert cell(card, "GPU hours") == "24.0"
    assert cell(card, "cost") == "60.00 US dollars at 2.5 an hour"
    assert cell(card, "machine") == "8 x NVIDIA H100 80GB HBM3"
    assert cell(card, "rl") == "7,200"
    assert cell(model_card(facts(price_per_gpu_hour=None), "av"), "cost") == "not known"
    cpu = model_card(facts(effort=Effort({"av": 60.0}, 1, "cpu")), "av")
    assert (cell(cpu, "GPU hours"), cell(cpu, "cost")) == ("none (trained on a CPU)", "not known")


def test_licence_notice_attribution_and_rehearsal_are_shown() -> None:
    card = model_card(facts(), "ar")
    assert card.index("**Built with Llama**") < card.index("## What it is not")
    assert "Files in this repository: `LICENSE`, `NOTICE`, `USE_POLICY.md`." in card
    assert "Contains information from X, made available under ODC-By 1.0." in card
    assert "rehearsal" not in card
    rehearsed = model_card(facts(rehearsal=True), "ar")
    assert "> **This is a rehearsal.**" in rehearsed
    assert "rehearsal" in ModelCard(rehearsed).data.tags


def test_the_same_facts_give_the_same_bytes() -> None:
    assert model_card(facts(), "av") == model_card(facts(), "av")


# -- texts of others -----------------------------------------------------------------------------------------


def test_a_hostile_explanation_stays_inside_its_fence() -> None:
    benign, card = model_card(with_sample("fine"), "av"), model_card(with_sample(HOSTILE, context=HOSTILE), "av")
    assert headings(card) == headings(benign)
    assert ModelCard(card).data.to_dict() == ModelCard(benign).data.to_dict()
    assert metadata_faults(card, "model") == []
    kinds = [token.type for token in parsed(card)]
    assert kinds == [token.type for token in parsed(benign)]
    shown = [text for text in fences(card) if "Not a heading" in text]
    assert len(shown) == 2
    assert all("````python" in text and "{{ 7 * 7 }} {% raw %}" in text for text in shown)
    assert not re.search("[\x00\x1b\u202e\ud800\r]", card)
    card.encode("utf-8")


def test_a_hostile_name_stays_inside_its_cell() -> None:
    recipe = RecipeFacts("a | b\n# c `x`", "``h``", {"k": "```\n# d"}, ("o/d\n- <b>",), HOSTILE)
    corpus = replace(RESULT, corpus=HOSTILE, versions={"x": "<b>|"})
    benign = model_card(facts(), "av")
    card = model_card(facts(recipe=recipe, evaluation=corpus, attribution=(HOSTILE,)), "av")
    assert headings(card) == headings(benign)
    tables = [[t.type for t in parsed(c)].count("td_open") for c in (card, benign)]
    assert tables[0] == tables[1]
    assert [t.content for t in parsed(card) if t.type.startswith("html")] == [
        t.content for t in parsed(benign) if t.type.startswith("html")
    ]
    inner = [child.type for token in parsed(card) for child in token.children or []]
    assert "html_inline" not in inner
    assert "image" not in inner


def test_secrets_in_samples_are_masked() -> None:
    card = model_card(
        with_sample("write to someone@mail.net", context="log in /home/someone/x with hf_" + "a" * 34), "av"
    )
    assert "someone" not in card
    assert "hf_a" not in card
    assert "write to [e-mail]" in card


def test_long_samples_are_cut_by_the_stated_rule() -> None:
    card = model_card(with_sample("y" * 5000, context="z" * 4000 + "END"), "av")
    read, written = fences(card)[-3:-1] if "seed: 0" in fences(card)[-1] else fences(card)[-2:]
    assert read.replace("\n", "").endswith("END")
    assert len(re.sub(r"\s|\[\.\.\.\]", "", read)) == CONTEXT_CHARACTERS
    assert len(re.sub(r"\s|\[\.\.\.\]", "", written)) == SAMPLE_CHARACTERS
    assert max(map(len, (read + written).splitlines())) <= 110


def test_an_answer_without_tags_is_shown_as_what_it_is() -> None:
    card = model_card(with_sample(None, raw="no tags here"), "av")
    assert "### Worst: no usable text (no tags), position 3" in card
    assert "no tags here" in card


@pytest.mark.parametrize("text", ["plain", "a`b", "``", "`", "x | y", "a\nb", "", "<b>&amp;*_[x](y)~$\\"])
def test_pieces_of_text_come_back_from_markdown(text: str) -> None:
    flat = " ".join(text.split())
    render_md = MarkdownIt("commonmark").enable("table")
    if flat:
        (token,) = render_md.parseInline(inline(text))
        assert "".join(child.content for child in token.children or []) == flat
        cells = [t for t in render_md.parse(f"| a | b |\n| --- | --- |\n| {code(text)} | 1 |") if t.type == "inline"]
        assert [t.content for t in cells][2:] != []
        (span,) = cells[2].children or []
        assert (span.type, span.content) == ("code_inline", flat)
    (block,) = [t for t in render_md.parse(fenced(text)) if t.type == "fence"]
    assert block.content == f"{text}\n"
    assert prose(text).startswith("```")


# -- recipes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_cards_render_for_every_recipe(name: str) -> None:
    card = recipe_card(name)
    assert metadata_faults(card, "model") == []
    assert LEFTOVERS.findall(card) == []
    assert "Nothing has been trained yet" in card
    assert "**not measured**" in card
    assert not re.search(r"FVE \([^)]*\): \d", card)


def test_published_figures_say_whose_they_are() -> None:
    qwen = recipe_card("qwen2.5-7b")
    assert "published: 0.752, raw variance, Fraser-Taliente et al. 2026; not measured here" in qwen
    assert "Its FVE: not measured." in recipe_card("gemma-3-12b")
    assert "**Built with Llama**" in recipe_card("llama-3.3-70b")
    assert "# Llama-3.3-70B-NLA-L53-av" in recipe_card("llama-3.3-70b")


def test_every_recipe_of_a_released_pair_has_a_card_here() -> None:
    cards = {path.stem for path in (ROOT / "model_cards").glob("*.md")}
    assert {name for name, entry in zoo().items() if entry.recipe is not None} <= cards


def test_cards_are_printed_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gemma-3-12b"]) == 0
    assert capsys.readouterr().out == (ROOT / "model_cards/gemma-3-12b.md").read_text("utf-8")
    assert main(["gemma-3-1b"]) == 2
    assert "gemma-3-12b" in capsys.readouterr().err


def test_a_name_that_nobody_gives_a_template_is_an_error() -> None:
    assert resources.data_directory("model_cards") / "templates" / "model.md"
    with pytest.raises(UndefinedError, match="is undefined"):
        render("with_nla_hub.md", role="av")


# -- results in the Hub's form -------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["av", "pair"])
def test_results_are_what_the_clients_read(role: RepoRole) -> None:
    ((name, content),) = eval_results(facts(), role).items()
    assert re.fullmatch(r"\.eval_results/[\w-]+\.yaml", name)
    found = {entry.task_id: entry for entry in parse_eval_result_entries(yaml.safe_load(content))}
    assert {task: round(entry.value, 3) for task, entry in found.items()} == {
        TASKS["raw_variance"]: 0.853,
        TASKS["mean_norm"]: 0.908,
        TASKS["cosine"]: 0.931,
    }
    assert {entry.dataset_id for entry in found.values()} == {"me/eval-set"}
    notes = found["cosine"].notes
    assert notes == "tiny-eval-v1, n=1200, greedy, seed 0, nla-hub at commit f1eb5782a4d9a33dfcdc98c90e3f32ad77d570c1"


def test_there_are_no_results_without_a_score_a_data_set_or_training() -> None:
    assert eval_results(facts(), "ar") == {}
    assert eval_results(facts(score=None), "av") == {}
    assert eval_results(facts(evaluation_set=None), "av") == {}
    assert eval_results(facts(rehearsal=True), "av") == {}
    only_one = replace(RESULT.score(), cosine=None)
    content = eval_results(facts(score=only_one, score_mean_norm=None), "av")[".eval_results/nla-eval.yaml"]
    assert [entry["dataset"]["task_id"] for entry in yaml.safe_load(content)] == [TASKS["raw_variance"]]
