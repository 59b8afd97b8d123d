"""How long a run waits after a failure: pure arithmetic, in seconds, never negative and never above `cap`."""

from __future__ import annotations

import random
from collections.abc import Callable

BASE = 2.0
CAP = 300.0

Jitter = Callable[[], float]


def exponential(failures: int, *, base: float = BASE, cap: float = CAP, jitter: Jitter = random.random) -> float:
    """`base` after the first failure, twice as long after each further one."""
    # The exponent is bounded before the power is taken: 2**10_000 is no float.
    return _bounded(base * 2.0 ** max(-1, min(failures - 1, 64)), cap, jitter)


def linear(failures: int, *, base: float = BASE, cap: float = CAP, jitter: Jitter = random.random) -> float:
    """`base` after the first failure, longer by as much after each further one."""
    return _bounded(base * min(failures, 2**64), cap, jitter)


def fixed(failures: int, *, base: float = BASE, cap: float = CAP, jitter: Jitter = random.random) -> float:  # noqa: ARG001
    """`base` after each failure."""
    return _bounded(base, cap, jitter)


def _bounded(seconds: float, cap: float, jitter: Jitter) -> float:
    """Shortened by up to a fifth, so that runs that failed together come back apart."""
    return min(cap, seconds) * (1.0 - 0.2 * jitter())
