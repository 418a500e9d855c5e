"""Bars of a batch job's size: memory that does not grow with the rows, and little time besides the computing."""

from __future__ import annotations

import pytest
from explain_scale import overhead, peaks

ROWS = 100_000
GROWTH = 1.3
OVERHEAD = 1.10


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", [1, 2])
def test_memory_does_not_grow_with_the_rows(workers: int) -> None:
    few, many = peaks(ROWS // 10, workers), peaks(ROWS, workers)
    print(few, many)
    assert many.rows > 9 * few.rows
    assert many.job <= GROWTH * few.job
    assert many.worker <= GROWTH * few.worker


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_job_costs_little_more_than_its_calls() -> None:
    found = overhead(5_000)
    print(found, found.ratio)
    assert found.ratio <= OVERHEAD
