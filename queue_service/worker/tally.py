"""What a worker did, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from queue_service.runs.model import Ending, Return, RunState

Settlement = Ending | Return


@dataclass(slots=True)
class Tally:
    """What a worker did. `returned` counts retries, snoozes and runs handed back; `lost` those taken away from it."""

    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    returned: int = 0
    lost: int = 0

    def add(self, outcomes: Sequence[Settlement]) -> None:
        states = [None if type(outcome) is Return else outcome.state for outcome in outcomes]  # type: ignore[union-attr]
        # To count by hash would take an Enum longer than the rest of this.
        succeeded = states.count(RunState.SUCCEEDED)
        self.succeeded += succeeded
        if succeeded == len(states):
            return
        names = Counter(state.value if state else "returned" for state in states if state is not RunState.SUCCEEDED)
        for name, count in names.items():
            setattr(self, name, getattr(self, name) + count)
