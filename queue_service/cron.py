"""When a schedule is due: the slots of a cron expression in a time zone, or of a fixed interval. Pure arithmetic, in UTC.

Slots ascend strictly, and the slot after a moment depends on that moment alone: whoever computes it, from wherever they
came, finds the same one. What happens where a clock on the wall skips or goes back is described in `docs/schedules.md`: the
rules are Debian cron's.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import islice, takewhile
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from queue_service.errors import ConfigError, nearest

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NICKNAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
MAX_EXPRESSION = 256
SHORTEST, LONGEST = timedelta(seconds=1), timedelta(days=36_500)
# How far back the newest slots are looked for, first and last; in between ever further.
NEAR, FAR = timedelta(hours=1), timedelta(days=366 * 50)


@dataclass(frozen=True, slots=True)
class Recurrence:
    """Either `cron`, five fields read in `timezone`, or `every`, counted from 1970-01-01 UTC. Making one checks it, and
    raises ConfigError for what has no slots."""

    cron: str | None = None
    every: timedelta | None = None
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        if (self.cron is None) == (self.every is None):
            raise ConfigError("A schedule has either a cron expression or every=, one of them.")
        zone(self.timezone)
        if self.every is not None:
            _check_interval(self.every, self.timezone)
        else:
            assert self.cron is not None
            _read(self.cron)

    def __str__(self) -> str:
        if self.every is not None:
            return f"every {self.every}"
        return str(self.cron) if self.timezone == "UTC" else f"{self.cron} ({self.timezone})"


def following(recurrence: Recurrence, moment: datetime) -> datetime:
    """The first slot after the moment."""
    return next(slots(recurrence, moment))


def slots(recurrence: Recurrence, moment: datetime) -> Iterator[datetime]:
    """The slots after the moment, for ever (those of a cron expression end when none comes for 50 years)."""
    if recurrence.every is not None:
        number = (moment - EPOCH) // recurrence.every
        while True:
            number += 1
            yield EPOCH + number * recurrence.every
    assert recurrence.cron is not None
    last = moment = moment.astimezone(UTC)
    for local in _walk(_read(recurrence.cron), moment, zone(recurrence.timezone)):
        slot = local.astimezone(UTC)
        # In the second coming of an hour that comes twice, cronsim finds the times of the first again.
        if slot > last:
            last = slot
            yield slot


def newest(recurrence: Recurrence, since: datetime, until: datetime, most: int) -> list[datetime]:
    """The last `most` slots from `since` to `until`, both included, ascending. What it costs does not grow with how many
    lie before them."""
    just_before = since - timedelta(microseconds=1)
    back = NEAR if recurrence.every is None else recurrence.every * min(most, (until - since) // recurrence.every + 1)
    while True:
        start = max(just_before, until - back)
        found = list(takewhile(lambda slot: slot <= until, slots(recurrence, start)))
        if len(found) >= most or start == just_before or back > FAR:
            return found[-most:]
        back *= 12


def upcoming(recurrence: Recurrence, moment: datetime, count: int) -> list[datetime]:
    """The next slots after the moment."""
    return list(islice(slots(recurrence, moment), count))


@functools.cache
def zone(name: str) -> tzinfo:
    """The time zone of this name, from the database of this machine, or else the `tzdata` package. ConfigError."""
    # For UTC itself cronsim has a quicker way.
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        close = nearest(str(name), available_timezones())
        raise ConfigError(
            f"There is no time zone {name!r} on this machine.{close} Use a name like Europe/Vienna."
        ) from None


@functools.lru_cache(1024)
def _read(expression: str) -> str:
    """The five fields. ConfigError for what cannot be read, and for what is never due."""
    if not isinstance(expression, str) or len(expression) > MAX_EXPRESSION:
        raise ConfigError(
            f"A cron expression is a text of at most {MAX_EXPRESSION} characters, not {expression!r:.80}."
        )
    cron = NICKNAMES.get(expression.strip().lower(), expression)
    if len(cron.split()) != 5:
        raise ConfigError(
            f"{expression!r} is no cron expression: it needs five fields (minute, hour, day of month, month, day of week), "
            "such as '0 9 * * 1-5', or a name such as @daily."
        )
    try:
        first = next(CronSim(cron, EPOCH), None)
    except CronSimError as refused:
        raise ConfigError(f"{expression!r} is no cron expression: {str(refused).lower()}.") from None
    if first is None:
        raise ConfigError(f"{expression!r} is never due: no day in 50 years is like that.")
    return cron


def _walk(cron: str, moment: datetime, zone: tzinfo) -> Iterator[datetime]:
    """The slots after the moment; where the clock changes, some may come twice or late."""
    minute, hour = cron.split()[:2]
    if zone is UTC or not (minute.startswith("*") or hour.startswith("*")):
        yield from CronSim(cron, moment.astimezone(zone))
    else:
        yield from _by_the_clock(cron, moment.replace(microsecond=0), zone)


def _by_the_clock(cron: str, moment: datetime, zone: tzinfo) -> Iterator[datetime]:
    """Each minute that the zone's clock shows as the expression says. cronsim would step by whole hours, and so past some
    minutes where a clock changes by half an hour, or not at a full one."""
    offset = _offset(moment, zone)
    walk = CronSim(cron, _wall(moment, offset))
    while (wall := next(walk, None)) is not None:
        slot = wall.replace(tzinfo=UTC) - offset
        changed = _change(moment, slot, offset, zone)
        if changed is None:
            moment = slot
            yield slot
        else:
            moment, offset = changed, _offset(changed, zone)
            # The moment of the change may be a slot itself.
            walk = CronSim(cron, _wall(moment, offset) - timedelta(seconds=1))


def _change(moment: datetime, until: datetime, offset: timedelta, zone: tzinfo) -> datetime | None:
    """The first second after the moment, up to `until`, at which the zone has another offset. None of them changes twice
    within a day."""
    while moment < until:
        ahead = min(moment + timedelta(days=1), until)
        if _offset(ahead, zone) != offset:
            seconds = range(int((ahead - moment).total_seconds()))
            start = moment
            return start + timedelta(
                seconds=1
                + bisect_left(seconds, True, key=lambda n: _offset(start + timedelta(seconds=n + 1), zone) != offset)
            )
        moment = ahead
    return None


def _offset(moment: datetime, zone: tzinfo) -> timedelta:
    offset = moment.astimezone(zone).utcoffset()
    assert offset is not None
    return offset


def _wall(moment: datetime, offset: timedelta) -> datetime:
    return (moment + offset).replace(tzinfo=None)


def _check_interval(every: timedelta, timezone: str) -> None:
    if timezone != "UTC":
        raise ConfigError("every= is counted in UTC. Leave out timezone=, or say it with a cron expression.")
    if not isinstance(every, timedelta) or not SHORTEST <= every <= LONGEST or every.microseconds:
        raise ConfigError(f"every= must be whole seconds, from 1 s to {LONGEST.days} days, not {every}.")
