"""An older revision drops data: what, is listed, and nothing goes that somebody still needs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest
import sqlalchemy
from click.testing import CliRunner, Result
from psycopg.conninfo import make_conninfo

from queue_service import App, Turn
from queue_service.cli import cli
from queue_service.db import downgrade as downgrade_module
from queue_service.db import migration
from queue_service.db.downgrade import downgrade
from queue_service.db.execute import Connection
from queue_service.db.revision import HEAD
from queue_service.errors import ConfigError, DatabaseUnavailable
from tests.support import eventually, one


def migrate(database: str, *arguments: str) -> Result:
    environment = {"QUEUE_SERVICE_DATABASE_URL": database}
    return CliRunner().invoke(cli, ["db", "migrate", *arguments], env=environment, prog_name="queue-service")


def revision_of(database: str) -> str:
    with psycopg.connect(database) as conn:
        row = conn.execute("select version_num from queue_service.alembic_version").fetchone()
        assert row is not None
        return str(row[0])


def using(database: str, use: Callable[[App], Awaitable[Any]]) -> None:
    async def used() -> None:
        async with App(database) as app:
            await use(app)

    asyncio.run(used())


async def end_a_turn(app: App) -> None:
    await app.turns.arm(Turn(deployment="dep", message_id="m", stream="s", platform="api"))
    await app.turns.commit_reply("dep", ["m"], {"text": "hello"})


async def owe_a_turn(app: App) -> None:
    await app.turns.arm(Turn(deployment="dep", message_id="m", stream="s", platform="api"))


async def join(app: App) -> None:
    async with app.pool.connection() as conn:
        await conn.execute(
            "insert into queue_service.workers (name, version, queues, revision) values ('w', '1', '{}', '9999')"
        )


async def enqueue(app: App) -> None:
    await app.enqueue("noop", {})


def test_what_would_go_is_listed_and_stays_until_yes_is_said(database: str) -> None:
    using(database, end_a_turn)
    refused = migrate(database, "--to", "0001")
    assert refused.exit_code == 2
    assert "table events (1 row)" in refused.stderr
    assert "table turn_markers (0 rows)" in refused.stderr
    assert "--yes" in refused.stderr
    assert revision_of(database) == HEAD
    done = migrate(database, "--to", "0001", "--yes")
    assert done.exit_code == 0, done.output
    assert "table events (1 row)" in done.stderr
    assert revision_of(database) == "0001"


def test_a_column_that_goes_is_listed(database: str) -> None:
    assert "column runs.progress" in migrate(database, "--to", "0010").stderr


@pytest.mark.parametrize(
    ("use", "to", "why"),
    [
        (owe_a_turn, "0011", "1 turn owed an ending"),
        (join, "0011", "1 worker at work"),
        (enqueue, "base", "1 run queued or running"),
    ],
    ids=["an owed turn", "a live worker", "a queued run"],
)
def test_what_is_needed_stays_unless_force_is_said(
    use: Callable[[App], Awaitable[Any]], to: str, why: str, database: str
) -> None:
    using(database, use)
    refused = migrate(database, "--to", to, "--yes")
    assert refused.exit_code != 0
    assert why in refused.stderr
    assert "--force" in refused.stderr
    assert revision_of(database) == HEAD
    assert migrate(database, "--to", to, "--force").exit_code == 2, "--force is no --yes"
    assert migrate(database, "--to", to, "--force", "--yes").exit_code == 0


def test_queued_runs_do_not_stand_against_a_downgrade_that_keeps_them(database: str) -> None:
    using(database, enqueue)
    assert migrate(database, "--to", "0011", "--yes").exit_code == 0


@pytest.mark.parametrize("isolation", ["read\\ committed", "serializable"])
async def test_a_turn_that_is_armed_while_it_waits_for_a_lock_is_seen(
    isolation: str, database: str, conn: Connection, session: Callable[[], Awaitable[Connection]]
) -> None:
    """Whatever isolation the server has by default."""
    where = make_conninfo(database, options=f"-c default_transaction_isolation={isolation}")
    arming = await session()
    async with arming.transaction():
        await arming.execute(
            "insert into queue_service.turn_markers (deployment, message_id, stream, deadline, admission, execution) "
            "values ('dep', 'm', 's', now() + '1 h', '1 h', '1 h')"
        )
        going = asyncio.create_task(
            asyncio.to_thread(downgrade, where, "0001", lease=timedelta(seconds=30), force=False, commit=True)
        )
        waits = (
            "select count(*) > 0 from pg_locks where not granted and relation = 'queue_service.turn_markers'::regclass"
        )
        await eventually(lambda: one(conn, waits))
    with pytest.raises(ConfigError, match="1 turn owed an ending"):
        await going
    assert await one(conn, "select count(*) from queue_service.turn_markers") == 1


async def test_a_question_waits_for_nobody_while_something_stands_against_it(
    database: str, conn: Connection, session: Callable[[], Awaitable[Connection]]
) -> None:
    """It would hold up all who enqueue after it."""
    async with App(database) as app:
        await owe_a_turn(app)
    enqueuing = await session()
    async with enqueuing.transaction():
        await enqueuing.execute("insert into queue_service.runs (queue, task, payload) values ('q', 't', '{}')")
        with pytest.raises(ConfigError, match="1 turn owed an ending"):
            await asyncio.to_thread(downgrade, database, "0001", lease=timedelta(seconds=30), force=False, commit=False)


async def test_a_transaction_that_holds_a_table_is_reported_in_a_sentence(
    database: str, session: Callable[[], Awaitable[Connection]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "PATIENCE", 0)
    enqueuing = await session()
    async with enqueuing.transaction():
        await enqueuing.execute("insert into queue_service.runs (queue, task, payload) values ('q', 't', '{}')")
        with pytest.raises(
            DatabaseUnavailable, match=r"waited for table runs, held by process \d+.*nothing was changed"
        ):
            await asyncio.to_thread(downgrade, database, "0001", lease=timedelta(seconds=30), force=False, commit=True)


def test_a_table_that_is_dropped_and_made_again_is_lost(engine: sqlalchemy.Engine) -> None:
    with engine.connect() as connection:
        before = downgrade_module._columns(connection)
        connection.exec_driver_sql("drop table queue_service.receipts")
        connection.exec_driver_sql("create table queue_service.receipts (deployment text)")
        connection.exec_driver_sql("alter table queue_service.events drop column terminal, add column terminal boolean")
        counts = dict.fromkeys({column.table for column in before}, 7)
        losses = downgrade_module._compared(before, downgrade_module._columns(connection), counts)
    assert losses.lines() == ["table receipts (7 rows)", "column events.terminal"]
