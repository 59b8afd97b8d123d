"""A migration whatever the role's settings are, beside those who are at work, and when it is stopped in the middle."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from queue_service.db import embedded, migration, revision, schema
from queue_service.db.cluster import Cluster
from queue_service.errors import ConfigError, DatabaseRefused, DatabaseUnavailable
from queue_service.testing import databases
from tests.support import eventually

pytestmark = pytest.mark.direct("what it sees and holds up are sessions of the server")

REPOSITORY = Path(__file__).parents[2]
Conn = psycopg.Connection[Any]


def ask(conn: Conn, query: str, *params: object) -> Any:
    found = conn.execute(query.encode(), params or None).fetchone()
    return None if found is None else found[0]


def have(conninfo: str) -> str | None:
    with psycopg.connect(make_conninfo(conninfo, client_encoding="UTF8", options="-c search_path=pg_catalog")) as conn:
        if ask(conn, "select to_regclass('queue_service.alembic_version') is null"):
            return None
        found = ask(conn, "select version_num from queue_service.alembic_version")
        return None if found is None else str(found)


@pytest.fixture
def look(empty_database: str) -> Iterator[Conn]:
    with psycopg.connect(empty_database, autocommit=True) as conn:
        yield conn


def give(conn: Conn, setting: str, value: str) -> None:
    """To all who connect to this database from now on."""
    conn.execute(
        sql.SQL("alter database {} set {} = {}").format(
            sql.Identifier(conn.info.dbname), sql.Identifier(setting), sql.Literal(value)
        )
    )


SETTINGS = [
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_isolation", "repeatable read"),
    ("default_transaction_read_only", "on"),
    ("default_transaction_deferrable", "on"),
    ("lock_timeout", "1ms"),
    ("statement_timeout", "100ms"),
    ("idle_in_transaction_session_timeout", "20ms"),
    ("idle_session_timeout", "1s"),
    ("datestyle", "German"),
    ("intervalstyle", "sql_standard"),
    ("timezone", "Asia/Kathmandu"),
    ("client_encoding", "LATIN1"),
    ("client_encoding", "SQL_ASCII"),
    ("quote_all_identifiers", "on"),
    ("standard_conforming_strings", "off"),
    ("transform_null_equals", "on"),
    ("array_nulls", "off"),
    ("plan_cache_mode", "force_generic_plan"),
    ("synchronous_commit", "off"),
    ("check_function_bodies", "off"),
    ("enable_seqscan", "off"),
    ("enable_indexscan", "off"),
    ("enable_nestloop", "off"),
]


@pytest.mark.parametrize(("setting", "value"), SETTINGS, ids=[f"{name}={value}" for name, value in SETTINGS])
def test_several_migrate_at_once_whatever_the_database_has_set(
    setting: str, value: str, empty_database: str, look: Conn
) -> None:
    give(look, setting, value)
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(schema.upgrade, empty_database) for _ in range(3)]:
            done.result()
    assert have(empty_database) == revision.HEAD
    schema.check(empty_database)


def test_a_transaction_timeout_does_not_end_a_migration(empty_database: str, look: Conn) -> None:
    if look.info.server_version < 170_000:
        pytest.skip("Postgres has it since 17")
    give(look, "transaction_timeout", "50ms")
    with slow(look, "create table", 0.2):
        schema.upgrade(empty_database)
    assert have(empty_database) == revision.HEAD


def test_functions_that_shadow_those_of_the_server_are_not_called(empty_database: str, look: Conn) -> None:
    look.execute("create table public.called (name text); create schema evil")
    for name, arguments, returns in [
        ("version", "", "text"), ("current_schema", "", "name"), ("current_setting", "text", "text"),
        ("current_setting", "text, boolean", "text"), ("set_config", "text, text, boolean", "text"),
        ("to_regclass", "text", "regclass"), ("to_regnamespace", "text", "regnamespace"),
        ("pg_advisory_xact_lock", "bigint", "void"), ("clock_timestamp", "", "timestamptz"),
        ("statement_timestamp", "", "timestamptz"), ("jsonb_typeof", "jsonb", "text"),
        ("pg_table_is_visible", "oid", "boolean"), ("num_nulls", "variadic text[]", "integer"),
    ]:  # fmt: skip
        result = "" if returns == "void" else "null"
        body = f"begin insert into public.called values ('{name}'); return {result}; end"
        look.execute(
            f"create function evil.{name}({arguments}) returns {returns} language plpgsql as $${body}$$".encode()
        )
    look.execute(f'alter database "{look.info.dbname}" set search_path = evil, pg_catalog, public'.encode())
    schema.upgrade(empty_database)
    schema.check(empty_database)
    assert have(empty_database) == revision.HEAD
    with psycopg.connect(make_conninfo(empty_database, options="-c search_path=pg_catalog")) as conn:
        assert conn.execute("select name from public.called").fetchall() == []


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1", "EUC_KR"])
def test_a_database_that_cannot_hold_every_text_is_refused_before_anything_is_changed(
    encoding: str, server: str
) -> None:
    name = f"queue_service_{encoding.lower()}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"create database {name} encoding '{encoding}' template template0 locale 'C'".encode())
        try:
            with pytest.raises(ConfigError, match=rf"is {encoding}, .*encoding 'UTF8' template template0"):
                schema.upgrade(make_conninfo(server, dbname=name))
            with psycopg.connect(server, dbname=name) as conn:
                assert ask(conn, "select count(*) from pg_namespace where nspname = 'queue_service'") == 0
        finally:
            admin.execute(f"drop database {name} with (force)".encode())


def test_a_standby_is_not_migrated(own_cluster: Cluster) -> None:
    """As any server that recovers: this one waits for what a primary would send."""
    own_cluster.stop()
    (own_cluster.data / "standby.signal").touch()
    os.chown(own_cluster.data / "standby.signal", own_cluster.data.stat().st_uid, -1)
    own_cluster.start()
    with pytest.raises(DatabaseUnavailable, match=r"takes no writes: .*name that one"):
        schema.upgrade(own_cluster.conninfo)


# Beside those who are at work


def run_of_a_lane(conn: Conn, key: str = "k") -> None:
    conn.execute(
        "insert into queue_service.runs (queue, task, payload, ordering_key) values ('q', 't', '{}', %s)", [key]
    )


def event(conn: Conn) -> None:
    conn.execute("insert into queue_service.events (stream, seq, kind, body) values ('s', 1, 'delta', '{}')")


def marker(conn: Conn) -> None:
    conn.execute(
        "insert into queue_service.turn_markers (deployment, message_id, stream, deadline, admission, execution) "
        "values ('dep', 'm', 's', now(), '1 h', '1 h')"
    )


def history(conn: Conn) -> None:
    conn.execute(
        "insert into queue_service.finished_runs (id, run_at, created_at, attempt, failures, losses, priority, state, queue, "
        "task, payload) values (1, now(), now(), 1, 0, 0, 0, 'succeeded', 'q', 't', '{}')"
    )


USES = (run_of_a_lane, event, marker, history)
ORDERS: list[tuple[Callable[[Conn], None], Callable[[Conn], None]]] = [
    (one, other) for one in USES for other in USES if one is not other
]


def waits(conn: Conn) -> bool:
    """Whether the migration waits for a lock, or for its next try."""
    return bool(
        ask(
            conn,
            "select count(*) from pg_stat_activity where datname = current_database() "
            "and application_name = 'queue_service migrate' and wait_event_type = 'Lock'",
        )
    )


@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
async def test_no_transaction_is_ended_by_a_migration_in_whatever_order_it_uses_tables(
    down: bool, empty_database: str, look: Conn
) -> None:
    """One at a time, each begun before the migration, and going on when that waits for it."""
    schema.upgrade(empty_database, revision.HEAD if down else "0012")
    deadlocks = "select deadlocks from pg_stat_database where datname = current_database()"
    for one, other in ORDERS:
        with psycopg.connect(empty_database) as busy:
            one(busy)
            change = schema.downgrade if down else schema.upgrade
            going = asyncio.create_task(asyncio.to_thread(change, empty_database, "0012" if down else "head"))
            await eventually(lambda: waits(look))
            other(busy)
        await going
        (schema.upgrade if down else schema.downgrade)(empty_database, revision.HEAD if down else "0012")
        look.execute(
            "truncate queue_service.runs, queue_service.lanes, queue_service.events, queue_service.turn_markers, "
            "queue_service.finished_runs"
        )
    look.execute("select pg_stat_clear_snapshot()")
    assert ask(look, deadlocks) == 0


@pytest.fixture
def impatient(look: Conn, monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration that waits for a fifth of a second where it would wait for two."""
    look.execute(f"alter database \"{look.info.dbname}\" set deadlock_timeout = '100ms'".encode())
    monkeypatch.setattr(migration, "FIRST_WAIT", 100)


