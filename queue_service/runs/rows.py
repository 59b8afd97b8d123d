"""How the rows of statements about runs are read."""

from __future__ import annotations

import msgspec

from queue_service.codec import loads
from queue_service.db.query import Row, Rows
from queue_service.runs.model import Attempt, Progress, Run, RunState, json_or_none

_decode_attempts = msgspec.json.Decoder(tuple[Attempt, ...]).decode
_decode_progress = msgspec.json.Decoder(Progress).decode


def read_claimed(rows: Rows) -> list[tuple[Run, int]]:
    """Runs as a claim returns them, in the order of execution, each with the id of its lease."""
    running = RunState.RUNNING
    runs = [
        (
            Run(
                id=row[0], queue=row[1], task=row[2], state=running, payload=loads(row[3]), attempt=row[4],
                failures=row[5], losses=row[6], priority=row[7], created_at=row[8], run_at=row[9], expires_at=row[10],
                max_attempts=row[11], retry_delay=row[12], timeout=row[13], singleton_key=row[14],
                ordering_key=row[15], organization_id=row[16], metadata=json_or_none(row[17]),
            ),
            row[18],
        )
        for row in rows
    ]  # fmt: skip
    runs.sort(key=lambda claimed: (-claimed[0].priority, claimed[0].run_at, claimed[0].id))
    return runs


def read_runs(rows: Rows) -> list[Run]:
    """Runs wherever they are, with all that is kept of them."""
    return [
        Run(
            id=row[0], queue=row[1], task=row[2], state=RunState(row[3]), payload=loads(row[4]), attempt=row[5],
            failures=row[6], losses=row[7], priority=row[8], created_at=row[9], run_at=row[10], expires_at=row[11],
            claimed_at=row[12], finished_at=row[13], worker_id=row[14], max_attempts=row[15], retry_delay=row[16],
            timeout=row[17], singleton_key=row[18], ordering_key=row[19], organization_id=row[20],
            metadata=json_or_none(row[21]), result=json_or_none(row[22]), error=json_or_none(row[23]),
            cancel_requested=row[24], attempts=_attempts(row),
            reported=None if row[26] is None else _decode_progress(row[26]),
        )
        for row in rows
    ]  # fmt: skip


def _attempts(row: Row) -> tuple[Attempt, ...]:
    """Those kept with the run, and the one that its own columns describe. There is none where a queued run waits, or ended:
    then the error is that of an attempt before."""
    kept = () if row[25] is None else _decode_attempts(row[25])
    if row[12] is None:
        return kept
    error = None if row[3] in {RunState.RUNNING, RunState.SUCCEEDED} else json_or_none(row[23])
    return (*kept, Attempt(attempt=row[5], worker_id=row[14], claimed_at=row[12], ended_at=row[13], error=error))
