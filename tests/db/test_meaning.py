"""An error of the database is told as what it is."""

from __future__ import annotations

import contextlib
import re

import psycopg
import pytest
from psycopg import errors as pg

from queue_service.db.execute import Connection, fetch, may_repeat
from queue_service.db.meaning import meaning
from queue_service.db.query import Query, nothing
from queue_service.errors import DatabaseRefused, DatabaseUnavailable, PayloadRefused, SchemaMismatch, ValueRefused
from tests.support import eventually, one


@pytest.mark.parametrize(
    ("state", "error", "text"),
    [
        ("57P01", DatabaseUnavailable, "cannot be reached: on purpose"),
        ("57P02", DatabaseUnavailable, "cannot be reached: on purpose"),
        ("57P03", DatabaseUnavailable, "takes no connections now: on purpose"),
        ("57P04", DatabaseUnavailable, "was dropped: on purpose"),
        ("57P05", DatabaseUnavailable, "closed a connection that was idle: on purpose"),
        ("57014", DatabaseUnavailable, "gave up on a statement: on purpose"),
        ("08006", DatabaseUnavailable, "cannot be reached: on purpose"),
        ("08001", DatabaseUnavailable, "cannot be reached: on purpose"),
        ("25P03", DatabaseUnavailable, "ended a transaction that was idle: on purpose"),
        ("25P04", DatabaseUnavailable, "ended a transaction that took too long: on purpose.*transaction_timeout"),
        ("25006", DatabaseUnavailable, "takes no writes: on purpose"),
        ("26000", DatabaseUnavailable, "on purpose.*QUEUE_SERVICE_POOLER=transaction"),
        ("42P05", DatabaseUnavailable, "on purpose.*QUEUE_SERVICE_POOLER=transaction"),
        # As the server says it of a statement that was bound with too many parameters, or too few.
        ("08P01", DatabaseUnavailable, "on purpose.*QUEUE_SERVICE_POOLER=transaction"),
        ("28P01", DatabaseUnavailable, "does not let us in: on purpose"),
        ("28000", DatabaseUnavailable, "does not let us in: on purpose"),
        ("3D000", DatabaseUnavailable, "no such database: on purpose"),
        ("53000", DatabaseUnavailable, "in trouble: on purpose"),
        ("53100", DatabaseUnavailable, "no room left: on purpose"),
        ("53200", DatabaseUnavailable, "not enough memory: on purpose"),
        ("53300", DatabaseUnavailable, "no more connections: on purpose"),
        ("53400", DatabaseUnavailable, "has a limit that this goes beyond: on purpose"),
        ("55P03", DatabaseUnavailable, "Another transaction has held"),
        ("58000", DatabaseUnavailable, "in trouble: on purpose"),
        ("58030", DatabaseUnavailable, "in trouble: on purpose"),
        ("XX000", DatabaseRefused, r"refused a statement: on purpose \(SQLSTATE XX000\)"),
        ("XX001", DatabaseRefused, "data damaged: on purpose"),
        ("XX002", DatabaseRefused, "data damaged: on purpose"),
        ("22021", ValueRefused, "cannot store a value: on purpose"),
        ("22P05", ValueRefused, "cannot store a value: on purpose"),
        ("22003", ValueRefused, "cannot store a value: on purpose"),
        ("54000", ValueRefused, "cannot store a value: on purpose"),
        ("42501", DatabaseRefused, "does not allow it: on purpose"),
        ("55000", DatabaseRefused, r"refused a statement: on purpose \(SQLSTATE 55000\)"),
        ("55006", DatabaseRefused, r"refused a statement: on purpose \(SQLSTATE 55006\)"),
        ("P0001", DatabaseRefused, r"refused a statement: on purpose \(SQLSTATE P0001\)"),
        # No class of the driver's is for this one.
        ("QS001", DatabaseRefused, r"refused a statement: on purpose \(SQLSTATE QS001\)"),
        ("0A000", DatabaseRefused, r"refused a statement: on purpose \(SQLSTATE 0A000\)"),
        # Those who know what a conflict means here look at the driver's own.
        ("23505", pg.UniqueViolation, "on purpose"),
        ("40001", pg.SerializationFailure, "on purpose"),
        ("40P01", pg.DeadlockDetected, "on purpose"),
        ("42601", pg.SyntaxError, "on purpose"),
    ],
)
async def test_by_its_state(conn: Connection, state: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as raised:
        await fetch(conn, Query(f"do $$begin raise exception 'on purpose' using errcode = '{state}'; end$$", nothing))
    assert raised.type is error


def test_a_value_that_is_refused_is_a_payload_that_is() -> None:
    assert issubclass(ValueRefused, PayloadRefused)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("query_wait_timeout", "no free connection to the database in time: FATAL:  query_wait_timeout"),
        ("no more connections allowed (max_client_conn)", "takes no more clients: .*max_client_conn"),
        ("unsupported startup parameter: options", "QUEUE_SERVICE_POOLER=session or transaction"),
        ("server login has been failing, try again later (server_login_retry)", "Is the server behind it up"),
        ("pgbouncer cannot connect to server", "Is the server behind it up"),
        ("the server of the pooler has crashed", "cannot be reached"),
    ],
)
def test_a_pooler_is_told_by_its_words(words: str, text: str) -> None:
    """As when a connection is made, and as what is sent in its course."""
    for error in (
        psycopg.OperationalError(f'connection to server at "x" failed: FATAL:  {words}'),
        pg.ProtocolViolation(f"FATAL:  {words}"),
    ):
        ours = meaning(error)
        assert isinstance(ours, DatabaseUnavailable)
        assert re.search(text.replace("FATAL:  ", "(.*)FATAL:  "), str(ours)), ours


