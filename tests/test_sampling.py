"""A row's randomness comes from its seed and key alone, and draws follow the distribution."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nla_hub.sampling import RowKey, choose, document_hash, row_uniforms, uniforms, vector_hash

keys = st.builds(RowKey, st.text(max_size=20), st.integers(-1, 10_000), st.integers(0, 50))


@given(st.integers(0, 2**63), keys, st.integers(1, 40), st.integers(1, 40))
def test_a_longer_stream_starts_with_the_shorter_one(seed: int, key: RowKey, n: int, more: int) -> None:
    long = row_uniforms(seed, key, n + more)
    assert np.array_equal(row_uniforms(seed, key, n), long[:n])
    assert long.dtype == np.float64
    assert ((long >= 0) & (long < 1)).all()


@given(st.lists(keys, min_size=2, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_a_stream_does_not_depend_on_other_rows_or_their_order(rows: list[RowKey], random: object) -> None:
    expected = {key: row_uniforms(3, key, 5) for key in rows}
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for key, got in zip(shuffled, uniforms(3, shuffled, 5), strict=True):
        assert np.array_equal(got.numpy(), expected[key])


def test_streams_of_different_seeds_keys_positions_and_samples_differ() -> None:
    base = RowKey("doc", 3, 0)
    others = [(0, RowKey("doc", 3, 1)), (0, RowKey("doc", 4, 0)), (0, RowKey("dog", 3, 0)), (1, base), (-1, base)]
    others += [(0, RowKey("doc\x1f3", 0, 0)), (0, RowKey("do", 3, 0)), (0, RowKey("doc", 30, 0))]
    first = row_uniforms(0, base, 4)
    for seed, key in others:
        assert not np.array_equal(row_uniforms(seed, key, 4), first)


def test_streams_are_pinned_for_good() -> None:
    """A change here changes every sampled explanation that anybody has published: it needs a new major version."""
    assert row_uniforms(0, RowKey("doc", 3, 1), 3).tolist() == [
        0.8979157029960626,
        0.6963703567985795,
        0.9931878480070123,
    ]


def test_streams_are_uniform_across_keys() -> None:
    """Chi-square over 20 bins of the first draw of 4000 keys: nineteen degrees, 0.999 quantile 43.8."""
    first = np.array([row_uniforms(9, RowKey("x", i), 1)[0] for i in range(4000)])
    counts, _ = np.histogram(first, bins=20, range=(0, 1))
    assert float(((counts - 200) ** 2 / 200).sum()) < 43.8
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.06


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    """Chi-square on a vocabulary of six: five degrees, 0.999 quantile 20.5."""
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, -2.0, 0.0])
    n = 6000
    draws = torch.tensor([row_uniforms(1, RowKey("x", i), 1)[0] for i in range(n)])
    tokens, logp = choose(logits.expand(n, -1), draws, temperature)
    exact = (logits.double() / temperature).softmax(-1)
    observed = torch.bincount(tokens, minlength=6).double()
    assert float(((observed - n * exact) ** 2 / (n * exact)).sum()) < 20.5
    assert torch.allclose(logp.double(), exact.log()[tokens], atol=1e-6)


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12), st.floats(0, 1, exclude_max=True))
def test_a_draw_inverts_the_cumulative_distribution(values: list[float], u: float) -> None:
    logits = torch.tensor([values])
    token = int(choose(logits, torch.tensor([u], dtype=torch.float64), 1.0)[0])
    cdf = logits.double().softmax(-1)[0].cumsum(-1)
    assert float(cdf[token]) >= u - 1e-6
    assert token == 0 or float(cdf[token - 1]) <= u + 1e-6


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    for u in (0.0, 0.499999, 0.5, 0.999999, 1 - 2**-53):
        token, _ = choose(logits, torch.tensor([u], dtype=torch.float64), 1.0)
        assert int(token) in (1, 3)


def test_greedy_takes_the_best_and_its_log_probability_is_at_temperature_1() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, -1.0]])
    tokens, logp = choose(logits, None, 0.1)
    assert tokens.tolist() == [1, 0]
    assert torch.allclose(logp, logits.log_softmax(-1)[[0, 1], [1, 0]])


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[0.0, 30.0, 10.0]])
    tokens, logp = choose(logits, torch.tensor([0.9], dtype=torch.float64), temperature)
    assert tokens.tolist() == [1]
    assert logp.tolist() == [0]


def test_half_precision_logits_are_widened_first() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    draws = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, logp = choose(logits, draws, 1.0)
    assert torch.equal(tokens, choose(logits.float(), draws, 1.0)[0])
    assert logp.dtype == torch.float32


def test_a_documents_hash_is_the_sha256_of_its_text() -> None:
    assert document_hash("the cat") == hashlib.sha256(b"the cat").hexdigest()
    assert document_hash("é") == hashlib.sha256("é".encode()).hexdigest()


def test_equal_conversations_have_equal_hashes_whatever_the_order_of_keys() -> None:
    a = [{"role": "user", "content": "x"}]
    b = [{"content": "x", "role": "user"}]
    assert document_hash(a) == document_hash(b) != document_hash([{"role": "user", "content": "y"}])


def test_a_vectors_hash_is_that_of_its_float32_bytes() -> None:
    row = torch.tensor([1.0, -2.5])
    expected = hashlib.sha256(np.array([1.0, -2.5], dtype="<f4").tobytes()).hexdigest()
    assert (
        vector_hash(row) == vector_hash(row.double()) == vector_hash(torch.stack([row, row], dim=1)[:, 0]) == expected
    )
    assert vector_hash(-row) != expected


def test_samples_of_a_row_differ_only_in_their_number() -> None:
    key = RowKey("doc", 3)
    assert key.with_sample(2) == RowKey("doc", 3, 2)
    assert RowKey("doc").position == -1
