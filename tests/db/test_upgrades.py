"""From every older revision to the newest, while somebody is at work: what was there is ended as if nothing had happened."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from alembic.script import ScriptDirectory
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from queue_service import Run
from queue_service.db import schema
from queue_service.db.revision import HEAD
from queue_service.testing import databases
from tests.support import eventually, quick_app, working

pytestmark = pytest.mark.direct("what it sees and holds up are sessions of the server")

Conn = psycopg.Connection[Any]

_SCRIPTS = ScriptDirectory.from_config(schema._config(None)).walk_revisions()
REVISIONS = sorted(script.revision for script in _SCRIPTS)


def insert(conn: Conn, table: str, **values: object) -> Any:
    """A row, of those of these columns which this revision has. Its `id`, if it has one."""
    found = conn.execute(
        "select attname from pg_attribute where attrelid = to_regclass(%s) and attnum > 0 and not attisdropped",
        [f"queue_service.{table}"],
    )
    columns = {name for (name,) in found}
    if not columns:
        return None
    given = {name: value for name, value in values.items() if name in columns}
    statement = sql.SQL("insert into queue_service.{} ({}) values ({}) returning {}").format(
        sql.Identifier(table),
        sql.SQL(", ").join(map(sql.Identifier, given)),
        sql.SQL(", ").join(sql.Placeholder() * len(given)),
        sql.Identifier("id") if "id" in columns else sql.SQL("null"),
    )
    row = conn.execute(statement, list(given.values())).fetchone()
    return None if row is None else row[0]


def enqueue(conn: Conn, queue: str = "default", **values: object) -> int:
    run_id: int = insert(conn, "runs", queue=queue, task="noop", payload="{}", **values)
    return run_id


def begin(conn: Conn, *run_ids: int) -> None:
    """As a worker does that is gone by now."""
    worker = insert(
        conn, "workers", name="gone", version="0", queues="{}", started_at="2020-01-01Z", seen_at="2020-01-01Z"
    )
    lease = insert(conn, "leases", worker_id=worker, expires_at="2020-01-01Z", run_ids=list(run_ids))
    conn.execute(
        "update queue_service.runs set state = 'running', lease_id = %s, attempt = attempt + 1, claimed_at = now() "
        "where id = any(%s)",
        [lease, list(run_ids)],
    )


def owe(conn: Conn, message_id: str, run_id: int | None = None, **values: object) -> None:
    turn = {"deployment": "dep", "message_id": message_id, "stream": "conversation"}
    insert(conn, "turn_outcomes", **turn)
    insert(
        conn,
        "turn_markers",
        deadline="2020-01-01Z",
        admission="1 min",
        execution="1 min",
        run_id=run_id,
        **turn,
        **values,
    )


def fill(conn: Conn, mark: str = "") -> None:
    """Something of everything that a revision may have, all of it to be ended by whoever comes next."""
    insert(conn, "queues", name=f"wide{mark}", max_running_per_key=2)
    insert(conn, "queues", name=f"elsewhere{mark}", paused_at="2020-01-01Z")
    enqueue(conn, singleton_key=f"one{mark}", priority=3)
    enqueue(conn, run_at="2020-01-01Z", expires_at="2020-01-02Z")
    enqueue(conn, failures=1, attempt=1, error='{"type": "E", "message": "m"}', metadata='{"a": 1}')
    begin(conn, enqueue(conn), enqueue(conn, cancel_requested=True))
    lane = [enqueue(conn, ordering_key=f"taken{mark}") for _ in range(3)]
    begin(conn, lane[0])
    for _ in range(2):
        enqueue(conn, ordering_key=f"free{mark}")
    wide = [enqueue(conn, "wide", ordering_key=f"k{mark}") for _ in range(4)]
    begin(conn, *wide[:2])
    for number, state in enumerate(("succeeded", "failed", "cancelled", "expired")):
        insert(
            conn, "finished_runs", id=-1 - number, run_at="2020-01-01Z", created_at="2020-01-01Z", attempt=1, failures=0,
            losses=0, priority=0, state=state, queue="default", task="noop", payload="{}",
        )  # fmt: skip


def fill_turns(conn: Conn, mark: str = "") -> None:
    if conn.execute("select to_regclass('queue_service.turn_markers')").fetchall() == [(None,)]:
        return
    insert(conn, "streams", stream=f"conversation{mark}", head=1, state="active")
    insert(
        conn,
        "events",
        stream=f"conversation{mark}",
        seq=1,
        kind="reply",
        terminal=True,
        body=json.dumps({"message_ids": [f"answered{mark}"]}),
    )
    insert(
        conn, "turn_outcomes", deployment="dep", message_id=f"answered{mark}", stream=f"conversation{mark}", ended_at="2020-01-01Z",
        seq=1, kind="reply",
    )  # fmt: skip
    owe(conn, f"lapsed{mark}")
    owe(conn, f"failed{mark}", failure_code="provider_overloaded")
    owe(conn, f"queued{mark}", enqueue(conn))
    begun = enqueue(conn)
    owe(conn, f"begun{mark}", begun, admitted_at="2020-01-01Z")
    begin(conn, begun)
    insert(conn, "receipts", deployment="dep", message_id=f"lapsed{mark}", seq=1, digest="d")
    insert(
        conn,
        "schedules",
        name=f"hourly{mark}",
        next_at="2999-01-01Z",
        every="1 h",
        task="noop",
        queue="default",
        payload="{}",
    )
    insert(conn, "connections", platform="slack", channel_id=f"c{mark}", owner="o", expires_at="2020-01-01Z")


def count(conn: Conn, what: str) -> int:
    found: int = conn.execute(f"select count(*) from queue_service.{what}".encode()).fetchall()[0][0]
    return found


async def noop(run: Run) -> None:
    del run


async def end_all(database: str) -> None:
    """By a worker of the newest version: afterwards nothing is owed, nothing was lost, and nothing was ended twice."""
    with psycopg.connect(database, autocommit=True) as conn:
        ids = {run_id for (run_id,) in conn.execute("select id from queue_service.runs")}
        turns = {turn for (turn,) in conn.execute("select message_id from queue_service.turn_markers")}
        async with quick_app(database) as app:
            app.task(name="noop")(noop)
            async with working(app, {"default": 5, "wide": 5}):
                await eventually(lambda: count(conn, "runs") == 0 == count(conn, "turn_markers"), within=30)
        ended = [run_id for (run_id,) in conn.execute("select id from queue_service.finished_runs where id > 0")]
        assert sorted(ended) == sorted(ids)
        terminal = conn.execute(
            "select message_id, count(*) from queue_service.events, jsonb_array_elements_text(body -> 'message_ids') "
            "as message_id where terminal group by 1"
        ).fetchall()
        assert {message_id for message_id, _ in terminal} >= turns
        assert {endings for _, endings in terminal} <= {1}
        assert count(conn, "turn_outcomes where kind is null") == 0
        assert count(conn, "finished_runs where id < 0") % 4 == 0


@pytest.fixture(scope="module")
def older(server: str) -> Iterator[dict[str, str]]:
    """The name of an empty database at each revision before the newest."""
    with ExitStack() as stack:
        growing = stack.enter_context(databases.made(server, "template0"))
        at = {}
        for name in REVISIONS[:-1]:
            schema.upgrade(growing, name)
            copy = stack.enter_context(databases.made(server, name_of(growing)))
            at[name] = name_of(copy)
        yield at


def name_of(conninfo: str) -> str:
    return str(conninfo_to_dict(conninfo)["dbname"])


async def upgrade_beside_somebody(database: str, conn: Conn, revision: str) -> None:
    """Who has begun a transaction at the revision before, and goes on with it while the migration waits."""
    with psycopg.connect(database) as busy:
        enqueue(busy)
        going = asyncio.create_task(asyncio.to_thread(schema.upgrade, database, revision))
        waits = (
            "pg_stat_activity where datname = current_database() and application_name = 'queue_service migrate' "
            "and wait_event_type = 'Lock'"
        )
        await eventually(lambda: conn.execute(f"select from {waits}".encode()).rowcount, within=30)
        enqueue(busy, ordering_key="late")
        begin(busy, enqueue(busy))
        insert(busy, "streams", stream=f"late {revision}")
    await going


@pytest.mark.parametrize("revision", REVISIONS[:-1])
async def test_what_was_in_flight_at_an_older_revision_is_ended(
    revision: str, older: dict[str, str], server: str
) -> None:
    with databases.made(server, older[revision]) as database:
        with psycopg.connect(database, autocommit=True) as conn:
            fill(conn)
            fill_turns(conn)
            await upgrade_beside_somebody(database, conn, HEAD)
        await end_all(database)


async def test_what_came_in_flight_at_each_revision_on_the_way_is_ended(empty_database: str) -> None:
    await asyncio.to_thread(schema.upgrade, empty_database, REVISIONS[0])
    with psycopg.connect(empty_database, autocommit=True) as conn:
        for revision in REVISIONS[1:]:
            fill(conn, mark=revision)
            fill_turns(conn, mark=revision)
            await upgrade_beside_somebody(empty_database, conn, revision)
    await end_all(empty_database)
