"""How often a delivery was tried: claims, but those that its renderer put off, which are bounded by their time instead.

Both numbers are in the metadata of the run, where only the holder of its claim writes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import msgspec

from queue_service.runs.model import Run

MAX_ATTEMPTS = 30
# Between two tries where nobody is connected, in seconds; and what a snooze counts for at least.
RETRY_DELAY = 1.0


@dataclass(frozen=True, slots=True)
class Tries:
    """`attempt` is the claim that goes on, `uncounted` how many of the claims before it are no tries, and `snoozed` for how
    many seconds the delivery was put off in all."""

    attempt: int
    uncounted: int
    snoozed: float

    @classmethod
    def of(cls, run: Run) -> Self:
        """What the run says; what is no number there counts for nothing."""
        stored = run.metadata or {}
        return cls(
            run.attempt,
            int(min(run.attempt - 1, _number(stored.get("uncounted_attempts")))),
            _number(stored.get("snoozed_seconds")),
        )

    @property
    def is_last(self) -> bool:
        """Whether no other process gets to try."""
        return self.count >= MAX_ATTEMPTS

    @property
    def count(self) -> int:
        """The one that goes on among them."""
        return self.attempt - self.uncounted

    def snoozed_for(self, seconds: float) -> Tries:
        """With this claim, which was put off for so long."""
        return Tries(self.attempt, self.uncounted + 1, self.snoozed + max(seconds, RETRY_DELAY))

    def fresh(self) -> Tries:
        """For whoever retries the run by hand: as if it had not been tried."""
        return Tries(self.attempt, self.attempt, 0.0)

    def metadata(self, run: Run) -> str:
        """That of the run with these numbers, as JSON text."""
        numbers = {"uncounted_attempts": self.uncounted, "snoozed_seconds": self.snoozed}
        return msgspec.json.encode({**(run.metadata or {}), **numbers}).decode()


def _number(stored: Any) -> float:
    return max(0.0, stored) if isinstance(stored, (int, float)) and not isinstance(stored, bool) else 0.0
