"""Revisions: brought up by many at once, taken down, and compared with what this version needs."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from queue_service.db import revision, schema
from queue_service.db.execute import Connection
from queue_service.db.session import connect
from queue_service.errors import DatabaseUnavailable, SchemaMismatch
from tests.support import eventually, one, rows

REPOSITORY = Path(__file__).parents[2]
# As in queue_service/db/migration.py: versions of this package that run at the same time must agree on it.
LOCK = 4_718_105_520_114
TABLES = {
    "runs", "leases", "finished_runs", "finished_runs_default", "queues", "workers", "receipts", "lanes",
    "turn_markers", "turn_outcomes", "streams", "events", "connections", "renderings", "deployments", "schedules",
    "schedule_slots", "steps", "gateways", "gateway_requests",
}  # fmt: skip


@pytest.fixture
async def look(empty_database: str, server: str) -> AsyncIterator[Connection]:
    """A connection to the database that has no schema yet, past any pooler."""
    conn = await connect(make_conninfo(server, dbname=conninfo_to_dict(empty_database)["dbname"]))
    yield conn
    await conn.close()


async def tables(conn: Connection) -> set[str]:
    found = await rows(conn, "select tablename from pg_tables where schemaname = 'queue_service'")
    return {name for (name,) in found} - {"alembic_version"}


def test_head_is_what_the_newest_revision_says() -> None:
    scripts = ScriptDirectory.from_config(schema._config(None))
    assert scripts.get_current_head() == revision.HEAD
    assert scripts.get_heads() == [revision.HEAD]


def test_revisions_can_be_compared_as_text() -> None:
    names = [script.revision for script in ScriptDirectory.from_config(schema._config(None)).walk_revisions()]
    assert names == sorted(names, reverse=True)
    assert {len(name) for name in names} == {4}


async def test_a_migration_brings_an_empty_database_to_head(empty_database: str, look: Connection) -> None:
    assert await revision.current(look) is None
    await asyncio.to_thread(schema.upgrade, empty_database)
    assert await revision.current(look) == revision.HEAD
    await revision.require(look)
    assert await tables(look) == TABLES


async def test_a_migration_that_was_done_changes_nothing(empty_database: str, look: Connection) -> None:
    await asyncio.to_thread(schema.upgrade, empty_database)
    await look.execute("insert into queue_service.queues (name) values ('kept')")
    await asyncio.to_thread(schema.upgrade, empty_database)
    assert await rows(look, "select name from queue_service.queues") == [("kept",)]


async def test_a_schema_goes_down_to_nothing_and_up_again(empty_database: str, look: Connection) -> None:
    await asyncio.to_thread(schema.upgrade, empty_database)
    await asyncio.to_thread(schema.downgrade, empty_database, "base")
    assert await revision.current(look) is None
    assert await tables(look) == set()
    await asyncio.to_thread(schema.upgrade, empty_database)
    assert await revision.current(look) == revision.HEAD
    assert await tables(look) == TABLES
    await asyncio.to_thread(schema.check, empty_database)


async def test_each_revision_goes_up_and_down_by_itself(empty_database: str, look: Connection) -> None:
    names = [script.revision for script in ScriptDirectory.from_config(schema._config(None)).walk_revisions()]
    for name in reversed(names):
        await asyncio.to_thread(schema.upgrade, empty_database, name)
        assert await revision.current(look) == name
    for below in [*names[1:], None]:
        await asyncio.to_thread(schema.downgrade, empty_database, below or "base")
        assert await revision.current(look) == below


def test_the_migrated_tables_are_the_ones_the_code_describes(database: str) -> None:
    schema.check(database)


@pytest.mark.parametrize(
    "change",
    [
        "alter table queue_service.runs drop column metadata",
        "alter table queue_service.queues add column extra text",
        "drop index queue_service.runs_claim_idx",
        "alter table queue_service.workers alter column name drop not null",
        "create table queue_service.stranger (id int)",
    ],
)
def test_a_table_that_differs_is_noticed(database: str, change: str) -> None:
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(change.encode())
    with pytest.raises(CommandError):
        schema.check(database)


async def test_daily_partitions_and_other_schemas_are_no_difference(database: str, conn: Connection) -> None:
    await conn.execute(
        "create table queue_service.finished_runs_20300101 partition of queue_service.finished_runs "
        "for values from ('2030-01-01') to ('2030-01-02')"
    )
    await conn.execute("create table public.somebody_elses (id int)")
    await asyncio.to_thread(schema.check, database)


_MIGRATE = "import sys; from queue_service.db import schema; sys.stdin.readline(); schema.upgrade(sys.argv[1])"


def migrating(conninfo: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _MIGRATE, conninfo],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


@pytest.mark.slow
async def test_many_processes_may_migrate_an_empty_database_at_once(empty_database: str, look: Connection) -> None:
    processes = [migrating(empty_database) for _ in range(4)]
    ended = await asyncio.gather(*(asyncio.to_thread(process.communicate, "\n") for process in processes))
    assert [process.returncode for process in processes] == [0] * 4, [errors for _, errors in ended]
    assert await revision.current(look) == revision.HEAD
    assert await tables(look) == TABLES


async def test_many_threads_may_migrate_an_empty_database_at_once(empty_database: str, look: Connection) -> None:
    with ThreadPoolExecutor(10) as pool:
        calls = [pool.submit(schema.upgrade, empty_database) for _ in range(10)]
        failures = [repr(call.exception()) for call in calls if call.exception() is not None]
    assert failures == []
    assert await revision.current(look) == revision.HEAD
    assert await tables(look) == TABLES


async def test_a_migration_waits_for_another_to_end(empty_database: str, look: Connection) -> None:
    await look.execute(f"select pg_advisory_lock({LOCK})")
    waiting = asyncio.create_task(asyncio.to_thread(schema.upgrade, empty_database))
    waits = """
        select count(*) from pg_locks
         where locktype = 'advisory' and not granted
           and database = (select oid from pg_database where datname = current_database())
    """
    assert await eventually(lambda: one(look, waits)) == 1
    assert not waiting.done()
    assert await revision.current(look) is None
    assert await one(look, "select count(*) from pg_namespace where nspname = 'queue_service'") == 0
    await look.execute(f"select pg_advisory_unlock({LOCK})")
    await waiting
    assert await revision.current(look) == revision.HEAD


async def test_a_migration_lets_go_of_its_lock(empty_database: str, look: Connection) -> None:
    await asyncio.to_thread(schema.upgrade, empty_database)
    assert await one(look, f"select pg_try_advisory_lock({LOCK})") is True


async def test_a_missing_schema_is_a_mismatch_that_says_how_to_make_it(look: Connection) -> None:
    with pytest.raises(SchemaMismatch, match=r"is not there yet.*queue-service db migrate") as refused:
        await revision.require(look)
    assert (refused.value.have, refused.value.want) == (None, revision.OLDEST)


async def test_a_schema_without_a_revision_is_missing_too(conn: Connection) -> None:
    await conn.execute("delete from queue_service.alembic_version")
    with pytest.raises(SchemaMismatch, match="not there yet"):
        await revision.require(conn)


async def test_an_older_schema_is_a_mismatch_that_says_to_migrate(conn: Connection) -> None:
    await conn.execute("update queue_service.alembic_version set version_num = '0000'")
    assert await revision.current(conn) == "0000"
    with pytest.raises(SchemaMismatch, match=rf"revision 0000.*revision {revision.OLDEST}.*queue-service db migrate"):
        await revision.require(conn)


async def test_a_newer_schema_is_a_mismatch_that_says_to_install_its_version(conn: Connection) -> None:
    await conn.execute("update queue_service.alembic_version set version_num = '9999', oldest_code = '9998'")
    with pytest.raises(
        SchemaMismatch, match=r"revision 9999.*9998 or a later one.*install the version of pg-queue-service"
    ) as refused:
        await revision.require(conn)
    assert "db migrate" not in str(refused.value)


async def test_a_newer_schema_cannot_be_migrated_by_this_version(database: str, conn: Connection) -> None:
    await conn.execute("update queue_service.alembic_version set version_num = '9999', oldest_code = '9998'")
    with pytest.raises(SchemaMismatch, match="install the version of pg-queue-service"):
        await asyncio.to_thread(schema.upgrade, database)
    assert await tables(conn) == TABLES


def test_a_server_that_cannot_be_reached_is_unavailable() -> None:
    with pytest.raises(DatabaseUnavailable) as refused:
        schema.upgrade("host=127.0.0.1 port=1 user=u password=s3cr3t dbname=d")
    assert "s3cr3t" not in str(refused.value)


async def test_a_password_with_a_percent_sign_reaches_the_server(empty_database: str, look: Connection) -> None:
    await asyncio.to_thread(schema.upgrade, f"{empty_database} password='100%(x)s'")
    assert await revision.current(look) == revision.HEAD


def test_the_migrations_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    schema.sql()
    printed = capsys.readouterr().out
    assert set(re.findall(r"create (?:unlogged )?table queue_service\.(\w+)", printed)) >= TABLES
    assert f"version_num='{revision.HEAD}'" in printed


async def test_the_printed_migrations_make_the_same_schema(
    empty_database: str, look: Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    schema.sql()
    await look.execute(capsys.readouterr().out.encode())
    await revision.require(look)
    await asyncio.to_thread(schema.check, empty_database)
