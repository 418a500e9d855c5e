"""Capture reads no more than it must, long documents in chunks, and leaves nothing behind."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import close
from torch import Tensor

from nla_hub.adapters import Adapter, adapter_for
from nla_hub.capture import block_outputs, capture, run_trunk
from nla_hub.errors import InputError
from nla_hub.sidecar import Site
from nla_hub.steering import SteeringVector
from nla_hub.testing import D_MODEL, LAYER, LAYERS, random_model, random_tokenizer

VOCABULARY, WINDOW, SITE = 420, 32, Site(LAYER)
Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]


def tokens(n: int, seed: int = 0) -> list[int]:
    """Ids that are no special tokens."""
    found: list[int] = torch.randint(10, 300, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


LONG: Sequences = [
    (tokens(120), [119, 0, 31, 32, 33, 64, 65, 100]),
    (tokens(5, 1), [2]),
    (tokens(70, 2), [69, 7, 7]),
    (tokens(90, 3), []),
    (tokens(3 * WINDOW, 4), [3]),
    (tokens(66, 5), list(range(66))),
]
"""Documents up to several windows long; the positions are in any order, and may be none."""


def read(model: Any, sequences: Sequences, *, site: Site = SITE, batch_size: int = 4, **settings: Any) -> Tensor:
    return run_trunk(adapter_for(model.config), model, site, sequences, pad_id=1, batch_size=batch_size, **settings)


def alone(case: Case, sequences: Sequences) -> Tensor:
    """What transformers' `hidden_states` hold of each document alone."""
    return torch.cat([case.source.hidden(ids, LAYER + 1)[list(chosen)] for ids, chosen in sequences])


@pytest.fixture
def model() -> Any:
    return random_model("llama", VOCABULARY)


@contextmanager
def passes(adapter: Adapter, model: Any) -> Iterator[list[tuple[int, int]]]:
    """Collects rows and columns of every pass through the trunk."""
    seen: list[tuple[int, int]] = []

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(tuple(kwargs["input_ids"].shape))

    handle = adapter.trunk(model).register_forward_pre_hook(look, with_kwargs=True)
    yield seen
    handle.remove()


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# -- the same vectors ----------------------------------------------------------------------------------------


def test_chunks_give_what_whole_documents_give(family: Case) -> None:
    trunk = family.nla.capture_source.loaded.model
    expected = alone(family, LONG)
    for batch_size, chunk in ((1, 65), (7, WINDOW), (64, 2048), (64, 200), (7, 11)):
        close(read(trunk, LONG, batch_size=batch_size, chunk_tokens=chunk), expected)
    close(read(family.source.model, LONG, chunk_tokens=WINDOW + 1), expected)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.lists(st.floats(0, 0.999), max_size=3)), min_size=1, max_size=5),
    st.integers(1, 64),
    st.integers(1, 4),
)
def test_any_lengths_positions_and_chunks_give_the_same(
    llama: Case, shapes: list[tuple[int, list[float]]], chunk: int, batch_size: int
) -> None:
    sequences = [(tokens(n, n), [int(x * n) for x in places]) for n, places in shapes]
    got = read(llama.source.model, sequences, batch_size=batch_size, chunk_tokens=chunk)
    if len(got):
        close(got, alone(llama, sequences))
    assert len(got) == sum(len(chosen) for _, chosen in sequences)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # its new name is not in 5.17
def test_a_model_that_keeps_no_cache_is_read_whole(model: Any) -> None:
    """Gradient checkpointing leaves out the cache while a model is in training mode."""
    expected = read(model, LONG)
    model.gradient_checkpointing_enable()
    model.train()
    with torch.no_grad(), passes(adapter_for(model.config), model) as seen:
        close(read(model, LONG, chunk_tokens=50), expected)
    assert (1, 120) in seen


@pytest.mark.parametrize("bad", [0, -1, True, 1.5, None])
def test_a_chunk_is_a_whole_number(model: Any, bad: Any) -> None:
    tokenizer = random_tokenizer()
    with pytest.raises(InputError, match="chunk_tokens is a whole number from 1 up"):
        capture(adapter_for(model.config), model, tokenizer, SITE, ["the cat"], chunk_tokens=bad)


def test_capture_hands_the_chunk_on(model: Any) -> None:
    adapter, tokenizer = adapter_for(model.config), random_tokenizer()
    text = "the cat sees a house and the dog"
    n = len(tokenizer(text)["input_ids"])
    with passes(adapter, model) as seen:
        got = capture(adapter, model, tokenizer, SITE, [text], positions="all", chunk_tokens=n - 1)
    assert seen == [(1, n - 1), (1, 1)]
    close(got.vectors, capture(adapter, model, tokenizer, SITE, [text], positions="all").vectors)


# -- no more than it must ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [20, 2048])
def test_no_block_above_the_site_runs(family: Case, chunk: int) -> None:
    model = family.source.model
    adapter = adapter_for(model.config)
    for layer in range(LAYERS):
        ran: list[int] = []
        handles = [
            block.register_forward_pre_hook(lambda *_, i=i, ran=ran: ran.append(i))
            for i, block in enumerate(adapter.block_list(model))
        ]
        read(model, LONG[:2], site=Site(layer), chunk_tokens=chunk)
        for handle in handles:
            handle.remove()
        assert set(ran) == set(range(layer + 1))


