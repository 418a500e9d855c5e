"""What watches a joint run: planted cheats raise their alarm and no other, an honest run raises none; the held-out figures
against the SDK's own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nla_hub
from nla_hub.engines.base import Completion
from nla_hub.errors import InputError, VectorError
from nla_hub.geometry import Reference, direction_mse
from nla_hub.nla import NLA
from nla_hub.sidecar import Site
from nla_hub.testing import D_MODEL, random_pair
from nla_hub.tiny import documents
from nla_hub.tiny.labeler import TinyLabeler
from nla_hub.tiny.labels import named_facts
from nla_hub.training.data import TrainingRows
from nla_hub.training.labelers import LabelRequest
from nla_hub.training.loop import NON_FINITE_LIMIT
from nla_hub.training.rl.dev_eval import FACT_ROWS, SAMPLES, DevEvaluation, DevResult, other_documents
from nla_hub.training.rl.monitor import (
    GAP_GROWTH,
    LOGPROB_LIMIT,
    MESSAGES,
    VECTOR_WORTH,
    WINDOW,
    Alarm,
    Monitor,
)

# -- streams of figures --------------------------------------------------------------------------------------

Step = dict[str, Any]


def honest(step: int, steps: int, rng: np.random.Generator, *, noise: float = 1.0, dtype: str = "float32") -> Step:
    """The figures of a step of a run that learns: cosine 0.45 -> 0.68, both ARs follow, texts stay themselves."""
    done = step / steps
    cosine = 0.45 + 0.23 * done + noise * rng.normal(0, 0.012)
    watch = cosine - 0.01 - 0.008 * done + noise * rng.normal(0, 0.005)
    loose = dtype != "float32"
    return {
        "reward": 2 * cosine - 2,
        "reward_std": 0.2,
        "mse": 2 - 2 * cosine,
        "cosine": cosine,
        "cosine_shuffled": 0.08 + noise * rng.normal(0, 0.01),
        "watch_cosine": watch,
        "gap": cosine - watch,
        "kl": 0.0 if step == 0 else 0.002 * step * (1 + 0.2 * noise * rng.uniform(-1, 1)),
        "beta": 0.01,
        "lr": 4e-4 * min(1.0, (step + 1) / 4),
        "ar_lr": 2e-4,
        "entropy": 0.9 - 0.5 * done + noise * rng.normal(0, 0.04),
        "length": 30 * (1 + 0.4 * done) + noise * rng.normal(0, 2),
        "ok": min(1.0, 0.985 + noise * rng.normal(0, 0.01)),
        "repetition": max(0.0, 0.03 + 0.02 * done + noise * rng.normal(0, 0.01)),
        "logprob_difference": 0.4 if loose else 2e-6,
        "logprob_difference_mean": 0.01 if loose else 1e-7,
        "dtype": dtype,
        "ar_loss": 2 - 2 * cosine,
        "ar_update": 2e-3,
        "policy_update": 3e-3,
        "loss_difference": 2e-3 if loose else 1e-6,
        "skipped": 0,
        "in_a_row": 0,
    }


def evaluation(fve: float = 0.4, permuted: float = -0.9, ok: int = 99, precision: float | None = 0.8) -> Step:
    facts = None if precision is None else {"recall": 0.5, "precision": precision, "rows": []}
    return {"n": 100, "fve": fve, "permuted": permuted, "statuses": {"ok": ok, "truncated": 100 - ok}, "facts": facts}


def run(plant: Callable[[int, Step], Step | None] | None = None, *, steps: int = 60, seed: int = 0) -> list[Alarm]:
    """All alarms of a run whose steps `plant` changed."""
    monitor, rng = Monitor(), np.random.default_rng(seed)
    alarms: list[Alarm] = []
    for step in range(steps):
        figures = honest(step, steps, rng)
        alarms += monitor.observe(step, (plant(step, figures) if plant else None) or figures)
    return alarms


def hidden_code(step: int, f: Step) -> Step | None:
    """From step 20 the live AR is flattered: its cosine rises by up to 0.2, the second AR sees nothing of it."""
    extra = min(0.2, 0.01 * max(0, step - 20))
    return {**f, "cosine": f["cosine"] + extra, "gap": f["gap"] + extra}


def ignores_vector(step: int, f: Step) -> Step | None:
    noise = float(np.random.default_rng(step).normal(0, 0.01))
    return {**f, "cosine": 0.31 + noise, "cosine_shuffled": 0.31, "watch_cosine": 0.3 + noise, "gap": 0.01}


def stale_reward(step: int, f: Step) -> Step | None:
    """The AR that pays is a copy from the beginning; the second one goes on learning."""
    return {**f, "gap": f["gap"] - 0.004 * step}


def from_step(first: int, **changes: Any) -> Callable[[int, Step], Step | None]:
    return lambda step, f: {**f, **changes} if step >= first else f


def without(name: str) -> Callable[[int, Step], Step | None]:
    return lambda step, f: {k: v for k, v in f.items() if k != name}


CHEATS: dict[str, tuple[str, Callable[[int, Step], Step | None], int, int]] = {
    "a hidden code": ("reward_hacking", hidden_code, 25, 32),
    "an AV that ignores its vector": ("vector_ignored", ignores_vector, 4, 4),
    "an AR without gradients": ("frozen_ar", from_step(0, ar_update=0.0), 2, 2),
    "an AR moved by weight decay's dust only": ("frozen_ar", from_step(10, ar_update=1e-9), 12, 12),
    "a stale copy pays": ("frozen_ar", stale_reward, 10, 20),
    "an AV without gradients": ("frozen_av", from_step(7, policy_update=0.0), 9, 9),
    "KL switched off": ("kl_not_applied", from_step(0, kl=None), 0, 0),
    "KL not even a figure": ("kl_not_applied", without("kl"), 0, 0),
    "KL to itself": ("kl_not_applied", from_step(0, kl=0.0), 3, 3),
    "another beta in the loss": ("kl_not_applied", from_step(3, loss_difference=0.02), 3, 3),
    "a loss that is not a number": ("kl_not_applied", from_step(3, loss_difference=float("nan")), 3, 3),
    "injection lost in the trainer": ("logprobs_disagree", from_step(5, logprob_difference=0.8), 5, 5),
    "NaN log-probabilities": ("logprobs_disagree", from_step(5, logprob_difference=float("nan")), 5, 5),
    "16-bit sampler of older weights": (
        "logprobs_disagree",
        from_step(5, dtype="bfloat16", logprob_difference=3.0, logprob_difference_mean=0.3),
        5,
        5,
    ),
    "tags forgotten": ("format_lost", lambda s, f: {**f, "ok": max(0.5, 1 - 0.01 * s)}, 11, 14),
    "longer and longer": ("length_explosion", lambda s, f: {**f, "length": 30.0 + 2 * s}, 16, 22),
    "one text only": ("entropy_collapse", lambda s, f: {**f, "entropy": 0.9 * 0.9**s}, 20, 30),
    "the same words again": ("repetition", lambda s, f: {**f, "repetition": 0.02 + 0.01 * s}, 12, 18),
    "non-finite steps": (
        "non_finite",
        lambda s, f: {**f, "in_a_row": s - 19, "policy_update": 0.0, "ar_update": 0.0} if s > 19 else f,
        29,
        29,
    ),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_each_planted_cheat_raises_its_alarm_once_and_no_other(cheat: str) -> None:
    name, plant, earliest, latest = CHEATS[cheat]
    alarms = run(plant)
    assert [alarm.name for alarm in alarms] == [name], alarms
    assert earliest <= alarms[0].step <= latest
    json.dumps(alarms[0].to_dict(), allow_nan=False)


@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.sampled_from([20, 60, 200]),
    noise=st.floats(0, 1.5),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_an_honest_run_raises_nothing(seed: int, steps: int, noise: float, dtype: str) -> None:
    monitor, rng = Monitor(precision_drop=0.05), np.random.default_rng(seed)
    for step in range(steps):
        assert monitor.observe(step, honest(step, steps, rng, noise=noise, dtype=dtype)) == []
        if step % 10 == 0:
            done = step / steps
            found = evaluation(0.2 + 0.3 * done, -0.9, 99, 0.8 + noise * float(rng.uniform(-0.015, 0.015)))
            assert monitor.evaluated(step, found) == []
    assert monitor.active == ()


@given(seed=st.integers(0, 2**32 - 1), rate=st.floats(0.005, 0.05), first=st.integers(0, 40))
def test_a_hidden_code_is_found_however_fast_it_grows(seed: int, rate: float, first: int) -> None:
    def plant(step: int, f: Step) -> Step:
        extra = rate * max(0, step - first)
        return {**f, "cosine": f["cosine"] + extra, "gap": f["gap"] + extra}

    alarms = run(plant, steps=80, seed=seed)
    assert "reward_hacking" in {alarm.name for alarm in alarms}


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("beta of 0", {"beta": 0.0, "kl": None}),
        ("only the AR learns", {"lr": 0.0, "policy_update": 0.0, "kl": None, "loss_difference": None}),
        ("only the AV learns", {"ar_lr": 0.0, "ar_update": 0.0}),
        ("no second AR", {"gap": None, "watch_cosine": None}),
        ("nothing is known", dict.fromkeys(honest(0, 1, np.random.default_rng(0))) | {"dtype": "float32"}),
    ],
)
def test_what_is_meant_to_be_so_is_no_alarm(name: str, figures: Step) -> None:
    assert run(lambda step, f: {**f, **figures}) == [], name


def test_a_single_odd_step_is_no_alarm() -> None:
    odd = {"gap": 0.5, "cosine": 0.1, "cosine_shuffled": 0.1, "ok": 0.2, "length": 500.0, "entropy": 0.0,
           "repetition": 0.9, "ar_update": 0.0, "policy_update": 0.0, "kl": 0.0}  # fmt: skip
    assert run(lambda step, f: {**f, **odd} if step == 30 else f) == []


def test_figures_that_are_not_finite_are_not_counted() -> None:
    scattered = dict.fromkeys(("gap", "cosine", "ok", "length", "entropy", "repetition", "kl"), float("nan"))
    assert run(lambda step, f: {**f, **scattered} if step % 3 == 0 else f) == []


def test_fatal_and_reported() -> None:
    assert not run(CHEATS["injection lost in the trainer"][1])[0].fatal, (
        "the trainer itself stops at a larger difference"
    )
    assert not run(CHEATS["16-bit sampler of older weights"][1])[0].fatal
    (stop,) = Monitor().observe(3, {"in_a_row": NON_FINITE_LIMIT})
    assert stop.fatal
    assert Monitor().observe(3, {"in_a_row": NON_FINITE_LIMIT - 1}) == []


def test_in_16_bit_single_tokens_may_differ() -> None:
    figures = {"dtype": "bfloat16", "logprob_difference": 2.0, "logprob_difference_mean": 0.02, "loss_difference": 5e-3}
    assert Monitor().observe(0, figures) == []
    assert [a.name for a in Monitor().observe(0, {**figures, "dtype": "float32"})] == [
        "logprobs_disagree",
        "kl_not_applied",
    ]


def test_an_alarm_comes_again_only_after_it_had_cleared() -> None:
    monitor = Monitor()
    bad, good = {"logprob_difference": 1.0}, {"logprob_difference": LOGPROB_LIMIT / 2}
    seen = [bool(monitor.observe(i, f)) for i, f in enumerate([bad, bad, bad, good, bad, bad])]
    assert seen == [True, False, False, False, True, False]
    # A figure that scatters around its limit is one alarm, not many.
    monitor, rng = Monitor(), np.random.default_rng(0)
    begun = []
    for step in range(200):
        worth = VECTOR_WORTH + float(rng.normal(0, 0.01))
        begun += monitor.observe(step, {"cosine": 0.3 + worth, "cosine_shuffled": 0.3})
    assert 1 <= len(begun) <= 8


def test_one_alarm_in_two_ways_is_one_alarm() -> None:
    monitor = Monitor()
    for step in range(WINDOW):
        first = monitor.observe(step, {"cosine": 0.3, "cosine_shuffled": 0.3})
    assert [a.name for a in first] == ["vector_ignored"]
    assert monitor.evaluated(WINDOW, evaluation(0.1, 0.1)) == []
    assert monitor.active == ("vector_ignored",)
    assert Monitor().evaluated(0, evaluation(0.1, 0.1))[0].limit == pytest.approx(0.05)


def test_precision_is_held_against_its_best() -> None:
    monitor = Monitor(precision_drop=0.05)
    stream = [0.70, 0.80, 0.76, None, 0.749, 0.74, 0.79, 0.70]
    seen = [[a.name for a in monitor.evaluated(i, evaluation(precision=p))] for i, p in enumerate(stream)]
    assert seen == [[], [], [], [], ["precision_falls"], [], [], ["precision_falls"]]
    unwatched = Monitor()
    assert [a for p in stream for a in unwatched.evaluated(0, evaluation(precision=p))] == []
    assert Monitor(precision_drop=0.05).evaluated(0, {"facts": None, "statuses": None, "fve": None}) == []


def test_an_evaluation_sees_lost_format() -> None:
    assert [a.name for a in Monitor().evaluated(0, evaluation(ok=89))] == ["format_lost"]
    assert Monitor().evaluated(0, evaluation(ok=90)) == []


@pytest.mark.parametrize("cheat", CHEATS)
@pytest.mark.parametrize("killed", [1, 8, 23])
def test_a_run_that_is_killed_raises_the_same_alarms(cheat: str, killed: int) -> None:
    def alarms(kill: int | None) -> Iterator[Alarm]:
        monitor, rng = Monitor(precision_drop=0.03), np.random.default_rng(1)
        for step in range(50):
            figures = honest(step, 50, rng)
            yield from monitor.observe(step, CHEATS[cheat][1](step, figures) or figures)
            if step % 10 == 9:
                yield from monitor.evaluated(step, evaluation(precision=0.8 - 0.001 * step))
            if step == kill:
                monitor = Monitor.from_dict(json.loads(json.dumps(monitor.to_dict(), allow_nan=False)))

    assert list(alarms(killed)) == list(alarms(None))


def test_a_state_that_is_none_is_refused() -> None:
    state = Monitor().to_dict()
    for wrong in ({}, {**state, "first": None}, {**state, "streaks": {"x": "many"}}):
        with pytest.raises(InputError, match="not the state of a monitor"):
            Monitor.from_dict(wrong)


def test_every_message_says_what_to_do() -> None:
    raised = {alarm.name for cheat in CHEATS.values() for alarm in run(cheat[1])} | {"precision_falls"}
    assert raised == {key.split("/")[0] for key in MESSAGES}
    for _, plant, _, _ in CHEATS.values():
        for alarm in run(plant):
            assert "{" not in alarm.message
            assert "Usually" in alarm.message or alarm.name == "entropy_collapse" or "heck" in alarm.message
    (code,) = run(hidden_code)
    assert (code.value or 0) > (code.limit or 0) > GAP_GROWTH
    assert f"{code.value:.3f} above that of the second AR" in code.message


# -- the held-out measurement --------------------------------------------------------------------------------

TINY = Path(nla_hub.__file__).parent / "tiny" / "weights"


@dataclasses.dataclass(frozen=True)
class Held:
    """A pair, rows of its source, and what is known there."""

    nla: NLA
    rows: TrainingRows
    truth: list[Mapping[str, Any]]


@pytest.fixture(scope="module")
def tiny() -> Held:
    """40 rows of the tiny world, two a document, with full labels."""
    nla = NLA.from_pretrained(str(TINY))
    world = documents(20, 977, "train")
    acts = nla.capture([d.content for d in world], positions=lambda e: [len(e) // 3, 2 * len(e) // 3])
    ends = [(world[d], c) for d, c in zip(acts.document, acts.char_end, strict=True)]
    gold = [str(text) for text in TinyLabeler().label([LabelRequest(d, c) for d, c in ends])]
    rows = TrainingRows(
        vectors=acts.vectors,
        texts=("", *gold[1:]),
        doc_ids=tuple(f"dev-{d}" for d in acts.document),
        positions=tuple(int(p) for p in acts.position),
        prefixes=tuple(d.text[:c] for d, c in ends),
        site=nla.site,
    )
    return Held(nla, rows, [named_facts(text) for text in gold])


def evaluate(held: Held, *, n: int = 400, **changes: Any) -> tuple[DevEvaluation, DevResult]:
    settings: dict[str, Any] = {"max_new_tokens": 60, "batch_size": 16, **changes}
    dev = DevEvaluation(held.rows, held.nla.ar.prompt, n=n, **settings)
    return dev, dev.measure(held.nla.av.engine, held.nla.ar.model)


def check_against_the_sdk(held: Held, result: DevResult, *, max_new_tokens: int) -> list[Any]:
    """Compare with verbalize and score; returns the SDK's explanations."""
    nla, vectors = held.nla, held.rows.vectors
    explained = nla.verbalize(vectors, temperature=0, max_new_tokens=max_new_tokens, batch_size=16)
    scores = nla.score(explained, vectors)
    reference = Reference.measure(vectors, "rows")
    mse = float(scores.mse_counted().mean())
    assert result.n == len(vectors)
    assert result.cosine == pytest.approx(scores.mean_cosine(), abs=1e-6)
    assert result.fve == pytest.approx(1 - mse / reference.raw_variance, abs=1e-6)
    assert result.fve_mean_norm == pytest.approx(1 - mse / reference.mean_norm, abs=1e-6)
    statuses = [e.status for e in explained]
    assert result.statuses == {s: statuses.count(s) for s in sorted(set(statuses))}
    return list(explained)


