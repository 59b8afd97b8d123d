"""How long to wait after a failure, in seconds: of a run (pure functions, never negative and never above `cap`), and of
whatever is tried again and again until it works (`Pauses`)."""

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


def spread() -> float:
    """A factor from 0.5 to 1.5, for those that must not all come back at the same moment."""
    return 0.5 + random.random()  # noqa: S311


class Pauses:
    """The pauses between tries in a row: `first` seconds, then twice as long each time, up to `longest`. `jitter` gives the
    factor by which each is multiplied."""

    def __init__(self, first: float, longest: float, *, jitter: Jitter = lambda: 1.0) -> None:
        self._first = first
        self._longest = longest
        self._jitter = jitter
        # How many pauses there were since the last success.
        self.count = 0

    def next(self, *, floor: float = 0.0) -> float:
        """How long to wait now. `floor` is what the other side asked for: it is added, since with jitter below it all would
        come back at the same moment."""
        # The exponent is bounded before the power is taken: 2**10_000 is no float.
        widest = min(self._longest, self._first * 2.0 ** min(self.count, 32))
        self.count += 1
        return floor + widest * self._jitter()

    def reset(self) -> None:
        """It worked: the next pause is the first one again."""
        self.count = 0