@pytest.mark.parametrize("chunk", [16, 100, 2048])
def test_a_pass_is_bounded_and_ends_with_what_was_asked_for(model: Any, chunk: int) -> None:
    with passes(adapter_for(model.config), model) as seen:
        read(model, LONG, chunk_tokens=chunk)
    assert all(rows * columns <= chunk and rows <= 4 for rows, columns in seen)
    longest = [max(chosen) + 1 for _, chosen in LONG if chosen]
    assert sum(rows * columns for rows, columns in seen if rows == 1) <= sum(longest)
    assert len(seen) >= -(-sum(longest) // chunk)


def test_tokens_behind_the_last_position_are_not_read(model: Any) -> None:
    with passes(adapter_for(model.config), model) as seen:
        read(model, [(tokens(100), [3, 24])], chunk_tokens=10)
        read(model, [(tokens(100), [])], chunk_tokens=10)
    assert seen == [(1, 10), (1, 10), (1, 5)]


# -- nothing left behind, nothing swallowed -------------------------------------------------------------------


def test_another_hooks_error_is_raised_and_no_hook_stays(model: Any) -> None:
    adapter = adapter_for(model.config)
    before = hooks(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("from elsewhere")

    for block in (adapter.block_list(model)[0], adapter.block(model, SITE)):
        handle = block.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="from elsewhere"):
            read(model, LONG, chunk_tokens=30)
        handle.remove()
        assert hooks(model) == before
    read(model, LONG, chunk_tokens=30)
    assert hooks(model) == before
    with torch.no_grad():
        assert model(input_ids=torch.tensor([tokens(9)])).logits.shape == (1, 9, VOCABULARY)


def test_a_pass_of_another_thread_runs_to_its_end(model: Any) -> None:
    ids = torch.tensor([tokens(9)])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    found: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.append(model(input_ids=ids).logits)

    with block_outputs(adapter_for(model.config), model, SITE, stop=True) as outputs:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert outputs == []
    assert torch.equal(found[0], expected)


def test_the_context_stops_after_its_first_pass_only_where_asked(model: Any) -> None:
    adapter, ids = adapter_for(model.config), torch.tensor([tokens(9)])
    with torch.no_grad():
        with block_outputs(adapter, model, SITE) as outputs:
            model(input_ids=ids)
            model(input_ids=ids)
        assert len(outputs) == 2
        with block_outputs(adapter, model, SITE, stop=True) as outputs:
            model(input_ids=ids)
            pytest.fail("the pass came back")
    assert len(outputs) == 1


@pytest.mark.parametrize("how", ["dispatched", "offloaded"])
def test_models_with_accelerates_hooks_are_captured(model: Any, how: str) -> None:
    from accelerate import cpu_offload, dispatch_model

    expected = read(model, LONG)
    if how == "dispatched":
        model = dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    else:
        model = cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(p.is_meta for p in model.parameters())
    assert model._hf_hook is not None
    before = hooks(model)
    for chunk in (30, 2048):
        close(read(model, LONG, chunk_tokens=chunk), expected)
    assert hooks(model) == before
    assert all(p.is_meta is (how == "offloaded") for p in model.parameters())


# -- steered models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["generated", "all", [-2], [40]])
def test_a_steered_model_is_read_whole(model: Any, positions: Any) -> None:
    """Its positions count from the prompt's end, which a part of the document does not have."""
    sequences = [(tokens(50), [0, 20, 40, 49]), (tokens(44, 1), [3, 42])]
    vector = SteeringVector(torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0)), Site(1))
    plain = read(model, sequences)
    with vector.apply(model, 4.0, positions=positions), torch.no_grad():
        expected = [
            model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0, list(chosen)]
            for ids, chosen in sequences
        ]
        got = read(model, sequences, chunk_tokens=10)
    close(got, torch.cat(expected))
    assert float((got - plain).abs().max()) > 0.1
    with passes(adapter_for(model.config), model) as seen:
        close(read(model, sequences, chunk_tokens=10), plain)
    assert max(columns for _, columns in seen) == 10


# -- memory --------------------------------------------------------------------------------------------------


def test_capture_goes_on_with_smaller_batches(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    expected = read(model, LONG)
    before, done = hooks(model), []

    def scarce(_: Any, args: tuple[Any, ...]) -> None:
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("not enough")

    handle = adapter_for(model.config).block_list(model)[1].register_forward_pre_hook(scarce)
    with caplog.at_level(logging.WARNING, "nla_hub"):
        close(read(model, LONG, batch_size=64, progress=done.append), expected)
    handle.remove()
    assert hooks(model) == before
    assert sum(done) == sum(1 for _, chosen in LONG if chosen)
    assert [r.getMessage() for r in caplog.records] == ["out of memory: going on with 2 rows at a time"]