def test_the_tiny_pair_measures_as_by_the_sdk(tiny: Held) -> None:
    before = {name: p.requires_grad for name, p in tiny.nla.ar.model.named_parameters()}
    dev, result = evaluate(tiny, named=named_facts, truth=tiny.truth)
    explained = check_against_the_sdk(tiny, result, max_new_tokens=60)
    assert {name: p.requires_grad for name, p in tiny.nla.ar.model.named_parameters()} == before
    texts = [e.text for e in explained if e.text is not None]
    assert result.fve is not None
    assert result.fve_low is not None
    assert result.fve_high is not None
    assert result.fve_low < result.fve < result.fve_high
    assert result.fve > 0.5
    assert result.words == pytest.approx(sum(len(t.split()) for t in texts) / len(texts))
    assert result.watch_cosine is None
    # The control by hand: each document's texts at the next document's rows (two rows each).
    found = torch.stack([tiny.nla.reconstruct(e.text) if e.text else torch.zeros(128) for e in explained])
    mse = direction_mse(found.roll(-2, dims=0), tiny.rows.vectors)  # an unusable row is orthogonal: mse 2
    control = 1 - float(mse.mean()) / dev.reference.raw_variance
    assert result.permuted == pytest.approx(control, abs=1e-6)
    assert control < 0.1
    # Facts counted by hand.
    assert result.facts is not None
    named = [named_facts(e.text) if e.text else {} for e in explained]
    by_name = {row.fact: row for row in result.facts.rows}
    for fact in ("next_word", "kind", "person"):
        has = [i for i, facts in enumerate(tiny.truth) if fact in facts]
        right = sum(named[i].get(fact) == tiny.truth[i][fact] for i in has)
        says = [i for i in range(len(named)) if fact in named[i]]
        true = sum(named[i][fact] == tiny.truth[i].get(fact) for i in says)
        row = by_name[fact]
        assert (row.n, row.named) == (len(has), len(says))
        assert row.recall == pytest.approx(right / len(has))
        assert row.precision == pytest.approx(true / len(says))
    recalls = [r.recall for r in result.facts.rows if r.n >= FACT_ROWS and r.recall is not None]
    precisions = [r.precision for r in result.facts.rows if r.named >= FACT_ROWS and r.precision is not None]
    assert result.facts.recall == pytest.approx(sum(recalls) / len(recalls))
    assert result.facts.precision == pytest.approx(sum(precisions) / len(precisions))


