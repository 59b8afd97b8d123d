"""The scheduler: one run for each slot among any number of them, misfires as asked for, and nobody held up by another."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from queue_service import App, Run, RunState, Worker
from queue_service.db import channels
from queue_service.db.channels import Notice
from queue_service.db.execute import Connection
from queue_service.db.query import Query
from queue_service.errors import ConfigError, DatabaseUnavailable, PayloadRefused
from queue_service.schedules.model import DueSchedule, Misfire
from queue_service.schedules.queries import Look
from queue_service.services.scheduler import FIRED_AT_ONCE, LATENESS, MAX_SLOTS, Scheduler, firing
from tests.support import eventually, one, refusing, rows, working

ROOT = Path(__file__).parents[2]


class RecordingScheduler(Scheduler):
    """A scheduler that writes down what it asks and announces, and whose database may be gone."""

    def __init__(self, app: App) -> None:
        self.notices: list[Notice] = []
        self.asked: list[Query[Any]] = []
        self.is_gone = False
        self._app = app
        settings = app.settings
        super().__init__(
            self.fetched, self.notices.extend, poll_interval=settings.poll_interval, retention=settings.retention
        )

    async def fetched(self, query: Query[Any]) -> Any:
        self.asked.append(query)
        if self.is_gone:
            raise DatabaseUnavailable("gone")
        return await self._app.fetch(query)


@pytest.fixture
async def scheduler(app: App) -> RecordingScheduler:
    return RecordingScheduler(app)


async def overdue(conn: Connection, by: timedelta, name: str | None = None) -> None:
    """Let the next slots have come so long ago, on a full hour. On a full minute, another one would often come meanwhile."""
    await conn.execute(
        "update queue_service.schedules set next_at = date_trunc('hour', clock_timestamp()) - %s where name = %s or %s",
        [by, name, name is None],
    )


async def fired(conn: Connection) -> list[str]:
    return [name for (name,) in await rows(conn, "select metadata ->> 'schedule' from queue_service.runs order by id")]


class TestOnce:
    async def test_nothing_that_is_due_costs_one_question(
        self, app: App, scheduler: RecordingScheduler, conn: Connection
    ) -> None:
        await app.schedules.put("yearly", "report", cron="@yearly")
        assert await scheduler.once() == 0
        assert (len(scheduler.asked), scheduler.notices, await fired(conn)) == (1, [], [])

    async def test_fires_what_is_due_once_and_tells_each_lane(
        self, app: App, scheduler: RecordingScheduler, conn: Connection
    ) -> None:
        for name, queue in [("a", "default"), ("b", "default"), ("c", "other")]:
            await app.schedules.put(name, "report", cron="@hourly", queue=queue)
        await app.schedules.put("later", "report", cron="@yearly")
        for name in "abc":
            await overdue(conn, timedelta(0), name)
        assert await scheduler.once() == 3
        assert sorted(await fired(conn)) == ["a", "b", "c"]
        assert sorted(scheduler.notices) == [channels.enqueued("default", 0), channels.enqueued("other", 0)]
        assert await scheduler.once() == 0

    async def test_more_than_a_batch_is_fired_in_batches(
        self, app: App, scheduler: RecordingScheduler, conn: Connection
    ) -> None:
        await app.schedules.put("s", "report", cron="@hourly")
        count = 2 * FIRED_AT_ONCE + 1
        await conn.execute(
            "insert into queue_service.schedules (name, task, queue, payload, cron, next_at) "
            "select 's' || n, 'report', 'default', '{}', '@hourly', clock_timestamp() from generate_series(2, %s) as n",
            [count],
        )
        await overdue(conn, timedelta(0))
        assert await scheduler.once() == count
        assert len(set(await fired(conn))) == count
        assert len(scheduler.asked) == 3 + 3 + 1

    async def test_many_schedulers_give_each_slot_one_run(self, app: App, conn: Connection) -> None:
        for n in range(20):
            await app.schedules.put(f"s{n}", "report", cron="@hourly", misfire="all")
        await overdue(conn, timedelta(hours=9))
        counts = await asyncio.gather(*(RecordingScheduler(app).once() for _ in range(8)))
        fired = await rows(conn, "select metadata ->> 'schedule', metadata ->> 'slot' from queue_service.runs")
        assert sum(counts) == len(fired) == len(set(fired))
        # An hour may have begun meanwhile.
        assert 200 <= len(fired) <= 220

    async def test_a_paused_schedule_is_passed_over(
        self, app: App, scheduler: RecordingScheduler, conn: Connection
    ) -> None:
        await app.schedules.put("s", "report", cron="@hourly")
        await overdue(conn, timedelta(hours=5))
        await app.schedules.pause("s")
        assert await scheduler.once() == 0
        await app.schedules.resume("s")
        assert await scheduler.once() == 0


class TestThePause:
    async def test_is_until_the_next_slot(self, app: App, scheduler: RecordingScheduler, conn: Connection) -> None:
        scheduler._poll_interval = timedelta(hours=1)
        await app.schedules.put("s", "report", cron="@yearly")
        await conn.execute("update queue_service.schedules set next_at = clock_timestamp() + interval '1 min'")
        await scheduler.once()
        assert timedelta(0) < scheduler.pause <= timedelta(minutes=1)

    async def test_is_the_poll_interval_at_most(self, app: App, scheduler: RecordingScheduler) -> None:
        await scheduler.once()
        assert scheduler.pause == app.settings.poll_interval
        await app.schedules.put("s", "report", cron="@yearly")
        await scheduler.once()
        assert scheduler.pause == app.settings.poll_interval

    async def test_follows_an_outage_too(self, app: App, scheduler: RecordingScheduler) -> None:
        scheduler.is_gone = True
        with pytest.raises(DatabaseUnavailable):
            await scheduler.when_due()
        assert scheduler.pause == app.settings.poll_interval


class TestWhatCannotFire:
    async def test_does_not_hold_up_the_others(
        self, app: App, scheduler: RecordingScheduler, conn: Connection, caplog: pytest.LogCaptureFixture
    ) -> None:
        for name in ("a", "bad", "c"):
            await app.schedules.put(name, name, cron="@hourly")
        async with refusing(conn, "runs", "task = 'bad'"):
            for _ in range(3):
                await overdue(conn, timedelta(0), "a")
                await overdue(conn, timedelta(0), "c")
                await overdue(conn, timedelta(0), "bad")
                await conn.execute("delete from queue_service.schedule_slots")
                assert await scheduler.once() == 2
            assert scheduler.pause > timedelta(0)
        assert [message for message in messages(caplog) if "cannot fire; it stays due" in message] != []
        assert len([message for message in messages(caplog) if "cannot fire; it stays due" in message]) == 1
        # Only the first pass tried a batch in vain.
        assert len([message for message in messages(caplog) if "a batch of schedules" in message]) == 1
        assert await scheduler.once() == 1
        assert sorted(await fired(conn)) == ["a"] * 3 + ["bad"] + ["c"] * 3

    @pytest.mark.parametrize("change", ["cron = 'nonsense'", "timezone = 'Atlantis/City'"])
    async def test_is_said_when_its_timing_cannot_be_read_here(
        self, app: App, scheduler: RecordingScheduler, conn: Connection, caplog: pytest.LogCaptureFixture, change: str
    ) -> None:
        for name in ("bad", "good"):
            await app.schedules.put(name, "report", cron="@hourly")
        await conn.execute(f"update queue_service.schedules set {change} where name = 'bad'".encode())
        await overdue(conn, timedelta(0))
        assert await scheduler.once() == 1
        assert await scheduler.once() == 0
        assert await fired(conn) == ["good"]
        assert len([message for message in messages(caplog) if "cannot fire; it stays due" in message]) == 1


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


class TestMisfire:
    NOW = datetime(2026, 3, 1, 12, 0, 10, tzinfo=UTC)

    def slots(self, misfire: str, cron: str, next_at: datetime, now: datetime = NOW) -> list[datetime]:
        due = DueSchedule("s", cron, None, "UTC", Misfire(misfire), next_at, now)
        made = firing(due, Look(now, None, [due]))
        assert made.next_at > now
        return made.slots

    @pytest.mark.parametrize("misfire", list(Misfire))
    def test_a_slot_that_is_on_time_is_fired_for(self, misfire: str) -> None:
        noon = self.NOW.replace(second=0)
        assert self.slots(misfire, "0 12 * * *", noon) == [noon]
        assert self.slots(misfire, "0 12 * * *", noon, noon) == [noon]

    def test_skip_makes_up_for_nothing(self) -> None:
        noon = self.NOW.replace(second=0)
        assert self.slots("skip", "0 12 * * *", noon, noon + LATENESS) == [noon]
        assert self.slots("skip", "0 12 * * *", noon, noon + LATENESS + timedelta(microseconds=1)) == []
        assert self.slots("skip", "0 12 * * *", noon - timedelta(days=3)) == [noon]
        assert self.slots("skip", "0 11 * * *", noon - timedelta(days=3, hours=1)) == []

    def test_last_makes_up_for_the_last_one(self) -> None:
        eleven = self.NOW.replace(hour=11, second=0)
        assert self.slots("last", "0 11 * * *", eleven - timedelta(days=3)) == [eleven]

    def test_all_makes_up_for_all_up_to_a_bound(self) -> None:
        eleven = self.NOW.replace(hour=11, second=0)
        assert self.slots("all", "0 11 * * *", eleven - timedelta(days=3)) == [
            eleven - timedelta(days=n) for n in (3, 2, 1, 0)
        ]
        many = self.slots("all", "* * * * *", eleven - timedelta(days=30))
        assert len(many) == MAX_SLOTS
        assert many[-1] == self.NOW.replace(second=0)

    def test_a_year_of_seconds_is_no_work(self) -> None:
        due = DueSchedule("s", None, timedelta(seconds=1), "UTC", Misfire.ALL, self.NOW - timedelta(days=365), self.NOW)
        assert len(firing(due, Look(self.NOW, None, [due])).slots) == MAX_SLOTS

    def test_a_slot_that_is_none_any_more_is_moved_to_the_one_that_is(self) -> None:
        # As when a zone's rules were changed between two versions of its database.
        noon = self.NOW.replace(second=0)
        assert self.slots("last", "30 12 * * *", noon) == []


class TestDeclared:
    def test_needs_a_task(self, app: App) -> None:
        with pytest.raises(ConfigError, match=r"above @app\.task"):

            @app.schedule("@daily")  # type: ignore[type-var]
            def report() -> None: ...

    @pytest.mark.parametrize(
        ("options", "error"),
        [({"every": 5}, ConfigError), ({"timezone": "Nowhere"}, ConfigError), ({"payload": {"m": 1}}, PayloadRefused),
         ({"payload": None}, PayloadRefused), ({"misfire": "x"}, ConfigError)],
    )  # fmt: skip
    def test_is_refused_where_it_stands(self, app: App, options: dict[str, Any], error: type[Exception]) -> None:
        with pytest.raises(error):

            @app.schedule("@daily", **{"payload": {"n": 1}} | options)
            @app.task
            async def report(n: int) -> None: ...

    def test_two_of_one_name_are_refused_and_two_names_are_not(self, app: App) -> None:
        with pytest.raises(ConfigError, match="another name="):

            @app.schedule("@daily")
            @app.schedule("@weekly", name="weekly")
            @app.schedule("@hourly")
            @app.task
            async def report() -> None: ...

        assert sorted(app.declared) == ["report", "weekly"]

    async def test_is_stored_by_a_worker_and_neither_resumed_nor_missed_nor_deleted_by_it(
        self, app: App, conn: Connection
    ) -> None:
        @app.schedule("0 9 * * 1-5", timezone="Europe/Vienna", misfire="skip", payload={"n": 1}, queue="slow")
        @app.schedule(every=3_600, payload={"n": 2}, name="often")
        @app.task(queue="reports")
        async def report(n: int) -> None: ...

        await app.schedules.put("undeclared", "report", {"n": 3}, cron="@daily")
        await Worker(app).run(once=True)
        assert [(each.name, each.queue) for each in await app.schedules.list()] == [
            ("often", "reports"), ("report", "slow"), ("undeclared", "reports")
        ]  # fmt: skip
        await app.schedules.pause("report")
        await overdue(conn, timedelta(hours=2), "often")
        await conn.execute("update queue_service.schedules set next_at = date_trunc('hour', next_at)")
        await Worker(app).run(once=True)
        found = await app.schedules.get("report")
        assert found is not None
        assert found.paused_at is not None
        # What came due while no worker was there was made up for.
        assert await fired(conn) == ["often"]

    async def test_runs_in_a_worker_when_its_slot_comes(self, app: App) -> None:
        seen: list[Run] = []

        @app.schedule(every=1)
        @app.task
        async def tick(run: Run) -> None:
            seen.append(run)

        async with working(app):
            await eventually(lambda: len(seen) >= 2)
        slots = [datetime.fromisoformat((run.metadata or {})["slot"]) for run in seen]
        assert len(set(slots)) == len(slots)
        assert all(slot.microsecond == 0 for slot in slots)
        # Woken for the slot, not by the next poll.
        assert all(
            timedelta(0) <= run.run_at - slot < timedelta(seconds=1) for run, slot in zip(seen, slots, strict=True)
        )

    async def test_what_is_due_is_worked_off_by_a_worker_that_goes_once(
        self, app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def never(_: Scheduler) -> None:
            await asyncio.Event().wait()

        # Before it looks for runs, and not by the luck of the loop that goes on beside.
        monkeypatch.setattr(Scheduler, "when_due", never)

        @app.schedule("@daily")
        @app.task
        async def report() -> None: ...

        await app.schedules.store_declared()
        await conn.execute("update queue_service.schedules set next_at = date_trunc('day', clock_timestamp())")
        tally = await Worker(app).run(once=True)
        assert tally.succeeded == 1

    async def test_a_run_says_what_it_was_enqueued_for(self, app: App) -> None:
        @app.task
        async def report(run: Run) -> str:
            return str((run.metadata or {})["schedule"])

        await app.schedules.put("mine", "report", cron="@daily")
        run_id = await app.schedules.run_now("mine")
        assert run_id is not None
        async with working(app):
            done = await app.wait(run_id, timeout=10)
        assert (done.state, done.result) == (RunState.SUCCEEDED, "mine")


PROGRAM = """
import asyncio
from queue_service import App, Worker

