"""A new attempt at a turn begins with a `reset` event: whoever reads the stream forgets the half answer before it."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from queue_service.db.execute import NOT_EXECUTED
from queue_service.db.query import Fetch
from queue_service.events import queries
from queue_service.exceptions import message
from queue_service.logs import get_logger
from queue_service.runs.model import Run
from queue_service.tasks import Snooze

log = get_logger(__name__)

# A run whose reset cannot be stored is begun again after so many seconds.
PAUSE = 1.0


def may_follow_another(run: Run) -> bool:
    """Whether attempts before this one may have left events in the stream of a turn."""
    return run.attempt > 1 and run.turn is not None


async def after_reset(fetch: Fetch, run: Run, call: Coroutine[Any, Any, Any]) -> Any:
    """Call the handler of a run that may follow another attempt, after its reset. Where that cannot be stored, the handler
    is not called, or a reader would take the two halves for one answer: the run is snoozed."""
    turn = run.turn
    assert turn is not None
    try:
        await fetch(queries.reset(turn.stream, turn.deployment, turn.message_id, (run.id, run.attempt)))
    except BaseException as error:
        # It was not begun, and never will be.
        call.close()
        if not isinstance(error, NOT_EXECUTED):
            raise
        log.warning("the reset of an attempt cannot be stored; it is begun later", run_id=run.id, why=message(error))
        return Snooze(PAUSE)
    return await call
