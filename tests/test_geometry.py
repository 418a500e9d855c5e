"""The maths, against numpy in float64 and against its own identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from nla_hub.errors import InputError, VectorError
from nla_hub.geometry import (
    FVE,
    Reference,
    as_vectors,
    bootstrap_interval,
    cosine,
    direction_mse,
    fve_value,
    norms,
    rescale,
    unit,
)
from nla_hub.results import Explanation, Explanations, Scores

finite = st.floats(-1e6, 1e6, allow_nan=False, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)
pairs = st.integers(2, 8).flatmap(
    lambda d: st.tuples(arrays(np.float32, (3, d), elements=finite), arrays(np.float32, (3, d), elements=finite))
)


def numpy_reference(rows: np.ndarray) -> tuple[float, float]:
    """Both denominators, from their definitions."""
    wide = rows.astype(np.float64)
    u = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    mean = u.mean(axis=0)
    raw = np.mean([np.sum((x - mean) ** 2) for x in u])
    normed = np.mean([np.sum((x - mean / np.linalg.norm(mean)) ** 2) for x in u])
    return float(raw), float(normed)


def rows(n: int = 150, d: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * 3 + torch.randn(d, generator=generator)


@given(pairs)
def test_direction_mse_is_the_elementwise_mse_of_vectors_scaled_to_sqrt_d(
    values: tuple[np.ndarray, np.ndarray],
) -> None:
    a, b = (v.astype(np.float64) for v in values)
    assume(bool((np.linalg.norm(a, axis=1) > 0).all() and (np.linalg.norm(b, axis=1) > 0).all()))
    scale = math.sqrt(a.shape[1])
    scaled = [scale * v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b)]
    expected = ((scaled[0] - scaled[1]) ** 2).mean(axis=1)
    got = direction_mse(torch.from_numpy(values[0]), torch.from_numpy(values[1])).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-9)
    np.testing.assert_allclose(got, 2 * (1 - cosine(*map(torch.from_numpy, values)).numpy()), atol=1e-12)


@given(pairs, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_only_directions_count(values: tuple[np.ndarray, np.ndarray], p: float, q: float) -> None:
    a, b = map(torch.from_numpy, values)
    torch.testing.assert_close(cosine(a.double() * p, b.double() * q), cosine(a, b), atol=1e-9, rtol=0)
    assert bool((cosine(a, b).abs() <= 1).all())


def test_equal_opposite_and_orthogonal_vectors_have_their_scores() -> None:
    a = torch.tensor([[3.0, 0.0]] * 3)
    b = torch.tensor([[5.0, 0.0], [-2.0, 0.0], [0.0, 7.0]])
    assert cosine(a, b).tolist() == [1, -1, 0]
    assert direction_mse(a, b).tolist() == [0, 4, 2]
    assert direction_mse(a, torch.zeros(3, 2)).tolist() == [2, 2, 2]


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-25, 1e-19, 1e19, 1e25, 2e38])
def test_the_ends_of_float32_lose_no_direction(size: float) -> None:
    row = torch.tensor([[1.0, -1.0, 0.0, 1.0]]) * size
    assert as_vectors(row) is not None
    assert float(cosine(row, torch.tensor([[1.0, -1.0, 0.0, 1.0]]))) == pytest.approx(1)
    assert torch.allclose(rescale(row, 6.0), torch.tensor([[1.0, -1.0, 0.0, 1.0]]) * 6 / math.sqrt(3))
    assert float(unit(row).norm()) == pytest.approx(1)
    if size < 1e38:
        assert float(norms(row)) == pytest.approx(size * math.sqrt(3), rel=0.2)


@given(st.floats(0.5, 1e5))
def test_rescaling_gives_the_norm_and_none_leaves_the_vector(scale: float) -> None:
    got = rescale(rows(20), scale)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double().norm(dim=-1), torch.full((20,), scale, dtype=torch.float64), rtol=1e-6)
    assert torch.equal(rescale(rows(20), None), rows(20))


@pytest.mark.parametrize("baseline", ["raw_variance", "mean_norm"])
def test_fve_and_its_denominators_equal_a_numpy_computation(baseline: str) -> None:
    vectors, predictions = rows(seed=1), rows(seed=1) + 2 * rows(seed=2)
    reference = Reference.measure(vectors, "numbers")
    expected = dict(zip(("raw_variance", "mean_norm"), numpy_reference(vectors.numpy()), strict=True))[baseline]
    assert reference.denominator(baseline) == pytest.approx(expected, rel=1e-9)
    mse = direction_mse(predictions, vectors)
    scores = Scores(tuple(cosine(predictions, vectors).tolist()), tuple(mse.tolist()), reference)
    got = scores.fve(baseline)
    assert got.value == pytest.approx(1 - float(mse.numpy().mean()) / expected, rel=1e-9)
    name = {"raw_variance": "raw variance", "mean_norm": "mean-norm"}[baseline]
    assert str(got) == f"FVE ({name}, numbers, n=150): {got.value:.3f}"


def test_the_two_baselines_differ_and_mean_norm_is_the_larger() -> None:
    reference = Reference.measure(rows(), "x")
    assert reference.mean_norm > reference.raw_variance > 0


def test_predicting_the_mean_explains_nothing_and_the_vector_itself_everything() -> None:
    vectors = rows()
    reference = Reference.measure(vectors, "x")
    mean = unit(vectors).mean(dim=0)
    residual = (unit(vectors) - mean).square().sum(-1)
    assert fve_value(residual, reference.raw_variance) == pytest.approx(0)
    assert fve_value(direction_mse(mean.expand_as(vectors), vectors), reference.mean_norm) == pytest.approx(0)
    assert fve_value(direction_mse(vectors, vectors), reference.raw_variance) == pytest.approx(1)


def test_the_norm_quantiles_are_those_of_the_raw_norms() -> None:
    reference = Reference.measure(rows(1000), "x")
    expected = np.quantile(np.linalg.norm(rows(1000).numpy().astype(np.float64), axis=1), [0.005, 0.995])
    assert (reference.norm_p0_5, reference.norm_p99_5) == pytest.approx(tuple(expected))


def test_rows_without_a_usable_explanation_count_with_mse_2_and_cosine_0() -> None:
    reference = Reference("x", 10, 0.8, 0.9)
    scores = Scores((0.9, None, None), (0.2, None, None), reference)
    assert scores.mse_counted().tolist() == [0.2, 2, 2]
    assert scores.fve().value == pytest.approx(1 - (0.2 + 2 + 2) / 3 / 0.8)
    assert scores.mean_cosine() == pytest.approx(0.3)
    assert scores.fve().n == 3


def test_without_a_reference_fewer_than_100_rows_are_not_measured() -> None:
    in_sample = Reference.measure(rows(), "in-sample")
    few = Scores((0.9,) * 99, (0.2,) * 99, None, in_sample)
    assert few.fve().value is None
    assert str(few.fve()) == "FVE (raw variance): not measured"
    enough = Scores((0.9,) * 100, (0.2,) * 100, None, in_sample)
    assert enough.fve().value == pytest.approx(1 - 0.2 / in_sample.raw_variance)
    assert str(enough.fve()).startswith("FVE (raw variance, in-sample, n=100): ")


def test_a_stored_reference_comes_before_the_rows_themselves() -> None:
    scores = Scores((0.9,) * 100, (0.2,) * 100, Reference("stored", 5, 0.5, 0.6), Reference("in-sample", 100, 0.9, 1.0))
    assert scores.fve().dataset == "stored"
    assert scores.fve().value == pytest.approx(0.6)


def test_identical_vectors_have_no_variance_to_explain() -> None:
    same = Reference.measure(torch.ones(120, 4), "in-sample")
    assert Scores((1.0,) * 120, (0.0,) * 120, None, same).fve().value is None
    opposite = Reference.measure(torch.cat([torch.ones(60, 4), -torch.ones(60, 4)]), "in-sample")
    assert Scores((1.0,) * 120, (0.0,) * 120, None, opposite).fve("mean_norm").value is None


def test_no_rows_are_not_measured() -> None:
    empty = Scores((), (), Reference("x", 10, 0.8, 0.9))
    assert empty.fve().value is None
    assert empty.mean_cosine() is None
    assert Explanations(()).fve().value is None


def test_unscored_rows_are_not_measured() -> None:
    unscored = Explanations((Explanation("a", "a", "ok", 1.0),) * 200, Reference("x", 10, 0.8, 0.9))
    assert unscored.fve().value is None


def test_bad_baselines_and_denominators_are_refused() -> None:
    with pytest.raises(InputError, match="Unknown FVE baseline"):
        Reference("x", 10, 0.8, 0.9).denominator("variance")
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="must be positive"):
            fve_value([0.1], bad)
    with pytest.raises(InputError, match="at least two"):
        Reference.measure(rows(1), "x")


def test_the_bootstrap_covers_the_mean_and_narrows_with_n() -> None:
    """Coverage of a 95 % interval over 200 samples of n = 60: binomial, below 0.89 with probability < 1e-3."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.normal(0.3, 1.0, 60), seed=seed, resamples=200)
        covered += low <= 0.3 <= high
    assert 178 <= covered <= 199
    intervals = [bootstrap_interval(rng.normal(0, 1, n), resamples=300) for n in (50, 5000)]
    wide, narrow = (high - low for low, high in intervals)
    assert narrow < wide / 4
    data = rng.normal(0, 1, 80)
    assert bootstrap_interval(data, seed=3) == bootstrap_interval(data, seed=3)
    low, high = bootstrap_interval(data)
    assert low < data.mean() < high
    with pytest.raises(InputError, match="no rows"):
        bootstrap_interval([])


