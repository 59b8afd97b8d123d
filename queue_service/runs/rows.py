"""How the rows of statements about runs are read: one that cannot be read as it is stored is a run that says so, and leaves
the others alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from queue_service import codec
from queue_service.codec import loads
from queue_service.db.query import Row, Rows
from queue_service.db.rows import flaw_of
from queue_service.exceptions import message
from queue_service.runs.model import Attempt, Progress, Run, RunState

T = TypeVar("T")

_decode_attempts = msgspec.json.Decoder(tuple[Attempt, ...]).decode
_decode_progress = msgspec.json.Decoder(Progress).decode


def read_claimed(rows: Rows) -> list[tuple[Run, int]]:
    """Runs as a claim returns them, in the order of execution, each with the id of its lease."""
    try:
        # Rows with flaws are of a class of their own.
        claimed = _claimed_together(rows) if type(rows) is list else _claimed_singly(rows)
    except Exception:  # noqa: BLE001 - whatever is wrong with one of them is found when each is read by itself
        claimed = _claimed_singly(rows)
    claimed.sort(key=lambda each: (-each[0].priority, each[0].run_at, each[0].id))
    return claimed


def read_runs(rows: Rows) -> list[Run]:
    """Runs wherever they are, with all that is kept of them."""
    return [_run(row) for row in rows]


def _claimed_together(rows: Rows) -> list[tuple[Run, int]]:
    running = RunState.RUNNING
    return [
        (
            Run(
                id=row[0], queue=row[1], task=row[2], state=running, payload=loads(row[3]), attempt=row[4],
                failures=row[5], losses=row[6], priority=row[7], created_at=row[8], run_at=row[9], expires_at=row[10],
                max_attempts=row[11], retry_delay=row[12], timeout=row[13], singleton_key=row[14],
                ordering_key=row[15], organization_id=row[16], metadata=None if row[17] is None else loads(row[17]),
            ),
            row[18],
        )
        for row in rows
    ]  # fmt: skip


def _claimed_singly(rows: Rows) -> list[tuple[Run, int]]:
    """As `_claimed_together`, slower: each says what of it cannot be read."""
    claimed: list[tuple[Run, int]] = []
    for row in rows:
        reading = _Reading(row)
        run = Run(
            id=row[0], queue=row[1], task=row[2], state=RunState.RUNNING, payload=reading.payload(row[3]), attempt=row[4],
            failures=row[5], losses=row[6], priority=row[7], created_at=row[8], run_at=row[9], expires_at=row[10],
            max_attempts=row[11], retry_delay=row[12], timeout=row[13], singleton_key=row[14],
            ordering_key=row[15], organization_id=row[16], metadata=reading.json("metadata", row[17]),
            unreadable=reading.flaws,
        )  # fmt: skip
        claimed.append((run, row[18]))
    return claimed


def _run(row: Row) -> Run:
    reading = _Reading(row)
    return Run(
        id=row[0], queue=row[1], task=row[2], state=RunState(row[3]), payload=reading.payload(row[4]), attempt=row[5],
        failures=row[6], losses=row[7], priority=row[8], created_at=row[9], run_at=row[10], expires_at=row[11],
        claimed_at=row[12], finished_at=row[13], worker_id=row[14], max_attempts=row[15], retry_delay=row[16],
        timeout=row[17], singleton_key=row[18], ordering_key=row[19], organization_id=row[20],
        metadata=reading.json("metadata", row[21]), result=reading.json("result", row[22]),
        error=reading.json("error", row[23]), cancel_requested=row[24], attempts=_attempts(row, reading),
        reported=reading.decoded("progress", row[26], _decode_progress), unreadable=reading.flaws,
    )  # fmt: skip


def _attempts(row: Row, reading: _Reading) -> tuple[Attempt, ...]:
    """Those kept with the run, and the one that its own columns describe. There is none where a queued run waits, or ended:
    then the error is that of an attempt before."""
    kept = reading.decoded("attempts", row[25], _decode_attempts) or ()
    if row[12] is None:
        return kept
    error = None if row[3] in {RunState.RUNNING, RunState.SUCCEEDED} else codec.read(row[23]).value
    return (*kept, Attempt(attempt=row[5], worker_id=row[14], claimed_at=row[12], ended_at=row[13], error=error))


class _Reading:
    """Reads the JSON of one row, and collects what is wrong with the row."""

    def __init__(self, row: Row) -> None:
        flaw = flaw_of(row)
        self._flaws = [] if flaw is None else [flaw]

    @property
    def flaws(self) -> str | None:
        return "; ".join(self._flaws) or None

    def payload(self, text: str | None) -> dict[str, Any]:
        """What a handler is called with: an object, and nothing else."""
        value, flaw = codec.read_object(text) if text is not None else ({}, "its claims cannot be counted any more")
        self._note("payload", flaw)
        payload: dict[str, Any] = value
        return payload

    def json(self, name: str, text: str | None) -> Any:
        value, flaw = codec.read(text)
        self._note(name, flaw)
        return value

    def decoded(self, name: str, text: str | None, decode: Callable[[str], T]) -> T | None:
        if text is None:
            return None
        try:
            return decode(text)
        except Exception as refused:  # noqa: BLE001 - what is stored may be anything
            self._note(name, message(refused))
            return None

    def _note(self, name: str, flaw: str | None) -> None:
        if flaw is not None:
            self._flaws.append(f"{name}: {flaw}")
