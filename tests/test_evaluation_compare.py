"""Two pairs on the same rows: the packaged one against itself, against a damaged copy, and what may not be compared."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

import nla_hub
from nla_hub.cli import eval as eval_command
from nla_hub.cli.app import RootGroup
from nla_hub.errors import GateFailedError, InputError
from nla_hub.evaluation import Comparison, check_gates, compare, parse_gates, run_protocol, tiny_rows
from nla_hub.evaluation.paired import UNMEASURED, Estimate, paired
from nla_hub.evaluation.probe import fit_probe
from nla_hub.evaluation.protocol_rows import capture_protocol, explain_rows
from nla_hub.evaluation.protocols import PROTOCOLS
from nla_hub.evaluation.stats import mean_interval
from nla_hub.export import save_av, save_source
from nla_hub.nla import NLA
from nla_hub.pretrained import LoadOptions, load_causal_lm, load_tokenizer
from nla_hub.sidecar import Sidecar
from nla_hub.testing import random_pair
from nla_hub.tiny import documents as tiny_documents

WEIGHTS = Path(nla_hub.__file__).parent / "tiny" / "weights"
SMALL = {"documents": 50, "fact_rows": 20, "probe_documents": 200}
FACTS = ("recall", "precision", "share")


def with_noise(directory: Path, amount: float):
    """The model in `directory` with every matrix disturbed by `amount` of its standard deviation."""
    model = load_causal_lm(directory, LoadOptions(dtype=torch.float32)).model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(amount * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model, load_tokenizer(directory, trust_remote_code=False)


@pytest.fixture(scope="module")
def damaged_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged pair with noise in the AV's weights."""
    root = tmp_path_factory.mktemp("damaged")
    for part in ("ar", "source"):
        shutil.copytree(WEIGHTS / part, root / part)
    save_av(root / "av", *with_noise(WEIGHTS / "av", 0.4), Sidecar.read(WEIGHTS / "av"), dtype=torch.float32)
    return root


@pytest.fixture(scope="module")
def pair() -> NLA:
    return NLA.from_pretrained("tiny")


@pytest.fixture(scope="module")
def damaged(damaged_directory: Path) -> NLA:
    return NLA.from_pretrained(damaged_directory)


@pytest.fixture(scope="module")
def found(pair: NLA, damaged: NLA) -> Comparison:
    """The damaged pair (A) against the packaged one (B)."""
    return compare(damaged, pair, **SMALL)


# -- paired figures ------------------------------------------------------------------------------------------


