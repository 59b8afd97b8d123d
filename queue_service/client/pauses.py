"""How long to wait before the next try: exponential with full jitter, so that clients that lost the same gateway come back
apart."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, but for `heartbeat_grace`: how many heartbeats may fail to come."""

    first_pause: float
    longest_pause: float
    heartbeat_grace: float
    answer_timeout: float


class Pauses:
    """The pauses after failures in a row."""

    def __init__(self, timing: Timing, *, jitter: Callable[[], float] = random.random) -> None:
        self._timing = timing
        self._jitter = jitter
        self._failures = 0

    def next(self, *, floor: float = 0.0) -> float:
        """The floor is what the other side asked for; the jitter comes on top, or all would come back at the floor."""
        # The exponent is bounded before the power is taken: 2**10_000 is no float.
        widest = min(self._timing.longest_pause, self._timing.first_pause * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return floor + widest * self._jitter()

    def reset(self) -> None:
        self._failures = 0
