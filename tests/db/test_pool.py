from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus

from queue_service import App
from queue_service.db import pool as pools
from queue_service.db.execute import Connection, fetch
from queue_service.db.own_connection import OwnConnection
from queue_service.db.pool import Pool
from queue_service.db.query import Query, nothing, scalar
from queue_service.db.session import Address, Limits, Session, connect
from queue_service.errors import DatabaseUnavailable, SchemaMismatch
from queue_service.runs import queries
from queue_service.runs.model import NewRun
from tests.chaos.proxy import Proxy
from tests.support import blocked, claimed, enqueued, eventually, free_port, lapse, one

PID: Query[int] = Query("select pg_backend_pid()", scalar, writes=False)
SLEEPING: Query[int] = Query("select pg_backend_pid() from pg_sleep(0.3)", scalar)
SLEEP: Query[None] = Query("select pg_sleep(60)", nothing, writes=False)


@pytest.fixture
async def connection(database: str) -> AsyncIterator[OwnConnection]:
    made = OwnConnection(database, application="connection under test")
    yield made
    await made.close()


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    made = Pool(database, size=2, application="pool under test")
    await made.open()
    yield made
    await made.close()


async def kill(conn: Connection, pid: int) -> None:
    assert await one(conn, "select pg_terminate_backend(%s)", pid)
    await eventually(lambda: one(conn, "select not exists (select from pg_stat_activity where pid = %s)", pid))


class TestSession:
    @pytest.mark.direct("a session has no settings of ours there")
    async def test_a_serializable_database_makes_no_statement_fail_that_loses_a_race(
        self, database: str, conn: Connection
    ) -> None:
        name = await one(conn, "select current_database()")
        await conn.execute(f"alter database {name} set default_transaction_isolation = 'serializable'".encode())
        first, second = await connect(database), await connect(database)
        new = NewRun("noop", "default", "{}", singleton_key="k")
        await first.execute("begin")
        stored = await fetch(first, queries.enqueue(new))
        waiting = asyncio.ensure_future(fetch(second, queries.enqueue(new)))
        await eventually(lambda: blocked(conn, second))
        await first.execute("commit")
        assert await waiting is None
        assert await fetch(second, queries.singleton_holder("default", "k", None)) == (stored, True)
        for each in (first, second):
            await each.close()

    @pytest.mark.direct("a session has no settings of ours there")
    @pytest.mark.parametrize("held", ["on", "remote_apply", "local", "off"])
    async def test_commits_are_as_durable_as_the_database_says_and_never_less_than_on_disk(
        self, database: str, conn: Connection, held: str
    ) -> None:
        name = await one(conn, "select current_database()")
        await conn.execute(f"alter database {name} set synchronous_commit = '{held}'".encode())
        fresh = await connect(database)
        assert await one(fresh, "show synchronous_commit") == ("on" if held == "off" else held)
        await fresh.close()

    @pytest.mark.direct("a session has no settings of ours there")
    async def test_times_are_read_in_utc_whatever_the_database_prefers(self, database: str, conn: Connection) -> None:
        name = await one(conn, "select current_database()")
        await conn.execute(f"alter database {name} set timezone = 'Asia/Kathmandu'".encode())
        await enqueued(conn)
        fresh = await connect(database)
        ((run, _),) = await claimed(fresh)
        assert run.run_at.utcoffset() == timedelta(0)
        await fresh.close()

    async def test_it_is_in_autocommit_mode(self, conn: Connection) -> None:
        await enqueued(conn)
        assert conn.info.transaction_status is TransactionStatus.IDLE

    async def test_an_address_where_nobody_answers_is_said(self) -> None:
        with pytest.raises(DatabaseUnavailable, match="cannot be reached"):
            await connect("host=127.0.0.1 port=1 dbname=x")


