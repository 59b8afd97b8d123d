from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from queue_service import App, RunState, Turn
from queue_service.db import channels
from queue_service.db.channels import Notice
from queue_service.db.execute import Connection, fetch
from queue_service.db.own_connection import OwnConnection
from queue_service.db.pool import Pool
from queue_service.db.query import Query, nothing, scalar
from queue_service.errors import DatabaseUnavailable, RunUnknown
from queue_service.runs import queries
from queue_service.runs.queries import Claimant
from queue_service.services.pruner import Pruner
from queue_service.services.sweeper import SweepCounts, Sweeper
from tests.support import claimed, enqueued, eventually, lapse, one, rows, working

KILL = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = %s and datname = current_database()"


class TestSweeper:
    async def test_a_lost_workers_runs_are_queued_again_and_announced(self, app: App, conn: Connection) -> None:
        announced: list[Notice] = []
        await enqueued(conn)
        await claimed(conn)
        sweeper = Sweeper(app.fetch, announced.extend, max_losses=3)
        assert await sweeper.once() == SweepCounts(0, 0, 0)
        await lapse(conn)
        assert await sweeper.once() == SweepCounts(1, 0, 0)
        assert await rows(conn, "select state, losses, attempt from queue_service.runs") == [("queued", 1, 1)]
        assert announced == [channels.enqueued("default", 0)]

    async def test_at_the_limit_of_losses_a_run_ends_failed_for_that_reason(self, app: App, conn: Connection) -> None:
        run_id = await enqueued(conn)
        sweeper = Sweeper(app.fetch, lambda _: None, max_losses=3)
        for loss in range(3):
            lease = timedelta(seconds=30)
            suspect = queries.claim_suspect(["default"], Claimant(["noop"], 1, lease))
            assert len(await (fetch(conn, suspect) if loss else claimed(conn))) == 1
            await lapse(conn)
            await sweeper.once()
        run = await app.get(run_id)
        assert run is not None
        assert run.error is not None
        assert (run.state, run.losses, run.failures, run.error["reason"]) == (RunState.FAILED, 3, 0, "worker_lost")

    async def test_a_lost_run_that_was_to_be_cancelled_ends_cancelled(self, app: App, conn: Connection) -> None:
        run_id = await enqueued(conn)
        await claimed(conn)
        await app.cancel(run_id)
        await lapse(conn)
        assert (await Sweeper(app.fetch, lambda _: None, max_losses=3).once()).ended == 1
        run = await app.get(run_id)
        assert run is not None
        assert run.state is RunState.CANCELLED

    async def test_many_leases_are_taken_in_bounded_passes(self, app: App, conn: Connection) -> None:
        for _ in range(45):
            await enqueued(conn)
            await claimed(conn, limit=1)
        await lapse(conn)
        assert (await Sweeper(app.fetch, lambda _: None, max_losses=3).once()).requeued == 45
        assert await one(conn, "select count(*) from queue_service.leases") == 0

    async def test_runs_that_were_not_started_in_time_end_expired(self, app: App, conn: Connection) -> None:
        run_id = await enqueued(conn, expires_in=timedelta(hours=1))
        await conn.execute("update queue_service.runs set expires_at = clock_timestamp() - interval '1 s'")
        assert await claimed(conn) == []
        assert await Sweeper(app.fetch, lambda _: None, max_losses=3).once() == SweepCounts(0, 0, 1)
        run = await app.get(run_id)
        assert run is not None
        assert run.state is RunState.EXPIRED

    async def test_after_an_outage_the_living_have_the_first_word(self, app: App, conn: Connection) -> None:
        await enqueued(conn)
        await claimed(conn)
        await lapse(conn)
        broken = True

        async def fetched(query: Query[object]) -> object:
            if broken:
                raise DatabaseUnavailable("gone")
            return await app.fetch(query)

        patient = Sweeper(fetched, lambda _: None, max_losses=3, grace=timedelta(minutes=1))
        with pytest.raises(DatabaseUnavailable):
            await patient.once()
        broken = False
        assert await patient.once() == SweepCounts(0, 0, 0)
        assert (await Sweeper(app.fetch, lambda _: None, max_losses=3).once()).requeued == 1


async def test_a_worker_begins_before_what_is_old_is_pruned(app: App, conn: Connection) -> None:
    @app.task
    async def noop() -> None: ...

    run_id = await app.enqueue("noop", {})
    async with conn.transaction(force_rollback=True):
        await conn.execute("lock table queue_service.turn_outcomes in access exclusive mode")
        async with working(app):
            assert (await app.wait(run_id, timeout=20)).state is RunState.SUCCEEDED


