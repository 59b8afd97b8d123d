"""How long a run waits after a failure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_service.backoff import CAP, exponential


@pytest.mark.parametrize(
    ("failures", "seconds"), [(0, 1), (1, 2), (2, 4), (3, 8), (7, 128), (8, 256), (9, 300), (10, 300), (16, 300)]
)
def test_the_wait_doubles_with_each_failure_up_to_the_cap(failures: int, seconds: float) -> None:
    assert exponential(failures, jitter=lambda: 0.0) == seconds


@pytest.mark.parametrize("failures", [17, 1_000, 10_000, 2**31 - 1, 10**30])
def test_any_number_of_failures_waits_the_cap(failures: int) -> None:
    assert exponential(failures, jitter=lambda: 0.0) == CAP == 300.0


def test_jitter_shortens_by_up_to_a_fifth() -> None:
    assert exponential(3, jitter=lambda: 1.0) == pytest.approx(6.4)
    assert exponential(3, jitter=lambda: 0.5) == pytest.approx(7.2)


@given(st.integers(0, 10**6))
def test_a_wait_is_never_longer_than_the_plain_one_nor_shorter_than_four_fifths_of_it(failures: int) -> None:
    plain = exponential(failures, jitter=lambda: 0.0)
    assert 0.8 * plain <= exponential(failures) <= plain


def test_runs_that_failed_together_come_back_apart() -> None:
    assert len({exponential(5) for _ in range(20)}) > 1