app = App()

@app.schedule(every=1, misfire="all")
@app.task
async def tick() -> None: ...

asyncio.run(Worker(app).run())
"""


@pytest.fixture
def worker_process(database: str, tmp_path: Path) -> Any:
    """Starts worker processes that declare a schedule of every second; they are killed in the end."""
    program = tmp_path / "ticking.py"
    program.write_text(PROGRAM)
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        environment = {**os.environ, "QUEUE_SERVICE_DATABASE_URL": database, "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen([sys.executable, str(program)], env=environment, stderr=subprocess.DEVNULL))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


async def test_each_slot_gives_one_run_whoever_is_killed(
    conn: Connection, worker_process: Callable[[], subprocess.Popen[bytes]]
) -> None:
    workers = [worker_process() for _ in range(3)]
    count = "select count(*) from queue_service.schedule_slots"
    await eventually(lambda: one(conn, "select count(*) = 3 from queue_service.workers"), within=30)
    for killed in range(3):
        before = await one(conn, count)
        await eventually(partial(grown, conn, before), within=20)
        workers[killed].send_signal(signal.SIGKILL)
        workers[killed].wait()
        if killed < 2:
            worker_process()
    before = await one(conn, count)
    await eventually(partial(grown, conn, before), within=20)
    every_slot = await rows(conn, "select slot, run_id from queue_service.schedule_slots order by slot")
    first, last = every_slot[0][0], every_slot[-1][0]
    # No second is missing, and none is there twice.
    assert len(every_slot) == round((last - first).total_seconds()) + 1
    runs = await rows(
        conn,
        "select id, metadata ->> 'slot' from queue_service.runs union all "
        "select id, metadata ->> 'slot' from queue_service.finished_runs",
    )
    stored = {datetime.fromisoformat(slot): run_id for run_id, slot in runs}
    assert len(stored) == len(runs)
    assert {slot: stored.get(slot) for slot, _ in every_slot} == dict(every_slot)


async def grown(conn: Connection, before: int) -> bool:
    return bool(await one(conn, "select count(*) > %s from queue_service.schedule_slots", before + 1))


async def test_a_thousand_schedules_cost_a_hundredth_of_a_core_when_idle(app: App, conn: Connection) -> None:
    await conn.execute(
        "insert into queue_service.schedules (name, task, queue, payload, cron, next_at) "
        "select 's' || n, 'report', 'default', '{}', '@daily', clock_timestamp() + n * interval '1 hour' "
        "from generate_series(1, 1000) as n"
    )
    scheduler = RecordingScheduler(app)
    await scheduler.once()
    began, passes = time.process_time(), 50
    for _ in range(passes):
        await scheduler.once()
    # One pass a second, which is how often a worker makes them; ten times the usual, for machines that are busy.
    assert (time.process_time() - began) / passes < 0.01
    assert len(scheduler.asked) == passes + 1