def test_an_interval_is_printed_with_the_figure() -> None:
    scores = Scores((0.9, 0.8), (0.2, 0.4), Reference("x", 10, 0.8, 0.9))
    fve = scores.fve(interval=True)
    assert fve.low is not None
    assert fve.high is not None
    assert fve.low <= fve.value <= fve.high
    assert str(FVE(0.5, "mean_norm", "x", 7, 0.4, 0.6)) == "FVE (mean-norm, x, n=7): 0.500 [0.400, 0.600]"


# -- what counts as vectors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(4),
        torch.ones(1, 4, dtype=torch.float16),
        torch.ones(1, 4, dtype=torch.bfloat16),
        np.ones((1, 4)),
        np.ones(4, dtype=np.float32),
        [1.0, 1.0, 1.0, 1.0],
        [[1.0, 1.0, 1.0, 1.0]],
        [torch.ones(4)],
        [torch.ones(4, dtype=torch.bfloat16)],
        [torch.ones(4, requires_grad=True)],
        torch.ones(1, 1, 4),
        torch.ones(4, requires_grad=True),
    ],
)
def test_every_kind_of_array_becomes_float32_rows(value: object) -> None:
    got = as_vectors(value, d=4)
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.ones(1, 4))
    assert not got.requires_grad


def test_read_only_arrays_are_taken_without_a_warning() -> None:
    array = np.ones((2, 4), dtype=np.float32)
    array.flags.writeable = False
    assert torch.equal(as_vectors(array, d=4), torch.ones(2, 4))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 4, dtype=torch.int64), r"dtype int64, expected float32"),
        ([1, 2, 3, 4], "floating point"),
        (torch.ones(4, dtype=torch.bool), "dtype bool"),
        (torch.ones(4, dtype=torch.complex64), "dtype complex64"),
        (torch.ones(2, 5), r"shape \(2, 5\), expected \[..., 4\]"),
        (torch.tensor(1.0), "do not have the width"),
        (torch.ones(4, 0), "do not have the width"),
        ([], "do not have the width"),
        ("the cat", "not numbers"),
        (None, "not numbers"),
        ([[1.0, 2.0], [3.0]], "not numbers"),
        ([{"a": 1}], "not numbers"),
    ],
)
def test_what_is_no_vector_is_a_typed_error(value: object, message: str) -> None:
    with pytest.raises(VectorError, match=message):
        as_vectors(value, d=4)
    if message != r"shape \(2, 5\), expected \[..., 4\]":
        with pytest.raises(VectorError):
            as_vectors(value)


def test_rows_without_direction_are_listed_with_their_reason() -> None:
    values = torch.ones(6, 4)
    values[1, 2], values[3], values[4, 0] = math.nan, 0.0, -math.inf
    with pytest.raises(VectorError, match="3 of 6 vectors have no direction") as caught:
        as_vectors(values)
    assert caught.value.faults == ("row 1: NaN", "row 3: zero", "row 4: infinite")
    with pytest.raises(VectorError, match="and 10 more"):
        as_vectors(torch.zeros(20, 4))
    assert torch.equal(as_vectors(torch.zeros(2, 4), allow_zero=True), torch.zeros(2, 4))


def test_numbers_that_leave_float32_are_refused() -> None:
    with pytest.raises(VectorError, match="row 0: infinite"):
        as_vectors(np.full((1, 4), 1e300))
    with pytest.raises(VectorError, match="row 0: zero"):
        as_vectors(np.full((1, 4), 1e-300))
