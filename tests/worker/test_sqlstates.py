"""Whatever the database answers to what a worker writes, the worker lives, says so, and goes on once it has an end."""

from __future__ import annotations

import asyncio
import re

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from queue_service import App, RunState, Worker
from queue_service.db.execute import Connection
from queue_service.errors import QueueServiceError
from queue_service.settings import load
from tests.support import eventually, one, working

# Time limits, shutdowns and crashes, connections, a standby, room and memory, prepared statements, locks, damage, encodings,
# rights, passwords, conflicts, what is missing, and what has no class at all.
STATES = [
    "25P03", "25P04", "57P05", "57014", "57P01", "57P03", "57P04", "08006", "08P01", "25006", "40001", "40P01", "53100",
    "53200", "53300", "26000", "42P05", "55P03", "58000", "XX000", "XX001", "22021", "54000", "42501", "28P01", "3D000",
    "23505", "42P01", "42601", "0A000", "P0001", "QS001",
]  # fmt: skip
VALUES = {"22021", "54000"}

# Statements of these tables are refused while there is a state in `raised`.
REFUSING = """
create table public.raised (state text not null);
create function public.refuse() returns trigger language plpgsql as $$
declare
    state_raised text := (select state from public.raised);
begin
    if state_raised is not null then
        raise exception 'on purpose' using errcode = state_raised;
    end if;
    return null;
end
$$;
"""
SAYS = re.compile("on purpose|has held what this needs|schema queue_service is")
TABLES = ("runs", "finished_runs", "leases", "turn_markers", "workers")


async def refuse(conn: Connection, state: str | None) -> None:
    await conn.execute("delete from public.raised")
    if state is not None:
        await conn.execute("insert into public.raised values (%s)", [state])


def failing(worker: Worker) -> dict[str, str | None]:
    parts = worker._parts
    assert parts is not None
    return {service.name: service.why for service in parts.services if not service.condition.is_well}


@pytest.fixture
async def conn(conn: Connection) -> Connection:
    await conn.execute(REFUSING)
    for table in TABLES:
        await conn.execute(
            f"create trigger refuse after insert or update or delete on queue_service.{table} "
            "for each statement execute function public.refuse()".encode()
        )
    return conn


async def stored_unseen(conn: Connection, task: str) -> int:
    """The id of a run that was stored past the triggers."""
    await conn.execute("set session_replication_role = replica")
    run_id = await one(
        conn, "insert into queue_service.runs (queue, task, payload) values ('default', %s, '{}') returning id", task
    )
    await conn.execute("set session_replication_role = origin")
    assert isinstance(run_id, int)
    return run_id


@pytest.mark.parametrize("states", [STATES[::2], STATES[1::2]], ids=["", "others"])
async def test_a_worker_lives_through_every_answer(app: App, conn: Connection, states: list[str]) -> None:
    ends, begun = asyncio.Event(), asyncio.Event()

    @app.task()
    async def held() -> None:
        begun.set()
        await ends.wait()

    @app.task()
    async def quick() -> None: ...

    async with working(app, {"default": 10}) as worker:
        for state in states:
            begun.clear()
            ends.clear()
            run_ids = [await app.enqueue("held", {})]
            await begun.wait()
            ended = asyncio.create_task(app.wait(run_ids[0]))
            await refuse(conn, state)
            ends.set()
            run_ids.append(await stored_unseen(conn, "quick"))
            with pytest.raises((QueueServiceError, psycopg.Error), match=SAYS):
                await app.enqueue("quick", {})
            await eventually(lambda: "claimer" in failing(worker))
            assert SAYS.search(failing(worker)["claimer"] or ""), state
            assert not ended.done(), state
            await refuse(conn, None)
            await eventually(lambda: not failing(worker))
            run_ids.append(await app.enqueue("quick", {}))
            for run in await app.wait_many(run_ids, timeout=20):
                # What cannot be stored is said to be the result.
                assert run.state is RunState.SUCCEEDED or state in VALUES, (state, run)
            await ended


async def test_a_worker_that_cannot_strike_its_name_out_has_worked_all_the_same(app: App, conn: Connection) -> None:
    @app.task()
    async def quick() -> None: ...

    await app.enqueue("quick", {})
    await conn.execute(
        "create trigger stay before delete on queue_service.workers for each statement execute function public.refuse()"
    )
    for table in TABLES:
        await conn.execute(f"drop trigger refuse on queue_service.{table}".encode())
    await refuse(conn, "P0001")
    tally = await Worker(app, {"default": 10}).run(once=True)
    assert tally.succeeded == 1


async def test_a_time_for_transactions_that_is_over_ends_no_worker(database: str, conn: Connection) -> None:
    """As behind a pooler, where none of our settings is in force: a claim waits for a lock, and is ended for it."""
    if conn.info.server_version < 170000:
        pytest.skip("Postgres 17 has it")
    name = str(conninfo_to_dict(database)["dbname"])
    await conn.execute(f"alter database \"{name}\" set transaction_timeout = '300ms'".encode())
    app = App(database, settings=load({"QUEUE_SERVICE_POOLER": "transaction", "QUEUE_SERVICE_POLL_INTERVAL": "100ms"}))

    @app.task()
    async def quick() -> None: ...

    async with app, working(app, {"default": 10}) as worker:
        async with conn.transaction():
            await conn.execute("lock table queue_service.runs in access exclusive mode")
            await eventually(lambda: "took too long" in (failing(worker).get("claimer") or ""))
        run_id = await app.enqueue("quick", {})
        assert (await app.wait(run_id, timeout=20)).state is RunState.SUCCEEDED
        await eventually(lambda: not failing(worker))