class TestFetch:
    async def test_a_passed_deadline_closes_the_connection_and_ends_the_statement(
        self, conn: Connection, session: Callable[[], Awaitable[Connection]]
    ) -> None:
        slow = await session()
        pid = slow.info.backend_pid
        with pytest.raises(DatabaseUnavailable, match="did not answer within"):
            await fetch(slow, SLEEP, deadline=0.05)
        assert slow.closed
        with pytest.raises(DatabaseUnavailable):
            await fetch(slow, PID)
        await eventually(
            lambda: one(
                conn, "select not exists (select from pg_stat_activity where pid = %s and state = 'active')", pid
            )
        )

    async def test_the_servers_own_limit_is_an_outage_too_and_the_connection_goes_on(self, conn: Connection) -> None:
        await conn.execute("set statement_timeout = '500ms'")
        with pytest.raises(DatabaseUnavailable, match="gave up on a statement"):
            await fetch(conn, SLEEP)
        assert await fetch(conn, Query("select 1", scalar)) == 1

    async def test_a_killed_backend_is_an_outage(
        self, conn: Connection, session: Callable[[], Awaitable[Connection]]
    ) -> None:
        doomed = await session()
        await kill(conn, doomed.info.backend_pid)
        with pytest.raises(DatabaseUnavailable):
            await fetch(doomed, PID)
        assert doomed.closed

    async def test_a_missing_schema_is_said(self, empty_database: str) -> None:
        conn = await connect(empty_database)
        with pytest.raises(SchemaMismatch):
            await fetch(conn, queries.get(1))
        await conn.close()

    async def test_a_mistake_of_ours_passes_unchanged(self, conn: Connection) -> None:
        with pytest.raises(psycopg.errors.SyntaxError):
            await fetch(conn, Query("selec 1", scalar))

    async def test_a_write_whose_caller_is_cancelled_is_not_cancelled_on_the_server_where_it_may_be_committing(
        self, conn: Connection, session: Callable[[], Awaitable[Connection]]
    ) -> None:
        holder, slow = await session(), await session()
        await enqueued(conn, singleton_key="k")
        await holder.execute("begin")
        await holder.execute("select from queue_service.runs for update")
        call = asyncio.ensure_future(
            fetch(slow, queries.replace(NewRun("noop", "default", '{"late": 1}', singleton_key="k")))
        )
        await eventually(lambda: blocked(conn, slow))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert slow.closed
        await holder.execute("rollback")
        await eventually(lambda: one(conn, """select payload = '{"late": 1}' from queue_service.runs"""))

    async def test_a_read_whose_caller_is_cancelled_is_cancelled_on_the_server(
        self, conn: Connection, session: Callable[[], Awaitable[Connection]]
    ) -> None:
        slow = await session()
        call = asyncio.ensure_future(fetch(slow, SLEEP))
        asleep = "select exists (select from pg_stat_activity where pid = %s and wait_event = 'PgSleep')"
        pid = slow.info.backend_pid
        await eventually(lambda: one(conn, asleep, pid))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert slow.closed
        await eventually(lambda: one(conn, asleep.replace("select exists", "select not exists"), pid))


class TestOwnConnection:
    async def test_it_keeps_its_connection_from_call_to_call(self, connection: OwnConnection) -> None:
        assert await connection.fetch(PID) == await connection.fetch(PID)

    @pytest.mark.direct("its connections to the server are the pooler's")
    async def test_a_connection_that_died_while_it_was_idle_fails_no_call(
        self, connection: OwnConnection, conn: Connection
    ) -> None:
        pid = await connection.fetch(PID)
        await kill(conn, pid)
        assert await connection.fetch(PID) != pid
        assert await connection.fetch(Query("show plan_cache_mode", scalar)) == "force_generic_plan"

    @pytest.mark.direct("its connections to the server are the pooler's")
    async def test_a_passed_deadline_fails_one_call_and_the_next_has_a_new_one(self, connection: OwnConnection) -> None:
        pid = await connection.fetch(PID)
        with pytest.raises(DatabaseUnavailable):
            await connection.fetch(SLEEP, deadline=0.05)
        assert await connection.fetch(PID) != pid

    @pytest.mark.direct("its connections to the server are the pooler's")
    async def test_closing_it_closes_the_connection_and_it_may_be_used_again(
        self, connection: OwnConnection, conn: Connection
    ) -> None:
        pid = await connection.fetch(PID)
        await connection.close()
        await eventually(lambda: one(conn, "select not exists (select from pg_stat_activity where pid = %s)", pid))
        assert await connection.fetch(PID) != pid


