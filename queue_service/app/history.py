"""Retrying many runs of history: batch after batch, each a statement of its own, so that it can be stopped at any moment
and begun again, and any number of callers may do it at once."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from queue_service.app.core import Core
from queue_service.errors import ConfigError
from queue_service.runs import walks
from queue_service.runs.model import RunState
from queue_service.runs.queries import COUNT_LIMIT
from queue_service.runs.walks import Batch, Filter, Place
from queue_service.tasks import duration

# Runs that one statement moves.
RETRIED_AT_ONCE = 1_000
RETRIABLE = (RunState.FAILED, RunState.CANCELLED, RunState.EXPIRED)


class Retried(NamedTuple):
    """How many runs were queued again, and how many were not, because a live run holds their singleton key."""

    runs: int
    skipped: int


OnProgress = Callable[[Retried], object]


def chosen(state: str, queue: str | None, task: str | None, since: datetime | timedelta | float | None) -> Filter:
    """The runs that these arguments of `App.retry_many` name. ConfigError for a state that cannot be retried, and for a
    time without a zone."""
    if state not in RETRIABLE:
        raise ConfigError(f"Runs that are {state!r} cannot be retried. Choose one of {', '.join(RETRIABLE)}.")
    if not isinstance(since, datetime):
        within = None if since is None else duration(since, "since")
        return Filter(RunState(state), queue, task, within=within)
    if since.tzinfo is None:
        raise ConfigError(f"since={since} has no time zone. Pass an aware datetime, or a timedelta.")
    return Filter(RunState(state), queue, task, since=since)


async def retry(core: Core, runs: Filter, *, limit: int | None, on_progress: OnProgress, conn: Any) -> Retried:
    """Move them, the oldest first."""
    done = Retried(0, 0)
    place: Place | None = Place()
    while place is not None and (limit is None or done.runs < limit):
        size = RETRIED_AT_ONCE if limit is None else min(RETRIED_AT_ONCE, limit - done.runs)
        batch = await core.fetch(walks.retry_many(runs, place, limit=size), conn)
        await core.announce(list(batch.notices), conn)
        done = Retried(done.runs + batch.moved, done.skipped + batch.found - batch.moved)
        if batch.found:
            on_progress(done)
        place = _following(batch)
    return done


async def count(core: Core, runs: Filter, *, limit: int | None, on_progress: OnProgress, conn: Any) -> Retried:
    """How many there are to be moved, as far as COUNT_LIMIT."""
    most = COUNT_LIMIT if limit is None else min(limit, COUNT_LIMIT)
    done = Retried(0, 0)
    place: Place | None = Place()
    while place is not None and done.runs < most:
        batch = await core.fetch(walks.count_many(runs, place, limit=most - done.runs), conn)
        done = Retried(done.runs + batch.found, 0)
        if batch.found:
            on_progress(done)
        place = _following(batch)
    return done


def _following(batch: Batch) -> Place | None:
    return None if batch.after is None else Place(batch.until, batch.after)
