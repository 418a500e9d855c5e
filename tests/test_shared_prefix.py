"""The beginning of a prompt, computed once for all rows: the same text as the plain path, and never from old weights."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Case, Spec
from parity import check_generation, close, same_rows

from nla_hub import NLA, memory
from nla_hub.architecture import Architecture
from nla_hub.engines import shared_prefix
from nla_hub.engines import transformers as engine_module
from nla_hub.engines.shared_prefix import SharedPrefix, TailCache, can_share
from nla_hub.errors import Interrupted
from nla_hub.memory import PartSize, Workload, working_bytes
from nla_hub.testing import D_MODEL

STEPS = 12


def rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed))


def uniforms(n: int) -> torch.Tensor:
    return torch.rand(n, STEPS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def texts(engine: Any, vectors: torch.Tensor, batch_size: int, draws: torch.Tensor | None = None) -> list[str]:
    found = engine.generate(vectors, draws, temperature=0.9, max_new_tokens=STEPS, batch_size=batch_size)
    return [completion.text for completion in found]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes the plain path from here on."""
    return lambda: monkeypatch.setattr(engine_module, "can_share", lambda *_: False)


def test_tokens_equal_a_route_of_its_own_for_batches_of_1_7_and_64(speaker: Case) -> None:
    engine, vectors, draws = speaker.nla.av.engine, rows(64), uniforms(64)
    for given, temperature in ((None, 1.0), (draws, 0.9)):
        expected, margins = speaker.av.decode(vectors, STEPS, given, temperature)
        for batch_size, n in ((64, 64), (7, 20), (1, 3)):
            found = engine.generate(
                vectors[:n],
                None if given is None else given[:n],
                temperature=temperature,
                max_new_tokens=STEPS,
                batch_size=batch_size,
            )
            same_rows([completion.ids for completion in found], expected[:n], margins[:n])


def test_families_share_what_stands_before_the_marker_where_their_windows_allow(architecture: Case) -> None:
    engine: Any = architecture.nla.av.engine
    prompt, config = engine.av.prompt, engine.model.config
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or []) or config.model_type == "mistral"
    shared = engine._shared(1)
    if slides and config.sliding_window < len(prompt) + 1:
        assert shared is None
    else:
        assert len(shared) == prompt.marker_position
    assert not can_share(engine.model, shared_prefix.SHORTEST - 1, 10)


