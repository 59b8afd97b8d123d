"""`app.schedules`: schedules as rows that any process may read and change, and those that an App declares in its code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Literal, TypeVar

import msgspec

from queue_service import cron as slots
from queue_service.app import enqueue as enqueueing
from queue_service.app.core import Core
from queue_service.cron import Recurrence
from queue_service.db import channels
from queue_service.db.query import interval_literal
from queue_service.db.steps import MAX_TRIES
from queue_service.errors import ConfigError, nearest
from queue_service.schedules import queries
from queue_service.schedules.model import Misfire, NewSchedule, Schedule
from queue_service.tasks import Task, duration
from queue_service.turn import Turn
from queue_service.words import check_word

TaskT = TypeVar("TaskT", bound=Task[..., Any])
MisfireWord = Literal["skip", "last", "all"]

MAX_NAME = 256


class Schedules:
    """Schedules are rows: one that is stored fires, in whichever worker looks first, until it is paused or deleted. For
    each of its slots one run is enqueued, whose metadata says `{"schedule": name, "slot": time}`.
    """

    def __init__(self, core: Core) -> None:
        self._core = core

    async def put(
        self,
        name: str,
        task: str,
        payload: Mapping[str, Any] | None = None,
        /,
        *,
        cron: str | None = None,
        every: timedelta | float | None = None,
        timezone: str = "UTC",
        misfire: MisfireWord = "last",
        queue: str | None = None,
        priority: int = 0,
        expires_in: timedelta | float | None = None,
        turn: Turn | None = None,
        conn: Any = None,
    ) -> bool | None:
        """Store a schedule under this name, or change the one that has it. Returns True if it is new, False if it was
        changed, and None if it was like this already.

        When: either `cron`, five fields (or `@daily` and the like) read in `timezone`, or `every`, seconds or timedelta.
        `misfire` says what happens about slots that passed while no worker was there: `skip`, `last` or `all` (at most
        100). The others are those of `enqueue`. With a `turn`, each run works on one of its own: that turn, its message id
        followed by the slot, in the lane of its stream; its metadata has the `source` `schedule`, unless it says another.
        A change of the recurrence begins with the next slot; pauses stay. With `conn` it is part of the caller's
        transaction. Raises ConfigError and PayloadRefused for what could never fire.
        """
        new = self._new(
            name, task, payload, cron=cron, every=every, timezone=timezone, misfire=misfire, queue=queue,
            priority=priority, expires_in=expires_in, turn=turn,
        )  # fmt: skip
        return await self._store(new, conn)

    async def get(self, name: str, *, conn: Any = None) -> Schedule | None:
        """Return the schedule of this name; None if there is none."""
        return await self._core.fetch(queries.get(name), conn)

    async def next(self, name: str, count: int = 5, *, conn: Any = None) -> list[datetime] | None:
        """Return when the schedule is due next, in UTC, as if it were not paused; None if there is no such schedule."""
        schedule = await self.get(name, conn=conn)
        if schedule is None:
            return None
        if schedule.paused_at is not None:
            return slots.upcoming(schedule.recurrence, await self._core.fetch(queries.clock(), conn), count)
        return [schedule.next_at, *slots.upcoming(schedule.recurrence, schedule.next_at, count - 1)][:count]

    async def list(self, *, conn: Any = None) -> list[Schedule]:
        """Return all schedules, ordered by name."""
        return await self._core.fetch(queries.listed(), conn)

    async def run_now(self, name: str, *, conn: Any = None) -> int | None:
        """Enqueue the schedule's run out of turn, also while it is paused, and return its id. Its `slot` is this moment,
        and its next slot stays. Returns None if there is no such schedule. With `conn` the run is part of the caller's
        transaction."""
        run = await self._core.fetch(queries.run_now(name), conn)
        if run is None:
            return None
        run_id, queue, priority = run
        await self._core.announce([channels.enqueued(queue, priority)], conn)
        return run_id

    async def pause(self, name: str, *, conn: Any = None) -> bool | None:
        """Keep it from firing until `resume`. Returns False if it was paused already, None if there is no such schedule.
        With `conn` it is part of the caller's transaction."""
        return await self._core.fetch(queries.pause(name), conn)

    async def resume(self, name: str, *, conn: Any = None) -> bool | None:
        """Let it fire again, from its next slot on: those of the pause are not made up for. Returns False if it
        was not paused, None if there is no such schedule. With `conn` it is part of the caller's transaction."""
        for _ in range(MAX_TRIES):
            schedule = await self.get(name, conn=conn)
            if schedule is None:
                return None
            if schedule.paused_at is None:
                return False
            next_at = slots.following(schedule.recurrence, await self._core.fetch(queries.clock(), conn))
            if await self._core.fetch(queries.resume(schedule, next_at), conn):
                return True
        raise ConfigError(f"Schedule {name!r} was changed again and again while it was to be resumed. Try again.")

    async def delete(self, name: str, *, conn: Any = None) -> bool:
        """Forget the schedule; its runs stay. One that is declared in code comes back when a worker starts with that code.
        Returns False if there was none. With `conn` it is part of the caller's transaction."""
        return await self._core.fetch(queries.delete(name), conn)

    async def store_declared(self, *, conn: Any = None) -> None:
        """Store what `@app.schedule` declared. Workers do this when they start; it pauses, resumes and deletes nothing.
        With `conn` it is part of the caller's transaction."""
        for new in self._core.declared.values():
            await self._store(new, conn)

    def declare(
        self,
        cron: str | None,
        name: str | None,
        payload: Mapping[str, Any] | None,
        options: Mapping[str, Any],
    ) -> Callable[[TaskT], TaskT]:
        """The decorator that `app.schedule` returns."""

        def declared(task: TaskT) -> TaskT:
            if not isinstance(task, Task):
                raise ConfigError("@app.schedule is for a task. Write it above @app.task, not below.")
            new = self._new(name or task.name, task.name, payload, cron=cron, **options)
            taken = self._core.declared.setdefault(new.name, new)
            if taken != new:
                raise ConfigError(f"Two schedules want the name {new.name!r}. Give one of them another name=.")
            return task

        return declared

    async def _store(self, new: NewSchedule, conn: Any) -> bool | None:
        now = await self._core.fetch(queries.clock(), conn)
        return await self._core.fetch(queries.put(new, slots.following(new.recurrence, now)), conn)

    def _new(
        self,
        name: str,
        task: str,
        payload: Mapping[str, Any] | None,
        *,
        cron: str | None,
        every: timedelta | float | None,
        timezone: str,
        misfire: MisfireWord,
        turn: Turn | None = None,
        **options: Any,
    ) -> NewSchedule:
        check_word(name, "the name of a schedule", MAX_NAME)
        words = [each.value for each in Misfire]
        if misfire not in words:
            raise ConfigError(f"misfire must be one of {', '.join(words)}.{nearest(str(misfire), words)}")
        recurrence = Recurrence(cron, None if every is None else duration(every, "every", positive=True), timezone)
        # Checked as the run that it will be.
        run = enqueueing.new_run(
            self._core.tasks, self._core.settings.payload_limit, task, {} if payload is None else payload, **options
        )
        return NewSchedule(
            name=name, recurrence=recurrence, misfire=Misfire(misfire), task=task, queue=run.queue, payload=run.payload,
            priority=run.priority, expires_in=run.expires_in, turn=None if turn is None else self._template(turn),
        )  # fmt: skip

    def _template(self, turn: Turn) -> str:
        """As the turns of a schedule are stored, with their deadlines."""
        settings = self._core.settings
        metadata = {"source": "schedule", **turn.metadata}
        # Checked with the longest id that it will have.
        of_slot = replace(turn, message_id=f"{turn.message_id}/2026-01-01T00:00:00.000000Z", metadata=metadata)
        deadlines = {
            "admission": settings.admission, "execution": settings.execution,
            "total": max(settings.total, settings.admission, settings.execution),
        }  # fmt: skip
        fields = {**of_slot.fields(settings.payload_limit), "message_id": turn.message_id}
        return msgspec.json.encode(
            fields | {name: interval_literal(value) for name, value in deadlines.items()}
        ).decode()
