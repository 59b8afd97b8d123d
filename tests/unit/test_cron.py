"""When schedules are due: by brute force in every time zone, wherever a clock changes from 2020 to 2037."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from itertools import pairwise, takewhile
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

import pytest

from queue_service import cron
from queue_service.cron import Recurrence, following, newest, slots, upcoming
from queue_service.errors import ConfigError

FIRST, LAST = datetime(2020, 1, 1, tzinfo=UTC), datetime(2038, 1, 1, tzinfo=UTC)
STEP = timedelta(minutes=5)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def times(found: list[datetime]) -> list[str]:
    return [f"{slot:%m-%d %H:%M}" for slot in found]


# Brute force


def changes() -> list[tuple[str, datetime]]:
    """Each change of a clock, once for all zones that share their clock from the first year to the last."""
    found: dict[object, list[tuple[str, datetime]]] = {}
    for name in sorted(available_timezones()):
        zone = ZoneInfo(name)
        of_zone: list[datetime] = []
        moment = FIRST
        while moment < LAST:
            ahead = moment + timedelta(days=6)
            if offset(moment, zone) != offset(ahead, zone):
                of_zone.append(change(moment, ahead, zone))
            moment = ahead
        key = (offset(FIRST, zone), *((each, offset(each, zone)) for each in of_zone))
        found.setdefault(key, [(name, each) for each in of_zone])
    return [each for of_zone in found.values() for each in of_zone]


def offset(moment: datetime, zone: tzinfo) -> timedelta:
    found = moment.astimezone(zone).utcoffset()
    assert found is not None
    return found


def change(before: datetime, after: datetime, zone: tzinfo) -> datetime:
    while after - before > timedelta(seconds=1):
        middle = before + (after - before) // 2
        middle = middle.replace(microsecond=0)
        before, after = (middle, after) if offset(middle, zone) == offset(before, zone) else (before, middle)
    return after


@pytest.fixture(scope="module")
def everywhere() -> list[tuple[str, datetime]]:
    return changes()


def by_the_clock(zone: tzinfo, start: datetime, end: datetime, hours: set[int], minutes: set[int]) -> list[datetime]:
    """Every fifth minute of real time, where the clock shows one of these."""
    found = []
    moment = start
    while (moment := moment + STEP) < end:
        shown = moment.astimezone(zone)
        if shown.hour in hours and shown.minute in minutes:
            found.append(moment)
    return found


def by_the_day(zone: tzinfo, start: datetime, end: datetime, hours: set[int], minutes: set[int]) -> list[datetime]:
    """Each of these times of each day, once: the first where it comes twice, and the end of the gap where it is skipped."""
    found = set()
    days = [start.astimezone(zone).date() + timedelta(days=n) for n in range(-1, 4)]
    for shown in (datetime.combine(day, time(hour, minute)) for day in days for hour in hours for minute in minutes):
        moment = shown.replace(tzinfo=zone).astimezone(UTC)
        if moment.astimezone(zone).replace(tzinfo=None) != shown:
            moment = change(moment - timedelta(hours=3), moment + timedelta(hours=3), zone)
        if start < moment < end:
            found.add(moment)
    return sorted(found)


ALL_HOURS = set(range(24))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("expression", "oracle", "hours", "minutes"),
    [
        ("30 2 * * *", by_the_day, {2}, {30}),
        ("0,15,30 0-3 * * *", by_the_day, {0, 1, 2, 3}, {0, 15, 30}),
        ("0 * * * *", by_the_clock, ALL_HOURS, {0}),
        ("15 */2 * * *", by_the_clock, set(range(0, 24, 2)), {15}),
        ("*/10 2 * * *", by_the_clock, {2}, set(range(0, 60, 10))),
        ("*/5 0-4 * * *", by_the_clock, set(range(5)), set(range(0, 60, 5))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_slots_are_those_of_the_clock_on_the_wall_in_every_zone(
    everywhere: list[tuple[str, datetime]],
    expression: str,
    oracle: Callable[..., list[datetime]],
    hours: set[int],
    minutes: set[int],
) -> None:
    assert len(everywhere) > 1_000
    numbers = random.Random(expression)
    for name, moment in everywhere:
        middle = moment.replace(minute=0, second=0)
        start, end = middle - timedelta(hours=4), middle + timedelta(hours=26)
        expected = oracle(ZoneInfo(name), start, end, hours, minutes)
        timing = Recurrence(expression, None, name)
        found = list(takewhile(end.__gt__, slots(timing, start)))
        assert found == expected, (name, moment)
        assert all(one < other for one, other in pairwise(found))
        # From wherever one comes, the next one is the same.
        anywhere = start + timedelta(seconds=numbers.randrange(24 * 3600), microseconds=numbers.randrange(10**6))
        after_all = following(timing, end - timedelta(microseconds=1))
        assert following(timing, anywhere) == next((slot for slot in expected if slot > anywhere), after_all)


# One zone, to read


VIENNA = "Europe/Vienna"


@pytest.mark.parametrize(
    ("expression", "start", "expected"),
    [
        # 02:00 becomes 03:00 on the 29th of March 2026, at 01:00 UTC.
        ("30 2 * * *", "2026-03-28", ["03-28 01:30", "03-29 01:00", "03-30 00:30"]),
        ("0,30 2 * * *", "2026-03-29", ["03-29 01:00", "03-30 00:00", "03-30 00:30"]),
        ("0 * * * *", "2026-03-28T23:30", ["03-29 00:00", "03-29 01:00", "03-29 02:00"]),
        ("*/30 2 * * *", "2026-03-28", ["03-28 01:00", "03-28 01:30", "03-30 00:00"]),
        # 03:00 becomes 02:00 on the 25th of October, at 01:00 UTC.
        ("30 2 * * *", "2026-10-24T12:00", ["10-25 00:30", "10-26 01:30", "10-27 01:30"]),
        ("30 2 * * *", "2026-10-25T01:10", ["10-26 01:30", "10-27 01:30", "10-28 01:30"]),
        ("0 * * * *", "2026-10-24T23:30", ["10-25 00:00", "10-25 01:00", "10-25 02:00"]),
        ("*/30 2 * * *", "2026-10-25", ["10-25 00:30", "10-25 01:00", "10-25 01:30"]),
        ("0 9 * * 1-5", "2026-10-23", ["10-23 07:00", "10-26 08:00", "10-27 08:00"]),
    ],
)
def test_where_the_clock_changes(expression: str, start: str, expected: list[str]) -> None:
    assert times(upcoming(Recurrence(expression, None, VIENNA), at(start), 3)) == expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("@daily", ["01-02 00:00", "01-03 00:00"]),
        ("@Hourly", ["01-01 01:00", "01-01 02:00"]),
        ("0 0 13 * FRI", ["01-02 00:00", "01-09 00:00"]),
        ("0 12 L * *", ["01-31 12:00", "02-28 12:00"]),
        ("5/20 0 * * *", ["01-01 00:05", "01-01 00:25"]),
        ("0 0 29 2 *", ["02-29 00:00", "02-29 00:00"]),
    ],
)
def test_an_expression_in_utc(expression: str, expected: list[str]) -> None:
    assert times(upcoming(Recurrence(expression), at("2026-01-01"), 2)) == expected


def test_an_interval_is_counted_from_1970() -> None:
    timing = Recurrence(every=timedelta(minutes=15))
    assert times(upcoming(timing, at("2026-01-01T00:07:30"), 2)) == ["01-01 00:15", "01-01 00:30"]
    assert following(timing, at("2026-01-01T00:15")) == at("2026-01-01T00:30")
    assert following(timing, at("2026-01-01T00:14:59.999999")) == at("2026-01-01T00:15")


@pytest.mark.parametrize(
    "timing",
    [Recurrence("*/7 * * * *"), Recurrence("30 2 * * *", None, VIENNA), Recurrence("0 0 1 * *"), Recurrence("* * * * *", None, VIENNA),
     Recurrence(every=timedelta(seconds=7)), Recurrence(every=timedelta(days=3))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("most", [1, 3, 100])
def test_the_newest_are_the_last_of_all(timing: Recurrence, most: int) -> None:
    until = at("2026-03-30T12:00:01")
    for days in (0, 0.001, 0.3, 9):
        since = following(timing, until - timedelta(days=days))
        every_one = list(takewhile(lambda slot: slot <= until, slots(timing, since - timedelta(seconds=1))))
        assert newest(timing, since, until, most) == every_one[-most:]
        assert newest(timing, since, since, most) == [since]


@pytest.mark.parametrize("timing", [Recurrence("* * * * *"), Recurrence(every=timedelta(seconds=1))], ids=str)
def test_the_newest_of_many_years_are_found_at_once(timing: Recurrence) -> None:
    walked = newest(timing, at("1990-01-01"), at("2026-01-01"), 2)
    assert walked[-1] == at("2026-01-01")


# What is refused


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "either a cron expression or every="),
        ({"cron": "* * * * *", "every": timedelta(seconds=5)}, "either a cron expression or every="),
        ({"cron": "* * * *"}, "five fields"),
        ({"cron": "* * * * * *"}, "five fields"),
        ({"cron": "@reboot"}, "five fields"),
        ({"cron": ""}, "five fields"),
        ({"cron": "61 * * * *"}, "bad minute"),
        ({"cron": "* * * * MOON"}, "bad day-of-week"),
        ({"cron": "0 0 30 2 *"}, "bad day-of-month"),
        ({"cron": "0 0 * 2 MON#5,TUE#6"}, "bad day-of-week"),
        ({"cron": "1," * 200 + "1 * * * *"}, "at most 256"),
        ({"cron": 5}, "is a text"),
        ({"cron": "* * * * *", "timezone": "Europe/Viena"}, "Did you mean 'Europe/Vienna'"),
        ({"cron": "* * * * *", "timezone": "../etc/passwd"}, "no time zone"),
        ({"cron": "* * * * *", "timezone": "Europe"}, "no time zone"),
        ({"cron": "* * * * *", "timezone": ""}, "no time zone"),
        ({"cron": "* * * * *", "timezone": "a\0b"}, "no time zone"),
        ({"every": timedelta(milliseconds=1500)}, "whole seconds"),
        ({"every": timedelta(0)}, "whole seconds"),
        ({"every": timedelta(days=-1)}, "whole seconds"),
        ({"every": timedelta(days=40_000)}, "whole seconds"),
        ({"every": timedelta(seconds=5), "timezone": VIENNA}, "in UTC"),
    ],
)
def test_a_timing_that_means_nothing_is_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Recurrence(**fields)


def test_a_day_that_never_comes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cron, "CronSim", lambda *_: iter(()))
    with pytest.raises(ConfigError, match="never due"):
        Recurrence("0 0 29 2 *#2,1")


def test_the_longest_interval_has_slots() -> None:
    timing = Recurrence(every=cron.LONGEST)
    assert following(timing, at("2026-01-01")).date() == date(2069, 12, 7)
    assert newest(timing, at("2026-01-01"), at("2070-01-01"), 100) == [following(timing, at("2026-01-01"))]
