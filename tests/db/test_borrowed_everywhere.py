"""Every call that takes `conn=`: what it does is the caller's to commit, and nothing else of the caller's session changes."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from queue_service import App, Turn, TurnFailure
from queue_service.app.sync import SyncApp
from queue_service.db import channels
from queue_service.db.execute import Connection, fetch
from queue_service.runs import settling
from queue_service.runs.model import Ending, RunState
from tests.support import claimed, rows

CHANNELS = (channels.RUNS, channels.FINISHED, channels.CANCEL, channels.EVENTS)
OWED = Turn(deployment="dep", message_id="owed", stream="talk")
FAILURE = TurnFailure("worker_died")
# How each is called. Runs 1 and 2 are queued, 3 is running, 4 has failed; turn `owed` is armed; there are five events.
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "enqueue": (("noop", {}), {"ordering_key": "lane", "delay": timedelta(0), "metadata": {"a": 1}}),
    "enqueue_many": (("noop", [{}, {}]), {"ordering_key": "lane", "retry_delay": 1.5}),
    "get": ((4,), {}),
    "cancel": ((3,), {}),
    "retry": ((4,), {}),
    "retry_many": ((), {"since": timedelta(days=1)}),
    "delete": ((1,), {}),
    "turns.arm": ((Turn(deployment="dep", message_id="m2", stream="talk"),), {"admission": 5}),
    "turns.dispatch": ((Turn(deployment="dep", message_id="m3", stream="talk"), "noop", {}), {"ordering_key": "lane"}),
    "turns.send": ((Turn(deployment="dep", message_id="m4", stream="talk"), "noop", {}), {"mode": "interrupt"}),
    "turns.unsend": (("dep", "sent"), {}),
    "turns.extend": (("dep",), {}),
    "turns.withhold": (("dep", "provider_unavailable"), {"reason": "down"}),
    "turns.restore": (("withheld",), {}),
    "turns.reset_admission": (("dep", "owed"), {}),
    "turns.commit_reply": (("dep", ["owed"], {"text": "ü"}), {}),
    "turns.fail": (("dep", "owed", FAILURE), {}),
    "turns.fail_deployment": (("dep", FAILURE), {}),
    "turns.reject": (("dep", "owed", "no"), {}),
    "turns.discharge": (("dep", "owed"), {}),
    "turns.is_live": (("dep", "owed"), {}),
    "turns.outcome": (("dep", "owed"), {}),
    "turns.list": ((), {"deployment": "dep"}),
    "turns.tally": ((), {}),
    "events.append": (("talk", "delta", {"text": "ü"}), {}),
    "events.append_many": (("talk", [("delta", 1), ("delta", 2)]), {}),
    "events.append_of": (("talk", [("delta", 1, (1, 1))]), {}),
    "events.read": (("talk",), {"kinds": ["delta"]}),
    "events.head": (("talk",), {}),
    "events.stream": (("talk",), {}),
    "events.set_state": (("talk", "suspended"), {}),
    "events.trim": (("talk",), {"upto": 2}),
    "queues.list": ((), {}),
    "queues.pause": (("default",), {"until": 60}),
    "queues.resume": (("paused",), {}),
    "queues.purge": (("default",), {}),
    "schedules.put": (("nightly", "noop", {}), {"cron": "@daily"}),
    "schedules.get": (("hourly",), {}),
    "schedules.next": (("hourly", 2), {}),
    "schedules.list": ((), {}),
    "schedules.run_now": (("hourly",), {}),
    "schedules.pause": (("hourly",), {}),
    "schedules.resume": (("asleep",), {}),
    "schedules.delete": (("hourly",), {}),
    "schedules.store_declared": ((), {}),
}
READS = {
    "get", "turns.is_live", "turns.outcome", "turns.list", "turns.tally", "events.read", "events.head", "events.stream",
    "queues.list", "schedules.get", "schedules.next", "schedules.list",
}  # fmt: skip
# What nobody waits for.
SILENT = {
    "delete", "turns.arm", "turns.extend", "turns.withhold", "turns.restore", "turns.reset_admission", "events.trim",
    "queues.pause", "queues.purge", "schedules.put", "schedules.pause", "schedules.resume", "schedules.delete",
    "schedules.store_declared",
}  # fmt: skip


def of(owner: object, name: str) -> Callable[..., Any]:
    for part in name.split("."):
        owner = getattr(owner, part)
    assert callable(owner)
    return owner


@pytest.fixture
async def filled(database: str, app: App, conn: Connection) -> App:
    @app.schedule("@weekly", name="declared")
    @app.task
    def noop() -> None: ...

    await app.enqueue("noop", {}, ordering_key="lane")
    await app.enqueue("noop", {})
    await app.enqueue("noop", {}, priority=9, queue="other")
    await app.enqueue("noop", {}, queue="failing")
    ((run, lease),) = await claimed(conn, queue="failing")
    await fetch(conn, settling.finish([Ending(run.claim, RunState.FAILED)], worker_id=1, freed=[lease]))
    await claimed(conn, queue="other")
    await app.turns.arm(OWED)
    for name in ("sent", "withheld"):
        await app.turns.send(Turn(deployment="dep", message_id=name, stream="other"), "noop", {}, queue="turns")
    await app.turns.arm(Turn(deployment="withheld", message_id="w", stream="other"))
    await app.turns.withhold("withheld", "provider_unavailable")
    for n in range(5):
        await app.events.append("talk", "delta", n)
    for name in ("hourly", "asleep"):
        await app.schedules.put(name, "noop", {}, cron="@hourly")
    await app.schedules.pause("asleep")
    await app.queues.pause("paused")
    return app


@pytest.fixture
async def q(filled: App) -> SyncApp:
    """One that was not opened: a call with `conn=` needs nothing of it."""
    return filled.sync


async def stored(conn: Connection) -> dict[str, list[Any]]:
    """All there is, as another session sees it."""
    tables = await rows(
        conn,
        "select c.relname from pg_class as c where c.relnamespace = 'queue_service'::regnamespace and c.relkind in ('r', 'p')"
        " and not c.relispartition and c.relname not in ('alembic_version')",
    )
    found = {}
    for (table,) in tables:
        query = sql.SQL("select t::text from queue_service.{} as t order by 1").format(sql.Identifier(table))
        found[table] = await (await conn.execute(query)).fetchall()
    return found


@pytest.fixture
async def ear(conn: Connection, filled: App) -> Callable[[], Awaitable[set[str]]]:
    """What is heard on which channels, up to now."""
    for channel in CHANNELS:
        await conn.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
    await conn.execute("listen mark")

    async def heard() -> set[str]:
        await conn.execute("notify mark")
        found = set()
        async for notice in conn.notifies(timeout=10):
            if notice.channel == "mark":
                break
            found.add(notice.channel)
        return found

    await filled.opened.notifier.close()
    await heard()
    return heard


def test_the_calls_are_all_that_take_a_connection() -> None:
    app = App("postgresql://nowhere")
    faces = {"": app, "turns.": app.turns, "events.": app.events, "queues.": app.queues, "schedules.": app.schedules}
    takers = {
        prefix + name
        for prefix, face in faces.items()
        for name, method in inspect.getmembers(type(face), inspect.isfunction)
        if not name.startswith("_") and "conn" in inspect.signature(method).parameters
    }
    assert takers == CALLS.keys()


def test_what_takes_none_is_no_part_of_a_transaction() -> None:
    """It waits or goes on for long, or takes locks that a transaction of somebody's must not hold for longer."""
    app = App("postgresql://nowhere")
    faces = {"": app, "turns.": app.turns, "events.": app.events, "queues.": app.queues, "schedules.": app.schedules}
    without = {
        prefix + name
        for prefix, face in faces.items()
        for name, method in inspect.getmembers(type(face), inspect.isfunction)
        if not name.startswith("_") and (inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method))
    } - CALLS.keys()
    assert without == {
        "open", "close", "fetch", "wait", "wait_many", "turns.wait", "turns.sweep", "events.follow",
        "queues.limit",
    }  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