def test_a_window_that_is_too_short_takes_the_plain_path(make_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = make_case(Spec("gemma3")).nla.av.engine
    assert engine.model.config.sliding_window == 32
    room = 32 - len(engine.av.prompt)
    assert engine._shared(room) is not None
    assert engine._shared(room + 1) is None
    monkeypatch.setattr(SharedPrefix, "of", lambda *_: pytest.fail("it was shared"))
    engine.generate(rows(2), None, temperature=1.0, max_new_tokens=room + 1, batch_size=2)


def test_changed_weights_are_never_answered_from_before(copied: Any, plain: Any) -> None:
    engine: Any = NLA.from_pretrained(copied.root, components=("av",)).av.engine
    vectors = rows(4)
    before = texts(engine, vectors, 4)
    block = engine.model.model.layers[0]
    with torch.no_grad():
        block.self_attn.k_proj.weight.add_(0.3)
        block.mlp.down_proj.weight.mul_(-1.5)
    after = texts(engine, vectors, 4)
    assert after != before
    plain()
    assert texts(engine, vectors, 4) == after


def test_a_stale_beginning_would_be_seen(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage: keys and values of other weights make the independent check fail."""
    engine: Any = llama.nla.av.engine
    stale = SharedPrefix([(keys + 0.5, values * 1.5) for keys, values in engine._shared(20).blocks])
    monkeypatch.setattr(type(engine), "_shared", lambda self, room: stale)
    with pytest.raises(AssertionError):
        check_generation(llama, rows(5))


def test_samples_of_one_vector_share_their_prompt_pass(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = llama.nla.av.engine
    seen: list[int] = []
    first = type(engine)._prompt_pass

    def counted(self: Any, vectors: torch.Tensor, *others: Any) -> Any:
        seen.append(len(vectors))
        return first(self, vectors, *others)

    monkeypatch.setattr(type(engine), "_prompt_pass", counted)
    vectors, draws = rows(3).repeat_interleave(4, dim=0), uniforms(12)
    together = texts(engine, vectors, 12, draws)
    assert seen == [3]
    assert together == [text for i in range(12) for text in texts(engine, vectors[i : i + 1], 1, draws[i : i + 1])]


def test_out_of_memory_halves_the_batch_and_goes_on(
    llama: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine: Any = llama.nla.av.engine
    vectors = rows(10)
    expected = texts(engine, vectors, 10)
    batch = type(engine)._batch

    def scarce(self: Any, part: torch.Tensor, *others: Any) -> Any:
        if len(part) > 3:
            raise torch.OutOfMemoryError("not enough")
        return batch(self, part, *others)

    monkeypatch.setattr(type(engine), "_batch", scarce)
    with caplog.at_level("WARNING", logger="nla_hub"):
        assert texts(engine, vectors, 10) == expected
    assert "out of memory: going on with 5 rows" in caplog.text
    assert "going on with 2 rows" in caplog.text
    monkeypatch.setattr(type(engine), "_batch", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        texts(engine, vectors, 4)


def test_the_attention_is_put_back_also_after_an_error(llama: Case) -> None:
    engine: Any = llama.nla.av.engine
    before = engine.model.config._attn_implementation
    cache = TailCache(engine._shared(1), capacity=4)

    def fail() -> None:
        with shared_prefix.shared_attention(engine.model, cache):
            assert engine.model.config._attn_implementation == shared_prefix.ATTENTION
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert engine.model.config._attn_implementation == before


def test_an_attention_that_ours_does_not_know_is_found_by_the_probe(
    llama: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_module.TransformersEngine(llama.nla.av.engine.av)
    engine.probe()
    assert engine._shared(1) is not None
    expected = texts(engine, rows(3), 3)
    attend = shared_prefix.attend

    def narrower(*args: Any, scaling: float, **others: Any) -> Any:
        return attend(*args, scaling=scaling * 0.5, **others)

    monkeypatch.setitem(shared_prefix.AttentionInterface._global_mapping, shared_prefix.ATTENTION, narrower)
    with caplog.at_level("WARNING", logger="nla_hub"):
        engine.probe()
    assert "going on without it" in caplog.text
    assert engine._shared(1) is None
    assert texts(engine, rows(3), 3) == expected


def test_threads_take_turns_on_one_model(llama: Case) -> None:
    """Without turns one thread's vectors and attention would be seen by the other's passes."""
    engine, parts = llama.nla.av.engine, [rows(5, seed) for seed in range(6)]
    alone = [texts(engine, part, 5) for part in parts]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda part: texts(engine, part, 5), parts)) == alone


def test_interrupted_keeps_the_rows_that_are_done(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the third batch: both before it are there, with the texts that they would have had."""
    nla, vectors = llama.nla, rows(10)
    whole = nla.verbalize(vectors, temperature=0, max_new_tokens=STEPS, batch_size=4)
    calls: list[int] = []
    forward = engine_module.TransformersEngine._prompt_pass

    def pressed(self: Any, part: torch.Tensor, *others: Any) -> Any:
        calls.append(len(part))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, part, *others)

    monkeypatch.setattr(engine_module.TransformersEngine, "_prompt_pass", pressed)
    with pytest.raises(Interrupted, match="8 rows are done") as caught:
        nla.verbalize(vectors, temperature=0, max_new_tokens=STEPS, batch_size=4)
    assert caught.value.done == dict(enumerate(whole[:8]))
    assert nla.verbalize(vectors, temperature=0, max_new_tokens=STEPS, batch_size=4) == whole


def test_interrupted_keeps_only_rows_of_which_every_sample_is_done(
    llama: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six samples are done, three a row: two rows; the fourth row's first sample alone is none."""
    calls: list[int] = []
    batch = engine_module.TransformersEngine._batch

    def pressed(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return batch(self, *args)

    monkeypatch.setattr(engine_module.TransformersEngine, "_batch", pressed)
    with pytest.raises(Interrupted) as caught:
        llama.nla.explain(["the cat", "a house", "the river"], n=3, max_new_tokens=4, batch_size=1)
    done = caught.value.done
    assert [(row.sample, row.cosine) for row in done] == [(0, None), (1, None), (2, None)] * 2
    assert not isinstance(caught.value, Exception)


def test_rows_run_on_where_stopping_is_turned_off(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_module.TransformersEngine(llama.nla.av.engine.av)
    end = llama.av.tokenizer.eos_token_id
    monkeypatch.setattr(
        engine_module, "choose", lambda logits, *_: (torch.full((len(logits),), end), torch.zeros(len(logits)))
    )
    run = {"temperature": 1.0, "max_new_tokens": 5, "batch_size": 2}
    assert [(c.ids, c.finish) for c in engine.generate(rows(2), None, **run)] == [((end,), "eos")] * 2
    engine.stops = False
    assert [(c.ids, c.finish) for c in engine.generate(rows(2), None, **run)] == [((end,) * 5, "length")] * 2


def test_as_many_rows_as_fit_run_together(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = llama.nla.av.engine
    assert engine.fitting_rows(20) == memory.MOST_ROWS_CPU
    sizes: list[int] = []
    for free in (1, 3_000_000, 12_000_000):
        monkeypatch.setattr(engine_module, "free_memory", lambda _, free=free: free)
        sizes.append(engine.fitting_rows(400))
    assert sizes[0] == 1 < sizes[1] < sizes[2] < memory.MOST_ROWS_CPU
    assert all(size & (size - 1) == 0 for size in sizes)
    prompt = engine.av.prompt
    monkeypatch.setattr(engine_module, "free_memory", lambda _: 3_000_000)
    size = PartSize("av", 0, 0, 0, Architecture.of(engine.model.config), 4)
    work = Workload(sizes[1], len(prompt), 400, shared=prompt.marker_position)
    assert working_bytes(size, work) <= 3_000_000 < working_bytes(size, replace(work, batch_size=2 * sizes[1] + 1))
    seen: list[int] = []
    batch = type(engine)._batch
    monkeypatch.setattr(
        type(engine), "_batch", lambda self, v, *rest: [seen.append(len(v)), *batch(self, v, *rest)][1:]
    )
    llama.nla.verbalize(rows(9), temperature=0, max_new_tokens=400)
    assert seen[0] == min(9, sizes[1])


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("new", [1, 3])
def test_the_attention_is_that_of_the_formula(group: int, softcap: float | None, new: int) -> None:
    torch.manual_seed(0)
    kv, width, before, tail, n = 2, 8, 5, 4, 3
    query = torch.randn(n, kv * group, new, width)
    prefix = [torch.randn(1, kv, before, width) for _ in range(2)]
    key, value = (torch.randn(n, kv, tail, width) for _ in range(2))
    cache = TailCache(SharedPrefix([(prefix[0], prefix[1])]), capacity=tail)
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    token = shared_prefix._RUNNING.set(cache)
    try:
        found, _ = shared_prefix.attend(
            module, query, key.transpose(0, 1), value.transpose(0, 1), scaling=0.3, softcap=softcap
        )
    finally:
        shared_prefix._RUNNING.reset(token)
    for row in range(n):
        for head in range(kv * group):
            keys = torch.cat([prefix[0][0, head // group], key[row, head // group]])
            values = torch.cat([prefix[1][0, head // group], value[row, head // group]])
            for i in range(new):
                scores = 0.3 * keys @ query[row, head, i]
                scores = softcap * torch.tanh(scores / softcap) if softcap is not None else scores
                scores[before + tail - new + i + 1 :] = float("-inf")
                close(found[row, i, head], scores.softmax(0) @ values)
