"""A caller's own connection, as callers have configured it: what we send is part of their transaction, and only that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from queue_service import App
from queue_service.app.sync import SyncApp
from queue_service.db import channels
from queue_service.db.execute import Connection
from queue_service.errors import ConfigError, DuplicateRun, SchemaMismatch
from tests.support import claimed, one, rows

TEXT = "tab\t back\\slash ünïcode \U0001f600"
PAYLOADS = [{"n": n, "text": TEXT} for n in range(3)]


@pytest.fixture
def q(app: App) -> Iterator[SyncApp]:
    with app.sync as opened:
        yield opened


@pytest.fixture(params=["commit", "rollback"])
def end(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def stored(conn: Connection) -> list[tuple[int, Any]]:
    return [(row[0], row[1]) for row in await rows(conn, "select id, payload from queue_service.runs order by id")]


def all_in_order(ids: list[int]) -> list[tuple[int, Any]]:
    return list(zip(ids, [*PAYLOADS, {"single": TEXT}], strict=True))


class TestTheIdsAndPayloadsOfBothCallsAreTheCallers:
    async def test_on_a_psycopg_connection_that_returns_dicts(
        self, q: SyncApp, database: str, conn: Connection, end: str
    ) -> None:
        with psycopg.connect(database, row_factory=dict_row) as mine:
            ids = [*q.enqueue_many("noop", PAYLOADS, conn=mine), q.enqueue("noop", {"single": TEXT}, conn=mine)]
            getattr(mine, end)()
        assert await stored(conn) == (all_in_order(ids) if end == "commit" else [])

    async def test_on_an_async_psycopg_connection_that_returns_dicts(
        self, app: App, database: str, conn: Connection, end: str
    ) -> None:
        async with await psycopg.AsyncConnection.connect(database, row_factory=dict_row) as mine:
            ids = await app.enqueue_many("noop", PAYLOADS, conn=mine)
            ids.append(await app.enqueue("noop", {"single": TEXT}, conn=mine))
            await getattr(mine, end)()
        assert await stored(conn) == (all_in_order(ids) if end == "commit" else [])

    async def test_on_a_sync_connection_of_any_kind_under_the_async_app(
        self, app: App, database: str, engine: Engine, conn: Connection, end: str
    ) -> None:
        ids: list[int] = []
        with psycopg.connect(database) as plain, engine.connect() as connection, Session(engine) as orm:
            for mine in (plain, connection, orm):
                ids += await app.enqueue_many("noop", PAYLOADS, conn=mine)
                ids.append(await app.enqueue("noop", {"single": TEXT}, conn=mine))
                getattr(mine, end)()
        expected = [*all_in_order(ids[:4]), *all_in_order(ids[4:8]), *all_in_order(ids[8:])]
        assert await stored(conn) == (expected if end == "commit" else [])

    async def test_in_a_session_with_work_of_its_own(
        self, q: SyncApp, engine: Engine, conn: Connection, end: str
    ) -> None:
        await conn.execute("create table public.orders (n int)")
        with Session(engine) as mine:
            mine.execute(text("insert into public.orders values (1)"))
            q.enqueue("noop", {}, conn=mine)
            q.enqueue_many("noop", PAYLOADS, conn=mine)
            mine.execute(text("insert into public.orders values (2)"))
            getattr(mine, end)()
        both = await one(
            conn, "select (select count(*) from public.orders) || ' ' || (select count(*) from queue_service.runs)"
        )
        assert both == ("2 4" if end == "commit" else "0 0")

    @pytest.mark.parametrize("kind", ["connection", "session", "scoped"])
    async def test_on_each_async_object_of_sqlalchemy(
        self, app: App, async_engine: AsyncEngine, conn: Connection, end: str, kind: str
    ) -> None:
        maker = async_sessionmaker(async_engine)
        kinds: dict[str, Callable[[], AsyncConnection | AsyncSession | async_scoped_session[AsyncSession]]] = {
            "connection": async_engine.connect,
            "session": maker,
            "scoped": lambda: async_scoped_session(maker, lambda: "test"),
        }
        mine = kinds[kind]()
        if isinstance(mine, AsyncConnection):
            await mine.start()
        ids = await app.enqueue_many("noop", PAYLOADS, conn=mine)
        ids.append(await app.enqueue("noop", {"single": TEXT}, conn=mine))
        await getattr(mine, end)()
        await mine.close()
        assert await stored(conn) == (all_in_order(ids) if end == "commit" else [])

    async def test_on_a_scoped_session(self, q: SyncApp, engine: Engine, conn: Connection, end: str) -> None:
        mine = scoped_session(sessionmaker(engine))
        ids = [*q.enqueue_many("noop", PAYLOADS, conn=mine), q.enqueue("noop", {"single": TEXT}, conn=mine)]
        getattr(mine, end)()
        mine.remove()
        assert await stored(conn) == (all_in_order(ids) if end == "commit" else [])

    async def test_inside_a_savepoint_that_is_rolled_back(self, q: SyncApp, database: str, conn: Connection) -> None:
        with psycopg.connect(database) as mine:
            kept = q.enqueue("noop", {}, conn=mine)
            with mine.transaction(force_rollback=True):
                q.enqueue("noop", {}, conn=mine)
                q.enqueue_many("noop", PAYLOADS, conn=mine)
            mine.commit()
        assert await stored(conn) == [(kept, {})]

    async def test_in_a_sqlalchemy_block_that_begins_and_commits(
        self, app: App, async_engine: AsyncEngine, conn: Connection
    ) -> None:
        async with async_engine.begin() as mine:
            await app.enqueue_many("noop", PAYLOADS, conn=mine)
        async with AsyncSession(async_engine) as session, session.begin() as begun:
            await app.enqueue_many("noop", PAYLOADS, conn=session)
            await begun.rollback()
        assert len(await stored(conn)) == 3


class TestHowTheCallerConfiguredIt:
    @pytest.mark.parametrize("cursor", [psycopg.ClientCursor, psycopg.RawCursor])
    async def test_another_cursor_factory_changes_nothing(
        self, q: SyncApp, database: str, conn: Connection, cursor: type[psycopg.Cursor[Any]]
    ) -> None:
        with psycopg.connect(database, cursor_factory=cursor) as mine:
            ids = [*q.enqueue_many("noop", PAYLOADS, conn=mine), q.enqueue("noop", {"single": TEXT}, conn=mine)]
        assert await stored(conn) == all_in_order(ids)

    @pytest.mark.direct("pgbouncer refuses options in the start-up packet")
    async def test_its_time_zone_and_interval_style_move_no_moment(
        self, q: SyncApp, database: str, conn: Connection
    ) -> None:
        style = "-c timezone=Asia/Kathmandu -c intervalstyle=sql_standard -c datestyle=ISO,DMY"
        with psycopg.connect(database, options=style) as mine:
            q.enqueue("noop", {}, delay=3_600, retry_delay=90.5, timeout=86_400, conn=mine)
            q.enqueue_many("noop", [{}], delay=3_600, retry_delay=90.5, timeout=86_400, conn=mine)
        assert await rows(
            conn,
            "select round(extract(epoch from run_at - clock_timestamp()) / 60)::int, extract(epoch from retry_delay)::float,"
            " extract(epoch from timeout)::int from queue_service.runs",
        ) == 2 * [(60, 90.5, 86_400)]

    async def test_autocommit_stores_at_once(self, app: App, database: str, conn: Connection) -> None:
        async with await psycopg.AsyncConnection.connect(database, autocommit=True) as mine:
            await app.enqueue("noop", {}, conn=mine)
            await app.enqueue_many("noop", PAYLOADS, conn=mine)
            assert len(await stored(conn)) == 4

    async def test_its_own_settings_are_left_alone(self, q: SyncApp, database: str) -> None:
        with psycopg.connect(database, autocommit=True) as mine:
            # The name is set by a pooler itself, for whose session it is.
            query = "select name, setting from pg_settings where name <> 'application_name' order by name"
            before = mine.execute(query).fetchall()
            q.enqueue("noop", {}, conn=mine)
            q.enqueue_many("noop", PAYLOADS, conn=mine)
            assert mine.execute(query).fetchall() == before

    @pytest.mark.parametrize("policy", ["return", "replace", "raise"])
    async def test_a_duplicate_leaves_a_sqlalchemy_transaction_whole(
        self, q: SyncApp, engine: Engine, conn: Connection, policy: Any
    ) -> None:
        first = q.enqueue("noop", {}, singleton_key="k")
        await claimed(conn)
        with Session(engine) as mine:
            q.enqueue("noop", {"before": 1}, conn=mine)
            if policy == "return":
                assert q.enqueue("noop", {}, singleton_key="k", on_conflict=policy, conn=mine) == first
            else:
                with pytest.raises(DuplicateRun):
                    q.enqueue("noop", {}, singleton_key="k", on_conflict=policy, conn=mine)
            q.enqueue("noop", {"after": 1}, conn=mine)
            mine.commit()
        assert [payload for _, payload in await stored(conn)] == [{}, {"before": 1}, {"after": 1}]

    async def test_a_database_without_the_schema_is_said(self, q: SyncApp, empty_database: str) -> None:
        with psycopg.connect(empty_database) as mine, pytest.raises(SchemaMismatch, match="migrate"):
            q.enqueue("noop", {}, conn=mine)


class TestNotices:
    @pytest.mark.parametrize("end", ["commit", "rollback"])
    @pytest.mark.parametrize("many", [False, True], ids=["enqueue", "enqueue_many"])
    async def test_go_out_with_the_callers_commit_and_not_without(
        self, q: SyncApp, engine: Engine, conn: Connection, end: str, many: bool
    ) -> None:
        await conn.execute(f"listen {channels.RUNS}")
        with Session(engine) as mine:
            if many:
                q.enqueue_many("noop", PAYLOADS, queue="q", priority=2, conn=mine)
            else:
                q.enqueue("noop", {}, queue="q", priority=2, conn=mine)
            getattr(mine, end)()
        # What is said later arrives later, so the first to arrive tells whether the other was sent.
        await conn.execute(f"notify {channels.RUNS}, 'last'")
        heard = [notice.payload async for notice in conn.notifies(timeout=5, stop_after=1)]
        assert heard[0] == ("2 q" if end == "commit" else "last")

    async def test_a_delayed_run_is_not_announced(self, q: SyncApp, database: str, conn: Connection) -> None:
        await conn.execute(f"listen {channels.RUNS}")
        with psycopg.connect(database) as mine:
            q.enqueue("noop", {}, delay=60, conn=mine)
            q.enqueue_many("noop", PAYLOADS, delay=60, conn=mine)
        await conn.execute(f"notify {channels.RUNS}, 'last'")
        heard = [notice.payload async for notice in conn.notifies(timeout=5, stop_after=1)]
        assert heard == ["last"]


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        "thing", [pytest.param(object(), id="object()"), "postgresql://", 1, psycopg.connect], ids=repr
    )
    async def test_what_is_no_connection(self, app: App, thing: Any) -> None:
        with pytest.raises(ConfigError, match="psycopg Connection or AsyncConnection"):
            await app.enqueue("noop", {}, conn=thing)
        with pytest.raises(ConfigError, match="psycopg Connection or AsyncConnection"):
            await app.enqueue_many("noop", [{}], conn=thing)

    async def test_an_engine(self, app: App, engine: Engine, async_engine: AsyncEngine) -> None:
        for thing in (engine, async_engine):
            with pytest.raises(ConfigError, match="cannot be used"):
                await app.enqueue("noop", {}, conn=thing)

    async def test_what_is_asynchronous_on_the_blocking_surface(
        self, q: SyncApp, async_engine: AsyncEngine, conn: Connection
    ) -> None:
        async with async_engine.connect() as connection, AsyncSession(async_engine) as orm:
            for mine in (conn, connection, orm):
                with pytest.raises(ConfigError, match="asynchronous"):
                    q.enqueue("noop", {}, conn=mine)
                with pytest.raises(ConfigError, match="asynchronous"):
                    q.enqueue_many("noop", [{}], conn=mine)

    async def test_another_driver(self, app: App) -> None:
        engine = create_engine("sqlite://")
        with engine.connect() as mine, pytest.raises(ConfigError, match="psycopg 3"):
            await app.enqueue("noop", {}, conn=mine)
        engine.dispose()