def test_the_result_is_json_of_the_agreed_shape(tiny: Held) -> None:
    _, result = evaluate(tiny)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert list(data) == ["n", "fve", "fve_low", "fve_high", "fve_mean_norm", "cosine", "permuted", "watch_cosine",
                          "statuses", "words", "tokens", "repetition", "facts", "samples"]  # fmt: skip
    assert data["facts"] is None
    assert data == result.to_dict()
    assert len(data["samples"]) == SAMPLES
    assert list(data["samples"][0]) == ["doc_id", "position", "context", "text", "raw", "status", "cosine", "gold"]
    assert Monitor(precision_drop=0.1).evaluated(0, data) == []


def test_the_samples_are_always_the_same_rows(tiny: Held) -> None:
    _, one = evaluate(tiny)
    _, again = evaluate(tiny, max_new_tokens=5)
    shown = [(s.doc_id, s.position) for s in one.samples]
    assert shown == [(s.doc_id, s.position) for s in again.samples]
    for sample in one.samples:
        i = list(zip(tiny.rows.doc_ids, tiny.rows.positions, strict=True)).index((sample.doc_id, sample.position))
        assert sample.context == tiny.rows.prefixes[i][-80:]
        assert sample.gold == (tiny.rows.texts[i] or None)
    assert all(s.cosine is None and s.text is None for s in again.samples)