def test_one_figure_is_that_of_its_own_interval():
    rng = np.random.default_rng(0)
    a, b, documents = rng.normal(size=60), rng.normal(size=60), [i // 2 for i in range(60)]
    one = np.ones(60)
    figure = paired((np.column_stack([a, one]), np.column_stack([b, one])), documents, seed=3)
    assert figure.a.value == pytest.approx(a.mean())
    assert (figure.a.low, figure.a.high) == pytest.approx(mean_interval(a, documents, seed=3))
    assert figure.difference.value == pytest.approx((a - b).mean())
    assert (figure.difference.low, figure.difference.high) == pytest.approx(mean_interval(a - b, documents, seed=3))


def test_means_are_over_the_facts_that_both_name():
    """Three facts; A never names the second, so neither side counts it."""
    a, b = np.zeros((40, 3, 2)), np.zeros((40, 3, 2))
    a[:, 0] = b[:, 0] = b[:, 1] = [1.0, 1.0]
    a[:, 2], b[:, 2] = [0.0, 1.0], [1.0, 1.0]
    figure = paired((a, b), list(range(40)))
    assert figure.a == Estimate(0.5, 0.5, 0.5)
    assert figure.b == Estimate(1.0, 1.0, 1.0)
    assert figure.difference == Estimate(-0.5, -0.5, -0.5)


def test_a_side_that_names_nothing_leaves_the_other_measured():
    figure = paired((np.zeros((10, 2)), np.ones((10, 2))), list(range(10)))
    assert (figure.a, figure.b, figure.difference) == (Estimate(), Estimate(1.0, 1.0, 1.0), Estimate())
    assert paired((np.empty((0, 2)), np.empty((0, 2))), []) == UNMEASURED


# -- comparisons ---------------------------------------------------------------------------------------------


def test_a_pair_against_itself_differs_by_exactly_nothing(pair: NLA):
    result = compare(pair, pair, **SMALL)
    differences = {k: v for k, v in result.figures().items() if k.startswith("difference.")}
    assert differences["difference.fve"] == differences["difference.share_low"] == 0.0
    gated = set(result.gated)
    assert {"next_word", "last_word", "kind"} <= gated
    for name, value in differences.items():
        unmeasured = name.startswith("difference.share") and name.count(".") == 2 and name.split(".")[2] not in gated
        assert value is None if unmeasured else value == 0.0, name


def test_a_damaged_verbalizer_is_worse_and_the_interval_says_so(found: Comparison):
    for figure in (found.fve, found.cosine, found.recall, found.share):
        assert figure.difference.value < 0
        assert figure.difference.low <= figure.difference.value <= figure.difference.high < 0
        assert figure.difference.value == pytest.approx(figure.a.value - figure.b.value, abs=1e-12)
    check_gates(
        parse_gates(["difference.fve_high<0", "b.fve>a.fve", "difference.recall<0"]), found.figures(), where="x"
    )
    with pytest.raises(GateFailedError, match=r"difference\.share_low is -"):
        check_gates(parse_gates(["difference.share_low>=0"]), found.figures(), where="x")


def test_each_side_has_the_figures_of_its_own_evaluation(found: Comparison, pair: NLA):
    alone = run_protocol(pair, **SMALL)
    assert found.fve.b.value == pytest.approx(alone.real.fve.value)
    assert (found.fve.b.low, found.fve.b.high) == pytest.approx((alone.real.fve.low, alone.real.fve.high))
    assert found.cosine.b.value == pytest.approx(alone.real.cosine)
    assert (found.ok.b.value, found.words.b.value) == pytest.approx((alone.ok, alone.words))
    assert found.statuses_b == alone.statuses
    assert {row.fact: (row.n, row.named_b, row.probe) for row in found.facts} == {
        row.fact: (row.n, row.named, row.probe) for row in alone.facts
    }
    for row, own in zip(found.facts, alone.facts, strict=True):
        assert row.recall.b == Estimate(own.recall, own.recall_low, own.recall_high)
        assert row.precision.b.value == pytest.approx(own.precision)
        if row.gated:
            assert (row.share.b.value, row.share.b.low) == pytest.approx((own.share, own.share_low))


def test_swapped_pairs_negate_the_difference(found: Comparison, pair: NLA, damaged: NLA):
    swapped = compare(pair, damaged, **SMALL)
    assert swapped.gated == found.gated
    figures, mirrored = found.figures(), swapped.figures()
    for name, value in figures.items():
        if name.startswith("difference.") and "_low" not in name and "_high" not in name:
            assert (mirrored[name] is None) is (value is None), name
            assert value is None or mirrored[name] == -value, name
    assert swapped.fve.difference.low == pytest.approx(-found.fve.difference.high)
    assert swapped.share.difference.high == pytest.approx(-found.share.difference.low)


def test_one_fact_again_by_numpy_alone(found: Comparison, pair: NLA, damaged: NLA):
    """Recall, precision and share of one fact and the paired interval of recall, with nothing of this package's statistics."""
    fact = "person"
    protocol = PROTOCOLS["tiny-eval-v1"].changed(documents=50)
    rows = capture_protocol(pair, protocol, fact_rows=20)
    members = list(rows.members[fact])
    actual = np.array([rows.world[i].facts[fact] for i in members])
    train = tiny_rows.train_rows(pair, documents=200)
    probe = np.mean(np.array(fit_probe(*train.having(fact)).predict(rows.acts.vectors[members])) == actual)
    hits, shares, precisions = [], [], []
    for nla in (damaged, pair):
        said = [tiny_rows.named(e.text).get(fact) for e in explain_rows(nla, rows.acts, protocol)]
        named = np.array([said[i] or "" for i in members])
        hits.append((named == actual).astype(float))
        others = [np.mean(np.delete(named, i) == actual[i]) for i in range(len(members))]
        shares.append((hits[-1].mean() - np.mean(others)) / (probe - np.mean(others)))
        claims = [said[i] == rows.world[i].facts.get(fact) for i in range(rows.n) if said[i] is not None]
        precisions.append(np.mean(claims))
    row = found.fact(fact)
    assert (row.gated, row.n, row.probe) == (True, len(members), pytest.approx(probe))
    assert row.recall.difference.value == pytest.approx(hits[0].mean() - hits[1].mean())
    assert row.precision.difference.value == pytest.approx(precisions[0] - precisions[1])
    assert row.share.difference.value == pytest.approx(shares[0] - shares[1])
    # The interval: other draws of the same bootstrap.
    documents = np.array([rows.acts.doc_id[i] for i in members])
    groups = [np.flatnonzero(documents == d) for d in dict.fromkeys(documents)]
    rng = np.random.default_rng(99)
    difference = hits[0] - hits[1]
    means = [
        np.concatenate([difference[groups[g]] for g in rng.integers(0, len(groups), len(groups))]).mean()
        for _ in range(2000)
    ]
    assert (row.recall.difference.low, row.recall.difference.high) == pytest.approx(
        np.quantile(means, [0.025, 0.975]), abs=0.03
    )


def test_means_are_those_of_the_gated_facts(found: Comparison):
    rows = [row for row in found.facts if row.gated]
    assert found.gated == tuple(row.fact for row in rows)
    for name in FACTS:
        figures = [getattr(row, name) for row in rows]
        both = [f for f in figures if f.difference.value is not None]
        mean = getattr(found, name)
        assert mean.a.value == pytest.approx(np.mean([f.a.value for f in both]))
        assert mean.difference.value == pytest.approx(np.mean([f.difference.value for f in both]))
        assert mean.difference.low <= mean.difference.value <= mean.difference.high


def test_a_comparison_is_printed_and_survives_json(found: Comparison):
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["fve"]["difference"]["value"] == found.figures()["difference.fve"]
    assert [row["fact"] for row in data["facts"]] == list(tiny_rows.facts_of_world())
    assert data["gated"] == list(found.gated)
    for shown in (str(found), found.to_markdown()):
        assert "FVE (raw variance, tiny-eval-v1+documents=50, n=100) -" in shown
        for words in ("status of A", "A - B", f"captured share, mean over {len(found.gated)} facts", "named by B"):
            assert words in shown
    assert all(value is None or math.isfinite(value) for value in found.figures().values())


def test_a_corpus_without_known_facts_has_none(pair: NLA, damaged: NLA, tmp_path: Path):
    corpus = tmp_path / "stories.jsonl"
    stories = [d.text for d in tiny_documents(400, 5, "eval") if d.kind == "story" and len(d.words) > 50]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories))
    result = compare(damaged, pair, "nla-eval-v1", corpus=corpus, documents=8)
    assert (result.facts, result.gated, result.recall, result.n) == ((), (), UNMEASURED, 40)
    assert (result.reference, result.fve) == (None, UNMEASURED)  # 40 rows are too few for a denominator
    assert result.cosine.difference.high < 0
    assert result.figures()["difference.share"] is None
    assert "not measured" in str(result)
    with pytest.raises(InputError, match="--corpus FILE"):
        compare(damaged, pair, "nla-eval-v1")


