"""Fires schedules: each slot of each schedule gives one run, however many schedulers there are.

A look at what is due locks nothing; then, in Python, the next slots are computed; and one statement moves each schedule on
from the very slot that was seen and stores its runs. Of two schedulers that saw the same, one moves it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta

from queue_service import cron
from queue_service.cron import Recurrence
from queue_service.db import channels
from queue_service.db.channels import Notify
from queue_service.db.execute import REFUSED
from queue_service.db.meaning import is_outage
from queue_service.db.query import Fetch
from queue_service.errors import DatabaseUnavailable
from queue_service.exceptions import message
from queue_service.logs import get_logger
from queue_service.schedules import queries
from queue_service.schedules.model import DueSchedule, Firing, Misfire
from queue_service.schedules.queries import START, Fired, Look

log = get_logger(__name__)

# Schedules that fire in one statement, and the most runs that one of them gets for slots that have passed.
FIRED_AT_ONCE = 100
MAX_SLOTS = 100
# A slot is missed once it has passed for longer than this.
LATENESS = timedelta(minutes=1)


class Scheduler:
    def __init__(self, fetch: Fetch, notify: Notify, *, poll_interval: timedelta, retention: timedelta) -> None:
        self._fetch = fetch
        self._notify = notify
        self._poll_interval = poll_interval
        self._retention = retention
        # Schedules that could not fire, and why: said once each.
        self._refused: dict[str, str] = {}
        # How long nothing will be due, as far as the last pass could see.
        self.pause = timedelta(0)

    async def when_due(self) -> None:
        """Sleep until the first slot is due, or for the poll interval at most, and fire what is."""
        await asyncio.sleep(self.pause.total_seconds())
        # If the pass fails, it is not begun again at once.
        self.pause = self._poll_interval
        await self.once()

    async def once(self) -> int:
        """Fire whatever is due. Returns how many runs that gave."""
        count, at = 0, START
        while True:
            look: Look = await self._fetch(queries.due(after=at, limit=FIRED_AT_ONCE))
            if not look.due:
                break
            count += await self._fire([firing for due in look.due if (firing := self._firing(due, look)) is not None])
            at = (look.due[-1].next_at, look.due[-1].name)
        until_next = self._poll_interval if look.later is None else look.later - look.now
        self.pause = min(until_next, self._poll_interval)
        return count

    def _firing(self, due: DueSchedule, look: Look) -> Firing | None:
        try:
            return firing(due, look)
        except Exception as refused:  # noqa: BLE001 - a schedule that means nothing must not hold up the others
            self._refuse(due.name, refused)
            return None

    async def _fire(self, firings: Sequence[Firing]) -> int:
        """Those that were refused before go one by one, so that they do not hold up the others again."""
        together = [each for each in firings if each.due.name not in self._refused]
        singly = [each for each in firings if each.due.name in self._refused]
        count = 0
        if together:
            try:
                count += self._announce(await self._fetch(queries.fire(together, retention=self._retention)))
            except (DatabaseUnavailable, *REFUSED) as refused:
                if is_outage(refused):
                    raise
                log.error("a batch of schedules cannot fire; trying each", why=str(refused))
                singly += together
        for each in singly:
            try:
                count += self._announce(await self._fetch(queries.fire([each], retention=self._retention)))
                self._refused.pop(each.due.name, None)
            except (DatabaseUnavailable, *REFUSED) as refused:
                if is_outage(refused):
                    raise
                self._refuse(each.due.name, refused)
        return count

    def _announce(self, fired: Sequence[Fired]) -> int:
        runs = [each for each in fired if each.run_id is not None]
        self._notify([channels.enqueued(*where) for where in {(each.queue, each.priority) for each in runs}])
        for each in runs:
            log.debug("schedule fired", schedule=each.name, slot=str(each.slot), run_id=each.run_id)
        return len(runs)

    def _refuse(self, name: str, refused: Exception) -> None:
        # Without the lines that follow: they show the row, which is another one each time.
        why = message(refused).partition("\n")[0]
        if self._refused.get(name) != why:
            log.error("a schedule cannot fire; it stays due", schedule=name, why=why)
        self._refused[name] = why


def firing(due: DueSchedule, look: Look) -> Firing:
    """What a due schedule does now: the slots it fires for, as its misfire policy says, and its next one. Raises
    ConfigError where its recurrence means nothing on this machine, and OverflowError where it leads too far."""
    recurrence = Recurrence(due.cron, due.every, due.timezone)
    most = MAX_SLOTS if due.misfire is Misfire.ALL else 1
    slots = cron.newest(recurrence, due.next_at, look.now, most)
    if due.misfire is Misfire.SKIP:
        slots = [slot for slot in slots if look.now - slot <= LATENESS]
    if slots[:1] != [due.next_at]:
        log.info("slots passed that get no run", schedule=due.name, since=str(due.next_at), misfire=due.misfire.value)
    return Firing(due, slots, cron.following(recurrence, look.now))
