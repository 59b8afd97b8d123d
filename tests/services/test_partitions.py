"""The partitions of history: there in time, gone in time, and what failed kept for longer."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime, timedelta

import pytest

from queue_service import App, RunState, Worker
from queue_service.db.execute import Connection, fetch
from queue_service.runs import queries, settling
from queue_service.runs.model import Ending
from queue_service.services.loop import Work, every
from queue_service.services.partitions import DAYS_AHEAD, Changed, Partitions
from queue_service.worker import maintenance
from tests.support import blocked, claimed, enqueued, eventually, one, rows

Open = Callable[[], Awaitable[Connection]]

WAITED_FOR = (
    "select count(*) > 0 from pg_locks where not granted and relation = 'queue_service.finished_runs'::regclass"
)
STATES = {1: "succeeded", 2: "failed", 3: "cancelled", 4: "failed", 5: "expired"}


def of(app: App, days: int = 14, failed: int = 0) -> Partitions:
    return Partitions(app.pool, retention=timedelta(days=days), retention_failed=timedelta(days=failed))


def ago(days: int) -> date:
    return datetime.now(UTC).date() - timedelta(days=days)


def name(day: date) -> str:
    return f"finished_runs_{day:%Y%m%d}"


async def make(conn: Connection, day: date) -> str:
    """A partition as another pass made it, on that day."""
    made = f"""create table queue_service.{name(day)} partition of queue_service.finished_runs
        for values from ('{day}Z') to ('{day + timedelta(days=1)}Z')"""
    await conn.execute(made.encode())
    return name(day)


async def fill(conn: Connection, day: date, states: dict[int, str] = STATES) -> None:
    """Runs that ended on that day, by id."""
    for run_id, state in states.items():
        await conn.execute(
            """insert into queue_service.finished_runs
                (id, finished_at, run_at, created_at, attempt, failures, losses, priority, state, queue, task, payload)
               select %s, at, at, at, 1, 0, 0, 0, %s, 'default', 'noop', '{}' from (select %s::timestamptz as at) as day""",
            [run_id, state, datetime(day.year, day.month, day.day, 12, tzinfo=UTC)],
        )


async def partitions(conn: Connection) -> list[str]:
    found = await rows(
        conn, "select relname from pg_class join pg_inherits on inhrelid = oid where relkind = 'r' order by relname"
    )
    return [row[0] for row in found]


async def kept(conn: Connection) -> list[int]:
    return [row[0] for row in await rows(conn, "select id from queue_service.finished_runs order by id")]


async def test_however_long_history_is_kept_a_worker_looks_in_time(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of a year is longer than the three days for which there are partitions."""
    intervals: dict[str, timedelta] = {}

    def noted(interval: timedelta, once: Callable[[], Awaitable[object]]) -> Work:
        intervals[getattr(once, "__qualname__", "")] = interval
        return every(interval, once)

    monkeypatch.setattr(maintenance, "every", noted)
    worker = Worker(app, settings=dataclasses.replace(app.settings, retention=timedelta(days=365)))
    running = asyncio.create_task(worker.run())
    await eventually(lambda: "Pruner.once" in intervals)
    worker.stop()
    await running
    assert intervals["Pruner.once"] <= timedelta(days=DAYS_AHEAD) / 3


class TestMaking:
    async def test_partitions_are_made_ahead_once(self, app: App) -> None:
        first, second = await of(app).make_and_drop(), await of(app).make_and_drop()
        assert first.made == [name(ago(-days)) for days in range(DAYS_AHEAD + 1)]
        assert (first.dropped, second) == ([], Changed([], []))

    async def test_what_the_default_partition_caught_moves_along(self, app: App, conn: Connection) -> None:
        await enqueued(conn)
        ((run, lease),) = await claimed(conn)
        await fetch(conn, settling.finish([Ending(run.claim, RunState.SUCCEEDED, "1")], worker_id=1, freed=[lease]))
        assert await one(conn, "select count(*) from queue_service.finished_runs_default") == 1
        await of(app).make_and_drop()
        assert await one(conn, "select count(*) from queue_service.finished_runs_default") == 0
        found = await app.get(run.id)
        assert found is not None
        assert found.result == 1

    @pytest.mark.parametrize("days", [5, 1, -20])
    async def test_a_day_for_which_nobody_made_one_in_time_gets_its_own_late(
        self, app: App, conn: Connection, days: int
    ) -> None:
        """Nobody worked for days, or the clock went back; some runs ended all the same. In the default partition they
        would stay for ever."""
        await fill(conn, ago(days))
        assert name(ago(days)) in (await of(app).make_and_drop()).made
        assert await one(conn, "select count(*) from queue_service.finished_runs_default") == 0
        assert await kept(conn) == sorted(STATES)

    async def test_what_came_late_and_is_past_retention_is_dropped_in_the_next_pass(
        self, app: App, conn: Connection
    ) -> None:
        await make(conn, ago(1))
        await fill(conn, ago(40))
        assert (await of(app).make_and_drop()).dropped == []
        assert (await of(app).make_and_drop()).dropped == [name(ago(40))]
        assert await kept(conn) == []

    async def test_two_at_once_do_the_work_once(self, app: App) -> None:
        done = await asyncio.gather(of(app).make_and_drop(), of(app).make_and_drop())
        assert sorted(len(each.made) for each in done) == [0, DAYS_AHEAD + 1]

    async def test_a_busy_table_is_left_for_the_next_pass(self, app: App, session: Open) -> None:
        busy = await session()
        async with busy.transaction():
            await busy.execute("lock table queue_service.finished_runs_default in row exclusive mode")
            assert await of(app).make_and_drop() == Changed([], [])
        assert len((await of(app).make_and_drop()).made) == DAYS_AHEAD + 1


