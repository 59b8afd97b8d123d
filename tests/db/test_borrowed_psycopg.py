"""A caller's psycopg connection in any state and however it is configured: what is asked of it works, or is refused in a
sentence before anything is sent."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import psycopg
import psycopg_pool
import pytest
from psycopg import sql
from psycopg.adapt import Dumper, Loader
from psycopg.rows import dict_row, namedtuple_row

from queue_service import App, Turn
from queue_service.app.sync import SyncApp
from queue_service.db import borrowed_psycopg
from queue_service.db.execute import Connection, fetch
from queue_service.errors import ConfigError, DatabaseRefused, DatabaseUnavailable, DuplicateRun, TransactionConflict
from queue_service.runs import queries
from queue_service.runs.model import NewRun
from tests.support import eventually, one, rows

TURN = Turn(deployment="dep", message_id="m", stream="talk")
TEXT = "tab\t back\\slash ünïcode \U0001f600 $1 %s"


@pytest.fixture
def q(database: str) -> SyncApp:
    """One that was not opened."""
    return App(database).sync


@pytest.fixture
def mine(database: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database) as conn:
        yield conn
        conn.rollback()


async def payloads(conn: Connection) -> list[Any]:
    return [row[0] for row in await rows(conn, "select payload from queue_service.runs order by id")]


class TestPipelineMode:
    async def test_what_is_enqueued_among_statements_of_the_callers_is_stored_with_them(
        self, q: SyncApp, database: str, conn: Connection
    ) -> None:
        await conn.execute("create table public.orders (n int)")
        with psycopg.connect(database) as mine, mine.pipeline():
            mine.execute("insert into orders values (1)")
            run_id = q.enqueue("noop", {"text": TEXT}, conn=mine)
            mine.execute("insert into orders values (2)")
            assert q.enqueue("noop", {}, singleton_key="k", conn=mine) == run_id + 1
            assert q.get(run_id, conn=mine) is not None
        assert await payloads(conn) == [{"text": TEXT}, {}]
        assert await one(conn, "select count(*) from public.orders") == 2

    async def test_on_an_asynchronous_connection(self, app: App, database: str, conn: Connection) -> None:
        async with await psycopg.AsyncConnection.connect(database) as mine:
            async with mine.pipeline():
                first = await app.enqueue("noop", {"text": TEXT}, conn=mine)
                many = await asyncio.gather(*[app.enqueue("noop", {"n": n}, conn=mine) for n in range(5)])
                await app.turns.send(TURN, "noop", {"sent": 1}, conn=mine)
            await mine.rollback()
            assert await payloads(conn) == []
            async with mine.pipeline():
                await app.enqueue("noop", {"text": TEXT}, conn=mine)
        assert len({first, *many}) == 6
        assert await payloads(conn) == [{"text": TEXT}]

    async def test_with_autocommit_each_call_is_stored(self, q: SyncApp, database: str, conn: Connection) -> None:
        with psycopg.connect(database, autocommit=True) as mine, mine.pipeline():
            q.enqueue("noop", {"n": 1}, conn=mine)
            assert await payloads(conn) == [{"n": 1}]
            with mine.transaction():
                q.enqueue("noop", {"n": 2}, conn=mine)
                assert await payloads(conn) == [{"n": 1}]
        assert await payloads(conn) == [{"n": 1}, {"n": 2}]

    def test_an_error_of_the_callers_is_the_callers(self, q: SyncApp, mine: psycopg.Connection[Any]) -> None:
        with mine.pipeline():
            # The driver may have read the answer before our call.
            with pytest.raises(psycopg.errors.UndefinedTable, match="a_table_of_mine"):  # noqa: PT012
                mine.execute("select * from a_table_of_mine")
                q.enqueue("noop", {}, conn=mine)
            mine.rollback()
            assert q.enqueue("noop", {}, conn=mine)

    def test_an_error_of_ours_is_ours_and_the_pipeline_goes_on(self, q: SyncApp, mine: psycopg.Connection[Any]) -> None:
        mine.execute("set transaction read only")
        with mine.pipeline():
            with pytest.raises(DatabaseRefused, match="takes no writes"):
                q.enqueue("noop", {}, conn=mine)
            with pytest.raises(ConfigError, match="has failed before"):
                q.enqueue("noop", {}, conn=mine)
            mine.rollback()
            assert q.enqueue("noop", {}, singleton_key="k", conn=mine)
            with pytest.raises(DuplicateRun):
                q.enqueue("noop", {}, singleton_key="k", on_conflict="raise", conn=mine)
            assert q.enqueue("noop", {}, conn=mine)

    async def test_many_are_refused_before_anything_is_sent(
        self, q: SyncApp, app: App, mine: psycopg.Connection[Any], database: str
    ) -> None:
        with mine.pipeline(), pytest.raises(ConfigError, match="pipeline mode"):
            q.enqueue_many("noop", [{}], conn=mine)
        assert mine.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        async with await psycopg.AsyncConnection.connect(database) as other, other.pipeline():
            with pytest.raises(ConfigError, match="pipeline mode"):
                await app.enqueue_many("noop", [{}], conn=other)
        assert q.enqueue_many("noop", [{}], conn=mine)


class Mangling(Loader):
    def load(self, data: Any) -> Any:  # noqa: ARG002 - psycopg passes it
        return "mangled"


class ManglingBinary(Mangling):
    format = psycopg.pq.Format.BINARY


class Misleading(Dumper):
    def dump(self, obj: Any) -> bytes:  # noqa: ARG002 - psycopg passes it
        return b"misled"


def configured(database: str, kind: str) -> psycopg.Connection[Any]:
    options: dict[str, dict[str, Any]] = {
        "client cursors": {"cursor_factory": psycopg.ClientCursor},
        "raw cursors": {"cursor_factory": psycopg.RawCursor},
        "dicts": {"row_factory": dict_row},
        "named tuples": {"row_factory": namedtuple_row},
        "prepares at once": {"prepare_threshold": 0},
        "prepares never": {"prepare_threshold": None},
    }
    conn = psycopg.connect(database, **options.get(kind, {}))
    if kind == "server cursors":
        conn.server_cursor_factory = psycopg.ServerCursor
    if kind == "loaders":
        for name in ("int8", "text", "jsonb", "json", "timestamptz", "bool", "interval", "int4"):
            conn.adapters.register_loader(name, Mangling)
            conn.adapters.register_loader(name, ManglingBinary)
    if kind == "dumpers":
        for each in (str, int, list, bool, float, dt.datetime, dt.timedelta, type(None)):
            conn.adapters.register_dumper(each, Misleading)
    if kind == "json":
        psycopg.types.json.set_json_loads(lambda data: json.loads(data, parse_int=str), conn)
    return conn


@pytest.mark.parametrize(
    "kind",
    ["client cursors", "raw cursors", "server cursors", "dicts", "named tuples", "prepares at once", "prepares never",
     "loaders", "dumpers", "json"],
)  # fmt: skip
async def test_how_the_caller_has_configured_it_changes_nothing(
    q: SyncApp, database: str, conn: Connection, kind: str
) -> None:
    moment = dt.datetime(2030, 1, 2, 3, 4, 5, 6, tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=45)))
    with configured(database, kind) as mine:
        for _ in range(7):
            run_id = q.enqueue(
                "noop", {"text": TEXT, "n": 5}, run_at=moment, retry_delay=1.5, metadata={"n": 1}, singleton_key="k",
                ordering_key="lane", conn=mine,
            )  # fmt: skip
        first, second = q.enqueue_many("noop", [{"n": 1}, {"n": 2}], run_at=moment, conn=mine)
        assert second == first + 1 > run_id + 1
        run = q.get(run_id, conn=mine)
        assert run is not None
        assert (run.payload, run.run_at, run.retry_delay) == ({"text": TEXT, "n": 5}, moment, dt.timedelta(seconds=1.5))
        assert q.events.append_many("talk", [("delta", {"text": TEXT}), ("delta", None)], conn=mine) == [1, 2]
        assert [event.body for event in q.events.read("talk", kinds=["delta"], conn=mine)] == [{"text": TEXT}, None]
        q.schedules.put("s", "noop", {}, every=90, conn=mine)
        assert [schedule.recurrence.every for schedule in q.schedules.list(conn=mine)] == [dt.timedelta(seconds=90)]
        mine.commit()
    assert (await payloads(conn))[-1] == {"n": 2}


@pytest.mark.parametrize("zone", ["Foo+3", "<+03>-3", "Asia/Kathmandu", "UTC"])
def test_moments_are_in_utc_whatever_the_time_zone_of_the_session(
    q: SyncApp, mine: psycopg.Connection[Any], zone: str, caplog: pytest.LogCaptureFixture
) -> None:
    mine.execute(sql.SQL("set timezone to {}").format(zone))
    moment = dt.datetime(2030, 1, 2, 3, 4, 5, 6, tzinfo=dt.UTC)
    run = q.get(q.enqueue("noop", {}, run_at=moment, conn=mine), conn=mine)
    assert run is not None
    assert (run.run_at, run.run_at.tzinfo, run.created_at.tzinfo) == (moment, dt.UTC, dt.UTC)
    assert caplog.text == ""


class TestWhatIsRefused:
    @pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "EUC_JP"])
    async def test_a_connection_with_another_encoding(
        self, q: SyncApp, app: App, database: str, conn: Connection, encoding: str
    ) -> None:
        with psycopg.connect(database, client_encoding=encoding, autocommit=True) as mine:
            for call in (lambda: q.enqueue("noop", {}, conn=mine), lambda: q.enqueue_many("noop", [{}], conn=mine)):
                with pytest.raises(ConfigError, match=rf"client_encoding of this connection is {encoding}"):
                    call()
            mine.execute("set client_encoding to 'UTF8'")
            assert q.enqueue("noop", {"text": TEXT}, conn=mine)
        async with await psycopg.AsyncConnection.connect(database, client_encoding=encoding) as other:
            with pytest.raises(ConfigError, match="client_encoding"):
                await app.enqueue("noop", {}, conn=other)
        assert await payloads(conn) == [{"text": TEXT}]

    @pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
    def test_a_database_with_another_encoding(self, q: SyncApp, server: str, encoding: str) -> None:
        name = f"queue_service_{encoding.lower()}"
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(f"create database {name} encoding '{encoding}' locale 'C' template template0".encode())
            try:
                with psycopg.connect(server, dbname=name, client_encoding="utf8") as mine:
                    with pytest.raises(ConfigError, match=rf"encoding of this database is {encoding}"):
                        q.enqueue("noop", {}, conn=mine)
            finally:
                admin.execute(f"drop database {name} with (force)".encode())

    def test_a_closed_connection(self, q: SyncApp, database: str) -> None:
        mine = psycopg.connect(database)
        mine.close()
        with pytest.raises(ConfigError, match="is closed"):
            q.enqueue("noop", {}, conn=mine)

    @pytest.mark.direct("its connections to the server are the pooler's")
    async def test_a_connection_that_has_lost_its_server(self, q: SyncApp, database: str, conn: Connection) -> None:
        with psycopg.connect(database) as mine:
            mine.execute("select 1")
            await conn.execute("select pg_terminate_backend(%s)", [mine.info.backend_pid])
            for _ in range(2):
                with pytest.raises(DatabaseUnavailable):
                    q.enqueue("noop", {}, conn=mine)

    def test_a_transaction_that_has_failed(self, q: SyncApp, mine: psycopg.Connection[Any]) -> None:
        with pytest.raises(psycopg.errors.UndefinedTable):
            mine.execute("select * from nowhere")
        with pytest.raises(ConfigError, match="has failed before"):
            q.enqueue("noop", {}, conn=mine)
        mine.rollback()
        assert q.enqueue("noop", {}, conn=mine)

    def test_a_connection_that_is_read_only(self, q: SyncApp, mine: psycopg.Connection[Any]) -> None:
        mine.read_only = True
        with pytest.raises(ConfigError, match="read only"):
            q.enqueue("noop", {}, conn=mine)
        assert mine.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        assert q.get(1, conn=mine) is None

    @pytest.mark.direct("pgbouncer refuses options in the start-up packet")
    def test_a_session_that_is_read_only(self, q: SyncApp, database: str) -> None:
        with psycopg.connect(database, options="-c default_transaction_read_only=on") as mine:
            with pytest.raises(DatabaseRefused, match="takes no writes"):
                q.enqueue("noop", {}, conn=mine)
            mine.rollback()

    def test_a_transaction_of_two_phases(self, q: SyncApp, mine: psycopg.Connection[Any]) -> None:
        """Postgres would refuse to prepare it, once a notice was sent in it."""
        mine.tpc_begin(mine.xid(1, "gtrid", "bqual"))
        with pytest.raises(ConfigError, match="two phases"):
            q.enqueue("noop", {}, conn=mine)
        mine.tpc_rollback()
        assert q.enqueue("noop", {}, conn=mine)

    async def test_one_in_the_block_of_a_copy_or_a_stream(
        self, q: SyncApp, app: App, mine: psycopg.Connection[Any], database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(borrowed_psycopg, "BUSY_PATIENCE", 0.1)
        mine.execute("create temporary table t (n int)")
        with mine.cursor() as cursor, cursor.copy("copy t from stdin") as copy:
            copy.write("1\n")
            with pytest.raises(ConfigError, match="in use"):
                q.enqueue("noop", {}, conn=mine)
        with mine.cursor() as cursor:
            stream = cursor.stream("select generate_series(1, 100)")
            assert next(stream) == (1,)
            with pytest.raises(ConfigError, match="in use"):
                q.enqueue_many("noop", [{}], conn=mine)
            assert len(list(stream)) == 99
        assert q.enqueue("noop", {}, conn=mine)
        async with await psycopg.AsyncConnection.connect(database) as other, other.cursor() as its:
            await other.execute("create temporary table t (n int)")
            async with its.copy("copy t from stdin"):
                with pytest.raises(ConfigError, match="in use"):
                    await app.enqueue("noop", {}, conn=other)
            assert await app.enqueue("noop", {}, conn=other)

    async def test_a_pool_a_cursor_and_what_was_not_awaited_say_what_to_pass(self, app: App, database: str) -> None:
        pool = psycopg_pool.ConnectionPool(database, open=False)
        with psycopg.connect(database) as mine:
            coroutine = psycopg.AsyncConnection.connect(database)
            for thing, advice in (
                (pool, "pool.connection"), (mine.cursor(), "its `connection`"), (psycopg.ClientCursor(mine), "its `connection`"),
                (coroutine, "not awaited"),
            ):  # fmt: skip
                with pytest.raises(ConfigError, match=advice):
                    await app.enqueue("noop", {}, conn=thing)


class TestInUse:
    def test_by_another_thread_it_is_waited_for(self, q: SyncApp, mine: psycopg.Connection[Any], database: str) -> None:
        ids: list[int] = []
        with psycopg.connect(database) as gate, gate.transaction():
            gate.execute("select pg_advisory_xact_lock(14)")
            theirs = threading.Thread(target=mine.execute, args=["select pg_advisory_xact_lock(14)"])
            theirs.start()
            while not gate.execute("select 1 from pg_locks where not granted and objid = 14").fetchone():
                pass
            ours = threading.Thread(target=lambda: ids.append(q.enqueue("noop", {}, conn=mine)))
            ours.start()
        theirs.join(10)
        ours.join(10)
        assert len(ids) == 1

    async def test_by_other_tasks_each_gets_what_it_asked_for(self, app: App, database: str, conn: Connection) -> None:
        async with await psycopg.AsyncConnection.connect(database) as mine:
            ids = await asyncio.gather(*[app.enqueue("noop", {"n": n}, conn=mine) for n in range(20)])
            await mine.commit()
        assert [each["n"] for each in await payloads(conn)] == sorted(range(20), key=lambda n: ids[n])

    async def test_a_connection_of_ours_is_a_callers_as_well(self, app: App, conn: Connection) -> None:
        async with app.pool.connection() as ours, ours.transaction():
            await app.enqueue("noop", {}, conn=ours)
            assert await payloads(conn) == []
        assert await payloads(conn) == [{}]


class TestNestedTransactions:
    async def test_what_an_inner_one_takes_back_is_gone_and_the_rest_stays(
        self, q: SyncApp, database: str, conn: Connection
    ) -> None:
        with psycopg.connect(database, autocommit=True) as mine, mine.transaction():
            q.enqueue("noop", {"outer": 1}, conn=mine)
            with mine.transaction(force_rollback=True):
                q.turns.dispatch(TURN, "noop", {"inner": 1}, conn=mine)
            with mine.transaction():
                assert q.turns.dispatch(TURN, "noop", {"inner": 2}, conn=mine)
        assert await payloads(conn) == [{"outer": 1}, {"inner": 2}]

    async def test_a_savepoint_takes_back_an_error_of_ours(self, q: SyncApp, database: str, conn: Connection) -> None:
        await conn.execute(
            "create function public.no() returns trigger language plpgsql as $$ begin raise 'not today'; end $$;"
            "create trigger no before insert on queue_service.runs for each row when (new.task = 'no') execute function public.no()"
        )
        with psycopg.connect(database) as mine:
            with pytest.raises(DatabaseRefused, match="not today"), mine.transaction():
                q.enqueue("no", {}, conn=mine)
            q.enqueue("yes", {}, conn=mine)
        assert await one(conn, "select array_agg(task) from queue_service.runs") == ["yes"]


class TestIsolation:
    @pytest.mark.parametrize("level", [psycopg.IsolationLevel.REPEATABLE_READ, psycopg.IsolationLevel.SERIALIZABLE])
    async def test_what_another_transaction_has_changed_is_a_conflict_in_a_sentence(
        self, q: SyncApp, database: str, app: App, level: psycopg.IsolationLevel
    ) -> None:
        with psycopg.connect(database) as mine:
            mine.isolation_level = level
            mine.execute("select 1 from queue_service.runs")
            run_id = await app.enqueue("noop", {}, singleton_key="k")
            with pytest.raises(TransactionConflict, match="begin it again"):
                q.enqueue("noop", {}, singleton_key="k", conn=mine)
            mine.rollback()
            assert q.enqueue("noop", {}, singleton_key="k", conn=mine) == run_id

    @pytest.mark.direct("pgbouncer refuses options in the start-up packet")
    async def test_a_timeout_of_the_callers_is_said(self, q: SyncApp, database: str, conn: Connection) -> None:
        await q_run(q, database)
        async with conn.transaction():
            await conn.execute("lock table queue_service.runs")
            for option, sentence in (("lock_timeout=50ms", "too long"), ("statement_timeout=50ms", "gave up")):
                with psycopg.connect(database, options=f"-c {option}") as mine:
                    with pytest.raises(DatabaseUnavailable, match=sentence):
                        q.enqueue("noop", {}, conn=mine)
                    mine.rollback()


async def q_run(q: SyncApp, database: str) -> int:
    with psycopg.connect(database) as mine:
        return q.enqueue("noop", {}, conn=mine)


@pytest.mark.direct("pgbouncer refuses options in the start-up packet")
async def test_a_lane_is_made_for_a_run_that_was_stored_while_triggers_did_not_fire(
    q: SyncApp, app: App, database: str, conn: Connection
) -> None:
    with psycopg.connect(database, options="-c session_replication_role=replica") as mine:
        q.enqueue("noop", {}, ordering_key="lane", conn=mine)
    assert await one(conn, "select count(*) from queue_service.lanes") == 0
    with app.opened.sweeping():
        assert await eventually(lambda: one(conn, "select count(*) from queue_service.lanes")) == 1


@pytest.mark.direct("who waits is told by the process of its session")
@pytest.mark.parametrize("autocommit", [True, False], ids=["committed by itself", "in a transaction"])
async def test_a_write_that_is_given_up_is_not_cancelled_where_it_may_be_committing(
    database: str, app: App, conn: Connection, session: Callable[[], Awaitable[Connection]], autocommit: bool
) -> None:
    mine = await psycopg.AsyncConnection.connect(database, autocommit=autocommit)
    holder = await session()
    await holder.execute("begin")
    await fetch(holder, queries.enqueue(NewRun("noop", "default", "{}", singleton_key="k")))
    call = asyncio.create_task(app.enqueue("noop", {"n": 1}, singleton_key="k", conn=mine))
    await eventually(lambda: one(conn, "select cardinality(pg_blocking_pids(%s)) > 0", mine.info.backend_pid))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert mine.closed is autocommit
    await holder.execute("rollback")
    await mine.close()
    # What was sent goes on to its end, or is rolled back with its transaction.
    await eventually(lambda: one(conn, f"select count(*) = {int(autocommit)} from queue_service.runs"))
