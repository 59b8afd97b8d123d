"""What a schedule is, and what it is to do about slots that nobody was there for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

import msgspec

from queue_service.cron import Recurrence


class Misfire(StrEnum):
    """What happens where several slots have passed, or one long ago, before any worker came to look: none of those is
    made up for, the last one is, or all are (the newest hundred of them)."""

    SKIP = "skip"
    LAST = "last"
    ALL = "all"


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule as it was when it was read. It fires at `next_at`, and while it is paused it does not. `last_slot` is the
    newest slot it has fired for, by `last_run_id`. `turn` is what each of its runs works on, where it has one."""

    name: str
    task: str
    queue: str
    payload: Mapping[str, Any]
    priority: int
    expires_in: timedelta | None
    cron: str | None
    every: timedelta | None
    timezone: str
    misfire: Misfire
    next_at: datetime
    paused_at: datetime | None
    created_at: datetime
    updated_at: datetime
    last_slot: datetime | None = None
    last_run_id: int | None = None
    turn: Mapping[str, Any] | None = None

    @property
    def recurrence(self) -> Recurrence:
        """Raises ConfigError where the time zone is not known on this machine."""
        return Recurrence(self.cron, self.every, self.timezone)


@dataclass(frozen=True, slots=True)
class NewSchedule:
    """What is stored of a schedule. `payload` and `turn` are JSON text."""

    name: str
    recurrence: Recurrence
    misfire: Misfire
    task: str
    queue: str
    payload: str
    priority: int = 0
    expires_in: timedelta | None = None
    turn: str | None = None


@dataclass(frozen=True, slots=True)
class DueSchedule:
    """A schedule whose `next_at` has come. Whoever changes the schedule meanwhile changes `updated_at` too."""

    name: str
    cron: str | None
    every: timedelta | None
    timezone: str
    misfire: Misfire
    next_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Firing:
    """The slots a due schedule fires for, and when it is due again."""

    due: DueSchedule
    slots: list[datetime]
    next_at: datetime