@pytest.mark.usefixtures("impatient")
async def test_it_says_for_whom_it_waits_without_what_that_one_stores(empty_database: str) -> None:
    schema.upgrade(empty_database, "0017")
    said: list[str] = []
    with psycopg.connect(empty_database, application_name="a report") as busy:
        busy.execute(
            "insert into queue_service.runs (queue, task, payload) values ('q', 't', '{\"card\": \"4111 1111\"}') -- \x1b[2J"
        )
        holder = f"process {busy.info.backend_pid} (a report, idle in transaction"
        going = asyncio.create_task(asyncio.to_thread(schema.upgrade, empty_database, tell=said.append))
        await eventually(lambda: said)
        assert not going.done()
    await going
    assert f"table runs, held by {holder}" in said[0]
    assert "insert into queue_service.runs" in said[0]
    assert "4111" not in said[0]
    assert "\x1b" not in said[0]
    assert len(said) == 1


@pytest.mark.usefixtures("impatient")
async def test_those_who_come_later_do_not_wait_for_long(empty_database: str, look: Conn) -> None:
    """Not until the transaction ends for which the migration waits."""
    schema.upgrade(empty_database, "0017")
    with psycopg.connect(empty_database) as busy:
        run_of_a_lane(busy)
        going = asyncio.create_task(asyncio.to_thread(schema.upgrade, empty_database))
        await eventually(lambda: waits(look))
        await asyncio.wait_for(asyncio.to_thread(run_of_a_lane, look, "another"), 5)
        assert not going.done()
    await going


