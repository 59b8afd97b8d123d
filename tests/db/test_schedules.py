"""Schedules as rows: what is stored, what is refused, and one firing for each slot whoever competes for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from queue_service import App, Run, Turn, Worker
from queue_service.db.execute import Connection, fetch
from queue_service.errors import ConfigError, PayloadRefused
from queue_service.schedules import queries
from queue_service.schedules.model import DueSchedule, Firing, Misfire
from tests.support import blocked, eventually, one, rows

RETENTION = timedelta(days=14)
FIRST = datetime(2026, 1, 1, 9, tzinfo=UTC)
SECOND = FIRST + timedelta(days=1)


async def due(conn: Connection, name: str = "daily") -> DueSchedule:
    """The schedule as a scheduler sees it, its slot having come."""
    await conn.execute("update queue_service.schedules set next_at = %s where name = %s", [FIRST, name])
    (found,) = [each for each in (await fetch(conn, queries.due(limit=10))).due if each.name == name]
    return found


def firing(seen: DueSchedule, *slots: datetime, next_at: datetime = SECOND) -> Firing:
    return Firing(seen, list(slots or [FIRST]), next_at)


async def fire(conn: Connection, *firings: Firing) -> list[int | None]:
    return [each.run_id for each in await fetch(conn, queries.fire(firings, retention=RETENTION))]


@pytest.fixture
async def daily(app: App) -> str:
    await app.schedules.put("daily", "report", {"n": 1}, cron="0 9 * * *")
    return "daily"


class TestPut:
    async def test_stores_what_it_is_given(self, app: App) -> None:
        stored = await app.schedules.put(
            "daily", "report", {"n": 1}, cron="0 9 * * 1-5", timezone="Europe/Vienna", misfire="all", queue="slow",
            priority=5, expires_in=60,
        )  # fmt: skip
        assert stored is True
        found = await app.schedules.get("daily")
        assert found is not None
        assert (found.task, found.queue, found.payload, found.priority) == ("report", "slow", {"n": 1}, 5)
        assert (found.cron, found.every, found.timezone) == ("0 9 * * 1-5", None, "Europe/Vienna")
        assert (found.misfire, found.expires_in, found.paused_at) == (Misfire.ALL, timedelta(seconds=60), None)
        assert found.next_at > found.created_at
        assert (found.last_slot, found.last_run_id) == (None, None)

    async def test_takes_a_tasks_own_queue_and_holds_the_payload_against_it(self, app: App) -> None:
        @app.task(queue="reports")
        async def report(n: int) -> None: ...

        await app.schedules.put("often", "report", {"n": 1}, every=90)
        found = await app.schedules.get("often")
        assert found is not None
        assert (found.queue, found.every) == ("reports", timedelta(seconds=90))
        with pytest.raises(PayloadRefused):
            await app.schedules.put("often", "report", {"m": 1}, every=90)

    async def test_again_changes_nothing_not_even_a_slot_that_is_due(self, app: App, conn: Connection) -> None:
        for _ in range(2):
            stored = await app.schedules.put("daily", "report", {"a": 1, "b": 2}, cron="@daily")
            await due(conn)
        assert stored is None
        assert await one(conn, "select next_at from queue_service.schedules") == FIRST

    async def test_a_change_keeps_pause_and_slot_and_a_new_timing_begins_with_its_next(
        self, app: App, conn: Connection, daily: str
    ) -> None:
        seen = await due(conn)
        await app.schedules.pause(daily)
        assert await app.schedules.put("daily", "report", {"n": 2}, cron="0 9 * * *") is False
        found = await app.schedules.get("daily")
        assert found is not None
        assert (found.payload, found.next_at) == ({"n": 2}, FIRST)
        assert found.paused_at is not None
        assert found.updated_at > seen.updated_at
        assert await app.schedules.put("daily", "report", {"n": 2}, cron="0 10 * * *") is False
        found = await app.schedules.get("daily")
        assert found is not None
        assert found.next_at > datetime.now(UTC) - timedelta(minutes=1)
        assert found.paused_at is not None

    @pytest.mark.parametrize(
        ("fields", "error"),
        [
            ({"cron": "nonsense"}, ConfigError),
            ({"cron": "@daily", "timezone": "Nowhere"}, ConfigError),
            ({}, ConfigError),
            ({"cron": "@daily", "every": 5}, ConfigError),
            ({"every": 0.5}, ConfigError),
            ({"every": -5}, ConfigError),
            ({"every": "5m"}, ConfigError),
            ({"cron": "@daily", "misfire": "never"}, ConfigError),
            ({"cron": "@daily", "priority": 10**6}, ConfigError),
            ({"cron": "@daily", "queue": ""}, ConfigError),
            ({"cron": "@daily", "expires_in": 0}, ConfigError),
        ],
    )
    async def test_refuses_what_could_never_fire(
        self, app: App, conn: Connection, fields: dict[str, Any], error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            await app.schedules.put("daily", "report", **fields)
        assert await one(conn, "select count(*) from queue_service.schedules") == 0

    @pytest.mark.parametrize(
        ("name", "task", "payload"),
        [("", "report", {}), ("x" * 257, "report", {}), ("daily", "", {}), ("daily", "report", [1]),
         ("daily", "report", {"n": float("nan")}), ("a\0b", "report", {})],
    )  # fmt: skip
    async def test_refuses_names_and_payloads_that_cannot_be_stored(
        self, app: App, name: str, task: str, payload: Any
    ) -> None:
        with pytest.raises((ConfigError, PayloadRefused)):
            await app.schedules.put(name, task, payload, cron="@daily")


@pytest.mark.usefixtures("daily")
class TestFire:
    async def test_stores_a_run_for_the_slot_and_moves_on(self, conn: Connection) -> None:
        (run_id,) = await fire(conn, firing(await due(conn)))
        assert await rows(
            conn, "select id, task, queue, payload, priority, state, metadata, expires_at from queue_service.runs"
        ) == [
            (run_id, "report", "default", {"n": 1}, 0, "queued",
             {"schedule": "daily", "slot": "2026-01-01T09:00:00+00:00"}, None)
        ]  # fmt: skip
        assert await one(
            conn, "select run_at <= clock_timestamp() and run_at > now() - interval '1 m' from queue_service.runs"
        )
        assert await one(conn, "select next_at from queue_service.schedules") == SECOND
        assert await rows(conn, "select schedule, slot, run_id from queue_service.schedule_slots") == [
            ("daily", FIRST, run_id)
        ]

    async def test_the_runs_of_several_slots_are_in_their_order(self, app: App, conn: Connection) -> None:
        slots = [FIRST + timedelta(hours=n) for n in range(5)]
        ids = await fire(conn, firing(await due(conn), *slots))
        assert len(ids) == 5
        in_order = await rows(conn, "select metadata ->> 'slot' from queue_service.runs order by run_at, id")
        assert [datetime.fromisoformat(slot) for (slot,) in in_order] == slots
        found = await app.schedules.get("daily")
        assert found is not None
        assert found.last_slot == slots[-1]
        assert found.last_run_id == max(filter(None, ids))

    async def test_what_expires_counts_from_the_firing(self, app: App, conn: Connection) -> None:
        await app.schedules.put("daily", "report", cron="@daily", expires_in=60)
        await fire(conn, firing(await due(conn)))
        assert await one(conn, "select expires_at - run_at from queue_service.runs") == timedelta(seconds=60)

    async def test_a_slot_that_was_fired_for_gives_no_second_run(self, conn: Connection) -> None:
        await fire(conn, firing(await due(conn)))
        # As after a clock of the server that was put back.
        assert await fire(conn, firing(await due(conn), FIRST, SECOND)) != [None]
        assert await one(conn, "select count(*) from queue_service.runs") == 2
        assert await fire(conn, firing(await due(conn))) == [None]
        assert await one(conn, "select next_at from queue_service.schedules") == SECOND

    @pytest.mark.parametrize("change", ["moved", "paused", "put", "resumed", "deleted"])
    async def test_what_was_changed_since_it_was_seen_does_not_fire(
        self, app: App, conn: Connection, change: str
    ) -> None:
        seen = await due(conn)
        if change == "moved":
            await fire(conn, firing(seen))
            await conn.execute("delete from queue_service.schedule_slots")
        elif change == "paused":
            await app.schedules.pause("daily")
        elif change == "put":
            await app.schedules.put("daily", "report", {"n": 2}, cron="0 9 * * *")
        elif change == "resumed":
            await app.schedules.pause("daily")
            await app.schedules.resume("daily")
        else:
            await app.schedules.delete("daily")
        before = await one(conn, "select count(*) from queue_service.runs")
        assert await fire(conn, firing(seen)) == []
        assert await one(conn, "select count(*) from queue_service.runs") == before

    async def test_a_run_that_cannot_be_stored_leaves_everything_as_it_was(self, conn: Connection) -> None:
        seen = await due(conn)
        await conn.execute("alter table queue_service.runs add constraint refused check (task <> 'report') not valid")
        with pytest.raises(Exception, match="refused"):
            await fire(conn, firing(seen))
        assert await one(conn, "select next_at from queue_service.schedules") == FIRST
        assert await one(conn, "select count(*) from queue_service.schedule_slots") == 0

    async def test_a_few_old_slots_of_what_fires_are_forgotten(self, conn: Connection) -> None:
        await conn.execute(
            "insert into queue_service.schedule_slots (schedule, slot, fired_at, run_id) "
            "select name, day, day, 1 from unnest(array['daily', 'other']) as name, "
            "generate_series(clock_timestamp() - interval '40 days', now() - interval '11 days', '1 day') as day"
        )
        now = await fetch(conn, queries.clock())
        for left in (20, 11, 5):
            await fire(conn, firing(await due(conn), now - timedelta(seconds=left)))
            assert await one(conn, "select count(*) from queue_service.schedule_slots where schedule = 'daily'") == left
        assert await one(conn, "select count(*) from queue_service.schedule_slots where schedule = 'other'") == 29


@pytest.mark.usefixtures("daily")
class TestRaces:
    async def test_of_two_that_saw_the_same_one_fires(
        self, conn: Connection, session: Callable[[], Awaitable[Connection]]
    ) -> None:
        other = await session()
        seen = await due(conn)
        async with conn.transaction():
            assert len(await fire(conn, firing(seen))) == 1
            # The row is taken: it is left to whoever holds it, without waiting.
            assert await fire(other, firing(seen)) == []
        assert await fire(other, firing(seen)) == []
        assert await one(conn, "select count(*) from queue_service.runs") == 1

    async def test_if_the_first_rolls_back_the_second_fires(
        self, conn: Connection, session: Callable[[], Awaitable[Connection]]
    ) -> None:
        other = await session()
        seen = await due(conn)
        async with conn.transaction(force_rollback=True):
            assert len(await fire(conn, firing(seen))) == 1
        assert len(await fire(other, firing(seen))) == 1
        assert await one(conn, "select count(*) from queue_service.runs") == 1

    async def test_a_slot_that_another_session_is_storing_is_waited_for(
        self, conn: Connection, session: Callable[[], Awaitable[Connection]]
    ) -> None:
        other = await session()
        seen = await due(conn)
        async with conn.transaction():
            await conn.execute(
                "insert into queue_service.schedule_slots (schedule, slot, run_id) values ('daily', %s, 1)", [FIRST]
            )
            waiting = asyncio.create_task(fire(other, firing(seen)))
            third = await session()
            await eventually(lambda: blocked(third, other))
        assert await waiting == [None]
        assert await one(conn, "select count(*) from queue_service.runs") == 0

    async def test_many_in_opposite_orders_fire_each_once(
        self, app: App, conn: Connection, session: Callable[[], Awaitable[Connection]]
    ) -> None:
        names = [f"s{n}" for n in range(30)]
        for name in names:
            await app.schedules.put(name, "report", cron="@daily")
        await conn.execute("update queue_service.schedules set next_at = %s where name <> 'daily'", [FIRST])
        seen = (await fetch(conn, queries.due(limit=100))).due
        sessions = [await session() for _ in range(6)]
        orders = [seen, seen[::-1]] * 3
        fired = await asyncio.gather(
            *(fire(each, *map(firing, order)) for each, order in zip(sessions, orders, strict=True))
        )
        assert sum(map(len, fired)) == 30
        by = await rows(conn, "select metadata ->> 'schedule' from queue_service.runs")
        assert sorted(name for (name,) in by) == sorted(names)


class TestTheRest:
    async def test_a_pause_stops_it_and_a_resumption_goes_on_with_the_next_slot(
        self, app: App, conn: Connection, daily: str
    ) -> None:
        await due(conn)
        assert await app.schedules.pause(daily) is True
        assert await app.schedules.pause(daily) is False
        assert (await fetch(conn, queries.due(limit=10))).due == []
        assert await app.schedules.resume(daily) is True
        assert await app.schedules.resume(daily) is False
        look = await fetch(conn, queries.due(limit=10))
        assert look.due == []
        assert look.later is not None
        assert timedelta(0) < look.later - look.now <= timedelta(days=1)

    async def test_a_resumption_that_saw_another_timing_changes_nothing(
        self, app: App, conn: Connection, daily: str
    ) -> None:
        await app.schedules.pause(daily)
        seen = await app.schedules.get(daily)
        assert seen is not None
        await app.schedules.put("daily", "report", {"n": 1}, cron="0 10 * * *")
        assert await fetch(conn, queries.resume(seen, SECOND)) is False
        assert await one(conn, "select paused_at is not null and next_at <> %s from queue_service.schedules", SECOND)

    async def test_what_does_not_exist_is_said_to(self, app: App) -> None:
        schedules = app.schedules
        assert await schedules.get("nobody") is None
        assert await schedules.next("nobody") is None
        assert await schedules.pause("nobody") is None
        assert await schedules.resume("nobody") is None
        assert await schedules.run_now("nobody") is None
        assert await schedules.delete("nobody") is False

    async def test_run_now_gives_a_run_and_uses_no_slot(self, app: App, daily: str) -> None:
        await app.schedules.pause(daily)
        before = await app.schedules.get(daily)
        run_id = await app.schedules.run_now(daily)
        assert run_id is not None
        run = await app.get(run_id)
        assert run is not None
        assert run.metadata is not None
        assert (run.task, run.payload, run.metadata["schedule"]) == ("report", {"n": 1}, "daily")
        assert datetime.fromisoformat(run.metadata["slot"]) == run.run_at
        assert await app.schedules.get(daily) == before

    async def test_next_tells_the_slots_to_come(self, app: App, conn: Connection, daily: str) -> None:
        await due(conn)
        assert await app.schedules.next(daily, 3) == [FIRST, SECOND, SECOND + timedelta(days=1)]
        assert await app.schedules.next(daily, 1) == [FIRST]
        await app.schedules.pause(daily)
        (following,) = await app.schedules.next(daily, 1) or []
        assert following > datetime.now(UTC) - timedelta(minutes=1)

    async def test_deleting_forgets_its_slots_and_keeps_its_runs(self, app: App, conn: Connection, daily: str) -> None:
        await app.schedules.put("other", "report", cron="@daily")
        await fire(conn, firing(await due(conn)))
        await fire(conn, firing(await due(conn, "other")))
        assert await app.schedules.delete(daily) is True
        assert [each.name for each in await app.schedules.list()] == ["other"]
        assert await rows(conn, "select schedule from queue_service.schedule_slots") == [("other",)]
        assert await one(conn, "select count(*) from queue_service.runs") == 2

    async def test_a_look_goes_on_after_the_last_one_it_saw(self, app: App, conn: Connection) -> None:
        for name in "edcba":
            await app.schedules.put(name, "report", cron="@daily")
        await conn.execute(
            "update queue_service.schedules set next_at = %s - (name = 'c')::int * interval '1 day'", [FIRST]
        )
        seen, at = [], queries.START
        while found := (await fetch(conn, queries.due(after=at, limit=2))).due:
            seen += [each.name for each in found]
            at = (found[-1].next_at, found[-1].name)
        assert seen == ["c", "a", "b", "d", "e"]


class TestAScheduleOfTurns:
    TURN = Turn(deployment="dep-1", message_id="daily", stream="conv-1", platform="chat", channel_id="c1")

    @pytest.fixture
    async def app(self, app: App) -> App:
        @app.schedule("0 9 * * *", turn=self.TURN, payload={"n": 1})
        @app.task()
        async def report(run: Run, n: int) -> None:
            assert run.turn is not None
            await app.turns.commit_reply("dep-1", [run.turn.message_id], {"n": n})

        await app.schedules.store_declared()
        return app

    async def test_arms_one_for_each_slot_for_its_run_to_work_on(self, app: App, conn: Connection) -> None:
        (run_id,) = await fire(conn, firing(await due(conn, "report")))
        assert run_id is not None
        (marker,) = await app.turns.list()
        assert (marker.message_id, marker.run_id) == ("daily/2026-01-01T09:00:00.000000Z", run_id)
        assert marker.metadata == {"source": "schedule"}
        assert marker.admission == app.settings.admission
        assert marker.ends_by is not None
        run = await app.get(run_id)
        assert run is not None
        assert run.turn == marker.turn
        assert run.ordering_key == "conv-1"
        await Worker(app, {"default": 1}).run(once=True)
        outcome = await app.turns.outcome("dep-1", marker.message_id)
        assert outcome is not None
        assert outcome.body is not None
        assert outcome.body["n"] == 1

    async def test_run_now_is_a_turn_too(self, app: App) -> None:
        run_id = await app.schedules.run_now("report")
        (marker,) = await app.turns.list()
        assert marker.run_id == run_id
        await app.schedules.run_now("report")
        assert len(await app.turns.list()) == 2

    async def test_is_shown_and_changed(self, app: App) -> None:
        schedule = await app.schedules.get("report")
        assert schedule is not None
        assert schedule.turn is not None
        assert schedule.turn["stream"] == "conv-1"
        assert await app.schedules.put("report", "report", {"n": 1}, cron="0 9 * * *") is False
        schedule = await app.schedules.get("report")
        assert schedule is not None
        assert schedule.turn is None
        run_id = await app.schedules.run_now("report")
        assert run_id is not None
        run = await app.get(run_id)
        assert run is not None
        assert run.turn is None

    async def test_a_turn_that_was_armed_before_is_not_armed_again(self, app: App, conn: Connection) -> None:
        message_id = "daily/2026-01-01T09:00:00.000000Z"
        await app.turns.arm(Turn(deployment="dep-1", message_id=message_id, stream="conv-1"))
        await app.turns.commit_reply("dep-1", [message_id], {})
        await fire(conn, firing(await due(conn, "report")))
        assert await app.turns.list() == []
