"""Training: the parts against independent routes, and a whole run that is interrupted, continued and refused."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import nla_hub
from nla_hub.batching import pad_right
from nla_hub.errors import (
    InputError,
    MissingExtraError,
    PublishError,
    RecipeError,
    RunError,
    TrainingError,
    UnknownNameError,
)
from nla_hub.geometry import direction_mse, norms
from nla_hub.hub import HubOptions
from nla_hub.injection import Injector
from nla_hub.loading import Source
from nla_hub.nla import NLA
from nla_hub.pretrained import LoadOptions, load_causal_lm, load_tokenizer, load_trunk
from nla_hub.prompts import ARPrompt, AVPrompt
from nla_hub.publish.staging import bundle
from nla_hub.publish.staging.bundle import Wanted
from nla_hub.publish.staging.found import find
from nla_hub.sidecar import Sidecar, Site
from nla_hub.source_text import encode_source
from nla_hub.testing import MARKER, random_pair
from nla_hub.tiny import documents
from nla_hub.tiny.labeler import TinyCorpus, TinyLabeler
from nla_hub.training import checks
from nla_hub.training.ar_regression import direction_loss, init_ar, train_ar
from nla_hub.training.av_sft import AVLoss, evaluate_av
from nla_hub.training.checks import check_recipe, check_reporters
from nla_hub.training.data import TrainingRows, collect, make_labeler, pick_positions, read_rows, write_rows
from nla_hub.training.loop import NON_FINITE_LIMIT, batch_order, learning_rate, run_loop
from nla_hub.training.pipeline import Pipeline
from nla_hub.training.recipe import LabelSpec, Recipe, RLSpec, StageSpec, load_recipe, recipe_names
from nla_hub.training.rehearsal import STEPS, rehearsed
from nla_hub.training.run import RunDirectory
from nla_hub.training.splits import SEED_OFFSETS, data_splits, require_dev_held_out, split_documents
from nla_hub.training.stages import require_stages, stages_of

SOURCE = Path(nla_hub.__file__).parent / "tiny" / "weights" / "source"


def small_recipe(**changes: Any) -> Recipe:
    """The tiny recipe on the packaged source, cut to a few documents."""
    recipe = rehearsed(load_recipe("tiny"))[0]
    base = dataclasses.replace(recipe.base, model=str(SOURCE), train=None)
    return dataclasses.replace(recipe, **{"base": base, "rl": None, **changes})


class Silent:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.resumed: list[str] = []

    def stage(self, name: str, *, resumed: bool) -> None:
        (self.resumed if resumed else self.begun).append(name)

    def metrics(self, name: str, metrics: dict[str, Any]) -> None: ...

    def done(self, name: str, summary: dict[str, Any]) -> None: ...


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(
        load_trunk(SOURCE, Site(load_recipe("tiny").layer), LoadOptions()), load_tokenizer(SOURCE), "tiny-source"
    )


@pytest.fixture(scope="module")
def rows(source: Source) -> TrainingRows:
    return collect(source, small_recipe(), TinyCorpus().documents(12, seed=1), TinyLabeler(), prefix="test")


# -- recipes -------------------------------------------------------------------------------------------------


def test_every_packaged_recipe_can_be_read() -> None:
    assert "tiny" in recipe_names()
    for name in recipe_names():
        assert load_recipe(name).name == name


def test_a_recipe_lists_all_of_its_faults_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny", ["ar.lrr=1e-3", "layer=-1", "marker=ab", "ar.documents=0", "prompts.av=no marker"])
    message = str(caught.value)
    for part in ("ar.lrr", "did you mean", "layer", "marker", "documents", "{injection_char} stands 0 times"):
        assert part in message, message


def test_overrides_change_the_recipe_and_its_digest() -> None:
    plain, changed = load_recipe("tiny"), load_recipe("tiny", ["ar.lr=1e-4"])
    assert changed.ar.lr == 1e-4
    assert plain.digest() != changed.digest()
    assert plain.digest() == load_recipe("tiny").digest()


def test_an_unknown_recipe_names_the_near_one() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'tiny'"):
        load_recipe("tinny")
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe("nowhere.yaml")


def test_a_rehearsal_changes_sizes_only_and_says_so() -> None:
    recipe = load_recipe("tiny")
    cut, changes = rehearsed(recipe)
    assert cut.prompts == recipe.prompts
    assert cut.injection == recipe.injection
    assert cut.layer == recipe.layer
    assert cut.ar.lr == recipe.ar.lr
    assert cut.ar.documents < recipe.ar.documents
    assert any("ar.documents" in change for change in changes)
    assert any("av.documents" in change for change in changes)


# -- data ----------------------------------------------------------------------------------------------------


RL = RLSpec(documents=40, steps=3, lr=1e-4, ar_lr=1e-3, prompts=8, group=4, micro_batch=8)


@pytest.mark.parametrize(
    "rl",
    [
        RL,
        RLSpec(documents=9000, steps=400, lr=1e-5, ar_lr=1e-4),
        RLSpec(documents=9000, steps=400, lr=1e-5, ar_lr=1e-4, prompts=63, group=9, micro_batch=7, updates=3),
        RLSpec(documents=2, steps=1, lr=1e-5, ar_lr=1e-4, prompts=1, group=2, micro_batch=1, updates=2, ar_warmup=9),
        RLSpec(documents=90, steps=9, lr=1e-5, ar_lr=1e-4, prompts=64, group=8, micro_batch=32, updates=16),
    ],
)
def test_a_rehearsed_rl_stage_is_small_and_whole(rl: RLSpec) -> None:
    assert list(rl.faults()) == []
    recipe = dataclasses.replace(load_recipe("tiny"), rl=rl)
    cut, changes = rehearsed(recipe)
    assert cut.rl is not None
    assert list(cut.rl.faults()) == []
    assert (cut.rl.steps <= STEPS, cut.rl.samples <= 16, cut.rl.ar_warmup <= 1) == (True, True, True)
    assert (cut.rl.lr, cut.rl.beta, cut.rl.reward, cut.rl.loss) == (rl.lr, rl.beta, rl.reward, rl.loss)
    for spec in dataclasses.fields(RLSpec):
        old, new = getattr(rl, spec.name), getattr(cut.rl, spec.name)
        assert (f"rl.{spec.name}: {old} -> {new}" in changes) == (old != new), spec.name


def test_only_a_recipe_with_an_rl_section_has_that_stage() -> None:
    plain, joint = small_recipe(), small_recipe(rl=RL)
    assert stages_of(plain) == ("source", "data", "ar", "av", "export", "eval")
    assert stages_of(joint) == ("source", "data", "ar", "av", "rl", "export", "eval")
    require_stages(joint, ["rl"])
    with pytest.raises(InputError, match="no stage 'rl'"):
        require_stages(plain, ["rl"])
    with pytest.raises(InputError, match="no such stage"):
        require_stages(joint, ["lr"])


def test_what_only_the_rl_stage_would_stumble_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
    check_recipe(small_recipe(rl=RL), world=4)
    with pytest.raises(RecipeError, match=r"32 samples are no multiple .* 8 x 1 x 8"):
        check_recipe(small_recipe(rl=RL), world=8)
    with pytest.raises(RecipeError, match=r"fewer than rl\.prompts"):
        check_recipe(small_recipe(rl=dataclasses.replace(RL, documents=1, prompts=16)))
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == "trl" else object())
    with pytest.raises(MissingExtraError, match=r"pip install 'nla-hub\[train\]'"):
        check_recipe(small_recipe(rl=RL))
    check_recipe(small_recipe())


def test_a_tracker_that_is_not_there_is_refused_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    check_reporters(())
    with pytest.raises(InputError, match=r"'trackio', which is not installed[^$]*pip install 'nla-hub\[log\]'"):
        check_reporters(["trackio"])
    with pytest.raises(InputError, match="pip install wandb"):
        check_reporters(["wandb"])
    with pytest.raises(InputError, match="nothing of that name"):
        check_reporters(["paper"])
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
    check_reporters(["trackio", "tensorboard", "wandb"])


def test_a_labeler_gets_only_the_settings_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        def label(self, requests: Any) -> list[str | None]:
            return ["a text"] * len(requests)

    labeler: Any = make_labeler(LabelSpec("tiny", {"clauses": ("mood",), "share": 0.5}))
    assert (labeler.clauses, labeler.share) == (("mood",), 0.5)
    monkeypatch.setattr("nla_hub.registry.labelers.get", lambda name: Plain)
    assert isinstance(make_labeler(LabelSpec("plain")), Plain)
    with pytest.raises(RecipeError, match=r"labels\.settings\.share"):
        make_labeler(LabelSpec("plain", {"share": 0.5}))


def test_rows_without_labels_are_vectors_of_the_same_tokens(source: Source, tmp_path: Path) -> None:
    documents = TinyCorpus().documents(4, seed=1)
    bare = collect(source, small_recipe(), documents, None, prefix="test")
    labelled = collect(source, small_recipe(), documents, TinyLabeler(), prefix="test")
    assert torch.equal(bare.vectors, labelled.vectors)
    assert bare.prefixes == labelled.prefixes
    assert set(bare.texts) == {""}
    write_rows(tmp_path / "rl.parquet", bare, meta={"stage": "rl"})
    assert "api_explanation" not in pq.read_schema(tmp_path / "rl.parquet").names
    back = read_rows(tmp_path / "rl.parquet")
    assert dataclasses.replace(back, vectors=bare.vectors) == bare


def test_positions_depend_on_seed_and_document_alone(source: Source) -> None:
    encoded = encode_source(source.tokenizer, documents(3, 0)[0].content)[0]
    chosen = pick_positions(encoded, "a", n=5, minimum=6, seed=0)
    assert chosen == pick_positions(encoded, "a", n=5, minimum=6, seed=0)
    assert len(set(chosen)) == 5
    assert min(chosen) >= 6
    assert not any(encoded.special[i] for i in chosen)
    others = {tuple(pick_positions(encoded, name, n=5, minimum=6, seed=0)) for name in "bcdefgh"}
    assert len(others) > 1


def test_rows_carry_the_vector_of_their_own_token(source: Source, rows: TrainingRows) -> None:
    document = TinyCorpus().documents(12, seed=1)[int(rows.doc_ids[5].removeprefix("test-"))]
    ids = encode_source(source.tokenizer, document.content)[0].ids[: rows.positions[5] + 1]
    with torch.inference_mode():
        alone = source.loaded.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    torch.testing.assert_close(rows.vectors[5], alone, rtol=1e-4, atol=1e-3)
    assert document.text.startswith(rows.prefixes[5])
    assert rows.texts[5] == TinyLabeler().label([_request(document, len(rows.prefixes[5]))])[0]


def _request(document: Any, char: int) -> Any:
    from nla_hub.training.labelers import LabelRequest

    return LabelRequest(document, char)


def test_rows_come_back_from_parquet_as_they_were(rows: TrainingRows, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", rows, meta={"stage": "av_sft"})
    column = pq.read_schema(tmp_path / "rows.parquet").field("activation_vector").type
    assert str(column).startswith("fixed_size_list<")
    assert column.list_size == rows.vectors.shape[1]
    back = read_rows(tmp_path / "rows.parquet")
    assert torch.equal(back.vectors, rows.vectors)
    assert dataclasses.replace(back, vectors=rows.vectors) == rows
    assert (tmp_path / "rows.parquet.nla_meta.yaml").is_file()


def test_a_corpus_too_short_for_its_positions_is_refused(source: Source) -> None:
    recipe = small_recipe()
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, min_position=500))
    with pytest.raises(TrainingError, match="No row"):
        collect(source, recipe, TinyCorpus().documents(3, seed=1), TinyLabeler(), prefix="x")


# -- the loop ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 17), st.integers(1, 3), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_every_epoch_sees_every_row_once(lengths: list[int], size: int, epochs: int, seed: int) -> None:
    batches = batch_order(lengths, size, epochs=epochs, seed=seed)
    assert Counter(i for batch in batches for i in batch) == dict.fromkeys(range(len(lengths)), epochs)
    assert max(map(len, batches)) <= size
    assert batches == batch_order(lengths, size, epochs=epochs, seed=seed)


def test_the_learning_rate_warms_up_and_ends_where_it_should() -> None:
    spec = StageSpec(documents=1, lr=1.0, warmup=0.1, final_lr=0.2)
    rates = [learning_rate(step, 100, spec) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(0.2, abs=0.01)


def test_a_loss_that_stays_non_finite_ends_the_run_and_a_single_one_is_skipped() -> None:
    def loss_of(model: Any, indices: Any) -> tuple[torch.Tensor, int]:
        calls.append(1)
        return model.weight.sum() * (float("nan") if len(calls) in bad else 1.0), 1

    spec = StageSpec(documents=1, lr=0.1, batch_size=1)
    calls: list[int] = []
    bad = {3}
    layer = torch.nn.Linear(2, 2)
    result = run_loop(layer, loss_of, [1] * 20, spec, seed=0, report=lambda m: None)
    assert (result.steps, result.skipped) == (20, 1)
    assert all(torch.isfinite(p).all() for p in layer.parameters())
    calls, bad = [], set(range(5, 100))
    with pytest.raises(TrainingError, match=f"{NON_FINITE_LIMIT} steps"):
        run_loop(torch.nn.Linear(2, 2), loss_of, [1] * 40, spec, seed=0, report=lambda m: None)


# -- the halves ----------------------------------------------------------------------------------------------


def test_the_direction_loss_is_the_published_mse(rows: TrainingRows) -> None:
    a, b = rows.vectors[:8], rows.vectors[8:16]
    torch.testing.assert_close(direction_loss(a, b).double(), direction_mse(a, b), rtol=1e-5, atol=1e-6)


def test_a_fresh_ar_returns_the_sources_own_residual_stream(source: Source) -> None:
    model = init_ar(source.loaded.adapter, copy.deepcopy(source.loaded.model))
    ids = torch.tensor([source.tokenizer("a story about a kite")["input_ids"]])
    with torch.inference_mode():
        expected = source.loaded.model(input_ids=ids).last_hidden_state[0, -1]
        assert torch.equal(model(ids, torch.ones_like(ids))[0], expected)


def test_ar_training_lowers_the_loss(source: Source, rows: TrainingRows) -> None:
    model = init_ar(source.loaded.adapter, copy.deepcopy(source.loaded.model))
    prompt = ARPrompt(source.tokenizer, load_recipe("tiny").prompts.ar, None)
    losses: list[float] = []
    spec = StageSpec(documents=1, lr=2e-3, batch_size=16, epochs=3)
    train_ar(model, prompt, rows, spec, seed=0, report=lambda m: losses.append(m.get("loss", math.nan)), max_steps=15)
    first = train_ar(
        init_ar(source.loaded.adapter, copy.deepcopy(source.loaded.model)),
        prompt,
        rows,
        spec,
        seed=0,
        report=lambda m: None,
        max_steps=1,
    )
    assert losses[-1] < first.loss


def av_parts(directory: Path) -> tuple[Any, Any, AVPrompt, Injector]:
    sidecar = Sidecar.read(directory)
    loaded, tokenizer = load_causal_lm(directory, LoadOptions()), load_tokenizer(directory)
    assert sidecar.marker is not None
    return (
        loaded.model,
        tokenizer,
        AVPrompt.build(tokenizer, sidecar),
        Injector(loaded.adapter, sidecar.injection, sidecar.marker),
    )


def random_rows(d: int) -> TrainingRows:
    texts = ("a cat", "the old dog walks", "river")
    vectors = torch.randn(3, d, generator=torch.Generator().manual_seed(3))
    return TrainingRows(vectors, texts, ("a", "b", "c"), (1, 2, 3), texts, Site(2))


def test_the_av_loss_equals_an_independent_forward_of_each_row(tmp_path: Path) -> None:
    pair = random_pair(tmp_path, "llama")
    model, tokenizer, prompt, injector = av_parts(pair.av)
    rows = random_rows(64)
    total, count = AVLoss(tokenizer, prompt, injector, rows)(model, [0, 1, 2])
    expected, terms = 0.0, 0
    for vector, text in zip(rows.vectors, rows.texts, strict=True):
        answer = tokenizer(f"<explanation>{text}</explanation>", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt.ids, *answer, tokenizer.eos_token_id]])
        embeds = model.get_input_embeddings()(ids).clone()
        at = list(prompt.ids).index(tokenizer.convert_tokens_to_ids(MARKER))
        embeds[0, at] = vector.double().mul(8.0 / vector.double().norm()).float()
        with torch.inference_mode():
            logp = model(inputs_embeds=embeds).logits[0].log_softmax(-1)
        for i in range(len(prompt), ids.shape[1]):
            expected -= float(logp[i - 1, ids[0, i]])
            terms += 1
    assert count == terms
    assert float(total) == pytest.approx(expected, rel=1e-5)


def test_an_av_that_ignores_its_vector_shows_a_worth_of_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, prompt, injector = av_parts(random_pair(tmp_path, "llama").av)
    rows = random_rows(64)
    real, shuffled = evaluate_av(model, tokenizer, prompt, injector, rows)
    assert abs(shuffled - real) > 1e-4
    constant = torch.ones(64)
    monkeypatch.setattr(Injector, "entering", lambda self, vectors: constant.expand(len(vectors), -1))
    real, shuffled = evaluate_av(model, tokenizer, prompt, injector, rows)
    assert real == shuffled


def test_padding_does_not_reach_the_loss(tmp_path: Path) -> None:
    model, tokenizer, prompt, injector = av_parts(random_pair(tmp_path, "qwen2").av)
    loss = AVLoss(tokenizer, prompt, injector, random_rows(64))
    with torch.inference_mode():
        together = loss(model, [0, 1, 2])
        alone = [loss(model, [i]) for i in range(3)]
    assert together[1] == sum(count for _, count in alone)
    assert float(together[0]) == pytest.approx(sum(float(total) for total, _ in alone), rel=1e-5)
    ids, mask = pad_right([[1, 2], [3]], 0)
    assert ids.tolist() == [[1, 2], [3, 0]]
    assert mask.tolist() == [[1, 1], [1, 0]]


# -- a whole run ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """A run that was cut inside its AV stage, and continued by the same call."""
    place, recipe = tmp_path_factory.mktemp("run") / "run", small_recipe()
    Pipeline(recipe, RunDirectory(place, recipe), Silent(), max_steps=STEPS).execute(("source", "data", "ar"))
    (place / "av" / "checkpoint").mkdir(parents=True)
    (place / "av" / "checkpoint" / "model.safetensors").write_bytes(b"half a file")
    stamps = {p: p.stat().st_mtime_ns for p in (place / "ar").rglob("*") if p.is_file()}
    listener = Silent()
    Pipeline(recipe, RunDirectory(place, recipe), listener, max_steps=STEPS).execute()
    assert listener.resumed == ["source", "data", "ar"]
    assert listener.begun == ["av", "export", "eval"]
    assert stamps == {p: p.stat().st_mtime_ns for p in (place / "ar").rglob("*") if p.is_file()}
    return place, recipe


def test_a_finished_run_is_a_pair_that_loads(finished: tuple[Path, Recipe]) -> None:
    place, recipe = finished
    for stage in stages_of(recipe):
        assert (place / stage / "DONE").is_file()
        assert (place / stage / "config.yaml").is_file()
    assert (place / "ar" / "metrics.jsonl").read_text().count("\n") >= 1
    nla = NLA.from_pretrained(place / "export" / "checkpoint", base_model=SOURCE)
    assert nla.site == Site(recipe.layer)
    rows = nla.explain("today otto came to the island.", temperature=0, max_new_tokens=5)
    assert len(rows) == 1
    scale = nla.sidecar.injection.scale
    vectors = read_rows(place / "data" / "checkpoint" / "av_sft.parquet").vectors
    assert scale == pytest.approx(float(torch.quantile(norms(vectors), 0.75)), rel=0.01)


def test_a_finished_run_is_published_as_what_was_measured_and_nothing_else(
    finished: tuple[Path, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    wanted = Wanted(owner="me", licence="apache-2.0", base_model="tiny-source")
    release = bundle.stage(find(Path("run")), wanted, options=HubOptions(), work=None)
    assert release.facts is not None
    assert release.facts.evaluation is not None
    head = tmp_path / "run" / "export" / "checkpoint" / "ar" / "value_head.safetensors"
    save_file({"weight": torch.eye(release.facts.ar.d_model)}, head)
    with pytest.raises(PublishError, match=r"AR: .* holds other weights than the stage eval measured"):
        bundle.stage(find(Path("run")), wanted, options=HubOptions(), work=None)


def test_the_same_recipe_and_seed_give_the_same_weights(finished: tuple[Path, Recipe], tmp_path: Path) -> None:
    place, recipe = finished
    Pipeline(recipe, RunDirectory(tmp_path / "again", recipe), Silent(), max_steps=STEPS).execute(
        stages_of(recipe)[:-1]
    )
    for half in ("av", "ar"):
        for file in (place / "export" / "checkpoint" / half).glob("*.safetensors"):
            if file.name == "fve_reference.safetensors":
                continue
            twin = tmp_path / "again" / "export" / "checkpoint" / half / file.name
            assert file.read_bytes() == twin.read_bytes(), file


def test_a_changed_configuration_is_refused_with_the_differences(finished: tuple[Path, Recipe]) -> None:
    place, recipe = finished
    changed = dataclasses.replace(recipe, ar=dataclasses.replace(recipe.ar, lr=0.5))
    with pytest.raises(RunError, match=r"ar\.lr: 0\.003 before, 0\.5 now"):
        RunDirectory(place, changed)


def test_a_place_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="something else"):
        RunDirectory(tmp_path, small_recipe())
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_a_second_user_is_kept_out_until_the_first_is_gone(tmp_path: Path) -> None:
    recipe = small_recipe()
    (first, second) = (RunDirectory(tmp_path / "run", recipe) for _ in range(2))
    with first, pytest.raises(RunError, match="Another process"), second:
        pass
    with second:
        pass


def test_a_marker_that_is_not_one_token_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe(marker="鿕")
    run = RunDirectory(tmp_path / "run", recipe)
    with pytest.raises(RecipeError, match="one token"):
        Pipeline(recipe, run, Silent(), max_steps=1).execute(("source", "data", "ar"))


def test_a_stage_without_the_ones_before_it_says_which_is_missing(tmp_path: Path) -> None:
    recipe = small_recipe()
    with pytest.raises(RunError, match="needs the stage 'source'"):
        Pipeline(recipe, RunDirectory(tmp_path / "run", recipe), Silent(), max_steps=1).execute(("av",))
    assert not (tmp_path / "run" / "av").exists()


def test_a_rehearsal_is_never_taken_for_the_real_run(tmp_path: Path) -> None:
    recipe = small_recipe()
    RunDirectory(tmp_path / "run", recipe, rehearsal=True)
    with pytest.raises(RunError, match="rehearsal"):
        RunDirectory(tmp_path / "run", recipe)


@pytest.mark.parametrize(
    "override",
    ["base.train={heads: 3}", "base.train={steps: 0}", "base.train={colour: 1}", "layer=9", "data.corpus=nope"],
)
def test_what_a_later_stage_would_stumble_over_is_refused_at_once(override: str) -> None:
    with pytest.raises((RecipeError, UnknownNameError)):
        check_recipe(load_recipe("tiny", ["rl=null", override]))
    check_recipe(load_recipe("tiny", ["rl=null"]))


def test_every_purpose_has_documents_of_its_own() -> None:
    recipe = small_recipe(rl=RL)
    assert set(data_splits(recipe)) == {"av_sft", "ar_sft", "dev", "rl"}
    assert set(data_splits(small_recipe())) == {"av_sft", "ar_sft", "dev"}
    first = [split_documents(recipe, split, 1)[0].content for split in SEED_OFFSETS]
    assert len({str(content) for content in first}) == len(SEED_OFFSETS)
    many = dataclasses.replace(RL, evaluate_rows=4000)
    assert data_splits(small_recipe(rl=many))["dev"] * recipe.data.positions >= 4000


def leaking(split: str, leaked: list[Any]) -> Any:
    """A corpus that gives `leaked` documents where `split` is asked for."""

    def give(self: TinyCorpus, n: int, *, seed: int) -> list[Any]:
        return leaked if seed == SEED_OFFSETS[split] else documents(n, seed)

    return give


@pytest.mark.parametrize("split", ["av_sft", "ar_sft", "rl"])
def test_a_leak_is_refused_before_a_score_is_stored(
    split: str, finished: tuple[Path, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, recipe = finished
    recipe = dataclasses.replace(recipe, rl=RL)
    pipeline = Pipeline(recipe, RunDirectory(tmp_path / "leaking", recipe), Silent(), max_steps=STEPS)
    monkeypatch.setattr(Pipeline, "pair_directory", place / "export" / "checkpoint")
    stored: list[Any] = []
    monkeypatch.setattr("nla_hub.training.pipeline.record_score", lambda *a: stored.append(a))
    stage = pipeline.run.stage("eval")
    stage.begin(recipe)
    with monkeypatch.context() as patched:
        patched.setattr(TinyCorpus, "documents", leaking(split, documents(60, 0, "eval")))
        with pytest.raises(InputError, match="stand verbatim in the training data"):
            pipeline._eval(stage)
    assert stored == []
    assert not (stage.path / "result.json").exists()
    pipeline._eval(stage)
    assert len(stored) == 1, "the same run without the leak is stored"


@pytest.mark.parametrize("split", ["av_sft", "ar_sft", "rl"])
def test_held_out_rows_that_are_trained_on_are_refused_before_any_training(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(rl=RL)
    require_dev_held_out(recipe)
    monkeypatch.setattr(TinyCorpus, "documents", leaking(split, documents(3, SEED_OFFSETS["dev"])))
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
    run = RunDirectory(tmp_path / "run", recipe)
    with pytest.raises(InputError, match="3 of 100 evaluation documents"):
        Pipeline(recipe, run, Silent(), max_steps=1).execute(("source", "data", "ar"))
    assert not run.stage("data").is_done


@pytest.mark.train
def test_a_run_with_rl_exports_what_the_rl_stage_made(tmp_path: Path) -> None:
    recipe = rehearsed(small_recipe(rl=dataclasses.replace(RL, micro_batch=4, label_share=0.5)))[0]
    listener = Silent()
    pair = Pipeline(recipe, RunDirectory(tmp_path / "run", recipe), listener, max_steps=STEPS).execute()
    assert listener.begun == list(stages_of(recipe))
    assert (tmp_path / "run" / "ar" / "watch" / "model.safetensors").is_file()
    for half in ("av", "ar"):
        sidecar = Sidecar.read(pair / half)
        assert sidecar.stage == "rl"
        assert sidecar.extra["training"]["rl_steps"] == STEPS
        exported, made, before = (
            load_file(place / "model.safetensors")
            for place in (
                pair / half,
                tmp_path / "run" / "rl" / "checkpoint" / half,
                tmp_path / "run" / half / "checkpoint",
            )
        )
        assert all(torch.equal(exported[name], made[name].to(exported[name].dtype)) for name in exported)
        if half == "ar":  # an AV after two steps may write nothing usable, and learns nothing from equal rewards
            assert any(not torch.equal(made[name], before[name]) for name in made)
    assert not (tmp_path / "run" / "rl" / "state").exists()
