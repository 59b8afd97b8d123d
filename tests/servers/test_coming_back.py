"""After an outage of any length, and of any kind, service is back within a moment of the database, with no person's help."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from queue_service import App, Turn
from queue_service.db.cluster import Cluster
from queue_service.db.execute import Connection
from queue_service.db.query import Query, nothing, scalar
from queue_service.errors import DatabaseUnavailable, TurnEnded
from tests.chaos.proxy import Outage, Proxy
from tests.servers.pair import Pair
from tests.support import eventually, one, quick_app, working

# Seconds until all works again, from when a fresh connection could write.
SOON = 1.5
OUTAGES: tuple[Outage, ...] = ("refuse", "reset", "swallow")
FILLED = 4
PID: Query[int] = Query("select pg_backend_pid()", scalar, writes=False)

Call = Callable[[], Awaitable[object]]


def through(database: str, port: int) -> str:
    return make_conninfo(database, host="127.0.0.1", port=port)


@pytest.fixture
async def served(shared_pair: Pair, own_database: str) -> str:
    """A database at a port, which a proxy may be put before."""
    return own_database


@asynccontextmanager
async def before(database: str) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy, and the way to the database that goes through it."""
    async with Proxy(int(str(conninfo_to_dict(database)["port"]))).open() as proxy:
        yield proxy, through(database, proxy.port)


async def writes(conninfo: str) -> bool:
    """Whether a fresh connection can write."""
    try:
        async with await psycopg.AsyncConnection.connect(conninfo, autocommit=True, connect_timeout=2) as conn:
            await conn.execute("create temporary table written ()")
    except psycopg.OperationalError:
        return False
    except psycopg.errors.ReadOnlySqlTransaction:
        return False
    return True


class Callers:
    """Each calls again and again, also through an outage. `last` says when each was answered last (monotonic)."""

    def __init__(self, calls: dict[str, Call]) -> None:
        self.last = dict.fromkeys(calls, 0.0)
        self._tasks = [asyncio.create_task(self._call(name, call)) for name, call in calls.items()]

    async def _call(self, name: str, call: Call) -> None:
        while True:
            try:
                # That its turn has ended is an answer.
                with suppress(TurnEnded):
                    await call()
            except DatabaseUnavailable:
                # As who has something else to do meanwhile.
                await asyncio.sleep(0.01)
            else:
                self.last[name] = time.monotonic()
                await asyncio.sleep(0.001)

    async def are_answered(self) -> None:
        begun = time.monotonic()
        await eventually(lambda: all(at > begun for at in self.last.values()))

    async def back_after(self, moment: float) -> dict[str, float]:
        """For each, how long after that moment it was answered again."""
        late: dict[str, float] = {}

        def all_are() -> bool:
            for name, at in self.last.items():
                if at > moment:
                    late.setdefault(name, at - moment)
            return len(late) == len(self.last)

        await eventually(all_are, within=40)
        return late

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        answers = await asyncio.gather(*self._tasks, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in answers), answers


def calls_of(app: App) -> dict[str, Call]:
    return {
        "enqueue": lambda: app.enqueue("noop", {}, queue="nobody"),
        "enqueue_once": lambda: app.enqueue("noop", {}, queue="nobody", singleton_key="k"),
        "arm": lambda: app.turns.arm(Turn(deployment="d", message_id="m", stream="s")),
        "commit_reply": lambda: app.turns.commit_reply("d", ["unknown"], {"text": "Hello."}),
        "append": lambda: app.events.append("s", "delta", 1),
        "sweep": app.turns.sweep,
        "get": lambda: app.get(1),
    }


@asynccontextmanager
async def at_work(app: App, executed: list[int]) -> AsyncIterator[None]:
    """A worker that has begun: one that has not would not survive an outage. Runs of `note` say their number."""

    @app.task
    async def note(n: int) -> None:
        executed.append(n)

    async with working(app):
        await app.enqueue("note", {"n": -1})
        await eventually(lambda: executed)
        executed.clear()
        yield


@asynccontextmanager
async def calling(app: App) -> AsyncIterator[Callers]:
    callers = Callers(calls_of(app))
    try:
        await callers.are_answered()
        yield callers
    finally:
        await callers.stop()


async def fresh_after(conninfo: str) -> float:
    """When a fresh connection could write (monotonic)."""
    await eventually(lambda: writes(conninfo))
    return time.monotonic()


