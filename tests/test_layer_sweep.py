"""A layer sweep on the tiny world: against independent routes, killed and continued, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import Case
from sklearn.linear_model import Ridge
from typer.testing import CliRunner

import nla_hub
from nla_hub import registry
from nla_hub.adapters import adapter_for
from nla_hub.capture import run_trunk, run_trunk_at
from nla_hub.cli.app import app
from nla_hub.errors import InputError, RunError, TrainingError
from nla_hub.geometry import direction_mse, unit
from nla_hub.loading import Source
from nla_hub.pretrained import LoadOptions, load_causal_lm, load_tokenizer, load_trunk
from nla_hub.prompts import ARPrompt
from nla_hub.sidecar import Site
from nla_hub.testing import LAYERS
from nla_hub.tiny import documents
from nla_hub.tiny.labeler import TinyLabeler
from nla_hub.training.ar_regression import init_ar, train_ar
from nla_hub.training.contract import suffix_ids
from nla_hub.training.corpora import content_key
from nla_hub.training.data import TrainingRows, collect, read_rows
from nla_hub.training.labelers import LabelContext, LabelRequest
from nla_hub.training.recipe import CorpusPart, DataSpec, LabelSpec, LoRASpec, Recipe, load_recipe
from nla_hub.training.run import RunDirectory
from nla_hub.training.splits import split_documents, splitter_of
from nla_hub.training.sweep import label_words
from nla_hub.training.sweep import run as module
from nla_hub.training.sweep.label_words import fact_accuracies, ridge_from_words
from nla_hub.training.sweep.result import SweepResult
from nla_hub.training.sweep.run import FOLDER, LayerSweep, check_sweep, choose_layers

BASE = Path(nla_hub.__file__).parent / "tiny" / "weights" / "source"
DOCUMENTS = 40
LAYERS_SWEPT = (0, 2)
runner = CliRunner()


def recipe_here() -> Recipe:
    """The packaged source, all labels, small batches: fifty steps from few rows."""
    recipe = load_recipe("tiny-weak", ["rl=null", "labels.settings={}", "ar.batch_size=12", "ar.epochs=1"])
    return dataclasses.replace(recipe, base=dataclasses.replace(recipe.base, model=str(BASE)))


def sweep_in(
    place: Path, layers: Sequence[int] = LAYERS_SWEPT, documents: int = DOCUMENTS, **settings: Any
) -> SweepResult:
    recipe = settings.pop("recipe", None) or recipe_here()
    return LayerSweep(
        recipe, RunDirectory(place, recipe), BASE, layers=layers, documents=documents, **settings
    ).execute()


def timeless(result: SweepResult) -> Any:
    return dataclasses.replace(result, layers=tuple(dataclasses.replace(each, seconds=0.0) for each in result.layers))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepResult]:
    place = tmp_path_factory.mktemp("sweep") / "run"
    return place, sweep_in(place)


# -- which layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "recipe_layer", "expected"),
    [
        (4, 2, (0, 1, 2, 3)),
        (28, 18, (0, 4, 8, 12, 15, 18, 23, 27)),
        (28, 20, (0, 4, 8, 12, 15, 18, 20, 27)),
        (80, 53, (0, 11, 23, 34, 45, 53, 68, 79)),
    ],
)
def test_the_layers_of_a_sweep(depth: int, recipe_layer: int, expected: tuple[int, ...]) -> None:
    assert choose_layers(depth, recipe_layer) == expected
    assert {2 * depth // 3, recipe_layer} <= set(expected)


def test_layers_that_are_asked_for() -> None:
    assert choose_layers(28, 18, [20, 3, 3]) == (3, 20)
    for wrong in ([28], [-1], []):
        with pytest.raises(InputError, match="expected 0 to 27"):
            choose_layers(28, 18, wrong)


def test_a_sweep_is_refused_before_anything_is_made() -> None:
    assert check_sweep(recipe_here(), None, 8) == (0, 1, 2, 3)
    assert check_sweep(load_recipe("tiny"), None, 8) == (0, 1, 2, 3)  # whose source is not trained yet
    with pytest.raises(InputError, match="got 4, expected 0 to 3"):
        check_sweep(load_recipe("tiny"), [4], 8)
    with pytest.raises(InputError, match="more documents"):
        check_sweep(recipe_here(), None, 7)


# -- one pass ------------------------------------------------------------------------------------------------


def test_one_pass_reads_what_a_pass_for_each_layer_reads(crossed: Case) -> None:
    loaded = load_causal_lm(crossed.pair.source, LoadOptions())
    adapter, model = adapter_for(loaded.model.config), loaded.model
    ids = torch.randint(5, 200, (3, 90), generator=torch.Generator().manual_seed(1)).tolist()
    sequences = [(ids[0], [3, 80]), (ids[1][:20], [19]), (ids[2][:60], [0, 7, 59])]
    sites = [Site(layer) for layer in (LAYERS - 1, 0, 2)]  # in any order
    for chunk in (2048, 32):  # 32: read in parts, with a cache
        settings: dict[str, Any] = {"pad_id": 1, "batch_size": 2, "chunk_tokens": chunk}
        found = run_trunk_at(adapter, model, sites, sequences, **settings)
        assert found.shape == (6, 3, 64)
        for i, site in enumerate(sites):
            assert torch.equal(found[:, i], run_trunk(adapter, model, site, sequences, **settings))
    assert run_trunk_at(adapter, model, sites, [], pad_id=1, batch_size=1).shape == (0, 3, 64)


# -- the sweep -----------------------------------------------------------------------------------------------


def test_it_shows_what_is_known_of_the_tiny_world(swept: tuple[Path, SweepResult]) -> None:
    place, result = swept
    first, middle = result.layers
    assert (first.layer, middle.layer) == LAYERS_SWEPT
    assert first.fve < middle.fve
    assert first.ridge_fve < middle.ridge_fve
    assert first.facts is not None
    assert middle.facts is not None
    assert first.facts + 0.05 < middle.facts
    for each in result.layers:
        assert each.mean_fve < each.fve_low < each.fve < each.fve_high < 1
        assert each.mean_fve < each.ridge_fve < 1
    assert result.best is middle
    assert "Layer 2 of 4" in result.sentence()
    assert "It is the recipe's layer." in result.sentence()
    stored = json.loads((place / FOLDER / "result.json").read_text())
    assert stored == json.loads(json.dumps(result.to_dict()))
    page = (place / FOLDER / "layer-sweep.html").read_text()
    assert page.count("<svg") >= 2
    assert "Little data" in page
    assert "<script" not in page


def test_the_figure_at_the_recipes_layer_is_what_train_ar_gives_on_the_same_rows(
    swept: tuple[Path, SweepResult],
) -> None:
    """By the parts of a run: `collect`, a trunk that ends at the layer, `train_ar` with its own measurement."""
    place, result = swept
    recipe = recipe_here()
    source = Source(load_trunk(BASE, recipe.site, LoadOptions()), load_tokenizer(BASE), "tiny-source")
    rows = {
        split: collect(source, recipe, split_documents(recipe, split, n), TinyLabeler(), prefix=split)
        for split, n in (("ar_sft", DOCUMENTS), ("dev", DOCUMENTS // 4))
    }
    kept = read_rows(place / FOLDER / "rows" / "L2-train.parquet")
    assert (kept.texts, kept.doc_ids, kept.positions) == (
        rows["ar_sft"].texts,
        rows["ar_sft"].doc_ids,
        rows["ar_sft"].positions,
    )
    assert torch.equal(kept.vectors, rows["ar_sft"].vectors)
    reported: list[dict[str, Any]] = []
    template = recipe.prompts.ar
    train_ar(
        init_ar(source.loaded.adapter, source.loaded.model),
        ARPrompt(source.tokenizer, template, suffix_ids(source.tokenizer, template)),
        rows["ar_sft"],
        dataclasses.replace(recipe.ar, documents=DOCUMENTS),
        seed=recipe.seed,
        report=reported.append,
        held_out=rows["dev"],
    )
    assert reported[-1]["held_out_fve_of_labels"] == pytest.approx(result.layers[1].fve, abs=1e-6)
    assert (result.train_rows, result.held_out_rows) == (len(rows["ar_sft"]), len(rows["dev"]))


def test_a_killed_sweep_goes_on_and_asks_for_no_label_twice(
    swept: tuple[Path, SweepResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    trained: list[int] = []
    label, train = TinyLabeler.label, module.train_ar

    def counted(self: TinyLabeler, requests: Any) -> Any:
        asked.append(len(requests))
        return label(self, requests)

    def killed(model: Any, prompt: Any, rows: TrainingRows, *others: Any, **settings: Any) -> Any:
        trained.append(rows.site.layer)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(model, prompt, rows, *others, **settings)

    monkeypatch.setattr(TinyLabeler, "label", counted)
    monkeypatch.setattr(module, "train_ar", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep_in(tmp_path / "run")
    said: list[str] = []
    result = sweep_in(tmp_path / "run", say=said.append)
    assert trained == [0, 2, 2]
    assert "layer 0: done before" in said
    assert len(asked) == 2  # one for each split
    assert timeless(result) == timeless(swept[1])
    more = sweep_in(tmp_path / "run", layers=(0, 1))
    assert [each.layer for each in more.layers] == [0, 1]
    assert (trained, len(asked)) == ([0, 2, 2, 1], 2)
    with pytest.raises(RunError, match="another number of documents") as caught:
        sweep_in(tmp_path / "run", documents=DOCUMENTS + 1)
    assert "--documents" in str(caught.value)


def test_labels_that_are_missing_leave_their_rows_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    label = TinyLabeler.label
    monkeypatch.setattr(
        TinyLabeler, "label", lambda self, requests: [x if i % 2 else None for i, x in enumerate(label(self, requests))]
    )
    result = sweep_in(tmp_path / "run", layers=(1,), documents=16)
    assert 0 < result.train_rows <= 16 * 8 // 2
    rows = read_rows(tmp_path / "run" / FOLDER / "rows" / "L1-train.parquet")
    assert len(rows) == result.train_rows
    source = load_trunk(BASE, Site(1), LoadOptions())
    again = collect(
        Source(source, load_tokenizer(BASE), "x"), dataclasses.replace(recipe_here(), layer=1),
        split_documents(recipe_here(), "ar_sft", 16), TinyLabeler(), prefix="ar_sft",
    )  # fmt: skip
    assert torch.equal(rows.vectors, again.vectors)
    monkeypatch.setattr(TinyLabeler, "label", lambda self, requests: [None] * len(requests))
    with pytest.raises(TrainingError, match="Fewer than two documents"):
        sweep_in(tmp_path / "none", layers=(1,), documents=16)


class LastWords:
    """A labeler of any texts, which is told where it may keep answers."""

    opened: ClassVar[list[LabelContext]] = []
    asked: ClassVar[list[set[str]]] = []

    def open(self, context: LabelContext) -> None:
        self.opened.append(context)

    def label(self, requests: Sequence[LabelRequest]) -> list[str | None]:
        self.asked.append({str(request.document.content) for request in requests})
        return [" ".join(str(request.prefix).split()[-4:]) or None for request in requests]


def test_a_mixture_is_swept_by_its_own_splits_and_without_facts(tmp_path: Path) -> None:
    texts = list(dict.fromkeys(document.text for document in documents(500, 3, "train")))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = dataclasses.replace(
        recipe_here(),
        data=DataSpec(mix=(CorpusPart(str(tmp_path / "texts.jsonl")),), positions=4, min_position=4, max_tokens=40),
        labels=LabelSpec("last-words"),
    )
    with registry.labelers.lend("last-words", LastWords):
        result = sweep_in(tmp_path / "run", layers=(1,), documents=16, recipe=recipe)
    (figures,) = result.layers
    assert figures.facts is None
    assert figures.accuracy == {}
    assert (result.documents, result.train_rows) == (16, 64)
    assert max(read_rows(tmp_path / "run" / FOLDER / "rows" / "L1-train.parquet").positions) < 40
    of = splitter_of(recipe).split_of
    assert [{of(content_key(text)) for text in texts} for texts in LastWords.asked] == [{"ar_sft"}, {"dev"}]
    assert [context.directory.name for context in LastWords.opened] == ["answers"]


def test_a_recipe_with_factors_is_swept_with_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    trained: list[set[str]] = []
    train = module.train_ar

    def spied(model: Any, *others: Any, **settings: Any) -> Any:
        trained.append({name for name, p in model.named_parameters() if p.requires_grad})
        return train(model, *others, **settings)

    monkeypatch.setattr(module, "train_ar", spied)
    recipe = dataclasses.replace(recipe_here(), lora=LoRASpec(r=4, alpha=8))
    result = sweep_in(tmp_path / "run", layers=(1,), documents=8, recipe=recipe)
    assert result.layers[0].fve > result.layers[0].mean_fve - 1
    assert all("lora_" in name or name.startswith("head") for name in trained[0])
    assert any("lora_" in name for name in trained[0])


# -- linear parts --------------------------------------------------------------------------------------------


def rows_of(texts: Sequence[str], vectors: torch.Tensor) -> TrainingRows:
    ids = tuple(f"d-{i // 4}" for i in range(len(texts)))
    return TrainingRows(vectors, tuple(texts), ids, (0,) * len(texts), tuple(texts), Site(0))


def test_the_ridge_map_is_ridge_regression_on_which_words_stand_there(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    words = [f"w{i}" for i in range(12)]
    holds = torch.rand(120, 12, generator=generator) < 0.3
    holds[:, 0] |= ~holds.any(dim=1)  # no empty label
    vectors = holds.float() @ torch.randn(12, 20, generator=generator) + torch.randn(120, 20, generator=generator)
    texts = [" ".join(w for w, here in zip(words, row, strict=True) if here) for row in holds.tolist()]
    train, held = rows_of(texts[:90], vectors[:90]), rows_of(texts[90:], vectors[90:])
    monkeypatch.setattr(label_words, "PENALTIES", (10.0, 10.0))
    got = ridge_from_words(train, held)
    x = holds.double().numpy()
    model = Ridge(alpha=10.0).fit(x[:90], unit(vectors[:90]).numpy())
    expected = direction_mse(torch.from_numpy(model.predict(x[90:])), vectors[90:])
    assert torch.allclose(got, expected, atol=1e-6)
    assert got.mean() < direction_mse(vectors[:90].mean(dim=0).expand(30, -1), vectors[90:]).mean()


def test_probes_leave_out_facts_that_too_few_rows_have() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(0, 3, (200,), generator=generator)
    vectors = torch.nn.functional.one_hot(values, 8).float() + 0.3 * torch.randn(200, 8, generator=generator)
    facts = [{"kind": int(v), **({"person": int(v)} if i < 20 else {})} for i, v in enumerate(values)]
    found = fact_accuracies(vectors[:120], facts[:120], vectors[120:], facts[120:])
    assert set(found) == {"kind"}
    assert found["kind"] > 0.9


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    words = ["train", "tiny-weak", "rl=null", "--layer-sweep", "--layers", "1,2", "--documents", "16"]
    words += ["-o", str(tmp_path / "run")]
    shown = runner.invoke(app, words)
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert lines[0].split("  ")[:2] == ["layer", "FVE of labels"]
    assert [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    assert lines[2].startswith("2 *")
    assert lines[3].startswith("Layer ")
    assert "Regression on labels, no reinforcement learning" in shown.stderr
    again = runner.invoke(app, [*words, "--json"])
    assert [json.loads(line)["layer"] for line in again.stdout.splitlines()] == [1, 2]
    assert again.stderr.count("done before") == 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--layer-sweep", "--layers", "9"], 1, "no such layer"),
        (["--layer-sweep", "--layers", "1,x"], 2, "expected numbers with commas"),
        (["--layer-sweep", "--documents", "3"], 1, "more documents"),
        (["--layer-sweep", "--plan"], 2, "does not go with --plan"),
        (["--layer-sweep", "--rehearse"], 2, "does not go with --rehearse"),
        (["--layer-sweep", "--stage", "ar"], 2, "does not go with --stage"),
        (["--layers", "1"], 2, "goes with --layer-sweep alone"),
        (["--documents", "9"], 2, "goes with --layer-sweep alone"),
    ],
)
def test_mistakes(words: list[str], code: int, message: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["train", "tiny-weak", "rl=null", "-o", str(tmp_path / "run"), *words])
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nla_hub.training.processes import Processes

    monkeypatch.setattr(Processes, "here", classmethod(lambda cls: cls(0, 2)))
    result = runner.invoke(app, ["train", "tiny-weak", "rl=null", "-o", str(tmp_path / "run"), "--layer-sweep"])
    assert result.exit_code == 1
    assert "runs in one process" in result.stderr