class TestEachCall:
    async def test_is_the_callers_to_commit(
        self, q: SyncApp, database: str, conn: Connection, ear: Callable[[], Awaitable[set[str]]], name: str
    ) -> None:
        args, options = CALLS[name]
        before = await stored(conn)
        with psycopg.connect(database) as mine:
            of(q, name)(*args, conn=mine, **options)
            assert await stored(conn) == before
            mine.rollback()
            assert await stored(conn) == before
            assert await ear() == set()
            of(q, name)(*args, conn=mine, **options)
            assert await ear() == set(), "it was said before the commit"
            mine.commit()
        assert (await stored(conn) == before) is (name in READS)
        assert bool(await ear()) is (name not in READS | SILENT)

    async def test_on_an_asynchronous_connection_as_well(
        self, filled: App, database: str, conn: Connection, name: str
    ) -> None:
        args, options = CALLS[name]
        before = await stored(conn)
        async with await psycopg.AsyncConnection.connect(database) as mine:
            await of(filled, name)(*args, conn=mine, **options)
            await mine.rollback()
            assert await stored(conn) == before
            await of(filled, name)(*args, conn=mine, **options)
        assert (await stored(conn) == before) is (name in READS)

    async def test_in_a_session_of_sqlalchemy_as_well(
        self, q: SyncApp, engine: Engine, conn: Connection, name: str
    ) -> None:
        args, options = CALLS[name]
        before = await stored(conn)
        with Session(engine) as mine:
            of(q, name)(*args, conn=mine, **options)
            mine.rollback()
            assert await stored(conn) == before
            of(q, name)(*args, conn=mine, **options)
            mine.commit()
        assert (await stored(conn) == before) is (name in READS)

    async def test_in_a_pipeline_as_well(self, q: SyncApp, database: str, conn: Connection, name: str) -> None:
        if name == "enqueue_many":
            pytest.skip("COPY is refused there")
        args, options = CALLS[name]
        before = await stored(conn)
        with psycopg.connect(database) as mine, mine.pipeline():
            of(q, name)(*args, conn=mine, **options)
        assert (await stored(conn) == before) is (name in READS)

    async def test_leaves_the_settings_of_the_session_as_they_were(self, q: SyncApp, database: str, name: str) -> None:
        args, options = CALLS[name]
        with psycopg.connect(database, prepare_threshold=None) as mine:
            before = session_of(mine)
            of(q, name)(*args, conn=mine, **options)
            assert session_of(mine) == before
            mine.commit()
            assert session_of(mine) == before

    @pytest.mark.direct("pgbouncer refuses options in the start-up packet")
    async def test_means_the_same_whatever_the_settings_of_the_session(
        self, q: SyncApp, database: str, conn: Connection, name: str
    ) -> None:
        args, options = CALLS[name]
        before = await stored(conn)
        with psycopg.connect(database, options=ODD) as mine:
            of(q, name)(*args, conn=mine, **options)
        assert (await stored(conn) == before) is (name in READS)


ODD = (
    "-c datestyle=SQL,DMY -c intervalstyle=sql_standard -c timezone=<+03>-3 -c extra_float_digits=-15 -c bytea_output=escape "
    "-c array_nulls=off -c standard_conforming_strings=off -c search_path=nowhere -c transform_null_equals=on "
    "-c default_transaction_isolation=serializable -c xmloption=document -c lc_messages=C -c plan_cache_mode=force_custom_plan "
    "-c enable_indexscan=off -c enable_hashjoin=off -c statement_timeout=20s -c lock_timeout=10s"
)


def session_of(mine: psycopg.Connection[Any]) -> list[Any]:
    names = ("client_encoding", "DateStyle", "IntervalStyle", "TimeZone", "application_name", "search_path")
    reported = [mine.pgconn.parameter_status(name.encode()) for name in names]
    listening = mine.execute("select pg_listening_channels()").fetchall()
    prepared = mine.execute("select name from pg_prepared_statements").fetchall()
    locks = mine.execute(
        "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()"
    ).fetchall()
    # Those of plpgsql are there once a function in it was called.
    query = "select name, setting from pg_settings where name not like 'plpgsql.%' order by name"
    settings = mine.execute(query).fetchall()
    return [reported, listening, prepared, locks, settings]
