"""How many connections a worker holds, and what it does where there are none."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from queue_service import App, Worker
from queue_service.db.execute import Connection
from queue_service.settings import load
from tests.support import eventually, one
from tests.worker.worker_process import WorkerProcess

OTHERS = "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
ROLE_S = "from pg_stat_activity where usename = %s"


@pytest.fixture
async def limited(database: str, server: str, conn: Connection) -> AsyncIterator[tuple[str, str]]:
    """A role, and the address of the database for it; how many connections it may have, the test says."""
    role = f"limited_{await one(conn, 'select current_database()')}"
    async with await psycopg.AsyncConnection.connect(server, autocommit=True) as admin:
        # A superuser has no limit; what it owns can be used by those who are members of it.
        owner = await one(conn, "select current_user")
        await admin.execute(f'create role "{role}" login in role "{owner}"'.encode())
        yield role, make_conninfo(database, user=role)
        await admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", [role])
        await eventually(lambda: one(conn, f"select count(*) = 0 {ROLE_S}", role))
        await conn.execute(f'reassign owned by "{role}" to "{owner}"'.encode())
        await admin.execute(f'drop role "{role}"'.encode())


async def limit(conn: Connection, role: str, connections: int) -> None:
    await conn.execute(f'alter role "{role}" connection limit {connections}'.encode())


async def test_a_worker_waits_for_a_server_that_has_no_connection_left(
    limited: tuple[str, str], conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    role, database = limited
    app = App(database, settings=load({"QUEUE_SERVICE_POLL_INTERVAL": "100ms", "QUEUE_SERVICE_LEASE": "3s"}))

    @app.task
    async def noop() -> str:
        return "done"

    async def works() -> None:
        async with App(make_conninfo(database, user=await one(conn, "select current_user"))) as asking:
            run = await asking.wait(await asking.enqueue("noop", {}), timeout=30)
            assert run.result == "done"

    await limit(conn, role, 0)
    worker = Worker(app)
    running = asyncio.create_task(worker.run())
    await eventually(lambda: "no connection left" in caplog.text)
    assert not running.done()
    await limit(conn, role, 3)
    await works()
    # And what it has is lost, and there is none for a while.
    await limit(conn, role, 0)
    await conn.execute("select pg_terminate_backend(pid) " + ROLE_S, [role])
    await eventually(lambda: one(conn, f"select count(*) = 0 {ROLE_S}", role))
    assert worker._parts is not None
    services = worker._parts.services
    await eventually(lambda: "trying until it works" in caplog.text)
    await limit(conn, role, 3)
    await works()
    await eventually(lambda: all(each.condition.is_well for each in [*services, *app.opened.services]))
    worker.stop()
    assert (await running).succeeded == 2


async def test_a_worker_that_waits_for_a_connection_can_be_stopped(limited: tuple[str, str], conn: Connection) -> None:
    role, database = limited
    await limit(conn, role, 0)
    process = WorkerProcess(database)
    try:
        await eventually(
            lambda: process.events("the server has no connection left for this worker; waiting for one"), within=30
        )
        process.signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.process.wait, 20) == 0
    finally:
        process.end()


async def test_an_idle_worker_holds_three_connections_whatever_it_did_before(database: str, conn: Connection) -> None:
    # At the default pace: where all services ask several times a second, they need more at once.
    paces = ["--lease", "30s", "--poll-interval", "1s", "--sweep-interval", "5s"]
    workers = [WorkerProcess(database, *paces) for _ in range(3)]
    try:
        for each in workers:
            await each.started()
        async with App(database) as app:
            runs = await app.enqueue_many("double", [{"n": n} for n in range(500)])
            runs += [await app.enqueue("ask_around", {}) for _ in range(30)]
            for run_id in runs:
                run = await app.wait(run_id, timeout=60)
                assert run.state == "succeeded", run
        held = (
            f"select array_agg(application_name order by application_name) {OTHERS} and backend_type = 'client backend'"
        )
        wanted = 3 * ["queue_service"] + 3 * ["queue_service keeper"] + 3 * ["queue_service listener"]
        seen: list[str] = []

        async def is_as_wanted() -> bool:
            seen[:] = await one(conn, held)
            return seen == wanted

        with contextlib.suppress(AssertionError):
            await eventually(is_as_wanted, within=30)
        assert seen == wanted
    finally:
        for each in workers:
            each.end()