@pytest.mark.direct("the session that ends is the pooler's")
@pytest.mark.parametrize(
    ("setting", "statement", "text"),
    [
        ("idle_in_transaction_session_timeout", "begin", "ended a transaction that was idle"),
        ("idle_session_timeout", "select 1", "closed a connection that was idle|connection is lost"),
        ("transaction_timeout", "begin", "ended a transaction that took too long"),
    ],
)
async def test_a_session_that_the_server_has_ended_by_its_time_is_an_outage(
    conn: Connection, database: str, setting: str, statement: str, text: str
) -> None:
    if setting == "transaction_timeout" and conn.info.server_version < 170000:
        pytest.skip("Postgres 17 has it")
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as victim:
        await victim.execute(f"select set_config('{setting}', '1', false)".encode())
        with contextlib.suppress(psycopg.Error):
            await victim.execute(statement.encode())
        there = "select count(*) = 0 from pg_stat_activity where pid = %s"
        await eventually(lambda: one(conn, there, victim.info.backend_pid))
        # What the server has said last is lost where the line breaks while we send.
        with pytest.raises(DatabaseUnavailable, match=f"{text}|cannot be reached"):
            await fetch(victim, Query("select 1", nothing))


async def test_a_function_that_finds_nothing_on_our_search_path_is_told_from_a_schema_of_another_revision(
    conn: Connection,
) -> None:
    await conn.execute("set search_path = pg_catalog")
    await conn.execute(
        "create function public.note() returns trigger language plpgsql as $$begin perform unknown_here(); return new; end$$;"
        "create trigger note before insert on queue_service.queues for each row execute function public.note()"
    )
    with pytest.raises(
        DatabaseRefused, match=r"unknown_here\(\) does not exist \(PL/pgSQL function (public\.)?note\(\).*search_path"
    ):
        await fetch(conn, Query("insert into queue_service.queues (name) values ('x')", nothing))
    with pytest.raises(SchemaMismatch):
        await fetch(conn, Query("select queue_service.of_another_revision()", nothing))
    await conn.execute("alter function public.note() set search_path = public, pg_catalog")
    await conn.execute("create function public.unknown_here() returns void language sql as ''")
    await fetch(conn, Query("insert into queue_service.queues (name) values ('x')", nothing))


async def test_a_row_that_met_a_partition_which_was_being_attached_is_told_in_every_language(conn: Connection) -> None:
    """By the table that it names, and no constraint; what a trigger raises, and what a check refuses, is another thing."""
    await conn.execute(
        "create table queue_service.finished_runs_20200101 partition of queue_service.finished_runs "
        "for values from ('2020-01-01Z') to ('2020-01-02Z')"
    )
    row = "insert into queue_service.{} select (jsonb_populate_record(null::queue_service.finished_runs, '{}')).*"
    with pytest.raises(pg.CheckViolation) as raised:
        await conn.execute(
            row.format(
                "finished_runs_default",
                '{"id": 1, "finished_at": "2020-01-01T12:00Z", "run_at": "2020-01-01Z", "created_at": "2020-01-01Z",'
                '"attempt": 1, "failures": 0, "losses": 0, "priority": 0, "state": "failed", "queue": "q", "task": "t",'
                '"payload": {}}',
            ).encode()
        )
    assert may_repeat(raised.value)
    for other in (
        "insert into queue_service.runs (queue, task, payload) values ('q', 't', '[]')",
        "do $$begin raise exception 'partition constraint' using errcode = 'check_violation'; end$$",
    ):
        with pytest.raises(pg.CheckViolation) as refused:
            await conn.execute(other.encode())
        assert not may_repeat(refused.value)