class TestAnOutageOfTheNetwork:
    @pytest.mark.parametrize("seconds", [1, 5])
    @pytest.mark.parametrize("kind", OUTAGES)
    async def test_all_works_again_as_soon_as_a_fresh_connection_does(
        self, served: str, kind: Outage, seconds: int
    ) -> None:
        async with before(served) as (proxy, conninfo), quick_app(conninfo) as app:
            executed: list[int] = []
            async with at_work(app, executed), quick_app(served) as beside, calling(app) as callers:
                await proxy.fail(kind, seconds)
                moment = await fresh_after(conninfo)
                # Enqueued by somebody who has seen no outage, so that it is the worker that has to be back.
                await beside.enqueue("note", {"n": seconds})
                late = await callers.back_after(moment)
                await eventually(lambda: executed, within=40)
                late["claim"] = time.monotonic() - moment
            assert {name: each for name, each in late.items() if each > SOON} == {}

    async def test_a_slow_network_is_no_outage(self, served: str) -> None:
        async with before(served) as (proxy, conninfo), quick_app(conninfo) as app:
            slow = asyncio.create_task(proxy.fail("slow", 1.0))
            run_ids = await asyncio.gather(*(app.enqueue("noop", {}) for _ in range(10)))
            await slow
            assert len(set(run_ids)) == 10

    @pytest.mark.parametrize("kind", OUTAGES)
    async def test_a_hundred_who_wait_all_come_back_and_connect_no_more_often_than_one(
        self, served: str, kind: Outage
    ) -> None:
        async with before(served) as (proxy, conninfo), quick_app(conninfo) as app:
            await app.enqueue("noop", {})
            out = asyncio.create_task(proxy.fail(kind, 3.0))
            begun = time.monotonic()
            await eventually(lambda: proxy._outage)
            waiting = [asyncio.create_task(insisting(app, n)) for n in range(100)]
            await out
            ended = time.monotonic()
            tried = Counter(int(at - begun) for at in proxy.accepted if begun <= at < ended)
            moment = await fresh_after(conninfo)
            answered = await asyncio.gather(*waiting)
            assert max(answered) - moment < SOON
            # One tries, with pauses of up to half a second and at random; then as many as the pool has.
            assert sum(tried.values()) <= 30, tried
            assert len([at for at in proxy.accepted if at >= ended]) <= 1 + app.settings.pool_size + 3

    async def test_who_has_a_connection_that_hears_nothing_is_told_in_time_and_the_next_one_has_another(
        self, served: str
    ) -> None:
        async with before(served) as (proxy, conninfo), quick_app(conninfo) as app:
            pids = await fill(app)
            proxy.forget()
            begun = time.monotonic()
            told = await asyncio.gather(*(app.pool.fetch(PID, deadline=1.0) for _ in pids), return_exceptions=True)
            assert time.monotonic() - begun < SOON
            assert all(isinstance(each, DatabaseUnavailable) for each in told)
            assert await app.pool.fetch(PID, deadline=1.0) not in pids


async def insisting(app: App, n: int) -> float:
    """When it was stored at last (monotonic)."""
    while True:
        try:
            await app.enqueue("noop", {}, singleton_key=str(n))
        except DatabaseUnavailable:
            await asyncio.sleep(0.01)
        else:
            return time.monotonic()


class TestADatabaseThatTakesNoWrites:
    async def test_what_was_connected_meanwhile_is_not_kept(self, database: str, conn: Connection) -> None:
        executed: list[int] = []
        async with quick_app(database) as app:
            async with at_work(app, executed), calling(app) as callers:
                name = await one(conn, "select current_database()")
                await conn.execute(f"alter database {name} set default_transaction_read_only = on".encode())
                await terminate_others(conn)
                await eventually(lambda: is_refused(app))
                await conn.execute(f"alter database {name} reset default_transaction_read_only".encode())
                await app_is_back(callers, database)
                # What nobody calls works again too: a turn that is overdue gets its ending, a schedule fires.
                moment = time.monotonic()
                await conn.execute(
                    "update queue_service.turn_markers set deadline = clock_timestamp() - interval '1 s'"
                )
                await eventually(
                    lambda: one(conn, "select count(*) > 0 from queue_service.events where kind = 'error'"), within=20
                )
                assert time.monotonic() - moment < SOON
                await app.schedules.put("note", "note", {"n": 7}, every=1)
                await eventually(lambda: 7 in executed, within=20)

    async def test_every_connection_of_the_pool_is_looked_at_when_one_of_them_takes_no_writes(
        self, database: str
    ) -> None:
        async with quick_app(database) as app:
            pids = await fill(app)
            # As a session that a pooler or a proxy has led to what is a standby now: all of them answer, and take no writes.
            for _ in pids:
                async with app.pool.connection() as lent:
                    await lent.execute("set default_transaction_read_only = on")
                    await lent.execute("select 1")
            refused = 0
            for n in range(20):
                try:
                    await app.enqueue("noop", {}, singleton_key=str(n))
                except DatabaseUnavailable:
                    refused += 1
            assert refused <= 1


async def is_refused(app: App) -> bool:
    """Whether it does not go through at once."""
    try:
        async with asyncio.timeout(0.5):
            await app.enqueue("noop", {}, queue="nobody", singleton_key="refused")
    except (DatabaseUnavailable, TimeoutError):
        return True
    return False