@pytest.mark.usefixtures("impatient")
async def test_it_gives_up_in_a_sentence(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schema.upgrade(empty_database, "0017")
    monkeypatch.setattr(migration, "PATIENCE", 0)
    with psycopg.connect(empty_database) as busy:
        run_of_a_lane(busy)
        with pytest.raises(
            DatabaseUnavailable, match=rf"table runs, held by process {busy.info.backend_pid} .*nothing was"
        ):
            await asyncio.to_thread(schema.upgrade, empty_database)
    assert have(empty_database) == "0017"


async def test_a_schema_that_is_there_already_waits_for_nobody(database: str) -> None:
    """Each deployment migrates, and most find nothing to do."""
    with psycopg.connect(database) as busy:
        run_of_a_lane(busy)
        busy.execute("lock table queue_service.runs in access exclusive mode")
        busy.execute("select pg_advisory_xact_lock(%s)", [migration.LOCK])
        await asyncio.wait_for(asyncio.to_thread(schema.upgrade, database), 10)


async def test_what_somebody_grants_meanwhile_is_waited_for(
    empty_database: str, look: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that change one entry of the catalogue: the second one is refused by the server."""
    schema.upgrade(empty_database, "0017")
    monkeypatch.setattr(migration, "NEXT_WAIT", 60_000)
    look.execute(f"alter database \"{look.info.dbname}\" set deadlock_timeout = '60s'".encode())
    with psycopg.connect(empty_database) as busy:
        busy.execute("grant select on queue_service.lanes to public")
        going = asyncio.create_task(asyncio.to_thread(schema.upgrade, empty_database))
        await eventually(lambda: waits(look))
    await going
    assert have(empty_database) == revision.HEAD


def test_a_user_who_owns_the_schema_need_not_be_allowed_to_make_one(empty_database: str, look: Conn) -> None:
    name = f"owner_{look.info.dbname}"
    look.execute(f'create role "{name}"'.encode())
    try:
        look.execute(f'create schema queue_service authorization "{name}"'.encode())
        schema.upgrade(make_conninfo(empty_database, options=f"-c role={name}"))
        assert have(empty_database) == revision.HEAD
    finally:
        look.execute(f'drop owned by "{name}"; drop role "{name}"'.encode())


# Stopped in the middle


@contextmanager
def slow(conn: Conn, tag: str, seconds: float) -> Iterator[None]:
    """Each command of this kind takes so long."""
    conn.execute(
        f"create function public.sleep() returns event_trigger language plpgsql as "
        f"$$ begin perform pg_sleep({seconds}); end $$; "
        f"create event trigger sleepy on ddl_command_end when tag in ('{tag}') execute function public.sleep()".encode()
    )
    try:
        yield
    finally:
        conn.execute("drop event trigger sleepy; drop function public.sleep()")


def migrating(conninfo: str) -> subprocess.Popen[str]:
    # Where the tests run in the background of a shell, Ctrl-C is ignored, and whatever they start inherits that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return started(conninfo)
    finally:
        signal.signal(signal.SIGINT, before)


def started(conninfo: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "queue_service", "db", "migrate", "--database-url", conninfo],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


def at(conn: Conn, event: str) -> int | None:
    """The process of the server in which the migration is at this moment, if it waits for that."""
    found: int | None = ask(
        conn,
        "select pid from pg_stat_activity where application_name = 'queue_service migrate' and wait_event = %s "
        "and datname = current_database()",
        event,
    )
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
async def test_a_migration_that_is_stopped_leaves_nothing_behind(how: int, empty_database: str, look: Conn) -> None:
    with slow(look, "create function", 600):
        process = migrating(empty_database)
        backend = await eventually(lambda: at(look, "PgSleep"), within=30)
        process.send_signal(how)
        _, said = await asyncio.to_thread(process.communicate)
        assert process.returncode != 0
        await eventually(lambda: ask(look, "select count(*) from pg_stat_activity where pid = %s", backend) == 0)
        assert ask(look, "select count(*) from pg_namespace where nspname = 'queue_service'") == 0
    if how == signal.SIGINT:
        assert "nothing was changed" in said
    assert "Traceback" not in said
    await asyncio.to_thread(schema.upgrade, empty_database)
    assert have(empty_database) == revision.HEAD


async def test_a_migration_that_lost_its_connection_says_what_to_do(empty_database: str, look: Conn) -> None:
    with slow(look, "create function", 600):
        going = asyncio.create_task(asyncio.to_thread(schema.upgrade, empty_database))
        backend = await eventually(lambda: at(look, "PgSleep"))
        look.execute("select pg_terminate_backend(%s)", [backend])
        with pytest.raises(
            DatabaseUnavailable, match=r"lost its connection.*all of it was done or nothing.*Run it again"
        ):
            await going
    assert have(empty_database) is None


async def test_a_statement_that_somebody_cancels_ends_the_migration_in_a_sentence(
    empty_database: str, look: Conn
) -> None:
    with slow(look, "create function", 600):
        going = asyncio.create_task(asyncio.to_thread(schema.upgrade, empty_database))
        backend = await eventually(lambda: at(look, "PgSleep"))
        look.execute("select pg_cancel_backend(%s)", [backend])
        with pytest.raises(DatabaseRefused, match=r"canceling statement.*Nothing was changed"):
            await going
    assert have(empty_database) is None


def test_what_stands_in_the_way_is_told_in_a_sentence(empty_database: str, look: Conn) -> None:
    look.execute("create schema queue_service; create table queue_service.runs ()")
    with pytest.raises(DatabaseRefused, match=r'relation "runs" already exists.*Nothing was changed'):
        schema.upgrade(empty_database)
    assert have(empty_database) is None


async def test_a_commit_that_waits_for_a_standby_is_not_cancelled(tmp_path: Path) -> None:
    """It would stand without the standby, and be gone with the primary, though somebody was told that it is there."""
    alone = {**databases.FAST, "synchronous_standby_names": "nobody"}
    cluster = Cluster(tmp_path / "cluster", embedded.programs(), alone)
    cluster.use()
    try:
        with psycopg.connect(cluster.conninfo, autocommit=True) as look:
            process = migrating(cluster.conninfo)
            backend = await eventually(lambda: at(look, "SyncRep"), within=30)
            process.send_signal(signal.SIGINT)
            _, said = await asyncio.to_thread(process.communicate)
            assert "db current" in said
            assert at(look, "SyncRep") == backend
    finally:
        cluster.stop()
        cluster.leave()


def test_a_table_of_any_name_in_our_schema_is_taken_like_the_others(empty_database: str, look: Conn) -> None:
    schema.upgrade(empty_database, "0020")
    look.execute('create table queue_service."a ""quoted"" name; drop table queue_service.runs" ()')
    schema.upgrade(empty_database)
    assert have(empty_database) == revision.HEAD
    assert ask(look, "select to_regclass('queue_service.runs') is not null")
