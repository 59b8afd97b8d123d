"""What becomes of a run when its handler has returned, or raised: a decision without effects, and one for each run.

Nothing that a handler, its result or its retry policy does here keeps its run from an outcome.
"""

from __future__ import annotations

from typing import Any

from queue_service import backoff, codec
from queue_service.errors import ClaimLost, PayloadRefused
from queue_service.logs import get_logger
from queue_service.runs.model import Ending, Return, Run, RunState
from queue_service.tasks import Cancel, Defer, ProcessDied, Retry, RetryLater, Snooze
from queue_service.worker.finisher import Settlement

log = get_logger(__name__)

# What a handler may return that is not its result.
WORDS = (Snooze, Cancel)


class TimedOut(TimeoutError):
    def __init__(self, seconds: float) -> None:
        super().__init__(f"The handler ran longer than its {seconds:g} s.")


def returned(run: Run, value: Any, *, limit: int) -> Settlement:
    """`limit` bounds the result, in bytes."""
    if isinstance(value, WORDS):
        return _as_asked(run, value)
    try:
        return Ending(run.claim, RunState.SUCCEEDED, codec.dumps_result(value, limit=limit))
    except Exception as refused:  # noqa: BLE001 - whatever a result does when it is read, the run gets its ending
        reason = codec.describe(refused) if isinstance(refused, PayloadRefused) else repr(type(refused))
        return Ending(run.claim, RunState.FAILED, error=codec.dumps_error("result_refused", reason))


def raised(run: Run, retry: Retry, error: BaseException, *, alone: bool = True) -> Settlement:
    """Where a run was not `alone` in its call, it may not be the cause: it is tried again whatever the error is."""
    if isinstance(error, ClaimLost) and error.run_id == run.id:
        # Nothing to be written: the finisher will find it lost, too.
        return Return(run.claim)
    delay = _delay(run, retry, error, alone=alone)
    described = _described(error)
    if delay is None:
        return Ending(run.claim, RunState.FAILED, error=described)
    return Return(run.claim, delay=delay, failed=True, error=described)


def cancelled(run: Run, reason: str = "It was cancelled while it ran.") -> Ending:
    return Ending(run.claim, RunState.CANCELLED, error=codec.dumps_error("cancelled", reason))


def interrupted(run: Run) -> Ending:
    message = (
        'Its worker stopped before it ended. Its task says on_lost="fail": it is begun again only if you retry it.'
    )
    return Ending(run.claim, RunState.FAILED, error=codec.dumps_error("interrupted", message))


def _as_asked(run: Run, value: Snooze | Cancel) -> Settlement:
    if isinstance(value, Cancel):
        return cancelled(run, value.reason)
    owner = value.owner if isinstance(value, Defer) else None
    return Return(run.claim, delay=value.delay.total_seconds(), reserved_for=owner)


def _delay(run: Run, retry: Retry, error: BaseException, *, alone: bool) -> float | None:
    """Seconds until the next try; None if there is none."""
    failures = run.failures + 1
    if failures >= (run.max_attempts or retry.max_attempts):
        return None
    if isinstance(error, RetryLater):
        return error.delay.total_seconds()
    try:
        if alone and not retry.covers(error):
            return None
        wait = retry.wait(failures, error) if run.retry_delay is None else run.retry_delay.total_seconds()
        return backoff.exponential(failures) if wait is None and not alone else wait
    except BaseException as broken:  # noqa: BLE001 - a policy that is broken must not cost its run the next try
        log.error(
            "a retry policy failed; the exponential wait is taken",
            run_id=run.id, task=run.task, why=codec.describe(broken), error=type(broken).__name__,
        )  # fmt: skip
        return backoff.exponential(failures)


def _described(error: BaseException) -> str:
    if isinstance(error, ProcessDied):
        more = {} if error.signal is None else {"signal": error.signal}
        return codec.dumps_error("process_died", codec.describe(error), type="ProcessDied", **more)
    return codec.describe_error(error, reason="timeout" if isinstance(error, TimedOut) else "raised")