def test_unusable_rows_count_with_mse_2(tiny: Held) -> None:
    dev, result = evaluate(tiny, max_new_tokens=5)
    assert result.statuses == {"truncated": 40}
    assert result.fve == pytest.approx(1 - 2 / dev.reference.raw_variance)
    assert result.permuted == pytest.approx(result.fve)
    assert (result.cosine, result.words, result.repetition, result.tokens) == (0.0, None, None, 5.0)
    names = [a.name for a in Monitor().evaluated(0, result.to_dict())]
    assert names == ["vector_ignored", "format_lost"]


def test_a_random_pair_measures_as_by_the_sdk(tmp_path: Path) -> None:
    random_pair(tmp_path, "llama")
    nla = NLA.from_pretrained(tmp_path)
    vectors = torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(0))
    ids, places = tuple(f"d{i // 4}" for i in range(40)), tuple(range(40))
    held = Held(nla, TrainingRows(vectors, ("",) * 40, ids, places, ("",) * 40, Site(2)), [])
    _, result = evaluate(held, max_new_tokens=12)
    check_against_the_sdk(held, result, max_new_tokens=12)
    assert result.facts is None
    assert all(sample.gold is None for sample in result.samples)


class Scripted:
    """An engine that writes given texts."""

    name = "scripted"

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def generate(self, vectors: torch.Tensor, draws: torch.Tensor | None, **settings: Any) -> list[Completion]:
        assert draws is None
        return [Completion((1, 2, 3), text, "eos", torch.zeros(3)) for text in self.texts[: len(vectors)]]


