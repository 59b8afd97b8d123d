"""How long a run waits after a failure: pure arithmetic, in seconds."""

from __future__ import annotations

import random
from collections.abc import Callable

CAP = 300.0


def exponential(failures: int, *, jitter: Callable[[], float] = random.random) -> float:
    """`2^failures` seconds, at most 300, shortened by up to a fifth so that runs that failed together come back apart."""
    # The exponent is bounded before the power is taken: 2**10_000 is no float.
    return min(CAP, 2.0 ** min(failures, 16)) * (1.0 - 0.2 * jitter())