async def app_is_back(callers: Callers, conninfo: str) -> None:
    late = await callers.back_after(await fresh_after(conninfo))
    assert {name: each for name, each in late.items() if each > SOON} == {}


class TestASwitchover:
    async def test_the_next_host_is_tried_by_itself(self, pair: Pair) -> None:
        """The address names both, in this order, and says nothing of which of them takes writes."""
        executed: list[int] = []
        async with quick_app(pair.conninfo) as app:
            async with at_work(app, executed), calling(app) as callers:
                for n in range(2):
                    await asyncio.to_thread(pair.switch_over)
                    await app_is_back(callers, pair.primary.conninfo)
                    await app.enqueue("note", {"n": n})
                    await eventually(lambda: n in executed, within=20)  # noqa: B023
            # The first host is the primary again.
            assert pair.primary.port == int(str(conninfo_to_dict(pair.conninfo)["port"]).split(",")[0])

    async def test_an_app_that_begins_while_the_first_host_is_a_standby_finds_the_other(self, pair: Pair) -> None:
        await asyncio.to_thread(pair.switch_over)
        async with quick_app(pair.conninfo) as app:
            assert await app.enqueue("noop", {})
            assert await one_setting(app, "port") == str(pair.primary.port)


async def one_setting(app: App, name: str) -> str:
    async with app.pool.connection() as lent:
        return str(await one(lent, "select current_setting(%s)", name))


async def fill(app: App) -> set[int]:
    """The pool has all of its connections, and all are idle. Returns the processes of the server."""
    busy: Query[int] = Query("select pg_backend_pid(), pg_sleep(0.05)", scalar)
    pids: set[int] = set()
    while len(pids) < FILLED:
        pids |= set(await asyncio.gather(*(app.pool.fetch(busy) for _ in range(FILLED))))
    return pids


async def terminate_others(conn: Connection) -> None:
    await conn.execute(
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity "
        "where datname = current_database() and pid <> pg_backend_pid()"
    )


async def twenty(app: App) -> list[BaseException]:
    """What the next twenty calls raise."""
    raised: list[BaseException] = []
    for n in range(20):
        try:
            await app.enqueue("noop", {}, singleton_key=str(n))
        except DatabaseUnavailable as lost:
            raised.append(lost)
    return raised


class TestAConnectionThatDiedWhileItWasIdle:
    async def test_costs_nobody_a_call(self, app: App, conn: Connection) -> None:
        await fill(app)
        await terminate_others(conn)
        assert await twenty(app) == []

    async def test_costs_nobody_a_call_where_twenty_call_at_once(self, app: App, conn: Connection) -> None:
        await fill(app)
        await terminate_others(conn)
        await asyncio.gather(*(app.enqueue("noop", {}, singleton_key=str(n)) for n in range(20)))

    async def test_costs_nobody_a_call_where_the_role_ends_idle_sessions(self, database: str, conn: Connection) -> None:
        name = await one(conn, "select current_database()")
        await conn.execute(f"alter database {name} set idle_session_timeout = '200ms'".encode())
        async with quick_app(database) as app:
            pids = await fill(app)
            # Long enough that the server has ended them, if it does.
            await eventually(
                lambda: one(
                    conn,
                    "select not exists (select from pg_stat_activity where pid = any(%s) "
                    "and state_change > clock_timestamp() - interval '400 ms')",
                    list(pids),
                )
            )
            assert await twenty(app) == []

    async def test_costs_nobody_a_call_where_the_server_was_started_again(self, own_cluster: Cluster) -> None:
        async with quick_app(own_cluster.conninfo) as app:
            await fill(app)
            await asyncio.to_thread(own_cluster.stop)
            await asyncio.to_thread(own_cluster.start)
            assert await twenty(app) == []

    async def test_costs_a_worker_nothing(self, app: App, conn: Connection) -> None:
        executed: list[int] = []

        @app.task
        async def note(n: int) -> None:
            executed.append(n)

        async with working(app) as worker:
            for n in range(4):
                await app.enqueue("note", {"n": n})
                await eventually(lambda: n in executed)  # noqa: B023
                await terminate_others(conn)
        assert (worker.tally.succeeded, worker.tally.failed) == (4, 0)


async def test_a_connection_that_dies_in_the_middle_of_a_statement_is_one_callers_trouble(
    app: App, conn: Connection
) -> None:
    long: Query[None] = Query("select pg_sleep(60)", nothing)
    unlucky = asyncio.create_task(app.pool.fetch(long))
    asleep = (
        "select pid from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep' "
        "and query like 'select pg_sleep(60)%%'"
    )
    pid = await eventually(lambda: one(conn, asleep))
    others = [asyncio.create_task(app.enqueue("noop", {}, singleton_key=str(n))) for n in range(20)]
    await conn.execute("select pg_terminate_backend(%s, 5000)", [pid])
    with pytest.raises(DatabaseUnavailable):
        await unlucky
    assert len(set(await asyncio.gather(*others))) == 20