class TestDropping:
    async def test_partitions_past_retention_are_dropped(self, app: App, conn: Connection) -> None:
        for days in (1, 14, 15, 400):
            await make(conn, ago(days))
        assert (await of(app).make_and_drop()).dropped == [name(ago(400)), name(ago(15))]

    async def test_a_clock_that_has_jumped_ahead_drops_nothing(self, app: App, conn: Connection) -> None:
        """Seen from today, the partitions were made by passes of long ago; nobody was here yesterday."""
        for days in range(60, 60 - DAYS_AHEAD - 1, -1):
            await make(conn, ago(days))
        await fill(conn, ago(60))
        for _ in range(2):
            assert (await of(app, failed=30).make_and_drop()).dropped == []
            assert await of(app, failed=90).thin() == []
        assert await kept(conn) == sorted(STATES)


class TestThinning:
    @pytest.fixture
    async def days(self, conn: Connection) -> list[str]:
        """Yesterday, and a day past retention with one run of each ending, and two that failed."""
        names = [await make(conn, ago(days)) for days in (20, 1)]
        await fill(conn, ago(20))
        return names

    async def test_what_failed_is_kept_for_longer_than_the_rest(
        self, app: App, conn: Connection, days: list[str]
    ) -> None:
        history = of(app, failed=30)
        assert (await history.make_and_drop()).dropped == []
        assert await history.thin() == [days[0]]
        assert await kept(conn) == [2, 4]
        assert [each for each in await partitions(conn) if each < days[1]] == [f"{days[0]}_failed"]
        assert (await history.make_and_drop(), await history.thin()) == (Changed([], []), [])

    async def test_it_is_found_by_its_indexes_and_can_be_retried(
        self, app: App, conn: Connection, days: list[str]
    ) -> None:
        await of(app, failed=30).thin()
        indexes = [
            f"select count(*) from pg_indexes where tablename = '{each}'" for each in (f"{days[0]}_failed", days[1])
        ]
        assert [await one(conn, each) for each in indexes] == [2, 2]
        assert await app.retry(4)
        assert await kept(conn) == [2]

    async def test_past_its_own_retention_it_is_dropped_too(self, app: App, conn: Connection, days: list[str]) -> None:
        await of(app, failed=30).thin()
        assert (await of(app, failed=19).make_and_drop()).dropped == [f"{days[0]}_failed"]
        assert await kept(conn) == []

    async def test_a_day_past_both_is_dropped_as_it_is(self, app: App, days: list[str]) -> None:
        history = of(app, failed=18)
        assert (await history.make_and_drop()).dropped == [days[0]]
        assert await history.thin() == []

    @pytest.mark.usefixtures("days")
    @pytest.mark.parametrize("failed", [0, 14])
    async def test_without_a_longer_retention_days_stay_whole(self, app: App, conn: Connection, failed: int) -> None:
        assert await of(app, failed=failed).thin() == []
        assert await kept(conn) == sorted(STATES)

    @pytest.mark.usefixtures("days")
    async def test_failed_runs_are_never_kept_for_less_than_the_others(self, app: App, conn: Connection) -> None:
        history = of(app, days=30, failed=1)
        assert (await history.make_and_drop()).dropped == []
        assert await history.thin() == []
        assert await kept(conn) == sorted(STATES)

    async def test_two_at_once_replace_a_day_once(self, app: App, conn: Connection, days: list[str]) -> None:
        done = await asyncio.gather(*(of(app, failed=30).thin() for _ in range(2)))
        assert sorted(done) == [[], [days[0]]]
        assert await kept(conn) == [2, 4]

    @pytest.mark.parametrize("commit", [True, False])
    async def test_what_is_retried_meanwhile_is_not_kept_as_well(
        self, app: App, conn: Connection, session: Open, days: list[str], commit: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is copied, since the retry is not committed; then the lock waits for the retry to end."""
        monkeypatch.setattr("queue_service.services.partitions.LOCK_WAIT", 60)
        retrying = await session()
        await retrying.execute("begin")
        assert await fetch(retrying, queries.retry(2))
        thinning = asyncio.create_task(of(app, failed=30).thin())
        await eventually(lambda: one(conn, WAITED_FOR))
        await retrying.execute("commit" if commit else "rollback")
        assert await thinning == [days[0]]
        assert await kept(conn) == ([4] if commit else [2, 4])

    async def test_a_retry_that_waits_for_the_day_to_be_replaced_finds_the_run(
        self, app: App, conn: Connection, session: Open, days: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("queue_service.services.partitions.LOCK_WAIT", 60)
        reader, retrying = await session(), await session()
        async with reader.transaction():
            await reader.execute("select from queue_service.finished_runs")
            thinning = asyncio.create_task(of(app, failed=30).thin())
            await eventually(lambda: one(conn, WAITED_FOR))
            retry = asyncio.create_task(fetch(retrying, queries.retry(2)))
            await eventually(lambda: blocked(conn, retrying))
        assert await thinning == [days[0]]
        moved = await retry
        assert moved is not None
        assert moved.has_moved
        assert await kept(conn) == [4]

    async def test_a_busy_history_is_left_whole_for_the_next_pass(
        self, app: App, conn: Connection, session: Open, days: list[str]
    ) -> None:
        busy = await session()
        async with busy.transaction():
            await busy.execute("select from queue_service.finished_runs")
            assert await of(app, failed=30).thin() == []
        assert await kept(conn) == sorted(STATES)
        assert await partitions(conn) == [*days, "finished_runs_default"]
        assert await of(app, failed=30).thin() == [days[0]]
