"""The bars of the packaged pair, measured again: what the card says is what the weights do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nla_hub.evaluation import EvalResult, check_gates, parse_gates, run_protocol, steering_table
from nla_hub.nla import NLA

CARD = Path(__file__).resolve().parents[1] / "model_cards" / "tiny"

BARS = (
    "fve>=0.70",
    "fve_sampled>=0.60",
    "ok_sampled>=0.99",
    "fve>floor",
    "fve>floor_linear",
    "ok>=0.99",
    "permuted<0",
    "share.next_word>=0.5",
    "share.last_word>=0.5",
    "share.kind>=0.5",
)

CHECKED_FACTS = ("person", "object", "colour", "place", "mood", "rhyme", "running_sum")


@pytest.fixture(scope="module")
def pair() -> NLA:
    return NLA.from_pretrained("tiny")


@pytest.fixture(scope="module")
def measured(pair: NLA) -> EvalResult:
    return run_protocol(pair, "tiny-eval-v1", with_source_check=True, sampled=True)


def test_the_pair_clears_its_bars(measured: EvalResult) -> None:
    check_gates(parse_gates(BARS), measured.figures(), where="tiny")
    shares = {f: row.share for f in CHECKED_FACTS if (row := measured.fact(f)) is not None and row.share is not None}
    assert sum(share >= 0.5 for share in shares.values()) >= 2, shares
    for fact in (*CHECKED_FACTS, "next_word", "last_word", "kind"):
        row = measured.fact(fact)
        assert row is not None
        assert row.n >= 1000, fact


def test_the_source_remembers_what_it_was_told(measured: EvalResult) -> None:
    held = [c for c in measured.source_check if c.n >= 1000 and c.accuracy >= 0.6 and c.accuracy >= 2 * c.majority]
    assert len(held) >= 3, measured.source_check


def test_no_evaluation_document_was_trained_on(measured: EvalResult) -> None:
    assert measured.shared_documents is not None
    assert measured.shared_documents < 0.005 * measured.documents


def test_measuring_again_gives_the_cards_figures(measured: EvalResult) -> None:
    stored = EvalResult.from_dict(json.loads((CARD / "eval.json").read_text(encoding="utf-8")))
    # Greedy texts may differ in a few near-ties between versions of torch; nothing else is random.
    for name in ("fve", "fve_sampled", "cosine", "permuted", "floor", "ceiling"):
        assert measured.figures()[name] == pytest.approx(stored.figures()[name], abs=0.01), name
    assert measured.statuses == pytest.approx(stored.statuses, abs=3)


def test_reinforcement_learning_cost_no_facts() -> None:
    stored = json.loads((CARD / "rl" / "warm-start.json").read_text(encoding="utf-8"))
    assert stored["n"] == 1200
    assert len(stored["gated"]) >= 10
    assert stored["share"]["difference"]["high"] >= 0, "the captured share is lower than before, beyond its interval"
    assert stored["fve"]["difference"]["low"] > 0


def test_a_weak_warm_start_gains_from_it_on_every_seed() -> None:
    stored = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((CARD / "rl").glob("weak-*.json"))]
    assert len(stored) == 3
    for comparison in stored:
        assert comparison["n"] == 1200
        assert comparison["fve"]["difference"]["value"] >= 0.15
        assert comparison["ok"]["a"]["value"] >= 0.99


def test_editing_the_person_flips_the_answer_and_a_random_direction_does_not(pair: NLA) -> None:
    table = steering_table(pair, facts=("person",), strengths=(1.0,))
    own, random = table.best("person"), table.best("person", "random")
    assert own is not None
    assert random is not None
    assert own.cases >= 50
    assert (own.rate or 0) >= 0.7
    assert (random.rate or 0) <= 0.1