class TestPruner:
    def make(self, app: App, days: int = 14) -> Pruner:
        return Pruner(app.pool, retention=timedelta(days=days))

    async def test_turns_that_ended_long_ago_are_forgotten_with_their_events(self, app: App, conn: Connection) -> None:
        for number in range(6):
            await app.turns.arm(Turn(deployment="d", message_id=f"m{number}", stream="s"))
        await app.turns.commit_reply("d", ["m0", "m1", "m2"], {"text": "Yes."})
        await conn.execute(
            "update queue_service.turn_outcomes set armed_at = '2020-01-01Z' where message_id in ('m0', 'm1', 'm5')"
        )
        assert (await self.make(app).once()).turns == 2
        remembered = await rows(conn, "select message_id from queue_service.turn_outcomes order by 1")
        # m5 is as old, and still owed its ending.
        assert remembered == [("m2",), ("m3",), ("m4",), ("m5",)]
        assert [event.body["message_ids"] for event in await app.events.read("s")] == [["m2"]]
        assert await app.turns.arm(Turn(deployment="d", message_id="m0", stream="s"))

    async def test_old_events_are_deleted_and_endings_stay(self, app: App, conn: Connection) -> None:
        for stream in ("s1", "s2", "s3"):
            await app.turns.arm(Turn(deployment="d", message_id=stream, stream=stream))
            await app.events.append_many(stream, [("delta", n) for n in range(5)])
            await app.turns.commit_reply("d", [stream], {})
            await app.events.append(stream, "delta", 5)
        await conn.execute(
            "update queue_service.events set created_at = '2020-01-01Z' where stream <> 's3' and seq <= 6 or stream = 's2'"
        )
        assert (await self.make(app).once()).events == 11
        left = {stream: [event.seq for event in await app.events.read(stream)] for stream in ("s1", "s2", "s3")}
        assert left == {"s1": [6, 7], "s2": [6], "s3": [1, 2, 3, 4, 5, 6, 7]}
        assert (await self.make(app).once()).events == 0


class TestWaiting:
    async def test_a_waiter_reads_an_ending_that_came_before(self, app: App) -> None:
        run_id = await app.enqueue("noop", {})
        await app.cancel(run_id)
        assert (await app.wait(run_id, timeout=10)).state is RunState.CANCELLED

    async def test_a_waiter_reads_an_ending_that_comes_later(self, app: App) -> None:
        run_id = await app.enqueue("noop", {})
        waiters = [asyncio.create_task(app.wait(run_id, timeout=10)) for _ in range(3)]
        await asyncio.sleep(0)
        await app.cancel(run_id)
        assert [(await waiter).state for waiter in waiters] == 3 * [RunState.CANCELLED]

    @pytest.mark.direct("nothing listens there")
    async def test_an_ending_without_a_notice_is_found_by_polling(self, app: App, conn: Connection) -> None:
        run_id = await app.enqueue("noop", {})
        waiter = asyncio.create_task(app.wait(run_id, timeout=10))
        await eventually(lambda: one(conn, KILL, "queue_service listener"))
        await fetch(conn, queries.cancel(run_id))
        assert (await waiter).state is RunState.CANCELLED

    async def test_a_run_that_nobody_may_start_any_more_ends_while_it_is_waited_for(self, app: App) -> None:
        run_id = await app.enqueue("noop", {}, expires_in=0.05)
        assert (await app.wait(run_id, timeout=10)).state is RunState.EXPIRED

    async def test_a_run_nobody_knows_is_said(self, app: App) -> None:
        with pytest.raises(RunUnknown, match="no run 999"):
            await app.wait(999, timeout=10)

    async def test_a_waiter_goes_on_after_its_time(self, app: App) -> None:
        run_id = await app.enqueue("noop", {})
        with pytest.raises(TimeoutError, match=r"did not end within 0\.05 s"):
            await app.wait(run_id, timeout=0.05)


class TestConnections:
    @pytest.mark.direct("a session has no settings of ours there")
    async def test_what_the_database_is_set_to_does_not_change_what_a_statement_means(
        self, database: str, conn: Connection
    ) -> None:
        name = await one(conn, "select current_database()")
        for setting in ("default_transaction_isolation = serializable", "synchronous_commit = off", "jit = on"):
            await conn.execute(f"alter database {name} set {setting}".encode())
        connection = OwnConnection(database, application="test")
        shown = {
            setting: await connection.fetch(Query(f"show {setting}", scalar))
            for setting in ("transaction_isolation", "synchronous_commit", "jit", "statement_timeout")
        }
        await connection.close()
        assert shown == {
            "transaction_isolation": "read committed", "synchronous_commit": "on", "jit": "off",
            "statement_timeout": "30s",
        }  # fmt: skip

    async def test_a_passed_deadline_is_an_error_and_the_connection_is_not_used_again(self, conn: Connection) -> None:
        with pytest.raises(DatabaseUnavailable, match=r"within 0\.05 s"):
            await fetch(conn, Query("select pg_sleep(30)", nothing), deadline=0.05)
        assert conn.closed

    async def test_a_pool_of_one_serves_many_callers(self, database: str) -> None:
        pool = Pool(database, size=1)
        await pool.open()
        answers = await asyncio.gather(*(pool.fetch(Query(f"select {n}", scalar)) for n in range(50)))
        assert answers == list(range(50))
        async with pool.connection() as lent:
            waiting = asyncio.create_task(pool.fetch(Query("select 50", scalar)))
            await asyncio.sleep(0)
            await lent.execute("select 1")
        assert await waiting == 50
        await pool.close()
