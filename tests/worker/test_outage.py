"""A running worker survives every outage of the database; one that cannot start says why."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter

import pytest

from queue_service import App, Retry, RunState, Worker
from queue_service.db import revision
from queue_service.db.cluster import Cluster
from queue_service.db.execute import Connection
from queue_service.db.session import connect
from queue_service.errors import DatabaseUnavailable, SchemaMismatch
from queue_service.settings import Settings, load
from tests.support import eventually, one, rows, working

TERMINATED = (
    "select count(*) from (select pg_terminate_backend(pid) from pg_stat_activity "
    "where datname = current_database() and pid <> pg_backend_pid() and application_name like 'queue_service%') as ended"
)


def quick() -> Settings:
    paces = {"LEASE": "2s", "POLL_INTERVAL": "100ms", "SWEEP_INTERVAL": "100ms"}
    return load({f"QUEUE_SERVICE_{name}": value for name, value in paces.items()})


async def insert(conn: Connection, count: int) -> None:
    await conn.execute(
        "insert into queue_service.runs (queue, task, payload) "
        "select 'default', 'note', jsonb_build_object('n', n) from generate_series(1, %s) as n",
        [count],
    )


async def assert_each_finished_once(conn: Connection, count: int) -> None:
    finished = "select count(*), count(distinct id), count(*) filter (where state = 'succeeded') from queue_service.finished_runs"
    assert await rows(conn, finished) == [(count, count, count)]
    assert await one(conn, "select count(*) from queue_service.runs") == 0
    await eventually(lambda: one(conn, "select count(*) = 0 from queue_service.leases"), within=20)


async def test_terminated_connections_under_load_cost_nothing(app: App, conn: Connection) -> None:
    executed: Counter[int] = Counter()

    @app.task(retry=Retry(max_attempts=1))
    async def note(n: int) -> int:
        await asyncio.sleep(0.001)  # the handler's work
        executed[n] += 1
        return n

    await insert(conn, 3_000)
    terminated = []
    async with working(app, {"default": 10}) as worker:
        for round_ in range(1, 9):
            await eventually(lambda: len(executed) >= 250 * round_, within=40)  # noqa: B023
            terminated.append(await one(conn, TERMINATED))
        await eventually(lambda: one(conn, "select count(*) = 3000 from queue_service.finished_runs"), within=60)
        await assert_each_finished_once(conn, 3_000)
        assert worker.tally.failed == 0
    print(f"terminated {terminated}, executed {sum(executed.values())} times")  # noqa: T201
    assert sum(terminated) >= 20
    assert len(executed) == 3_000
    losses = await one(conn, "select sum(losses) from queue_service.finished_runs")
    assert sum(executed.values()) <= 3_000 + losses


async def test_a_worker_survives_a_restart_of_the_server(own_cluster: Cluster) -> None:
    executed: Counter[int] = Counter()
    app = App(own_cluster.conninfo, settings=quick())
    waiting, release = asyncio.Event(), asyncio.Event()

    @app.task(retry=Retry(max_attempts=1))
    async def note(n: int) -> int:
        executed[n] += 1
        if n == 400:
            waiting.set()
            await release.wait()
        await asyncio.sleep(0.001)  # the handler's work
        return n

    async with app, working(app, {"default": 5}) as worker:
        conn = await connect(own_cluster.conninfo)
        await insert(conn, 800)
        await asyncio.wait_for(waiting.wait(), 20)
        assert await asyncio.to_thread(own_cluster.stop)
        # It ends while there is no database; its ending is written when there is one again.
        release.set()
        with pytest.raises(DatabaseUnavailable):
            await connect(own_cluster.conninfo)
        await asyncio.to_thread(own_cluster.start)
        await conn.close()
        conn = await connect(own_cluster.conninfo)
        try:
            await eventually(lambda: one(conn, "select count(*) = 800 from queue_service.finished_runs"), within=60)
            await assert_each_finished_once(conn, 800)
            assert worker.tally.failed == 0
            assert len(executed) == 800
            assert await one(conn, "select count(*) from queue_service.workers") == 1
            # Notices are heard again, and the App's own connections work again.
            run = await app.wait(await app.enqueue("note", {"n": 0}), timeout=20)
            assert run.result == 0
        finally:
            await conn.close()


async def test_a_worker_may_be_stopped_while_the_server_is_down(own_cluster: Cluster) -> None:
    app = App(own_cluster.conninfo, settings=quick())

    @app.task
    async def noop() -> None: ...

    async with app:
        worker = Worker(app)
        running = asyncio.create_task(worker.run())
        await app.wait(await app.enqueue("noop", {}), timeout=20)
        await eventually(lambda: worker.tally.succeeded == 1)
        await asyncio.to_thread(own_cluster.stop)
        worker.stop()
        tally = await asyncio.wait_for(running, 50)
    assert tally.succeeded == 1


async def test_waiting_for_a_run_survives_lost_connections(app: App, conn: Connection) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    @app.task
    async def wait() -> str:
        started.set()
        await release.wait()
        return "done"

    async with working(app):
        run_id = await app.enqueue("wait", {})
        waiter = asyncio.create_task(app.wait(run_id, timeout=30))
        await asyncio.wait_for(started.wait(), 10)
        for _ in range(3):
            await conn.execute(TERMINATED)
        release.set()
        run = await waiter
    assert (run.state, run.result) == (RunState.SUCCEEDED, "done")


# Not even started


async def test_a_worker_without_a_schema_says_how_to_get_one(empty_database: str) -> None:
    with pytest.raises(SchemaMismatch, match="queue-service db migrate") as caught:
        await Worker(App(empty_database)).run()
    assert (caught.value.have, caught.value.want) == (None, revision.OLDEST)


@pytest.mark.parametrize(("revision", "fix"), [("0000", "db migrate"), ("9999", "install the version")])
async def test_a_worker_refuses_a_schema_of_another_revision(
    database: str, conn: Connection, revision: str, fix: str
) -> None:
    await conn.execute(
        "update queue_service.alembic_version set version_num = %s, oldest_code = %s", [revision, min(revision, "9998")]
    )
    with pytest.raises(SchemaMismatch, match=fix):
        await Worker(App(database)).run()
    code, errors = _command(database, "worker", "-a", "tests.worker.tasks_for_tests:app")
    assert code == 4
    assert fix in errors
    assert "Traceback" not in errors


async def test_the_command_line_without_a_schema_exits_with_four_and_the_fix(empty_database: str) -> None:
    code, errors = _command(empty_database, "worker", "-a", "tests.worker.tasks_for_tests:app")
    assert code == 4
    assert "queue-service db migrate" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("where", ["postgresql://127.0.0.1:1/nowhere", "host=/nonexistent dbname=nowhere"])
async def test_a_server_out_of_reach_is_explained_and_exits_with_three(where: str) -> None:
    with pytest.raises(DatabaseUnavailable):
        await Worker(App(where)).run()
    code, errors = _command(where, "worker", "-a", "tests.worker.tasks_for_tests:app")
    assert code == 3
    assert "cannot be reached" in errors
    assert "Traceback" not in errors


async def test_a_wrong_password_is_not_shown(server: str) -> None:
    code, errors = _command(
        "postgresql://me:secretive@127.0.0.1:1/nowhere", "worker", "-a", "tests.worker.tasks_for_tests:app"
    )
    assert code == 3
    assert "secretive" not in errors


def _command(database: str, *arguments: str) -> tuple[int, str]:
    finished = subprocess.run(
        [sys.executable, "-m", "queue_service", *arguments],
        env={**os.environ, "QUEUE_SERVICE_DATABASE_URL": database},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return finished.returncode, finished.stderr
