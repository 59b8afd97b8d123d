from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from queue_service import App, Run, RunState, Worker, __version__
from queue_service.db.execute import Connection, fetch
from queue_service.errors import ConfigError
from queue_service.runs import queries, settling
from queue_service.runs.model import Ending
from queue_service.services.pruner import Pruner
from tests.support import blocked, claimed, enqueued, eventually, one, rows, working


async def test_a_run_is_executed_and_its_result_is_read(app: App) -> None:
    @app.task
    async def double(n: int) -> int:
        return 2 * n

    run_id = await app.enqueue("double", {"n": 21})
    async with working(app):
        done = await app.wait(run_id, timeout=10)
    assert (done.state, done.result, done.attempt) == (RunState.SUCCEEDED, 42, 1)


async def test_a_thousand_runs_are_each_executed_once(app: App, conn: Connection) -> None:
    executed: list[int] = []

    @app.task
    async def note(n: int) -> None:
        executed.append(n)
        if n % 3 == 0:
            await asyncio.sleep(0)

    await app.enqueue_many("note", [{"n": n} for n in range(1_000)])
    tally = await Worker(app, {"default": 20}).run(once=True)
    assert sorted(executed) == list(range(1_000))
    assert (tally.succeeded, tally.failed, tally.returned, tally.lost) == (1_000, 0, 0, 0)
    assert await one(conn, "select count(*) from queue_service.finished_runs where state = 'succeeded'") == 1_000
    assert await one(conn, "select count(*) from queue_service.runs") == 0
    assert await one(conn, "select count(*) from queue_service.leases") == 0


async def test_once_ends_on_an_empty_queue(app: App) -> None:
    tally = await asyncio.wait_for(Worker(app).run(once=True), 20)
    assert tally.succeeded == 0


async def test_once_works_off_what_the_handlers_enqueue(app: App) -> None:
    depths: list[int] = []

    @app.task
    async def descend(depth: int) -> None:
        depths.append(depth)
        if depth:
            await app.enqueue("descend", {"depth": depth - 1})

    await app.enqueue("descend", {"depth": 5})
    await Worker(app).run(once=True)
    assert depths == [5, 4, 3, 2, 1, 0]


async def test_once_leaves_runs_that_are_due_later(app: App) -> None:
    @app.task
    async def noop() -> None: ...

    later = await app.enqueue("noop", {}, delay=3_600)
    now = await app.enqueue("noop", {})
    tally = await Worker(app).run(once=True)
    assert tally.succeeded == 1
    assert (await app.wait(now, timeout=5)).state is RunState.SUCCEEDED
    waiting = await app.get(later)
    assert waiting is not None
    assert waiting.state is RunState.QUEUED


async def test_a_worker_is_in_the_roster_while_it_runs(app: App, conn: Connection) -> None:
    async with working(app, {"a": 1, "b": 2}, name="here") as worker:
        listed = await rows(conn, "select id, name, version, queues from queue_service.workers")
        assert listed == [(worker.id, "here", __version__, {"a": 1, "b": 2})]
    assert await rows(conn, "select id from queue_service.workers") == []


async def test_a_worker_says_that_it_is_alive(app: App, conn: Connection) -> None:
    async with working(app):
        await conn.execute("update queue_service.workers set seen_at = seen_at - interval '1 h'")
        await eventually(
            lambda: one(conn, "select seen_at > clock_timestamp() - interval '1 minute' from queue_service.workers")
        )


async def test_one_worker_object_runs_once_at_a_time_and_may_run_again(app: App) -> None:
    async with working(app) as worker:
        with pytest.raises(ConfigError, match="running already"):
            await worker.run()
    tally = await worker.run(once=True)
    assert tally.succeeded == 0


@pytest.mark.direct("its connections to the server are the pooler's")
async def test_a_worker_keeps_no_connection_after_it_stopped(
    app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("queue_service.db.listener.LINGER", 0.1)
    of_the_app = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    await eventually(lambda: one(conn, f"select ({of_the_app}) = 1"))
    async with working(app):
        await eventually(lambda: one(conn, f"select ({of_the_app} and application_name ~ 'keeper|listener') = 2"))
    await eventually(lambda: one(conn, f"select ({of_the_app}) = 1"))


async def test_a_finished_run_is_seen_at_the_moment_its_partition_is_attached(
    app: App, session: Callable[[], Awaitable[Connection]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that starts moves what has ended today into a partition of its own. Whoever looks meanwhile must wait for
    it at a place where what comes out is what there is then."""

    @app.task
    async def noop() -> None: ...

    monkeypatch.setattr("queue_service.services.partitions.LOCK_WAIT", 60)
    holder, reader, waiter, witness = [await session() for _ in range(4)]
    run_id = await enqueued(witness)
    ((claimed_run, _),) = await claimed(witness)
    await fetch(witness, settling.finish([Ending(claimed_run.claim, RunState.SUCCEEDED)], worker_id=1))
    async with holder.transaction():
        await holder.execute("select from queue_service.finished_runs_default")
        pruning = asyncio.create_task(Pruner(app.pool, retention=timedelta(days=14)).once())
        await eventually(
            lambda: one(
                witness,
                "select count(*) > 0 from pg_locks join pg_database on pg_database.oid = database "
                "where datname = current_database() and not granted",
            )
        )
        looks = [
            asyncio.create_task(fetch(reader, queries.get(run_id))),
            asyncio.create_task(fetch(waiter, queries.endings([run_id]))),
        ]
        for waits in (reader, waiter):
            await eventually(lambda: blocked(witness, waits))  # noqa: B023
    assert (await pruning).made
    found, endings = [await look for look in looks]
    assert isinstance(found, Run)
    assert endings == {run_id: RunState.SUCCEEDED}


@pytest.mark.parametrize(
    "queues", [{"": 1}, {"a": 0}, {"a": -1}, {"a": 1.5}, {"a": True}, {"a": "3"}, {"a": 10**6}, {None: 1}]
)
async def test_queues_that_make_no_sense_are_refused(app: App, queues: dict[Any, Any]) -> None:
    with pytest.raises(ConfigError):
        Worker(app, queues)
