"""What the statements about schedules read: planned while every table was empty, believed empty, and with right statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from queue_service.db.query import Query
from queue_service.schedules import queries
from queue_service.schedules.model import DueSchedule, Firing, Misfire
from tests.plans.database import Sync, believed_empty, looked, prepare
from tests.support import make_ours

SCHEDULES, SLOTS = 20_000, 200_000
TABLES = {"schedules", "schedule_slots", "runs"}
FIRST = datetime(2026, 1, 1, tzinfo=UTC)

# A hundredth is due and as many are paused, on the same slots; of each of the first thousand, two hundred old slots.
FILL = """
insert into queue_service.schedules (name, task, queue, payload, cron, next_at, updated_at, paused_at)
select 's' || n, 't', 'default', '{}', '@daily',
       case when n % 50 = 0 then '2026-01-01Z' else clock_timestamp() + n * interval '1 min' end, '2026-01-01Z',
       case when n % 100 = 50 then clock_timestamp() end
  from generate_series(1, 20000) as n;
insert into queue_service.schedule_slots (schedule, slot, fired_at, run_id)
select 's' || 100 * (n % 1000), moment, moment, n
  from generate_series(0, 199999) as n
 cross join lateral (select '2025-01-01Z'::timestamptz + n / 1000 * interval '1 h' as moment) as moments
"""

STAGES = ["planned while empty", "believed empty", "believed full"]


def due(number: int) -> DueSchedule:
    return DueSchedule(f"s{number}", "@daily", None, "UTC", Misfire.LAST, FIRST, FIRST)


# The most rows that each may look at.
STATEMENTS: dict[str, tuple[Callable[[], Query[Any]], int]] = {
    "due": (lambda: queries.due(limit=100), 101),
    "due after": (lambda: queries.due(after=(FIRST, "s5"), limit=100), 101),
    "get": (lambda: queries.get("s100"), 2),
    "run_now": (lambda: queries.run_now("s100"), 1),
    "pause": (lambda: queries.pause("s100"), 2),
    "delete": (lambda: queries.delete("s100"), 1 + 200),
    # Each is found, locked and moved, and ten old slots are forgotten.
    "fire one": (lambda: fire(1), 2 + 20),
    "fire many": (lambda: fire(100), 100 * (2 + 20)),
}


def fire(count: int) -> Query[Any]:
    firings = [Firing(due(100 * n), [FIRST], FIRST + timedelta(days=1)) for n in range(1, count + 1)]
    return queries.fire(firings, retention=timedelta(days=14))


@pytest.fixture(scope="module")
def filled(server: str, template: str) -> Iterator[Sync]:
    with believed_empty(server, template, "queue_service_schedule_plans", TABLES) as conn:
        make_ours(conn)
        for number, (make, _) in enumerate(STATEMENTS.values()):
            prepare(conn, f"p{number}", make())
        conn.execute(FILL.encode())
        yield conn


@pytest.fixture(scope="module", params=STAGES)
def stage(request: pytest.FixtureRequest, filled: Sync) -> str:
    """The stages follow one another on one database."""
    if request.param == "believed full":
        filled.execute("reset all")
        filled.execute("analyze")
        make_ours(filled)
    return str(request.param)


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_statement_looks_at_what_it_takes_and_little_else(filled: Sync, stage: str, name: str) -> None:
    make, most = STATEMENTS[name]
    prepared = f"p{list(STATEMENTS).index(name)}" if stage == "planned while empty" else None
    with filled.transaction(force_rollback=True):
        look = looked(filled, make(), TABLES, prepared=prepared)
    assert look.visited <= most, look.shown
    assert {kind for _, kind in look.kinds} <= {"Index Scan", "Index Only Scan", "Tid Scan"}, look.shown
    assert look.discarded <= 30_000