# -- what may not be compared --------------------------------------------------------------------------------


def test_pairs_of_different_base_models_are_refused(pair: NLA, tmp_path: Path):
    with pytest.raises(InputError, match="do not read the same vectors"):
        compare(pair, NLA.from_pretrained(random_pair(tmp_path / "random").root), **SMALL)
    save_source(tmp_path / "source", *with_noise(WEIGHTS / "source", 0.01), dtype=torch.float32)
    other = NLA.from_pretrained("tiny", base_model=tmp_path / "source")
    with pytest.raises(InputError, match="read different base models") as caught:
        compare(pair, other, **SMALL)
    assert "16 tokens give vectors that differ by" in str(caught.value)


def test_base_models_that_read_texts_differently_are_refused(pair: NLA, damaged: NLA, monkeypatch: pytest.MonkeyPatch):
    real = tiny_rows.source_tokenizer
    monkeypatch.setattr(tiny_rows, "source_tokenizer", lambda nla: (real(nla)[0], 12) if nla is damaged else real(nla))
    with pytest.raises(InputError, match="16 of 16 documents are other tokens"):
        compare(pair, damaged, **SMALL)


def test_denominators_are_the_same_for_both_and_measured_where_the_pairs_store_different_ones(
    found: Comparison, pair: NLA, damaged: NLA, monkeypatch: pytest.MonkeyPatch
):
    from nla_hub.geometry import Reference

    stored = {id(pair): Reference("tiny-eval-v1+documents=50", 9, 0.5, 0.6), id(damaged): None}
    monkeypatch.setattr(NLA, "reference", property(lambda self: stored[id(self)]))
    measured = compare(damaged, pair, facts=False, **SMALL).reference
    assert measured.raw_variance == pytest.approx(found.reference.raw_variance)
    stored[id(damaged)] = stored[id(pair)]
    assert compare(damaged, pair, facts=False, **SMALL).reference.raw_variance == 0.5


# -- the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `nla-hub eval ...` with small probes; returns exit code, stdout and stderr."""
    app = typer.Typer(cls=RootGroup, callback=lambda: None)
    eval_command.register(app)
    monkeypatch.setattr("nla_hub.evaluation.compare", partial(compare, fact_rows=20, probe_documents=200), raising=True)

    def run(*arguments: str):
        with pytest.raises(SystemExit) as caught:
            app(list(arguments))
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return run


def test_eval_against_another_pair(command, found: Comparison, damaged_directory: Path):
    arguments = ("eval", str(damaged_directory), "--against", "tiny", "--documents", "50")
    code, out, err = command(*arguments, "--json", "--gate", "difference.fve_low>0")
    assert code == 3
    assert "difference.fve_low>0" in err
    told = json.loads(out)
    assert told["share"] == found.to_dict()["share"]
    code, out, _ = command(*arguments, "--no-facts", "--markdown", "--gate", "difference.fve_high<0")
    assert code == 0
    assert "| FVE (raw variance) |" in out
    assert "Captured share" not in out


def test_eval_against_takes_no_controls(command):
    assert command("eval", "tiny", "--against", "tiny", "--sampled")[0] == 2
    assert command("eval", "tiny", "--against", "tiny", "--source-check")[0] == 2
