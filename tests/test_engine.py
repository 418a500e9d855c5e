"""Generation: equal to an independent loop, whatever the batch, the order and the neighbours in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Case
from parity import STEPS, check_generation, close, engine_logits, same_rows

from nla_hub.engines import transformers as engine_module
from nla_hub.errors import InjectionError, UnknownNameError
from nla_hub.sampling import RowKey, uniforms
from nla_hub.sidecar import Injection
from nla_hub.testing import D_MODEL


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of the engine."""
    calls: list[int] = []
    generate = engine_module.TransformersEngine.generate

    def spy(self: Any, vectors: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(vectors))
        return generate(self, vectors, *args, **kwargs)

    monkeypatch.setattr(engine_module.TransformersEngine, "generate", spy)
    return calls


def rows(n: int, seed: int = 11) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed))


def test_greedy_text_equals_an_independent_loop_for_every_batch_size(speaker: Case, vectors: torch.Tensor) -> None:
    check_generation(speaker, vectors)


def test_drawn_text_equals_an_independent_loop_for_every_batch_size(speaker: Case, vectors: torch.Tensor) -> None:
    draws = uniforms(0, [RowKey(str(i)) for i in range(len(vectors))], STEPS)
    check_generation(speaker, vectors, draws=draws)


def test_rows_that_stop_early_leave_the_others_as_they_are(architecture: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are made to meet EOS at different steps; those that go on are as if they had run alone."""
    steps = 20
    vectors = rows(6)
    draws = uniforms(1, [RowKey(str(i)) for i in range(6)], steps)
    stops = {0: 3, 2: 0, 3: 11, 5: 3}
    for row, step in stops.items():
        draws[row, step] = -1.0
    choose = engine_module.choose

    def stopping(logits: torch.Tensor, draws: Any, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logp = choose(logits, draws.clamp(min=0), temperature)
        return torch.where(draws < 0, architecture.av.tokenizer.eos_token_id, tokens), logp

    expected, margins = architecture.av.decode(vectors, steps, draws.clamp(min=0), 0.9)
    monkeypatch.setattr(engine_module, "choose", stopping)
    run = {"temperature": 0.9, "max_new_tokens": steps}
    for batch_size in (6, 1):
        found = architecture.nla.av.engine.generate(vectors, draws, batch_size=batch_size, **run)
        assert {i: len(c.ids) - 1 for i, c in enumerate(found) if c.finish == "eos"}.items() >= stops.items()
        for row, step in stops.items():
            expected[row][step] = architecture.av.tokenizer.eos_token_id
        same_rows([c.ids for c in found], expected, margins)


def test_a_sampled_marker_is_just_a_token(
    speaker: Case, vectors: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is made to write marker and neighbours; its logits afterwards are those of the plain tokens."""
    engine = speaker.nla.av.engine
    marker = engine.av.injector.marker
    forced = [marker.left_id, marker.id, marker.right_id, marker.id, marker.left_id]
    seen: list[torch.Tensor] = []

    def force(logits: torch.Tensor, draws: Any, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(logits)
        return torch.full((len(logits),), forced[len(seen) - 1]), torch.zeros(len(logits))

    monkeypatch.setattr(engine_module, "choose", force)
    found = engine.generate(vectors, None, temperature=1.0, max_new_tokens=len(forced), batch_size=7)
    assert [list(c.ids) for c in found] == [forced] * 7
    expected = speaker.av.logits(vectors, torch.tensor([forced] * 7))
    for step, logits in enumerate(seen):
        close(logits, expected[:, step])


def test_the_closing_tag_stops_a_row_and_stays_in_its_text(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llama.nla.av.engine
    script = llama.av.tokenizer("<explanation>the cat</explanation> and more", add_special_tokens=False)["input_ids"]
    steps = iter(script)
    monkeypatch.setattr(engine_module, "choose", lambda logits, *_: (torch.tensor([next(steps)]), torch.zeros(1)))
    (found,) = engine.generate(rows(1), None, temperature=1.0, max_new_tokens=50, batch_size=1)
    assert (found.text, found.finish) == ("<explanation>the cat</explanation>", "tag")


def test_a_tag_that_is_spelled_in_several_tokens_stops_too(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llama.nla.av.engine
    tokenizer = llama.av.tokenizer
    pieces = [i for c in "<explanation>a</explanation>" for i in tokenizer(c, add_special_tokens=False)["input_ids"]]
    assert len(pieces) == len("<explanation>a</explanation>")
    steps = iter([*pieces, *pieces])
    monkeypatch.setattr(engine_module, "choose", lambda logits, *_: (torch.tensor([next(steps)]), torch.zeros(1)))
    (found,) = engine.generate(rows(1), None, temperature=1.0, max_new_tokens=50, batch_size=1)
    assert (found.text, found.finish) == ("<explanation>a</explanation>", "tag")


def test_order_does_not_change_texts(crossed: Case) -> None:
    vectors = rows(9)
    order = [4, 8, 0, 2, 7, 1, 3, 6, 5]
    for temperature in (0.0, 0.9):
        run = {"temperature": temperature, "max_new_tokens": 16, "batch_size": 4}
        straight = [e.raw for e in crossed.nla.verbalize(vectors, **run)]
        shuffled = [e.raw for e in crossed.nla.verbalize(vectors[order], **run)]
        assert shuffled == [straight[i] for i in order]
        assert len(set(straight)) > 4


def test_the_same_seed_gives_the_same_text_and_another_seed_another(crossed: Case) -> None:
    vectors = rows(8)
    run = {"temperature": 0.9, "max_new_tokens": 16}
    first = [e.raw for e in crossed.nla.verbalize(vectors, seed=3, batch_size=1, **run)]
    again = [e.raw for e in crossed.nla.verbalize(vectors, seed=3, batch_size=8, **run)]
    other = [e.raw for e in crossed.nla.verbalize(vectors, seed=4, batch_size=8, **run)]
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_a_rows_text_does_not_depend_on_the_other_rows(llama: Case) -> None:
    vectors = rows(6)
    run = {"temperature": 0.9, "max_new_tokens": 16}
    together = [e.raw for e in llama.nla.verbalize(vectors, **run)]
    assert [llama.nla.verbalize(v, **run).raw for v in vectors] == together


def test_more_samples_start_with_the_fewer_ones(llama: Case) -> None:
    run = {"temperature": 0.9, "max_new_tokens": 12}
    three = [e.raw for e in llama.nla.verbalize(rows(1)[0], n=3, **run)]
    assert [e.raw for e in llama.nla.verbalize(rows(1)[0], n=2, **run)] == three[:2]
    assert llama.nla.verbalize(rows(1)[0], **run).raw == three[0]
    assert len(set(three)) == 3


def test_equal_vectors_are_computed_once(llama: Case, generated: list[int]) -> None:
    vectors = rows(3)[[0, 1, 0, 2, 1, 0]]
    found = llama.nla.verbalize(vectors, temperature=0.9, max_new_tokens=8)
    assert generated == [3]
    assert [e.raw for e in found] == [found[i].raw for i in (0, 1, 0, 3, 1, 0)]


def test_samples_of_equal_vectors_are_computed_once_each(llama: Case, generated: list[int]) -> None:
    llama.nla.verbalize(rows(2)[[0, 0, 1]], n=4, temperature=0.9, max_new_tokens=4)
    assert generated == [8]


def test_greedy_samples_are_computed_once_whatever_their_key(llama: Case, generated: list[int]) -> None:
    found = llama.nla.verbalize(rows(2)[[0, 1, 0]], n=5, temperature=0, keys=["a", "b", "c"], max_new_tokens=8)
    assert generated == [2]
    assert len({e.raw for e in (*found[0], *found[2])}) == 1


def test_equal_vectors_under_different_keys_are_drawn_apart(llama: Case, generated: list[int]) -> None:
    one = rows(1)
    found = llama.nla.verbalize(one.repeat(3, 1), keys=["a", "b", "a"], temperature=0.9, max_new_tokens=16)
    assert generated == [2]
    assert found[0].raw == found[2].raw != found[1].raw


def test_equal_keys_with_different_vectors_are_both_computed(llama: Case, generated: list[int]) -> None:
    found = llama.nla.verbalize(rows(2), keys=["a", "a"], temperature=0.9, max_new_tokens=16)
    assert generated == [2]
    assert found[0].raw != found[1].raw


def test_first_tokens_are_drawn_from_the_models_distribution(llama: Case) -> None:
    """Pearson's chi-square over the eight likeliest tokens and the rest: seven degrees and one, 0.999 quantile 26.1."""
    n = 3000
    vector = rows(1)
    exact = llama.av.logits(vector, torch.empty(1, 0, dtype=torch.long))[0, -1].double().softmax(-1)
    draws = uniforms(7, [RowKey("x", sample=i) for i in range(n)], 1)
    found = llama.nla.av.engine.generate(vector.expand(n, -1), draws, temperature=1.0, max_new_tokens=1, batch_size=500)
    top = exact.topk(8)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in found]), minlength=len(exact)).double()
    observed = torch.cat([counts[top.indices], (n - counts[top.indices].sum())[None]])
    expected = n * torch.cat([top.values, (1 - top.values.sum())[None]])
    assert float(expected.min()) > 5
    assert float(((observed - expected) ** 2 / expected).sum()) < 26.1


def test_no_rows_give_no_completions(llama: Case) -> None:
    assert llama.nla.verbalize(torch.empty(0, D_MODEL)) == []


def test_the_probe_passes_for_every_pair_and_fails_without_injection(
    speaker: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = speaker.nla.av.engine
    engine.probe()
    deaf = torch.zeros(1, len(speaker.av.tokenizer)).expand(2, -1)
    monkeypatch.setattr(engine, "_prompt_pass", lambda *_: (deaf, None))
    with pytest.raises(InjectionError, match="does not reach"):
        engine.probe()


def test_logits_that_the_engine_chooses_from_differ_between_vectors(speaker: Case, vectors: torch.Tensor) -> None:
    logits = engine_logits(speaker.nla.av.engine, vectors)
    assert len({tuple(row.tolist()) for row in logits}) == len(vectors)


def test_an_engine_that_cannot_inject_this_kind_is_refused(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module.TransformersEngine, "kinds", frozenset({"add"}))
    with pytest.raises(InjectionError, match=r"injection.kind 'overwrite'.*expected add"):
        engine_module.TransformersEngine(llama.nla.av.engine.av)
    assert llama.nla.sidecar.injection == Injection("overwrite", 8.0)


def test_an_unknown_engine_gets_a_suggestion(llama: Case) -> None:
    from nla_hub import NLA

    with pytest.raises(UnknownNameError, match="did you mean 'transformers'") as caught:
        NLA.from_pretrained(llama.pair.root, engine="transformer")
    assert caught.value.suggestions == ["transformers"]