class TestPool:
    @pytest.mark.direct("its connections to the server are the pooler's")
    async def test_connections_that_died_while_they_were_idle_fail_no_call(self, pool: Pool, conn: Connection) -> None:
        pids = await pids_of_all(pool)
        for pid in pids:
            await kill(conn, pid)
        assert not pids & {await pool.fetch(PID) for _ in range(4)}

    async def test_connections_that_the_server_ends_as_they_are_used_fail_no_call(self, pool: Pool) -> None:
        """Where the look comes too early to see it."""
        async with pool.connection() as lent:
            await lent.execute("select set_config('idle_session_timeout', '1ms', false)")
        for _ in range(20):
            assert await pool.fetch(PID)

    async def test_a_passed_deadline_costs_no_place_in_the_pool(self, pool: Pool) -> None:
        for _ in range(3):
            with pytest.raises(DatabaseUnavailable):
                await pool.fetch(SLEEP, deadline=0.02)
        assert len(await asyncio.gather(*(pool.fetch(PID) for _ in range(6)))) == 6

    async def test_it_never_has_more_connections_than_its_size(self, pool: Pool) -> None:
        pids = await asyncio.gather(
            *(pool.fetch(Query("select pg_backend_pid(), pg_sleep(0.005)", scalar)) for _ in range(20))
        )
        assert 1 <= len(set(pids)) <= 2

    async def test_a_cancelled_caller_gives_its_connection_back(self, pool: Pool, conn: Connection) -> None:
        asleep = "select exists (select from pg_stat_activity where query = %s and wait_event = 'PgSleep')"
        for _ in range(4):
            call = asyncio.ensure_future(pool.fetch(SLEEP))
            await eventually(lambda: one(conn, asleep, SLEEP.text))
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        assert len(await asyncio.gather(*(pool.fetch(PID) for _ in range(4)))) == 4

    async def test_a_lent_connection_with_an_open_transaction_does_not_come_back_with_it(
        self, pool: Pool, conn: Connection
    ) -> None:
        async with pool.connection() as lent:
            await lent.execute("begin")
            await enqueued(lent)
        assert await one(conn, "select count(*) from queue_service.runs") == 0
        status = await pool.fetch(Query("select pg_current_xact_id_if_assigned()::text", scalar))
        assert status is None

    async def test_what_lost_a_deadlock_is_sent_again(self, app: App, conn: Connection) -> None:
        """Two that lock the same two runs in opposite order: one is refused by the server, and neither caller hears."""
        first, second = await enqueued(conn), await enqueued(conn)
        touch = "update queue_service.runs set metadata = '{{}}' where id = {} returning id"
        await conn.execute("begin")
        await conn.execute(touch.format(second).encode())
        both: Query[object] = Query(
            f"with a as ({touch.format(first)}), b as ({touch.format(second)}) select id from a union all select id from b",
            list,
        )
        calls = asyncio.ensure_future(app.fetch(both))
        await eventually(
            lambda: one(
                conn,
                "select exists (select from pg_stat_activity where cardinality(pg_blocking_pids(pid)) > 0 "
                "and datname = current_database())",
            )
        )
        try:
            await conn.execute(touch.format(first).encode())
            await conn.execute("commit")
        except psycopg.errors.DeadlockDetected:
            await conn.execute("rollback")
        assert await calls is not None

    async def test_sweeping_through_the_pool_sees_what_others_committed(self, pool: Pool, conn: Connection) -> None:
        run_id = await enqueued(conn)
        await claimed(conn)
        assert await pool.fetch(queries.sweep(limit=1, max_losses=3)) == []
        await lapse(conn)
        assert [each.run_id for each in await pool.fetch(queries.sweep(limit=1, max_losses=3))] == [run_id]


@pytest.mark.parametrize("turns", range(4))
async def test_a_cancellation_that_comes_with_the_connection_is_not_lost(pool: Pool, turns: int) -> None:
    held = [await taken(pool) for _ in range(2)]
    waiting = asyncio.create_task(pool.fetch(PID))
    await eventually(lambda: len(pool._line) == 1)
    pool._give(held.pop(), is_reserved=False)
    for _ in range(turns):
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    # Nor is the connection that it was given.
    async with asyncio.timeout(20), pool.connection():
        pass
    pool._give(held.pop(), is_reserved=False)


