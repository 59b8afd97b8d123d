"""SQLAlchemy's sessions and connections, however they are bound and whatever listens to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, NullPool, create_engine, event, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from queue_service import App
from queue_service.app.sync import SyncApp
from queue_service.db import tables
from queue_service.db.execute import Connection as Ours
from queue_service.errors import (
    ConfigError,
    DatabaseRefused,
    DatabaseUnavailable,
    SchemaMismatch,
    TransactionConflict,
)
from queue_service.testing import databases
from tests.support import one


class Base(DeclarativeBase): ...


class Order(Base):
    __tablename__ = "orders"
    n: Mapped[int] = mapped_column(primary_key=True)


class Elsewhere(DeclarativeBase): ...


class Note(Elsewhere):
    __tablename__ = "notes"
    n: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def q(database: str) -> SyncApp:
    """One that was not opened."""
    return App(database).sync


@pytest.fixture
async def orders(conn: Ours) -> None:
    await conn.execute("create table public.orders (n int primary key)")


@pytest.fixture
def other_engine(server: str, template: str) -> Iterator[Engine]:
    """Of another database, which has our schema too."""
    with databases.made(server, template) as conninfo:
        engine = engine_of(conninfo)
        with engine.begin() as conn:
            conn.execute(text("create table public.notes (n int primary key)"))
        yield engine
        engine.dispose()


def engine_of(conninfo: str, **options: Any) -> Engine:
    return create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(conninfo), poolclass=NullPool, **options
    )


async def counts(conn: Ours) -> Any:
    """How many orders and runs there are."""
    return await one(
        conn, "select array[(select count(*) from public.orders), (select count(*) from queue_service.runs)]"
    )


@pytest.mark.usefixtures("orders")
class TestASessionThatIsBoundByMapper:
    async def test_takes_the_bind_of_our_tables(
        self, q: SyncApp, engine: Engine, other_engine: Engine, conn: Ours
    ) -> None:
        with Session(binds={Elsewhere: other_engine, Base: engine, tables.runs: engine}) as mine:
            q.enqueue("noop", {}, conn=mine)
            mine.add_all([Order(n=1), Note(n=1)])
            q.enqueue_many("noop", [{}], conn=mine)
            mine.rollback()
            assert await counts(conn) == [0, 0]
            mine.add_all([Order(n=1), Note(n=1)])
            q.enqueue("noop", {}, conn=mine)
            mine.commit()
        assert await counts(conn) == [1, 1]

    async def test_or_the_one_connection_that_it_has(
        self, q: SyncApp, engine: Engine, other_engine: Engine, conn: Ours
    ) -> None:
        with Session(binds={Elsewhere: other_engine, Base: engine}) as mine:
            mine.add(Order(n=1))
            mine.flush()
            q.enqueue("noop", {}, conn=mine)
            with mine.begin_nested():
                q.enqueue("noop", {}, conn=mine)
            mine.rollback()
            assert await counts(conn) == [0, 0]
            mine.add(Order(n=1))
            mine.flush()
            q.enqueue_many("noop", [{}], conn=mine)
            mine.commit()
        assert await counts(conn) == [1, 1]

    def test_and_says_what_is_missing_where_it_has_none_or_two(
        self, q: SyncApp, engine: Engine, other_engine: Engine
    ) -> None:
        with Session(binds={Elsewhere: other_engine, Base: engine}) as mine:
            with pytest.raises(ConfigError, match=r"(?s)no connections so far.*tables\.runs"):
                q.enqueue("noop", {}, conn=mine)
            assert not mine.in_transaction()
            mine.add_all([Order(n=1), Note(n=1)])
            mine.flush()
            with pytest.raises(ConfigError, match="2 connections so far"):
                q.enqueue("noop", {}, conn=mine)
            assert q.enqueue("noop", {}, conn=mine.connection(bind_arguments={"mapper": Order.__mapper__}))

    async def test_an_asynchronous_one_as_well(self, app: App, async_engine: AsyncEngine, conn: Ours) -> None:
        async with AsyncSession(binds={Base: async_engine, tables.runs: async_engine}) as mine:
            await app.enqueue("noop", {}, conn=mine)
            await mine.commit()
        async with AsyncSession(binds={Base: async_engine}) as mine:
            with pytest.raises(ConfigError, match="no connections so far"):
                await app.enqueue("noop", {}, conn=mine)
            mine.add(Order(n=1))
            await mine.flush()
            await app.enqueue_many("noop", [{}], conn=mine)
            await mine.commit()
        assert await counts(conn) == [1, 2]

    async def test_a_session_that_routes_gives_the_connection_it_writes_on(
        self, q: SyncApp, engine: Engine, database: str, conn: Ours
    ) -> None:
        replica = create_engine(
            "postgresql+psycopg://",
            creator=lambda: psycopg.connect(database, options="-c default_transaction_read_only=on"),
            poolclass=NullPool,
        )

        class Routing(Session):
            def get_bind(self, mapper: Any = None, *, clause: Any = None, **_: Any) -> Engine:  # noqa: ARG002
                return engine if self._flushing or getattr(clause, "is_dml", False) else replica

        with Routing() as mine:
            mine.add(Order(n=1))
            q.enqueue("noop", {}, conn=mine)
            mine.commit()
        assert await counts(conn) == [1, 1]


@pytest.mark.usefixtures("orders")
class TestHowItIsConfigured:
    async def test_a_session_that_has_joined_a_connection_leaves_the_end_to_that(
        self, q: SyncApp, engine: Engine, conn: Ours
    ) -> None:
        for keep in (False, True):
            with engine.connect() as outer:
                transaction = outer.begin()
                with Session(bind=outer, join_transaction_mode="create_savepoint") as mine:
                    mine.add(Order(n=1))
                    q.enqueue("noop", {}, conn=mine)
                    mine.rollback()
                    mine.add(Order(n=2))
                    q.enqueue("noop", {}, conn=mine)
                    mine.commit()
                assert await counts(conn) == [0, 0]
                transaction.commit() if keep else transaction.rollback()
        assert await counts(conn) == [1, 1]

    async def test_with_autocommit_each_call_is_stored_at_once(self, q: SyncApp, engine: Engine, conn: Ours) -> None:
        with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as mine:
            q.enqueue("noop", {}, conn=mine)
            q.enqueue_many("noop", [{}], conn=mine)
            assert await counts(conn) == [0, 2]
        with Session(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
            q.enqueue("noop", {}, conn=session)
            assert await counts(conn) == [0, 3]

    async def test_a_schema_translate_map_moves_nothing_of_ours(self, q: SyncApp, engine: Engine, conn: Ours) -> None:
        translating = engine.execution_options(schema_translate_map={"queue_service": "nowhere", None: "public"})
        with Session(translating) as mine:
            mine.add(Order(n=1))
            q.enqueue("noop", {}, conn=mine)
            mine.commit()
        assert await counts(conn) == [1, 1]

    async def test_a_hook_that_rewrites_statements_does_not_meet_ours(
        self, q: SyncApp, database: str, conn: Ours
    ) -> None:
        engine = engine_of(database)

        @event.listens_for(engine, "before_cursor_execute", retval=True)
        def rewrite(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> tuple[str, Any]:
            return statement.replace("queue_service", "nowhere") + " /* 100% */", parameters

        begun: list[Connection] = []
        event.listen(engine, "begin", begun.append)
        with engine.connect() as mine:
            q.enqueue("noop", {}, conn=mine)
            assert mine.in_transaction()
            assert len(begun) == 1
            mine.commit()
            with mine.begin():
                q.enqueue_many("noop", [{}], conn=mine)
        assert await counts(conn) == [0, 2]

    def test_payloads_are_in_no_log_of_sqlalchemys(
        self, q: SyncApp, database: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with engine_of(database, echo=True).begin() as mine:
            q.enqueue("noop", {"secret": "hunter2"}, conn=mine)
        assert "BEGIN" in caplog.text
        assert "hunter2" not in caplog.text

    async def test_a_transaction_of_two_phases_is_refused_before_anything_is_sent(
        self, q: SyncApp, app: App, engine: Engine, async_engine: AsyncEngine, conn: Ours
    ) -> None:
        with Session(engine, twophase=True) as mine:
            mine.add(Order(n=1))
            with pytest.raises(ConfigError, match="two phases"):
                q.enqueue("noop", {}, conn=mine)
            mine.rollback()
        with engine.connect() as plain, plain.begin_twophase():
            with pytest.raises(ConfigError, match="two phases"):
                q.enqueue("noop", {}, conn=plain)
        async with AsyncSession(async_engine, twophase=True) as other:
            with pytest.raises(ConfigError, match="two phases"):
                await app.enqueue("noop", {}, conn=other)
        assert await counts(conn) == [0, 0]

    def test_a_read_only_engine_is_said(self, q: SyncApp, engine: Engine) -> None:
        with engine.execution_options(postgresql_readonly=True).connect() as mine:
            with pytest.raises(ConfigError, match="read only"):
                q.enqueue("noop", {}, conn=mine)
            assert q.get(1, conn=mine) is None


@pytest.mark.usefixtures("orders")
class TestTheBlockingSideOfAnAsynchronousSession:
    async def test_enqueues_within_run_sync(self, q: SyncApp, async_engine: AsyncEngine, conn: Ours) -> None:
        async with AsyncSession(async_engine) as mine:
            await mine.run_sync(lambda session: q.enqueue("noop", {}, conn=session))
            await mine.run_sync(lambda session: q.enqueue_many("noop", [{}], conn=session))
            await mine.rollback()
            assert await counts(conn) == [0, 0]
            await mine.run_sync(lambda session: q.enqueue("noop", {}, conn=session))
            await mine.commit()
        async with async_engine.begin() as connection:
            await connection.run_sync(lambda its: q.enqueue("noop", {}, conn=its))
        assert await counts(conn) == [0, 2]

    async def test_enqueues_in_what_listens_to_it(self, q: SyncApp, async_engine: AsyncEngine, conn: Ours) -> None:
        async with AsyncSession(async_engine) as mine:
            event.listen(mine.sync_session, "after_flush", lambda session, _: q.enqueue("noop", {}, conn=session))
            mine.add(Order(n=1))
            await mine.commit()
        assert await counts(conn) == [1, 1]

    async def test_says_so_anywhere_else(self, q: SyncApp, async_engine: AsyncEngine) -> None:
        async with AsyncSession(async_engine) as mine:
            await mine.connection()
            with pytest.raises(ConfigError, match="greenlet"):
                q.enqueue("noop", {}, conn=mine.sync_session)


class TestWhatIsPassedByMistake:
    async def test_says_what_to_pass(self, app: App, engine: Engine, async_engine: AsyncEngine) -> None:
        with Session(engine) as mine, engine.connect() as connection:
            for thing, advice in (
                (engine, "engine.begin"), (async_engine, "engine.begin"), (sessionmaker(engine), "makes sessions"),
                (async_sessionmaker(async_engine), "makes sessions"), (mine.begin(), "is a transaction"),
                (connection.begin(), "is a transaction"), (engine.raw_connection(), "driver_connection"),
            ):  # fmt: skip
                with pytest.raises(ConfigError, match=advice):
                    await app.enqueue("noop", {}, conn=thing)

    async def test_one_that_was_closed_or_not_begun(
        self, q: SyncApp, app: App, engine: Engine, async_engine: AsyncEngine
    ) -> None:
        with engine.connect() as mine:
            pass
        with pytest.raises(ConfigError, match="closed"):
            q.enqueue("noop", {}, conn=mine)
        with pytest.raises(ConfigError, match="not been awaited"):
            await app.enqueue("noop", {}, conn=async_engine.connect())
        with Session(engine, autobegin=False) as session, pytest.raises(ConfigError, match=r"[Aa]utobegin"):
            q.enqueue("noop", {}, conn=session)


class TestErrors:
    """They read the same as on psycopg's own connection, and SQLAlchemy goes on as after an error of its own."""

    def test_a_missing_schema(self, q: SyncApp, empty_database: str) -> None:
        with Session(engine_of(empty_database)) as mine:
            with pytest.raises(SchemaMismatch, match="migrate"):
                q.enqueue("noop", {}, conn=mine)
            with pytest.raises(ConfigError, match="has failed before"):
                q.enqueue("noop", {}, conn=mine)
            mine.rollback()
            assert mine.execute(text("select 1")).scalar() == 1

    async def test_a_permission_that_is_denied(self, q: SyncApp, engine: Engine, conn: Ours) -> None:
        await conn.execute("create role queue_service_stranger")
        try:
            with engine.connect() as mine:
                mine.execute(text("set local role queue_service_stranger"))
                with pytest.raises(DatabaseRefused, match="does not allow it"):
                    q.enqueue("noop", {}, conn=mine)
        finally:
            await conn.execute("drop role queue_service_stranger")

    @pytest.mark.usefixtures("orders")
    def test_a_flush_that_failed_before(self, q: SyncApp, engine: Engine) -> None:
        with Session(engine) as mine:
            mine.add_all([Order(n=1)])
            mine.flush()
            mine.execute(text("insert into orders values (2)"))
            mine.add(Order(n=2))
            with pytest.raises(Exception, match="duplicate key"):
                mine.flush()
            with pytest.raises(ConfigError, match="Roll it back") as caught:
                q.enqueue("noop", {}, conn=mine)
            assert "insert" not in str(caught.value).lower()
            mine.rollback()
            assert q.enqueue("noop", {}, conn=mine)

    async def test_a_conflict(self, q: SyncApp, app: App, engine: Engine) -> None:
        with engine.execution_options(isolation_level="SERIALIZABLE").connect() as mine:
            mine.execute(text("select 1 from queue_service.runs"))
            await app.enqueue("noop", {}, singleton_key="k")
            with pytest.raises(TransactionConflict) as caught:
                q.enqueue("noop", {}, singleton_key="k", conn=mine)
            assert isinstance(caught.value.__cause__, psycopg.errors.SerializationFailure)

    def test_a_server_that_cannot_be_reached(self, q: SyncApp) -> None:
        engine = create_engine("postgresql+psycopg://nobody@127.0.0.1:1/nowhere")
        with Session(engine) as mine, pytest.raises(DatabaseUnavailable, match="cannot be reached"):
            q.enqueue("noop", {}, conn=mine)
        engine.dispose()

    async def test_a_server_that_goes_away(self, q: SyncApp, database: str, conn: Ours) -> None:
        """The pool of SQLAlchemy's gives nobody that connection again."""
        engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(database), pool_size=1)
        with Session(engine) as mine:
            pid = mine.execute(text("select pg_backend_pid()")).scalar()
            await conn.execute("select pg_terminate_backend(%s)", [pid])
            with pytest.raises(DatabaseUnavailable):
                q.enqueue("noop", {}, conn=mine)
            with pytest.raises(ConfigError, match=r"[Rr]oll(ed)? (it )?back"):
                q.enqueue("noop", {}, conn=mine)
            mine.rollback()
            assert q.enqueue("noop", {}, conn=mine)
        with Session(engine) as mine:
            assert q.enqueue("noop", {}, conn=mine)
        engine.dispose()

    async def test_a_server_that_goes_away_from_an_asynchronous_session(
        self, app: App, async_engine: AsyncEngine, conn: Ours
    ) -> None:
        async with AsyncSession(async_engine) as mine:
            pid = (await mine.execute(text("select pg_backend_pid()"))).scalar()
            await conn.execute("select pg_terminate_backend(%s)", [pid])
            with pytest.raises(DatabaseUnavailable):
                await app.enqueue("noop", {}, conn=mine)
            await mine.rollback()
            assert await app.enqueue("noop", {}, conn=mine)

    def test_an_error_of_the_callers_own_stays_sqlalchemys(self, engine: Engine) -> None:
        with engine.connect() as mine, pytest.raises(ProgrammingError):
            mine.execute(text("select * from nowhere"))
