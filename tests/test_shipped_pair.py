"""The bars of the packaged pair, measured again: what the card says is what the weights do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nla_hub.evaluation import EvalResult, check_gates, parse_gates, run_protocol, steering_table
from nla_hub.nla import NLA

CARD = Path(__file__).resolve().parents[1] / "model_cards" / "tiny"

BARS = (
    "fve>=0.65",
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
    return run_protocol(pair, "tiny-eval-v1", with_source_check=True)


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
    for name in ("fve", "cosine", "permuted", "floor", "ceiling"):
        assert measured.figures()[name] == pytest.approx(stored.figures()[name], abs=0.01), name
    assert measured.statuses == pytest.approx(stored.statuses, abs=3)


def test_editing_the_person_flips_the_answer_and_a_random_direction_does_not(pair: NLA) -> None:
    table = steering_table(pair, facts=("person",), strengths=(1.0,))
    own, random = table.best("person"), table.best("person", "random")
    assert own is not None
    assert random is not None
    assert own.cases >= 50
    assert (own.rate or 0) >= 0.7
    assert (random.rate or 0) <= 0.1