async def pids_of_all(pool: Pool) -> set[int]:
    held = [await taken(pool) for _ in range(2)]
    for each in held:
        pool._give(each, is_reserved=False)
    return {each.info.backend_pid for each in held}


async def taken(pool: Pool) -> Session:
    return await pool._take(pool.limits, 10.0, is_reserved=False)


class TestLending:
    @pytest.mark.parametrize(("seconds", "told"), [(0.1234, "0.123"), (-0.00001, "0")])
    async def test_who_waits_in_vain_is_told_for_how_long(self, pool: Pool, seconds: float, told: str) -> None:
        """What is left of a deadline may be nothing, where an earlier try has used it up."""
        held = [await taken(pool) for _ in range(2)]
        with pytest.raises(DatabaseUnavailable, match=f"No connection became free within {told} s"):
            await pool.fetch(PID, deadline=seconds)
        for conn in held:
            pool._give(conn, is_reserved=False)

    async def test_who_comes_first_is_served_first(self, pool: Pool) -> None:
        held = [await taken(pool) for _ in range(2)]
        served: list[int] = []

        async def serve(number: int) -> None:
            conn = await taken(pool)
            served.append(number)
            pool._give(conn, is_reserved=False)

        waiting = []
        for number in range(5):
            waiting.append(asyncio.create_task(serve(number)))
            await eventually(lambda: len(pool._line) == len(waiting))
        for conn in held:
            pool._give(conn, is_reserved=False)
        await asyncio.gather(*waiting)
        assert served == [0, 1, 2, 3, 4]

    async def test_a_place_never_waits_behind_others_and_takes_nothing_from_them(self, pool: Pool) -> None:
        place = pool.reserved()
        held = [await taken(pool) for _ in range(2)]
        waiting = asyncio.create_task(pool.fetch(PID))
        await eventually(lambda: len(pool._line) == 1)
        async with asyncio.timeout(10):
            assert await place.fetch(PID)
        assert not waiting.done()
        for conn in held:
            pool._give(conn, is_reserved=False)
        await waiting
        assert len(pool._open) == 3
        place.leave()

    @pytest.mark.direct("a session has no settings of ours there")
    async def test_the_statements_of_a_place_have_limits_of_their_own(self, pool: Pool) -> None:
        place = pool.reserved(Limits(timedelta(milliseconds=50), timedelta(milliseconds=80)))
        shown = Query("select current_setting('lock_timeout') || ' ' || current_setting('statement_timeout')", scalar)
        for _ in range(3):
            assert await place.fetch(shown) == "50ms 80ms"
            assert await pool.fetch(shown) == "10s 30s"
        assert len(pool._open) == 1

    @pytest.mark.direct("a session has no settings of ours there")
    async def test_what_is_as_good_in_any_limits_takes_the_next_connection_as_it_is(self, pool: Pool) -> None:
        place = pool.reserved(Limits(timedelta(milliseconds=50), timedelta(milliseconds=80)))
        shown = Query("select current_setting('lock_timeout') || ' ' || current_setting('statement_timeout')", scalar)
        assert await place.fetch(shown) == "50ms 80ms"
        assert await pool.fetch_on_any(shown) == await pool.reserved(None).fetch(shown) == "50ms 80ms"

    @pytest.mark.direct("a session has no settings of ours there")
    async def test_what_they_are_too_narrow_for_is_done_within_the_pools(self, pool: Pool) -> None:
        place = pool.reserved(Limits(timedelta(milliseconds=50), timedelta(milliseconds=80)))
        assert await place.fetch(PID) == await pool.fetch_on_any(SLEEPING)
        with pytest.raises(DatabaseUnavailable):
            await place.fetch(SLEEPING)

    async def test_behind_a_pooler_they_are_those_of_one_transaction(self, database: str) -> None:
        pool = Pool(Address(database, pooler="transaction"), size=1)
        place = pool.reserved(Limits(timedelta(milliseconds=50), timedelta(milliseconds=80)))
        shown = Query("select current_setting('lock_timeout') || ' ' || current_setting('statement_timeout')", scalar)
        assert await place.fetch(shown) == "50ms 80ms"
        assert await pool.fetch(shown) == "0 0"
        await pool.close()

    async def test_what_is_not_used_is_closed_but_for_one(
        self, pool: Pool, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pools, "IDLE", 0.05)
        assert len(await pids_of_all(pool)) == 2
        await eventually(lambda: len(pool._open) == 1)
        counted = "select count(*) from pg_stat_activity where application_name = 'pool under test'"
        await eventually(lambda: one(conn, f"select ({counted}) = 1"))
        assert await pool.fetch(PID)

    @pytest.mark.direct("its connections to the server are the pooler's")
    async def test_a_connection_that_has_lived_long_enough_is_replaced(self, pool: Pool) -> None:
        pid = await pool.fetch(PID)
        for session in pool._open:
            session.ends_at = 0.0
        assert await pool.fetch(PID) != pid

    @pytest.mark.parametrize("moment", range(6))
    async def test_whoever_is_cancelled_at_any_moment_leaves_the_connection_to_the_next(
        self, database: str, moment: int
    ) -> None:
        pool = Pool(database, size=1)
        held = await taken(pool)
        first, second = asyncio.create_task(pool.fetch(PID)), asyncio.create_task(pool.fetch(PID))
        await eventually(lambda: len(pool._line) == 2)
        pool._give(held, is_reserved=False)
        for _ in range(moment):
            await asyncio.sleep(0)
        first.cancel()
        async with asyncio.timeout(10):
            assert await second
        await pool.close()

    async def test_whoever_waits_when_it_closes_hears_so(self, pool: Pool) -> None:
        held = [await taken(pool) for _ in range(2)]
        waiting = asyncio.create_task(pool.fetch(PID))
        await eventually(lambda: len(pool._line) == 1)
        await pool.close()
        with pytest.raises(DatabaseUnavailable, match="were closed"):
            await waiting
        for conn in held:
            pool._give(conn, is_reserved=False)
            assert conn.closed

    async def test_why_there_is_none_is_said(self, database: str) -> None:
        lost = Pool(make_conninfo(database, dbname="nowhere"), size=1)
        with pytest.raises(DatabaseUnavailable, match="nowhere"):
            await lost.fetch(PID, deadline=0.3)
        await lost.close()


