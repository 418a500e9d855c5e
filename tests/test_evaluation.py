"""Protocols, positions, corpora, statistics, probes, facts tables and gates, without a model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nla_hub.errors import GateFailedError, InputError, UnknownNameError
from nla_hub.evaluation.facts import chance_of_rows, fact_row, facts_table
from nla_hub.evaluation.gates import check_gates, parse_gates
from nla_hub.evaluation.probe import accuracy, balanced_accuracy, fit_probe, majority_share
from nla_hub.evaluation.protocols import (
    PROTOCOLS,
    Protocol,
    choose,
    eligible_positions,
    get_protocol,
    overlap,
    read_corpus,
    require_disjoint,
    select_rows,
)
from nla_hub.evaluation.stats import cluster_interval, cluster_totals, derangement, mean_interval, percentiles, wilson
from nla_hub.source_text import encode_source
from nla_hub.testing import random_tokenizer

CHAT = [{"role": "user", "content": "the cat sees a dog"}, {"role": "assistant", "content": "it is a small house"}]


@pytest.fixture(scope="module")
def tokenizer():
    return random_tokenizer()


def texts(n: int) -> list[str]:
    words = ["the", "a", "cat", "dog", "sees", "walks", "red", "blue", "house", "river", "song", "night"]
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(words, 30)) for _ in range(n)]


# -- protocols -----------------------------------------------------------------------------------------------


def test_protocols_are_those_of_the_definitions():
    tiny, general = PROTOCOLS["tiny-eval-v1"], PROTOCOLS["nla-eval-v1"]
    assert (tiny.documents, tiny.positions, tiny.min_position, tiny.seed, tiny.temperature) == (600, 2, 10, 0, 0.0)
    assert (general.rows, general.positions, general.min_position, general.seed) == (1000, 5, 50, 0)
    assert (general.temperature, general.samples, general.corpus) == (0.0, 1, None)


def test_an_unknown_protocol_suggests_the_near_one():
    with pytest.raises(UnknownNameError, match="tiny-eval-v1"):
        get_protocol("tiny-eval")


def test_a_changed_protocol_loses_its_name():
    tiny = PROTOCOLS["tiny-eval-v1"]
    assert tiny.changed(documents=600) is tiny
    assert tiny.changed(documents=None) is tiny
    assert tiny.changed(documents=7).name == "tiny-eval-v1+documents=7"
    with pytest.raises(InputError):
        tiny.changed(documents=0)


def test_positions_depend_on_seed_and_document_alone():
    candidates = list(range(10, 60))
    first = choose(candidates, 5, seed=0, document="a")
    assert first == sorted(first) == choose(candidates[::-1], 5, seed=0, document="a")
    assert first != choose(candidates, 5, seed=1, document="a")
    assert first != choose(candidates, 5, seed=0, document="b")
    # What is dropped elsewhere moves nothing.
    assert first == choose(sorted({*first, 10, 59}), 5, seed=0, document="a") or set(first) & {10, 59}


def test_special_tokens_and_early_positions_are_never_chosen(tokenizer):
    protocol = Protocol("p", documents=1, positions=8, min_position=6)
    encoded = encode_source(tokenizer, CHAT)[0]
    eligible = eligible_positions(encoded, 6)
    assert all(p >= 6 and not encoded.special[p] for p in eligible)
    assert any(encoded.special[p] for p in range(6, len(encoded)))
    selection = select_rows(tokenizer, [CHAT], protocol, max_length=None, corpus="c")
    assert set(selection.positions[0]) <= set(eligible)
    assert selection.char_ends[0] == tuple(encoded.offsets[p][1] for p in selection.positions[0])


def test_selection_is_the_same_whatever_stands_around(tokenizer):
    protocol = Protocol("p", documents=5, positions=3, min_position=10)
    many = texts(12)
    whole = select_rows(tokenizer, many, protocol, max_length=None, corpus="c")
    with_junk = select_rows(
        tokenizer, [many[0], "too short", many[0], *many[1:]], protocol, max_length=None, corpus="c"
    )
    assert whole.positions == with_junk.positions
    assert whole.contents == with_junk.contents == tuple(many[:5])
    assert with_junk.read == 7


def test_too_few_documents_are_counted(tokenizer):
    protocol = Protocol("p", documents=5, positions=3, min_position=10)
    with pytest.raises(InputError, match=r"3 documents \(9 rows\) are missing"):
        select_rows(tokenizer, texts(2), protocol, max_length=None, corpus="c")


# -- corpora -------------------------------------------------------------------------------------------------


def test_corpora_of_every_kind(tmp_path: Path):
    (tmp_path / "lines.txt").write_text("one\ntwo\n\n\n")
    (tmp_path / "blocks.txt").write_text("\none\nmore\n\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"messages": CHAT}) + "\n")
    pq.write_table(pa.table({"text": ["one", "two"], "x": [1, 2]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"messages": [CHAT]}), tmp_path / "m.parquet")
    assert list(read_corpus(tmp_path / "lines.txt")) == ["one", "two"]
    assert list(read_corpus(tmp_path / "blocks.txt")) == ["one\nmore", "two"]
    assert list(read_corpus(tmp_path / "a.jsonl")) == ["one", CHAT]
    assert list(read_corpus(tmp_path / "a.parquet")) == ["one", "two"]
    assert list(read_corpus(tmp_path / "m.parquet")) == [CHAT]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("absent.txt", None),
        ("empty.txt", b"\n\n"),
        ("binary.txt", b"\xff\xfe\x00"),
        ("bad.jsonl", b"{"),
        ("other.jsonl", b'{"body": "x"}'),
        ("bad.parquet", b"PAR0"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_a_known_error(tmp_path: Path, name: str, data: bytes | None):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=name):
        list(read_corpus(tmp_path / name))


def test_leaked_documents_are_noticed():
    training = ["a story", "another one", CHAT]
    assert overlap(["new", " a story\n", CHAT], training) == [1, 2]
    assert require_disjoint([f"new {i}" for i in range(299)] + ["a story"], training) == 1
    with pytest.raises(InputError, match="2 of 3 evaluation documents"):
        require_disjoint(["new", "a story", CHAT], training)


# -- statistics ----------------------------------------------------------------------------------------------


def test_derangements_move_every_row_and_are_seeded():
    order = derangement(50, seed=3)
    assert sorted(order) == list(range(50))
    assert all(i != j for i, j in enumerate(order))
    assert order == derangement(50, seed=3) != derangement(50, seed=4)
    with pytest.raises(InputError):
        derangement(1)


def test_wilson_against_published_values():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for (r, n), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson(r, n) == pytest.approx(expected, abs=5e-5)


def test_intervals_resample_documents_not_rows():
    rng = np.random.default_rng(0)
    per_document = rng.normal(size=100)
    rows, documents = np.repeat(per_document, 20), np.repeat(np.arange(100), 20)
    low, high = mean_interval(rows, documents)
    assert (high - low) / 2 == pytest.approx(1.96 * per_document.std() / 10, rel=0.15)
    naive = mean_interval(rows, range(len(rows)))
    assert naive[1] - naive[0] < (high - low) / 3


# -- probe ---------------------------------------------------------------------------------------------------


def planted(n: int, classes: int = 5, d: int = 12, seed: int = 0) -> tuple[torch.Tensor, list[int]]:
    """Gaussian classes of unequal frequency under a badly conditioned covariance, as residual streams have."""
    generator = torch.Generator().manual_seed(seed)
    centres = 0.9 * torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    y = torch.multinomial(torch.arange(1, classes + 1).float(), n, replacement=True, generator=generator)
    mix = (
        torch.diag(torch.logspace(0, 2, d)) @ torch.linalg.qr(torch.randn(d, d, generator=generator.manual_seed(7)))[0]
    )
    x = (centres[y] + torch.randn(n, d, generator=generator.manual_seed(seed + 1))) @ mix
    return x, y.tolist()


def test_the_discriminant_agrees_with_scikit_learn():
    lda = pytest.importorskip("sklearn.discriminant_analysis", reason="the independent route needs scikit-learn")
    x, y = planted(600)
    test, _ = planted(400, seed=5)
    mine = fit_probe(x, y, refine_up_to=0, shrinkage=0.0)
    other = lda.LinearDiscriminantAnalysis(solver="lsqr", priors=[0.2] * 5).fit(x.double().numpy(), y)
    assert mine.predict(test) == other.predict(test.double().numpy()).tolist()


@pytest.mark.parametrize("balanced", [True, False])
def test_the_refined_probe_agrees_with_scikit_learn(balanced: bool):
    linear = pytest.importorskip("sklearn.linear_model", reason="the independent route needs scikit-learn")
    x, y = planted(600)
    test, truth = planted(400, seed=5)
    mine = fit_probe(x, y, balanced=balanced, iterations=300)
    # Independent whitening: the pooled within-class covariance, by eigenvectors (any whitening gives the same optimum).
    wide, target = x.double().numpy(), np.array(y)
    standard = (wide - wide.mean(0)) / wide.std(0)
    prior = np.full(5, 0.2) if balanced else np.bincount(target) / len(target)
    within = sum(prior[c] * np.cov(standard[target == c].T, bias=True) for c in range(5))
    within += (1e-3 * np.diag(within).mean() + 1e-9) * np.eye(len(within))
    values, axes = np.linalg.eigh(within)
    whiten = axes / np.sqrt(values)
    model = linear.LogisticRegression(
        C=1 / (len(y) * 1e-3), class_weight="balanced" if balanced else None, max_iter=10_000, tol=1e-10
    ).fit(standard @ whiten, y)
    other = model.predict(((test.double().numpy() - wide.mean(0)) / wide.std(0)) @ whiten)
    assert np.mean(np.array(mine.predict(test)) == other) >= 0.99
    assert accuracy(mine.predict(test), truth) > 2 * majority_share(truth)


def test_a_probe_on_noise_finds_nothing_and_is_deterministic():
    generator = torch.Generator().manual_seed(0)
    x, test = torch.randn(1000, 10, generator=generator), torch.randn(1000, 10, generator=generator)
    y = ["ab"[i % 2] for i in range(1000)]
    first = fit_probe(x, y).predict(test)
    assert first == fit_probe(x, y).predict(test)
    assert accuracy(first, y) == pytest.approx(0.5, abs=0.06)


def test_balanced_accuracy_is_not_bought_by_the_majority():
    actual = ["a"] * 90 + ["b"] * 10
    assert accuracy(["a"] * 100, actual) == 0.9
    assert balanced_accuracy(["a"] * 100, actual) == 0.5
    x, y = planted(2000)
    test, truth = planted(2000, seed=5)
    balanced, natural = fit_probe(x, y).predict(test), fit_probe(x, y, balanced=False).predict(test)
    assert balanced_accuracy(balanced, truth) > balanced_accuracy(natural, truth)
    with pytest.raises(InputError):
        fit_probe(x, y[:3])


def test_resamples_take_the_same_documents_whatever_is_summed():
    documents = ["a", "a", "b", "c", "c"]
    one = cluster_totals(np.arange(5.0)[:, None], documents, seed=4, resamples=50)
    two = cluster_totals(np.column_stack([np.ones(5), np.arange(5.0)]), documents, seed=4, resamples=50)
    assert (one == two[:, 1:]).all()
    assert (two[:, 0] == two[:, 2]).all()
    ratio = one[:, 0] / one[:, 1]
    assert percentiles(ratio) == cluster_interval(
        np.arange(5.0)[:, None], documents, lambda sums: sums[:, 0] / sums[:, 1], seed=4, resamples=50
    )
    assert percentiles(np.array([np.nan, 1.0, np.inf])) == (1.0, 1.0)
    assert np.isnan(percentiles(np.array([np.nan]))).all()


# -- facts ---------------------------------------------------------------------------------------------------

PEOPLE = ("mara", "otto", "lena", "bruno")


def table_of(actual, named, probed=None):
    rows = [i for i, a in enumerate(actual) if a is not None]
    return facts_table(
        ["person"],
        actual=[{} if a is None else {"person": a} for a in actual],
        named=[{} if m is None else {"person": m} for m in named],
        documents=list(range(len(actual))),
        members={"person": rows},
        base=len(actual),
        probed={} if probed is None else {"person": probed},
    )[0]


def test_true_explanations_have_recall_one_and_permuted_ones_chance():
    rng = np.random.default_rng(0)
    actual = [PEOPLE[i] for i in rng.integers(0, 4, 1200)]
    row = table_of(actual, actual, probed=actual)
    assert (row.recall, row.precision, row.precision_given, row.share, row.gated) == (1.0, 1.0, 1.0, 1.0, True)
    assert row.chance == pytest.approx(0.25, abs=0.01)
    elsewhere = table_of(actual, [actual[i] for i in derangement(1200)], probed=actual)
    assert elsewhere.recall == pytest.approx(elsewhere.chance, abs=0.05)
    assert elsewhere.share == pytest.approx(0.0, abs=0.06)
    assert elsewhere.share_low <= elsewhere.share <= elsewhere.share_high


def test_confabulation_shows_in_precision():
    actual = [PEOPLE[i % 4] if i % 3 == 0 else None for i in range(1200)]
    named = [a or PEOPLE[(i + 1) % 4] for i, a in enumerate(actual)]  # right where there is one, invented elsewhere
    row = table_of(actual, named)
    assert (row.n, row.recall, row.precision_given) == (400, 1.0, 1.0)
    assert row.named == 1200
    assert row.precision == pytest.approx(1 / 3)


def test_chance_is_the_mean_over_permutations_without_fixed_points():
    actual, named = ["a", "a", "b", "c"], ["a", "b", "b", None]
    drawn = [[named[j] == actual[i] for i, j in enumerate(derangement(4, seed=seed))] for seed in range(3000)]
    assert np.mean(drawn, axis=0) == pytest.approx(chance_of_rows(named, actual), abs=0.04)


def test_a_fact_that_the_vector_does_not_hold_has_no_share():
    rng = np.random.default_rng(1)
    actual = [PEOPLE[i] for i in rng.integers(0, 4, 1000)]
    row = table_of(actual, actual, probed=[PEOPLE[i] for i in rng.integers(0, 4, 1000)])
    assert (row.gated, row.share, row.share_low) == (False, None, None)


def test_a_fact_without_rows_is_not_measured():
    row = fact_row(
        "person", actual=[], named=[], probed=None, documents=[], base_actual=[None, None], base_named=["mara", None]
    )
    assert (row.n, row.recall, row.probe, row.share) == (0, None, None, None)
    assert (row.named, row.precision) == (1, 0.0)


# -- gates ---------------------------------------------------------------------------------------------------

FIGURES = {"fve": 0.7, "floor": 0.5, "ok": 0.99, "share.person": None}


def test_gates_hold_or_fail_with_their_figures():
    check_gates(parse_gates(["fve>=0.7, ok>=0.99", "fve > floor", "floor<0.6"]), FIGURES, where="x")
    gates = parse_gates(["fve>0.7", "share.person>=0.5", "fve>floor"])
    with pytest.raises(GateFailedError, match="2 of 3 gates failed") as caught:
        check_gates(gates, FIGURES, where="x")
    assert caught.value.exit_code == 3
    assert "fve is 0.7000" in str(caught.value)
    assert "share.person was not measured" in str(caught.value)


@pytest.mark.parametrize("text", ["fve", "fve=0.5", ">=0.5", "fve>=", "fve>=0,5", "fve>=1e"])
def test_what_is_no_gate_is_refused(text: str):
    with pytest.raises(InputError):
        parse_gates([text])


def test_a_gate_on_an_unknown_figure_suggests_the_near_one():
    with pytest.raises(UnknownNameError, match=r"share\.person"):
        check_gates(parse_gates(["share.persn>0"]), FIGURES, where="x")


def test_no_nan_gate_passes():
    assert parse_gates(["fve>=nan"])[0].fault(FIGURES) is not None
    assert not math.isnan(parse_gates(["fve>=0"])[0].bar)
