"""How long a run waits after a failure."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_service.backoff import BASE, CAP, Jitter, exponential, fixed, linear

GROWTHS = [exponential, linear, fixed]
FAILURES = st.integers(0, 10**12) | st.integers(0, 70)
# What durations may be, in seconds.
SECONDS = st.floats(0, 3_153_600_000, allow_nan=False)


def plainly() -> float:
    return 0.0


def wait(growth: Any, failures: int, base: float = BASE, cap: float = CAP, jitter: Jitter = plainly) -> float:
    seconds = growth(failures, base=base, cap=cap, jitter=jitter)
    assert isinstance(seconds, float)
    return seconds


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


@pytest.mark.parametrize(
    ("growth", "waits"),
    [(exponential, [10, 20, 40, 80, 100, 100]), (linear, [10, 20, 30, 40, 50, 60]), (fixed, [10] * 6)],
)
def test_each_growth_begins_at_the_base_and_ends_at_the_cap(growth: Any, waits: list[float]) -> None:
    assert [wait(growth, failures, base=10, cap=100) for failures in range(1, 7)] == waits
    assert wait(growth, 10**6, base=10, cap=100) == waits[-1] if growth is fixed else 100


@pytest.mark.parametrize("growth", GROWTHS)
@given(FAILURES, SECONDS, SECONDS)
def test_no_wait_is_negative_or_no_number_or_over_its_cap(growth: Any, failures: int, base: float, cap: float) -> None:
    plain = wait(growth, failures, base, cap)
    assert math.isfinite(plain)
    assert 0.0 <= plain <= cap
    assert 0.8 * plain <= wait(growth, failures, base, cap, random.random) <= plain


@pytest.mark.parametrize("growth", GROWTHS)
@given(FAILURES, st.integers(0, 100), SECONDS, SECONDS)
def test_without_jitter_no_wait_is_shorter_than_the_one_before(
    growth: Any, failures: int, more: int, base: float, cap: float
) -> None:
    assert wait(growth, failures, base, cap) <= wait(growth, failures + more, base, cap)