class TestOutage:
    """A port whose connections are cut at once."""

    async def test_once_nobody_waits_nobody_tries(self) -> None:
        async with Proxy(free_port()).open() as proxy:
            pool = Pool(lost_at(proxy), size=4)
            answers = await asyncio.gather(*(pool.fetch(PID, deadline=0.5) for _ in range(10)), return_exceptions=True)
            assert all(isinstance(each, DatabaseUnavailable) for each in answers)
            await eventually(lambda: not pool._connecting)
            tries = len(proxy.accepted)
            await eventually(lambda: pool._growing is None)
            assert len(proxy.accepted) == tries
            await pool.close()

    async def test_however_many_wait_one_tries(self) -> None:
        async with Proxy(free_port()).open() as proxy:
            pool = Pool(lost_at(proxy), size=20)
            waiting = [asyncio.create_task(pool.fetch(PID)) for _ in range(100)]
            await eventually(lambda: len(proxy.accepted) >= 26)
            # After the first 20 at 50 ms, 100 ms, … with full jitter, and not 20 of them each time.
            assert proxy.accepted[25] - proxy.accepted[20] > 0.1
            await pool.close()
            answers = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(each, DatabaseUnavailable) for each in answers)


def lost_at(proxy: Proxy) -> str:
    return f"host=127.0.0.1 port={proxy.port} dbname=x sslmode=disable gssencmode=disable"


class TestWrites:
    @pytest.mark.direct("its connections to the server are the pooler's")
    async def test_once_one_is_refused_all_are_looked_at(self, pool: Pool) -> None:
        """As after a switchover to another server behind the same address."""
        pids = await pids_of_all(pool)
        for each in list(pool._open):
            await each.execute("set default_transaction_read_only = on")
        write = Query("update queue_service.queues set paused_at = null", nothing)
        with pytest.raises(DatabaseUnavailable, match="takes no writes"):
            await pool.fetch(write)
        for _ in range(3):
            await pool.fetch(write)
        assert not pids & await pids_of_all(pool)