def test_gold_labels_by_a_scripted_av(tiny: Held) -> None:
    """Labels written by an AV that knows everything: all named facts are true, and a second AR that is the first agrees."""
    gold = [f"<explanation>{text or 'kind story'}</explanation>" for text in tiny.rows.texts]
    gold[5], gold[6], gold[7] = "no tags at all", "<explanation>cut", "<explanation> </explanation>"
    dev = DevEvaluation(tiny.rows, tiny.nla.ar.prompt, n=40, max_new_tokens=60, named=named_facts, truth=tiny.truth)
    ar = tiny.nla.ar.model
    result = dev.measure(Scripted(gold), ar, ar)  # type: ignore[arg-type]
    assert result.statuses == {"empty": 1, "no_tags": 1, "ok": 37, "truncated": 1}
    assert result.watch_cosine == result.cosine
    assert result.facts is not None
    assert result.facts.precision is not None
    assert result.facts.precision > 0.98  # one row's label is made up here
    row = next(row for row in result.facts.rows if row.fact == "next_word")
    assert row.recall == pytest.approx(1 - 4 / row.n, abs=1 / row.n)
    written = [None if 4 < i < 8 else (text or "kind story") for i, text in enumerate(tiny.rows.texts)]
    scores = tiny.nla.score(written, tiny.rows.vectors)
    assert result.cosine == pytest.approx(scores.mean_cosine(), abs=1e-6)
    # A text that is too long for the AR is a result, not the end of the run.
    short = dataclasses.replace(tiny.nla.ar.prompt, max_length=4)
    unread = DevEvaluation(tiny.rows, short, n=40, max_new_tokens=60).measure(Scripted(gold), ar)  # type: ignore[arg-type]
    assert unread.statuses["ok"] == 37
    assert unread.cosine == 0.0


