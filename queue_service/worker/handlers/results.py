"""What becomes of a run when its handler has returned, or raised: a decision without effects, and one for each run.

Nothing that a handler, its result, its exception or its retry policy does here keeps its run from an outcome.
"""

from __future__ import annotations

from typing import Any

import msgspec

from queue_service import codec, exceptions
from queue_service.errors import ClaimLost, ConfigError, PayloadRefused
from queue_service.runs.model import Ending, Return, Run, RunState
from queue_service.tasks import Cancel, Defer, HandedOn, ProcessDied, Retry, Snooze, duration, wait_after
from queue_service.words import check_word
from queue_service.worker.tally import Settlement

# What a handler may return that is not its result.
WORDS = (Snooze, Cancel, HandedOn)


class TimedOut(TimeoutError):
    def __init__(self, seconds: float) -> None:
        super().__init__(f"The handler ran longer than its {seconds:g} s.")


def returned(run: Run, value: Any, *, limit: int) -> Settlement:
    """`limit` bounds the result, in bytes."""
    if value is None:
        return Ending(run.claim, RunState.SUCCEEDED)
    try:
        if exceptions.is_a(value, Cancel):
            return cancelled(run, exceptions.text(value.reason))
        if exceptions.is_a(value, Snooze):
            return _snoozed(run, value)
        return succeeded(run, value, limit=limit)
    except BaseException as refused:  # noqa: BLE001 - whatever a result does when it is read, the run gets its ending
        known = exceptions.is_a(refused, (PayloadRefused, ConfigError))
        reason = exceptions.message(refused) if known else f"Reading it raised {exceptions.type_name(refused)}."
        return Ending(run.claim, RunState.FAILED, error=codec.dumps_error("result_refused", reason))


def succeeded(run: Run, value: Any, *, limit: int) -> Ending:
    """Raises PayloadRefused for what is no result, and ConfigError for a HandedOn that cannot be meant."""
    if exceptions.is_a(value, HandedOn):
        return _handed_on(run, value)
    return Ending(run.claim, RunState.SUCCEEDED, codec.dumps_result(value, limit=limit))


def raised(run: Run, retry: Retry, error: BaseException, *, alone: bool = True) -> Settlement:
    """Where a run was not `alone` in its call, it may not be the cause: it is tried again whatever the error is."""
    if exceptions.is_a(error, ClaimLost) and _is_about(error, run):
        # Nothing to be written: the finisher will find it lost, too.
        return Return(run.claim)
    delay = wait_after(run, retry, error, alone=alone)
    described = _described(error)
    exceptions.release(error)
    if delay is None:
        return Ending(run.claim, RunState.FAILED, error=described)
    return Return(run.claim, delay=delay, failed=True, error=described)


def cancelled(run: Run, reason: str = "It was cancelled while it ran.") -> Ending:
    return Ending(run.claim, RunState.CANCELLED, error=codec.dumps_error("cancelled", reason))


def unreadable(run: Run) -> Ending:
    message = (
        f"It cannot be read as it is stored: {run.unreadable}. Something else than this library has stored it so; its "
        "payload is kept as it is."
    )
    return Ending(run.claim, RunState.FAILED, error=codec.dumps_error("unreadable", message))


def interrupted(run: Run) -> Ending:
    message = (
        'Its worker stopped before it ended. Its task says on_lost="fail": it is begun again only if you retry it.'
    )
    return Ending(run.claim, RunState.FAILED, error=codec.dumps_error("interrupted", message))


def _snoozed(run: Run, value: Snooze) -> Return:
    # Looked at again: a subclass, or whoever has changed it, may have made it another thing.
    delay = duration(value.delay, "The delay of a Snooze")
    owner = value.owner if isinstance(value, Defer) else None
    if owner is not None:
        check_word(owner, "The owner of a Defer")
    return Return(run.claim, delay=delay.total_seconds(), reserved_for=owner)


def _handed_on(run: Run, value: HandedOn) -> Ending:
    # As with a Snooze, looked at again.
    to = HandedOn(value.to).to
    result = msgspec.json.encode({"handed_on": to}).decode()
    if isinstance(to, int):
        return Ending(run.claim, RunState.SUCCEEDED, result, handed_on=True, heir=to)
    if run.turn is not None and run.turn.deployment != to:
        raise ConfigError(
            f"The turn is of deployment {run.turn.deployment!r} and cannot be handed on to {to!r}. Dispatch it to that "
            "one, or hand it on to a run."
        )
    return Ending(run.claim, RunState.SUCCEEDED, result, handed_on=True)


def _is_about(lost: ClaimLost, run: Run) -> bool:
    try:
        return bool(lost.run_id == run.id)
    except BaseException:  # noqa: BLE001 - a subclass may have another idea of its attributes
        return False


def _described(error: BaseException) -> str:
    if type(error) is ProcessDied:
        more = {} if error.signal is None else {"signal": error.signal}
        return codec.dumps_error("process_died", exceptions.message(error), type="ProcessDied", **more)
    return codec.describe_error(error, reason="timeout" if type(error) is TimedOut else "raised")