def test_rows_are_taken_evenly_with_their_facts(tiny: Held) -> None:
    dev = DevEvaluation(tiny.rows, tiny.nla.ar.prompt, n=10, max_new_tokens=60)
    assert dev.rows.doc_ids == tiny.rows.doc_ids[::4]
    assert torch.equal(dev.rows.vectors, tiny.rows.vectors[::4])
    assert dev.reference.n == 10


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=30))
def test_the_control_never_stays_in_a_document(ids: list[str]) -> None:
    found = other_documents(ids)
    if found is None:
        assert 2 * max(ids.count(d) for d in ids) > len(ids)
    else:
        assert sorted(found) == list(range(len(ids)))
        assert all(ids[i] != ids[j] for i, j in enumerate(found))


def test_what_cannot_be_measured_is_refused(tiny: Held) -> None:
    def build(rows: TrainingRows, **changes: Any) -> DevEvaluation:
        return DevEvaluation(rows, tiny.nla.ar.prompt, **{"n": 40, "max_new_tokens": 60, **changes})

    with pytest.raises(InputError, match="at least two rows"):
        build(tiny.rows[:1])
    with pytest.raises(InputError, match="together"):
        build(tiny.rows, named=named_facts)
    with pytest.raises(InputError, match="every row"):
        build(tiny.rows, named=named_facts, truth=tiny.truth[:3])
    with pytest.raises(InputError, match="batch_size"):
        build(tiny.rows, batch_size=0)
    broken = dataclasses.replace(tiny.rows, vectors=tiny.rows.vectors.clone().index_fill_(0, torch.tensor([3]), 0.0))
    with pytest.raises(VectorError, match="row 3: zero"):
        build(broken)
